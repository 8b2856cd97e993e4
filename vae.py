"""The codecs, audio <-> latents: load, save, and train either of the two.

    python vae.py                                            # the toy's mel codec, on the built-in world
    python vae.py --codec oobleck --max_minutes 20           # a small waveform codec, on one-second crops
    python vae.py --data my/captions.jsonl --seconds 4.096   # on audio of your own
    python vae.py --checkpoint runs/vae --out runs/finer --learning_rate 1e-3    # go on from a trained codec
    python vae.py --codec oobleck --data sounds/captions.jsonl --seconds 1 --overfit 8 --max_minutes 20 \\
        --out runs/oobleck_overfit                           # does it learn at all? Eight clips, by heart

A codec has sampling_rate, audio_channels, hop (samples per latent frame), latent_channels, and
    encode(audio (B, channels, samples)) -> mean, std (B, L, C) raw     decode(latents (B, L, C) raw) -> audio
    normalise(latents), denormalise(latents)                            what the flow is trained on and makes
Nothing else in the code knows which codec it talks to. The mel codec (melvae.py) is the second paper's,
small; Oobleck (oobleck.py) is the first paper's. Both train in the one loop below; the losses stand beside
the networks. Batch and noise of a step follow from (seed, step): a killed and resumed run ends with the same
bits.

Letters: B batch, L latent frames, C latent channels, M mel bands, F mel frames.
"""
import argparse
import itertools
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from audio import probe_audio, resample
from common import (UserError, append_jsonl, choose_device, generator, in_range, parse_arguments, read_json, read_jsonl,
                    run_main, save_tensors, write_json)
from melvae import MelVAE, mel_losses
from oobleck import (LOSS_WEIGHTS, OOBLECK_DEFAULTS, TOY_OOBLECK, TOY_OOBLECK_TRAINING, Oobleck, empty_oobleck,
                     oobleck_losses)
from training import cosine_decay, draw_log, load_state, save_state, trim_log
from vocoder import MEL_16K, MEL_44K, LogMel, log_mel_error
from weights import find_weights, load_weights

# 4.096 s at 16 kHz = 256 mel frames = 64 latent frames of 64 ms, 48 channels. The paper's layout as it is (two
# halvings, random start, 32 channels) stood at a log-mel error of 7 dB after 2000 steps, and reconstructions lost
# 40 % of event F1. Four mel frames to a column and a linear skip stand at 2.9 dB before the first step (see
# melvae.py).
TOY_MEL = dict(data_dim=80, embed_dim=48, hidden_dim=192, ch_mult=[1], num_res_blocks=1, attn_layers=[3],
               down_layers=[], patch=4, linear_skip=True)

# What differs between the codecs where a flag is not given.
DEFAULTS = {
    "mel": dict(config=TOY_MEL, clips=6000, crop_seconds=2.048, steps=1000, batch_size=32, learning_rate=1e-2,
                beta1=0.9, kl_weight=1e-3, dtype="bfloat16"),
    "oobleck": dict(config=TOY_OOBLECK, clips=512, dtype="float32", **TOY_OOBLECK_TRAINING),
}


# ----------------------------------------------------------------------------- codecs on disk

def make_codec(kind, config, empty=False):
    """A codec with random weights: kind "mel" (config of MelVAE) or "oobleck" (config of Oobleck).

    `empty`: Oobleck's weights will be loaded and are not drawn.
    """
    if kind not in DEFAULTS:
        raise UserError(f"the codec is called {kind!r}; use mel or oobleck")
    for name, value in config.items() if kind == "oobleck" else ():
        values = value if isinstance(OOBLECK_DEFAULTS.get(name), list) else [value]
        if not isinstance(values, (list, tuple)) or any(type(each) is not int or each < 1 for each in values):
            raise UserError(f"config.json: {name} of the codec is {value!r}, but must be made of whole numbers from 1")
    try:
        if kind == "mel":
            return MelVAE(**config)
        return (empty_oobleck if empty else Oobleck)(**{**OOBLECK_DEFAULTS, **config})
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"the config does not describe a codec of kind {kind}: {error}") from None


