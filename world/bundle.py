"""Copies the parts of runs into a model folder, in float16 (the runs: docs/training.md).

    python -m world.bundle --flow runs/weak --tagger runs/tagger \\
        --tagger_features runs/tagger_features --tagger_quality runs/quality \\
        --clap_reward runs/clap_reward --clap_judge runs/clap_judge --out checkpoints/toy/base
    python -m world.bundle --flow runs/clean --parts_of ../base --out checkpoints/toy/clean
    python -m world.bundle --flow runs/aligned/iteration_5 --parts_of ../base \\
        --out checkpoints/toy/aligned
"""
from pathlib import Path

import torch

from lib.common import flag, parse_flags, run_main
from model import load_model, save_model
from reward import load_clap
from world.ears import FILES, load_tagger, save_tagger

CLAPS = ("clap_reward", "clap_judge")
EARS = {Path(name).stem: which for which, name in FILES.items()}    # "tagger": "judge", ...
FLAGS = {"what": [
    flag("--flow", None, "run or model folder of the flow, with codec and text encoder"),
    flag("--parts_of", None, "relative folder that has codec and text encoder; none: copy them"),
    *[flag(f"--{name}", None, f"folder of a trained {name}") for name in (*EARS, *CLAPS)],
    flag("--out", "runs/toy", "model folder to write")]}


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    out = Path(args.out)
    if args.flow and args.parts_of:
        run = load_model(args.flow, parts=("flow",))
        references = {"vae": args.parts_of, "text_encoder": args.parts_of}
        save_model(out, run.flow, references=references, dtype=torch.float16)
    elif args.flow:
        run = load_model(args.flow)
        save_model(out, run.flow, run.codec, run.text, dtype=torch.float16)
    for name, which in EARS.items():
        source = getattr(args, name)
        if source:
            save_tagger(out / FILES[which], load_tagger(source, which))
    for name in CLAPS:
        source = getattr(args, name)
        if source:
            load_clap(source).save(out / name, torch.float16)
    print(f'wrote {out}; next: python sample.py --checkpoint {out} --prompt "three beeps"')


if __name__ == "__main__":
    run_main(main)
