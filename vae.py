"""The codecs, audio <-> latents: load, save, and train either of the two.

    python vae.py                                     # the toy's mel codec, on the built-in world
    python vae.py --codec oobleck --max_minutes 20    # a small waveform codec, on short crops
    python vae.py --data my.jsonl --checkpoint runs/vae --out runs/mine     # tuned on your audio

A codec has sampling_rate, audio_channels, hop (samples of a latent frame), latent_channels, and
    encode(audio (B, channels, samples)) -> mean, std (B, L, C) raw   decode(latents) -> audio
    normalise(latents), denormalise(latents)         what the flow is trained on and makes
    example(audio), losses(examples, generator)      log-mels or audio, {name of a part: scalar}
    start(examples), finish(examples)                what is measured before and after training
The mel codec (lib/mel.py) is the second paper's, small; Oobleck (lib/oobleck.py) the first paper's.
B batch, L latent frames, C latent channels, N examples of R rows and T columns.
"""
import json
import math
import time
from collections import defaultdict
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from tqdm import tqdm

from data import DATA_FLAGS, load_clip, read_rows, split_rows
from lib.audio import resample, usable
from lib.common import (DEVICE, UserError, append_jsonl, autocast_for, choose_device, flag,
                        generator, parse_flags, read_json, reading, run_main,
                        stop_on_signal, write_json)
from lib.fast import quicken_codec
from lib.mel import LogMel, MelVAE
from lib.oobleck import OOBLECK_DEFAULTS, Oobleck
from lib.text import print_row
from lib.weights import (draw_log, find_weights, learning_rate, load_state, load_weights,
                         model_folder, read_config, resolve, run_folder, save_module, save_state,
                         set_rate, trim_log)
from world.scenes import World
from world.sounds import SAMPLE_RATE

CODECS = {"mel": MelVAE, "oobleck": Oobleck}
FLAGS = {"codec": [
    flag("--codec", "mel", "mel (second paper) or oobleck (first paper)", choices=list(CODECS)),
    flag("--config", None, "JSON object, or file with one, that changes the small config"),
    flag("--checkpoint", None, "folder or hub id of a trained codec to start from"),
], "your own audio": DATA_FLAGS, "clips": [
    flag("--seconds", 4.096, "length of a clip of --data", 0.1, 600),
    flag("--clips", 6000, "clips kept in memory (oobleck: 512)", 1),
    flag("--validation_clips", 64, "held-out clips", 1),
    flag("--degraded", 0.3, "share of spoilt scenes of the world: bad audio stays bad", 0, 1),
    flag("--crop_seconds", 2.048, "length of a crop (oobleck: 1)", 0.1, 600),
], "training": [
    flag("--train_steps", 1000, "steps (oobleck: 3000)", 1, alias="--steps"),
    flag("--batch_size", 32, "crops of a step (oobleck: 4)", 1),
    flag("--learning_rate", 1e-2, "peak rate (oobleck: 3e-3)", 1e-9, 10),
    flag("--beta1", 0.9, "beta1 of AdamW (oobleck: 0.8)", 0, 0.99999),
    flag("--warmup_steps", 50, "steps of linear warm-up, before the cosine", 1),
    flag("--kl_weight", 1e-3, "weight of the KL term (oobleck: 1e-4, Stable Audio 2.0)", 0, 1e6),
    flag("--waveform_weight", 1.0, "weight of Oobleck's waveform L1 (official: 0)", 0, 1e6),
    flag("--dtype", "bfloat16", "precision (oobleck: float32)", choices=["float32", "bfloat16"]),
], "run": [
    flag("--out", "runs/vae", "output folder; a run found there is resumed"),
    flag("--seed", 0, "seed of weights, scenes, batches and noise", 0, 2 ** 63),
    flag("--max_minutes", 60.0, "minutes after which it stops; the same command goes on", 0, 1e9),
    flag("--log_every", 50, "steps between validations", 1),
    flag("--save_every", 100, "steps between saved states", 1), DEVICE]}
OOBLECK = dict(clips=512, crop_seconds=1.0, train_steps=3000, batch_size=4, learning_rate=3e-3,
               beta1=0.8, kl_weight=1e-4, dtype="float32")      # found on eight one-second clips
MAY_CHANGE = ("out", "max_minutes", "log_every", "save_every", "device", "debug")


# ------------------------------------------------------------------------- codecs on disk

def make_codec(kind, config, device="cpu"):
    """A codec with random weights; on "meta" without any. UserError: no such config."""
    with reading(f"the config of a codec {kind}", "it must describe a codec mel or oobleck"):
        with torch.device(device):
            return CODECS[kind](**config)


def codec_place(name):
    """(folder, config, kind) of the codec of a folder or hub id, ours or in diffusers' layout."""
    folder = model_folder(name, ("config.json", "vae.safetensors", "vae/*"))
    for place in (folder, folder / "vae"):                      # Stable Audio Open has it in vae/
        config = read_config(place) if (place / "config.json").is_file() else {}
        if config.get("_class_name") == "AutoencoderOobleck":
            config = {key: config[key] for key in OOBLECK_DEFAULTS if key in config}
            return place, config, "oobleck"
    folder, config = resolve(folder, "vae")
    with reading(folder / "config.json", "its key vae must describe a codec"):
        config = dict(config.get("vae", {}))
    kind = config.pop("codec", "oobleck")                       # official files do not say
    return folder, config, kind


