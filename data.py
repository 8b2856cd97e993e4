"""Captioned audio: preview the built-in world, read your own by a manifest, cache the latents.

    python data.py --split test --pairs unseen         # scenes of the test: WAVs, captions, picture
    python data.py --degraded 1 --out preview_damaged  # scenes with noise, clipping, ...
    python data.py --data sounds/captions.jsonl        # what the toy would hear of your recordings

A manifest is a .jsonl, .json or .csv file, a clip a row, with the columns (or TangoFlux's)
    audio (location)       path of the sound file, relative to the manifest or --audio_dir
    caption (captions)     what is heard; of a list the first one is taken
    duration, score        optional: seconds of sound, never more than the file has; any number
An AudioCaps table (audiocap_id, youtube_id, start_time, caption) has no paths: ids name its files.
Bad rows and bad sounds are named, counted and left out; if all are bad, that is an error.
Clips are cropped around their centre (TangoFlux 3.2; official: --crop start) or end in silence.

A cache holds the codec's raw posterior of each clip, so that each epoch draws its own sample:
mean.npy, std.npy, float16 (N, L, C); rows.jsonl, an object a clip; settings.json, what made them.
Letters: N clips, B batch, L latent frames, C latent channels, S text tokens, T text width.
"""
import filecmp
import hashlib
import math
import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from lib.audio import (SILENCE, fit_audio, probe_audio, read_audio, resample, save_spectrogram,
                       silent_files, usable, write_wav)
from lib.common import (UserError, append_jsonl, atomic_path, derive_seed, file_hash, flag, locked,
                        parse_flags, read_json, read_jsonl, reading, run_main, settings_key,
                        whole_blocks, write_json, write_jsonl)
from lib.text import read_table
from lib.weights import load_tensors, module_hash
from world.scenes import World, in_workers, render_clips
from world.sounds import CLIP_SAMPLES, SAMPLE_RATE

DATA_FLAGS = [
    flag("--data", None, ".jsonl, .json or .csv manifest"),
    flag("--audio_dir", None, "folder of its sound files; none: the manifest's"),
    flag("--audio_key", None, "column of the path; none: audio or location"),
    flag("--caption_key", None, "column of the caption; none: caption or captions"),
    flag("--duration_key", None, "column of the seconds of sound; none: duration, if there"),
    flag("--score_key", None, "column of the score; none: score, if there"),
    flag("--crop", "center", "part of longer clips heard (paper: center; official code: start)",
         choices=["center", "start"])]
FLAGS = {"preview": [
    flag("--count", 8, "scenes or clips", 1, 1000),
    flag("--out", "preview", "folder to write to"),
], "the built-in world": [
    flag("--split", "train", "recorded clips and scenes", choices=["train", "val", "test"]),
    flag("--pairs", "seen", "event pairs: those of training, the others, or all",
         choices=["seen", "unseen", "all"]),
    flag("--degraded", 0.0, "share of scenes with noise, clipping, band limit, ...", 0, 1),
    flag("--seed", 0, "seed of the scenes"),
], "your own audio": DATA_FLAGS}

COLUMNS = {                 # names of a column: this project's, then TangoFlux's (Audio-Alpaca's)
    "audio": ("audio", "location"), "caption": ("caption", "captions"),
    "prompt": ("prompt", "captions", "caption"),
    "winner": ("winner", "chosen"), "loser": ("loser", "reject", "rejected")}
NUMBERS = {"duration": 0, "score": -math.inf}       # optional columns, and what they must exceed
SOUND_SUFFIXES = ".wav .flac .ogg .opus .mp3 .aiff .aif .au .caf .w64".split()


# ----------------------------------------------------------------------------- manifests

def read_cell(row, what, key):
    """The text in a cell, of a list of captions the first; of NUMBERS one or None. ValueError."""
    value = row.get(key)
    if what in NUMBERS:
        number = None if value is None or str(value).strip() == "" else float(value)
        if number is not None and not NUMBERS[what] < number < math.inf:
            raise ValueError(f"its {key} is {number}")
        return number
    words = what in ("caption", "prompt")
    if words and value and isinstance(value, list):
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"it has no {key}, or more than one")
    return value.strip() if words else value        # a file's name may begin with a space


