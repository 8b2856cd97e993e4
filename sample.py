"""Text to audio: prompts in, WAV files out (paper 2.4 and A.4).

    python sample.py --prompt "a violin followed by rain"
    python sample.py --prompt "three beeps" --prompt "wind and a bird" --num_samples 4 --duration 3 --plot
    python sample.py --prompt_file prompts.txt --solver heun --steps 25 --guidance_scale 3.5
    python sample.py --checkpoint declare-lab/TangoFlux --prompt "a dog barks" --duration 10 --profile tangoflux
    python sample.py --checkpoint runs/score --score 1.5 --prompt "three beeps"      # a model with a score head

Schedule, solvers and guidance are in solvers.py. Letters: B batch, L latent frames, C latent channels, S text tokens, T
text width.

Where the official sampler and this one differ: every prompt of a batch has its own null row (the official
code stops at several prompts), a guidance scale of 1 is the conditional branch alone (there: an error),
sample i has its own noise made from (seed, i) whatever the batch (there: every prompt the same; --noise official),
and no row sees the padding of another. As there: T5 of "" is the null, at the prompt's own length; all frames are made
(--crop_latents: those of the duration) and the audio is cut to int(duration * rate) samples, so that 30 s last 29.95;
prompts are cut where the text encoder says, FLAN-T5's 512 tokens (training: 64; --max_text_length).
`--profile official --seed 0` gives the numbers of TangoFluxInference.generate.

What makes it quick is the same on every device: text is encoded once and T5 released; modulations of all steps are one
product; q, k and v one; both branches of guidance one batch; bfloat16 where the hardware multiplies in it; of the
latents only those are decoded that the duration needs. On a CPU, oneDNN multiplies (blocks.Linear).
"""
import argparse
import math
import re
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import UserError, check_writable, choose_device, in_range, parse_arguments, run_main, side_by_side, warn
from model import (Condition, check_config, encode_prompts, load_model, model_folder, moved, null_condition, null_score,
                   read_config, resolve, take_rows)
from solvers import EVALUATIONS, SOLVERS, guided_velocity, noise_for, official_noise, schedule
from text import well_formed
from training import dtype_for
from weights import find_weights

HERE = Path(__file__).resolve().parent
BASE = HERE / "checkpoints" / "toy" / "base"
DEFAULT_CHECKPOINT = HERE / "checkpoints" / "toy" / "aligned"     # chosen once: README, "Align it"
OFFICIAL = "declare-lab/TangoFlux"
DEFAULT_PROMPT = "a violin followed by rain"
# the second paper's submissions (III-E): joint guidance on text and a score beyond those of training
SUBMISSION = {"score": 5.0, "guidance_scale": 4.0, "steps": 25, "solver": "euler", "lufs": -16.5,
              "prompt_prefix": "high quality instrumental music, "}
PROFILES = {"attm_sub1": {**SUBMISSION, "seed": 42}, "attm_sub2": {**SUBMISSION, "seed": 55},
            "tangoflux": {"guidance_scale": 4.5, "steps": 50, "solver": "euler"},
            # TangoFluxInference.generate, number by number (its float32, too)
            "official": {"guidance_scale": 4.5, "steps": 25, "solver": "euler", "noise": "official",
                         "max_text_length": 512, "dtype": "float32"}}


def negative_condition(text, negative_prompt, condition):
    """The unconditional branch with a negative prompt in the place of "", the same for every row; durations stay.

    It is padded to the row's own prompt length like the null text; where it is longer, all of it is visible.
    """
    ids, mask = text.tokenize([negative_prompt])                                   # (1, S')
    size = max(ids.shape[1], condition.text.shape[1])
    ids, mask = (F.pad(rows, (0, size - rows.shape[1])).expand(len(condition.text), -1) for rows in (ids, mask))
    hidden = text.encode(ids, mask)                                                # (B, S, T)
    lengths = condition.pooled_mask.sum(1).to(hidden.device).clamp(min=int(mask[0].sum()))
    visible = torch.arange(size, device=hidden.device) < lengths[:, None]          # (B, S)
    return Condition(hidden, visible, mask.to(hidden.device), condition.duration,
                     None if condition.score is None else null_score(condition.score))


