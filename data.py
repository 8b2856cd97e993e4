"""Captioned audio: preview the built-in world, or read your own through a manifest.

    python data.py                                     # 8 scenes of the world: WAVs, captions.jsonl, a picture
    python data.py --split test --pairs unseen         # what the test prompts sound like
    python data.py --degraded 1 --out preview_damaged  # every scene with noise, clipping, ... of known strength
    python data.py --data sounds/captions.jsonl        # what a model would hear of your own recordings

A manifest is a .jsonl, .json or .csv file, a clip a row, with these columns (others through the --..._key flags):

    audio     path of the sound file, relative to the manifest or to --audio_dir; or TangoFlux's `location`
    caption   what is heard; or TangoFlux's `captions`; of a list of captions the first one is taken
    duration  optional, seconds of sound; never more than the file holds. Without it the file's own length counts
    score     optional, a number such as an aesthetic score, used as it is

An AudioCaps-style table (audiocap_id, youtube_id, start_time, caption) has no paths: its files are looked for by
name, below --audio_dir. Longer clips are cropped around their centre and shorter ones padded with silence
(TangoFlux, section 3.2; the official code takes the start: --crop start).
"""
import argparse
import csv
import dataclasses
import json
import math
import os
from pathlib import Path

from tqdm import tqdm

from audio import fit_audio, probe_audio, read_audio, save_spectrogram, write_wav
from common import (UserError, atomic_path, derive_seed, in_range, parse_arguments, read_json, read_jsonl, run_main,
                    warn)

KNOWN_COLUMNS = {"audio": ("audio", "location"), "caption": ("caption", "captions"),
                 "duration": ("duration",), "score": ("score",)}
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
NAMED_AT_MOST = 20  # bad files named one by one; beyond that they are only counted


# ----------------------------------------------------------------------------- manifests

def add_data_flags(parser):
    """The flags of every script that takes a manifest; `manifest_rows(args)` reads what they say."""
    group = parser.add_argument_group("your own audio")
    group.add_argument("--data", metavar="FILE", help=".jsonl, .json or .csv manifest (default: none)")
    group.add_argument("--audio_dir", metavar="FOLDER", help="where its files are (default: beside the manifest)")
    group.add_argument("--audio_key", help="column of the file's path (default: audio or location)")
    group.add_argument("--caption_key", help="column of the caption (default: caption or captions)")
    group.add_argument("--duration_key", help="column of the seconds of sound (default: duration, if there)")
    group.add_argument("--score_key", help="column of the score (default: score, if there)")
    group.add_argument("--crop", choices=["center", "start"], default="center",
                       help="which part of longer clips is heard (default: center, as paper 3.2; "
                            "the official code: start)")


def check_data_flags(args, parser, manifest=(), world=()):
    """Raise UserError for a flag that describes a manifest where none is given, or the world where one is.

    `manifest`, `world`: names of such flags besides those of `add_data_flags`.
    """
    keys = ("audio_dir", "audio_key", "caption_key", "duration_key", "score_key", "crop")
    useless, why = (world, "with --data") if args.data else ((*keys, *manifest), "without --data")
    given = [f"--{name}" for name in useless if getattr(args, name) != parser.get_default(name)]
    if "--score_column" in given:           # it is what sets the other one
        given.remove("--score_key")
    if given:
        raise UserError(f"{' and '.join(given)} would have no effect {why}; leave one or the other out")


def manifest_rows(args):
    """The usable rows of the manifest that `add_data_flags` asked for."""
    return usable_rows(read_manifest(args.data, args.caption_key, args.audio_key, args.duration_key,
                                     args.score_key, args.audio_dir))


def read_table(path):
    """The rows of a .jsonl, .json (a list, or TangoFlux's object per line) or .csv file as dicts, row 1 first."""
    path = Path(path)
    if not os.path.isfile(path):            # False, too, for a name that no file can have
        raise UserError(f"manifest {path} is missing; pass the path of a .jsonl, .json or .csv file")
    if path.suffix.lower() not in (".jsonl", ".json", ".csv"):
        raise UserError(f"manifest {path} must end in .jsonl, .json or .csv")
    try:
        if path.suffix.lower() == ".csv":
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.DictReader(file))
        else:
            with open(path, encoding="utf-8") as file:
                is_list = file.read(4096).lstrip().startswith("[")
            rows = read_json(path) if is_list else read_jsonl(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"manifest {path} is not readable: {error}") from None
    if not rows:
        raise UserError(f"manifest {path} holds no rows; write one JSON object, or CSV line, per clip")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"manifest {path} row {number} is not an object with an audio path and a caption")
        if None in row:  # csv.DictReader's mark for fields beyond the header
            raise UserError(f"manifest {path} row {number} is longer than the header; quote captions with commas")
    return rows


