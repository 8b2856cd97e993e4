"""The world's ears: small networks that hear which events sound, when, how often; their scores.

    tagger = load_tagger(BASE)                          # python -m world.train_ears trains another
    scores(tally_all(hear(tagger, clips), scenes))      # clips (N, 65536) of N Scenes

The judge is the truth of every table: never an input, a filter or a loss of what generates. The
features tagger (other seed, width, scenes) serves Frechet and KL distances, and as a cross-check.
The quality judge has one "event": its presence is how little a clip was spoilt (world.votes).
B batch, F mel frames (16 ms), T tagger frames (64 ms; 2T strike frames of 32 ms), N clips,
K events, Q countable events, W width.
"""
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn
from torch.nn.functional import pad, relu, softplus

from lib.common import UserError, reading, warn
from lib.mel import MEL_16K, LogMel
from lib.weights import load_weights, open_safetensors, read_header, save_module
from world.sounds import EVENT_NAMES

MEL_PER_FRAME = 4   # mel frames per tagger frame
FRAME_SECONDS = 0.064
MEL_FLOOR = -5.0    # log10 of the mel clamp: silence
FILES = {"judge": "tagger.safetensors", "features": "tagger_features.safetensors",
         "quality": "tagger_quality.safetensors"}
CONFIG = "events countable width layers thresholds strike_threshold".split()
COLUMNS = "hits extras misses ordered order_right counted counts_right exact clips".split()


# ----------------------------------------------------------------------------- the network

class Residual(nn.Module):
    """x + ReLU(BatchNorm(convolution over time)), (B, W, T) -> (B, W, T)."""

    def __init__(self, width, kernel, dilation=1):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, 1, "same", dilation, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return x + relu(self.norm(self.conv(x)))


