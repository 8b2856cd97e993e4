"""Training of the world's ears: the judge, the features tagger and the quality judge.

    python -m world.train_ears                      # the judge -> runs/tagger/tagger.safetensors
    python -m world.train_ears --which features     # for embeddings -> runs/tagger_features
    python -m world.train_ears --which quality      # how little a clip is spoilt -> runs/quality

judge and features hear events in clips that a codec or a generator made: their scenes are played at
other speeds (a handful of clips holds few pitches), their batches augmented. quality hears
votes.true_quality: half of its clips went through the codec, a fifth hum, which it must overlook.
B batch, M mel bands, F mel frames (16 ms), T tagger frames (64 ms; 2T strike frames of 32 ms),
K events, Q countable events, N scenes or clips.
"""
import math
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits as entropy
from torch.utils.data import default_collate
from tqdm import trange

from lib.common import (BASE, DEVICE, DTYPE, UserError, append_jsonl, autocast_for, choose_device,
                        derive_seed, flag, generator, locked, parse_flags, pick, run_main,
                        stop_on_signal)
from lib.mel import MEL_16K, LogMel
from lib.weights import (learning_rate, load_state, make_optimizer, module_hash, save_state,
                         set_rate, trim_log)
from vae import load_codec
from world.ears import (FILES, FRAME_SECONDS, MEL_FLOOR, Tagger, probabilities, save_tagger,
                        spearman, strike_times)
from world.scenes import World, in_workers
from world.sounds import COUNTABLE, EVENT_NAMES
from world.votes import WORKERS, coded, render_takes

FLAGS = {"where": [
    flag("--which", "judge", "ear to train", choices=["judge", "features", "quality"]),
    flag("--out", "runs/tagger", "run folder; a run found there is resumed"),
    flag("--codec", str(BASE), "folder with the codec (quality)"),
    WORKERS, DTYPE, DEVICE], "training": [
    flag("--seed", 0, "seed of scenes, weights, batches and augmentation", 0, 1e15),
    flag("--scenes", 14000, "training scenes, kept as log-mels", 1, 1e6),
    flag("--val_scenes", 1500, "held-out scenes, for thresholds or report", 1, 1e6),
    flag("--width", 192, "width of the network, a multiple of 12", 12, 1536),
    flag("--layers", 4, "residual convolutions at 64 ms", 1, 48),
    flag("--train_steps", 2200, "optimizer steps", 1, 1e7, alias="--steps"),
    flag("--batch_size", 32, "clips in a step", 2, 4096),
    flag("--learning_rate", 3e-3, "peak of AdamW's rate", 1e-8, 1)]}
DEFAULTS = {"judge": {}, "features": {"seed": 1, "width": 168, "out": "runs/tagger_features"},
            "quality": {"scenes": 5000, "val_scenes": 400, "width": 96, "layers": 3,
                        "train_steps": 3000, "out": "runs/quality"}}
HARDER = {"relations": (0.1, 0.4, 0.28, 0.22), "counted": 0.5}  # what is learned slowest
Training = namedtuple("Training", "seed train_steps batch_size learning_rate which scenes width "
                      "layers dtype codec", defaults=[None] * 6)
EVERY = 200     # steps between two rows of log.jsonl, two states
END = 4.096     # seconds of a clip


def targets(scene, factor=1.0):
    """Truth of a Scene played `factor` times faster -> activity (T, K), strike rate (2T, Q).
    A strike is one unit, shared between the two frames nearest to it: the rate sums to the count.
    What begins at the very end of the clip is left out."""
    starts = np.arange(64) * FRAME_SECONDS
    activity = np.zeros((64, len(EVENT_NAMES)), np.float16)
    rate = np.zeros((128, len(COUNTABLE)), np.float16)
    for event in scene.events:
        onset, offset = event.onset / factor, event.offset / factor
        strikes = np.array(event.strikes) / factor
        strikes = strikes[strikes < END - 0.03]
        if onset >= END - 0.15 or event.strikes and not len(strikes):
            continue
        covered = np.minimum(offset, starts + FRAME_SECONDS) - np.maximum(onset, starts)
        activity[:, EVENT_NAMES.index(event.name)] = covered.clip(min=0) / FRAME_SECONDS
        if event.strikes:
            places = (strikes / FRAME_SECONDS * 2 - 0.5).clip(0, 127)
            distances = abs(np.arange(128)[:, None] - places)  # (2T, strikes)
            shares = (1 - distances).clip(min=0)
            rate[:, COUNTABLE.index(event.name)] = shares.sum(1)
    return activity, rate


