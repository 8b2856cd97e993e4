"""CLAP-ranked preference optimisation: sample, rank, pair, optimise, and again with the new model.

    python crpo.py                                  # the bundled base model, 6 iterations, on a CPU
    python crpo.py --iterations 1 --prompts 64 --eval_prompts 64 --out runs/small    # some minutes
    python crpo.py --offline --loss dpo --beta 20 --out runs/dpo    # L_DPO-FM alone (Fig. 2)
    python crpo.py --pairs alpaca.json --checkpoint declare-lab/TangoFlux            # static (4.3)

Each iteration (paper 2.5) is a folder, each stage a file in it, skipped where it is found: a killed
run ends with the same bits. Clip i is made from (seed, i); in bfloat16, on its batch a little too.

Where paper and official code differ, we do this:
  - beta multiplies 0.5 times MEAN errors over (L, C), as in the code (Eq. 2: sums, no 0.5:
    --reduction sum --half 1). A mean is 1/(L C) of the sum, so an equally strong beta grows
    with L C: 2000 at the code's 645 x 64 is 149 at the toy's 64 x 48. Ours is 20 there, and L_FM,
    a mean (Eq. 5), weighs 0.1: docs/log.md (official: --beta 149 --fm_weight 1);
  - t is logit-normal, as the code (Eq. 2: uniform), but nearer to noise (code: --t_mean 0) and
    continuous (code: 1000 values); a pair shares noise and t, as the code (Eq. 2 does not say);
  - sampled latents are trained on directly (code: through wav files and the VAE); every iteration,
    prompt and clip has noise of its own (code: the same N noises, always);
  - three pairs of a prompt's 8 clips (paper: one of 5: --pairs_per_prompt 1 --num_samples 5);
  - a KL holds the velocities near the reference's (paper: --kl_weight 0): the errors of winners and
    losers could rise together;
  - weights are averaged, the average goes on (paper: raw, --ema 0); gradients are clipped; T5 has
    no dropout, conditions have (code: none); the duration embedder is trained;
  - the rate decays to 0, as the code (A.5 names a warm-up only).
A score head samples at --score, and learns under it (second paper, III-D d: Eq. 1 is this loss).
M prompts, N clips of each, P pairs (B in a step), L latent frames, C channels, S text tokens.
"""
import copy
import math
import os
import shutil
import time
from collections import defaultdict, namedtuple
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from data import read_pairs, read_prompts
from evaluate import Judges, alarms, compare, held_out_clips, judged
from lib.common import (BASE, DEVICE, DTYPE, UserError, append_jsonl, autocast_for, check_settings,
                        choose_device, choose_dtype, command_line, flag, generator, parse_flags,
                        pick, read_json, read_jsonl, reading, relative_to_here, run_main,
                        side_by_side, stop_on_signal, warn, whole_blocks, write_json, write_jsonl,
                        write_report)
from lib.losses import LOSSES, noisy_path, path_step, with_defaults
from lib.text import null_score
from lib.weights import (average_decay, code_hash, copy_weights, draw_log, learning_rate, links,
                         load_state, load_tensors, make_optimizer, module_hash, policy_hash,
                         run_folder, save_state, save_tensors, set_rate, trainable, trim_log,
                         update_average)
from model import SCORE_HEADS, load_policy, save_model
from reward import JUDGE, REWARD, groups_of, pairs_of, save_pairs, shuffled, training_data
from sample import decode, default_duration, sampler_of
from train_fm import Batch, epoch_order, interpolate, logit_normal_t, text_condition
from vae import encode_pairs
from world.scenes import World, render_clips

