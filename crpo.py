"""CLAP-ranked preference optimisation: generate, rank, pair, optimise, and again with the new model (paper 2.5).

    python crpo.py                                       # the bundled base model, 5 iterations, on a CPU
    python crpo.py --iterations 1 --prompts 64 --evaluate 64 --out runs/quick            # a few minutes of it
    python crpo.py --offline --out runs/offline          # the base's pairs in all iterations (paper Fig. 2)
    python crpo.py --offline --fm_weight 0 --out runs/dpo        # L_DPO-FM alone on them (paper 4.5)
    python crpo.py --pairs audio_alpaca.json --checkpoint declare-lab/TangoFlux          # a static set (paper 4.3)
    python crpo.py --checkpoint runs/experts/round_1 --score_head v2 --score 1.5 --guidance_scale 1.5 --iterations 1 \\
        --out runs/hybrid
                                                         # stage 3 of the second paper: v1 weights as v2, then CRPO

Each iteration is a folder: prompts.jsonl, candidates.safetensors, scores.jsonl, pairs.jsonl, pairs.safetensors, the
model folder, state.pt, log.jsonl, report.json, heard.safetensors. Every stage leaves its file and is skipped where it
is found: a killed run goes on and ends with the same pairs and weights. Clip i of iteration k is made from (seed_k, i),
as scores.jsonl says, by the policy of iteration k - 1: sample.py --checkpoint POLICY --prompt PROMPT --duration SECONDS
--steps 10 --seed seed_k --first_index i makes it again.

Where paper and official code differ, we do this:
  - beta multiplies 0.5 times MEANS over (L, C), as the code (the paper's Eq. 2 has sums and no 0.5; its beta is not
    given): --reduction sum --half 1 is Eq. 2;
  - t is logit-normal, as the code (--t_distribution uniform is Eq. 2), here nearer to noise as in the training of the
    base (the code: --t_mean 0); winner and loser share noise and t, as the code (Eq. 2 does not say;
    --no-shared_noise);
  - sampled latents are trained on directly (the code goes through wav files and the VAE: --reencode);
  - every iteration, prompt and clip has noise of its own (the code: the same N noises for all of them, always);
  - all of the flow is trained, the duration embedder too (the official optimizer forgets it); t is continuous (the
    code: 1000 values); gradients are clipped (--clip 0: not); T5 runs without dropout, from text encoded once;
  - fine-tuning keeps condition dropout (the code: --dropout 0); the rate decays to 0, as the code (A.5 names a warm-up
    only: --no-decay); weights are averaged and the average is carried on (the paper: the last ones, --carry raw).

A model with a score head makes its candidates at --score, and learns from their pairs under the same score, which
--score_dropout of the rows lose (second paper, III-D d: Eq. 1 is this loss; Delta is the negated difference of errors).

Letters: M prompts, N clips of each, B pairs, L latent frames, C latent channels, S text tokens, D text width.
"""
import argparse
import contextlib
import functools
import html
import io
import json
import math
import os
import shlex
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import alignment
from audio import write_wav
from cache import module_hash
from common import (UserError, append_jsonl, atomic_path, check_writable, choose_device, file_hash, generator, in_range,
                    load_tensors, parse_arguments, read_json, read_jsonl, run_main, side_by_side, warn, write_json)
from evaluate import as_clips, markdown, render
from model import (SCORE_HEADS, concat_conditions, load_model, model_folder, null_score, resolve, save_model,
                   with_score_head)
from preferences import (draw_prompts, make_candidates, prompt_pool, score_candidates, static_pairs,
                         write_pairs)
from reward import JUDGE, REWARD, read_pairs
from sample import BASE, add_sampling_flags, check_sampling_flags, decode, generate, open_model
from text import MAX_TOKENS
from train_fm import Batch, epoch_order, interpolate, logit_normal_t, text_condition
from training import (average_decay, choose_dtype, copy_weights, draw_log, linear_decay, load_state,
                      make_optimizer, save_state, set_rate, trainable, trim_log, update_average)
from world import World

HELD_OUT = 50000        # first validation scene whose prompt is used here: none that chose thresholds or base


# ============================================================================= the algorithm


def pair_errors(velocity, target, reduction="mean"):
    """Squared errors of velocities (B, L, C) per example (B,): mean over (L, C) (official), or sum (Eq. 2)."""
    error = (velocity.float() - target.float()) ** 2
    return error.mean((1, 2)) if reduction == "mean" else error.sum((1, 2))


