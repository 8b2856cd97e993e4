"""The codecs, audio <-> latents: load, save, and train either of the two.

    python vae.py                                            # the toy's mel codec, on the built-in world (minutes)
    python vae.py --codec oobleck --max_minutes 20           # a small waveform codec, on one-second crops
    python vae.py --data my/captions.jsonl --seconds 4.096   # on audio of your own
    python vae.py --checkpoint runs/vae --out runs/finer --lr 1e-3    # go on from a trained codec

A codec has sampling_rate, audio_channels, hop (samples per latent frame), latent_channels, and
    encode(audio (B, channels, samples)) -> mean, std (B, L, C) raw       decode(latents (B, L, C) raw) -> audio
    normalise(latents), denormalise(latents)                              what training and sampling of the flow see
Nothing else in the code knows which codec it talks to. The mel codec (melvae.py) is the second paper's,
small; Oobleck (oobleck.py) is the first paper's. Both train in the one loop below; the losses stand beside
the networks.

Letters: B batch, L latent frames, C latent channels, M mel bands, F mel frames.
"""
import argparse
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from audio import resample
from common import (UserError, append_jsonl, atomic_path, choose_device, generator, in_range, load_exactly,
                    load_tensors, read_json, read_jsonl, run_main, save_tensors, write_json)
from vocoder import MEL_16K, MEL_44K, LogMel, log_mel_error

# 4.096 s at 16 kHz = 256 mel frames = 64 latent frames of 64 ms. 1.4 M parameters.
TOY_MEL = dict(data_dim=80, embed_dim=32, hidden_dim=64, ch_mult=[1, 2, 2], num_res_blocks=1, attn_layers=[3],
               down_layers=[0, 1])
# The same frames from waveforms: hop 8 * 8 * 4 * 4 = 1024.
TOY_OOBLECK = dict(encoder_hidden_size=8, downsampling_ratios=[4, 4, 8, 8], channel_multiples=[1, 4, 8, 16],
                   decoder_channels=8, decoder_input_channels=32, audio_channels=1, sampling_rate=16000)

# What differs between the codecs where a flag is not given.
DEFAULTS = {
    "mel": dict(config=TOY_MEL, clips=6000, crop_seconds=2.048, steps=2000, batch_size=32, lr=1e-2,
                kl_weight=1e-3, precision="bfloat16"),
    "oobleck": dict(config=TOY_OOBLECK, clips=512, crop_seconds=1.0, steps=2000, batch_size=8, lr=1e-3,
                    kl_weight=1e-4, precision="float32"),
}


# ----------------------------------------------------------------------------- codecs on disk

def make_codec(kind, config):
    """A codec with random weights: kind "mel" (config of MelVAE) or "oobleck" (config of Oobleck)."""
    from melvae import MelVAE
    from oobleck import OOBLECK_DEFAULTS, Oobleck
    if kind not in DEFAULTS:
        raise UserError(f"the codec is called {kind!r}; use mel or oobleck")
    try:
        return MelVAE(**config) if kind == "mel" else Oobleck(**{**OOBLECK_DEFAULTS, **config})
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(f"the config does not describe a {kind} codec: {error}") from None


