"""Waveform <-> log-mel: the mel front end of the second paper's codec, and Griffin-Lim for the way back.

    mel = LogMel(**MEL_16K)
    log_mel = mel(audio)                         # (B, samples) -> (B, M, F)
    audio = griffin_lim(log_mel, mel)            # (B, M, F) -> (B, F * hop)

The way back is two steps: a magnitude spectrogram that explains the mel bands (non-negative, multiplicative
steps), then the phase (fast Griffin-Lim). It learns nothing, so it neither invents nor forgets sounds.

Letters: B batch, M mel bands, K frequency bins (n_fft / 2 + 1), F mel frames.
"""
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from common import side_by_side

# Parameters of the two mel codecs behind FluxAudio (MMAudio's mel converter). The toy uses the first.
MEL_16K = dict(sampling_rate=16000, n_fft=1024, num_mels=80, hop_size=256, win_size=1024, fmin=0, fmax=8000,
               log="log10")
MEL_44K = dict(sampling_rate=44100, n_fft=2048, num_mels=128, hop_size=512, win_size=2048, fmin=0, fmax=22050.0,
               log="natural log")

FLOOR = 1e-5                      # mel magnitudes below this are stored as this: -100 dB, silence


# ----------------------------------------------------------------------------- the mel scale

def hz_to_mel(hz):
    """Slaney's scale (Auditory Toolbox): linear below 1 kHz, 3 mel per 200 Hz; above, 27 mel per factor 6.4."""
    hz = np.asarray(hz, dtype=np.float64)
    return np.where(hz < 1000, hz * 3 / 200, 15 + np.log(np.maximum(hz, 1e-9) / 1000) * 27 / math.log(6.4))


def mel_to_hz(mel):
    """Inverse of `hz_to_mel`."""
    mel = np.asarray(mel, dtype=np.float64)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * math.log(6.4) / 27))


