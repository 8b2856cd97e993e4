"""How good are clips? Any set of them, several models side by side, differences with intervals.

    python evaluate.py                                            # the bundled aligned and base
    python evaluate.py --checkpoint runs/a runs/b                 # training seeds, each and pooled
    python evaluate.py --data sounds/captions.jsonl --prompts 16  # your captions and clips

All sets answer the same prompts, models from the same noise (paper 4.3, Table 3), beside real
scenes or a manifest's clips. --clips: in name order, a folder's files answer OUT/prompts.jsonl.

Who judges: the reward (the CLAP that ranked: it can be fooled), the judge (a CLAP that ranked
nothing), the world's tagger (event F1, order, count, exact scenes); Frechet distance and KL to the
real clips on a second tagger's features and classes, for other sounds Frechet on CLAP's embeddings.
Intervals: 95 %, resampled prompts, paired (not KL). N clips, K classes, W feature width, S seeds.
"""
import math
import time
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import DATA_FLAGS, SOUND_SUFFIXES, load_clip, read_rows
from lib.audio import as_mono, fit_audio, listening_page, usable, write_clips
from lib.common import (ALIGNED, BASE, DEVICE, UserError, check_writable, choose_device,
                        command_line, flag, markdown, parse_flags, reading, relative_to_here,
                        run_main, settings_key, write_jsonl, write_report)
from lib.text import number, tables
from lib.weights import code_hash, load_tensors, module_hash, save_tensors
from model import load_model
from reward import JUDGE, REWARD, load_clap, load_reward
from sample import SAMPLER_FLAGS, Sampling, decode, sample_latents
from world.ears import COLUMNS, features, hear, load_tagger, probabilities, scores, tally_all
from world.scenes import Scene, World, render_clips
from world.sounds import CLIP_SAMPLES, SAMPLE_RATE

FLAGS = {"what is judged": [
    flag("--checkpoint", [str(ALIGNED)], "model folders or hub ids", nargs="*"),
    flag("--clips", [], "folders of existing clips", kind=str, nargs="*"),
    flag("--against", str(BASE), "the model or folder that others are compared with"),
], "your own prompts": DATA_FLAGS, "prompts": [
    flag("--prompts", 1024, "held-out prompts, at most", 2, 10 ** 6),
    flag("--pairs", "unseen", "pairs of events in them", choices=["seen", "unseen", "all"]),
], "sampler": [
    *SAMPLER_FLAGS, flag("--score", None, "score asked for", -1e6, 1e6, kind=float),
], "who judges": [
    flag("--reward", str(REWARD), "what ranked: a CLAP (paper: laion/clap-htsat-unfused) or "
         "FILE.py:function"),
    flag("--judge", str(JUDGE), "CLAP that only judges (paper: laion/clap-htsat-fused)"),
    flag("--tagger", str(BASE), "folder of the world's taggers"),
    flag("--draws", 1000, "resamplings of the prompts", 1, 10 ** 6),
], "run": [
    flag("--seed", 0, "seed of the noise and of the resamplings", 0, 2 ** 62),
    flag("--batch_size", 32, "samples at a time", 1, 4096),
    flag("--cache", "cache/evaluate", "folder of sampled latents"),
    flag("--out", "runs/results", "folder of the report"), DEVICE]}

SILENT = 0.1                            # a clip whose peak is below is silent
FEWEST = 8                              # prompts of an interval
CLAP_RATE = 48000                       # Hz at which clips outside of the world are heard
MEASURES = {"reward": "reward", "judge": "judge", "f1": "event F1", "order": "order",
            "count": "count", "exact": "exact", "frechet": "Frechet", "kl": "KL",
            "silent": "silent"}
Asked = namedtuple("Asked", "prompt duration")      # as a Scene, which has these two names too
Sampler = namedtuple("Sampler", "sampling seed batch_size cache")       # cache: of latents


# ----------------------------------------------------------------------------- distances, intervals

def frechet_distance(a, b):
    """|means' difference|^2 + tr(A + B - 2 (A B)^(1/2)), A, B covariances of a (N, W), b (M, W)."""
    # float64, as stable-audio-metrics; the root of A^(1/2) B A^(1/2) has the same trace and is real
    shift = a.mean(0, dtype=float) - b.mean(0, dtype=float)                    # (W,)
    first = np.cov(a.T, dtype=float)                                           # (W, W)
    second = np.cov(b.T, dtype=float)                                          # (W, W)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    between = np.linalg.eigvalsh(root @ second @ root).clip(0)
    traces = np.trace(first + second)
    return float(shift @ shift + traces - 2 * np.sqrt(between).sum())