# ----------------------------------------------------------------------------- prompts -> latents -> audio

def encode_conditions(text, prompts, durations, guidance_scale=3.0, negative_prompt=None, batch_size=16, score=None):
    """What `generate` feeds the flow with: a list of (condition, null or None), one for each batch, on the CPU.

    Where no row has padding the masks are None, as in the official code: attention without a mask is quicker.
    """
    device, conditions = text.t5.shared.weight.device, []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        with torch.inference_mode():
            seconds = torch.tensor(durations[rows], dtype=torch.float32, device=device)
            scores = None if score is None else torch.full((len(seconds),), float(score), device=device)
            condition, null = encode_prompts(text, prompts[rows], seconds, score=scores), None
            if guidance_scale != 1:
                null = (negative_condition(text, negative_prompt, condition) if negative_prompt else
                        null_condition(text, condition))
            both = [condition] if null is None else [condition, null]
            full = all(each.mask is None or each.mask.all() for each in both)
            if full and len({each.text.shape[1] for each in both}) == 1:
                both = [each._replace(mask=None) for each in both]
        both = [moved(each, "cpu") for each in both]            # of thousands of prompts a GPU would be full
        conditions.append((both[0], both[1] if null is not None else None))
    return conditions


def frames_for(codec, seconds):
    """Latent frames that hold the first int(seconds * rate) samples (the official cut), at least 1."""
    return max(1, math.ceil(int(seconds * codec.sampling_rate) / codec.hop))


def generate(model, prompts, durations, seed=0, indices=None, steps=25, guidance_scale=3.0, solver="euler",
             negative_prompt=None, batch_size=16, progress=False, score=None, score_scale=None, conditions=None,
             noise=None, crop=False):
    """Sample one latent per prompt: raw latents (B, L, C), float32 on the CPU.

    durations: seconds, one per prompt. indices: the i in the (seed, i) that makes each sample's noise,
    default 0, 1, ... Dropout is off while sampling whatever the mode of the networks, which is put back (a
    training loop may call this). score: what a model with a score head is asked for (None: nothing); score_scale: its
    own guidance (None: that of the text). conditions: those of encode_conditions, made before with the same settings
    (model.text may then be None). noise (B, L, C): in the place of (seed, i). crop: denoise only the frames of each
    duration, as if there were no more (an approximation: the model was trained on all L); the others are 0.
    Raises UserError if there is no head.
    """
    flow, codec = model.flow, model.codec
    if score is not None and not flow.config.get("score_head"):
        raise UserError("--score needs a model with a score head, which this one has not: train_fm.py --score_column "
                        "makes one")
    device = next(flow.parameters()).device
    indices = list(range(len(prompts))) if indices is None else list(indices)
    ts = schedule(steps)
    shape = (flow.config["audio_seq_len"], flow.config["in_channels"])
    bar = progress_bar(progress, len(prompts) * steps * EVALUATIONS[solver], "sampling")
    modes = [(module, module.training) for module in (flow, model.text) if module is not None]
    samples = []
    try:
        for module, _ in modes:
            module.eval()
        conditions = conditions or encode_conditions(model.text, prompts, durations, guidance_scale, negative_prompt,
                                                     batch_size, score)
        for start, (condition, null) in zip(range(0, len(prompts), batch_size), conditions):
            rows = slice(start, start + batch_size)
            condition, null = moved(condition, device), null and moved(null, device)
            x0 = noise[rows] if noise is not None else noise_for(seed, indices[rows], shape)
            x0 = x0.to(device)                                                     # (B, L, C), t = 1
            frames = [min(frames_for(codec, seconds), shape[0]) if crop else shape[0] for seconds in durations[rows]]

            @torch.inference_mode()
            def solve(piece):
                size = frames[piece[0]]
                velocity_fn = guided_velocity(flow, take_rows(condition, piece), null and take_rows(null, piece),
                                              guidance_scale, score_scale, ts)
                if bar is not None:
                    velocity_fn = counted(velocity_fn, bar)
                latents = SOLVERS[solver](velocity_fn, x0[piece, :size], ts)
                return F.pad(codec.denormalise(latents).float().cpu(), (0, 0, 0, shape[0] - size))
            pieces = even_pieces(frames, device)
            found = torch.cat(side_by_side(solve, pieces, device))
            samples.append(found[torch.tensor([i for piece in pieces for i in piece]).argsort()])
    finally:
        for module, training in modes:
            module.train(training)
        if bar is not None:
            bar.close()
    return torch.cat(samples)  # made outside of inference_mode: usable as training data


