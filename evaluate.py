"""What the bundled model can do, in tables: scenes, gate, codec, duration, steps, text.

    python evaluate.py scenes      # unseen pairs of events: F1, order, exact scenes, real beside generated
    python evaluate.py gate        # is there room left for alignment? base against real and best of 8
    python evaluate.py codec       # what VAE and vocoder keep: events, log-mels, degradations
    python evaluate.py duration    # asked-for against sounding length (paper A.8, Fig. 5)
    python evaluate.py steps       # solver steps, Euler against Heun (paper A.7, A.9)
    python evaluate.py text        # what the flow reads in a prompt: its loss under wrong ones

Each prints its tables and writes results/NAME.md and .json, some a picture. The numbers of all but `text` (losses
of the flow itself) are those of metrics.py, heard by the judge (tagger.py), which no training and no choice of
samples has seen, and by a second tagger beside it. Generated latents are kept block by block in cache/evaluate under
a key of weights and settings: a killed command goes on where it was. Letters: N clips, K samples of one prompt, B
batch, L latent frames, C latent channels.
"""
import argparse
import shlex
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import metrics
from audio import fit_audio, resample
from cache import module_hash, settings_key
from common import (UserError, atomic_path, check_writable, generator, in_range, load_tensors, parse_arguments,
                    run_main, save_tensors, warn, write_json)
from sample import (BASE, DEFAULT_PROMPT, HERE, add_model_flags, add_sampling_flags, check_sampling_flags, decode,
                    default_duration, generate, load_for_sampling)
from solvers import EVALUATIONS, SOLVERS
from tagger import FILES, hear, load_tagger
from vocoder import MEL_16K, LogMel, griffin_lim, log_mel_error
from world import (CLIP_SAMPLES, DEGRADATIONS, EVENT_NAMES, EVENTS, NUMBERS, SAMPLE_RATE, Scene, SceneEvent, World,
                   degrade)

BLOCK = 64  # clips per saved file
SILENCE_DB = -40.0  # duration: a frame is silent this far below the loudest frame


# ----------------------------------------------------------------------------- audio to judge

def render(world, indices):
    """Real scenes: audio (N, 65536) float32 at 16 kHz and their truths."""
    pairs = [world.render(index) for index in tqdm(indices, desc="real scenes", leave=False)]
    return torch.from_numpy(np.stack([audio for audio, _ in pairs])), [scene for _, scene in pairs]


def as_clips(codec, audios):
    """A model's audio, a list of (channels, samples) -> (N, 65536) at 16 kHz as the taggers hear it, silence after."""
    return torch.stack([fit_audio(resample(audio.mean(0, keepdim=True), codec.sampling_rate, SAMPLE_RATE),
                                  CLIP_SAMPLES, "start")[0] for audio in audios])


def through_codec(model, clips, batch_size=16):
    """Clips (N, 65536) -> the same clips after encode (the posterior's mean) and decode."""
    codec = model.codec
    device = next(codec.parameters()).device
    wide = resample(clips, SAMPLE_RATE, codec.sampling_rate)[:, None].expand(-1, codec.audio_channels, -1)
    audios = []
    for batch in tqdm(wide.split(batch_size), desc="through the codec", leave=False):
        with torch.inference_mode():
            audios.extend(codec.decode(codec.encode(batch.to(device))[0]).cpu().unbind(0))
    return as_clips(codec, audios)


weights_hash = lru_cache(module_hash)  # of networks that do not change while this runs


