"""Speed and memory, side by side with the official way.

    python bench.py crpo                    # an iteration of CRPO, toy; 3 rounds, on two cores 25 minutes
    python bench.py crpo --prompts 12 --repeats 1
    python bench.py generate                # a generation at full size (race.py), 28 minutes, needs diffusers and 9 GB
    python bench.py generate --steps 4 --repeats 1 --checkpoint FOLDER
    python bench.py vae                     # decoding: seconds and memory by duration (needs diffusers)
    python bench.py load                    # memory while loading

`crpo`: all make N clips of the same M prompts, score them by the same CLAP, pair best and worst, and take the same
number of training steps on their pairs. Ours is what crpo.py runs, at its defaults: --steps 10, its --dtype. The
official way (its shell script and three Python files) is driven twice: at our number of sampler steps, and at its own
50. It samples one prompt at a time with its N clips and writes each clip to a wav file; CLAP reads file after file
and embeds one clip and one text at a time; every training step reads its wav files again, encodes them by the VAE and
their prompts by T5, in float32. Both ways use the decoder of this repository. The ways take turns; times are wall-
clock seconds, ratios are medians over the rounds.
"""
import argparse
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import crpo
import race
from audio import read_audio, write_wav
from clap import load_clap
from common import (UserError, atomic_path, check_writable, choose_device, in_range, parse_arguments, run_main,
                    write_json)
from evaluate import markdown
from model import encode_prompts, load_model, null_condition
from preferences import draw_prompts, encode_all, make_candidates, prompt_pool, score_candidates, write_pairs
from reward import make_pairs
from sample import decode
from solvers import euler, guided_velocity, noise_for, schedule
from train_fm import Batch, text_condition
from training import choose_dtype, make_optimizer, set_rate, trainable

STAGES = ("generate", "decode and score", "train")


class Clock:
    """Seconds per stage: each call adds what passed since the call before."""

    def __init__(self):
        self.seconds, self.last = dict.fromkeys(STAGES, 0.0), time.perf_counter()

    def __call__(self, stage):
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def ours(args, folder, model, clap, prompts):
    """An iteration as crpo.py runs it -> {stage: seconds}, scores (M, N). Its training writes and reports as always."""
    clock = Clock()
    latents = make_candidates(args, folder, args.seed, prompts, model)
    clock("generate")
    scores = score_candidates(args, folder, args.seed, prompts, latents, model, clap, "bench")
    rows, tensors = write_pairs(args, folder, prompts, scores, latents, model)
    clock("decode and score")
    device = next(model.flow.parameters()).device
    crpo.optimise(args, folder, args.checkpoint, rows, tensors, args.seed, device,
                  choose_dtype(args.dtype, device, say=lambda _: None))
    clock("train")
    return clock.seconds, scores


@torch.inference_mode()
def samples_of_one_prompt(args, model, row, first, steps):
    """args.num_samples raw latents (N, L, C) of one prompt, in one batch on all threads."""
    flow, count = model.flow, args.num_samples
    condition = encode_prompts(model.text, [row["prompt"]] * count, torch.full((count,), float(row["duration"])))
    noise = noise_for(args.seed, range(first, first + count), (flow.config["audio_seq_len"],
                                                               flow.config["in_channels"]))
    velocity = guided_velocity(flow, condition, null_condition(model.text, condition), args.guidance_scale)
    return model.codec.denormalise(euler(velocity, noise, schedule(steps)))


