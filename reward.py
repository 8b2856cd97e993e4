"""The reward: CLAP scores of many clips, ranking, and pairs of winner and loser (paper 2.5, A.3).

    python reward.py score --audio out/0000_a-violin.wav --prompt "a violin followed by rain"
    python reward.py score --audio a.wav --prompt "three beeps" --clap laion/clap-htsat-unfused     # the paper's
    python reward.py train_clap                                          # the one that ranks -> runs/clap_reward
    python reward.py train_clap --seed 1 --width 104 --text_width 144 --out runs/clap_judge      # the one that judges
    python reward.py train_ranker --votes runs/votes/votes.jsonl         # from votes (second paper) -> runs/ranker
    python reward.py score_manifest --data runs/scored/clips.jsonl       # its scores as a column -> scored.jsonl

The CLAP that ranks never judges, as in the paper. Where the official code differs, we do this: scores are not
rounded (its three decimals turn near ties into pairs by position); a prompt whose clips all score the same, or score
NaN, makes no pair and is counted (it made pairs of a clip with itself); all N scores of a prompt are kept.

Letters: M prompts, N clips of each.
"""
import argparse
import os
import re
from pathlib import Path

import numpy as np

from common import UserError, choose_device, in_range, parse_arguments, read_json, read_jsonl, run_main

HERE = Path(__file__).resolve().parent
REWARD = HERE / "checkpoints" / "toy" / "base" / "clap_reward"
JUDGE = HERE / "checkpoints" / "toy" / "base" / "clap_judge"
PROMPT_KEYS, WINNER_KEYS, LOSER_KEYS = ("prompt", "captions", "caption"), ("winner", "chosen"), (
    "loser", "reject", "rejected")       # this project's, then TangoFlux's


# ----------------------------------------------------------------------------- ranking

def best_of(scores):
    """Index of the best clip of each prompt, scores (M, N) -> (M,); of equals the first; NaN never wins.

    Raises UserError if a prompt has only NaN.
    """
    scores = np.asarray(scores, dtype=float)
    empty = np.flatnonzero(np.isnan(scores).all(1))
    if len(empty):
        raise UserError(f"all rewards of prompt {empty[0]} are NaN; is its audio silent or the CLAP broken?")
    return np.nanargmax(scores, axis=1)


def make_pairs(scores):
    """Best and worst clip of each prompt (paper 2.5), scores (M, N).

    -> winners (M,), losers (M,), kept (M,) bool. Of equal scores the first counts, as in the official code. Not kept
    are prompts with NaN among their scores and those whose best clip is not above their worst.
    """
    scores = np.asarray(scores, dtype=float)
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise UserError(f"pairs need at least 2 clips of each prompt, not {scores.shape[-1]}; raise --num_samples")
    usable = ~np.isnan(scores).any(1)
    filled = np.where(usable[:, None], scores, 0.0)
    winners, losers = filled.argmax(1), filled.argmin(1)
    margin = np.take_along_axis(filled, winners[:, None], 1) - np.take_along_axis(filled, losers[:, None], 1)
    return winners, losers, usable & (margin[:, 0] > 0)


# ----------------------------------------------------------------------------- static preference sets

