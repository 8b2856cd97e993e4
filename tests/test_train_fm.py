"""Flow-matching training: maths, the official numbers, wiring, scores, exact resume, that something is learned."""
import json
import math
import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, TINY_MEL, kill_at, relative_error

import train_fm
from data import prepare
from lib.audio import write_wav
from lib.common import UserError, generator, read_jsonl, write_jsonl
from lib.text import Condition, encode_prompts, make_text_encoder, null_condition
from lib.weights import load_tensors, make_optimizer, muon_takes, save_tensors, set_rate, trainable
from model import PRESETS, TangoFlux, load_model, save_model
from train_fm import Batch, batch_loss, flow_matching_loss, interpolate, logit_normal_t, on_grid, text_condition
from vae import make_codec


@pytest.mark.parametrize("mean", [0.0, 0.8])
def test_t_is_logit_normal_on_the_official_grid_too(mean):
    """--t_grid once turned --t_mean 0.8 into -0.8: the official table of levels falls."""
    t = logit_normal_t(200_000, generator(0), mean)
    assert 0 < t.min() and t.max() < 1
    assert abs(t.logit().mean() - mean) < 0.01 and abs(t.logit().std() - 1) < 0.01
    assert abs(logit_normal_t(200_000, generator(1), mean, 0.5).logit().std() - 0.5) < 0.01
    gridded = logit_normal_t(200_000, generator(0), mean, grid=1000)
    assert torch.equal((gridded * 1000).round() / 1000, gridded)
    assert gridded.min() >= 0.001 and gridded.max() <= 1 and (gridded - t).abs().max() <= 0.0011


def test_interpolation_and_loss_closed_forms():
    x1, x0 = torch.randn(2, 3, 5, 4, generator=generator(0), dtype=torch.float64)
    xt, v = interpolate(x1, x0, torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))
    assert torch.equal(xt[0], x1[0]) and torch.equal(xt[1], x0[1])
    assert torch.allclose(xt[2], 0.75 * x1[2] + 0.25 * x0[2])
    assert torch.allclose((xt[2] - x1[2]) / 0.25, v[2])                              # v = dx_t / dt
    offset = torch.tensor([0.0, 1.0, 3.0])
    loss, per_example = flow_matching_loss(v + offset[:, None, None], v)
    assert torch.allclose(per_example, offset ** 2, atol=1e-5) and loss.item() == pytest.approx(10 / 3, rel=1e-5)


@pytest.mark.parametrize("name", ["sft", "sft_dropout"])
def test_official_loss_and_gradients(parity, name, monkeypatch):
    fixture = parity("tangoflux_tiny")
    tensors, values = fixture.tensors, fixture.info["values"][name]
    flow = TangoFlux(fixture.info["config"])
    flow.load_state_dict(fixture.weights)
    t = on_grid(tensors[f"{name}.u"], 1000)
    assert torch.equal(t, tensors[f"{name}.t"])
    dropped = torch.zeros(len(t), dtype=torch.bool)
    dropped[values["dropped_examples"]] = True
    condition = Condition(tensors["text.hidden"], None, tensors["text.mask"], tensors["sft.duration"])
    monkeypatch.setattr(train_fm, "text_condition", lambda *_: condition)       # mask None: padding is visible there
    batch = Batch(tensors["sft.latents"], tensors[f"{name}.noise"], t, None, None, None, None, dropped)
    loss, per_example = batch_loss(flow, None, batch, "official_zeros")
    loss.backward()
    assert relative_error(loss, tensors[f"{name}.loss"]) < 1e-4
    assert relative_error(per_example, tensors[f"{name}.loss_per_example"]) < 1e-4
    gradients = {f"{name}.grad.{key}": parameter.grad for key, parameter in flow.named_parameters()}
    for key in gradients.keys() & tensors.keys():
        assert relative_error(gradients[key], tensors[key]) < 1e-4, key
    for key, reference in values["grad_norms"].items():
        assert gradients[f"{name}.grad.{key}"].norm().item() == pytest.approx(reference, rel=1e-3, abs=1e-6), key


