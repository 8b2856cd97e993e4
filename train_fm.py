"""Train or fine-tune the flow: the velocity from noise to latents of captioned audio (paper 3.1, A.4, A.5).

    python train_fm.py                           # the toy model, from scratch, on the built-in world
    python train_fm.py --max_minutes 30          # half an hour of it; the same command goes on
    python train_fm.py --checkpoint checkpoints/toy/base --data my.jsonl --train_text   # on your clips
    torchrun --nproc_per_node 5 train_fm.py --preset tangoflux --codec FOLDER \\
        --text_encoder google/flan-t5-large --data wavcaps.jsonl --epochs 80 --batch_size 16 \\
        --learning_rate 5e-4 --warmup_steps 2000 --t_mean 0                              # the paper's
    python train_fm.py --checkpoint checkpoints/toy/base --data runs/scored/scored.jsonl --score_column score \\
        --steps 1000 --learning_rate 1e-3 --sigma_rel 0.05 0.1 --out runs/score      # a score as a further input

The run's folder is a model folder, which sample.py and all other scripts load: its tangoflux.safetensors (and
its text_encoder, if trained) hold the AVERAGED weights unless --save_weights raw. ema.safetensors holds the
average of all that was trained, state.pt what a resume needs. A run found in --out is resumed: example i, its
noise, its t and its dropout follow from (seed, i) alone: a killed and resumed run ends with the same bits.

Where paper and official code differ, we do this:
  - the duration embedder is trained (the official optimizer forgets it: it gets transformer and fc only);
  - the text encoder is in eval mode, without T5's dropout (the official loop turns it on by accident), and frozen
    as in the paper, unless --train_text; a new one first learns to read the world's captions
    (reading.py), and with --data, whose captions it can't read, goes on learning with the flow;
  - t is logit-normal(0.8, 1), nearer to noise (paper: mean 0: --t_mean 0);
  - Muon trains the attention and MLP matrices of a new toy flow, AdamW the rest (both: AdamW for all: --muon 0);
  - condition dropout replaces the text by T5(""), the very null that guidance uses, and keeps the duration
    (the paper has none; the official option zeroes text and duration, not the pooled text:
    --null official_zeros);
  - t is continuous (official: on a grid of 1/1000: --t_grid 1000); text padding is hidden from attention;
  - weight decay spares biases, gains, frequencies; gradients are clipped, weights averaged (official: none).

With --score_column the flow also learns what scores mean (second paper, III-B, III-D b). A row that loses its text
loses its score as well, for the null of joint guidance (Eq. 2) has neither; of the others --score_dropout lose it.
--experts mixes clips in that expert_iteration.py kept (III-D c).

B batch, L latent frames, C latent channels, S text tokens, D text width.
"""
import argparse
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import averages
from cache import (TRAIN_SCENES, VAL_SCENES, WORLD_FLAGS, add_world_flags, default_folder, gather, manifest_cache,
                   prepare, with_experts, world_cache, world_mix)
from common import (UserError, append_jsonl, check_writable, derive_seed, generator, in_range, parse_arguments,
                    run_main, warn)
from model import SCORE_HEADS, null_score
from training import (average_decay, choose_dtype, draw_log, export, linear_decay, load_state, log_line,
                      make_optimizer, mean_over_ranks, save_state, set_rate, start_ranks, trainable, trim_log,
                      update_average, wait_for_ranks, weights_replaced)

STEPS, READING_STEPS = 12500, 4000     # of the toy model; a fine-tuning says --steps
VAL_BINS = 5               # validation loss is also logged per fifth of t
# flags that decide what the weights become: a run is resumed only if they are the same
DECISIVE = ("checkpoint", "preset", "text_encoder", "train_text", "reading_steps", "max_text_length", "seed",
            "batch_size", "learning_rate", "muon", "beta1", "beta2", "weight_decay", "clip", "ema", "dtype",
            "dropout", "null", "t_mean", "t_std", "t_grid", "decay", "score_column", "score_head", "score_null",
            "score_dropout", "oversample", "experts_only", "sigma_rel")
