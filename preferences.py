"""From prompts to pairs of winner and loser: the first two steps of a CRPO iteration, or a static set (paper 2.5, 4.3).

Each function makes one file of an iteration's folder, and reads it instead where it is found: prompts.jsonl,
candidates.safetensors, scores.jsonl, pairs.jsonl with pairs.safetensors. `args` are the flags of crpo.py.

Letters: M prompts, N clips of each, P pairs, L latent frames, C latent channels.
"""
import itertools
import shutil

import numpy as np
import torch
from tqdm import tqdm

from audio import fit_audio
from common import UserError, append_jsonl, generator, load_tensors, read_jsonl, save_tensors, warn, write_jsonl
from data import load_clip
from reward import make_pairs, read_pairs
from sample import decode, default_duration, generate, read_prompts

ENCODED_AT_ONCE = 8     # clips: of the codecs' activations, not of their latents, memory is full


def prompt_pool(args, max_duration):
    """The pool that prompts are drawn from: rows {"prompt", "duration"} of --prompt_file or of training scenes."""
    if args.prompt_file:
        rows = read_prompts(args.prompt_file)
        return [{"prompt": row["prompt"], "duration": min(row["duration"] or default_duration(max_duration),
                                                           max_duration)} for row in rows]
    from world import World
    world = World("train", seed="crpo")
    return [{"prompt": scene.prompt, "duration": scene.duration} for scene in map(world.scene, range(args.pool))]


def draw_prompts(args, folder, iteration, pool):
    """prompts.jsonl: M different rows of the pool, drawn anew in each iteration (paper 3.2)."""
    path = folder / "prompts.jsonl"
    if not path.is_file():
        order = torch.randperm(len(pool), generator=generator(args.seed, "prompts", iteration))[:args.prompts]
        rows = [{"prompt_id": int(i), **pool[i]} for i in order]
        write_jsonl(path, rows)
    return read_jsonl(path)


def make_candidates(args, folder, seed, prompts, model):
    """candidates.safetensors: latents (M * N, L, C), N of each prompt in a row; clip i is made from (seed, i)."""
    path, parts = folder / "candidates.safetensors", folder / "candidates"
    if path.is_file():
        return load_tensors(path)["latents"]
    rows = [row for row in prompts for _ in range(args.num_samples)]
    starts = range(0, len(rows), args.save_clips)
    for start in tqdm(starts, desc="generating", unit=f" x {args.save_clips}"):
        part, block = parts / f"{start:07d}.safetensors", rows[start:start + args.save_clips]
        if not part.is_file():
            latents = generate(model, [row["prompt"] for row in block], [row["duration"] for row in block], seed,
                               range(start, start + len(block)), args.steps, args.guidance_scale, args.solver,
                               batch_size=args.generation_batch, score=args.score)
            save_tensors(part, {"latents": latents})
    made = [parts / f"{start:07d}.safetensors" for start in starts]        # by name: a kill leaves half-written ones
    latents = torch.cat([load_tensors(part)["latents"] for part in made])
    save_tensors(path, {"latents": latents})
    shutil.rmtree(parts)
    return latents


