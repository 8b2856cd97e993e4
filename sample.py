"""Text to audio: prompts in, WAV files out (paper 2.4, A.4, A.6, A.7).

    python sample.py --prompt "a violin followed by rain"
    python sample.py --prompt "three beeps" --prompt "rain" --num_samples 4 --duration 3 --plot
    python sample.py --checkpoint declare-lab/TangoFlux --prompt "a dog barks" --profile tangoflux

x_t = (1-t) x_1 + t x_0 with x_0 noise, x_1 data (Eq. 4). The network gives v = dx/dt = x_0 - x_1:
sampling runs from t = 1 down to 0 and every step is negative.

Where the official sampler and this one differ: every prompt of a batch has its own null row, and a
guidance scale of 1 is the conditional branch alone (there: errors); sample i has its own noise,
made from (seed, i) (there: every prompt the same; --noise official); no row sees another's padding.
As there: all frames are made, the audio is cut to int(duration * rate) samples (30 s last 29.95).
B batch, L latent frames, C latent channels, S text tokens, T text width.
"""
import math
from functools import partial
from itertools import pairwise
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import read_prompts
from lib.audio import (limited, normalise_loudness, output_paths, place_of, save_spectrogram,
                       write_wav)
from lib.common import (BASE, CLEAN, DEVICE, DTYPE, UserError, check_writable, choose_device,
                        choose_dtype, flag, generator, need, parse_flags, pick,
                        relative_to_here, run_main, side_by_side, warn, write_json)
from lib.fast import quicken
from lib.text import (concat_conditions, encode_prompts, moved, null_condition, text_hash,
                      warn_of_unknown_words, well_formed)
from lib.weights import code_hash, model_folder, module_hash, policy_hash, resolve, weights_hash
from model import ModelConfig, load_model
from reward import load_reward
from vae import codec_place
from world.scenes import fitting_seconds, sounds_named
from world.sounds import CLIP_SAMPLES, EVENT_NAMES, SAMPLE_RATE

# the second paper's submissions (III-E): guidance on text and a score beyond the training's
SUBMISSION = {"score": 5.0, "guidance_scale": 4.0, "steps": 25, "solver": "euler", "lufs": -16.5,
              "prompt_prefix": "high quality instrumental music, "}
PROFILES = {
    "tangoflux": {"guidance_scale": 4.5, "steps": 50, "solver": "euler"},
    "official": {"guidance_scale": 4.5, "steps": 25, "solver": "euler", "noise": "official",
                 "max_text_length": 512, "dtype": "float32"},
    "attm_sub1": {**SUBMISSION, "seed": 42}, "attm_sub2": {**SUBMISSION, "seed": 55}}

SAMPLER_FLAGS = [
    flag("--steps", 25, "solver steps (paper 3.3: 50)", 1, 1000),
    flag("--guidance_scale", 3.0, "classifier-free guidance, 1 is none (paper A.6: 4.5)", 0, 50),
    flag("--solver", "euler", "euler (paper), heun (A.7), or what you add to SOLVERS")]
FLAGS = {"what to make": [
    flag("prompts", [], "what to hear", kind=str, nargs="*"),
    flag("--prompt", [], "a prompt; may be repeated", kind=str, nargs="append"),
    flag("--prompt_file", None, ".txt with a prompt a line, or a table as --data of train_fm.py"),
    flag("--prompt_prefix", "", "text before every prompt"),
    flag("--negative_prompt", None, "what not to hear, in the place of the empty text"),
    flag("--duration", None, "seconds; none: 10 (paper), in the toy 4, or what a count needs", 1e-3,
         1e6, kind=float),
    flag("--num_samples", 1, "samples of each prompt", 1, 1e5),
    flag("--best_of", 1, "candidates for each sample (paper A.3: 5, 10, 15)", 1, 1e5),
    flag("--reward", str(BASE / "clap_reward"), "what chooses: a CLAP, or FILE.py:function"),
    flag("--profile", None, "settings of a paper or its code", choices=list(PROFILES)),
], "sampler (where the codec is Oobleck, the default of --guidance_scale is 4.5)": [
    *SAMPLER_FLAGS,
    flag("--seed", 0, "seed of the noise", 0, 2 ** 63),
    flag("--first_index", 0, "index i of the first sample, made from (seed, i)", 0, 2 ** 62),
    flag("--noise", "indexed", "official: alike for all", choices=["indexed", "official"]),
    flag("--max_text_length", None, "tokens of a prompt (FLAN-T5: 512)", 2, 1e5, kind=int),
    flag("--score", None, "for score heads (second paper: 5.0)", -1e6, 1e6, kind=float),
], "output": [
    flag("--output", "out", "a folder or a .wav file; what is there is never replaced"),
    flag("--plot", False, "a spectrogram picture beside each WAV"),
    flag("--lufs", None, "loudness in LUFS (second paper: -16.5)", -70, 0, kind=float),
    flag("--true_peak", -1.0, "ceiling of --lufs in dB (second paper: -1)", -60, 0),
], "model and machine": [
    flag("--checkpoint", CLEAN, "folder or hub id (paper: declare-lab/TangoFlux)", kind=str),
    flag("--batch_size", 16, "samples at a time; in bfloat16 it changes a clip a little", 1, 4096),
    DTYPE, DEVICE]}
