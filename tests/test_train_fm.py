"""Flow-matching training: maths, the official numbers, wiring, exact resume, that something is learned."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, relative_error

import train_fm
from common import UserError, generator, load_tensors, read_jsonl
from train_fm import (Batch, batch_loss, flow_matching_loss, interpolate, logit_normal_t, on_grid,
                      text_condition)
from training import (average_decay, linear_decay, make_optimizer, muon_takes, set_rate, trainable,
                      update_average, weights_replaced)

# ----------------------------------------------------------------------------- maths


def test_t_is_logit_normal():
    t = logit_normal_t(200_000, generator(0))
    logits = torch.log(t / (1 - t))
    assert 0 < t.min() and t.max() < 1
    assert abs(logits.mean()) < 0.01 and abs(logits.std() - 1) < 0.01 and abs(t.median() - 0.5) < 0.005
    shifted = logit_normal_t(200_000, generator(1), mean=-1.0, std=0.5).logit()
    assert abs(shifted.mean() + 1) < 0.01 and abs(shifted.std() - 0.5) < 0.01
    gridded = logit_normal_t(200_000, generator(0), grid=1000)
    assert torch.equal((gridded * 1000).round() / 1000, gridded)
    assert gridded.min() >= 0.001 and gridded.max() <= 1
    assert (gridded - (1 - t)).abs().max() <= 0.0011        # the official grid counts noise levels downwards


def test_interpolation_and_loss_closed_forms():
    x1, x0 = torch.randn(2, 3, 5, 4, generator=generator(0), dtype=torch.float64)
    ends = interpolate(x1, x0, torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64))[0]
    assert torch.equal(ends[0], x1[0]) and torch.equal(ends[1], x0[1])
    assert torch.allclose(ends[2], 0.75 * x1[2] + 0.25 * x0[2])
    later, v = interpolate(x1, x0, torch.full((3,), 0.5 + 1e-6, dtype=torch.float64))
    earlier, _ = interpolate(x1, x0, torch.full((3,), 0.5 - 1e-6, dtype=torch.float64))
    assert torch.allclose((later - earlier) / 2e-6, v, atol=1e-8)                    # v = dx_t / dt
    offset = torch.tensor([0.0, 1.0, 3.0])
    loss, per_example = flow_matching_loss(v + offset[:, None, None], v)
    assert torch.allclose(per_example, offset ** 2, atol=1e-5)
    assert loss.item() == pytest.approx(10 / 3, rel=1e-5)


def test_schedule_and_average():
    rates = [linear_decay(step, 2.0, 10, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * (k + 1) for k in range(10)])
    assert rates[10] == 2.0 and rates[60] == pytest.approx(1.0) and rates[109] == pytest.approx(0.02)
    assert linear_decay(110, 2.0, 10, 110) == 0 and linear_decay(0, 1.0, 0, 1) == 1
    assert average_decay(0, 0.999) == 0.1 and average_decay(10 ** 6, 0.999) == 0.999
    weight = torch.nn.Parameter(torch.zeros(3))
    average, expected = {"w": torch.ones(3)}, 1.0
    for step in range(50):
        weight.data.fill_(step)
        update_average(average, {"w": weight}, average_decay(step, 0.9))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert average["w"].tolist() == pytest.approx([expected] * 3, rel=1e-5)
    with weights_replaced({"w": weight}, average):
        assert torch.equal(weight, average["w"])
    assert weight.tolist() == [49.0] * 3


# ----------------------------------------------------------------------------- the official numbers

def official_flow(fixture):
    from model import TangoFlux
    flow = TangoFlux(fixture.info["config"])
    flow.load_state_dict(fixture.weights)
    return flow


@pytest.mark.parametrize("name", ["sft", "sft_dropout"])
def test_official_loss_and_gradients(parity, name):
    from model import Condition
    fixture = parity("tangoflux_tiny")
    tensors, values = fixture.tensors, fixture.info["values"][name]
    flow = official_flow(fixture)
    t = on_grid(tensors[f"{name}.u"], 1000)
    assert torch.equal(t, tensors[f"{name}.t"])
    dropped = torch.zeros(len(t), dtype=torch.bool)
    dropped[values["dropped_examples"]] = True
    condition = Condition(tensors["text.hidden"], None, tensors["text.mask"], tensors["sft.duration"])
    xt, target = interpolate(tensors["sft.latents"], tensors[f"{name}.noise"], t)
    loss, per_example = flow_matching_loss(train_fm.zeroed_velocity(flow, xt, t, condition, dropped), target)
    loss.backward()
    assert relative_error(loss, tensors[f"{name}.loss"]) < 1e-4
    assert relative_error(per_example, tensors[f"{name}.loss_per_example"]) < 1e-4
    named = dict(flow.named_parameters())
    for key, reference in tensors.items():
        if key.startswith(f"{name}.grad."):
            assert relative_error(named[key.removeprefix(f"{name}.grad.")].grad, reference) < 1e-4, key
    for key, reference in values["grad_norms"].items():
        assert named[key].grad.norm().item() == pytest.approx(reference, rel=1e-3, abs=1e-6), key
    if name == "sft":                       # nothing dropped: the plain velocity is the same function
        plain, _ = flow_matching_loss(flow.velocity(xt, t, condition), target)
        assert torch.equal(plain, loss)


# ----------------------------------------------------------------------------- a tiny model for the rest

TINY = dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, audio_seq_len=64, max_duration=4.096, axes_dims_rope=[2, 2, 4])


def tiny_parts():
    from model import TangoFlux
    from text import make_text_encoder
    torch.manual_seed(0)
    flow = TangoFlux(TINY)
    with torch.no_grad():                   # away from the zeros of the initialisation
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return flow, make_text_encoder(["rain", "wind", "a", "violin"], width=16, layers=1, heads=2, d_ff=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model folder, and beside it the latents of a few scenes."""
    from model import save_model
    from vae import make_codec
    folder = tmp_path_factory.mktemp("tiny")
    flow, encoder = tiny_parts()
    codec = make_codec("mel", dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1],
                                   num_res_blocks=1, attn_layers=[], down_layers=[0, 1])).eval()
    save_model(folder / "model", flow, codec, encoder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                # the same arithmetic as in the processes that are killed
    yield folder
    torch.set_num_threads(threads)


def flags(tiny, out, *more):
    return ["--checkpoint", str(tiny / "model"), "--cache", str(tiny / "latents"), "--out", str(out),
            "--scenes", "13", "--val_scenes", "6", "--val_clips", "6", "--workers", "0", "--batch_size", "4",
            "--steps", "12", "--learning_rate", "1e-3", "--device", "cpu", "--log_every", "1", "--train_text",
            *more]


def run(tiny, out, *more):
    train_fm.train(train_fm.parse_args(flags(tiny, out, *more)))
    return torch.load(out / "state.pt", weights_only=True)


def parts_and_data(tiny, *more):
    args = train_fm.parse_args(flags(tiny, tiny / "unused", *more))
    flow, codec, encoder, frozen = train_fm.load_parts(args, torch.device("cpu"))
    data, held = train_fm.load_data(args, codec, encoder, frozen, 4.096)
    return flow, codec, encoder, data, held


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------------- wiring

def test_dropped_text_is_the_null_of_guidance(tiny):
    from model import Condition, null_condition, replace_rows
    flow, codec, encoder, data, _ = parts_and_data(tiny)
    batch = train_fm.training_batch(data, codec, 0, 0, 6)._replace(dropped=torch.arange(6) % 2 == 0)
    assert len(set(batch.mask.sum(1).tolist())) > 1                         # prompts of unequal length
    whole = Condition(encoder.encode(batch.ids, batch.mask), batch.mask, batch.mask, batch.duration)
    expected = replace_rows(whole, batch.dropped, null_condition(encoder, whole))
    got = text_condition(encoder, batch, "empty_prompt")
    assert torch.allclose(got.text[got.mask], expected.text[expected.mask], atol=1e-6)
    assert torch.equal(got.mask, expected.mask) and torch.equal(got.duration, batch.duration)
    assert torch.equal(got.pooled_mask.bool(), expected.pooled_mask.bool())
    kept = text_condition(encoder, batch, "official_zeros")                 # there the flow does it
    assert torch.allclose(kept.text, whole.text, atol=1e-6) and torch.equal(kept.pooled_mask, batch.mask)
    frozen = train_fm.prepare(data.cache, data.rows, encoder, 64, True)     # the same from cached text
    cached = train_fm.training_batch(frozen, codec, 0, 0, 6)._replace(dropped=batch.dropped)
    from_cache = text_condition(encoder, cached, "empty_prompt")
    assert cached.hidden is not None and torch.equal(from_cache.mask, got.mask)
    assert torch.allclose(from_cache.text[got.mask], got.text[got.mask], atol=5e-3)
    live = batch_loss(flow, encoder, batch)[1]
    assert torch.allclose(batch_loss(flow, encoder, cached)[1], live, rtol=2e-2)


def test_example_depends_on_seed_and_position_only(tiny):
    _, codec, _, data, _ = parts_and_data(tiny)
    long, short = train_fm.training_batch(data, codec, 3, 0, 8), train_fm.training_batch(data, codec, 3, 4, 4)
    for name in ("x1", "x0", "t", "dropped", "duration"):
        assert torch.equal(getattr(long, name)[4:], getattr(short, name)), name
    other = train_fm.training_batch(data, codec, 4, 4, 4)
    assert not torch.equal(other.x0, short.x0) and not torch.equal(other.t, short.t)
    n = len(data.rows)
    for epoch in range(2):
        order = train_fm.epoch_order(3, epoch, n)
        assert sorted(order) == list(range(n))
    dropped = train_fm.training_batch(data, codec, 0, 0, 400, dropout=0.3).dropped
    assert abs(dropped.float().mean() - 0.3) < 0.07


@pytest.mark.parametrize("muon", [0.0, 10.0])
def test_every_trained_tensor_is_in_the_optimizer_and_moves(tiny, muon):
    flow, codec, encoder, data, _ = parts_and_data(tiny)
    encoder.train().t5.eval()
    named = trainable(flow, encoder)
    assert {name for name in named if not name.startswith("text_encoder.")} == set(flow.state_dict())
    assert any(name.startswith("duration_emebdder.") for name in named)
    optimizer = make_optimizer(named, weight_decay=0.0, muon=muon)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(named) == len({id(p) for p in held})
    before = {name: p.detach().clone() for name, p in named.items()}
    set_rate(optimizer, 1e-3)
    batch_loss(flow, encoder, train_fm.training_batch(data, codec, 0, 0, 13))[0].backward()
    assert all(p.grad is not None for p in named.values())
    optimizer.step()
    still = [name for name, p in named.items() if torch.equal(p, before[name])]
    assert not still, still
    assert not any(p.requires_grad and p.grad is not None for p in codec.parameters())


def test_frozen_text_encoder_stays_and_decay_spares_vectors(tiny, tmp_path):
    arguments = [flag for flag in flags(tiny, tmp_path / "r", "--steps", "2") if flag != "--train_text"]
    train_fm.train(train_fm.parse_args(arguments))
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    assert not any(name.startswith("text_encoder.") for name in state["weights"])
    assert same(load_tensors(tmp_path / "r" / "text_encoder" / "model.safetensors"),
                load_tensors(tiny / "model" / "text_encoder" / "model.safetensors"))
    flow, _ = tiny_parts()
    for group in make_optimizer(trainable(flow), weight_decay=0.3).param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] == 0.3) for p in group["params"])


