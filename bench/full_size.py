"""Full size, side by side: sample.py's functions against the official method.

    python -m bench.full_size generate                # 10 s of sound, 5 rounds: 28 minutes, 9 GB
    python -m bench.full_size generate --checkpoint FOLDER --steps 50
    python -m bench.full_size vae --repeats 1         # decoding: seconds and memory by duration

Every run is a process of its own, ours and the official one in turn, so that none finds the other's
memory or caches. Weights are random, because speed does not depend on them, and are written once to
a folder in the official layout; --checkpoint takes one with real weights (and T5 in text_encoder/).
Needs diffusers, an extra. Letters: L latent frames, C latent channels.
"""
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.official import Clock, Official, comparison, vae_of
from lib.common import (check_writable, command_line, flag, markdown, need, parse_commands,
                        read_json, run_main, write_report)
from lib.fast import quicken, quicken_codec
from lib.oobleck import Oobleck
from lib.text import make_text_encoder
from lib.weights import load_tensors, model_folder, save_tensors
from model import TangoFlux, load_model, save_model
from sample import Sampling, decode, encode_conditions, official_noise, sample_latents
from vae import load_codec

PROMPT = ("Hammer slowly hitting the wooden table while a dog barks far away and rain falls on a "
          "tin roof")
T5_LARGE = dict(width=1024, layers=24, heads=16, d_ff=2816)
DURATIONS = (2.5, 5, 10, 20, 29)                            # seconds that `vae` decodes
COMMON = [
    flag("--checkpoint", None, "folder in the official layout, or hub id; none: random weights"),
    flag("--repeats", 5, "rounds", 1, 1000),
    flag("--out", "runs/bench", "folder of the table (the tracked ones: results)"),
]
GENERATION = [
    flag("--steps", 25, "solver steps (official code: 25; paper: 50)", 1, 1000),
    flag("--guidance_scale", 4.5, "classifier-free guidance (paper A.6: 4.5)", 1.001, 50),
    flag("--duration", 10.0, "seconds asked for (paper: 10)", 0.01, 1000),
]
COMMANDS = {
    "generate": ("a generation by every way in turn", {"what": COMMON, "generation": GENERATION}),
    "vae": ("decoding what was asked for against decoding all", {"what": COMMON})}


# ----------------------------------------------------------------------------- random weights

