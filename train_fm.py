"""Train or fine-tune the flow: the velocity from noise to latents of captioned audio (paper A.5).

    python train_fm.py                      # a new toy model, on the world; again: it goes on
    python train_fm.py --checkpoint checkpoints/toy/clean --data my.jsonl --score_column score
    torchrun --nproc_per_node 5 train_fm.py --preset tangoflux --codec FOLDER --batch_size 16 \\
        --text_encoder google/flan-t5-large --data wavcaps.jsonl --epochs 80 \\
        --learning_rate 5e-4 --warmup_steps 2000 --t_mean 0                     # the paper's size

A run's folder is a model of AVERAGED weights. Example i follows from (seed, i): resume is exact.

Where paper and official code differ, we do this:
  - the duration embedder is trained (the official optimizer forgets it);
  - the text encoder is frozen (paper; or --train_text), its dropout off (official: by accident on);
  - t is logit-normal(0.8, 1), nearer to noise (paper: mean 0), and continuous (official: a grid);
  - Muon trains the blocks' matrices of a new toy flow, AdamW the rest (both: AdamW for all);
  - a row whose text is dropped gets guidance's null condition: T5("") as text, its own duration
    (official: zeros for both) and no score (joint guidance: second paper, Eq. 2);
  - text padding is hidden from attention, weight decay spares vectors, gradients are clipped.
B batch, L latent frames, C latent channels, S text tokens, T text width.
"""
import functools
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import (DATA_FLAGS, gather, manifest_cache, prepare, read_rows, split_rows, with_experts,
                  world_cache)
from lib.common import (BASE, DEVICE, DTYPE, UserError, append_jsonl, autocast_for, derive_seed,
                        flag, generator, parse_flags, read_json, reading, relative_to_here,
                        run_main, stop_on_signal)
from lib.fast import mean_over_ranks, start_ranks, wait_for_ranks
from lib.text import Condition, load_text_encoder, null_score, null_tokens, print_row
from lib.weights import (draw_log, learning_rate, load_state, make_optimizer, muon_takes,
                         run_folder, save_state, save_tensors, set_rate, start_averages, trainable,
                         trim_log, update_averages, weights_replaced)
from model import PRESETS, SCORE_HEADS, TangoFlux, load_model, save_model, with_score_head
from vae import load_codec

