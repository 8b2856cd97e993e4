"""Training of the two small CLAPs of the built-in world: one ranks, the other judges.

    python -m world.train_clap                              # the reward -> runs/clap_reward
    python -m world.train_clap --seed 1 --width 104 --text_width 144 --out runs/clap_judge

Contrast alone teaches which sounds are there, but order and number late: a batch seldom holds the
same sounds twice. So a batch is made of families, a scene and scenes that are almost it, and each
clip stands beside more captions that are almost its own, its near misses. During training linear
layers, thrown away afterwards, tell from each tower's pooled vector which event has which place and
count (as in world.reader), and from the audio tower's last grid what sounds when.
B batch, H near misses of a clip, D embedding width, F mel frames (32 ms), M mel bands, N scenes,
R read-outs (4 places x events + counts), T steps of 256 ms, K events, Q countable events.
"""
import json
import math
from collections import namedtuple
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as entropy
from torch.nn.functional import cross_entropy, normalize, softplus
from torch.utils.data import default_collate

from lib.common import (DEVICE, DTYPE, UserError, autocast_for, choose_device, derive_seed, flag,
                        generator, locked, parse_flags, pick, run_main)
from lib.audio import ClapMel
from lib.text import make_tokenizer
from lib.weights import learning_rate, make_optimizer
from reward import build_clap
from world.reader import COLUMNS, reading_targets
from world.scenes import (NUMBERS, World, caption, in_workers, known_words, near_misses, perform,
                          relative, story)
from world.sounds import COUNTABLE, EVENT_NAMES
from world.train_ears import augment, batch_indices, fit, strike_likelihood, targets
from world.votes import WORKERS

FLAGS = {"where": [
    flag("--out", "runs/clap_reward", "run folder; a run found there is resumed"),
    WORKERS, DTYPE, DEVICE], "scenes": [
    flag("--scenes", 40000, "training scenes, kept as log-mels", 1, 1e7),
    flag("--val_scenes", 1024, "held-out scenes", 64, 1e6),
    flag("--degraded", 0.25, "share of degraded scenes", 0, 1),
    flag("--family", 4, "scenes of a family; 1: all different", 1, 64)], "training": [
    flag("--seed", 0, "seed of weights, batches, captions and World(seed=3000 + seed)", 0, 1e18),
    flag("--width", 112, "width of the audio tower's first stage, a multiple of 8", 8, 1024),
    flag("--text_width", 128, "width of the text tower, a multiple of 4", 4, 4096),
    flag("--train_steps", 6000, "optimizer steps", 1, 1e7, alias="--steps"),
    flag("--batch_size", 48, "clips in a step", 2, 4096),
    flag("--learning_rate", 2e-3, "peak of AdamW's rate", 1e-8, 1),
    flag("--muon", 10.0, "rate of Muon in AdamW's; 0: AdamW for all", 0, 1000),
    flag("--weight_decay", 0.05, "weight decay of AdamW, times --muon of Muon", 0, 1),
    flag("--reading_weight", 0.5, "weight of places and counts told", 0, 1000),
    flag("--hearing_weight", 0.5, "weight of what sounds when", 0, 1000)]}
Training = namedtuple("Training", "seed scenes family degraded width text_width train_steps "
                      "batch_size learning_rate weight_decay muon reading_weight hearing_weight "
                      "dtype")
# 128 mels x 126 frames of 32 ms, an image of 128 x 128. The original folds time into four rows:
# "below" is then both a lower sound and a later one, and order was hardly learned. Silence after a
# short clip, not repetition: three beeps stay three.
PREPROCESSOR = dict(feature_extractor_type="ClapFeatureExtractor", feature_size=128,
                    sampling_rate=16000, hop_length=512, max_length_s=4, fft_window_size=1024,
                    frequency_min=50, frequency_max=8000, truncation="rand_trunc", padding="pad",
                    padding_value=0.0, top_db=None)
HARDER = {"pairs": "all", "relations": (0.1, 0.3, 0.35, 0.25), "counted": 0.7}
NEAR_MISSES = 4


