"""Audio: files, resampling, loudness, a picture, and what CLAP hears of it.

    python -m lib.audio out/0000_rain.wav --lufs -16.5 --out levelled       # files, after Demucs
    audio, gain, reached = normalise_loudness(audio, 44100, -16.5, -1.0)    # LUFS, dB of true peak

Waveforms are float32 tensors (channels, N) in [-1, 1], N samples long; rates are in Hz.
B clips, F mel frames, M mel bands, K frequency bins.
Where papers and official code differ, we follow the papers: longer clips are cropped around their
centre (TangoFlux 3.2; the code: crop="start"); loudness is BS.1770 of all channels, TRUE peak at
most -1 dB (second paper, III-E b; the code makes mono and scales a SAMPLE peak over 0.99 to 0.95).
"""
import contextlib
import functools
import html
import itertools
import json
import os
import re
import textwrap
import warnings
import wave
from math import ceil, floor, gcd, inf, log2, log10
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool1d, conv1d, interpolate, max_pool1d, pad
from tqdm import tqdm

from lib.common import (UserError, atomic_path, check_writable, flag, generator, need, parse_flags,
                        picture, reading, run_main, warn, write_text)

FLAGS = {"loudness": [
    flag("files", None, "sound files", nargs="+"),
    flag("--lufs", -16.5, "target loudness in LUFS (second paper: -16.5)", -70, 0),
    flag("--true_peak", -1.0, "ceiling of the true peak in dB (second paper: -1)", -60, 0),
    flag("--out", "levelled", "folder for WAVs of the same names")]}

ZERO_CROSSINGS = 64     # of the resampling filter on each side, a sinc under a Kaiser window that
KAISER_BETA = 10.0      # lies 100 dB down from the smaller Nyquist frequency on
CUTOFF = 0.95
PHASES_PER_BLOCK = 160  # a block is one convolution; all of 44.1 <-> 48 kHz fits one
CROP_MARGIN = 0.1       # seconds read beyond a crop: the filter sees no edge inside it
SILENCE = 1e-3          # peak of a clip in which nothing is heard: -60 dB
silent_files = []       # those that `read_audio` met; `usable` names them


@functools.lru_cache(maxsize=64)
def sinc_kernels(up, down, first):
    """Kernels of outputs first, first+1, ... of each `up`: their first input, weights (phases, taps).
    Output m lies at input time m*down/up; outputs m and m + up share a kernel, `down` inputs on."""
    rate = min(1.0, up / down) * CUTOFF        # cut-off over the input's Nyquist frequency
    reach = ZERO_CROSSINGS * max(1.0, down / up)        # half the filter's length, in inputs
    phases = torch.arange(first, min(first + PHASES_PER_BLOCK, up)).double()
    times = phases * down / up
    start = floor(times[0].item() - reach)
    inputs = torch.arange(start, ceil(times[-1].item() + reach) + 1)        # (taps,)
    distance = inputs - times[:, None]                                      # (phases, taps)
    bell = (1 - (distance / reach) ** 2).clamp(min=0).sqrt()
    window = torch.special.i0(KAISER_BETA * bell) / float(np.i0(KAISER_BETA))
    window = torch.where(distance.abs() <= reach, window, 0)
    return start, rate * torch.sinc(rate * distance) * window


def resample(audio, rate_in, rate_out):
    """Resample (..., N) to (..., ceil(N * rate_out / rate_in)) with a Kaiser-windowed sinc.
    Flat to 0.9 of the smaller Nyquist frequency (error under -80 dB); silence beyond the ends."""
    shared = gcd(rate_in, rate_out)
    up = rate_out // shared
    down = rate_in // shared
    if up == down:
        return audio
    length = ceil(audio.shape[-1] * up / down)
    groups = ceil(length / up)        # outputs come in groups of `up`
    margin = ZERO_CROSSINGS * ceil(down / up)
    signal = audio.reshape(-1, 1, audio.shape[-1])              # (B, 1, N)
    signal = pad(signal, (margin, margin + down + 2))
    blocks = []
    for first in range(0, up, PHASES_PER_BLOCK):
        start, weights = sinc_kernels(up, down, first)
        weights = weights.to(signal)[:, None]                   # (phases, 1, taps)
        block = conv1d(signal[..., margin + start:], weights, stride=down)
        blocks.append(block[..., :groups])                      # (B, phases, groups)
    output = torch.cat(blocks, 1).mT.flatten(1)                 # (B, groups up)
    return output[:, :length].reshape(*audio.shape[:-1], length)