def sampled(model, args, prompts, durations, seed, indices=None, steps=None, solver=None, cut=True):
    """Generated clips (N, 65536) for the prompts, and the seconds that sampling took; finished blocks are read back.

    cut: at the duration. args.crop_latents, where it is: as --crop_latents of sample.py.
    """
    settings = {"weights": [weights_hash(part) for part in (model.flow, model.text, model.codec)], "seed": seed,
                "prompts": prompts, "durations": durations, "indices": indices or list(range(len(prompts))),
                "steps": steps or args.steps, "solver": solver or args.solver, "scale": args.guidance_scale,
                "dtype": args.dtype}
    cropped = getattr(args, "crop_latents", False)
    settings |= {"crop_latents": True} if cropped else {}
    folder = Path(args.cache) / settings_key(settings)
    latents, seconds = [], 0.0
    for start in range(0, len(prompts), BLOCK):
        path, rows = folder / f"latents_{start:06d}.safetensors", slice(start, start + BLOCK)
        if not path.is_file():
            began = time.perf_counter()
            block = generate(model, prompts[rows], durations[rows], seed, settings["indices"][rows],
                             settings["steps"], args.guidance_scale, settings["solver"],
                             batch_size=args.batch_size, progress=True, crop=cropped)
            save_tensors(path, {"latents": block, "seconds": torch.tensor(time.perf_counter() - began)})
        saved = load_tensors(path)
        latents.append(saved["latents"])                                           # (B, L, C)
        seconds += saved["seconds"].item()
    audios = decode(model, torch.cat(latents), durations if cut else None, args.batch_size, True, cropped)
    return as_clips(model.codec, audios), seconds


def ears(args):
    """{"judge": tagger, "features": tagger}; the second is left out with a warning if the folder has none."""
    heads = {"judge": load_tagger(args.tagger, "judge")}
    if (Path(args.tagger) / FILES["features"]).is_file():
        heads["features"] = load_tagger(args.tagger, "features")
    else:
        warn(f"{Path(args.tagger) / FILES['features']} is missing: no column of the second tagger")
    return heads


# ----------------------------------------------------------------------------- tables

def score_cells(rows, seed):
    """Tally rows (N, columns) or (N, K, columns) -> cells "0.912 (0.89-0.94)" of SCORE_HEADS, the same as numbers.

    A score that no prompt asked for is "-", and None among the numbers.
    """
    values, spans = metrics.scores(rows.reshape(-1, rows.shape[-1])), metrics.bootstrap(rows, seed=seed)
    names = ("f1", "order", "count", "exact")
    known = {name for name, value in values.items() if value == value}             # the others are NaN: nothing asked
    cells = [f"{values[name]:.3f} ({spans[name][0]:.2f}-{spans[name][1]:.2f})" if name in known else "-"
             for name in names]
    return cells, {name: {"value": values[name], "interval": spans[name]} if name in known else None
                   for name in values}


SCORE_HEADS = ["event F1", "order", "count", "exact scene"]


def markdown(heads, rows):
    """A Markdown table, its columns aligned so that it reads as plain text too."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_report(args, title, parts, numbers, script="evaluate.py"):
    """Print the report and write results/NAME.md and .json. parts: texts and tables, in order."""
    given = sys.argv[1:] if sys.argv[0].endswith(script) else [args.command]
    command = f"python {script} {shlex.join(given)}"
    text = "\n\n".join([f"# {title}", f"    {command}", *parts]) + "\n"
    path = Path(args.out) / f"{args.command}.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    def here(value):                                        # paths without the way to this folder
        if isinstance(value, list):
            return [here(each) for each in value]
        return value.removeprefix(f"{HERE}/") if isinstance(value, str) else value
    settings = {name: here(value) for name, value in vars(args).items() if not callable(value)}
    write_json(path.with_suffix(".json"), {"settings": settings, **numbers})
    print(text)
    print(f"wrote {path} and {path.with_suffix('.json')}")


def picture(args, draw, width=6.4, height=4.8):
    """results/NAME.png, drawn by `draw(axes)`; one notice instead if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return warn("matplotlib is not installed: the picture is skipped; pip install matplotlib")
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.add_subplot())
    path = Path(args.out) / f"{args.command}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    print(f"wrote {path}")


# ----------------------------------------------------------------------------- scenes