def render_scene(settings, semitones, index):
    """A scene, up to `semitones` faster or slower -> log-mel (M, F) float16, its targets."""
    audio, scene = World(**settings).render(index)
    rng = np.random.default_rng(derive_seed("speed", settings["seed"], index))
    factor = 2 ** (rng.uniform(-semitones, semitones) / 12)
    places = np.arange(len(audio))
    audio = np.interp(places * factor, places, audio, right=0.0).astype(np.float32)
    mel = LogMel(**MEL_16K)(torch.from_numpy(audio)[None])[0]
    return mel.half().numpy(), *targets(scene, factor)


def render_scenes(settings, count, workers, semitones=0.0):
    """Scenes 0..count-1 -> mel (N, M, F), activity (N, T, K), strike rate (N, 2T, Q)."""
    render = partial(render_scene, settings, semitones)
    return default_collate(list(in_workers(render, range(count), workers, "rendering", "scene")))


def rated_clips(codec, seed, workers, split, scenes, share):
    """Two takes of each scene, a `share` through the codec -> mel (N, M, F), quality (N,)."""
    world = {"split": split, "seed": 7000 + seed, "pairs": "all"}
    log_mel = LogMel(**MEL_16K)
    mels, qualities = [], []
    for audio, rows in render_takes(world, range(scenes), 2, 0.2, workers):
        audio = coded(codec, audio, rows, share, seed)
        for clip, row in zip(audio, rows):
            clip[int(row["duration"] * 16000):] = 0  # as generated clips are cut
            qualities.append(row["quality"])
        mels.append(log_mel(torch.from_numpy(audio)).half())
    return torch.cat(mels), torch.tensor(qualities)


def moved(part, steps, silence):
    """(B, F, ...) moved along F by `steps` (B,); in comes `silence`, or the edge if None."""
    rows = torch.arange(len(part))[:, None]                 # (B, 1)
    places = torch.arange(part.shape[1]) - steps[:, None]   # (B, F)
    part = part[rows, places.clamp(0, part.shape[1] - 1)]
    if silence is not None:
        part[places < 0] = silence
    return part


def augment(mel, activity, rate, random, mel_per_frame=4):
    """A batch as other recordings and machines would leave it; `random` is its torch.Generator.
    mel (B, M, F), activity (B, T, K), rate (B, 2T, Q): moved in time by up to 0.4 s, in pitch by up
    to two bands; gain, tilt and a bend of the spectrum; masked bands; blur; noise of up to 2 dB."""
    batch, bands, _ = mel.shape

    def draw(low, high):                                            # (B, 1, 1)
        return low + (high - low) * torch.rand(batch, 1, 1, generator=random)

    shifts = torch.randint(-3, 7, (batch,), generator=random).clamp(min=0)
    pitches = torch.randint(-2, 3, (batch,), generator=random)
    mel = moved(mel.mT, shifts * mel_per_frame, MEL_FLOOR).mT
    mel = moved(mel, pitches, None)
    axis = torch.linspace(-1, 1, bands)[:, None]                    # (M, 1)
    angle = math.pi * draw(1, 4) * axis
    bend = torch.cos(angle + draw(0, 2 * math.pi))                  # (B, M, 1)
    mel = mel + draw(-0.3, 0.3)
    mel = mel + draw(-0.3, 0.3) * axis
    mel = mel + draw(-0.15, 0.15) * bend
    start = torch.randint(0, bands, (batch, 1, 1), generator=random)
    size = torch.randint(-8, 9, (batch, 1, 1), generator=random)    # below 1: none
    places = torch.arange(bands)[:, None] - start                   # (B, M, 1)
    mel = mel.masked_fill(places % bands < size, MEL_FLOOR)
    for high, wide in ((3, 1), (1, 3), (1, 3)):
        padding = high // 2, wide // 2
        smooth = avg_pool2d(mel, (high, wide), 1, padding, count_include_pad=False)
        share = draw(-1, 1).clamp(min=0)        # none in half
        mel = mel + share * (smooth - mel)
    noise = torch.randn(mel.shape, generator=random)
    mel = mel + noise * draw(-0.1, 0.1).clamp(min=0)
    return mel.clamp(min=MEL_FLOOR), moved(activity, shifts, 0), moved(rate, shifts * 2, 0)


