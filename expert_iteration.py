"""Expert iteration: sample, keep the best decile by two scores, fine-tune, and again (III-D c).

    python expert_iteration.py                          # runs/score, runs/ranker -> runs/experts
    python expert_iteration.py --checkpoint runs/other --rounds 3 --keep 64 --out runs/three
    python expert_iteration.py --prompts 64 --tuning_steps 40 --polish_steps 8 --out runs/few

They need runs/score and runs/ranker (docs/training.md). A round (second paper) is a folder:
prompts.jsonl, candidates.safetensors, scores.jsonl (reward, CLAP's score, the sum of their
z-scores), experts.jsonl and .safetensors (the kept clips), tuned/ (fine-tuned on the mixture), and
the model after the polish on the kept clips alone.
A stage whose file is there is skipped. Where the paper is silent: prompts are drawn anew in each
round; a kept clip is conditioned on its own reward; its sampled latents are trained on directly;
both trainings start from averaged weights (code: from raw ones) at a constant, the toy's, rate.
N clips, L latent frames, C latent channels.
"""
from pathlib import Path

import numpy as np

import train_fm
from crpo import draw_prompts, make_candidates, prompt_pool, score_candidates
from lib.common import (DEVICE, DTYPE, UserError, check_settings, choose_device, choose_dtype,
                        derive_seed, file_hash, flag, parse_flags, read_json, read_jsonl,
                        reading, run_main, write_json, write_jsonl)
from lib.weights import code_hash, policy_hash, run_folder, save_tensors
from model import load_policy
from ranker import TrainedRanker
from reward import REWARD, load_clap
from sample import sampler_of

FLAGS = {"what it starts from": [
    flag("--checkpoint", "runs/score", "model with a score head (train_fm.py --score_column)"),
    flag("--data", "runs/scored/scored.jsonl", "manifest of the mixture"),
    flag("--score_column", "score", "its column of scores"),
    flag("--audio_dir", None, "folder of its sounds; none: beside it"),
    flag("--cache", None, "folder of its latents; none: that of train_fm.py"),
], "sample and keep (second paper, III-D c)": [
    flag("--rounds", 1, "times to sample and fine-tune (paper: 1)", 1),
    flag("--prompts", 600, "clips of different prompts (paper: about 600)", 2, alias="--samples"),
    flag("--score", 1.5, "score asked for, above 95 % of the scores (paper: 2.0)", -1e6, 1e6),
    flag("--keep", 0.1, "kept share of them, or count (paper: 64 of about 600)", 1e-6),
    flag("--pool", 20000, "training scenes whose prompts make the pool", 2),
    flag("--prompt_file", None, "the pool instead: .txt or .jsonl"),
    flag("--ranker", "runs/ranker", "reward (of world.train_ranker)"),
    flag("--clap", str(REWARD), "CLAP, the second score"),
    flag("--steps", 10, "solver steps", 1),
    flag("--guidance_scale", 1.5, "classifier-free guidance", 0),
], "fine-tune and polish (second paper, III-D c)": [
    flag("--oversample", 5, "times that the mixture holds each kept clip (paper: 5)", 1),
    flag("--tuning_steps", 400, "optimizer steps on the mixture (paper: 30000)", 1),
    flag("--learning_rate", 2e-4, "its constant rate (paper: 1e-5)", 0),
    flag("--polish_steps", 60, "steps on the kept clips alone (paper: 5000)", 1),
    flag("--polish_rate", 5e-5, "its constant rate (paper: 1e-6)", 0),
    flag("--batch_size", 32, "examples of a step (paper: 64)", 1),
], "run": [
    flag("--seed", 0, "seed of prompts, samples and training", 0, 2 ** 50),
    flag("--out", "runs/experts", "run folder; a run found there goes on"),
    flag("--generation_batch", 32, "clips at a time", 1),
    flag("--save_clips", 64, "clips between two saves", 1),
    flag("--save_every", 100, "steps between two saves", 1), DTYPE, DEVICE]}
MAY_CHANGE = {"rounds", "out", "device", "save_every", "debug"}
TRAINING = ("data", "score_column", "audio_dir", "cache", "oversample", "batch_size", "save_every",
            "dtype", "device")                  # flags of train_fm.py


def z_blend(*scores):
    """The sum of each score's z-values (N,): equal weights; a constant score counts nothing."""
    total = 0.0
    for values in scores:
        values = np.asarray(values, dtype=float)
        if not np.isfinite(values).all():
            raise UserError("a reward is NaN or infinite; is the ranker whole?")
        total = total + (values - values.mean()) / (values.std() or 1.0)
    return total