FLAGS = {"model": [
    flag("--checkpoint", None, "model folder or hub id to start from; none: a new flow"),
    flag("--codec", str(BASE), "model folder whose codec a new flow takes"),
    flag("--text_encoder", str(BASE), "T5 of a new flow, folder or hub id (paper: flan-t5-large)"),
    flag("--preset", "toy", "size of a new flow (paper: tangoflux)", choices=list(PRESETS)),
    flag("--train_text", False, "training of the text encoder as well (paper: frozen)"),
    flag("--max_text_length", 64, "longest prompt in tokens (official: 64)", 2, 1e5),
], "your own audio": DATA_FLAGS, "data": [
    flag("--scenes", None, "training scenes; none: those visited, at most 100,000", 1, kind=int),
    flag("--val_scenes", 512, "held-out scenes", 1),
    flag("--world_seed", 0, "seed of the training scenes", 0),
    flag("--events", [], "their sounds, such as rain beep violin; none: all", kind=str, nargs="*"),
    flag("--relations", [0.14, 0.24, 0.34, 0.28], "weights of scenes with one sound, two at once, "
         "two in order, three in order", 1e-6, 1e6, nargs=4),
    flag("--counted", 0.35, "share of countable sounds whose number is named", 0, 1),
    flag("--weak", 0.0, "share of captions false in one thing, as the web's are", 0, 1),
    flag("--validation_fraction", 0.05, "held-out share of a manifest's files", 0, 0.99),
    flag("--cache", None, "folder of the latents; none: in cache/, named after the data"),
    flag("--workers", 2, "processes that render or read clips; 0: this one", 0, 256),
], "flow matching": [
    flag("--t_mean", 0.8, "mean of the logit-normal t (paper A.5: 0)", -20, 20),
    flag("--t_std", 1.0, "deviation of the logit-normal t (paper A.5: 1)", 1e-6, 20),
    flag("--t_grid", 0, "noise levels of t; 0: continuous (official: 1000)", 0),
    flag("--dropout", 0.1, "share of examples without text (paper: 0; official: 0.1)", 0, 1),
    flag("--null", "empty_prompt", "what replaces a lost text: T5 of an empty prompt, or zeros for "
         "text and duration", choices=["empty_prompt", "official_zeros"]),
], "scores and experts (second paper, III-B, III-D)": [
    flag("--score_column", None, "column of --data whose numbers condition the flow"),
    flag("--score_head", None, "where scores enter; none: as before, or v1", choices=SCORE_HEADS),
    flag("--score_null", "zero", "embedding of no score: 0, or that of the mean score (Eq. 2)",
         choices=["zero", "scalar"]),
    flag("--score_dropout", 0.1, "share of examples losing their score alone (paper: 0.1)", 0, 1),
    flag("--experts", None, "folder of clips that expert_iteration.py kept, to join --data"),
    flag("--oversample", 5, "times that an epoch holds each kept clip (paper: 5)", 1),
    flag("--experts_only", False, "training on the kept clips alone"),
], "optimisation": [
    flag("--train_steps", 12500, "optimizer steps", 1, alias="--steps"),
    flag("--epochs", None, "passes, in place of steps (paper: 80, then 65)", 1e-9, kind=float),
    flag("--batch_size", 32, "examples of a process (paper: 16 on 5 GPUs)", 1),
    flag("--learning_rate", None, "peak rate; none: 2e-3, tuned 1e-4 (paper: 5e-4)", 0, kind=float),
    flag("--warmup_steps", None, "warm-up; none: a tenth, at most 300 (paper: 2000)", 0, kind=int),
    flag("--decay", True, "linear decay of the rate to 0 (second paper: --no-decay)"),
    flag("--muon", None, "Muon's rate over AdamW's; none: 10 for a new toy, else 0", 0, kind=float),
    flag("--beta1", 0.9, "beta1 of AdamW (paper: 0.9)", 0, 0.99999),
    flag("--beta2", 0.95, "beta2 of AdamW (paper: 0.95)", 0, 0.99999),
    flag("--weight_decay", 0.01, "weight decay of matrices (official: 0.01)", 0, 10),
    flag("--clip", 1.0, "largest gradient norm; 0: no clipping (official)", 0, 1e9),
    flag("--ema", 0.999, "decay of the exponential weight average (official: none)", 0, 1),
    flag("--sigma_rel", None, "widths of power-function averages (second paper: 0.05 0.1)", 1e-3,
         0.2886, kind=float, nargs="+"),
    flag("--snapshot_every", 250, "steps between files of the power-function averages", 1),
], "run": [
    flag("--out", None, "folder; none: runs/base, with --checkpoint runs/tuned"),
    flag("--seed", 0, "seed of initialisation, order, noise, t, dropout", 0, 2 ** 63),
    flag("--max_minutes", 1e6, "minutes after which it stops; the same command goes on", 0, 1e9),
    flag("--save_every", 250, "steps between saves", 1),
    flag("--save_weights", "ema", "weights of the saved model: exponential average, as trained, or "
         "average of the first --sigma_rel", choices=["ema", "raw", "power"]),
    flag("--log_every", 10, "steps between rows of log.jsonl", 1),
    flag("--val_every", 250, "steps between validations", 1),
    flag("--val_clips", 256, "held-out clips of a validation", 1), DTYPE, DEVICE]}
SCENES = 100_000        # of the built-in world
DECISIVE = ("checkpoint preset train_text max_text_length seed batch_size learning_rate muon beta1 "
            "beta2 weight_decay clip ema dtype dropout null t_mean t_std t_grid decay score_column "
            "score_head score_null score_dropout oversample experts_only sigma_rel steps "
            "warmup_steps processes").split()   # a run goes on with the same values only


# ------------------------------------------------------------------------- the algorithm

def logit_normal_t(count, rng, mean=0.0, std=1.0, grid=None):
    """t (count,) = sigmoid(normal(mean, std)) in (0, 1) (paper A.5), with `grid` on its levels."""
    u = torch.sigmoid(mean + std * torch.randn(count, generator=rng))
    return on_grid(1 - u, grid) if grid else u      # levels fall: 1 - u, so that t has this mean


def on_grid(u, grid):
    """The official code's t of a logit-normal u, by which it indexes `grid` falling levels."""
    return (grid - torch.floor(grid * u)) / grid


def interpolate(x1, x0, t):
    """x_t = (1 - t) x_1 + t x_0, v = x_0 - x_1 (paper Eq. 4): data, noise (B, L, C), t (B,)."""
    t = t[:, None, None]                                                        # (B, 1, 1)
    return (1 - t) * x1 + t * x0, x0 - x1


