"""Latents on disk: every clip goes through the frozen codec once, and training reads the result.

    python cache.py                                        # the built-in world: training and validation scenes
    python cache.py --data my.jsonl                        # your own clips, from a manifest
    python cache.py --data my.jsonl --with_text FOLDER     # and hidden states of that model's text encoder
    python cache.py --rebuild                              # throw a stale cache away and build it again

A cache folder holds `mean.npy` and `std.npy`, the codec's raw posterior as float16 (N, L, C), opened memory-mapped;
`rows.jsonl`, one object a clip (prompt, duration, and what else is known of it); `settings.json`, what all this was
made from: a hash of the codec's weights, and the world's or the manifest's settings. A folder made from something
else is refused, with the setting that differs. A killed build goes on at the first batch that isn't complete. The
mean and std are kept rather than one sample, so that each epoch draws its own (the official code does, too).

N clips, B batch, L latent frames, C latent channels, S text tokens, D text width.
"""
import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import (UserError, append_jsonl, atomic_path, choose_device, file_hash, in_range, load_tensors,
                    parse_arguments, read_json, read_jsonl, run_main, warn, write_json)

FORMAT = 1                                  # raise it when the layout of the folder changes: older ones are refused
TRAIN_SCENES, VAL_SCENES = 100000, 512      # scenes of the built-in world


class Cache(NamedTuple):
    """An open cache; `kept` are the rows whose audio could be read, `key` names the settings in one word."""
    folder: Path
    mean: np.ndarray                        # (N, L, C) float16, memory-mapped
    std: np.ndarray                         # (N, L, C) float16, memory-mapped
    rows: list
    kept: np.ndarray                        # (kept,) int64
    key: str


# ----------------------------------------------------------------------------- what a cache was made from

def module_hash(module):
    """SHA-256 over the names, types and bytes of a module's tensors: the weights as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def settings_key(settings):
    """One short word for a dict of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def refuse_stale(folder, found, wanted, remedy):
    """Raise a UserError that names the settings in which the cache `folder` differs from what is asked for."""
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if names:
        def short(value):
            return f"{value[:8]}..." if isinstance(value, str) and len(value) > 32 else value
        shown = ", ".join(f"{name} {short(found.get(name))} there, {short(wanted.get(name))} now" for name in names)
        raise UserError(f"the cache {folder} is stale: {shown}; {remedy}")


def codec_settings(codec, samples):
    """What every cache depends on: the codec's weights and config, and the clips' length in samples."""
    return {"format": FORMAT, "codec weights": module_hash(codec), "codec config": getattr(codec, "config", None),
            "sampling rate": codec.sampling_rate, "channels": codec.audio_channels, "samples": samples}


def world_settings(codec, samples, scenes, options):
    """What a cache of world scenes depends on; `options` are the keywords of world.World."""
    from world import World
    return {"source": "world", **World(**options).settings(), "scenes": scenes, **codec_settings(codec, samples)}


def manifest_settings(codec, samples, manifest, rows, crop):
    """What a cache of a manifest depends on: the file, the size of its audio files, the crop."""
    sizes = sum(os.path.getsize(row["audio"]) for row in rows if os.path.isfile(row["audio"]))
    captions = hashlib.sha256("\n".join(row["caption"] for row in rows).encode()).hexdigest()
    return {"source": "manifest", **codec_settings(codec, samples), "manifest": file_hash(manifest),
            "captions": captions, "clips": len(rows), "bytes of audio": sizes, "crop": crop}


# ----------------------------------------------------------------------------- building

def open_cache(folder, settings=None):
    """Open a complete cache. Raises UserError if it is missing, incomplete, or made from other `settings`."""
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise UserError(f"there is no latent cache in {folder}; build it with python cache.py")
    found = read_json(folder / "settings.json")
    if settings is not None:
        refuse_stale(folder, found, settings, "python cache.py --rebuild makes it anew, --cache names another folder")
    rows = read_jsonl(folder / "rows.jsonl")
    try:
        mean, std = (np.load(folder / name, mmap_mode="r") for name in ("mean.npy", "std.npy"))
    except (OSError, ValueError) as error:
        raise UserError(f"the cache {folder} is damaged ({error}); python cache.py --rebuild makes it anew") from None
    if len(rows) < len(mean):
        raise UserError(f"the cache {folder} is incomplete ({len(rows)} of {len(mean)}); python cache.py goes on")
    kept = np.array([index for index, row in enumerate(rows) if "error" not in row], dtype=np.int64)
    return Cache(folder, mean, std, rows, kept, settings_key(found))


