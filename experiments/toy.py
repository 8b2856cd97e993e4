"""What the bundled model can do, in tables.

    python -m experiments.toy scenes      # unseen pairs of events: F1, order, exact scenes
    python -m experiments.toy codec       # what VAE and vocoder keep: events, log-mels
    python -m experiments.toy duration    # asked-for against sounding length (paper A.8, Fig. 5)
    python -m experiments.toy steps       # solver steps, Euler against Heun (paper A.7, A.9)
    python -m experiments.toy text        # what the flow reads: its loss under wrong prompts

The judge (world/ears.py) hears the clips: no training and no choice of samples has seen it. In
brackets: 95 % intervals over prompts. Letters: N clips, B batch, L latent frames, C channels.
"""
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

import evaluate
from evaluate import Sampler, as_clips, bootstrap, number, sampled, tables
from lib.audio import resample
from lib.common import (BASE, check_writable, choose_device, flag, parse_commands, run_main,
                        write_report)
from lib.mel import MEL_16K, LogMel, griffin_lim, log_mel_error
from lib.text import encode_prompts
from model import load_model
from sample import SAMPLER_FLAGS, SOLVERS, Sampling, noise_for
from train_fm import flow_matching_loss, interpolate
from world.ears import hear, load_tagger, scores, tally_all
from world.scenes import NUMBERS, World, render_clips
from world.sounds import EVENTS, SAMPLE_RATE

FLAGS = {
    "what is measured": [
        flag("--checkpoint", str(BASE), "model folder or hub id"),
        flag("--tagger", str(BASE), "folder of the taggers"),
        flag("--prompts", 256, "prompts or scenes", 2, 10 ** 6),
        flag("--seeds", 3, "sampling seeds of scenes; steps takes the first", 1, 1000),
        flag("--num_samples", 50, "clips of a duration (paper: 100)", 1, 10 ** 6)],
    "sampler": SAMPLER_FLAGS,
    "run": evaluate.FLAGS["run"]}
DURATIONS = [1.0, 2.0, 3.0, 4.0]        # seconds of the table of duration (paper: 5 to 25)
GRID = [5, 10, 25, 50, 100]             # Euler steps of the table of steps (paper A.9: 10 to 200)
LEVELS = [0.5, 0.7, 0.85, 0.95, 1.0]    # t of the losses of the table of text
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
    frames = clip.double().unfold(0, FRAME, FRAME)                              # (frames, 320)
    energy = frames.square().mean(1)
    loud = torch.nonzero(energy > energy.max() * threshold)
    return (loud.max().item() + 1) * FRAME / SAMPLE_RATE if len(loud) else 0.0


def encoded(codec, clips):
    """Clips (B, 65536) -> the mean of their posterior (B, L, C), as the codec gives it."""
    wide = resample(clips, SAMPLE_RATE, codec.sampling_rate)[:, None]
    return codec.encode(wide.expand(-1, codec.audio_channels, -1).to(codec.latent_mean.device))[0]


@torch.inference_mode()
def through_codec(codec, clips, batch_size=16):
    """Clips (N, 65536) -> the same clips after encode (the posterior's mean) and decode."""
    audios = []
    for batch in clips.split(batch_size):
        audios.extend(codec.decode(encoded(codec, batch)).cpu())
    return as_clips(codec, audios)


def heard(tagger, sets, truths, seed):
    """Sets of clips [(N, 65536)] of the same prompts -> cells "0.912 (0.89-0.94)" of SCORES.

    The samples of a prompt are drawn together: they share its difficulty. "-": nothing was asked.
    """
    tallies = sum(tally_all(hear(tagger, clips), truths) for clips in sets)     # (N, columns)
    cells = []
    for name in SCORES.values():
        cells.append(number(scores(tallies)[name], 3))
        if cells[-1] != "-":
            low, high = bootstrap(lambda rows: scores(tallies[rows])[name], len(tallies), seed=seed)
            cells[-1] += f" ({low:.2f}-{high:.2f})"
    return cells


# ----------------------------------------------------------------------------- tables

# each takes its flags by name and returns a note, the heads and the rows of one table