def codec_place(name):
    """(folder, file name, kind, config) of the codec of a model folder, a hub id, or a VAE in diffusers' layout."""
    from model import model_folder, read_config, resolve
    folder = model_folder(name, ("config.json", "vae.safetensors", "vae/*"))
    for place in (folder, folder / "vae"):                          # Stable Audio Open has it in vae/
        config = read_config(place) if (place / "config.json").is_file() else {}
        if config.get("_class_name") == "AutoencoderOobleck":
            return place, "diffusion_pytorch_model.safetensors", "oobleck", {
                key: config[key] for key in OOBLECK_DEFAULTS if key in config}
    folder = resolve(folder, "vae")
    config = read_config(folder).get("vae", {})
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json: vae is {config!r}, but must be a JSON object")
    rest = {name: value for name, value in config.items() if name != "codec"}
    return folder, "vae.safetensors", config.get("codec", "oobleck"), rest


def load_codec(name, device="cpu"):
    """The codec of a model folder or hub id, for inference. Raises UserError if missing, truncated or misshapen.

    folder/config.json says which: {"vae": {"codec": "mel", ...}}; without that key it is the official
    Oobleck. A part may live elsewhere: {"references": {"vae": "../base"}}. Weights are in
    folder/vae.safetensors. Stable Audio Open's own layout (vae/config.json, vae/diffusion_pytorch_model.safetensors)
    is read, too.
    """
    folder, file_name, kind, config = codec_place(name)
    codec = make_codec(kind, config, empty=True)
    weights = find_weights(folder, file_name)
    load_weights(codec, weights, optional=("latent_mean", "latent_std"))    # official mel files keep them with the flow
    return codec.to(device).requires_grad_(False).eval().fold()


def save_codec(folder, codec, dtype=torch.float16):
    """Write folder/vae.safetensors and the "vae" key of folder/config.json (other keys stay as they are)."""
    folder = Path(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in codec.state_dict().items()}
    save_tensors(folder / "vae.safetensors", tensors)
    write_config(folder, codec)