def flow_matching_loss(velocity, target):
    """Paper Eq. 5, a mean over (L, C), in float32: the batch's mean, and each example's (B,)."""
    per_example = (velocity.float() - target.float()).square().mean((1, 2))     # (B,)
    return per_example.mean(), per_example


class Batch(NamedTuple):
    """One training batch on the device."""
    x1: torch.Tensor                    # (B, L, C) normalised latents
    x0: torch.Tensor                    # (B, L, C) noise
    t: torch.Tensor                     # (B,)
    ids: torch.Tensor | None            # (B, S) tokens, padded to the longest of the batch
    hidden: torch.Tensor | None         # (B, S, T) of a frozen encoder; None: ids are encoded
    mask: torch.Tensor                  # (B, S) bool, real tokens
    duration: torch.Tensor              # (B,) seconds
    drop_text: torch.Tensor             # (B,) bool, rows that lose their text
    score: torch.Tensor | None = None   # (B,) NaN = none; None: a flow without scores

    def to(self, device):
        return Batch(*[part if part is None else part.to(device) for part in self])


def text_condition(encoder, batch, null="empty_prompt"):
    """Condition of a batch; dropped rows get T5("") padded to their own length, as in guidance."""
    lengths = batch.mask.sum(1)                                                 # (B,)
    null_ids, null_mask, null_visible = null_tokens(lengths)                    # (B, S)
    is_null = batch.drop_text[:, None] & (null == "empty_prompt")               # (B, 1)
    pooled_mask = torch.where(is_null, null_mask, batch.mask)                   # (B, S)
    visible = torch.where(is_null, null_visible, batch.mask)                    # (B, S)
    if batch.hidden is None:
        ids = torch.where(is_null, null_ids, batch.ids)
        hidden = encoder.encode(ids, pooled_mask)                               # (B, S, T)
    else:
        longest = lengths.argmax()[None]    # every null row is a prefix of the longest one
        null_hidden = encoder.encode(null_ids[longest], null_mask[longest]).to(batch.hidden.dtype)
        hidden = torch.where(is_null[..., None], null_hidden, batch.hidden)     # (B, S, T)
    return Condition(hidden, visible, pooled_mask, batch.duration, batch.score)


def batch_loss(flow, encoder, batch, null="empty_prompt"):
    """Flow-matching loss of a batch: (mean, per example (B,))."""
    xt, target = interpolate(batch.x1, batch.x0, batch.t)
    condition = text_condition(encoder, batch, null)
    text, *rest = flow.condition_inputs(condition)                              # (B, S+1, T)
    if null == "official_zeros":            # of text AND duration token, not of the pooled text
        text = text * ~batch.drop_text[:, None, None]
    velocity = flow.transformer(xt, batch.t, text, *rest)                       # (B, L, C)
    return flow_matching_loss(velocity, target)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, epoch, count):
    """The order in which an epoch visits its `count` examples: a permutation from (seed, epoch)."""
    return torch.randperm(count, generator=generator(seed, "order", epoch)).numpy()


def noise_of(rngs, shape):
    """Noise (B, *shape), an example from each generator."""
    return torch.stack([torch.randn(shape, generator=rng) for rng in rngs])


def collate(data, codec, chosen, eps, x0, t, drop_text, drop_score):
    """Rows `chosen` (B,) of the cache, with their noise, t, and what each loses -> Batch."""
    mean, std, ids, hidden, mask, duration = gather(data, chosen)
    x1 = mean + std * eps                           # a sample of the codec's posterior (B, L, C)
    score = None
    if data.scores is not None:
        score = data.scores[chosen]                                             # (B,)
        score = torch.where(drop_text | drop_score, null_score(score), score)
    device = codec.latent_mean.device
    x1 = codec.normalise(x1.to(device))
    return Batch(x1, x0, t, ids, hidden, mask, duration, drop_text, score).to(device)