def load_codec(folder, device="cpu"):
    """The codec of a model folder, for inference. Raises UserError if missing, truncated or misshapen.

    folder/config.json says which: {"vae": {"codec": "mel", ...}}; without that key it is the official
    Oobleck. A part may live elsewhere: {"references": {"vae": "../base"}}. Weights are in
    folder/vae.safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"the codec folder {folder} is missing; give a folder with config.json and vae.safetensors")
    config = read_json(folder / "config.json")
    if "vae" in config.get("references", {}):
        return load_codec(folder / config["references"]["vae"], device)
    config = dict(config.get("vae", {}))
    codec = make_codec(config.pop("codec", "oobleck"), config)
    tensors = load_tensors(folder / "vae.safetensors")
    for name in ("latent_mean", "latent_std"):      # the official mel files keep them with the flow
        if name in codec.state_dict():
            tensors.setdefault(name, getattr(codec, name))
    load_exactly(codec, tensors, folder / "vae.safetensors")
    return codec.to(device).requires_grad_(False).eval().fold()


def save_codec(folder, codec, dtype=torch.float16):
    """Write folder/vae.safetensors and the "vae" key of folder/config.json (other keys stay as they are)."""
    folder = Path(folder)
    save_tensors(folder / "vae.safetensors", {name: tensor.to(dtype) for name, tensor in codec.state_dict().items()})
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
    return "mel" if hasattr(codec, "encode_mel") else "oobleck"


# ----------------------------------------------------------------------------- data

def clip_sources(args, codec):
    """Training and held-out clips, of the world or a manifest: two lists of () -> audio (channels, samples)."""
    if args.data is None:
        from world import SAMPLE_RATE, World

        def render(world, index):
            audio = torch.as_tensor(world.render(index)[0])[None]                   # (1, samples)
            return resample(audio, SAMPLE_RATE, codec.sampling_rate).expand(codec.audio_channels, -1)
        train, held_out = (World(split, args.seed, degraded=args.degraded) for split in ("train", "val"))
        return ([lambda i=i: render(train, i) for i in range(args.clips)],
                [lambda i=i: render(held_out, i) for i in range(args.validation_clips)])

    samples = round(args.seconds * codec.sampling_rate)
    rows = {row["audio"]: row for row in data.manifest_rows(args)}.values()         # a file may have many captions
    if len(rows) < 2:
        raise UserError(f"{args.data} has a single usable sound file; training needs two, one to hold out")

    def read(row):
        return data.load_clip(row, codec.sampling_rate, codec.audio_channels, samples, args.crop)[0]
    sides = data.split_rows(list(rows), 0.05, args.seed)
    limits = args.clips, args.validation_clips
    return tuple([lambda row=row: read(row) for row in side[:limit]] for side, limit in zip(sides, limits))


def gather(codec, clips, what):
    """What the codec trains on, in memory: log-mels (N, M, F) float16, or audio (N, channels, samples).

    Rendering a scene costs as much as a training step on it, and a log-mel takes 40 kB: all are kept.
    """
    examples = []
    for clip in tqdm(clips, desc=what, unit="clip", disable=len(clips) < 100):
        audio = clip()                                                              # (channels, samples)
        missing = -audio.shape[-1] % codec.hop
        audio = torch.nn.functional.pad(audio, (0, missing))
        examples.append(codec.mel(audio.mean(0, keepdim=True))[0].half() if codec_kind(codec) == "mel" else audio)
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
    if codec_kind(codec) == "mel":
        from melvae import mel_losses
        parts = mel_losses(codec, batch, random)
    else:
        from oobleck import oobleck_losses
        parts = oobleck_losses(codec, batch, random)
    loss = sum(weights.get(name, 1.0) * value for name, value in parts.items())
    return loss, {name: value.item() for name, value in parts.items()}


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then cosine decay to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def reconstruction_error(codec, examples, length):
    """Mean log-mel error in dB (vocoder.log_mel_error) of held-out examples, decoded from the posterior mean.

    Without Griffin-Lim for the mel codec; from the waveform, under a front end for its rate, for the other.
    """
    codec.eval()
    errors = []
    for batch in examples[..., :length].float().split(8):
        batch = batch.to(codec.latent_mean.device)
        if codec_kind(codec) == "mel":
            mel, reference, ours = codec.mel, batch, codec.decode_mel(codec.encode_mel(batch)[0])
        else:
            mel = LogMel(**(MEL_16K if codec.sampling_rate < 32000 else MEL_44K)).to(batch.device)
            ours = codec.decode(codec.encode(batch)[0])
            reference, ours = mel(batch[..., :ours.shape[-1]].flatten(0, 1)), mel(ours.flatten(0, 1))
        errors.append(log_mel_error(reference, ours, mel.natural))
    codec.train()
    return torch.cat(errors).mean().item()


@torch.no_grad()
def measure_latents(codec, examples, limit=2000):
    """Set the codec's latent_mean and latent_std (C,) from posterior samples of training examples."""
    codec.eval()
    means, variances = [], []
    for batch in examples[:limit].split(64):
        mean, std = codec.encode_mel(batch.float().to(codec.latent_mean.device))    # (B, L, C)
        means.append(mean.flatten(0, 1))
        variances.append(std.square().flatten(0, 1))
    means, variances = torch.cat(means), torch.cat(variances)
    codec.latent_mean.copy_(means.mean(0))
    codec.latent_std.copy_((means.var(0) + variances.mean(0)).sqrt())


# ----------------------------------------------------------------------------- training

