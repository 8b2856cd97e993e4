"""Full size, side by side: sample.py against the official method (official.py), and what decoding and loading take.

bench.py's commands `generate`, `vae` and `load`. Every run is a process of its own, ours and the official one in
turn, so that none finds the other's memory or caches. Weights are random, for speed does not depend on them, and are
written once to a folder in the official layout; --checkpoint takes one with real weights (and T5 in text_encoder/).

Letters: N tokens, D width, L latent frames.
"""
import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from blocks import onednn_multiplies
from common import UserError, atomic_path, check_writable, load_tensors, save_tensors, write_json
from evaluate import markdown

HERE = Path(__file__).resolve().parent
PROMPT = "Hammer slowly hitting the wooden table while a dog barks far away and rain falls on a tin roof"
SIZES = {"tangoflux": dict(width=1024, layers=24, heads=16, d_ff=2816, vocabulary=32128),
         "tiny": dict(width=32, layers=1, heads=2, d_ff=32, vocabulary=600)}     # of the text encoder
WAYS = {"official, float32": ("official", "float32"), "ours, float32": ("ours", "float32"),
        "ours, bfloat16": ("ours", "bfloat16"), "ours, bfloat16, --crop_latents": ("cropped", "bfloat16")}


# ----------------------------------------------------------------------------- a folder in the official layout