def read_pairs(path, audio_dir=None):
    """A static preference set -> (rows {"prompt", "duration" or None, "winner", "loser"}, notes on what was left out).

    `path`: this project's own format, JSON lines of prompt, duration, winner, loser (audio files; the duration may be
    absent), or TangoFlux's JSON with captions, chosen and reject (Audio-Alpaca), as a list or a line each. Not the
    pairs.jsonl that crpo.py makes of its own clips: those are latents. Sounds are looked for in `audio_dir`, default
    the file's folder. Rows whose sounds are missing or the same are left out and counted; UserError if none remains or
    a row is neither of these.
    """
    path = Path(path)
    rows = read_json_rows(path)
    folder, pairs, left_out = Path(audio_dir) if audio_dir else path.parent, [], {"missing": [], "equal": []}
    for number, row in enumerate(rows, 1):
        prompt, duration, *sounds = read_row(row, f"{path} row {number}")
        winner, loser = (folder / sound for sound in sounds)
        if winner == loser:
            left_out["equal"].append(number)
        elif not (winner.is_file() and loser.is_file()):
            left_out["missing"].append(f"{number} ({winner if not winner.is_file() else loser})")
        else:
            pairs.append({"prompt": prompt, "duration": duration, "winner": str(winner), "loser": str(loser)})
    notes = [f"{path}: {len(left_out[key])} of {len(rows)} rows left out, {why}; first: row {left_out[key][0]}"
             for key, why in (("missing", "a sound is missing"), ("equal", "winner and loser are one file"))
             if left_out[key]]
    if not pairs:
        raise UserError("; ".join(notes) or f"{path} holds no pairs")
    return pairs, notes


def read_row(row, where):
    """A row of a preference set -> prompt, duration (s) or None, winner, loser; a UserError begins with `where`."""
    found = []
    for keys in (PROMPT_KEYS, WINNER_KEYS, LOSER_KEYS):
        found.append(next((row[key] for key in keys if isinstance(row, dict) and isinstance(row.get(key), str)), None))
        if found[-1] is None:
            raise UserError(f"{where} has no {' or '.join(keys)}; a row looks like "
                            '{"prompt": "...", "duration": 3.0, "winner": "a.wav", "loser": "b.wav"}')
    prompt, *sounds = found
    for sound in sounds:
        if re.search(r"\.safetensors#\d+$", sound):          # as preferences.write_pairs names them
            raise UserError(f"{where}: {sound} is latents in a run of crpo.py, not an audio file; name audio files, or "
                            "give that run's folder as --out to go on with its own pairs")
    duration = row.get("duration")
    if not isinstance(duration, (int, float, type(None))) or (duration is not None and not 0 < duration < 1e6):
        raise UserError(f"{where}: duration {duration!r} is not a positive number of seconds")
    return prompt, duration, *sounds


def read_json_rows(path):
    """The rows of a JSON file: a list, or one object a line (as TangoFlux's own files are)."""
    try:
        rows = read_json(path)
    except UserError:
        if not path.is_file():
            raise
        rows = [] if path.read_bytes().lstrip().startswith(b"[") else read_jsonl(path)
        if not rows:                                    # read_jsonl drops a torn last line, here the only one
            raise UserError(f"{path} is empty or not whole JSON; download or write it again") from None
    return rows if isinstance(rows, list) else [rows]


# ----------------------------------------------------------------------------- command line

def score(args):
    """Print the CLAP score of each --audio with its --prompt."""
    from audio import probe_audio, read_audio
    from clap import load_clap
    prompts = args.prompt * len(args.audio) if len(args.prompt) == 1 else args.prompt
    if len(prompts) != len(args.audio):
        raise UserError(f"{len(args.prompt)} --prompt for {len(args.audio)} --audio; give one, or one each")
    for path in args.audio:
        probe_audio(path)                       # a missing one is told before the CLAP is loaded
    clap = load_clap(args.clap, choose_device(args.device))
    rate = clap.front.sampling_rate
    for path, prompt in zip(args.audio, prompts):
        value = clap.scores([read_audio(path, rate, 1)], rate, [prompt]).item()
        print(f"{value:.6f}  {path}: {prompt[:100]}")
    print('next: python sample.py --prompt "a violin followed by rain" --best_of 5 lets this score choose')


def train_clap(args):
    """Train a small CLAP on the world."""
    check_training_flags(args)
    import train_clap as training
    finished = training.train(args)
    print(f"wrote {args.out}: model.safetensors, config.json, preprocessor_config.json, tokenizer.json, log.jsonl"
          + ("" if finished else "; stopped early, the same command goes on"))
    print(f'next: python reward.py score --clap {args.out} --audio FILE --prompt "rain"')


