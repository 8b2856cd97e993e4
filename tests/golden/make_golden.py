"""Where the numbers of golden.safetensors and golden.json come from: the code of commit 3aa9344, function by function.

    cd OLD && python PATH/make_golden.py OLD                 # OLD: a checkout of 3aa9344; writes beside this file
    python PATH/make_golden.py OLD --fixtures                # also runs again what is in the folders beside it

This file is documentation: it needs modules as they were at that commit, which it puts on sys.path. Each function
below that @golden marks makes the goldens named NAME.KEY of its name NAME: float arrays go to golden.safetensors
(float32), all else to "values" of golden.json. Its docstring says from what. A test of newer code makes the same from
the same inputs and compares: |ours - golden|.max() <= tolerance * |golden|.max(), the tolerance of golden.json:
max(1e-5, three times what the golden moved between the kernels of VARIANTS). All in float32, seeds fixed.

The fixtures (files that the old commit wrote, and runs that it was stopped in) are made by make_fixtures.py; what an
undisturbed run ends with is among the goldens here (functions run_*), and golden.json says the command lines.
"""
import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
VARIANTS = {"again, stopped runs resumed": {}, "1 thread": {"OMP_NUM_THREADS": "1"},
            "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
            "AVX2, 1 thread": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"},
            "plain": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}}
GOLDENS, FIXTURES = [], []


def golden(function):
    """Mark a function that returns {key: array, or something for JSON}."""
    GOLDENS.append(function)
    return function


def fixture(function):
    """The same for one that goes on with a run beside this file."""
    FIXTURES.append(function)
    return function


# ----------------------------------------------------------------------------- shared inputs

@functools.lru_cache(maxsize=None)
def toy(name="base"):
    """The bundled model checkpoints/toy/NAME in float32: .flow .codec .text"""
    from model import load_model
    return load_model(OLD / "checkpoints" / "toy" / name)


@functools.lru_cache(maxsize=None)
def val_scenes():
    """World("val") scenes 0-7, rendered: audio (8, 65536), the Scenes."""
    from world import World
    audio, scenes = zip(*(World("val").render(i) for i in range(8)))
    return np.stack(audio), scenes


def fixed(*shape, seed=0):
    """torch.randn(shape) of torch.Generator().manual_seed(seed)."""
    import torch
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norms(named, before=None):
    """Of {name: tensor} sorted by name: sums and norms (K,); with `before`, of the differences to those."""
    import torch
    names = sorted(named)
    tensors = [named[name].detach().float() - (before[name] if before else 0) for name in names]
    return torch.stack([torch.stack([t.double().sum(), t.double().norm()]) for t in tensors]).float()


# ----------------------------------------------------------------------------- sampling

def latents_of(name, solver, steps):
    """Raw latents (8, 64, 48) of the prompts and durations of val_scenes, every 4th frame."""
    from sample import generate
    _, scenes = val_scenes()
    latents = generate(toy(name), [s.prompt for s in scenes], [s.duration for s in scenes], seed=0, steps=steps,
                       guidance_scale=3.0, solver=solver)
    return {"latents": latents[:, ::4], "all": [latents.sum().item(), latents.abs().sum().item()]}


@golden
def euler_base():
    """latents_of("base", "euler", 5)"""
    return latents_of("base", "euler", 5)


@golden
def heun_base():
    """latents_of("base", "heun", 3)"""
    return latents_of("base", "heun", 3)


@golden
def euler_aligned():
    """latents_of("aligned", "euler", 5)"""
    return latents_of("aligned", "euler", 5)


@golden
def heun_aligned():
    """latents_of("aligned", "heun", 3)"""
    return latents_of("aligned", "heun", 3)


@golden
def velocity():
    """Base flow, one forward: x = fixed(3, 64, 48), t = 0.9, 0.5, 0.1, prompts below, seconds 1, 2, 4, padding masked;
    `null`: the same under null_condition."""
    import torch

    from model import encode_prompts, null_condition
    model = toy()
    with torch.no_grad():
        condition = encode_prompts(model.text, PROMPTS, torch.tensor([1.0, 2.0, 4.0]))
        x, t = fixed(3, 64, 48), torch.tensor([0.9, 0.5, 0.1])
        return {"velocity": model.flow.velocity(x, t, condition)[:, ::8],
                "null": model.flow.velocity(x, t, null_condition(model.text, condition))[:, ::8]}


PROMPTS = ["rain", "a violin followed by rain", "first three beeps, then a choir singing, and finally wind"]


@golden
def text():
    """Base text encoder: ids and hidden states (every 8th channel) of PROMPTS and of "zebra é!" (unknown words)."""
    import torch
    model = toy()
    ids, mask = model.text.tokenize([*PROMPTS, "zebra é!"])
    with torch.no_grad():
        hidden = model.text.encode(ids, mask) * mask[..., None]
    return {"ids": ids.tolist(), "mask": mask.int().tolist(), "hidden": hidden[..., ::8]}


@golden
def negative_and_cropped():
    """Base, PROMPTS, seconds 1, 2, 4, seed 3, indices 5, 6, 7, Euler 2 steps, guidance 4.5: with negative prompt
    "wind" (`negative`), with crop=True (`cropped`), and guidance 1 (`plain`); every 8th frame."""
    from sample import generate
    given = dict(seed=3, indices=[5, 6, 7], steps=2, solver="euler")
    seconds = [1.0, 2.0, 4.0]
    return {"negative": generate(toy(), PROMPTS, seconds, guidance_scale=4.5, negative_prompt="wind", **given)[:, ::8],
            "cropped": generate(toy(), PROMPTS, seconds, guidance_scale=4.5, crop=True, **given)[:, ::8],
            "plain": generate(toy(), PROMPTS, seconds, guidance_scale=1, **given)[:, ::8]}


