"""FluxTransformer and its conditioning (paper sections 2.2 and 2.3), and model folders on disk.

    from model import TangoFlux, PRESETS, load_model, encode_prompts, null_condition

    model = load_model("checkpoints/toy/base")                     # or a hub id in the official layout
    condition = encode_prompts(model.text, ["a violin followed by rain"], torch.tensor([3.0]))
    velocity = model.flow.velocity(noise, torch.ones(1), condition)

The network follows the official code (declare-lab/TangoFlux on diffusers' Flux blocks), whose state_dict
names are kept, the misspelt `duration_emebdder` included, so that official weights load. Where we differ:
  - `Condition.mask` hides a row's text padding from attention; in the official code (mask=None) every row attends
    to its padding, so that its result depends on the other prompts of the batch.
  - the number of audio tokens comes from the latents, not from `audio_seq_len`.
  - initialisation: see `init_weights`.
The paper says 515M parameters; the official layout has 518,009,536.

A score, such as a listener's reward, may be a further input (Kim et al., "Improving Text-to-Music Generation with
Human Preference Rewards", III-B; its code is not published: all but the five names is our reading): `ScoreEmbed`.

Letters: B batch, L latent frames, C latent channels, S text tokens (S+1 with the duration token), M blocks,
N = S+1+L tokens in all, K times prepared at once, D width, H heads, A width of a head, T width of the text encoder.
"""
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import (AdaLN, Attention, DoubleBlock, DurationEmbedder, Linear, ScoreEmbed, SingleBlock, TimeTextEmbed,
                    modulate, rope_tables)
from common import UserError, read_json, save_tensors, warn, write_json
from text import fetch, load_text, null_tokens
from weights import check_finite, empty, find_weights, load_weights

PRESETS = {
    # learns the built-in world on two CPU cores: 4 heads x 48, 2 double + 4 single blocks (train_fm.py takes
    # in_channels and audio_seq_len from the codec)
    "toy": dict(num_layers=2, num_single_layers=4, in_channels=48, attention_head_dim=48,
                num_attention_heads=4, joint_attention_dim=128, audio_seq_len=64, max_duration=4.096,
                axes_dims_rope=[8, 20, 20], uncondition=False, text_encoder_name="text_encoder"),
    # the paper, section 2.3: 6 MMDiT + 18 DiT blocks, 8 heads x 128; 645 frames = 30 s of Oobleck latents
    "tangoflux": dict(num_layers=6, num_single_layers=18, in_channels=64, attention_head_dim=128,
                      num_attention_heads=8, joint_attention_dim=1024, audio_seq_len=645, max_duration=30,
                      axes_dims_rope=[16, 56, 56], uncondition=False,
                      text_encoder_name="google/flan-t5-large"),
}

# where a score enters (second paper, Table I); v1 and v2 have the same weights and differ in the forward pass alone
SCORE_HEADS = {"v1": "GlobalAdaLN", "v2": "InputAdd", "v3": "AudioPrepend", "v4": "PerBlockAdaLN", "v5": "TextPrepend"}

# whole numbers of a config that must be there: name -> (lowest, highest)
LIMITS = {"num_layers": (0, 1000), "num_single_layers": (0, 1000), "in_channels": (1, 100_000),
          "attention_head_dim": (2, 10_000), "num_attention_heads": (1, 1000),
          "joint_attention_dim": (1, 100_000), "audio_seq_len": (1, 1_000_000)}


