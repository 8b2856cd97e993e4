"""What the first edition computed (commit 3aa9344), computed by today's functions from the same inputs.

golden/ holds 183 numbers and arrays named NAME.KEY, and runs that were stopped (run_*): function NAME of `Goldens` makes
the former today, the latter are resumed. golden.json says in words how each was made ("how") and how far it may move: three
times what it moved between kernels of the CPU. The code that made them runs in a checkout of 3aa9344 alone, and stays in
history: `git show 980f06f:tests/golden/make_golden.py`, and so make_fixtures.py for the files and the stopped runs.
"""
import importlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evaluate
import ranker
import reward
import sample
import train_fm
from bench import full_size
from conftest import ROOT, TINY, TINY_OFFICIAL, TINY_OOBLECK, noise, planted, tiny_tagger
from data import open_cache, prepare, world_cache
from experiments import toy
from lib import audio as sound, fast, mel, oobleck, text, weights
from lib.common import BASE, CLEAN, derive_seed, generator, parse_flags, pick, read_jsonl
from lib.text import encode_prompts
from model import TangoFlux, load_model, with_score_head
from world import ears, scenes, sounds, train_clap, train_ears, train_ranker, votes as poll

HERE = ROOT / "tests" / "golden"
PROMPTS = ["rain", "a violin followed by rain", "first three beeps, then a choir singing, and finally wind"]
FROZEN = json.loads((HERE / "golden.json").read_text(encoding="utf-8"))
VALUES = {**load_file(HERE / "golden.safetensors"), **FROZEN["values"]}         # {"NAME.KEY": tensor or JSON}
VALUES["ranker.report"].pop("sources")          # accuracies of each source: gone on purpose
GONE = ("negative_and_cropped.cropped", "files.two", "tallies.match", "numbers.ridge", "numbers.damage",
        "numbers.paired_t")                     # on purpose, with what they measure


@cache
def base():
    """The base of the first edition, which learned from true captions, in float32: .flow .codec .text"""
    return load_model(CLEAN)


@cache
def val_scenes():
    """World("val") scenes 0-7: audio (8, 65536), the Scenes."""
    return scenes.render_clips(scenes.World("val"), range(8))


@cache
def training_data():
    """World("train") scenes 0-7 by the base codec, and their texts -> Data."""
    latents = world_cache("latents", base().codec, "train", 8, workers=0)
    return prepare(latents, latents.kept, base().text, 64, frozen=False)


def norms(named):
    """Of {name: tensor} sorted by name: sums and norms (K, 2)."""
    tensors = [named[name].detach().float().double() for name in sorted(named)]
    return torch.stack([torch.stack([t.sum(), t.norm()]) for t in tensors]).float()


def movement(one, other):
    """Largest difference over the largest number, of tensors or of the numbers in JSON; inf if all else differs."""
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
            return np.inf
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        return ((one - other).abs().max() / one.abs().max().clamp(min=1e-30)).item() if one.numel() else 0.0
    if isinstance(one, dict):
        return movement([*one.values()], [other[key] for key in one]) if one.keys() == other.keys() else np.inf
    if isinstance(one, list):
        return max(map(movement, one, other), default=0.0) if len(one) == len(other) else np.inf
    if isinstance(one, float) and isinstance(other, float) and one == one:
        return np.nan_to_num(abs(one - other) / max(abs(one), 1e-30), nan=np.inf)
    return 0.0 if one == other or (one != one and other != other) else np.inf


def gradients(module):
    return norms({name: p.grad for name, p in module.named_parameters() if p.grad is not None})


def latents_of(quick, solver, steps):
    """Latents of the prompts and durations of val_scenes; by the plain model, or as quick as sample.py makes it."""
    model, truth, sampling = load_model(CLEAN), val_scenes()[1], sample.Sampling(steps, 3.0, solver)
    if quick:
        fast.quicken(model.flow, 512)
    latents = sample.sample_latents(model, [s.prompt for s in truth], [s.duration for s in truth], sampling=sampling)
    return {"latents": latents[:, ::4], "all": [latents.sum().item(), latents.abs().sum().item()]}


def intervals(rows):
    """Intervals of the scores of tally rows (N prompts, K clips, columns), by 200 draws of prompts."""
    drawn = evaluate.bootstrap(lambda places: list(ears.scores(np.concatenate(rows[places])).values()), len(rows), 200)
    return dict(zip(ears.scores(rows[0]), zip(*drawn)))


