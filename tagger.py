"""The world's ear: a small network that hears which events sound, when, and how often.

    python tagger.py                                     # how well the bundled judge hears held-out scenes
    python tagger.py --which features --split val        # the other tagger
    python train_tagger.py --out runs/tagger             # trains a new one

The judge is the ground truth of every table: it is never an input, a filter or a loss of anything that generates.
The second tagger (another seed, width and other scenes) gives embeddings and posteriors for Frechet and KL
distances, and a cross-check of the judge. A third one has a single "event", quality: its presence probability is its
estimate of how little a clip was spoilt (votes.true_quality). It too judges only (train_quality.py trains it).

Log-mel -> three 2D convolutions -> residual 1D convolutions at 32 ms, then 64 ms. Three read-outs: activity of each
event per 64 ms frame, presence in the clip (attention over frames), and for countable events a rate of strikes per
32 ms frame, whose peaks are counted. Readings (who sounded, from when to when, how often) are pure functions of
these arrays.

Letters: B batch, F mel frames (16 ms), T tagger frames (64 ms; 2T strike frames of 32 ms), K events, Q countable
events, W width.
"""
import argparse
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as functional
from tqdm import tqdm

from common import (UserError, choose_device, in_range, load_exactly, load_tensors, parse_arguments, run_main,
                    save_tensors)
from vocoder import MEL_16K, LogMel

MEL_PER_FRAME = 4                       # mel frames per tagger frame
FRAME_SECONDS = MEL_PER_FRAME * MEL_16K["hop_size"] / MEL_16K["sampling_rate"]
MEL_FLOOR = -5.0                        # log10 of the mel clamp: silence
FILES = {"judge": "tagger.safetensors", "features": "tagger_features.safetensors",
         "quality": "tagger_quality.safetensors"}


# ----------------------------------------------------------------------------- the network

