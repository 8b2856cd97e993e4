"""The mel VAE against the original, the codec interface, its files, and the training loop of both codecs."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import vae
from audio import write_wav
from common import UserError, read_jsonl, run_main
from conftest import ROOT, relative_error
from melvae import Conv, MelVAE, mel_losses
from training import cosine_decay
from vocoder import log_mel_error

TINY = dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 2, 2], num_res_blocks=1, down_layers=[0, 1])
TINY_OOBLECK = dict(encoder_hidden_size=4, downsampling_ratios=[4, 8, 8], channel_multiples=[1, 2, 2],
                    decoder_channels=4, decoder_input_channels=4, audio_channels=1, sampling_rate=16000)


def tiny_codec(seed=0, **changes):
    torch.manual_seed(seed)
    return MelVAE(**{**TINY, **changes})


def official(tensors):
    """A state_dict without the two entries that are ours."""
    return {name: tensor for name, tensor in tensors.items() if name not in ("latent_mean", "latent_std")}


def strict_load(codec, weights):
    missing, unexpected = codec.load_state_dict(weights, strict=False)
    assert set(missing) == {"latent_mean", "latent_std"} and not unexpected
    return codec


# ----------------------------------------------------------------------------- parity

@pytest.mark.parametrize("fold", [False, True])
def test_tiny_mel_vae_matches_the_original(parity, fold):
    fixture = parity("melvae_tiny")
    expected = fixture.tensors
    codec = strict_load(MelVAE(**fixture.info["config"]), fixture.weights)
    codec = codec.fold() if fold else codec.train()
    with torch.no_grad():
        mean, std = codec.encode_mel(expected["mel"])                               # (B, L, C)
        assert relative_error(mean.transpose(1, 2), expected["mean"]) < 1e-4
        assert relative_error(std.transpose(1, 2), expected["std"]) < 1e-4
        sample = mean + std * expected["noise"].transpose(1, 2)
        assert relative_error(sample.transpose(1, 2), expected["sample"]) < 1e-4
        assert relative_error(codec.decode_mel(mean), expected["decoded_mean"]) < 1e-4
        assert relative_error(codec.decode_mel(sample), expected["decoded_sample"]) < 1e-4
        assert relative_error(codec.kl(mean, std).transpose(1, 2), expected["kl_elementwise"]) < 1e-4


def test_weight_normalisation_matches_the_original(parity):
    fixture = parity("melvae_tiny")
    codec = strict_load(MelVAE(**fixture.info["config"]), fixture.weights).fold()
    names = [name for name in fixture.tensors if name.startswith("after_norm_removal.")]
    assert names
    for name in names:
        conv = codec.get_submodule(name.removeprefix("after_norm_removal.").removesuffix(".weight"))
        assert relative_error(conv.folded, fixture.tensors[name]) < 1e-5


def test_full_size_names_shapes_and_parameter_totals(parity):
    info = parity("melvae_bigvgan_keys").info
    for name in [name for name in info if name.startswith("vae_")]:
        full = info[name]
        with torch.device("meta"):
            codec = MelVAE(full["data_dim"], full["embed_dim"], full["hidden_dim"], mel=full["mel"])
        shapes = {key: list(tensor.shape) for key, tensor in official(codec.state_dict()).items()}
        assert shapes == full["keys"] and len(shapes) == full["num_keys"]
        for part, module in (("total", codec), ("encoder", codec.encoder), ("decoder", codec.decoder)):
            assert sum(p.numel() for p in module.parameters()) == full[f"params_{part}"]


# ----------------------------------------------------------------------------- the codec

def test_toy_codec_shapes():
    codec = vae.make_codec("mel", vae.TOY_MEL)
    assert sum(p.numel() for p in codec.parameters()) < 3e6
    facts = codec.hop, codec.sampling_rate, codec.latent_channels, codec.audio_channels
    assert facts == (1024, 16000, 48, 1)
    with torch.no_grad():
        mean, std = codec.encode(torch.zeros(1, 1, 65536))
        assert mean.shape == std.shape == (1, 64, 48) and (std > 0).all()
        assert codec.decode_mel(mean).shape == (1, 80, 256)
        assert codec.decode(mean[:, :5]).shape == (1, 1, 5 * 1024)
        assert codec.encode(torch.zeros(2, 1, 3000))[0].shape == (2, 3, 48)     # the last frame is filled up


def test_normalise_and_denormalise_are_inverse():
    codec = tiny_codec()
    codec.latent_mean += 3
    codec.latent_std *= 2
    latents = torch.randn(2, 5, 4)
    assert torch.allclose(codec.normalise(latents), (latents - 3) / 2)
    assert torch.allclose(codec.denormalise(codec.normalise(latents)), latents, atol=1e-6)


def test_folding_changes_nothing_and_training_undoes_it():
    codec = tiny_codec()
    names = set(codec.state_dict())
    log_mel = torch.randn(1, 80, 16)
    with torch.no_grad():
        before = codec.encode_mel(log_mel)[0]
        assert torch.equal(codec.fold().encode_mel(log_mel)[0], before)
        assert set(codec.state_dict()) == names
        other = tiny_codec(seed=1)
        codec.load_state_dict(other.state_dict())                                   # loading undoes it too
        assert torch.equal(codec.encode_mel(log_mel)[0], other.encode_mel(log_mel)[0])
    assert all(m.folded is None for m in codec.fold().train().modules() if isinstance(m, Conv))


@pytest.mark.parametrize("kind, config", [("mel", TINY), ("oobleck", TINY_OOBLECK)])
def test_save_and_load_round_trip(tmp_path, kind, config):
    (tmp_path / "config.json").write_text('{"text": {"kept": 1}}')
    codec = vae.make_codec(kind, config).eval()
    if kind == "mel":
        codec.latent_mean += 2
    vae.save_codec(tmp_path, codec, torch.float32)
    again = vae.load_codec(tmp_path)
    audio = 0.1 * torch.randn(1, 1, 4096)
    with torch.no_grad():
        for ours, theirs in zip(again.encode(audio), codec.encode(audio)):
            assert relative_error(ours, theirs) < 1e-6
    assert torch.equal(again.latent_mean, codec.latent_mean)
    assert json.loads((tmp_path / "config.json").read_text())["text"] == {"kept": 1}
    assert not any(p.requires_grad for p in again.parameters())

    (tmp_path / "variant").mkdir()
    (tmp_path / "variant" / "config.json").write_text('{"references": {"vae": ".."}}')
    assert torch.equal(vae.load_codec(tmp_path / "variant").latent_mean, codec.latent_mean)

    vae.save_codec(tmp_path, codec)                                                 # float16 on disk
    with torch.no_grad():
        assert relative_error(vae.load_codec(tmp_path).encode(audio)[0], codec.encode(audio)[0]) < 2e-2


def test_broken_folders_are_one_line_errors(tmp_path):
    with pytest.raises(UserError, match="missing"):
        vae.load_codec(tmp_path / "nowhere")
    vae.save_codec(tmp_path, tiny_codec())
    whole = (tmp_path / "vae.safetensors").read_bytes()
    (tmp_path / "vae.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        vae.load_codec(tmp_path)
    (tmp_path / "vae.safetensors").write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"hidden_dim": 16}, "does not fit"), ({"colour": 1}, "does not describe"),
                            ({"codec": "mp3"}, "use mel or oobleck")):
        (tmp_path / "config.json").write_text(json.dumps({"vae": {**config["vae"], **change}}))
        with pytest.raises(UserError, match=message):
            vae.load_codec(tmp_path)


# ----------------------------------------------------------------------------- training

def test_every_parameter_gets_a_gradient_and_moves():
    codec = tiny_codec()
    before = {name: p.detach().clone() for name, p in codec.named_parameters()}
    optimizer = torch.optim.AdamW(codec.parameters(), 1e-2)
    losses = mel_losses(codec, torch.randn(2, 80, 32), torch.Generator().manual_seed(0))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in codec.named_parameters())


def test_batches_depend_on_seed_and_step_alone():
    examples = torch.arange(10 * 64, dtype=torch.float32).view(10, 1, 64)
    first, again = (vae.draw_batch(examples, 4, 16, 4, 0, "batch", 7) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, vae.draw_batch(examples, 4, 16, 4, 0, "batch", 8))
    assert first.shape == (4, 1, 16) and (first[..., 0] % 4 == 0).all()
    assert vae.draw_batch(examples, 2, 999, 4, 0).shape == (2, 1, 64)


def test_learning_rate_schedule():
    rates = [cosine_decay(step, 2.0, 10, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)]) and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_mel_codec_learns_a_handful_of_clips():
    torch.manual_seed(0)
    codec = MelVAE(**{**TINY, "hidden_dim": 24, "embed_dim": 16})
    clips = torch.stack([tone_clip(i) for i in range(4)])
    log_mel = codec.mel(clips)                                                      # (4, M, F)
    codec.data_mean.copy_(log_mel.mean((0, 2))[None, :, None])
    codec.data_std.copy_(log_mel.std((0, 2)).clamp(min=0.1)[None, :, None])
    optimizer = torch.optim.AdamW(codec.parameters(), 2e-2)
    losses = []
    for step in range(80):
        parts = mel_losses(codec, log_mel, torch.Generator().manual_seed(step))
        loss = parts["mel"] + 1e-3 * parts["kl"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["mel"].item())
    assert losses[-1] < 0.4 * losses[0]
    vae.measure_latents(codec, log_mel)
    with torch.no_grad():
        mean, _ = codec.encode_mel(log_mel)
        assert codec.normalise(mean).mean().abs() < 1e-3
        assert 0.5 < codec.normalise(mean).std() < 1.05                         # posterior noise is the rest
        assert log_mel_error(log_mel, codec.decode_mel(mean)).mean() < 8


def tone_clip(index, samples=16384):
    time = torch.arange(samples) / 16000
    return 0.3 * torch.sin(2 * torch.pi * 300 * (index + 1) * time) * torch.exp(-5 * (time % 0.25))


# ----------------------------------------------------------------------------- the command

@pytest.fixture
def one_thread():
    """The same arithmetic here as in the process that is killed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(out, *extra, codec="mel"):
    config = {**TINY, "patch": 1, "linear_skip": False} if codec == "mel" else TINY_OOBLECK
    return ["--codec", codec, "--config", json.dumps(config), "--clips", "2", "--validation_clips", "1",
            "--batch_size", "2", "--warmup_steps", "2", "--log_every", "3", "--device", "cpu",
            "--crop_seconds", "0.256", "--out", str(out), *extra]