MADE_FROM = ("seed noise best_of reward steps guidance_scale solver score negative_prompt "
             "max_text_length lufs true_peak").split()     # flags that a sample depends on


class Sampling(NamedTuple):
    """How latents are sampled; the names are those of the flags."""
    steps: int = 25
    guidance_scale: float = 3.0
    solver: str | Callable = "euler"        # a name of SOLVERS, or a function as `euler`
    score: float | None = None              # what a model with a score head is asked for
    negative_prompt: str | None = None      # in the place of the empty text


# ----------------------------------------------------------------------------- the maths

def schedule(steps):
    """Times 1 = t_0 > ... > t_N = 0, (N + 1,) float32: linspace(1, 1/N, N), then 0 (official)."""
    times = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    return F.pad(times, (0, 1)).float()


def euler(velocity_fn, x, ts):
    """Integrate dx/dt = velocity_fn(x, t) along `ts` (paper 2.4), one evaluation a step."""
    for t, t_next in pairwise(ts):
        x = x + (t_next - t) * velocity_fn(x, t)                                # (B, L, C)
    return x


def heun(velocity_fn, x, ts):
    """Heun's trapezium rule (paper A.7): two evaluations a step, the last too: v(t=0) is finite."""
    for t, t_next in pairwise(ts):
        slope = velocity_fn(x, t)                                               # (B, L, C)
        slope_next = velocity_fn(x + (t_next - t) * slope, t_next)              # (B, L, C)
        x = x + (t_next - t) * 0.5 * (slope + slope_next)
    return x


SOLVERS = {"euler": (euler, 1), "heun": (heun, 2)}          # and evaluations a step


def guide(cond, uncond, guidance_scale):
    """Classifier-free guidance (paper A.6): uncond + w (cond - uncond); w = 1 is cond."""
    return uncond + guidance_scale * (cond - uncond)


def guided_velocity(flow, condition, null, guidance_scale):
    """velocity_fn(x (B, L, C), t scalar) for the solvers, in x's own precision.
    Both branches are one batch [uncond; cond] (official order); `null` None: the conditional one
    alone. A score is guided jointly with the text (second paper, Eq. 2)."""
    both = condition if null is None else concat_conditions(null, condition)
    if both.mask is not None and both.mask.all():           # attention is quicker without a mask
        both = both._replace(mask=None)
    text, *others = flow.condition_inputs(both)             # (2B, S+1, T), the same at every step

    def velocity_fn(x, t):
        times = t.expand(len(text)).to(text.device)                             # (2B,)
        rows = x if null is None else torch.cat([x, x])                         # (2B, L, C)
        velocity = flow.transformer(rows.to(text.dtype), times, text, *others).to(x.dtype)
        if null is None:
            return velocity
        uncond, cond = velocity.chunk(2)                                        # (B, L, C) each
        return guide(cond, uncond, guidance_scale)
    return velocity_fn