def restore(args, settings, codec, optimizer):
    """Load args.out/state.pt if it is there: steps done, seconds spent. A run with other settings is refused."""
    path = args.out / "state.pt"
    if not path.exists():
        return 0, 0.0
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        problem = type(error).__name__
        raise UserError(f"{path} cannot be read ({problem}); delete it or use another --out") from None
    changed = [f"--{name} was {state['settings'].get(name)!r}" for name in settings
               if settings[name] != state["settings"].get(name)]
    if changed:
        raise UserError(f"{args.out} holds a run with other settings ({', '.join(changed)}); "
                        "repeat them or use another --out")
    codec.load_state_dict(state["codec"])
    optimizer.load_state_dict(state["optimizer"])
    log = args.out / "log.jsonl"
    rows = [row for row in (read_jsonl(log) if log.exists() else []) if row["step"] <= state["step"]]
    with atomic_path(log) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"resuming {args.out} after step {state['step']} of {args.steps}")
    return state["step"], state["seconds"]


def train(args):
    """Train the codec that the flags describe (see `flags`); returns it and the steps done."""
    device = choose_device(args.device)
    if args.checkpoint:
        codec = load_codec(args.checkpoint)
        args.codec = codec_kind(codec)
    fill_defaults(args)
    if not args.checkpoint:
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            codec = make_codec(args.codec, args.config)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("out", "max_minutes", "log_every", "save_every", "device")}
    codec = codec.to(device).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    print(f"{args.codec} codec, {sum(p.numel() for p in codec.parameters()) / 1e6:.2f} M parameters, "
          f"{codec.hop / codec.sampling_rate * 1000:.0f} ms and {codec.latent_channels} channels per latent frame")
    step, seconds = restore(args, settings, codec, optimizer)
    write_config(args.out, codec, settings)             # before an hour of work, in case the folder cannot be written

    train_clips, held_out_clips = clip_sources(args, codec)
    examples = gather(codec, train_clips, "training clips")                         # (N, M, F) or (N, channels, T)
    held_out = gather(codec, held_out_clips, "held-out clips")
    unit = codec.frames_per_latent if args.codec == "mel" else codec.hop
    samples_per_column = codec.mel.hop if args.codec == "mel" else 1
    length = max(1, round(args.crop_seconds * codec.sampling_rate / samples_per_column / unit)) * unit
    if args.codec == "mel" and not args.checkpoint and step == 0:
        codec.data_mean.copy_(examples.float().mean((0, 2))[None, :, None])
        codec.data_std.copy_(examples.float().std((0, 2)).clamp(min=0.1)[None, :, None])
    weights = {"kl": args.kl_weight, "waveform": args.waveform_weight}
    started, bar = time.time() - seconds, tqdm(total=args.steps, initial=step, desc="training", unit="step")

    while step < args.steps and time.time() - started < args.max_minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup_steps)
        batch = draw_batch(examples, args.batch_size, length, unit, args.seed, "batch", step).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bfloat16"):
            loss, parts = loss_and_parts(codec, batch, generator(args.seed, "noise", step), weights)
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()} at step {step}; try a smaller --lr or --precision float32")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(codec.parameters(), args.max_grad_norm)
        optimizer.step()
        step += 1
        bar.update()

        last = step == args.steps
        if step % args.log_every == 0 or step == 1 or last:
            row = {"step": step, "loss": loss.item(), **parts, "grad_norm": norm.item(),
                   "validation_db": reconstruction_error(codec, held_out, length),
                   "lr": group["lr"], "minutes": (time.time() - started) / 60}
            append_jsonl(args.out / "log.jsonl", row)
            bar.write("  ".join(f"{k} {v:.4g}" for k, v in row.items()))
        if step % args.save_every == 0 or last:
            save_state(args.out, step, time.time() - started, codec, optimizer, settings)
    bar.close()
    save_state(args.out, step, time.time() - started, codec, optimizer, settings)
    if args.codec == "mel":
        measure_latents(codec, examples)
    return codec, step


def save_state(out, step, seconds, codec, optimizer, settings):
    """What `restore` needs, in one atomic file; no RNG state, as batches and noise depend on the step."""
    with atomic_path(out / "state.pt") as temporary:
        torch.save({"step": step, "seconds": seconds, "codec": codec.state_dict(),
                    "optimizer": optimizer.state_dict(), "settings": settings}, temporary)