def row_cells(keys, named):
    """{what: name of its column}, (its name, a row) -> {what: its cell}. Raises UserError."""
    name, row = named
    with reading(name, "mend or delete it"):
        return {what: read_cell(row, what, key) for what, key in keys.items()}


def read_cells(path, table, asked, hint):
    """Of a table's good rows [(row, its cells of `asked` {what: name of its column, or None})]."""
    columns = set().union(*[row for _, row in table])
    keys = {}
    for what, key in asked.items():
        names = (key,) if key else COLUMNS.get(what, (what,))
        keys[what] = next((name for name in names if name in columns), None)
        if keys[what] is None and (key or what not in NUMBERS):
            names = " or ".join(names)
            raise UserError(f"{path} has no column {names}, but {sorted(columns)[:9]}; {hint}")
    good = usable(table, partial(row_cells, keys), f"rows of {path}")
    return [(row, cells) for (_, row), cells in good]


def add_audiocaps_paths(rows, folder):
    """Set "audio" of each row of an AudioCaps table: the file below `folder` that its ids name,
    also with start, or start_end, in (milli)seconds; else a path to be named as missing."""
    files, whole = {}, {}
    for file in sorted(Path(folder).rglob("*"), reverse=True):
        if file.suffix.lower() in SOUND_SUFFIXES:
            whole[file.stem] = str(file)
            start = re.sub(r"_0*(\d+)(\.0+)?(_\d+(\.\d+)?)?$", r"_\1", file.stem)
            files[start] = str(file)
    files |= whole
    for row in rows:
        video = row.get("youtube_id") or ""
        clip = str(row.get("audiocap_id") or "")
        start = str(row.get("start_time")).removesuffix(".0")
        names = [f"{video}_{start}", f"{video}_{start}000", video]
        stems = [*names, *[f"Y{name}" for name in names], clip]             # Y: AudioSet's
        known = [files[stem] for stem in stems if stem in files]
        row["audio"] = known[0] if known else f"{video or clip}.wav"


def sound_place(folder, name):
    """The path of a sound, below `folder` or (official) here; else without spaces around it."""
    places = [os.path.join(base, each) for each in (name, name.strip()) for base in (folder, "")]
    return os.path.abspath(next(filter(os.path.exists, places), places[0]))


def read_manifest(path, caption_key=None, audio_key=None, duration_key=None, score_key=None,
                  audio_dir=None, others=False):
    """Rows {"audio": absolute path, "caption", "duration": seconds or None, "score" or None}; paths
    are relative to `audio_dir`, else the manifest's folder, or (official) the working folder.
    others: with the key "others", the row as it stands there."""
    table = read_table(path)
    folder = os.path.abspath(audio_dir or Path(path).parent)
    columns = set().union(*[row for _, row in table])
    if columns & {"youtube_id", "audiocap_id"} and not columns & {audio_key, *COLUMNS["audio"]}:
        add_audiocaps_paths([row for _, row in table], folder)
    asked = {"audio": audio_key, "caption": caption_key, "duration": duration_key,
             "score": score_key}
    rows = []
    for whole, row in read_cells(path, table, asked, "name its own by --audio_key, --caption_key"):
        row["audio"] = sound_place(folder, row["audio"])
        rows.append({**row, "others": whole} if others else row)
    return rows


def read_prompts(path):
    """Rows {"prompt", "duration": seconds or None} of a .txt file, a prompt a line, or of a table
    in the layouts of --data. Raises UserError."""
    remedy = 'write a prompt a line, or rows like {"prompt": "...", "duration": 3.0}'
    asked = dict.fromkeys(("prompt", "duration"))
    return [row for _, row in read_cells(path, read_table(path), asked, remedy)]


def usable_rows(rows):
    """The rows whose sound files can be read at both ends; the others are named and counted."""
    files = list(dict.fromkeys(row["audio"] for row in rows))
    good = {file for file, _ in usable(files, probe_audio, "sound files (--audio_dir?)")}
    return [row for row in rows if row["audio"] in good]