def new_clap(width, text_width, seed):
    """A toy Clap: two HTSAT stages of `width`, 2 * width; three RoBERTa layers of `text_width`."""
    tokenizer = make_tokenizer(known_words(), ("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>")
    text = dict(vocab_size=tokenizer.get_vocab_size(), hidden_size=text_width, num_hidden_layers=3,
                num_attention_heads=4, intermediate_size=2 * text_width, hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0, max_position_embeddings=82)
    audio = dict(window_size=8, num_mel_bins=128, spec_size=128, patch_size=8, depths=[1, 3],
                 patch_stride=[8, 8], num_attention_heads=[4, 8], num_hidden_layers=2,
                 patch_embeds_hidden_size=width, hidden_size=2 * width, mlp_ratio=3.0,
                 hidden_dropout_prob=0.0, num_classes=1)
    config = dict(text_config=text, audio_config=audio, projection_dim=128,
                  logit_scale_init_value=30.0)
    clap = build_clap(config, tokenizer, PREPROCESSOR, seed)
    encoder = clap.clap.audio_model.audio_encoder
    encoder.batch_norm.running_mean.fill_(-40)  # its place in the original: mels in dB
    encoder.batch_norm.running_var.fill_(900)
    # the position bias alone tells HTSAT before from after, late if it starts at the original's 0:
    # heads start with a bias to what is earlier, to what is later, and between
    later = torch.arange(-7.0, 8).repeat(15)[:, None]        # columns of query - key
    for stage in encoder.layers:
        for block in stage.blocks:
            table = block.attention.self.relative_position_bias_table   # (15 * 15, heads)
            table.data.copy_(later * torch.linspace(-0.7, 0.7, table.shape[1]))
    return clap


class ReadOut(nn.Module):
    """Linear layers that tell events, places and counts from both towers, and what sounds when."""

    def __init__(self, audio_width, text_width):
        super().__init__()
        sounds = 2 * (len(EVENT_NAMES) + len(COUNTABLE))            # each column: two steps
        self.audio = nn.Linear(audio_width, len(COLUMNS))
        self.text = nn.Linear(text_width, len(COLUMNS))
        self.hears = nn.Linear(audio_width, sounds)
        for layer in self.children():
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, -4.0)        # most is not there

    def hearing(self, grid, activity, strikes):
        """Last grid (B, width, bands, T / 2), activity (B, T, K), strikes (B, T, Q) -> the loss."""
        columns = self.hears(grid.float().mean(2).mT)               # (B, T / 2, 2 (K + Q))
        heard = columns.unflatten(2, (2, -1)).flatten(1, 2)         # (B, T, K + Q)
        logits, rate = heard.split([len(EVENT_NAMES), len(COUNTABLE)], 2)
        likelihood = strike_likelihood(softplus(rate), strikes)     # (B, T, Q)
        return entropy(logits, activity) * 20 + likelihood.sum(2).mean()

    def reading(self, audio, text, targets):
        """Pooled (B, width) of both towers, targets (B, R) -> the sum of both cross-entropies."""
        known = torch.ones_like(targets)  # of audio, counts only where a caption counts
        counts = len(NUMBERS) * len(COUNTABLE)
        known[:, -counts:] = targets[:, -counts:].amax(1, keepdim=True)
        heard = entropy(self.audio(audio.float()), targets, reduction="none") * known
        read = entropy(self.text(text.float()), targets, reduction="none")
        return heard.sum(1).mean() + read.sum(1).mean()


def render_family(settings, size, index):
    """A scene and `size` - 1 relatives -> log-mels (size, F, M) float16, their Scenes."""
    world = World(**settings)
    rng = np.random.default_rng(derive_seed("family", json.dumps(world.settings()), index))
    audio, scene = world.render(index)
    audios, scenes = [audio], [scene]
    while len(scenes) < size:
        scenes.append(relative(scene, rng))
        audios.append(perform(scenes[-1], world.split, rng, rng))
    front = ClapMel(**PREPROCESSOR)
    audio = torch.from_numpy(np.stack(audios))[:, :front.samples]
    return front.log_mel(audio).half().numpy(), scenes


