"""What alignment can gain, and by which loss: the room that a base leaves, losses side by side.

    python -m experiments.alignment best_of                 # the reward alone (paper A.3, Table 5)
    python -m experiments.alignment room
    python -m experiments.alignment methods --losses crpo nft control --seeds 0 1 2
    python -m experiments.alignment guidance                # base and aligned over guidance 1 to 6
    python -m experiments.alignment recovered --aligned runs/crpo/iteration_6
    python -m experiments.alignment progress --runs runs/crpo        # gains over clips generated
    python -m experiments.alignment silent                  # silent clips of prompts that count

Prints its tables and writes OUT/NAME.md, .json and pictures. Who judges, and how differences are
tested: see evaluate.py. `room` and `methods` run crpo.py in --runs and go on where they stopped;
`progress` reads finished runs.
The truth as the reward is a diagnosis, no method: it tells what the reward overlooks from what the
loss does not carry over. Letters: M prompts, N clips of each, S seeds.
"""
import shutil
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np

import crpo
from evaluate import (FLAGS, MEASURES, Judges, Sampler, as_clips, bootstrap, change_table, fooled,
                      gains, held_out_clips, read_judged, summary, summary_table)
from experiments.models import (best_of, best_of_table, candidates_of, guidance, recovered,
                                short_name, silent, truth)
from lib.common import (ALIGNED, BASE, CLEAN, UserError, check_writable, choose_device,
                        choose_dtype, command_line, flag, markdown, parse_commands, picture,
                        read_json, read_jsonl, run_main, write_jsonl, write_report)
from lib.text import number
from lib.weights import load_tensors
from model import load_model
from sample import Sampling, decode, sampler_of
from world.ears import COLUMNS, hear, load_tagger, tally_all
from world.scenes import World, render_clips

# settings of crpo.py by which each loss is run, at equal clips generated; 149: the official 2000
PAIRED = {"pairs_per_prompt": 3, "epochs": 5, "learning_rate": 3e-4, "beta": 149, "fm_weight": 1}
ALL = {"epochs": 5, "batch_size": 64, "micro_batch": 16, "learning_rate": 5e-4}
METHODS = {
    "crpo": {"loss": "crpo", **PAIRED},
    "crpo, safeguard": {"loss": "crpo", "safeguard": 0.9, **PAIRED},
    "dpo": {"loss": "dpo", **PAIRED},
    "nft": {"loss": "nft", **ALL},
    "dgpo": {"loss": "dgpo", **ALL, "batch_size": 8, "micro_batch": 2},     # groups of N
    "awm": {"loss": "awm", **ALL},
    "grpo": {"loss": "grpo", **ALL},
    "control": {"loss": "crpo", "shuffle": True, **PAIRED},
    "nft control": {"loss": "nft", "shuffle": True, **ALL}}
REWARDS = ("clap", "truth", "shuffled")

SHARED = ("prompts", "num_samples", "eval_prompts", "steps", "guidance_scale", "reward", "judge",
          "tagger", "device")
COMMON = {name: FLAGS[name] for name in ("who judges", "run")}
BASE_FLAG = flag("--base", str(BASE), "model folder of the base")
CLEAN_FLAG = flag("--clean", str(CLEAN), "model that learned from true captions alone")
CONTROL_FLAG = flag("--control", [], "models or runs of shuffled rewards, one a seed", kind=str,
                    nargs="*")
MODELS_FLAG = flag("--models", [str(BASE), ALIGNED], "model folders", nargs="+")
STEPS_FLAG = flag("--steps", 10, "solver steps", 1)
LOOP = [flag("--prompts", 320, "M, prompts of an iteration", 2),
        flag("--num_samples", 8, "N, clips of each", 2),
        flag("--eval_prompts", 512, "held-out prompts", 8),
        STEPS_FLAG,
        flag("--guidance_scale", 3.0, "classifier-free guidance", 0),
        flag("--runs", "runs/alignment", "folder of the runs")]