def dpo_fm_loss(winner, loser, reference_winner, reference_loser, beta=2000.0, half=0.5):
    """L_DPO-FM (Eq. 2) of four errors per pair (B,) -> (loss, {"accuracy", "margin", ...} as floats).

    inside = -half * beta * ((winner - loser) - (reference winner - reference loser)); half = 0.5 as the official
    code, 1 as Eq. 2. At policy = reference the loss is log 2. accuracy: share of pairs with inside > 0.
    """
    inside = -half * beta * ((winner - loser) - (reference_winner - reference_loser))      # (B,)
    loss = -F.logsigmoid(inside).mean()                                                    # Eq. 2
    parts = {"accuracy": (inside > 0).float().mean(), "margin": inside.mean(), "dpo": loss, "winner": winner.mean(),
             "loser": loser.mean(), "reference_winner": reference_winner.mean(),
             "reference_loser": reference_loser.mean()}
    return loss, {name: value.detach().item() for name, value in parts.items()}


def crpo_loss(winner, loser, reference_winner, reference_loser, beta=2000.0, half=0.5, fm_weight=1.0):
    """L_CRPO = L_DPO-FM + L_FM (Eq. 3); L_FM is the winners' mean error (Eq. 5), `fm_weight` 1 in the paper."""
    loss, parts = dpo_fm_loss(winner, loser, reference_winner, reference_loser, beta, half)
    return loss + fm_weight * winner.mean(), parts


def four_errors(flow, reference, condition, x1, x0, t, reduction="mean"):
    """Errors of policy and (frozen) reference on winners and losers: four (B,).

    x1, x0 (2B, L, C), t (2B,), winners first.
    """
    both = concat_conditions(condition, condition)                                         # 2B rows
    xt, target = interpolate(x1, x0, t)
    winner, loser = pair_errors(flow.velocity(xt, t, both), target, reduction).chunk(2)
    # not under no_grad, which takes another kernel of attention: in bfloat16 equal weights would differ
    reference_winner, reference_loser = pair_errors(reference.velocity(xt, t, both), target, reduction).chunk(2)
    return winner, loser, reference_winner.detach(), reference_loser.detach()


