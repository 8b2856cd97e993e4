"""Tables and figures of the second paper in miniature: hypothesis, table, paired tests, verdict.

    python -m experiments.attm table1                  # five score heads (Table I)
    python -m experiments.attm table2                  # the chain, stage by stage (Table II)
    python -m experiments.attm figure2 --seeds 0       # the score at inference (Fig. 2), one seed

They need what world/votes.py and reward.py make (docs/training.md). Models and latents stay in
--runs: what was killed goes on. Absolute values do not compare with the paper's, whose metrics hear
music at 44.1 kHz; the direction of a difference does.

Who judges: reward (the ranker: it conditions and selects), CLAP (ranks nothing), true quality (its
judge met nothing that generates), event recall and order, the Frechet distance to the real scenes.
Tests: mean over training seeds, paired over prompts, 95 % intervals of resampled prompts (paper:
paired t). In brackets behind a mean: its range over training seeds. N test prompts, D features.
"""
from collections import namedtuple
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import crpo
import expert_iteration
import train_fm
from evaluate import Judges, Sampler, bootstrap, frechet_distance, number, sampled, tables
from lib.audio import fit_audio, read_audio
from lib.common import (BASE, CLEAN, DEVICE, check_settings, check_writable, choose_device,
                        command_line, flag, parse_commands, read_json, read_jsonl, reading,
                        run_main, write_json, write_report)
from lib.mel import MEL_16K, LogMel
from model import SCORE_HEADS, load_model, with_score_head
from ranker import TrainedRanker
from reward import JUDGE
from sample import Sampling
from world.ears import features, load_tagger, quality, scores, spearman
from world.scenes import World, render_clips
from world.sounds import CLIP_SAMPLES, SAMPLE_RATE

FLAGS = {
    "what it starts from": [
        flag("--checkpoint", str(CLEAN), "flow that stage 1 goes on from"),
        flag("--data", "runs/scored/scored.jsonl", "scored clips"),
        flag("--hum_data", "runs/hum/scored.jsonl", "clips of which some hum"),
        flag("--ranker", "runs/ranker", "the learned reward"),
        flag("--judge", str(JUDGE), "CLAP that only judges"),
        flag("--tagger", str(BASE), "folder of the world's taggers")],
    "training": [
        flag("--seeds", [0, 1, 2], "training seeds", 0, 2 ** 50, nargs="+"),
        flag("--sft_steps", 1000, "optimizer steps of stage 1 (paper: 200000)", 1, 1e9),
        flag("--batch_size", 32, "clips of a step (paper: 64)", 1, 1e5),
        flag("--samples", 600, "clips sampled in stage 2 (paper: about 600)", 2, 1e7),
        flag("--tuning_steps", 400, "fine-tuning steps of stage 2 (paper: 30000)", 1, 1e9),
        flag("--polish_steps", 60, "polish steps of stage 2 (paper: 5000)", 1, 1e9),
        flag("--crpo_prompts", 256, "prompts of stage 3, five clips each (paper: 2000)", 1, 1e7)],
    "measuring": [
        flag("--prompts", 100, "test prompts (paper: 100)", 4, 1e6),
        flag("--score", 1.5, "s, above p95 of training (paper: 2, 5)", -1e6, 1e6),
        flag("--steps", 10, "solver steps", 1, 1000)],
    "run": [
        flag("--runs", "runs/reproduce", "folder of models and latents"),
        flag("--out", "runs/results", "folder of the report"), DEVICE]}

GUIDANCE = 1.5                  # guidance scale where an entry names none
HELD_OUT = 400                  # clips on which the meter of hum is checked
HEADS = {"frechet": "Frechet", "judge": "CLAP", "reward": "reward", "quality": "true quality",
         "hum": "hum", "recall": "event recall", "order": "order"}
TESTED = ("judge", "reward", "quality", "hum")


# ----------------------------------------------------------------------------- entries

# how clips are made. stage: the last one ("base", "sft", "experts", "crpo"); head: of the training,
# None: without scores; run_as: another head at inference; score: a number, "s": --score, "p95": a
# percentile of the training scores; noise: its seed; scale: guidance; data: a flag, and its column
Way = namedtuple("Way", "stage head run_as score noise scale data column",
                 defaults=(None, None, None, 42, GUIDANCE, "data", "score"))