def check_config(config):
    """The known keys of a model config; keys of other parts (vae, references) are left out. Official files lack
    axes_dims_rope: they get its default. Raises UserError naming the first bad value.
    """
    known = {"max_duration": 30, "axes_dims_rope": [16, 56, 56], "uncondition": False,
             "text_encoder_name": "google/flan-t5-large"}
    for name, (low, high) in LIMITS.items():
        value = config.get(name)
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"config.json: {name} is {value!r}, but must be a whole number from {low} to {high}")
    checked = {name: config[name] for name in LIMITS} | {name: config.get(name, known[name]) for name in known}
    duration = checked["max_duration"]
    if type(duration) not in (int, float) or not 0 < duration < math.inf:
        raise UserError(f"config.json: max_duration is {duration!r}, but must be a positive number of seconds")
    axes = checked["axes_dims_rope"]
    even = isinstance(axes, (list, tuple)) and all(type(a) is int and a > 0 and a % 2 == 0 for a in axes)
    if not even:
        raise UserError(f"config.json: axes_dims_rope is {axes!r}, but must be a list of even widths")
    if sum(axes) != checked["attention_head_dim"]:
        raise UserError(f"config.json: axes_dims_rope {list(axes)} adds up to {sum(axes)}, "
                        f"but attention_head_dim is {checked['attention_head_dim']}")
    if not isinstance(checked["text_encoder_name"], str):
        raise UserError(f"config.json: text_encoder_name is {checked['text_encoder_name']!r}, but must be a name")
    return checked | (check_score(config) if config.get("score_head") else {})


def check_score(config):
    """The keys of a config that has a score head. Raises UserError naming the first bad value."""
    checked = {name: config.get(name, default) for name, default in (
        ("score_head", None), ("score_null", "zero"), ("score_mean", 0.0), ("score_std", 1.0))}
    for name, allowed in (("score_head", tuple(SCORE_HEADS)), ("score_null", ("zero", "scalar"))):
        if checked[name] not in allowed:
            raise UserError(f"config.json: {name} is {checked[name]!r}, but must be one of {', '.join(allowed)}")
    for name in ("score_mean", "score_std"):
        value = checked[name]
        if type(value) not in (int, float) or not math.isfinite(value) or (name == "score_std" and value <= 0):
            raise UserError(f"config.json: {name} is {value!r}, but must be a number, and a deviation above 0")
    return checked


# ----------------------------------------------------------------------------- the network