def scenes(model, judge, sampler, prompts, seeds, **_):
    """Prompts with pairs of events that no training scene holds."""
    real, truths = render_clips(World("test", pairs="unseen"), range(prompts))
    others = [truths[i] for i in derangement(prompts, sampler.seed)]
    samplers = [sampler._replace(seed=sampler.seed + i) for i in range(seeds)]
    made = [sampled(model, truths, each)[0] for each in samplers]
    decoded = through_codec(model.codec, real, sampler.batch_size)
    sets = {"generated": (made, truths),
            "real scenes": ([real], truths),
            "real through the codec": ([decoded], truths),
            "generated, prompts shuffled": (made, others)}
    rows = []
    for source, (clips, asked) in sets.items():
        rows.append([source, *heard(judge, clips, asked, sampler.seed)])
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
    mel = LogMel(**MEL_16K)
    world = World("test", pairs="all", relations=(1, 0, 0, 0))
    single, _ = render_clips(world, range(prompts))
    decoded = through_codec(model.codec, single, sampler.batch_size)
    errors = []
    for clip, other in zip(single.split(1), decoded.split(1)):
        reference = mel(clip)                                                   # (1, 80, frames)
        alone = log_mel_error(reference, mel(griffin_lim(reference, mel)))
        errors.append([alone.item(), log_mel_error(reference, mel(other)).item()])
    note = (f"Event F1 of {prompts} scenes. Log-mel error (scenes of one event, dB): vocoder alone "
            "{:.2f}, VAE and vocoder {:.2f}.".format(*np.mean(errors, axis=0)))
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
    ways = [("euler", each) for each in GRID]
    ways += [("heun", each // 2) for each in GRID if each % 2 == 0]
    rows = []
    for solver, each in ways:
        sampling = sampler.sampling._replace(steps=each, solver=solver)
        clips, seconds = sampled(model, truths, sampler._replace(sampling=sampling))
        cells = heard(judge, [clips], truths, sampler.seed)
        evaluations = each * SOLVERS[solver][1]
        rows.append([f"{solver} {each}", evaluations, f"{seconds / prompts:.3f}", *cells])
    note = (f"{prompts} prompts with unseen pairs; {sampler.batch_size} clips at a time, "
            f"{torch.get_num_threads()} threads. Heun evaluates the network twice a step.")
    return note, ["steps", "evaluations", "s per clip", *SCORES], rows


def exchanged(scene):
    """A prompt of two sounds with the two exchanged: "wind, then a bell" -> "a bell, then wind"."""
    parts = []
    for truth in scene.events:
        event = EVENTS[truth.name]
        phrases = event.names.split(", ")
        if event.counted:
            phrases += [f"{word} {event.counted}" for word in NUMBERS.values()]
        parts.append(max([each for each in phrases if each in scene.prompt], key=len))
    held = scene.prompt.replace(parts[0], "*", 1)
    return held.replace(parts[1], parts[0], 1).replace("*", parts[1])


@torch.inference_mode()
def text(model, judge, sampler, prompts, **_):
    """How much the flow's loss rises when the prompt is wrong; long before one hears it."""
    world = World("val", pairs="all", relations=(0, 0, 1, 0), duration=4.0)
    clips, truths = render_clips(world, range(prompts))
    own = [scene.prompt for scene in truths]
    others = [own[i] for i in derangement(prompts, sampler.seed)]
    kinds = {"its own": own,
             "its two sounds exchanged": [exchanged(scene) for scene in truths],
             "another scene's": others,
             "empty": [""] * prompts}
    losses = np.zeros((len(kinds), len(LEVELS)))
    for start in range(0, prompts, sampler.batch_size):
        rows = slice(start, start + sampler.batch_size)
        x1 = model.codec.normalise(encoded(model.codec, clips[rows]))           # (B, L, C)
        indices = range(start, start + len(x1))
        x0 = noise_for(f"{sampler.seed}/text", indices, x1.shape[1:]).to(x1.device)
        seconds = torch.tensor([scene.duration for scene in truths[rows]])      # (B,)
        for row, asked in enumerate(kinds.values()):
            condition = encode_prompts(model.text, asked[rows], seconds)
            for column, level in enumerate(LEVELS):
                t = torch.full((len(x1),), level, device=x1.device)             # (B,)
                xt, target = interpolate(x1, x0, t)
                velocity = model.flow.velocity(xt, t, condition)
                _, each = flow_matching_loss(velocity, target)                  # (B,)
                losses[row, column] += each.sum().item() / prompts
    table = [["its own", *[number(loss, 4) for loss in losses[0]]]]
    rises = 100 * (losses[1:] / losses[0] - 1)
    for kind, row in zip(list(kinds)[1:], rises):
        table.append([kind, *[f"{number(rise, 1, '+')} %" for rise in row]])
    note = f"{prompts} scenes of two ordered sounds. First row: the loss; below: how much it rises."
    return note, ["prompt", *[f"t = {level:g}" for level in LEVELS]], table


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
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    write_report(args.out, args.command, COMMANDS[args.command][0],
                 f"python -m experiments.toy {command}", [note, tables(heads, rows)],
                 {"settings": vars(args), "note": note, "heads": heads, "rows": rows})
    print("next: python -m experiments.toy --help lists the other tables")


if __name__ == "__main__":
    run_main(main)
