"""audio.py: the resampling filter against scipy and exact sines, reading, cropping, writing, the picture."""
import math
import sys

import numpy as np
import pytest
import torch

import audio
from common import UserError

RATES = [(44100, 48000), (48000, 16000), (44100, 16000), (16000, 44100)]


def tones(rate, samples, frequencies):
    """A sum of sines (samples,) float64, in [-1, 1], with phases that do not depend on the rate."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    angle = 2 * math.pi * frequencies[:, None] * time + torch.arange(len(frequencies))[:, None]
    return angle.sin().mean(0)


def decibel(error, reference):
    return 20 * math.log10(error.abs().max() / reference.abs().max())


# ----------------------------------------------------------------------------- resampling

@pytest.mark.parametrize("rate_in, rate_out", RATES + [(22254, 16000)])
def test_resample_keeps_the_pass_band(rate_in, rate_out):
    """Sines up to 0.9 of the smaller Nyquist frequency come out as the same sines: error under -60 dB."""
    frequencies = torch.linspace(40, 0.45 * min(rate_in, rate_out), 40, dtype=torch.float64)
    ours = audio.resample(tones(rate_in, rate_in, frequencies).float(), rate_in, rate_out)
    exact = tones(rate_out, len(ours), frequencies)
    inside = slice(rate_out // 20, -rate_out // 20)  # the ends know nothing of what lies beyond
    assert len(ours) == rate_out
    assert decibel((ours - exact)[inside], exact) < -80


@pytest.mark.parametrize("rate_in, rate_out", RATES)
def test_resample_matches_scipy(rate_in, rate_out):
    """Band-limited noise, against scipy.signal.resample_poly with a filter of its own."""
    signal = pytest.importorskip("scipy.signal")
    up, down = rate_out // math.gcd(rate_in, rate_out), rate_in // math.gcd(rate_in, rate_out)
    noise = np.random.default_rng(0).standard_normal(8000)
    spectrum = np.fft.rfft(noise)
    spectrum[int(len(spectrum) * 0.88 * min(1, rate_out / rate_in)):] = 0
    noise = np.fft.irfft(spectrum)
    taps = signal.firwin(2 * 90 * max(up, down) + 1, 0.95 / max(up, down), window=("kaiser", 10.0))
    theirs = torch.from_numpy(signal.resample_poly(noise, up, down, window=taps))
    ours = audio.resample(torch.from_numpy(noise).float(), rate_in, rate_out)
    assert ours.shape == theirs.shape
    assert decibel((ours - theirs)[500:-500], theirs) < -80


def test_resample_removes_what_would_alias():
    loud = tones(44100, 44100, torch.tensor([8010.0, 12000.0, 21000.0], dtype=torch.float64)).float()
    assert audio.resample(loud, 44100, 16000)[1000:-1000].abs().max() < 1e-4


@pytest.mark.parametrize("samples", [1, 2, 159, 1000])
def test_resample_shapes_batches_and_gradients(samples):
    batch = torch.randn(2, 3, samples, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for rate_in, rate_out in RATES:
        output = audio.resample(batch, rate_in, rate_out)
        assert output.shape == (2, 3, math.ceil(samples * rate_out / rate_in))
        torch.testing.assert_close(output[1, 2], audio.resample(batch[1, 2], rate_in, rate_out), atol=1e-5, rtol=0)
    output.sum().backward()
    assert batch.grad.abs().sum() > 0
    assert audio.resample(batch, 16000, 16000) is batch


# ----------------------------------------------------------------------------- cropping

def test_fit_audio():
    ramp = torch.arange(10.0).repeat(2, 1)
    assert audio.fit_audio(ramp, 4)[0].tolist() == [3, 4, 5, 6]
    assert audio.fit_audio(ramp, 4, "start")[0].tolist() == [0, 1, 2, 3]
    assert audio.fit_audio(ramp, 10).equal(ramp)
    for crop in ("center", "start"):
        assert audio.fit_audio(ramp, 12, crop)[1].tolist() == [*range(10), 0, 0]


# ----------------------------------------------------------------------------- files

def test_write_then_read_wav(tmp_path):
    sound = torch.stack([torch.linspace(-1, 1, 5000), torch.linspace(0.5, -0.5, 5000)])
    audio.write_wav(tmp_path / "new" / "a.wav", sound, 44100)
    back = audio.read_audio(tmp_path / "new" / "a.wav", 44100, 2)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, sound, atol=6.2e-5, rtol=0)  # two steps of 16 bits
    audio.write_wav(tmp_path / "loud.wav", np.array([2.0, -3.0, 0.0]), 16000)  # clipped; numpy and (N,) will do
    torch.testing.assert_close(audio.read_audio(tmp_path / "loud.wav", 16000, 1), torch.tensor([[1.0, -1, 0]]),
                               atol=6.2e-5, rtol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loud.wav", "new"]  # no temporary file is left


def test_write_wav_refuses(tmp_path):
    with pytest.raises(UserError, match="NaN"):
        audio.write_wav(tmp_path / "a.wav", torch.tensor([[0.0, float("nan")]]), 16000)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        audio.write_wav(tmp_path / "file" / "a.wav", torch.zeros(1, 10), 16000)
    assert not (tmp_path / "a.wav").exists()


def test_read_audio_channels(tmp_path):
    import soundfile
    left, right = np.full(400, 0.5, np.float32), np.full(400, -0.25, np.float32)
    soundfile.write(tmp_path / "stereo.flac", np.stack([left, right], 1), 16000)
    soundfile.write(tmp_path / "mono.ogg", left, 16000)
    five = np.stack([left, right, left * 0, left, left], 1)
    soundfile.write(tmp_path / "five.wav", five, 16000, subtype="FLOAT")
    assert audio.read_audio(tmp_path / "stereo.flac", 16000, 1).mean().item() == pytest.approx(0.125, abs=1e-4)
    mono = audio.read_audio(tmp_path / "mono.ogg", 16000, 2)
    assert mono.shape == (2, 400) and mono[0].equal(mono[1])
    surround = audio.read_audio(tmp_path / "five.wav", 16000, 2)
    assert surround[:, 0].tolist() == [0.5, -0.25]
    assert audio.read_audio(tmp_path / "stereo.flac", 44100, 1).shape == (1, math.ceil(400 * 441 / 160))


@pytest.mark.parametrize("crop", ["center", "start"])
def test_read_audio_reads_only_what_the_crop_needs(tmp_path, crop):
    """A piece read from a long file equals the piece of the whole file, up to a shift of less than a sample."""
    audio.write_wav(tmp_path / "long.wav", tones(44100, 10 * 44100, torch.tensor([3.0, 5.0]).double()), 44100)
    piece = audio.read_audio(tmp_path / "long.wav", 16000, 1, 2.0, crop)
    whole = audio.read_audio(tmp_path / "long.wav", 16000, 1)
    assert 32000 <= piece.shape[-1] < 36000 and whole.shape[-1] == 160000
    difference = (audio.fit_audio(piece, 32000, crop) - audio.fit_audio(whole, 32000, crop)).abs()
    assert difference[:, 100:].max() < 5e-3


def bad_files(folder):
    """{name: what the error must say} of files that cannot be used, written to `folder`."""
    import soundfile
    (folder / "corrupt.wav").write_bytes(b"RIFF not really a sound file" * 20)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "no_samples.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan, 0.2], np.float32), 16000, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    return {"missing.wav": "is missing", "corrupt.wav": "cannot be decoded", "empty.wav": "is empty",
            "no_samples.wav": "is empty", "nan.wav": "NaN", "folder.wav": "is missing"}


def test_bad_files_are_named(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        for read in (audio.probe_audio, lambda path: audio.read_audio(path, 16000, 1)):
            with pytest.raises(UserError, match=reason) as error:
                read(tmp_path / name)
            assert name in str(error.value) and "\n" not in str(error.value)


def test_probe_audio_gives_seconds(tmp_path):
    audio.write_wav(tmp_path / "a.wav", torch.zeros(1, 24000), 16000)
    assert audio.probe_audio(tmp_path / "a.wav") == 1.5


# ----------------------------------------------------------------------------- picture

def test_mel_picture_shows_a_tone_at_its_frequency():
    edges = torch.linspace(0, 8000, 81, dtype=torch.float64)
    picture = audio.mel_picture(tones(16000, 16000, torch.tensor([3050.0]).double()), 16000, edges)
    assert picture.shape[0] == 80 and picture[:, 5:-5].argmax(0).unique().tolist() == [30]
    assert picture.max() == 0 and audio.mel_picture(torch.zeros(10).double(), 16000, edges).isfinite().all()


def test_spectrogram_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    noise = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0))
    sounds, titles = [noise, np.zeros(50, np.float32), torch.ones(1)], [
        "rain $x", "\U0001f40d \u5c0f\u63d0", "x " * 200]
    assert audio.save_spectrogram(tmp_path / "a.png", sounds, titles, 44100)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not audio.save_spectrogram(tmp_path / "b.png", sounds, ["", "", ""], 16000)
    assert "matplotlib" in capsys.readouterr().err and not (tmp_path / "b.png").exists()