def strike_likelihood(heard, rate):
    """Poisson likelihood (negative, its logarithm) of strikes `rate` where `heard` is expected."""
    return heard - rate * heard.clamp(min=1e-6).log()


def tagger_loss(outputs, activity, rate, hits):
    """Cross-entropy of presence and activity, Poisson likelihood of strikes: {part: scalar}.
    outputs = Tagger(mel); activity (B, T, K), rate (B, 2T, Q), hits (B, Q). Strikes are learned
    where there are some: else doubt about presence thins them out."""
    activity_logits, presence_logits, heard = outputs
    present = (activity.amax(1) > 0).float()                        # (B, K)
    struck = (hits > 0).float()                                     # (B, Q)
    likelihood = strike_likelihood(heard, rate).sum(1) * struck     # (B, Q)
    return {"presence": entropy(presence_logits, present) * 20,
            "activity": entropy(activity_logits, activity) * 20,
            "strikes": likelihood.sum() / struck.sum().clamp(min=1) * 0.2}


def batch_indices(seed, step, scenes, batch_size):
    """The scenes of batch `step`: each epoch is a permutation; depends on (seed, step) alone."""
    per_epoch = max(1, scenes // batch_size)
    order = torch.randperm(scenes, generator=generator(seed, "epoch", step // per_epoch))
    return order[step % per_epoch * batch_size:][:batch_size]


def batch_loss(tagger, clips, training, autocast, step):
    """{"loss": scalar, parts} of batch `step` of clips: mel and quality, or as render_scenes."""
    rows = batch_indices(training.seed, step, len(clips[0]), training.batch_size)
    batch = [part[rows].float() for part in clips]
    if tagger.countable:
        hits = batch[2].sum(1)
        batch = [*augment(*batch, generator(training.seed, "augment", step)), hits]
    mel, *truth = [part.to(tagger.norm.weight.device) for part in batch]
    with autocast():
        outputs = tagger(mel)
    if tagger.countable:
        parts = tagger_loss(outputs, *truth)
        return {"loss": sum(parts.values()), **parts}
    return {"loss": entropy(outputs[1][:, 0], *truth)}


def fit(out, file, network, optimizer, training, loss_of, rate_of, largest_norm, check=dict):
    """The loop of the ears and the CLAPs: trains `network` in place; a killed run goes on exactly.
    file: its name in `out`, as the caller saves it.
    loss_of(step) -> {"loss": scalar, parts}; rate_of(step); check() -> {name: number} to log."""
    settings, steps = training._asdict(), training.train_steps
    start, _ = load_state(out, network.state_dict(), optimizer, {}, settings, file)
    trim_log(out, start)
    network.train()
    with stop_on_signal() as stopped:
        for step in trange(start, steps, desc="training", disable=None):
            # rate, forward, backward, clip
            set_rate(optimizer, rate_of(step))
            parts = loss_of(step)
            optimizer.zero_grad()
            parts["loss"].backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), largest_norm)
            if not (parts["loss"] + norm).isfinite():
                raise UserError(f"step {step}: the loss or its gradient is not finite; "
                                "give a lower --learning_rate and another --out")
            optimizer.step()

            # log, check, save
            done = step + 1
            if done == steps or done % EVERY == 0 or stopped:
                network.eval()
                row = {name: part.item() for name, part in parts.items()}
                append_jsonl(Path(out) / "log.jsonl", {"step": done, **row, **check()})
                save_state(out, network.state_dict(), optimizer, {}, done, settings, 0.0)
                network.train()
            if stopped:
                break
    network.eval()


def tagger_rate(training, step):
    """AdamW's rate: a short warm-up, times a cosine to zero."""
    peak = training.learning_rate * min(1, (step + 1) / 50)
    return learning_rate(step, peak, 0, training.train_steps, "cosine")


def middle_of_best(grid, values):
    """The middle of the plateau of the best value: its edge is an accident of these scenes."""
    best = grid[values >= values.max() - 1e-9]
    return round(float(np.median(best)), 4)


def best_thresholds(presence, truth):
    """Probabilities and truth (N, K) of held-out scenes -> each event's threshold of best F1."""
    grid = np.linspace(0.05, 0.95, 91)
    heard = presence >= grid[:, None, None]     # (levels, N, K)
    right = (truth & heard).sum(1)              # (levels, K)
    f1 = 2 * right / np.maximum(1, truth.sum(0) + heard.sum(1))
    return [middle_of_best(grid, column) for column in f1.T]


def best_strike_threshold(rate, hits):
    """Strike rates (N, 2T, Q), hits (N, Q) -> the threshold that counts most of hits > 0 right."""
    grid = np.linspace(0.15, 0.85, 29)
    right = np.zeros(len(grid))
    for i, q in np.argwhere(hits > 0):
        counts = [len(strike_times(rate[i, :, q], level)) for level in grid]
        right += np.equal(counts, hits[i, q])
    return middle_of_best(grid, right)


def main(argv=None):
    which = parse_flags(__doc__, FLAGS, argv).which
    args = parse_flags(__doc__, FLAGS, argv, DEFAULTS[which])
    file = Path(args.out) / FILES[which]
    device = choose_device(args.device)
    autocast = autocast_for(args.dtype, device)

    with locked(args.out):
        # clips, and who hears them
        training = pick(Training, args)._replace(codec=None)
        world = {"split": "train", "seed": 1000 + args.seed, "degraded": 0.3, "pairs": "all"}
        if which == "quality":
            codec = load_codec(args.codec, device)
            rated = partial(rated_clips, codec, args.seed, args.workers)
            clips = rated("train", args.scenes, 0.5)
            known = ["quality"], []
            training = training._replace(codec=module_hash(codec)[:16])
        else:
            clips = render_scenes({**world, **HARDER}, args.scenes, args.workers, 4.0)
            known = EVENT_NAMES, COUNTABLE
        torch.manual_seed(args.seed)  # the initial weights, nothing else
        tagger = Tagger(*known, args.width, args.layers).to(device)
        optimizer = make_optimizer(dict(tagger.named_parameters()), (0.9, 0.98), 0.05)

        # training
        loss_of = partial(batch_loss, tagger, clips, training, autocast)
        rate_of = partial(tagger_rate, training)
        fit(args.out, file.name, tagger, optimizer, training, loss_of, rate_of, 2.0)

        # what it is worth on held-out clips, or the thresholds that they fix
        if which == "quality":
            for share in (0.0, 1.0):
                mels, truth = rated("test", args.val_scenes, share)
                _, presence, _ = probabilities(tagger, mels)
                rank = spearman(presence[:, 0].numpy(), truth.numpy())
                print(f"rank correlation with the truth, {share:.0%} through the codec: {rank:.3f}")
        else:
            world["split"] = "val"
            mels, activity, strikes = render_scenes(world, args.val_scenes, args.workers)
            _, presence, rate = probabilities(tagger, mels)
            present = activity.amax(1) > 0
            hits = strikes.float().sum(1).round()
            tagger.thresholds = best_thresholds(presence.numpy(), present.numpy())
            tagger.strike_threshold = best_strike_threshold(rate.numpy(), hits.numpy())
        save_tagger(file, tagger)
    print(f"wrote {file}; next: python -m world.bundle --{file.stem} {args.out} --out MODEL_FOLDER")


if __name__ == "__main__":
    run_main(main)