def render_scenes(settings, count, size, workers):
    """Scenes of World(**settings), each `size` a family -> log-mels (N, F, M) float16, N Scenes."""
    render = partial(render_family, settings, size)
    results = in_workers(render, range(count // size), workers, "rendering", "family")
    mels, families = zip(*results)
    return torch.from_numpy(np.concatenate(mels)), list(chain(*families))


def texts_of(scenes, start, *seed):
    """Captions of scenes in words drawn anew (B), then the near misses of each, B * H."""
    texts = []
    misses = []
    for i, scene in enumerate(scenes, start):
        rng = np.random.default_rng(derive_seed(*seed, i))
        texts.append(caption(rng, scene.relation, scene.asked))
        misses += near_misses(rng, scene.relation, scene.asked, NEAR_MISSES)
    return texts + misses


def augmented(mels, scenes, random):
    """Log-mels in dB (B, F, M), augmented -> them, activity (B, T, K), strikes (B, T, Q)."""
    activity, rate = default_collate([targets(scene) for scene in scenes])  # at 64 and 32 ms
    images = mels.float().mT / 20        # its unit is 20 dB
    images, activity, rate = augment(images, activity.float(), rate.float(), random, 2)
    activity = activity.unflatten(1, (16, -1)).mean(2)
    return images.mT * 20, activity, rate.unflatten(1, (16, -1)).sum(2)


def embed(clap, mels, texts):
    """mels (B, F, M), texts (any number) -> audio and text embeddings (., D) of unit length, pooled
    audio (B, width), pooled texts (., width), the audio's last grid (B, width, bands, T / 2)."""
    towers = clap.clap
    for scale in (towers.logit_scale_a, towers.logit_scale_t):  # after each step, as CLIP:
        scale.data.clamp_(max=math.log(100))        # logits at most 100 cosines
    longer = torch.zeros(len(mels), 1, dtype=torch.bool, device=mels.device)
    heard = towers.audio_model(input_features=mels[:, None], is_longer=longer)
    ids, mask = clap.tokenize(texts)
    read = towers.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
    audio = normalize(towers.audio_projection(heard.pooler_output).float(), dim=-1)
    text = normalize(towers.text_projection(read).float(), dim=-1)
    return audio, text, heard.pooler_output, read, heard.last_hidden_state


def ranked_right(audio, text, misses):
    """Which clips are nearer to their caption than to each of their own near misses, (B,) bool."""
    own = misses.unflatten(0, (len(audio), -1))         # (B, H, D)
    nearest = (audio[:, None] * own).sum(-1).amax(1)    # (B,)
    return (audio * text).sum(1) > nearest


def contrastive_loss(audio, text, misses, scale_audio, scale_text, same):
    """Symmetric cross-entropy (CLIP) in which every clip also sees all near misses.
    audio, text (B, D), misses (B * H, D) of unit length; scales: factors on the cosines; same
    (B, B): clip i and caption j tell one story, neither is a wrong answer for the other. No near
    miss is ever masked, even where it happens to be true."""
    right = torch.arange(len(audio), device=audio.device)
    banned = same & (right[:, None] != right)                           # (B, B)
    cosines = audio @ text.T                                            # (B, B)
    rows = (scale_audio * cosines).masked_fill(banned, -math.inf)
    rows = torch.cat([rows, scale_audio * audio @ misses.T], dim=1)     # (B, B + B H)
    columns = (scale_text * cosines.T).masked_fill(banned, -math.inf)   # (B, B)
    return (cross_entropy(rows, right) + cross_entropy(columns, right)) / 2


def batch_loss(clap, readout, training, autocast, mels, scenes, step):
    """{"loss": scalar, parts} of the batch of a step, which follows from (seed, step)."""
    # the batch
    family = training.family
    size = training.batch_size
    families = batch_indices(training.seed, step, len(scenes) // family, size // family)
    rows = (families[:, None] * family + torch.arange(family)).flatten()    # (B,)
    scenes = [scenes[i] for i in rows]
    texts = texts_of(scenes, 0, training.seed, "text", step)
    random = generator(training.seed, "augment", step)
    batch = [*augmented(mels[rows], scenes, random), reading_targets(scenes)]
    mels, activity, strikes, said = [part.to(clap.device) for part in batch]
    stories = [story(scene) for scene in scenes]
    first = torch.tensor([stories.index(one) for one in stories], device=clap.device)
    same = first[:, None] == first                                          # (B, B)

    # losses
    with autocast():
        audio, text, heard, read, grid = embed(clap, mels, texts)
    pairs = audio, text[:size], text[size:]
    scale_audio = clap.clap.logit_scale_a.exp()
    scale_text = clap.clap.logit_scale_t.exp()
    contrast = contrastive_loss(*pairs, scale_audio, scale_text, same)
    reading = readout.reading(heard, read[:size], said)
    hearing = readout.hearing(grid, activity, strikes)
    loss = contrast + training.reading_weight * reading + training.hearing_weight * hearing
    return {"loss": loss, "contrast": contrast, "reading": reading, "hearing": hearing,
            "ranked": ranked_right(*pairs).float().mean(), "scale": scale_audio}


@torch.no_grad()
def check(clap, mels, scenes, family):
    """Held-out families, shares: "val_captions", clips nearer to their caption than to all near
    misses; "val_clips", captions nearer to their clip than to its relatives; "val_recall", @1."""
    size = 64 // family * family
    place = torch.arange(size, device=clap.device)
    stranger = place[:, None] // family != place // family  # (B, B)
    right = []
    for start in range(0, len(scenes) - size + 1, size):
        batch = slice(start, start + size)
        texts = texts_of(scenes[batch], start, "check")
        audio, text, *_ = embed(clap, mels[batch].float().to(clap.device), texts)
        ranked = ranked_right(audio, text[:size], text[size:])
        cosines = audio @ text[:size].T                     # (B, B)
        relative_right = cosines.masked_fill(stranger, -2).argmax(0) == place
        recalled = cosines.argmax(1) == place
        right.append(torch.stack([ranked, relative_right, recalled]))
    shares = torch.cat(right, 1).float().mean(1).tolist()
    return dict(zip(("val_captions", "val_clips", "val_recall"), shares))


def in_a_layer(name, parameter):
    """Whether Muon trains this tensor: the attention and MLP matrices of both towers' layers."""
    inside = ".layer." in name or ".blocks." in name
    return parameter.ndim == 2 and inside and "bias_table" not in name


def train(training, out, val_scenes, workers, device):
    """Train a Clap in the run folder `out`; a killed run goes on exactly."""
    with locked(out):
        # the network
        clap = new_clap(training.width, training.text_width, training.seed).to(device)
        readout = ReadOut(2 * training.width, training.text_width).to(device)
        both = nn.ModuleDict({"clap": clap.clap, "readout": readout})
        optimizer = make_optimizer(dict(both.named_parameters()), (0.9, 0.98),
                                   training.weight_decay, training.muon, in_a_layer)

        # scenes
        world = {**HARDER, "seed": 3000 + training.seed}
        world["degraded"] = training.degraded
        scenes = partial(render_scenes, size=training.family, workers=workers)
        clips = scenes({**world, "split": "train"}, training.scenes)
        held_out = scenes({**world, "split": "val"}, val_scenes)

        # training
        autocast = autocast_for(training.dtype, device)
        loss_of = partial(batch_loss, clap, readout, training, autocast, *clips)
        steps = training.train_steps
        warmup = min(100, steps // 10 + 1)
        rate_of = partial(learning_rate, peak=training.learning_rate, warmup=warmup, steps=steps,
                          shape="cosine")
        heard = partial(check, clap, *held_out, training.family)
        fit(out, "model.safetensors", both, optimizer, training, loss_of, rate_of, 1.0, heard)
        clap.save(out, torch.float16)


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    if args.batch_size % args.family or args.scenes < args.batch_size:
        raise UserError(f"--batch_size must be a multiple of --family {args.family}, and "
                        f"--scenes {args.scenes} fill a batch")
    device = choose_device(args.device)
    train(pick(Training, args), Path(args.out), args.val_scenes, args.workers, device)
    print(f'wrote; next: python reward.py --clap {args.out} --audio FILE --prompt "rain"')


if __name__ == "__main__":
    run_main(main)
