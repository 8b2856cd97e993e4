"""Training of the ranker: votes "A is better than B" become a number per clip (2nd paper, III-C).

    python -m world.train_ranker --votes runs/votes/votes.jsonl     # of world.votes -> runs/ranker
    python ranker.py --data runs/scored/clips.jsonl  # what it is for

Where the paper is silent: votes are split by prompt, the epoch with the lowest validation loss is
kept, features and scores are standardised. N clips, P votes, B batch, W width of the features.
"""
import json
import math
import os
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from lib.common import (BASE, DEVICE, UserError, choose_device, derive_seed, flag, generator,
                        locked, parse_flags, pick, read_jsonl, reading, run_main, warn,
                        write_json, write_jsonl)
from lib.weights import learning_rate, save_tensors, set_rate
from world.ears import spearman
from reward import REWARD
from ranker import AUDIO_DIR, Encoders, Ranker, clip_features, ranknet_loss

FLAGS = {"what it learns from": [
    flag("--votes", "runs/votes/votes.jsonl", "of world.votes (paper: 4 sources, 22,000 pairs)"),
    flag("--clap", str(REWARD), "a CLAP (second paper: LAION-CLAP-Music)"), AUDIO_DIR, DEVICE,
    flag("--encoder", str(BASE), "folder with a tagger or audio model (paper: m-a-p/MERT-v1-330M)"),
    flag("--out", "runs/ranker", "run folder; features found there are used")], "training": [
    flag("--widths", [1024, 512, 256, 128], "of its layers (paper: these)", 1, nargs="+"),
    flag("--dropout", 0.5, "share of units dropped (second paper: 0.5)", 0, 0.95),
    flag("--epochs", 8, "passes over the votes", 1),
    flag("--batch_size", 1024, "votes", 2),
    flag("--learning_rate", 2e-3, "peak of AdamW's rate; cosine to zero", 0, 1),
    flag("--weight_decay", 1e-2, "of AdamW", 0, 10),
    flag("--seed", 0, "of split, weights, order and dropout", 0, 2 ** 62)]}
Fit = namedtuple("Fit", "widths dropout epochs batch_size learning_rate weight_decay seed")
# arrays (P,): places of clips A and B, 1: A is better, 0: B, 0.5: a tie, the chance of A if known
Votes = namedtuple("Votes", "a b preference chance source")
VOTE = 'a vote is {"prompt": "...", "a": "x.wav", "b": "y.wav", "source": "s1", "preference": 0.5}'


def read_votes(path, audio_dir=None):
    """votes.jsonl -> (clips [{"audio", "caption"}], Votes); votes on missing files are left out."""
    folder = Path(audio_dir or Path(path).parent)
    rows = read_jsonl(path)
    places, votes = {}, []  # {(file, prompt): place}
    with reading(path, VOTE):
        for row in rows:
            chance = row.get("chance", math.nan)
            if row["preference"] not in (0, 0.5, 1) or not isinstance(chance, (int, float)):
                raise ValueError(f"a preference is {row['preference']}, its chance {chance!r}")
            prompt, source = str(row["prompt"]), str(row["source"])
            if os.path.isfile(folder / row["a"]) and os.path.isfile(folder / row["b"]):
                a = places.setdefault((row["a"], prompt), len(places))
                b = places.setdefault((row["b"], str(row.get("prompt_b", prompt))), len(places))
                votes.append((a, b, row["preference"], chance, source))
    if not votes:
        raise UserError(f"{path} has no votes on clips in {folder}; name their folder: --audio_dir")
    missing = len(rows) - len(votes)
    if missing:
        warn(f"{path}: {missing} votes are on missing clips, left out")
    clips = [{"audio": str(folder / name), "caption": prompt} for name, prompt in places]
    votes = Votes(*map(np.array, zip(*votes)))
    return clips, votes._replace(preference=votes.preference.astype(np.float32))


def split_votes(clips, votes, seed):
    """Places of training, validation, test votes: 80, 10, 10 % of the prompts; no mixed votes."""
    draws = np.array([derive_seed(seed, "votes", row["caption"]) / 2 ** 63 for row in clips])
    part = (draws < 0.2).astype(int) + (draws < 0.1)    # (N,)
    a, b = part[votes.a], part[votes.b]                 # (P,)
    part = np.where(a == b, a, -1)
    return [np.flatnonzero(part == k) for k in range(3)]


