"""Is an aligned model better than its base? Both make the same prompts from the same noise (paper 4.3, Table 3).

    python alignment.py                                                          # the bundled aligned model, base
    python alignment.py --checkpoint runs/a runs/b runs/c --prompts 1024         # training seeds, pooled and each
    python alignment.py best_of --counts 1 5 10 15                               # the reward chooses (paper A.3)
    python alignment.py shortcuts                        # what bfloat16 and --crop_latents cost
    python alignment.py crpo_search --runs runs/search/* # runs of crpo.py, on the held-out prompts that they share
    python alignment.py crpo_pairs --runs runs/crpo      # what its winners have that its losers lack

Who says so: the reward (the CLAP that ranked: the one that can be fooled), the judge (a CLAP that ranked nothing),
and the truth of the world as the judge's tagger hears it: event F1, order, exact scenes. Beside them the Frechet
distance and KL divergence to the real scenes of the same prompts, on features and classes of the second tagger.
Every difference is paired over prompts, its 95 % interval comes from resampling them.

Letters: N prompts, K events, W feature width, S training seeds.
"""
import argparse
import shlex
from pathlib import Path

import numpy as np
import torch

import metrics
from clap import load_clap
from common import (UserError, choose_device, in_range, load_tensors, parse_arguments, read_json, read_jsonl, run_main,
                    save_tensors)
from evaluate import as_clips, markdown, render, sampled, write_report
from model import load_model
from reward import JUDGE, REWARD, best_of
from sample import BASE, DEFAULT_CHECKPOINT, HERE, add_sampling_flags, check_sampling_flags, decode
from tagger import features, hear, load_tagger, posteriors
from world import SAMPLE_RATE, World

SCORES = ("reward", "judge", "f1", "order", "count", "exact")          # larger is better
HEADS = ["reward", "judge", "event F1", "order", "count", "exact scene", "Frechet", "KL"]


class Ears:
    """All that listens: two CLAPs and two taggers of a folder."""

    def __init__(self, tagger=BASE, reward=REWARD, judge=JUDGE, device="cpu"):
        self.reward, self.judge = load_clap(reward, device), load_clap(judge, device)
        self.truth, self.features = (load_tagger(tagger, which, device) for which in ("judge", "features"))

    def networks(self):
        """All four of them."""
        return self.reward, self.judge, self.truth, self.features

    def listen(self, clips, scenes):
        """Clips (N, 65536) of the scenes -> {"reward", "judge" (N,), "tally" (N, columns), "features" (N, W),
        "logits" (N, K)}, all tensors."""
        prompts = [scene.prompt for scene in scenes]
        audios = [clip[:int(scene.duration * SAMPLE_RATE)] for clip, scene in zip(clips, scenes)]
        chances = posteriors(self.features, clips).clamp(1e-6, 1 - 1e-6)
        return {"reward": self.reward.scores(audios, SAMPLE_RATE, prompts),
                "judge": self.judge.scores(audios, SAMPLE_RATE, prompts),
                "tally": torch.from_numpy(metrics.tally_all(hear(self.truth, clips), scenes)),
                "features": features(self.features, clips), "logits": chances.logit()}


def heard(path, ears, clips_of, scenes):
    """ears.listen(clips_of(), scenes) as arrays, kept in the file `path` (None: not kept)."""
    if path is not None and Path(path).is_file():
        found = load_tensors(path)
    else:
        found = ears.listen(clips_of(), scenes)
        if path is not None:
            save_tensors(path, found)
    return {name: tensor.numpy() for name, tensor in found.items()}


def kept(path):
    """What `heard` left in a file, as arrays; UserError if it is missing."""
    return {name: tensor.numpy() for name, tensor in load_tensors(Path(path)).items()}


def summary(found, real):
    """The numbers of a row of the table: {"reward", "judge", "f1", ..., "frechet", "kl"} (means over prompts)."""
    scores = metrics.scores(found["tally"])
    return {"reward": float(found["reward"].mean()), "judge": float(found["judge"].mean()),
            **{name: scores[name] for name in ("f1", "order", "count", "exact")},
            "frechet": metrics.frechet_distance(found["features"], real["features"]),
            "kl": float(metrics.kl_divergence(found["logits"], real["logits"]).mean())}