def halve_bands(inputs, outputs, bands, frames, stride):
    """Layers (B, inputs, bands, F) -> (B, outputs, bands / 2, F / stride)."""
    padding = (bands // 2, frames // 2)
    conv = nn.Conv2d(inputs, outputs, (bands, frames), (2, stride), padding)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU()


class Tagger(nn.Module):
    """Knows K `events` and counts the strikes of Q `countable` ones. No dropout: no hidden draws.
    thresholds (K,): presence from which an event is heard; strike_threshold: see strike_times."""

    def __init__(self, events, countable, width=192, layers=4, thresholds=None,
                 strike_threshold=0.4):
        super().__init__()
        self.events, self.countable = list(events), list(countable)
        self.width, self.layers = width, layers
        self.thresholds = thresholds or [0.5] * len(events)
        self.strike_threshold = strike_threshold
        self.log_mel = LogMel(**MEL_16K)
        self.stem = nn.Sequential(  # 80 bands are halved thrice: harmonics stay apart
            *halve_bands(1, width // 12, 5, 5, 2),
            *halve_bands(width // 12, width // 4, 3, 3, 1),
            *halve_bands(width // 4, width // 3, 3, 1, 1))
        self.bands = nn.Sequential(
            nn.Conv1d(10 * (width // 3), width, 1), nn.BatchNorm1d(width), nn.ReLU())
        self.fine = Residual(width, 5)
        self.coarse = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(width, 3, 2 ** (i % 3)) for i in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.activity = nn.Linear(width, len(events))
        self.attention = nn.Linear(width, len(events))
        self.evidence = nn.Linear(width, len(events))
        self.strike_hidden = nn.Linear(2 * width, width // 2)
        self.strikes = nn.Linear(width // 2, max(1, len(countable)))  # quality counts nothing
        nn.init.constant_(self.activity.bias, -3.0)  # events are rare, strikes rarer
        nn.init.constant_(self.strikes.bias, -3.0)

    def frames(self, mel):
        """(B, 80, F) log10 mel -> fine (B, 2T, W), hidden (B, T, W), the last frame filled up."""
        mel = pad(mel, (0, -mel.shape[-1] % MEL_PER_FRAME), value=MEL_FLOOR)
        x = self.stem((mel[:, None] + 2.5) / 1.5)               # (B, W/3, 10, 2T)
        x = self.bands(x.flatten(1, 2))                         # (B, W, 2T)
        fine = self.fine(x)                                     # (B, W, 2T)
        x = self.blocks(self.coarse(fine))                      # (B, W, T)
        return fine.mT, self.norm(x.mT)

    def forward(self, mel):
        """(B, 80, F) -> logits of activity (B, T, K) and presence (B, K), strikes (B, 2T, Q)."""
        fine, hidden = self.frames(mel)
        weights = self.attention(hidden).float().softmax(1)     # (B, T, K): where to listen
        presence = (weights * self.evidence(hidden)).sum(1)     # (B, K)
        context = hidden.repeat_interleave(2, dim=1)            # (B, 2T, W)
        both = torch.cat([fine, context], -1)                   # (B, 2T, 2W)
        strikes = self.strikes(relu(self.strike_hidden(both)))  # (B, 2T, Q)
        return self.activity(hidden).float(), presence.float(), softplus(strikes.float())


def save_tagger(path, tagger):
    """Write one self-contained .safetensors file: float16 weights, the config in its header."""
    config = {name: getattr(tagger, name) for name in CONFIG}
    save_module(path, tagger, torch.float16, {"tagger": json.dumps(config)})


def load_tagger(source, which="judge", device="cpu"):
    """A Tagger in eval mode from a file, or the one called `which` in a folder."""
    path = Path(source)
    if path.is_dir():
        path /= FILES[which]
    weights = open_safetensors(path)
    config = read_header(path, "tagger")
    with reading(path, "train it again with python -m world.train_ears"):
        tagger = Tagger(**config)
    load_weights(tagger, weights)
    unheard = [name for name in EVENT_NAMES if name not in tagger.events]
    if unheard and tagger.events != ["quality"]:
        warn(f"{path} cannot hear {', '.join(unheard)}; python -m world.train_ears trains another")
    return tagger.to(device).eval()


# ----------------------------------------------------------------------------- hearing

class Heard(NamedTuple):
    """One event that a tagger hears in a clip; a reading of a clip is {name: Heard}."""
    onset: float        # seconds from the start of the clip
    offset: float
    count: int = None   # strikes, where they can be counted


def interval(activity):
    """Activity (T,) of an event -> seconds (onset, offset): a 3-frame mean above half its peak."""
    padded = np.pad(activity.astype(float), 1, mode="edge")
    smooth = sliding_window_view(padded, 3).mean(1)
    loud = np.flatnonzero(smooth >= 0.5 * smooth.max()).tolist()
    return loud[0] * FRAME_SECONDS, (loud[-1] + 1) * FRAME_SECONDS


def strike_times(rate, threshold):
    """Strikes per frame (2T,) of one event -> seconds of its strikes.
    A strike: the first peak of the 1-2-1 average within two frames (64 ms) each way that gathers
    `threshold` with its neighbours. A sum below 1 is uncertainty, not a fraction of a strike."""
    around = sliding_window_view(np.pad(rate.astype(float), 3), 3)  # (2T + 4, 3)
    smooth = (around * [0.25, 0.5, 0.25]).sum(1)
    peak = sliding_window_view(smooth, 5).argmax(1) == 2            # (2T,)
    gathered = around[2:-2].sum(1)
    return np.flatnonzero(peak & (gathered >= threshold)) * (FRAME_SECONDS / 2)


def read_scene(tagger, activity, presence, rate):
    """Activity (T, K), presence (K,), strikes (2T, Q) of a clip -> {name: Heard} by onset."""
    heard = {}
    for k, name in enumerate(tagger.events):
        if presence[k] >= tagger.thresholds[k]:
            count = None
            if name in tagger.countable:
                struck = rate[:, tagger.countable.index(name)]
                count = max(1, len(strike_times(struck, tagger.strike_threshold)))
            heard[name] = Heard(*interval(activity[:, k]), count)
    return dict(sorted(heard.items(), key=lambda item: item[1][:2]))


def log_mels(tagger, audio):
    """Batches of log-mels of audio (N, samples), or those given (N, 80, F), on its device."""
    for part in torch.as_tensor(audio, dtype=torch.float32).split(64):
        part = part.to(tagger.norm.weight.device)
        yield tagger.log_mel(part) if part.ndim == 2 else part


@torch.no_grad()
def probabilities(tagger, audio):
    """Audio or log-mels -> activity (N, T, K), presence (N, K), strikes (N, 2T, Q) on the CPU."""
    outputs = map(tagger, log_mels(tagger, audio))
    activity, presence, rate = map(torch.cat, zip(*outputs))
    return activity.sigmoid().cpu(), presence.sigmoid().cpu(), rate.cpu()


def hear(tagger, audio):
    """Audio (N, samples) at 16 kHz -> N readings {name: Heard}."""
    arrays = [part.numpy() for part in probabilities(tagger, audio)]
    return [read_scene(tagger, *clip) for clip in zip(*arrays)]


@torch.no_grad()
def features(tagger, audio):
    """Audio (N, samples) -> (N, W): mean of the last hidden layer, for Frechet distances."""
    hidden = [tagger.frames(mel)[1].mean(1) for mel in log_mels(tagger, audio)]
    return torch.cat(hidden).cpu()


def quality(tagger, audio):
    """Audio (N, samples) -> quality (N,) in [0, 1]. UserError if the tagger is not that judge."""
    if tagger.events != ["quality"]:
        raise UserError("this tagger hears events; pass the folder of a tagger_quality.safetensors")
    return probabilities(tagger, audio)[1][:, 0]


# ----------------------------------------------------------------------------- against the truth

def related(a, b, relation):
    """Do two Heard events share over half of the shorter; if "then": not, and `a` is earlier?"""
    shared = min(a.offset, b.offset) - max(a.onset, b.onset)
    shorter = min(a.offset - a.onset, b.offset - b.onset)
    together = shared / shorter > 0.5
    if relation == "then":
        return not together and a.onset < b.onset - 0.1
    return together


def tally(heard, scene):
    """A reading and its Scene -> a row of COLUMNS that may be summed over clips; see `scores`."""
    asked = dict(scene.asked)
    found = [heard[name] for name in asked if name in heard]
    misses = len(asked) - len(found)
    extras = len(heard) - len(found)
    related_right = all(related(*pair, scene.relation) for pair in pairwise(found))
    fits = misses == 0 and related_right
    counted = [name for name in asked if asked[name]]
    right = [name for name in counted if name in heard and heard[name].count == asked[name]]
    ordered = scene.relation == "then"
    exact = fits and extras == 0 and right == counted
    return (len(found), extras, misses, ordered, ordered and fits, len(counted), len(right),
            exact, 1)


def tally_all(readings, scenes):
    """Rows (N, len(COLUMNS)) of paired readings and Scenes, int64."""
    pairs = zip(readings, scenes, strict=True)
    return np.array([tally(*pair) for pair in pairs], dtype=np.int64)


def scores(rows):
    """Tally rows (..., N, columns) -> {"f1", "precision", "recall", "order", "count", "exact"}.
    Each of shape (...), NaN where nothing was asked. order: right share of the ordered prompts;
    count: of the counted events; exact: of the clips, no event missing, extra or miscounted."""
    total = np.moveaxis(np.sum(rows, -2, dtype=float), -1, 0)
    hits, extras, misses, ordered, order_right, counted, counts_right, exact, clips = total
    with np.errstate(invalid="ignore"):
        return dict(f1=2 * hits / (2 * hits + extras + misses),
                    precision=hits / (hits + extras),
                    recall=hits / (hits + misses),
                    order=order_right / ordered,
                    count=counts_right / counted,
                    exact=exact / clips)


def spearman(a, b):
    """Rank correlation of two (N,) arrays, equal values sharing a rank; NaN if one is constant."""
    ranks = []
    for values in (a, b):
        ordered = np.sort(values)
        ranks.append(np.searchsorted(ordered, values) + np.searchsorted(ordered, values, "right"))
    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])


def band_statistics(mel, samples):
    """A log10 mel (80, F) over its sounding samples -> (720,): a band's quantiles, changes, dips.
    In decades below the clip's peak, at most 4 (80 dB)."""
    mel = mel[:, :max(9, math.ceil(samples / MEL_16K["hop_size"]))]
    mel = (mel - mel.max()).clamp(min=-4)
    change = mel.diff(dim=1).abs()
    around = pad(mel[None], (4, 4), mode="replicate")[0].unfold(1, 9, 1)              # (80, F, 9)
    beside = torch.minimum(around[..., :4].amax(-1), around[..., 5:].amax(-1))
    dip = (beside - mel).clamp(min=0)        # a gap
    quantiles = torch.quantile(mel, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=1)
    return torch.cat([*quantiles, change.mean(1), (change > 0.75).float().mean(1),
                      dip.mean(1), (dip > 1).float().mean(1)])