def random_folder(folder, flow={}, codec={}, text=T5_LARGE, words=31728):
    """Write random weights in the official layout, no matrix zero -> the folder.

    518 M + 156 M and a T5 as FLAN-T5-large's, or other configs of flow, codec and T5.
    """
    vocabulary = PROMPT.split() + [f"word{i}" for i in range(words)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = TangoFlux(flow)
        for module in network.modules():            # what starts at zero would hide branches
            if isinstance(module, torch.nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.3 / module.in_features ** 0.5)
        save_model(folder, flow=network)
        del network
        save_model(folder, codec=Oobleck(**codec))
        save_model(folder, text=make_text_encoder(vocabulary, **text))
    return Path(folder)


def random_latents(checkpoint):
    """Latents (1, L, C) of a model's shape."""
    config = read_json(Path(checkpoint) / "config.json", dict)
    return official_noise(0, [1], (config["audio_seq_len"], config["in_channels"]))


# ----------------------------------------------------------------------------- the ways

# each runs in a process of its own -> (audio (channels, samples), {measure: number})

def generate_officially(checkpoint, duration, sampling):
    """TangoFluxInference.generate."""
    peer = Official(checkpoint)
    audio = peer.generate(PROMPT, duration, sampling.steps, sampling.guidance_scale)
    return audio, peer.clock.seconds


def generate_ours(checkpoint, duration, sampling, dtype):
    """What sample.py --noise official does."""
    import transformers.models.t5.modeling_t5  # noqa: F401  (importing is not loading)
    clock = Clock()
    text = load_model(checkpoint, parts=("text",)).text
    clock("load")
    conditions = encode_conditions(text, [PROMPT], [duration], sampling, 1)
    clock("text")
    del text                                                # with FLAN-T5 a third of all memory
    model = load_model(checkpoint, dtype=dtype, parts=("flow", "codec"))
    noise = random_latents(checkpoint)                                          # (1, L, C)
    quicken(model.flow, 2 * noise.shape[1])
    quicken_codec(model.codec)
    clock("load")
    latents = sample_latents(model, [PROMPT], [duration], sampling=sampling,
                             conditions=conditions, noise=noise)
    clock("steps")
    model.flow = None                                       # decoding needs its memory
    audio = decode(model.codec, latents, [duration])[0]
    clock("decode")
    return audio, clock.seconds


def decode_officially(checkpoint, duration):
    """All latents by diffusers, then cut."""
    codec = vae_of(checkpoint)
    latents = random_latents(checkpoint).transpose(1, 2)                        # (1, C, L)
    with torch.no_grad():
        codec.decode(latents[..., :8])                      # the first call takes longer
        before, clock = memory("VmRSS"), Clock()
        audio = codec.decode(latents).sample[0]
    clock("decode")
    samples = int(duration * codec.config.sampling_rate)
    return audio[:, :samples], {**clock.seconds, "extra": memory("VmHWM") - before}


def decode_ours(checkpoint, duration):
    """What the duration needs, by lib/oobleck.py."""
    codec = quicken_codec(load_codec(checkpoint))
    latents = random_latents(checkpoint)
    decode(codec, latents[:, :8], [0.1 * duration])         # folds the weights
    before, clock = memory("VmRSS"), Clock()
    audio = decode(codec, latents, [duration])[0]
    clock("decode")
    return audio, {**clock.seconds, "extra": memory("VmHWM") - before}


def memory(key):
    """GB of this process by /proc/self/status: VmHWM the peak so far, VmRSS resident now."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{key}:")[1].split()[0]) / 1e9


def run_way(path, way, *arguments):
    """In a new process: the audio goes to the file `path` -> {measure: number}."""
    audio, found = way(*arguments)
    save_tensors(path, {"audio": audio})
    return {**found, "peak": memory("VmHWM")}


# ----------------------------------------------------------------------------- side by side

def measure(ways, checkpoint, work, repeats):
    """Every way {name: (function, ...)} in turn, `repeats` rounds -> {name: [found]}."""
    path = work / "audio.safetensors"
    runs = {name: [] for name in ways}
    for repeat in range(repeats):
        first = None
        for name, (way, *arguments) in ways.items():
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found = process.submit(run_way, path, way, checkpoint, *arguments).result()
            audio = load_tensors(path)["audio"]
            first = audio if first is None else first
            found["difference"] = ((audio - first).abs().max() / first.abs().max()).item()
            runs[name].append(found)
            shown = {key: f"{value:.3g}" for key, value in found.items()}
            print(f"round {repeat + 1}, {name}: {shown}", flush=True)
    return runs


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    need("diffusers", "the official method")
    check_writable(Path(args.out) / f"bench_{args.command}.md")

    # groups of ways, each compared with the first of its group
    measures = ["decode", "extra"]
    groups = []
    for seconds in DURATIONS:
        groups.append({f"official, {seconds:g} s": (decode_officially, seconds),
                       f"ours, {seconds:g} s": (decode_ours, seconds)})
    if args.command == "generate":
        how = args.duration, Sampling(args.steps, args.guidance_scale)
        measures = ["load", "text", "steps", "decode", "peak"]
        groups = [{"official, float32": (generate_officially, *how),
                   "ours, float32": (generate_ours, *how, torch.float32),
                   "ours, bfloat16": (generate_ours, *how, torch.bfloat16)}]

    # every way in turn
    runs = {}
    rows = []
    with tempfile.TemporaryDirectory() as work:
        if args.checkpoint:
            checkpoint = model_folder(args.checkpoint)
        else:
            print("writing random weights", flush=True)
            checkpoint = random_folder(Path(work) / "model")
        for ways in groups:
            runs |= measure(ways, checkpoint, Path(work), args.repeats)
            rows += comparison({name: runs[name] for name in ways}, measures)

    # the table
    for row in rows:
        row.append(f"{runs[row[0]][-1]['difference']:.0e}")
    threads = torch.get_num_threads()
    text = (f"{threads} threads, torch {torch.__version__}. Medians of {args.repeats} rounds; x: "
            "times the official one, by rounds, with the range. Seconds; peak and extra (memory "
            "beyond what was there before) in GB. Difference: largest of the audio to the official "
            "one, over its largest sample (same weights and noise).")
    command = command_line("-m bench.full_size", argv)
    write_report(args.out, f"bench_{args.command}", f"Full size: {COMMANDS[args.command][0]}",
                 command, [text, markdown(["way", *measures, "difference"], rows)], {"runs": runs})
    print("next: python sample.py --checkpoint FOLDER runs it")


if __name__ == "__main__":
    run_main(main)