RANGES = (("steps", 1, 1e9), ("epochs", 1e-9, 1e9), ("batch_size", 1, 1e6), ("learning_rate", 0, 10),
          ("warmup_steps", 0, 1e9), ("beta1", 0, 0.99999), ("beta2", 0, 0.99999), ("weight_decay", 0, 10),
          ("muon", 0, 1e4), ("clip", 0, 1e9), ("ema", 0, 1), ("dropout", 0, 1), ("t_mean", -20, 20),
          ("t_std", 1e-6, 20), ("t_grid", 0, 1e6), ("scenes", 1, 1e8), ("val_scenes", 1, 1e8),
          ("validation_fraction", 0, 0.99), ("max_minutes", 0, math.inf), ("save_every", 1, 1e9),
          ("log_every", 1, 1e9), ("val_every", 1, 1e9),
          ("val_clips", 1, 1e6), ("max_text_length", 2, 100000), ("reading_steps", 0, 1e9), ("workers", 0, 256),
          ("score_dropout", 0, 1), ("oversample", 1, 1e6), ("snapshot_every", 1, 1e9), ("seed", 0, 2 ** 63))

# ============================================================================= the algorithm


def logit_normal_t(count, rng, mean=0.0, std=1.0, grid=None):
    """t (count,) = sigmoid(normal(mean, std)), in (0, 1) (paper A.5, after Esser et al. 2024; "variance 1").

    With `grid` = 1000, the official discretisation: t = (1000 - floor(1000 u)) / 1000: 0.001, 0.002, ..., 1.
    """
    u = torch.sigmoid(mean + std * torch.randn(count, generator=rng))
    return on_grid(u, grid) if grid else u


def on_grid(u, grid):
    """The official code's t for a logit-normal u: it indexes a table of `grid` falling noise levels."""
    return (grid - torch.floor(grid * u)) / grid


def interpolate(x1, x0, t):
    """x_t = (1 - t) x_1 + t x_0 and its velocity v = x_0 - x_1 (paper Eq. 4).

    x1 data and x0 noise (B, L, C), t (B,).
    """
    t = t[:, None, None]                                                          # (B, 1, 1)
    return (1 - t) * x1 + t * x0, x0 - x1


def flow_matching_loss(velocity, target):
    """Paper Eq. 5, the mean over (L, C): the batch's mean and the losses per example (B,), in float32."""
    per_example = (velocity.float() - target.float()).square().mean((1, 2))       # (B,)
    return per_example.mean(), per_example


class Batch(NamedTuple):
    """One training batch on the device. Text is live (`ids`) or a frozen encoder's (`hidden`), else None."""
    x1: torch.Tensor                # (B, L, C) normalised latents
    x0: torch.Tensor                # (B, L, C) noise
    t: torch.Tensor                 # (B,)
    ids: torch.Tensor | None        # (B, S) tokens, padded to the longest of the batch
    hidden: torch.Tensor | None     # (B, S, D)
    mask: torch.Tensor              # (B, S) bool, real tokens
    duration: torch.Tensor          # (B,) seconds
    dropped: torch.Tensor           # (B,) bool, rows that lose their condition
    score: torch.Tensor | None = None   # (B,) NaN = none, or lost; None: a flow without scores


def text_condition(encoder, batch, null):
    """Condition of a batch; dropped rows get T5("") padded to their own length (model.null_condition)."""
    from model import Condition, null_tokens
    lengths = batch.mask.sum(1)                                                   # (B,)
    null_ids, null_mask, null_visible = null_tokens(lengths)                      # (B, S)
    dropped = batch.dropped[:, None] & (null == "empty_prompt")                   # (B, 1)
    pooled_mask = torch.where(dropped, null_mask.bool(), batch.mask)              # (B, S)
    visible = torch.where(dropped, null_visible.bool(), batch.mask)               # (B, S)
    if batch.hidden is None:
        hidden = encoder.encode(torch.where(dropped, null_ids, batch.ids), pooled_mask)     # (B, S, D)
    else:
        with torch.no_grad():       # its padding sees the end token only: the longest row holds all others
            longest = lengths.argmax()[None]
            null_hidden = encoder.encode(null_ids[longest], null_mask[longest])             # (1, S, D)
        null_hidden = null_hidden.to(batch.hidden.dtype)
        hidden = torch.where(dropped[..., None], null_hidden, batch.hidden)                 # (B, S, D)
    return Condition(hidden, visible, pooled_mask, batch.duration, batch.score)