def mel_filters(sampling_rate, n_fft, num_mels, fmin, fmax):
    """Triangular mel filters (M, K), each of unit area in Hz (Slaney's norm, librosa.filters.mel's default)."""
    bins = np.arange(n_fft // 2 + 1) * sampling_rate / n_fft
    edges = mel_to_hz(np.linspace(hz_to_mel(fmin), hz_to_mel(fmax), num_mels + 2))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    triangles = np.maximum(0, np.minimum(rising, falling))
    return torch.from_numpy((triangles * 2 / (high - low)).astype(np.float32))


class LogMel(nn.Module):
    """Log-mel spectrogram as MMAudio's mel converter computes it (`get_mel_converter`), MEL_16K or MEL_44K.

    It has no weights: window and filters are buffers outside the state_dict.
    """

    def __init__(self, sampling_rate, n_fft, num_mels, hop_size, win_size, fmin, fmax, log):
        super().__init__()
        self.sampling_rate, self.n_fft, self.num_mels, self.hop = sampling_rate, n_fft, num_mels, hop_size
        self.natural = log != "log10"
        window = torch.hann_window(win_size, periodic=True)
        window = F.pad(window, [(n_fft - win_size) // 2] * 2)
        self.register_buffer("window", window, persistent=False)                        # (n_fft,)
        filters = mel_filters(sampling_rate, n_fft, num_mels, fmin, fmax)
        self.register_buffer("filters", filters, persistent=False)                      # (M, K)

    def forward(self, audio):
        """(B, samples) in [-1, 1] -> (B, M, F) with F = samples / hop; audio beyond [-1, 1] is clipped."""
        padding = (self.n_fft - self.hop) // 2
        audio = F.pad(audio.float().clamp(-1, 1)[:, None], (padding, padding), mode="reflect")[:, 0]
        spectrum = torch.fft.rfft(audio.unfold(-1, self.n_fft, self.hop) * self.window)  # (B, F, K)
        magnitude = (spectrum.real ** 2 + spectrum.imag ** 2 + 1e-9).sqrt()
        mel = (magnitude @ self.filters.T).clamp(min=FLOOR).transpose(1, 2)             # (B, M, F)
        return mel.log() if self.natural else mel.log10()

    def to_magnitude(self, log_mel):
        """The log undone, (B, M, F) -> (B, M, F); what lies on the floor is zero: silence stays silence."""
        magnitude = log_mel.exp() if self.natural else 10 ** log_mel
        return torch.where(magnitude > FLOOR * 1.01, magnitude, torch.zeros_like(magnitude))


def log_mel_error(reference, other, natural=False, reach=60.0):
    """Mean absolute difference of two log-mels (B, M, F) in dB, per clip (B,), over frames that can be heard.

    Those are the frames of `reference` whose loudest band lies within `reach` dB of the clip's peak.
    """
    decibel = 20 / math.log(10) if natural else 20.0
    level = reference.amax(1) * decibel                                                 # (B, F)
    heard = (level >= level.amax(1, keepdim=True) - reach).float()
    error = (reference - other).abs().mean(1) * decibel                                 # (B, F)
    return (error * heard).sum(1) / heard.sum(1)


# ----------------------------------------------------------------------------- and back

def fit_to_mel(magnitude, target, mel):
    """One multiplicative step of a magnitude spectrogram (B, F, K) >= 0 towards mel bands `target` (B, F, M).

    The step is that for the Kullback-Leibler divergence (Lee and Seung 2001, equation 5), which weighs
    quiet bands by their relative error, as the ear does. A band of zero makes its bins zero at once.
    """
    share = mel.filters / mel.filters.sum(0).clamp(min=1e-9)                            # (M, K)
    ratio = (target / (magnitude @ mel.filters.T + 1e-9)).clamp(max=100)                # (B, F, M)
    return magnitude * (ratio @ share)


def invert_mel(log_mel, mel, steps=10):
    """Magnitude spectrogram (B, F, K) >= 0 whose mel bands are near those of `log_mel` (B, M, F).

    The start is the filters' own smooth interpolation of the bands.
    """
    target = mel.to_magnitude(log_mel.float()).transpose(1, 2)                          # (B, F, M)
    share = mel.filters / mel.filters.sum(0).clamp(min=1e-9)                            # (M, K)
    magnitude = (target / mel.filters.sum(1).clamp(min=1e-9)) @ share                   # (B, F, K)
    for _ in range(steps):
        magnitude = fit_to_mel(magnitude, target, mel)
    return magnitude


def overlap_add(frames, hop):
    """Sum frames (B, F, n_fft) at distance `hop` -> (B, (F - 1) * hop + n_fft); n_fft is a multiple of hop."""
    batch, count, length = frames.shape
    parts = length // hop
    frames = frames.view(batch, count, parts, hop)
    audio = frames.new_zeros(batch, count + parts - 1, hop)
    for part in range(parts):
        audio[:, part:part + count] += frames[:, :, part]
    return audio.flatten(1)


def griffin_lim(log_mel, mel, iterations=24, mel_steps=10, momentum=0.99):
    """Audio (B, F * hop) for a log-mel spectrogram (B, M, F), by fast Griffin-Lim (Perraudin et al. 2013).

    The mel bands fix the magnitudes only in sum, so from the fifth iteration on the magnitudes give way as
    well: half towards those of the audio (geometric mean), then one step back to the bands. At equal
    iterations this takes a third off the median log-mel error and leaves the linear spectrogram as near to
    the truth as it was.

    The first phase is noise from a fixed generator, the same for every row: the same spectrogram always
    gives the same audio, alone or in a batch. On a CPU each row is a piece of its own, whose spectrum just fits the
    cache of a core.
    """
    frames = log_mel.shape[-1]
    phase = torch.rand(frames, mel.n_fft // 2 + 1, generator=torch.Generator().manual_seed(0)).to(log_mel.device)
    phase = torch.polar(torch.ones_like(phase), 2 * math.pi * phase)                    # (F, K)
    overlap = overlap_add((mel.window ** 2).expand(1, frames, -1), mel.hop).clamp(min=1e-3)  # (1, padded)
    chunks = log_mel.split(1 if log_mel.device.type == "cpu" else 64)
    return torch.cat(side_by_side(lambda chunk: _find_phase(chunk.float(), mel, phase, overlap, iterations, mel_steps,
                                                            momentum), chunks, log_mel.device))


@torch.no_grad()
def _find_phase(log_mel, mel, phase, overlap, iterations, mel_steps, momentum):
    """One chunk of `griffin_lim`: log-mel (B, M, F), first phase (F, K) -> audio (B, F * hop)."""
    def to_audio(spectrum):
        return overlap_add(torch.fft.irfft(spectrum, n=mel.n_fft) * mel.window, mel.hop) / overlap  # (B, padded)

    target = mel.to_magnitude(log_mel).transpose(1, 2)                                  # (B, F, M)
    start = magnitude = invert_mel(log_mel, mel, mel_steps)                             # (B, F, K)
    previous = 0
    for iteration in range(iterations):
        audio = to_audio(magnitude * phase)
        rebuilt = torch.fft.rfft(audio.unfold(-1, mel.n_fft, mel.hop) * mel.window)     # (B, F, K)
        # c_n = t_n + momentum (t_n - t_{n-1}), of which only the phase is kept
        ahead = rebuilt - (momentum / (1 + momentum)) * previous
        phase = ahead / (ahead.abs() + 1e-16)
        if iteration >= 4:
            magnitude = fit_to_mel((magnitude * (rebuilt.abs() + 1e-3 * start)).sqrt(), target, mel)
        previous = rebuilt
    padding = (mel.n_fft - mel.hop) // 2
    audio = to_audio(magnitude * phase)[:, padding:padding + log_mel.shape[-1] * mel.hop]
    return audio.clamp(-1, 1)