def start_or_resume(folder, settings, shape, batch):
    """Make the arrays of a new cache, or find how far a killed build came. Returns the number of complete rows.

    A complete cache is only read: several processes may open it at once, and its folder need not be writable.
    """
    if (folder / "settings.json").is_file():
        refuse_stale(folder, read_json(folder / "settings.json"), settings,
                     "--rebuild makes it anew, --cache names another folder")
        rows = read_jsonl(folder / "rows.jsonl") if (folder / "rows.jsonl").is_file() else []
        if len(rows) == shape[0]:
            return len(rows)
        done = len(rows) // batch * batch
        with atomic_path(folder / "rows.jsonl") as temporary:               # without the rows of a torn batch
            temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:done]),
                                 encoding="utf-8")
        return done
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").unlink(missing_ok=True)
        for name in ("mean.npy", "std.npy"):
            np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.float16, shape=shape).flush()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; choose another folder with --cache") from None
    write_json(folder / "settings.json", settings)         # last: a folder with settings has its arrays
    return 0


@torch.no_grad()
def build(folder, settings, codec, count, batch, read):
    """Encode `count` clips into `folder`, going on where a killed build stopped; returns the open cache.

    `read(batches)` yields (audio float32 (B, channels, samples), rows) for each range of `batches`; a row with
    the key "error" has no audio and its slot stays zero.
    """
    folder = Path(folder)
    device = next(codec.parameters()).device
    probe = codec.encode(torch.zeros(1, codec.audio_channels, settings["samples"], device=device))[0]  # (1, L, C)
    done = start_or_resume(folder, settings, (count, *probe.shape[1:]), batch)
    if done < count:
        mean, std = (np.lib.format.open_memmap(folder / name, mode="r+") for name in ("mean.npy", "std.npy"))
        batches = [range(start, min(start + batch, count)) for start in range(done, count, batch)]
        with tqdm(total=count, initial=done, desc=f"encode {folder}", unit="clip", disable=None) as bar:
            for indices, (audio, rows) in zip(batches, read(batches)):
                good = [indices[i] for i, row in enumerate(rows) if "error" not in row]
                if good:
                    audio = torch.from_numpy(audio[[index - indices[0] for index in good]])
                    posterior = codec.encode(audio.to(device))                    # 2 x (B, L, C)
                    mean[good], std[good] = (tensor.float().cpu().numpy() for tensor in posterior)
                mean.flush(), std.flush()
                for row in rows:                                                  # rows last: they say what is complete
                    append_jsonl(folder / "rows.jsonl", row)
                bar.update(len(indices))
    return open_cache(folder, settings)


def ahead(submit, tasks, depth):
    """Results of submit(task) in order, with at most `depth` tasks waiting: the workers stay busy, memory bounded."""
    waiting = collections.deque()
    for task in tasks:
        waiting.append(submit(task))
        if len(waiting) > depth:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def world_cache(folder, codec, split="train", scenes=TRAIN_SCENES, seed=0, pairs="seen", degraded=0.0, samples=None,
                workers=2, batch=64, **mix):
    """The latents of world scenes 0..scenes-1 of a split, built (or gone on with) if need be; returns a Cache.

    `workers` processes render while this one encodes; 0 renders here. `samples`: clip length at the codec's rate.
    `mix`: relations and counted of world.World.
    """
    import world
    samples = samples or round(world.CLIP_SAMPLES * codec.sampling_rate / world.SAMPLE_RATE)
    options = {"split": split, "seed": seed, "pairs": pairs, "degraded": degraded, **mix}
    settings = world_settings(codec, samples, scenes, options)

    def read(batches):
        render = functools.partial(render_scenes, options, codec.sampling_rate, codec.audio_channels, samples)
        if not workers:
            yield from map(render, batches)
            return
        spawn = multiprocessing.get_context("spawn")       # a fork of a process with torch's threads can hang
        with concurrent.futures.ProcessPoolExecutor(workers, spawn, initializer=end_with_parent) as pool:
            yield from ahead(lambda task: pool.submit(render, task), batches, 2 * workers)

    return build(folder, settings, codec, scenes, batch, read)


WORLD_FLAGS = ("scenes", "val_scenes", "world_seed", "relations", "counted")  # without effect on a manifest


def add_world_flags(group):
    """--world_seed, --relations, --counted: which scenes of the world a flow is trained on."""
    group.add_argument("--world_seed", type=int, default=0,
                       help="of the training scenes (default: 0; the held-out ones are always those of 0)")
    group.add_argument("--relations", type=float, nargs=4, metavar="WEIGHT",
                       help="of training scenes with one sound, two at once, two in order, three in order "
                            "(default: 0.14 0.24 0.34 0.28)")
    group.add_argument("--counted", type=float, metavar="SHARE",
                       help="of the sounds that can be counted whose number a training caption names (default: 0.35)")