def train_ranker(args):
    """Train the pairwise ranker on votes and report what it is worth on held-out ones."""
    import ranker as learned
    from common import check_writable, write_json, write_jsonl
    for name, low, high in (("epochs", 1, 10000), ("batch_size", 2, 1e6), ("learning_rate", 1e-8, 1),
                            ("weight_decay", 0, 10), ("dropout", 0, 0.95), ("seed", 0, 2 ** 62)):
        in_range(f"--{name}", getattr(args, name), low, high)
    for width in args.widths:
        in_range("--widths", width, 1, 100000)
    out = Path(args.out)
    check_writable([out / "ranker.safetensors", out / "features" / "x"])
    clips, votes = learned.read_votes(args.votes, args.audio_dir)
    device = choose_device(args.device)
    encoders = learned.Encoders(args.clap, args.encoder, device)
    features = learned.clip_features(encoders, clips, out / "features")
    parts = learned.split_votes(clips, votes, args.seed)
    print(f"{len(clips)} clips, features {features.shape[1]} wide; {len(parts[0])} training, {len(parts[1])} "
          f"validation and {len(parts[2])} test votes, split by prompt")
    network, log = learned.fit(features, votes, parts, args.widths, args.dropout, args.epochs, args.batch_size,
                               args.learning_rate, args.weight_decay, args.seed, device)
    found = learned.report(network, features, votes, parts[2], true_quality(clips, args))
    learned.save_ranker(out, network, encoders.names, encoders.key())
    write_json(out / "report.json", found)
    write_jsonl(out / "log.jsonl", log)
    import torch
    with torch.no_grad():
        utility = network.utility(features.to(device)).cpu().numpy()
    drawn = learned.draw_calibration(out / "calibration.png", utility, votes, parts[2])
    print(f"held-out votes: accuracy {found['accuracy']:.3f}" + (
        f" (ceiling {found['ceiling']:.3f}: what the sources' own noise allows)" if "ceiling" in found else "")
        + f", expected calibration error {found['calibration error']:.3f}" + (
        f"; rank correlation with the true quality {found['spearman']:.3f}" if "spearman" in found else ""))
    print(f"wrote {out}: ranker.safetensors, report.json, log.jsonl{', calibration.png' * drawn}, features/")
    print(f"next: python reward.py score_manifest --data runs/scored/clips.jsonl --ranker {out}")


def true_quality(clips, args):
    """The clips' quality (N,) from the clips.jsonl beside the votes, or None where it is not known."""
    path = Path(args.votes).parent / "clips.jsonl"
    if not path.is_file():
        return None
    known = {str(path.parent / row["audio"]): row["quality"] for row in read_jsonl(path) if "quality" in row}
    found = [known.get(row["audio"]) for row in clips]
    return None if None in found else np.array(found)


def score_manifest(args):
    """Write a manifest again with a column of scores."""
    import ranker as learned
    from common import check_writable, write_jsonl
    from data import read_manifest, read_table, usable_rows
    out = Path(args.out) if args.out else Path(args.data).parent / "scored.jsonl"
    if out.suffix != ".jsonl" or out.resolve() == Path(args.data).resolve():
        raise UserError(f"--out {out} must be another file than --data, and end in .jsonl")
    check_writable([out])
    rows, table = read_manifest(args.data, audio_dir=args.audio_dir), read_table(args.data)
    plus = {}
    for name, weight in args.plus or []:
        try:
            plus[name] = [float(weight) * float(row[name]) for row in table]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"--plus {name} {weight}: {args.data} has no column {name} of numbers, or {weight} is "
                            "none") from None
    usable = {row["audio"] for row in usable_rows(rows)}
    places = [i for i, row in enumerate(rows) if row["audio"] in usable]
    judged = learned.Judged(args.ranker, choose_device(args.device))
    keep = out.parent / f"features_{out.stem}"
    scores = judged.of(learned.clip_features(judged.encoders, [rows[i] for i in places], keep)).tolist()
    scored = []
    for i, score in zip(places, scores):
        row = {**table[i], "audio": os.path.relpath(rows[i]["audio"], out.parent), "caption": rows[i]["caption"],
               args.column: score}
        scored.append(row | {f"{args.column}_plus_{name}": score + values[i] for name, values in plus.items()})
    write_jsonl(out, scored)
    low, middle, high = np.percentile(scores, [5, 50, 95])
    print(f"wrote {out}: {len(scored)} rows with {args.column} (5 %: {low:.2f}, median {middle:.2f}, 95 %: {high:.2f})"
          + "".join(f" and {args.column}_plus_{name}" for name in plus))
    print(f"next: python train_fm.py --checkpoint checkpoints/toy/base --data {out} --score_column {args.column} "
          "--steps 1000 --learning_rate 1e-3 --out runs/score")


