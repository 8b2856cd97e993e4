"""Loudness of audio by ITU-R BS.1770, and bringing it to a target under a ceiling (second paper, III-E b).

    python loudness.py out/0000_a-violin-followed-by-rain.wav --out levelled       # files, after Demucs
    python sample.py --lufs -16.5 --prompt "rain"                                  # what sample.py makes

    audio, gain, reached = normalise(audio, 44100, target=-16.5, ceiling=-1.0)     # LUFS, dB of true peak

The meter is pyloudnorm, an extra (requirements-extra.txt); the paper names the recommendation, its code this package.
That code turns all to mono and, where the SAMPLE peak passes 0.99, scales it to 0.95. We follow the paper: a true peak
(between the samples) of at most -1 dB, and as many channels as there are.
"""
import argparse
import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from audio import open_audio, read_audio, resample, write_wav
from common import UserError, check_writable, in_range, parse_arguments, run_main

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


# ----------------------------------------------------------------------------- command line

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="sound files")
    parser.add_argument("--lufs", type=float, default=-16.5, help="target (default: -16.5; second paper: -16.5)")
    parser.add_argument("--true_peak", type=float, default=-1.0, metavar="DB",
                        help="ceiling in dB (default: -1; second paper: -1)")
    parser.add_argument("--out", default="levelled", help="folder for WAVs of the same names (default: levelled)")
    args = parse_arguments(parser, argv)
    in_range("--lufs", args.lufs, -70, 0)
    in_range("--true_peak", args.true_peak, -60, 0)
    need_pyloudnorm()
    paths = [Path(args.out) / f"{Path(name).stem}.wav" for name in args.files]
    if len(set(paths)) < len(paths):
        raise UserError("two of the files have one name; level them into different --out folders")
    if any(path.exists() and path.samefile(name) for path, name in zip(paths, args.files) if Path(name).exists()):
        raise UserError(f"--out {args.out} is where the files are; choose another folder")
    check_writable(paths)
    for name, path in zip(tqdm(args.files, desc="loudness", delay=2), paths):
        with open_audio(name) as file:
            rate, channels = file.samplerate, file.channels
        audio, gain, reached = normalise(read_audio(name, rate, min(channels, 2)), rate, args.lufs, args.true_peak)
        write_wav(path, audio, rate)
        limited = "" if abs(reached - args.lufs) <= 0.1 else "; its peaks or silence allow no more"
        print(f"wrote {path}: {reached:.1f} LUFS (gain {20 * math.log10(gain):+.1f} dB){limited}")
    print("next: listen to it; python sample.py --lufs -16.5 does the same to what it makes")


if __name__ == "__main__":
    run_main(main)