def end_of(name, monkeypatch):
    """Go on with a stopped run in a copy, by its old command line; the weights that it ends with, its log's losses."""
    shutil.copytree(HERE, "golden", ignore=shutil.ignore_patterns("golden.*"))
    for folder in ("checkpoints", "sounds"):
        Path(folder).symlink_to(ROOT / folder)
    _, script, *words = FROZEN["commands"][name].split()
    module = importlib.import_module({"train_tagger.py": "world.train_ears"}.get(script, script.removesuffix(".py")))
    if name == "run_crpo":
        words += ["--beta", "2000", "--fm_weight", "1", "--kl_weight", "0"]         # as it was then
    out, found = Path(words[words.index("--out") + 1]), {}
    monkeypatch.setattr("sys.argv", [script, *words])
    monkeypatch.setattr(scenes, "DataLoader", lambda jobs, *_, collate_fn, **more: map(collate_fn, jobs))
    logs = {path: path.read_text() for path in out.rglob("log.jsonl")}
    module.main()
    assert all(path.read_text().startswith(rows) for path, rows in logs.items()), "it was begun anew"
    for file in (key[len(name) + 1:-6] for key in VALUES if key.startswith(name) and key.endswith(".names")):
        tensors = torch.load(out / file, weights_only=True) if file.endswith(".pt") else load_file(out / file)
        tensors = tensors.get("weights", tensors.get("tagger", tensors))
        tensors = {key: t.float() for key, t in tensors.items() if t.is_floating_point()}
        largest = max(sorted(tensors), key=lambda key: tensors[key].numel())
        rows = [row["loss"] for row in read_jsonl((out / file).with_name("log.jsonl")) if "loss" in row]
        if name == "run_experts":
            rows = [np.mean(rows)]          # then one row of four steps; now each save has one, of two
        found |= {file: norms(tensors), f"{file}.names": sorted(tensors), f"{file}.losses": rows,
                  f"{file}.first": tensors[largest].flatten()[:64]}
    return found