@golden
def noise_and_schedule():
    """noise_for(0, [0, 7], (4, 6)), official_noise(0, [2, 1], (4, 6)), schedule(5), derive_seed, logit_normal_t."""
    from common import derive_seed, generator
    from solvers import noise_for, official_noise, schedule
    from train_fm import epoch_order, logit_normal_t
    return {"noise": noise_for(0, [0, 7], (4, 6)), "official": official_noise(0, [2, 1], (4, 6)), "ts": schedule(5),
            "seeds": [str(derive_seed(*parts)) for parts in ((0,), (0, 1), ("a", 2, "b"), (0, "flow"))],
            "t": logit_normal_t(6, generator(0), 0.8, 1.0), "grid": logit_normal_t(6, generator(0), 0.0, 1.0, 1000),
            "order": epoch_order(3, 1, 10).tolist()}


@golden
def official_profile():
    """race.random_folder(size="tiny", seed=0); sample.produce with --profile official --device cpu --batch_size 2
    --num_samples 2: prompt race.PROMPT, twice, 1 s each. Audio (2, channels, samples)."""
    import torch

    import race
    import sample
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        race.random_folder(folder, "tiny")
        args = sample.parse_args(["--checkpoint", folder, "--profile", "official", "--device", "cpu", "--batch_size",
                                  "2", "--num_samples", "2"])
        audios, rate = sample.produce(args, Path(folder), torch.device("cpu"), "float32", [race.PROMPT] * 2, [1.0] * 2)
    names = ("guidance_scale", "steps", "solver", "noise", "max_text_length", "dtype", "seed")
    return {"audio": torch.stack(audios)[..., ::4], "rate": rate,
            "sampler": {name: getattr(args, name) for name in names}, "profiles": sample.PROFILES}


@golden
def score_heads():
    """Each head v1-v5 on a tiny flow: manual_seed(0), TangoFlux(TINY), 0.05 randn added to each parameter in order,
    with_score_head(flow, head, "zero", 0.2, 1.5, seed=0), then 0.1 randn (manual_seed(1)) added to the parameters whose
    name has "score_embed", in order. Velocity at x = fixed(2, 16, 4), t = 0.7, 0.3; prompts "rain", "a violin" by the
    tiny encoder; seconds 1, 2; scores 1.5 and NaN."""
    import torch

    from model import encode_prompts, with_score_head
    found = {}
    for head in ("v1", "v2", "v3", "v4", "v5"):
        flow, encoder = tiny_parts()
        flow, _ = with_score_head(flow, head, "zero", 0.2, 1.5, seed=0)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in flow.named_parameters():
                if "score_embed" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            condition = encode_prompts(encoder, ["rain", "a violin"], torch.tensor([1.0, 2.0]), None,
                                       torch.tensor([1.5, float("nan")]))
            found[head] = flow.velocity(fixed(2, 16, 4), torch.tensor([0.7, 0.3]), condition)
    return found


TINY = dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, audio_seq_len=64, max_duration=4.096, axes_dims_rope=[2, 2, 4])
TINY_MEL = dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1], num_res_blocks=1, attn_layers=[],
                down_layers=[0, 1])


def tiny_parts():
    """A tiny flow, away from the zeros of its initialisation, and a tiny text encoder of four words."""
    import torch

    from model import TangoFlux
    from text import make_text_encoder
    torch.manual_seed(0)
    flow = TangoFlux(TINY)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow, make_text_encoder(["rain", "wind", "a", "violin"], width=16, layers=1, heads=2, d_ff=16)


# ----------------------------------------------------------------------------- training of flows

def training_data(folder):
    """The latents of World("train") scenes 0-7 by the base codec, in a cache, and the base's frozen text -> Data."""
    from cache import prepare, world_cache
    model = toy()
    with contextlib.redirect_stderr(io.StringIO()):
        cache = world_cache(folder, model.codec, "train", 8, workers=0)
        return prepare(cache, cache.kept, model.text, 64, False)


def steps_of(flow, muon, rate, steps=5):
    """Training steps of batches of 4 (training_batch, seed 0, dropout 0.1, t_mean 0.8): losses, gradient norms before
    clipping at 1, and of all tensors' changes, sorted by name, sum and norm; `change`: of three of them, a corner."""
    import torch

    from train_fm import batch_loss, training_batch
    from training import average_decay, make_optimizer, set_rate, trainable, update_average
    model = toy()
    with tempfile.TemporaryDirectory() as folder:
        data = training_data(folder)
        named = trainable(flow)
        optimizer = make_optimizer(named, (0.9, 0.95), 1e-2, muon)
        average = {name: p.detach().clone() for name, p in named.items()}
        before, losses, sizes = {name: p.detach().clone() for name, p in named.items()}, [], []
        for step in range(steps):
            batch = training_batch(data, model.codec, 0, 4 * step, 4, 0.1, 0.8)
            loss, _ = batch_loss(flow, model.text, batch)
            optimizer.zero_grad()
            loss.backward()
            sizes.append(torch.nn.utils.clip_grad_norm_(named.values(), 1.0).item())
            losses.append(loss.item())
            set_rate(optimizer, rate)
            optimizer.step()
            update_average(average, named, average_decay(step, 0.999))
    corner = ("transformer.transformer_blocks.0.attn.to_q.weight", "transformer.proj_out.weight",
              "transformer.single_transformer_blocks.1.proj_mlp.weight")
    return {"losses": torch.tensor(losses), "grad_norms": torch.tensor(sizes), "weights": norms(named),
            "changes": norms(named, before), "average": norms(average, before), "names": sorted(named),
            "change": torch.stack([(named[name].detach() - before[name])[:8, :8] for name in corner])}


@golden
def fm_adamw():
    """steps_of the bundled base flow (train mode as loaded), AdamW at a constant 1e-4, 5 steps."""
    from model import load_model
    return steps_of(load_model(OLD / "checkpoints" / "toy" / "base", parts=("flow",)).flow, 0.0, 1e-4)


@golden
def fm_muon():
    """steps_of a new toy flow: manual_seed(derive_seed(0, "flow")), PRESETS["toy"]; --muon 10, constant 2e-3, 2 steps
    (Muon orthogonalises in bfloat16: its rounding moves; its gates are shut at first, so the blocks move in the 2nd)."""
    import torch

    from common import derive_seed
    from model import PRESETS, TangoFlux
    torch.manual_seed(derive_seed(0, "flow"))
    return steps_of(TangoFlux(PRESETS["toy"]), 10.0, 2e-3, 2)