def score_candidates(args, folder, seed, prompts, latents, model, clap, maker):
    """scores.jsonl: the reward of every clip, unrounded, with what is needed to make it again -> (M, N)."""
    path, rows = folder / "scores.jsonl", [row for row in prompts for _ in range(args.num_samples)]
    done = read_jsonl(path) if path.is_file() else []
    if len(done) < len(rows):                                              # whole blocks stay
        done = done[:len(done) // args.save_clips * args.save_clips]
        write_jsonl(path, done)
    for start in tqdm(range(len(done), len(rows), args.save_clips), desc="scoring", unit=f" x {args.save_clips}"):
        block = rows[start:start + args.save_clips]
        audios = decode(model, latents[start:start + args.save_clips], [row["duration"] for row in block])
        rewards = clap.scores(audios, model.codec.sampling_rate, [row["prompt"] for row in block])
        for i, (row, value) in enumerate(zip(block, rewards.tolist()), start):
            done.append({**row, "seed": seed, "index": i, "reward": value, "checkpoint": maker})
            append_jsonl(path, done[-1])
    return np.array([row["reward"] for row in done]).reshape(len(prompts), args.num_samples)


def write_pairs(args, folder, prompts, scores, latents, model):
    """pairs.jsonl and pairs.safetensors, returned as well: winners' and losers' raw latents (P, L, C).

    Names: winner_mean, loser_mean; with --reencode they are posteriors, and winner_std, loser_std stand beside them.
    """
    winners, losers, kept = make_pairs(scores)
    if not kept.any():
        raise UserError(f"none of {len(prompts)} prompts makes a pair: all clips of a prompt score the same or "
                        "NaN; raise --num_samples, or check the CLAP of --reward")
    chosen = np.flatnonzero(kept)
    rows = [{"prompt": prompts[m]["prompt"], "duration": prompts[m]["duration"],
             "winner": f"candidates.safetensors#{m * args.num_samples + winners[m]}",
             "loser": f"candidates.safetensors#{m * args.num_samples + losers[m]}",
             "reward_winner": scores[m, winners[m]], "reward_loser": scores[m, losers[m]]} for m in chosen]
    write_jsonl(folder / "pairs.jsonl", rows)
    places = {"winner": chosen * args.num_samples + winners[chosen],
              "loser": chosen * args.num_samples + losers[chosen]}
    tensors = {}
    for which, place in places.items():
        mean = latents[torch.as_tensor(place)]
        if args.reencode:                              # through audio and VAE, as the official code
            tensors |= encode_all(model, which, len(rows), (
                audio for start in range(0, len(rows), ENCODED_AT_ONCE) for audio in decode(
                    model, mean[start:start + ENCODED_AT_ONCE],
                    [row["duration"] for row in rows[start:start + ENCODED_AT_ONCE]])))
        else:
            tensors[f"{which}_mean"] = mean
    save_tensors(folder / "pairs.safetensors", tensors)
    if not kept.all():
        warn(f"{(~kept).sum()} of {len(kept)} prompts make no pair (equal or NaN scores)")
    return rows, tensors


def static_pairs(args, folder, model):
    """The same two files from a static preference set (--pairs).

    A pair lasts as long as its winner, or as its row says.
    """
    rows, notes = read_pairs(args.pairs, args.audio_dir)
    for note in notes:
        warn(note)
    codec, tensors = model.codec, {}
    samples = round(model.flow.config["max_duration"] * codec.sampling_rate)

    def sounds(which):
        for row in rows:
            audio, seconds = load_clip({"audio": row[which], "duration": row["duration"]}, codec.sampling_rate,
                                       codec.audio_channels, samples, "start")
            if which == "winner":
                row["duration"] = seconds
            yield audio
    for which in ("winner", "loser"):
        tensors |= encode_all(model, which, len(rows), sounds(which))
    write_jsonl(folder / "pairs.jsonl", rows)
    save_tensors(folder / "pairs.safetensors", tensors)
    return rows, tensors


@torch.inference_mode()
def encode_all(model, which, count, audios, quiet=False):
    """`count` clips (channels, samples), an iterable -> {"WHICH_mean", "WHICH_std"}: posteriors (count, L, C).

    Each is filled up to the model's length with silence.
    """
    samples = round(model.flow.config["max_duration"] * model.codec.sampling_rate)
    device, pieces, audios = next(model.codec.parameters()).device, [], iter(audios)
    for _ in tqdm(range(0, count, ENCODED_AT_ONCE), desc=f"encoding {which}s", disable=quiet):
        batch = torch.stack([fit_audio(audio, samples, "start") for audio in itertools.islice(audios, ENCODED_AT_ONCE)])
        pieces.append([part[:, :model.flow.config["audio_seq_len"]].cpu()
                       for part in model.codec.encode(batch.to(device))])
    return {f"{which}_{name}": torch.cat(column) for name, column in zip(("mean", "std"), zip(*pieces))}