def best_places(blend, keep):
    """Places of the best, best first: `keep` of them, or below 1 that share, at least one."""
    count = int(keep) if keep >= 1 else max(1, round(keep * len(blend)))
    return np.argsort(-blend, kind="stable")[:count]


def keep_best(folder, rows, latents, keep):
    """experts.jsonl and experts.safetensors: the rows and latents (N, L, C) of the best blends."""
    path = folder / "experts.jsonl"
    if not path.is_file():
        chosen = best_places(np.array([row["blend"] for row in rows]), keep).tolist()
        save_tensors(folder / "experts.safetensors", {"latents": latents[chosen].half()})
        write_jsonl(path, [{**rows[i], "score": rows[i]["reward"]} for i in chosen])
    return read_jsonl(path)


def tune(out, experts, **settings):
    """One training of train_fm.py with the experts of a round; resumes what it finds."""
    if not (out / "finished").is_file():
        train_fm.train(out=str(out), experts=str(experts), decay=False, ema=0.99,
                       val_every=10 ** 9, val_clips=64, log_every=25, **settings)
        (out / "finished").touch()


def run(**settings):
    """All rounds, settings named as the flags -> their reports."""
    args = parse_flags(__doc__, FLAGS, [], settings)
    out, device = Path(args.out), choose_device(args.device)
    with run_folder(out, "expert_iteration.py", args.cache):
        if args.keep > args.prompts:
            raise UserError(f"--keep {args.keep:g} is more than --prompts {args.prompts}")
        clap = load_clap(args.clap, device)
        scorers = {"reward": TrainedRanker(args.ranker, device), "clap": clap}
        sampler = sampler_of(args)
        dtype, _ = choose_dtype(args.dtype, device)
        policy = str(args.checkpoint)
        config = load_policy(policy, device).flow.config
        if not config.get("score_head"):
            raise UserError(f"--checkpoint needs a model with a score head, which {policy} has not")
        pool = prompt_pool(args.prompt_file, args.pool, args.prompts, config["max_duration"])

        # a run found in --out goes on under the same settings
        wanted = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        with reading(args.data, "python ranker.py writes a manifest with scores"):
            wanted |= {"policy": policy_hash(policy), "manifest": file_hash(args.data),
                       "code": code_hash()}
        if (out / "config.json").is_file():
            check_settings(out, read_json(out / "config.json", dict), wanted)
        write_json(out / "config.json", wanted)
        training = {name: getattr(args, name) for name in TRAINING}

        reports = []
        for k in range(1, args.rounds + 1):
            folder = out / f"round_{k}"
            if not (folder / "report.json").is_file():
                # sample, one clip of each prompt
                seed = derive_seed(args.seed, "round", k) % 2 ** 40
                model = load_policy(policy, device, None, args.generation_batch, dtype)
                rows = draw_prompts(folder, pool, args.prompts, args.seed, k)
                latents = make_candidates(folder, model, rows, seed, sampler, args.save_clips)

                # score, blend, keep the best
                rows = score_candidates(folder, model.codec, rows, latents, scorers, {"seed": seed},
                                        args.save_clips)
                rewards = [row["reward"] for row in rows]
                fits = [row["clap"] for row in rows]
                for row, value in zip(rows, z_blend(rewards, fits)):
                    row["blend"] = float(value)
                write_jsonl(folder / "scores.jsonl", rows)
                kept = keep_best(folder, rows, latents, args.keep)

                # fine-tune on the mixture, polish on the kept clips alone
                training["seed"] = seed
                tune(folder / "tuned", folder, checkpoint=policy, train_steps=args.tuning_steps,
                     learning_rate=args.learning_rate, **training)
                tune(folder, folder, checkpoint=str(folder / "tuned"), experts_only=True,
                     train_steps=args.polish_steps, learning_rate=args.polish_rate, **training)
                report = {"samples": len(rows), "kept": len(kept), "policy": policy_hash(policy)}
                for name in scorers:
                    report[f"{name} of samples"] = float(np.mean([row[name] for row in rows]))
                    report[f"{name} of kept"] = float(np.mean([row[name] for row in kept]))
                write_json(folder / "report.json", report)
            reports.append(read_json(folder / "report.json", dict))
            print(f"round {k}: {reports[-1]}")
            policy = str(folder)
        return reports


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    run(**vars(args))
    print(f"next: python crpo.py --checkpoint {args.out}/round_{args.rounds} --score_head v2 "
          f"--score {args.score:g} --guidance_scale {args.guidance_scale:g} --out runs/hybrid")


if __name__ == "__main__":
    run_main(main)