def test_muon_gets_the_matrices_of_the_blocks_and_steps_orthogonally(tiny):
    flow, encoder = tiny_parts()
    named = trainable(flow, encoder)
    taken = {name for name, p in named.items() if muon_takes(name, p)}
    assert {"transformer.transformer_blocks.0.attn.to_q.weight",
            "transformer.single_transformer_blocks.0.proj_mlp.weight"} <= taken
    assert all(named[name].ndim == 2 and "norm" not in name and "embed" not in name for name in taken)
    optimizer = make_optimizer(named, weight_decay=0.0, muon=10.0)
    weight = named["transformer.transformer_blocks.0.attn.to_q.weight"]
    before = weight.detach().clone()
    left, _, right = torch.linalg.svd(torch.randn(weight.shape, generator=generator(0)))
    weight.grad = left @ torch.diag(torch.linspace(1, 0.1, len(weight))) @ right
    set_rate(optimizer, 1e-3)
    optimizer.step()
    spectrum = torch.linalg.svdvals((before - weight.detach()) / 1e-2)      # one size, 10 x the rate
    assert 0.5 < spectrum.min() and spectrum.max() < 1.5, spectrum


def test_validation_never_shifts_training_and_run_is_a_model_folder(tiny, tmp_path):
    from model import load_model
    often = run(tiny, tmp_path / "often", "--val_every", "1", "--save_every", "1")
    seldom = run(tiny, tmp_path / "seldom", "--val_every", "1000")
    assert same(often["weights"], seldom["weights"]) and same(often["average"], seldom["average"])
    start = load_model(tiny / "model")
    still = [name for name, p in trainable(start.flow, start.text).items()
             if torch.equal(p, often["weights"][name])]
    assert not still, still                     # the loop trains all of the flow and of the text encoder
    rows = read_jsonl(tmp_path / "often" / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(13))       # 0: before training
    assert all(math.isfinite(row["val_loss"]) for row in rows)
    assert all(len(row["val_bins_ema"]) == train_fm.VAL_BINS for row in rows)
    last = read_jsonl(tmp_path / "seldom" / "log.jsonl")[-1]
    assert (last["val_loss"], last["val_loss_ema"]) == (rows[-1]["val_loss"], rows[-1]["val_loss_ema"])
    model = load_model(tmp_path / "often")
    named = trainable(model.flow, model.text)
    assert same({name: p.detach() for name, p in named.items()}, often["average"])
    assert same(load_tensors(tmp_path / "often" / "ema.safetensors"), often["average"])
    assert model.codec.latent_channels == 4 and model.config["training"]["seed"] == 0


