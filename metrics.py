"""Metrics: pure functions of what was heard, what was asked for, and arrays.

A reading (tagger.Reading) has `events`: {name: Heard(onset, offset, probability, count)}. A scene
(world.Scene) is the truth of a prompt. Letters: N clips, K samples of one prompt, F mel frames, D features.

    event F1               micro: hits, extras and misses are summed over all clips, then 2 TP / (2 TP + FP + FN)
    order accuracy         over all prompts that ask for an order; all events heard, each before the next;
                           a missing event is wrong
    count accuracy         over all events whose prompt counts them; a missing event is wrong
    exact-scene accuracy   all events heard and none besides, order or togetherness right, every asked count right
"""
import math

import numpy as np

from tagger import before, together

COLUMNS = ("hits", "extras", "misses", "ordered", "order_right", "counted", "counts_right", "exact", "clips")


def heard_events(reading, scene):
    """The Heard of each event of the scene in the prompt's order, or None if one is missing."""
    heard = [reading.events.get(event.name) for event in scene.events]
    return None if None in heard else heard


def relation_right(reading, scene):
    """Are all events heard, and one after the other, or together, as the prompt says?"""
    heard = heard_events(reading, scene)
    if heard is None:
        return False
    fits = before if scene.relation == "then" else together
    return all(fits(a, b) for a, b in zip(heard, heard[1:]))  # a single event has no pairs


def tally(reading, scene):
    """One clip as a row of integers (len(COLUMNS),) that may be summed over clips; see `scores`."""
    asked = {event.name: event.count for event in scene.events}
    hits = sum(name in reading.events for name in asked)
    extras = sum(name not in asked for name in reading.events)
    counts = {name: count for name, count in asked.items() if count is not None}
    counts_right = sum(name in reading.events and reading.events[name].count == count
                       for name, count in counts.items())
    exact = hits == len(asked) and not extras and counts_right == len(counts) and relation_right(reading, scene)
    ordered = scene.relation == "then"
    return np.array([hits, extras, len(asked) - hits, ordered, ordered and relation_right(reading, scene),
                     len(counts), counts_right, exact, 1], dtype=np.int64)


def tally_all(readings, scenes):
    """Rows (N, len(COLUMNS)) of paired readings and scenes."""
    return np.stack([tally(reading, scene) for reading, scene in zip(readings, scenes, strict=True)])


def scores(rows):
    """Tally rows (..., N, columns) -> {"f1", "precision", "recall", "order", "count", "exact"}.

    Each is of shape (...), a float for one set of rows; NaN where nothing was asked, such as order without
    ordered prompts.
    """
    total = dict(zip(COLUMNS, np.moveaxis(np.asarray(rows).sum(-2), -1, 0).astype(float)))
    with np.errstate(invalid="ignore", divide="ignore"):
        result = {"f1": 2 * total["hits"] / (2 * total["hits"] + total["extras"] + total["misses"]),
                  "precision": total["hits"] / (total["hits"] + total["extras"]),
                  "recall": total["hits"] / (total["hits"] + total["misses"]),
                  "order": total["order_right"] / total["ordered"],
                  "count": total["counts_right"] / total["counted"],
                  "exact": total["exact"] / total["clips"]}
    return {name: float(value) if np.ndim(value) == 0 else value for name, value in result.items()}


def bootstrap(rows, draws=1000, seed=0, level=0.95):
    """Confidence intervals {name: (low, high)} of `scores`, by resampling prompts.

    rows: (N, columns), or (N, K, columns) for K samples of each prompt: the samples of a prompt are drawn
    together, since they share its difficulty. A score that is undefined in a draw is left out of it.
    """
    rows = np.asarray(rows)
    rows = rows.sum(1) if rows.ndim == 3 else rows                                 # (N, columns)
    rng = np.random.default_rng(seed)
    drawn = scores(rows[rng.integers(len(rows), size=(draws, len(rows)))])          # each (draws,)
    kept = {name: values[~np.isnan(values)] for name, values in drawn.items()}
    tails = 100 * np.array([(1 - level) / 2, (1 + level) / 2])
    return {name: tuple(np.percentile(values if len(values) else np.nan, tails).tolist())
            for name, values in kept.items()}