def world_mix(args):
    """The keywords of world_cache that the flags of add_world_flags ask for. UserError if out of range."""
    mix = {"seed": args.world_seed}
    if args.counted is not None:
        mix["counted"] = in_range("--counted", args.counted, 0, 1)
    if args.relations is not None:
        for weight in args.relations:
            in_range("--relations", weight, 0, 1e6)
        if args.relations[0] <= 0:
            raise UserError("--relations: the weight of one sound must be above 0, for short scenes hold no more")
        mix["relations"] = tuple(args.relations)
    return mix


def end_with_parent():
    """In a worker: leave when the parent is gone, so that a killed build leaves no processes behind."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


@functools.lru_cache(maxsize=2)
def open_world(**options):
    """world.World(**options), made once in each process."""
    import world
    return world.World(**options)


def render_scenes(options, sampling_rate, channels, samples, indices):
    """Scenes `indices` of a world -> (audio float32 (B, channels, samples), rows with the scene's whole truth)."""
    from audio import fit_audio, resample
    import world
    clips, rows = [], []
    for index in indices:
        audio, scene = open_world(**options).render(index)
        audio = torch.from_numpy(audio)[None].float()                                      # (1, samples)
        if sampling_rate != world.SAMPLE_RATE:
            audio = resample(audio, world.SAMPLE_RATE, sampling_rate)
        clips.append(fit_audio(audio, samples, "start").expand(channels, -1).numpy())       # (channels, samples)
        rows.append(dataclasses.asdict(scene))
    return np.stack(clips), rows


def manifest_cache(folder, codec, manifest, rows, samples, crop="center", workers=2, batch=32):
    """The latents of a manifest's clips, built (or gone on with) if need be; returns a Cache.

    Files that can't be read are named, counted and skipped (they keep their row, with "error"); all bad: UserError.
    """
    from data import load_clip
    settings = manifest_settings(codec, samples, manifest, rows, crop)

    def read_row(row):
        try:
            audio, duration = load_clip(row, codec.sampling_rate, codec.audio_channels, samples, crop)
        except UserError as error:
            return np.zeros((codec.audio_channels, samples), np.float32), {**described(row), "error": str(error)}
        return audio.numpy(), {**described(row), "duration": float(duration)}

    def described(row):
        return {"prompt": row["caption"], "duration": row["duration"], "audio": row["audio"], "score": row["score"]}

    def read(batches):
        with concurrent.futures.ThreadPoolExecutor(max(workers, 1)) as pool:   # file reading lets go of Python's lock
            submit = lambda index: pool.submit(read_row, rows[index])
            clips = ahead(submit, (index for indices in batches for index in indices), 2 * batch)
            for indices in batches:
                audio, described_rows = zip(*(next(clips) for _ in indices))
                yield np.stack(audio), list(described_rows)

    cache = build(folder, settings, codec, len(rows), batch, read)
    bad = [row for row in cache.rows if "error" in row]
    for row in bad[:10]:
        warn(f"skipped: {row['error']}")
    if not len(cache.kept):
        raise UserError(f"none of the {len(rows)} audio files of {manifest} can be read; the first: {bad[0]['error']}")
    if bad:
        print(f"{len(bad)} of {len(rows)} audio files skipped, {len(cache.kept)} kept")
    return cache


# ----------------------------------------------------------------------------- text of a frozen encoder

@torch.no_grad()
def text_cache(cache, encoder, max_length, batch=64):
    """Hidden states of the prompts of `cache` by a frozen encoder -> hidden (tokens, D) float16, offsets (N+1,).

    Row i is hidden[offsets[i]:offsets[i + 1]], without padding. Written beside the latents, resumable, keyed by the
    encoder's weights; a folder made by another encoder is refused.
    """
    folder, prompts = cache.folder, [row["prompt"] for row in cache.rows]
    settings = {"text encoder": module_hash(encoder), "max length": max_length, "latents": cache.key}
    ids, mask = encoder.tokenize(prompts, max_length)                                        # (N, S)
    lengths = mask.sum(1)                                                                    # (N,)
    offsets = np.concatenate([[0], lengths.cumsum(0).numpy()])
    done, path = 0, folder / "text.npy"
    if (folder / "text.json").is_file():
        state = read_json(folder / "text.json")
        done = state.pop("done")
        refuse_stale(folder / "text.npy", state, settings, "delete its text.json, and it is made anew")
    device = next(encoder.parameters()).device
    if done == 0:
        width = encoder.encode(ids[:1, :1].to(device), mask[:1, :1].to(device)).shape[-1]
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(int(offsets[-1]), width)).flush()
    if done < len(prompts):
        hidden = np.lib.format.open_memmap(path, mode="r+")
        for start in tqdm(range(done, len(prompts), batch), desc=f"text {folder}", unit="batch", disable=None):
            stop = min(start + batch, len(prompts))
            longest = int(lengths[start:stop].max())
            block = [tensor[start:stop, :longest].to(device) for tensor in (ids, mask)]
            states = encoder.encode(*block).float().cpu()                                    # (B, S, D)
            hidden[offsets[start]:offsets[stop]] = states[mask[start:stop, :longest].bool()].numpy()
            hidden.flush()
            write_json(folder / "text.json", {**settings, "done": stop})
    return np.load(path, mmap_mode="r"), offsets


