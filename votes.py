"""Clips of known quality, and listeners who vote on them: the data behind a learned reward (second paper, III-C).

    python votes.py                                                  # 10,000 clips, 200,000 votes -> runs/votes
    python votes.py --votes 0 --scenes 4000 --takes 1 --seed 1 --out runs/scored    # clips alone, to be scored
    python votes.py --votes 0 --scenes 2000 --takes 1 --seed 2 --hum 0.3 --out runs/hum   # some of them hum

A scene of the world is played once and spoilt anew for each take (world.degrade: noise, clipping, band limit,
dropouts, reverberation; a tenth of the takes stay whole). The true quality of a take is exp(-damage / 10 dB), damage
being the mean difference of its log-mel to that of the whole one: 1 is untouched, 0 ruined. It stays in clips.jsonl.

Four sources vote "A is better than B", as the paper pools four. Each has habits: what it minds more than others, how
sharp it hears, when it calls a tie, how often its mind wanders, whether it compares takes of one prompt or of two. The
chance that a source prefers A is kept with the vote ("chance"), so that the best possible accuracy is known.

A hum (120 Hz and its harmonics, as of mains) is what the world lacks and no listener minds: quality is measured without
it. It plays the part of the vocals of the paper's III-D a (reward.py score_manifest --plus hum).
"""
import argparse
import math
import multiprocessing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from audio import write_wav
from common import (UserError, append_jsonl, check_writable, choose_device, derive_seed, in_range, parse_arguments,
                    read_json, read_jsonl, run_main, write_json, write_jsonl)
from vocoder import MEL_16K, LogMel, log_mel_error
from world import DEGRADATIONS, SAMPLE_RATE, World, degrade

SOFTNESS = 10.0         # dB of damage after which quality has fallen to 1 / e
WHOLE = 0.1             # share of takes that are not spoilt
BLOCK = 16              # scenes written at a time


# ----------------------------------------------------------------------------- true quality

def true_quality(clean, damaged, log_mel):
    """Audio (B, samples) before and after -> quality (B,) in (0, 1]: exp(-damage / SOFTNESS), damage in dB."""
    return torch.exp(-log_mel_error(log_mel(clean), log_mel(damaged)) / SOFTNESS)


def with_hum(audio, level, rng):
    """Audio (samples,) with a hum of `level` times its loudness: 120 Hz and harmonics, as of mains."""
    t = np.arange(len(audio)) / SAMPLE_RATE
    hum = sum(np.sin(2 * np.pi * 120 * k * t + rng.uniform(0, 2 * np.pi)) / k for k in range(1, 9))
    rms = np.sqrt(np.mean(audio ** 2)) + 1e-9
    out = audio + level * rms * hum / np.sqrt(np.mean(hum ** 2))
    return (out * min(1.0, 0.98 / np.abs(out).max())).astype(np.float32)


def takes_of(world, index, takes, hum, log_mel):
    """Takes of scene `index` -> audio (takes, samples) float32, rows {"caption", "duration", "quality", ...}.

    Each depends on (the world's settings, index, take) alone. `hum`: share of takes that hum.
    """
    clean, scene = world.render(index)
    audios, rows = [], []
    for take in range(takes):
        rng = np.random.default_rng(derive_seed("take", world.split, world.seed, index, take))
        kind, level = (None, 0.0) if rng.random() < WHOLE else (str(rng.choice(DEGRADATIONS)), float(rng.random()))
        audio = degrade(clean, kind, level, rng) if kind else clean
        quality = true_quality(*(torch.from_numpy(a)[None] for a in (clean, audio)), log_mel).item()
        loud = float(rng.uniform(0.3, 1.0)) if rng.random() < hum else 0.0
        audios.append(with_hum(audio, loud, rng) if loud else audio)
        rows.append({"caption": scene.prompt, "duration": scene.duration, "quality": quality, "hum": float(loud > 0),
                     "degradation": kind, "level": round(level, 4), "scene": index, "take": take})
    return np.stack(audios), rows


def _render(job):
    """One worker's scenes: a list of what takes_of gives."""
    torch.set_num_threads(1)
    settings, indices, takes, hum = job
    world, log_mel = World(**settings), LogMel(**MEL_16K)
    return [takes_of(world, index, takes, hum, log_mel) for index in indices]


