"""Expert iteration: sample, keep the best decile by reward and CLAP, fine-tune, and again (second paper, III-D c).

    python expert_iteration.py                                     # runs/score, runs/ranker -> runs/experts/round_1
    python expert_iteration.py --checkpoint runs/other --rounds 3 --keep 64 --out runs/three

Each round is a folder: prompts.jsonl, candidates.safetensors, scores.jsonl (the ranker's reward, CLAP's score, and the
sum of their z-scores), experts.jsonl with experts.safetensors (the kept clips), tuned/ (the model fine-tuned on the
mixture), and in the folder itself the model after the polish on the kept clips alone, which makes the next round's
samples. Every stage leaves its file and is skipped where it is found: a killed run goes on and ends the same.

Where the paper is silent: prompts are drawn anew in each round; a kept clip is conditioned on its own reward, as other
training clips are; its sampled latents are trained on directly; both trainings start from the averaged weights (the
code: from raw ones of an earlier save) at a constant rate; the rates are the toy's (it learns at 2e-3, not at 1e-4).
"""
import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import train_fm
from common import (UserError, append_jsonl, check_writable, choose_device, derive_seed, file_hash, in_range,
                    parse_arguments, read_json, read_jsonl, run_main, save_tensors, write_json, write_jsonl)
from crpo import policy_hash
from model import load_model
from preferences import draw_prompts, make_candidates, prompt_pool
from reward import REWARD
from sample import add_sampling_flags, check_sampling_flags, decode

FREE = ("rounds", "out", "device", "save_clips", "save_every")      # another value goes on with the same run


# ----------------------------------------------------------------------------- the algorithm

def z_blend(*scores):
    """The sum of each score's z-values (N,): equal weights; a score that is constant counts nothing."""
    total = np.zeros(len(scores[0]))
    for values in scores:
        values = np.asarray(values, dtype=float)
        if not np.isfinite(values).all():
            raise UserError("a reward is NaN or infinite; is the ranker whole?")
        total += (values - values.mean()) / (values.std() or 1.0)
    return total


def best_places(blend, keep):
    """Places of the best: `keep` of them if it is 1 or more, else that share, at least one; the best first."""
    count = int(keep) if keep >= 1 else max(1, round(keep * len(blend)))
    return np.argsort(-blend, kind="stable")[:count]


# ----------------------------------------------------------------------------- a round