def write_config(folder, codec, notes=None):
    """Set the keys "vae" and, if given, "vae_training" of folder/config.json."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.exists() else {}
    config["vae"] = {"codec": codec_kind(codec), **codec.config}
    if notes:
        config["vae_training"] = notes
    write_json(path, config)


def codec_kind(codec):
    """"mel" or "oobleck"."""
    return "mel" if hasattr(codec, "encode_mel") else "oobleck"


# ----------------------------------------------------------------------------- data

def clip_sources(args, codec):
    """Training and held-out clips of the world or a manifest: two lists of () -> audio (channels, samples).

    With --overfit nothing is held out: the second list is empty, and training and validation share the first.
    """
    if args.data is None:
        from world import SAMPLE_RATE, World

        def render(world, index):
            audio = torch.as_tensor(world.render(index)[0])[None]                   # (1, samples)
            return resample(audio, SAMPLE_RATE, codec.sampling_rate).expand(codec.audio_channels, -1)
        train, held_out = (World(split, args.seed, degraded=args.degraded) for split in ("train", "val"))
        count, held_count = (args.overfit, 0) if args.overfit else (args.clips, args.validation_clips)
        return ([lambda i=i: render(train, i) for i in range(count)],
                [lambda i=i: render(held_out, i) for i in range(held_count)])

    def read(row):
        samples = round(args.seconds * codec.sampling_rate)
        return data.load_clip(row, codec.sampling_rate, codec.audio_channels, samples, args.crop)[0]
    rows = list({row["audio"]: row for row in data.manifest_rows(args)}.values())   # some have two captions
    order = torch.randperm(len(rows), generator=generator(args.seed, "clips")).tolist()
    rows = [rows[i] for i in order]                 # a manifest may be sorted: take its clips at random
    if args.overfit:
        sides = overfit_rows(rows, args), []
    elif len(rows) < 2:
        raise UserError(f"{args.data} has a single usable sound file; training needs two, one to hold out")
    else:
        train, held_out = data.split_rows(rows, 0.05, args.seed)
        sides = train[:args.clips], held_out[:args.validation_clips]
    return tuple([lambda row=row: read(row) for row in side] for side in sides)


def overfit_rows(rows, args):
    """The first --overfit rows with --seconds of sound or more: none is filled up with silence."""
    def seconds(row):
        return min(probe_audio(row["audio"]), row["duration"] or math.inf)
    chosen = list(itertools.islice((row for row in rows if seconds(row) >= args.seconds), args.overfit))
    if len(chosen) < args.overfit:
        raise UserError(f"{args.data} has {len(chosen)} clips of {args.seconds:g} s or more; use a smaller "
                        f"--overfit than {args.overfit}, or fewer --seconds")
    for row in chosen:
        print(f"to be learned by heart: {Path(row['audio']).name}, {row['caption']}")
    return chosen


def gather(codec, clips, what):
    """What the codec trains on, in memory: log-mels (N, M, F) float16, or audio (N, channels, samples).

    Rendering a scene costs as much as a training step on it, and a log-mel takes 40 kB: all are kept.
    """
    examples = []
    for clip in tqdm(clips, desc=what, unit="clip", disable=len(clips) < 100):
        audio = clip()                                                              # (channels, samples)
        missing = -audio.shape[-1] % codec.hop
        audio = torch.nn.functional.pad(audio, (0, missing))
        if codec_kind(codec) == "mel":
            audio = codec.mel(audio.mean(0, keepdim=True).to(codec.latent_mean.device))[0].half().cpu()
        examples.append(audio)
    return torch.stack(examples)


def draw_batch(examples, size, length, multiple, *seed):
    """Random crops (size, rows, length) of examples (N, rows, T); batch i of a run depends on its seed alone.

    Starts are multiples of `multiple`; examples shorter than `length` are used whole.
    """
    random = generator(*seed)
    length = min(length, examples.shape[-1])
    index = torch.randint(len(examples), (size,), generator=random)
    start = torch.randint((examples.shape[-1] - length) // multiple + 1, (size,), generator=random) * multiple
    return torch.stack([examples[i, :, s:s + length] for i, s in zip(index.tolist(), start.tolist())]).float()


# ----------------------------------------------------------------------------- the algorithm

def loss_and_parts(codec, batch, random, weights):
    """Weighted loss of a batch and its parts as floats: L1 on log-mels + KL, or STFT + waveform + KL."""
    losses = mel_losses if codec_kind(codec) == "mel" else oobleck_losses
    parts = losses(codec, batch, random)
    loss = sum(weights.get(name, 1.0) * value for name, value in parts.items())
    return loss, {name: value.item() for name, value in parts.items()}


@torch.no_grad()
def validate(codec, examples, length, weights):
    """Loss, and log-mel error in dB (vocoder.log_mel_error), on the first `length` columns of all examples.

    The loss is training's, with noise that is the same each time: what changes between two validations is the
    codec. The error is that of the posterior mean, decoded: without Griffin-Lim for the mel codec; from the
    waveform, under a front end for its rate, for the other.
    """
    codec.eval()
    losses, errors = 0.0, []
    for number, batch in enumerate(examples[..., :length].float().split(8)):
        batch = batch.to(codec.latent_mean.device)
        loss, _ = loss_and_parts(codec, batch, generator("validation", number), weights)
        losses += loss.item() * len(batch)
        if codec_kind(codec) == "mel":
            mel, reference, ours = codec.mel, batch, codec.decode_mel(codec.encode_mel(batch)[0])
        else:
            mel = LogMel(**(MEL_16K if codec.sampling_rate < 32000 else MEL_44K)).to(batch.device)
            ours = codec.decode(codec.encode(batch)[0])
            reference, ours = mel(batch[..., :ours.shape[-1]].flatten(0, 1)), mel(ours.flatten(0, 1))
        errors.append(log_mel_error(reference, ours, mel.natural))
    codec.train()
    return {"validation_loss": losses / len(examples), "validation_db": torch.cat(errors).mean().item()}


@torch.no_grad()
def measure_latents(codec, examples, limit=2000):
    """Set the codec's latent_mean and latent_std (C,) from posterior samples of training examples.

    With a linear skip the principal components have equal variance, though the first moves the log-mel a hundred times
    as much as the last. The flow's loss should not spend itself on the last: a normalised channel keeps a standard
    deviation in proportion to the square root of its reach (mean square 1). A choice, not yet a finding: one run each
    and 128 prompts gave event F1 0.456, 5 exact scenes after 2200 steps so, 0.455 and 1 after 4000 with equal channels.
    """
    codec.eval()
    means, variances = [], []
    for batch in examples[:limit].split(64):
        mean, std = codec.encode_mel(batch.float().to(codec.latent_mean.device))    # (B, L, C)
        means.append(mean.flatten(0, 1))
        variances.append(std.square().flatten(0, 1))
    means, variances = torch.cat(means), torch.cat(variances)
    codec.latent_mean.copy_(means.mean(0))
    std = (means.var(0) + variances.mean(0)).sqrt()
    if codec.linear_skip:
        share = codec.skip_decoder.norm(dim=1).sqrt()                               # (C,)
        std = std / (share / share.square().mean().sqrt())
    codec.latent_std.copy_(std)


# ----------------------------------------------------------------------------- training

def train(args):
    """Train the codec that the flags describe (see `flags`); returns it and the steps done."""
    began, device = time.monotonic(), choose_device(args.device)
    if args.checkpoint:
        codec = load_codec(args.checkpoint)
        args.codec = codec_kind(codec)
    fill_defaults(args)
    if args.checkpoint:
        args.config = codec.config
    else:
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            codec = make_codec(args.codec, args.config)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out", "max_minutes", "log_every", "save_every", "device")}
    codec = codec.to(device).requires_grad_(True).train()
    betas = args.beta1, args.beta2
    optimizer = torch.optim.AdamW(codec.parameters(), lr=args.learning_rate, betas=betas, weight_decay=0.0)
    size, frame = sum(p.numel() for p in codec.parameters()) / 1e6, 1000 * codec.hop / codec.sampling_rate
    print(f"{args.codec} codec, {size:.2f} M parameters; a latent frame is {frame:.0f} ms and "
          f"{codec.latent_channels} channels")
    named = codec.state_dict()                      # parameters and buffers: the codec's own memory
    step, earlier = load_state(args.out, named, optimizer, {}, settings, "vae.safetensors")
    write_config(args.out, codec, settings)         # before an hour of work: the folder may not be writable
    trim_log(args.out, step or -1)                  # a new run writes its own row of step 0
    if step:
        print(f"going on in {args.out} after step {step} of {args.steps}")

    train_clips, held_out_clips = clip_sources(args, codec)
    examples = gather(codec, train_clips, "training clips")             # (N, M, F) or (N, channels, T)
    held_out = examples if args.overfit else gather(codec, held_out_clips, "held-out clips")
    unit = codec.frames_per_latent if args.codec == "mel" else codec.hop
    frames = math.ceil(round(args.crop_seconds * codec.sampling_rate) / codec.hop)
    length = frames * unit                          # columns of a training crop
    if args.codec == "mel" and not args.checkpoint and step == 0:
        codec.data_mean.copy_(examples.float().mean((0, 2))[None, :, None])
        codec.data_std.copy_(examples.float().std((0, 2)).clamp(min=0.1)[None, :, None])
        if codec.linear_skip:
            codec.start_linear(examples)
    weights = {"kl": args.kl_weight, "waveform": args.waveform_weight}
    bar, late = tqdm(total=args.steps, initial=step, desc="training", unit="step"), False

    def log(row):
        row = {**row, **validate(codec, held_out, length, weights), "minutes": minutes_done()}
        append_jsonl(args.out / "log.jsonl", row)
        bar.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))

    def minutes_done():
        return earlier + (time.monotonic() - began) / 60

    if step == 0:
        log({"step": 0})                            # before any training
    while step < args.steps and not late:
        for group in optimizer.param_groups:
            group["lr"] = cosine_decay(step, args.learning_rate, args.warmup_steps, args.steps)
        batch = draw_batch(examples, args.batch_size, length, unit, args.seed, "batch", step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss, parts = loss_and_parts(codec, batch, generator(args.seed, "noise", step), weights)
        if not math.isfinite(loss.item()):
            raise UserError(f"step {step}: the loss is {loss.item()}; lower --learning_rate or try --dtype float32")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(codec.parameters(), args.max_grad_norm)
        optimizer.step()
        step += 1
        bar.update()
        late = minutes_done() - earlier >= args.max_minutes
        last = late or step == args.steps
        if last or step % args.log_every == 0:
            log({"step": step, "loss": loss.item(), **parts, "grad_norm": norm.item(), "lr": group["lr"]})
        if last or step % args.save_every == 0:
            save_state(args.out, named, optimizer, {}, step, settings, minutes_done())
    bar.close()
    if args.codec == "mel":
        measure_latents(codec, examples)
    return codec, step


def draw_losses(out, clips):
    """out/vae_loss.png: training loss and its parts, and log-mel error. False without matplotlib."""
    names = ("loss", "mel", "stft", "waveform", "kl")
    losses = {name: lambda row, name=name: row.get(name) for name in names}
    losses[f"loss, {clips} clips, fixed noise"] = lambda row: row.get("validation_loss")
    error = {"posterior mean, decoded": lambda row: row.get("validation_db")}
    return draw_log(out, [("training loss", "log", losses),
                          (f"log-mel error of {clips} clips (dB)", "linear", error)], "vae_loss.png")


# ----------------------------------------------------------------------------- flags

def flags():
    """The parser of this script; None stands for a default of the codec's own (see `fill_defaults`)."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    group = parser.add_argument_group("codec")
    group.add_argument("--codec", choices=list(DEFAULTS), default="mel",
                       help="mel: 1D mel VAE + Griffin-Lim (second paper's layout, small); oobleck: waveform "
                            "VAE of the first paper (frozen there, from Stable Audio Open); default mel")
    group.add_argument("--config", metavar="JSON",
                       help="JSON object, or a file with one, that overrides parts of the small default "
                            "config; the second paper's is data_dim 80, embed_dim 20, hidden_dim 384, "
                            "ch_mult [1, 2, 4], num_res_blocks 2, down_layers [0]")
    group.add_argument("--checkpoint", metavar="FOLDER",
                       help="a trained codec to start from; default none: from scratch")
    data.add_data_flags(parser)
    group = parser.add_argument_group("clips")
    group.add_argument("--seconds", type=float, default=4.096,
                       help="length of a clip of --data; default 4.096")
    group.add_argument("--clips", type=int,
                       help="clips kept in memory (of --data, at random); default 6000 (mel), 512 (oobleck)")
    group.add_argument("--overfit", type=int, metavar="CLIPS",
                       help="learn so many clips by heart, to see whether training works at all: they are "
                            "the training AND the validation clips; of --data none shorter than --seconds; "
                            "default off")
    group.add_argument("--validation_clips", type=int, default=64, help="held-out clips; default 64")
    group.add_argument("--degraded", type=float, default=0.3,
                       help="share of the world's scenes with a known degradation, so that the codec keeps "
                            "bad audio bad; default 0.3")
    group.add_argument("--crop_seconds", type=float,
                       help="length of a training crop; default 2.048 (mel), 1.0 (oobleck)")
    group = parser.add_argument_group("training (neither paper trains its codec)")
    group.add_argument("--steps", type=int, help="optimizer steps; default 1000 (mel), 3000 (oobleck)")
    group.add_argument("--max_minutes", type=float, default=60.0,
                       help="stop after these minutes of this command, saved; the same command goes on; "
                            "default 60")
    group.add_argument("--batch_size", type=int, help="crops per step; default 32 (mel), 4 (oobleck)")
    group.add_argument("--learning_rate", type=float,
                       help="peak learning rate of AdamW; default 1e-2 (mel: its raw weights have unit "
                            "variance), 3e-3 (oobleck)")
    group.add_argument("--beta1", type=float, help="of AdamW; default 0.9 (mel), 0.8 (oobleck)")
    group.add_argument("--beta2", type=float, default=0.99, help="of AdamW; default 0.99")
    group.add_argument("--warmup_steps", type=int, default=50,
                       help="linear warm-up, then cosine decay to 0 at --steps; default 50")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradient clipping; default 1.0")
    group.add_argument("--kl_weight", type=float,
                       help="weight of the KL term; default 1e-3 (mel), 1e-4 (oobleck)")
    group.add_argument("--waveform_weight", type=float, default=LOSS_WEIGHTS["waveform"],
                       help="weight of the waveform L1 (oobleck); default 1.0")
    group.add_argument("--dtype", choices=("float32", "bfloat16"),
                       help="bfloat16 is autocast; default bfloat16 (mel), float32 (oobleck)")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, default=Path("runs/vae"),
                       help="output folder; a run found there is resumed; default runs/vae")
    group.add_argument("--seed", type=int, default=0, help="weights, scenes, batches and noise; default 0")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or mps; default auto")
    group.add_argument("--log_every", type=int, default=50, help="steps between validations; default 50")
    group.add_argument("--save_every", type=int, default=100, help="steps between saved states; default 100")
    return parser