# ways {name: Way}; pairs [(first, second, sign)]: where the hypothesis has the interval of first
# minus second in `measure`: above 0 ("+"), or around it ("0")
Entry = namedtuple("Entry", "title hypothesis ways pairs measure", defaults=("reward",))

SHARED = {
    "SFT v1": Way("sft", "v1", None, "s"),
    "experts v1": Way("experts", "v1", None, "s"),
    "experts v1 as v2": Way("experts", "v1", "v2", "s"),
    "hybrid": Way("crpo", "v1", None, "s")}
CHAIN = {"clean base": Way("base"), "no score": Way("sft"), **SHARED,
         "hybrid, noise 55": Way("crpo", "v1", None, "s", 55)}
WEIGHTS = {
    **SHARED,
    "SFT v1 as v2": Way("sft", "v1", "v2", "s"),
    "SFT v2": Way("sft", "v2", None, "s"),
    "SFT v2 as v1": Way("sft", "v2", "v1", "s"),
    "SFT v1, p5": Way("sft", "v1", None, "p5"),
    "SFT v1 as v2, p5": Way("sft", "v1", "v2", "p5"),
    "experts v2": Way("experts", "v2", None, "s"),
    "experts v2 as v1": Way("experts", "v2", "v1", "s"),
    "CRPO v2": Way("crpo", "v2", None, "s")}
HUM = {
    "clean": Way("sft", "v2", None, "p95", 42, 3.0, "hum_data", "score"),
    "contaminated": Way("sft", "v2", None, "p95", 42, 3.0, "hum_data", "score_plus_hum")}


def table1(heads=tuple(SCORE_HEADS)):
    """Every head at five scores, against training without scores."""
    ways = {"without scores": Way("sft", scale=3.0)}
    pairs = []
    for head in heads:
        for score in ("p5", -0.5, 0.5, 1.5, "p95"):
            ways[f"{head}, s = {score}"] = Way("sft", head, score=score, scale=3.0)
        pairs += [(f"{head}, s = 1.5", f"{head}, s = -0.5", "+"),       # the paper's delta out
                  (f"{head}, s = p95", f"{head}, s = p5", "+"),
                  (f"{head}, s = 1.5", "without scores", "+")]
    return Entry("Five ways to condition on a score",
                 "Every head makes the output follow the input score, and scored training beats "
                 "training without scores (Table I; the paper's best score-r: v2).",
                 ways, pairs, "quality")


def figure2(grid=(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5, 6.0)):
    """Fig. 2: scores within and above the training range, before and after the chain."""
    ways = {}
    for score in grid:
        ways[f"SFT, s = {score:g}"] = Way("sft", "v1", score=score)
        ways[f"hybrid, s = {score:g}"] = Way("crpo", "v1", score=score)
    pairs = [("SFT, s = 1.5", "SFT, s = 0", "+"), ("hybrid, s = 1.5", "hybrid, s = 0", "0")]
    return Entry("The score at inference, before and after the chain",
                 "After stage 1 the reward rises with the score over the training range; at the "
                 "end of the chain the score does next to nothing (Fig. 2).", ways, pairs)


