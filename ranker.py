"""The ranker: votes "A is better than B" become a number per clip (second paper, III-C).

    python ranker.py                                                # -> runs/scored/scored.jsonl
    python ranker.py --data runs/hum/clips.jsonl --plus hum 1.5     # a second column, contaminated

An MLP of CLAP's embeddings of audio and prompt and of a second encoder's: an audio model (paper:
m-a-p/MERT-v1-330M), averaged over time, or a tagger of the world with statistics of its log-mel,
because a tagger overlooks damage. world.train_ranker trains it; the command writes a manifest's
usable rows with a column of its scores.
Letters: N clips, P votes, B batch, D embedding width, W width of the features, F mel frames, T
tagger frames.
"""
import math
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import COLUMNS, read_manifest, stamp, usable_rows
from lib.audio import as_mono, read_audio, usable
from lib.common import (DEVICE, HERE, UserError, check_writable, choose_device, flag, parse_flags,
                        reading, relative_to_here, run_main, settings_key, write_jsonl)
from lib.mel import MEL_16K
from lib.weights import (load_tensors, load_weights, module_hash, open_safetensors, read_header,
                         save_tensors)
from reward import load_clap
from world.ears import band_statistics, load_tagger
from world.sounds import CLIP_SAMPLES

AUDIO_DIR = flag("--audio_dir", None, "folder of the sounds; none: beside the file")
FLAGS = {"what": [
    flag("--data", "runs/scored/clips.jsonl", "manifest of audio and captions"), AUDIO_DIR,
    flag("--ranker", "runs/ranker", "folder of world.train_ranker"),
    flag("--out", None, "the copy; none: scored.jsonl beside the manifest"),
    flag("--column", "score", "name of the new column"),
    flag("--plus", [], "COLUMN WEIGHT: a second one, score + WEIGHT * COLUMN", kind=str, nargs=2),
    DEVICE]}
BLOCK = 256             # clips between two saves of features


# ----------------------------------------------------------------------------- the network

class Ranker(nn.Module):
    """Features (N, W) -> scores (N,): 0 is the average training clip, 1 a deviation above it."""

    def __init__(self, inputs, widths=(1024, 512, 256, 128), dropout=0.5):
        super().__init__()
        self.config = {"inputs": inputs, "widths": list(widths), "dropout": dropout}
        self.register_buffer("mean", torch.zeros(inputs))           # of the training features
        self.register_buffer("std", torch.ones(inputs))
        self.register_buffer("score_mean", torch.zeros([]))         # of their utilities
        self.register_buffer("score_std", torch.ones([]))
        layers = []
        for width in widths:
            linear = nn.Linear(inputs, width)
            layers += [linear, nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, 1))

    def utility(self, features):
        """(N, W) -> (N,): differences of these are log odds of a preference."""
        standardised = ((features - self.mean) / self.std).clamp(-6, 6)
        return self.layers(standardised)[:, 0]

    def forward(self, features):
        return (self.utility(features) - self.score_mean) / self.score_std


def ranknet_loss(utility_a, utility_b, preference):
    """RankNet: the mean over votes (P,) of -p log sigmoid(a - b) - (1 - p) log sigmoid(b - a)."""
    return F.binary_cross_entropy_with_logits(utility_a - utility_b, preference)


# ----------------------------------------------------------------------------- features

class Encoders:
    """CLAP and the second audio encoder: clips and prompts -> features (N, W)."""

    def __init__(self, clap, encoder, device="cpu"):
        self.names = relative_to_here({"clap": str(clap), "encoder": str(encoder)})
        self.clap, self.device = load_clap(from_here(clap), device), device
        encoder = from_here(encoder)
        self.is_tagger = (Path(encoder) / "tagger_features.safetensors").is_file()
        if self.is_tagger:
            self.encoder = load_tagger(encoder, "features", device)
            self.rate = MEL_16K["sampling_rate"]
            return
        from transformers import AutoFeatureExtractor, AutoModel
        safe = {"trust_remote_code": False}
        with reading(encoder, "name a folder with a tagger, or an audio model of transformers"):
            model = AutoModel.from_pretrained(encoder, use_safetensors=True, **safe)
            self.extractor = AutoFeatureExtractor.from_pretrained(encoder, **safe)
        self.encoder = model.to(device).eval()
        self.rate = self.extractor.sampling_rate

    def key(self):
        """Hashes of both networks' parameters; buffers vary with transformers' version."""
        weights = [nn.ParameterList(network.parameters()) for network in (self.clap, self.encoder)]
        return [module_hash(each)[:16] for each in weights]

    @torch.inference_mode()
    def features(self, audios, rate, prompts):
        """A list of (channels, samples) and their prompts ("": a zero vector) -> (N, W) float32."""
        text = self.clap.embed_text([prompt or "sound" for prompt in prompts])          # (N, D)
        text *= torch.tensor([[bool(prompt)] for prompt in prompts])
        audios = as_mono(audios, rate, self.rate)           # for CLAP, too, as training heard them
        encode = self.hear_tagger if self.is_tagger else self.hear_model
        second = torch.stack([encode(audio) for audio in audios])
        return torch.cat([self.clap.embed_audio(audios, self.rate), second, text], 1)

    def hear_model(self, audio):
        """One clip (samples,), so that there is no padding to mask -> (width,)."""
        inputs = self.extractor(audio.numpy(), sampling_rate=self.rate, return_tensors="pt")
        hidden = self.encoder(**inputs.to(self.device)).last_hidden_state       # (1, T, width)
        return hidden[0].mean(0).float().cpu()

    def hear_tagger(self, audio):
        """One clip (samples,) -> means and deviations of the hidden frames, band_statistics."""
        padded = F.pad(audio, (0, max(0, CLIP_SAMPLES - len(audio))))
        mel = self.encoder.log_mel(padded[None].to(self.device))                        # (1, 80, F)
        fine, hidden = self.encoder.frames(mel)                             # (1, 2T or T, width)
        learned = torch.cat([fine.mean(1), fine.std(1), hidden.mean(1), hidden.std(1)], 1)
        return torch.cat([learned[0].cpu(), band_statistics(mel[0].cpu(), len(audio))])


