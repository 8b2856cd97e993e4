"""Training of the taggers, the world's ears: scenes, what spoils them, the loss, the loop, the thresholds.

    python train_tagger.py                                   # the judge -> runs/tagger/tagger.safetensors
    python train_tagger.py --which features --seed 1 --width 168 --out runs/tagger_features

Scenes of the world are rendered once, with their truth, and kept as log-mels in memory. The ear has to judge clips
that it never met and audio that a codec or a generator made. So its scenes are played at other speeds, and each
batch is moved, tilted, masked, blurred and made noisy (augment). A killed run goes on exactly where its last state
stood.

Letters: B batch, F mel frames (16 ms), T tagger frames (64 ms; 2T strike frames of 32 ms), K events, Q countable
events, N scenes.
"""
import argparse
import math
import multiprocessing
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from tqdm import tqdm

from common import (UserError, append_jsonl, atomic_path, choose_device, derive_seed, generator, in_range,
                    parse_arguments, run_main)
from tagger import FILES, FRAME_SECONDS, MEL_FLOOR, MEL_PER_FRAME, Tagger, save_tagger, strike_times
from training import choose_dtype, make_optimizer, trim_log
from vocoder import MEL_16K, LogMel


# ----------------------------------------------------------------------------- training data

def targets(scene, events, countable, frames=64):
    """Truth of a Scene -> activity (T, K) and strike rate (2T, Q), float16, and hits (Q,) int8, -1 if unknown.

    Each strike is one unit, shared between the two 32 ms frames nearest to it, so that the rate sums to the count.
    """
    activity = np.zeros((frames, len(events)), dtype=np.float16)
    rate = np.zeros((2 * frames, len(countable)), dtype=np.float16)
    hits = np.zeros(len(countable), dtype=np.int8)
    starts = np.arange(frames) * FRAME_SECONDS
    for event in scene.events:
        covered = np.minimum(event.offset, starts + FRAME_SECONDS) - np.maximum(event.onset, starts)
        activity[:, events.index(event.name)] = covered.clip(min=0) / FRAME_SECONDS
        if event.name in countable:
            q = countable.index(event.name)
            hits[q] = -1 if event.hits is None or not event.strikes else event.hits
            for second in event.strikes or []:
                place = min(max(second / FRAME_SECONDS * 2 - 0.5, 0), 2 * frames - 1)
                left = int(place)
                rate[left, q] += 1 - (place - left)
                rate[min(left + 1, 2 * frames - 1), q] += place - left
    return activity, rate, hits


def played_faster(audio, scene, factor):
    """The audio (samples,) at 16 kHz played `factor` times faster (and higher), and its truth, cut at the end.

    A handful of clips per instrument holds few pitches; this is where the tagger meets the others.
    """
    end = len(audio) / 16000
    steps = np.arange(len(audio))
    audio = np.interp(steps * factor, steps, audio, right=0.0).astype(np.float32)
    for event in scene.events:
        event.onset, event.offset = event.onset / factor, min(end, event.offset / factor)
        if event.strikes and event.hits is not None:
            event.strikes = [second / factor for second in event.strikes if second / factor < end - 0.03]
            event.hits = len(event.strikes)
    scene.events = [event for event in scene.events if event.onset < end - 0.15 and event.hits != 0]
    return audio, scene


