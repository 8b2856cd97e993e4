"""A codec's files, and the training loop of both codecs: batches, resume, learning, wrong inputs."""
import json
import sys

import pytest
import torch
from conftest import TINY_MEL, TINY_OOBLECK, refused, relative_error
from test_mel import tone_clip
from test_train_fm import state_of, stop_in_step

import vae
from lib.audio import write_wav
from lib.common import generator, read_json, read_jsonl, write_json, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind, config", [("mel", TINY_MEL), ("oobleck", TINY_OOBLECK)])
def test_save_and_load_round_trip(tmp_path, kind, config):
    write_json(tmp_path / "config.json", {"text": {"kept": 1}})
    codec = vae.make_codec(kind, config).eval()
    if kind == "mel":
        codec.latent_mean += 2
    vae.save_codec(tmp_path, codec, torch.float32, training={"steps": 3})
    again = vae.load_codec(tmp_path)
    audio = 0.1 * torch.randn(1, 1, 4096)
    with torch.no_grad():
        mean, std = codec.encode(audio)
    for ours, theirs in zip(again.encode(audio), (mean, std)):
        assert relative_error(ours, theirs) < 1e-6
    written = read_json(tmp_path / "config.json")
    assert written["text"] == {"kept": 1} and written["vae_training"] == {"steps": 3}
    assert not any(p.requires_grad for p in again.parameters())
    write_json(tmp_path / "variant" / "config.json", {"references": {"vae": ".."}})
    assert torch.equal(vae.load_codec(tmp_path / "variant").latent_mean, codec.latent_mean)
    vae.save_codec(tmp_path, codec)                                                 # float16 on disk
    assert relative_error(vae.load_codec(tmp_path).encode(audio)[0], mean) < 2e-2


def test_broken_folders_are_one_line_errors(tmp_path):
    refused("missing", vae.load_codec, tmp_path / "nowhere")
    vae.save_codec(tmp_path, vae.make_codec("mel", TINY_MEL))
    config = read_json(tmp_path / "config.json")["vae"]
    for broken, message in (({"hidden_dim": 16}, "does not fit"), ({"colour": 1}, "must describe"),
                            ({"codec": "mp3"}, "mel or oobleck"), ({"hidden_dim": 10 ** 7}, "does not fit")):
        write_json(tmp_path / "config.json", {"vae": {**config, **broken}})
        refused(message, vae.load_codec, tmp_path)
    write_json(tmp_path / "config.json", {"vae": 3})
    refused("must describe a codec", vae.load_codec, tmp_path)