# ----------------------------------------------------------------------------- clips that a model made and kept

class Joined:
    """Arrays of rows (N, ...) one behind the other, read by row numbers as if they were one."""

    def __init__(self, first, second):
        self.first, self.second = first, second
        self.shape = (len(first) + len(second), *first.shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Row numbers (B,) -> (B, ...)."""
        rows = np.asarray(rows)
        late, count = rows >= len(self.first), len(self.first)
        found = np.empty((len(rows), *self.shape[1:]), self.first.dtype)
        found[~late], found[late] = self.first[rows[~late]], self.second[rows[late] - count]
        return found


def with_experts(cache, folder):
    """`cache` and, behind its rows, the clips that expert_iteration.py kept in `folder`; their std is 0.

    Raises UserError if the folder holds none, or latents of another shape.
    """
    folder = Path(folder)
    if not (folder / "experts.jsonl").is_file():
        raise UserError(f"{folder} holds no experts.jsonl; pass a round of expert_iteration.py")
    rows = read_jsonl(folder / "experts.jsonl")
    latents = load_tensors(folder / "experts.safetensors")["latents"].numpy()                # (K, L, C)
    if len(rows) != len(latents) or latents.shape[1:] != cache.mean.shape[1:]:
        raise UserError(f"{folder}: {len(rows)} experts with latents {latents.shape} do not fit latents of "
                        f"{cache.mean.shape[1:]}; they are another model's")
    key = settings_key({"latents": cache.key, "experts": file_hash(folder / "experts.safetensors")})
    return Cache(cache.folder, Joined(cache.mean, latents), Joined(cache.std, np.zeros_like(latents)),
                 [*cache.rows, *rows], np.concatenate([cache.kept, len(cache.rows) + np.arange(len(rows))]), key)


# ----------------------------------------------------------------------------- reading

class Data(NamedTuple):
    """A cache with its prompts tokenised, ready for batches; `rows` (n,) are the row numbers that this set holds."""
    cache: Cache
    rows: np.ndarray
    ids: torch.Tensor                       # (N, S) tokens of every row of the cache
    lengths: torch.Tensor                   # (N,) tokens of each
    durations: torch.Tensor                 # (N,) seconds
    text: tuple | None                      # (hidden (tokens, D), offsets (N+1,)) of a frozen encoder
    scores: torch.Tensor | None = None      # (N,) NaN = none; None: the flow has no score head


def prepare(cache, rows, encoder, max_length, frozen):
    """Tokenise the cache's prompts once -> Data. A frozen encoder's hidden states come from beside the latents."""
    ids, mask = encoder.tokenize([row["prompt"] for row in cache.rows], max_length)                    # (N, S)
    durations = torch.tensor([row["duration"] or 0.0 for row in cache.rows])    # skipped rows may have none
    return Data(cache, rows, ids.cpu(), mask.sum(1).cpu(), durations,
                text_cache(cache, encoder, max_length) if frozen else None)


def gather(data, chosen):
    """Row numbers (B,) -> mean, std (B, L, C), ids (B, S), hidden (B, S, D) or None, mask (B, S), durations (B,).

    The text is padded to the longest prompt of the batch.
    """
    mean, std = (torch.from_numpy(array[chosen]).float() for array in (data.cache.mean, data.cache.std))
    lengths = data.lengths[chosen]
    mask = torch.arange(int(lengths.max())) < lengths[:, None]                  # (B, S)
    hidden = None
    if data.text is not None:
        states, offsets = data.text
        hidden = torch.zeros(*mask.shape, states.shape[1])                      # (B, S, D)
        for row, index in enumerate(chosen):
            hidden[row, :lengths[row]] = torch.from_numpy(states[offsets[index]:offsets[index + 1]].astype(np.float32))
    return mean, std, data.ids[chosen, :mask.shape[1]], hidden, mask, data.durations[chosen]


# ----------------------------------------------------------------------------- command line

def parse_args():
    """The flags of this script, their ranges checked."""
    from data import add_data_flags, check_data_flags
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    group = parser.add_argument_group("what to encode")
    group.add_argument("--scenes", type=int, default=TRAIN_SCENES,
                       help=f"training scenes of the world (default: {TRAIN_SCENES})")
    group.add_argument("--val_scenes", type=int, default=VAL_SCENES, help=f"validation scenes (default: {VAL_SCENES})")
    add_world_flags(group)
    group.add_argument("--max_duration", type=float, default=4.096,
                       help="seconds a manifest's clip is cropped or padded to (default: 4.096; paper: 30)")
    group = parser.add_argument_group("with what")
    group.add_argument("--codec", default="checkpoints/toy/base",
                       help="folder with the codec (default: checkpoints/toy/base)")
    group.add_argument("--with_text", metavar="FOLDER",
                       help="also the hidden states of this model's text encoder (default: none)")
    group.add_argument("--max_text_length", type=int, default=64,
                       help="text tokens kept (default: 64, as the official training)")
    group = parser.add_argument_group("where and how")
    group.add_argument("--cache",
                       help="folder (default: cache/world_train and cache/world_val, or cache/FOLDER_NAME for "
                            "--data FOLDER/NAME.jsonl); of the world, the validation scenes go to this name and _val")
    group.add_argument("--rebuild", action="store_true", help="delete what is there first (default: off)")
    group.add_argument("--workers", type=int, default=2,
                       help="processes that render, or threads that read (default: 2)")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parse_arguments(parser)
    for name, low, high in (("scenes", 1, 1e8), ("val_scenes", 1, 1e8), ("max_duration", 0.1, 600),
                            ("max_text_length", 2, 100000), ("workers", 0, 256)):
        in_range(f"--{name}", getattr(args, name), low, high)
    check_data_flags(args, parser, ("max_duration",), WORLD_FLAGS)
    world_mix(args)
    if args.max_text_length != parser.get_default("max_text_length") and not args.with_text:
        raise UserError("--max_text_length would have no effect without --with_text; leave one or the other out")
    return parser, args


def default_folder(data, name="train"):
    """Where a cache lies unless told otherwise: by the manifest's folder and name, or the world's split."""
    return Path("cache") / (f"{Path(data).resolve().parent.name}_{Path(data).stem}" if data else f"world_{name}")


def discard(folder):
    """Delete a cache folder, and nothing that isn't one."""
    folder = Path(folder)
    if (folder / "settings.json").is_file() and (folder / "mean.npy").is_file():
        shutil.rmtree(folder)
    elif folder.exists():
        raise UserError(f"{folder} is not a latent cache: nothing was deleted; choose another folder with --cache")


def main():
    parser, args = parse_args()
    from data import manifest_rows
    from model import load_model
    from vae import load_codec
    if args.with_text:                  # a faulty one is told now, not after minutes of rendering
        encoder = load_model(args.with_text, choose_device(args.device, quiet=True), parts=("text",)).text
    codec = load_codec(args.codec, choose_device(args.device))
    folders = [Path(args.cache) if args.cache else default_folder(args.data)]
    if not args.data:
        folders.append(Path(f"{args.cache}_val") if args.cache else default_folder(None, "val"))
    for folder in folders if args.rebuild else []:
        discard(folder)
    if args.data:
        samples = round(args.max_duration * codec.sampling_rate)
        rows = manifest_rows(args)
        caches = [manifest_cache(folders[0], codec, args.data, rows, samples, args.crop, args.workers)]
    else:
        caches = [world_cache(folders[0], codec, "train", args.scenes, workers=args.workers, **world_mix(args)),
                  world_cache(folders[1], codec, "val", args.val_scenes, workers=args.workers)]
    if args.with_text:
        for cache in caches:
            text_cache(cache, encoder, args.max_text_length)
    for cache in caches:
        print(f"{cache.folder}: {len(cache.kept)} clips, latents {tuple(cache.mean.shape[1:])}, key {cache.key}")
    given = [(name, getattr(args, name)) for name in ("data", "codec", "cache", *WORLD_FLAGS)
             if getattr(args, name) != parser.get_default(name)]
    flags = "".join(f" --{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
                    for name, value in given)
    print(f"next: python train_fm.py{flags}")


if __name__ == "__main__":
    run_main(main)
