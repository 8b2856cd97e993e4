"""What reproduce.py works with: the stages that its entries train, once for all of them, who listens, and tests.

A Lab has the flags of an entry. Its stages are folders below --runs, seed by seed; what is heard of a model's clips is
kept in --runs/heard, named by all that it depends on. Both are found again by any entry.

Letters: N test prompts.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

import crpo
import expert_iteration
import metrics
import train_fm
from alignment import heard
from cache import settings_key
from clap import load_clap
from common import UserError, atomic_path, choose_device, file_hash, read_jsonl
from evaluate import as_clips, render
from model import load_model, with_score_head
from ranker import Judged
from sample import decode, generate
from tagger import features, hear, load_tagger, quality
from vocoder import MEL_16K, LogMel
from world import SAMPLE_RATE, World

# ----------------------------------------------------------------------------- stages: what has to be trained

class Lab:
    """The flags, the stages that they describe, and what listens, each made when first asked for."""

    def __init__(self, args):
        self.args, self.device, self.runs = args, choose_device(args.device), Path(args.runs)
        self.made = {}

    def once(self, name, make):
        """What `make()` gave when it was first asked for under this name."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def score_of(self, share, column="score"):
        """The score below which `share` percent of the training clips lie."""
        data = self.args.hum_data if column != "score" else self.args.data
        return float(np.percentile([row[column] for row in read_jsonl(data)], share))

    def folder(self, seed, name):
        """Where a stage of a training seed lies."""
        return self.runs / f"seed_{seed}" / name

    def flow(self, seed, head=None, column="score", data=None):
        """Stage 1: the bundled base trained on scored clips with a `head`, or without scores (None)."""
        args, data = self.args, data or self.args.data
        name = f"sft_{head or 'plain'}" + ("" if data == args.data else f"_{column}")
        out = self.folder(seed, name)
        flags = ["--checkpoint", args.checkpoint, "--data", data, "--steps", args.sft_steps, "--learning_rate",
                 args.sft_rate, "--batch_size", args.batch_size, "--seed", seed, "--save_every", 250, "--val_every",
                 10 ** 9, "--val_clips", 64, "--log_every", 50,
                 *(["--score_column", column, "--score_head", head] if head else []),
                 "--device", args.device, "--out", out]
        return self.trained(out, flags, lambda flags: train_fm.train(train_fm.parse_args(flags)))

    def trained(self, out, flags, train):
        """`train(flags)` unless `out` was finished with the same ones; -> out. UserError if with others."""
        flags, done = [str(flag) for flag in flags], out / "finished"
        said = " ".join(flags[:flags.index("--device")])
        if not done.is_file():
            train(flags)
            with atomic_path(done) as temporary:
                temporary.write_text(said, encoding="utf-8")
        elif done.read_text(encoding="utf-8") != said:
            raise UserError(f"{out} was made with other flags ({done.read_text(encoding='utf-8')}); give the same, or "
                            "another --runs")
        return out

    def experts(self, seed, head):
        """Stage 2: expert iteration on the flow of stage 1."""
        args, out = self.args, self.folder(seed, f"experts_{head}")
        flags = ["--checkpoint", self.flow(seed, head), "--data", args.data, "--ranker", args.ranker, "--samples",
                 args.samples, "--score", args.score, "--tuning_steps", args.tuning_steps, "--polish_steps",
                 args.polish_steps, "--steps", args.steps, "--guidance_scale", args.guidance_scale, "--batch_size",
                 args.batch_size, "--seed", seed, "--device", args.device, "--out", out]
        self.trained(out, flags, lambda flags: expert_iteration.run(expert_iteration.parse_args(flags)))
        return out / "round_1"

    def aligned(self, seed, head):
        """Stage 3: CRPO of the experts of `head`, run as v2."""
        args, out = self.args, self.folder(seed, f"crpo_{head}")
        flags = ["--checkpoint", self.experts(seed, head), "--score_head", "v2", "--score", args.score, "--iterations",
                 1, "--prompts", args.crpo_prompts, "--epochs", args.crpo_epochs, "--evaluate", 2, "--steps",
                 args.steps, "--guidance_scale", args.guidance_scale, "--seed", seed, "--device", args.device,
                 "--out", out]
        self.trained(out, flags, lambda flags: crpo.run(crpo.parse_args(flags)))
        return out / "iteration_1"

    # ------------------------------------------------------------------------- what listens

    def scenes(self):
        """The test scenes of all entries, and what is heard of their real clips."""
        def make():
            clips, scenes = render(World("test", pairs="all"), range(self.args.prompts))
            return scenes, self.listen(clips, scenes)
        return self.once("scenes", make)

    def listen(self, clips, scenes):
        """Clips (N, 65536) -> {"reward", "clap", "quality" (N,), "tally", "features", "low band"} as arrays."""
        args, device = self.args, self.device
        prompts = [scene.prompt for scene in scenes]
        audios = [clip[None, :int(scene.duration * SAMPLE_RATE)] for clip, scene in zip(clips, scenes)]
        ranker = self.once("ranker", lambda: Judged(args.ranker, device))
        judge = self.once("clap", lambda: load_clap(args.judge, device))
        tagger, second, third = (self.once(which, lambda which=which: load_tagger(args.tagger, which, device))
                                 for which in ("judge", "features", "quality"))
        return {"reward": ranker.scores(audios, SAMPLE_RATE, prompts).numpy(),
                "clap": judge.scores(audios, SAMPLE_RATE, prompts).numpy(), "quality": quality(third, clips).numpy(),
                "tally": metrics.tally_all(hear(tagger, clips), scenes), "features": features(second, clips).numpy(),
                "low band": low_band(clips).numpy()}

    def measure(self, folder, score=None, head=None, noise=42, guidance_scale=None):
        """What is heard of a model's clips of the test prompts; `head` runs v1 weights as v2, or the reverse."""
        args, (scenes, _) = self.args, self.scenes()
        guidance_scale = guidance_scale or args.guidance_scale
        key = settings_key({"weights": file_hash(Path(folder) / "tangoflux.safetensors"), "score": score, "head": head,
                            "noise": noise, "prompts": args.prompts, "steps": args.steps, "scale": guidance_scale,
                            "solver": args.solver, "ranker": file_hash(Path(args.ranker) / "ranker.safetensors")})

        def clips():
            model = load_model(folder, self.device)
            if head and model.flow.config["score_head"] != head:
                model.flow = with_score_head(model.flow, head)[0]
            durations = [scene.duration for scene in scenes]
            latents = generate(model, [scene.prompt for scene in scenes], durations, noise, steps=args.steps,
                               guidance_scale=guidance_scale, solver=args.solver, batch_size=args.batch_size,
                               score=score, progress=True)
            return as_clips(model.codec, decode(model, latents, durations))
        listener = argparse.Namespace(listen=lambda made, scenes: {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.listen(made, scenes).items()})
        return heard(self.runs / "heard" / f"{key}.safetensors", listener, clips, scenes)

    def seeds(self, folder_of, **how):
        """measure() of each training seed's model."""
        return [self.measure(folder_of(seed), **how) for seed in self.args.seeds]


