"""What the clean model can do, in tables.

    python -m experiments.toy scenes      # unseen pairs of events: F1, order, exact scenes
    python -m experiments.toy codec       # what VAE and vocoder keep: events, log-mels
    python -m experiments.toy duration    # asked-for against sounding length (paper A.8, Fig. 5)
    python -m experiments.toy steps       # solver steps, Euler against Heun (paper A.7, A.9)
    python -m experiments.toy text        # what the flow reads: its loss under wrong prompts

The judge (world/ears.py) hears the clips: no training and no choice of samples has seen it. In
brackets: 95 % intervals over prompts. Letters: N clips, B batch, L latent frames, C channels.
"""
from pathlib import Path

import numpy as np
import torch

import evaluate
from evaluate import Sampler, as_clips, bootstrap, number, sampled, tables
from lib.audio import resample
from lib.common import (BASE, CLEAN, check_writable, choose_device, command_line, flag,
                        parse_commands, run_main, write_report)
from lib.mel import MEL_16K, LogMel, griffin_lim, log_mel_error
from lib.text import encode_prompts
from model import load_model
from sample import SAMPLER_FLAGS, SOLVERS, Sampling, decode, noise_for
from train_fm import flow_matching_loss, interpolate
from world.ears import hear, load_tagger, scores, tally_all
from world.scenes import World, caption, render_clips
from world.sounds import SAMPLE_RATE

FLAGS = {
    "what is measured": [
        flag("--checkpoint", str(CLEAN), "model folder or hub id"),
        flag("--tagger", str(BASE), "folder of the taggers"),
        flag("--prompts", 256, "prompts or scenes", 2, 10 ** 6),
        flag("--seeds", 3, "sampling seeds of scenes; steps takes the first", 1, 1000),
        flag("--num_samples", 50, "clips of a duration (paper: 100)", 1, 10 ** 6)],
    "sampler": SAMPLER_FLAGS,
    "run": evaluate.FLAGS["run"]}
DURATIONS = [1.0, 2.0, 3.0, 4.0]        # seconds of the table of duration (paper: 5 to 25)
LEVELS = [0.5, 0.7, 0.85, 0.95, 1.0]    # t of the losses of the table of text
# the table of steps (paper A.9: 10 to 200); a Heun row has an Euler row of equal cost
GRID = [("euler", 5), ("euler", 10), ("euler", 25), ("euler", 50), ("euler", 100),
        ("heun", 5), ("heun", 25), ("heun", 50)]
FRAME = 320                             # samples of a frame of sounding_length: 20 ms
SCORES = {"event F1": "f1", "order": "order", "count": "count", "exact scene": "exact"}


# ----------------------------------------------------------------------------- measures

def derangement(count, seed):
    """A seeded permutation of range(count), count >= 2, that leaves nothing in its place."""
    order = np.random.default_rng(seed).permutation(count)
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)
    return partner


def sounding_length(clip, threshold=1e-4):
    """Seconds of a clip (samples,) until its last 20 ms frame above -40 dB of the loudest.

    0: silence. Paper A.8 has an energy-based silence detector, whose threshold is not given.
    """
    frames = clip.double().unfold(0, FRAME, FRAME)    # (frames, 320)
    energy = frames.square().mean(1)
    loud = torch.nonzero(energy > energy.max() * threshold)
    return (loud.max().item() + 1) * FRAME / SAMPLE_RATE if len(loud) else 0.0


@torch.inference_mode()
def encoded(codec, clips, batch_size):
    """Clips (N, 65536) -> the means of their posteriors (N, L, C), as the codec gives them."""
    device = codec.latent_mean.device
    means = []
    for batch in clips[:, None].split(batch_size):    # (B, 1, 65536)
        batch = resample(batch, SAMPLE_RATE, codec.sampling_rate)
        batch = batch.expand(-1, codec.audio_channels, -1).to(device)
        means.append(codec.encode(batch)[0])
    return torch.cat(means)


def through_codec(codec, clips, batch_size):
    """Clips (N, 65536) -> the same clips after encode (the posterior's mean) and decode."""
    latents = encoded(codec, clips, batch_size)
    return as_clips(codec, decode(codec, latents, batch_size=batch_size))


