"""What alignment gains, beyond the comparison of `python evaluate.py`.

    python -m experiments.alignment best_of                         # the reward chooses (paper A.3)
    python -m experiments.alignment crpo_search --runs runs/search/*   # what runs of crpo.py gained
    python -m experiments.alignment crpo_pairs --runs runs/crpo     # what winners have over losers

Each prints its tables and writes OUT/NAME.md and .json. Who judges, and how differences are tested:
see evaluate.py. Letters: M prompts, N clips of each, P pairs.
"""
import shlex
import sys
from pathlib import Path

import numpy as np

from evaluate import (FLAGS, Judges, Sampler, as_clips, change_table, compare, gains, load_judged,
                      sampled, tables)
from lib.common import (BASE, UserError, check_writable, choose_device, flag, parse_commands,
                        read_json, read_jsonl, relative_to_here, run_main, write_report)
from lib.weights import load_tensors
from model import load_model
from reward import best_of
from sample import Sampling, decode
from world.scenes import World, render_clips

RUNS = flag("--runs", [], "run folders of crpo.py", kind=str, nargs="+")
MODEL = flag("--checkpoint", str(BASE), "model folder or hub id")
COUNTS = flag("--counts", [1, 5, 10, 15], "the N (paper: the same)", 1, 1000, nargs="+")
SHARED = {name: FLAGS[name] for name in ("prompts", "sampler", "who judges", "run")}
COMMANDS = {
    "best_of": ("Best of N by the reward", {"what": [MODEL, COUNTS], **SHARED}),
    "crpo_search": ("What runs of crpo.py gained", {"what": [RUNS], **SHARED}),
    "crpo_pairs": ("Winners and losers of crpo.py", {"what": [RUNS, MODEL], **SHARED})}


def best_of_counts(judges, model, scenes, real, counts, sampler, draws):
    """Paper Table 5: the reward chooses among N clips; judge and truth say if it helps."""
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


def settings_of(run):
    """config.json of a run of crpo.py. Raises UserError if the folder is none."""
    path = Path(run) / "config.json"
    settings = read_json(path, dict) if path.is_file() else {}
    if "num_samples" not in settings:
        raise UserError(f"{run} is no run of crpo.py; pass --runs the --out folder of one")
    return settings


def iterations(runs, name):
    """Folders of the iterations of runs that hold a file `name`. Raises UserError if none does."""
    folders = []
    for run in runs:
        for k in range(1, settings_of(run)["iterations"] + 1):
            folders.append(Path(run) / f"iteration_{k}")
    folders = [folder for folder in folders if (folder / name).is_file()]
    if not folders:
        raise UserError(f"--runs holds no {name}; pass the --out folders of crpo.py")
    return folders


def search(runs, draws, seed):
    """What each iteration of each run gained on the run's own held-out prompts."""
    rows, changes, numbers = [], {}, {}
    for folder in iterations(runs, "heard.safetensors"):
        name = relative_to_here(folder)
        report = read_json(folder / "report.json", dict)
        real = load_judged(folder.parent / "real.safetensors")
        base = load_judged(folder.parent / "base.safetensors")
        policy = load_judged(folder / "heard.safetensors")
        changes[name] = gains([policy], base, real, draws, seed)
        numbers[name] = {"settings": settings_of(folder.parent), "report": report,
                         "gains": changes[name]}
        winners = report["winner"] / report["reference_winner"]
        rows.append([name, report["pairs"], f"{report['accuracy']:.2f}", f"{winners:.3f}"])
    return ["Accuracy: implicit, on the iteration's pairs; winners: loss over the reference's.",
            tables(["iteration", "pairs", "accuracy", "winners"], rows),
            "Gains over the base on each run's held-out prompts:", change_table(changes)], numbers


def pairs_of(folder, model):
    """{"real", "losers", "winners": clips (P, 65536)} of an iteration's pairs, and their scenes."""
    settings = settings_of(folder.parent)
    if settings["pairs"] or settings["prompt_file"]:
        raise UserError(f"{folder}: its prompts are not the world's, whose truth alone is known")
    prompts = read_jsonl(folder / "prompts.jsonl")
    latents = load_tensors(folder / "candidates.safetensors")["latents"]
    rows = read_jsonl(folder / "pairs.jsonl")
    places = {}
    for which in ("loser", "winner"):
        places[f"{which}s"] = [int(row[which].split("#")[1]) for row in rows]
    chosen = [prompts[place // settings["num_samples"]] for place in places["winners"]]
    indices = [prompt["prompt_id"] for prompt in chosen]
    real, scenes = render_clips(World("train", seed="crpo"), indices)
    clips = {"real": real}
    for which, chosen in places.items():
        durations = [scene.duration for scene in scenes]
        audios = decode(model.codec, latents[chosen], durations, progress=True)
        clips[which] = as_clips(model.codec, audios)
    return clips, scenes


def compare_pairs(judges, model, runs, draws, seed):
    """What the reward prefers, and so teaches: winners against losers, as judge and truth hear."""
    parts = {}
    for folder in iterations(runs, "pairs.jsonl"):          # --offline: of the first one alone
        clips, scenes = pairs_of(folder, model)
        for which, each in clips.items():
            parts.setdefault(which, []).append(judges.judge(each, scenes))
    found = {}
    for which, sets in parts.items():
        found[which] = {key: np.concatenate([one[key] for one in sets]) for key in sets[0]}
    return compare(found, "losers", draws, seed)


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    check_writable(Path(args.out) / f"{args.command}.md")
    if args.command == "crpo_search":
        paragraphs, numbers = search(args.runs, args.draws, args.seed)
    else:
        device = choose_device(args.device)
        judges = Judges(args.reward, args.judge, args.tagger, device)
        model = load_model(args.checkpoint, device)
    if args.command == "crpo_pairs":
        paragraphs, numbers = compare_pairs(judges, model, args.runs, args.draws, args.seed)
    if args.command == "best_of":
        real, scenes = render_clips(World("test", pairs=args.pairs), range(args.prompts))
        sampling = Sampling(args.steps, args.guidance_scale, args.solver)
        sampler = Sampler(sampling, args.seed, args.batch_size, args.cache)
        paragraphs, numbers = best_of_counts(judges, model, scenes, real, args.counts, sampler,
                                             args.draws)
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    write_report(args.out, args.command, COMMANDS[args.command][0],
                 f"python -m experiments.alignment {command}", paragraphs,
                 {"settings": vars(args), **numbers})
    print("next: python evaluate.py compares an aligned model with its base")


if __name__ == "__main__":
    run_main(main)