def noise_for(seed, indices, shape):
    """Noise of the samples `indices`, (B, *shape) on the CPU: row i depends on (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=generator(seed, index)) for index in indices])


def official_noise(seed, counts, shape):
    """The official noise (B, *shape): the seed anew for each prompt, its `counts` are one draw."""
    random = torch.Generator()
    return torch.cat([torch.randn(n, *shape, generator=random.manual_seed(seed)) for n in counts])


# ----------------------------------------------------------------------------- prompts -> latents

@torch.inference_mode()
def encode_conditions(text, prompts, durations, sampling=Sampling(), batch_size=16):
    """[(condition, null or None) of each batch] on the CPU, because thousands would fill a GPU."""
    conditions = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        seconds = torch.tensor(durations[rows], dtype=torch.float32)            # (B,)
        score = None if sampling.score is None else torch.full_like(seconds, sampling.score)
        condition = encode_prompts(text, prompts[rows], seconds, score)
        null = None
        if sampling.guidance_scale != 1:
            null = moved(null_condition(text, condition, sampling.negative_prompt or ""), "cpu")
        conditions.append((moved(condition, "cpu"), null))
    return conditions


@torch.inference_mode()
def solve(model, sampling, progress, piece):
    """Some rows (condition, null, noise (B, L, C)) -> raw latents (B, L, C) on the CPU."""
    condition, null, noise = piece
    velocity_fn = guided_velocity(model.flow, condition, null, sampling.guidance_scale)
    ts = tqdm(schedule(sampling.steps), "sampling", leave=False, disable=not progress)
    solver = sampling.solver
    if isinstance(solver, str):
        solver, _ = SOLVERS[solver]
    latents = solver(velocity_fn, noise, ts)
    return model.codec.denormalise(latents).float().cpu()


def sample_latents(model, prompts, durations, seed=0, indices=None, sampling=Sampling(),
                   batch_size=16, conditions=None, noise=None, progress=False):
    """Sample one latent for each prompt: raw latents (B, L, C), float32 on the CPU.
    durations: seconds. indices: the i of (seed, i), default 0, 1, ... conditions: those of
    `encode_conditions`; model.text may then be None. noise (B, L, C): in the place of (seed, i).
    Raises UserError if a score is asked without a head."""
    flow = quicken(model.flow)
    if sampling.score is not None and not flow.config.get("score_head"):
        raise UserError("--score needs a model with a score head: train_fm.py --score_column")
    if isinstance(sampling.solver, str) and sampling.solver not in SOLVERS:
        raise UserError(f"--solver {sampling.solver} is unknown; there are {', '.join(SOLVERS)}")
    if conditions is None:
        conditions = encode_conditions(model.text, prompts, durations, sampling, batch_size)
    if noise is None:
        indices = range(len(prompts)) if indices is None else indices
        noise = noise_for(seed, indices, (flow.config["audio_seq_len"], flow.config["in_channels"]))
    device = next(flow.parameters()).device
    cores = torch.get_num_threads() if device.type == "cpu" else 1      # each samples some rows
    pieces = []
    for (condition, null), x0 in zip(conditions, noise.split(batch_size)):      # (B, L, C), t = 1
        for rows in torch.arange(len(x0)).chunk(cores):
            null_rows = None if null is None else moved(null, device, rows)
            pieces.append((moved(condition, device, rows), null_rows, x0[rows].to(device)))
    latents = side_by_side(partial(solve, model, sampling, progress), pieces, device)
    return torch.cat(latents)       # made outside of inference_mode: usable as training data


def sampler_of(flags, **others):
    """sampler(model, prompts, durations, seed, indices) -> latents (B, L, C), by a script's flags;
    others: Sampling's fields, in their place."""
    sampling = Sampling(flags.steps, flags.guidance_scale, score=flags.score)._replace(**others)
    return partial(sample_latents, sampling=sampling, batch_size=flags.generation_batch)


# ----------------------------------------------------------------------------- latents -> audio

@torch.inference_mode()
def decode(codec, latents, durations=None, batch_size=16, progress=False, say=lambda line: None):
    """Raw latents (B, L, C) -> list of audio (channels, int(duration * rate)), on the CPU.
    Nothing clips: what passes full scale is turned down around its peaks, and `say` is told."""
    weight = next(codec.parameters())
    samples = [latents.shape[1] * codec.hop] * len(latents)        # durations None
    if durations is not None:
        samples = [max(1, int(seconds * codec.sampling_rate)) for seconds in durations]
    audios = []
    for start in tqdm(range(0, len(latents), batch_size), "decoding", disable=not progress):
        rows = slice(start, start + batch_size)
        # no more is decoded than is heard, and a frame: what follows a sample decides its limit
        frames = min(math.ceil(max(samples[rows]) / codec.hop) + 1, latents.shape[1])
        decoded = codec.decode(latents[rows].to(weight), frames=frames)         # (B, channels, N)
        for audio, n in zip(decoded.float().cpu(), samples[rows]):
            peak = audio[:, :n].abs().max().item()
            if peak > 1:
                say(f"a clip passes full scale by {20 * math.log10(peak):.1f} dB: limited")
            audios.append(limited(audio, codec.sampling_rate)[:, :n])
    return audios