def scenes(args, model, heads):
    """Prompts with pairs of events that no training scene holds: generated and real scenes."""
    real, truths = render(World("test", pairs="unseen"), range(args.prompts))
    prompts, durations = [scene.prompt for scene in truths], [scene.duration for scene in truths]
    made = [sampled(model, args, prompts, durations, seed)[0] for seed in range(args.seed, args.seed + args.seeds)]
    decoded = through_codec(model, real, args.batch_size)
    others = [truths[i] for i in metrics.derangement(len(truths), args.seed)] if len(truths) > 1 else truths
    sources = {f"generated, {args.seeds} seeds": (made, truths), "real scenes": ([real], truths),
               "real through the codec": ([decoded], truths), "generated, prompts shuffled": (made, others)}
    table, numbers = [], {}
    for ear, tagger in heads.items():
        heard = {}
        for source, (sets, scenes_of) in sources.items():
            for clips in sets:                                                     # shuffled: heard once already
                if id(clips) not in heard:
                    heard[id(clips)] = hear(tagger, clips)
            tallies = [metrics.tally_all(heard[id(clips)], scenes_of) for clips in sets]
            rows = np.stack(tallies, axis=1)                                       # (N, K, columns)
            cells, values = score_cells(rows, args.seed)
            table.append([source, ear, rows.shape[0] * rows.shape[1], *cells])
            numbers[f"{source} / {ear}"] = values
    right, total = first_prompt(args, model, heads["judge"])
    numbers["first prompt"] = {"right": right, "seeds": total}
    write_report(args, "Prompts with unseen pairs of events", [
        f"{args.prompts} prompts of World(\"test\", pairs=\"unseen\"); {args.steps} {args.solver} steps, guidance "
        f"{args.guidance_scale:g}. In brackets: 95 % bootstrap intervals over prompts. Event F1 is micro-averaged.",
        markdown(["source", "heard by", "clips", *SCORE_HEADS], table),
        f"\"{DEFAULT_PROMPT}\" at seeds 0 to {total - 1}: the judge hears violin, then rain in {right} of {total}."],
        numbers)


def first_prompt(args, model, judge, seeds=16):
    """Of the default prompt at seeds 0, 1, ...: how many hold a violin followed by rain -> (right, seeds)."""
    truth = Scene(0, DEFAULT_PROMPT, "then", [SceneEvent("violin", 0, 0), SceneEvent("rain", 0, 0)], 0)
    duration = default_duration(model.flow.config["max_duration"])
    clips = torch.cat([sampled(model, args, [DEFAULT_PROMPT], [duration], seed)[0] for seed in range(seeds)])
    return sum(metrics.relation_right(reading, truth) for reading in hear(judge, clips)), seeds


def gate(args, model, heads):
    """Is the world hard enough? Exact scenes of the model 0.10-0.25 below real ones; the best of 8 gains 0.08."""
    real, truths = render(World("test", pairs="all"), range(args.prompts))
    prompts = [scene.prompt for scene in truths for _ in range(args.candidates)]
    durations = [scene.duration for scene in truths for _ in range(args.candidates)]
    made, _ = sampled(model, args, prompts, durations, args.seed)
    heard = {ear: hear(tagger, made) for ear, tagger in heads.items()}
    repeated = [scene for scene in truths for _ in range(args.candidates)]
    every = metrics.tally_all(heard["judge"], repeated).reshape(args.prompts, args.candidates, -1)  # (N, K, columns)
    rows = {"real scenes": metrics.tally_all(hear(heads["judge"], real), truths), "one sample": every}
    for ear, readings in heard.items():
        fit = np.array([metrics.match(*pair) for pair in zip(readings, repeated)]).reshape(args.prompts, -1)
        rows[f"best of {args.candidates}, picked by {ear}"] = every[np.arange(args.prompts), fit.argmax(1)]
    cells = {name: score_cells(row, args.seed) for name, row in rows.items()}
    exact = {name: values["exact"]["value"] for name, (_, values) in cells.items()}
    below = exact["real scenes"] - exact["one sample"]
    gains = {name: value - exact["one sample"] for name, value in exact.items() if name.startswith("best")}
    verdict = (f"The model lies {below:.3f} below real scenes (wanted: 0.10 to 0.25); "
               + "; ".join(f"{name}: {gain:+.3f}" for name, gain in gains.items()) + " (wanted: at least +0.08).")
    write_report(args, "Room for alignment: exact scenes of the model, real ones, best of several", [
        f"{args.prompts} prompts of World(\"test\", pairs=\"all\"), {args.candidates} samples each, heard by the "
        "judge.",
        markdown(["source", *SCORE_HEADS], [[name, *row] for name, (row, _) in cells.items()]), verdict],
        {"below real": below, "gains": gains, **{name: values for name, (_, values) in cells.items()}})