class Goldens:
    euler_base, euler_quick = partial(latents_of, False, "euler", 5), partial(latents_of, True, "euler", 5)
    heun_base, heun_quick = partial(latents_of, False, "heun", 3), partial(latents_of, True, "heun", 3)

    def negative_and_cropped():
        how = {"negative": (2, 4.5, "euler", None, "wind"), "plain": (2, 1.0, "euler")}
        latents = partial(sample.sample_latents, base(), PROMPTS, [1.0, 2.0, 4.0], 3, [5, 6, 7])
        return {name: latents(sample.Sampling(*settings))[:, ::8] for name, settings in how.items()}

    def noise_and_schedule():
        seeds = [str(derive_seed(*parts)) for parts in ((0,), (0, 1), ("a", 2, "b"), (0, "flow"))]
        return {"noise": sample.noise_for(0, [0, 7], (4, 6)), "official": sample.official_noise(0, [2, 1], (4, 6)),
                "ts": sample.schedule(5), "seeds": seeds, "order": train_fm.epoch_order(3, 1, 10).tolist(),
                "t": train_fm.logit_normal_t(6, generator(0), 0.8, 1.0),
                "grid": train_fm.on_grid(train_fm.logit_normal_t(6, generator(0)), 1000)}

    def official_profile():
        full_size.random_folder("tiny", **TINY_OFFICIAL)
        args, prompts = parse_flags("", sample.FLAGS, [], sample.PROFILES["official"]), [full_size.PROMPT] * 2
        given, start = ("tiny", prompts, [1.0] * 2, 0, None), sample.official_noise(0, [2], (24, 4))
        made = sample.prompts_to_audio(*given, pick(sample.Sampling, args), noise=start, batch_size=2,
                                       max_text_length=args.max_text_length)
        _, audios, rates = zip(*made)
        return {"audio": torch.stack(audios)[..., ::4], "rate": rates[0], "profiles": sample.PROFILES,
                "sampler": {name: getattr(args, name) for name in VALUES["official_profile.sampler"]}}

    @torch.no_grad()
    def score_heads():
        encoder = text.make_text_encoder(["rain", "wind", "a", "violin"], width=16, layers=1, heads=2, d_ff=16)
        seconds, score, found = torch.tensor([1.0, 2.0]), torch.tensor([1.5, np.nan]), {}
        condition = encode_prompts(encoder, ["rain", "a violin"], seconds, score=score)
        for head in ("v1", "v2", "v3", "v4", "v5"):
            torch.manual_seed(0)
            flow = TangoFlux(TINY)
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            flow, _ = with_score_head(flow, head, "zero", 0.2, 1.5, seed=0)
            torch.manual_seed(1)
            for name, parameter in flow.named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) if "score_embed" in name else 0)
            found[head] = flow.velocity(noise(2, 16, 4), torch.tensor([0.7, 0.3]), condition)
        return found

    def fm_validation():
        grid = train_fm.validation_batches(training_data(), base().codec, 8)
        loss, bins = train_fm.validate(base().flow, base().text, grid, nullcontext).values()
        return {"loss": [loss], "bins": [b for b in bins if b is not None], "empty": [b is None for b in bins]}

    def ranker():
        clips, features, truth, votes = planted(200, 1500)
        parts = train_ranker.split_votes(clips, votes, 0)
        network, log = train_ranker.fit(features, votes, parts, train_ranker.Fit((16, 8), 0.5, 1, 256, 1e-4, 1e-2, 0))
        held = train_ranker.Votes(*(column[parts[2]] for column in votes))
        torch.manual_seed(0)
        untrained = ranker.Ranker(12, (16, 8)).eval()
        learned = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
        del learned["layers.0.bias"], learned["layers.4.bias"]      # before BatchNorm: their gradients are rounding
        return {"untrained": untrained(features)[:64], "log": [[row["loss"], row["validation"]] for row in log],
                "scores": network(features)[:64], "weights": norms(learned), "names": sorted(learned),
                "report": train_ranker.report(network.utility(features).detach().numpy(), held, truth),
                "parts": [len(part) for part in parts], "bands": ranker.band_statistics(noise(80, 64), 14000),
                "ranknet": ranker.ranknet_loss(*noise(2, 5), torch.tensor([1.0, 0, 0.5, 1, 0]))[None]}

    def votes():
        audio, rows = poll.render_block({"split": "train", "seed": 5000}, 2, 0.5, range(3))
        clips = [{**row, "audio": f"{row['scene']}_{row['take']}.wav"} for row in rows]
        cast, audio = poll.cast_votes(clips, 24, seed=0), audio.astype(float)
        return {"chance": [vote.pop("chance") for vote in cast], "quality": [row.pop("quality") for row in clips],
                "votes": cast, "rows": clips, "sums": np.stack([audio.sum(1), abs(audio).sum(1)], 1)}

    def clap():
        found, audios, prompts = {}, list(val_scenes()[0]), [scene.prompt for scene in val_scenes()[1]]
        for which in ("reward", "judge"):
            network = reward.load_clap(BASE / f"clap_{which}")
            found |= {f"{which}.scores": network.scores(audios, 16000, prompts),
                      f"{which}.shifted": network.scores(audios, 16000, prompts[1:] + prompts[:1]),
                      f"{which}.audio": network.embed_audio(audios, 16000)[:, :16],
                      f"{which}.text": network.embed_text(prompts)[:, :16]}
        return found

    def taggers():
        audio, found = val_scenes()[0], {"quality": ears.quality(ears.load_tagger(BASE, "quality"), val_scenes()[0])}
        for which in ("judge", "features"):
            network = ears.load_tagger(BASE, which)
            readings = [reading.items() for reading in ears.hear(network, audio)]
            heard = [[[name, event.onset, event.offset, event.count] for name, event in each] for each in readings]
            activity, presence, rate = ears.probabilities(network, audio)
            found |= {f"{which}.heard": heard, f"{which}.presence": presence, f"{which}.rate": rate[:, ::8],
                      f"{which}.activity": activity[:, ::8]}
        return {**found, "embedding": ears.features(network, audio)[:, ::4], "posteriors": presence}

    def tallies():
        rows = ears.tally_all(ears.hear(ears.load_tagger(BASE), val_scenes()[0]), val_scenes()[1])
        return {"rows": rows.tolist(), "scores": ears.scores(rows), "bootstrap": intervals(rows[:, None])}

    def tagger_training():
        network = tiny_tagger()
        batch = noise(4, 80, 64) - 2.5, (noise(4, 16, 3, seed=1) > 1).float(), noise(4, 32, 1).abs() * 0.1
        parts = train_ears.tagger_loss(network(batch[0]), *batch[1:], torch.tensor([[1], [0], [2], [-1]]))
        loss = sum(parts.values())
        loss.backward()
        image, activity, rate = train_ears.augment(*batch, generator("test"))
        return {"parts": torch.stack([loss, *parts.values()]), "names": ["loss", *parts], "mel": image[:, ::8, ::8],
                "gradients": gradients(network), "activity": activity.sum(1), "rate": rate.sum(1)}

    def clap_training():
        found = {"caption": [], "almost": [], "misses": [], "relative": []}
        for i in range(8):
            scene, rng = scenes.World("train").scene(i), np.random.default_rng(i)
            given = rng, scene.relation, [(event.name, event.count) for event in scene.events]
            found["caption"].append(scenes.caption(*given))
            found["almost"].append([scenes.almost(*given) for _ in range(3)])
            found["misses"].append(scenes.near_misses(*given, 4))
            found["relative"].append(asdict(scenes.relative(scene, rng)))
        rows = [torch.nn.functional.normalize(noise(n, 8, seed=seed), dim=-1) for n, seed in ((4, 0), (4, 1), (8, 2))]
        same = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
        loss, ranked = train_clap.contrastive_loss(*rows, 10.0, 12.0, same), train_clap.ranked_right(*rows)
        return {**found, "loss": torch.stack([loss, ranked.float().mean()])}

    def mel_codec():
        audio, codec, latents = val_scenes()[0][:2, None], base().codec, noise(2, 3, 48)
        (mean, std), image = codec.encode(audio), codec.log_mel(audio)
        losses = codec.losses(image, generator(0))
        return {"mean": mean[:, ::4], "std": std[:, ::4], "mel": image[:, ::4, ::8], "names": list(losses),
                "losses": list(losses.values()), "decoded": codec.decode_mel(mean)[:, ::4, ::8],
                "audio": mel.griffin_lim(codec.decode_mel(mean), codec.mel)[:, None, ::64].clamp(-1, 1), "normalised": codec.normalise(latents),
                "denormalised": codec.denormalise(latents)}

    def oobleck():
        torch.manual_seed(0)
        codec, audio = oobleck.Oobleck(**TINY_OOBLECK), 0.1 * noise(2, 1, 2048)
        (mean, std), losses = codec.encode(audio), codec.losses(audio, generator(0))
        return {"mean": mean, "std": std, "audio": codec.decode(mean)[..., ::8], "names": list(losses),
                "losses": torch.stack([*losses.values()])}

    def resampled():
        audio, pairs = 0.2 * noise(1, 4000), ((16000, 44100), (44100, 16000), (48000, 44100), (16000, 48000))
        found = {f"{a}_{b}": sound.resample(audio, a, b) for a, b in pairs}
        cut = [sound.fit_audio(audio, size, crop)[0, :50] for size in (3000, 5000) for crop in ("center", "start")]
        return {**{key: out[:, ::7] for key, out in found.items()}, "fit": torch.stack(cut),
                "lengths": [out.shape[-1] for out in found.values()]}

    def world_scenes():
        prompts = {f"{split} {pairs}": [scenes.World(split, pairs=pairs).scene(i).prompt for i in range(20)]
                   for split in ("train", "val", "test") for pairs in ("seen", "unseen", "all")}
        other = scenes.World("train", seed=3, relations=(1, 2, 3, 4), counted=0.9, degraded=0.5)
        return {"prompts": prompts, "truth": [asdict(scenes.World().scene(i)) for i in range(20)],
                "other": [[other.scene(i).prompt, other.scene(i).degradation] for i in range(20)],
                "settings": other.settings(), "words": scenes.known_words()}

    def world_audio():
        asked = (("train",), 2), (("val",), 2), (("test", 0, "unseen"), 1), (("test", 0, "seen", 1.0), 8)
        parts = [scenes.render_clips(scenes.World(*settings), range(count)) for settings, count in asked]
        audio, told = torch.cat([clips for clips, _ in parts]).double(), [scene for _, own in parts for scene in own]
        return {"sums": torch.stack([audio.sum(1), audio.abs().sum(1)], 1), "first": audio[:, 4000:4008],
                "degradations": [s.degradation for s in told], "strikes": [[e.strikes for e in s.events] for s in told]}

    def degradations():
        audio, log_mel, rows, quality = val_scenes()[0][3], mel.LogMel(**mel.MEL_16K), [], []
        for kind, level in ((kind, level) for kind in sounds.DEGRADATIONS for level in (0.1, 0.5, 0.95)):
            out = sounds.degrade(audio.numpy(), kind, level, np.random.default_rng(0))
            rows.append([out.sum(dtype=float), np.abs(out).sum(dtype=float), *out[4000:4008]])
            quality.append(poll.true_quality(audio[None], torch.from_numpy(out)[None], log_mel).item())
        return {"kinds": list(sounds.DEGRADATIONS), "rows": rows, "quality": quality}

    def numbers():
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((2, 40, 6)) + np.array([0, 0.3])[:, None, None]
        rows, gains = rng.integers(0, 3, (30, 9)), b.mean(1) - a.mean(1)
        audio = np.concatenate([rng.standard_normal(8000), 1e-4 * rng.standard_normal(8000)])
        return {"frechet": evaluate.frechet_distance(a, b), "kl": evaluate.kl_divergence(a, b),
                "paired_bootstrap": evaluate.bootstrap(lambda places: gains[places].mean(), 40, 200),
                "spearman": ears.spearman(a[:, 0], b[:, 0] + a[:, 0]), "scores": ears.scores(rows),
                "derangement": toy.derangement(7, 0).tolist(), "sounding": toy.sounding_length(torch.from_numpy(audio)),
                "bootstrap": intervals(rows[:, None]), "grouped": intervals(rows.reshape(10, 3, 9))}

    def clap_run():
        training = train_clap.Training(0, 8, 4, 0.0, 16, 16, 3, 8, 2e-3, 0.0, 10.0, 0.1, 0.5, "float32")
        train_clap.train(training, Path("clap"), 64, 0, torch.device("cpu"))
        learned = {key: t for key, t in load_file("clap/model.safetensors").items() if t.is_floating_point()}
        keys = "loss contrast reading hearing ranked scale val_captions val_clips val_recall".split()
        log = [read_jsonl("clap/log.jsonl")[-1][key] for key in keys]
        return {"log": log, "weights": norms(learned), "names": sorted(learned)}

    def files():
        found, prompts = {}, [scene.prompt for scene in val_scenes()[1]]
        for name, score in (("model", None), ("score", 1.5)):
            model, sampling = load_model(HERE / name), sample.Sampling(2, 3.0, "euler", score)
            latents = sample.sample_latents(model, ["rain", "a violin"], [3.0, 3.0], sampling=sampling)
            found |= {f"{name}.latents": latents[:, ::8], f"{name}.mel": model.codec.decode_mel(latents)[:, ::4, ::16]}
        for name in ("world", "world_val"):
            latents = open_cache(HERE / "latents" / name)
            found |= {f"{name}.mean": latents.mean[:, ::8].copy(), f"{name}.std": latents.std[:, ::8].copy()}
        tagger, trained = ears.load_tagger(HERE / "tagger.safetensors"), ranker.TrainedRanker(HERE / "ranker")
        return {**found, "tagger.presence": ears.probabilities(tagger, val_scenes()[0])[1],
                "ranker": trained.scores(list(val_scenes()[0]), 16000, prompts)}


@pytest.mark.parametrize("name", FROZEN["how"])
def test_golden(name, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "fast_bfloat16", lambda device: True)      # in Muon, as on the CPU that froze them
    made, far = end_of(name, monkeypatch) if name in FROZEN["commands"] else getattr(Goldens, name)(), {}
    for key in (key for key in FROZEN["goldens"] if key.split(".")[0] == name and key not in GONE):
        ours, golden, tolerance = made[key.removeprefix(f"{name}.")], VALUES[key], FROZEN["goldens"][key]["tolerance"]
        ours = json.loads(json.dumps(ours)) if key in FROZEN["values"] else torch.as_tensor(ours).detach().float()
        if not movement(golden, ours) <= tolerance:
            far[key] = f"off by {movement(golden, ours):.3g}, tolerance {tolerance}"
    assert not far
