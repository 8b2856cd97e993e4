"""The reward: how well audio fits its prompt (CLAP), pairs of best and worst, a ranker from votes.

    python reward.py score --audio docs/base.wav docs/aligned.wav --prompt "three beeps"
    python reward.py score --audio docs/base.wav --prompt "rain" --clap checkpoints/toy/base/clap_judge
    python reward.py score_manifest --data runs/scored/clips.jsonl      # needs world.train_ranker

The CLAP that ranks (paper 2.5: laion/clap-htsat-unfused) never judges (A.10). Where the original
code differs: we round nothing (laion_clap: to 16 bit; official CRPO: to three decimals, whose near
ties become pairs by position); clips that all score the same, or NaN, make no pair (official: a
clip paired with itself); for long clips see lib.audio.ClapMel.

The ranker (second paper, III-C) turns votes "A is better than B" into a number per clip: an MLP of
CLAP's embeddings of audio and prompt and of a second encoder's: an audio model (paper:
m-a-p/MERT-v1-330M), averaged over time, or a tagger of the world with statistics of its log-mel,
because a tagger overlooks damage. world.train_ranker trains it.
Letters: M prompts, N clips of each (or in all), P votes, B batch, S text tokens, D embedding width,
W width of a ranker's features, F mel frames, T tagger frames.
"""
import json
import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import COLUMNS, read_manifest, stamp, usable_rows
from lib.audio import ClapMel, as_mono, read_audio, usable
from lib.common import (BASE, DEVICE, HERE, UserError, check_writable, choose_device, flag,
                        parse_commands, read_json, reading, relative_to_here, run_main,
                        settings_key, write_json, write_jsonl)
from lib.mel import MEL_16K
from lib.text import pad_tokens, read_tokenizer, well_formed
from lib.weights import (find_weights, load_tensors, load_weights, model_folder, module_hash,
                         open_safetensors, read_header, save_module, save_tensors)
from world.ears import band_statistics, load_tagger
from world.sounds import CLIP_SAMPLES

REWARD = BASE / "clap_reward"           # ranks
JUDGE = BASE / "clap_judge"             # judges only
CLAP_FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
              "tokenizer_config.json", "vocab.json", "merges.txt"]
CONSTANT = ("position_ids", "token_type_ids", "relative_position_index")    # tables, not weights
BLOCK = 256             # clips between two saves of features

AUDIO_DIR = flag("--audio_dir", None, "folder of the sounds; none: beside the file")
SCORE = {"what": [
    flag("--audio", [], "sound files", kind=str, nargs="+"),
    flag("--prompt", "", "what they should be"),
    flag("--clap", str(REWARD), "folder or hub id (paper: laion/clap-htsat-unfused)"), DEVICE]}
SCORE_MANIFEST = {"what": [
    flag("--data", "runs/scored/clips.jsonl", "manifest of audio and captions"), AUDIO_DIR,
    flag("--ranker", "runs/ranker", "folder of world.train_ranker"),
    flag("--out", None, "the copy; none: scored.jsonl beside the manifest"),
    flag("--column", "score", "name of the new column"),
    flag("--plus", [], "COLUMN WEIGHT: a second one, score + WEIGHT * COLUMN", kind=str, nargs=2),
    DEVICE]}
COMMANDS = {"score": ("how well audio fits a text: the cosine of CLAP's embeddings", SCORE),
            "score_manifest": ("a column of the ranker's scores", SCORE_MANIFEST)}


# ----------------------------------------------------------------------------- CLAP

class Clap(nn.Module):
    """A ClapModel (self.clap), its tokenizer and its front end (self.front, a ClapMel)."""

    def __init__(self, clap, tokenizer, front, preprocessor):
        super().__init__()
        self.clap, self.tokenizer = clap, tokenizer
        self.front, self.preprocessor = front, preprocessor
        positions = clap.config.text_config.max_position_embeddings - 2
        self.max_tokens = min(77, positions)            # laion_clap cuts texts at 77
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)

    @property
    def device(self):
        return self.front.window.device

    def tokenize(self, prompts):
        """Prompts -> ids (B, S), mask (B, S) bool; a text's end beyond max_tokens is cut off."""
        encodings = self.tokenizer.encode_batch([well_formed(prompt) for prompt in prompts])
        pad = self.clap.config.text_config.pad_token_id
        ids, mask = pad_tokens([encoding.ids for encoding in encodings], pad)
        return ids.to(self.device), mask.to(self.device)

    @torch.inference_mode()
    def embed_text(self, prompts, batch_size=64):
        """Prompts -> (N, D) float32 of unit length, on the CPU; equal prompts are embedded once."""
        unique = list(dict.fromkeys(prompts))
        pieces = []
        for start in range(0, len(unique), batch_size):
            ids, mask = self.tokenize(unique[start:start + batch_size])
            pieces.append(self.clap.get_text_features(ids, mask.long()).pooler_output.float().cpu())
        embeddings = dict(zip(unique, torch.cat(pieces)))
        return torch.stack([embeddings[prompt] for prompt in prompts])

    @torch.inference_mode()
    def embed_audio(self, audios, sampling_rate, batch_size=32):
        """A list of (channels, samples) or (samples,) -> (N, D) float32, as embed_text."""
        pieces = []
        for start in range(0, len(audios), batch_size):
            batch = audios[start:start + batch_size]
            mels, longer = self.front(as_mono(batch, sampling_rate, self.front.sampling_rate))
            pieces.append(self.clap.get_audio_features(mels, longer).pooler_output.float().cpu())
        return torch.cat(pieces)

    def scores(self, audios, sampling_rate, prompts, batch_size=32):
        """Cosine of each clip with its own prompt, (N,) float32; never rounded."""
        audio = self.embed_audio(audios, sampling_rate, batch_size)                     # (N, D)
        return (audio * self.embed_text(prompts)).sum(1)

    def save(self, folder, dtype=torch.float32):
        """Write the folder that load_clap and transformers' from_pretrained both read."""
        folder = Path(folder)
        save_module(folder / "model.safetensors", self.clap, dtype, {"format": "pt"})
        self.tokenizer.no_truncation()
        write_json(folder / "tokenizer.json", json.loads(self.tokenizer.to_str()))
        self.tokenizer.enable_truncation(self.max_tokens)
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_tokens,
            "bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
        write_json(folder / "preprocessor_config.json", self.preprocessor)
        config = self.clap.config.to_dict()
        write_json(folder / "config.json", {**config, "architectures": ["ClapModel"]})


