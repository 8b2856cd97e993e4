"""An iteration of CRPO, side by side with the official way of driving the same model.

    python -m bench.crpo                                  # 3 rounds on two cores: 16 minutes
    python -m bench.crpo --prompts 12 --repeats 1
    python -m bench.crpo --official_steps 10              # at our own number of solver steps alone

All make N clips of the same M prompts, score them by the same CLAP, pair best and worst, and take
the same number of training steps. Ours is what crpo.py runs, sampling in --dtype, but for one pair
a prompt and all rounds of Griffin-Lim. The official way (its shell script and three Python files)
samples one prompt at a time and writes each clip to a wav file; CLAP reads file after file, one
clip and one text at a time; every training step reads its wav files again, encodes them by the VAE
and their prompts by T5, in float32: at our number of solver steps, and at its own 50. Both use the
decoder of this repository. Wall-clock seconds; ratios are medians over rounds.
B pairs of a step, L latent frames, C latent channels.
"""
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import crpo
from bench.official import Clock, comparison
from lib.audio import fit_audio, read_audio, write_wav
from lib.common import (BASE, check_writable, choose_dtype, command_line, flag, markdown,
                        parse_flags, pick, run_main, write_report)
from lib.losses import pair_loss, with_defaults
from lib.text import concat_conditions, encode_prompts, null_condition
from lib.weights import make_optimizer, set_rate, trainable
from model import load_model, load_policy
from reward import REWARD, load_clap, make_pairs, pairs_of
from sample import decode, euler, guided_velocity, noise_for, sampler_of, schedule
from train_fm import interpolate

FLAGS = {"what is timed": [
    flag("--prompts", 48, "M", 2, 20000),
    flag("--num_samples", 5, "N, clips of each prompt (paper: 5)", 2, 1000),
    flag("--epochs", 24, "passes over the pairs, one pair a prompt", 1, 1e6),
    flag("--official_steps", 50, "solver steps of the official way (official code: 50)", 1, 1000),
    flag("--repeats", 3, "rounds, after one to warm up", 1, 1000),
    flag("--checkpoint", str(BASE), "model folder"),
    flag("--out", "runs/bench", "folder of the table (the tracked one: results)"),
]}
STAGES = ("generate", "decode and score", "train", "whole iteration")


def ours(folder, model, clap, prompts, settings, steps):
    """An iteration as crpo.py runs it -> {stage: seconds}. Its training saves as always."""
    clock = Clock()
    count, block = settings.num_samples, settings.save_clips
    rows = [row for row in prompts for _ in range(count)]
    sampler = sampler_of(settings)
    latents = crpo.make_candidates(folder, model, rows, 0, sampler, block)
    clock("generate")
    scored = crpo.score_candidates(folder, model.codec, rows, latents, {"reward": clap}, {}, block)
    pairs = pairs_of(folder, scored, latents, count)
    clock("decode and score")
    loss, how = pick(crpo.Loss, settings), pick(crpo.Optimisation, settings)
    device = torch.device("cpu")
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
    audios = []
    for path in paths:
        audio = read_audio(path, codec.sampling_rate, 1)
        audios.append(fit_audio(audio, samples, "start"))
    mean, std = codec.encode(torch.stack(audios))
    return codec.normalise(mean + std * torch.randn(std.shape, generator=rng))