def zeroed_velocity(flow, latents, t, condition, dropped):
    """The official dropout: text AND duration token of dropped rows are zero, the pooled text is kept."""
    text, pooled, mask = flow.condition_inputs(condition)       # (B, S+1, D), (B, D), (B, S+1)
    return flow.transformer(latents, t, text * ~dropped[:, None, None], pooled, mask, condition.score)


def batch_loss(flow, encoder, batch, null="empty_prompt"):
    """Flow-matching loss of a batch: (mean, per example (B,))."""
    xt, target = interpolate(batch.x1, batch.x0, batch.t)
    condition = text_condition(encoder, batch, null)
    if null == "official_zeros":
        prediction = zeroed_velocity(flow, xt, batch.t, condition, batch.dropped)
    else:
        prediction = flow.velocity(xt, batch.t, condition)          # (B, L, C)
    return flow_matching_loss(prediction, target)


# ============================================================================= data


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order in which an epoch visits its `count` examples: a permutation that follows from (seed, epoch)."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).numpy()


def collate(data, codec, chosen, draws):
    """Rows `chosen` of the cache and their `draws` (posterior noise, x0, t, dropped, score dropped) -> Batch.

    The latent is a sample of the codec's posterior, normalised; all tensors are on the codec's device.
    """
    mean, std, ids, hidden, mask, duration = gather(data, chosen)
    eps, x0, t, dropped, unscored = (torch.stack(column) for column in zip(*draws))
    score = None
    if data.scores is not None:
        scores = data.scores[chosen]                                              # (B,)
        score = torch.where(dropped | unscored, null_score(scores), scores)
    tensors = (mean + std * eps, x0, t, ids, hidden, mask, duration, dropped, score)
    batch = Batch(*(None if tensor is None else tensor.to(codec.latent_mean.device) for tensor in tensors))
    return batch._replace(x1=codec.normalise(batch.x1))