def even_pieces(frames, device):
    """The rows of a batch as pieces (lists) for side_by_side, the rows of a piece equally many `frames` long.

    One piece for each of a CPU's threads, a single one elsewhere; with several lengths, at least one for each.
    """
    size = math.ceil(len(frames) / torch.get_num_threads()) if device.type == "cpu" else len(frames)
    return [rows[start:start + size] for rows in same_length(frames) for start in range(0, len(rows), size)]


def same_length(frames):
    """The places of equal numbers in a list, as lists: [3, 5, 3] -> [[0, 2], [1]]."""
    return [[i for i, each in enumerate(frames) if each == length] for length in dict.fromkeys(frames)]


def decode(model, latents, durations=None, batch_size=16, progress=False, cropped=False):
    """Raw latents (B, L, C) -> list of audio (channels, samples) in [-1, 1] on the CPU.

    Each clip is cut to int(duration * rate) samples, as the official code does, and no more is decoded than those
    samples depend on; durations None leaves the clips whole. cropped: latents of generate(..., crop=True), which end
    where the duration does.
    """
    codec = model.codec
    reference = next(codec.parameters())
    bar = progress_bar(progress, len(latents), "decoding")
    frames = [latents.shape[1]] * len(latents)
    if durations is not None:
        frames = [min(frames_for(codec, seconds), latents.shape[1]) for seconds in durations]
    groups = same_length(frames) if cropped else [list(range(len(frames)))]
    pieces = [group[start:start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    audios = {}
    for piece in pieces:
        longest = max(frames[i] for i in piece)
        batch = latents[piece, :longest if cropped else None].to(reference.device, reference.dtype)
        with torch.inference_mode():
            audios |= dict(zip(piece, codec.decode(batch, frames=longest).float().cpu()))      # (channels, samples)
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.close()
    if durations is None:
        return [audios[i] for i in range(len(latents))]
    return [audios[i][:, :max(1, int(seconds * codec.sampling_rate))] for i, seconds in enumerate(durations)]


def progress_bar(wanted, total, what):
    """A tqdm bar, or None where none is wanted."""
    if not wanted:
        return None
    return tqdm(total=total, desc=what, leave=False)


def counted(velocity_fn, bar):
    """velocity_fn that advances `bar` by one for each row that it evaluates."""
    def wrapped(x, t):
        bar.update(len(x))
        return velocity_fn(x, t)
    return wrapped


def default_duration(max_duration):
    """Seconds asked for when nobody says: 10 (the official default), or the whole seconds that the model can make."""
    return min(10.0, float(math.floor(max_duration)) or max_duration)


# ----------------------------------------------------------------------------- command line

def read_prompts(path):
    """Rows {"prompt", "duration": seconds or None} of a .txt (a prompt a line) or .jsonl file; none: UserError."""
    from common import read_jsonl
    path = Path(path)
    if path.suffix.lower() == ".jsonl":
        rows = read_jsonl(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise UserError(f'{path} row {number} has no "prompt"; a row looks like '
                                '{"prompt_id": 7, "prompt": "...", "duration": 3.0}')
            if not isinstance(row.get("duration"), (int, float, type(None))):
                raise UserError(f'{path} row {number}: duration {row["duration"]!r} is not a number of seconds')
            if row.get("duration") is not None:
                check_duration(f"{path} row {number}: duration", row["duration"], math.inf)
        rows = [{"prompt": row["prompt"], "duration": row.get("duration")} for row in rows]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            raise UserError(f"--prompt_file {path} is missing") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {path} is not readable text: {error}") from None
        rows = [{"prompt": line.strip(), "duration": None} for line in lines if line.strip()]
    if not rows:
        raise UserError(f"--prompt_file {path} has no prompt in it; write one per line")
    return rows


def output_paths(output, prompts):
    """One WAV path per sample: `output` itself if it ends in .wav (one sample only), else 0000_words.wav in it.

    The words keep letters and digits of any script. UserError for other audio formats.
    """
    output = Path(output)
    if output.suffix.lower() == ".wav":
        if len(prompts) > 1:
            raise UserError(f"--output {output} is one file, but {len(prompts)} samples are asked for; give a folder")
        return [output]
    if output.suffix.lower() in (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".aif", ".aiff"):
        raise UserError(f"--output {output}: only WAV files are written; name a .wav file or a folder")
    slugs = [re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") or "prompt" for prompt in prompts]
    return [output / f"{index:04d}_{slug}.wav" for index, slug in enumerate(slugs)]


def warn_of_unknown_words(text, prompts, checkpoint):
    """One warning for all words that the model's tokenizer has no piece for (the toy's spells them in bytes)."""
    unknown = sorted({word for prompt in prompts for word in text.unknown_words(prompt)})
    if not unknown:
        return
    shown = ", ".join(word[:40] for word in unknown[:8]) + (", ..." if len(unknown) > 8 else "")
    message = f"{checkpoint} has no words for: {shown}"
    if text.tokenizer.get_vocab_size() < 10000:
        from world import EVENT_NAMES
        message += (f". The bundled model knows these sounds: {', '.join(EVENT_NAMES)}. "
                    f"For anything else use the official weights: --checkpoint {OFFICIAL}")
    warn(message)


def make_parser():
    """All flags of this script."""
    parser = argparse.ArgumentParser(description="Text to audio.", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog=__doc__.split("\n\n")[1])
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", action="append",
                       help=f'what to hear; repeat it for several (default "{DEFAULT_PROMPT}")')
    group.add_argument("--prompt_file",
                       help='a .txt with a prompt a line, or a .jsonl of {"prompt_id", "prompt", "duration"}')
    group.add_argument("--negative_prompt",
                       help="what not to hear: takes the place of the empty text in guidance (default: none; "
                            "paper: none)")
    group.add_argument("--duration", type=float,
                       help="seconds, at most the model's maximum (default 4 for the toy; paper: 10)")
    group.add_argument("--num_samples", type=int, default=1, help="samples per prompt (default 1)")
    group.add_argument("--best_of", type=int, default=1, metavar="N",
                       help="make N for each and keep the one that the reward scores highest (default 1; paper A.3: 5, "
                            "10, 15)")
    group.add_argument("--reward", help="folder or hub id of the CLAP that scores them (default: the bundled one; "
                                        "paper: laion/clap-htsat-unfused)")
    group.add_argument("--noise", choices=["indexed", "official"], default="indexed", help="sample i from (seed, i), "
                       "or as the official code: the seed anew for each prompt, whose samples are one draw (default: "
                       "indexed)")
    group.add_argument("--max_text_length", type=int, help="tokens of a prompt (default: the text encoder's, 64 for "
                       "the toy and FLAN-T5's 512; paper: 64 in training, official sampler 512)")
    group.add_argument("--crop_latents", action="store_true", help="denoise the frames of the duration alone, faster "
                       "and a little worse (default: all, as the paper)")
    group.add_argument("--first_index", type=int, default=0, metavar="I",
                       help="the first sample is made from (seed, I), the next from (seed, I + 1), ... (default 0; "
                            "the index in a scores.jsonl makes that clip again)")
    add_sampling_flags(parser)
    parser.set_defaults(guidance_scale=None)                # depends on the codec: see main
    group = parser.add_argument_group("score (second paper, III-B and III-E)")
    group.add_argument("--score", type=float, help="what a model with a score head is asked for, in the units of its "
                       "training scores (default: nothing; second paper: 5.0)")
    group.add_argument("--score_scale", type=float, help="guidance of the score apart from the text's, 1 is none "
                       "(default: the same as the text's, as Eq. 2 of the second paper)")
    group.add_argument("--prompt_prefix", default="", help='put before every prompt (default: none; second paper: '
                       '"high quality instrumental music, ")')
    group.add_argument("--profile", choices=list(PROFILES), help="all settings of: tangoflux, the paper; official, its "
                       "code's generate(); attm_sub1 and 2, the second paper's submissions, but for Demucs; flags "
                       "given beside it win")
    group.add_argument("--lufs", type=float, help="normalise loudness to so many LUFS (needs pyloudnorm; default: not; "
                       "second paper: -16.5)")
    group.add_argument("--true_peak", type=float, default=-1.0, metavar="DB", help="ceiling of --lufs, which limits "
                       "its gain (default -1 dB; second paper: -1)")
    group = parser.add_argument_group("where")
    group.add_argument("--output", default="out", help="a .wav file, or a folder (default out)")
    group.add_argument("--plot", action="store_true", help="a spectrogram picture beside each WAV (needs matplotlib)")
    add_model_flags(parser, dtype="auto")
    group.add_argument("--compile", action="store_true", help="let torch.compile make the flow's step: a minute or "
                       "more before the first, for many samples on a GPU (default: not)")
    return parser


def add_sampling_flags(parser, names=("steps", "guidance_scale", "solver", "seed"), steps=25, guidance_scale=3.0):
    """--steps, --guidance_scale, --solver, --seed: the settings of a sampler, or those of `names`, with defaults."""
    group = parser.add_argument_group("sampler")
    flags = {"steps": dict(type=int, default=steps, help=f"solver steps (default {steps}; paper 50, section 3.3)"),
             "guidance_scale": dict(type=float, default=guidance_scale, help="classifier-free guidance; 1 is the "
                                    f"conditional model alone (default {guidance_scale}; paper 4.5, section 3.3, and "
                                    "A.6, which sample.py takes with an Oobleck codec; second paper 4.0)"),
             "solver": dict(choices=list(SOLVERS), default="euler", help="heun evaluates the network twice a step "
                            "(default euler, as the paper; A.7)"),
             "seed": dict(type=int, default=0, help="sample i is made from (seed, i) (default 0)")}
    for name in names:
        group.add_argument(f"--{name}", **flags[name])


def add_model_flags(parser, batch_size=16, checkpoint=DEFAULT_CHECKPOINT, dtype="float32"):
    """--checkpoint, --batch_size, --dtype, --device."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--checkpoint", default=str(checkpoint), help="model folder or hub id (default: the bundled "
                       f"{checkpoint.relative_to(HERE)}; paper: {OFFICIAL})")
    group.add_argument("--batch_size", type=int, default=batch_size, help=f"samples at a time (default {batch_size})")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default=dtype,
                       help=f"precision of the flow (default {dtype}; auto is bfloat16 where the hardware multiplies "
                            "in it; official code: float32). Text encoder and codec: float32")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default auto)")


def check_sampling_flags(args):
    """Raise UserError if a sampling flag that `args` has is out of range (NaN is out of every range)."""
    for name, low, high in (("steps", 1, 1000), ("guidance_scale", 0, 50), ("seed", 0, 2 ** 63),
                            ("batch_size", 1, 4096), ("score", -1e6, 1e6), ("score_scale", 0, 50), ("lufs", -70, 0),
                            ("true_peak", -60, 0), ("max_text_length", 2, 100_000)):
        if getattr(args, name, None) is not None:
            in_range(f"--{name}", getattr(args, name), low, high)


def check_duration(name, duration, max_duration):
    """Return a duration in (0, max_duration] seconds, else raise UserError."""
    if not 0 < duration <= max_duration:
        limit = f" and at most {max_duration:g} s for this model" if max_duration < math.inf else ""
        raise UserError(f"{name} is {duration} s, but must be above 0{limit}")
    return float(duration)


def load_for_sampling(args, quiet=False):
    """The model of --checkpoint on --device in --dtype."""
    device = choose_device(args.device, quiet=quiet)
    return load_model(args.checkpoint, device=device, dtype=getattr(torch, dtype_for(args.dtype, device)[0]))


def open_model(name):
    """(folder, checked config, kind of codec) of a model folder or hub id; no weights are read, but they are there."""
    from vae import codec_place
    folder = model_folder(name)
    place = resolve(folder, "flow")
    config = check_config(read_config(place))
    find_weights(place, "tangoflux.safetensors")
    codec, file_name, kind, _ = codec_place(folder)
    find_weights(codec, file_name)
    return folder, config, kind


def load_reward(args):
    """The CLAP of --reward, default the bundled one."""
    from clap import load_clap
    from reward import REWARD
    return load_clap(args.reward or REWARD, choose_device(args.device, quiet=True))


def choose_best(clap, audios, prompts, sampling_rate, args):
    """Of each --best_of N clips in a row the one with the highest reward (paper A.3); prints which and the scores."""
    from reward import best_of
    scores = clap.scores(audios, sampling_rate, prompts).reshape(-1, args.best_of)         # (prompts, N)
    best = best_of(scores)
    for row, (choice, values) in enumerate(zip(best, scores.tolist())):
        print(f"best of {args.best_of}: sample {args.first_index + row * args.best_of + choice}, reward "
              f"{values[choice]:.4f} (mean {sum(values) / len(values):.4f}): {prompts[row * args.best_of][:60]}")
    return [audios[row * args.best_of + choice] for row, choice in enumerate(best)]


def parse_args(argv=None):
    """The flags; those of --profile are defaults, which flags on the command line override."""
    parser = make_parser()
    profile = parse_arguments(parser, argv).profile
    parser.set_defaults(**PROFILES.get(profile, {}))
    return parse_arguments(parser, argv)


def post_processed(audios, rate, args):
    """Audio at --lufs, each clip limited by --true_peak; says how many were (second paper, III-E b)."""
    from loudness import normalise
    levelled = [normalise(audio, rate, args.lufs, args.true_peak) for audio in tqdm(audios, desc="loudness", delay=2)]
    limited = [i for i, (_, _, reached) in enumerate(levelled) if abs(reached - args.lufs) > 0.1]
    if limited:
        reached = ", ".join(f"{levelled[i][2]:.1f}" for i in limited[:8]) + ", ..." * (len(limited) > 8)
        print(f"{len(limited)} of {len(audios)} clips stay below {args.lufs:g} LUFS, for their peaks reach "
              f"{args.true_peak:g} dB or they are silent: {reached}")
    return [audio for audio, _, _ in levelled]


def produce(args, folder, device, dtype, prompts, seconds, done=lambda stage: None):
    """Prompts and their seconds -> (audios, a list of (channels, samples); sampling rate), by the flags of `args`.

    No part of the model is in memory longer than it is needed. `done` is told each stage that has ended.
    """
    text = load_model(folder, device, parts=("text",)).text
    text.max_tokens = args.max_text_length or text.max_tokens
    warn_of_unknown_words(text, [*prompts, args.negative_prompt or ""], args.checkpoint)
    done("load")
    conditions = encode_conditions(text, prompts, seconds, args.guidance_scale, args.negative_prompt, args.batch_size,
                                   args.score)
    del text                                                # with FLAN-T5 a third of all memory
    done("text")
    model = load_model(folder, device, getattr(torch, dtype), ("flow", "codec"))
    flow, codec = model.flow, model.codec
    shape, rows = (flow.config["audio_seq_len"], flow.config["in_channels"]), min(args.batch_size, len(prompts))
    if args.compile:
        flow.transformer.run = torch.compile(flow.transformer.run)
    else:
        flow.pack(rows * (2 if conditions[0][1] else 1) * shape[0])
    done("load")
    noise, many = None, args.num_samples * args.best_of
    if args.noise == "official":
        noise = official_noise(args.seed, [many] * (len(prompts) // many), shape)
    indices = range(args.first_index, args.first_index + len(prompts))
    try:
        latents = generate(model, prompts, seconds, args.seed, indices, args.steps, args.guidance_scale, args.solver,
                           batch_size=args.batch_size, progress=True, score=args.score, score_scale=args.score_scale,
                           conditions=conditions, noise=noise, crop=args.crop_latents)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().split("\n")[-1]
        raise UserError(f"--compile: torch found no way to compile the flow here ({reason}); leave it out") from None
    done("steps")
    model.flow = flow = None                                # decoding needs its memory
    audios = decode(model, latents, seconds, args.batch_size, progress=len(latents) > args.batch_size,
                    cropped=args.crop_latents)
    done("decode")
    return audios, codec.sampling_rate


def main(argv=None):
    """Prompts in, WAV files out."""
    args = parse_args(argv)
    check_sampling_flags(args)
    if args.lufs is not None:
        from loudness import need_pyloudnorm
        need_pyloudnorm()
    in_range("--num_samples", args.num_samples, 1, 100000)
    in_range("--best_of", args.best_of, 1, 100000)
    in_range("--first_index", args.first_index, 0, 2 ** 62)
    if args.noise == "official" and args.first_index:
        raise UserError("--first_index would have no effect with --noise official, which has no indices")
    if args.score_scale is not None and (args.score is None or args.guidance_scale == 1):
        raise UserError("--score_scale would have no effect without --score and a --guidance_scale other than 1")
    if args.reward and args.best_of == 1:
        raise UserError("--reward would have no effect without --best_of N, N above 1")
    rows = [{"prompt": prompt, "duration": None} for prompt in args.prompt or []]
    rows += read_prompts(args.prompt_file) if args.prompt_file else []
    rows = rows or [{"prompt": DEFAULT_PROMPT, "duration": None}]
    if any(not row["prompt"].strip() for row in rows):
        warn("an empty prompt asks for any sound at all")
    rows = [row for row in rows for _ in range(args.num_samples)]
    prompts = [well_formed(args.prompt_prefix + row["prompt"]) for row in rows]
    paths = output_paths(args.output, prompts)
    if args.negative_prompt and args.guidance_scale == 1:
        warn("--negative_prompt has no effect at --guidance_scale 1, which is no guidance")
    if args.plot:
        from importlib.util import find_spec
        if find_spec("matplotlib") is None:
            raise UserError("--plot needs matplotlib: pip install matplotlib")
    if args.duration is not None:
        check_duration("--duration", args.duration, math.inf)
    check_writable(paths, keep=False)

    device = choose_device(args.device)
    if args.compile and device.type == "cpu" and args.batch_size > 1:
        raise UserError("--compile on a CPU needs --batch_size 1, for several threads can't compile at a time")
    dtype, reason = dtype_for(args.dtype, device)
    clap = load_reward(args) if args.best_of > 1 else None
    folder, config, kind = open_model(args.checkpoint)
    if args.guidance_scale is None:
        args.guidance_scale = 4.5 if kind == "oobleck" else 3.0          # the paper's, for the paper's codec
    if clap and not args.reward and kind == "oobleck":
        warn("the bundled CLAP knows the built-in world alone; the paper's is --reward laion/clap-htsat-unfused")
    if args.score is not None and not config.get("score_head"):
        raise UserError(f"--score needs a model with a score head, and {args.checkpoint} has none: python train_fm.py "
                        "--score_column makes one")
    fallback = default_duration(config["max_duration"]) if args.duration is None else args.duration
    durations = [check_duration("duration", fallback if row["duration"] is None else row["duration"],
                                config["max_duration"]) for row in rows]
    print(f"dtype: {dtype} ({reason}); text encoder and codec float32")

    every, seconds = ([value for value in values for _ in range(args.best_of)] for values in (prompts, durations))
    audios, rate = produce(args, folder, device, dtype, every, seconds)
    if args.best_of > 1:
        audios = choose_best(clap, audios, every, rate, args)

    if args.lufs is not None:
        audios = post_processed(audios, rate, args)
    from audio import save_spectrogram, write_wav
    for path, audio, prompt in zip(paths, audios, prompts):
        write_wav(path, audio, rate)
        if args.plot:
            save_spectrogram(path.with_suffix(".png"), [audio], [prompt], rate)
        print(f"wrote {path} ({audio.shape[-1] / rate:.2f} s): {prompt[:100]}")
    given = "" if args.checkpoint == str(DEFAULT_CHECKPOINT) else f"--checkpoint {shlex.quote(args.checkpoint)} "
    print(f'next: listen to it, or ask for another: '
          f'python sample.py {given}--prompt "three beeps and wind" --seed {args.seed + 1}')


if __name__ == "__main__":
    run_main(main)