class FluxTransformer(nn.Module):
    """Velocity of latents (B, L, C) at time t, given text tokens, a pooled text vector and perhaps a score.

    The score's embedding e_s joins: v1 the global condition of every block's adaLN; v2 every audio latent behind the
    input projection; v3 the audio, v5 the text, as one more token before it, at position 0, which stays where there is
    no score; v4 the global condition, with an e_s of its own for each block.
    """

    def __init__(self, config):
        super().__init__()
        heads, head_width = config["num_attention_heads"], config["attention_head_dim"]
        width, text_width = heads * head_width, config["joint_attention_dim"]
        self.axes = tuple(config["axes_dims_rope"])
        self.time_text_embed = TimeTextEmbed(text_width, width)
        self.context_embedder = Linear(text_width, width)
        self.x_embedder = Linear(config["in_channels"], width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(heads, head_width) for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(heads, head_width) for _ in range(config["num_single_layers"]))
        self.norm_out = AdaLN(width, 2)
        self.proj_out = Linear(width, config["in_channels"])
        self.score_head = config.get("score_head")
        if self.score_head:
            self.score_embed = ScoreEmbed(config, width)

    def forward(self, latents, t, text, pooled, text_mask=None, score=None):
        """latents (B, L, C), t (B,) in [0, 1] with 1 = noise, text (B, S, T), pooled (B, T) -> velocity (B, L, C).

        `text_mask` (B, S) bool: False tokens are invisible as keys; None: all are visible (the official way).
        `score` (B,), NaN = none; None: none for all rows. Only a network with a score head takes one.
        """
        return self.run(latents, self.prepare(t[None], text, pooled, latents.shape[1], text_mask, score)[0])

    def prepare(self, ts, text, pooled, frames, text_mask=None, score=None):
        """All that does not depend on the latents, for times ts (K, B): K Prepared, one for each time.

        A sampler calls this once for many steps: their modulations are one product a block.
        """
        count, rows = ts.shape
        temb = self.time_text_embed(ts.flatten(), pooled.repeat(count, 1))                      # (K B, D)
        text, embedded = self.context_embedder(text), None                                      # (B, S, D)
        if self.score_head:
            score = null_score(text) if score is None else score.to(text.device)
            embedded = self.score_embed(score)                                                  # (B, D), v4 (B, M+1, D)
            if self.score_head == "v1":
                temb = temb + embedded.repeat(count, 1)
            elif self.score_head == "v4":
                temb = [temb + each.repeat(count, 1) for each in embedded.unbind(1)]            # M+1 x (K B, D)
            elif self.score_head == "v5":
                text = torch.cat([embedded[:, None].to(text.dtype), text], dim=1)               # (B, 1+S, D)
                text_mask = None if text_mask is None else F.pad(text_mask, (1, 0), value=True)
        elif score is not None:
            raise ValueError("this network has no score head")
        before = text.shape[1] + (self.score_head == "v3")      # tokens before the first frame stand at position 0:
        rope = rope_tables(before, frames, self.axes, text.device)          # text, duration, a score's of v3 and v5
        visible = None
        if text_mask is not None:
            visible = F.pad(text_mask, (0, before - text.shape[1] + frames), value=True)[:, None, None]     # (B,1,1,N)
        silu_tembs = map(F.silu, temb) if self.score_head == "v4" else itertools.repeat(F.silu(temb))   # (K B, D) each
        layers = [block.modulations(next(silu_tembs))
                  for block in [*self.transformer_blocks, *self.single_transformer_blocks]]
        layers.append(self.norm_out(next(silu_tembs)))
        token = embedded if self.score_head in ("v2", "v3") else None
        return [Prepared(text, token, [take(layer, slice(k * rows, (k + 1) * rows)) for layer in layers], rope, visible)
                for k in range(count)]

    def run(self, latents, prepared):
        """Velocity of latents (B, L, C), all else being `prepared`: a step of a sampler."""
        text, embedded, layers, rope, visible = prepared
        audio = self.x_embedder(latents)                                                        # (B, L, D)
        if self.score_head == "v2":
            audio = audio + embedded[:, None]
        elif self.score_head == "v3":
            audio = torch.cat([embedded[:, None].to(audio.dtype), audio], dim=1)                # (B, 1+L, D)
        layers = iter(layers)
        for block in self.transformer_blocks:
            text, audio = block(text, audio, next(layers), rope, visible)
        x = torch.cat([text, audio], dim=1)                                                     # (B, N, D)
        for block in self.single_transformer_blocks:
            x = block(x, next(layers), rope, visible)
        scale, shift = next(layers)                              # in this order, unlike in the blocks
        return self.proj_out(modulate(x[:, -latents.shape[1]:], shift, scale))                  # (B, L, C)


class Prepared(NamedTuple):
    """What FluxTransformer.prepare makes for one time."""
    text: torch.Tensor           # (B, S, D)
    score: torch.Tensor | None   # (B, D), of v2 and v3
    layers: list                 # modulations of each block and of the output, tensors (B, 1, D)
    rope: tuple                  # cos, sin (N, A)
    visible: torch.Tensor | None     # (B, 1, 1, N) bool


def take(modulations, rows):
    """The part `rows` of modulations, a tensor or nested tuples of them."""
    return modulations[rows] if isinstance(modulations, torch.Tensor) else tuple(take(m, rows) for m in modulations)


class Condition(NamedTuple):
    """What a velocity is conditioned on. One row per latent."""
    text: torch.Tensor           # (B, S, T) hidden states of the text encoder
    mask: torch.Tensor | None    # (B, S) bool: what the transformer may see; None = all, padding too (official)
    pooled_mask: torch.Tensor    # (B, S) 1 = real token: what the pooled vector averages
    duration: torch.Tensor       # (B,) seconds
    score: torch.Tensor | None = None    # (B,) NaN = none; None: none for all rows


