"""Log-mel against the original mel converter, mel inversion and Griffin-Lim."""
import math

import numpy as np
import pytest
import torch

from conftest import relative_error
from vocoder import FLOOR, MEL_16K, MEL_44K, LogMel, griffin_lim, hz_to_mel, invert_mel, log_mel_error, mel_to_hz

OURS = {"16k": MEL_16K, "44k": MEL_44K}


def tone(frequency, samples=16384, rate=16000, level=0.3):
    return level * torch.sin(2 * math.pi * frequency * torch.arange(samples) / rate)[None]  # (1, samples)


# ----------------------------------------------------------------------------- parity and maths

def test_log_mel_matches_the_original(parity):
    fixture = parity("mel_converter")
    for name in fixture.info["cases"]:
        tensors = fixture.load(f"mel_converter_{name}")
        mel = LogMel(**fixture.info["parameters"][name])
        assert relative_error(mel(tensors["audio"]), tensors["mel"]) < 1e-4
        assert relative_error(mel.filters.sum(1), tensors["mel_basis_sum_over_bins"]) < 1e-5
        assert relative_error(mel.filters.sum(0), tensors["mel_basis_sum_over_mels"]) < 1e-5


def test_parameters_are_those_of_the_original(parity):
    assert parity("mel_converter").info["parameters"] == OURS


def test_mel_scale_is_invertible_and_meets_its_landmarks():
    hz = np.array([0.0, 200.0, 999.0, 1000.0, 6400.0, 22050.0])
    np.testing.assert_allclose(mel_to_hz(hz_to_mel(hz)), hz, atol=1e-9)
    np.testing.assert_allclose(hz_to_mel([0, 200, 1000, 6400]), [0, 3, 15, 42], atol=1e-9)


def test_frames_and_clipping():
    mel = LogMel(**MEL_16K)
    assert mel(torch.zeros(2, 65536)).shape == (2, 80, 256)
    assert torch.equal(mel(tone(440, level=1.0) * 3), mel((tone(440, level=1.0) * 3).clamp(-1, 1)))
    assert not LogMel(**MEL_16K).state_dict()


def test_mel_inversion_explains_the_bands():
    torch.manual_seed(0)
    mel = LogMel(**MEL_16K)
    log_mel = mel(0.1 * torch.randn(1, 16384))
    magnitude = invert_mel(log_mel, mel)                                            # (B, F, K)
    assert (magnitude >= 0).all()
    again = (magnitude @ mel.filters.T).clamp(min=FLOOR).log10().transpose(1, 2)
    assert log_mel_error(log_mel, again).item() < 0.5


def test_log_mel_error_is_in_decibel_and_leaves_out_what_cannot_be_heard():
    reference = torch.zeros(1, 80, 4)
    reference[..., 3] = -4.0                                     # 80 dB below the peak
    other = reference + 0.1
    other[..., 3] += 7
    assert log_mel_error(reference, other).item() == pytest.approx(2.0, rel=1e-5)
    natural = math.log(10)
    assert log_mel_error(reference * natural, other * natural, natural=True).item() == pytest.approx(2.0, rel=1e-5)


# ----------------------------------------------------------------------------- Griffin-Lim

@pytest.mark.parametrize("name", OURS)
def test_a_tone_keeps_its_frequency_and_level(name):
    mel = LogMel(**OURS[name])
    audio = tone(1000, 32 * mel.hop, mel.sampling_rate)
    ours = griffin_lim(mel(audio), mel)
    assert ours.shape == audio.shape
    peak = torch.fft.rfft(ours[0]).abs().argmax() * mel.sampling_rate / ours.shape[-1]
    assert abs(peak.item() - 1000) < 40                          # within a mel band
    assert 20 * abs(math.log10(ours.std() / audio.std())) < 2    # dB


def test_griffin_lim_brings_the_log_mel_back():
    mel = LogMel(**MEL_16K)
    time = torch.arange(32768) / 16000
    audio = sum(torch.sin(2 * math.pi * 220 * k * time) / k for k in range(1, 9)) * 0.2 * torch.exp(-4 * (time % 0.5))
    log_mel = mel(audio[None])
    errors = [log_mel_error(log_mel, mel(griffin_lim(log_mel, mel, iterations=n))).item() for n in (0, 16)]
    assert errors[1] < 3.5 and errors[1] < 0.7 * errors[0]


def test_silence_stays_silence():
    mel = LogMel(**MEL_16K)
    assert griffin_lim(mel(torch.zeros(1, 8192)), mel).abs().max() == 0
    audio = torch.cat([tone(500, 8192), torch.zeros(1, 16384)], dim=1)
    assert griffin_lim(mel(audio), mel)[:, 12288:].abs().max() < 1e-4


def test_same_spectrogram_same_audio_alone_and_in_a_batch():
    mel = LogMel(**MEL_16K)
    log_mel = mel(torch.cat([tone(300), tone(900), tone(2000)]))
    before = torch.get_rng_state()
    together = griffin_lim(log_mel, mel)
    assert torch.equal(before, torch.get_rng_state())            # the global generator is left alone
    assert torch.equal(together, griffin_lim(log_mel, mel))
    assert relative_error(griffin_lim(log_mel[1:2], mel), together[1:2]) < 1e-5