@golden
def fm_muon_base():
    """steps_of the bundled base flow, --muon 10, constant 1e-4, 1 step; without `change`, whose single numbers are
    bfloat16's rounding."""
    from model import load_model
    found = steps_of(load_model(OLD / "checkpoints" / "toy" / "base", parts=("flow",)).flow, 10.0, 1e-4, 1)
    return {key: value for key, value in found.items() if key != "change"}


@golden
def fm_validation():
    """train_fm.validate of the base flow on validation_batches of training_data, count 8."""
    import torch

    from train_fm import validate, validation_batches
    with tempfile.TemporaryDirectory() as folder:
        loss, bins = validate(toy().flow, toy().text, list(validation_batches(training_data(folder), toy().codec, 8)),
                              contextlib.nullcontext)
    return {"loss": torch.tensor([loss]), "bins": torch.tensor([b for b in bins if b is not None]),
            "empty": [b is None for b in bins]}


@golden
def rates():
    """linear_decay(step, 2, 10, 110), cosine_decay(the same), average_decay(step, 0.999), at steps 0, 5, 10, 60, 109."""
    import torch

    from training import average_decay, cosine_decay, linear_decay
    at = (0, 5, 10, 60, 109)
    return {"linear": torch.tensor([linear_decay(i, 2.0, 10, 110) for i in at]),
            "constant": torch.tensor([linear_decay(i, 2.0, 10, 110, False) for i in at]),
            "cosine": torch.tensor([cosine_decay(i, 2.0, 10, 110) for i in at]),
            "average": torch.tensor([average_decay(i, 0.999) for i in at])}


# ----------------------------------------------------------------------------- preferences

@golden
def crpo_step():
    """crpo.loss_and_gradients, default flags but --micro_batch 2 --dtype float32: policy the aligned flow, reference
    the base; pairs of scenes val 0-3, winners the codec's means of the clean audio, losers of degrade(audio, "noise",
    0.5, default_rng(i)); positions 0-3, seed 7. The loss, its parts and the gradients (sorted by name, sum and norm)."""
    import torch

    import crpo
    from model import load_model
    from training import trainable
    from world import degrade
    audio, scenes = val_scenes()
    args = crpo.parse_args(["--micro_batch", "2", "--dtype", "float32", "--device", "cpu"])
    policy = load_model(OLD / "checkpoints" / "toy" / "aligned", parts=("flow",)).flow
    noisy = np.stack([degrade(audio[i], "noise", 0.5, np.random.default_rng(i)) for i in range(4)])
    with torch.inference_mode():
        tensors = {"winner_mean": toy().codec.encode(torch.from_numpy(audio[:4])[:, None])[0],
                   "loser_mean": toy().codec.encode(torch.from_numpy(noisy)[:, None])[0]}
    rows = [{"prompt": scene.prompt, "duration": scene.duration} for scene in scenes[:4]]
    pairs = crpo.with_conditions(rows, tensors, toy())
    named = trainable(policy)
    parts = crpo.loss_and_gradients(args, (policy, toy().flow, toy().text), named, pairs, range(4), 7,
                                    torch.device("cpu"), contextlib.nullcontext)
    total = torch.nn.utils.clip_grad_norm_(named.values(), float("inf")).item()
    return {"parts": torch.tensor(list(parts.values())), "names": list(parts), "grad_norm": torch.tensor([total]),
            "gradients": norms({name: p.grad for name, p in named.items()})}


@golden
def crpo_loss():
    """crpo_loss of errors fixed(4, 6).abs() (winner, loser, reference winner, reference loser), for (beta, half,
    fm_weight): (2000, 0.5, 1), (10, 0.5, 1), (3, 1, 0); rows of loss and parts. pair_errors mean and sum of
    fixed(2, 3, 5, 4)."""
    import torch

    from crpo import crpo_loss, pair_errors
    rows, names = [], None
    for beta, half, weight in ((2000.0, 0.5, 1.0), (10.0, 0.5, 1.0), (3.0, 1.0, 0.0)):
        loss, parts = crpo_loss(*fixed(4, 6).abs(), beta, half, weight)
        rows.append([loss.item(), *parts.values()])
        names = ["loss", *parts]
    both = fixed(2, 3, 5, 4)
    return {"rows": torch.tensor(rows), "names": names, "mean": pair_errors(*both), "sum": pair_errors(*both, "sum")}


@golden
def pairs_and_best():
    """reward.make_pairs and best_of of scores with ties and NaN; expert_iteration.z_blend and best_places of
    default_rng(0).standard_normal((2, 40)), keep 0.1, 5 and 1."""
    from expert_iteration import best_places, z_blend
    from reward import best_of, make_pairs
    scores = [[0.1, 0.5, 0.2], [0.3, 0.3, 0.3], [np.nan, 1.0, 0.0], [0.9, 0.1, 0.9]]
    winners, losers, kept = make_pairs(scores)
    blend = z_blend(*np.random.default_rng(0).standard_normal((2, 40)))
    return {"winners": winners.tolist(), "losers": losers.tolist(), "kept": kept.tolist(),
            "best": best_of(scores).tolist(), "blend": blend,
            "places": [best_places(blend, keep).tolist() for keep in (0.1, 5, 1)]}


def planted(seed=0, count=200, number=1500):
    """Features (count, 12) of which two columns decide the quality, and votes on them by votes.cast_votes."""
    import torch

    import votes
    rng = np.random.default_rng(seed)
    clips = [{"audio": f"{i}.wav", "caption": f"prompt {i // 2}", "scene": i // 2, "quality": 0.0,
              "degradation": "noise", "level": 0.0} for i in range(count)]
    features = torch.from_numpy(rng.standard_normal((count, 12))).float()
    truth = 1 / (1 + np.exp(-(features[:, 0] - features[:, 1]).numpy()))
    for row, value in zip(clips, truth):
        row["quality"] = float(value)
    cast = votes.cast_votes(clips, number, seed)
    place = {row["audio"]: i for i, row in enumerate(clips)}
    named = {"a": np.array([place[v["a"]] for v in cast]), "b": np.array([place[v["b"]] for v in cast]),
             "preference": np.array([v["preference"] for v in cast], np.float32),
             "chance": np.array([v["chance"] for v in cast]), "source": np.array([v["source"] for v in cast])}
    return clips, features, truth, named