def test_killed_run_ends_with_the_same_bits(tiny, tmp_path):
    whole = run(tiny, tmp_path / "whole", "--steps", "40", "--muon", "10", "--save_every", "1000")
    arguments = flags(tiny, tmp_path / "killed", "--steps", "40", "--muon", "10", "--save_every", "3")
    process = subprocess.Popen([sys.executable, ROOT / "train_fm.py", *arguments], stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, wanted = tmp_path / "killed" / "log.jsonl", random.randint(5, 20)
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < wanted):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert torch.load(tmp_path / "killed" / "state.pt", weights_only=True)["step"] < 40
    resumed = run(tiny, tmp_path / "killed", "--steps", "40", "--muon", "10", "--save_every", "3")
    assert same(resumed["weights"], whole["weights"]) and same(resumed["average"], whole["average"])
    for ours, theirs in zip(resumed["optimizer"], whole["optimizer"], strict=True):     # AdamW's state, Muon's state
        assert all(same(ours["state"][key], theirs["state"][key]) for key in theirs["state"])
    assert [row["step"] for row in read_jsonl(log)] == list(range(41))
    assert same(*(load_tensors(tmp_path / run / "tangoflux.safetensors") for run in ("killed", "whole")))


def test_kill_between_two_files_is_mended_by_the_resume(tiny, tmp_path):
    out = tmp_path / "r"
    run(tiny, out, "--steps", "4")
    (out / "ema.safetensors").unlink()                          # as if killed right after state.pt
    (out / "tangoflux.safetensors").unlink()
    state = run(tiny, out, "--steps", "4")
    assert same(load_tensors(out / "ema.safetensors"), state["average"])
    assert (out / "tangoflux.safetensors").exists()