ENTRIES = {
    "table1": table1(),
    "table2": Entry(
        "The chain, stage by stage",
        "Expert iteration is the one significant step after score conditioning; running v1 as v2 "
        "and CRPO stay within noise (Table II; the paper's rewards: -0.392, 0.028, 0.524, 0.535, "
        "0.533, with noise 55 0.550).", CHAIN,
        [("SFT v1", "no score", "+"), ("experts v1", "SFT v1", "+"),
         ("experts v1 as v2", "experts v1", "0"), ("hybrid", "experts v1 as v2", "0")]),
    "table3": Entry(
        "Weights against forward pass",
        "Running v1 weights as v2 is benign, running v2 weights as v1 collapses, at both stages "
        "(Table III; the paper's rewards: SFT v1 0.028, as v2 0.009; v2 0.282, as v1 -0.500).",
        WEIGHTS,
        [("SFT v1", "SFT v1 as v2", "0"), ("SFT v2", "SFT v2 as v1", "+"),
         ("experts v1", "experts v1 as v2", "0"), ("experts v2", "experts v2 as v1", "+"),
         ("SFT v1", "SFT v1, p5", "+"), ("SFT v1 as v2", "SFT v1 as v2, p5", "+"),
         ("hybrid", "SFT v1", "+"), ("hybrid", "CRPO v2", "+")]),
    "figure2": figure2(),
    "reward_column": Entry(
        "A clean reward against a contaminated one",
        "Conditioned on a reward that partly tracks a hum, the generator learns to hum, and its "
        "Frechet distance to scenes without one grows (III-D a; the paper: vocals, FAD 0.337 and "
        "0.515).", HUM, [("contaminated", "clean", "+")], "hum")}
COMMANDS = {name: (entry.title, FLAGS) for name, entry in ENTRIES.items()}


# ----------------------------------------------------------------------------- who judges

class Panel(Judges):
    """The ranker as reward, a CLAP, and three taggers."""

    def __init__(self, ranker, judge, tagger, device):
        super().__init__(judge, judge, tagger, device)
        self.reward = TrainedRanker(ranker, device)
        self.quality = load_tagger(tagger, "quality", device)

    def judge(self, clips, scenes):
        """As Judges, and {"quality": (N,)}."""
        found = super().judge(clips, scenes)
        return {**found, "quality": quality(self.quality, clips).numpy()}


def low_band(clips):
    """Clips (N, 65536) -> (N, 72): low, middle and high quantiles of their lowest 24 mel bands."""
    log_mel = LogMel(**MEL_16K)
    mel = torch.cat([log_mel(part)[:, :24] for part in clips.split(64)])        # (N, 24, frames)
    levels = torch.quantile(mel, torch.tensor([0.1, 0.5, 0.9]), dim=2)          # (3, N, 24)
    return levels.transpose(0, 1).flatten(1).numpy()


def ridge(x, targets, penalty=0.03):
    """Ridge regression of targets (N,) on x (N, D): the function of (M, D) to (M,)."""
    mean = x.mean(0)
    deviation = x.std(0) + 1e-6
    x = (x - mean) / deviation                                                  # (N, D)
    gram = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (targets - targets.mean()))           # (D,)
    return lambda rows: (rows - mean) / deviation @ weights + targets.mean()


# ----------------------------------------------------------------------------- stages, measurements