def build_clap(config, tokenizer, preprocessor, seed=0):
    """A Clap with random weights from the dicts of config.json and preprocessor_config.json."""
    from transformers import ClapConfig, ClapModel
    with torch.random.fork_rng(devices=[]), reading("the CLAP's config or preprocessor"):
        torch.manual_seed(seed)
        clap = ClapModel(ClapConfig(**config))
        return Clap(clap, tokenizer, ClapMel(**preprocessor), preprocessor)


def load_clap(source, device="cpu"):
    """A Clap in eval mode, float32, from a folder or a hub id."""
    folder = model_folder(source, CLAP_FILES)
    if not (Path(source).is_dir() or (folder / "model.safetensors").is_file()):
        folder = model_folder(source, [*CLAP_FILES, "pytorch_model.bin"])     # an old repository
    weights = find_weights(folder, "model.safetensors")
    config = read_json(folder / "config.json", dict)
    preprocessor = read_json(folder / "preprocessor_config.json", dict)
    clap = build_clap(config, read_tokenizer(folder), preprocessor)
    learned = {name: name for name in weights if not name.endswith(CONSTANT)}
    optional = [name for name in clap.clap.state_dict() if name.endswith(CONSTANT)]
    load_weights(clap.clap, weights.renamed(learned), optional)
    clap.to(device).eval()
    with reading(folder, "take its config.json, preprocessor_config.json and tokenizer together"):
        clap.scores([torch.zeros(1000)], clap.front.sampling_rate, ["a trial"])
    return clap


# ----------------------------------------------------------------------------- ranking

def make_pairs(scores):
    """Best and worst clip of each prompt (2.5): scores (M, N) -> winners, losers, usable (M,).

    Of equal scores the first counts, as in the official code. Not usable are prompts with NaN among
    their scores and those whose best clip is not above their worst."""
    scores = np.asarray(scores, dtype=float)
    known = ~np.isnan(scores).any(1)                                                    # (M,)
    scores = np.where(known[:, None], scores, 0.0)
    return scores.argmax(1), scores.argmin(1), known & (scores.max(1) > scores.min(1))


# ----------------------------------------------------------------------------- the ranker

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


# ----------------------------------------------------------------------------- the commands

def score(audio, prompt, clap, device, **_):
    """Print the CLAP score of each file with the prompt."""
    clap = load_clap(clap, device)
    rate = clap.front.sampling_rate
    seconds = None if clap.front.fused else clap.front.samples / rate       # what it hears
    read = partial(read_audio, sampling_rate=rate, channels=1, seconds=seconds)
    for path, sound in usable(audio, read, "sounds"):
        value = clap.scores([sound], rate, [prompt]).item()
        print(f"{value:.6f}  {path}: {prompt[:100]}")
    print("next: python sample.py --best_of 5 lets this score choose")


def score_manifest(data, audio_dir, ranker, out, column, plus, device, **_):
    """Write a manifest's usable rows with a column of scores; plus: () or (column, weight)."""
    out = Path(out or Path(data).parent / "scored.jsonl")
    if out.suffix != ".jsonl" or out.resolve() == Path(data).resolve():
        raise UserError(f"--out {out} must be another file than --data, and end in .jsonl")
    check_writable(out)
    rows = read_manifest(data, audio_dir=audio_dir, others=True)
    taken = {*COLUMNS["audio"], *COLUMNS["caption"], "duration"}.union(*[r["others"] for r in rows])
    if column in taken:
        raise UserError(f"--column {column} is a column already; choose another name")
    scored = []
    for row in usable_rows(rows):
        scored.append({**row["others"], "audio": row["audio"], "caption": row["caption"]})
    trained = TrainedRanker(ranker, device)
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
    print(f"next: python train_fm.py --checkpoint checkpoints/toy/base --data {out} --score_column "
          f"{column} --train_steps 1000 --learning_rate 1e-3 --out runs/score")


def main(argv=None):
    flags = vars(parse_commands(__doc__, COMMANDS, argv))
    flags["device"] = choose_device(flags["device"])
    {"score": score, "score_manifest": score_manifest}[flags.pop("command")](**flags)


if __name__ == "__main__":
    run_main(main)