def training_batch(data, codec, seed, first, count, dropout=0.1, t_mean=0.0, t_std=1.0, t_grid=None,
                   score_dropout=0.0):
    """Examples first .. first + count - 1 of endless shuffled epochs; each depends on (seed, i) only."""
    shape, n, chosen, draws = data.cache.mean.shape[1:], len(data.rows), [], []
    for position in range(first, first + count):
        rng = generator(seed, "example", position)
        chosen.append(data.rows[epoch_order(seed, position // n, n)[position % n]])
        draws.append((torch.randn(shape, generator=rng), torch.randn(shape, generator=rng),
                      logit_normal_t(1, rng, t_mean, t_std, t_grid)[0],
                      torch.rand((), generator=rng) < dropout, torch.rand((), generator=rng) < score_dropout))
    return collate(data, codec, np.array(chosen), draws)


def validation_batches(data, codec, count, size=64):
    """The fixed grid: the first `count` rows, fixed noise, no dropout, t at quantiles of
    logit-normal(0, 1) whatever --t_mean is, so that runs compare.

    Its generators are its own: validating draws nothing that training would.
    """
    count = min(count, len(data.rows))
    quantiles = torch.special.ndtri((torch.arange(count) + 0.5) / count).sigmoid()
    ts = quantiles[torch.randperm(count, generator=generator("validation", "t"))]
    for first in range(0, count, size):
        draws = []
        for index in range(first, min(first + size, count)):
            rng, shape = generator("validation", index), data.cache.mean.shape[1:]
            draws.append((torch.randn(shape, generator=rng), torch.randn(shape, generator=rng), ts[index],
                          torch.tensor(False), torch.tensor(False)))
        yield collate(data, codec, data.rows[first:first + size], draws)


@torch.no_grad()
def validate(flow, encoder, batches, autocast):
    """Mean loss over the fixed grid, and per bin of t (None where a bin is empty)."""
    losses, ts = [], []
    for batch in batches:
        with autocast():
            losses.append(batch_loss(flow, encoder, batch)[1].cpu())
        ts.append(batch.t.cpu())
    losses, bins = torch.cat(losses), (torch.cat(ts) * VAL_BINS).long().clamp(max=VAL_BINS - 1)
    per_bin = [losses[bins == k].mean().item() if (bins == k).any() else None for k in range(VAL_BINS)]
    return losses.mean().item(), per_bin


# ============================================================================= set-up and loop


def load_parts(args, device, say=print):
    """(flow, codec, text encoder, whether it is frozen), from --checkpoint or newly initialised."""
    from model import PRESETS, TangoFlux, fetch, load_model
    from text import TextEncoder
    from vae import load_codec
    if args.checkpoint:
        model = load_model(args.checkpoint, device)
        return model.flow, model.codec, model.text, not args.train_text
    codec = load_codec(args.codec, device)
    config = {**PRESETS[args.preset], "in_channels": codec.latent_channels,
              "text_encoder_name": "text_encoder"}
    config["audio_seq_len"] = round(config["max_duration"] * codec.sampling_rate) // codec.hop
    if args.text_encoder:
        folder = Path(args.text_encoder)
        encoder = TextEncoder.load(folder if folder.is_dir() else fetch(
            args.text_encoder, ["config.json", "model.safetensors", "tokenizer*.json", "spiece.model"]))
        config["joint_attention_dim"] = encoder.width
    else:
        from reading import new_encoder
        encoder = new_encoder(args.out, config["joint_attention_dim"], args.reading_steps, args.seed, device, say)
    with torch.random.fork_rng(devices=[]):     # initialisation is the one place with the global generator
        torch.manual_seed(derive_seed(args.seed, "flow"))
        flow = TangoFlux(config)
    frozen = not args.train_text and bool(args.text_encoder or not args.data)   # a new one read the world's captions
    return flow.to(device), codec, encoder.to(device), frozen


def load_data(args, codec, encoder, cached_text, max_duration):
    """(training Data, validation Data): latent caches of the world or a manifest, built where missing."""
    samples = round(max_duration * codec.sampling_rate)
    ready = functools.partial(prepare, encoder=encoder, max_length=args.max_text_length, frozen=cached_text)
    folder = Path(args.cache) if args.cache else default_folder(args.data)
    if not args.data:
        rest = dict(samples=samples, workers=args.workers)
        train = world_cache(folder, codec, "train", args.scenes, **world_mix(args), **rest)
        folder = Path(f"{args.cache}_val") if args.cache else default_folder(None, "val")
        held = world_cache(folder, codec, "val", args.val_scenes, **rest)
        return ready(train, train.kept), ready(held, held.kept)
    from data import manifest_rows, split_rows
    rows = manifest_rows(args)
    cache = manifest_cache(folder, codec, args.data, rows, samples, args.crop, args.workers)
    kept = [cache.rows[i] for i in cache.kept]
    held = {row["audio"] for row in split_rows(kept, args.validation_fraction)[1]}
    chosen = np.array([row["audio"] in held for row in kept])
    if not held:
        warn(f"{args.data} leaves nothing to validate on: the validation loss is that of training clips")
    training, held_out, count = cache.kept[~chosen], cache.kept[chosen], len(cache.rows)
    scores = scores_of(rows, args) if args.score_column else []
    if args.experts:
        cache = with_experts(cache, args.experts)
        experts = np.arange(count, len(cache.rows))
        training = experts if args.experts_only else np.concatenate([training, *[experts] * args.oversample])
        scores += [row["score"] for row in cache.rows[count:]]
    data = ready(cache, training)._replace(scores=torch.tensor(scores) if args.score_column else None)
    return data, data._replace(rows=held_out) if held else data


def scores_of(rows, args):
    """The scores of a manifest's rows as floats, NaN where a cell is empty. Raises UserError if they say nothing."""
    scores = [math.nan if row["score"] is None else row["score"] for row in rows]
    known = [score for score in scores if not math.isnan(score)]
    if not known or min(known) == max(known):
        raise UserError(f"{args.data}: column {args.score_column} " + (
            f"is {known[0]:g} in every row" if known else "is empty") + "; a flow learns nothing from it, name another "
            "with --score_column")
    if len(known) < len(scores):
        warn(f"{len(scores) - len(known)} of {len(scores)} rows have no {args.score_column}: they teach the null")
    return scores


def scored_flow(flow, data, args):
    """`flow` with the score head that --score_column asks for: its own, another's (v1, v2) or a new one."""
    if not args.score_column:
        return flow
    from model import with_score_head
    known = data.scores[~data.scores.isnan()]
    head = args.score_head or flow.config.get("score_head") or "v1"
    mean, std = known.mean().item(), known.std(correction=0).item()
    return with_score_head(flow, head, args.score_null, mean, std, args.seed)[0]


def train(args):
    """The whole run: parts, data, resume, steps, log, checkpoints. Returns (rank, steps done, all steps)."""
    from model import save_model
    rank, ranks, device = start_ranks(args.device)
    say, out, began = print if rank == 0 else lambda *_: None, Path(args.out), time.monotonic()
    autocast = choose_dtype(args.dtype, device, say)
    check_writable([out / "state.pt"])
    if args.data:
        from data import manifest_rows
        manifest_rows(args)                     # a faulty manifest is told now, not after a minute of reading
    if rank > 0:
        wait_for_ranks(ranks)                   # the first process makes text encoder and caches, the others open them
    flow, codec, encoder, frozen = load_parts(args, device, say)
    cached_text = frozen and bool(args.checkpoint or args.text_encoder)     # a cache holds one encoder's, no new one's
    data, held = load_data(args, codec, encoder, cached_text and not args.experts, flow.config["max_duration"])
    flow = scored_flow(flow, data, args)
    if rank == 0:
        wait_for_ranks(ranks)
    flow.train()
    encoder.train(not frozen).t5.eval()         # train() lets gradients through; T5's dropout stays off
    encoder.requires_grad_(not frozen)
    named = trainable(flow, None if frozen else encoder)
    optimizer = make_optimizer(named, (args.beta1, args.beta2), args.weight_decay, args.muon)
    average = {name: parameter.detach().clone() for name, parameter in named.items()}
    powers = {str(width): {name: p.detach().clone() for name, p in named.items()} for width in args.sigma_rel or []}
    kept = average | {f"{width} {name}": tensor for width, each in powers.items() for name, tensor in each.items()}
    exported = next(iter(powers.values())) if args.save_weights == "power" else average
    steps = math.ceil(args.epochs * len(data.rows) / (args.batch_size * ranks)) if args.epochs else args.steps
    warmup = args.warmup_steps if args.warmup_steps is not None else max(1, min(300, steps // 10))
    settings = {**{name: getattr(args, name) for name in DECISIVE}, "steps": steps, "warmup_steps": warmup,
                "processes": ranks, "latents": data.cache.key, "training clips": len(data.rows),
                "text frozen": frozen}
    step, earlier = load_state(out, named, optimizer, kept, settings)
    save = functools.partial(save_model, out, flow=flow, text=None if frozen else encoder,
                             extra={"training": {**vars(args), **settings}})
    if rank == 0:
        save_model(out, codec=codec, text=encoder if frozen else None)
        trim_log(out, step or -1)             # a new run writes its own row of step 0
        if step:
            export(out, save, named, exported, args.save_weights)     # a kill may have come between two files
    say(f"{len(data.rows)} training and {len(held.rows)} validation clips, text encoder "
        f"{'frozen' if frozen else 'trained'}, {sum(p.numel() for p in named.values()):,} parameters; "
        + (f"going on at step {step} of {steps}" if step else f"{steps} steps"))
    grid = list(validation_batches(held, codec, args.val_clips)) if rank == 0 else []

    def validated():
        """Validation of the weights and of their average, as entries of a row of the log."""
        row = dict(zip(("val_loss", "val_bins"), validate(flow, encoder, grid, autocast)))
        with weights_replaced(named, average):
            return row | dict(zip(("val_loss_ema", "val_bins_ema"), validate(flow, encoder, grid, autocast)))

    if rank == 0 and step == 0:                                       # where a fine-tuning starts from
        row = {"step": 0, "minutes": (time.monotonic() - began) / 60, **validated()}
        append_jsonl(out / "log.jsonl", row)
        say(f"before step 1: validation loss {row['val_loss']:.4f}", flush=True)
    losses, mark, late = [], time.monotonic(), torch.zeros(1, device=device)
    while step < steps and not late:
        rate = linear_decay(step, args.learning_rate, warmup, steps, args.decay)
        set_rate(optimizer, rate)
        first = (step * ranks + rank) * args.batch_size
        batch = training_batch(data, codec, args.seed, first, args.batch_size, args.dropout, args.t_mean,
                               args.t_std, args.t_grid, args.score_dropout)
        with autocast():
            loss, _ = batch_loss(flow, encoder, batch, args.null)
        optimizer.zero_grad()
        loss.backward()
        minutes = (time.monotonic() - began) / 60
        late.fill_(args.max_minutes is not None and minutes >= args.max_minutes)
        mean_over_ranks([*(p.grad for p in named.values() if p.grad is not None), loss.detach(), late], ranks)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), args.clip or math.inf).item()
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm):
            raise UserError(f"step {step}: the loss is {losses[-1]:g}, its gradient norm {norm:g}; lower "
                            "--learning_rate or use --dtype float32 (state.pt is the last good step saved)")
        optimizer.step()
        update_average(average, named, average_decay(step, args.ema))
        step += 1
        averages.update(powers, named, step)
        last = step == steps or bool(late)
        if rank == 0 and (last or step % args.log_every == 0 or step % args.val_every == 0):
            row = {"step": step, "loss": float(np.mean(losses)), "lr": rate, "grad_norm": norm,
                   "seconds_per_step": (time.monotonic() - mark) / len(losses), "minutes": earlier + minutes}
            if last or step % args.val_every == 0:
                row |= validated()
            append_jsonl(out / "log.jsonl", row)
            say(log_line(row, steps), flush=True)
            losses, mark = [], time.monotonic()
        if rank == 0 and (last or step % args.snapshot_every == 0):
            averages.store(out, powers, step)
        if rank == 0 and (last or step % args.save_every == 0):
            save_state(out, named, optimizer, kept, step, settings, earlier + minutes)
            export(out, save, named, exported, args.save_weights)
    return rank, step, steps


def draw_losses(out):
    """loss.png: training and validation loss, and validation per bin of t. False without matplotlib."""
    def per_bin(row, k):
        return row["val_bins_ema"][k] if "val_bins_ema" in row else None
    losses = {"training": "loss", "validation": "val_loss", "validation, averaged weights": "val_loss_ema"}
    losses = {label: lambda row, key=key: row.get(key) for label, key in losses.items()}
    bins = {f"t {k / VAL_BINS:.1f} to {(k + 1) / VAL_BINS:.1f}": functools.partial(per_bin, k=k)
            for k in range(VAL_BINS)}
    return draw_log(out, [("flow-matching loss", "log", losses),
                          ("validation by t, averaged weights", "log", bins)])


# ============================================================================= command line


def parse_args(arguments=None):
    """All flags of this script, their ranges checked; `arguments` instead of the command line."""
    from data import add_data_flags, check_data_flags
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint",
                       help="model folder or hub id to start from (default: a new flow and text encoder)")
    group.add_argument("--codec",
                       help="folder with the codec of a new flow (default: checkpoints/toy/base)")
    group.add_argument("--preset", choices=["toy", "tangoflux"],
                       help="size of a new flow (default: toy; paper: tangoflux, 6 + 18 blocks, 1024 wide)")
    group.add_argument("--text_encoder", help="T5 folder or hub id for a new flow, then frozen (default: "
                                              "a small new one; paper: google/flan-t5-large)")
    group.add_argument("--reading_steps", type=int,
                       help="steps in which a small new text encoder learns to read captions before the flow is "
                            f"trained (default: {READING_STEPS}; 0: none; paper: FLAN-T5 comes trained)")
    group.add_argument("--train_text", action="store_true",
                       help="train the text encoder with the flow, too (default: off, as paper; on for a new one "
                            "with --data, whose captions it can't read)")
    group.add_argument("--max_text_length", type=int, default=64,
                       help="text tokens (default: 64, as the official code)")
    add_data_flags(parser)
    group = parser.add_argument_group("data")
    group.add_argument("--scenes", type=int, default=TRAIN_SCENES,
                       help=f"scenes of the world (default: {TRAIN_SCENES})")
    group.add_argument("--val_scenes", type=int, default=VAL_SCENES,
                       help=f"held-out scenes (default: {VAL_SCENES})")
    add_world_flags(group)
    group.add_argument("--validation_fraction", type=float, default=0.05,
                       help="of a manifest's files (default: 0.05)")
    group.add_argument("--cache",
                       help="of the latents (default: cache/world_train, or cache/FOLDER_NAME for "
                            "--data FOLDER/NAME.jsonl)")
    group.add_argument("--workers", type=int, default=2,
                       help="processes that render, threads that read (default: 2)")
    group = parser.add_argument_group("flow matching")
    group.add_argument("--t_mean", type=float, default=0.8,
                       help="of the logit-normal t (default: 0.8, for what a text decides is decided near noise; "
                            "paper A.5: 0)")
    group.add_argument("--t_std", type=float, default=1.0,
                       help="of the logit-normal t (default: 1; paper A.5: variance 1)")
    group.add_argument("--t_grid", type=int, default=0,
                       help="noise levels of t (default: 0, continuous; official code: 1000)")
    group.add_argument("--dropout", type=float, default=0.1,
                       help="share of examples losing their text (default: 0.1; paper: none; official: 0.1)")
    group.add_argument("--null", choices=["empty_prompt", "official_zeros"], default="empty_prompt",
                       help="what dropped examples get: T5(\"\") as in guidance, or the official zeros "
                            "(default: empty_prompt)")
    group = parser.add_argument_group("scores and experts (second paper, III-B, III-D)")
    group.add_argument("--score_column", metavar="NAME", help="column of --data that conditions the flow (default: "
                       "none; second paper: instrumental_reward_score)")
    group.add_argument("--score_head", choices=list(SCORE_HEADS), help="where the score enters: " + ", ".join(
        f"{head} {name}" for head, name in SCORE_HEADS.items()) + " (default: that of --checkpoint, else v1; second "
        "paper: v1, then v2)")
    group.add_argument("--score_null", choices=["zero", "scalar"], default="zero", help="no score is the zero "
                       "embedding, or what the head makes of the mean score (default: zero; second paper, Eq. 2: the "
                       "scalar 0)")
    group.add_argument("--score_dropout", type=float, default=0.1,
                       help="share of examples that lose their score and keep their text (default: 0.1; second paper: "
                            "0.1)")
    group.add_argument("--experts", metavar="FOLDER", help="a folder of expert_iteration.py, whose kept clips join the "
                       "training clips of --data (default: none)")
    group.add_argument("--oversample", type=int, default=5, help="times that an epoch holds each of them (default: 5; "
                       "second paper: 5)")
    group.add_argument("--experts_only", action="store_true", help="train on them alone (the second paper's polish)")
    group = parser.add_argument_group("optimizer (paper A.5)")
    group.add_argument("--steps", type=int,
                       help=f"default: {STEPS}; paper: 80 epochs, then 65 on AudioCaps")
    group.add_argument("--epochs", type=float, help="instead of --steps (paper: 80, then 65 of fine-tuning)")
    group.add_argument("--batch_size", type=int, default=32,
                       help="a process (default: 32; paper: 16 on each of 5 GPUs, 80)")
    group.add_argument("--learning_rate", type=float,
                       help="peak (default: 2e-3, with --checkpoint 1e-4; paper: 5e-4)")
    group.add_argument("--warmup_steps", type=int,
                       help="then linear decay to 0 (default: 300, at most a tenth; paper: 2000)")
    group.add_argument("--decay", action=argparse.BooleanOptionalAction, default=True,
                       help="the rate falls to 0 (default); --no-decay: constant after warm-up, as the second paper")
    group.add_argument("--muon", type=float,
                       help="the blocks' attention and MLP matrices are trained by Muon at this times the learning "
                            "rate; 0: AdamW for everything (default: 10 for a new toy flow, else 0; paper: 0)")
    group.add_argument("--beta1", type=float, default=0.9, help="of AdamW (default: 0.9; paper: 0.9)")
    group.add_argument("--beta2", type=float, default=0.95, help="of AdamW (default: 0.95; paper: 0.95)")
    group.add_argument("--weight_decay", type=float, default=1e-2,
                       help="of AdamW, and at --muon times the rate of Muon (default: 0.01, as the official code)")
    group.add_argument("--clip", type=float, default=1.0,
                       help="largest gradient norm, 0: any (default: 1; official: any)")
    group.add_argument("--ema", type=float, default=0.999,
                       help="decay of the weight average (default: 0.999; official: none)")
    group.add_argument("--sigma_rel", nargs="+", type=float, metavar="WIDTH", help="also power-function averages of "
                       "these widths, see averages.py (default: none; second paper: 0.05 0.1)")
    group.add_argument("--snapshot_every", type=int, default=250, help="steps between their files in averages/ "
                       "(default: 250)")
    group = parser.add_argument_group("run")
    group.add_argument("--out",
                       help="a run found there goes on (default: runs/base, with --checkpoint runs/tuned)")
    group.add_argument("--seed", type=int, default=0,
                       help="of initialisation, order, noise, t, dropout (default: 0)")
    group.add_argument("--max_minutes", type=float,
                       help="stop after these minutes of this command, saved; the same command goes on "
                            "(default: no limit)")
    group.add_argument("--save_every", type=int, default=250, help="steps (default: 250)")
    group.add_argument("--save_weights", choices=["ema", "raw", "power"], default="ema",
                       help="what tangoflux.safetensors holds: averaged or latest weights, or the average of the first "
                            "--sigma_rel (default: ema)")
    group.add_argument("--log_every", type=int, default=10, help="steps (default: 10)")
    group.add_argument("--val_every", type=int, default=250, help="steps (default: 250)")
    group.add_argument("--val_clips", type=int, default=256,
                       help="clips of the validation grid (default: 256)")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="of the matrix products (default: auto, bfloat16 where the hardware has it; "
                            "official: float32)")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default: auto)")
    args = parse_arguments(parser, arguments)
    new = {"codec": "checkpoints/toy/base", "preset": "toy", "text_encoder": None, "reading_steps": READING_STEPS}
    given = [f"--{name}" for name in new if getattr(args, name) is not None]
    if args.checkpoint and given:
        raise UserError(f"{' and '.join(given)} would have no effect: --checkpoint brings codec, size and text "
                        "encoder along; leave one or the other out")
    if args.text_encoder and args.reading_steps is not None:
        raise UserError("--reading_steps would have no effect: --text_encoder is trained already; leave one out")
    for name, default in new.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.steps and args.epochs:
        raise UserError("--steps would have no effect beside --epochs; leave one out")
    args.steps = args.steps if args.steps is not None or args.epochs else STEPS
    if args.score_column:
        args.score_key = args.score_column
    check_data_flags(args, parser, ("validation_fraction", "score_column", "experts"), WORLD_FLAGS)
    check_score_flags(args, parser)
    world_mix(args)                             # out of range is told now
    if args.muon is None:
        args.muon = 10.0 if args.preset == "toy" and not args.checkpoint else 0.0
    args.out = args.out or ("runs/tuned" if args.checkpoint else "runs/base")
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.checkpoint else 2e-3
    for name, low, high in RANGES:
        if getattr(args, name) is not None:
            in_range(f"--{name}", getattr(args, name), low, high)
    return args


