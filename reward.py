"""The reward: how well audio fits its prompt (CLAP), and what it makes of a prompt's clips.

    python reward.py --audio docs/base.wav docs/aligned.wav --prompt "rain followed by a flute"
    python reward.py --audio docs/base.wav --prompt "rain" --clap checkpoints/toy/base/clap_judge
    python reward.py --audio docs/aligned.wav --prompt "a flute followed by rain" --device cpu

The CLAP that ranks (paper 2.5: laion/clap-htsat-unfused) never judges (A.10). Where the original
code differs: we round nothing (laion_clap: to 16 bit; official CRPO: to three decimals, whose near
ties become pairs by position); clips that all score the same, or NaN, make no pair (official: a
clip paired with itself); for long clips see lib.audio.ClapMel.
Letters: M prompts, U different ones, N clips of each (or in all), P pairs, K clips of a row, B
batch, S text tokens, T text width, L latent frames, C channels, D embedding width.
"""
import json
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from lib.audio import ClapMel, as_mono, read_audio, usable
from lib.common import (BASE, DEVICE, UserError, choose_device, flag, generator, parse_flags,
                        read_json, reading, run_main, warn, write_json, write_jsonl)
from lib.losses import advantages
from lib.text import MAX_TOKENS, pad_tokens, read_tokenizer, well_formed
from lib.weights import (find_weights, load_weights, model_folder, save_module, save_tensors)

REWARD = BASE / "clap_reward"           # ranks
JUDGE = BASE / "clap_judge"             # judges only
CLAP_FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
              "tokenizer_config.json", "vocab.json", "merges.txt"]
CONSTANT = ("position_ids", "token_type_ids", "relative_position_index")    # tables, not weights
FLAGS = {"what": [
    flag("--audio", [], "sound files", kind=str, nargs="+"),
    flag("--prompt", "", "what they should be"),
    flag("--clap", str(REWARD), "folder or hub id (paper: laion/clap-htsat-unfused)"), DEVICE]}


# ----------------------------------------------------------------------------- CLAP

class Clap(nn.Module):
    """A ClapModel (self.clap), its tokenizer and its front end (self.front, a ClapMel)."""

    def __init__(self, clap, tokenizer, front, preprocessor):
        super().__init__()
        self.clap, self.tokenizer = clap, tokenizer
        self.front, self.preprocessor = front, preprocessor
        positions = clap.config.text_config.max_position_embeddings - 2
        self.max_tokens = min(77, positions)        # laion_clap cuts texts at 77
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


class UserReward(nn.Module):
    """A function of a file, "FILE.py:function", in the place of a CLAP.

    function(audios: list of (channels, samples), rate in Hz, prompts) -> a number for each clip."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        path, _, function = name.rpartition(":")
        with reading(path, f"it must define {function}(audios, rate, prompts)"):
            code = bytearray(Path(path).read_bytes())           # module_hash sees it
            self.register_buffer("code", torch.frombuffer(code, dtype=torch.uint8))
            self.function = runpy.run_path(path)[function]

    def scores(self, audios, sampling_rate, prompts):
        """A list of (channels, samples) with their prompts -> (N,) float32."""
        with reading(self.name, "it must give a number for each clip"):
            values = self.function(audios, sampling_rate, prompts)
            scores = torch.as_tensor(values, dtype=torch.float32).detach().cpu()
            if scores.shape != (len(audios),):
                raise ValueError(f"its scores of {len(audios)} clips are {tuple(scores.shape)}")
        return scores


def load_reward(name, device="cpu"):
    """What scores clips: "FILE.py:function", or the folder or hub id of a CLAP."""
    if str(name).rpartition(":")[0].endswith(".py"):
        return UserReward(name)
    return load_clap(name, device)


# ----------------------------------------------------------------------------- pairs and groups

def make_pairs(scores, per_prompt=1):
    """Best and worst clip of each prompt (2.5), the second best and second worst, and so on.

    scores (M, N) -> prompts, winners, losers, (P,) each: the best pairs of all prompts first. Of
    equal scores the first counts, as in the official code. Prompts with NaN among their scores
    make no pair, nor do clips that score the same."""
    scores = np.asarray(scores, dtype=float)
    known = np.isfinite(scores).all(1)                                                  # (M,)
    scores = np.where(known[:, None], scores, 0.0)
    best = np.argsort(-scores, axis=1, kind="stable")                                   # (M, N)
    worst = np.argsort(scores, axis=1, kind="stable")
    pairs = []
    for k in range(min(per_prompt, scores.shape[1] // 2)):
        prompts = np.arange(len(scores))
        above = scores[prompts, best[:, k]] > scores[prompts, worst[:, k]]
        prompts = np.flatnonzero(known & above)
        pairs.append((prompts, best[prompts, k], worst[prompts, k]))
    return [np.concatenate(part) for part in zip(*pairs)]


def usable_pairs(rewards, per_prompt=1):
    """make_pairs, and a warning of the prompts that make none. UserError if none does."""
    pairs = make_pairs(rewards, per_prompt)
    most = rewards.shape[1] // 2
    if most < per_prompt:
        warn(f"{rewards.shape[1]} clips of a prompt make {most} pairs, not {per_prompt}")
    missing = len(rewards) - len(set(pairs[0].tolist()))
    if missing == len(rewards):
        remedy = "their scores are equal: raise --num_samples or check --reward"
        if not np.isfinite(rewards).all():
            remedy = "some of their scores are NaN or infinite: mend --reward"
        raise UserError(f"no prompt makes a pair; {remedy}")
    if missing:
        warn(f"{missing} of {len(rewards)} prompts make no pair (equal or NaN scores)")
    return pairs


def pairs_of(folder, scored, latents, count, per_prompt=1):
    """pairs.jsonl, pairs.safetensors: best and worst of each prompt's `count` clips, and so on.

    scored: M N rows; latents (M N, L, C) -> P rows, {"winner_mean", "loser_mean": (P, L, C)}."""
    rewards = np.array([row["reward"] for row in scored]).reshape(-1, count)            # (M, N)
    prompts, best, worst = usable_pairs(rewards, per_prompt)                            # (P,) each
    places = {"winner": prompts * count + best, "loser": prompts * count + worst}
    rows = [{"prompt": scored[i]["prompt"], "duration": scored[i]["duration"]}
            for i in places["winner"]]
    for which, indices in places.items():
        for row, i in zip(rows, indices):
            row[which] = f"candidates.safetensors#{i}"
            row[f"reward_{which}"] = scored[i]["reward"]
    return save_pairs(folder, rows, {f"{which}_mean": latents[i] for which, i in places.items()})


def shuffled(scored, count, seed):
    """The rows of scores.jsonl, the rewards of each prompt's `count` clips in random order."""
    rewards = torch.tensor([row["reward"] for row in scored]).view(-1, count)           # (M, N)
    order = torch.rand(rewards.shape, generator=generator(seed, "shuffle")).argsort(1)
    mixed = rewards.gather(1, order).flatten().tolist()
    return [{**row, "reward": value} for row, value in zip(scored, mixed)]