class Lab:
    """The models of an entry's settings (its flags), trained when first asked for; its judges."""

    def __init__(self, settings):
        self.settings = settings
        self.runs = Path(settings.runs)
        self.device = choose_device(settings.device)
        self.panel = Panel(settings.ranker, settings.judge, settings.tagger, self.device)
        world = World("test", pairs="all")
        clips, self.scenes = render_clips(world, range(settings.prompts))
        self.real = self.panel.judge(clips, self.scenes)

    def trained(self, name, seed, train, settings):
        """The folder of a stage, trained unless it is finished. UserError: with other settings."""
        out = self.runs / f"seed_{seed}" / name
        if not (out / "finished.json").is_file():
            train(**settings, seed=seed, device=self.settings.device, out=str(out))
            write_json(out / "finished.json", settings)
        check_settings(out, read_json(out / "finished.json", dict), settings)
        return out

    def folder(self, way, seed):
        """The model folder of a way, after it and the stages before it are trained."""
        given = self.settings
        name = f"{way.stage}_{way.head or 'plain'}"
        if way.stage == "base":
            return Path(given.checkpoint)
        if way.stage == "sft":              # on scored clips, with a head or without scores
            settings = {"checkpoint": given.checkpoint, "data": getattr(given, way.data),
                        "train_steps": given.sft_steps, "learning_rate": 1e-3,      # paper: 1e-4
                        "batch_size": given.batch_size, "val_every": 10 ** 9, "val_clips": 64}
            if way.head:
                settings |= {"score_column": way.column, "score_head": way.head}
            if way.data == "hum_data":
                name += f"_{way.column}"
            return self.trained(name, seed, train_fm.train, settings)
        before = way._replace(stage="sft" if way.stage == "experts" else "experts")
        settings = {"checkpoint": str(self.folder(before, seed)), "score": given.score,
                    "steps": given.steps, "guidance_scale": GUIDANCE}
        if way.stage == "experts":
            settings |= {"data": given.data, "ranker": given.ranker, "prompts": given.samples,
                         "tuning_steps": given.tuning_steps, "polish_steps": given.polish_steps,
                         "batch_size": given.batch_size}
            return self.trained(name, seed, expert_iteration.run, settings) / "round_1"
        # as the tracked tables (in float32) were made: crpo.py's defaults are those of a weak base
        settings |= {"score_head": "v2", "iterations": 1, "eval_prompts": 2, "num_samples": 5,
                     "pairs_per_prompt": 1, "epochs": 24, "beta": 2000.0, "fm_weight": 1.0,
                     "learning_rate": 1e-4, "vocoder_steps": 24, "kl_weight": 0.0,
                     "prompts": given.crpo_prompts}
        return self.trained(name, seed, crpo.run, settings) / "iteration_1"

    def score_of(self, way):
        """The score that a way asks for, a number or None."""
        if way.score == "s":
            return self.settings.score
        if not isinstance(way.score, str):
            return way.score
        path = getattr(self.settings, way.data)
        with reading(path, "python ranker.py --plus hum writes score_plus_hum"):
            column = [row[way.column] for row in read_jsonl(path)]
        return float(np.percentile(column, int(way.score[1:])))

    def heard(self, way):
        """What the panel says of a way's clips, one for each training seed."""
        given = self.settings
        sampling = Sampling(given.steps, way.scale, "euler", self.score_of(way))
        sampler = Sampler(sampling, way.noise, given.batch_size, str(self.runs / "latents"))
        results = []
        for seed in given.seeds:
            model = load_model(self.folder(way, seed), self.device)
            if way.run_as:
                model.flow, _ = with_score_head(model.flow, way.run_as)
            clips, _ = sampled(model, self.scenes, sampler)
            found = self.panel.judge(clips, self.scenes)
            if way.data == "hum_data":
                meter, _ = self.hum_meter
                found["hum"] = meter(np.hstack([found["features"], low_band(clips)]))
            results.append(found)
        return results

    @cached_property
    def hum_meter(self):
        """(function of features and low bands to hum, its rank correlation on held-out clips)."""
        rows = read_jsonl(self.settings.hum_data)[:2000]
        folder = Path(self.settings.hum_data).parent
        clips = []
        for row in rows:
            audio = read_audio(folder / row["audio"], SAMPLE_RATE, 1)
            clips.append(fit_audio(audio, CLIP_SAMPLES, "start"))
        clips = torch.cat(clips)                                                # (N, 65536)
        x = np.hstack([features(self.panel.feature_tagger, clips), low_band(clips)])       # (N, D)
        hums = np.array([row["hum"] for row in rows])
        meter = ridge(x[HELD_OUT:], hums[HELD_OUT:])
        return meter, spearman(meter(x[:HELD_OUT]), hums[:HELD_OUT])


# ----------------------------------------------------------------------------- numbers over seeds

def row_of(found, real):
    """{measure: [of each training seed]} of what was heard."""
    row = {}
    for one in found:
        values = scores(one["tally"])
        values["frechet"] = frechet_distance(one["features"], real["features"])
        values |= {name: one[name].mean() for name in TESTED if name in one}
        for name in HEADS:
            if name in values:
                row.setdefault(name, []).append(float(values[name]))
    return row


def test(first, second, name, draws=2000):
    """(mean, low, high) of first minus second in a measure, paired over prompts."""
    pairs = zip(first, second)
    difference = np.mean([one[name] - other[name] for one, other in pairs], axis=0)     # (N,)
    interval = bootstrap(lambda rows: difference[rows].mean(), len(difference), draws)
    return float(difference.mean()), *interval


