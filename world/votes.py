"""Clips of known quality, and listeners who vote on them: the data behind a learned reward.

    python -m world.votes                       # 10,000 clips, 200,000 votes -> runs/votes
    python -m world.votes --votes 0 --scenes 4000 --takes 1 --seed 1 --out runs/scored
    python -m world.votes --votes 0 --scenes 2000 --takes 1 --seed 2 --hum 0.3 --out runs/hum

A scene is played once and spoilt anew for each take (a tenth stay whole). Four sources vote "A is
better than B" (second paper, III-C). Each has habits; a vote keeps the chance that its source
prefers A: the best accuracy is known. A hum (120 Hz and harmonics, as of mains), which no listener
minds, is added after the quality is measured: it plays the vocals of III-D a. B, N clips.
"""
import math
from collections import defaultdict, namedtuple
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.audio import write_wav
from lib.common import (BASE, DEVICE, UserError, append_jsonl, check_settings, choose_device,
                        derive_seed, flag, locked, parse_flags, pick, read_json, run_main,
                        whole_blocks, write_json, write_jsonl)
from lib.mel import MEL_16K, LogMel, log_mel_error
from lib.weights import module_hash
from vae import load_codec
from world.scenes import World, in_workers
from world.sounds import DEGRADATIONS, SAMPLE_RATE, degrade, rms, seconds

WORKERS = flag("--workers", 2, "processes that render", 0, 256)
FLAGS = {"clips": [
    flag("--scenes", 5000, "scenes of the world", 1, 1e7),
    flag("--takes", 2, "takes of each scene, spoilt in different ways", 1, 1000),
    flag("--seed", 0, "seed of damage, votes and World(seed=5000 + seed)", 0, 1e15),
    flag("--hum", 0.0, "share of clips that hum", 0, 1),
    flag("--through_codec", 0.5, "share of clips through the codec", 0, 1)], "votes and where": [
    flag("--votes", 200000, "number of votes (paper: 22,000)", 0, 1e8),
    flag("--codec", str(BASE), "folder with the codec"),
    flag("--out", "runs/votes", "folder of clips/, clips.jsonl, votes.jsonl; one begun goes on"),
    WORKERS, DEVICE]}
BLOCK = 16  # scenes rendered and written at a time
Clips = namedtuple("Clips", "scenes takes seed hum through_codec")  # what clips depend on


def true_quality(clean, damaged, log_mel):
    """Audio (B, samples) before and after -> exp(-damage / 10 dB) (B,): 1 untouched, 0 ruined."""
    return torch.exp(-log_mel_error(log_mel(clean), log_mel(damaged)) / 10)


def with_hum(audio, level, rng):
    """Audio (samples,) with a hum of `level` times its loudness."""
    k = np.arange(1, 9)[:, None]        # harmonics
    phases = rng.uniform(0, 2 * np.pi, (8, 1))
    angles = 2 * np.pi * 120 * k * seconds(len(audio)) + phases
    hum = (np.sin(angles) / k).sum(0)
    audio = audio + level * rms(audio) * hum / np.sqrt(np.mean(hum ** 2))
    return (audio * min(1.0, 0.98 / np.abs(audio).max())).astype(np.float32)


def render_block(settings, takes, hum, indices):
    """Takes of the scenes `indices` of World(**settings), of which a share `hum` hums -> audio
    (B, 65536), rows of clips.jsonl."""
    world, log_mel = World(**settings), LogMel(**MEL_16K)
    audios, rows = [], []
    for index in indices:
        clean, scene = world.render(index)
        for take in range(takes):
            seed = derive_seed("take", world.split, world.seed, index, take)
            rng = np.random.default_rng(seed)
            audio, kind, level = clean, None, 0.0
            if rng.random() >= 0.1:
                kind = str(rng.choice(DEGRADATIONS))
                level = float(rng.random())
                audio = degrade(audio, kind, level, rng)
            pair = torch.from_numpy(np.stack([clean, audio]))
            quality = true_quality(pair[:1], pair[1:], log_mel).item()
            hums = rng.random() < hum
            if hums:
                audio = with_hum(audio, rng.uniform(0.3, 1.0), rng)
            audios.append(audio)
            rows.append({"caption": scene.prompt, "duration": scene.duration, "quality": quality,
                         "hum": float(hums), "degradation": kind, "level": round(level, 4),
                         "scene": index, "take": take})
    return np.stack(audios), rows


def render_takes(settings, scenes, takes, hum, workers):
    """What render_block gives, of block after block of the range `scenes`."""
    blocks = [scenes[start:start + BLOCK] for start in range(0, len(scenes), BLOCK)]
    render = partial(render_block, settings, takes, hum)
    return in_workers(render, blocks, workers, "clips", f" x {BLOCK} scenes")


