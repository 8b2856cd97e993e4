"""Training of the quality judge: how little was a clip spoilt? (See votes.py for what that means.)

    python train_quality.py                            # 5,000 scenes, two takes each -> runs/quality

The judge never conditions, filters or trains what generates: "true quality" of a generated clip means its reading, as
the judge tagger's reading means its events. So it has scenes and a seed of its own, and half of its clips have been
through the codec, which generated clips all have. A fifth of them hum, which it has to overlook. A killed run goes on
where it was.

Letters: N clips, B batch, F mel frames (16 ms).
"""
import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as functional
from tqdm import tqdm

import metrics
from common import UserError, choose_device, in_range, parse_arguments, run_main, write_json
from tagger import FILES, Tagger, save_tagger
from train_tagger import fit
from training import choose_dtype, trim_log
from vae import load_codec
from vocoder import MEL_16K, LogMel
from votes import BLOCK, coded, render_takes


def quality_loss(outputs, truth):
    """outputs = Tagger(mel), its one presence logit against the truth (B,) in [0, 1]: binary cross-entropy."""
    loss = functional.binary_cross_entropy_with_logits(outputs[1][:, 0], truth)
    return loss, {"error": (outputs[1][:, 0].sigmoid() - truth).abs().mean().item()}


def rated(args, codec, split, scenes, through_codec):
    """Takes of `scenes` scenes -> (mel (N, 80, F) float16, quality (N,)); silence after each clip's duration."""
    world = {"split": split, "seed": 7000 + args.seed, "pairs": "all"}
    mels, truth, log_mel = [], [], LogMel(**MEL_16K)
    blocks = render_takes(world, range(scenes), args.takes, 0.2, args.workers)
    for audio, rows in tqdm(blocks, f"clips, {split}", math.ceil(scenes / BLOCK), unit=f" x {BLOCK} scenes"):
        audio = coded(codec, audio, rows, through_codec, args.seed)
        for clip, row in zip(audio, rows):
            clip[int(row["duration"] * 16000):] = 0                        # as generated clips are cut
        mels.append(log_mel(torch.from_numpy(audio)).half())
        truth += [row["quality"] for row in rows]
    return torch.cat(mels), torch.tensor(truth)


def main(argv=None):
    args = parse_args(argv)
    out, device = Path(args.out), choose_device(args.device)
    autocast, codec = choose_dtype(args.dtype, device), load_codec(args.codec, device)
    trim_log(out, math.inf)                                     # a folder that can't be written is told now
    scenes = rated(args, codec, "train", args.scenes, 0.5)
    torch.manual_seed(args.seed)                                # the initial weights, nothing else
    tagger = Tagger(["quality"], [], args.width, args.layers).to(device)
    finished = fit(tagger, scenes, out, args.seed, args.steps, args.batch_size, args.learning_rate, 0.05,
                   args.max_minutes, autocast=autocast, augmented=False, loss_of=quality_loss)
    save_tagger(out / FILES["quality"], tagger)
    found = {}
    for name, share in (("as they are", 0.0), ("after the codec", 1.0)):
        mel, truth = rated(args, codec, "test", args.val_scenes, share)
        heard = torch.cat([tagger.clip_probabilities(part.float().to(device))[:, 0] for part in mel.split(64)])
        found[name] = {"spearman": metrics.spearman(heard.numpy(), truth.numpy()),
                       "mean error": (heard - truth).abs().mean().item(), "clips": len(truth)}
        print(f"held-out clips {name}: rank correlation with the true quality {found[name]['spearman']:.3f}, mean "
              f"error {found[name]['mean error']:.3f}")
    write_json(out / "report.json", found)
    print(f"wrote {out / FILES['quality']}, report.json" + ("" if finished else
                                                            "; stopped early, the same command goes on"))
    print(f"next: cp {out / FILES['quality']} beside the other taggers of a model folder; python votes.py")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def flag(group, name, default, what, kind=None, **more):
        group.add_argument(name, default=default, type=kind or type(default), help=f"{what} (default: %(default)s)",
                           **more)
    group = parser.add_argument_group("clips")
    flag(group, "--scenes", 5000, "training scenes: those of World(seed=7000 + seed)")
    flag(group, "--takes", 2, "of each scene, spoilt in different ways")
    flag(group, "--val_scenes", 400, "held-out scenes, of other recorded sounds")
    flag(group, "--codec", "checkpoints/toy/base", "folder with the codec")
    flag(group, "--workers", 2, "processes that render")
    group = parser.add_argument_group("network and optimizer")
    flag(group, "--seed", 0, "initial weights, scenes and batches")
    flag(group, "--width", 96, "a multiple of 12")
    flag(group, "--layers", 3, "residual convolutions at 64 ms")
    flag(group, "--steps", 3000, "optimizer steps")
    flag(group, "--batch_size", 32, "clips per step")
    flag(group, "--learning_rate", 3e-3, "peak of AdamW's rate; warm-up, then cosine to zero")
    group = parser.add_argument_group("where")
    flag(group, "--out", "runs/quality", "run folder; a run found there is resumed")
    flag(group, "--max_minutes", None, "stop training after so many; the same command goes on", float)
    flag(group, "--dtype", "auto", "of the forward pass", choices=("auto", "float32", "bfloat16"))
    flag(group, "--device", "auto", "auto, cuda, mps or cpu")
    args = parse_arguments(parser, argv)
    for name, low, high in (("scenes", 16, 1e6), ("takes", 1, 100), ("val_scenes", 8, 1e6), ("workers", 1, 256),
                            ("seed", 0, 2 ** 50), ("width", 12, 1536), ("layers", 1, 48), ("steps", 1, 1e7),
                            ("batch_size", 2, 4096), ("learning_rate", 1e-8, 1)):
        in_range(f"--{name}", getattr(args, name), low, high)
    if args.width % 12:
        raise UserError(f"--width {args.width} is no multiple of 12")
    return args


if __name__ == "__main__":
    run_main(main)