def draw_pairs(pairs, positions, args, seed, device):
    """Examples `positions` of endless shuffled epochs over the pairs -> (Batch, x1, x0, t), the last three (2B, ...).

    Each depends on (seed, position) alone. The Batch holds the conditions of the B pairs.
    """
    n, shape, chosen, draws = len(pairs["duration"]), pairs["winner_mean"].shape[1:], [], []
    for position in positions:
        rng = generator(seed, "pair", position)
        chosen.append(epoch_order(seed, position // n, n)[position % n])
        x0 = torch.randn(2, *shape, generator=rng)
        t = (torch.rand(1, generator=rng) if args.t_distribution == "uniform" else
             logit_normal_t(1, rng, args.t_mean, 1.0))
        draws.append((torch.stack([x0[0], x0[0]]) if args.shared_noise else x0, t[0],
                      torch.rand((), generator=rng) < args.dropout, torch.randn(2, *shape, generator=rng),
                      torch.rand((), generator=rng) < args.score_dropout))
    x0, t, dropped, eps, unscored = (torch.stack(column) for column in zip(*draws))
    score = None
    if args.score is not None:
        score = torch.where(dropped | unscored, null_score(t), torch.full((len(t),), args.score)).to(device)
    rows = torch.as_tensor(np.array(chosen))
    x1 = [pairs[f"{which}_mean"][rows] + pairs[f"{which}_std"][rows] * eps[:, i]
          for i, which in enumerate(("winner", "loser"))]
    size = int(pairs["mask"][rows].sum(1).max())
    batch = Batch(None, None, None, None, *(value.to(device) for value in (
        pairs["hidden"][rows, :size], pairs["mask"][rows, :size], pairs["duration"][rows], dropped)), score)
    return batch, torch.cat(x1).to(device), torch.cat([x0[:, 0], x0[:, 1]]).to(device), torch.cat([t, t]).to(device)


@torch.inference_mode()
def with_conditions(rows, tensors, model, batch_size=64):
    """The training data of an iteration: latents normalised, text encoded once -> {name: tensor} on the CPU."""
    codec, text = model.codec, model.text
    device, size = next(model.flow.parameters()).device, 0
    pieces = []
    for start in range(0, len(rows), batch_size):
        ids, mask = text.tokenize([row["prompt"] for row in rows[start:start + batch_size]], MAX_TOKENS)
        pieces.append((text.encode(ids, mask).cpu(), mask.cpu()))
        size = max(size, mask.shape[1])
    hidden = torch.cat([F.pad(h, (0, 0, 0, size - h.shape[1])) for h, _ in pieces])        # (P, S, D)
    mask = torch.cat([F.pad(m, (0, size - m.shape[1])) for _, m in pieces])                # (P, S)
    pairs = {"hidden": hidden, "mask": mask, "duration": torch.tensor([float(row["duration"]) for row in rows])}
    for which in ("winner", "loser"):
        mean = codec.normalise(tensors[f"{which}_mean"].to(device)).cpu()
        std = tensors.get(f"{which}_std", torch.zeros_like(mean))        # sampled latents have none
        pairs |= {f"{which}_mean": mean, f"{which}_std": std / codec.latent_std.cpu()}
    return pairs                                       # draw_pairs indexes, which copies out of inference mode


# ============================================================================= optimisation

def policy_model(args, name, device, parts=("flow", "codec", "text"), quiet=False):
    """load_model, with the flow's score head run as --score_head says (v1 and v2 take each other's weights)."""
    model = load_model(name, device, parts=parts)
    head = model.flow.config.get("score_head")
    if args.score is not None and not head:
        raise UserError(f"--score needs a model with a score head, and {name} has none: python train_fm.py "
                        "--score_column makes one")
    if args.score_head and head != args.score_head:
        if not head:
            raise UserError(f"--score_head {args.score_head}: {name} has no score head to run so")
        with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
            model.flow = with_score_head(model.flow, args.score_head)[0]
    return model


def loss_and_gradients(args, networks, named, pairs, positions, seed, device, autocast):
    """L_CRPO of the pairs at `positions` of the stream (see draw_pairs); -> {"loss", "accuracy", ...} as floats.

    networks: (policy, reference, text encoder). Its gradients go into the .grad of `named`; with `named` None the loss
    is all. The loss is a mean over pairs, so it is the sum of what pieces of --micro_batch pairs contribute: memory is
    that of a piece, and on a CPU pieces run side by side, one on each core.
    """
    flow, reference, encoder = networks

    def piece(places):
        batch, x1, x0, t = draw_pairs(pairs, places, args, seed, device)
        with torch.set_grad_enabled(named is not None), autocast():
            condition = text_condition(encoder, batch, "empty_prompt")
            errors = four_errors(flow, reference, condition, x1, x0, t, args.reduction)         # four (B,)
            loss, _ = crpo_loss(*errors, args.beta, args.half, args.fm_weight)
            loss = loss * (len(places) / len(positions))
            return torch.stack(errors).detach(), torch.autograd.grad(loss, list(named.values())) if named else []
    pieces = [positions[i:i + args.micro_batch] for i in range(0, len(positions), args.micro_batch)]
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    errors, total = [], []
    for first in range(0, len(pieces), cores):                     # summed in order: the same on any number of cores
        for part, gradients in side_by_side(piece, pieces[first:first + cores], device):
            errors.append(part)
            total = torch._foreach_add(total, gradients) if total else gradients
    for parameter, gradient in zip((named or {}).values(), total):
        parameter.grad = gradient
    loss, parts = crpo_loss(*torch.cat(errors, dim=1), args.beta, args.half, args.fm_weight)
    return {"loss": loss.item(), **parts}


def optimise(args, folder, policy, rows, tensors, seed, device, autocast):
    """One iteration's training: `policy` (a model folder) becomes the model in `folder`; -> its pair report.

    The reference is a copy of the policy as it came, and stays so. What step i draws follows from (seed, i).
    """
    model = policy_model(args, policy, device, quiet=True)
    reference = policy_model(args, policy, device, ("flow",), quiet=True).flow
    flow, networks = model.flow, (model.flow, reference, model.text)
    reference.requires_grad_(False)
    model.text.requires_grad_(False)
    named = trainable(flow)
    optimizer = make_optimizer(named, (args.beta1, args.beta2), args.weight_decay)
    average = {name: parameter.detach().clone() for name, parameter in named.items()}
    pairs = with_conditions(rows, tensors, model)
    steps = math.ceil(args.epochs * len(rows) / args.batch_size)
    warmup = min(args.warmup_steps, max(1, steps // 4))
    settings = {name: getattr(args, name) for name in TRAINED_WITH} | {
        "seed": seed, "steps": steps, "warmup": warmup, "policy": policy_hash(policy)}
    step, earlier = load_state(folder, named, optimizer, average, settings)
    trim_log(folder, step)
    began, logged = time.monotonic(), []

    def minutes():
        return earlier + (time.monotonic() - began) / 60
    flow.train()
    for step in tqdm(range(step, steps), desc="optimising", initial=step, total=steps, unit="step"):
        rate = linear_decay(step, args.learning_rate, warmup, steps, args.decay)
        set_rate(optimizer, rate)
        parts = loss_and_gradients(args, networks, named, pairs,
                                   range(step * args.batch_size, (step + 1) * args.batch_size), seed, device, autocast)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), args.clip or math.inf).item()
        if not math.isfinite(parts["loss"] + norm):
            raise UserError(f"step {step}: the loss is {parts['loss']:g}, its gradient norm {norm:g}; give a "
                            "lower --learning_rate or --beta, and another --out")
        optimizer.step()
        update_average(average, named, average_decay(step, args.ema))
        logged.append({**parts, "grad_norm": norm})
        done = step + 1
        if done == steps or done % args.log_every == 0:
            means = {name: float(np.mean([row[name] for row in logged])) for name in logged[0]}
            append_jsonl(folder / "log.jsonl", {"step": done, **means, "lr": rate, "minutes": minutes()})
            logged = []
        if done % args.save_every == 0 and done < steps:
            save_state(folder, named, optimizer, average, done, settings, minutes())
    save_state(folder, named, optimizer, average, steps, settings, minutes())
    if args.carry == "ema":
        copy_weights(named, average)
    flow.eval()                                     # losses over all pairs once, without dropout (paper Fig. 4)
    whole = argparse.Namespace(**{**vars(args), "dropout": 0.0, "score_dropout": 0.0})
    report = loss_and_gradients(whole, networks, None, pairs, range(len(rows)), f"report {args.seed}", device, autocast)
    save_model(folder, flow=flow, **other_parts(policy, folder, model), extra={"training": {**vars(args), **settings}})
    return report


def other_parts(policy, folder, model):
    """Keywords of save_model for codec and text: references to a local policy's, or the parts themselves."""
    if not Path(policy).is_dir():                                                # from the hub
        return {"codec": model.codec, "text": model.text}
    return {"references": {part: os.path.relpath(resolve(Path(policy), part).resolve(), Path(folder).resolve())
                           for part in ("vae", "text_encoder")}}


@functools.lru_cache(maxsize=8)
def policy_hash(folder):
    """What scores.jsonl calls a model: the hash of its flow's weights. UserError if `folder` holds none."""
    path = resolve(model_folder(folder), "flow") / "tangoflux.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} is no model folder ({path.name} is missing); of a run of crpo.py pass an "
                        "iteration_1, iteration_2, ...")
    return f"sha256:{file_hash(path)[:16]}"


# ============================================================================= evaluation and report


def warnings_of(rows):
    """One line for each known failure that the rows (base, iteration 1, ...) of the table show."""
    lines = []
    for before, now in zip(rows, rows[1:]):
        if "pairs" in now and now["pairs"]["accuracy"] > 0.95 and now["pairs"]["winner"] > 1.05 * now["pairs"][
                "reference_winner"]:
            lines.append(f"{now['name']}: the winners' loss rose by "
                         f"{100 * (now['pairs']['winner'] / now['pairs']['reference_winner'] - 1):.0f} % while the "
                         "implicit accuracy is near 1: the margin grows by making losers worse; raise --fm_weight or "
                         "lower --beta or --learning_rate")
        if now["reward"] > before["reward"] and now["judge"] < before["judge"]:
            lines.append(f"{now['name']}: the reward rose and the judge fell: the reward is being fooled; take an "
                         "earlier iteration, more prompts or fewer --epochs")
    return lines


def table_row(args, ears, name, path, folder, device):
    """A row of the table: what `ears` say of the model in `folder` on held-out prompts, the noise always the same.

    `path` keeps what was heard; a `folder` of None means the real scenes of the prompts.
    """
    world = World("val", pairs="all")
    scenes = [world.scene(HELD_OUT + i) for i in range(args.evaluate)]

    def real_clips():
        return render(world, [scene.index for scene in scenes])[0]

    def made_clips():
        model = policy_model(args, folder, device, quiet=True)
        durations = [scene.duration for scene in scenes]
        latents = generate(model, [scene.prompt for scene in scenes], durations, seed=args.evaluation_seed,
                           steps=args.steps, guidance_scale=args.guidance_scale, solver=args.solver,
                           batch_size=args.generation_batch, progress=True, score=args.score)
        return as_clips(model.codec, decode(model, latents, durations))
    real = alignment.heard(Path(args.out) / "real.safetensors", ears, real_clips, scenes)
    found = alignment.heard(path, ears, made_clips, scenes) if folder else real
    return {"name": name, **alignment.summary(found, real)}


def write_table(args, rows):
    """crpo.md and crpo.json: the paper's Table 3 in miniature, with the losses of Fig. 4."""
    heads = ["model", *alignment.HEADS, "winner", "loser", "accuracy", "margin"]
    table = [[row["name"], *alignment.cells(row), *([f"{row['pairs'][key]:.4f}" for key in ("winner", "loser")] + [
        f"{row['pairs']['accuracy']:.2f}", f"{row['pairs']['margin']:.2f}"] if "pairs" in row else ["-"] * 4)]
        for row in rows]
    text = "\n\n".join(["# CRPO", f"{args.evaluate} held-out prompts, fixed noise. winner, loser: losses on the "
                        "iteration's own pairs (Fig. 4).", markdown(heads, table), *warnings_of(rows[1:])]) + "\n"
    with atomic_path(Path(args.out) / "crpo.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(Path(args.out) / "crpo.json", rows)
    print(text)


def listening_page(args, folders, device, count=8):
    """listen.html: the same prompts from the same noise by every model, side by side."""
    out, world = Path(args.out), World("val", pairs="all")
    scenes = [world.scene(HELD_OUT + i) for i in range(min(count, args.evaluate))]
    lines = ["<!doctype html><meta charset=utf-8><title>CRPO</title><h1>CRPO: the same noise before and after</h1>",
             "<table border=1 cellpadding=6><tr><th>prompt" + "".join(f"<th>{name}" for name in folders)]
    for name, folder in folders.items():
        model = policy_model(args, folder, device, quiet=True)
        durations = [scene.duration for scene in scenes]
        latents = generate(model, [scene.prompt for scene in scenes], durations, args.evaluation_seed,
                           steps=args.steps, guidance_scale=args.guidance_scale, solver=args.solver, score=args.score)
        for i, audio in enumerate(decode(model, latents, durations)):
            write_wav(out / "listen" / f"{i:02d}_{name.replace(' ', '_')}.wav", audio, model.codec.sampling_rate)
    for i, scene in enumerate(scenes):
        lines.append(f"<tr><td>{html.escape(scene.prompt)}" + "".join(
            f'<td><audio controls src="listen/{i:02d}_{name.replace(" ", "_")}.wav"></audio>' for name in folders))
    with atomic_path(out / "listen.html") as temporary:
        temporary.write_text("\n".join([*lines, "</table>\n"]), encoding="utf-8")


def draw_pictures(args, rows):
    """iterations.png: reward, judge and exact scenes over the iterations; in each folder loss.png."""
    for k in range(1, len(rows) - 1):
        folder = Path(args.out) / f"iteration_{k}"
        curves = {name: lambda row, key=key: row.get(key) for name, key in (
            ("winner", "winner"), ("loser", "loser"), ("reference, winner", "reference_winner"),
            ("reference, loser", "reference_loser"))}
        if not draw_log(folder, [("errors", "linear", curves), ("preference loss", "linear",
                                                                {"dpo": lambda row: row.get("dpo")}),
                                 ("implicit accuracy", "linear", {"accuracy": lambda row: row.get("accuracy")})]):
            return
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, key in zip(figure.subplots(1, 4), ("reward", "judge", "exact", "frechet")):
        axis.plot(range(len(rows) - 1), [row[key] for row in rows[1:]], marker="o")
        axis.set(title=key, xlabel="iteration")
    with atomic_path(Path(args.out) / "iterations.png") as temporary:
        figure.savefig(temporary, dpi=100)


# ============================================================================= the loop


def run(args):
    """All iterations; returns the rows of the table: real scenes, base, iteration 1, ..."""
    out = Path(args.out)
    check_writable([out / "config.json"])
    device = choose_device(args.device)
    autocast = choose_dtype(args.dtype, device)
    ears = alignment.Ears(args.tagger, args.reward, args.judge, device)
    settings = {name: value for name, value in vars(args).items() if name not in FREE} | {
        "policy": policy_hash(args.checkpoint), "ears": [module_hash(network)[:16] for network in ears.networks()]}
    started = read_json(out / "config.json") if (out / "config.json").is_file() else settings
    for name in settings:
        if name != "iterations" and started.get(name) != json.loads(json.dumps(settings[name])):
            raise UserError(f"the run in {out} was started with {name} = {started.get(name)}, now it is "
                            f"{settings[name]}; give the same flags to go on, or another --out")
    policy, folders = args.checkpoint, {"base": args.checkpoint}
    flow = policy_model(args, policy, device, ("flow",)).flow
    if args.reward == str(REWARD) and open_model(policy)[2] == "oobleck":
        warn("the bundled CLAPs know the built-in world alone; the paper's are --reward laion/clap-htsat-unfused "
             "--judge laion/clap-htsat-fused")
    pool = prompt_pool(args, flow.config["max_duration"]) if not args.pairs else []
    if not args.pairs and len(pool) < args.prompts:
        raise UserError(f"--prompts {args.prompts} is more than the {len(pool)} prompts of the pool; "
                        "lower it, or give more")
    if args.pairs:
        read_pairs(args.pairs, args.audio_dir)
    write_json(out / "config.json", {"command": command_of(args), **settings})        # all that can be wrong is right
    print(f"effective beta: {args.beta * args.half:g} on {args.reduction}s over (L, C)")
    rows = [table_row(args, ears, "real scenes", None, None, device),
            table_row(args, ears, "base", out / "base.safetensors", args.checkpoint, device)]
    for k in range(1, args.iterations + 1):
        folder, began = out / f"iteration_{k}", time.monotonic()
        folder.mkdir(exist_ok=True)
        source = out / "iteration_1" if args.offline else folder          # offline: the first iteration's pairs
        if not (folder / "report.json").is_file():
            model = policy_model(args, policy, device, quiet=True)
            seed = args.seed * 1000 + k
            if (source / "pairs.safetensors").is_file():
                pair_rows, tensors = read_jsonl(source / "pairs.jsonl"), load_tensors(source / "pairs.safetensors")
            elif args.pairs:
                pair_rows, tensors = static_pairs(args, source, model)
            else:
                prompts = draw_prompts(args, source, k, pool)
                latents = make_candidates(args, source, seed, prompts, model)
                scores = score_candidates(args, source, seed, prompts, latents, model, ears.reward,
                                          policy_hash(policy))
                pair_rows, tensors = write_pairs(args, source, prompts, scores, latents, model)
            made = time.monotonic() - began
            report = optimise(args, folder, policy, pair_rows, tensors, seed, device, autocast)
            write_json(folder / "report.json", {**report, "pairs": len(pair_rows), "seconds_for_pairs": made,
                                                "seconds": time.monotonic() - began})
        row = table_row(args, ears, f"iteration {k}", folder / "heard.safetensors", folder, device)
        rows.append({**row, "pairs": read_json(folder / "report.json")})
        policy = str(folder)
        folders[f"iteration {k}"] = policy
        write_table(args, rows)
        for line in warnings_of(rows[-2:]):
            warn(line)
    listening_page(args, {name: folders[name] for name in dict.fromkeys(("base", "iteration 1", list(folders)[-1]))},
                   device)
    draw_pictures(args, rows)
    return rows


TRAINED_WITH = ("beta", "half", "reduction", "fm_weight", "shared_noise", "t_distribution", "t_mean", "dropout",
                "batch_size", "micro_batch", "epochs", "learning_rate", "decay", "beta1", "beta2", "weight_decay",
                "clip", "ema", "dtype", "score", "score_head", "score_dropout")
FREE = ("out", "device", "log_every", "save_every")        # another value goes on with the same run


def make_parser():
    """All flags of this script: toy defaults beside the paper's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(group, name, default, what, kind=None, **more):
        group.add_argument(name, default=default, type=kind or type(default),
                           help=what.replace("DEFAULT", "%(default)s"), **more)
    group = parser.add_argument_group("the loop (paper 2.5, 3.2)")
    flag(group, "--checkpoint", str(BASE), "model folder or hub id (default: checkpoints/toy/base)")
    flag(group, "--iterations", 5, "default: DEFAULT; paper: 5")
    flag(group, "--prompts", 256, "M, drawn anew from the pool in each iteration (default: DEFAULT; paper: 20000)")
    flag(group, "--num_samples", 5, "N, clips of each prompt (default: DEFAULT; paper: 5)")
    flag(group, "--pool", 20000, "training scenes whose prompts make the pool (default: DEFAULT; paper: 45k)")
    group.add_argument("--prompt_file", help="the pool instead: .txt or .jsonl (default: none; paper: AudioCaps)")
    group.add_argument("--offline", action="store_true", help="keep the first iteration's pairs (paper Fig. 2)")
    group.add_argument("--pairs", metavar="FILE", help="a static preference set instead: pairs.jsonl, or TangoFlux's "
                       "JSON with chosen and reject (paper 4.3); --iterations is then 1")
    group.add_argument("--audio_dir", help="where its sounds are (default: beside the file)")
    group.add_argument("--carry", choices=["ema", "raw"], default="ema",
                       help="weights that go on: averaged (default), or the last (paper)")
    group.add_argument("--reencode", action="store_true",
                       help="train on latents that went through audio and VAE (default: off; official code: so)")
    group = parser.add_argument_group("preference loss (Eq. 2, 3)")
    flag(group, "--beta", 2000.0, "default: DEFAULT, as the official code (paper: not given)")
    flag(group, "--half", 0.5, "factor on beta (default: DEFAULT, as the official code; Eq. 2: 1)")
    group.add_argument("--reduction", choices=["mean", "sum"], default="mean",
                       help="of squared errors over (L, C) (default: mean, as the official code; Eq. 2: sum, where the "
                            "same strength is a --beta L * C times smaller)")
    flag(group, "--fm_weight", 1.0, "of the flow-matching loss of winners (default: DEFAULT; paper: 1; 0: L_DPO-FM)")
    group.add_argument("--shared_noise", action=argparse.BooleanOptionalAction, default=True,
                       help="winner and loser share the noise; t they always share (default: shared, as official)")
    group.add_argument("--t_distribution", choices=["logit_normal", "uniform"], default="logit_normal",
                       help="of t (default: logit_normal, as the official code; Eq. 2: uniform)")
    flag(group, "--t_mean", 0.8, "of the logit-normal t (default: DEFAULT, as the base; official code: 0)")
    flag(group, "--dropout", 0.1, "share of pairs losing their text (default: DEFAULT; official: 0)")
    group = parser.add_argument_group("score (second paper, III-D d)")
    group.add_argument("--score", type=float, help="what a model with a score head is asked for, in candidates, pairs "
                       "and evaluation (default: nothing)")
    group.add_argument("--score_head", choices=list(SCORE_HEADS), help="run the model's head as this one: v1 and v2 "
                       "take each other's weights (default: as it is; second paper: v2 from v1)")
    flag(group, "--score_dropout", 0.1, "share of pairs losing their score (default: DEFAULT; second paper: 0.1)")
    group = parser.add_argument_group("optimizer (paper 3.1, A.5)")
    flag(group, "--epochs", 24, "over the pairs of an iteration (default: DEFAULT; paper: 8)")
    flag(group, "--batch_size", 48, "pairs (default: DEFAULT; paper: 48)")
    flag(group, "--micro_batch", 12, "pairs at a time, their gradients summed: bounds memory (default: DEFAULT)")
    flag(group, "--learning_rate", 1e-4, "peak (default: DEFAULT; paper: 1e-5)")
    flag(group, "--warmup_steps", 10, "at most a quarter of the steps (default: DEFAULT; paper: 100)")
    group.add_argument("--decay", action=argparse.BooleanOptionalAction, default=True,
                       help="the rate falls to 0 (default); --no-decay: constant after warm-up")
    flag(group, "--beta1", 0.9, "of AdamW (default: DEFAULT; paper: 0.9)")
    flag(group, "--beta2", 0.95, "of AdamW (default: DEFAULT; paper: 0.95)")
    flag(group, "--weight_decay", 1e-2, "of AdamW (default: DEFAULT, as the official code)")
    flag(group, "--clip", 1.0, "largest gradient norm, 0: any (default: DEFAULT; official: any)")
    flag(group, "--ema", 0.99, "decay of the weight average (default: DEFAULT; official: none)")
    add_sampling_flags(parser, steps=10)     # results/steps.md: 10 are as good as 100, and generation is the cost
    flag(parser, "--generation_batch", 32, "clips at a time (default: DEFAULT)")
    group = parser.add_argument_group("who listens")
    flag(group, "--reward", str(REWARD), "the CLAP that ranks (default: clap_reward; paper: laion/clap-htsat-unfused)")
    flag(group, "--judge", str(JUDGE), "the CLAP that judges only (default: clap_judge; paper: laion/clap-htsat-fused)")
    flag(group, "--tagger", str(BASE), "folder of the world's taggers")
    flag(group, "--evaluate", 256, "held-out prompts after each iteration (default: DEFAULT)")
    flag(group, "--evaluation_seed", 7, "of their noise (default: DEFAULT)")
    group = parser.add_argument_group("run")
    flag(group, "--out", "runs/crpo", "a run found there goes on (default: DEFAULT)")
    flag(group, "--log_every", 4, "steps (default: DEFAULT)")
    flag(group, "--save_every", 25, "steps (default: DEFAULT)")
    flag(group, "--save_clips", 64, "clips generated or scored between two saves (default: DEFAULT)")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="of the training's matrix products (default: bfloat16 where the hardware has it, else "
                            "float32, as the official code; cosine of both gradients 0.99, of two draws of noise 0.1)")
    flag(group, "--device", "auto", "auto, cuda, mps or cpu (default: DEFAULT)")
    return parser


def command_of(args):
    """The command that gives these flags: those that differ from the default, without --out."""
    words = ["python crpo.py"]
    for action in make_parser()._actions:
        value = getattr(args, action.dest, action.default)
        if value != action.default and action.dest != "out":
            flag = action.option_strings[0]
            words.append(flag if value is True else flag.replace("--", "--no-", 1) if value is False else
                         f"{flag} {shlex.quote(str(value))}")
    return " ".join(words)


def parse_args(argv=None):
    """The flags, their ranges checked."""
    args = parse_arguments(make_parser(), argv)
    check_sampling_flags(args)
    for name, low, high in (("iterations", 1, 1000), ("prompts", 1, 1e8), ("num_samples", 1, 10000), ("pool", 1, 1e8),
                            ("beta", 0, 1e9), ("half", 0, 100), ("fm_weight", 0, 1e6), ("t_mean", -20, 20),
                            ("dropout", 0, 1), ("score_dropout", 0, 1), ("epochs", 1, 1e6), ("batch_size", 1, 1e6),
                            ("micro_batch", 1, 1e6),
                            ("learning_rate", 0, 10), ("warmup_steps", 0, 1e9), ("beta1", 0, 0.99999),
                            ("beta2", 0, 0.99999), ("weight_decay", 0, 10), ("clip", 0, 1e9), ("ema", 0, 1),
                            ("generation_batch", 1, 1e6),
                            ("evaluate", 2, 1e6), ("evaluation_seed", 0, 2 ** 62), ("log_every", 1, 1e9),
                            ("save_every", 1, 1e9), ("save_clips", 1, 1e9), ("seed", 0, 2 ** 50)):
        in_range(f"--{name}", getattr(args, name), low, high)
    if args.num_samples < 2 and not args.pairs:
        raise UserError("--num_samples 1 makes no pairs: a winner needs a loser; give at least 2 (paper: 5)")
    if args.pairs:
        standard = make_parser().parse_args([])
        idle = [f"--{name}" for name in ("iterations", "prompts", "num_samples", "pool", "prompt_file", "offline",
                                         "reencode") if getattr(args, name) != getattr(standard, name)]
        if idle:
            raise UserError(f"{', '.join(idle)} would have no effect beside --pairs; leave it out")
        args.iterations = 1
    elif args.audio_dir:
        raise UserError("--audio_dir says where the sounds of --pairs are; without --pairs leave it out")
    return args


def main(argv=None):
    args = parse_args(argv)
    run(args)
    out, last = Path(args.out), Path(args.out) / f"iteration_{args.iterations}"
    files = [name for name in ("crpo.md", "crpo.json", "iterations.png", "listen.html") if (out / name).is_file()]
    print(f"wrote {out}: {', '.join(files)}, iteration_1 to {args.iterations} (models, pairs, scores)")
    standard = vars(parse_args([]))
    more = [f"--{flag} {shlex.quote(str(getattr(args, name)))}" for flag, name in (
        ("against", "checkpoint"), ("reward", "reward"), ("judge", "judge"), ("tagger", "tagger"))
        if getattr(args, name) != standard[name]]
    print(f"next: {' '.join(['python alignment.py --checkpoint', shlex.quote(str(last)), *more])} compares it with "
          "where it began, on unseen prompts")


if __name__ == "__main__":
    run_main(main)