@torch.inference_mode()
def coded(codec, audio, rows, share, seed):
    """Send a `share` of clips (N, 65536), by (seed, scene, take), through the codec, in place."""
    for row in rows:
        draw = derive_seed("coded", seed, row["scene"], row["take"])
        row["coded"] = int(draw / 2 ** 63 < share)
    places = np.flatnonzero([row["coded"] for row in rows])
    if len(places):
        clips = torch.from_numpy(audio[places])[:, None].to(codec.latent_mean.device)
        mean, _ = codec.encode(clips)
        audio[places] = codec.decode(mean).cpu()[:, 0, :audio.shape[1]]
    return audio


class Source(NamedTuple):
    """How one source votes: utility is quality less what it minds; a vote adds logistic noise."""
    noise: float        # width of the noise, in units of quality
    tie: float          # a heard difference below this is a tie
    lapse: float        # share of votes by chance
    minds: str          # a degradation, at full level worth ...
    cost: float         # ... so much utility
    one_prompt: bool    # compares takes of one prompt, or of any two

    def utility(self, row):
        """What a clip is worth to this source."""
        minded = row["level"] if row["degradation"] == self.minds else 0.0
        return row["quality"] - self.cost * minded

    def prefers(self, gain):
        """P(A is preferred to B) where the utility of A is higher by `gain`."""
        odds = math.exp(min(50.0, (self.tie - gain) / self.noise))
        return self.lapse / 2 + (1 - self.lapse) / (1 + odds)


SOURCES = {"studio": Source(0.12, 0.02, 0.0, "clipping", 0.05, True),
           "arena": Source(0.20, 0.04, 0.02, "noise", 0.08, True),
           "crowd": Source(0.28, 0.08, 0.06, "dropouts", 0.08, False),
           "archive": Source(0.18, 0.03, 0.02, "reverberation", -0.08, False)}


def cast_votes(clips, count, seed):
    """`count` votes on clips (rows with "audio" and the truth), by each source in turn.
    preference: 1 A, 0 B, 0.5 a tie; chance: P(A | no tie), all that can be predicted."""
    scenes = defaultdict(list)
    for row in clips:
        scenes[row["scene"]].append(row)
    groups = [rows for rows in scenes.values() if len(rows) > 1]
    if not groups or len(scenes) < 2:
        raise UserError("votes need at least 2 --takes and 2 --scenes; --votes 0 makes clips alone")
    rng = np.random.default_rng(derive_seed("votes", seed))
    votes = []
    for name, source in islice(cycle(SOURCES.items()), count):
        pool = groups[rng.integers(len(groups))] if source.one_prompt else clips
        first, other = rng.integers(len(pool)), rng.integers(len(pool) - 1)
        a, b = pool[first], pool[other + (other >= first)]
        gain = source.utility(a) - source.utility(b)
        for_a, for_b = source.prefers(gain), source.prefers(-gain)
        draw = rng.random()
        preference = 0.5
        if draw < for_a + for_b:
            preference = 1.0 if draw < for_a else 0.0
        vote = {"prompt": a["caption"], "a": a["audio"], "b": b["audio"], "source": name,
                "preference": preference, "chance": for_a / (for_a + for_b)}
        if a["caption"] != b["caption"]:
            vote["prompt_b"] = b["caption"]
        votes.append(vote)
    return votes


def make_clips(out, settings, codec, workers):
    """clips/*.wav and clips.jsonl in `out`, continued where a kill stopped; returns the rows."""
    started = out / "settings.json"
    made_from = settings._asdict()
    if settings.through_codec:
        made_from["codec"] = module_hash(codec)
    if started.is_file():
        check_settings(out, read_json(started, dict), made_from)
    write_json(started, made_from)
    scenes, takes, seed, hum, share = settings
    done = whole_blocks(out / "clips.jsonl", BLOCK * takes, scenes * takes)
    rest = range(len(done) // takes, scenes)
    world = {"split": "train", "seed": 5000 + seed}
    for audio, rows in render_takes(world, rest, takes, hum, workers):
        for clip, row in zip(coded(codec, audio, rows, share, seed), rows):
            name = f"clips/{row['scene']:06d}_{row['take']:02d}.wav"
            clip = torch.from_numpy(clip[:int(row["duration"] * SAMPLE_RATE)])
            write_wav(out / name, clip, SAMPLE_RATE)
            done.append({"audio": name, **row})
            append_jsonl(out / "clips.jsonl", done[-1])
    return done


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    out = Path(args.out)
    with locked(out):
        codec = load_codec(args.codec, choose_device(args.device))
        clips = make_clips(out, pick(Clips, args), codec, args.workers)
        if args.votes:
            write_jsonl(out / "votes.jsonl", cast_votes(clips, args.votes, args.seed))
    following = f"python ranker.py --data {out}/clips.jsonl"
    if args.votes:
        following = f"python -m world.train_ranker --votes {out}/votes.jsonl"
    print(f"wrote {len(clips)} clips into {out}; next: {following}")


if __name__ == "__main__":
    run_main(main)