def groups_of(scored, latents, count, size):
    """All clips of the prompts that make a pair, K = `size` of them in a row: M N scored rows,
    latents (M N, L, C) -> P rows, {"clips": (P, K, L, C), "advantage": (P, K)}."""
    rewards = torch.tensor([row["reward"] for row in scored]).view(-1, count)           # (M, N)
    prompts, _, _ = usable_pairs(rewards)
    clips = latents.unflatten(0, rewards.shape)[prompts].flatten(0, 1)
    rows = [scored[i * count + j] for i in prompts for j in range(0, count, size)]
    advantage = advantages(rewards[prompts]).view(-1, size)                             # (P, K)
    return rows, {"clips": clips.unflatten(0, (-1, size)), "advantage": advantage}


def save_pairs(folder, rows, tensors):
    """Write pairs.jsonl, then pairs.safetensors (P, L, C): the stage is done."""
    write_jsonl(folder / "pairs.jsonl", rows)
    save_tensors(folder / "pairs.safetensors", tensors)
    return rows, tensors


@torch.no_grad()
def training_data(rows, tensors, model):
    """Pairs or clips, normalised, each prompt encoded once -> tensors of crpo.draw_rows, CPU."""
    codec, scale = model.codec, model.codec.latent_std.cpu()
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    ids, mask = model.text.tokenize(prompts, MAX_TOKENS)                                # (U, S)
    batches = zip(ids.split(64), mask.split(64))
    hidden = torch.cat([model.text.encode(*batch).cpu() for batch in batches])          # (U, S, T)
    number = {prompt: i for i, prompt in enumerate(prompts)}
    text = torch.tensor([number[row["prompt"]] for row in rows])                        # (P,)
    duration = torch.tensor([float(row["duration"]) for row in rows])
    if "clips" in tensors:
        mean, advantage = tensors["clips"], tensors["advantage"]        # (P, K, L, C), (P, K)
    else:
        mean = torch.stack([tensors["winner_mean"], tensors["loser_mean"]], 1)
        advantage = torch.tensor([1.0, -1.0]).expand(len(mean), 2)
    std = torch.zeros(()).expand_as(mean)        # sampled latents have none
    if "winner_std" in tensors:
        std = torch.stack([tensors["winner_std"], tensors["loser_std"]], 1) / scale
    mean = codec.normalise(mean.to(codec.latent_std.device)).cpu()
    return {"hidden": hidden, "mask": mask.cpu(), "text": text, "duration": duration, "mean": mean,
            "std": std, "advantage": advantage}


# ----------------------------------------------------------------------------- the command

def main(argv=None):
    """Print the CLAP score of each file with the prompt."""
    args = parse_flags(__doc__, FLAGS, argv)
    if not args.audio or not args.prompt.strip():
        raise UserError("give sounds by --audio, and by --prompt what they should be")
    clap = load_clap(args.clap, choose_device(args.device))
    rate = clap.front.sampling_rate
    seconds = None if clap.front.fused else clap.front.samples / rate       # what it hears
    read = partial(read_audio, sampling_rate=rate, channels=1, seconds=seconds)
    for path, sound in usable(args.audio, read, "sounds"):
        value = clap.scores([sound], rate, [args.prompt]).item()
        print(f"{value:.6f}  {path}: {args.prompt[:100]}")
    print("next: python sample.py --best_of 5 lets this score choose")


if __name__ == "__main__":
    run_main(main)