def heard(tagger, sets, truths, seed):
    """Sets of clips [(N, 65536)] of the same prompts -> cells "0.912 (0.89-0.94)" of SCORES.

    The samples of a prompt are drawn together: they share its difficulty. "-": nothing was asked.
    """
    tallies = sum(tally_all(hear(tagger, clips), truths) for clips in sets)     # (N, columns)
    cells = []
    for name in SCORES.values():
        cell = number(scores(tallies)[name], 3)
        if cell != "-":
            low, high = bootstrap(lambda rows: scores(tallies[rows])[name], len(tallies), seed=seed)
            cell += f" ({low:.2f}-{high:.2f})"
        cells.append(cell)
    return cells


# ----------------------------------------------------------------------------- tables

# each takes its flags by name and returns a note, the heads and the rows of one table

def scenes(model, judge, sampler, prompts, seeds, **_):
    """Prompts with pairs of events that no training scene holds."""
    real, truths = render_clips(World("test", pairs="unseen"), range(prompts))
    others = [truths[i] for i in derangement(prompts, sampler.seed)]
    made = []
    for i in range(seeds):
        clips, _ = sampled(model, truths, sampler._replace(seed=sampler.seed + i))
        made.append(clips)
    decoded = through_codec(model.codec, real, sampler.batch_size)
    rows = [["generated", *heard(judge, made, truths, sampler.seed)],
            ["real scenes", *heard(judge, [real], truths, sampler.seed)],
            ["real through the codec", *heard(judge, [decoded], truths, sampler.seed)],
            ["generated, prompts shuffled", *heard(judge, made, others, sampler.seed)]]
    note = f"{prompts} prompts with unseen pairs of events, {seeds} sampling seeds."
    return note, ["clips", *SCORES], rows


def codec(model, judge, sampler, prompts, **_):
    """What VAE and vocoder keep of held-out scenes."""
    rows = []
    for kind, degraded in (("clean", 0.0), ("degraded", 1.0)):
        real, truths = render_clips(World("test", pairs="all", degraded=degraded), range(prompts))
        decoded = through_codec(model.codec, real, sampler.batch_size)
        before = heard(judge, [real], truths, sampler.seed)
        after = heard(judge, [decoded], truths, sampler.seed)
        rows.append([kind, before[0], after[0]])
    world = World("test", pairs="all", relations=(1, 0, 0, 0))
    single, _ = render_clips(world, range(prompts))
    decoded = through_codec(model.codec, single, sampler.batch_size)
    log_mel = LogMel(**MEL_16K)
    mel = log_mel(single)    # (N, 80, frames)
    vocoder = log_mel_error(mel, log_mel(griffin_lim(mel, log_mel))).mean()
    both = log_mel_error(mel, log_mel(decoded)).mean()
    note = (f"Event F1 of {prompts} scenes. Log-mel error (scenes of one event, dB): vocoder alone "
            f"{vocoder:.2f}, VAE and vocoder {both:.2f}.")
    return note, ["scenes", "originals", "reconstructions"], rows


def duration(model, judge, sampler, num_samples, **_):
    """Sounding length of the whole decode against the length asked for (paper A.8, Fig. 5)."""
    rows = [["generated"], ["real scenes"]]
    for seconds in DURATIONS:
        world = World("test", pairs="all", duration=seconds)
        real, truths = render_clips(world, range(num_samples))
        made, _ = sampled(model, truths, sampler, cut=False)
        for row, clips in zip(rows, (made, real)):
            lengths = np.array([sounding_length(clip) for clip in clips])
            error = np.median(abs(lengths - seconds))
            row.append(f"{np.median(lengths):.2f} ({error:.3f})")
    note = f"{num_samples} clips a duration. Cells: median length (absolute error), seconds."
    return note, ["clips", *[f"{seconds:g} s" for seconds in DURATIONS]], rows