def cells(values):
    """A summary as cells of HEADS."""
    return [f"{values[name]:.4f}" for name in ("reward", "judge")] + [
        f"{values[name]:.3f}" for name in ("f1", "order", "count", "exact")] + [
        f"{round(values[name], 3) + 0.0:.3f}" for name in ("frechet", "kl")]                    # never "-0.000"


def gains(aligned, base, real, draws=1000, seed=0):
    """{measure: (difference, low, high)} of aligned minus base; for "frechet" the ratio of both, aligned over base.

    aligned: a list of S arrays dicts (training seeds), whose rows of one prompt are drawn together; base: one. The
    Frechet distance takes long: a fifth of the draws.
    """
    count = len(aligned)

    def pooled(name):
        return np.stack([one[name] for one in aligned], axis=1).reshape(len(base[name]), count, -1)    # (N, S, ...)

    def repeated(name):
        return np.repeat(base[name].reshape(len(base[name]), 1, -1), count, axis=1)
    result = {}
    for name in ("reward", "judge"):
        a, b = pooled(name), repeated(name)
        result[name] = (float(a.mean() - b.mean()), *metrics.paired_bootstrap(np.mean, a, b, draws, seed))
    a, b = pooled("tally"), repeated("tally")
    for name in ("f1", "order", "count", "exact"):
        def score(rows, name=name):
            return metrics.scores(rows.sum(1))[name]
        result[name] = (score(a) - score(b), *metrics.paired_bootstrap(score, a, b, draws, seed))

    def log_distance(mine, theirs):
        return float(np.log(np.mean([metrics.frechet_distance(mine[:, s], theirs) for s in range(mine.shape[1])])))
    a, b, truth = pooled("features"), base["features"][:, None], real["features"]
    low, high = metrics.paired_bootstrap(log_distance, (a, truth), (b, truth), max(draws // 5, 1), seed)
    result["frechet"] = tuple(np.exp([log_distance(a, truth) - log_distance(b, truth), low, high]).tolist())
    return result


# ----------------------------------------------------------------------------- command line

def shown(path):
    """A path as the tables name it: what lies beside this script without the way there."""
    return str(path).removeprefix(f"{HERE}/")


def change_cells(change):
    """What `gains` found as cells of HEADS up to the Frechet distance."""
    return [*("{:+.4f} ({:+.4f} to {:+.4f})".format(*change[key]) for key in SCORES),
            "x {:.3f} ({:.3f} to {:.3f})".format(*change["frechet"])]


def real_scenes(args, ears):
    """The test scenes of the prompts, and what the ears say of their real clips, as arrays."""
    clips, scenes = render(World("test", seed=args.world_seed, pairs=args.pairs), range(args.prompts))
    return scenes, {name: tensor.numpy() for name, tensor in ears.listen(clips, scenes).items()}


def made_scenes(args, ears, checkpoint, scenes, device):
    """What the ears say of a model's clips of the scenes' prompts, the noise of each from its place, as arrays."""
    made = sampled(load_model(checkpoint, device), args, [scene.prompt for scene in scenes],
                   [scene.duration for scene in scenes], args.seed)[0]
    return {name: tensor.numpy() for name, tensor in ears.listen(made, scenes).items()}


def compare(args):
    """Table and intervals of --checkpoint against --against on unseen pairs of events (or --pairs)."""
    device = choose_device(args.device)
    for name in (args.against, *args.checkpoint):
        load_model(name)                        # a faulty one is told now, not after minutes of listening
    ears = Ears(args.tagger, args.reward, args.judge, device)
    scenes, real = real_scenes(args, ears)
    rows, numbers, found = [["real scenes", *cells(summary(real, real))]], {}, {}
    for name in (args.against, *args.checkpoint):
        found[name] = made_scenes(args, ears, name, scenes, device)
        numbers[shown(name)] = summary(found[name], real)
        rows.append([shown(name), *cells(numbers[shown(name)])])
    table, base, against = [], found[args.against], shown(args.against)
    groups = {shown(name): [found[name]] for name in args.checkpoint}
    if len(groups) > 1:
        groups[f"all {len(groups)} pooled"] = [found[name] for name in args.checkpoint]
    for name, group in groups.items():
        numbers[f"{name} against {against}"] = change = gains(group, base, real, args.draws, args.seed)
        table.append([name, *change_cells(change)])
    write_report(args, "Aligned against base", [
        f"{args.prompts} prompts of World(\"test\", pairs=\"{args.pairs}\"), the same noise for all; {args.steps} "
        f"{args.solver} steps, guidance {args.guidance_scale:g}.",
        markdown(["model", *HEADS], rows),
        f"Differences to {against}, in brackets their 95 % intervals over prompts (Frechet distance: the ratio):",
        markdown(["model", *HEADS[:6], "Frechet ratio"], table)], numbers, "alignment.py")


def compare_counts(args):
    """Paper Table 5: the reward chooses among the first N samples of each prompt; judge and truth say if it helps."""
    device = choose_device(args.device)
    load_model(args.checkpoint[0])
    ears = Ears(args.tagger, args.reward, args.judge, device)
    scenes, real = real_scenes(args, ears)
    most = max(args.counts)
    made = made_scenes(args, ears, args.checkpoint[0], [scene for scene in scenes for _ in range(most)], device)
    every = {name: values.reshape(args.prompts, most, *values.shape[1:]) for name, values in made.items()}
    rows, numbers, chosen = [], {}, {}
    for count in args.counts:
        picked = best_of(every["reward"][:, :count])
        chosen[count] = {name: values[np.arange(args.prompts), picked] for name, values in every.items()}
        numbers[f"N = {count}"] = summary(chosen[count], real)
        rows.append([count, *cells(numbers[f"N = {count}"])])
    table, first = [], min(args.counts)
    for count in args.counts:
        if count != first:
            numbers[f"{count} against {first}"] = change = gains([chosen[count]], chosen[first], real, args.draws,
                                                                 args.seed)
            table.append([count, *change_cells(change)])
    write_report(args, "Best of N by the reward", [
        f"{args.prompts} prompts of World(\"test\", pairs=\"{args.pairs}\"), {shown(args.checkpoint[0])}.",
        markdown(["N", *HEADS], rows), f"Differences to N = {first}:",
        markdown(["N", *HEADS[:6], "Frechet ratio"], table)], numbers, "alignment.py")


def compare_shortcuts(args):
    """What sample.py's bfloat16 and --crop_latents cost: the same prompts from the same noise, heard and timed."""
    device = choose_device(args.device)
    ears = Ears(args.tagger, args.reward, args.judge, device)
    scenes, real = real_scenes(args, ears)
    prompts, seconds = [scene.prompt for scene in scenes], [scene.duration for scene in scenes]
    rows, table, numbers, base = [["real scenes", *cells(summary(real, real)), ""]], [], {}, None
    for name, dtype, crop in (("float32", "float32", False), ("bfloat16", "bfloat16", False),
                              ("float32, cropped", "float32", True), ("bfloat16, cropped", "bfloat16", True)):
        model = load_model(args.checkpoint[0], device, getattr(torch, dtype))
        place = f"{args.cache}/shortcuts_{device.type}_{args.batch_size}_{torch.get_num_threads()}"     # it is timed
        settings = argparse.Namespace(**{**vars(args), "dtype": dtype, "crop_latents": crop, "cache": place})
        made, took = sampled(model, settings, prompts, seconds, args.seed)
        found = {key: tensor.numpy() for key, tensor in ears.listen(made, scenes).items()}
        numbers[name] = {**summary(found, real), "seconds": took}
        rows.append([name, *cells(numbers[name]), f"{took / len(prompts):.3f}"])
        base = base or (found, took)
        if found is not base[0]:
            numbers[f"{name} against float32"] = change = gains([found], base[0], real, args.draws, args.seed)
            table.append([name, *change_cells(change), f"x {took / base[1]:.2f}"])
    write_report(args, "What bfloat16 and --crop_latents cost", [
        f"{args.prompts} prompts of World(\"test\", pairs=\"{args.pairs}\") of 1 to 4 s, "
        f"{shown(args.checkpoint[0])}, the same noise; {args.steps} {args.solver} steps, guidance "
        f"{args.guidance_scale:g}; {args.batch_size} at a time on {torch.get_num_threads()} threads, seconds a clip "
        "without decoding and without the packed weights of sample.py.",
        markdown(["way", *HEADS, "seconds"], rows),
        "Differences to float32 on all latents, in brackets their 95 % intervals over prompts (Frechet distance: the "
        "ratio):", markdown(["way", *HEADS[:6], "Frechet ratio", "seconds"], table)], numbers, "alignment.py")


def settings_of(run):
    """config.json of a run of crpo.py. Raises UserError if the folder is none."""
    settings = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if "num_samples" not in settings:
        raise UserError(f"{run} is no run of crpo.py; pass --runs the --out folder of one")
    return settings


def search(args):
    """What each iteration of each run of crpo.py in --runs gained on the run's held-out prompts, and its command."""
    rows, numbers = [], {}
    for run in map(Path, args.runs):
        settings = settings_of(run)
        real, base = (kept(run / f"{name}.safetensors") for name in ("real", "base"))
        for k in range(1, settings["iterations"] + 1):
            folder = run / f"iteration_{k}"
            if not (folder / "heard.safetensors").is_file():
                break
            report = read_json(folder / "report.json")
            change = gains([kept(folder / "heard.safetensors")], base, real, args.draws, args.seed)
            numbers[str(folder)] = {"command": settings["command"], "report": report, "gains": change}
            rows.append([f"`{settings['command']}`" if k == 1 else "", k, report["pairs"],
                         f"{report['accuracy']:.2f}", f"{report['winner'] / report['reference_winner']:.3f}",
                         *change_cells(change)])
    if not rows:
        raise UserError(f"{' '.join(args.runs)}: no finished iteration of crpo.py; pass the --out of its runs")
    write_report(args, "Search for the settings of crpo.py", [
        "Gains over the base on each run's held-out prompts, with 95 % intervals; accuracy: implicit, on the "
        "iteration's pairs; winners: their loss over the reference's.",
        markdown(["command", "iteration", "pairs", "accuracy", "winners", *HEADS[:6], "Frechet"], rows)],
        numbers, "alignment.py")


def compare_pairs(args):
    """What the reward prefers: winners against losers of the pairs of crpo.py's --runs, heard by judge and truth.

    A property that winners and losers have alike cannot be learned from their preference.
    """
    device = choose_device(args.device)
    all_settings = {run: settings_of(run) for run in map(Path, args.runs)}
    ears, model, world = Ears(args.tagger, args.reward, args.judge, device), load_model(args.against, device), None
    found = {"real scenes": [], "losers": [], "winners": []}
    for run, settings in all_settings.items():
        if settings["pairs"] or settings["prompt_file"]:
            raise UserError(f"{run}: its prompts are not the world's; the truth is known of no others")
        for folder in sorted(run.glob("iteration_*"), key=lambda folder: int(folder.name.split("_")[1])):
            if not (folder / "pairs.jsonl").is_file():
                continue                                                   # --offline: those of the first iteration
            world = world or World("train", seed="crpo")
            places = {which: [int(row[which].split("#")[1]) for row in read_jsonl(folder / "pairs.jsonl")]
                      for which in ("loser", "winner")}
            prompts, made = read_jsonl(folder / "prompts.jsonl"), load_tensors(folder / "candidates.safetensors")
            clips, scenes = render(world, [prompts[place // settings["num_samples"]]["prompt_id"]
                                           for place in places["winner"]])
            found["real scenes"].append(ears.listen(clips, scenes))
            for which, place in places.items():
                audios = decode(model, made["latents"][place], [scene.duration for scene in scenes], progress=True)
                found[f"{which}s"].append(ears.listen(as_clips(model.codec, audios), scenes))
    if world is None:
        raise UserError(f"{' '.join(args.runs)}: no pairs of crpo.py; pass the --out of its runs")
    found = {name: {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
             for name, parts in found.items()}
    real = found["real scenes"]
    numbers = {name: summary(values, real) for name, values in found.items()}
    numbers["winners against losers"] = change = gains([found["winners"]], found["losers"], real, args.draws, args.seed)
    write_report(args, "Winners and losers of crpo.py", [
        f"{len(real['reward'])} pairs, the best and the worst clip of a prompt by the reward.",
        markdown(["clips", *HEADS], [[name, *cells(values)] for name, values in numbers.items() if name in found]),
        "Winners minus losers, in brackets the 95 % interval over prompts (Frechet distance: the ratio):",
        markdown([*HEADS[:6], "Frechet ratio"], [change_cells(change)])], numbers, "alignment.py")


def make_parser():
    """All flags of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="alignment",
                        choices=["alignment", "best_of", "shortcuts", "crpo_search", "crpo_pairs"],
                        help="which table (default: alignment)")
    group = parser.add_argument_group("what to compare")
    group.add_argument("--checkpoint", nargs="+", default=[str(DEFAULT_CHECKPOINT)],
                       help="model folders to judge (default: the bundled aligned one)")
    group.add_argument("--against", default=str(BASE), help="the base (default: the bundled one)")
    group.add_argument("--counts", type=int, nargs="+", default=[1, 5, 10, 15],
                       help="the N of best_of (default: 1 5 10 15, as paper Table 5)")
    group.add_argument("--runs", nargs="+", default=[], help="of crpo_search and crpo_pairs: --out folders of crpo.py")
    group.add_argument("--prompts", type=int, default=1024, help="held-out prompts (default: 1024)")
    group.add_argument("--pairs", choices=["seen", "unseen", "all"], default="unseen",
                       help="pairs of events of the prompts (default: unseen)")
    group.add_argument("--world_seed", type=int, default=0, help="of the prompts (default: 0)")
    group.add_argument("--draws", type=int, default=1000, help="resamplings of the prompts (default: 1000)")
    add_sampling_flags(parser)
    group = parser.add_argument_group("who listens, and where to")
    group.add_argument("--reward", default=str(REWARD), help="the CLAP that ranked (default: the bundled one)")
    group.add_argument("--judge", default=str(JUDGE), help="the CLAP that judges (default: the bundled one)")
    group.add_argument("--tagger", default=str(BASE), help="folder of both taggers")
    group.add_argument("--cache", default="cache/evaluate", help="of generated latents (default: cache/evaluate)")
    group.add_argument("--out", default="results", help="folder of the tables (default: results)")
    group.add_argument("--batch_size", type=int, default=32, help="samples at a time (default: 32)")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    parser.set_defaults(dtype="float32")                    # of sampling, for evaluate.sampled's key of kept latents
    return parser


def main(argv=None):
    args = parse_arguments(make_parser(), argv)
    check_sampling_flags(args)
    in_range("--prompts", args.prompts, 2, 1e6)
    in_range("--draws", args.draws, 1, 1e6)
    if min(args.counts) < 1 or (args.command in ("best_of", "shortcuts") and len(args.checkpoint) > 1):
        raise UserError("--counts must be at least 1, and best_of and shortcuts take one --checkpoint")
    of_runs = args.command in ("crpo_search", "crpo_pairs")
    if of_runs and not args.runs:
        raise UserError(f"{args.command} needs --runs, the --out folders of crpo.py")
    {"alignment": compare, "best_of": compare_counts, "shortcuts": compare_shortcuts, "crpo_search": search,
     "crpo_pairs": compare_pairs}[args.command](args)
    heard_in = args.runs[0] + "/iteration_1" if of_runs else shown(args.checkpoint[-1])
    print(f"next: python sample.py --checkpoint {shlex.quote(heard_in)}, to hear the difference to --checkpoint "
          f"{shlex.quote(shown(args.against))}")


if __name__ == "__main__":
    run_main(main)
