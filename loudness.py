"""Loudness of audio by ITU-R BS.1770, and bringing it to a target under a ceiling (second paper, III-E b).

    audio, gain, reached = normalise(audio, 44100, target=-16.5, ceiling=-1.0)     # LUFS, dB of true peak

The meter is pyloudnorm, an extra (requirements-extra.txt); the paper names the recommendation, its code this package.
That code turns all to mono and, where the SAMPLE peak passes 0.99, scales it to 0.95. We follow the paper: a true peak
(between the samples) of at most -1 dB, and as many channels as there are.
"""
import math

import numpy as np

from audio import resample
from common import UserError

BLOCK = 0.4             # seconds that the meter's gates average over: no clip is shorter to it
OVERSAMPLING = 4        # of the true peak, as BS.1770-4, annex 2


def need_pyloudnorm():
    """The package, or a UserError that says how to get it."""
    try:
        import pyloudnorm
    except ImportError:
        raise UserError("--lufs needs pyloudnorm, which is not installed: pip install pyloudnorm") from None
    return pyloudnorm


def loudness(audio, sampling_rate):
    """Audio (channels, samples) -> integrated loudness in LUFS; -inf for silence. Shorter clips than 0.4 s are
    repeated up to it."""
    meter = need_pyloudnorm().Meter(sampling_rate)
    shortest = math.ceil(BLOCK * sampling_rate) + 1
    samples = np.asarray(audio, dtype=np.float64).T                                    # (samples, channels)
    if len(samples) == 0:
        return -math.inf
    samples = np.tile(samples, (math.ceil(shortest / len(samples)), 1)) if len(samples) < shortest else samples
    with np.errstate(divide="ignore"):
        return float(meter.integrated_loudness(samples))


def true_peak(audio, sampling_rate):
    """Largest value of audio (channels, samples), tensor, between the samples as well: of itself oversampled."""
    between = resample(audio.float(), sampling_rate, OVERSAMPLING * sampling_rate)
    return max(audio.abs().max().item(), between.abs().max().item())


def normalise(audio, sampling_rate, target=-16.5, ceiling=-1.0):
    """Audio (channels, samples) -> (the same at `target` LUFS, gain, LUFS reached).

    The gain is less where a true peak would pass `ceiling` dB; silence stays as it is (reached: -inf).
    """
    before = loudness(audio, sampling_rate)
    if not math.isfinite(before):
        return audio, 1.0, before
    gain = min(10 ** ((target - before) / 20), 10 ** (ceiling / 20) / max(true_peak(audio, sampling_rate), 1e-9))
    return audio * gain, gain, before + 20 * math.log10(gain)