FLAGS = {"the loop (paper 2.5, 3.2)": [
    flag("--checkpoint", str(BASE), "model folder or hub id"),
    flag("--iterations", 6, "times to sample and optimise (paper: 5)", 1),
    flag("--prompts", 320, "M, drawn anew in each iteration (paper: 20000)", 1),
    flag("--num_samples", 8, "N, clips of each prompt (paper: 5)", 2),
    flag("--pool", 20000, "training scenes whose prompts make the pool (paper: 45k)", 1),
    flag("--prompt_file", None, "the pool instead: .txt or .jsonl (paper: AudioCaps)"),
    flag("--offline", False, "train on the first iteration's pairs in all of them (paper Fig. 2)"),
    flag("--pairs", None, "static preference set instead, one iteration (paper 4.3)"),
    flag("--audio_dir", None, "folder of its sounds; none: beside the file"),
], "preference loss (Eq. 2, 3)": [
    flag("--loss", "crpo", "crpo, its dpo alone, or of all clips (paper A.11: grpo)",
         choices=list(LOSSES)),
    flag("--beta", None, "strength of the preference, of means over (L, C); none: crpo 20, dpo 149 "
         "in the toy, dgpo 4.7, as strong elsewhere (official: 2000 at 645 x 64)", 0, kind=float),
    flag("--pairs_per_prompt", 3, "pairs of a prompt, at most N / 2: best and worst, then the next "
         "two (paper: 1)", 1),
    flag("--kl_weight", None, "weight of |v - old|^2, for pairs in units of half x beta; none: "
         "crpo 0.4, awm and dgpo 1, grpo 0.04, else 0 (paper: 0)", 0, kind=float),
    flag("--safeguard", None, "mu: a loser may undo 1 - mu of its winner's descent; none: all "
         "of it (Diffusion-SDPO: 0.9)", 0, 1, kind=float),
    flag("--half", 0.5, "constant factor in front of beta (official: 0.5; Eq. 2: 1)", 0),
    flag("--reduction", "mean", "of errors over (L, C) (Eq. 2: sum)", choices=["mean", "sum"]),
    flag("--fm_weight", 0.1, "weight of the winners' L_FM (paper: 1)", 0),
    flag("--shared_noise", True, "one noise for winner and loser (official: shared)"),
    flag("--t_distribution", "logit_normal", "distribution of t (Eq. 2: uniform)",
         choices=["logit_normal", "uniform"]),
    flag("--t_mean", 0.8, "mean of the logit-normal t (official: 0)"),
    flag("--dropout", 0.1, "share of pairs losing their text (official: 0)", 0, 1),
    flag("--score", None, "score asked for, if there is a score head", -1e6, 1e6, kind=float),
    flag("--score_head", None, "head to run v1 or v2 weights as (second paper: v2)",
         choices=list(SCORE_HEADS)),
    flag("--score_dropout", 0.1, "share of pairs losing their score (second paper: 0.1)", 0, 1),
], "losses of all clips (lib/losses.py)": [
    flag("--advantage_slope", 0.8, "nft: of a clip's goodness (DiffusionNFT: 0.1)", 0),
    flag("--nft_beta", 1.0, "nft: b, how far both images lie from the old velocity", 1e-6),
    flag("--sde_noise", 0.7, "grpo: a, noise of the sampler's steps (Flow-GRPO: 0.7)", 1e-6),
    flag("--clip_range", 1e-3, "grpo: largest change of a ratio that is rewarded", 0, 1),
], "optimizer: AdamW (paper 3.1, A.5)": [
    flag("--epochs", 5, "passes over the rows of an iteration (paper: 8)", 1),
    flag("--batch_size", 48, "rows of a step: pairs, clips or, of dgpo, groups (paper: 48)", 1),
    flag("--micro_batch", 12, "rows at a time, their gradients summed: bounds memory", 1),
    flag("--learning_rate", 3e-4, "peak learning rate (paper: 1e-5)", 0),
    flag("--warmup_steps", 10, "steps to the peak, at most a quarter of all (paper: 100)", 0),
    flag("--decay", True, "linear decay of the rate to 0 (official: the same)"),
    flag("--beta1", 0.9, "beta1 of AdamW (paper: 0.9)", 0, 0.99999),
    flag("--beta2", 0.95, "beta2 of AdamW (paper: 0.95)", 0, 0.99999),
    flag("--weight_decay", 0.01, "weight decay of AdamW (official: 0.01)", 0),
    flag("--clip", 1.0, "largest gradient norm; 0: no clipping (official: none)", 0),
    flag("--ema", 0.99, "decay of the averaged weights, which go on (paper: raw, 0)", 0, 1),
], "sampler": [
    flag("--steps", 10, "solver steps: as good as 100 for the toy (paper 3.3: 50)", 1),
    flag("--guidance_scale", 3.0, "classifier-free guidance (paper 3.3: 4.5; grpo's paths: 1)", 0),
    flag("--generation_batch", 32, "clips sampled in one batch", 1),
], "judges": [
    flag("--reward", str(REWARD), "what ranks, a CLAP (paper: laion/clap-htsat-unfused) or "
         "FILE.py:function"),
    flag("--vocoder_steps", 4, "rounds of Griffin-Lim that the reward hears; 24 are played", 1),
    flag("--shuffle", False, "control: a prompt's scores in random order"),
    flag("--judge", str(JUDGE), "CLAP that only judges (paper: laion/clap-htsat-fused)"),
    flag("--tagger", str(BASE), "folder of the world's taggers"),
    flag("--eval_prompts", 256, "held-out prompts per iteration", 2, alias="--evaluate"),
], "run": [
    flag("--out", "runs/crpo", "run folder; a run found there goes on"),
    flag("--seed", 0, "seed of prompts, candidates and training", 0, 2 ** 50),
    flag("--log_every", 1, "steps between rows of log.jsonl", 1),
    flag("--save_every", 25, "steps between saves", 1),
    flag("--save_clips", 64, "clips sampled or scored between saves", 1), DTYPE, DEVICE]}
