"""Models side by side, for experiments/alignment.py: best of N, guidance, what is recovered.

Each table takes its flags by name and returns (paragraphs, numbers). M prompts, N clips of each.
"""
from functools import partial
from pathlib import Path

import numpy as np

from evaluate import (MEASURES, SILENT, Asked, bootstrap, change_table, compare, gains, measure,
                      sampled, summary, summary_table)
from lib.common import UserError, markdown, picture
from lib.text import number
from model import load_model
from world.ears import COLUMNS, hear, scores, tally_all
from world.scenes import NUMBERS, World, render_clips
from world.sounds import COUNTABLE, EVENTS


def short_name(source):
    """A model folder's name; of iterations, which share theirs, the run's before it."""
    path = Path(source)
    return f"{path.parent.name}_{path.name}" if path.name.startswith("iteration_") else path.name


# ----------------------------------------------------------------------------- best of N

def best_of(rewards):
    """Index of each prompt's best clip: rewards (M, N) -> (M,); the first of equals, never NaN."""
    rewards = np.asarray(rewards, dtype=float)
    if np.isnan(rewards).all(1).any():
        raise UserError("all rewards of a prompt are NaN; is its audio silent?")
    return np.nanargmax(rewards, axis=1)


def candidates_of(judges, model, scenes, count, sampler):
    """`count` clips of each scene, judged: arrays of M N rows, see Judges.judge."""
    repeated = [scene for scene in scenes for _ in range(count)]
    clips, _ = sampled(model, repeated, sampler)
    return judges.judge(clips, repeated)


def truth(tallies):
    """Rows (N, columns) of world.ears.tally -> (N,): exact + F1 + half for order and for counts."""
    column = dict(zip(COLUMNS, np.asarray(tallies, float).T))
    f1 = 2 * column["hits"] / (2 * column["hits"] + column["extras"] + column["misses"])
    order = column["order_right"] / np.maximum(column["ordered"], 1)
    counts = column["counts_right"] / np.maximum(column["counted"], 1)
    return column["exact"] + f1 + 0.5 * order + 0.5 * counts


def best_of_table(judges, device, sampler, checkpoint, counts, prompts, pairs, draws, **_):
    """The reward chooses among N clips; judge and truth say if it helps (Table 5 in small).
    In the last row the truth chooses: that is the ceiling."""
    real, scenes = render_clips(World("test", pairs=pairs), range(prompts))
    most = max(counts)
    candidates = candidates_of(judges, load_model(checkpoint, device), scenes, most, sampler)
    rewards = candidates["reward"].reshape(len(scenes), most)    # (M, N)
    truths = truth(candidates["tally"]).reshape(rewards.shape)    # (M, N)
    choices = {f"best of {count}": best_of(rewards[:, :count]) for count in counts}     # (M,) each
    choices[f"best of {most} by truth"] = best_of(truths)
    found = {"real": judges.judge(real, scenes)}
    for name, chosen in choices.items():
        rows = np.arange(0, rewards.size, most) + chosen
        found[name] = {key: each[rows] for key, each in candidates.items()}
    return compare(found, f"best of {min(counts)}", draws, sampler.seed)


# ----------------------------------------------------------------------------- guidance

def with_guidance(sampler, scale):
    """The sampler at another guidance scale."""
    return sampler._replace(sampling=sampler.sampling._replace(guidance_scale=scale))


def guidance(judges, device, sampler, models, scales, prompts, draws, out, **_):
    """Each model over guidance scales: judge and exact scenes against the Frechet distance."""
    clips, scenes = render_clips(World("test", pairs="unseen"), range(prompts))
    real = judges.judge(clips, scenes)
    found = {}                                          # {"MODEL at SCALE": judged arrays}
    summaries = {}
    fronts = {}                                         # {MODEL: a summary for each scale}
    for source in models:
        model = load_model(source, device)
        name = short_name(source)
        if name in fronts:
            raise UserError(f"two models of --models are called {name}: rename a folder")
        fronts[name] = []
        for scale in scales:
            key = f"{name} at {scale:g}"
            clips, _ = sampled(model, scenes, with_guidance(sampler, scale))
            found[key] = judges.judge(clips, scenes)
            summaries[key] = summary(found[key], real)
            fronts[name].append(summaries[key])
    with picture(Path(out) / "guidance.png", 5.5, 4, 2) as axes:
        for axis, key in zip(axes or [], ("judge", "exact")):
            for name, points in fronts.items():
                x = [point["frechet"] for point in points]
                y = [point[key] for point in points]
                axis.plot(x, y, marker="o", label=name)
                for scale, *place in zip(scales, x, y):
                    axis.annotate(f"{scale:g}", place, fontsize=7)
            axis.set(xlabel="Frechet distance", ylabel=MEASURES[key])
            axis.legend()
    best = []
    for name, points in fronts.items():
        judge = [point["judge"] for point in points]
        best.append(f"{name} at {scales[np.argmax(judge)]:g}")
    first, *others = best
    changes = {}
    for key in others:
        changes[f"{key} against {first}"] = gains([found[key]], [found[first]], real, draws)
    note = "Each at its best guidance by the judge on these prompts; the choice widens no interval:"
    paragraphs = [summary_table(summaries), note, change_table(changes)]
    return paragraphs, {"fronts": fronts, "changes": changes}