COMMANDS = {
    "best_of": ("Best of N by the reward", {
        "what": [flag("--checkpoint", str(BASE), "model folder or hub id"),
                 flag("--counts", [1, 5, 10, 15], "the N (paper: the same)", 1, 1000, nargs="+")],
        **{name: FLAGS[name] for name in ("prompts", "sampler", "who judges", "run")}}),
    "room": ("What a base leaves to gain, by reward and by beta", {
        "what": [flag("--bases", [str(CLEAN), str(BASE)], "model folders", nargs="+"),
                 flag("--rewards", list(REWARDS), "what ranks", nargs="+", choices=list(REWARDS)),
                 flag("--betas", [20.0, 149.0, 2000.0], "of crpo, with L_FM at 1", 0, nargs="+")],
        "loop": LOOP, **COMMON}),
    "methods": ("Every loss from the same base", {
        "what": [BASE_FLAG,
                 flag("--losses", list(METHODS), "which", nargs="+", choices=list(METHODS)),
                 flag("--iterations", 2, "of each", 1),
                 flag("--seeds", [0, 1, 2], "of training", 0, nargs="+")],
        "loop": LOOP, **COMMON}),
    "recovered": ("How much of what weak captions cost alignment wins back", {
        "what": [BASE_FLAG, CLEAN_FLAG,
                 flag("--aligned", [ALIGNED], "of the aligned models, one a seed", nargs="+"),
                 CONTROL_FLAG,
                 flag("--scales", [3.0, 3.0], "guidance: of base and clean; of aligned and control",
                      0, nargs=2),
                 flag("--prompts", 1024, "held-out prompts of unseen pairs", 8),
                 STEPS_FLAG], **COMMON}),
    "progress": ("What runs of crpo.py gain over the clips generated", {
        "what": [flag("--runs", ["runs/crpo"], "finished runs, one a seed", nargs="+"),
                 CONTROL_FLAG, CLEAN_FLAG], **COMMON}),
    "silent": ("Silent clips where a prompt counts", {
        "what": [MODELS_FLAG,
                 flag("--prompts", 20, "counted prompts, at most 30", 1, 30),
                 flag("--num_samples", 16, "clips of each", 1),
                 flag("--duration", 4.0, "seconds", 0.1, 4.0),
                 STEPS_FLAG], **COMMON}),
    "guidance": ("Base and aligned over the guidance scale", {
        "what": [MODELS_FLAG,
                 flag("--scales", [1.0, 1.5, 2.0, 3.0, 4.5, 6.0], "guidance", 0, nargs="+"),
                 flag("--prompts", 512, "held-out prompts", 8),
                 STEPS_FLAG], **COMMON})}


# ----------------------------------------------------------------------------- the room

def room_of(candidates, count):
    """{what: (M,) of each prompt} about N = `count` clips: what choosing could gain."""
    rewards = candidates["reward"].reshape(-1, count)    # (M, N)
    tallies = candidates["tally"].reshape(len(rewards), count, -1)
    exact = tallies[..., COLUMNS.index("exact")].astype(float)
    rows = np.arange(len(rewards))
    above = rewards[:, :, None] > rewards[:, None]    # (M, N, N)
    pairs = exact[:, :, None] * (1 - exact[:, None])            # an exact clip and one that is not
    with np.errstate(invalid="ignore"):
        ranked = (above * pairs).sum((1, 2)) / pairs.sum((1, 2))    # NaN: none
    return {"one clip": exact.mean(1), f"best of {count} by truth": exact.max(1),
            f"best of {count} by the reward": exact[rows, best_of(rewards)],
            "exact above not": ranked}


def room_table(rooms, draws):
    """The table of {base: room_of(...)}, shares with 95 % intervals over prompts, and numbers."""
    numbers = {base: {} for base in rooms}
    rows = []
    for what in next(iter(rooms.values())):
        row = [what]
        for base, room in rooms.items():
            values = room[what]
            values = values[~np.isnan(values)]
            low, high = bootstrap(lambda places: values[places].mean(), len(values), draws)
            mean = float(values.mean()) if len(values) else float("nan")
            numbers[base][what] = [mean, low, high]
            row.append(f"{mean:.3f} ({low:.3f}-{high:.3f})")
        rows.append(row)
    return markdown(["exact scenes", *rooms], rows), numbers