def load_codec(name, device="cpu"):
    """The codec of a model folder or hub id, for inference. UserError: missing or misshapen."""
    folder, config, kind = codec_place(name)
    codec = make_codec(kind, config, "meta")
    weights = find_weights(folder, "vae.safetensors")           # or diffusion_pytorch_model
    load_weights(codec, weights, ("latent_mean", "latent_std"), torch.float32)
    if kind == "mel":                                           # its front end is no weights
        codec.mel = LogMel(**codec.config["mel"])
        if "latent_mean" not in weights.shapes:                 # official: raw latents
            codec.latent_std.copy_(codec.latent_mean.zero_() + 1)
    return quicken_codec(codec.to(device).requires_grad_(False).eval())


def save_codec(folder, codec, dtype=torch.float16, training=None):
    """Write vae.safetensors and the keys "vae" and, if given, "vae_training" of config.json."""
    save_module(Path(folder) / "vae.safetensors", codec, dtype)
    path = Path(folder) / "config.json"
    config = read_json(path, dict) if path.exists() else {}
    config["vae"] = {"codec": codec.kind, **codec.config}
    if training:
        config["vae_training"] = training
    write_json(path, config)


# ------------------------------------------------------------------------- examples

def world_clips(codec, world):
    """Yield the scenes of a World, without an end, as audio (channels, samples)."""
    for index in count():
        audio, _ = world.render(index)
        audio = resample(torch.as_tensor(audio)[None], SAMPLE_RATE, codec.sampling_rate)
        yield audio.expand(codec.audio_channels, -1)                # (channels, samples)


def file_clips(codec, rows, seconds, crop):
    """Yield the sound of a manifest's rows as audio (channels, samples)."""
    samples = round(seconds * codec.sampling_rate)
    load = partial(load_clip, sampling_rate=codec.sampling_rate, channels=codec.audio_channels,
                   samples=samples, crop=crop)
    for _, (audio, _) in usable(rows, load, "sounds"):
        yield audio


@torch.inference_mode()
def encode_pairs(codec, config, pairs):
    """Rows of data.read_pairs -> rows, {"winner_mean", "winner_std", "loser_...": (P, L, C)}."""
    rate, frames = codec.sampling_rate, config["audio_seq_len"]
    samples = round(config["max_duration"] * rate)
    parts = defaultdict(list)
    rows = []
    for row in tqdm(pairs, "encoding", unit="pair"):
        for which in ("loser", "winner"):       # where no length is given, the winner's
            clip = {"audio": row[which], "duration": row["duration"]}
            audio, seconds = load_clip(clip, rate, codec.audio_channels, samples, "start")
            mean, std = codec.encode(audio[None].to(codec.latent_std.device))   # (1, L, C) each
            parts[f"{which}_mean"].append(mean[:, :frames].cpu())
            parts[f"{which}_std"].append(std[:, :frames].cpu())
        rows.append({**row, "duration": seconds})
    return rows, {name: torch.cat(each) for name, each in parts.items()}


def split_clips(rows, seed):
    """(training rows, held-out rows): each sound once, shuffled: a manifest may be sorted."""
    rows = list({row["audio"]: row for row in rows}.values())   # some have two captions
    if len(rows) < 2:
        raise UserError("training needs two usable sound files, one of them to hold out")
    order = torch.randperm(len(rows), generator=generator(seed, "clips")).tolist()
    return split_rows([rows[i] for i in order], 0.05, seed)


def load_examples(codec, clips, most):
    """The first clips' examples (N, R, T) in memory: rendering takes as long as a training step."""
    clips = tqdm(islice(clips, most), "clips", unit="clip", delay=2)
    return torch.stack([codec.example(audio) for audio in clips])


def draw_batch(examples, size, length, multiple, random):
    """Crops (size, R, length or less) of examples (N, R, T), each from a multiple of `multiple`."""
    length = min(length, examples.shape[-1])
    places = (examples.shape[-1] - length) // multiple + 1
    index = torch.randint(len(examples), (size,), generator=random)
    start = torch.randint(places, (size,), generator=random) * multiple
    crops = [examples[i, :, s:s + length] for i, s in zip(index, start)]
    return torch.stack(crops).float()


# ------------------------------------------------------------------------- loss and loop

def weighted_loss(codec, batch, random, weights):
    """Loss of a batch (B, R, T) and its parts: L1 of log-mels + KL, or STFT + waveform + KL."""
    parts = codec.losses(batch, random)
    weighted = [weights.get(name, 1.0) * part for name, part in parts.items()]
    return sum(weighted), parts