def official_way(folder, model, clap, prompts, settings, steps):
    """The same iteration, prompt by prompt and file by file -> {stage: seconds}."""
    clock = Clock()
    count, rate = settings.num_samples, model.codec.sampling_rate
    guidance_scale = settings.guidance_scale
    scores = np.zeros((len(prompts), count))
    for m, row in enumerate(tqdm(prompts, "prompt by prompt", leave=False)):
        latents = samples_of_one_prompt(model, row, count, m * count, guidance_scale, steps)
        clock("generate")
        audios = decode(model.codec, latents, [row["duration"]] * count)
        for n, audio in enumerate(audios):
            write_wav(folder / f"{m}_{n}.wav", audio, rate)
        clock("decode and score")
    for m, n in np.ndindex(scores.shape):
        audio = read_audio(folder / f"{m}_{n}.wav", rate, 1)
        scores[m, n] = clap.scores([audio], rate, [prompts[m]["prompt"]]).item()
    pairs, winners, losers = make_pairs(scores)
    clock("decode and score")

    flow = load_model(settings.checkpoint, parts=("flow",)).flow.train()
    reference = load_model(settings.checkpoint, parts=("flow",)).flow.requires_grad_(False)
    optimizer = make_optimizer(trainable(flow))
    set_rate(optimizer, settings.learning_rate)
    rng = torch.Generator().manual_seed(0)
    size = settings.batch_size
    for step in tqdm(range(settings.train_steps), "training from files", leave=False):
        rows = np.arange(len(pairs)).take(range(step * size, (step + 1) * size), mode="wrap")
        paths = [folder / f"{pairs[p]}_{best[p]}.wav" for best in (winners, losers) for p in rows]
        x1 = encoded_files(model, paths, rng)                                   # (2B, L, C)
        x0 = torch.randn(x1[:size].shape, generator=rng).repeat(2, 1, 1)
        t = torch.randn(size, generator=rng).sigmoid().repeat(2)                # (2B,)
        texts = [prompts[pairs[p]]["prompt"] for p in rows]
        durations = torch.tensor([float(prompts[pairs[p]]["duration"]) for p in rows])
        with torch.no_grad():
            condition = encode_prompts(model.text, texts, durations)
        xt, target = interpolate(x1, x0, t)
        condition = concat_conditions(condition, condition)                     # 2B rows
        both = crpo.two_velocities(flow, reference, xt, t, condition)
        loss, _ = pair_loss(*both, xt, target, t, None, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clock("train")
    return clock.seconds


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    check_writable(Path(args.out) / "bench_crpo.md")
    settings = parse_flags("", crpo.FLAGS, [], {
        "prompts": args.prompts, "num_samples": args.num_samples, "epochs": args.epochs,
        "checkpoint": args.checkpoint})
    settings.batch_size = min(settings.batch_size, args.prompts)
    settings.train_steps = math.ceil(args.epochs * args.prompts / settings.batch_size)
    device = torch.device("cpu")
    dtype, _ = choose_dtype(settings.dtype, device)
    sampling_policy = load_policy(args.checkpoint, device, None, settings.generation_batch, dtype)
    model, clap = load_model(args.checkpoint), load_clap(REWARD)
    config = model.flow.config
    loss = with_defaults(pick(crpo.Loss, settings), config["audio_seq_len"], config["in_channels"])
    settings.beta, settings.kl_weight = loss.beta, loss.kl_weight
    longest = config["max_duration"]
    pool = crpo.prompt_pool(None, settings.pool, args.prompts, longest)
    ways = {f"ours, {settings.steps} steps": (ours, sampling_policy, settings.steps)}
    for steps in (settings.steps, args.official_steps):
        ways[f"official way, {steps} steps"] = (official_way, model, steps)

    # the ways take turns
    runs = {name: [] for name in ways}
    for repeat in range(args.repeats + 1):
        for name, (way, policy, steps) in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                prompts = crpo.draw_prompts(Path(folder), pool, args.prompts, 0, 1)
                seconds = way(Path(folder), policy, clap, prompts, settings, steps)
            seconds["whole iteration"] = seconds.total()
            if repeat:                                          # the first warms up
                runs[name].append(seconds)
            shown = {stage: round(value, 1) for stage, value in seconds.items()}
            print(f"round {repeat}, {name}: {shown}", flush=True)

    # the table
    text = (f"{args.prompts} prompts x {settings.num_samples} clips, {settings.train_steps} "
            f"training steps of {settings.batch_size} pairs, {torch.get_num_threads()} threads. "
            f"Seconds, medians of {args.repeats} rounds; x: times ours, with the range.")
    table = markdown(["way", *STAGES], comparison(runs, STAGES))
    title = "An iteration of CRPO against the official way of driving the same model"
    line = command_line("-m bench.crpo", argv)
    write_report(args.out, "bench_crpo", title, line, [text, table], {"runs": runs})
    print("next: python crpo.py runs it")


if __name__ == "__main__":
    run_main(main)