def test_max_minutes_stops_cleanly_and_the_same_command_goes_on(tiny, tmp_path):
    assert run(tiny, tmp_path / "r", "--max_minutes", "0")["step"] == 1
    assert run(tiny, tmp_path / "r")["step"] == 12


def test_wrong_input_is_one_line(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path / "r", "--steps", "1")
    with pytest.raises(UserError, match="started with learning_rate = 0.001, now it is 0.002"):
        run(tiny, tmp_path / "r", "--steps", "1", "--learning_rate", "2e-3")
    with pytest.raises(UserError, match="stale: seed 0 there, 5 now"):
        run(tiny, tmp_path / "r", "--world_seed", "5")
    with pytest.raises(UserError, match="--codec and --preset would have no effect"):
        run(tiny, tmp_path / "r", "--codec", "runs/vae", "--preset", "toy")
    with pytest.raises(UserError, match="no state.pt"):
        run(tiny, tiny / "model")
    (tmp_path / "r" / "state.pt").write_bytes(b"PK torn")
    with pytest.raises(UserError, match="not a whole training state"):
        run(tiny, tmp_path / "r", "--steps", "1")
    for bad in (["--steps", "0"], ["--learning_rate", "nan"], ["--dropout", "1.5"], ["--muon", "-1"],
                ["--batch_size", "-3"]):
        with pytest.raises(UserError, match=bad[0]):
            train_fm.parse_args(bad)
    for useless in (["--steps", "3", "--epochs", "2"], ["--audio_dir", "x"], ["--crop", "start"],
                    ["--validation_fraction", "0.1"], ["--scenes", "5", "--data", "x.jsonl"],
                    ["--relations", "1", "1", "1", "1", "--data", "x.jsonl"]):
        with pytest.raises(UserError, match=f"{useless[0]} would have no effect"):
            train_fm.parse_args(useless)
    monkeypatch.setattr(train_fm, "batch_loss", lambda flow, encoder, batch, *_: (
        flow.fc[0].weight.sum() * math.nan, torch.full((len(batch.t),), math.nan)))
    with pytest.raises(UserError, match="step 0: the loss is nan"):
        run(tiny, tmp_path / "nan")