class Residual(nn.Module):
    """x + ReLU(BatchNorm(convolution over time)), (B, W, T) -> (B, W, T)."""

    def __init__(self, width, kernel, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return x + functional.relu(self.norm(self.conv(x)))


class Tagger(nn.Module):
    """Log-mels (B, 80, F) -> activity and presence logits, strike rate; see forward.

    `events` are the K names it knows, `countable` the Q of them whose strikes it counts, `thresholds` (K,) the
    presence probability from which an event counts as heard, `strike_threshold` see strike_times. No dropout:
    explicit generators decide all.
    """

    def __init__(self, events, countable, width=192, layers=4, thresholds=None, strike_threshold=0.4):
        super().__init__()
        self.events, self.countable, self.width, self.layers = list(events), list(countable), width, layers
        self.thresholds = list(thresholds) if thresholds is not None else [0.5] * len(self.events)
        self.strike_threshold = strike_threshold
        self.log_mel = LogMel(**MEL_16K)
        low, middle, high = width // 12, width // 4, width // 3  # 80 bands are halved thrice: harmonics stay apart
        self.stem = nn.Sequential(
            nn.Conv2d(1, low, 5, stride=(2, 2), padding=2), nn.BatchNorm2d(low), nn.ReLU(),
            nn.Conv2d(low, middle, 3, stride=(2, 1), padding=1), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, high, (3, 1), stride=(2, 1), padding=(1, 0)), nn.BatchNorm2d(high), nn.ReLU())
        self.bands = nn.Sequential(nn.Conv1d(10 * high, width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.fine = Residual(width, 5)
        self.coarse = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(width, 3, 2 ** (i % 3)) for i in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.activity = nn.Linear(width, len(self.events))
        self.attention = nn.Linear(width, len(self.events))
        self.evidence = nn.Linear(width, len(self.events))
        self.strike_hidden = nn.Linear(2 * width, width // 2)
        self.strikes = nn.Linear(width // 2, max(1, len(self.countable)))   # a quality judge counts nothing
        nn.init.constant_(self.activity.bias, -3.0)             # events are rare, strikes rarer: start there
        nn.init.constant_(self.strikes.bias, -3.0)

    def frames(self, mel):
        """(B, 80, F) log10 mel -> fine (B, 2T, W) and hidden (B, T, W); silence is added to fill the last frame."""
        mel = functional.pad(mel, (0, -mel.shape[-1] % MEL_PER_FRAME), value=MEL_FLOOR)
        x = self.stem((mel[:, None] + 2.5) / 1.5)               # (B, W/3, 10, 2T)
        fine = self.fine(self.bands(x.flatten(1, 2)))           # (B, W, 2T)
        x = self.blocks(self.coarse(fine))                      # (B, W, T)
        return fine.transpose(1, 2), self.norm(x.transpose(1, 2))

    def forward(self, mel):
        """(B, 80, F) -> activity logits (B, T, K), presence logits (B, K), strikes per 32 ms (B, 2T, Q) >= 0."""
        fine, hidden = self.frames(mel)
        weights = self.attention(hidden).float().softmax(1)     # (B, T, K): where to listen for each event
        presence = (weights * self.evidence(hidden)).sum(1)     # (B, K)
        context = hidden.repeat_interleave(2, dim=1)            # (B, 2T, W)
        rate = self.strikes(functional.relu(self.strike_hidden(torch.cat([fine, context], -1))))
        return self.activity(hidden).float(), presence.float(), functional.softplus(rate.float())

    @torch.no_grad()
    def clip_probabilities(self, mel):
        """(B, 80, F) -> presence probabilities (B, K) on the CPU."""
        return self(mel)[1].sigmoid().cpu()

    def config(self):
        """Everything but the weights, as stored in the header of the safetensors file."""
        return {"events": self.events, "countable": self.countable, "width": self.width, "layers": self.layers,
                "thresholds": [round(float(value), 4) for value in self.thresholds],
                "strike_threshold": round(float(self.strike_threshold), 4)}


def save_tagger(path, tagger, dtype=torch.float16):
    """Write one self-contained .safetensors file: weights, and the config (names, thresholds) in its header."""
    tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
               for name, tensor in tagger.state_dict().items()}
    save_tensors(path, tensors, {"tagger": json.dumps(tagger.config())})


def load_tagger(source, which="judge", device="cpu"):
    """A Tagger in eval mode from a file, or from a folder that holds it (`which`: a name of FILES)."""
    from safetensors import safe_open
    path = Path(source)
    path = path / FILES[which] if path.suffix != ".safetensors" else path
    tensors = load_tensors(path)
    with safe_open(path, "pt") as file:
        config = json.loads((file.metadata() or {}).get("tagger", "null"))
    if config is None:
        raise UserError(f"{path} is no tagger: its header has no config; write one with python train_tagger.py")
    try:
        tagger = Tagger(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its header does not describe a tagger ({error}); train it again") from None
    load_exactly(tagger, tensors, str(path))
    return tagger.to(device).eval()


# ----------------------------------------------------------------------------- reading: functions of arrays

@dataclass
class Heard:
    """One event in a reading: seconds from the start of the clip; number of strikes (None: not countable)."""
    onset: float
    offset: float
    probability: float
    count: int | None


@dataclass
class Reading:
    """What a tagger hears in one clip: name -> Heard, in order of onset."""
    events: dict

    def names(self):
        return set(self.events)


def interval(activity, frame_seconds=FRAME_SECONDS):
    """Activity (T,) of one event -> (onset, offset), seconds: where its 3-frame mean is above half its peak."""
    padded = np.pad(np.asarray(activity, dtype=np.float64), 1, mode="edge")
    smooth = (padded[:-2] + padded[1:-1] + padded[2:]) / 3
    loud = np.flatnonzero(smooth >= 0.5 * smooth.max())
    return float(loud[0] * frame_seconds), float((loud[-1] + 1) * frame_seconds)


def strike_times(rate, threshold, frame_seconds=FRAME_SECONDS / 2):
    """Strikes per frame (2T,) of one event -> seconds of its strikes.

    A strike is a peak of the 1-2-1 average, the highest within two frames (64 ms) each way, that gathers at least
    `threshold` strikes with its two neighbours: what is missing to 1 is doubt, not half a strike.
    """
    padded = np.pad(np.asarray(rate, dtype=np.float64), 3)
    smooth = padded[:-2] / 4 + padded[1:-1] / 2 + padded[2:] / 4
    gathered = padded[2:-4] + padded[3:-3] + padded[4:-2]
    earlier = np.maximum(smooth[:-4], smooth[1:-3])
    later = np.maximum(smooth[3:-1], smooth[4:])
    peak = (smooth[2:-2] > earlier) & (smooth[2:-2] >= later) & (gathered >= threshold)
    return np.flatnonzero(peak) * frame_seconds


def read_scene(activity, presence, rate, events, countable, thresholds, strike_threshold=0.4):
    """Arrays of one clip -> Reading.

    activity (T, K) and presence (K,) are probabilities, rate (2T, Q) strikes per half frame. A countable event that
    is heard was struck at least once.
    """
    heard = {}
    for k, name in enumerate(events):
        if presence[k] >= thresholds[k]:
            count = None
            if name in countable:
                count = max(1, len(strike_times(rate[:, countable.index(name)], strike_threshold)))
            heard[name] = Heard(*interval(activity[:, k]), float(presence[k]), count)
    return Reading(dict(sorted(heard.items(), key=lambda item: (item[1].onset, item[1].offset))))


def overlap(a, b):
    """Seconds that two Heard events share, over the length of the shorter: 0 apart, 1 one inside the other."""
    shared = min(a.offset, b.offset) - max(a.onset, b.onset)
    return max(0.0, shared) / max(1e-6, min(a.offset - a.onset, b.offset - b.onset))


def before(a, b, margin=0.1):
    """Is Heard `a` followed by Heard `b`: it starts over `margin` seconds earlier, and they share at most half?"""
    return a.onset < b.onset - margin and overlap(a, b) <= 0.5


def together(a, b):
    """Do two Heard events sound at the same time: do they share over half of the shorter?"""
    return overlap(a, b) > 0.5


# ----------------------------------------------------------------------------- hearing audio

def _log_mels(tagger, audio, batch_size):
    """Log-mels of audio (N, samples) float, batch by batch, on the tagger's device."""
    audio = torch.as_tensor(audio, dtype=torch.float32)
    if audio.ndim != 2:
        raise ValueError(f"audio is {tuple(audio.shape)}, expected (N, samples)")
    for part in audio.split(batch_size):
        yield tagger.log_mel(part.to(tagger.norm.weight.device))


@torch.no_grad()
def listen(tagger, audio, batch_size=64):
    """Audio (N, samples) at 16 kHz -> numpy activity (N, T, K), presence (N, K), strike rate (N, 2T, Q)."""
    heard = [(activity.sigmoid(), presence.sigmoid(), rate)
             for activity, presence, rate in map(tagger, _log_mels(tagger, audio, batch_size))]
    return tuple(torch.cat(parts).cpu().numpy() for parts in zip(*heard))


def hear(tagger, audio, batch_size=64):
    """Audio (N, samples) at 16 kHz -> list of N Readings."""
    return [read_scene(*arrays, tagger.events, tagger.countable, tagger.thresholds, tagger.strike_threshold)
            for arrays in zip(*listen(tagger, audio, batch_size))]


@torch.no_grad()
def features(tagger, audio, batch_size=64):
    """Audio (N, samples) -> (N, W): the mean over frames of the last hidden layer, for Frechet distances."""
    return torch.cat([tagger.frames(mel)[1].mean(1).cpu() for mel in _log_mels(tagger, audio, batch_size)])


def posteriors(tagger, audio, batch_size=64):
    """Audio (N, samples) -> presence probabilities (N, K), for KL divergences and the inception score."""
    return torch.cat([tagger.clip_probabilities(mel) for mel in _log_mels(tagger, audio, batch_size)])


def quality(tagger, audio, batch_size=64):
    """Audio (N, samples) -> (N,) estimated quality in [0, 1]; `tagger` is the quality judge. UserError if it isn't."""
    if tagger.events != ["quality"]:
        raise UserError("this tagger hears events, not quality; pass the folder of a tagger_quality.safetensors")
    return posteriors(tagger, audio, batch_size)[:, 0]


# ----------------------------------------------------------------------------- report

def report(args):
    """Held-out scenes, clean and degraded: scores, F1 per event, and the most frequent confusions."""
    import metrics
    from world import World
    tagger = load_tagger(args.tagger, args.which, choose_device(args.device))
    for label, degraded in (("clean", 0.0), ("degraded", 1.0)):
        world, readings, scenes = World(args.split, seed=args.seed, pairs="all", degraded=degraded), [], []
        for start in tqdm(range(0, args.scenes, 50), desc=label, unit="batch"):
            audio, truth = zip(*(world.render(i) for i in range(start, min(start + 50, args.scenes))))
            readings += hear(tagger, np.stack(audio))
            scenes += truth
        scores = metrics.scores(metrics.tally_all(readings, scenes))
        print(f"{args.split} {label}, {args.scenes} scenes: " + "  ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        table, confusions = {name: np.zeros(3, dtype=int) for name in tagger.events}, Counter()
        for reading, scene in zip(readings, scenes):
            true, heard = {event.name for event in scene.events}, reading.names()
            for name in true | heard:                           # columns: hits, extras, misses
                table[name] += (name in true & heard, name not in true, name not in heard)
            confusions.update((missed, extra) for missed in true - heard for extra in heard - true or {"nothing"})
        for name, (hits, extras, misses) in table.items():
            f1 = 2 * hits / max(1, 2 * hits + extras + misses)
            print(f"  {name:16s} F1 {f1:.3f}   hits {hits:4d}   extras {extras:4d}   misses {misses:4d}")
        for (missed, extra), times in confusions.most_common(12):
            print(f"  {missed} heard as {extra}: {times}")
    print("nothing was written; next: python evaluate.py scenes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("which ear")
    what.add_argument("--tagger", default="checkpoints/toy/base", help="file or folder (default: %(default)s)")
    what.add_argument("--which", choices=("judge", "features"), default="judge",
                      help="tagger of the folder (default: %(default)s)")
    what.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    scenes = parser.add_argument_group("what it hears")
    scenes.add_argument("--split", choices=("train", "val", "test"), default="test",
                        help="whose recorded clips (default: %(default)s)")
    scenes.add_argument("--scenes", type=int, default=500, help="so many clean and degraded (default: %(default)s)")
    scenes.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    args = parse_arguments(parser)
    in_range("--scenes", args.scenes, 1, 10 ** 6)
    in_range("--seed", args.seed, 0, 2 ** 62)
    report(args)


if __name__ == "__main__":
    run_main(main)