@golden
def ranker():
    """ranker.fit(planted(), split_votes seed 0, widths (16, 8), epochs 1, batch_size 256, rate 1e-4, seed 0): log,
    scores of 64 features, weights but for the biases before BatchNorm (their gradients are 0 but for rounding, which
    AdamW magnifies: so the low rate); report() on the test part with the truth; sizes of the three parts. `untrained`:
    Ranker(12, (16, 8)) after manual_seed(0), in eval mode, of the features."""
    import torch

    import ranker as learned
    clips, features, truth, named = planted()
    parts = learned.split_votes(clips, named, 0)
    with contextlib.redirect_stderr(io.StringIO()):
        network, log = learned.fit(features, named, parts, (16, 8), epochs=1, batch_size=256, learning_rate=1e-4)
    torch.manual_seed(0)
    untrained = learned.Ranker(12, (16, 8)).eval()
    found = learned.report(network, features, named, parts[2], truth)
    weights = {name: t for name, t in network.state_dict().items()
               if t.is_floating_point() and name not in ("layers.0.bias", "layers.4.bias")}
    return {"untrained": untrained(features).detach()[:64], "log": torch.tensor([[row["loss"], row["validation"]] for row in log]),
            "scores": network(features).detach()[:64], "weights": norms(weights), "names": sorted(weights),
            "report": found, "parts": [len(part) for part in parts],
            "ranknet": learned.ranknet_loss(*fixed(2, 5), torch.tensor([1.0, 0, 0.5, 1, 0]))[None],
            "bands": learned.band_statistics(fixed(80, 64).float(), 14000)}


@golden
def votes():
    """votes.takes_of(World("train", seed=5000), scenes 0-2, 2 takes, hum 0.5): rows, audio's sum and absolute sum;
    cast_votes of these six clips (audio "SCENE_TAKE.wav"), 24 votes, seed 0."""
    import torch

    import votes as poll
    from vocoder import MEL_16K, LogMel
    from world import World
    log_mel, clips, sums = LogMel(**MEL_16K), [], []
    for index in range(3):
        audio, rows = poll.takes_of(World("train", seed=5000), index, 2, 0.5, log_mel)
        sums += [[a.astype(np.float64).sum(), np.abs(a.astype(np.float64)).sum()] for a in audio]
        clips += [{**row, "audio": f"{row['scene']}_{row['take']}.wav"} for row in rows]
    cast = poll.cast_votes(clips, 24, seed=0)
    return {"quality": torch.tensor([row.pop("quality") for row in [dict(row) for row in clips]]),
            "sums": np.array(sums), "rows": [{k: v for k, v in row.items() if k != "quality"} for row in clips],
            "votes": [{k: v for k, v in vote.items() if k != "chance"} for vote in cast],
            "chance": torch.tensor([vote["chance"] for vote in cast])}


# ----------------------------------------------------------------------------- what listens

@golden
def clap():
    """reward and judge: scores(val_scenes audio, 16000, their prompts) (8,), and of shifted prompts (prompt i + 1);
    embed_audio and embed_text (8, first 16)."""
    import torch

    from clap import load_clap
    audio, scenes = val_scenes()
    audios, prompts = [torch.from_numpy(a)[None] for a in audio], [scene.prompt for scene in scenes]
    found = {}
    for which in ("reward", "judge"):
        network = load_clap(OLD / "checkpoints" / "toy" / "base" / f"clap_{which}")
        found[f"{which}.scores"] = network.scores(audios, 16000, prompts)
        found[f"{which}.shifted"] = network.scores(audios, 16000, prompts[1:] + prompts[:1])
        found[f"{which}.audio"] = network.embed_audio(audios, 16000)[:, :16]
        found[f"{which}.text"] = network.embed_text(prompts)[:, :16]
    return found


@golden
def taggers():
    """judge and features on val_scenes: hear() (events in order, onset, offset, count; probability apart), presence;
    posteriors and features() of the features tagger; quality() of the quality judge."""
    import torch

    import tagger as ear
    audio, _ = val_scenes()
    found, base = {}, OLD / "checkpoints" / "toy" / "base"
    for which in ("judge", "features"):
        network = ear.load_tagger(base, which)
        readings = ear.hear(network, audio)
        found[f"{which}.heard"] = [[[name, event.onset, event.offset, event.count] for name, event in
                                    reading.events.items()] for reading in readings]
        activity, presence, rate = ear.listen(network, audio)
        found |= {f"{which}.presence": presence, f"{which}.rate": rate[:, ::8], f"{which}.activity": activity[:, ::8]}
    found["embedding"] = ear.features(network, audio)[:, ::4]
    found["posteriors"] = ear.posteriors(network, audio)
    found["quality"] = ear.quality(ear.load_tagger(base, "quality"), audio)
    return found


@golden
def tallies():
    """metrics.tally_all of the judge's readings of val_scenes with their scenes: rows, scores, bootstrap(draws=200);
    metrics.match of each."""
    import metrics
    import tagger as ear
    audio, scenes = val_scenes()
    readings = ear.hear(ear.load_tagger(OLD / "checkpoints" / "toy" / "base"), audio)
    rows = metrics.tally_all(readings, scenes)
    return {"rows": rows.tolist(), "scores": metrics.scores(rows), "bootstrap": metrics.bootstrap(rows, 200),
            "match": np.array([metrics.match(*pair) for pair in zip(readings, scenes)])}