def prompts_to_audio(name, prompts, durations, seed=0, indices=None, sampling=Sampling(),
                     batch_size=16, noise=None, device="cpu", dtype=torch.float32,
                     max_text_length=None, done=()):
    """Yield (row, audio (channels, samples), sampling rate) of each prompt, batch after batch; not
    of batches whose rows are all in `done`: others keep their batch, on which bfloat16 depends."""
    text = load_model(name, device, parts=("text",)).text
    text.max_tokens = max_text_length or text.max_tokens
    training = resolve(model_folder(name), "text_encoder")[1].get("training")
    # a text encoder that was trained as well (--train_text) has learned its captions' own words
    if not (isinstance(training, dict) and training.get("train_text")):
        warn_of_unknown_words(text, [*prompts, sampling.negative_prompt or ""], EVENT_NAMES)
    conditions = encode_conditions(text, prompts, durations, sampling, batch_size)
    del text        # with FLAN-T5 a third of all memory

    model = load_model(name, device, dtype, ("flow", "codec"))
    rate = model.codec.sampling_rate
    shape = model.flow.config["audio_seq_len"], model.flow.config["in_channels"]
    quicken(model.flow, 2 * min(batch_size, len(prompts)) * shape[0])
    for number, condition in enumerate(tqdm(conditions, "batches", delay=2)):
        own = slice(number * batch_size, (number + 1) * batch_size)
        if done and all(done[own]):
            continue
        x0 = noise_for(seed, indices[own], shape) if noise is None else noise[own]  # (B, L, C)
        latents = sample_latents(model, prompts[own], durations[own], sampling=sampling,
                                 batch_size=batch_size, conditions=[condition], noise=x0,
                                 progress=True)
        if own.stop >= len(prompts):
            model.flow = None        # decoding needs its memory
        audios = decode(model.codec, latents, durations[own], batch_size, say=print)
        for row, audio in enumerate(audios, own.start):
            yield row, audio, rate


# ----------------------------------------------------------------------------- command line

def default_duration(max_duration):
    """Seconds where nobody says: 10 (official), or the whole seconds that the model can make."""
    return min(10.0, float(math.floor(max_duration)) or max_duration)


def best_audio(scores, audios, rate, prompt):
    """The best of a prompt's candidates by reward (paper A.3); all NaN: the first."""
    rewards = torch.as_tensor(scores(audios, rate, [prompt] * len(audios)))     # (N,)
    index = rewards.nan_to_num(-torch.inf).argmax().item()
    print(f"best of {len(audios)}: candidate {index}, reward {rewards[index]:.4f} "
          f"(mean {rewards.nanmean():.4f}): {prompt[:60]}")
    return audios[index]


