"""Speed, side by side. `crpo`: an iteration of this repository against the same model driven as officially.

    python bench.py crpo                                 # 3 pairs of runs, on a CPU a few minutes
    python bench.py crpo --prompts 48 --repeats 1

Both make N clips of the same M prompts with the same sampler settings, score them by the same CLAP, pair best and
worst, and take the same number of training steps on the same pairs in float32. The official way (its shell script
and three Python files): one prompt at a time with its N clips, each clip to a wav file; CLAP reads file after file,
embeds one clip and one text at a time; every training step reads its wav files again, encodes them by the VAE and
their prompts by T5. Runs alternate, ours first; times are wall-clock seconds, the ratio is the median of the pairs'.
"""
import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import crpo
from audio import read_audio, write_wav
from clap import load_clap
from common import in_range, parse_arguments, run_main, write_json
from evaluate import markdown
from model import load_model
from preferences import encode_all, make_candidates, prompt_pool, draw_prompts, score_candidates, write_pairs
from reward import make_pairs
from sample import decode, generate
from train_fm import Batch, text_condition
from training import make_optimizer, set_rate, trainable


def clock(times, name, began):
    """Add the seconds since `began` to times[name]; the time now."""
    now = time.perf_counter()
    times[name] = times.get(name, 0.0) + now - began
    return now