@golden
def tagger_training():
    """train_tagger.tagger_loss of a Tagger(["hum", "click", "whistle"], ["click"], 24, 1) after manual_seed(0) on
    mel fixed(4, 80, 64) - 2.5, activity fixed(4, 16, 3) > 1, rate 0.1 |fixed(4, 32, 1)|, hits [[1], [0], [2], [-1]];
    gradients' sums and norms; augment() of the same by generator("test")."""
    import torch

    import tagger as ear
    import train_tagger as school
    from common import generator
    torch.manual_seed(0)
    network = ear.Tagger(["hum", "click", "whistle"], ["click"], 24, 1)
    mel, activity, rate = fixed(4, 80, 64) - 2.5, (fixed(4, 16, 3, seed=1) > 1).float(), fixed(4, 32, 1).abs() * 0.1
    loss, parts = school.tagger_loss(network(mel), activity, rate, torch.tensor([[1], [0], [2], [-1]]))
    loss.backward()
    moved = school.augment(mel, activity, rate, generator("test"))
    return {"parts": torch.tensor([loss.item(), *parts.values()]), "names": ["loss", *parts],
            "gradients": norms({name: p.grad for name, p in network.named_parameters()}),
            "mel": moved[0][:, ::8, ::8], "activity": moved[1].sum(1), "rate": moved[2].sum(1)}


@golden
def clap_training():
    """train_clap: captions, near misses and relatives of World("train") scenes 0-7 with default_rng(i): caption(),
    almost(), near_misses(..., 4), relative(); contrastive_loss of unit rows of fixed(4, 8), fixed(4, 8, seed=1),
    fixed(8, 8, seed=2), scales 10 and 12, same = diagonal and (0, 1), (1, 0)."""
    import torch
    import torch.nn.functional as functional

    import train_clap as school
    from world import World, caption
    found = {"caption": [], "almost": [], "misses": [], "relative": []}
    for i in range(8):
        scene, rng = World("train").scene(i), np.random.default_rng(i)
        events = [(event.name, event.count) for event in scene.events]
        found["caption"].append(caption(rng, scene.relation, events))
        found["almost"].append([school.almost(rng, scene.relation, events) for _ in range(3)])
        found["misses"].append(school.near_misses(rng, scene.relation, events, 4))
        found["relative"].append(dataclasses.asdict(school.relative(scene, rng)))
    rows = [functional.normalize(fixed(n, 8, seed=s), dim=-1) for n, s in ((4, 0), (4, 1), (8, 2))]
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    loss, ranked = school.contrastive_loss(*rows, 10.0, 12.0, same)
    return {**found, "loss": torch.stack([loss, ranked])}


# ----------------------------------------------------------------------------- codecs and audio

@golden
def mel_codec():
    """Base codec on val_scenes 0, 1: mean, std (2, 64, 48) every 4th frame; decode_mel(mean) every 4th band and 8th
    frame; decode(mean), every 64th sample; normalise and denormalise of fixed(2, 3, 48); mel_losses of their log-mel by
    generator(0)."""
    import torch

    from common import generator
    from melvae import mel_losses
    audio, codec = torch.from_numpy(val_scenes()[0][:2])[:, None], toy().codec
    with torch.no_grad():
        mean, std = codec.encode(audio)
        mel = codec.mel(audio[:, 0])
        losses = mel_losses(codec, mel, generator(0))
        return {"mean": mean[:, ::4], "std": std[:, ::4], "mel": mel[:, ::4, ::8],
                "decoded": codec.decode_mel(mean)[:, ::4, ::8], "audio": codec.decode(mean)[..., ::64],
                "normalised": codec.normalise(fixed(2, 3, 48)), "denormalised": codec.denormalise(fixed(2, 3, 48)),
                "losses": torch.stack(list(losses.values())), "names": list(losses)}


@golden
def mel_codec_training():
    """MelVAE(**TINY_MEL) after manual_seed(0), train mode: loss L1 + 1e-3 KL of mel_losses on fixed(2, 80, 32) - 2 by
    generator(0); parts, gradients' sums and norms."""
    import torch

    from common import generator
    from melvae import MelVAE, mel_losses
    torch.manual_seed(0)
    codec = MelVAE(**TINY_MEL).train()
    losses = mel_losses(codec, fixed(2, 80, 32) - 2, generator(0))
    sum({"kl": 1e-3}.get(name, 1.0) * value for name, value in losses.items()).backward()
    gradients = {name: p.grad for name, p in codec.named_parameters() if p.grad is not None}
    return {"parts": torch.stack([v.detach() for v in losses.values()]), "names": list(losses),
            "gradients": norms(gradients), "trained": sorted(gradients)}


@golden
def oobleck():
    """Oobleck(encoder_hidden_size 4, ratios 4, 8, 8, multiples 1, 2, 2, decoder_channels 4, decoder_input_channels 4,
    1 channel, 16 kHz) after manual_seed(0): encode and decode 0.1 fixed(2, 1, 2048); oobleck_losses by generator(0)."""
    import torch

    from common import generator
    from oobleck import OOBLECK_DEFAULTS, Oobleck, oobleck_losses
    torch.manual_seed(0)
    codec = Oobleck(**{**OOBLECK_DEFAULTS, "encoder_hidden_size": 4, "downsampling_ratios": [4, 8, 8],
                       "channel_multiples": [1, 2, 2], "decoder_channels": 4, "decoder_input_channels": 4,
                       "audio_channels": 1, "sampling_rate": 16000})
    audio = 0.1 * fixed(2, 1, 2048)
    with torch.no_grad():
        mean, std = codec.encode(audio)
        losses = oobleck_losses(codec, audio, generator(0))
        return {"mean": mean, "std": std, "audio": codec.decode(mean)[..., ::8],
                "losses": torch.stack(list(losses.values())), "names": list(losses)}


@golden
def resampled():
    """audio.resample of 0.2 fixed(1, 4000): 16000 -> 44100, 44100 -> 16000, 48000 -> 44100, 16000 -> 48000; every 7th
    sample, and the lengths. fit_audio of it to 3000 and 5000, sums."""
    import torch

    from audio import fit_audio, resample
    audio, found, lengths = 0.2 * fixed(1, 4000), {}, []
    for a, b in ((16000, 44100), (44100, 16000), (48000, 44100), (16000, 48000)):
        out = resample(audio, a, b)
        found[f"{a}_{b}"] = out[:, ::7]
        lengths.append(out.shape[-1])
    cut = [fit_audio(audio, n, crop)[0, :50] for n in (3000, 5000) for crop in ("center", "start")]
    return {**found, "lengths": lengths, "fit": torch.stack(cut)}