def check_training_flags(args):
    """UserError for flags of train_clap that are out of range or do not fit each other."""
    limits = {"scenes": (1, 1e7), "val_scenes": (64, 1e6), "scene_seed": (0, 2 ** 62), "degraded": (0, 1),
              "family": (1, 64), "workers": (1, 256), "seed": (0, 2 ** 62), "width": (8, 1024),
              "text_width": (4, 4096), "steps": (1, 1e7), "batch_size": (2, 4096), "learning_rate": (1e-8, 1),
              "muon": (0, 1000), "weight_decay": (0, 1), "reading_weight": (0, 1000), "hearing_weight": (0, 1000),
              "val_every": (1, 1e9), "max_minutes": (0, 1e6)}
    for name, (low, high) in limits.items():
        if getattr(args, name) is not None:
            in_range(f"--{name}", getattr(args, name), low, high)
    if args.width % 8 or args.text_width % 4:
        raise UserError("--width must be a multiple of 8 and --text_width of 4")
    if args.batch_size % args.family:
        raise UserError(f"--batch_size {args.batch_size} must be a multiple of --family {args.family}")
    if args.scenes < args.batch_size:
        raise UserError(f"--scenes {args.scenes} do not fill one batch of --batch_size {args.batch_size}; give more, "
                        "or a smaller batch")