def _render(job):
    """One worker's share: log-mels and targets of scenes of a World, played up to `semitones` faster or slower."""
    torch.set_num_threads(1)
    from world import COUNTABLE, EVENT_NAMES, World
    settings, indices, semitones = job
    source, log_mel, rows = World(**settings), LogMel(**MEL_16K), []
    for index in indices:
        audio, scene = source.render(index)
        if semitones:
            random = np.random.default_rng(derive_seed("speed", settings["seed"], index))
            audio, scene = played_faster(audio, scene, 2 ** (random.uniform(-semitones, semitones) / 12))
        mel = log_mel(torch.from_numpy(audio)[None])[0].numpy().astype(np.float16)
        rows.append((mel, *targets(scene, EVENT_NAMES, COUNTABLE, mel.shape[1] // MEL_PER_FRAME)))
    return [np.stack(column) for column in zip(*rows)]


def render_scenes(settings, count, workers=2, semitones=0.0, chunk=50):
    """Scenes 0..count-1 of World(**settings), rendered in parallel; `semitones`: see played_faster.

    Returns tensors mel (N, 80, F), activity (N, T, K), strike rate (N, 2T, Q), float16, and hits (N, Q) int8.
    """
    jobs = [(settings, range(start, min(start + chunk, count)), semitones) for start in range(0, count, chunk)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        parts = list(tqdm(pool.imap(_render, jobs), f"rendering {settings['split']}", len(jobs), unit=f" x {chunk}"))
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts)]


def blurred(mel, kernel, amount):
    """Mix mel (B, 80, F) with its mean over `kernel` (bands, frames) by amount (B, 1, 1) in [0, 1]."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    smooth = functional.avg_pool2d(mel[:, None], kernel, 1, padding, count_include_pad=False)[:, 0]
    return mel + amount * (smooth - mel)


def augment(mel, activity, rate, random, mel_per_frame=MEL_PER_FRAME):
    """A training batch as other recordings and machines would leave it; `random` is the batch's torch.Generator.

    Moved in time (with its truth) by up to 0.4 s and in pitch by up to two bands; gain, tilt and a bend of the
    spectrum; masked bands; blur over time and bands; noise of up to 2 dB (0.1 in log10).
    """
    batch, bands, _ = mel.shape

    def uniform(low, high):
        return low + (high - low) * torch.rand(batch, 1, 1, generator=random)

    def sometimes(high):                                        # 0 in half of the rows
        return uniform(-high, high).clamp(min=0)

    mel, activity, rate = mel.clone(), activity.clone(), rate.clone()
    shifts = torch.randint(-3, 7, (batch,), generator=random).clamp(min=0).tolist()
    pitches = torch.randint(-2, 3, (batch,), generator=random).tolist()
    for row, (shift, pitch) in enumerate(zip(shifts, pitches)):
        for part, frames, silence in ((mel[row].T, mel_per_frame, MEL_FLOOR), (activity[row], 1, 0), (rate[row], 2, 0)):
            part.copy_(part.roll(shift * frames, 0))
            part[:shift * frames] = silence
        if pitch:                                               # the bands that rolled in repeat their neighbour
            mel[row] = mel[row].roll(pitch, 0)
            mel[row, slice(0, pitch) if pitch > 0 else slice(bands + pitch, bands)] = mel[row, pitch - (pitch < 0)]
    axis = torch.linspace(-1, 1, bands)[:, None]
    bend = torch.cos(math.pi * uniform(1, 4) * axis + uniform(0, 2 * math.pi))
    mel = mel + uniform(-0.3, 0.3) + uniform(-0.3, 0.3) * axis + uniform(-0.15, 0.15) * bend
    start, size = (torch.randint(low, high, (batch, 1, 1), generator=random) for low, high in ((0, bands), (-8, 9)))
    mel = mel.masked_fill((torch.arange(bands)[:, None] - start) % bands < size, MEL_FLOOR)
    for kernel in ((3, 1), (1, 3), (1, 3)):
        mel = blurred(mel, kernel, sometimes(1.0))
    mel = mel + torch.randn(mel.shape, generator=random) * sometimes(0.1)
    return mel.clamp(min=MEL_FLOOR), activity, rate


# ----------------------------------------------------------------------------- training

def tagger_loss(outputs, activity, rate, hits):
    """Cross-entropy of presence and of activity, and the Poisson likelihood of the strikes.

    outputs = Tagger(mel); activity (B, T, K) in [0, 1], rate (B, 2T, Q), hits (B, Q) int, -1 unknown. Strikes are
    learned in the clips that have some: else doubt about presence would thin them out. Returns the loss and its
    parts. The weights bring the three to one size.
    """
    frame_logits, clip_logits, heard_rate = outputs
    present, struck = (activity.amax(1) > 0).float(), (hits > 0).float()   # (B, K), (B, Q)
    likelihood = (heard_rate - rate * heard_rate.clamp(min=1e-6).log()).sum(1)
    parts = {"presence": functional.binary_cross_entropy_with_logits(clip_logits, present) * 20,
             "activity": functional.binary_cross_entropy_with_logits(frame_logits, activity) * 20,
             "strikes": (likelihood * struck).sum() / struck.sum().clamp(min=1) * 0.2}
    return sum(parts.values()), {name: part.item() for name, part in parts.items()}


def best_thresholds(presence, truth):
    """Probabilities (N, K) and truth (N, K) of validation scenes -> per event the threshold of the best F1.

    The middle of the plateau of best values is taken: the edge of it is an accident of these scenes.
    """
    grid, chosen = np.linspace(0.05, 0.95, 91), []
    for scores, true in zip(np.asarray(presence).T, np.asarray(truth, dtype=bool).T):
        f1 = np.array([2 * (true & (scores >= level)).sum() / max(1, true.sum() + (scores >= level).sum())
                       for level in grid])
        chosen.append(float(np.median(grid[f1 >= f1.max() - 1e-9])))
    return chosen


def best_strike_threshold(rate, hits):
    """Strike rates (N, 2T, Q) and true hits (N, Q) -> the threshold with most counts right where hits > 0."""
    struck = [(rate[i, :, q], hits[i, q]) for i, q in np.argwhere(np.asarray(hits) > 0)]
    grid = np.linspace(0.15, 0.85, 29)
    right = np.array([np.mean([len(strike_times(curve, level)) == count for curve, count in struck] or [0])
                      for level in grid])
    return float(np.median(grid[right >= right.max() - 1e-9]))


def batch_indices(seed, step, scenes, batch_size):
    """The scenes of batch `step`: each epoch is its own permutation; depends on (seed, step) alone."""
    per_epoch = max(1, scenes // batch_size)
    order = torch.randperm(scenes, generator=generator(seed, "epoch", step // per_epoch))
    return order[step % per_epoch * batch_size:][:batch_size]


def fit(tagger, scenes, out, seed=0, steps=1500, batch_size=32, learning_rate=3e-3, weight_decay=0.05,
        max_minutes=None, save_every=100, autocast=None, augmented=True, loss_of=tagger_loss):
    """Train `tagger` in place on `scenes` = render_scenes(...); resumes exactly from out/state.pt.

    autocast: a function that gives a context (training.choose_dtype). loss_of(outputs, *truth): loss and its parts.
    True when all steps are done.
    """
    state_path, step, device = Path(out) / "state.pt", 0, tagger.norm.weight.device
    optimizer = make_optimizer(dict(tagger.named_parameters()), (0.9, 0.98), weight_decay)
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        tagger.load_state_dict(state["tagger"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"resumed {out} at step {step}")
    trim_log(out, step)
    tagger.train()
    started, bar = time.time(), tqdm(total=steps, initial=step, desc="training", unit="step")
    late = False
    while step < steps and not late:
        rows = batch_indices(seed, step, len(scenes[0]), batch_size)
        batch = [part[rows] if part.dtype == torch.int8 else part[rows].float() for part in scenes]
        if augmented:
            batch[:3] = augment(*batch[:3], generator(seed, "augment", step))
        mel, *truth = (part.to(device) for part in batch)
        for group in optimizer.param_groups:                    # short warm-up, then a cosine to zero
            group["lr"] = learning_rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with autocast() if autocast else nullcontext():
            outputs = tagger(mel)
        loss, parts = loss_of(outputs, *truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tagger.parameters(), 2.0)
        optimizer.step()
        step += 1
        bar.update()
        if step % 20 == 0 or step == steps:
            append_jsonl(Path(out) / "log.jsonl", {"step": step, "loss": loss.item(), **parts})
            bar.set_postfix(loss=f"{loss.item():.3f}")
        late = max_minutes is not None and time.time() - started > 60 * max_minutes
        if step % save_every == 0 or step == steps or late:
            with atomic_path(state_path) as temporary:
                torch.save({"tagger": tagger.state_dict(), "optimizer": optimizer.state_dict(), "step": step},
                           temporary)
    bar.close()
    tagger.eval()
    return step == steps


# ----------------------------------------------------------------------------- command line

def main():
    args = parse_args()
    from world import COUNTABLE, EVENT_NAMES
    out, device = Path(args.out), choose_device(args.device)
    autocast = choose_dtype(args.dtype, device)
    trim_log(out, math.inf)                                     # a folder that can't be written is told now
    settings = {"split": "train", "seed": args.scene_seed + args.seed, "degraded": args.degraded, "pairs": "all"}
    harder = {"relations": (0.1, 0.4, 0.28, 0.22), "counted": 0.5}          # mixtures and counts are learned slowest
    scenes = render_scenes({**settings, **harder}, args.scenes, args.workers, args.semitones)
    checks = render_scenes({**settings, "split": "val"}, args.val_scenes, args.workers)
    torch.manual_seed(args.seed)                                # the initial weights, nothing else
    tagger = Tagger(EVENT_NAMES, COUNTABLE, args.width, args.layers).to(device)
    print(f"tagger: {sum(p.numel() for p in tagger.parameters()) / 1e6:.2f} M parameters")
    finished = fit(tagger, scenes, out, args.seed, args.steps, args.batch_size, args.learning_rate,
                   args.weight_decay, args.max_minutes, autocast=autocast)
    with torch.no_grad():
        heard = [tagger(mel.float().to(device))[1:] for mel in checks[0].split(64)]
    presence, rate = (torch.cat(parts).cpu() for parts in zip(*heard))
    tagger.thresholds = best_thresholds(presence.sigmoid(), checks[1].amax(1) > 0)
    tagger.strike_threshold = best_strike_threshold(rate.numpy(), checks[3].numpy())
    save_tagger(out / FILES[args.which], tagger)
    print(f"wrote {out / FILES[args.which]}" + ("" if finished else "; stopped early, the same command goes on"))
    print(f"next: python tagger.py --which {args.which} --tagger {out}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(group, name, default, what, kind=None, **more):
        group.add_argument(name, default=default, type=kind or type(default), help=f"{what} (default: %(default)s)",
                           **more)

    group = parser.add_argument_group("where")
    flag(group, "--out", "runs/tagger", "run folder; a run found there is resumed")
    flag(group, "--which", "judge", "decides the name of the file written", choices=("judge", "features"))
    flag(group, "--device", "auto", "auto, cuda, mps or cpu")
    flag(group, "--dtype", "auto", "of the forward pass", choices=("auto", "float32", "bfloat16"))
    flag(group, "--max_minutes", None, "stop training after so many; the same command goes on", float)
    group = parser.add_argument_group("scenes")
    flag(group, "--scenes", 14000, "training scenes, kept as log-mels in memory")
    flag(group, "--val_scenes", 1500, "validation scenes that fix the thresholds")
    flag(group, "--scene_seed", 1000, "the scenes are those of World(seed=scene_seed + seed)")
    flag(group, "--degraded", 0.3, "share of degraded scenes")
    flag(group, "--semitones", 4.0, "training scenes are played faster or slower by up to this")
    flag(group, "--workers", 2, "processes that render")
    group = parser.add_argument_group("network and optimizer")
    flag(group, "--seed", 0, "initial weights, batches and augmentation")
    flag(group, "--width", 192, "a multiple of 12")
    flag(group, "--layers", 4, "residual convolutions at 64 ms")
    flag(group, "--steps", 2200, "optimizer steps")
    flag(group, "--batch_size", 32, "scenes per step")
    flag(group, "--learning_rate", 3e-3, "peak of AdamW's rate; warm-up, then cosine to zero")
    flag(group, "--weight_decay", 0.05, "of AdamW")
    args = parse_arguments(parser)
    limits = {"scenes": (1, 1e6), "val_scenes": (1, 1e6), "workers": (1, 256), "layers": (1, 48), "steps": (1, 1e7),
              "batch_size": (2, 4096), "learning_rate": (1e-8, 1), "weight_decay": (0, 1), "degraded": (0, 1),
              "semitones": (0, 12), "max_minutes": (0, 1e6), "seed": (0, 2 ** 62), "width": (12, 1536)}
    for name, (low, high) in limits.items():
        if getattr(args, name) is not None:
            in_range(f"--{name}", getattr(args, name), low, high)
    if args.width % 12:
        raise UserError(f"--width {args.width} is no multiple of 12")
    return args


if __name__ == "__main__":
    run_main(main)