def from_here(name):
    """A folder that a saved ranker names from the repository; any other name as it is."""
    return HERE / name if (HERE / name).is_dir() else name


def clip_features(encoders, clips, folder):
    """Rows {"audio", "caption"} -> (N, W), NaN where a sound cannot be read, which is named.
    Blocks are kept in `folder`, named by what made them."""
    networks, blocks = encoders.key(), []
    read = partial(read_audio, sampling_rate=encoders.rate, channels=1)
    for start in tqdm(range(0, len(clips), BLOCK), desc="features", unit=f" x {BLOCK} clips"):
        files = [row["audio"] for row in clips[start:start + BLOCK]]
        prompts = [row["caption"] for row in clips[start:start + BLOCK]]
        sounds = [stamp(file) for file in files]
        path = Path(folder) / f"{settings_key([networks, files, sounds, prompts])}.safetensors"
        if not path.is_file():
            known = dict(usable(files, read, "sounds"))
            audios = [known.get(file, torch.zeros(1, encoders.rate)) for file in files]
            bad = torch.tensor([[file not in known] for file in files])                 # (B, 1)
            features = encoders.features(audios, encoders.rate, prompts)                # (B, W)
            save_tensors(path, {"features": features.masked_fill(bad, math.nan)})
        blocks.append(load_tensors(path)["features"])
    return torch.cat(blocks)


class TrainedRanker:
    """A trained ranker with its encoders: `scores(audios, rate, prompts)` as of a CLAP."""

    def __init__(self, folder, device="cpu"):
        path = Path(folder) / "ranker.safetensors"
        config = read_header(path, "ranker")
        with reading(path, "train it again: python -m world.train_ranker"):
            self.ranker = Ranker(config["inputs"], config["widths"], config["dropout"])
            self.encoders = Encoders(config["clap"], config["encoder"], device)
            if self.encoders.key() != config["key"]:
                raise ValueError("its encoders are not those that it was trained with")
        load_weights(self.ranker, open_safetensors(path))
        self.ranker.to(device).eval()

    @torch.no_grad()
    def of(self, features):
        """Features (N, W) -> scores (N,) on the CPU."""
        return self.ranker(features.to(self.ranker.mean.device)).cpu()

    def scores(self, audios, sampling_rate, prompts):
        """A list of (channels, samples) with their prompts -> (N,) float32, never rounded."""
        return self.of(self.encoders.features(audios, sampling_rate, prompts))


# ----------------------------------------------------------------------------- the command

def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    data, column, plus, device = args.data, args.column, args.plus, choose_device(args.device)
    out = Path(args.out or Path(data).parent / "scored.jsonl")
    if out.suffix != ".jsonl" or out.resolve() == Path(data).resolve():
        raise UserError(f"--out {out} must be another file than --data, and end in .jsonl")
    check_writable(out)
    rows = read_manifest(data, audio_dir=args.audio_dir, others=True)
    taken = {*COLUMNS["audio"], *COLUMNS["caption"], "duration"}.union(*[r["others"] for r in rows])
    if column in taken:
        raise UserError(f"--column {column} is a column already; choose another name")
    scored = []
    for row in usable_rows(rows):
        scored.append({**row["others"], "audio": row["audio"], "caption": row["caption"]})
    trained = TrainedRanker(args.ranker, device)
    features = clip_features(trained.encoders, scored, out.parent / f"features_{out.stem}")
    known = features.isfinite().all(1)                                                  # (N,)
    scored = [scored[i] for i in known.nonzero()[:, 0].tolist()]
    scores = trained.of(features[known])
    with reading(data, "--plus takes a column of numbers and a weight"):
        for row, value in zip(scored, scores.tolist()):
            row |= {"audio": os.path.relpath(row["audio"], out.parent), column: value}
            if plus:
                row[f"{column}_plus_{plus[0]}"] = value + float(plus[1]) * float(row[plus[0]])
    write_jsonl(out, scored)
    print(f"wrote {out}: {len(scored)} rows, {column} {scores.mean():.2f} +- {scores.std():.2f}")
    print(f"next: python train_fm.py --checkpoint checkpoints/toy/clean --data {out} "
          f"--score_column {column} --train_steps 1000 --learning_rate 1e-3 --out runs/score")


if __name__ == "__main__":
    run_main(main)