class TangoFlux(nn.Module):
    """The transformer with its conditioning; state_dict as in the official tangoflux.safetensors."""

    def __init__(self, config):
        super().__init__()
        self.config = check_config(config)
        text_width = self.config["joint_attention_dim"]
        self.transformer = FluxTransformer(self.config)
        self.fc = nn.Sequential(Linear(text_width, text_width), nn.ReLU())
        self.duration_emebdder = DurationEmbedder(text_width, self.config["max_duration"])
        init_weights(self)

    def condition_inputs(self, condition):
        """Condition -> text with the duration token at its END (B, S+1, T), pooled (B, T), mask (B, S+1) or None."""
        text = condition.text.to(self.fc[0].bias.dtype)
        weights = condition.pooled_mask[..., None].to(text.dtype)                               # (B, S, 1)
        pooled = self.fc((text * weights).sum(1) / weights.sum(1).clamp(min=1))                 # (B, T)
        text = torch.cat([text, self.duration_emebdder(condition.duration).to(text.dtype)], 1)  # (B, S+1, T)
        mask = None if condition.mask is None else F.pad(condition.mask.bool(), (0, 1), value=True)
        return text, pooled, mask

    def prepare(self, ts, condition, frames):
        """FluxTransformer.prepare of a Condition with B rows at the times ts (K,), the same for all rows."""
        text, pooled, mask = self.condition_inputs(condition)
        return self.transformer.prepare(ts[:, None].expand(-1, len(text)), text, pooled, frames, mask, condition.score)

    def pack(self, rows):
        """Make this a network for sampling: q, k and v one product, on a CPU weights in oneDNN's order of storage.

        `rows`: about B N of the batches to come. The weights move: there is no state_dict afterwards, nor training.
        """
        for module in list(self.modules()):
            if isinstance(module, Attention):
                module.fuse()
        with torch.inference_mode():
            for module in self.modules():
                if isinstance(module, Linear):
                    module.pack(rows)
        return self

    def velocity(self, latents, t, condition):
        """Noise minus data at x_t: latents (B, L, C) normalised, t (B,), Condition with B rows -> (B, L, C)."""
        return self.transformer(latents, t, *self.condition_inputs(condition), condition.score)