def kl_divergence(generated, reference, smallest=1e-6):
    """KL(generated || reference) of logits (N, K) -> (N,); `smallest` as KL_passt, in the log."""
    log_p = torch.as_tensor(generated).double().log_softmax(-1)
    q = torch.as_tensor(reference).double().softmax(-1)
    return (log_p.exp() * (log_p - (q + smallest).log())).sum(-1).numpy()


def bootstrap(statistic, count, draws=1000, seed=0, asked=FEWEST):
    """95 % interval [low, high] of statistic(rows), `count` rows drawn anew; NaN is left out.
    asked: how many of them ask for what is measured, if not all. Below FEWEST NaN: too narrow."""
    if min(count, asked) < FEWEST:
        return [math.nan, math.nan]
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)         # where all values are NaN
        return np.nanpercentile(values, [2.5, 97.5], axis=0).tolist()


# ----------------------------------------------------------------------------- judging

class Judges:
    """A CLAP that ranked, one that judges; the world's tagger, one for Frechet: in this order."""
    def __init__(self, reward=REWARD, judge=JUDGE, tagger=BASE, device="cpu"):
        self.reward = load_reward(reward, device)
        self.judge_clap = load_clap(judge, device)
        self.tagger = load_tagger(tagger, "judge", device)
        self.feature_tagger = load_tagger(tagger, "features", device)

    def judge(self, clips, asked, rate=SAMPLE_RATE):
        """{"reward", "judge": (N,), "features": (N, W)}, and of scenes {"tally", "logits": (N, K)}.

        clips: of scenes (N, 65536) at 16 kHz, of other prompts (N, samples) at `rate`."""
        prompts = [each.prompt for each in asked]
        audios = [clip[:int(each.duration * rate)] for clip, each in zip(clips, asked)]
        embedded = self.judge_clap.embed_audio(audios, rate)                   # (N, W)
        verdict = {"reward": self.reward.scores(audios, rate, prompts),
                   "judge": (embedded * self.judge_clap.embed_text(prompts)).sum(1),
                   "features": embedded,
                   "silent": [float(audio.abs().max() < SILENT) for audio in audios]}
        if isinstance(asked[0], Scene):
            _, chances, _ = probabilities(self.feature_tagger, clips)          # (N, K)
            verdict["logits"] = chances.clamp(1e-6, 1 - 1e-6).logit()
            verdict["features"] = features(self.feature_tagger, clips)         # (N, W)
            verdict["tally"] = tally_all(hear(self.tagger, clips), asked)
        return {name: np.asarray(array) for name, array in verdict.items()}


def judged(path, judges, clips_of, scenes):
    """judges.judge(clips_of(), scenes), kept in the file `path`."""
    if not Path(path).is_file():
        verdict = judges.judge(clips_of(), scenes)
        save_tensors(path, {name: torch.from_numpy(array) for name, array in verdict.items()})
    return read_judged(path)


def read_judged(path):
    """The arrays that `judged` kept in the file `path`."""
    with reading(path, "delete it: its clips are judged again"):
        verdict = {name: tensor.numpy() for name, tensor in load_tensors(path).items()}
    return {"silent": np.full(len(verdict["reward"]), np.nan), **verdict}       # of older runs: "-"


def measure(name, sets, real, rows):
    """One number about some rows of S judged sets together; `real`: the judged real clips."""
    if name in ("reward", "judge", "silent"):
        return np.mean([each[name][rows] for each in sets])
    distances = {"frechet": (frechet_distance, "features"), "kl": (kl_divergence, "logits")}
    if name in distances:
        distance, key = distances[name]
        return np.mean([distance(each[key][rows], real[key][rows]) for each in sets])
    return scores(sum(each["tally"][rows] for each in sets))[name]


def summary(verdict, real):
    """{measure: number} of a judged set, in the order of MEASURES; real: the judged real clips."""
    names = MEASURES if "tally" in verdict else ["reward", "judge", "frechet", "silent"]
    return {name: float(measure(name, [verdict], real, slice(None))) for name in names}


def difference(name, aligned, base, real, rows):
    """Some rows of judged sets minus those of others; of Frechet distances the log of the ratio."""
    ours, theirs = [measure(name, sets, real, rows) for sets in (aligned, base)]
    return np.log(ours / theirs) if name == "frechet" else ours - theirs