@golden
def read_sounds():
    """audio.read_audio of the first four clips of sounds/captions.jsonl at 16 kHz mono and 44.1 kHz stereo: lengths,
    sums, absolute sums, samples 1000-1008."""
    import torch

    from audio import read_audio
    from common import read_jsonl
    rows, lengths, sums, first = read_jsonl(OLD / "sounds" / "captions.jsonl")[:4], [], [], []
    for row in rows:
        for rate, channels in ((16000, 1), (44100, 2)):
            audio = read_audio(OLD / "sounds" / row["audio"], rate, channels)
            lengths.append(list(audio.shape))
            sums.append(torch.stack([audio.double().sum(), audio.double().abs().sum()]))
            first.append(audio[0, 1000:1008])
    return {"audio": [row["audio"] for row in rows], "lengths": lengths, "sums": torch.stack(sums),
            "first": torch.stack(first)}


@golden
def loudness():
    """loudness.loudness, true_peak and normalise (target -16.5, ceiling -1: gain, LUFS reached) of val_scenes 0, 1 as
    mono at 16 kHz (needs pyloudnorm)."""
    import torch

    import loudness as meter
    rows = []
    for audio in torch.from_numpy(val_scenes()[0][:2])[:, None]:
        _, gain, reached = meter.normalise(audio, 16000)
        rows.append([meter.loudness(audio, 16000), meter.true_peak(audio, 16000), gain, reached])
    return {"rows": torch.tensor(rows)}


# ----------------------------------------------------------------------------- the world

@golden
def world_scenes():
    """World(split, pairs=pairs).scene(0-19) for all nine settings: prompts; of "train", "seen" all truth; prompts of
    World("train", seed=3, relations=(1, 2, 3, 4), counted=0.9, degraded=0.5), with the degradations; known_words."""
    from world import World, known_words
    prompts = {f"{split} {pairs}": [World(split, pairs=pairs).scene(i).prompt for i in range(20)]
               for split in ("train", "val", "test") for pairs in ("seen", "unseen", "all")}
    other = World("train", seed=3, relations=(1, 2, 3, 4), counted=0.9, degraded=0.5)
    return {"prompts": prompts, "truth": [dataclasses.asdict(World().scene(i)) for i in range(20)],
            "other": [[other.scene(i).prompt, other.scene(i).degradation] for i in range(20)],
            "settings": other.settings(), "words": known_words()}


@golden
def world_audio():
    """render() of World("train") 0, 1, World("val") 0, 1, World("test", pairs="unseen") 0, World("test", degraded=1.0)
    0-7: sum, absolute sum, samples 4000-4008; the strikes."""
    from world import World
    asked = [(World("train"), 0), (World("train"), 1), (World("val"), 0), (World("val"), 1),
             (World("test", pairs="unseen"), 0), *((World("test", degraded=1.0), i) for i in range(8))]
    found = [world.render(index) for world, index in asked]
    audio = np.stack([a for a, _ in found]).astype(np.float64)
    return {"sums": np.stack([audio.sum(1), np.abs(audio).sum(1)], 1), "first": audio[:, 4000:4008],
            "strikes": [[event.strikes for event in scene.events] for _, scene in found],
            "degradations": [scene.degradation for _, scene in found]}


@golden
def degradations():
    """world.degrade of World("val") scene 3, each kind at 0.1, 0.5, 0.95 with default_rng(0): sum, absolute sum,
    samples 4000-4008; votes.true_quality of each; evaluate's damage_features via metrics of the first."""
    import torch

    import votes as poll
    from vocoder import MEL_16K, LogMel
    from world import DEGRADATIONS, degrade
    audio, log_mel, rows, quality = val_scenes()[0][3], LogMel(**MEL_16K), [], []
    for kind in DEGRADATIONS:
        for level in (0.1, 0.5, 0.95):
            out = degrade(audio, kind, level, np.random.default_rng(0))
            rows.append([out.astype(np.float64).sum(), np.abs(out.astype(np.float64)).sum(), *out[4000:4008]])
            quality.append(poll.true_quality(*(torch.from_numpy(a)[None] for a in (audio, out)), log_mel).item())
    return {"kinds": list(DEGRADATIONS), "rows": np.array(rows), "quality": np.array(quality)}


# ----------------------------------------------------------------------------- numbers

@golden
def averages():
    """averages.gamma_of(0.05, 0.1, 0.25), power_decay, combination of six stored ones for sigma_rel 0.08 at step 300,
    overlap of two profiles; update() of {"0.1": zeros} over weights 1, 2, ..., 5."""
    import torch

    import averages as power
    gammas = [power.gamma_of(s) for s in (0.05, 0.1, 0.25)]
    stored = [(at, gamma) for gamma in gammas[:2] for at in (100, 200, 300)]
    weight, kept = torch.nn.Parameter(torch.zeros(3)), {"0.1": {"w": torch.zeros(3)}}
    for step in range(1, 6):
        weight.data.fill_(step)
        power.update(kept, {"w": weight}, step)
    return {"gammas": np.array(gammas), "decays": np.array([power.power_decay(t, gammas[1]) for t in (1, 2, 10, 100)]),
            "weights": power.combination([s for s, _ in stored], [g for _, g in stored], 300, power.gamma_of(0.08)),
            "overlap": np.array([power.overlap(100, gammas[0], 300, gammas[1])]), "updated": kept["0.1"]["w"]}