def score_r(levels):
    """Per seed, the correlation of the reward with the score asked for; levels {score: heard}."""
    values = []
    for found in zip(*levels.values()):                     # of one seed, all levels
        rewards = [one["reward"] for one in found]
        asked = np.repeat(list(levels), len(rewards[0]))
        values.append(float(np.corrcoef(asked, np.concatenate(rewards))[0, 1]))
    return values


def measure(lab, entry):
    """{"rows": {name: row_of}, "tests": {what: {measure: test}}, "score-r": {model: score_r}}."""
    heard, rows, levels, tests = {}, {}, {}, {}
    for name, way in entry.ways.items():
        heard[name] = lab.heard(way)
        rows[name] = row_of(heard[name], lab.real)
        model, *asked = name.split(", s = ")
        if asked:
            levels.setdefault(model, {})[lab.score_of(way)] = heard[name]
    for one, other, _ in entry.pairs:
        names = [name for name in TESTED if name in rows[one]]
        differences = {name: test(heard[one], heard[other], name) for name in names}
        tests[f"{one} minus {other}"] = differences
    follows = {model: score_r(each) for model, each in levels.items()}
    return {"rows": rows, "tests": tests, "score-r": follows}


def verdict(tests, expected, name):
    """One sentence: which intervals of a measure lie as the hypothesis has it."""
    agree, differ = [], []
    for sign, (what, values) in zip(expected, tests.items()):
        _, low, high = values[name]
        found = "+" if low > 0 else "-" if high < 0 else "0"
        which = agree if found == sign else differ
        which.append(f"{what} ({found})")
    agree, differ = [", ".join(each) or "nowhere" for each in (agree, differ)]
    return f"{HEADS[name]} as expected: {agree}; not as expected: {differ}."


def cell(mean, low, high, sign=""):
    """A mean, in brackets its range or interval."""
    mean, low, high = [number(each, 3, sign) for each in (mean, low, high)]
    return f"{mean} ({low} to {high})"


def spread(values):
    """The mean over training seeds as a cell."""
    return cell(np.mean(values), min(values), max(values))


def result_tables(found, expected):
    """The tables of rows, of tests (expected: their signs), and of score-r."""
    rows = []
    for name, row in found["rows"].items():
        rows.append([name, *map(spread, row.values())])
    heads = [HEADS[name] for name in row]
    texts = [tables(["clips", *heads], rows)]
    rows = []
    for sign, (what, values) in zip(expected, found["tests"].items()):
        rows.append([what, sign, *[cell(*value, "+") for value in values.values()]])
    heads = [HEADS[name] for name in values]
    texts.append(tables(["difference", "expected", *heads], rows))
    if found["score-r"]:
        rows = [[model, spread(values)] for model, values in found["score-r"].items()]
        texts.append(tables(["model", "score-r"], rows))
    return texts


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    out = Path(args.out)
    name = f"attm_{args.command}"
    check_writable(out / f"{name}.md", Path(args.runs) / "latents" / "x")
    entry = ENTRIES[args.command]
    lab = Lab(args)

    hypothesis = f"Hypothesis: {entry.hypothesis}"
    budget = (f"Budget: {len(args.seeds)} training seeds of {args.sft_steps} steps a model, "
              f"{args.prompts} test prompts, {args.steps} Euler steps, s = {args.score:g}.")
    print(f"{name}\n{hypothesis}\n{budget}", flush=True)

    # train, sample, judge, compare
    found = measure(lab, entry)
    signs = [sign for _, _, sign in entry.pairs]
    sentence = f"Verdict: {verdict(found['tests'], signs, entry.measure)}"
    paragraphs = [hypothesis, budget, *result_tables(found, signs), sentence]
    if entry.measure == "hum":
        paragraphs.append(f"hum: a ridge regression, {lab.hum_meter[1]:.2f} on held-out clips.")

    # report
    write_report(out, name, entry.title, command_line("-m experiments.attm", argv), paragraphs,
                 {"settings": vars(args), "verdict": sentence, **found})
    print("next: python -m experiments.attm --help lists the other entries")


if __name__ == "__main__":
    run_main(main)