# ----------------------------------------------------------------------------- files

@contextlib.contextmanager
def open_audio(path):
    """Yield `path` as an open soundfile.SoundFile; what fails in the block is a UserError, too, and
    so are pipes, devices, rates beyond 1 to 768 kHz, frames that it cannot hold, a WAV cut off."""
    import soundfile
    if not os.path.isfile(path):
        raise UserError(f"audio file {path} is {'no file' if os.path.exists(path) else 'missing'}")
    with reading(path, "replace it or leave it out"), soundfile.SoundFile(path) as file:
        if not 1000 <= file.samplerate <= 768_000:
            raise ValueError(f"its header says {file.samplerate} Hz")
        if file.frames > 8192 * os.path.getsize(path):      # densest: digital silence in FLAC
            raise ValueError(f"its header promises {file.frames} frames, more than it can hold")
        cut = re.search(r"\bdata : (\d+) \(should be (\d+)\)", file.extra_info)     # WAV, RF64, CAF
        promised, there = map(int, cut.groups()) if cut else (0, 0)
        if there + 64 < 0.99 * promised < 2 ** 30:      # from 1 GB: a stream; 64: a header
            raise ValueError(f"it was cut off: {there} of {promised} bytes are there")
        yield file


def read_frames(file, frames):
    """The next `frames` of an open file, float32 (channels, N). ValueError: none, or not finite."""
    samples = file.read(frames, dtype="float32", always_2d=True)
    audio = torch.from_numpy(samples).T.contiguous()
    if audio.numel() == 0:
        raise ValueError("it is empty")
    if not audio.isfinite().all():
        raise ValueError("it holds NaN or infinity")
    return audio


def probe_audio(path):
    """Raise UserError if a sound file is not usable: both ends are decoded."""
    with open_audio(path) as file:
        read_frames(file, 4096)
        file.seek(max(0, file.frames - 4096))
        read_frames(file, 4096)


def usable(items, read, what):
    """Yield (item, read(item)) of the items that can be read. The others are named, 20 of them, and
    counted at the end, as are silent sounds. Raises UserError if none can be read."""
    good = 0
    errors = []
    try:
        for item in tqdm(items, f"reading {what}", delay=2, disable=None):
            try:
                result = read(item)
            except UserError as error:
                errors.append(str(error))
            else:
                good += 1
                yield item, result
    finally:
        for error in errors[:20] * bool(good):
            warn(f"skipped: {error}")
        if errors and good:
            warn(f"{len(errors)} of {len(items)} {what} skipped")
        if names := list(dict.fromkeys(silent_files)):
            silent_files.clear()
            shown = ", ".join(names[:20])
            warn(f"{len(names)} sounds are silent, or their channels cancel: {shown}")
    if not good:
        reason = errors[0] if errors else "there are none"
        raise UserError(f"the {len(errors)} {what} cannot be used: {reason}")