def render_takes(settings, scenes, takes, hum=0.0, workers=2, size=BLOCK):
    """Yield (audio (B, 65536), rows) of blocks of `size` scenes, in order; `scenes` is a range, `settings` World's."""
    jobs = [(settings, scenes[i:i + size], takes, hum) for i in range(0, len(scenes), size)]
    with multiprocessing.get_context("spawn").Pool(min(workers, max(len(jobs), 1))) as pool:
        for parts in pool.imap(_render, jobs):
            yield np.concatenate([audio for audio, _ in parts]), [row for _, rows in parts for row in rows]


@torch.inference_mode()
def coded(codec, audio, rows, share, seed):
    """Send about `share` of the clips (N, 65536) through the codec, as generated ones are: -> (N, 65536).

    Which ones follows from (seed, scene, take); rows get "coded": 1 or 0.
    """
    chosen = [derive_seed("coded", seed, row["scene"], row["take"]) / 2 ** 63 < share for row in rows]
    for row, yes in zip(rows, chosen):
        row["coded"] = int(yes)
    if any(chosen):
        device, places = next(codec.parameters()).device, np.flatnonzero(chosen)
        mean, _ = codec.encode(torch.from_numpy(audio[places])[:, None].to(device))
        audio[places] = codec.decode(mean).cpu()[:, 0, :audio.shape[1]].numpy()
    return audio


# ----------------------------------------------------------------------------- listeners

@dataclass(frozen=True)
class Source:
    """How one source votes. Utility is quality less what it minds; a vote adds logistic noise of width `noise`."""
    noise: float                                # in units of quality
    tie: float                                  # a heard difference below this is a tie
    lapse: float                                # share of votes by chance
    minds: dict = field(default_factory=dict)   # degradation -> utility lost at full level
    one_prompt: bool = True                     # compares takes of one prompt, or of any two


SOURCES = {"studio": Source(0.12, 0.02, 0.0, {"clipping": 0.05}),
           "arena": Source(0.20, 0.04, 0.02, {"noise": 0.08}),
           "crowd": Source(0.28, 0.08, 0.06, {"dropouts": 0.08}, one_prompt=False),
           "archive": Source(0.18, 0.03, 0.02, {"reverberation": -0.08}, one_prompt=False)}


def chances(source, difference):
    """P(A is preferred), P(B is preferred) for utilities A - B = `difference`; the rest are ties."""
    def one(d):
        return source.lapse / 2 + (1 - source.lapse) / (1 + math.exp(min(50.0, (source.tie - d) / source.noise)))
    return one(difference), one(-difference)


def utility(source, row):
    """What a clip is worth to a source."""
    return row["quality"] - source.minds.get(row["degradation"], 0.0) * row["level"]


def cast_votes(clips, count, seed=0):
    """`count` votes on clips (rows with "audio" and the truth) -> rows {"prompt", "a", "b", "source", "preference"}.

    The sources take turns. preference: 1 A, 0 B, 0.5 a tie. "chance": P(A | no tie), what the source can't help.
    "prompt_b" where the two clips' prompts differ. Raises UserError if there is nothing to compare.
    """
    scenes = {}
    for row in clips:
        scenes.setdefault(row["scene"], []).append(row)
    groups, names, votes = [rows for rows in scenes.values() if len(rows) > 1], list(SOURCES), []
    if not groups or len(scenes) < 2:
        raise UserError("votes compare takes of a scene and takes of two: give at least 2 --takes and 2 --scenes")
    rng = np.random.default_rng(derive_seed("votes", seed))
    for i in range(count):
        name = names[i % len(names)]
        source = SOURCES[name]
        pool = groups[rng.integers(len(groups))] if source.one_prompt else clips
        first, other = rng.integers(len(pool)), rng.integers(len(pool) - 1)
        a, b = pool[first], pool[other + (other >= first)]
        for_a, for_b = chances(source, utility(source, a) - utility(source, b))
        draw = rng.random()
        vote = {"prompt": a["caption"], "a": a["audio"], "b": b["audio"], "source": name,
                "preference": 1.0 if draw < for_a else 0.0 if draw < for_a + for_b else 0.5,
                "chance": for_a / (for_a + for_b)}
        votes.append(vote if a["caption"] == b["caption"] else {**vote, "prompt_b": b["caption"]})
    return votes