def loss_picture(out):
    """out/vae_loss.png from out/log.jsonl; returns False with a notice where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("matplotlib is missing: no loss picture")
        return False
    rows = read_jsonl(out / "log.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name in [name for name in ("loss", "mel", "stft", "waveform", "kl") if name in rows[0]]:
        left.plot([row["step"] for row in rows], [row[name] for row in rows], label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    left.legend()
    right.plot([row["step"] for row in rows], [row["validation_db"] for row in rows])
    right.set(xlabel="step", ylabel="log-mel error of held-out clips (dB)", ylim=(0, None))
    with atomic_path(out / "vae_loss.png") as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return True


# ----------------------------------------------------------------------------- flags

def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("codec")
    group.add_argument("--codec", choices=list(DEFAULTS), default="mel",
                       help="mel: 1D mel VAE + Griffin-Lim (second paper's layout, small); oobleck: waveform VAE of the "
                            "first paper (frozen there, from Stable Audio Open); default mel")
    group.add_argument("--config", metavar="JSON",
                       help="JSON object, or a file with one, that overrides parts of the small default config; the "
                            "second paper's is data_dim 80, embed_dim 20, hidden_dim 384, ch_mult [1, 2, 4], "
                            "num_res_blocks 2, down_layers [0]")
    group.add_argument("--checkpoint", metavar="FOLDER",
                       help="a trained codec to start from; default none: from scratch")
    data.add_data_flags(parser)
    group = parser.add_argument_group("clips")
    group.add_argument("--seconds", type=float, default=4.096, help="length of a clip of --data; default 4.096")
    group.add_argument("--clips", type=int, help="clips kept in memory; default 6000 (mel), 512 (oobleck)")
    group.add_argument("--validation_clips", type=int, default=64, help="held-out clips; default 64")
    group.add_argument("--degraded", type=float, default=0.3,
                       help="share of the world's scenes with a known degradation, so that the codec keeps bad audio "
                            "bad; default 0.3")
    group.add_argument("--crop_seconds", type=float,
                       help="length of a training crop; default 2.048 (mel), 1.0 (oobleck)")
    group = parser.add_argument_group("training (neither paper trains its codec)")
    group.add_argument("--steps", type=int, help="optimizer steps; default 2000 (mel), 2000 (oobleck)")
    group.add_argument("--max_minutes", type=float, default=60.0,
                       help="stop after this many; the same command goes on; default 60")
    group.add_argument("--batch_size", type=int, help="crops per step; default 32 (mel), 8 (oobleck)")
    group.add_argument("--lr", type=float,
                       help="peak learning rate of AdamW; default 1e-2 (mel: its raw weights have unit variance), "
                            "1e-3 (oobleck)")
    group.add_argument("--warmup_steps", type=int, default=50, help="linear warm-up, cosine decay after; default 50")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradient clipping; default 1.0")
    group.add_argument("--kl_weight", type=float,
                       help="weight of the KL term; default 1e-3 (mel), 1e-4 (oobleck)")
    group.add_argument("--waveform_weight", type=float, default=1.0,
                       help="weight of the waveform L1 (oobleck); default 1.0")
    group.add_argument("--precision", choices=("float32", "bfloat16"),
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
            text = Path(args.config).read_text() if Path(args.config).is_file() else args.config
            args.config = dict(json.loads(text))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"--config is neither a JSON object nor a file with one: {error}") from None
    if args.checkpoint and args.config:
        raise UserError("--config describes a codec from scratch; leave it out with --checkpoint")
    args.config = {**DEFAULTS[args.codec]["config"], **args.config}
    for name in ("steps", "clips", "batch_size", "validation_clips", "log_every", "save_every", "warmup_steps"):
        in_range(f"--{name}", getattr(args, name), 1, 1e9)
    for name in ("lr", "crop_seconds", "seconds", "max_grad_norm"):
        in_range(f"--{name}", getattr(args, name), 1e-9, 1e6)
    for name in ("max_minutes", "kl_weight", "waveform_weight"):
        in_range(f"--{name}", getattr(args, name), 0, 1e6)
    in_range("--degraded", args.degraded, 0, 1)


def main():
    args = flags().parse_args()
    codec, step = train(args)
    save_codec(args.out, codec)
    picture = loss_picture(args.out)
    print(f"wrote {args.out}/vae.safetensors, config.json, state.pt, log.jsonl{', vae_loss.png' if picture else ''}")
    if step < args.steps:
        print(f"stopped at step {step} of {args.steps} by --max_minutes; the same command with more minutes goes on")
    else:
        print(f"next: python train_fm.py --codec {args.out}")


if __name__ == "__main__":
    run_main(main)