def find_column(path, rows, what, asked, required):
    """The name of the column that holds `what`, or None if there is none and it is not required."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    found = next((key for key in ([asked] if asked else KNOWN_COLUMNS[what]) if key in columns), None)
    if found is None and (required or asked):
        raise UserError(f"manifest {path} has no column {asked or ' or '.join(KNOWN_COLUMNS[what])}; "
                        f"name one of {', '.join(columns)} with --{what}_key")
    return found


def read_text(value, what, where):
    """A non-empty string; of a list (some sets give several captions) the first one."""
    if isinstance(value, list):
        value = next((text for text in value if text), None)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} has no {what}")
    return value.strip()


def read_number(value, what, where, positive):
    """A float, or None for an empty cell. Raises UserError if it is no number, or not `positive` where asked."""
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (positive and number <= 0):
        wanted = "a positive number of seconds" if positive else "a number"
        raise UserError(f"{where}: {what} is {value!r}, but must be {wanted} (or empty)")
    return number


def audiocaps_paths(path, rows, folder):
    """The audio path of each row of an AudioCaps-style table, looked for below `folder` by the usual file names.

    Rows whose video could not be had get the path that would be theirs, so that they are named as missing later.
    """
    files = {}
    for parent, _, names in os.walk(folder):
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SOUND_SUFFIXES:
                files.setdefault(stem, os.path.join(parent, name))
    paths, found = [], 0
    for row in rows:
        video, start, clip = (str(row.get(key) or "") for key in ("youtube_id", "start_time", "audiocap_id"))
        stems = [f"{video}_{start}", video, f"Y{video}", clip] if video else [clip]  # Y: AudioSet's way
        stem = next((stem for stem in stems if stem in files), None)
        found += stem is not None
        paths.append(files.get(stem, os.path.join(folder, f"{video or clip}.wav")))
    if not found:
        raise UserError(f"no sound file named by a youtube_id or audiocap_id of {path} lies below {folder}; "
                        f"name their folder with --audio_dir")
    return paths


def read_manifest(path, caption_key=None, audio_key=None, duration_key=None, score_key=None, audio_dir=None):
    """Rows {"audio": absolute path, "caption": str, "duration": seconds or None, "score": float or None}.

    Relative paths belong to `audio_dir`, or to the manifest's folder; as in the official code they may also be
    relative to the working folder. Sound files are not opened here (see `usable_rows`). Raises UserError.
    """
    table = read_table(path)
    folder = os.path.abspath(audio_dir or Path(path).parent)
    if not os.path.isdir(folder):
        raise UserError(f"--audio_dir {audio_dir} is not a folder")
    by_id = not audio_key and any(key in table[0] for key in ("youtube_id", "audiocap_id"))
    by_id = by_id and not any(key in table[0] for key in KNOWN_COLUMNS["audio"])
    audio_key = None if by_id else find_column(path, table, "audio", audio_key, True)
    caption_key = find_column(path, table, "caption", caption_key, True)
    duration_key = find_column(path, table, "duration", duration_key, False)
    score_key = find_column(path, table, "score", score_key, False)
    by_id = audiocaps_paths(path, table, folder) if by_id else None
    rows = []
    for number, row in enumerate(table, 1):
        where = f"manifest {path} row {number}"
        audio = by_id[number - 1] if by_id else read_text(row.get(audio_key), "audio path", where)
        placed = os.path.join(folder, audio)
        if not os.path.exists(placed) and os.path.exists(audio):
            placed = os.path.abspath(audio)
        rows.append({"audio": os.path.normpath(placed),
                     "caption": read_text(row.get(caption_key), "caption", f"{where} ({os.path.basename(audio)})"),
                     "duration": read_number(row.get(duration_key), "duration", where, True),
                     "score": read_number(row.get(score_key), "score", where, False)})
    return rows


def usable_rows(rows):
    """The rows whose sound files open and start and end with sound samples; the others are named and counted.

    Each file is probed once, at both ends only. Raises UserError if no row is left.
    """
    reasons = {}
    for audio in tqdm(dict.fromkeys(row["audio"] for row in rows), "checking sound files", delay=2, disable=None):
        try:
            probe_audio(audio)
        except UserError as error:
            reasons[audio] = str(error)
    good = [row for row in rows if row["audio"] not in reasons]
    for reason in list(reasons.values())[:NAMED_AT_MOST]:
        warn(f"{reason}; skipped")
    if reasons and not good:
        raise UserError(f"none of the {len(rows)} rows has a usable sound file: {next(iter(reasons.values()))}")
    if reasons:
        unnamed = len(reasons) - NAMED_AT_MOST
        warn(f"{len(rows) - len(good)} of {len(rows)} rows skipped, with {len(reasons)} bad sound files"
             + (f" ({unnamed} of them not named)" if unnamed > 0 else ""))
    return good


def split_rows(rows, validation_fraction, seed=0):
    """Split into (training, validation) by a hash of the audio path below the rows' common folder and the seed.

    So all captions of a file fall on one side, and the split survives moving the folder and reordering the rows.
    Each side gets at least one file if there are two and 0 < validation_fraction < 1.
    """
    in_range("--validation_fraction", validation_fraction, 0, 1)
    folder = os.path.commonpath([os.path.dirname(row["audio"]) for row in rows])
    place = {row["audio"]: derive_seed(seed, os.path.relpath(row["audio"], folder)) / 2 ** 63 for row in rows}
    ranked = sorted(place, key=place.get)
    held_out = sum(value < validation_fraction for value in place.values())
    if 0 < validation_fraction < 1:
        held_out = min(max(held_out, 1), len(ranked) - 1)
    validation = set(ranked[:held_out])
    return ([row for row in rows if row["audio"] not in validation],
            [row for row in rows if row["audio"] in validation])


def load_clip(row, sampling_rate, channels, samples, crop="center"):
    """A row as a model hears it: audio (channels, samples), cropped or padded, and its seconds of sound.

    The seconds are the file's own or, if less, the row's `duration`, and at most samples / sampling_rate.
    Raises UserError naming the file.
    """
    audio = read_audio(row["audio"], sampling_rate, channels, samples / sampling_rate, crop)  # (channels, N)
    duration = min(audio.shape[-1], samples) / sampling_rate
    if row.get("duration") is not None:
        duration = min(duration, row["duration"])
    return fit_audio(audio, samples, crop), duration                                          # (channels, samples)


# ----------------------------------------------------------------------------- preview

def preview_world(args):
    """Yield (row with the scene's truth, audio (1, N), sampling rate) for the first scenes of a split."""
    import world
    scenes = world.World(args.split, args.seed, args.pairs, args.degraded)
    for index in range(args.count):
        audio, scene = scenes.render(index)
        truth = dataclasses.asdict(scene)
        yield {"caption": truth.pop("prompt"), **truth}, audio[None], world.SAMPLE_RATE


def preview_manifest(args):
    """Yield (row, audio (channels, samples), sampling rate) of a manifest's first rows, as a model hears them."""
    rows = manifest_rows(args)
    print(f"{args.data}: {len(rows)} usable rows")
    for row in rows[:args.count]:
        audio, duration = load_clip(row, args.sampling_rate, args.channels,
                                    round(args.max_duration * args.sampling_rate), args.crop)
        yield {"caption": row["caption"], "duration": round(duration, 3), "score": row["score"],
               "source": row["audio"]}, audio, args.sampling_rate


def parse_args():
    """The flags of this script, their ranges checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8, help="how many scenes or clips (default: 8)")
    parser.add_argument("--out", default="preview", help="folder to write to (default: preview)")
    group = parser.add_argument_group("the built-in world")
    group.add_argument("--split", choices=["train", "val", "test"], default="train",
                       help="which recorded clips and random stream (default: train)")
    group.add_argument("--pairs", choices=["seen", "unseen", "all"], default="seen",
                       help="event pairs that training sees, or never sees (default: seen)")
    group.add_argument("--degraded", type=float, default=0.0, metavar="SHARE",
                       help="share of scenes with noise, clipping, band limit, ... from 0 to 1 (default: 0)")
    group.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    add_data_flags(parser)
    group = parser.add_argument_group("how a model would hear your own audio")
    group.add_argument("--sampling_rate", type=int, default=16000, help="Hz (default: 16000; paper: 44100)")
    group.add_argument("--channels", type=int, choices=[1, 2], default=1, help="default: 1; paper: 2")
    group.add_argument("--max_duration", type=float, default=4.096, help="seconds (default: 4.096; paper: 30)")
    args = parse_arguments(parser)
    in_range("--count", args.count, 1, 10000)
    in_range("--degraded", args.degraded, 0, 1)
    in_range("--sampling_rate", args.sampling_rate, 1000, 384000)
    in_range("--max_duration", args.max_duration, 0.1, 600)
    check_data_flags(args, parser, ("sampling_rate", "channels", "max_duration"),
                     ("split", "pairs", "degraded", "seed"))
    return args


def main():
    args = parse_args()
    out = Path(args.out)
    rows, pictured = [], []
    clips = preview_manifest(args) if args.data else preview_world(args)
    for number, (row, audio, rate) in enumerate(clips):
        name = f"{number:04d}.wav"
        write_wav(out / name, audio, rate)
        rows.append({"audio": name, **row})
        if number < 16:  # more panels than that are too small to read
            pictured.append((audio, row["caption"]))
        print(f"{out / name}  {row['duration']:.2f} s  {row['caption']}")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_path(out / "captions.jsonl") as temporary:
        temporary.write_text(lines, encoding="utf-8")
    drawn = save_spectrogram(out / "spectrograms.png", *zip(*pictured), rate)
    print(f"wrote {len(rows)} WAV files and captions.jsonl{' and spectrograms.png' * drawn} to {out}")
    print(f"next: `python train_fm.py --data {args.data}` trains on these recordings" if args.data else
          "next: `python sample.py --prompt \"a violin followed by rain\"` makes such a scene from text")


if __name__ == "__main__":
    run_main(main)