def random_folder(folder, size="tangoflux", seed=0):
    """Write a model folder in the official layout with random weights, no matrix of them zero; returns its path.

    size "tangoflux": 518 M + 156 M parameters and a T5 encoder as large as FLAN-T5-large's. "tiny" is for tests.
    """
    from model import PRESETS, TangoFlux, save_model
    from oobleck import OOBLECK_DEFAULTS, Oobleck
    from text import make_text_encoder
    folder, config, codec = Path(folder), dict(PRESETS["tangoflux"]), dict(OOBLECK_DEFAULTS)
    if size == "tiny":
        config |= dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=16, num_attention_heads=2,
                       joint_attention_dim=32, audio_seq_len=24, max_duration=1.0, axes_dims_rope=[4, 6, 6])
        codec |= dict(encoder_hidden_size=8, downsampling_ratios=[2, 4, 4], channel_multiples=[1, 1, 2],
                      decoder_channels=8, decoder_input_channels=4, sampling_rate=768)
    sizes = dict(SIZES[size])
    words = [*PROMPT.split(), *(f"word{i}" for i in range(sizes.pop("vocabulary") - 400))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = TangoFlux(config)
        with torch.no_grad():
            for module in flow.modules():                       # what starts at zero would hide whole branches
                if isinstance(module, torch.nn.Linear) and not module.weight.any():
                    module.weight.normal_(0, 0.3 / module.in_features ** 0.5)
        save_model(folder, flow=flow)
        del flow
        save_model(folder, codec=Oobleck(**codec))
        save_model(folder, text=make_text_encoder(words, seed=seed, **sizes))
    return folder


# ----------------------------------------------------------------------------- one process

def peak_memory():
    """Largest resident memory of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):                               # not told here: a parent's peak may count as well
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory():
    """Resident memory of this process now, in bytes (0 where there is no /proc)."""
    try:
        return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])
    except (OSError, IndexError):
        return 0


def run_side(args):
    """One run of `args.way`, in this process: prints a line of JSON for `side`; audio goes to args.audio."""
    began = time.perf_counter()
    found = {"imported": resident_memory()}
    if args.way == "load":
        from model import load_model
        import transformers.models.t5.modeling_t5  # noqa: F401  (what loading imports is not what it loads)
        found["imported"] = resident_memory()
        model = load_model(args.checkpoint, parts=tuple(args.parts))
        parts = [module for module in (model.flow, model.codec, model.text) if module is not None]
        found["bytes"] = sum(4 * parameter.numel() for part in parts for parameter in part.parameters())
        found["load"] = time.perf_counter() - began
    elif args.way.endswith("vae"):
        found |= decode_alone(args)
    elif args.way == "official":
        from diffusers import AutoencoderOobleck, FluxTransformer2DModel  # noqa: F401  (imports are not loading)
        from transformers import T5EncoderModel  # noqa: F401

        from official import Official
        began = time.perf_counter()
        peer = Official(args.checkpoint)
        found["load"] = time.perf_counter() - began
        audio = peer.generate(PROMPT, args.duration, args.steps, args.guidance_scale)
        found |= {**peer.seconds, "steps": sum(peer.seconds["steps"])}
    else:
        import transformers.models.t5.modeling_t5  # noqa: F401
        found |= dict.fromkeys(("load", "text", "steps", "decode"), 0.0)
        audio = sample_as_ever(args, found)
    found["peak"] = peak_memory()
    if args.audio and not args.way.endswith("vae"):
        save_tensors(args.audio, {"audio": audio})
    print("\n" + json.dumps(found))


def sample_as_ever(args, found):
    """What sample.py does, its stages' seconds added to `found`."""
    import sample
    flags = ["--checkpoint", args.checkpoint, "--steps", str(args.steps), "--guidance_scale", str(args.guidance_scale),
             "--dtype", args.dtype, "--duration", str(args.duration), "--noise", "official", "--device", "cpu",
             *(["--crop_latents"] if args.way == "cropped" else [])]
    mark = time.perf_counter()

    def done(stage):
        nonlocal mark
        now = time.perf_counter()
        found[stage] += now - mark
        mark = now
    from model import model_folder
    audios, _ = sample.produce(sample.parse_args(flags), model_folder(args.checkpoint), torch.device("cpu"), args.dtype,
                               [PROMPT], [args.duration], done)
    return audios[0]


def decode_alone(args):
    """Decode args.duration seconds of random latents: ours what is asked for, officially all of it."""
    from vae import load_codec
    config = json.loads((Path(args.checkpoint) / "config.json").read_text())
    shape = config["audio_seq_len"], config["in_channels"]
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    if args.way == "ours_vae":
        from types import SimpleNamespace

        from sample import decode
        model = SimpleNamespace(codec=load_codec(args.checkpoint))
        decode(model, latents[:, :8], [0.1 * args.duration])                # folds the weights
        before, began = resident_memory(), time.perf_counter()
        audio = decode(model, latents, [args.duration])[0]
    else:
        from official import vae_of
        peer = vae_of(args.checkpoint)
        with torch.no_grad():
            peer.decode(latents[:, :8].transpose(1, 2))
            before, began = resident_memory(), time.perf_counter()
            audio = peer.decode(latents.transpose(1, 2)).sample[0, :, :int(args.duration * peer.config.sampling_rate)]
    found = {"decode": time.perf_counter() - began, "before": before}
    save_tensors(args.audio, {"audio": audio.contiguous()})
    return found


def side(way, checkpoint, dtype="float32", audio=None, **flags):
    """Run `python bench.py side` for one way and return what it found. UserError with its last line if it fails."""
    given = [f"--{name}={value}" for name, value in flags.items() if name != "parts"]
    given += ["--parts", *flags["parts"]] if "parts" in flags else []
    command = [sys.executable, str(HERE / "bench.py"), "side", "--way", way, "--dtype", dtype, "--checkpoint",
               str(checkpoint), *([f"--audio={audio}"] if audio else []), *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise UserError(f"the run of {way} failed: {last[0].removeprefix('error: ')}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# ----------------------------------------------------------------------------- numbers

def matmul_peaks(dtype, size=2048, repeats=12):
    """This machine's best at multiplying two square matrices, in FLOP per second: {"torch": ..., "oneDNN": ...}."""
    x = torch.randn(size, size).to(dtype)
    ways, peaks = {"torch": lambda: x @ x}, {}
    with torch.inference_mode():
        if onednn_multiplies(x):
            packed = torch.ops.mkldnn._reorder_linear_weight(x, size)
            ways["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        for name, way in ways.items():
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                way()
                seconds.append(time.perf_counter() - began)
            peaks[name] = 2 * size ** 3 / min(seconds)
    return peaks


def flops_of_step(config, tokens):
    """FLOP of a guided step: 2 rows of N = L + tokens; a block's linear layers take 24 N D^2, attention 4 N^2 D."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks, count = config["num_layers"] + config["num_single_layers"], config["audio_seq_len"] + tokens
    return 2 * blocks * (24 * count * width ** 2 + 4 * count ** 2 * width)


def difference(path, other):
    """Largest difference of two kept audios, over the largest sample of the first."""
    one, two = (load_tensors(each)["audio"] for each in (path, other))
    return ((one - two).abs().max() / one.abs().max()).item()


def shown(peaks):
    """"205 (torch), 495 (oneDNN) GFLOP/s"."""
    return ", ".join(f"{peak / 1e9:.0f} ({name})" for name, peak in peaks.items()) + " GFLOP/s"


def spread(values, digits=2):
    """"median (lowest to highest)"."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(args, name, title, paragraphs, numbers):
    """Print and write results/bench_NAME.md and .json."""
    path = Path(args.out) / f"bench_{name}.md"
    given = sys.argv[1:] if sys.argv[0].endswith("bench.py") else [args.command]
    command = shlex.join(["python", "bench.py", *given])
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, {cpu_name()}."
    text = "\n\n".join([f"# {title}", f"    {command}", machine, *paragraphs]) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(path.with_suffix(".json"), numbers)
    print(f"{text}\nwrote {path} and {path.with_suffix('.json')}\nnext: python sample.py --checkpoint FOLDER runs it")


def cpu_name():
    """The processor's name, if the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


# ----------------------------------------------------------------------------- the three tables

def with_folder(command):
    """A command run on --checkpoint, or on a folder of random weights that is gone afterwards."""
    def run(args):
        check_writable([Path(args.out) / f"bench_{args.command}.md"])
        if args.command != "load":
            from official import need_diffusers
            need_diffusers()
        with tempfile.TemporaryDirectory() as work:
            if args.checkpoint is not None:
                from sample import open_model
                args.checkpoint = str(open_model(args.checkpoint)[0])
            else:
                needed = 5e9 if args.size == "tangoflux" else 0
                if shutil.disk_usage(work).free < needed:
                    raise UserError(f"{work} has not the 5 GB that random weights take; free them, or set TMPDIR")
                print("writing random weights" + ", 4 GB" * (args.size == "tangoflux"), flush=True)
                args.checkpoint = str(random_folder(Path(work) / "model", args.size))
            command(args, Path(work))
    return run


@with_folder
def bench_generate(args, work):
    """Whole generations by every way in turn: seconds per step, per stage, peak memory, share of the matmul peak."""
    peaks = {dtype: matmul_peaks(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    runs, apart = {name: [] for name in WAYS}, {}
    for repeat in range(args.repeats):
        for name, (way, dtype) in WAYS.items():
            audio = work / f"{way}_{dtype}.safetensors"
            found = side(way, args.checkpoint, dtype, audio, steps=args.steps, duration=args.duration,
                         guidance_scale=args.guidance_scale)
            found["whole"] = found["text"] + found["steps"] + found["decode"]
            runs[name].append(found)
            print(f"round {repeat + 1}, {name}: {found['steps'] / args.steps:.2f} s a step, whole "
                  f"{found['whole']:.1f} s, peak {found['peak'] / 1e9:.2f} GB", flush=True)
            apart[name] = difference(work / "official_float32.safetensors", audio)
    config = json.loads((Path(args.checkpoint) / "config.json").read_text())
    from text import read_tokenizer
    tokens = len(read_tokenizer(Path(args.checkpoint) / "text_encoder").encode(PROMPT).ids) + 1
    flops = flops_of_step(config, tokens)
    first, rows, numbers = next(iter(WAYS)), [], {"runs": runs, "peaks": peaks, "flops": flops, "apart": apart}
    for name, (way, dtype) in WAYS.items():
        cells = [name]
        for key, digits, scale in (("steps", 2, args.steps), ("text", 2, 1), ("decode", 1, 1), ("whole", 1, 1),
                                   ("load", 1, 1), ("peak", 2, 1e9)):
            values = [run[key] / scale for run in runs[name]]
            ratios = [run[key] / other[key] for run, other in zip(runs[name], runs[first])]
            numbers[f"{key}, {name}"] = statistics.median(ratios)
            cells.append(f"{statistics.median(values):.{digits}f}" + ("" if name == first else f"; x {spread(ratios)}"))
        speed = flops / statistics.median(run["steps"] / args.steps for run in runs[name])
        cells[2:2] = ["" if way == "cropped" else
                      f"{speed / 1e9:.0f} ({100 * speed / max(peaks[dtype].values()):.0f} %)"]
        rows.append([*cells, f"{apart[name]:.0e}"])
    report(args, "generate", "A generation against the official method", [
        f"{args.duration:g} s asked for, {args.steps} steps, guidance {args.guidance_scale:g}, {tokens} tokens of text "
        f"and duration beside {config['audio_seq_len']} frames: {flops / 1e12:.2f} TFLOP a guided step. Two 2048 x "
        f"2048 matrices are multiplied here at {shown(peaks['float32'])} in float32, {shown(peaks['bfloat16'])} in "
        f"bfloat16; the share is of the higher. Medians of {args.repeats} rounds, each run its own process; x: times "
        "the official number, round by round, with the range. Difference: largest of the audio to the official one, "
        "over its largest sample (same weights and noise).",
        markdown(["way", "s a step", "GFLOP/s (share of peak)", "text, s", "decode, s", "whole, s", "load, s",
                  "peak memory, GB", "difference"], rows)], numbers)


@with_folder
def bench_vae(args, work):
    """Decoding for several durations: seconds, memory beyond what the weights take, and equality with the whole."""
    durations = [seconds for seconds in (2.5, 5, 10, 20, 29) if seconds <= args.longest]
    runs = {seconds: [] for seconds in durations}
    for repeat in range(args.repeats):
        for seconds in durations:
            pair = {way: side(f"{way}_vae", args.checkpoint, audio=work / f"{way}.safetensors", duration=seconds)
                    for way in ("official", "ours")}
            pair["apart"] = difference(work / "official.safetensors", work / "ours.safetensors")
            runs[seconds].append(pair)
            print(f"round {repeat + 1}, {seconds:g} s: official {pair['official']['decode']:.1f} s, ours "
                  f"{pair['ours']['decode']:.1f} s", flush=True)
    rows = []
    for seconds, pairs in runs.items():
        extra = {way: [(pair[way]["peak"] - pair[way]["before"]) / 1e9 for pair in pairs]
                 for way in ("official", "ours")}
        rows.append([f"{seconds:g}", *(f"{statistics.median(pair[way]['decode'] for pair in pairs):.1f}"
                                       for way in ("official", "ours")),
                     spread([pair["ours"]["decode"] / pair["official"]["decode"] for pair in pairs]),
                     *(f"{statistics.median(extra[way]):.2f}" for way in ("official", "ours")),
                     f"{max(pair['apart'] for pair in pairs):.0e}"])
    report(args, "vae", "Decoding what was asked for against decoding all", [
        f"Medians of {args.repeats} rounds. Memory: what decoding takes beyond what was there before. Difference: "
        "largest of the audio, over its largest sample.",
        markdown(["s asked for", "official, s", "ours, s", "x", "official, GB", "ours, GB", "difference"], rows)],
        {str(seconds): pairs for seconds, pairs in runs.items()})


@with_folder
def bench_load(args, work):
    """Memory while loading, above that after imports, against the size of the weights."""
    rows, numbers = [], {}
    for parts in (("flow", "codec"), ("flow", "codec", "text")):
        found = side("load", args.checkpoint, parts=parts)
        peak = found["peak"] - found["imported"]
        share = peak / found["bytes"]
        numbers[" ".join(parts)] = {**found, "share": share}
        rows.append([", ".join(parts), f"{found['bytes'] / 1e9:.2f}", f"{peak / 1e9:.2f}",
                     f"{share:.3f}", f"{found['load']:.1f}"])
    report(args, "load", "Memory while loading", [
        "float32, one run each; peak resident memory less that after imports.",
        markdown(["parts", "weights, GB", "peak, GB", "x", "s, imports included"], rows)], numbers)


def add_flags(parser):
    """Flags of this file's commands, and of the processes that they start."""
    group = parser.add_argument_group("generate, vae, load")
    group.add_argument("--size", choices=list(SIZES), default="tangoflux", help="of random weights (default: "
                       "tangoflux, 518 M + 156 M and a T5 as FLAN-T5-large's)")
    group.add_argument("--duration", type=float, default=10.0, help="seconds asked for (default: 10, as paper)")
    group.add_argument("--longest", type=float, default=29.0, help="of vae, seconds (default: 29)")
    group.add_argument("--guidance_scale", type=float, default=4.5, help="default: 4.5, as paper")
    group.add_argument("--way", choices=["official", "ours", "cropped", "official_vae", "ours_vae", "load"],
                       help=argparse.SUPPRESS)
    for name in ("--dtype", "--audio"):
        group.add_argument(name, help=argparse.SUPPRESS)
    group.add_argument("--parts", nargs="+", help=argparse.SUPPRESS)