MAY_CHANGE = {"iterations", "out", "device", "log_every", "save_every", "debug"}
FILES = {"policy": "--checkpoint", "ears": "--reward, --judge or --tagger"}     # by config.json
HELD_OUT = 50000        # first validation scene used: none that chose thresholds or the base
NOISE = "evaluation 7"  # seed of the held-out clips: no candidates have it, whatever --seed is

Loss = namedtuple("Loss", "loss beta half reduction fm_weight safeguard shared_noise "
                  "t_distribution t_mean dropout score score_dropout "
                  "advantage_slope nft_beta kl_weight sde_noise clip_range steps")
Optimisation = namedtuple("Optimisation", "epochs batch_size micro_batch learning_rate "
                          "warmup_steps decay beta1 beta2 weight_decay clip ema dtype score_head "
                          "log_every save_every")
Training = namedtuple("Training", "flow reference encoder pairs settings micro_batch device "
                      "autocast")


# ----------------------------------------------------------------------------- a step

def two_velocities(flow, reference, xt, t, condition):
    """Velocities (B, L, C) of policy and frozen reference."""
    # no torch.no_grad(): it picks another attention kernel, and in bfloat16 the reference would
    # differ from an identical policy
    old = reference.velocity(xt, t, condition).detach()
    return flow.velocity(xt, t, condition), old


