"""Models side by side, for experiments/alignment.py: best of N, guidance, what is recovered.

Each table takes its flags by name and returns (paragraphs, numbers). M prompts, N clips of each.
"""
from functools import partial
from pathlib import Path

import numpy as np

from evaluate import (HEADS, MEASURES, SILENT, Asked, bootstrap, cells, change_table, compare,
                      gains, measure, sampled, summary)
from lib.common import UserError, markdown, picture
from lib.text import number, tables
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


def best_of_counts(judges, model, scenes, real, counts, sampler, draws):
    """The reward chooses among N clips; judge and truth say if it helps -> tables, numbers.
    In the last row the truth chooses: that is the ceiling."""
    most = max(counts)
    candidates = candidates_of(judges, model, scenes, most, sampler)
    rewards = candidates["reward"].reshape(len(scenes), most)    # (M, N)
    truths = truth(candidates["tally"]).reshape(rewards.shape)    # (M, N)
    choices = {f"best of {count}": best_of(rewards[:, :count]) for count in counts}     # (M,) each
    choices[f"best of {most} by truth"] = best_of(truths)
    found = {"real": judges.judge(real, scenes)}
    for name, chosen in choices.items():
        rows = np.arange(0, rewards.size, most) + chosen
        found[name] = {key: each[rows] for key, each in candidates.items()}
    return compare(found, f"best of {min(counts)}", draws, sampler.seed)


def best_of_table(judges, device, sampler, checkpoint, counts, prompts, pairs, draws, **_):
    """Table 5 in small."""
    real, scenes = render_clips(World("test", pairs=pairs), range(prompts))
    model = load_model(checkpoint, device)
    return best_of_counts(judges, model, scenes, real, counts, sampler, draws)


# ----------------------------------------------------------------------------- guidance

def with_guidance(sampler, scale):
    """The sampler at another guidance scale."""
    return sampler._replace(sampling=sampler.sampling._replace(guidance_scale=scale))


def guidance(judges, device, sampler, models, scales, prompts, draws, out, **_):
    """Each model over guidance scales: judge and exact scenes against the Frechet distance."""
    clips, scenes = render_clips(World("test", pairs="unseen"), range(prompts))
    found = {"real": judges.judge(clips, scenes)}
    rows = []
    fronts = {}
    for source in models:
        model, name = load_model(source, device), short_name(source)
        for scale in scales:
            key = f"{name} at {scale:g}"
            clips, _ = sampled(model, scenes, with_guidance(sampler, scale))
            found[key] = judges.judge(clips, scenes)
            front = summary(found[key], found["real"])
            fronts.setdefault(name, []).append(front)
            rows.append([key, *cells(front)])
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
    best = {}
    for name, points in fronts.items():
        judge = [point["judge"] for point in points]
        best[name] = f"{name} at {scales[int(np.argmax(judge))]:g}"
    first, *others = best.values()
    changes = {}
    for key in others:
        changes[f"{key} against {first}"] = gains([found[key]], [found[first]], found["real"],
                                                  draws)
    note = "Each at its best guidance by the judge on these prompts; the choice widens no interval:"
    paragraphs = [tables(["clips", *HEADS], rows), note, change_table(changes)]
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


def share(name, models, real, rows):
    """(aligned - base) / (clean - base) of a measure, over some rows of the prompts; NaN where
    base and clean are equal."""
    base = measure(name, models["base"], real, rows)
    aligned = measure(name, models["aligned"], real, rows)
    clean = measure(name, models["clean"], real, rows)
    return (aligned - base) / (clean - base) if clean != base else np.nan


def judged_models(judges, folders, scenes, sampler, device):
    """[judged arrays of each model], with "second": the tally of the other tagger."""
    judged = []
    for folder in folders:
        clips, _ = sampled(load_model(folder, device), scenes, sampler)
        second = tally_all(hear(judges.ear, clips), scenes)
        judged.append({**judges.judge(clips, scenes), "second": second})
    return judged


def recovered(judges, device, sampler, base, clean, aligned, control, scales, prompts, draws, seed,
              **_):
    """What lies between a base that learned from weak captions and one that learned from true
    ones, and how much of it is won back; beside it the control, whose rewards were shuffled."""
    if clean == base:
        raise UserError("--clean must name the model that learned from true captions, not the base")
    clips, scenes = render_clips(World("test", pairs="unseen"), range(prompts))
    real = judges.judge(clips, scenes)
    first = with_guidance(sampler, scales[0])
    second = with_guidance(sampler, scales[1])
    models = {"base": judged_models(judges, [base], scenes, first, device),
              "clean": judged_models(judges, [clean], scenes, first, device),
              "aligned": judged_models(judges, aligned, scenes, second, device),
              "control": judged_models(judges, control, scenes, second, device)}

    # every model, and what the second tagger hears
    rows, others = [["real", *cells(summary(real, real))]], []
    for kind, sets in models.items():
        for place, judged in enumerate(sets):
            rows.append([f"{kind} {place}", *cells(summary(judged, real))])
            heard = scores(judged["second"])
            others.append([f"{kind} {place}", *[number(heard[name], 3) for name in SHARES[1:]]])

    # differences, and what is recovered
    pairs = (("aligned", "base"), ("control", "base"), ("aligned", "control"), ("clean", "base"))
    changes = {}
    for ours, theirs in pairs:
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
    paragraphs = [tables(["clips", *HEADS], rows), change_table(changes), markdown(heads, table),
                  markdown(other_heads, others)]
    return paragraphs, {"changes": changes, "recovered": shares, "second tagger": others}