def read_audio(path, sampling_rate, channels, seconds=None, crop="center"):
    """Read a sound file (WAV, FLAC, OGG, MP3, ...) as float32 (channels, N) at `sampling_rate` Hz.
    Mono is doubled for stereo; mono hears the mean of the channels, stereo the front pair. seconds:
    only so much and a margin, which `fit_audio` cuts off. Raises UserError naming the file."""
    with open_audio(path) as file:
        rate = file.samplerate
        frames = file.frames
        if seconds is None:
            file.seek(max(0, frames - 1))       # before memory is taken for as many as it promises
            read_frames(file, 1)
            file.seek(0)
        else:
            frames = min(frames, ceil((seconds + CROP_MARGIN) * rate))
        if crop == "center":
            file.seek((file.frames - frames) // 2)
        audio = read_frames(file, frames)
    if channels == 1:
        audio = audio.mean(0, keepdim=True)                     # (1, N)
    audio = audio[:channels].expand(channels, -1)               # (channels, N)
    if audio.abs().max() < SILENCE:
        silent_files.append(str(path))
    return resample(audio, rate, sampling_rate).clamp(-1, 1)


def fit_audio(audio, samples, crop="center"):
    """(channels, N) -> (channels, samples): cropped ("center", "start") or padded with silence."""
    surplus = max(audio.shape[-1] - samples, 0)
    start = surplus // 2 if crop == "center" else 0
    audio = audio[..., start:start + samples]
    return pad(audio, (0, samples - audio.shape[-1]))


def as_mono(audios, rate_in, rate_out):
    """A list of (channels, samples) or (samples,) -> a list of (samples,) at `rate_out`."""
    if any(audio.numel() == 0 for audio in audios):
        raise UserError("a clip is empty: it has no score")
    mono = [audio.reshape(-1, audio.shape[-1]).mean(0) for audio in audios]
    return [resample(audio, rate_in, rate_out) for audio in mono]


def write_wav(path, audio, sampling_rate):
    """Write (channels, N), or (N,) for mono, as 16-bit WAV, clipped to [-1, 1]. Raises UserError.
    By the standard library: sample.py starts without soundfile."""
    audio = torch.atleast_2d(audio).float()                     # (channels, N)
    if not audio.isfinite().all():
        raise UserError(f"{path} is not written: the audio holds NaN or infinity")
    pcm = (audio.clamp(-1, 1) * 32767).round().T.numpy()        # (N, channels)
    with atomic_path(path) as temporary, wave.open(str(temporary), "wb") as file:
        file.setparams((len(audio), 2, sampling_rate, 0, "NONE", ""))
        file.writeframes(pcm.astype("<i2").tobytes())


# ----------------------------------------------------------------------------- loudness

def loudness(audio, sampling_rate):
    """(channels, N) -> LUFS; -inf for silence. Under 0.4 s, the meter's block: repeated."""
    need("pyloudnorm", "--lufs")
    from pyloudnorm import Meter
    blocks = (0.4 * sampling_rate + 1) / audio.shape[1]
    samples = np.tile(audio, ceil(blocks)).T.astype(float)      # (N, channels)
    with np.errstate(divide="ignore"):
        return float(Meter(sampling_rate).integrated_loudness(samples))


def true_peak(audio, sampling_rate):
    """Largest value of (channels, N), also between samples: 4 times oversampled (BS.1770-4)."""
    between = resample(audio.float(), sampling_rate, 4 * sampling_rate)
    both = torch.cat([audio, between], dim=1)
    return both.abs().max().item()


def normalise_loudness(audio, sampling_rate, target=-16.5, ceiling=-1.0):
    """(channels, N) -> (the same at `target` LUFS, gain, LUFS reached).
    The gain is less where a true peak would pass `ceiling` dB; silence stays (reached: -inf)."""
    before = loudness(audio, sampling_rate)
    if before == -inf:
        return audio, 1.0, before
    highest = 10 ** (ceiling / 20) / true_peak(audio, sampling_rate)
    gain = min(10 ** ((target - before) / 20), highest)
    return audio * gain, gain, before + 20 * log10(gain)


def limited(audio, sampling_rate, ceiling=0.98):
    """(channels, N); what passes full scale is turned down for 5 ms around each peak."""
    if audio.abs().max() <= 1:
        return audio
    reach = sampling_rate // 200
    peaks = max_pool1d(audio.abs().amax(0, keepdim=True), 2 * reach + 1, 1, reach)  # (1, N)
    gain = (ceiling / peaks).clamp(max=1)
    gain = pad(gain[None], (reach, reach), mode="replicate")        # (1, 1, N + 2 reach)
    return audio * avg_pool1d(gain, 2 * reach + 1, 1)[0]        # a mean of sufficient gains


def save_spectrogram(path, audios, titles, sampling_rate):
    """Write a PNG with a spectrogram per audio ((channels, N) or (N,)) under its title."""
    n_fft = 2 ** round(log2(sampling_rate * 0.06))
    rows = ceil(len(audios) / 2)
    with warnings.catch_warnings(), picture(path, 12.8, 2.3 * rows + 0.4) as axes:
        warnings.simplefilter("ignore")         # scripts that the font lacks, silence, short clips
        if axes is None:
            return
        figure = axes[0].figure
        figure.clear()
        figure.supxlabel("Hz over seconds; black: 80 dB below the peak", fontsize=9)
        for number, (audio, title) in enumerate(zip(audios, titles), 1):
            axis = figure.add_subplot(rows, min(2, len(audios)), number, facecolor="black")
            mono = torch.atleast_2d(audio).mean(0).numpy()
            power, _, _, image = axis.specgram(mono, n_fft, sampling_rate, cmap="magma",
                                               noverlap=n_fft * 7 // 8)
            peak = 10 * log10(power.max() + 1e-20)
            image.set_clim(peak - 80, peak)
            axis.set_yscale("symlog", linthresh=1000)           # nearly as the ear: mel
            lines = textwrap.wrap(title, 60)[:2]
            axis.set_title("\n".join(lines), fontsize=10, parse_math=False)


# ----------------------------------------------------------------------------- samples and pages

def output_paths(output, prompts):
    """One WAV path for each sample: `output` if it ends in .wav, else 0000_words.wav in it."""
    suffix = Path(output).suffix.lower()
    if suffix in (".mp3", ".flac", ".ogg", ".m4a", ".aac"):
        raise UserError(f"--output {output}: only WAV files are written")
    if suffix == ".wav":
        if len(prompts) > 1:
            raise UserError(f"--output {output} is one file, for {len(prompts)} samples")
        return [Path(output)]
    words = [re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") for prompt in prompts]
    return [Path(output, f"{i:04d}_{word or 'prompt'}.wav") for i, word in enumerate(words)]


def place_of(path, record):
    """(path, whether this very sample is there): path_2, path_3, ... where another one is.
    record: all that a sample depends on, which stands beside its WAV as JSON."""
    own = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()    # as write_json
    for number in itertools.count(1):
        place = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        about = place.with_suffix(".json")
        is_own = about.is_file() and about.read_bytes() == own
        if is_own and place.exists():
            print(f"{place} is there already, of the same settings and code")
            return place, True
        if not place.exists() and (is_own or not about.exists()):
            return place, False


def write_clips(out, column, clips, asked, rate):
    """Write the first eight clips (N, samples) as WAVs into out/listen -> their paths."""
    paths = [Path(out) / "listen" / f"{i:02d}_{column}.wav" for i in range(min(8, len(asked)))]
    for path, clip, each in zip(paths, clips, asked):
        write_wav(path, clip[None, :int(each.duration * rate)], rate)
    return paths


def listening_page(path, columns, prompts, blind=False, title="The same prompts side by side"):
    """Write the page `path`: a row for each prompt, a column for each {name: [paths of WAV files]}.
    blind: each row has an order of its own, and the names are behind a click."""
    names = ["?"] * len(columns) if blind else list(columns)
    lines = [f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1>",
             "<table border=1 cellpadding=6><tr><th>prompt"]
    lines += [f"<th>{html.escape(name)}" for name in names]
    for prompt, *paths in zip(prompts, *columns.values()):
        lines.append(f"<tr><td>{html.escape(prompt)}")
        players = list(zip(columns, paths))
        order = range(len(players))
        if blind:                               # an order that the prompt decides
            order = torch.randperm(len(players), generator=generator("blind", prompt)).tolist()
        for name, wav in (players[k] for k in order):
            source = html.escape(os.path.relpath(wav, Path(path).parent))
            lines.append(f'<td><audio controls src="{source}"></audio>')
            if blind:
                lines.append(f"<details><summary>which?</summary>{html.escape(name)}</details>")
    write_text(Path(path), "\n".join(lines))


# ----------------------------------------------------------------------------- CLAP's front end

class ClapMel(torch.nn.Module):
    """ClapFeatureExtractor in torch; the keywords are those of preprocessor_config.json.
    padding: "repeatpad" (repeated while it fits, then silence) or "pad". Clips longer than it hears
    are cut in the MIDDLE ("rand_trunc"), or become 4 mels, the whole shrunk and three chunks from
    the middle of its thirds ("fusion"); the originals cut at random: scores change each time."""

    def __init__(self, **settings):
        super().__init__()
        from transformers import ClapFeatureExtractor
        original = ClapFeatureExtractor(**settings)
        truncation, self.padding = original.truncation, original.padding
        if truncation not in ("fusion", "rand_trunc") or self.padding not in ("repeatpad", "pad"):
            raise UserError(f"preprocessor_config.json: truncation {truncation!r} with padding "
                            f"{self.padding!r} is unknown")
        self.sampling_rate = original.sampling_rate
        self.hop = original.hop_length
        self.samples = int(original.nb_max_samples)
        self.frames = self.samples // self.hop + 1
        self.fused = truncation == "fusion"
        filters = original.mel_filters if self.fused else original.mel_filters_slaney
        filters = torch.from_numpy(filters).float()                 # (K, M)
        window = torch.hann_window(original.fft_window_size)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", window, persistent=False)

    def log_mel(self, audio):
        """(B, samples) -> power in dB (B, F, M), frames centred on multiples of the hop."""
        # a quiet band beside a loud one is lost in float32; a device without float64 makes do
        exact = torch.float32 if audio.device.type == "mps" else torch.float64
        window = self.window.to(exact)
        spectrum = torch.stft(audio.to(exact), len(window), self.hop, window=window,
                              return_complex=True)                  # (B, K, F)
        power = spectrum.real ** 2 + spectrum.imag ** 2
        mel = power.mT @ self.filters.to(exact)                     # (B, F, M)
        return (10 * mel.clamp(min=1e-10).log10()).float()          # at least -100 dB

    def starts(self, count):
        """Where the three chunks begin: in the middle of each third of the places 0..count-1."""
        thirds = np.array_split(np.arange(count), 3)
        return [third[len(third) // 2] if len(third) else 0 for third in thirds]

    def clip_mel(self, audio):
        """A clip (samples,) -> mels (1 or 4, F, M); is it longer, in frames, than what is heard?"""
        longer = len(audio) > self.samples
        if self.padding == "repeatpad" and not longer:
            audio = audio.repeat(self.samples // len(audio))
        if not (self.fused and longer):
            audio = fit_audio(audio, self.samples)
        mel = self.log_mel(audio[None])                             # (1, F or more, M)
        if not self.fused:
            return mel, longer
        surplus = mel.shape[1] - self.frames
        if surplus == 0:
            return mel.expand(4, -1, -1), False
        size = (self.frames, mel.shape[2])
        whole = interpolate(mel[None], size, mode="bilinear")[0]    # (1, F, M)
        chunks = [mel[:, start:][:, :self.frames] for start in self.starts(surplus + 1)]
        return torch.cat([whole, *chunks]), True

    def forward(self, audios):
        """A list of (samples,) -> features (B, 1 or 4, F, M), is_longer (B, 1) bool."""
        device = self.window.device
        mels, longer = zip(*[self.clip_mel(audio.to(device)) for audio in audios])
        return torch.stack(mels), torch.tensor(longer, device=device)[:, None]


# ----------------------------------------------------------------------------- command line

def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    for name in args.files:
        path = Path(args.out, f"{Path(name).stem}.wav")
        if path.exists():
            raise UserError(f"{path} is there already; choose another --out")
        check_writable(path)
        with open_audio(name) as file:
            rate = file.samplerate
            audio = read_audio(name, rate, min(file.channels, 2))
        audio, gain, reached = normalise_loudness(audio, rate, args.lufs, args.true_peak)
        write_wav(path, audio, rate)
        print(f"wrote {path}: {reached:.1f} LUFS (gain {20 * log10(gain):+.1f} dB)")


if __name__ == "__main__":
    run_main(main)