# ----------------------------------------------------------------------------- codec

def codec(args, model, heads):
    """What VAE and vocoder keep of held-out scenes: events, log-mels, the level of degradations."""
    parts, numbers = [], {}
    table = []
    for name, degraded in (("clean", 0.0), ("degraded", 1.0)):
        real, truths = render(World("test", pairs="all", degraded=degraded), range(args.prompts))
        decoded = through_codec(model, real, args.batch_size)
        for ear, tagger in heads.items():
            pair = [score_cells(metrics.tally_all(hear(tagger, clips), truths), args.seed)
                    for clips in (real, decoded)]
            f1 = [values["f1"]["value"] for _, values in pair]
            ratio = f1[1] / f1[0] if f1[0] else float("nan")                       # nothing heard at all
            table.append([name, ear, pair[0][0][0], pair[1][0][0], f"{ratio:.3f}"])
            numbers[f"{name} / {ear}"] = {"originals": pair[0][1], "reconstructions": pair[1][1],
                                          "ratio": ratio}
    parts += [f"Events of {args.prompts} held-out scenes, on the originals and after encode and decode:",
              markdown(["scenes", "heard by", "F1 originals", "F1 reconstructions", "ratio"], table)]
    errors = mel_errors(model, args)
    numbers["log-mel error"] = errors
    parts += ["Log-mel error: mean absolute dB over 80 bands and the frames within 60 dB of the clip's peak, per "
              "event (scenes of one event). The vocoder alone: log-mel, Griffin-Lim, log-mel.",
              markdown(["event", "clips", "vocoder alone", "VAE + vocoder"],
                       [[name, row["clips"], f"{row['vocoder']:.2f}", f"{row['codec']:.2f}"]
                        for name, row in errors.items()])]
    levels = degradation_ranks(model, args)
    numbers["degradations"] = levels
    parts += ["Degradation level (0 to 1) before and after the codec. The estimator is a ridge regression on "
              "statistics of the log-mel (metrics.damage_features and their squares), fitted per kind on originals of "
              "the validation scenes. Rank correlations (Spearman) on test scenes:",
              markdown(["kind", "estimate before, after", "truth, before", "truth, after"],
                       [[kind, *(f"{value:.3f}" for value in row)] for kind, row in levels.items()])]
    write_report(args, "The codec", parts, numbers)


def mel_errors(model, args):
    """{event: {"clips", "vocoder", "codec"}} in dB, and "all" for their mean over clips."""
    mel = LogMel(**MEL_16K)
    clips, truths = render(World("test", pairs="all", relations=(1, 0, 0, 0)), range(args.prompts))
    found = {name: [] for name in EVENT_NAMES}
    decoded = through_codec(model, clips, args.batch_size)
    for audio, other, scene in zip(tqdm(clips, desc="vocoder alone", leave=False), decoded, truths):
        reference = mel(audio[None])
        alone = log_mel_error(reference, mel(griffin_lim(reference, mel))).item()
        found[scene.events[0].name].append((alone, log_mel_error(reference, mel(other[None])).item()))
    found["all"] = sum(found.values(), [])
    means = {name: np.mean(rows, axis=0).tolist() for name, rows in found.items() if rows}
    return {name: {"clips": len(found[name]), "vocoder": alone, "codec": both} for name, (alone, both) in means.items()}