def score_samples(args, folder, seed, prompts, latents, model, ranker, clap):
    """scores.jsonl: reward, CLAP score and blend of every sample, with what makes it again -> rows."""
    path = folder / "scores.jsonl"
    done = read_jsonl(path) if path.is_file() else []
    if len(done) == len(prompts) and "blend" in done[-1]:
        return done
    done = done[:len(done) // args.save_clips * args.save_clips]                   # whole blocks stay
    write_jsonl(path, done)
    for start in tqdm(range(len(done), len(prompts), args.save_clips), desc="scoring", unit=f" x {args.save_clips}"):
        block = prompts[start:start + args.save_clips]
        audios = decode(model, latents[start:start + args.save_clips], [row["duration"] for row in block])
        asked = [row["prompt"] for row in block]
        rewards = ranker.scores(audios, model.codec.sampling_rate, asked).tolist()
        fits = clap.scores(audios, model.codec.sampling_rate, asked).tolist()
        for i, (row, reward, fit) in enumerate(zip(block, rewards, fits), start):
            done.append({**row, "seed": seed, "index": i, "reward": reward, "clap": fit})
            append_jsonl(path, done[-1])
    for row, value in zip(done, z_blend([row["reward"] for row in done], [row["clap"] for row in done])):
        row["blend"] = float(value)
    write_jsonl(path, done)
    return done


def keep_best(args, folder, rows, latents):
    """experts.jsonl and experts.safetensors: the rows and latents with the highest blend; -> the kept rows."""
    if not (folder / "experts.jsonl").is_file():
        chosen = best_places(np.array([row["blend"] for row in rows]), args.keep)
        save_tensors(folder / "experts.safetensors", {"latents": latents[torch.as_tensor(chosen.copy())].half()})
        write_jsonl(folder / "experts.jsonl", [{**rows[i], "score": rows[i]["reward"]} for i in chosen])
    return read_jsonl(folder / "experts.jsonl")


def tune(args, policy, folder, out, steps, learning_rate, seed, only):
    """One training of train_fm.py with the experts of `folder`, in the mixture or alone; resumes what it finds."""
    flags = ["--checkpoint", policy, "--data", args.data, "--score_column", args.score_column, "--experts", folder,
             "--steps", steps, "--learning_rate", learning_rate, "--no-decay", "--batch_size", args.batch_size,
             "--score_dropout", args.score_dropout, "--dropout", args.dropout, "--seed", seed, "--ema", args.ema,
             "--save_every", args.save_every, "--val_every", 10 ** 9, "--val_clips", 64, "--log_every", 25,
             "--device", args.device, "--dtype", args.dtype, "--out", out]
    flags += ["--experts_only"] if only else ["--oversample", args.oversample]
    flags += ["--cache", args.cache] if args.cache else []
    flags += ["--audio_dir", args.audio_dir] if args.audio_dir else []
    if not (Path(out) / "finished").is_file():
        train_fm.train(train_fm.parse_args([str(flag) for flag in flags]))
        (Path(out) / "finished").touch()


def run_round(args, k, policy, pool, ranker, clap, device):
    """Round k from the model folder `policy`; -> its report."""
    folder = Path(args.out) / f"round_{k}"
    folder.mkdir(parents=True, exist_ok=True)
    seed = derive_seed(args.seed, "round", k) % 2 ** 40
    model = load_model(policy, device)
    prompts = draw_prompts(args, folder, k, pool)
    latents = make_candidates(args, folder, seed, prompts, model)
    rows = score_samples(args, folder, seed, prompts, latents, model, ranker, clap)
    kept = keep_best(args, folder, rows, latents)
    tune(args, policy, folder, folder / "tuned", args.tuning_steps, args.learning_rate, seed, False)
    tune(args, folder / "tuned", folder, folder, args.polish_steps, args.polish_rate, seed, True)
    report = {"samples": len(rows), "kept": len(kept), "policy": policy_hash(str(policy)), "seed": seed}
    for name in ("reward", "clap"):
        report |= {f"{name} of samples": float(np.mean([row[name] for row in rows])),
                   f"{name} of kept": float(np.mean([row[name] for row in kept]))}
    write_json(folder / "report.json", report)
    return report


# ----------------------------------------------------------------------------- command line

def make_parser():
    """All flags: toy defaults beside the paper's values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(group, name, default, what, kind=None, **more):
        group.add_argument(name, default=default, type=kind or type(default),
                           help=what.replace("DEFAULT", "%(default)s"), **more)
    group = parser.add_argument_group("what it starts from")
    flag(group, "--checkpoint", "runs/score", "model with a score head (default: DEFAULT, of train_fm.py "
         "--score_column)")
    flag(group, "--data", "runs/scored/scored.jsonl", "manifest of the mixture (default: DEFAULT)")
    flag(group, "--score_column", "score", "its column of scores (default: DEFAULT)")
    flag(group, "--audio_dir", None, "where its sounds are (default: beside it)", str)
    flag(group, "--cache", None, "of its latents (default: as train_fm.py's)", str)
    group = parser.add_argument_group("sample and keep (second paper, III-D c)")
    flag(group, "--rounds", 1, "default: DEFAULT; paper: 1")
    flag(group, "--samples", 600, "clips of different prompts in a round (default: DEFAULT; paper: about 600)")
    flag(group, "--score", 1.5, "that they are sampled at (default: DEFAULT, above 95 %% of the training scores; "
         "paper: 2.0 of at most 2.76)")
    flag(group, "--keep", 0.1, "share of them, or count, that is kept (default: DEFAULT; paper: 64 of about 600)")
    flag(group, "--pool", 20000, "training scenes whose prompts they have (default: DEFAULT)")
    flag(group, "--prompt_file", None, "the pool instead: .txt or .jsonl (default: none)", str)
    flag(group, "--ranker", "runs/ranker", "reward, of reward.py train_ranker (default: DEFAULT)")
    flag(group, "--clap", str(REWARD), "CLAP (default: the bundled clap_reward)")
    add_sampling_flags(parser, ("steps", "guidance_scale", "solver"), steps=10, guidance_scale=1.5)
    group = parser.add_argument_group("fine-tune and polish (second paper, III-D c)")
    flag(group, "--oversample", 5, "times that the mixture holds each kept clip (default: DEFAULT; paper: 5)")
    flag(group, "--tuning_steps", 400, "on the mixture (default: DEFAULT; paper: 30000)")
    flag(group, "--learning_rate", 2e-4, "constant (default: DEFAULT; paper: 1e-5)")
    flag(group, "--polish_steps", 60, "on the kept clips alone (default: DEFAULT; paper: 5000)")
    flag(group, "--polish_rate", 5e-5, "constant (default: DEFAULT; paper: 1e-6)")
    flag(group, "--batch_size", 32, "default: DEFAULT; paper: 64")
    flag(group, "--dropout", 0.1, "share of examples losing their text and score (default: DEFAULT; paper: 0.1)")
    flag(group, "--score_dropout", 0.1, "of the others, losing their score (default: DEFAULT; paper: 0.1)")
    flag(group, "--ema", 0.99, "decay of the weight average (default: DEFAULT)")
    group = parser.add_argument_group("run")
    flag(group, "--seed", 0, "of prompts, samples and training (default: DEFAULT)")
    flag(group, "--out", "runs/experts", "a run found there goes on (default: DEFAULT)")
    flag(group, "--generation_batch", 32, "clips at a time (default: DEFAULT)")
    flag(group, "--save_clips", 64, "clips between two saves (default: DEFAULT)")
    flag(group, "--save_every", 100, "steps between two saves (default: DEFAULT)")
    flag(group, "--dtype", "auto", "of the training (default: DEFAULT)", choices=("auto", "float32", "bfloat16"))
    flag(group, "--device", "auto", "auto, cuda, mps or cpu (default: DEFAULT)")
    return parser


def parse_args(argv=None):
    args = parse_arguments(make_parser(), argv)
    check_sampling_flags(args)
    for name, low, high in (("rounds", 1, 1000), ("samples", 2, 1e8), ("keep", 1e-6, 1e8), ("pool", 2, 1e8),
                            ("oversample", 1, 1e6), ("tuning_steps", 1, 1e9), ("learning_rate", 0, 10),
                            ("polish_steps", 1, 1e9), ("polish_rate", 0, 10), ("batch_size", 1, 1e6),
                            ("dropout", 0, 1), ("score_dropout", 0, 1), ("ema", 0, 1), ("seed", 0, 2 ** 50),
                            ("generation_batch", 1, 1e6), ("save_clips", 1, 1e9), ("save_every", 1, 1e9)):
        in_range(f"--{name}", getattr(args, name), low, high)
    if args.keep > args.samples:
        raise UserError(f"--keep {args.keep:g} is more than --samples {args.samples}")
    args.prompts, args.num_samples = args.samples, 1        # as preferences.py calls them
    return args


def run(args):
    """All rounds; returns their reports."""
    from clap import load_clap
    from ranker import Judged
    out, device = Path(args.out), choose_device(args.device)
    check_writable([out / "config.json"])
    flow = load_model(args.checkpoint, parts=("flow",)).flow
    if not flow.config.get("score_head"):
        raise UserError(f"{args.checkpoint} has no score head; python train_fm.py --score_column makes one")
    ranker, clap = Judged(args.ranker, device), load_clap(args.clap, device)
    pool = prompt_pool(args, flow.config["max_duration"])
    if len(pool) < args.samples:
        raise UserError(f"--samples {args.samples} is more than the {len(pool)} prompts of the pool; lower it, or give "
                        "more")
    if not Path(args.data).is_file():
        raise UserError(f"manifest {args.data} is missing; python reward.py score_manifest writes one")
    settings = {name: value for name, value in vars(args).items() if name not in FREE} | {
        "policy": policy_hash(args.checkpoint), "manifest": file_hash(args.data)}
    started = read_json(out / "config.json") if (out / "config.json").is_file() else settings
    for name in settings:
        if started.get(name) != json.loads(json.dumps(settings[name])):
            raise UserError(f"the run in {out} was started with {name} = {started.get(name)}, now it is "
                            f"{settings[name]}; give the same flags to go on, or another --out")
    write_json(out / "config.json", settings)
    policy, reports = args.checkpoint, []
    for k in range(1, args.rounds + 1):
        report = out / f"round_{k}" / "report.json"
        reports.append(read_json(report) if report.is_file() else
                       run_round(args, k, policy, pool, ranker, clap, device))
        print("round {}: {samples} samples, reward {reward of samples:.3f}, CLAP {clap of samples:.3f}; {kept} kept, "
              "reward {reward of kept:.3f}, CLAP {clap of kept:.3f}".format(k, **reports[-1]))
        policy = out / f"round_{k}"
    return reports


def main(argv=None):
    args = parse_args(argv)
    run(args)
    last = Path(args.out) / f"round_{args.rounds}"
    print(f"wrote {args.out}: round_1 to {args.rounds} (models, scores, kept clips)")
    print(f"next: python crpo.py --checkpoint {shlex.quote(str(last))} --score_head v2 --score {args.score:g} "
          f"--guidance_scale {args.guidance_scale:g} --iterations 1 --out runs/hybrid")


if __name__ == "__main__":
    run_main(main)