def gains(aligned, base, real, draws=1000, seed=0):
    """{measure: (difference, low, high)} of judged sets `aligned` to the sets `base`, each of S
    training seeds; Frechet: a ratio."""
    count = len(real["reward"])
    changes = {}
    for name in summary(base[0], real):
        change = partial(difference, name, aligned, base, real)
        whole = float(change(np.arange(count)))
        if name == "frechet":                   # it takes long: a fifth of the draws
            interval = bootstrap(change, count, max(draws // 5, 1), seed)
            changes[name] = tuple(np.exp([whole, *interval]).tolist())
        elif name != "kl":
            asked = count
            if name in ("order", "count"):
                asked = np.count_nonzero(real["tally"][:, COLUMNS.index(f"{name}ed")])
            changes[name] = (whole, *bootstrap(change, count, draws, seed, asked))
    return changes


# ----------------------------------------------------------------------------- tables and pages

def summary_table(summaries):
    """The table of {clips: summary}."""
    digits = {"reward": 4, "judge": 4}
    rows = []
    for clips, values in summaries.items():
        cells = [number(value, digits.get(name, 3)) for name, value in values.items()]
        rows.append([clips, *cells])
    heads = [MEASURES[name] for name in next(iter(summaries.values()))]
    return tables(["clips", *heads], rows)


def change_table(changes):
    """The table of {what: gains}; the Frechet distance as a ratio."""
    rows = []
    for what, gained in changes.items():
        for name, values in gained.items():
            form = (3, "") if name == "frechet" else (4, "+")
            rows.append([what, MEASURES[name], *[number(each, *form) for each in values]])
    return markdown(["clips", "measure", "difference (Frechet: ratio)", "95 %: from", "to"], rows)


def compare(verdicts, against, draws=1000, seed=0, pooled=()):
    """(tables, numbers) of judged sets {name: arrays}, "real" first; pooled: training seeds."""
    real = verdicts["real"]
    summaries = {name: summary(each, real) for name, each in verdicts.items()}
    groups = {name: [verdicts[name]] for name in verdicts if name not in ("real", against)}
    if len(pooled) > 1:
        groups[f"all {len(pooled)} pooled"] = [verdicts[name] for name in pooled]
    base = verdicts[against]
    changes = {name: gains(group, [base], real, draws, seed) for name, group in groups.items()}
    numbers = {f"{name} against {against}": change for name, change in changes.items()}
    note = f"Differences to {against}, over prompts ({FEWEST} or more for an interval):"
    return [summary_table(summaries), note, change_table(changes)], {**summaries, **numbers}


def change_of(name, before, now):
    """95 % interval of what a CLAP, "reward" or "judge", says of two judged sets."""
    gained = now[name] - before[name]
    return bootstrap(lambda rows: gained[rows].mean(), len(gained))


def fooled(before, now):
    """Whether the reward rose and the judge fell from one judged set to another."""
    return change_of("reward", before, now)[0] > 0 > change_of("judge", before, now)[1]


def alarms(name, losses, before, now):
    """One line for each known failure of an iteration; before, now: what the judges said."""
    lines = []
    risen = losses.get("winner", 0) > 1.05 * losses.get("reference_winner", 0)  # grpo: no errors
    if losses.get("accuracy", 0) > 0.95 and risen:
        lines.append(f"{name}: the winners' loss rose at an accuracy near 1: losers get worse; "
                     "raise --fm_weight or lower --beta, --learning_rate")
    if fooled(before, now):
        lines.append(f"{name}: the reward rose and the judge fell: the reward is being fooled; "
                     "take an earlier iteration, more prompts or fewer --epochs")
    if change_of("reward", before, now)[1] < 0:
        lines.append(f"{name}: the reward itself fell: the policy drifts or collapses; lower "
                     "--learning_rate, or raise --kl_weight (nft, dgpo, awm, grpo)")
    return lines


# ----------------------------------------------------------------------------- sets of clips

def as_clips(codec, audios, rate=SAMPLE_RATE, samples=CLIP_SAMPLES):
    """A codec's audio, a list of (channels, samples) -> mono (N, samples), silence after."""
    clips = as_mono(audios, codec.sampling_rate, rate)
    return torch.stack([fit_audio(clip, samples, "start") for clip in clips])


def held_out_clips(model, scenes, noise, sampler):
    """A policy's clips (N, 65536) of held-out scenes, from the same noise for every policy."""
    durations = [scene.duration for scene in scenes]
    latents = sampler(model, [scene.prompt for scene in scenes], durations, noise)
    return as_clips(model.codec, decode(model.codec, latents, durations))


def sampled(model, asked, sampler, rate=SAMPLE_RATE, samples=CLIP_SAMPLES, cut=True):
    """A model's clips (N, samples), cut or not at the durations, and the seconds of sampling.

    A model without a score head is asked for no score."""
    if not model.flow.config.get("score_head"):
        sampler = sampler._replace(sampling=sampler.sampling._replace(score=None))
    prompts, durations = zip(*[(each.prompt, each.duration) for each in asked])
    device = next(model.flow.parameters()).device
    weights = [module_hash(part) for part in (model.flow, model.text, model.codec)]
    # latents are kept by all that they and the seconds depend on
    key = settings_key([sampler, code_hash(), model.flow.config, prompts, durations, weights,
                        torch.get_num_threads(), str(device)])
    path = Path(sampler.cache) / f"{key}.safetensors"
    if not path.is_file():
        began = time.perf_counter()
        latents = sample_latents(model, prompts, durations, sampler.seed, None, sampler.sampling,
                                 sampler.batch_size, progress=True)                 # (N, L, C)
        seconds = torch.tensor(time.perf_counter() - began)
        save_tensors(path, {"latents": latents, "seconds": seconds})
    kept = load_tensors(path)
    lengths = durations if cut else None
    audios = decode(model.codec, kept["latents"], lengths, sampler.batch_size, progress=True)
    return as_clips(model.codec, audios, rate, samples), kept["seconds"].item()


def folder_clips(folder, count, rate, samples):
    """The first `count` sounds of a folder (N, samples). Raises UserError if there are fewer."""
    files = [path for path in sorted(Path(folder).glob("*")) if path.suffix in SOUND_SUFFIXES]
    if len(files) < count:
        raise UserError(f"{folder} holds {len(files)} sounds for {count} prompts: see --prompts")
    clips = [load_clip({"audio": path}, rate, 1, samples, "start")[0] for path in files[:count]]
    return torch.cat(clips)


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    out = Path(args.out)
    name = Path(args.data).stem if args.data else "compared"
    check_writable(out / f"{name}.md", Path(args.cache) / "latents")
    device = choose_device(args.device)
    sampling = Sampling(args.steps, args.guidance_scale, args.solver, args.score)
    sampler = Sampler(sampling, args.seed, args.batch_size, args.cache)

    # what is asked, and the real clips; a faulty model is an error before the minutes of judging
    sources = list(dict.fromkeys([args.against, *args.checkpoint, *args.clips]))
    longest = 30.0
    for source in sources:
        if source not in args.clips:
            flow = load_model(source, parts=("flow",)).flow
            longest = min(longest, flow.config["max_duration"])
    rate, samples = SAMPLE_RATE, CLIP_SAMPLES
    if args.data:
        rate = CLAP_RATE
        samples = round(rate * longest)
        read = partial(load_clip, sampling_rate=rate, channels=1, samples=samples, crop=args.crop)
        rows, clips = zip(*usable(read_rows(args)[:args.prompts], read, "sounds"))
        if len(rows) < 2:
            raise UserError(f"{args.data} has one usable clip; an evaluation needs two")
        real = torch.cat([audio for audio, _ in clips])
        asked = [Asked(row["caption"], seconds) for row, (_, seconds) in zip(rows, clips)]
    else:
        real, asked = render_clips(World("test", pairs=args.pairs), range(args.prompts))
    judges = Judges(args.reward, args.judge, args.tagger, device)
    given = {path: folder_clips(path, len(asked), rate, samples) for path in args.clips}

    # every set is judged
    write_jsonl(out / "prompts.jsonl", [Asked(a.prompt, a.duration)._asdict() for a in asked])
    verdicts = {"real": judges.judge(real, asked, rate)}
    pages = {"real": write_clips(out, 0, real, asked, rate)}
    for source in sources:
        clips = given.pop(source, None)
        if clips is None:
            clips, _ = sampled(load_model(source, device), asked, sampler, rate, samples)
        column = relative_to_here(source)
        verdicts[column] = judges.judge(clips, asked, rate)
        pages[column] = write_clips(out, len(pages), clips, asked, rate)

    # the report
    against, pooled = relative_to_here([args.against, args.checkpoint])
    paragraphs, numbers = compare(verdicts, against, args.draws, args.seed, pooled)
    budget = (f"{len(asked)} prompts of {args.data or 'the world'}, the same noise for all models; "
              f"{args.steps} {args.solver} steps, guidance {args.guidance_scale:g}.")
    write_report(out, name, "Clips side by side", command_line("evaluate.py", argv),
                 [budget, *paragraphs], {"settings": vars(args), **numbers})
    for page, blind in (("listen.html", False), ("blind.html", True)):
        listening_page(out / page, pages, [each.prompt for each in asked], blind)
    print(f"wrote {out}/listen.html: the first clips of each, side by side, and blind.html, the "
          "same without their names\nnext: open one, or "
          "python -m experiments.alignment best_of, what the reward alone would gain")


if __name__ == "__main__":
    run_main(main)