def tiny_parts():
    """A tiny flow, away from the zeros of its initialisation, and a text encoder."""
    torch.manual_seed(0)
    flow = TangoFlux(TINY)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow, make_text_encoder(["rain", "wind", "a", "violin"], width=16, layers=1, heads=2, d_ff=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, one_thread):
    """A tiny model and a manifest of eight clips, whose score is their loudness; latents will lie beside them."""
    folder, (flow, encoder) = tmp_path_factory.mktemp("tiny"), tiny_parts()
    save_model(folder / "model", flow, make_codec("mel", TINY_MEL).eval(), encoder)
    rows = []
    for i in range(8):
        write_wav(folder / f"{i}.wav", 0.1 * (i + 1) * torch.sin(torch.arange(8000) * (0.02 + 0.01 * i)), 16000)
        rows.append({"audio": f"{i}.wav", "caption": "rain" if i % 2 else "a violin", "score": 0.5 * i, "same": 1.0,
                     "bad": math.nan if i == 3 else 1.0 * i, "sparse": "" if i < 4 else 1.0 * i})
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def of_tiny(tiny, out, **more):
    """Settings of a run on scenes of the world."""
    return dict(checkpoint=tiny / "model", cache=str(tiny / "latents"), out=out, scenes=13, val_scenes=6, val_clips=6,
                workers=0, batch_size=4, train_steps=8, learning_rate=1e-3, device="cpu", log_every=1,
                train_text=True) | more


def of_scored(tiny, out, **more):
    """Settings of a run on the manifest."""
    return dict(checkpoint=tiny / "model", data=str(tiny / "rows.jsonl"), cache=str(tiny / "cache"), val_clips=2,
                score_column="score", train_steps=6, batch_size=4, validation_fraction=0.2, workers=0, device="cpu",
                out=out) | more


def state_of(out):
    return torch.load(Path(out) / "state.pt", weights_only=True)


def run(settings):
    train_fm.train(**settings)
    return state_of(settings["out"])


def parts_and_data(settings):
    args = train_fm.with_defaults(settings)
    args.processes = 1
    return train_fm.load_all(args, 0, torch.device("cpu"))


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_dropped_text_is_the_null_of_guidance(tiny):
    flow, codec, encoder, data, _ = parts_and_data(of_tiny(tiny, tiny / "unused"))
    batch = train_fm.training_batch(data, codec, 0, 0, 6)._replace(drop_text=torch.arange(6) % 2 == 0)
    whole = Condition(encoder.encode(batch.ids, batch.mask), batch.mask, batch.mask, batch.duration)
    null = null_condition(encoder, whole)
    got = text_condition(encoder, batch)
    for row, dropped in enumerate(batch.drop_text):
        expected, visible = null if dropped else whole, got.mask[row]
        assert torch.allclose(got.text[row, visible], expected.text[row, visible], atol=1e-6)
        assert torch.equal(visible, expected.mask[row])
        assert torch.equal(got.pooled_mask[row].bool(), expected.pooled_mask[row].bool())
    assert torch.equal(text_condition(encoder, batch, "official_zeros").pooled_mask, batch.mask)
    frozen = prepare(data.cache, data.rows, encoder.eval(), 64, True)       # the same from cached text
    cached = train_fm.training_batch(frozen, codec, 0, 0, 6)._replace(drop_text=batch.drop_text)
    from_cache = text_condition(encoder, cached)
    assert not from_cache.text.requires_grad and torch.equal(from_cache.mask, got.mask)
    assert torch.allclose(from_cache.text[got.mask], got.text[got.mask], atol=5e-3)
    assert torch.allclose(batch_loss(flow, encoder, cached)[1], batch_loss(flow, encoder, batch)[1], rtol=2e-2)