def train_step(args, flow, reference, optimizer, encoder, batch, x1, x0, t):
    """One step of L_CRPO, the same for both ways."""
    errors = crpo.four_errors(flow, reference, text_condition(encoder, batch, "empty_prompt"), x1, x0, t)
    loss, _ = crpo.crpo_loss(*errors, args.beta, args.half, args.fm_weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def learner(args, model):
    """A fresh policy in training mode, its reference and optimizer."""
    flow, reference = (load_model(args.checkpoint, parts=("flow",)).flow for _ in range(2))
    reference.requires_grad_(False)
    optimizer = make_optimizer(trainable(flow))
    set_rate(optimizer, 1e-6)
    return flow.train(), reference, optimizer


def ours(args, folder, model, clap, prompts):
    """An iteration as crpo.py runs it -> {stage: seconds}, scores (M, N)."""
    times, began = {}, time.perf_counter()
    latents = make_candidates(args, folder, args.seed, prompts, model)
    began = clock(times, "generate", began)
    scores = score_candidates(args, folder, args.seed, prompts, latents, model, clap, "bench")
    rows, tensors = write_pairs(args, folder, prompts, scores, latents, model)
    began = clock(times, "decode and score", began)
    flow, reference, optimizer = learner(args, model)
    began = time.perf_counter()
    pairs = crpo.with_conditions(rows, tensors, model)
    for step in range(args.train_steps):
        places = range(step * args.batch_size, (step + 1) * args.batch_size)
        train_step(args, flow, reference, optimizer, model.text, *crpo.draw_pairs(pairs, places, args, "cpu"))
    clock(times, "train", began)
    return times, scores


def official_way(args, folder, model, clap, prompts):
    """The same iteration, prompt by prompt and file by file -> {stage: seconds}, scores (M, N)."""
    times, rate, codec = {}, model.codec.sampling_rate, model.codec
    began = time.perf_counter()
    for m, row in enumerate(prompts):
        count = args.num_samples
        latents = generate(model, [row["prompt"]] * count, [row["duration"]] * count, args.seed,
                           range(m * count, (m + 1) * count), args.steps, args.guidance_scale, args.solver,
                           batch_size=count)
        began = clock(times, "generate", began)
        for n, audio in enumerate(decode(model, latents, [row["duration"]] * count, count)):
            write_wav(folder / f"{m}_{n}.wav", audio, rate)
        began = clock(times, "decode and score", began)
    scores = np.array([[clap.scores([read_audio(folder / f"{m}_{n}.wav", rate, 1)], rate, [row["prompt"]]).item()
                        for n in range(args.num_samples)] for m, row in enumerate(prompts)])
    winners, losers, kept = make_pairs(scores)
    chosen = np.flatnonzero(kept)
    clock(times, "decode and score", began)
    flow, reference, optimizer = learner(args, model)
    began, rng = time.perf_counter(), torch.Generator().manual_seed(0)
    for step in range(args.train_steps):
        rows = [int(chosen[i % len(chosen)]) for i in range(step * args.batch_size, (step + 1) * args.batch_size)]
        x1 = []
        for best in (winners, losers):
            audios = [read_audio(folder / f"{m}_{best[m]}.wav", rate, codec.audio_channels) for m in rows]
            mean, std = encode_all(model, audios, len(audios))
            x1.append(codec.normalise(mean + std * torch.randn(mean.shape, generator=rng)))
        with torch.no_grad():
            ids, mask = model.text.tokenize([prompts[m]["prompt"] for m in rows])
            hidden = model.text.encode(ids, mask)
        seconds = torch.tensor([prompts[m]["duration"] for m in rows])
        dropped = torch.rand(len(rows), generator=rng) < args.dropout
        batch = Batch(None, None, None, None, hidden, mask, seconds, dropped)
        x0 = torch.randn(x1[0].shape, generator=rng).repeat(2, 1, 1)
        t = torch.randn(len(rows), generator=rng).sigmoid().repeat(2)
        train_step(args, flow, reference, optimizer, model.text, batch, torch.cat(x1), x0, t)
    clock(times, "train", began)
    return times, scores


def bench_crpo(args):
    """Alternate both ways, print and write the table."""
    model, clap = load_model(args.checkpoint), load_clap(args.reward)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        prompts = draw_prompts(args, folder, 1, prompt_pool(args, model.flow.config["max_duration"]))
        ways, runs = {"ours": ours, "official way": official_way}, {"ours": [], "official way": []}
        agreement = []
        for repeat in range(args.repeats + 1):                              # the first pair warms up
            scores = {}
            for name, way in ways.items():
                place = folder / f"{repeat}_{name[:4]}"
                place.mkdir()
                times, scores[name] = way(args, place, model, clap, prompts)
                shutil.rmtree(place)
                if repeat:
                    runs[name].append(times)
                print(f"{'warm-up' if not repeat else f'run {repeat}'}, {name}: " + ", ".join(
                    f"{stage} {value:.1f} s" for stage, value in times.items()), flush=True)
            agreement.append(float(np.abs(scores["ours"] - scores["official way"]).max()))
    clips, pairs = args.prompts * args.num_samples, args.train_steps * args.batch_size
    stages = {"generate": clips, "decode and score": clips, "train": pairs}
    rows, ratios = [], {}
    for stage, count in (*stages.items(), ("whole iteration", None)):
        seconds = {name: [sum(run.values()) if count is None else run[stage] for run in many]
                   for name, many in runs.items()}
        ratios[stage] = [slow / fast for fast, slow in zip(seconds["ours"], seconds["official way"])]
        middle = {name: statistics.median(values) for name, values in seconds.items()}
        rows.append([stage, *(f"{middle[name]:.1f} s" + (f" ({count / middle[name]:.2f} a second)" if count else "")
                              for name in runs),
                     f"{statistics.median(ratios[stage]):.2f} ({min(ratios[stage]):.2f} to {max(ratios[stage]):.2f})"])
    text = "\n\n".join([
        "# An iteration of CRPO against the official way of driving the same model",
        f"    python bench.py crpo --prompts {args.prompts} --repeats {args.repeats}",
        f"{args.prompts} prompts x {args.num_samples} clips, {args.steps} {args.solver} steps, {args.train_steps} "
        f"training steps of {args.batch_size} pairs, {torch.get_num_threads()} threads. Median of {args.repeats} pairs "
        f"of runs, ratio with its range. Largest difference of a score between the ways: {max(agreement):.1e}.",
        markdown(["stage", "ours", "official way", "ratio"], rows)]) + "\n"
    path = Path(args.out) / "bench_crpo.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    write_json(path.with_suffix(".json"), {"settings": vars(args), "runs": runs, "ratios": ratios})
    print(f"{text}\nwrote {path} and {path.with_suffix('.json')}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["crpo"], help="what to time")
    parser.add_argument("--prompts", type=int, default=24, help="M (default: 24)")
    parser.add_argument("--train_steps", type=int, help="default: the --epochs of crpo.py over M pairs")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs after one to warm up (default: 3)")
    parser.add_argument("--out", default="results", help="folder of the table (default: results)")
    args = parse_arguments(parser, argv)
    in_range("--prompts", args.prompts, 1, 1e6)
    in_range("--repeats", args.repeats, 1, 1000)
    settings = vars(crpo.parse_args(["--prompts", str(args.prompts)]))
    given = {name: value for name, value in vars(args).items() if value is not None}
    args = argparse.Namespace(**{**settings, **given})
    args.batch_size = min(args.batch_size, args.prompts)
    if getattr(args, "train_steps", None) is None:
        args.train_steps = -(-args.epochs * args.prompts // args.batch_size)
    bench_crpo(args)


if __name__ == "__main__":
    run_main(main)