def official_way(args, folder, model, clap, prompts, steps):
    """The same iteration, prompt by prompt and file by file -> {stage: seconds}, scores (M, N)."""
    clock, count, rate, codec = Clock(), args.num_samples, model.codec.sampling_rate, model.codec
    for m, row in enumerate(tqdm(prompts, desc="prompt by prompt", leave=False)):
        latents = samples_of_one_prompt(args, model, row, m * count, steps)
        clock("generate")
        for n, audio in enumerate(decode(model, latents, [row["duration"]] * count, count)):
            write_wav(folder / f"{m}_{n}.wav", audio, rate)
        clock("decode and score")
    scores = np.array([[clap.scores([read_audio(folder / f"{m}_{n}.wav", rate, 1)], rate, [row["prompt"]]).item()
                        for n in range(count)] for m, row in enumerate(prompts)])
    winners, losers, kept = make_pairs(scores)
    chosen = np.flatnonzero(kept)
    clock("decode and score")
    flow, reference = (load_model(args.checkpoint, parts=("flow",)).flow for _ in range(2))
    reference.requires_grad_(False)
    optimizer = make_optimizer(trainable(flow.train()))
    set_rate(optimizer, args.learning_rate)
    rng = torch.Generator().manual_seed(0)
    for step in tqdm(range(args.train_steps), desc="training from files", leave=False):
        rows = [int(chosen[i % len(chosen)]) for i in range(step * args.batch_size, (step + 1) * args.batch_size)]
        x1 = []
        for best in (winners, losers):
            files = (read_audio(folder / f"{m}_{best[m]}.wav", rate, codec.audio_channels) for m in rows)
            found = encode_all(model, "x", len(rows), files, quiet=True)
            x1.append(codec.normalise(found["x_mean"] + found["x_std"] * torch.randn(found["x_std"].shape,
                                                                                     generator=rng)))
        with torch.no_grad():
            ids, mask = model.text.tokenize([prompts[m]["prompt"] for m in rows])
            hidden = model.text.encode(ids, mask)
        seconds = torch.tensor([float(prompts[m]["duration"]) for m in rows])
        dropped = torch.zeros(len(rows), dtype=torch.bool)                              # it drops no condition here
        batch = Batch(None, None, None, None, hidden, mask.bool(), seconds, dropped)
        x0 = torch.randn(x1[0].shape, generator=rng).repeat(2, 1, 1)
        t = torch.randn(len(rows), generator=rng).sigmoid().repeat(2)
        errors = crpo.four_errors(flow, reference, text_condition(model.text, batch, "empty_prompt"),
                                  torch.cat(x1), x0, t)
        loss, _ = crpo.crpo_loss(*errors, args.beta, args.half, args.fm_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clock("train")
    return clock.seconds, scores


def bench_crpo(args):
    """All ways in turn, args.repeats rounds after one to warm up; prints and writes the table."""
    path = Path(args.out) / "bench_crpo.md"
    check_writable([path, path.with_suffix(".json")])
    model, clap = load_model(args.checkpoint), load_clap(args.reward)
    ways = {f"ours, {args.steps} steps": ours}
    for steps in dict.fromkeys((args.steps, args.official_steps)):
        ways[f"official way, {steps} steps"] = lambda *given, steps=steps: official_way(*given, steps)
    runs, differences = {name: [] for name in ways}, []
    with tempfile.TemporaryDirectory() as work:
        prompts = draw_prompts(args, Path(work), 1, prompt_pool(args, model.flow.config["max_duration"]))
        for repeat in range(args.repeats + 1):
            scores = []
            for number, (name, way) in enumerate(ways.items()):
                place = Path(work) / f"{repeat}_{number}"
                place.mkdir()
                seconds, found = way(args, place, model, clap, prompts)
                shutil.rmtree(place)
                scores.append(found)
                if repeat:
                    runs[name].append(seconds)
                print(f"{'warm-up' if not repeat else f'round {repeat}'}, {name}: " + ", ".join(
                    f"{stage} {value:.1f} s" for stage, value in seconds.items()), flush=True)
            differences.append(float(np.median(np.abs(scores[0] - scores[1]))))
    clips, pairs = args.prompts * args.num_samples, args.train_steps * args.batch_size
    rows, ratios, first = [], {}, next(iter(ways))
    for stage, count in (("generate", clips), ("decode and score", clips), ("generate, decode and score", clips),
                         ("train", pairs), ("whole iteration", None)):
        def total(run, stage=stage):
            return sum(value for name, value in run.items() if name in stage or stage == "whole iteration")
        seconds = {name: [total(run) for run in many] for name, many in runs.items()}
        cells = []
        for name, values in seconds.items():
            ratios[f"{stage}, {name}"] = ratio = [value / fast for value, fast in zip(values, seconds[first])]
            middle = statistics.median(values)
            cells.append(f"{middle:.1f} s" + (f", {count / middle:.1f} a second" if count else "") + (
                "" if name == first else f"; x {statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})"))
        rows.append([stage, *cells])
    text = "\n\n".join([
        "# An iteration of CRPO against the official way of driving the same model",
        f"    python bench.py {shlex.join(sys.argv[1:] if sys.argv[0].endswith('bench.py') else ['crpo'])}",
        f"{args.prompts} prompts x {args.num_samples} clips, {args.train_steps} training steps of {args.batch_size} "
        f"pairs, {torch.get_num_threads()} threads. Medians of {args.repeats} rounds; \"a second\": clips, or pairs "
        f"trained; x: how many times as long as ours, with its range. Median difference of a clip's score between ours "
        f"and the official way at as many steps: {max(differences):.0e}, from its 16-bit wav files.",
        markdown(["stage", *ways], rows)]) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(path.with_suffix(".json"), {"runs": runs, "ratios": ratios})
    print(f"{text}\nwrote {path} and {path.with_suffix('.json')}\nnext: python crpo.py runs it")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["crpo", "generate", "vae", "load", "side"],
                        help="what to time (side: one run of another command)")
    parser.add_argument("--checkpoint", help="model folder (default: crpo checkpoints/toy/base, else random weights)")
    parser.add_argument("--prompts", type=int, default=48, help="M (default: 48)")
    parser.add_argument("--epochs", type=int, default=24, help="over the M pairs (default: 24, as crpo.py)")
    parser.add_argument("--official_steps", type=int, default=50,
                        help="sampler steps of the official way (default: 50)")
    parser.add_argument("--repeats", type=int, help="rounds (default: crpo 3, after one to warm up; generate 5; vae 3; "
                        "load always 1)")
    parser.add_argument("--steps", type=int, help="of the sampler (default: crpo 10, as crpo.py; generate 25, as "
                        "the official code)")
    race.add_flags(parser)
    parser.add_argument("--out", default="results", help="folder of the table (default: results)")
    args = parse_arguments(parser, argv)
    args.repeats = args.repeats if args.repeats is not None else 5 if args.command == "generate" else 3
    args.steps = args.steps if args.steps is not None else 10 if args.command == "crpo" else 25
    for name, high in (("prompts", 20000), ("epochs", 1e6), ("official_steps", 10000), ("repeats", 1000),
                       ("steps", 1000)):
        in_range(f"--{name}", getattr(args, name), 1, high)
    in_range("--duration", args.duration, 0.01, 1000)
    in_range("--longest", args.longest, 2.5, 1000)
    if args.command == "side":
        if not (args.way and args.checkpoint and args.dtype):
            raise UserError("side is what the other commands start; use crpo, generate, vae or load")
        return race.run_side(args)
    choose_device("cpu")
    if args.command != "crpo":
        return {"generate": race.bench_generate, "vae": race.bench_vae, "load": race.bench_load}[args.command](args)
    args.checkpoint = args.checkpoint or str(crpo.BASE)
    settings = vars(crpo.parse_args(["--prompts", str(args.prompts), "--epochs", str(args.epochs)]))
    given = {name: getattr(args, name) for name in ("command", "checkpoint", "prompts", "epochs", "official_steps",
                                                    "repeats", "steps", "out")}
    args = argparse.Namespace(**{**settings, **given})
    args.batch_size = min(args.batch_size, args.prompts)
    args.train_steps = -(-args.epochs * args.prompts // args.batch_size)
    bench_crpo(args)


if __name__ == "__main__":
    run_main(main)