def read_rows(args):
    """The usable rows of the manifest that DATA_FLAGS ask for."""
    return usable_rows(read_manifest(args.data, args.caption_key, args.audio_key, args.duration_key,
                                     args.score_key, args.audio_dir))


def split_rows(rows, fraction, seed=0):
    """(training, validation) by a hash of the seed and of the path below their common folder.
    Whole files fall on a side, at least one on each if there are two and 0 < fraction < 1."""
    folder = os.path.commonpath([row["audio"] for row in rows])
    place = {}
    for row in rows:
        place[row["audio"]] = derive_seed(seed, os.path.relpath(row["audio"], folder)) / 2 ** 63
    held_out = sum(value < fraction for value in place.values())
    if 0 < fraction < 1:
        held_out = min(max(held_out, 1), len(place) - 1)
    validation = set(sorted(place, key=place.get)[:held_out])
    training = [row for row in rows if row["audio"] not in validation]
    return training, [row for row in rows if row["audio"] in validation]


def load_clip(row, sampling_rate, channels, samples, crop="center"):
    """A row as a model hears it: audio (channels, samples), cropped or padded; seconds of sound,
    the file's own or, if less, the row's `duration`. Raises UserError."""
    audio = read_audio(row["audio"], sampling_rate, channels, samples / sampling_rate, crop)
    seconds = min(audio.shape[-1], samples) / sampling_rate
    return fit_audio(audio, samples, crop), min(seconds, row.get("duration") or seconds)


def read_pair(folder, row):
    """A row of read_pairs with the paths of its two sounds. UserError: unusable, or the same."""
    winner, loser = (sound_place(folder, row[side]) for side in ("winner", "loser"))
    probe_audio(winner)
    probe_audio(loser)
    if filecmp.cmp(winner, loser, shallow=False):
        raise UserError(f"{winner} and {loser} hold the same sound")
    return {**row, "winner": winner, "loser": loser}


def read_pairs(path, audio_dir=None):
    """A static preference set -> rows {"prompt", "duration" or None, "winner", "loser": paths}.
    Pairs with a bad sound, or of one sound, are named and counted. UserError if none remains."""
    folder = audio_dir or Path(path).parent
    asked = dict.fromkeys(("prompt", "duration", "winner", "loser"))
    rows = [row for _, row in read_cells(path, read_table(path), asked, "rename its own")]
    pairs = usable(rows, partial(read_pair, folder), f"pairs of {path} (--audio_dir?)")
    return [pair for _, pair in pairs]


# ----------------------------------------------------------------------------- the cache

class Cache(NamedTuple):
    """An open cache; `key` names its settings in one word."""
    folder: Path
    mean: np.ndarray                        # (N, L, C) float16, memory-mapped
    std: np.ndarray                         # (N, L, C) float16, memory-mapped
    rows: list
    kept: np.ndarray                        # row numbers whose audio could be read
    key: str


def check_fresh(place, found, wanted):
    """Raise UserError naming a setting in which a cache differs from what is asked for."""
    for name in found | wanted:
        there, now = found.get(name), wanted.get(name)
        if there != now:
            change = f"{name} {there!s:.40} there, {now!s:.40} now"
            if name == "manifest":
                change = "it is of another manifest"
            raise UserError(f"the cache {place} is stale: {change}; delete it, or choose another "
                            "(--cache)")


def open_cache(folder):
    """Open a complete cache. Raises UserError if it is missing or incomplete."""
    folder = Path(folder)
    with reading(folder, "delete it, and it is made anew"):
        settings = read_json(folder / "settings.json", dict)
        rows = read_jsonl(folder / "rows.jsonl")
        mean = np.load(folder / "mean.npy", mmap_mode="r")
        std = np.load(folder / "std.npy", mmap_mode="r")
        if len(rows) != len(mean) or mean.shape != std.shape:
            raise ValueError(f"it is torn ({len(rows)} rows, {len(mean)} and {len(std)} clips)")
        kept = [i for i, row in enumerate(rows) if "error" not in row]
    settings.pop("sounds and durations", None)      # runs of older versions do not know them
    return Cache(folder, mean, std, rows, np.array(kept, dtype=np.int64), settings_key(settings))


