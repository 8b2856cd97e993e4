"""Full size, side by side: sample.py's functions against the official method.

    python -m bench.full_size generate                # 10 s of sound, 5 rounds: 28 minutes, 9 GB
    python -m bench.full_size vae --repeats 1         # decoding: seconds and memory by duration
    python -m bench.full_size load                    # memory while loading

Every run is a process of its own, ours and the official one in turn, so that none finds the other's
memory or caches. Weights are random, because speed does not depend on them, and are written once to
a folder in the official layout; --checkpoint takes one with real weights (and T5 in text_encoder/).
Needs diffusers, an extra. Letters: L latent frames, C latent channels.
"""
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.official import Official, vae_of
from lib.common import (HERE, UserError, check_writable, flag, markdown, need, parse_commands,
                        read_json, run_main, write_report)
from lib.fast import quicken, quicken_codec
from lib.oobleck import OOBLECK_DEFAULTS, Oobleck
from lib.text import make_text_encoder
from lib.weights import load_tensors, model_folder, save_tensors
from model import PRESETS, TangoFlux, load_model, save_model
from sample import Sampling, decode, encode_conditions, official_noise, sample_latents
from vae import load_codec

PROMPT = ("Hammer slowly hitting the wooden table while a dog barks far away and rain falls on a "
          "tin roof")
DURATIONS = (2.5, 5, 10, 20, 29)                            # seconds that `vae` decodes
WAYS = {"official, float32": ("official", "float32"), "ours, float32": ("ours", "float32"),
        "ours, bfloat16": ("ours", "bfloat16")}
T5_SIZES = {"tangoflux": dict(width=1024, layers=24, heads=16, d_ff=2816),
            "tiny": dict(width=32, layers=1, heads=2, d_ff=32)}
VOCABULARY = {"tangoflux": 32128, "tiny": 600}
TINY_FLOW = dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=16,
                 num_attention_heads=2, joint_attention_dim=32, audio_seq_len=24, max_duration=1.0,
                 axes_dims_rope=[4, 6, 6])
TINY_CODEC = dict(encoder_hidden_size=8, downsampling_ratios=[2, 4, 4], channel_multiples=[1, 1, 2],
                  decoder_channels=8, decoder_input_channels=4, sampling_rate=768)

COMMON = [
    flag("--checkpoint", None, "folder in the official layout, or hub id; none: random weights"),
    flag("--size", "tangoflux", "of random weights: 518 M + 156 M and a T5 as FLAN-T5-large's",
         choices=list(T5_SIZES)),
    flag("--repeats", 5, "rounds", 1, 1000),
    flag("--out", "runs/bench", "folder of the table (the tracked ones: results)"),
]
GENERATION = [
    flag("--steps", 25, "solver steps (official code: 25; paper: 50)", 1, 1000),
    flag("--guidance_scale", 4.5, "classifier-free guidance (paper A.6: 4.5)", 1.001, 50),
    flag("--duration", 10.0, "seconds asked for (paper: 10)", 0.01, 1000),
]
SIDE = [
    flag("--way", "ours", "official, ours, official_vae, ours_vae or load"),
    flag("--dtype", "float32", "float32 or bfloat16"),
    flag("--audio", None, "file for the audio"),
    flag("--parts", ["flow"], "of load", nargs="+"),
]
COMMANDS = {
    "generate": ("a generation by every way in turn", {"what": COMMON, "generation": GENERATION}),
    "vae": ("decoding what was asked for against decoding all", {"what": COMMON}),
    "load": ("memory while loading", {"what": COMMON}),
    "side": ("one run of another command, in this process", {
        "what": COMMON, "generation": GENERATION, "run": SIDE}),
}


# ----------------------------------------------------------------------------- random weights

def random_folder(folder, size="tangoflux", seed=0):
    """Write a folder in the official layout with random weights, no matrix zero; -> its path."""
    tiny = size == "tiny"
    config = PRESETS["tangoflux"] | (TINY_FLOW if tiny else {})
    codec = OOBLECK_DEFAULTS | (TINY_CODEC if tiny else {})
    fillers = [f"word{i}" for i in range(VOCABULARY[size] - 400)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        flow = TangoFlux(config)
        for module in flow.modules():               # what starts at zero would hide branches
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.3 / module.in_features ** 0.5)
        save_model(folder, flow=flow)
        del flow
        save_model(folder, codec=Oobleck(**codec))
        words = [*PROMPT.split(), *fillers]
        save_model(folder, text=make_text_encoder(words, seed=seed, **T5_SIZES[size]))
    return Path(folder)