def test_example_depends_on_seed_and_position_only(tiny):
    _, codec, _, data, held = parts_and_data(of_tiny(tiny, tiny / "unused"))
    long, short = train_fm.training_batch(data, codec, 3, 0, 8), train_fm.training_batch(data, codec, 3, 4, 4)
    assert all(torch.equal(getattr(long, name)[4:], getattr(short, name)) for name in ("x1", "x0", "t", "drop_text"))
    other = train_fm.training_batch(data, codec, 4, 4, 4)
    assert not torch.equal(other.x0, short.x0) and not torch.equal(other.t, short.t)
    dropped = train_fm.training_batch(data, codec, 0, 0, 400, dropout=0.3).drop_text
    assert abs(dropped.float().mean() - 0.3) < 0.07
    for clips in (4, 6, 100):               # of six: --val_clips 4 once crashed, no multiple of 64
        grid = list(train_fm.validation_batches(held, codec, clips))
        halves = list(train_fm.validation_batches(held, codec, clips, size=2))
        assert len(grid[0].t) == min(clips, 6)
        assert torch.equal(torch.cat([batch.x0 for batch in halves]), grid[0].x0)


@pytest.mark.parametrize("muon", [0.0, 10.0])
def test_every_trained_tensor_is_in_the_optimizer_and_moves(tiny, muon):
    flow, codec, encoder, data, _ = parts_and_data(of_tiny(tiny, tiny / "unused"))
    parameters = trainable(flow, encoder)
    assert {name for name in parameters if not name.startswith("text_encoder.")} == set(flow.state_dict())
    optimizer = make_optimizer(parameters, weight_decay=0.3, muon=muon, muon_takes=muon_takes)
    in_groups = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(in_groups) == len(parameters) == len(set(in_groups))
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])    # decay spares vectors
    before = {name: p.detach().clone() for name, p in parameters.items()}
    set_rate(optimizer, 1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 1e-3 * (muon or 1)}
    batch_loss(flow, encoder, train_fm.training_batch(data, codec, 0, 0, 13))[0].backward()
    assert all(p.grad is not None for p in parameters.values())
    optimizer.step()
    assert [name for name, p in parameters.items() if torch.equal(p, before[name])] == []


def test_validation_never_shifts_training_and_run_is_a_model_folder(tiny, tmp_path):
    often = run(of_tiny(tiny, tmp_path / "often", val_every=1, save_every=1))
    seldom = run(of_tiny(tiny, tmp_path / "seldom", val_every=1000))
    assert same(often["weights"], seldom["weights"]) and same(often["average"], seldom["average"])
    rows = read_jsonl(tmp_path / "often" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(9))          # 0: before training
    assert all(math.isfinite(row["val_loss"]) and len(row["val_bins_ema"]) == 5 for row in rows)
    last = read_jsonl(tmp_path / "seldom" / "log.jsonl")[-1]
    assert (last["val_loss"], last["val_loss_ema"]) == (rows[-1]["val_loss"], rows[-1]["val_loss_ema"])
    model = load_model(tmp_path / "often")
    assert same({name: p.detach() for name, p in trainable(model.flow, model.text).items()}, often["average"])
    assert model.codec.latent_channels == 4 and model.config["training"]["seed"] == 0


