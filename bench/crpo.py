"""An iteration of CRPO, side by side with the official way of driving the same model.

    python -m bench.crpo                                  # 3 rounds on two cores: 25 minutes
    python -m bench.crpo --prompts 12 --repeats 1
    python -m bench.crpo --official_steps 10              # at our own number of solver steps alone

All make N clips of the same M prompts, score them by the same CLAP, pair best and worst, and take
the same number of training steps. Ours is what crpo.py runs. The official way (its shell script and
three Python files) samples one prompt at a time and writes each clip to a wav file; CLAP reads file
after file, one clip and one text at a time; every training step reads its wav files again, encodes
them by the VAE and their prompts by T5, in float32: at our number of solver steps, and at its own
50. Both use the decoder of this repository. Wall-clock seconds; ratios are medians over rounds.
"""
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
from lib.audio import fit_audio, read_audio, write_wav
from lib.common import (BASE, check_writable, flag, markdown, parse_flags, pick, run_main,
                        write_report)
from lib.weights import make_optimizer, set_rate, trainable
from lib.text import encode_prompts, null_condition
from model import load_model
from reward import REWARD, load_clap, make_pairs
from sample import decode, euler, guided_velocity, noise_for, schedule
from train_fm import Batch, text_condition

FLAGS = {"what is timed": [
    flag("--prompts", 48, "M", 2, 20000),
    flag("--epochs", 24, "over the M pairs (crpo.py: 24)", 1, 1e6),
    flag("--official_steps", 50, "solver steps of the official way (official code: 50)", 1, 1000),
    flag("--repeats", 3, "rounds, after one to warm up", 1, 1000),
    flag("--checkpoint", str(BASE), "model folder"),
    flag("--reward", str(REWARD), "CLAP that ranks"),
    flag("--out", "runs/bench", "folder of the table (the tracked one: results)"),
]}
STAGES = ("generate", "decode and score", "train")