# ----------------------------------------------------------------------------- one process

def memory(key):
    """Bytes of this process by /proc/self/status: VmHWM the peak so far, VmRSS resident now."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0])


def run_side(args):
    """One run of --way: prints a line of JSON; the audio goes to --audio."""
    import transformers.models.t5.modeling_t5  # noqa: F401  (importing is not loading)
    if args.way == "official":
        from diffusers import AutoencoderOobleck, FluxTransformer2DModel  # noqa: F401
    found = {"before": memory("VmRSS")}
    audio = None
    if args.way == "load":
        found |= load_alone(args.checkpoint, args.parts)
    elif args.way == "ours_vae":
        audio = decode_ours(args.checkpoint, args.duration, found)
    elif args.way == "official_vae":
        audio = decode_officially(args.checkpoint, args.duration, found)
    elif args.way == "official":
        began = time.perf_counter()
        peer = Official(args.checkpoint)
        found["load"] = time.perf_counter() - began
        audio = peer.generate(PROMPT, args.duration, args.steps, args.guidance_scale)
        found |= peer.seconds
    else:
        sampling = Sampling(args.steps, args.guidance_scale)
        dtype = getattr(torch, args.dtype)
        audio = generate_ours(args.checkpoint, sampling, args.duration, dtype, found)
    found["peak"] = memory("VmHWM")
    if audio is not None:
        save_tensors(args.audio, {"audio": audio})
    print("\n" + json.dumps(found))


def generate_ours(checkpoint, sampling, duration, dtype, seconds):
    """What sample.py --noise official does -> audio (channels, samples); fills `seconds`."""
    began = time.perf_counter()
    text = load_model(checkpoint, parts=("text",)).text
    loaded = time.perf_counter()
    conditions = encode_conditions(text, [PROMPT], [duration], sampling, 1)
    del text                                                # with FLAN-T5 a third of all memory
    seconds["text"] = time.perf_counter() - loaded

    again = time.perf_counter()
    model = load_model(checkpoint, dtype=dtype, parts=("flow", "codec"))
    shape = (model.flow.config["audio_seq_len"], model.flow.config["in_channels"])
    quicken(model.flow, 2 * shape[0])
    quicken_codec(model.codec)
    seconds["load"] = time.perf_counter() - again + loaded - began

    began = time.perf_counter()
    noise = official_noise(0, [1], shape)                                   # (1, L, C)
    latents = sample_latents(model, [PROMPT], [duration], sampling=sampling,
                             conditions=conditions, noise=noise)
    seconds["steps"] = time.perf_counter() - began
    model.flow = None                                       # decoding needs its memory

    began = time.perf_counter()
    audio = decode(model.codec, latents, [duration])[0]
    seconds["decode"] = time.perf_counter() - began
    return audio


def random_latents(checkpoint):
    """Latents (1, L, C) of a model's shape."""
    config = read_json(Path(checkpoint) / "config.json", dict)
    shape = (1, config["audio_seq_len"], config["in_channels"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def decode_ours(checkpoint, duration, found):
    """`duration` seconds of random latents -> audio; seconds and memory before go to `found`."""
    codec = quicken_codec(load_codec(checkpoint))
    latents = random_latents(checkpoint)
    decode(codec, latents[:, :8], [0.1 * duration])         # folds the weights
    found["before"] = memory("VmRSS")
    began = time.perf_counter()
    audio = decode(codec, latents, [duration])[0]
    found["decode"] = time.perf_counter() - began
    return audio


def decode_officially(checkpoint, duration, found):
    """The same by diffusers: all latents, then cut."""
    peer = vae_of(checkpoint)
    latents = random_latents(checkpoint).transpose(1, 2)    # (1, C, L)
    with torch.no_grad():
        peer.decode(latents[..., :8])
        found["before"] = memory("VmRSS")
        began = time.perf_counter()
        audio = peer.decode(latents).sample[0]
        found["decode"] = time.perf_counter() - began
    return audio[:, :int(duration * peer.config.sampling_rate)].contiguous()


def load_alone(checkpoint, parts):
    """Load parts of a model -> {"load" (seconds), "bytes" of its weights}."""
    began = time.perf_counter()
    model = load_model(checkpoint, parts=tuple(parts))
    modules = [module for module in (model.flow, model.codec, model.text) if module is not None]
    numbers = sum(parameter.numel() for module in modules for parameter in module.parameters())
    return {"bytes": 4 * numbers, "load": time.perf_counter() - began}


def side(checkpoint, audio, flags):
    """Run `side` in a process of its own -> what it found. Raises UserError with its last line."""
    words = [sys.executable, "-m", "bench.full_size", "side"]
    words += [f"--checkpoint={checkpoint}", f"--audio={audio}"]
    for name, value in flags.items():
        words += [f"--{name}", *value] if isinstance(value, tuple) else [f"--{name}={value}"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise UserError(f"the run of {flags} failed: {last[0].removeprefix('error: ')}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ----------------------------------------------------------------------------- tables

def cases_of(args):
    """Groups {name: flags of `side`} of a command, and what its table shows.

    The cases of a group are compared with its first.
    """
    if args.command == "generate":
        same = dict(steps=args.steps, duration=args.duration, guidance_scale=args.guidance_scale)
        cases = {name: same | dict(way=way, dtype=dtype) for name, (way, dtype) in WAYS.items()}
        return [cases], ("load", "text", "steps", "decode", "peak")
    if args.command == "vae":
        groups = []
        for seconds in DURATIONS:
            names = {f"{way}, {seconds:g} s": f"{way}_vae" for way in ("official", "ours")}
            groups.append({name: dict(way=names[name], duration=seconds) for name in names})
        return groups, ("decode", "extra")
    parts = (("flow", "codec"), ("flow", "codec", "text"))
    groups = [{", ".join(each): dict(way="load", parts=each)} for each in parts]
    return groups, ("load", "bytes", "extra")


def measure(cases, checkpoint, work, repeats):
    """Every case in turn, `repeats` rounds -> {name: [what `side` found]}."""
    runs = {name: [] for name in cases}
    for repeat in range(repeats):
        for number, (name, flags) in enumerate(cases.items()):
            found = side(checkpoint, work / f"{number}.safetensors", flags)
            found["extra"] = found["peak"] - found["before"]
            if number:
                found["difference"] = difference(work, number)
            runs[name].append(found)
            shown = {key: round(value, 2) for key, value in found.items() if value < 1e5}
            print(f"round {repeat + 1}, {name}: {shown}", flush=True)
    return runs


def difference(work, number):
    """Largest difference of an audio to the first's, over its largest sample."""
    one, two = (load_tensors(work / f"{i}.safetensors")["audio"] for i in (0, number))
    return ((one - two).abs().max() / one.abs().max()).item()


def table_rows(runs, keys):
    """Rows of a table: medians over rounds (GB for bytes), and times the first case, by rounds."""
    rows = []
    first = next(iter(runs.values()))
    for name, many in runs.items():
        row = [name]
        for key in keys:
            values = [run[key] for run in many]
            scale = 1e9 if key in ("peak", "extra", "bytes") else 1
            cell = f"{statistics.median(values) / scale:.2f}"
            if many is not first:
                ratios = [value / run[key] for value, run in zip(values, first)]
                cell += f"; x {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            row.append(cell)
        row.append(f"{many[-1]['difference']:.0e}" if many is not first else "")
        rows.append(row)
    return rows


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    if args.command == "side":
        return run_side(args)
    need("diffusers", "the official method")
    check_writable(Path(args.out) / f"bench_{args.command}.md")
    groups, keys = cases_of(args)

    # every case in turn, each in a process of its own
    with tempfile.TemporaryDirectory() as work:
        checkpoint = args.checkpoint and model_folder(args.checkpoint)
        if checkpoint is None:
            print("writing random weights", flush=True)
            checkpoint = random_folder(Path(work) / "model", args.size)
        runs = [measure(cases, checkpoint, Path(work), args.repeats) for cases in groups]

    # the table
    rows = [row for each in runs for row in table_rows(each, keys)]
    threads = torch.get_num_threads()
    text = (f"{threads} threads, torch {torch.__version__}. Medians of {args.repeats} rounds; x: "
            "times the first, by rounds, with the range. Seconds; peak, extra (memory beyond what "
            "was there before) and bytes of weights in GB. Difference: largest of the audio to the "
            "first's, over its largest sample (same weights and noise).")
    command = f"python -m bench.full_size {shlex.join(argv or sys.argv[1:])}"
    title = f"Full size: {COMMANDS[args.command][0]}"
    write_report(args.out, f"bench_{args.command}", title, command,
                 [text, markdown(["case", *keys, "difference"], rows)], {"runs": runs})
    print("next: python sample.py --checkpoint FOLDER runs it")


if __name__ == "__main__":
    run_main(main)