def fill_defaults(args):
    """Put the codec's own defaults where no flag was given, and check the ranges."""
    for name, value in DEFAULTS[args.codec].items():
        if name != "config" and getattr(args, name) is None:
            setattr(args, name, value)
    if args.config is None:
        args.config = {}
    elif isinstance(args.config, str):
        try:
            is_json = args.config.lstrip().startswith("{")
            args.config = dict(json.loads(args.config if is_json else Path(args.config).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--config is neither a JSON object nor a file with one: {error}") from None
    if args.checkpoint and args.config:
        raise UserError("--config describes a codec from scratch; leave it out with --checkpoint")
    args.config = {**DEFAULTS[args.codec]["config"], **args.config}
    for name in ("steps", "clips", "batch_size", "validation_clips", "log_every", "save_every",
                 "warmup_steps"):
        in_range(f"--{name}", getattr(args, name), 1, 1e9)
    for name in ("learning_rate", "max_grad_norm"):
        in_range(f"--{name}", getattr(args, name), 1e-9, 1e6)
    for name in ("crop_seconds", "seconds"):
        in_range(f"--{name}", getattr(args, name), 0.1, 600)    # below a tenth the mel front end has no frame
    for name in ("max_minutes", "kl_weight", "waveform_weight"):
        in_range(f"--{name}", getattr(args, name), 0, 1e6)
    for name in ("beta1", "beta2"):
        in_range(f"--{name}", getattr(args, name), 0, 0.99999)
    data.check_data_flags(args, flags(), world=("degraded",))
    in_range("--degraded", args.degraded, 0, 1)
    in_range("--seed", args.seed, 0, 2 ** 63)
    if args.overfit is not None:
        in_range("--overfit", args.overfit, 1, 1e6)


def main():
    args = parse_arguments(flags())
    codec, step = train(args)
    save_codec(args.out, codec)
    clips = "training" if args.overfit else "held-out"
    picture = draw_losses(args.out, clips)
    print(f"wrote {args.out}/vae.safetensors, config.json, state.pt, log.jsonl{', vae_loss.png' * picture}")
    first, *_, last = read_jsonl(args.out / "log.jsonl")
    ratio = last["validation_loss"] / first["validation_loss"]
    print(f"{clips} clips, fixed noise, steps 0 to {step}, {last['minutes']:.1f} minutes: "
          f"loss {first['validation_loss']:.3f} to {last['validation_loss']:.3f} (x {ratio:.2f}), "
          f"log-mel error {first['validation_db']:.1f} to {last['validation_db']:.1f} dB")
    if step < args.steps:
        print(f"stopped at step {step} of {args.steps} by --max_minutes; the same command goes on")
    elif args.overfit:
        print("next: the same without --overfit, into another --out, trains a codec for use")
    else:
        print(f"next: python train_fm.py --codec {args.out}")


if __name__ == "__main__":
    run_main(main)
