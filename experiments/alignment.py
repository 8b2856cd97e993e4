"""What the reward alone would gain: the best of N clips (paper A.3, Table 5).

    python -m experiments.alignment best_of
    python -m experiments.alignment best_of --counts 1 2 --prompts 64

Prints its tables and writes OUT/best_of.md and .json. Who judges, and how differences are tested:
see evaluate.py. Letters: M prompts, N clips of each.
"""
import shlex
import sys
from pathlib import Path

import numpy as np

from evaluate import FLAGS, Judges, Sampler, compare, sampled
from lib.common import (BASE, UserError, check_writable, choose_device, flag, parse_commands,
                        run_main, write_report)
from model import load_model
from sample import Sampling
from world.scenes import World, render_clips

COMMANDS = {"best_of": ("Best of N by the reward", {
    "what": [flag("--checkpoint", str(BASE), "model folder or hub id"),
             flag("--counts", [1, 5, 10, 15], "the N (paper: the same)", 1, 1000, nargs="+")],
    **{name: FLAGS[name] for name in ("prompts", "sampler", "who judges", "run")}})}


def best_of(scores):
    """Index of each prompt's best clip: scores (M, N) -> (M,); the first of equals, never NaN."""
    scores = np.asarray(scores, dtype=float)
    if np.isnan(scores).all(1).any():
        raise UserError("all rewards of a prompt are NaN; is its audio silent?")
    return np.nanargmax(scores, axis=1)


def best_of_counts(judges, model, scenes, real, counts, sampler, draws):
    """The reward chooses among N clips; judge and truth say if it helps -> tables, numbers."""
    most = max(counts)
    repeated = [scene for scene in scenes for _ in range(most)]
    clips, _ = sampled(model, repeated, sampler)
    candidates = judges.judge(clips, repeated)
    rewards = candidates["reward"].reshape(len(scenes), most)                           # (M, N)
    found = {"real": judges.judge(real, scenes)}
    for count in counts:
        chosen = np.arange(0, len(repeated), most) + best_of(rewards[:, :count])
        found[f"best of {count}"] = {name: each[chosen] for name, each in candidates.items()}
    return compare(found, f"best of {min(counts)}", draws, sampler.seed)


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    check_writable(Path(args.out) / "best_of.md", Path(args.cache) / "latents")
    device = choose_device(args.device)
    judges = Judges(args.reward, args.judge, args.tagger, device)
    model = load_model(args.checkpoint, device)
    real, scenes = render_clips(World("test", pairs=args.pairs), range(args.prompts))
    sampling = Sampling(args.steps, args.guidance_scale, args.solver)
    sampler = Sampler(sampling, args.seed, args.batch_size, args.cache)
    paragraphs, numbers = best_of_counts(judges, model, scenes, real, args.counts, sampler,
                                         args.draws)
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    write_report(args.out, "best_of", "Best of N by the reward",
                 f"python -m experiments.alignment {command}", paragraphs,
                 {"settings": vars(args), **numbers})
    print("next: python evaluate.py compares an aligned model with its base")


if __name__ == "__main__":
    run_main(main)