def make_parser():
    """-> the parser and its two subparsers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    one = commands.add_parser("score", help="the score of audio files",
                              description="How well audio fits a text: the cosine of CLAP's embeddings.")
    one.add_argument("--audio", action="append", required=True, help="a sound file; may be repeated")
    one.add_argument("--prompt", action="append", required=True, help="one for all files, or one each")
    one.add_argument("--clap", default=str(REWARD), help="folder or hub id of a ClapModel (default: the bundled "
                     "clap_reward; paper: laion/clap-htsat-unfused)")
    one.set_defaults(run=score)
    two = commands.add_parser("train_clap", help="train a small CLAP on the built-in world",
                              description="A small ClapModel from scratch on scenes of the built-in world.")

    def flag(group, name, default, what, kind=None, **more):
        group.add_argument(name, default=default, type=kind or type(default), help=f"{what} (default: %(default)s)",
                           **more)
    group = two.add_argument_group("where")
    flag(group, "--out", "runs/clap_reward", "run folder; a run found there is resumed")
    flag(group, "--max_minutes", None, "stop training after so many; the same command goes on", float)
    flag(group, "--dtype", "auto", "of the forward pass", choices=("auto", "float32", "bfloat16"))
    group = two.add_argument_group("scenes")
    flag(group, "--scenes", 40000, "training scenes, kept as log-mels in --out and in memory")
    flag(group, "--val_scenes", 1024, "held-out scenes")
    flag(group, "--scene_seed", 3000, "the scenes are those of World(seed=scene_seed + seed)")
    flag(group, "--degraded", 0.25, "share of degraded scenes")
    flag(group, "--family", 4, "of so many scenes each that are almost the same; 1: all different")
    flag(group, "--workers", 2, "processes that render")
    group = two.add_argument_group("network and optimizer")
    flag(group, "--seed", 0, "initial weights, batches, captions and augmentation")
    flag(group, "--width", 112, "of the audio tower's first stage; a multiple of 8")
    flag(group, "--text_width", 128, "of the text tower; a multiple of 4")
    flag(group, "--steps", 6000, "optimizer steps")
    flag(group, "--batch_size", 48, "clips per step")
    flag(group, "--learning_rate", 2e-3, "peak of AdamW's rate; warm-up, then cosine to zero")
    flag(group, "--muon", 10.0, "the layers' matrices are trained by Muon at this times the rate; 0: AdamW for all")
    flag(group, "--weight_decay", 0.05, "of AdamW, and at --muon times the rate of Muon")
    flag(group, "--reading_weight", 0.5, "of telling events, places and counts from each tower")
    flag(group, "--hearing_weight", 0.5, "of telling what sounds when, and its strikes, from the audio tower's grid")
    flag(group, "--val_every", 250, "steps between checks on held-out scenes")
    two.set_defaults(run=train_clap)
    three = commands.add_parser("train_ranker", help="train the pairwise ranker on votes",
                                description="A score per clip from votes A against B (second paper, III-C).")
    group = three.add_argument_group("what it learns from")
    flag(group, "--votes", "runs/votes/votes.jsonl", "rows of prompt, a, b, source, preference; python votes.py makes "
         "them; paper: four sources, 22,000 pairs")
    flag(group, "--audio_dir", None, "where its sounds are; None: beside the file", str)
    group = three.add_argument_group("what it hears with")
    flag(group, "--clap", str(REWARD.relative_to(HERE)), "folder or hub id of a ClapModel; paper: LAION-CLAP-Music")
    flag(group, "--encoder", str(REWARD.parent.relative_to(HERE)), "folder with the world's second tagger, or an audio "
         "model of transformers; paper: m-a-p/MERT-v1-330M")
    group = three.add_argument_group("network and optimizer")
    group.add_argument("--widths", type=int, nargs="+", default=[1024, 512, 256, 128],
                       help="of the layers before the last (default, as the paper: 1024 512 256 128)")
    flag(group, "--dropout", 0.5, "paper: 0.5")
    flag(group, "--epochs", 8, "the one with the lowest validation loss is kept")
    flag(group, "--batch_size", 1024, "votes")
    flag(group, "--learning_rate", 2e-3, "peak of AdamW's rate; cosine to zero")
    flag(group, "--weight_decay", 1e-2, "of AdamW")
    flag(group, "--seed", 0, "of the split, the weights, order and dropout")
    flag(group, "--out", "runs/ranker", "where it goes; features found there are used again")
    three.set_defaults(run=train_ranker)
    four = commands.add_parser("score_manifest", help="write a column of scores into a manifest",
                               description="The ranker's score of every clip of a manifest, as a column of a copy.")
    flag(four, "--data", "runs/scored/clips.jsonl", "manifest of audio and captions")
    flag(four, "--audio_dir", None, "where its sounds are; None: beside the file", str)
    flag(four, "--ranker", "runs/ranker", "folder of train_ranker")
    flag(four, "--out", None, "the copy; None: scored.jsonl beside the manifest", str)
    flag(four, "--column", "score", "name of the new column")
    four.add_argument("--plus", nargs=2, action="append", metavar=("COLUMN", "WEIGHT"),
                      help="a second new column, NAME_plus_COLUMN: the score and WEIGHT times what COLUMN says, a "
                      "reward that partly tracks something else (paper III-D a: vocals)")
    four.set_defaults(run=score_manifest)
    for one_parser in (one, two, three, four):
        flag(one_parser, "--device", "auto", "auto, cuda, mps or cpu")
    return parser, (one, two, three, four)


def main(argv=None):
    parser, commands = make_parser()
    args = parse_arguments(parser, argv, commands)
    args.run(args)


if __name__ == "__main__":
    run_main(main)