# ----------------------------------------------------------------------------- silent clips

def silent(device, sampler, models, prompts, num_samples, duration, **_):
    """Prompts that count ("three beeps") at more seconds than they fill: is there any sound?"""
    counted = [f"{word} {EVENTS[name].counted}" for name in COUNTABLE for word in NUMBERS.values()]
    asked = [Asked(prompt, duration) for prompt in counted[:prompts] for _ in range(num_samples)]
    rows = []
    for source in models:
        clips, _ = sampled(load_model(source, device), asked, sampler)
        quiet = clips.abs().amax(1) < SILENT                                    # (M N,)
        most = quiet.view(prompts, -1).sum(1).max()
        rows.append([short_name(source), f"{quiet.sum()} of {len(quiet)}", int(most)])
    return [markdown(["model", "silent clips", "of a prompt, most"], rows)], {"rows": rows}


# ----------------------------------------------------------------------------- recovered

SHARES = ("judge", "exact", "order", "f1", "count")
DIFFERENCES = (("aligned", "base"), ("control", "base"), ("aligned", "control"), ("clean", "base"))


def share(name, models, real, rows):
    """(aligned - base) / (clean - base) of a measure, over some rows of the prompts; NaN where
    base and clean are equal."""
    base = measure(name, models["base"], real, rows)
    aligned = measure(name, models["aligned"], real, rows)
    clean = measure(name, models["clean"], real, rows)
    return (aligned - base) / (clean - base) if clean != base else np.nan


def recovered(judges, device, sampler, base, clean, aligned, control, scales, prompts, draws, seed,
              **_):
    """What lies between a base that learned from weak captions and one that learned from true
    ones, and how much of it is won back; beside it the control, whose rewards were shuffled."""
    if clean == base:
        raise UserError("--clean must name the model that learned from true captions, not the base")
    clips, scenes = render_clips(World("test", pairs="unseen"), range(prompts))
    real = judges.judge(clips, scenes)
    base_scale, aligned_scale = scales
    kinds = {"base": (base_scale, [base]), "clean": (base_scale, [clean]),
             "aligned": (aligned_scale, aligned), "control": (aligned_scale, control)}

    # every model, and what the second tagger hears
    summaries = {"real": summary(real, real)}
    others = []
    models = {kind: [] for kind in kinds}               # {kind: judged arrays of each model}
    for kind, (scale, folders) in kinds.items():
        for place, folder in enumerate(folders):
            model = load_model(folder, device)
            clips, _ = sampled(model, scenes, with_guidance(sampler, scale))
            judged = judges.judge(clips, scenes)
            models[kind].append(judged)
            summaries[f"{kind} {place}"] = summary(judged, real)
            heard = scores(tally_all(hear(judges.feature_tagger, clips), scenes))
            others.append([f"{kind} {place}", *[number(heard[name], 3) for name in SHARES[1:]]])

    # differences, and what is recovered
    changes = {}
    for ours, theirs in DIFFERENCES:
        if models[ours] and models[theirs]:
            changes[f"{ours} - {theirs}"] = gains(models[ours], models[theirs], real, draws, seed)
    shares = {}
    table = []
    for name in SHARES:
        share_of = partial(share, name, models, real)
        low, high = bootstrap(share_of, prompts, draws, seed)
        shares[name] = [float(share_of(np.arange(prompts))), low, high]
        table.append([MEASURES[name], *[number(value, 2) for value in shares[name]]])
    heads = ["recovered: (aligned - base) / (clean - base)", "share", "95 %: from", "to"]
    other_heads = ["clips, by the second tagger", *[MEASURES[name] for name in SHARES[1:]]]
    paragraphs = [summary_table(summaries), change_table(changes), markdown(heads, table),
                  markdown(other_heads, others)]
    return paragraphs, {"changes": changes, "recovered": shares, "second tagger": others}