def degradation_ranks(model, args):
    """{kind: (rho of the estimates before and after, of truth and before, of truth and after)}, and their mean."""
    mel = LogMel(**MEL_16K)

    def damaged(split, kind, count):
        """(clips (N, 65536), levels (N,)) of one kind with uniform levels."""
        audios, levels = [], []
        for index, clip in enumerate(clean[split][:count]):
            rng = np.random.default_rng([args.seed, DEGRADATIONS.index(kind), index])
            levels.append(rng.random())
            audios.append(degrade(clip, kind, levels[-1], rng))
        return torch.from_numpy(np.stack(audios)), np.array(levels)

    def features(clips):
        return np.stack([metrics.damage_features(20 * mel(clip[None])[0].numpy()) for clip in clips])

    clean = {split: render(World(split, pairs="all"), range(count))[0].numpy()
             for split, count in (("val", args.fit_scenes), ("test", args.prompts))}
    ranks = {}
    for kind in DEGRADATIONS:
        fitted, levels = damaged("val", kind, args.fit_scenes)
        rows = features(fitted)
        mean, std = rows.mean(0), rows.std(0) + 1e-6
        estimate = metrics.fit_ridge(metrics.with_squares(rows, mean, std), levels, penalty=0.03)
        clips, truth = damaged("test", kind, args.prompts)
        before, after = (estimate(metrics.with_squares(features(audio), mean, std))
                         for audio in (clips, through_codec(model, clips, args.batch_size)))
        ranks[kind] = tuple(metrics.spearman(*pair) for pair in ((before, after), (truth, before), (truth, after)))
    ranks["mean"] = tuple(float(value) for value in np.mean(list(ranks.values()), axis=0))
    return ranks


# ----------------------------------------------------------------------------- duration, steps

def duration(args, model, heads):
    """Sounding length of the uncropped decode against the length asked for, beside real scenes (paper A.8, Fig. 5)."""
    def lengths(clips):
        return np.array([metrics.sounding_length(clip.numpy(), SAMPLE_RATE, SILENCE_DB) for clip in clips])
    rows = {"generated": [], "real scenes": [], "real through the codec": []}
    asked = []
    for seconds in args.durations:
        real, truths = render(World("test", pairs="all", duration=seconds), range(args.clips))
        prompts = [scene.prompt for scene in truths]
        asked.append(np.full(args.clips, seconds))
        made, _ = sampled(model, args, prompts, [seconds] * args.clips, args.seed, cut=False)
        rows["generated"].append(lengths(made))
        rows["real scenes"].append(lengths(real))
        rows["real through the codec"].append(lengths(through_codec(model, real, args.batch_size)))
    table, numbers = [], {}
    for source, measured in rows.items():
        errors = [np.abs(found - wanted) for found, wanted in zip(measured, asked)]
        median, tail = np.percentile(np.concatenate(errors), [50, 90])
        table.append([source, *(f"{np.median(found):.2f} ({np.median(error):.3f})"
                                for found, error in zip(measured, errors)), f"{median:.3f}", f"{tail:.3f}"])
        numbers[source] = {"median absolute error": float(median),
                           "measured": [found.tolist() for found in measured], "asked": list(args.durations)}

    def draw(axes):
        spread = np.random.default_rng(0).uniform(-0.08, 0.08, len(np.concatenate(asked)))
        axes.plot([0, 4.1], [0, 4.1], color="0.7", zorder=0)
        for shift, source, colour in ((-0.1, "real scenes", "tab:gray"), (0.1, "generated", "tab:orange")):
            axes.scatter(np.concatenate(asked) + shift + spread, np.concatenate(rows[source]), 9, colour,
                         label=source, alpha=0.7)
        axes.set(xlabel="duration asked for (s)", ylabel="sounding length of the whole decode (s)")
        axes.legend()
    write_report(args, "Duration", [
        f"{args.clips} clips per duration. Sounding length: the end of the last 20 ms frame whose energy is above "
        f"{SILENCE_DB:g} dB of the loudest frame of the clip, on the uncropped decode. Cells: median length (median "
        "absolute error).",
        markdown(["source", *(f"{seconds:g} s" for seconds in args.durations), "median error", "90th percentile"],
                 table)], numbers)
    picture(args, draw)