def run(monkeypatch, *arguments, **options):
    """`python vae.py`, in this process."""
    monkeypatch.setattr(sys, "argv", ["vae.py", *map(str, flags(*arguments, **options))])
    vae.main()


def error_of(monkeypatch, capsys, *arguments):
    """What the command says on stderr; it must end with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["vae.py", *flags(*arguments)])
    with pytest.raises(SystemExit) as stop:
        run_main(vae.main)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def state_of(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, one_thread):
    settings = "--steps", "40", "--save_every", "2", "--log_every", "20"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "vae.py", *flags(killed, *settings)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (killed / "state.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    done = state_of(killed)["step"]
    assert 0 < done < 40
    run(monkeypatch, killed, *settings)
    assert f"after step {done} of 40" in capsys.readouterr().out
    run(monkeypatch, whole, *settings)
    said = capsys.readouterr().out
    assert "next: python train_fm.py" in said and "held-out clips, fixed noise, steps 0 to 40" in said

    first, second = state_of(whole), state_of(killed)
    assert first["weights"].keys() == second["weights"].keys() == tiny_codec().state_dict().keys()
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    rows = [[(row["step"], row.get("loss"), row["validation_loss"], row["validation_db"])
             for row in read_jsonl(folder / "log.jsonl")] for folder in (whole, killed)]
    assert rows[0] == rows[1] and [row[0] for row in rows[0]] == [0, 20, 40]
    assert (vae.load_codec(killed).latent_std != 1).all()

    said = error_of(monkeypatch, capsys, killed, *settings, "--seed", "1")
    assert "started with seed = 0, now it is 1" in said
    (killed / "state.pt").unlink()
    assert "holds a model but no state.pt" in error_of(monkeypatch, capsys, killed, *settings)


def test_oobleck_trains_in_the_same_loop_and_stops_in_time(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, "--steps", "4", "--max_minutes", "0", codec="oobleck")
    assert "stopped at step 1 of 4" in capsys.readouterr().out and state_of(tmp_path)["step"] == 1
    run(monkeypatch, tmp_path, "--steps", "4", codec="oobleck")
    codec = vae.load_codec(tmp_path)
    with torch.no_grad():
        assert codec.encode(torch.zeros(1, 1, 4096))[0].shape == (1, 16, 4)
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 3, 4]
    assert {"loss", "stft", "waveform", "kl", "validation_loss", "validation_db", "minutes"} <= set(rows[-1])


def test_overfit_takes_whole_clips_and_validates_on_them(tmp_path, monkeypatch, capsys):
    """Clips under --seconds are left out; the loss of the same clips, with the same noise, falls."""
    for index, samples in enumerate((5000, 1500, 9000, 4096)):
        write_wav(tmp_path / f"{index}.wav", tone_clip(index, samples)[None], 16000)
    rows = [{"audio": f"{index}.wav", "caption": f"a tone, {index}"} for index in range(4)]
    rows[0]["duration"] = 0.1
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = "--data", tmp_path / "m.jsonl", "--seconds", "0.256", "--steps", "20", "--log_every", "10"
    run(monkeypatch, tmp_path / "run", *arguments, "--overfit", "2")
    said = capsys.readouterr().out
    assert all((f"{name}.wav, a tone" in said) == (name in (2, 3)) for name in range(4))
    assert "training clips, fixed noise, steps 0 to 20" in said
    first, *_, last = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert last["validation_loss"] < 0.8 * first["validation_loss"]
    assert last["validation_db"] < first["validation_db"]
    assert "has 2 clips of 0.256 s or more" in error_of(
        monkeypatch, capsys, tmp_path / "more", *map(str, arguments), "--overfit", "3")


def test_validation_draws_the_same_noise_each_time():
    codec, examples = tiny_codec(), torch.randn(3, 80, 32)
    first, again = (vae.validate(codec, examples, 16, {"kl": 1.0}) for _ in range(2))
    assert first == again and codec.training


@pytest.mark.parametrize("extra, message", [
    (["--config", '{"colour": 1}'], "does not describe"),
    (["--config", "nonsense"], "--config"),
    (["--learning_rate", "nan"], "--learning_rate"),
    (["--overfit", "0"], "--overfit"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl is missing"),
    (["--checkpoint", "nowhere"], "missing"),
    (["--out", "/proc/nowhere"], "cannot write"),
])
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, extra, message):
    said = error_of(monkeypatch, capsys, tmp_path, "--steps", "1", *extra)
    assert len(said.splitlines()) == 1 and message in said


def test_linear_skip_starts_as_principal_components():
    """Before any training the codec with a linear skip is the best linear one: as many components, the same error."""
    random = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 80 * 4, generator=random)
    columns = torch.randn(40, 16, 6, generator=random) @ basis                       # rank 6: six channels hold it
    mels = columns.unflatten(-1, (80, 4)).permute(0, 2, 1, 3).flatten(2)             # (N, M, F)
    errors = []
    for channels in (6, 3):
        codec = MelVAE(data_dim=80, embed_dim=channels, hidden_dim=8, ch_mult=[1], num_res_blocks=1, down_layers=[],
                       patch=4, linear_skip=True).eval()
        codec.start_linear(mels)
        mean, std = codec.encode_mel(mels)
        assert mean.shape == std.shape == (40, 16, channels)
        assert torch.allclose(mean.var((0, 1)), torch.ones(channels), atol=0.1)      # whitened
        errors.append((codec.decode_mel(mean) - mels).abs().max())
    assert errors[0] < 1e-2 < errors[1]