def main(argv=None):
    # settings: a profile's are defaults; guidance depends on the codec, unless it is given
    profile = PROFILES.get(parse_flags(__doc__, FLAGS, argv).profile, {})
    args = parse_flags(__doc__, FLAGS, argv, {"guidance_scale": None, **profile})
    if args.plot:
        need("matplotlib", "--plot")
    if args.lufs is not None:
        need("pyloudnorm", "--lufs")
    folder = model_folder(args.checkpoint)
    if args.guidance_scale is None:
        args.guidance_scale = 4.5 if codec_place(folder)[2] == "oobleck" else 3.0
    device = choose_device(args.device)
    dtype, reason = choose_dtype(args.dtype, device)
    print(f"dtype: {str(dtype).removeprefix('torch.')} ({reason}); text encoder and codec float32")

    # prompts, and seconds that the model can make
    config = ModelConfig.from_dict(resolve(folder, "flow")[1], folder)
    rows = [{"prompt": prompt, "duration": None} for prompt in args.prompts + args.prompt]
    rows += read_prompts(args.prompt_file) if args.prompt_file else []
    rows = rows or [{"prompt": "a violin followed by rain", "duration": None}]
    if len(args.prompts) > 2 and " " not in "".join(args.prompts):
        warn(f"{len(args.prompts)} prompts of a word each: a sentence needs quotation marks")
    if not all(row["prompt"].strip() for row in rows):
        warn("an empty prompt asks for any sound at all")
    is_toy = config.max_duration == CLIP_SAMPLES / SAMPLE_RATE          # a model of the world
    crowded = [row["prompt"] for row in rows if is_toy and sounds_named(row["prompt"]) > 3]
    if crowded:
        warn(f"the toy never heard more than three sounds, as {len(crowded)} prompts name: "
             f"{crowded[0][:80]}")
    for row in rows:
        row["prompt"] = well_formed(args.prompt_prefix + row["prompt"])
        usual = default_duration(config.max_duration)
        if is_toy:
            usual = fitting_seconds(row["prompt"], usual)
        seconds = row["duration"] = row["duration"] or args.duration or usual
        if seconds > config.max_duration:
            raise UserError(f"{row['prompt'][:40]}: ask for at most {config.max_duration:g} s")
    rows = [row for row in rows for _ in range(args.num_samples)]

    # the files that they will be, and what they depend on
    paths = output_paths(args.output, [row["prompt"] for row in rows])
    check_writable(*paths)
    reward = load_reward(args.reward, device) if args.best_of > 1 else None
    made_from = {name: relative_to_here(getattr(args, name)) for name in MADE_FROM}
    made_from["negative_prompt"] = args.negative_prompt and well_formed(args.negative_prompt)
    made_from |= {"dtype": str(dtype), "checkpoint": policy_hash(folder), "code": code_hash(),
                  "codec": weights_hash(codec_place(folder)[0], "vae.safetensors"),
                  "text encoder": text_hash(folder, config.text_encoder_name),
                  "ranked by": reward and module_hash(reward)}
    places = []                                                     # (path, is it there, record)
    for number, (path, row) in enumerate(zip(paths, rows)):
        index = args.first_index + number * args.best_of
        if args.noise == "official":                # it is alike for all prompts
            index = number % args.num_samples
        record = {**row, "index": index, **made_from}
        place, is_there = place_of(path, record)
        has_all = is_there and (place.with_suffix(".png").exists() or not args.plot)
        places.append((path, has_all, record))

    # prompts -> latents -> audio, batch after batch
    rows = [row for row in rows for _ in range(args.best_of)]       # of each candidate
    done = [places[row // args.best_of][1] for row in range(len(rows))]
    noise = None
    if args.noise == "official":
        copies = args.num_samples * args.best_of
        shape = config.audio_seq_len, config.in_channels
        noise = official_noise(args.seed, [copies] * (len(rows) // copies), shape)      # (B, L, C)
    prompts, durations = zip(*[(row["prompt"], row["duration"]) for row in rows])
    indices = range(args.first_index, args.first_index + len(rows))
    made = () if all(done) else prompts_to_audio(
        folder, prompts, durations, args.seed, indices, pick(Sampling, args), args.batch_size,
        noise, device, dtype, args.max_text_length, done)
    candidates = []
    for row, audio, rate in made:
        number, candidate = divmod(row, args.best_of)
        path, is_there, record = places[number]
        candidates = [*candidates, audio] if candidate else [audio]
        if is_there or candidate + 1 < args.best_of:
            continue

        # the best candidate, at one loudness, is written
        if args.best_of > 1:
            audio = best_audio(reward.scores, candidates, rate, record["prompt"])
        path, _ = place_of(path, record)        # another command may have taken it
        if args.lufs is not None:
            audio = normalise_loudness(audio, rate, args.lufs, args.true_peak)[0]
        if args.plot:
            save_spectrogram(path.with_suffix(".png"), [audio], [record["prompt"]], rate)
        write_json(path.with_suffix(".json"), record)       # first: a WAV that is there is whole
        write_wav(path, audio, rate)
        print(f"wrote {path} ({audio.shape[-1] / rate:.2f} s): {record['prompt'][:100]}")
    print(f'next: python sample.py --checkpoint {relative_to_here(args.checkpoint)} --prompt '
          f'"three beeps and wind" --seed {args.seed + 1}')


if __name__ == "__main__":
    run_main(main)