def match(reading, scene):
    """How well one reading fits a scene, for picking the best of several: larger is better.

    Exact scenes are always above others, then the share of right parts counts, then how sure the tagger is of
    the wanted events.
    """
    row = dict(zip(COLUMNS, tally(reading, scene)))
    asked = [event.name for event in scene.events]
    sure = np.mean([reading.events[name].probability if name in reading.events else 0.0 for name in asked])
    f1 = 2 * row["hits"] / (2 * row["hits"] + row["extras"] + row["misses"])
    counts = row["counts_right"] / row["counted"] if row["counted"] else 1.0
    return float(10 * row["exact"] + f1 + 0.5 * relation_right(reading, scene) + 0.5 * counts + 0.1 * sure)


def derangement(number, seed):
    """A seeded permutation of range(number) that leaves nothing in its place (number >= 2): shuffled prompts."""
    order = np.random.default_rng(seed).permutation(number)
    partner = np.empty(number, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


# ----------------------------------------------------------------------------- sets of clips, and two models

def frechet_distance(a, b):
    """Frechet distance of two feature sets (N, D) and (M, D): |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    A and B are the covariances (N - 1 in the denominator); in float64, as stable-audio-metrics. tr (A B)^(1/2) is the
    sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no complex roots to drop.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    shift = a.mean(0) - b.mean(0)
    first, second = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))               # (D, D)
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    between = np.linalg.eigvalsh(root @ second @ root).clip(0)
    return float(shift @ shift + np.trace(first) + np.trace(second) - 2 * np.sqrt(between).sum())


def kl_divergence(generated, reference, smallest=1e-6):
    """KL(generated || reference) of paired class logits (N, K) -> (N,), softmax over classes (the paper's KL_passt).

    `smallest` is added to the reference within the logarithm only, as that tool does.
    """
    def softmax(logits):
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)
    p, q = softmax(np.asarray(generated, np.float64)), softmax(np.asarray(reference, np.float64))
    return (p * (np.log(p.clip(1e-300)) - np.log(q + smallest))).sum(-1)


def paired_bootstrap(statistic, first, second, draws=1000, seed=0, level=0.95):
    """Interval (low, high) of statistic(first) - statistic(second), by resampling the prompts of both alike.

    first, second: arrays, or tuples of arrays, with one row a prompt; statistic: a function of the resampled ones.
    Draws in which it is NaN are left out.
    """
    first, second = (x if isinstance(x, tuple) else (x,) for x in (first, second))
    rng, count = np.random.default_rng(seed), len(first[0])
    gains = []
    for _ in range(draws):
        rows = rng.integers(count, size=count)
        gains.append(statistic(*(x[rows] for x in first)) - statistic(*(x[rows] for x in second)))
    tails = 100 * np.array([(1 - level) / 2, (1 + level) / 2])
    return tuple(np.nanpercentile(np.array(gains, dtype=float), tails).tolist())


def paired_t(first, second):
    """Paired t-test of (N,) scores -> (mean difference first - second, t, one-sided p that it is above 0 by chance).

    The tail of Student's distribution is integrated numerically; without any difference p is 0.5.
    """
    difference = np.asarray(first, float) - np.asarray(second, float)
    count, spread = len(difference), difference.std(ddof=1)
    mean = float(difference.mean())
    if spread == 0:
        return mean, float(np.sign(mean)) * np.inf if mean else 0.0, 0.5 if mean == 0 else float(mean < 0)
    t, freedom = mean / (spread / math.sqrt(count)), count - 1
    angles = np.linspace(math.atan(abs(t) / math.sqrt(freedom)), math.pi / 2, 20001)   # t = sqrt(freedom) tan(angle)
    density = np.cos(angles) ** (freedom - 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    tail = scale * float(((density[1:] + density[:-1]) / 2 * np.diff(angles)).sum())
    return mean, float(t), tail if t > 0 else 1 - tail


# ----------------------------------------------------------------------------- audio measures

def sounding_length(audio, sampling_rate, threshold_db=-40.0, frame=0.02):
    """Seconds until the end of the last frame whose energy is above `threshold_db` of the loudest frame.

    audio: (N,) numpy; frames of `frame` seconds that do not overlap (paper A.8 measures with an
    energy-based silence detector; its threshold is not given). 0 for silence.
    """
    size = int(frame * sampling_rate)
    frames = audio[:len(audio) // size * size].reshape(-1, size).astype(np.float64)
    energy = (frames ** 2).mean(1)                                                 # (frames,)
    if not energy.max() > 0:
        return 0.0
    return float((np.flatnonzero(energy > energy.max() * 10 ** (threshold_db / 10))[-1] + 1) * frame)


def ranks(values):
    """Ranks 0..N-1 of (N,), equal values sharing the mean of theirs."""
    values = np.asarray(values, dtype=float)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def spearman(a, b):
    """Rank correlation of two (N,) arrays; NaN if one is constant."""
    a, b = (ranks(values) - (len(values) - 1) / 2 for values in (a, b))
    norm = np.sqrt((a ** 2).sum() * (b ** 2).sum())
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def fit_ridge(features, targets, penalty=1.0):
    """Ridge regression of targets (N,) on features (N, D) -> a function of features (M, D) to estimates (M,).

    Features are standardised first. penalty: weight of the squared coefficients per example.
    """
    mean, std = features.mean(0), features.std(0) + 1e-6
    x = (features - mean) / std                                                    # (N, D)
    centre = targets.mean()
    gram = x.T @ x + penalty * len(x) * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (targets - centre))                      # (D,)
    return lambda rows: (rows - mean) / std @ weights + centre


def damage_features(decibels):
    """What degradations change in a log-mel (80, F) in dB -> (D,): levels, roughness in time, dips, edges.

    Statistics over ten groups of bands, from the first to the last frame within 60 dB of the peak. They are not
    standardised.
    """
    loud = np.flatnonzero(decibels.max(0) >= decibels.max() - 60)
    x = np.maximum(decibels[:, loud[0]:loud[-1] + 1] - decibels.max(), -80)       # (80, F)
    x = np.pad(x, ((0, 0), (0, max(0, 8 - x.shape[1]))), mode="edge")
    groups = x.reshape(10, 8, -1)
    change = np.diff(x, axis=1)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(x, ((0, 0), (4, 4)), mode="edge"), 9, axis=1)
    dip = np.maximum(0, np.minimum(around[..., :4].max(-1), around[..., 5:].max(-1)) - x)  # a gap between sounds
    ridges = np.abs(np.diff(x, axis=0, prepend=x[:1]))                             # tones against noise

    def grouped(values):
        return values.reshape(10, 8, -1).mean((1, 2))
    parts = [groups.mean((1, 2)), groups.mean(1).std(1), *np.percentile(groups.mean(1), [5, 50, 95], axis=1)]
    parts += [grouped(value) for value in (np.abs(change), dip, dip > 20, dip > 40, change > 15, change < -15, ridges,
                                           np.abs(change) < 1.5)]
    flatness = (x.mean(0) - 10 * np.log10((10 ** (x / 10)).mean(0))).mean()
    parts += [np.percentile(x.max(0), [5, 25, 50, 75]), np.percentile(dip.mean(0), [50, 75, 90, 95, 99]),
              [x.shape[1], flatness]]
    return np.concatenate(parts)


def with_squares(features, mean, std):
    """Standardised features (N, D), cut at 4 deviations, and their squares -> (N, 2D): a regression that bends."""
    z = np.clip((features - mean) / std, -4, 4)
    return np.concatenate([z, z ** 2], axis=1)
