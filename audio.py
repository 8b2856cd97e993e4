"""Audio files and waveforms: reading, resampling, cropping, writing, and a picture of them.

Waveforms are float32 tensors (channels, N) in [-1, 1], N samples long.

Where TangoFlux's paper and its code differ, the paper is followed: longer clips are cropped around their centre
(section 3.2; the official code takes the first 30 s: crop="start").
"""
import contextlib
import functools
import math
import wave
from pathlib import Path

import torch
import torch.nn.functional as F

from common import UserError, atomic_path, warn

# The resampling filter: a sinc of 2 x 64 zero crossings under a Kaiser window. With beta = 10 the stop band lies
# 100 dB down and the transition is 0.1 of the smaller Nyquist frequency wide: flat to 0.9, silent from 1.0 on.
ZERO_CROSSINGS, KAISER_BETA, CUTOFF = 64, 10.0, 0.95
PHASES_PER_BLOCK = 160  # a block is one convolution; all of 44.1 <-> 48 kHz fits one, odd rates take several
CROP_MARGIN = 0.1       # seconds read beyond a crop, so that the resampling filter sees no edge inside it


# ----------------------------------------------------------------------------- resampling

@functools.lru_cache(maxsize=64)
def sinc_kernels(up, down, first):
    """The kernels of outputs first, first+1, ... of each `up` outputs: offset and weights (phases, taps).

    Output m lies at input time m*down/up, so outputs m and m + up share a kernel and lie `down` inputs apart:
    a convolution of stride `down` with one output channel per phase makes them all.
    """
    rate = min(1.0, up / down) * CUTOFF                       # cut-off over the input's Nyquist frequency
    reach = ZERO_CROSSINGS * max(1.0, down / up)              # half the filter's length, in input samples
    times = torch.arange(first, min(first + PHASES_PER_BLOCK, up), dtype=torch.float64) * down / up
    offset = math.floor(times[0].item() - reach)
    taps = math.ceil(times[-1].item() + reach) - offset + 1
    distance = offset + torch.arange(taps, dtype=torch.float64) - times[:, None]          # (phases, taps)
    window = torch.special.i0(KAISER_BETA * (1 - (distance / reach) ** 2).clamp(min=0).sqrt())
    window = torch.where(distance.abs() <= reach, window, 0) / torch.special.i0(torch.tensor(KAISER_BETA))
    return offset, rate * torch.sinc(rate * distance) * window