def new_array(path, shape):
    """Write a .npy file of float16 zeros (shape) whose room on the disk is reserved: when a disk is
    full, a write into a memory map is a SIGBUS. Raises UserError."""
    with atomic_path(path) as temporary:
        open_memmap(temporary, "w+", np.float16, shape)
        with open(temporary, "r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(temporary))


def begin(folder, settings, codec, clips):
    """Check the cache in a locked folder, or begin it there. UserError: stale, or no cache."""
    log, state = folder / "rows.jsonl", folder / "settings.json"
    if state.is_file():
        return check_fresh(folder, read_json(state, dict), settings)
    arrays = [folder / "mean.npy", folder / "std.npy"]
    there = [path for path in (log, *arrays) if path.exists()]
    if there and not (log.is_file() and log.stat().st_size == 0):       # a killed start left it
        raise UserError(f"{there[0]} is not of a cache; choose another folder (--cache)")
    silence = torch.zeros(1, settings["channels"], settings["samples"])
    shape = codec.encode(silence.to(codec.latent_mean.device))[0].shape[1:]         # (L, C)
    write_jsonl(log, [])
    try:
        for path in arrays:
            new_array(path, (clips, *shape))
    except UserError:
        for path in (log, *arrays):
            path.unlink(missing_ok=True)
        raise
    write_json(state, settings)        # last: then the arrays are there


@torch.no_grad()
def build(folder, settings, codec, samples, items, function, workers, batch):
    """Encode the clips of `items` into `folder`, going on where a killed build stopped -> Cache.
    function(rate, channels, samples, batch of items), in another process, makes audio (B, channels,
    samples) and rows; the slot of a row with the key "error" stays zero."""
    folder = Path(folder)
    device = codec.latent_mean.device
    settings = {**settings, "format": 1, "codec weights": module_hash(codec),
                "codec config": codec.config, "sampling rate": codec.sampling_rate,
                "channels": codec.audio_channels, "samples": samples}
    log, state = folder / "rows.jsonl", folder / "settings.json"
    if state.is_file() and log.is_file() and log.read_bytes().count(b"\n") >= len(items):
        check_fresh(folder, read_json(state, dict), settings)
        return open_cache(folder)        # complete: read without a lock
    with locked(folder):
        begin(folder, settings, codec, len(items))
        done = len(whole_blocks(log, batch, len(items)))
        arrays = [open_memmap(folder / name, "r+") for name in ("mean.npy", "std.npy")]
        jobs = [items[start:start + batch] for start in range(done, len(items), batch)]
        make = partial(function, codec.sampling_rate, codec.audio_channels, samples)
        for audio, rows in in_workers(make, jobs, workers, f"encode {folder}", f" x {batch}"):
            good = [i for i, row in enumerate(rows) if "error" not in row]
            if good:
                posterior = codec.encode(audio[good].to(device))    # two of (B, L, C)
                for array, part in zip(arrays, posterior):
                    array[np.add(good, done)] = part.float().cpu().numpy()
                    array.flush()
            for row in rows:        # last: they say what is complete
                append_jsonl(log, row)
            done += len(rows)
    return open_cache(folder)


def render_batch(world, sampling_rate, channels, samples, indices):
    """Scenes `indices` of a World -> (audio (B, channels, samples), rows with the whole truth)."""
    audio, scenes = render_clips(world, indices)
    audio = fit_audio(resample(audio, SAMPLE_RATE, sampling_rate), samples, "start")
    return audio[:, None].expand(-1, channels, -1), [asdict(scene) for scene in scenes]


def world_cache(folder, codec, split="train", scenes=100000, seed=0, samples=None, workers=2,
                batch=64, **mix):
    """The latents of scenes 0..scenes-1 of a split, built where missing -> Cache.
    samples: of a clip at the codec's rate. mix: World's other settings."""
    samples = samples or round(CLIP_SAMPLES * codec.sampling_rate / SAMPLE_RATE)
    world = World(split, seed, **mix)
    settings = {"source": "world", **world.settings(), "scenes": scenes}
    render = partial(render_batch, world)
    return build(folder, settings, codec, samples, range(scenes), render, workers, batch)


def read_batch(crop, sampling_rate, channels, samples, rows):
    """Rows of a manifest -> (audio (B, channels, samples), rows of a cache); bad files: "error"."""
    audios = torch.zeros(len(rows), channels, samples)
    cached = []
    for audio, row in zip(audios, rows):
        entry = {"prompt": row["caption"], "duration": row["duration"], "audio": row["audio"],
                 "score": row["score"]}
        try:
            audio[:], entry["duration"] = load_clip(row, sampling_rate, channels, samples, crop)
            if audio.abs().max() < SILENCE:
                entry["silent"] = True
        except UserError as error:
            entry["error"] = str(error)
        cached.append(entry)
    return audios, cached


def stamp(path):
    """[name, bytes, time] of a file: what a cache made of it depends on."""
    about = os.stat(path)
    return [os.path.basename(path), about.st_size, about.st_mtime_ns]


def heard(row):
    """UserError if the sound of a row of read_batch could not be read."""
    if "error" in row:
        raise UserError(row["error"])


def manifest_cache(folder, codec, manifest, rows, samples, crop="center", workers=2, batch=32):
    """The latents of a manifest's clips, built where missing -> Cache. Bad files are named, counted
    and keep their rows; silent ones are named. Raises UserError if all are bad."""
    sounds = [[*stamp(row["audio"]), row["duration"]] for row in rows]
    captions = "\n".join(row["caption"] for row in rows).encode()
    settings = {"source": "manifest", "manifest": file_hash(manifest),
                "captions": hashlib.sha256(captions).hexdigest(), "clips": len(rows),
                "bytes of audio": sum(os.path.getsize(row["audio"]) for row in rows),
                "sounds and durations": settings_key(sounds), "crop": crop}
    read = partial(read_batch, crop)
    cache = build(folder, settings, codec, samples, rows, read, workers, batch)
    silent_files.extend(row["audio"] for row in cache.rows if "silent" in row)
    list(usable(cache.rows, heard, "sounds"))
    return cache


@torch.no_grad()
def text_cache(cache, encoder, ids, mask, max_length, batch=64):
    """Hidden states of ids, mask (N, S) by a frozen encoder -> (tokens, T) float16, offsets (N+1,):
    row i is hidden[offsets[i]:offsets[i + 1]]. They lie beside the latents; stale: UserError."""
    path = cache.folder / "text.npy"
    state = path.with_suffix(".json")
    settings = {"text encoder": module_hash(encoder), "max length": max_length,
                "latents": cache.key, "done": len(ids)}
    offsets = np.append(0, mask.sum(1).cumsum(0).numpy())
    if state.is_file():
        check_fresh(path, read_json(state, dict), settings)
        with reading(path, "delete it, and it is made anew"):
            return np.load(path, mmap_mode="r"), offsets
    with locked(cache.folder):
        new_array(path, (int(offsets[-1]), encoder.width))
        hidden = open_memmap(path, "r+")
        for start in tqdm(range(0, len(ids), batch), f"text {path}", delay=2, disable=None):
            own = mask[start:start + batch]
            own = own[:, :own.sum(1).max()]                         # (B, S)
            stop = start + len(own)
            states = encoder.encode(ids[start:stop, :own.shape[1]], own).cpu()      # (B, S, T)
            hidden[offsets[start]:offsets[stop]] = states[own].numpy()
        hidden.flush()
        write_json(state, settings)        # last: then the states are there
    return hidden, offsets


def with_experts(cache, folder):
    """`cache` and, behind its rows, the clips that expert_iteration.py kept in `folder`, std 0.
    Raises UserError if the folder holds none, or latents of another shape."""
    path = Path(folder) / "experts.safetensors"
    rows = read_jsonl(path.with_suffix(".jsonl"))
    latents = load_tensors(path)["latents"].numpy()                 # (K, L, C)
    wanted = (len(rows), *cache.mean.shape[1:])
    if latents.shape != wanted:
        raise UserError(f"{path} holds latents {latents.shape}, not {wanted}: another model's")
    key = settings_key({"latents": cache.key, "experts": file_hash(path)})
    mean = np.concatenate([cache.mean, latents])                    # (N + K, L, C), in memory
    std = np.concatenate([cache.std, np.zeros_like(latents)])
    kept = np.append(cache.kept, range(len(cache.rows), len(mean)))
    return Cache(cache.folder, mean, std, cache.rows + rows, kept, key)


class Data(NamedTuple):
    """A cache with its prompts tokenised, ready for batches."""
    cache: Cache
    rows: np.ndarray                        # row numbers that this set holds
    ids: torch.Tensor                       # (N, S) tokens of every row of the cache
    lengths: torch.Tensor                   # (N,) tokens of each
    durations: torch.Tensor                 # (N,) seconds
    text: tuple | None                      # of a frozen encoder: see text_cache
    scores: torch.Tensor | None = None      # (N,) NaN = none; None: the flow has no score head


def prepare(cache, rows, encoder, max_length, frozen):
    """Tokenise the cache's prompts once -> Data; frozen: hidden states come from the disk, too."""
    with reading(cache.folder / "rows.jsonl", "delete the cache, and it is made anew"):
        ids, mask = encoder.tokenize([row["prompt"] for row in cache.rows], max_length)  # (N, S)
        durations = torch.tensor([row["duration"] or 0.0 for row in cache.rows])    # of bad files 0
    text = text_cache(cache, encoder, ids, mask, max_length) if frozen else None
    return Data(cache, rows, ids, mask.sum(1), durations, text)


def gather(data, chosen):
    """Row numbers (B,) -> mean, std (B, L, C), ids (B, S), hidden (B, S, T) or None, mask (B, S),
    durations (B,). The text is padded to the longest prompt of the batch."""
    mean = torch.from_numpy(data.cache.mean[chosen]).float()        # (B, L, C)
    std = torch.from_numpy(data.cache.std[chosen]).float()
    lengths = data.lengths[chosen]
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]                 # (B, S)
    hidden = None
    if data.text is not None:
        states, offsets = data.text
        rows = [torch.tensor(states[offsets[i]:offsets[i + 1]]).float() for i in chosen]
        hidden = pad_sequence(rows, batch_first=True)               # (B, S, T)
    return mean, std, data.ids[chosen, :longest], hidden, mask, data.durations[chosen]


