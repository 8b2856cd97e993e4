"""Training of the two small CLAPs of the built-in world; the script is `python reward.py train_clap`.

Contrast alone teaches which sounds are there; order and number are learned late, since a batch seldom holds the same
sounds twice. So a batch is made of families: a scene and scenes that are almost it, each with its sound and caption
(two sounds exchanged, another count, "and" for "then", one sound replaced, added or left out), and each clip stands
beside more such captions, its near misses. A reward needs both: of one prompt's clips the right one has to score
best, not only of one clip's captions. And during training linear layers have to tell
what is thrown away afterwards: from each tower's pooled vector which event has which place and count (as reading.py
teaches the flow's text encoder), from the audio tower's last grid which events sound when, and how often they strike.
The audio is spoiled in each batch as for the taggers, so that clips of a codec and a generator are no news.

Letters: B batch, H near misses of a clip, D embedding width, F mel frames (32 ms), M mel bands, N scenes,
R read-outs (4 places x events + counts), T steps of 256 ms, K events, Q countable.
"""
import dataclasses
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as functional
from tqdm import tqdm

from clap import build
from common import (UserError, append_jsonl, check_writable, choose_device, derive_seed, generator, load_tensors,
                    read_json, read_jsonl, save_tensors, write_json, write_jsonl)
from reading import PLACES, reading_targets
from text import make_tokenizer
from train_tagger import augment, batch_indices, targets
from training import choose_dtype, cosine_decay, load_state, make_optimizer, save_state, set_rate, trim_log
from world import (COUNTABLE, EVENT_NAMES, NUMBERS, SHORTEST, Scene, SceneEvent, World, caption, degrade, known_words,
                   perform, spans)

# 128 mels x 126 frames of 32 ms, stretched to an image of 128 x 128. The original folds time into four rows of its
# image (64 mels of 256); HTSAT knows places only relative to each other, and in a folded image "below" is both a lower
# sound and a later one: order was hardly learned. Silence after a short clip, not repetition: three beeps stay three.
BANDS, HOP = 128, 512
PREPROCESSOR = dict(feature_extractor_type="ClapFeatureExtractor", feature_size=BANDS, sampling_rate=16000,
                    hop_length=HOP, max_length_s=4, fft_window_size=1024, frequency_min=50, frequency_max=8000,
                    truncation="rand_trunc", padding="pad", padding_value=0.0, top_db=None)
HARDER = {"relations": (0.1, 0.3, 0.35, 0.25), "counted": 0.7}          # mixtures and counts are learned slowest
KINDS = (0.3, 0.3, 0.1, 0.15, 0.15)                                     # of near misses: order and count slower still
NEAR_MISSES, STEPS, FRAMES = 4, 16, 64                                  # of 256 ms; of 64 ms, as in targets
TRAINED_WITH = ("seed", "scene_seed", "scenes", "family", "degraded", "width", "text_width", "steps", "batch_size",
                "learning_rate", "weight_decay", "muon", "reading_weight", "hearing_weight", "dtype")
LARGEST_SCALE = math.log(100)                                           # as CLIP: logits at most 100 times the cosine