# ----------------------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(group, name, default, what, **more):
        group.add_argument(name, default=default, type=type(default), help=f"{what} (default: %(default)s)", **more)
    group = parser.add_argument_group("clips")
    flag(group, "--scenes", 5000, "of the world, each with a prompt of its own")
    flag(group, "--takes", 2, "of each scene, spoilt in different ways")
    flag(group, "--seed", 0, "of scenes, damage and votes; scenes are those of World(seed=5000 + seed)")
    flag(group, "--split", "train", "whose recorded sounds", choices=("train", "val", "test"))
    flag(group, "--hum", 0.0, "share of clips that hum, which changes neither quality nor votes")
    flag(group, "--through_codec", 0.5, "share of clips that go through the codec, as generated ones do")
    group = parser.add_argument_group("votes")
    flag(group, "--votes", 200000, "0: clips alone; paper: about 22,000 pairs")
    group = parser.add_argument_group("where and how")
    flag(group, "--codec", "checkpoints/toy/base", "folder with the codec")
    flag(group, "--out", "runs/votes", "clips/, clips.jsonl, votes.jsonl; a folder begun there is gone on with")
    flag(group, "--workers", 2, "processes that render")
    flag(group, "--device", "auto", "auto, cuda, mps or cpu")
    args = parse_arguments(parser, argv)
    for name, low, high in (("scenes", 1, 1e7), ("takes", 1, 1000), ("seed", 0, 2 ** 50), ("hum", 0, 1),
                            ("through_codec", 0, 1), ("votes", 0, 1e8), ("workers", 1, 256)):
        in_range(f"--{name}", getattr(args, name), low, high)
    if args.votes and (args.takes < 2 or args.scenes < 2):
        raise UserError("votes compare takes of a scene and takes of two: give at least 2 --takes and 2 --scenes, or "
                        "--votes 0 for the clips alone")
    return args


def make_clips(args, codec):
    """clips/*.wav and clips.jsonl, gone on with where a kill stopped; returns the rows."""
    out, path = Path(args.out), Path(args.out) / "clips.jsonl"
    settings = {name: getattr(args, name) for name in ("scenes", "takes", "seed", "split", "hum", "through_codec")}
    if (out / "settings.json").is_file():
        started = read_json(out / "settings.json")
        for name, value in settings.items():
            if started.get(name) != value:
                raise UserError(f"the clips in {out} were made with {name} = {started.get(name)}, now it is {value}; "
                                "give the same flags to go on, or another --out")
    write_json(out / "settings.json", settings)
    done = read_jsonl(path) if path.is_file() else []
    whole = len(done) // (BLOCK * args.takes) * BLOCK if len(done) < args.scenes * args.takes else args.scenes
    done = done[:whole * args.takes]
    write_jsonl(path, done)
    world = {"split": args.split, "seed": 5000 + args.seed, "pairs": "all" if args.split != "train" else "seen"}
    blocks = render_takes(world, range(whole, args.scenes), args.takes, args.hum, args.workers)
    with tqdm(total=args.scenes * args.takes, initial=len(done), desc="clips", unit="clip") as bar:
        for audio, rows in blocks if whole < args.scenes else ():
            for clip, row in zip(coded(codec, audio, rows, args.through_codec, args.seed), rows):
                name = f"clips/{row['scene']:06d}_{row['take']:02d}.wav"
                write_wav(out / name, torch.from_numpy(clip[:int(row["duration"] * SAMPLE_RATE)]), SAMPLE_RATE)
                done.append({"audio": name, **row})
                append_jsonl(path, done[-1])
            bar.update(len(rows))
    return done


def main(argv=None):
    args = parse_args(argv)
    from vae import load_codec
    check_writable([Path(args.out) / "clips.jsonl", Path(args.out) / "clips" / "x"])
    clips = make_clips(args, load_codec(args.codec, choose_device(args.device)))
    quality = np.array([row["quality"] for row in clips])
    print(f"{len(clips)} clips, quality {quality.mean():.3f} on average (5 %: {np.percentile(quality, 5):.3f}, 95 %: "
          f"{np.percentile(quality, 95):.3f})")
    if args.votes:
        votes = cast_votes(clips, args.votes, args.seed)
        write_jsonl(Path(args.out) / "votes.jsonl", votes)
        best = np.mean([max(vote["chance"], 1 - vote["chance"]) for vote in votes if vote["preference"] != 0.5])
        ties = np.mean([vote["preference"] == 0.5 for vote in votes])
        print(f"{len(votes)} votes, {100 * ties:.0f} % ties; knowing each source's mind, {100 * best:.1f} % of the "
              "others can be foretold")
    print(f"wrote {args.out}: clips.jsonl{', votes.jsonl' * bool(args.votes)}, clips/")
    print(f"next: python reward.py train_ranker --votes {args.out}/votes.jsonl" if args.votes else
          f"next: python reward.py score_manifest --data {args.out}/clips.jsonl --ranker runs/ranker")


if __name__ == "__main__":
    run_main(main)