@golden
def numbers():
    """metrics of default_rng(0): a, b = standard_normal((2, 40, 6)), b + 0.3: frechet_distance, kl_divergence,
    paired_t of means, paired_bootstrap of means (200 draws), spearman of the first columns, fit_ridge (0 on 1: estimates
    of 5); derangement(7, 0); damage_features of 10 a reshaped; sounding_length; tally rows of integers(0, 3): bootstrap."""
    import metrics
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 40, 6))
    b = b + 0.3
    rows = rng.integers(0, 3, (30, 9))
    audio = np.concatenate([rng.standard_normal(8000), 1e-4 * rng.standard_normal(8000)])
    mel = 10 * rng.standard_normal((80, 40))
    return {"frechet": metrics.frechet_distance(a, b), "kl": metrics.kl_divergence(a, b),
            "paired_t": list(metrics.paired_t(b.mean(1), a.mean(1))),
            "paired_bootstrap": list(metrics.paired_bootstrap(np.mean, b.mean(1), a.mean(1), 200)),
            "spearman": metrics.spearman(a[:, 0], b[:, 0] + a[:, 0]), "derangement": metrics.derangement(7, 0).tolist(),
            "ridge": metrics.fit_ridge(a, a[:, 1] + b[:, 0])(b[:5]), "damage": metrics.damage_features(mel),
            "sounding": metrics.sounding_length(audio, 16000), "scores": metrics.scores(rows),
            "bootstrap": metrics.bootstrap(rows, 200), "grouped": metrics.bootstrap(rows.reshape(10, 3, 9), 200)}


# ----------------------------------------------------------------------------- runs that were stopped

COMMANDS = json.loads((HERE / "commands.json").read_text()) if (HERE / "commands.json").is_file() else {}