def check_score_flags(args, parser):
    """UserError for flags about scores, experts and averages that do not go together."""
    idle = [f"--{name}" for name in ("score_head", "score_null", "score_dropout")
            if getattr(args, name) != parser.get_default(name) and not args.score_column]
    if idle:
        raise UserError(f"{' and '.join(idle)} would have no effect without --score_column; name the column")
    idle = [f"--{name}" for name in ("oversample", "experts_only")
            if getattr(args, name) != parser.get_default(name) and not args.experts]
    if idle:
        raise UserError(f"{' and '.join(idle)} would have no effect without --experts; name the folder")
    if args.save_weights == "power" and not args.sigma_rel:
        raise UserError("--save_weights power needs --sigma_rel: the width of the average")
    for width in args.sigma_rel or []:
        averages.gamma_of(width)


def main():
    args = parse_args()
    rank, step, steps = train(args)
    if rank > 0:
        return
    pictures = ", loss.png" * draw_losses(args.out)
    which = "latest" if args.save_weights == "raw" else "averaged"
    print(f"wrote {args.out}: tangoflux.safetensors ({which} weights), "
          f"vae.safetensors, text_encoder/, config.json, ema.safetensors, state.pt, log.jsonl"
          f"{', reading.json' * (Path(args.out) / 'reading.json').is_file()}{', averages/' * bool(args.sigma_rel)}"
          f"{pictures}")
    if step < steps:
        print(f"stopped at step {step} of {steps}: the same command goes on")
    score = " --score 1 --guidance_scale 1.5" if args.score_column else ""
    print(f'next: python sample.py --checkpoint {args.out}{score} --prompt "rain followed by a violin"')
    if args.score_column:
        print(f"      or python expert_iteration.py --checkpoint {args.out} --data {args.data}")


if __name__ == "__main__":
    run_main(main)