def training_batch(data, codec, seed, first, count, dropout=0.1, t_mean=0.0, t_std=1.0, t_grid=None,
                   score_dropout=0.0):
    """`count` examples from `first` on of endless shuffled epochs; each follows from (seed, i)."""
    n = len(data.rows)
    shape = data.cache.mean.shape[1:]                                           # (L, C)
    numbers = range(first, first + count)
    chosen = [data.rows[epoch_order(seed, i // n, n)[i % n]] for i in numbers]
    rngs = [generator(seed, "example", i) for i in numbers]
    eps = noise_of(rngs, shape)
    x0 = noise_of(rngs, shape)
    t = torch.cat([logit_normal_t(1, rng, t_mean, t_std, t_grid) for rng in rngs])
    draws = torch.stack([torch.rand(2, generator=rng) for rng in rngs])         # (B, 2)
    drop_text = draws[:, 0] < dropout
    drop_score = draws[:, 1] < score_dropout
    return collate(data, codec, np.array(chosen), eps, x0, t, drop_text, drop_score)


def validation_batches(data, codec, count, size=64):
    """A fixed grid: first rows, own noise, no dropout, t logit-normal(0, 1), not --t_mean's."""
    rows = data.rows[:count]
    n = len(rows)
    shape = data.cache.mean.shape[1:]                                           # (L, C)
    order = torch.randperm(n, generator=generator("validation", "t"))
    t = torch.special.ndtri((torch.arange(n) + 0.5) / n).sigmoid()[order]
    rngs = [generator("validation", i) for i in range(n)]
    eps = noise_of(rngs, shape)
    x0 = noise_of(rngs, shape)
    nothing = torch.zeros(n, dtype=torch.bool)      # no row loses its text or score
    for start in range(0, n, size):
        own = slice(start, start + size)
        yield collate(data, codec, rows[own], eps[own], x0[own], t[own], nothing[own], nothing[own])


@torch.no_grad()
def validate(flow, encoder, batches, autocast, suffix=""):
    """Entries of the log: the mean loss over the grid, and per fifth of t (None: no t in it)."""
    losses, ts = [], []
    for batch in batches:
        with autocast():
            losses.append(batch_loss(flow, encoder, batch)[1].cpu())
        ts.append(batch.t.cpu())
    losses = torch.cat(losses)
    fifths = (torch.cat(ts) * 5).long()
    groups = [losses[fifths == k] for k in range(5)]
    bins = [group.mean().item() if len(group) else None for group in groups]
    return {f"val_loss{suffix}": losses.mean().item(), f"val_bins{suffix}": bins}


# ------------------------------------------------------------------------- parts, data, the run

def world_data(args, codec, encoder, samples):
    """(training Data, held-out Data) of the built-in world; a clip has `samples` samples."""
    only = tuple(args.events)
    names = "_".join(["", *only]).replace(" ", "-")
    folder = Path(args.cache or f"cache/world_train{names}")
    scenes = args.scenes or SCENES
    visited = args.train_steps * args.batch_size * args.processes
    whole = args.scenes or args.cache or args.epochs or (folder / "text.json").is_file()
    if visited < SCENES and not whole:          # a short run renders the scenes that it visits
        scenes = math.ceil(visited / 256) * 256
        folder = f"cache/world_train{names}_{scenes}"
    cache = world_cache(folder, codec, "train", scenes, args.world_seed, samples, args.workers,
                        relations=tuple(args.relations), counted=args.counted, weak=args.weak,
                        only=only)
    folder = f"{args.cache}_val" if args.cache else f"cache/world_val{names}_{args.val_scenes}"
    held = world_cache(folder, codec, "val", args.val_scenes, 0, samples, args.workers, only=only)
    text = encoder, args.max_text_length, not args.train_text
    return prepare(cache, cache.kept, *text), prepare(held, held.kept, *text)


def manifest_data(args, codec, encoder, samples):
    """(training Data, held-out Data) of a manifest, and of clips that expert_iteration.py kept."""
    path = Path(args.data).resolve()
    folder = args.cache or f"cache/{path.parent.name}_{path.stem}"
    rows = read_rows(args)
    cache = manifest_cache(folder, codec, args.data, rows, samples, args.crop, args.workers)
    readable = [{**cache.rows[i], "number": int(i)} for i in cache.kept]
    training, held = split_rows(readable, args.validation_fraction)
    training = [row["number"] for row in training]
    held = [row["number"] for row in held]
    if args.experts:
        cache = with_experts(cache, args.experts)
        experts = list(range(len(rows), len(cache.rows)))
        training = experts if args.experts_only else training + experts * args.oversample
    frozen = not (args.train_text or args.experts)              # then its states are cached
    data = prepare(cache, np.array(training), encoder, args.max_text_length, frozen)
    if args.score_column:
        rows += cache.rows[len(rows):]          # not the cache's own, which may be another column's
        scores = np.array([row["score"] for row in rows], np.float32)           # None: NaN
        data = data._replace(scores=torch.from_numpy(scores))
    return data, data._replace(rows=np.array(held or training))


def new_flow(codec, text_encoder, preset, seed):
    """A random flow, its codec and its text encoder: world.reader's, a model's, or a hub id."""
    codec = load_codec(codec)
    encoder = load_text_encoder(text_encoder)
    config = {**PRESETS[preset], "in_channels": codec.latent_channels,
              "joint_attention_dim": encoder.width, "text_encoder_name": "text_encoder"}
    config["audio_seq_len"] = round(config["max_duration"] * codec.sampling_rate) // codec.hop
    with torch.random.fork_rng(devices=[]):     # the one place with the global generator
        torch.manual_seed(derive_seed(seed, "flow"))
        return TangoFlux(config), codec, encoder


def load_all(args, rank, device):
    """(flow, codec, text encoder, training Data, held-out Data), ready to train."""
    if rank > 0:                                # the first process builds the caches
        wait_for_ranks(args.processes)
    if args.checkpoint:
        model = load_model(args.checkpoint)
        flow, codec, encoder = model.flow, model.codec, model.text
    else:
        flow, codec, encoder = new_flow(args.codec, args.text_encoder, args.preset, args.seed)
    flow, codec, encoder = flow.to(device).train(), codec.to(device), encoder.to(device)
    encoder.train(args.train_text).requires_grad_(args.train_text).t5.eval()    # no dropout
    samples = round(flow.config["max_duration"] * codec.sampling_rate)
    data, held = (manifest_data if args.data else world_data)(args, codec, encoder, samples)
    if args.score_column:
        known = data.scores[~data.scores.isnan()]
        if len(known.unique()) < 2:
            raise UserError("--score_column is empty or the same in every row: name another column")
        head = args.score_head or flow.config.get("score_head") or "v1"
        mean, std = known.mean(), known.std(correction=0)
        flow, _ = with_score_head(flow, head, args.score_null, mean, std, args.seed)
    if rank == 0:
        wait_for_ranks(args.processes)
    return flow, codec, encoder, data, held


def with_defaults(settings):
    """All flags as a namespace, with the values of `settings`; what depends on others is set."""
    args = parse_flags(__doc__, FLAGS, [], settings)
    args.score_key = args.score_column or args.score_key
    args.out = args.out or ("runs/tuned" if args.checkpoint else "runs/base")
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.checkpoint else 2e-3
    if args.muon is None:
        args.muon = 10.0 if args.preset == "toy" and not args.checkpoint else 0.0
    if args.checkpoint and args.preset != "toy":
        raise UserError("--preset is the size of a new flow: leave it out, or --checkpoint")
    if (args.score_column or args.experts) and not args.data:
        raise UserError("--score_column and --experts need --data: the built-in world has neither")
    if args.save_weights == "power" and not args.sigma_rel:
        raise UserError("--save_weights power needs --sigma_rel: the width of the average")
    if (Path(args.out) / "reading.json").is_file():
        args.text_encoder = args.out            # new flows once made their own, and go on with it
    return args


def decisive_settings(args, data):
    """{name: value} of what must be the same when a run goes on; sets steps and warm-up."""
    args.steps = args.train_steps
    if args.epochs:
        args.steps = math.ceil(args.epochs * len(data.rows) / (args.batch_size * args.processes))
    config = Path(args.out) / "config.json"
    if args.warmup_steps is None and not args.decay and config.with_name("state.pt").is_file():
        with reading(config):                   # the run's own, which followed from fewer steps
            args.warmup_steps = read_json(config).get("training", {}).get("warmup_steps")
    if args.warmup_steps is None:
        args.warmup_steps = max(1, min(300, args.steps // 10))
    settings = {name: getattr(args, name) for name in DECISIVE}
    settings |= {"latents": data.cache.key, "training clips": len(data.rows)}
    if not args.decay:                          # then a longer run begins as a shorter one
        del settings["steps"]
    return relative_to_here(settings)


def train(**settings):
    """A run; settings: flags by name. One found in `out` goes on -> rank, out, steps done, all."""
    args = with_defaults(settings)
    with run_folder(args.out, "train_fm.py", args.cache):
        return train_in(Path(args.out), args)


def train_in(out, args):
    """The run of `train` in its folder."""
    began = time.monotonic()
    rank, args.processes, device = start_ranks(args.device)
    autocast = autocast_for(args.dtype, device, print if rank == 0 else lambda line: None)

    # model, data, and averages of what is trained
    flow, codec, encoder, data, held = load_all(args, rank, device)
    grid = list(validation_batches(held, codec, args.val_clips))
    trained_text = encoder if args.train_text else None
    parameters = trainable(flow, trained_text)
    betas = args.beta1, args.beta2
    optimizer = make_optimizer(parameters, betas, args.weight_decay, args.muon, muon_takes)
    widths = args.sigma_rel or []
    averages, memory = start_averages(parameters, widths)
    average = averages[widths[0] if args.save_weights == "power" else ""]
    saved = parameters if args.save_weights == "raw" else average

    # resume
    decisive = decisive_settings(args, data)
    step, minutes = load_state(out, parameters, optimizer, memory, decisive)
    began -= 60 * minutes                               # the clock of the whole run
    stop_at = minutes + args.max_minutes
    if rank == 0:
        save_model(out, codec=codec, text=None if trained_text else encoder)
        trim_log(out, step or -1)                       # a new run writes its own row of step 0
        print(f"{len(data.rows)} training clips; step {step} of {args.steps}")

    losses = []             # since the last row of the log
    last_step = {}          # rate and gradient norm of the last step
    out_of_time = torch.zeros(1, device=device)     # a tensor: all processes stop at once
    bar = tqdm(None, "training", args.steps, initial=step, disable=rank > 0 or None)
    with stop_on_signal() as stopped:
        while True:
            last = step >= args.steps or bool(out_of_time)
            # log the steps since the last row; at a save, too, because a resume knows none of them
            validates = (last and not stopped) or step % args.val_every == 0
            saves = last or step % args.save_every == 0
            logs = validates or saves or step % args.log_every == 0
            if rank == 0 and (losses or step == 0) and logs:
                row = {"step": step, "minutes": minutes}
                if losses:
                    row |= {"loss": float(np.mean(losses)), **last_step}
                if validates:
                    row |= validate(flow, encoder, grid, autocast)
                    with weights_replaced(parameters, averages[""]):
                        row |= validate(flow, encoder, grid, autocast, "_ema")
                append_jsonl(out / "log.jsonl", row)
                print_row(bar, row, stopped)
                losses = []

            # save
            if rank == 0 and step and (last or step % args.snapshot_every == 0):
                for width in widths:
                    save_tensors(out / f"averages/{width}_{step:09d}.safetensors", averages[width])
            if rank == 0 and step and saves:
                save_state(out, parameters, optimizer, memory, step, decisive, minutes)
                record = {"training": relative_to_here(vars(args)) | decisive}
                with weights_replaced(parameters, saved):
                    save_model(out, flow=flow, text=trained_text, extra=record)
                save_tensors(out / "ema.safetensors", average)
            if last:
                return rank, out, step, args.steps

            # rate, batch, forward and backward
            rate = learning_rate(step, args.learning_rate, args.warmup_steps, args.steps,
                                 "linear" if args.decay else "constant")
            set_rate(optimizer, rate)
            first = (step * args.processes + rank) * args.batch_size
            batch = training_batch(data, codec, args.seed, first, args.batch_size, args.dropout,
                                   args.t_mean, args.t_std, args.t_grid, args.score_dropout)
            with autocast():
                loss, _ = batch_loss(flow, encoder, batch, args.null)
            optimizer.zero_grad()
            loss.backward()

            # means over processes: gradients, loss, and whether the time of any is over
            minutes = (time.monotonic() - began) / 60
            out_of_time.fill_(minutes >= stop_at or bool(stopped))
            gradients = [p.grad for p in parameters.values() if p.grad is not None]
            mean_over_ranks([*gradients, loss.detach(), out_of_time], args.processes)

            # clip, step, average
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), args.clip or math.inf).item()
            losses.append(loss.item())
            last_step = {"lr": rate, "grad_norm": norm}
            if not math.isfinite(losses[-1] + norm):
                reason = f"loss {losses[-1]:g}, gradient norm {norm:g}"
                raise UserError(f"step {step}: {reason}; lower --learning_rate")
            optimizer.step()
            step += 1
            bar.update()
            update_averages(averages, parameters, step, args.ema)


def main():
    args = parse_flags(__doc__, FLAGS)
    rank, out, step, steps = train(**vars(args))
    if rank == 0:
        draw_log(out, [("loss", "log", {"training": "loss", "held-out clips": "val_loss_ema"})])
        more = "; the same command goes on" if step < steps else ""
        print(f"wrote {out} after step {step} of {steps}{more}")
        prompt = " followed by ".join((args.events or ["rain", "a violin"])[:2])
        print(f'next: python sample.py --checkpoint {out} --prompt "{prompt}"')


if __name__ == "__main__":
    run_main(main)
