"""lib/audio.py: the resampling filter against exact sines, files, cropping, loudness, the picture."""
import functools
import itertools
import math
import os
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, overwrite, refused

from lib.common import UserError
from lib import audio
from lib.audio import loudness, main, normalise_loudness, true_peak

pytestmark = pytest.mark.usefixtures("one_thread")
RATES = [(44100, 48000), (48000, 16000), (44100, 16000), (16000, 44100)]


def tones(rate, samples, frequencies):
    """A sum of sines (samples,) float64, in [-1, 1], with phases that do not depend on the rate."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    angle = 2 * math.pi * frequencies[:, None] * time + torch.arange(len(frequencies))[:, None]
    return angle.sin().mean(0)


@pytest.mark.parametrize("rate_in, rate_out", RATES + [(22254, 16000)])
def test_resample_keeps_the_pass_band(rate_in, rate_out):
    frequencies = torch.linspace(40, 0.45 * min(rate_in, rate_out), 40, dtype=torch.float64)
    ours = audio.resample(tones(rate_in, rate_in, frequencies).float(), rate_in, rate_out)
    exact = tones(rate_out, len(ours), frequencies)
    inside = slice(rate_out // 20, -rate_out // 20)  # the ends know nothing of what lies beyond
    assert len(ours) == rate_out and (ours - exact)[inside].abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("samples", [1, 2, 159, 1000])
def test_resample_shapes_and_batches(samples):
    batch = noise(2, 3, samples)
    for rate_in, rate_out in RATES:
        output = audio.resample(batch, rate_in, rate_out)
        assert output.shape == (2, 3, math.ceil(samples * rate_out / rate_in))
        torch.testing.assert_close(output[1, 2], audio.resample(batch[1, 2], rate_in, rate_out), atol=1e-5, rtol=0)
    assert audio.resample(batch, 16000, 16000) is batch


def test_wav_files_come_back_or_are_refused(tmp_path):
    sound = torch.stack([torch.linspace(-1, 1, 5000), torch.linspace(0.5, -0.5, 5000)])
    audio.write_wav(tmp_path / "new" / "a.wav", sound, 44100)
    back = audio.read_audio(tmp_path / "new" / "a.wav", 44100, 2)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, sound, atol=6.2e-5, rtol=0)  # two steps of 16 bits
    audio.write_wav(tmp_path / "loud.wav", torch.tensor([2.0, -3.0, 0.0]), 16000)       # clipped; (N,) will do
    torch.testing.assert_close(audio.read_audio(tmp_path / "loud.wav", 16000, 1), torch.tensor([[1.0, -1, 0]]),
                               atol=6.2e-5, rtol=0)
    refused("NaN", audio.write_wav, tmp_path / "nan.wav", torch.tensor([[0.0, math.nan]]), 16000)
    refused("cannot write", audio.write_wav, tmp_path / "loud.wav" / "a.wav", torch.zeros(1, 10), 16000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loud.wav", "new"]  # no temporary file is left


def test_read_audio_channels(tmp_path):
    left, right = np.full(400, 0.5, np.float32), np.full(400, -0.25, np.float32)
    soundfile.write(tmp_path / "stereo.flac", np.stack([left, right], 1), 16000)
    soundfile.write(tmp_path / "mono.ogg", left, 16000)
    soundfile.write(tmp_path / "five.wav", np.stack([left, right, left * 0, left, left], 1), 16000, subtype="FLOAT")
    assert audio.read_audio(tmp_path / "stereo.flac", 16000, 1).mean().item() == pytest.approx(0.125, abs=1e-4)
    mono = audio.read_audio(tmp_path / "mono.ogg", 16000, 2)
    assert mono.shape == (2, 400) and mono[0].equal(mono[1])
    assert audio.read_audio(tmp_path / "five.wav", 16000, 2)[:, 0].tolist() == [0.5, -0.25]
    assert audio.read_audio(tmp_path / "stereo.flac", 44100, 1).shape == (1, math.ceil(400 * 441 / 160))


@pytest.mark.parametrize("seconds", [None, 0.1])
def test_headers_that_cannot_be_true_are_refused(tmp_path, seconds):
    """Rates beyond 1 to 768 kHz, more frames than bytes can hold, pipes and devices: before memory is taken."""
    read, path = functools.partial(audio.read_audio, seconds=seconds), tmp_path / "a.wav"
    for rate, good in ((999, False), (1000, True), (768_000, True), (768_001, False), (99_999_989, False), (2 ** 31 - 1, False)):
        audio.write_wav(path, torch.full((1, 3000), 0.5), 16000)
        overwrite(path, 24, rate.to_bytes(4, "little"))
        if good:
            assert read(path, 16000, 1).numel()
        else:
            refused(f"a.wav cannot be used: its header says {rate} Hz", read, path, 16000, 1)
    audio.write_wav(path, torch.full((1, 3000), 0.5), 16000)
    path.write_bytes(path.read_bytes()[:4044])
    refused("a.wav cannot be used: it was cut off: 4000 of 6000 bytes are there", read, path, 16000, 1)
    overwrite(path, 40, bytes([255] * 4))                           # of a stream, whose length nobody knew
    assert read(path, 16000, 1).numel()
    flac = tmp_path / "a.flac"
    soundfile.write(flac, np.full(16000, 0.5), 16000)
    overwrite(flac, 8 + 14, (2 ** 32 - 1).to_bytes(4, "big"))       # of 36 bits of STREAMINFO the last 32
    refused("promises 4294967295 frames, more than it can hold", read, flac, 16000, 1)
    flac.write_bytes(flac.read_bytes() + bytes(2 ** 19))            # now the file is long enough to be believed
    refused("a.flac cannot be used", read, flac, 16000, 1)
    soundfile.write(tmp_path / "zeros.flac", np.zeros(20 * 48000), 48000)       # as dense as a file gets
    assert read(tmp_path / "zeros.flac", 48000, 1).shape[1] == (20 * 48000 if seconds is None else 9600)
    os.mkfifo(tmp_path / "fifo.wav")
    for name, match in (("/dev/zero", "is no file"), (tmp_path / "fifo.wav", "is no file"), (tmp_path, "is no file"),
                        ("x" * 300, "is missing"), ("a\0b", "is missing")):
        refused(match, read, name, 16000, 1)


def test_the_end_is_tried_before_a_whole_file_is_read(tmp_path, monkeypatch):
    """A FLAC may promise 16 GB in a few MB: the memory is taken only once its last frame was there."""
    flac, asked = tmp_path / "a.flac", []
    soundfile.write(flac, np.random.default_rng(0).standard_normal(48000) * 0.1, 16000)
    overwrite(flac, 8 + 14, (2 ** 29).to_bytes(4, "big"))
    original = audio.read_frames
    monkeypatch.setattr(audio, "read_frames", lambda file, frames: [asked.append(frames), original(file, frames)][1])
    refused("a.flac cannot be used", audio.read_audio, flac, 16000, 1)
    assert all(frames == 1 for frames in asked)


def test_what_cannot_be_read_is_named_and_counted(capsys):
    audio.silent_files.clear()

    def read(item):
        if item % 2:
            raise UserError(f"{item} is odd")
        return item / 2
    assert list(audio.usable(range(60), read, "numbers")) == [(i, i / 2) for i in range(0, 60, 2)]
    *named, last = capsys.readouterr().err.splitlines()
    assert named == [f"warning: skipped: {i} is odd" for i in range(1, 40, 2)]         # twenty of them
    assert last == "warning: 30 of 60 numbers skipped"
    first = list(itertools.islice(audio.usable([1, 2, 3], read, "numbers"), 1))         # who stops early is told, too
    assert first == [(2, 1)] and "1 is odd" in capsys.readouterr().err
    refused("the 2 numbers cannot be used: 1 is odd", list, audio.usable([1, 3], read, "numbers"))
    refused("the 0 numbers cannot be used: there are none", list, audio.usable([], read, "numbers"))
    assert list(audio.usable([2], read, "numbers")) == [(2, 1)] and capsys.readouterr().err == ""


@pytest.mark.parametrize("crop", ["center", "start"])
def test_read_audio_reads_only_what_the_crop_needs(tmp_path, crop):
    audio.write_wav(tmp_path / "long.wav", tones(44100, 10 * 44100, torch.tensor([3.0, 5.0]).double()), 44100)
    piece = audio.read_audio(tmp_path / "long.wav", 16000, 1, 2.0, crop)
    whole = audio.read_audio(tmp_path / "long.wav", 16000, 1)
    assert 32000 <= piece.shape[-1] < 36000 and whole.shape[-1] == 160000
    piece, whole = (audio.fit_audio(sound, 32000, crop) for sound in (piece, whole))
    assert (piece - whole)[:, 100:].abs().max() < 5e-3


def test_spectrogram_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    sounds, titles = [noise(2, 8000), torch.zeros(50), torch.ones(1)], ["rain $x", "\U0001f40d \u5c0f\u63d0", "x " * 200]
    audio.save_spectrogram(tmp_path / "a.png", sounds, titles, 44100)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    audio.save_spectrogram(tmp_path / "b.png", sounds, ["", "", ""], 16000)
    assert "matplotlib" in capsys.readouterr().err and not (tmp_path / "b.png").exists()


def rebuilt(recipe):
    """The signal of a recipe of shared/parity/metrics.json -> float64 (channels, samples)."""
    rate, kind, count = recipe["rate"], recipe["kind"], round(recipe["rate"] * recipe["seconds"])
    t, random, silence = np.arange(count) / rate, np.random.RandomState(recipe.get("seed")), np.zeros(count)
    rise = (recipe["freq2"] - recipe["freq"]) / (2 * recipe["seconds"]) if kind == "chirp" else 0
    wave = np.sin(2 * np.pi * (recipe["freq"] * t + rise * t ** 2)) if kind in ("sine", "chirp") else silence
    signal = np.stack([gain * (random.randn(count) if kind == "noise" else wave) for gain in recipe["gains"]])
    for start, end, factor in recipe.get("envelope", []):
        signal[:, int(start * rate):int(end * rate)] *= factor
    return signal


def test_pyloudnorm_numbers_are_matched(parity):
    pytest.importorskip("pyloudnorm")
    signals = parity("metrics").info["loudness"]["signals"]
    assert len(signals) >= 10
    for name, wanted in signals.items():
        signal = torch.from_numpy(rebuilt(wanted["recipe"]))
        assert signal.sum().item() == pytest.approx(wanted["sum"], abs=1e-6), name
        rate = wanted["recipe"]["rate"]
        if not math.isfinite(float(wanted["lufs"])):
            assert loudness(signal, rate) == -math.inf
            continue
        assert loudness(signal, rate) == pytest.approx(wanted["lufs"], abs=1e-4), name
        gain = wanted["after_normalising_to_-16.5"]["gain"]
        audio, ours, reached = normalise_loudness(signal.float(), rate, -16.5, 60.0)       # no ceiling
        assert ours == pytest.approx(gain, rel=1e-4) and reached == pytest.approx(-16.5, abs=1e-3)
        assert loudness(audio, rate) == pytest.approx(-16.5, abs=0.01)


def test_pyloudnorm_brings_varied_clips_to_the_target_or_the_ceiling():
    pytest.importorskip("pyloudnorm")
    quiet = 0.01 * noise(1, 32000)
    click = quiet + 0.9 * (torch.arange(32000) == 16000)
    for sound, limited in ((quiet, False), (click, True)):
        made, _, reached = normalise_loudness(sound, 16000)
        assert loudness(made, 16000) == pytest.approx(reached, abs=0.05)
        peak = 20 * math.log10(true_peak(made, 16000))
        assert peak == pytest.approx(-1, abs=0.01) and reached < -17 if limited else peak < -1
        assert limited or reached == pytest.approx(-16.5, abs=1e-3)
    made, gain, reached = normalise_loudness(torch.zeros(1, 16000), 16000)              # silence
    assert not made.any() and gain == 1 and reached == -math.inf
    tone = 0.5 * torch.sin(torch.arange(1600) * 0.3)[None]                              # shorter than a block
    assert loudness(tone, 16000) == pytest.approx(loudness(tone.repeat(1, 20), 16000), abs=0.3)


def test_pyloudnorm_levels_files_beside_their_originals(tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyloudnorm")
    monkeypatch.chdir(tmp_path)
    audio.write_wav(tmp_path / "a.wav", 0.05 * noise(2, 32000), 16000)
    main([str(tmp_path / "a.wav"), "--out", str(tmp_path / "levelled"), "--lufs", "-20"])
    made = audio.read_audio(tmp_path / "levelled" / "a.wav", 16000, 2)
    assert loudness(made, 16000) == pytest.approx(-20, abs=0.1)
    assert "-20.0 LUFS" in capsys.readouterr().out
    refused("a.wav is there already", main, ["a.wav", "--out", "."])
    refused("b.wav is missing", main, ["b.wav", "--out", "x"])
    (tmp_path / "broken.wav").write_bytes(b"RIFF no sound")
    refused("broken.wav cannot be used", main, ["broken.wav", "--out", "new/x"])
    (tmp_path / "broken.wav").unlink()
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)                                # where it is absent
    refused("pip install py", main, ["a.wav", "--out", "x"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "levelled"]