def steps(model, judge, sampler, prompts, **_):
    """Numbers of solver steps, and Euler against Heun at equal numbers of function evaluations."""
    world = World("test", pairs="unseen")
    truths = [world.scene(i) for i in range(prompts)]
    rows = []
    for solver, count in GRID:
        sampling = sampler.sampling._replace(steps=count, solver=solver)
        clips, seconds = sampled(model, truths, sampler._replace(sampling=sampling))
        evaluations = count * SOLVERS[solver][1]
        rows.append([f"{solver} {count}", evaluations, f"{seconds / prompts:.3f}",
                     *heard(judge, [clips], truths, sampler.seed)])
    note = (f"{prompts} prompts with unseen pairs; {sampler.batch_size} clips at a time, "
            f"{torch.get_num_threads()} threads. Heun evaluates the network twice a step.")
    return note, ["steps", "evaluations", "s per clip", *SCORES], rows


@torch.inference_mode()
def losses(model, x1, x0, prompts, seconds, batch_size):
    """The flow's mean losses at LEVELS: x1, x0 (N, L, C) under N prompts, seconds (N,)."""
    total = np.zeros(len(LEVELS))
    for start in range(0, len(x1), batch_size):
        rows = slice(start, start + batch_size)
        condition = encode_prompts(model.text, prompts[rows], seconds[rows])
        for column, level in enumerate(LEVELS):
            t = torch.full_like(x1[rows, 0, 0], level)    # (B,)
            xt, target = interpolate(x1[rows], x0[rows], t)
            velocity = model.flow.velocity(xt, t, condition)
            _, errors = flow_matching_loss(velocity, target)    # (B,)
            total[column] += errors.sum().item()
    return total / len(x1)


def text(model, judge, sampler, prompts, **_):
    """How much the flow's loss rises when the prompt is wrong; long before one hears it."""
    world = World("val", pairs="all", relations=(0, 0, 1, 0), duration=4.0)
    clips, truths = render_clips(world, range(prompts))
    x1 = model.codec.normalise(encoded(model.codec, clips, sampler.batch_size))     # (N, L, C)
    x0 = noise_for(f"{sampler.seed}/text", range(prompts), x1.shape[1:]).to(x1.device)
    seconds = torch.tensor([scene.duration for scene in truths])    # (N,)
    own = [scene.prompt for scene in truths]
    right = losses(model, x1, x0, own, seconds, sampler.batch_size)
    rows = [["its own", *[number(loss, 4) for loss in right]]]
    rng = np.random.default_rng(sampler.seed)
    exchanged = []
    for scene in truths:
        events = [(event.name, event.count) for event in reversed(scene.events)]
        exchanged.append(caption(rng, scene.relation, events))
    others = {"its two sounds exchanged": exchanged,
              "another scene's": [own[i] for i in derangement(prompts, sampler.seed)],
              "empty": [""] * prompts}
    for kind, asked in others.items():
        wrong = losses(model, x1, x0, asked, seconds, sampler.batch_size)
        rises = 100 * (wrong / right - 1)
        rows.append([kind, *[f"{number(rise, 1, '+')} %" for rise in rises]])
    note = f"{prompts} scenes of two ordered sounds. First row: the loss; below: how much it rises."
    return note, ["prompt", *[f"t = {level:g}" for level in LEVELS]], rows


TABLES = {"scenes": scenes, "codec": codec, "duration": duration, "steps": steps, "text": text}
COMMANDS = {name: (table.__doc__.strip("."), FLAGS) for name, table in TABLES.items()}


def main(argv=None):
    args = parse_commands(__doc__, COMMANDS, argv)
    check_writable(Path(args.out) / f"{args.command}.md", Path(args.cache) / "latents")

    # the model, who hears it, how it samples
    device = choose_device(args.device)
    model = load_model(args.checkpoint, device)
    judge = load_tagger(args.tagger, "judge", device)
    sampling = Sampling(args.steps, args.guidance_scale, args.solver)
    sampler = Sampler(sampling, args.seed, args.batch_size, args.cache)

    # one table
    note, heads, rows = TABLES[args.command](model, judge, sampler, **vars(args))
    title, _ = COMMANDS[args.command]
    command = command_line("-m experiments.toy", argv)
    write_report(args.out, args.command, title, command, [note, tables(heads, rows)],
                 {"settings": vars(args), "note": note, "heads": heads, "rows": rows})
    print("next: python -m experiments.toy --help lists the other tables")


if __name__ == "__main__":
    run_main(main)