def with_score_head(flow, head, null="zero", mean=0.0, std=1.0, seed=0):
    """A TangoFlux with a score head and the weights of `flow` -> (flow, whether its head is a new one).

    The head is new where `flow` has none (e_s = 0: the velocity is that of `flow`, but for the extra token of v3 and
    v5). v1 and v2 take each other's, strictly, with their mean and deviation, which the arguments then do not change
    (the paper's cross-loading, IV-B); v2 into v1 is warned of. Raises UserError for other heads.
    """
    before = flow.config.get("score_head")
    if before and before != head and {before, head} != {"v1", "v2"}:
        raise UserError(f"the model has the score head {before} ({SCORE_HEADS[before]}), whose weights {head} "
                        f"({SCORE_HEADS[head]}) can't take; only v1 and v2 take each other's")
    if (before, head) == ("v2", "v1"):
        warn("weights trained as v2 (InputAdd) run as v1 (GlobalAdaLN): the paper found that this collapses (reward "
             "-0.50 where v1 -> v2 has +0.01, Table III)")
    new = {} if before else {"score_null": null, "score_mean": float(mean), "score_std": float(std)}
    device = next(flow.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = TangoFlux({**flow.config, **new, "score_head": head})
    tensors = flow.state_dict()
    if not before:
        tensors = {**{name: tensor for name, tensor in result.state_dict().items() if "score_embed" in name}, **tensors}
    result.load_state_dict(tensors)                     # strict
    return result.to(device).train(flow.training), not before


def init_weights(flow):
    """Initialise in one place, as DiT does; the official code kept diffusers' (= PyTorch's) defaults everywhere.

    Zero: the adaLN linears, so that every gate is shut and each block starts as the identity, and the last
    projection, so that the first prediction is 0 whatever t is. Everything else: Xavier uniform, no bias. DiT starts
    the embedders of t and text at std 0.02; text so faint is learned late (after 300 toy steps its share of the
    loss was a quarter of what it is here).
    """
    for module in flow.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in flow.modules():
        if isinstance(module, AdaLN):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(flow.transformer.proj_out.weight)
    if flow.transformer.score_head:
        nn.init.zeros_(flow.transformer.score_embed.linear_2.weight)     # its bias is: e_s = 0 at first


# ----------------------------------------------------------------------------- conditions

def encode_prompts(text_encoder, prompts, duration, max_length=None, score=None):
    """Prompts, seconds (B,) and perhaps scores (B,) -> Condition, each row blind to the other rows' padding."""
    ids, mask = text_encoder.tokenize(prompts, max_length)
    hidden = text_encoder.encode(ids, mask)
    mask = mask.to(hidden.device)
    return Condition(hidden, mask, mask, duration.to(hidden.device), None if score is None else score.to(hidden.device))


def null_score(like):
    """The one null of the score, in dropout and in guidance: NaN (B,) for the B rows of `like`; see ScoreEmbed."""
    return torch.full((len(like),), math.nan, device=like.device)


def null_condition(text_encoder, condition):
    """The unconditional branch of guidance: the null text at each row's own length, no score, the same duration."""
    ids, attention, visible = null_tokens(condition.pooled_mask.sum(1), condition.text.shape[1])
    hidden = text_encoder.encode(ids, attention)
    return Condition(hidden, None if condition.mask is None else visible.to(hidden.device),
                     attention.to(hidden.device), condition.duration,
                     None if condition.score is None else null_score(condition.score))


def replace_rows(condition, rows, other):
    """`condition` with `rows` (B,) bool taken from `other` (same widths): condition dropout on encoded text."""
    def pick(ours, theirs):
        return None if ours is None else torch.where(rows.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)
    return Condition(*map(pick, condition, other))


def moved(condition, device):
    """`condition` on `device`."""
    return Condition(*(None if value is None else value.to(device) for value in condition))


def take_rows(condition, rows):
    """The part `rows` (a slice or an index) of a condition's batch."""
    return Condition(*(None if value is None else value[rows] for value in condition))


def concat_conditions(first, second):
    """Stack two conditions along the batch, e.g. null and prompt. Unequal S is padded, invisibly, so needs masks."""
    size = max(first.text.shape[1], second.text.shape[1])
    if first.text.shape[1] != second.text.shape[1] and (first.mask is None or second.mask is None):
        raise ValueError("conditions without a mask must have the same number of tokens")

    def pad(condition):
        extra = size - condition.text.shape[1]
        return Condition(F.pad(condition.text, (0, 0, 0, extra)),
                         None if condition.mask is None else F.pad(condition.mask, (0, extra)),
                         F.pad(condition.pooled_mask, (0, extra)), condition.duration, condition.score)
    return Condition(*(None if a is None else torch.cat([a, b]) for a, b in zip(pad(first), pad(second))))


# ----------------------------------------------------------------------------- model folders

def model_folder(name, files=("config.json", "*.safetensors", "text_encoder/*")):
    """A local model folder as it is; anything else in the form owner/name: its `files`, fetched from the hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; pass the model folder that holds it")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) or folder.parent.exists():
        raise UserError(f"model folder {name} is missing; pass an existing folder or a hub id like owner/name")
    return fetch(str(name), list(files))


def read_config(folder):
    """The dict in folder/config.json. Raises UserError if it is missing, broken or no JSON object."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json is not a JSON object; take the config.json of a model folder")
    return config