def low_band(clips, bands=24):
    """Clips (N, 65536) -> (N, 72): low, middle and high quantiles of their lowest mel bands, in decades."""
    mel = torch.cat([LogMel(**MEL_16K)(part) for part in clips.split(64)])[:, :bands]               # (N, 24, F)
    return torch.quantile(mel, torch.tensor([0.1, 0.5, 0.9]), dim=2).transpose(0, 1).flatten(1)


# ----------------------------------------------------------------------------- numbers of several seeds

def row_of(found, real):
    """The means over seeds and prompts of a list of measurements, and their spread over seeds."""
    each = [{"frechet": metrics.frechet_distance(one["features"], real["features"]),
             **{name: float(one[name].mean()) for name in ("clap", "reward", "quality")},
             **{name: metrics.scores(one["tally"])[name] for name in ("recall", "order")}} for one in found]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]} | {
        "seeds": {name: [one[name] for one in each] for name in each[0]}}


def per_prompt(found, name):
    """(N,) means over seeds."""
    return np.mean([one[name] for one in found], axis=0)


def difference(first, second, name, draws=2000):
    """{"mean", "low", "high", "t", "p"} of first minus second, paired over prompts; p one-sided for first > second."""
    a, b = per_prompt(first, name), per_prompt(second, name)
    mean, t, p = metrics.paired_t(a, b)
    low, high = metrics.paired_bootstrap(np.mean, a, b, draws)
    return {"mean": mean, "low": low, "high": high, "t": t, "p": p}


def cells(row, names=("frechet", "clap", "reward", "quality", "recall", "order")):
    """Numbers of a row, in brackets their range over seeds."""
    def one(name):
        low, high = min(row["seeds"][name]), max(row["seeds"][name])
        return f"{row[name]:.3f}" + (f" ({low:.3f} to {high:.3f})" if len(row["seeds"][name]) > 1 else "")
    return [one(name) for name in names]


def interval(value, digits=3):
    return f"{value['mean']:+.{digits}f} ({value['low']:+.{digits}f} to {value['high']:+.{digits}f})"


def tested(value):
    """A difference with its interval and p as a cell."""
    return f"{interval(value)}, p = {value['p']:.3f}"


HEADS = ["Frechet", "CLAP", "reward", "true quality", "event recall", "order"]


def say(lab, entry, hypothesis):
    """Print what an entry expects and costs before it starts."""
    args = lab.args
    budget = (f"{len(args.seeds)} training seeds of {args.sft_steps} steps a model, {args.prompts} test prompts, "
              f"{args.steps} {args.solver} steps, guidance {args.guidance_scale:g}")
    print(f"{entry}\nhypothesis: {hypothesis}\nbudget: {budget}", flush=True)
    return [f"Hypothesis: {hypothesis}", f"Budget: {budget}; seeds {', '.join(map(str, args.seeds))}."]