class Clock:
    """Seconds per stage: each call adds what passed since the call before."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.last = time.perf_counter()

    def __call__(self, stage):
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def ours(folder, model, clap, prompts, settings, steps):
    """An iteration as crpo.py runs it -> {stage: seconds}. Its training saves as always."""
    clock = Clock()
    count, device = settings.num_samples, torch.device("cpu")
    rows = [row for row in prompts for _ in range(count)]
    sampler = crpo.sampler_of(settings)
    latents = crpo.make_candidates(folder, model, rows, 0, sampler, settings.save_clips)
    clock("generate")
    scored = crpo.score_candidates(folder, model, rows, latents, {"reward": clap}, {},
                                   settings.save_clips)
    pairs = crpo.write_pairs(folder, scored, count, latents)
    clock("decode and score")
    loss, how = pick(crpo.Loss, settings), pick(crpo.Optimisation, settings)
    crpo.optimise(folder, settings.checkpoint, *pairs, loss, how, 0, "report 0", device)
    clock("train")
    return clock.seconds


@torch.inference_mode()
def samples_of_one_prompt(model, row, count, first, guidance_scale, steps):
    """Raw latents (N, L, C) of one prompt, in one batch on all threads."""
    seconds = torch.full((count,), float(row["duration"]))
    condition = encode_prompts(model.text, [row["prompt"]] * count, seconds)
    shape = (model.flow.config["audio_seq_len"], model.flow.config["in_channels"])
    noise = noise_for(0, range(first, first + count), shape)                    # (N, L, C)
    null = null_condition(model.text, condition)
    velocity = guided_velocity(model.flow, condition, null, guidance_scale)
    return model.codec.denormalise(euler(velocity, noise, schedule(steps)))


@torch.no_grad()
def encoded_files(model, paths, rng):
    """A posterior sample of each wav file, normalised, (B, L, C)."""
    codec = model.codec
    samples = model.flow.config["audio_seq_len"] * codec.hop
    audios = [fit_audio(read_audio(path, codec.sampling_rate, 1), samples, "start") for path in paths]
    mean, std = codec.encode(torch.stack(audios))
    return codec.normalise(mean + std * torch.randn(std.shape, generator=rng))


def official_way(folder, model, clap, prompts, settings, steps):
    """The same iteration, prompt by prompt and file by file -> {stage: seconds}."""
    clock = Clock()
    count, rate = settings.num_samples, model.codec.sampling_rate
    paths = [[folder / f"{m}_{n}.wav" for n in range(count)] for m in range(len(prompts))]
    for m, row in enumerate(tqdm(prompts, "prompt by prompt", leave=False)):
        latents = samples_of_one_prompt(model, row, count, m * count, settings.guidance_scale, steps)
        clock("generate")
        for path, audio in zip(paths[m], decode(model.codec, latents, [row["duration"]] * count)):
            write_wav(path, audio, rate)
        clock("decode and score")
    scores = np.zeros((len(prompts), count))
    for m, row in enumerate(prompts):
        for n, path in enumerate(paths[m]):
            scores[m, n] = clap.scores([read_audio(path, rate, 1)], rate, [row["prompt"]]).item()
    winners, losers, usable = make_pairs(scores)
    chosen = np.flatnonzero(usable)
    clock("decode and score")

    flow, reference = (load_model(settings.checkpoint, parts=("flow",)).flow for _ in range(2))
    reference.requires_grad_(False)
    optimizer = make_optimizer(trainable(flow.train()))
    set_rate(optimizer, settings.learning_rate)
    rng = torch.Generator().manual_seed(0)
    for step in tqdm(range(settings.train_steps), "training from files", leave=False):
        first = step * settings.batch_size
        rows = [int(chosen[i % len(chosen)]) for i in range(first, first + settings.batch_size)]
        x1 = torch.cat([encoded_files(model, [paths[m][best[m]] for m in rows], rng)
                        for best in (winners, losers)])                         # (2B, L, C)
        x0 = torch.randn(x1[:len(rows)].shape, generator=rng).repeat(2, 1, 1)
        t = torch.randn(len(rows), generator=rng).sigmoid().repeat(2)           # (2B,)
        with torch.no_grad():
            ids, mask = model.text.tokenize([prompts[m]["prompt"] for m in rows])
            hidden = model.text.encode(ids, mask)
        seconds = torch.tensor([float(prompts[m]["duration"]) for m in rows])
        kept = torch.zeros(len(rows), dtype=torch.bool)                         # drops no condition
        batch = Batch(x1, x0, t, None, hidden, mask, seconds, kept)
        condition = text_condition(model.text, batch)
        errors = crpo.four_errors(flow, reference, condition, x1, x0, t)
        loss, _ = crpo.crpo_loss(*errors, settings.beta, settings.half, settings.fm_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clock("train")
    return clock.seconds


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    check_writable(Path(args.out) / "bench_crpo.md")
    settings = parse_flags("", crpo.FLAGS, [], {
        "prompts": args.prompts, "epochs": args.epochs, "checkpoint": args.checkpoint})
    settings.batch_size = min(settings.batch_size, args.prompts)
    settings.train_steps = -(-args.epochs * args.prompts // settings.batch_size)
    model, clap = load_model(args.checkpoint), load_clap(args.reward)
    ways = {f"ours, {settings.steps} steps": (ours, settings.steps)}
    for steps in {settings.steps: 0, args.official_steps: 0}:
        ways[f"official way, {steps} steps"] = (official_way, steps)

    # the ways take turns
    runs = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as work:
        pool = crpo.prompt_pool(None, settings.pool, args.prompts, model.flow.config["max_duration"])
        prompts = crpo.draw_prompts(Path(work), pool, args.prompts, 0, 1)
        for repeat in range(args.repeats + 1):
            for name, (way, steps) in ways.items():
                folder = Path(work) / "run"
                folder.mkdir()
                seconds = way(folder, model, clap, prompts, settings, steps)
                shutil.rmtree(folder)
                seconds["whole iteration"] = sum(seconds.values())
                runs[name] += [seconds] if repeat else []               # the first warms up
                shown = {stage: round(value, 1) for stage, value in seconds.items()}
                print(f"round {repeat}, {name}: {shown}", flush=True)

    # the table
    rows = []
    first = runs[next(iter(runs))]
    for stage in (*STAGES, "whole iteration"):
        row = [stage]
        for name, many in runs.items():
            values = [run[stage] for run in many]
            ratios = [value / fast[stage] for value, fast in zip(values, first)]
            ratio = f"; x {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            row.append(f"{statistics.median(values):.1f} s" + (ratio if many is not first else ""))
        rows.append(row)
    text = (f"{args.prompts} prompts x {settings.num_samples} clips, {settings.train_steps} training "
            f"steps of {settings.batch_size} pairs, {torch.get_num_threads()} threads. Medians of "
            f"{args.repeats} rounds; x: how many times as long as ours, with its range.")
    command = f"python -m bench.crpo {shlex.join(argv or sys.argv[1:])}"
    title = "An iteration of CRPO against the official way of driving the same model"
    write_report(args.out, "bench_crpo", title, command, [text, markdown(["stage", *ways], rows)],
                 {"runs": runs})
    print("next: python crpo.py runs it")


if __name__ == "__main__":
    run_main(main)