@contextlib.contextmanager
def stage():
    """A working folder as the fixtures' command lines want it: golden/ (a copy of this folder), and links to the
    checkout's checkpoints/ and sounds/. It is the current one inside."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(HERE, Path(folder) / "golden", ignore=shutil.ignore_patterns("golden.*", "*.py", "__pycache__"))
        for name in ("checkpoints", "sounds"):
            (Path(folder) / name).symlink_to(OLD / name)
        os.chdir(folder)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield Path(folder)
        finally:
            os.chdir(before)


def end_of(name, *products):
    """Run the command line `name` of commands.json and read the weights that it ends with: of each product (a file of
    --out; state.pt: its weights) all tensors' sums and norms, sorted by name, and the first 64 numbers of the largest
    tensor; the losses of log.jsonl beside it.

    The golden is an UNDISTURBED run: the stopped one is removed first. The variants go on with the stopped one.
    """
    import torch

    from common import load_tensors, read_jsonl
    words, found = COMMANDS[name].split(), {}
    with stage() as folder:
        out = folder / words[words.index("--out") + 1]
        if not RESUMED:
            shutil.rmtree(out)
        subprocess.run([sys.executable, str(OLD / words[1]), *words[2:]], check=True, capture_output=True)
        for product in products:
            path = out / product
            if path.suffix == ".pt":
                state = torch.load(path, weights_only=True)
                tensors = state.get("weights", state.get("tagger"))
            else:
                tensors = load_tensors(path)
            tensors = {key: t for key, t in tensors.items() if t.is_floating_point()}
            largest = max(sorted(tensors), key=lambda key: tensors[key].numel())
            found |= {product: norms(tensors), f"{product}.first": tensors[largest].float().flatten()[:64],
                      f"{product}.names": sorted(tensors)}
            log = read_jsonl(path.parent / "log.jsonl")
            if "tuned" not in product:          # its only row is a mean over the steps since the run was resumed
                found[f"{product}.losses"] = np.array([row["loss"] for row in log if "loss" in row])
    return found


RESUMED = False


@fixture
def run_flow_adamw():
    """run_flow/adamw of train_fm.py, AdamW, the text encoder trained, too; stopped after 4 of 8 steps."""
    return end_of("run_flow_adamw", "tangoflux.safetensors", "ema.safetensors", "state.pt")


@fixture
def run_flow_muon():
    """run_flow/muon of train_fm.py --muon 10 --sigma_rel 0.1, text frozen; stopped after 4 of 8 steps."""
    return end_of("run_flow_muon", "tangoflux.safetensors", "ema.safetensors", "state.pt")


@fixture
def run_vae():
    """run_vae of vae.py, the mel codec, stopped after 4 of 8 steps."""
    return end_of("run_vae", "state.pt")


@fixture
def run_crpo():
    """run_crpo of crpo.py, killed in the training of iteration 1, after its pairs and 2 of 6 steps."""
    return end_of("run_crpo", "iteration_1/tangoflux.safetensors", "iteration_1/state.pt")


@fixture
def run_experts():
    """run_experts of expert_iteration.py, killed in the tuning of round 1, after 2 of 6 steps (then a polish of 4)."""
    return end_of("run_experts", "round_1/tuned/tangoflux.safetensors", "round_1/tangoflux.safetensors")


@fixture
def run_tagger():
    """run_tagger of train_tagger.py, stopped after 1 of 4 steps."""
    return end_of("run_tagger", "state.pt")


@fixture
def clap_run():
    """train_clap.train from scratch, 3 steps, nothing stopped: seed 0, scene_seed 3000, 8 scenes in families of 4, 64
    held-out ones, degraded 0, width 16, text_width 16, batch 8, rate 2e-3, muon 10, weight decay 0, reading_weight 0.1,
    hearing_weight 0.5, float32, log of the last step and the sums and norms of model.safetensors (float16)."""
    script = """if __name__ == "__main__":
        import argparse, sys
        sys.path.insert(0, sys.argv[1])
        import train_clap
        train_clap.train(argparse.Namespace(out="clap", device="cpu", dtype="float32", scene_seed=3000, seed=0, scenes=8,
            val_scenes=64, degraded=0.0, workers=1, width=16, text_width=16, steps=3, batch_size=8, learning_rate=2e-3,
            muon=10.0, weight_decay=0.0, reading_weight=0.1, hearing_weight=0.5, family=4, max_minutes=None,
            val_every=1000))"""
    from common import load_tensors, read_jsonl
    with stage() as folder:
        Path("clap_run.py").write_text(script)
        subprocess.run([sys.executable, "clap_run.py", str(OLD)], check=True, capture_output=True)
        row = read_jsonl(folder / "clap" / "log.jsonl")[-1]
        tensors = {k: t for k, t in load_tensors(folder / "clap" / "model.safetensors").items() if t.is_floating_point()}
    keys = ("loss", "contrast", "reading", "hearing", "ranked", "scale", "val_captions", "val_clips", "val_recall")
    return {"log": np.array([row[key] for key in keys]), "weights": norms(tensors), "names": sorted(tensors)}


@fixture
def files():
    """What the old commit's files give: golden/model and golden/score (score 1.5) generate for "rain" and "a violin",
    3 s, seed 0, Euler 2 steps, guidance 3, every 8th frame (`two`: --score_scale 2), and its decode_mel (every 4th band
    and 16th frame; Griffin-Lim of what an untrained codec says is chaotic); golden/ranker's scores of val_scenes;
    golden/tagger.safetensors' presence and hearing of val_scenes; the caches' latents."""
    import torch

    import tagger as ear
    from model import load_model
    from ranker import Judged
    from sample import generate
    audio, scenes = val_scenes()
    with stage():
        found = {}
        for name, score in (("model", None), ("score", 1.5)):
            model = load_model(f"golden/{name}")
            latents = generate(model, ["rain", "a violin"], [3.0, 3.0], 0, steps=2, guidance_scale=3.0, score=score)
            with torch.no_grad():
                found |= {f"{name}.latents": latents[:, ::8],
                          f"{name}.mel": model.codec.decode_mel(latents)[:, ::4, ::16]}
        found["two"] = generate(model, ["rain", "a violin"], [3.0, 3.0], 0, steps=2, guidance_scale=3.0, score=1.5,
                                score_scale=2.0)[:, ::8]
        found["ranker"] = Judged("golden/ranker").scores([torch.from_numpy(a)[None] for a in audio], 16000,
                                                         [scene.prompt for scene in scenes])
        network = ear.load_tagger("golden/tagger.safetensors")
        found["tagger.presence"] = ear.listen(network, audio)[1]
        for name in ("world", "world_val"):
            found |= {f"{name}.{part}": np.load(f"golden/latents/{name}/{part}.npy").astype(np.float32)[:, ::8]
                      for part in ("mean", "std")}
    return found


# ----------------------------------------------------------------------------- writing and comparing

def made(function):
    """{NAME.KEY: value} of a golden, arrays as float32 tensors."""
    import torch
    found = {}
    for key, value in function().items():
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if isinstance(value, torch.Tensor):
            value = value.detach().float().contiguous().clone()
        found[f"{function.__name__}.{key}"] = value
    return found


def movement(one, other):
    """Largest difference over the largest number, of tensors or of the numbers in JSON; inf if all else differs."""
    import torch
    if isinstance(one, torch.Tensor):
        if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
            return float("inf")
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        return ((one - other).abs().max() / one.abs().max().clamp(min=1e-30)).item() if one.numel() else 0.0
    if isinstance(one, dict):
        return max([movement(one[key], other[key]) for key in one] or [0.0]) if one.keys() == other.keys() else np.inf
    if isinstance(one, (list, tuple)):
        return max([movement(*pair) for pair in zip(one, other)] or [0.0]) if len(one) == len(other) else np.inf
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(abs(one), 1e-30) if one == one else (0.0 if other != other else np.inf)
    return 0.0 if one == other else float("inf")


def all_of(functions):
    """What all functions make."""
    import time
    import traceback
    found = {}
    for function in functions:
        began = time.monotonic()
        try:
            found |= made(function)
        except Exception:
            traceback.print_exc()
            print(f"{function.__name__} FAILED", file=sys.stderr, flush=True)
        print(f"{function.__name__} {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return found


def main():
    global OLD, RESUMED
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a checkout of commit 3aa9344")
    parser.add_argument("--fixtures", action="store_true", help="the functions run_*, too")
    parser.add_argument("--only", nargs="+", help="these functions, the rest of the files stays")
    parser.add_argument("--variant", help="write here (pickle), going on with stopped runs, and compare nothing")
    args = parser.parse_args()
    RESUMED = bool(args.variant)
    OLD = Path(args.old).resolve()
    sys.path.insert(0, str(OLD))
    import torch
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    functions = [f for f in [*GOLDENS, *(FIXTURES if args.fixtures or args.only else [])]
                 if not args.only or f.__name__ in args.only]
    found = all_of(functions)
    found = {key: value if isinstance(value, torch.Tensor) else json.loads(json.dumps(value))
             for key, value in found.items()}
    if args.variant:
        torch.save(found, args.variant)
        return
    moved = {key: {} for key in found}
    for name, environment in VARIANTS.items():
        with tempfile.NamedTemporaryFile() as file:
            print(f"--- {name}", file=sys.stderr, flush=True)
            subprocess.run([sys.executable, __file__, str(OLD), "--variant", file.name, "--only",
                            *[f.__name__ for f in functions]], env={**os.environ, **environment}, check=True)
            other = torch.load(file.name)
        for key, value in found.items():
            moved[key][name] = movement(value, other[key]) if key in other else float("inf")
    write(found, moved, functions, args.only)


def write(found, moved, functions, only):
    """golden.safetensors and golden.json."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    tensors, told = {}, {"goldens": {}, "values": {}}
    if (HERE / "golden.json").is_file() and only:
        told, tensors = json.loads((HERE / "golden.json").read_text()), load_file(HERE / "golden.safetensors")
        for name in only:
            for place in (told["goldens"], told["values"], tensors):
                for key in [key for key in place if key.startswith(f"{name}.")]:
                    del place[key]
    for key, value in found.items():
        largest = max(moved[key].values())
        about = {"moved": {name: float(f"{value:.3g}") for name, value in moved[key].items()},
                 "tolerance": float(f"{max(1e-5, 3 * largest):.3g}")}
        if isinstance(value, torch.Tensor):
            tensors[key] = value
            about["shape"] = list(value.shape)
        else:
            told["values"][key] = value
        told["goldens"][key] = about
    told |= {"commit": "3aa9344", "made with": {
        "torch": torch.__version__, "numpy": np.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability()}}
    told["commands"] = COMMANDS
    told["how"] = {f.__name__: " ".join(f.__doc__.split()) for f in [*GOLDENS, *FIXTURES]}
    save_file(tensors, HERE / "golden.safetensors")
    (HERE / "golden.safetensors").chmod(0o644)
    (HERE / "golden.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