# ----------------------------------------------------------------------------- runs of crpo.py

def share_candidates(source, folder, rewards_of=None):
    """Begin the run `folder` with what the run `source` judged and sampled in its iteration 1.
    rewards_of() -> (M N,): in the place of the scores there."""
    if (folder / "iteration_1" / "scores.jsonl").is_file() or folder == source:
        return
    for name in ("real.safetensors", "base.safetensors", "iteration_1/prompts.jsonl",
                 "iteration_1/candidates.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, folder / name)
    rows = read_jsonl(source / "iteration_1" / "scores.jsonl")
    for row, reward in zip(rows, rewards_of() if rewards_of else []):
        row["reward"] = float(reward)
    write_jsonl(folder / "iteration_1" / "scores.jsonl", rows)


def true_rewards(folder, base, tagger, device):
    """`truth` of the candidates of a run, in the order of its scores.jsonl."""
    rows = read_jsonl(folder / "iteration_1" / "scores.jsonl")
    latents = load_tensors(folder / "iteration_1" / "candidates.safetensors")["latents"]
    codec, tagger = load_model(base, device, parts=("codec",)).codec, load_tagger(tagger, "judge")
    world, found = World("train", seed="crpo"), []
    for start in range(0, len(rows), 256):
        some = rows[start:start + 256]
        audios = decode(codec, latents[start:start + 256], [row["duration"] for row in some])
        scenes = [world.scene(row["prompt_id"]) for row in some]
        found.append(truth(tally_all(hear(tagger, as_clips(codec, audios)), scenes)))
    return np.concatenate(found)


def judged_sets(folder, iterations):
    """{"real", "base", "iteration 1", ...: judged arrays} of a finished run of crpo.py."""
    paths = {"real": folder / "real.safetensors", "base": folder / "base.safetensors"}
    for k in range(1, iterations + 1):
        paths[f"iteration {k}"] = folder / f"iteration_{k}" / "heard.safetensors"
    return {name: read_judged(path) for name, path in paths.items()}


def room(judges, device, sampler, loop, bases, rewards, betas, runs, tagger, draws, seed, **_):
    """Bases, rewards and betas: the room of each, and what one iteration makes of it."""
    scenes = render_clips(World("val", pairs="all"), range(loop["prompts"]))[1]
    count = loop["num_samples"]
    rooms = {}
    changes = {}
    summaries = {}
    for base in bases:
        name = short_name(base)
        model = load_model(base, device)
        rooms[name] = room_of(candidates_of(judges, model, scenes, count, sampler), count)
        first = Path(runs) / f"{name}_clap_{betas[0]:g}"
        for reward in sorted({*rewards, "clap"}, key=REWARDS.index):    # that one samples
            source = first
            if reward == "truth":   # once for all betas
                source = Path(runs) / f"{name}_truth_{betas[0]:g}"
                share_candidates(first, source, lambda: true_rewards(first, base, tagger, device))
            for beta in betas:
                folder = Path(runs) / f"{name}_{reward}_{beta:g}"
                share_candidates(source, folder)
                crpo.run(f"room: {folder.name}", out=str(folder), checkpoint=base, iterations=1,
                         seed=seed, shuffle=reward == "shuffled", **loop | PAIRED | {"beta": beta})
                sets = judged_sets(folder, 1)
                real, aligned = sets["real"], sets["iteration 1"]
                if folder == first:
                    summaries[f"{name}: real"] = summary(real, real)
                    summaries[f"{name}: base"] = summary(sets["base"], real)
                label = f"{name}, {reward}, beta {beta:g}"
                summaries[label] = summary(aligned, real)
                changes[label] = gains([aligned], [sets["base"]], real, draws, seed)
    table, numbers = room_table(rooms, draws)
    paragraphs = [table, summary_table(summaries), change_table(changes)]
    return paragraphs, {"room": numbers, "changes": changes}


def methods(loop, base, losses, iterations, seeds, runs, draws, out, **_):
    """Every loss, `iterations` times from the same base, over seeds: means, bands, intervals."""
    finished = {name: [] for name in losses}    # {loss: [the folder of each seed]}
    for seed in seeds:
        first = None    # whose first candidates the others take
        for name in losses:
            folder = Path(runs) / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"
            if METHODS[name]["loss"] != "grpo":     # which samples paths of its own
                first = first or folder
                share_candidates(first, folder)
            crpo.run(f"methods: {folder.name}", out=str(folder), checkpoint=base, seed=seed,
                     iterations=iterations, **loop, **METHODS[name])
            finished[name].append(folder)

    # all seeds' last iterations against the base, what training cost, where hacking begins
    last = f"iteration {iterations}"
    changes = {}
    rows = []
    curves = {}
    for name, folders in finished.items():
        sets = [judged_sets(folder, iterations) for folder in folders]
        real = sets[0]["real"]
        aligned = [each[last] for each in sets]
        changes[name] = gains(aligned, [sets[0]["base"]], real, draws)
        costs = [training_cost(folder, iterations) for folder in folders]
        minutes, drift, ratio = np.mean(costs, axis=0)
        rows.append([name, number(minutes, 1), number(drift, 4), number(ratio, 3), hacks(sets)])
        curves[name] = curve_of(sets, real)
    clips = np.arange(iterations + 1) * loop["prompts"] * loop["num_samples"]
    draw_curves(Path(out) / "methods.png", curves, clips, {"real scenes": summary(real, real)})
    heads = ["loss", "minutes of training", "drift", "winners' error, ratio", "hacks from"]
    return [markdown(heads, rows), change_table(changes)], {"changes": changes, "curves": curves}


def training_cost(folder, iterations):
    """Minutes of a run's training, and of its last iteration the drift |v - old|^2 and the winners'
    error over the reference's; NaN where a loss has none."""
    minutes = 0.0
    for k in range(1, iterations + 1):
        minutes += read_jsonl(folder / f"iteration_{k}" / "log.jsonl")[-1]["minutes"]
    report = read_json(folder / f"iteration_{iterations}" / "report.json")
    ratio = report.get("winner", np.nan) / report.get("reference_winner", np.nan)
    return minutes, report.get("drift", np.nan), ratio


def hacks(sets):
    """The first iteration in which the reward rose and the judge fell, of any seed; "-": none."""
    for before, now in pairwise(list(sets[0])[1:]):
        if any(fooled(each[before], each[now]) for each in sets):
            return now
    return "-"


def curve_of(sets, real):
    """Summaries (K, S) of the judged sets of S runs: the base, iteration 1, ..."""
    curve = []
    for name in list(sets[0])[1:]:
        curve.append([summary(each[name], real) for each in sets])
    return curve


def draw_curves(path, curves, clips, levels, names=("judge", "exact")):
    """Measures over `clips` generated (K,): a band over seeds of each {label: summaries (K, S)},
    a line for each of {label: summary}."""
    with picture(path, 5.5, 4, len(names)) as axes:
        for axis, name in zip(axes or [], names):
            for label, points in curves.items():
                values = []    # (K, S)
                for seeds in points:
                    values.append([found[name] for found in seeds])
                values = np.array(values)
                line, = axis.plot(clips, values.mean(1), marker="o", label=label)
                axis.fill_between(clips, values.min(1), values.max(1), alpha=0.2,
                                  color=line.get_color())
            for label, shade in zip(levels, ("0.4", "0.7")):
                axis.axhline(levels[label][name], color=shade, linestyle="--", label=label)
            axis.set(xlabel="clips generated", ylabel=MEASURES[name])
            axis.legend(fontsize=7)


# ----------------------------------------------------------------------------- progress

def progress(judges, device, runs, control, clean, draws, seed, out, **_):
    """Finished runs of crpo.py, iteration by iteration, between base and clean: what more clips
    bring. The slope is a line through base and iterations, of means over seeds, per 1,000 clips."""
    configs = [read_json(Path(run) / "config.json") for run in (*runs, *control)]
    config = configs[0]
    for name in ("iterations", "prompts", "num_samples", "eval_prompts"):
        if any(other[name] != config[name] for other in configs):
            raise UserError(f"the runs differ in --{name}: give runs of the same settings")
    iterations = config["iterations"]
    clips = np.arange(iterations + 1) * config["prompts"] * config["num_samples"]
    real = judged_sets(Path(runs[0]), iterations)["real"]
    places = range(crpo.HELD_OUT, crpo.HELD_OUT + config["eval_prompts"])
    _, scenes = render_clips(World("val", pairs="all"), places)
    sampler = sampler_of(Namespace(**config))
    dtype, _ = choose_dtype(config["dtype"], device)
    model = load_model(clean, device, dtype)    # in the precision of the runs
    heard = held_out_clips(model, scenes, config["noise"], sampler)
    levels = {"real scenes": summary(real, real),
              "true captions": summary(judges.judge(heard, scenes), real)}

    curves = {}
    changes = {}
    summaries = {**levels}
    kinds = {"aligned": runs}
    if control:
        kinds["shuffled rewards"] = control
    for kind, folders in kinds.items():
        sets = [judged_sets(Path(folder), iterations) for folder in folders]
        base = [each["base"] for each in sets]
        curves[kind] = curve_of(sets, real)
        for k, points in enumerate(curves[kind]):
            label = f"{kind}, {clips[k]:,} clips"
            for run, point in enumerate(points):
                summaries[f"{label}, run {run}"] = point
            if k:
                aligned = [each[f"iteration {k}"] for each in sets]
                changes[label] = gains(aligned, base, real, draws, seed)
    slopes = {}
    for name in ("judge", "exact"):
        means = []
        for points in curves["aligned"]:
            means.append(np.mean([point[name] for point in points]))
        slopes[name] = float(np.polyfit(clips / 1000, means, 1)[0])
    draw_curves(Path(out) / "progress.png", curves, clips, levels, ("reward", "judge", "exact"))
    note = (f"Slope per 1,000 clips: judge {slopes['judge']:+.4f}, exact {slopes['exact']:+.4f}. "
            "Differences to the base, over prompts:")
    paragraphs = [summary_table(summaries), note, change_table(changes)]
    return paragraphs, {"curves": curves, "levels": levels, "slopes": slopes, "changes": changes}


# ----------------------------------------------------------------------------- command line

TABLES = {"best_of": best_of_table, "room": room, "methods": methods, "recovered": recovered,
          "guidance": guidance, "progress": progress, "silent": silent}


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    check_writable(Path(args.out) / f"{args.command}.md", Path(args.cache) / "latents")
    device = choose_device(args.device)
    judges = Judges(args.reward, args.judge, args.tagger, device)
    flags = {"guidance_scale": 3.0, "steps": 10, "solver": "euler", **vars(args)}
    sampling = Sampling(flags["steps"], flags["guidance_scale"], flags["solver"])
    sampler = Sampler(sampling, args.seed, args.batch_size, args.cache)
    loop = {name: flags[name] for name in SHARED if name in flags}      # settings of crpo.py
    paragraphs, numbers = TABLES[args.command](judges=judges, sampler=sampler,
                                               loop={**loop, "save_clips": 256},
                                               **{**flags, "device": device})
    title, _ = COMMANDS[args.command]
    command = command_line("-m experiments.alignment", argv)
    write_report(args.out, args.command, title, command, paragraphs,
                 {"settings": vars(args), **numbers})
    print("next: python evaluate.py compares an aligned model with its base")


if __name__ == "__main__":
    run_main(main)