def fit(features, votes, parts, settings, device="cpu"):
    """Train a Ranker on features (N, W) and Votes -> (ranker in eval mode, log rows)."""
    training, validation, test = parts
    decided = votes.preference[test] != 0.5
    if len(training) < 2 or len(validation) == 0 or not decided.any():
        raise UserError(f"votes are too few to be split: {[len(part) for part in parts]}")
    features = features.to(device)
    preference = torch.from_numpy(votes.preference).to(device)
    places = torch.from_numpy(np.stack([votes.a, votes.b]))     # (2, P)
    steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
    step = 0
    lowest = math.inf
    log = []
    with torch.random.fork_rng(devices=[]):     # initialisation and dropout take no generator
        torch.manual_seed(derive_seed(settings.seed, "ranker"))
        ranker = Ranker(features.shape[1], settings.widths, settings.dropout).to(device)
        known = features[places[:, training].unique()]
        ranker.mean.copy_(known.mean(0))
        ranker.std.copy_(known.std(0).clamp(min=1e-4))
        optimizer = torch.optim.AdamW(ranker.parameters(), weight_decay=settings.weight_decay)
        for epoch in trange(settings.epochs, desc="ranker", unit="epoch"):
            # train
            ranker.train()
            rng = generator(settings.seed, "votes", epoch)
            order = torch.randperm(len(training), generator=rng)
            for batch in order.split(settings.batch_size):
                step += 1
                if len(batch) < 2:
                    continue                    # a batch's statistics need more
                rows = training[batch]
                pairs = features[places[:, rows].flatten()]     # (2 B, W)
                a, b = ranker.utility(pairs).chunk(2)           # (B,) each
                loss = ranknet_loss(a, b, preference[rows])
                optimizer.zero_grad()
                loss.backward()
                rate = learning_rate(step, settings.learning_rate, 0, steps + 1, "cosine")
                set_rate(optimizer, rate)
                optimizer.step()

            # validate, keep the best
            ranker.eval()
            a, b = ranker.utility(features)[places[:, validation]]
            held = ranknet_loss(a, b, preference[validation]).item()
            log.append({"epoch": epoch + 1, "loss": loss.item(), "validation": held})
            if held < lowest:
                lowest = held
                best = {name: tensor.clone() for name, tensor in ranker.state_dict().items()}
    ranker.load_state_dict(best)
    utility = ranker.utility(known).detach()
    ranker.score_mean.copy_(utility.mean())
    ranker.score_std.copy_(utility.std().clamp(min=1e-6))
    return ranker, log


def pairwise_accuracy(difference, preference):
    """Share of the votes (P,) that are no ties whose sign is that of the difference s(A) - s(B)."""
    right = (difference > 0) == (preference > 0.5)
    return float(right[preference != 0.5].mean())


def calibration_error(chance, preference):
    """|mean chance of A - share of A| over ten bins of P(A) (P,), weighted by their votes."""
    decided = preference != 0.5
    chance, preference = chance[decided], preference[decided]
    bins = np.minimum(chance * 10, 9).astype(int)
    gaps = np.bincount(bins, chance - preference)
    return float(np.abs(gaps).sum() / len(bins))


def report(utility, votes, quality=None):
    """Numbers of a ranker's utilities (N,) on held-out Votes; quality (N,): the truth, if known."""
    difference = utility[votes.a] - utility[votes.b]  # (P,)
    chance = 1 / (1 + np.exp(-difference))
    numbers = {"votes": len(chance),
               "accuracy": pairwise_accuracy(difference, votes.preference),
               "calibration error": calibration_error(chance, votes.preference)}
    if np.isfinite(votes.chance).all():  # of a simulated source: nobody can predict more
        decided = votes.chance[votes.preference != 0.5]
        numbers["ceiling"] = float(np.maximum(decided, 1 - decided).mean())
    if quality is not None:
        clips = np.unique([votes.a, votes.b])
        truth = quality[votes.a] - quality[votes.b]
        numbers["spearman"] = spearman(utility[clips], quality[clips])
        numbers["clips"] = len(clips)
        numbers["accuracy of the true quality"] = pairwise_accuracy(truth, votes.preference)
    return numbers


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    device = choose_device(args.device)
    out = Path(args.out)

    with locked(args.out):
        # votes and features; the world knows its clips' quality
        encoders = Encoders(args.clap, args.encoder, device)
        clips, votes = read_votes(args.votes, args.audio_dir)
        path = Path(args.votes).parent / "clips.jsonl"
        rows = read_jsonl(path) if path.is_file() else []
        known = {str(path.parent / row["audio"]): row.get("quality") for row in rows}
        quality = [known.get(row["audio"]) for row in clips]
        features = clip_features(encoders, clips, out / "features")
        heard = features.isfinite().all(1).numpy()
        votes = Votes(*[column[heard[votes.a] & heard[votes.b]] for column in votes])

        # the ranker, and what it is worth on held-out votes
        parts = split_votes(clips, votes, args.seed)
        ranker, log = fit(features, votes, parts, pick(Fit, args), device)
        utility = ranker.utility(features.to(device)).detach().cpu().numpy()
        held = Votes(*[column[parts[2]] for column in votes])
        numbers = report(utility, held, None if None in quality else np.array(quality))

        # its layers in half precision, what it is in the header
        ranker.layers.half()
        config = json.dumps({**ranker.config, **encoders.names, "key": encoders.key()})
        save_tensors(out / "ranker.safetensors", ranker.state_dict(), {"ranker": config})
        write_jsonl(out / "log.jsonl", log)
        write_json(out / "report.json", numbers)
        print(f"held-out votes: {json.dumps(numbers, indent=2)}")
    print(f"next: python ranker.py --data runs/scored/clips.jsonl --ranker {out}")


if __name__ == "__main__":
    run_main(main)