def steps(args, model, heads):
    """Numbers of solver steps, and Euler against Heun at an equal number of function evaluations."""
    truths = [World("test", pairs="unseen").scene(index) for index in range(args.prompts)]
    prompts, durations = [scene.prompt for scene in truths], [scene.duration for scene in truths]
    table, numbers = [], {}
    grid = [("euler", count) for count in args.grid]
    grid += [("heun", count // 2) for count in args.grid if count % 2 == 0]
    for solver, count in grid:
        clips, seconds = zip(*(sampled(model, args, prompts, durations, seed, steps=count, solver=solver)
                               for seed in range(args.seed, args.seed + args.seeds)))
        rows = np.stack([metrics.tally_all(hear(heads["judge"], part), truths) for part in clips], axis=1)
        cells, values = score_cells(rows, args.seed)
        per_clip = sum(seconds) / rows.shape[0] / rows.shape[1]
        table.append([solver, count, count * EVALUATIONS[solver], f"{per_clip:.3f}", *cells])
        numbers[f"{solver} {count}"] = {"evaluations": count * EVALUATIONS[solver], "seconds per clip": per_clip,
                                        **values}

    def draw(axes):
        for solver in SOLVERS:
            rows = [row for name, row in numbers.items() if name.startswith(solver)]
            for score, style in (("f1", "-"), ("exact", "--")):
                axes.plot([row["evaluations"] for row in rows], [row[score]["value"] for row in rows], style,
                          marker="o", color={"euler": "tab:blue", "heun": "tab:orange"}[solver],
                          label=f"{solver}, {score}")
        axes.set(xscale="log", xlabel="function evaluations", ylabel="score", xticks=args.grid, xticklabels=args.grid)
        axes.legend()
    write_report(args, "Solver steps", [
        f"{args.prompts} prompts of World(\"test\", pairs=\"unseen\"), {args.seeds} seeds, heard by the judge. Heun "
        "evaluates the network twice a step (its last step included), so its rows have an Euler row of equal cost.",
        markdown(["solver", "steps", "evaluations", "s per clip", *SCORE_HEADS], table)], numbers)
    picture(args, draw)


# ----------------------------------------------------------------------------- text

def exchanged(scene):
    """The prompt of a scene of two sounds with the two exchanged: "wind, then two beeps" -> "two beeps, then wind"."""
    spans = []
    for truth in scene.events:
        event = EVENTS[truth.name]
        known = [*event.phrases, *(f"{number} {event.counted}" for number in NUMBERS.values() if event.countable)]
        said = max((phrase for phrase in known if phrase in scene.prompt), key=len)
        spans.append((scene.prompt.index(said), said))
    (start, first), (later, second) = sorted(spans)
    middle = scene.prompt[start + len(first):later]
    return scene.prompt[:start] + second + middle + first + scene.prompt[later + len(second):]


@torch.inference_mode()
def text(args, model, heads):
    """How much the flow's loss rises when the prompt is wrong, by t: what it reads, long before it can be heard."""
    from model import encode_prompts
    from train_fm import flow_matching_loss, interpolate
    clips, truths = render(World("val", pairs="all", relations=(0, 0, 1, 0), duration=4.0), range(args.prompts))
    device = next(model.flow.parameters()).device
    wide = resample(clips, SAMPLE_RATE, model.codec.sampling_rate)[:, None].expand(-1, model.codec.audio_channels, -1)
    prompts = [scene.prompt for scene in truths]
    kinds = {"its own": prompts, "its two sounds exchanged": [exchanged(scene) for scene in truths],
             "another scene's": [prompts[i] for i in metrics.derangement(len(prompts), args.seed)],
             "empty": [""] * len(prompts)}
    losses = {kind: np.zeros(len(args.levels)) for kind in kinds}
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="losses", leave=False):
        rows = slice(start, start + args.batch_size)
        x1 = model.codec.normalise(model.codec.encode(wide[rows].to(device))[0])                   # (B, L, C)
        x0 = torch.stack([torch.randn(x1.shape[1:], generator=generator(args.seed, "text", start + i))
                          for i in range(len(x1))]).to(device)                                     # (B, L, C)
        seconds = torch.tensor([scene.duration for scene in truths[rows]])
        for kind, said in kinds.items():
            condition = encode_prompts(model.text, said[rows], seconds)
            for column, level in enumerate(args.levels):
                t = torch.full((len(x1),), level, device=device)
                xt, target = interpolate(x1, x0, t)
                dtype = next(model.flow.parameters()).dtype
                velocity = model.flow.velocity(xt.to(dtype), t.to(dtype), condition)
                losses[kind][column] += flow_matching_loss(velocity, target)[1].sum().item() / len(prompts)
    own = losses["its own"]
    table = [[kind, *(f"{loss:.4f}" if kind == "its own" else f"{100 * (loss / right - 1):+.1f} %"
                      for loss, right in zip(row, own))] for kind, row in losses.items()]
    write_report(args, "What the flow reads", [
        f"{args.prompts} held-out scenes of two sounds in order, 4 s each. First row: the flow-matching loss at t; "
        "below it, by how much it rises when the scene gets another prompt.",
        markdown(["prompt", *(f"t = {level:g}" for level in args.levels)], table)],
        {"t": args.levels, **{kind: row.tolist() for kind, row in losses.items()}})


# ----------------------------------------------------------------------------- command line

def make_parser():
    """The subcommands with their flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for run in (scenes, gate, codec, duration, steps, text):
        command = commands.add_parser(run.__name__, help=run.__doc__.split("\n")[0], description=run.__doc__)
        group = command.add_argument_group("what to measure")
        if run is not duration:
            group.add_argument("--prompts", type=int, default=256, help="prompts or scenes (default 256)")
        if run in (scenes, steps):
            group.add_argument("--seeds", type=int, default=3 if run is scenes else 1,
                               help="sampling seeds (default %(default)s)")
        if run is gate:
            group.add_argument("--candidates", type=int, default=8, help="samples of each prompt (default 8)")
        if run is codec:
            group.add_argument("--fit_scenes", type=int, default=700,
                               help="scenes that fit the estimator (default 700)")
        if run is duration:
            group.add_argument("--durations", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.0],
                               help="seconds (default 1 2 3 4; paper 5 to 25)")
            group.add_argument("--clips", type=int, default=50, help="clips per duration (default 50; paper 100)")
        if run is steps:
            group.add_argument("--grid", type=int, nargs="+", default=[5, 10, 25, 50, 100],
                               help="Euler steps; Heun takes half of the even ones (default 5 10 25 50 100; "
                                    "paper A.9: 10 to 200)")
        if run is text:
            group.add_argument("--levels", type=float, nargs="+", default=[0.5, 0.7, 0.85, 0.95, 1.0],
                               help="values of t (default 0.5 0.7 0.85 0.95 1)")
        add_sampling_flags(command, {codec: ["seed"], text: ["seed"], steps: ["guidance_scale", "seed"]}.get(
            run, ["steps", "guidance_scale", "solver", "seed"]))
        add_model_flags(command, 32, BASE)
        group = command.add_argument_group("folders")
        group.add_argument("--tagger", default=str(BASE),
                           help="folder of the taggers (default: the bundled model)")
        group.add_argument("--out", default="results", help="where the report goes (default results)")
        group.add_argument("--cache", default="cache/evaluate", help="where latents are kept (default cache/evaluate)")
        command.set_defaults(run=run)
    return parser, commands.choices.values()


def main(argv=None):
    parser, commands = make_parser()
    args = parse_arguments(parser, argv, commands)
    check_sampling_flags(args)
    for name in ("prompts", "seeds", "candidates", "fit_scenes", "clips"):
        if hasattr(args, name):
            in_range(f"--{name}", getattr(args, name), 2 if name == "fit_scenes" or args.command == "text" else 1,
                     10 ** 6)
    for count in getattr(args, "grid", []):
        in_range("--grid", count, 1, 1000)
    for level in getattr(args, "levels", []):
        in_range("--levels", level, 0, 1)
    for seconds in getattr(args, "durations", []):
        in_range("--durations", seconds, 1, 4)
    check_writable([Path(args.out) / f"{args.command}.md", Path(args.cache) / "latents"])
    model = load_for_sampling(args)
    if model.codec.sampling_rate < SAMPLE_RATE:
        raise UserError(f"{args.checkpoint} makes audio at {model.codec.sampling_rate} Hz, but the taggers need "
                        f"{SAMPLE_RATE} or more; choose another --checkpoint")
    args.run(args, model, {} if args.run is text else ears(args))
    print("next: python evaluate.py --help lists the other tables; python sample.py makes something to hear")


if __name__ == "__main__":
    run_main(main)