def test_batches_depend_on_their_seeds_alone():
    examples = torch.arange(10 * 64, dtype=torch.float32).view(10, 1, 64)
    first, again, other = (vae.draw_batch(examples, 4, 16, 4, generator(0, "batch", step)) for step in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (4, 1, 16) and (first[..., 0] % 4 == 0).all()
    assert vae.draw_batch(examples, 2, 999, 4, generator(0)).shape == (2, 1, 64)
    rows = [{"audio": f"/sounds/{i // 2}.wav", "caption": str(i)} for i in range(80)]       # two captions each
    training, held_out = vae.split_clips(rows, 0)
    assert len({row["audio"] for row in training + held_out}) == len(training) + len(held_out) == 40 and held_out
    refused("two usable sound files", vae.split_clips, rows[:2], 0)


def run(monkeypatch, out, *extra, codec="mel"):
    """`python vae.py`, in this process."""
    config = {**TINY_MEL, "patch": 1, "linear_skip": False} if codec == "mel" else TINY_OOBLECK
    sizes = "--clips 2 --validation_clips 1 --batch_size 2 --warmup_steps 2 --log_every 3 --crop_seconds 0.256"
    monkeypatch.setattr(sys, "argv", ["vae.py", "--codec", codec, "--config", json.dumps(config), *sizes.split(),
                                      "--device", "cpu", "--out", str(out), *map(str, extra)])
    vae.main()


def unmoved(first, second):
    """Names of weights that are the same in two states."""
    return {name for name, tensor in second["weights"].items() if torch.equal(first["weights"][name], tensor)}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    settings = "--steps", "12", "--save_every", "2", "--log_every", "5"
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def save_and_die(*arguments):
        vae_save(*arguments)
        if arguments[4] == 6:
            raise ArithmeticError
    vae_save = vae.save_state
    with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
        patch.setattr(vae, "save_state", save_and_die)
        run(patch, killed, *settings)
    early = state_of(killed)
    assert early["step"] == 6 and not (killed / "vae.safetensors").exists()
    run(monkeypatch, killed, *settings)
    run(monkeypatch, whole, *settings)
    first, second = state_of(whole), state_of(killed)
    assert unmoved(first, second) == first["weights"].keys()
    assert not unmoved(early, second) & dict(vae.load_codec(killed).named_parameters()).keys()      # all are trained
    assert json.loads(first["settings"])["steps"] == 12                 # the name that older runs know
    rows = [[row | {"minutes": 0} for row in read_jsonl(folder / "log.jsonl")] for folder in (whole, killed)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [0, 5, 10, 12]
    assert (vae.load_codec(killed).latent_std != 1).all()
    for change in (("--seed", "1"), ("--steps", "13")):
        refused("was started with", run, monkeypatch, killed, *settings, *change)
    (killed / "state.pt").unlink()
    refused("holds a model but no state.pt", run, monkeypatch, killed, *settings)


def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(monkeypatch, whole, "--steps", "6")
    stop_in_step(monkeypatch, vae, 4, lambda: run(monkeypatch, parts, "--steps", "6"))
    assert state_of(parts)["step"] == 4 and not (parts / "vae.safetensors").exists()
    run(monkeypatch, parts, "--steps", "6")
    assert len(unmoved(state_of(whole), state_of(parts))) == len(state_of(whole)["weights"])


def test_oobleck_trains_in_the_same_loop_and_stops_in_time(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, "--steps", "4", "--max_minutes", "0", codec="oobleck")
    early = state_of(tmp_path)
    assert "after step 1 of 4" in capsys.readouterr().out and early["step"] == 1
    run(monkeypatch, tmp_path, "--steps", "4", codec="oobleck")
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 3, 4]
    assert not unmoved(early, state_of(tmp_path))
    assert {"loss", "stft", "waveform", "kl", "validation_loss", "validation_db", "minutes"} <= set(rows[-1])
    settings = read_json(tmp_path / "config.json")["vae_training"]
    assert settings["learning_rate"] == 3e-3 and settings["beta1"] == 0.8       # its own defaults


def test_a_codec_learns_a_manifest_and_another_run_starts_from_it(tmp_path, monkeypatch):
    for index in range(4):
        write_wav(tmp_path / f"{index}.wav", tone_clip(index)[None], 16000)
    write_jsonl(tmp_path / "m.jsonl", [{"audio": f"{index}.wav", "caption": "a tone"} for index in range(4)])
    more = ["--data", tmp_path / "m.jsonl", "--seconds", "0.512", "--crop_seconds", "0.512", "--log_every", "20"]
    run(monkeypatch, tmp_path / "run", *more, "--steps", "60")
    first, *_, last = read_jsonl(tmp_path / "run" / "log.jsonl")
    assert last["validation_loss"] < 0.8 * first["validation_loss"]
    run(monkeypatch, tmp_path / "finer", *more, "--steps", "1", "--codec", "oobleck", "--checkpoint", tmp_path / "run")
    again = read_jsonl(tmp_path / "finer" / "log.jsonl")[0]
    assert again["validation_loss"] == pytest.approx(last["validation_loss"], rel=0.02)     # float16 on disk
    config = read_json(tmp_path / "finer" / "config.json")
    assert config["vae"]["codec"] == "mel"
    assert config["vae_training"]["config"] == vae.load_codec(tmp_path / "run").config


def test_an_unwritable_folder_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(vae, "make_codec", None)
    refused("cannot write", run, monkeypatch, "/proc/no")


@pytest.mark.parametrize("extra, message", [("--config nonsense", "nonsense"), ("--data nowhere.jsonl", "missing"),
                                            ("--checkpoint nowhere", "missing")])
def test_wrong_input_is_told(tmp_path, monkeypatch, extra, message):
    refused(message, run, monkeypatch, tmp_path, "--steps", "1", *extra.split())