def resample(audio, rate_in, rate_out):
    """Resample (..., N) to (..., ceil(N * rate_out / rate_in)) with a Kaiser-windowed sinc, rates in Hz.

    Flat to 0.9 of the smaller Nyquist frequency (error under -80 dB), no aliases; beyond the ends is silence.
    """
    common_rate = math.gcd(int(rate_in), int(rate_out))
    up, down = int(rate_out) // common_rate, int(rate_in) // common_rate
    if up == down:
        return audio
    length = -(-audio.shape[-1] * up // down)
    groups = -(-length // up)                                            # outputs come in groups of `up`
    signal = audio.reshape(-1, 1, audio.shape[-1])                       # (B, 1, N)
    phases = []
    for first in range(0, up, PHASES_PER_BLOCK):
        offset, weights = sinc_kernels(up, down, first)
        weights = weights.to(signal)[:, None]                            # (phases, 1, taps)
        needed = offset + (groups - 1) * down + weights.shape[-1]        # one past the last input that is used
        left, right = max(0, -offset), max(0, needed - signal.shape[-1])
        padded = F.pad(signal, (left, right))[..., offset + left:needed + left]
        phases.append(F.conv1d(padded, weights, stride=down))            # (B, phases, groups)
    output = torch.cat(phases, 1).transpose(1, 2)                        # (B, groups, up)
    return output.reshape(*audio.shape[:-1], groups * up)[..., :length]


# ----------------------------------------------------------------------------- files

@contextlib.contextmanager
def open_audio(path):
    """Yield `path` as an open soundfile.SoundFile; all that can be wrong with it becomes a UserError naming it."""
    import soundfile
    if not Path(path).is_file():
        raise UserError(f"audio file {path} is missing")
    try:
        with soundfile.SoundFile(path) as file:
            if file.frames <= 0:
                raise UserError(f"audio file {path} is empty; replace it or leave it out")
            yield file
    except (RuntimeError, OSError, TypeError) as error:  # TypeError: headerless formats such as .raw
        if Path(path).stat().st_size == 0:
            raise UserError(f"audio file {path} is empty; replace it or leave it out") from None
        raise UserError(f"audio file {path} cannot be decoded ({error}); replace it or leave it out") from None


def read_frames(path, file, frames):
    """The next `frames` of an open file, float32 (channels, N). UserError if none are there or not finite."""
    samples = torch.from_numpy(file.read(frames, dtype="float32", always_2d=True)).T.contiguous()
    if samples.shape[-1] == 0:
        raise UserError(f"audio file {path} is empty; replace it or leave it out")
    if not samples.isfinite().all():
        raise UserError(f"audio file {path} holds samples that are NaN or infinite; replace it or leave it out")
    return samples


def probe_audio(path, frames=4096):
    """Seconds of sound in a file, of which only both ends are decoded. Raises UserError if it is not usable."""
    with open_audio(path) as file:
        read_frames(path, file, frames)
        file.seek(max(0, file.frames - frames))
        read_frames(path, file, frames)
        return file.frames / file.samplerate


def read_audio(path, sampling_rate, channels, seconds=None, crop="center"):
    """Read a sound file (WAV, FLAC, OGG, MP3, ...) as float32 (channels, N) in [-1, 1] at `sampling_rate` Hz.

    A mono file is doubled for a stereo model; for a mono model channels are averaged; of surround sound a
    stereo model hears the front pair. With `seconds`, only that much (and a margin) of a longer file is read,
    around its centre or from its start: `fit_audio` then cuts it exactly. Raises UserError naming the file.
    """
    with open_audio(path) as file:
        rate, frames = file.samplerate, file.frames
        if seconds is not None:
            frames = min(frames, math.ceil((seconds + CROP_MARGIN) * rate))
        if crop == "center" and frames < file.frames:
            file.seek((file.frames - frames) // 2)
        audio = read_frames(path, file, frames)
    if channels == 1:
        audio = audio.mean(0, keepdim=True)                                      # (1, N)
    elif len(audio) == 1:
        audio = audio.repeat(channels, 1)                                        # (channels, N)
    if len(audio) < channels:
        raise UserError(f"audio file {path} has {len(audio)} channels, but {channels} are needed")
    return resample(audio[:channels], rate, sampling_rate).clamp(-1, 1)


def fit_audio(audio, samples, crop="center"):
    """(channels, N) -> (channels, samples): cropped ("center" as paper 3.2, or "start") or padded with silence."""
    start = max(audio.shape[-1] - samples, 0) // 2 if crop == "center" else 0
    audio = audio[..., start:start + samples]
    return F.pad(audio, (0, samples - audio.shape[-1]))


def write_wav(path, audio, sampling_rate):
    """Write (channels, N), or (N,) for mono, as 16-bit WAV, atomically; values beyond [-1, 1] are clipped.

    Uses the standard library, so that `sample.py` starts without loading soundfile. Raises UserError if samples
    are NaN or infinite, or the folder cannot be written.
    """
    audio = torch.atleast_2d(torch.as_tensor(audio).detach().cpu().float())      # (channels, N)
    if not audio.isfinite().all():
        raise UserError(f"{path} is not written: the audio holds samples that are NaN or infinite")
    pcm = (audio.clamp(-1, 1) * 32767).round().to(torch.int16).T.contiguous()    # (N, channels)
    with atomic_path(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(audio.shape[0])
        file.setsampwidth(2)
        file.setframerate(int(sampling_rate))
        file.writeframes(pcm.numpy().astype("<i2").tobytes())


# ----------------------------------------------------------------------------- picture

def mel_picture(audio, sampling_rate, edges):
    """float64 (N,) -> dB below its peak (bands, frames): the power between successive `edges` in Hz.

    The power is summed up over frequency and read off at the edges, so bands may be narrower than an FFT bin.
    """
    n_fft = 2 ** round(math.log2(sampling_rate * 0.06))
    spectrum = torch.stft(F.pad(audio, (0, max(0, n_fft - len(audio)))), n_fft, n_fft // 8,
                          window=torch.hann_window(n_fft).to(audio), return_complex=True, pad_mode="constant")
    total = F.pad(spectrum.abs().square().cumsum(0), (0, 0, 1, 0))               # (n_fft/2 + 2, frames)
    position = (edges / sampling_rate * n_fft).clamp(max=n_fft // 2)
    below = position.long()
    at_edges = torch.lerp(total[below], total[below + 1], (position - below)[:, None])
    power = at_edges.diff(dim=0).clamp(min=0) / edges.diff()[:, None]            # (bands, frames)
    return 10 * (power / power.max().clamp(min=1e-12)).clamp(min=1e-9).log10()


def save_spectrogram(path, audios, titles, sampling_rate):
    """Write a PNG with one mel-scaled spectrogram per audio ((channels, N) or (N,)), under its title.

    Returns True, or False after one notice if matplotlib is not installed. Raises UserError if unwritable.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        warn(f"matplotlib is not installed, so {path} is skipped; `pip install matplotlib` draws it")
        return False
    import textwrap
    import warnings
    nyquist, bands = sampling_rate / 2, 160
    top = 2595 * math.log10(1 + nyquist / 700)                                   # mel (O'Shaughnessy)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 1, dtype=torch.float64) / 2595) - 1)
    ticks = [tick for tick in (100, 500, 1000, 2000, 4000, 8000, 16000) if tick <= nyquist]
    columns = min(2, len(audios))
    rows = -(-len(audios) // columns)
    figure = Figure(figsize=(6.4 * columns, 2.3 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, audio, title in zip(axes, audios, titles):
        audio = torch.atleast_2d(torch.as_tensor(audio).detach().cpu().double()).mean(0)
        image = axis.imshow(mel_picture(audio, sampling_rate, edges).numpy(), origin="lower", aspect="auto",
                            cmap="magma", vmin=-80, vmax=0, extent=(0, len(audio) / sampling_rate, 0, top))
        axis.set_yticks([2595 * math.log10(1 + tick / 700) for tick in ticks],
                        [f"{tick / 1000:g}" for tick in ticks])
        axis.set_title("\n".join(textwrap.wrap(str(title), 60)[:2]), fontsize=10, parse_math=False)
    for axis in axes[len(audios):]:
        axis.set_axis_off()
    figure.supxlabel("seconds", fontsize=9)
    figure.supylabel("kHz", fontsize=9)
    figure.colorbar(image, ax=axes.tolist(), label="dB below peak", fraction=0.02)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # titles in scripts that the font lacks
        figure.savefig(temporary, dpi=110, format="png")
    return True