def resolve(folder, part):
    """The folder that really holds `part` ("flow", "vae", "text_encoder"), through config.json's "references"."""
    for _ in range(8):
        references = read_config(folder).get("references", {})
        if not isinstance(references, dict) or not isinstance(references.get(part, ""), str):
            raise UserError(f"{folder}/config.json: references must map a part to a relative folder")
        if part not in references:
            return folder
        target = folder / references[part]
        if not target.is_dir():
            raise UserError(f"{folder}/config.json looks for {part} in {references[part]}, but {target} is missing")
        folder = target
    raise UserError(f"{folder}/config.json: the references for {part} lead in a circle")


def flow_and_text_weights(folder):
    """Weights of the flow in a folder, and of the text encoder that some official files carry along (None if not)."""
    weights = find_weights(folder, "tangoflux.safetensors")
    names = {name.removeprefix("text_encoder."): name for name in weights if name.startswith("text_encoder.")}
    return weights.named({name: name for name in weights if not name.startswith("text_encoder.")}), (
        weights.named(names) if names else None)


def load_flow(weights, config, dtype):
    """A TangoFlux of `config` with these weights, cast to `dtype`; no random numbers are drawn in vain."""
    with torch.device("meta"):
        flow = TangoFlux(config)
    flow = empty(flow, dtype)
    load_weights(flow, weights)
    return flow


def load_model(name, device="cpu", dtype=torch.float32, parts=("flow", "codec", "text")):
    """Read a model folder or hub id -> namespace .flow .codec .text (None where not in `parts`) .config .folder.

    Layout: config.json, tangoflux.safetensors, vae.safetensors, text_encoder/. Everything is in eval mode. Weights
    must fit the config exactly; the flow is cast to `dtype`, codec and text encoder stay float32.
    """
    folder = model_folder(name)
    config = read_config(folder)
    flow = codec = text = carried = None
    if "flow" in parts or "text" in parts:
        place = resolve(folder, "flow")
        checked = check_config(read_config(place))
        if "flow" in parts or "/" in checked["text_encoder_name"]:       # only an official file may carry a T5
            weights, carried = flow_and_text_weights(place)
    if "text" in parts:
        text = load_text(resolve(folder, "text_encoder"), checked, carried, torch.float32).to(device)
        if text.width != checked["joint_attention_dim"]:
            raise UserError(f"{folder}: the text encoder is {text.width} wide, "
                            f"but joint_attention_dim is {checked['joint_attention_dim']}")
    if "flow" in parts:
        flow = load_flow(weights, checked, dtype).to(device).eval()
    if "codec" in parts:
        from vae import load_codec
        codec = load_codec(folder, device)
    if flow is not None and codec is not None and flow.config["in_channels"] != codec.latent_channels:
        raise UserError(f"{folder}: the codec's latents are {codec.latent_channels} wide, the flow's "
                        f"{flow.config['in_channels']}; use parts that belong together")
    return SimpleNamespace(flow=flow, codec=codec, text=text, config=config, folder=folder)


def save_model(folder, flow=None, codec=None, text=None, references=None, extra=None, dtype=torch.float32):
    """Write the given parts as a model folder; each file appears whole or not at all, config.json last.

    `references` {"vae": "../base", "text_encoder": "../base"}: parts that stay in another folder. `extra`: further
    keys of config.json (how it was trained, default steps). Keys that an earlier save left there are kept.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_config(folder) if path.exists() else {}
    if flow is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in flow.state_dict().items()}
        save_tensors(folder / "tangoflux.safetensors", check_finite(tensors, "tangoflux.safetensors"))
        config |= flow.config
    if text is not None:
        text.save(folder / "text_encoder", dtype)
    given = {"flow": flow, "vae": codec, "text_encoder": text}
    kept = {**config.get("references", {}), **(references or {})}
    config["references"] = {part: target for part, target in kept.items() if given.get(part) is None}
    write_json(path, config | (extra or {}))
    if codec is not None:
        from vae import save_codec
        save_codec(folder, codec, dtype)   # adds its own key "vae" to config.json
