"""The preference ranker: from votes "A is better than B" to one number per clip (second paper, III-C).

One branch scores a clip from the concatenation of CLAP's embedding of the audio, what a second audio encoder hears,
and CLAP's embedding of the prompt: 1024, 512, 256, 128, 1 wide, with BatchNorm, ReLU and dropout. Both clips of a vote
go through the same branch, and the loss is RankNet's: -log sigmoid(s(A) - s(B)), where a tie counts half for each.

The second encoder is any transformers audio model by folder or hub id (the paper: m-a-p/MERT-v1-330M), whose last
layer is averaged over time, or a tagger of the world: mean and deviation over time of both its layers, and of the
log-mel that it hears its quantiles, changes and dips per band, for a tagger learns to overlook damage. Features are
standardised by their mean and deviation over the training clips, and so is the score, which makes scores of several
rankers alike: 0 is the average training clip, 1 a deviation above it.

Where the paper is silent: votes are split by prompt, so that no clip of a held-out vote was trained on; the epoch with
the lowest loss on the validation votes is kept; an absent prompt is the zero vector.

Letters: N clips, P votes, W width of all features together.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import metrics
from audio import read_audio, resample
from cache import module_hash
from clap import load_clap
from common import (UserError, atomic_path, derive_seed, generator, load_exactly, load_tensors, read_json, read_jsonl,
                    save_tensors, warn, write_json)
from tagger import load_tagger

HERE = Path(__file__).resolve().parent
WIDTHS = (1024, 512, 256, 128)
BLOCK = 256             # clips listened to between two saves
TAGGER_RATE = 16000     # Hz


# ----------------------------------------------------------------------------- the algorithm

class Ranker(nn.Module):
    """Features (N, W) -> scores (N,), standardised over the training clips."""

    def __init__(self, inputs, widths=WIDTHS, dropout=0.5):
        super().__init__()
        self.inputs, self.widths, self.dropout = inputs, list(widths), dropout
        for name, value in (("mean", torch.zeros(inputs)), ("std", torch.ones(inputs)),
                            ("score_mean", torch.zeros(())), ("score_std", torch.ones(()))):
            self.register_buffer(name, value)
        layers = []
        for before, width in zip((inputs, *widths), widths):
            layers += [nn.Linear(before, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def utility(self, features):
        """(N, W) -> (N,): differences of these are log odds of a preference."""
        return self.layers(((features - self.mean) / self.std).clamp(-6, 6))[:, 0]

    def forward(self, features):
        return (self.utility(features) - self.score_mean) / self.score_std


def ranknet_loss(utility_a, utility_b, preference):
    """-p log sigmoid(a - b) - (1 - p) log sigmoid(b - a), the mean over P votes; p = 1, 0, or 0.5 for a tie."""
    return F.binary_cross_entropy_with_logits(utility_a - utility_b, preference)


def pairwise_accuracy(difference, preference):
    """Share of the votes that are no ties whose sign is that of the difference s(A) - s(B)."""
    decided = preference != 0.5
    return float(((difference > 0) == (preference > 0.5))[decided].mean())


def calibration_error(chance, preference, bins=10):
    """Expected calibration error of P(A) against votes that are no ties: |mean chance - share of A| over equal bins."""
    decided = preference != 0.5
    chance, preference = chance[decided], preference[decided]
    place, error = np.minimum((chance * bins).astype(int), bins - 1), 0.0
    for k in range(bins):
        if (place == k).any():
            error += (place == k).mean() * abs(chance[place == k].mean() - preference[place == k].mean())
    return float(error)


# ----------------------------------------------------------------------------- features

class Encoders:
    """CLAP and the second audio encoder: clips and prompts -> features (N, W). See the head of this file."""

    def __init__(self, clap, encoder, device="cpu"):
        self.names = {"clap": str(clap).removeprefix(f"{HERE}/"), "encoder": str(encoder).removeprefix(f"{HERE}/")}
        clap, encoder = (HERE / name if (HERE / name).is_dir() else name for name in (clap, encoder))
        self.clap, self.device = load_clap(clap, device), device
        if (Path(encoder) / "tagger_features.safetensors").is_file():
            self.encoder, self.rate = load_tagger(encoder, "features", device), TAGGER_RATE
        else:
            from transformers import AutoFeatureExtractor, AutoModel
            try:
                self.encoder = AutoModel.from_pretrained(encoder, use_safetensors=True).to(device).eval()
                self.extractor = AutoFeatureExtractor.from_pretrained(encoder)
            except Exception as error:  # noqa: BLE001  (missing, offline, no audio model: transformers has many)
                raise UserError(f"--encoder {encoder} is neither a folder with a tagger nor an audio model of "
                                f"transformers that can be had here ({type(error).__name__})") from None
            self.rate = self.extractor.sampling_rate

    def key(self):
        """What features depend on."""
        weights = [nn.ParameterList(network.parameters()) for network in (self.clap, self.encoder)]
        return [module_hash(one)[:16] for one in weights]       # without buffers, which transformers' versions vary

    @torch.inference_mode()
    def hear(self, audios, rate):
        """The second encoder: a list of (channels, samples) -> (N, its width)."""
        mono = [resample(audio.reshape(-1, audio.shape[-1]).mean(0), rate, self.rate) for audio in audios]
        if hasattr(self, "extractor"):
            pieces = []
            for audio in mono:                          # one by one: no padding to mask
                inputs = self.extractor(audio.numpy(), sampling_rate=self.rate, return_tensors="pt")
                pieces.append(self.encoder(**inputs.to(self.device)).last_hidden_state.mean(1).float().cpu())
            return torch.cat(pieces)
        sizes, found = [max(65536, len(audio)) for audio in mono], [None] * len(mono)            # clip by clip
        for size in set(sizes):
            places = [i for i, one in enumerate(sizes) if one == size]
            padded = torch.stack([F.pad(mono[i], (0, size - len(mono[i]))) for i in places])
            mel = self.encoder.log_mel(padded.to(self.device))                                   # (N', 80, F)
            fine, hidden = self.encoder.frames(mel)                                              # (N', 2T|T, W')
            learned = torch.cat([part for layer in (fine, hidden) for part in (layer.mean(1), layer.std(1))], 1).cpu()
            for i, one, row in zip(places, mel.cpu(), learned):
                found[i] = torch.cat([row, band_statistics(one, len(mono[i]))])
        return torch.stack(found)

    def features(self, audios, rate, prompts):
        """A list of (channels, samples) at `rate` and their prompts ("" for none) -> (N, W) float32."""
        text = self.clap.embed_text([prompt or "sound" for prompt in prompts]).clone()
        text[[not prompt for prompt in prompts]] = 0
        return torch.cat([self.clap.embed_audio(audios, rate), self.hear(audios, rate), text], 1)


def band_statistics(mel, samples, hop=256):
    """A log10 mel (80, F) over its sounding samples -> (720,): per band its quantiles, changes and dips, in decades.

    Levels are relative to the clip's peak, at most 4 decades (80 dB) below it.
    """
    mel = mel[:, :max(9, math.ceil(samples / hop))]
    mel = (mel - mel.max()).clamp(min=-4)
    change = mel.diff(dim=1)
    around = F.pad(mel[None], (4, 4), mode="replicate")[0].unfold(1, 9, 1)                       # (80, F, 9)
    dip = (torch.minimum(around[..., :4].amax(-1), around[..., 5:].amax(-1)) - mel).clamp(min=0)  # a gap in a sound
    parts = [*torch.quantile(mel, torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=1), change.abs().mean(1),
             (change.abs() > 0.75).float().mean(1), dip.mean(1), (dip > 1).float().mean(1)]
    return torch.cat(parts)


def clip_features(encoders, clips, keep=None, desc="features"):
    """Rows {"audio", "caption"} -> (N, W); with `keep`, a folder, blocks are kept there and read back."""
    names = derive_seed(*(f"{row['audio']} {row['caption']}" for row in clips))
    settings = {"encoders": encoders.key(), "clips": names, "statistics": 1}
    if keep is not None:
        if (Path(keep) / "settings.json").is_file() and read_json(Path(keep) / "settings.json") != settings:
            for path in Path(keep).glob("*.safetensors"):
                path.unlink()
        write_json(Path(keep) / "settings.json", settings)
    pieces = []
    for start in tqdm(range(0, len(clips), BLOCK), desc=desc, unit=f" x {BLOCK} clips"):
        path = None if keep is None else Path(keep) / f"{start:08d}.safetensors"
        if path is None or not path.is_file():
            rows = clips[start:start + BLOCK]
            audios = [read_audio(row["audio"], encoders.rate, 1) for row in rows]
            block = encoders.features(audios, encoders.rate, [row["caption"] for row in rows])
            if path is not None:
                save_tensors(path, {"features": block})
            pieces.append(block)
        else:
            pieces.append(load_tensors(path)["features"])
    return torch.cat(pieces)


# ----------------------------------------------------------------------------- votes

def read_votes(path, audio_dir=None):
    """votes.jsonl -> (clips [{"audio", "caption"}], votes {"a", "b" (P,) places, "preference", "chance", "source"}).

    Votes on unknown clips (no such file) are counted and left out. Raises UserError for rows that are no votes, or if
    none is left.
    """
    path, clips, places, missing = Path(path), [], {}, []
    if not path.is_file():
        raise UserError(f"{path} is missing; python votes.py makes it, --votes names it")
    rows = read_jsonl(path)
    folder = Path(audio_dir) if audio_dir else path.parent

    def place(name, prompt):
        known = places.get((name, prompt))
        if known is None and (folder / name).is_file():
            known = places[name, prompt] = len(clips)
            clips.append({"audio": str(folder / name), "caption": prompt})
        return known
    kept = []
    for number, row in enumerate(rows, 1):
        texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("prompt", "a", "b", "source"))
        if not texts or row.get("preference") not in (0, 0.5, 1):
            raise UserError(f'{path} row {number} is no vote; one looks like {{"prompt": "...", "a": "x.wav", "b": '
                            '"y.wav", "source": "s1", "preference": 1} (1: a is better, 0: b, 0.5: a tie)')
        a, b = place(row["a"], row["prompt"]), place(row["b"], row.get("prompt_b", row["prompt"]))
        if a is None or b is None:
            missing.append(row["a"] if a is None else row["b"])
        else:
            kept.append((a, b, float(row["preference"]), row.get("chance", math.nan), row["source"]))
    if missing:
        note = f"{path}: {len(missing)} of {len(rows)} votes are on unknown clips; first: {folder / missing[0]}"
        if not kept:
            raise UserError(f"{note}; name their folder with --audio_dir")
        warn(f"{note}; left out")
    if not kept:
        raise UserError(f"{path} holds no votes; python votes.py makes some")
    a, b, preference, chance, source = zip(*kept)
    if len(set(source)) == 1:
        warn(f"all votes are of one source, {source[0]}: the ranker learns its habits with its taste; pool several")
    return clips, {"a": np.array(a), "b": np.array(b), "preference": np.array(preference, np.float32),
                   "chance": np.array(chance), "source": np.array(source)}


def split_votes(clips, votes, seed, shares=(0.1, 0.1)):
    """Places of training, validation and test votes: prompts are split, votes across parts are left out."""
    def part(caption):
        value = derive_seed(seed, "votes", caption) / 2 ** 63
        return 2 if value < shares[1] else 1 if value < sum(shares) else 0
    of = np.array([part(row["caption"]) for row in clips])
    both = np.where(of[votes["a"]] == of[votes["b"]], of[votes["a"]], -1)
    return [np.flatnonzero(both == k) for k in range(3)]


# ----------------------------------------------------------------------------- training

def fit(features, votes, parts, widths=WIDTHS, dropout=0.5, epochs=20, batch_size=256, learning_rate=1e-3,
        weight_decay=1e-2, seed=0, device="cpu"):
    """Train a Ranker on features (N, W) and votes -> (ranker in eval mode, log rows). `parts`: split_votes."""
    training, validation, test = parts
    if len(training) < 2 or not len(validation) or not (votes["preference"][test] != 0.5).any():
        raise UserError(f"{len(training)} training, {len(validation)} validation and {len(test)} test votes (split by "
                        "prompt) are too few; give more")
    a, b = (torch.from_numpy(votes[which]) for which in ("a", "b"))
    preference, features = torch.from_numpy(votes["preference"]).to(device), features.to(device)
    with torch.random.fork_rng(devices=[]):             # initialisation, and dropout, which has no generator
        torch.manual_seed(derive_seed(seed, "ranker"))
        ranker = Ranker(features.shape[1], widths, dropout).to(device)
        known = features[torch.cat([a[training], b[training]]).unique()]
        ranker.mean.copy_(known.mean(0))
        ranker.std.copy_(known.std(0).clamp(min=1e-4))
        optimizer = torch.optim.AdamW(ranker.parameters(), lr=learning_rate, weight_decay=weight_decay)
        steps, step, best, log = epochs * math.ceil(len(training) / batch_size), 0, None, []
        for epoch in tqdm(range(epochs), desc="ranker", unit="epoch"):
            ranker.train()
            order = torch.randperm(len(training), generator=generator(seed, "votes", epoch)).numpy()
            for start in range(0, len(order), batch_size):
                rows = training[order[start:start + batch_size]]
                step += 1
                if len(rows) < 2:
                    continue                            # BatchNorm needs more
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
                utility = ranker.utility(features[torch.cat([a[rows], b[rows]])])
                loss = ranknet_loss(*utility.chunk(2), preference[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ranker.eval()
            with torch.no_grad():
                utility = ranker.utility(features)
                held = ranknet_loss(utility[a[validation]], utility[b[validation]], preference[validation]).item()
            log.append({"epoch": epoch + 1, "loss": loss.item(), "validation": held})
            if best is None or held < best[0]:
                best = (held, {name: tensor.clone() for name, tensor in ranker.state_dict().items()})
    ranker.load_state_dict(best[1])
    with torch.no_grad():
        utility = ranker.utility(known)
        ranker.score_mean.copy_(utility.mean())
        ranker.score_std.copy_(utility.std().clamp(min=1e-6))
    return ranker, log


@torch.no_grad()
def report(ranker, features, votes, test, quality=None):
    """Held-out numbers: accuracy and its ceiling, calibration, rank correlation with the true quality where known."""
    ranker.eval()
    utility = ranker.utility(features.to(ranker.mean.device)).cpu().numpy()
    difference = utility[votes["a"][test]] - utility[votes["b"][test]]
    preference, chance = votes["preference"][test], votes["chance"][test]
    found = {"votes": len(test), "accuracy": pairwise_accuracy(difference, preference),
             "calibration error": calibration_error(1 / (1 + np.exp(-difference)), preference),
             "sources": {str(name): pairwise_accuracy(difference[votes["source"][test] == name],
                                                      preference[votes["source"][test] == name])
                         for name in np.unique(votes["source"][test])}}
    decided = preference != 0.5
    if np.isfinite(chance).all():       # of a simulated source the chance of A is known: nobody can foretell more
        found["ceiling"] = float(np.maximum(chance, 1 - chance)[decided].mean())
    if quality is not None:
        clips = np.unique(np.concatenate([votes["a"][test], votes["b"][test]]))
        found["spearman"] = metrics.spearman(utility[clips], quality[clips])
        found["clips"] = len(clips)
        told = quality[votes["a"][test]] - quality[votes["b"][test]]
        found["accuracy of the true quality"] = pairwise_accuracy(told, preference)
    return found


# ----------------------------------------------------------------------------- on disk, and in use

def save_ranker(folder, ranker, encoders, key):
    """ranker.safetensors, with what it is in its header."""
    tensors = {name: tensor.half() if tensor.is_floating_point() and name.startswith("layers") else tensor
               for name, tensor in ranker.state_dict().items()}
    config = {"inputs": ranker.inputs, "widths": ranker.widths, "dropout": ranker.dropout, **encoders, "key": key}
    save_tensors(Path(folder) / "ranker.safetensors", tensors, {"ranker": json.dumps(config)})


class Judged:
    """A trained ranker with its encoders: `scores(audios, rate, prompts)` as of a CLAP."""

    def __init__(self, folder, device="cpu"):
        from safetensors import safe_open
        path = Path(folder)
        path = path / "ranker.safetensors" if path.suffix != ".safetensors" else path
        if not path.is_file():
            raise UserError(f"{path} is missing; python reward.py train_ranker trains a ranker, --ranker names its "
                            "folder")
        tensors = load_tensors(path)
        with safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("ranker", "null"))
        if not isinstance(config, dict):
            raise UserError(f"{path} is no ranker: its header has no config; train it with python reward.py "
                            "train_ranker")
        self.ranker = Ranker(config["inputs"], config["widths"], config["dropout"])
        load_exactly(self.ranker, tensors, str(path))
        self.ranker = self.ranker.to(device).eval()
        self.encoders = Encoders(config["clap"], config["encoder"], device)
        if self.encoders.key() != config["key"]:
            raise UserError(f"{path}: the encoders in {config['clap']} and {config['encoder']} are not those it was "
                            "trained with; train it again")

    @torch.no_grad()
    def of(self, features):
        """Features (N, W) -> scores (N,) on the CPU."""
        return self.ranker(features.to(self.ranker.mean.device)).cpu()

    def scores(self, audios, sampling_rate, prompts, batch_size=BLOCK):
        """A list of (channels, samples) with their prompts -> (N,) float32, standardised, never rounded."""
        return torch.cat([self.of(self.encoders.features(audios[i:i + batch_size], sampling_rate,
                                                         prompts[i:i + batch_size]))
                          for i in range(0, len(audios), batch_size)])


def draw_calibration(path, utility, votes, test):
    """calibration.png: of held-out votes, the share of A against its foretold chance. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        warn("matplotlib is not installed: the picture is skipped; pip install matplotlib")
        return False
    difference, preference = utility[votes["a"][test]] - utility[votes["b"][test]], votes["preference"][test]
    chance, decided = 1 / (1 + np.exp(-difference)), preference != 0.5
    place = np.minimum((chance * 10).astype(int), 9)
    figure = Figure(figsize=(4.5, 4), layout="constrained")
    axes = figure.subplots()
    points = [(chance[decided & (place == k)].mean(), preference[decided & (place == k)].mean())
              for k in range(10) if (decided & (place == k)).any()]
    axes.plot([0, 1], [0, 1], color="0.7")
    axes.plot(*zip(*points), marker="o")
    axes.set(xlabel="foretold chance that A is preferred", ylabel="share of votes for A")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    return True