def test_new_flow_and_manifest(tiny, tmp_path, monkeypatch):
    """From scratch with a codec, on a manifest: sizes follow the codec, files are split, text is trained."""
    soundfile = pytest.importorskip("soundfile")
    for k in range(5):
        tone = np.sin(np.arange(9000) * 0.02 * (k + 1)).astype(np.float32)
        soundfile.write(tmp_path / f"{k}.wav", tone, 16000)
    rows = [{"audio": f"{k}.wav", "caption": f"a tone, {k}"} for k in range(5)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    import model
    monkeypatch.setitem(model.PRESETS, "toy", {**model.PRESETS["toy"], **TINY})
    train_fm.train(train_fm.parse_args([
        "--codec", str(tiny / "model"), "--data", str(tmp_path / "m.jsonl"), "--cache", str(tmp_path / "c"),
        "--out", str(tmp_path / "r"), "--steps", "2", "--batch_size", "2", "--device", "cpu",
        "--reading_steps", "2"]))
    trained = model.load_model(tmp_path / "r")
    assert trained.flow.config["in_channels"] == 4 and trained.flow.config["audio_seq_len"] == 64
    state = torch.load(tmp_path / "r" / "state.pt", weights_only=True)
    settings = json.loads(state["settings"])
    assert settings["training clips"] == 4 and not settings["text frozen"]
    assert any(name.startswith("text_encoder.") for name in state["weights"])


def test_a_new_encoder_reads_first_stays_as_it_read_and_is_found_by_a_resume(tiny, tmp_path, monkeypatch):
    import model
    monkeypatch.setitem(model.PRESETS, "toy", {**model.PRESETS["toy"], **TINY})
    arguments = ["--codec", str(tiny / "model"), "--cache", str(tmp_path / "c"), "--out", str(tmp_path / "r"),
                 "--scenes", "5", "--val_scenes", "2", "--workers", "0", "--steps", "6", "--batch_size", "2",
                 "--device", "cpu", "--reading_steps", "3"]
    train_fm.train(train_fm.parse_args([*arguments, "--max_minutes", "0"]))
    read = load_tensors(tmp_path / "r" / "text_encoder" / "model.safetensors")
    monkeypatch.setattr("reading.learn_to_read", lambda *_, **__: pytest.fail("it learns to read once more"))
    train_fm.train(train_fm.parse_args(arguments))
    assert same(read, load_tensors(tmp_path / "r" / "text_encoder" / "model.safetensors"))
    assert torch.load(tmp_path / "r" / "state.pt", weights_only=True)["step"] == 6
    with pytest.raises(UserError, match="--reading_steps 3; now .*--reading_steps 0"):
        train_fm.train(train_fm.parse_args([*arguments[:-1], "0"]))
    assert same(read, load_tensors(tmp_path / "r" / "text_encoder" / "model.safetensors"))      # and is untouched


@pytest.mark.skipif("SLOW_TESTS" not in os.environ, reason="two more processes; set SLOW_TESTS=1")
def test_two_processes_equal_one_with_twice_the_batch(tiny, tmp_path):
    one = run(tiny, tmp_path / "one", "--steps", "3", "--batch_size", "8", "--dtype", "float32")
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port}
    command = [sys.executable, ROOT / "train_fm.py", *flags(tiny, tmp_path / "two", "--steps", "3",
                                                            "--dtype", "float32")]
    processes = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.DEVNULL)
                 for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    two = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    for name in one["weights"]:
        assert torch.allclose(one["weights"][name], two["weights"][name], atol=1e-4), name