def new_clap(width, text_width, seed):
    """A toy Clap: two HTSAT stages of `width` and 2 * width; three RoBERTa layers of `text_width`."""
    tokenizer = make_tokenizer(known_words(), ("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>")
    text = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=text_width, num_hidden_layers=3,
                num_attention_heads=4, intermediate_size=2 * text_width, max_position_embeddings=82,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    audio = dict(window_size=8, num_mel_bins=BANDS, spec_size=128, patch_size=8, patch_stride=[8, 8], depths=[1, 3],
                 num_attention_heads=[4, 8], num_hidden_layers=2, patch_embeds_hidden_size=width,
                 hidden_size=2 * width, mlp_ratio=3.0, hidden_dropout_prob=0.0, num_classes=1)
    clap = build({"text_config": text, "audio_config": audio, "projection_dim": 128, "logit_scale_init_value": 30.0},
                 tokenizer, PREPROCESSOR, seed)
    look_both_ways(clap.clap.audio_model.audio_encoder)
    return clap


@torch.no_grad()
def look_both_ways(encoder, steepest=0.7):
    """Start each layer's heads with a bias to what is earlier, to what is later, and between (0 in the original).

    The position bias is all that tells HTSAT's attention before from after, and from 0 it is long in coming.
    """
    for stage in encoder.layers:
        for block in stage.blocks:
            table = block.attention.self.relative_position_bias_table                      # (15 * 15, heads)
            later = torch.arange(-7.0, 8).repeat(15)                                       # columns of query - key
            table.copy_(later[:, None] * torch.linspace(-steepest, steepest, table.shape[1]))


# ----------------------------------------------------------------------------- captions that are wrong by a little

def almost(rng, relation, events):
    """A scene of (name, count or None) that is nearly the given one but not it -> (relation, events).

    A count that is not named is not changed: "beeping" is right for any number of beeps.
    """
    names = [name for name, _ in events]

    def other():
        return str(rng.choice([name for name in EVENT_NAMES if name not in names])), None

    while True:
        changed, turned = list(events), relation
        kind, place = rng.choice(5, p=KINDS), rng.integers(len(events))
        if kind == 0 and relation == "then":                            # two neighbours exchanged
            place = rng.integers(len(events) - 1)
            changed[place:place + 2] = changed[place + 1], changed[place]
        elif kind == 1 and events[place][1]:                            # another count
            changed[place] = (names[place], int(rng.choice([count for count in NUMBERS if count != events[place][1]])))
        elif kind == 2 and len(events) == 2:                            # "and" for "then", or the reverse
            turned = "then" if relation == "and" else "and"
            changed = changed if rng.random() < 0.5 else changed[::-1]
        elif kind == 3:                                                 # one replaced
            changed[place] = other()
        elif kind == 4 and len(events) > 1 and rng.random() < 0.5:      # one left out
            del changed[place]
        elif kind == 4 and len(events) < 3 and relation != "and":       # one added
            changed.insert(rng.integers(len(events) + 1), other())
            turned = "then" if relation == "then" or rng.random() < 0.5 else "and"
        else:
            continue
        if changed != list(events) or turned != relation:
            return "single" if len(changed) == 1 else ("then" if len(changed) == 3 else turned), changed


def near_misses(rng, relation, events, number):
    """`number` different captions of scenes that are `almost` the given one, but false."""
    wrong = set()
    while len(wrong) < number:
        wrong.add(caption(rng, *almost(rng, relation, events)))
    return sorted(wrong)


def relative(scene, rng):
    """A Scene that is `almost` the given one: its events laid out anew, within its duration where that is enough."""
    events = [(event.name, event.count) for event in scene.events]
    while True:
        relation, changed = almost(rng, scene.relation, events)
        duration = max(scene.duration, 0.7 * len(changed)) if relation == "then" else scene.duration
        laid = [SceneEvent(name, round(float(onset), 4), round(float(offset), 4), count) for (name, count), (
            onset, offset) in zip(changed, spans(rng, relation, len(changed), duration))]
        if all((event.offset - event.onset) / (event.count or 1) >= SHORTEST for event in laid):
            return Scene(scene.index, caption(rng, relation, changed), relation, laid, duration, scene.degradation)


def story(scene):
    """What makes two scenes of the world the same to a caption: relation, names and counts, in order for "then"."""
    parts = [(event.name, event.count) for event in scene.events]
    return scene.relation, tuple(parts if scene.relation == "then" else sorted(parts, key=str))


# ----------------------------------------------------------------------------- scenes

def _render(job):
    """One worker's share: log-mels (N, F, M) float16 and the scenes as dicts, families of `size` one after another."""
    torch.set_num_threads(1)
    from clap import FrontEnd
    settings, size, indices = job
    source, front, mels, rows = World(**settings), FrontEnd(**PREPROCESSOR), [], []
    for index in indices:
        audio, scene = source.render(index)
        rng = np.random.default_rng(derive_seed("family", json.dumps(source.settings()), index))
        clips = [(audio, scene)]
        for _ in range(size - 1):
            near = relative(scene, rng)
            audio = perform(near, rng, source.split)
            clips.append((degrade(audio, *near.degradation, rng) if near.degradation else audio, near))
        for audio, near in clips:
            audio = torch.from_numpy(audio.astype(np.float32))
            mels.append(front.log_mel(audio[None, :front.samples])[0].half().numpy())
            rows.append(dataclasses.asdict(near))
    return np.stack(mels), rows


def render_scenes(folder, settings, count, size, workers, chunk=50):
    """Scenes of World(**settings), of which each `size` are a family: log-mels (N, F, M) float16 and N Scenes.

    N is `count` rounded down to whole families. They are kept in `folder` for a resume.
    """
    key, folder = {"world": World(**settings).settings(), "scenes": count, "family": size,
                   "front": PREPROCESSOR}, Path(folder)
    made = folder / "scenes.json"
    if not (made.is_file() and read_json(made) == json.loads(json.dumps(key))):
        jobs = [(settings, size, range(start, min(start + chunk, count // size)))
                for start in range(0, count // size, chunk)]
        made.unlink(missing_ok=True)                                    # a kill from here on leaves nothing that counts
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            parts = list(tqdm(pool.imap(_render, jobs), "rendering", len(jobs), unit=f" x {chunk * size}"))
        save_tensors(folder / "scenes.safetensors", {"mels": torch.from_numpy(np.concatenate([p[0] for p in parts]))})
        write_jsonl(folder / "scenes.jsonl", [row for part in parts for row in part[1]])
        write_json(made, key)                                           # last: it says that the others are whole
    scenes = [Scene(**{**row, "events": [SceneEvent(**event) for event in row["events"]]})
              for row in read_jsonl(folder / "scenes.jsonl")]
    return load_tensors(folder / "scenes.safetensors")["mels"], scenes


def spoiled(mels, scenes, random):
    """Log-mels in dB (B, F, M) as other machines would leave them, by train_tagger.augment, whose unit is 20 dB.

    -> them, and what sounds when: activity (B, T, K) in [0, 1], strikes (B, T, Q), both moved along with the audio.
    """
    truth = [targets(scene, EVENT_NAMES, COUNTABLE, FRAMES)[:2] for scene in scenes]       # at 64 and 32 ms
    activity, rate = (torch.from_numpy(np.stack(column)).float() for column in zip(*truth))
    mels, activity, rate = augment(mels.transpose(1, 2) / 20, activity, rate, random, 1024 // HOP)
    activity, rate = activity.unflatten(1, (STEPS, -1)).mean(2), rate.unflatten(1, (STEPS, -1)).sum(2)
    return mels.transpose(1, 2) * 20, activity, rate


def texts_of(scene, rng):
    """A caption of the scene in new words, and its near misses."""
    events = [(event.name, event.count) for event in scene.events]
    return caption(rng, scene.relation, events), near_misses(rng, scene.relation, events, NEAR_MISSES)


# ----------------------------------------------------------------------------- the loss

def contrastive_loss(audio, text, misses, scale_audio, scale_text, same):
    """Symmetric cross-entropy (CLIP) in which every clip also sees all near misses; (loss, share ranked right).

    audio, text (B, D) and misses (B * H, D) of unit length; scales: the two factors on the cosines; same (B, B)
    bool: clip i and caption j tell the same story, so that j is no wrong answer for i, nor i for j (its diagonal is not
    read). No near miss is ever masked: each of the B * H is a wrong answer for every clip of the batch, even for a clip
    (of a relative, say) of which it happens to be true.
    """
    right = torch.arange(len(audio), device=audio.device)
    banned = same & ~torch.eye(len(audio), dtype=torch.bool, device=audio.device)
    cosines = audio @ text.T                                                               # (B, B)
    rows = torch.cat([(scale_audio * cosines).masked_fill(banned, -math.inf), scale_audio * audio @ misses.T], dim=1)
    columns = (scale_text * cosines.T).masked_fill(banned, -math.inf)                      # (B, B)
    loss = (functional.cross_entropy(rows, right) + functional.cross_entropy(columns, right)) / 2
    return loss, ranked_right(cosines, audio, misses).float().mean()


def ranked_right(cosines, audio, misses):
    """Which clips are nearer to their caption than to each of their own near misses, (B,) bool.

    cosines (B, B) of audio (B, D) and captions; misses (B * H, D).
    """
    own = (audio[:, None] * misses.view(len(audio), -1, misses.shape[1])).sum(-1)          # (B, H)
    return cosines.diagonal() > own.amax(1)


class ReadOut(nn.Module):
    """Linear layers that tell events, places and counts from both towers, and what sounds when from the audio's."""

    def __init__(self, audio_width, text_width):
        super().__init__()
        size = len(PLACES) * len(EVENT_NAMES) + len(NUMBERS) * len(COUNTABLE)
        self.audio, self.text = nn.Linear(audio_width, size), nn.Linear(text_width, size)
        self.hears = nn.Linear(audio_width, 2 * (len(EVENT_NAMES) + len(COUNTABLE)))        # each column: two steps
        for layer in (self.audio, self.text, self.hears):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, -4.0)                         # most things are not there

    def hearing(self, grid, activity, strikes):
        """The audio tower's last grid (B, width, bands, T / 2) -> cross-entropy of activity + Poisson loss of strikes.
        """
        heard = self.hears(grid.float().mean(2).transpose(1, 2)).unflatten(2, (2, -1)).flatten(1, 2)   # (B, T, K + Q)
        rate = functional.softplus(heard[..., len(EVENT_NAMES):])
        likelihood = (rate - strikes * rate.clamp(min=1e-6).log()).sum(2).mean()
        active = functional.binary_cross_entropy_with_logits(heard[..., :len(EVENT_NAMES)], activity)
        return active * 20 + likelihood

    def forward(self, audio, text, targets):
        """Pooled (B, width) of both towers, targets (B, R) -> the sum of both cross-entropies, mean over clips."""
        counts = targets[:, -len(NUMBERS) * len(COUNTABLE):].any(1, keepdim=True)     # only where a caption counts
        known = torch.ones_like(targets)
        known[:, -len(NUMBERS) * len(COUNTABLE):] = counts.float()
        losses = [functional.binary_cross_entropy_with_logits(layer(pooled.float()), targets, reduction="none")
                  for layer, pooled in ((self.audio, audio), (self.text, text))]
        return (losses[0] * known).sum(1).mean() + losses[1].sum(1).mean()


def forward(clap, mels, texts, misses):
    """Both towers -> audio (B, D), text (B, D), misses (B * H, D); pooled audio, pooled text, the audio's last grid."""
    longer = torch.zeros(len(mels), 1, dtype=torch.bool, device=mels.device)
    out = clap.clap.audio_model(input_features=mels[:, None], is_longer=longer)
    heard = out.pooler_output
    ids, mask = clap.tokenize([*texts, *(miss for row in misses for miss in row)])
    read = clap.clap.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
    audio = functional.normalize(clap.clap.audio_projection(heard).float(), dim=-1)
    text = functional.normalize(clap.clap.text_projection(read).float(), dim=-1)
    return audio, text[:len(mels)], text[len(mels):], heard, read[:len(mels)], out.last_hidden_state


@torch.no_grad()
def check(clap, mels, scenes, family, batch_size=64):
    """Held-out families: {"val_captions": share of clips nearer to their caption than to all near misses,
    "val_clips": share of captions nearer to their clip than to its relatives, "val_recall": recall@1 in batches}."""
    ranked, best, found, batch_size = [], [], [], batch_size // family * family
    for start in range(0, len(scenes) - batch_size + 1, batch_size):
        rows = range(start, start + batch_size)
        texts, misses = zip(*(texts_of(scenes[i], np.random.default_rng(derive_seed("check", i))) for i in rows))
        audio, text, wrong, *_ = forward(clap, mels[start:start + batch_size].float().to(clap.device), texts, misses)
        cosines, place = audio @ text.T, torch.arange(batch_size, device=audio.device)
        ranked += ranked_right(cosines, audio, wrong).tolist()
        stranger = place[:, None] // family != place // family                             # (B, B)
        best += (cosines.masked_fill(stranger, -2).argmax(0) == place).tolist()
        found += (cosines.argmax(1) == place).tolist()
    return {"val_captions": float(np.mean(ranked)), "val_clips": float(np.mean(best)),
            "val_recall": float(np.mean(found))}


# ----------------------------------------------------------------------------- the loop

def in_a_layer(name, parameter):
    """Whether Muon trains this tensor: the attention and MLP matrices of both towers' layers."""
    return parameter.ndim == 2 and (".layer." in name or ".blocks." in name) and "bias_table" not in name


def new_networks(args, device):
    """-> a new Clap, its ReadOut, and one module of all that is trained."""
    clap = new_clap(args.width, args.text_width, args.seed).to(device)
    readout = ReadOut(2 * args.width, args.text_width).to(device)
    with torch.no_grad():                                               # BatchNorm's place in the original: mels in dB
        clap.clap.audio_model.audio_encoder.batch_norm.running_mean.fill_(-40)
        clap.clap.audio_model.audio_encoder.batch_norm.running_var.fill_(900)
    print(f"CLAP: {sum(p.numel() for p in clap.clap.parameters()) / 1e6:.2f} M parameters")
    return clap, readout, nn.ModuleDict({"clap": clap.clap, "readout": readout})


def draw_batch(args, step, mels, scenes, device):
    """The batch of a step, whole families: B Scenes, captions and lists of near misses, and on `device` the spoiled
    log-mels (B, F, M), activity (B, T, K), strikes (B, T, Q), and which clips tell the same story (B, B) bool.

    It follows from (seed, step) alone.
    """
    families = batch_indices(args.seed, step, len(scenes) // args.family, args.batch_size // args.family)
    rows = (families[:, None] * args.family + torch.arange(args.family)).flatten()         # (B,)
    batch = [scenes[i] for i in rows]
    texts, misses = zip(*(texts_of(scene, np.random.default_rng(derive_seed(args.seed, "text", step, i)))
                          for i, scene in enumerate(batch)))
    heard = spoiled(mels[rows].float(), batch, generator(args.seed, "augment", step))
    stories = [story(scene) for scene in batch]
    same = torch.tensor([[a == b for b in stories] for a in stories])
    return batch, texts, misses, *(tensor.to(device) for tensor in (*heard, same))


def train(args):
    """Train a Clap with the flags of `reward.py train_clap`; a killed run goes on exactly. -> are all steps done?"""
    out = Path(args.out)
    check_writable([out / "log.jsonl"])
    device = choose_device(args.device)
    autocast = choose_dtype(args.dtype, device)
    clap, readout, both = new_networks(args, device)
    optimizer = make_optimizer(dict(both.named_parameters()), (0.9, 0.98), args.weight_decay, args.muon, in_a_layer)
    settings, named = {name: getattr(args, name) for name in TRAINED_WITH}, both.state_dict()
    step, earlier = load_state(out, named, optimizer, {}, settings, "model.safetensors")
    if step:
        print(f"going on in {out} after step {step} of {args.steps}")
    trim_log(out, step)
    world = {"seed": args.scene_seed + args.seed, "degraded": args.degraded, "pairs": "all", **HARDER}
    mels, scenes = render_scenes(out / "scenes", {**world, "split": "train"}, args.scenes, args.family, args.workers)
    val_mels, val_scenes = render_scenes(out / "val_scenes", {**world, "split": "val"}, args.val_scenes, args.family,
                                         args.workers)
    clap.train()
    began, late, names = time.monotonic(), False, (EVENT_NAMES, COUNTABLE, NUMBERS)
    bar = tqdm(total=args.steps, initial=step, desc="training", unit="step", disable=None)
    while step < args.steps and not late:
        batch, texts, misses, heard, activity, strikes, same = draw_batch(args, step, mels, scenes, device)
        set_rate(optimizer, cosine_decay(step, args.learning_rate, min(100, args.steps // 10 + 1), args.steps))
        with autocast():
            audio, text, wrong, pooled_audio, pooled_text, grid = forward(clap, heard, texts, misses)
        scales = clap.clap.logit_scale_a.exp(), clap.clap.logit_scale_t.exp()
        contrast, ranked = contrastive_loss(audio, text, wrong, *scales, same)
        reading = readout(pooled_audio, pooled_text, reading_targets(batch, *names).to(device))
        hearing = readout.hearing(grid, activity, strikes)
        loss = contrast + args.reading_weight * reading + args.hearing_weight * hearing
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0).item()
        if not math.isfinite(loss.item() + norm):
            raise UserError(f"step {step}: the loss is {loss.item():g}, its gradient norm {norm:g}; give a lower "
                            "--learning_rate or --muon, and another --out")
        optimizer.step()
        with torch.no_grad():
            for scale in (clap.clap.logit_scale_a, clap.clap.logit_scale_t):
                scale.clamp_(max=LARGEST_SCALE)
        step += 1
        bar.update()
        minutes = (time.monotonic() - began) / 60
        late = args.max_minutes is not None and minutes > args.max_minutes
        last = step == args.steps or late
        if last or step % 20 == 0:
            row = {"step": step, "loss": loss.item(), "contrast": contrast.item(), "reading": reading.item(),
                   "hearing": hearing.item(), "ranked": ranked.item(), "scale": scales[0].item(),
                   "minutes": earlier + minutes}
            if last or step % args.val_every == 0:
                clap.eval()
                row |= check(clap, val_mels, val_scenes, args.family)
                clap.train()
                tqdm.write(f"step {step}: loss {loss.item():.3f}; held-out: captions told from near misses "
                           f"{row['val_captions']:.3f}, clips from relatives {row['val_clips']:.3f}, recall@1 of 64 "
                           f"{row['val_recall']:.3f}")
            append_jsonl(out / "log.jsonl", row)
        if last or step % 100 == 0:
            save_state(out, named, optimizer, {}, step, settings, earlier + minutes)
    bar.close()
    clap.eval()
    clap.save(out, torch.float16)
    return step == args.steps