def main():
    args = parse_flags(__doc__, FLAGS)
    out = Path(args.out)
    kind = SAMPLE_RATE, 1, CLIP_SAMPLES        # what the toy hears

    # a manifest's clips, or scenes with their truth
    if args.data:
        audios, rows = read_batch(args.crop, *kind, read_rows(args)[:args.count])
        audios = [audio for audio, row in zip(audios, rows) if "error" not in row]
        rows = [row for row, _ in usable(rows, heard, "sounds")]
    else:
        world = World(args.split, args.seed, args.pairs, args.degraded)
        audios, rows = render_batch(world, *kind, range(args.count))

    # WAVs, a manifest of them, and a picture of the first (more are too small to read)
    for number, (row, audio) in enumerate(zip(rows, audios)):
        name = f"{number:04d}.wav"
        write_wav(out / name, audio, SAMPLE_RATE)
        print(f"{name}  {row['duration'] or 0:.2f} s  {row['prompt']}")
        rows[number] = {"caption": row.pop("prompt"), **row, "audio": name}
    write_jsonl(out / "captions.jsonl", rows)
    captions = [row["caption"] for row in rows]
    save_spectrogram(out / "spectrograms.png", audios[:16], captions, SAMPLE_RATE)
    print(f"wrote {len(rows)} WAV files and captions.jsonl to {out}")
    print("next: python train_fm.py trains on such scenes, with --data MANIFEST on your own clips")


if __name__ == "__main__":
    run_main(main)