def words(settings):
    """These settings on a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value)) if word != "True"]


def test_killed_run_ends_with_the_same_bits(tiny, tmp_path):
    whole = run(of_tiny(tiny, tmp_path / "whole", train_steps=30, muon=10.0, save_every=1000))
    settings = of_tiny(tiny, tmp_path / "killed", train_steps=30, muon=10.0, save_every=3)
    log = tmp_path / "killed" / "log.jsonl"
    kill_at("train_fm.py", words(settings), log, 8)
    assert state_of(tmp_path / "killed")["step"] < 30
    resumed = run(settings)
    assert same(resumed["weights"], whole["weights"]) and same(resumed["average"], whole["average"])
    for ours, theirs in zip(resumed["optimizer"], whole["optimizer"], strict=True):     # AdamW's state, Muon's
        assert all(same(ours["state"][key], theirs["state"][key]) for key in theirs["state"])
    assert [row["step"] for row in read_jsonl(log)] == list(range(31))
    (tmp_path / "killed" / "tangoflux.safetensors").unlink()            # as if killed right after state.pt
    run(settings)
    for file in ("tangoflux", "ema"):
        assert same(*(load_tensors(tmp_path / name / f"{file}.safetensors") for name in ("killed", "whole")))


def stop_in_step(monkeypatch, module, number, train):
    """`train()` of this module gets a signal in its step `number` = 1, 2, ...: it ends after it, and says what it saves."""
    rates, set_rate = [], module.set_rate

    def counted(*arguments):
        rates.append(arguments)
        if len(rates) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        set_rate(*arguments)
    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        patch.setattr(module, "set_rate", counted)
        train()
    assert len(rates) == number and ended.value.args in (("the same command goes on",), (130,))


def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tiny, tmp_path, monkeypatch):
    """The rows of the log are means of all steps since the row before, whatever is saved and stopped between."""
    whole = run(of_tiny(tiny, tmp_path / "whole", log_every=1))
    settings = of_tiny(tiny, tmp_path / "parts", log_every=4, save_every=3)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(train_fm, "save_tensors", None)                   # as if killed right after the first save
        run(settings)
    stop_in_step(monkeypatch, train_fm, 2, lambda: run(settings))
    assert state_of(tmp_path / "parts")["step"] == 5
    assert same(run(settings)["weights"], whole["weights"])
    losses = [row.get("loss") for row in read_jsonl(tmp_path / "whole" / "log.jsonl")]
    rows = {row["step"]: row.get("loss") for row in read_jsonl(tmp_path / "parts" / "log.jsonl")}
    assert list(rows) == [0, 3, 4, 5, 6, 8]
    for first, last in pairwise(rows):
        assert rows[last] == pytest.approx(np.mean(losses[first + 1:last + 1]), rel=1e-6)


def test_a_run_at_a_constant_rate_goes_on_longer(tiny, tmp_path):
    """Its warm-up is that of its first command; with decay the rate depends on the number of steps."""
    whole = run(of_tiny(tiny, tmp_path / "whole", decay=False, train_steps=22, warmup_steps=1))
    for steps in (10, 22):                              # a tenth of them: 1, 2
        longer = run(of_tiny(tiny, tmp_path / "longer", decay=False, train_steps=steps))
    assert longer["step"] == 22 and same(longer["weights"], whole["weights"])
    run(of_tiny(tiny, tmp_path / "decays", train_steps=2))
    with pytest.raises(UserError, match="started with steps = 2, now it is 3"):
        run(of_tiny(tiny, tmp_path / "decays", train_steps=3))


def test_defaults_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train_fm.with_defaults({})
    flow, codec, encoder = train_fm.new_flow(args.codec, args.text_encoder, args.preset, 0)
    assert (codec.latent_channels, encoder.width) == (flow.config["in_channels"], flow.config["joint_attention_dim"])


def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path):
    one = run(of_tiny(tiny, tmp_path / "one", train_steps=3, batch_size=8, dtype="float32"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    settings = of_tiny(tiny, tmp_path / "two", train_steps=3, dtype="float32")
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, ROOT / "train_fm.py", *words(settings)]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**shared, "RANK": str(i)}) for i in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    for name, tensor in state_of(tmp_path / "two")["weights"].items():
        assert torch.allclose(one["weights"][name], tensor, atol=1e-4), name


def test_wrong_input_is_one_line(tiny, tmp_path, monkeypatch):
    run(of_tiny(tiny, tmp_path / "r", train_steps=1))
    for change, message in ((dict(learning_rate=2e-3), "started with learning_rate = 0.001, now it is 0.002"),
                            (dict(world_seed=5), "stale: seed 0 there, 5 now"),
                            (dict(out=tiny / "model"), "no state.pt"),
                            (dict(save_weights="power"), "power needs --sigma_rel"),
                            (dict(preset="tangoflux"), "--preset is the size of a new flow: leave it out"),
                            (dict(experts="x"), "--experts need --data"), (dict(score_column="x"), "--score_column and"),
                            (dict(cache=tmp_path / "r"), "r holds the latents .--cache.; choose another folder")):
        with pytest.raises(UserError, match=message):
            run(of_tiny(tiny, tmp_path / "r", train_steps=1) | change)
    (tmp_path / "r" / "state.pt").write_bytes(b"PK torn")
    with pytest.raises(UserError, match="state.pt cannot be used"):
        run(of_tiny(tiny, tmp_path / "r", train_steps=1))
    for change, message in ((dict(score_column="missing"), "has no column missing"), (dict(experts="."), "is missing"),
                            (dict(score_column="same"), "same in every row")):
        with pytest.raises(UserError, match=message):
            run(of_scored(tiny, tmp_path / "x", **change))
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr(train_fm, "batch_loss", lambda flow, encoder, batch, *_: (
        flow.fc[0].weight.sum() * math.nan, torch.full((len(batch.t),), math.nan)))
    with pytest.raises(UserError, match="step 0: loss nan"):
        run(of_tiny(tiny, tmp_path / "nan"))


@pytest.fixture
def new_flow(tiny, tmp_path, monkeypatch):
    """Settings of a new flow with the tiny codec and encoder, on a few scenes."""
    monkeypatch.setitem(PRESETS, "toy", {**PRESETS["toy"], **TINY})
    return dict(codec=tiny / "model", text_encoder=tiny / "model" / "text_encoder", cache=str(tmp_path / "c"),
                out=tmp_path / "r", scenes=5, val_scenes=2, workers=0, train_steps=2, batch_size=2, device="cpu")


def test_new_flow_takes_its_sizes_from_codec_and_text_encoder(new_flow, tiny, tmp_path):
    settings = json.loads(run({**new_flow, "max_minutes": 0})["settings"])
    assert settings["training clips"] == 5 and not settings["train_text"] and settings["muon"] == 10.0
    assert {"in_channels": 4, "audio_seq_len": 64}.items() <= load_model(tmp_path / "r").flow.config.items()
    files = [folder / "text_encoder" / "model.safetensors" for folder in (tmp_path / "r", tiny / "model")]
    assert same(*map(load_tensors, files))                      # frozen
    (tmp_path / "r" / "reading.json").write_text("{}")          # such a run once trained its own encoder
    state = run({**new_flow, "text_encoder": "nowhere"})
    assert state["step"] == 2 and not any(name.startswith("text_encoder.") for name in state["weights"])


def test_a_short_run_does_not_render_all_scenes(new_flow, tmp_path, monkeypatch):
    """As many as it visits, in whole blocks, unless a whole cache is there."""
    def asked(**change):
        """(folder, scenes) that a run asks for."""
        with pytest.raises(InterruptedError) as stop:
            train_fm.train(**{**new_flow, "cache": None, "scenes": None} | change)
        return stop.value.args

    def world_cache(folder, codec, split, scenes, *_, **__):
        raise InterruptedError(str(folder), scenes)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_fm, "world_cache", world_cache)
    whole = ("cache/world_train", 100_000)
    assert asked() == ("cache/world_train_256", 256)
    assert asked(train_steps=3000) == ("cache/world_train_6144", 6144)
    assert asked(events=["rain", "church organ", "bird"])[0] == "cache/world_train_rain_church-organ_bird_256"
    assert asked(train_steps=60000) == asked(epochs=1.0) == whole and asked(scenes=7) == ("cache/world_train", 7)
    (tmp_path / "cache" / "world_train").mkdir(parents=True)
    (tmp_path / "cache" / "world_train" / "text.json").write_text("{}")
    assert asked() == whole


def test_a_column_of_scores_trains_a_head(tiny, tmp_path):
    run(of_scored(tiny, tmp_path / "run", score_head="v4"))
    flow = load_model(tmp_path / "run").flow
    assert flow.config["score_head"] == "v4" and 1 < flow.config["score_mean"] < 2.5
    assert flow.transformer.score_embed.linear_2.weight.any()
    run(of_scored(tiny, tmp_path / "more", checkpoint=tmp_path / "run", train_steps=1))
    assert load_model(tmp_path / "more").flow.config["score_head"] == "v4"          # its own head goes on


def test_scores_reach_their_rows_and_dropped_text_loses_its_score(tiny, tmp_path):
    _, codec, encoder, data, _ = parts_and_data(of_scored(tiny, tmp_path))
    assert all(data.scores[i] == data.cache.rows[i]["score"] for i in data.rows)
    batch, whole = (train_fm.training_batch(data, codec, 0, 0, 400, dropout=0.1, score_dropout=p) for p in (0.1, 0.0))
    lost = batch.score.isnan()
    assert lost[batch.drop_text].all() and 0.05 < lost[~batch.drop_text].float().mean() < 0.16
    assert torch.equal(whole.x0, batch.x0) and torch.equal(whole.t, batch.t)        # its draw comes last
    assert torch.equal(whole.score.isnan(), whole.drop_text)
    assert text_condition(encoder, batch).score is batch.score


def test_latents_of_experts_join_the_mixture(tiny, tmp_path):
    plain = parts_and_data(of_scored(tiny, tmp_path, score_column="sparse"))[3]
    assert plain.scores[:4].isnan().all()                                   # empty cells: no score
    shape = plain.cache.mean.shape[1:]
    latents = torch.arange(2 * shape[0] * shape[1]).reshape(2, *shape).half() / 64
    save_tensors(tmp_path / "experts.safetensors", {"latents": latents})
    write_jsonl(tmp_path / "experts.jsonl", [{"prompt": "wind", "duration": 1.0, "score": at} for at in (7.0, 8.0)])
    flow, _, _, mixed, held = parts_and_data(of_scored(tiny, tmp_path, experts=tmp_path, oversample=3))
    assert sorted(mixed.rows.tolist()) == sorted([*plain.rows.tolist(), *3 * [8, 9]])
    assert not set(held.rows) & set(mixed.rows)
    mean, std = (part[np.array([8, 9, 0])] for part in (mixed.cache.mean, mixed.cache.std))
    assert np.array_equal(mean[:2], latents) and np.array_equal(mean[2], plain.cache.mean[0]) and not std[:2].any()
    known = [*np.arange(8) / 2, 7.0, 8.0]
    assert mixed.scores.tolist() == known and mixed.cache.key != plain.cache.key
    assert [flow.config["score_mean"], flow.config["score_std"]] == pytest.approx([np.mean(known), np.std(known)])
    only = parts_and_data(of_scored(tiny, tmp_path, experts=tmp_path, experts_only=True))[3]
    assert only.rows.tolist() == [8, 9]


def test_it_learns_two_prompts():
    """Two prompts, two latents: the loss falls far below 1 + variance, and the prompt decides where to."""
    flow, encoder = tiny_parts()
    encoder.train().t5.eval()
    optimizer = make_optimizer(trainable(flow, encoder))
    set_rate(optimizer, 5e-3)
    which, losses = torch.arange(16) % 2, []
    x1 = (1.0 - 2.0 * which)[:, None, None].expand(16, 8, 4)                # (B, L, C): 1 or -1
    ids, mask = (each[which] for each in encoder.tokenize(["rain", "wind"]))
    for step in range(150):
        rng = generator("learn", step)
        x0, t = torch.randn(16, 8, 4, generator=rng), logit_normal_t(16, rng)
        dropped = torch.rand(16, generator=rng) < 0.1
        loss, _ = batch_loss(flow, encoder, Batch(x1, x0, t, ids, None, mask, torch.full((16,), 2.0), dropped))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.35 * np.mean(losses[:10])
    noise = torch.randn(1, 8, 4, generator=generator("x")).expand(2, -1, -1)
    with torch.no_grad():
        condition = encode_prompts(encoder, ["rain", "wind"], torch.full((2,), 2.0))
        reached = noise - flow.velocity(noise, torch.ones(2), condition)
    assert reached[0].mean() > 0.5 and reached[1].mean() < -0.5