def draw_rows(data, positions, settings, seed, device):
    """Rows `positions` of endless epochs -> Batch of K B clips, advantages (B, K).

    A row's K clips share their prompt and t: a pair's winner and loser, a group, or one alone. The
    first clip of all rows comes first; a score that is asked for is dropped as in train_fm.py."""
    count, *shape = data["mean"].shape                                          # P, (K, L, C)
    K = shape[0]
    rows, draws = [], []
    for position in positions:
        rng = generator(seed, "pair", position)             # a row depends on these alone
        row = int(epoch_order(seed, position // count, count)[position % count])
        x0 = torch.randn(shape, generator=rng)                                  # (K, L, C)
        if settings.shared_noise:
            x0 = x0[:1].expand(shape)
        if settings.t_distribution == "uniform":
            t = torch.rand(1, generator=rng)
        else:
            t = logit_normal_t(1, rng, settings.t_mean)
        drop_text = torch.rand(1, generator=rng) < settings.dropout
        eps = torch.randn(shape, generator=rng)
        drop_score = torch.rand(1, generator=rng) < settings.score_dropout
        x1 = data["mean"][row] + data["std"][row] * eps                         # (K, L, C)
        rows.append(row)
        draws.append((x1, x0, t.expand(K), drop_text.expand(K), drop_score.expand(K)))
    # (K, B, ...) -> (K B, ...)
    x1, x0, t, drop_text, drop_score = [torch.stack(part, 1).flatten(0, 1) for part in zip(*draws)]
    score = None
    if settings.score is not None:
        score = torch.where(drop_text | drop_score, null_score(t), settings.score)
    texts = data["text"][rows].repeat(K)                                        # (K B,)
    mask = data["mask"][texts]
    size = mask.sum(1).max()                                                    # S
    batch = Batch(x1, x0, t, None, data["hidden"][texts, :size], mask[:, :size],
                  data["duration"][rows].repeat(K), drop_text, score)
    return batch.to(device), data["advantage"][rows].to(device)


def piece_loss(training, parameters, seed, count, positions):
    """What to log of some of a step's `count` rows, and their part of its gradients."""
    flow, reference, encoder, data, settings, _, device, autocast = training
    batch, advantage = draw_rows(data, positions, settings, seed, device)
    with torch.set_grad_enabled(len(parameters) > 0), autocast():
        condition = text_condition(encoder, batch)
        if settings.loss == "grpo":             # x_1 are paths
            xt, target, t = path_step(batch.x1, batch.t)
        else:
            t = batch.t
            xt, target = interpolate(batch.x1, batch.x0, t)
        velocity, old = two_velocities(flow, reference, xt, t, condition)
        loss_of, _ = LOSSES[settings.loss]
        loss, parts = loss_of(velocity, old, xt, target, t, advantage, settings)
        share = len(positions) / count
        gradients = torch.autograd.grad(loss * share, parameters) if parameters else []
    return {"loss": loss.item(), **parts}, gradients


def loss_and_gradients(training, parameters, positions, seed):
    """The loss of the rows at `positions` -> {"loss", "accuracy", ...}; gradients go into .grad."""
    # a mean over rows: pieces add up, memory is a piece's, each core takes one
    size = training.micro_batch
    pieces = [positions[i:i + size] for i in range(0, len(positions), size)]
    work = partial(piece_loss, training, parameters, seed, len(positions))
    cores = torch.get_num_threads() if training.device.type == "cpu" else 1
    means, total = defaultdict(float), []
    for first in range(0, len(pieces), cores):      # summed in order, whatever the number of cores
        some = pieces[first:first + cores]
        for piece, (parts, gradients) in zip(some, side_by_side(work, some, training.device)):
            for name, value in parts.items():
                means[name] += value * len(piece) / len(positions)
            total = torch._foreach_add(total, gradients) if total else gradients
    for parameter, gradient in zip(parameters, total):
        parameter.grad = gradient
    return dict(means)


# ----------------------------------------------------------------------------- optimisation

def optimise(folder, policy, rows, tensors, settings, how, seed, report_seed, device):
    """The model folder `policy`, trained, goes to `folder` -> losses over all rows (Fig. 4)."""
    model = load_policy(policy, device, how.score_head)
    flow = model.flow
    reference = copy.deepcopy(flow).requires_grad_(False)   # the policy as it came
    with reading(f"the pairs or clips of {folder}", "delete them: they are made anew"):
        pairs = training_data(rows, tensors, model)
        if len(pairs["mean"]) != len(rows):
            raise ValueError(f"there are {len(rows)} rows for {len(pairs['mean'])} pairs")
    parameters = trainable(flow)
    optimizer = make_optimizer(parameters, (how.beta1, how.beta2), how.weight_decay)
    average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    steps = math.ceil(how.epochs * len(rows) / how.batch_size)
    warmup = min(how.warmup_steps, max(1, steps // 4))
    shape = "linear" if how.decay else "constant"
    settings = with_defaults(settings, *pairs["mean"].shape[-2:])
    record = {"seed": seed, "warmup": warmup, "policy": policy_hash(policy),
              **settings._asdict(), "sampler_steps": settings.steps, **how._asdict(),
              "steps": steps, "log_every": 0, "save_every": 0}
    training = Training(flow, reference, model.text, pairs, settings, how.micro_batch, device,
                        autocast_for(how.dtype, device))
    step, minutes = load_state(folder, parameters, optimizer, average, record)
    trim_log(folder, step)
    began = time.monotonic() - 60 * minutes
    flow.train()
    with stop_on_signal() as stopped:
        for step in tqdm(range(step, steps), "optimising", initial=step, total=steps, unit="step"):
            # rate
            rate = learning_rate(step, how.learning_rate, warmup, steps, shape)
            set_rate(optimizer, rate)

            # loss and gradients
            positions = range(step * how.batch_size, (step + 1) * how.batch_size)
            parts = loss_and_gradients(training, list(parameters.values()), positions, seed)

            # clip, step, average
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), how.clip or math.inf).item()
            if not math.isfinite(norm):
                raise UserError(f"step {step}: gradient norm {norm:g}; lower --learning_rate")
            optimizer.step()
            update_average(average, parameters, average_decay(step, how.ema))

            # log and save
            done = step + 1
            minutes = (time.monotonic() - began) / 60
            if done == steps or done % how.log_every == 0:
                row = {"step": done, "lr": rate, "minutes": minutes, **parts, "grad_norm": norm}
                append_jsonl(folder / "log.jsonl", row)
            if done == steps or done % how.save_every == 0 or stopped:
                save_state(folder, parameters, optimizer, average, done, record, minutes)
            if stopped:
                break

    # the losses over all pairs, and the model; it links to the other parts of a local one
    copy_weights(parameters, average)
    flow.eval()
    training = training._replace(settings=settings._replace(dropout=0.0, score_dropout=0.0))
    losses = loss_and_gradients(training, [], range(len(rows)), report_seed)
    draw_log(folder, [("errors", "linear", {"winner": "winner", "loser": "loser"})])
    if Path(policy).is_dir():
        save_model(folder, flow, references=links(policy, folder), extra={"training": record})
    else:
        save_model(folder, flow, model.codec, model.text, extra={"training": record})
    return losses


# ----------------------------------------------------------------------------- prompts to pairs

def prompt_pool(prompt_file, size, count, max_duration):
    """What `count` prompts are drawn from: rows of a file, or of `size` training scenes."""
    if prompt_file:
        rows = read_prompts(prompt_file)
    else:
        scenes = map(World("train", seed="crpo").scene, range(size))
        rows = [{"prompt": scene.prompt, "duration": scene.duration} for scene in scenes]
    if len(rows) < count:
        raise UserError(f"--prompts {count} is more than the {len(rows)} of "
                        f"{prompt_file or '--pool'}")
    for row in rows:
        row["duration"] = min(row["duration"] or default_duration(max_duration), max_duration)
    return rows


def draw_prompts(folder, pool, count, seed, iteration):
    """prompts.jsonl: `count` rows of the pool, drawn anew in each iteration (paper 3.2)."""
    path = folder / "prompts.jsonl"
    if not path.is_file():
        order = torch.randperm(len(pool), generator=generator(seed, "prompts", iteration)).tolist()
        write_jsonl(path, [{"prompt_id": i, **pool[i]} for i in order[:count]])
    return read_jsonl(path)


def make_candidates(folder, model, rows, seed, sampler, save_clips):
    """candidates.safetensors: a latent for each row (M N, L, C); clip i is made from (seed, i).
    With grpo's sampler all states of it, (M N, steps + 1, L, C), the latent last."""
    path = folder / "candidates.safetensors"
    blocks = []
    if path.is_file():
        return load_tensors(path)["latents"]
    for start in tqdm(range(0, len(rows), save_clips), "sampling", unit=f" x {save_clips}"):
        part = folder / "candidates" / f"{start:07d}.safetensors"
        if not part.is_file():
            block = rows[start:start + save_clips]
            prompts, durations = zip(*[(row["prompt"], row["duration"]) for row in block])
            indices = range(start, start + len(prompts))
            save_tensors(part, {"latents": sampler(model, prompts, durations, seed, indices)})
        blocks.append(load_tensors(part)["latents"])
    save_tensors(path, {"latents": torch.cat(blocks)})
    shutil.rmtree(folder / "candidates")
    return torch.cat(blocks)


def score_candidates(folder, codec, rows, latents, scorers, origin, save_clips):
    """scores.jsonl: rows, `origin` (seed, policy), index, scores; scorers: {name: a CLAP, ...}."""
    path, rate = folder / "scores.jsonl", codec.sampling_rate
    latents = latents[:, -1] if latents.ndim == 4 else latents        # of paths the end
    scored = whole_blocks(path, save_clips, len(rows))
    starts = range(len(scored), len(rows), save_clips)
    for start in tqdm(starts, "scoring", unit=f" x {save_clips}"):
        block = slice(start, start + save_clips)
        prompts, durations = zip(*[(row["prompt"], row["duration"]) for row in rows[block]])
        audios = decode(codec, latents[block], durations)
        scores = [scorer.scores(audios, rate, prompts).tolist() for scorer in scorers.values()]
        for row, values in zip(rows[block], zip(*scores)):
            scored.append({**row, **origin, "index": len(scored), **dict(zip(scorers, values))})
            append_jsonl(path, scored[-1])
    return scored


# ----------------------------------------------------------------------------- the loop

def begin(path, command, flags, policy, judges):
    """Write a run's config.json, or check that a run found there has the same settings."""
    wanted = {name: value for name, value in vars(flags).items() if name not in MAY_CHANGE}
    wanted |= {"policy": policy, "ears": [module_hash(each)[:16] for each in vars(judges).values()],
               "code": code_hash()}
    wanted = relative_to_here(wanted)           # so that a repository may move
    started = {"noise": NOISE}
    if path.is_file() and (path.parent / "real.safetensors").is_file():     # else nothing was made
        started = relative_to_here(read_json(path, dict))
        for name, files in FILES.items():
            if started.get(name, wanted[name]) != wanted[name]:
                raise UserError(f"the run in {path.parent} was started with other files at "
                                f"{files}; delete it, or give another --out")
        check_settings(path.parent, started, wanted)
    wanted["noise"] = started.get("noise", started.get("evaluation_seed"))  # of the first edition
    write_json(path, {"command": command, **wanted, "iterations": flags.iterations})
    return wanted


def run(command="crpo.run(...)", **settings):
    """All iterations; settings: flags by name -> the numbers of crpo.json (evaluate.compare)."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("crpo.py is one process: start it without torchrun")
    args = parse_flags(__doc__, FLAGS, [], settings)
    _, kind = LOSSES[args.loss]
    out, device = Path(args.out), choose_device(args.device)
    with run_folder(out, "crpo.py"):
        judges = Judges(args.reward, args.judge, args.tagger, device)
        sampler = sampler_of(args)
        changes = {}
        if args.loss == "grpo":         # paths, of the velocity that is trained: without guidance
            changes = {"solver": partial(noisy_path, noise=args.sde_noise), "guidance_scale": 1.0}
        explorer = sampler_of(args, **changes)

        # the policy, and what pairs come from: prompts, or a static set
        policy = str(args.checkpoint)
        dtype, _ = choose_dtype(args.dtype, device)         # of sampling; of training: autocast_for
        model = load_policy(policy, device, args.score_head, args.generation_batch, dtype)
        if model.codec.kind != "mel" and (args.beta is None or args.learning_rate > 1e-4):
            warn("the toy's settings at full size; docs/official_weights.md has the paper's")
        if args.score is not None and not model.flow.config.get("score_head"):
            raise UserError(f"--score needs a model with a score head, which {policy} has not")
        if args.pairs and (args.shuffle or kind != "pairs"):
            raise UserError("--pairs has no clips to shuffle or to group: leave out --shuffle and "
                            f"--loss {args.loss}")
        if args.loss == "grpo" and (args.offline or args.steps < 2):
            raise UserError("--loss grpo needs new paths in each iteration, of 2 steps or more: "
                            "leave out --offline, raise --steps")
        if args.pairs:
            static = read_pairs(args.pairs, args.audio_dir)
            args.iterations = 1
        else:
            longest = model.flow.config["max_duration"]
            pool = prompt_pool(args.prompt_file, args.pool, args.prompts, longest)
        config = begin(out / "config.json", command, args, policy_hash(policy), judges)

        # who is judged, on the same scenes: real ones, the base, every iteration, the result
        places = range(HELD_OUT, HELD_OUT + args.eval_prompts)
        clips, scenes = render_clips(World("val", pairs="all"), places)
        verdicts = {"real": judged(out / "real.safetensors", judges, lambda: clips, scenes)}
        clips_of = partial(held_out_clips, model, scenes, config["noise"], sampler)
        verdicts["base"] = judged(out / "base.safetensors", judges, clips_of, scenes)
        warnings = []

        for k in range(1, args.iterations + 1):
            folder = out / f"iteration_{k}"
            name = f"iteration {k}"
            source = out / "iteration_1" if args.offline else folder
            seed = args.seed * 1000 + k
            if not (folder / "report.json").is_file():
                if kind == "pairs" and (source / "pairs.safetensors").is_file():
                    rows = read_jsonl(source / "pairs.jsonl")
                    tensors = load_tensors(source / "pairs.safetensors")
                elif args.pairs:
                    rows, tensors = encode_pairs(model.codec, model.flow.config, static)
                    save_pairs(source, rows, tensors)
                else:
                    # prompts, N candidates of each, their rewards
                    prompts = draw_prompts(source, pool, args.prompts, args.seed, k)
                    asked = [row for row in prompts for _ in range(args.num_samples)]   # M N rows
                    latents = make_candidates(source, model, asked, seed, explorer, args.save_clips)
                    origin = {"seed": seed, "checkpoint": policy_hash(policy)}
                    codec = copy.copy(model.codec)      # for the reward; Oobleck has no phases
                    codec.vocoder_steps = args.vocoder_steps
                    scored = score_candidates(source, codec, asked, latents,
                                              {"reward": judges.reward}, origin, args.save_clips)
                    if args.shuffle:
                        scored = shuffled(scored, args.num_samples, f"{args.seed} {source.name}")

                    # the best and the worst, or all with their advantages
                    if kind == "pairs":
                        rows, tensors = pairs_of(source, scored, latents, args.num_samples,
                                                 args.pairs_per_prompt)
                    else:
                        size = args.num_samples if kind == "groups" else 1
                        rows, tensors = groups_of(scored, latents, args.num_samples, size)

                # the next policy prefers the winners
                losses = optimise(folder, policy, rows, tensors, pick(Loss, args),
                                  pick(Optimisation, args), seed, f"report {args.seed}", device)
                (folder / "heard.safetensors").unlink(missing_ok=True)
                write_json(folder / "report.json", {**losses, "pairs": len(rows)})

            # what the judges say of it
            before = verdicts[f"iteration {k - 1}" if k > 1 else "base"]
            policy = str(folder)
            model = load_policy(policy, device, args.score_head, args.generation_batch, dtype)
            clips_of = partial(held_out_clips, model, scenes, config["noise"], sampler)
            verdicts[name] = judged(folder / "heard.safetensors", judges, clips_of, scenes)
            warnings += alarms(name, read_json(folder / "report.json"), before, verdicts[name])
            paragraphs, numbers = compare(verdicts, "base", draws=200)
            write_report(out, "crpo", "CRPO", command, [*paragraphs, *warnings], numbers)
        return numbers


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    run(command_line("crpo.py", argv), **vars(args))
    last = 1 if args.pairs else args.iterations
    before = relative_to_here(args.checkpoint)
    print(f"wrote {args.out}: crpo.md, a folder for each iteration\nnext: python "
          f"evaluate.py --checkpoint {args.out}/iteration_{last} --against {before}")


if __name__ == "__main__":
    run_main(main)