# ----------------------------------------------------------------------------- learning

def test_it_learns_two_prompts():
    """Two prompts, two latents: the loss falls far below 1 + variance, and the prompt decides where to."""
    flow, encoder = tiny_parts()
    encoder.train().t5.eval()
    named = trainable(flow, encoder)
    optimizer = make_optimizer(named)
    targets = torch.stack([torch.full((8, 4), 1.0), torch.full((8, 4), -1.0)])         # (2, L, C)
    ids, mask = encoder.tokenize(["rain", "wind"])
    first = last = 0.0
    for step in range(200):
        rng = generator("learn", step)
        which = torch.arange(16) % 2
        x0, t = torch.randn(16, 8, 4, generator=rng), logit_normal_t(16, rng)
        batch = Batch(targets[which], x0, t, ids[which], None, mask[which], torch.full((16,), 2.0),
                      torch.rand(16, generator=rng) < 0.1)
        loss, _ = batch_loss(flow, encoder, batch)
        set_rate(optimizer, linear_decay(step, 1e-2, 10, 200))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        first += loss.item() / 10 if step < 10 else 0
        last += loss.item() / 10 if step >= 190 else 0
    assert first > 1.5 and last < 0.35 * first, (first, last)
    noise = torch.randn(1, 8, 4, generator=generator("x")).expand(2, -1, -1)
    whole = Batch(targets, noise, torch.ones(2), ids, None, mask, torch.full((2,), 2.0),
                  torch.zeros(2, dtype=torch.bool))
    with torch.no_grad():
        reached = noise - flow.velocity(noise, whole.t, text_condition(encoder, whole, "empty_prompt"))
    assert reached[0].mean() > 0.5 and reached[1].mean() < -0.5