@torch.no_grad()
def validate(codec, examples, weights):
    """Training's loss, with the same noise each time, and the error in dB of the decoded means."""
    total = 0.0
    errors = []
    for number, batch in enumerate(examples.float().split(8)):
        batch = batch.to(codec.latent_mean.device)                              # (B, R, T)
        loss, _ = weighted_loss(codec, batch, generator("validation", number), weights)
        total += loss.item() * len(batch)
        errors.append(codec.error_db(batch))                                    # (B,)
    decibel = torch.cat(errors).mean().item()
    return {"validation_loss": total / len(examples), "validation_db": decibel}


def train(args, codec, optimizer, examples, held_out, settings, step, minutes):
    """Train from `step` to the last, or --max_minutes -> steps done; minutes: spent before."""
    device = codec.latent_mean.device
    autocast = autocast_for(args.dtype, device)
    weights = {"kl": args.kl_weight, "waveform": args.waveform_weight}
    frames = math.ceil(round(args.crop_seconds * codec.sampling_rate) / codec.hop)
    length = frames * codec.columns                                             # of a crop
    held_out = held_out[..., :length]
    log = Path(args.out) / "log.jsonl"
    stop_at = minutes + args.max_minutes
    began = time.monotonic() - 60 * minutes                     # the clock of the whole run
    steps = args.train_steps
    if step == 0:
        append_jsonl(log, {"step": 0, **validate(codec, held_out, weights), "minutes": minutes})
    last = step >= steps
    bar = tqdm(None, "training", steps, initial=step, unit="step", disable=None)
    with bar, stop_on_signal() as stopped:
        while not last:
            # rate (linear warm-up, then half a cosine) and batch
            rate = learning_rate(step, args.learning_rate, args.warmup_steps, steps, "cosine")
            set_rate(optimizer, rate)
            random = generator(args.seed, "batch", step)
            batch = draw_batch(examples, args.batch_size, length, codec.columns, random)

            # encode, add noise, decode, compare: codec.losses; backward, clip, step
            with autocast():
                noise = generator(args.seed, "noise", step)
                loss, parts = weighted_loss(codec, batch.to(device), noise, weights)
            if not math.isfinite(loss.item()):
                raise UserError(f"step {step}: the loss is {loss.item()}; lower --learning_rate")
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()

            # log and save
            minutes = (time.monotonic() - began) / 60
            last = minutes >= stop_at or step == steps or bool(stopped)
            if last or step % args.log_every == 0:
                losses = {"loss": loss, **parts, "grad_norm": norm}
                losses = {name: value.item() for name, value in losses.items()}
                row = {"step": step, **losses, "lr": rate, "minutes": minutes}
                row |= validate(codec, held_out, weights)
                append_jsonl(log, row)
                print_row(bar, row, stopped)
            if last or step % args.save_every == 0:
                save_state(args.out, codec.state_dict(), optimizer, {}, step, settings, minutes)
    return step


def main():
    args = parse_flags(__doc__, FLAGS)
    with run_folder(args.out, "vae.py"):
        codec = load_codec(args.checkpoint) if args.checkpoint else None
        kind = codec.kind if codec else args.codec
        args = parse_flags(__doc__, FLAGS, defaults=OOBLECK if kind == "oobleck" else None)
        args.codec = kind

        # the codec
        if codec:
            args.config = codec.config
        else:
            text = args.config or "{}"
            with reading("--config", "write a JSON object, or name a file with one"):
                text = text if text[0] == "{" else Path(text).read_text()
                args.config = {**CODECS[kind].TOY, **json.loads(text)}
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                codec = make_codec(kind, args.config)
        codec.to(choose_device(args.device)).requires_grad_(True)
        print(f"{kind} codec, {sum(p.numel() for p in codec.parameters()):,} parameters")

        # resume
        settings = {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
        settings["steps"] = settings.pop("train_steps")     # its name in state.pt
        optimizer = torch.optim.AdamW(codec.parameters(), betas=(args.beta1, 0.99), weight_decay=0)
        step, minutes = load_state(args.out, codec.state_dict(), optimizer, {}, settings,
                                   "vae.safetensors")

        # examples
        if args.data:
            sides = split_clips(read_rows(args), args.seed)
            clips = [file_clips(codec, rows, args.seconds, args.crop) for rows in sides]
        else:
            worlds = [World(split, args.seed, degraded=args.degraded) for split in ("train", "val")]
            clips = [world_clips(codec, world) for world in worlds]
        examples = load_examples(codec, clips[0], args.clips)                       # (N, R, T)
        held_out = load_examples(codec, clips[1], args.validation_clips)
        if step == 0 and not args.checkpoint:
            codec.start(examples)
        trim_log(args.out, step or -1)                      # a new run writes its row of step 0

        # train, measure the latents, save
        step = train(args, codec, optimizer, examples, held_out, settings, step, minutes)
        codec.finish(examples)
        save_codec(args.out, codec, training=settings)
        panels = [("loss", "log", {"training": "loss", "held-out clips": "validation_loss"}),
                  ("log-mel error, dB", "linear", {"held-out clips": "validation_db"})]
        draw_log(args.out, panels, "vae_loss.png")
        more = "; the same command goes on" if step < args.train_steps else ""
        print(f"wrote {args.out} after step {step} of {args.train_steps}{more}")
        print(f"next: python train_fm.py --codec {args.out}")


if __name__ == "__main__":
    run_main(main)
