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

Letters: B batch, L latent frames, C latent channels, S text tokens (S+1 with the duration token),
N = S+1+L tokens in all, D width, H heads, A width of a head, T width of the text encoder.
"""
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, load_exactly, load_tensors, read_json, save_tensors, write_json
from text import check_finite, fetch, load_text, null_tokens, refuse_pickles

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
    return checked


# ----------------------------------------------------------------------------- embeddings

def timestep_sinusoid(t, width=256):
    """t (B,) in [0, 1] -> (B, width): cos, then sin, of 1000 t at geometric frequencies.

    As diffusers' get_timestep_embedding with flip_sin_to_cos. Float32 always: 1000 t has no room in 16 bits.
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = (1000 * t.float())[:, None] * frequencies                                          # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_tables(text_tokens, frames, axes, device):
    """cos and signed sin, each (N, A) float32, for `apply_rope`; theta 10000.

    Text and duration stand at position 0, audio frame i at position i on every axis (official code).
    Angles in float64 as in diffusers' FluxPosEmbed (mps has none).
    """
    wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
    steps = torch.cat([torch.arange(0, width, 2, dtype=wide, device=device) / width for width in axes])
    positions = torch.cat([torch.zeros(text_tokens, dtype=wide, device=device),
                           torch.arange(frames, dtype=wide, device=device)])
    angles = torch.outer(positions, 10000.0 ** -steps)                                          # (N, A/2)
    cos, sin = angles.cos().float(), angles.sin().float()
    return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], dim=-1).flatten(-2)           # (N, A)


def apply_rope(x, cos, sin):
    """Rotate adjacent pairs of x (B, H, N, A) by the tables (N, A): (a, b) -> (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)                                     # (B, H, N, A)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, width_in, width):
        super().__init__()
        self.linear_1 = nn.Linear(width_in, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """The global condition of adaLN: time + pooled text. A further global signal (a score) would be added here."""

    def __init__(self, text_width, width):
        super().__init__()
        self.timestep_embedder = MLPEmbedder(256, width)
        self.text_embedder = MLPEmbedder(text_width, width)

    def forward(self, t, pooled):
        time = self.timestep_embedder(timestep_sinusoid(t).to(pooled.dtype))
        return time + self.text_embedder(pooled)                                                # (B, D)


class LearnedFourier(nn.Module):
    """x (B, 1) -> (B, 257): x, sin(2 pi x w), cos(2 pi x w) with 128 learned w."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(128))

    def forward(self, x):
        angles = 2 * math.pi * x.float() * self.weights.float()
        return torch.cat([x.float(), angles.sin(), angles.cos()], dim=-1).to(self.weights.dtype)


class DurationEmbedder(nn.Module):
    """Seconds (B,) -> one token (B, 1, T), paper 2.2 (from Stable Audio Open). Clamped to [0, max_duration]."""

    def __init__(self, text_width, max_duration):
        super().__init__()
        self.max_duration = max_duration
        self.time_positional_embedding = nn.Sequential(LearnedFourier(), nn.Linear(257, text_width))

    def forward(self, duration):
        fraction = duration.float().clamp(0, self.max_duration) / self.max_duration             # (B,)
        return self.time_positional_embedding(fraction[:, None])[:, None]                       # (B, 1, T)


# ----------------------------------------------------------------------------- blocks

class AdaLN(nn.Module):
    """temb (B, D) -> `chunks` modulations, each (B, 1, D). Takes SiLU(temb), which is the same for every block."""

    def __init__(self, width, chunks):
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(width, chunks * width)

    def forward(self, silu_temb):
        return self.linear(silu_temb)[:, None].chunk(self.chunks, dim=-1)


def modulate(x, shift, scale):
    """LayerNorm without affine, eps 1e-6, then scale and shift: x (B, N, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; 4x wide. The list mirrors diffusers' names net.0.proj and net.2."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), nn.Linear(4 * width, width)])
        self.net[0].proj = nn.Linear(width, 4 * width)

    def forward(self, x):
        return self.net[2](F.gelu(self.net[0].proj(x), approximate="tanh"))


class HeadNorm(nn.Module):
    """RMS norm over a head's A channels, eps 1e-6, in its input's dtype (a float32 weight slows autocast)."""

    def __init__(self, head_width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


def attention(q, k, v, visible):
    """softmax(q k^T / sqrt(A)) v for (B, H, N, A); `visible` (B, 1, 1, N) bool hides keys, None shows all."""
    if q.device.type != "cpu" or q.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    # the same written out: in 16 bits on a CPU the backward pass of the fused kernel is four times slower
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)                                    # (B, H, N, N)
    if visible is not None:
        scores = scores + torch.zeros_like(visible, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Joint attention over text and audio. A double block (joint=True) has separate projections for the text."""

    def __init__(self, heads, head_width, joint):
        super().__init__()
        self.heads, width = heads, heads * head_width
        self.norm_q, self.norm_k = HeadNorm(head_width), HeadNorm(head_width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        if joint:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.norm_added_q, self.norm_added_k = HeadNorm(head_width), HeadNorm(head_width)
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
            self.to_add_out = nn.Linear(width, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                                # (B, H, N, A)

    def project(self, x):
        """q, k, v of the audio, or of all tokens in a single block; q and k are normalised per head."""
        q, k, v = self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))
        return self.norm_q(q), self.norm_k(k), v

    def project_text(self, x):
        q, k, v = self.split(self.add_q_proj(x)), self.split(self.add_k_proj(x)), self.split(self.add_v_proj(x))
        return self.norm_added_q(q), self.norm_added_k(k), v

    def attend(self, q, k, v, rope, visible):
        """Rotate q and k, attend, join the heads: (B, H, N, A) -> (B, N, D)."""
        q, k = apply_rope(q, *rope).to(v.dtype), apply_rope(k, *rope).to(v.dtype)
        return attention(q, k, v, visible).transpose(1, 2).flatten(2)                           # (B, N, D)


class DoubleBlock(nn.Module):
    """MMDiT: text and audio have their own weights and meet in attention only."""

    def __init__(self, heads, head_width):
        super().__init__()
        width = heads * head_width
        self.norm1, self.norm1_context = AdaLN(width, 6), AdaLN(width, 6)
        self.attn = Attention(heads, head_width, joint=True)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def forward(self, text, audio, silu_temb, rope, visible):
        # six modulations each, in the official order: shift, scale, gate of attention, then of the MLP
        shift, scale, gate, *mlp = self.norm1(silu_temb)
        text_shift, text_scale, text_gate, *text_mlp = self.norm1_context(silu_temb)
        qkv_text = self.attn.project_text(modulate(text, text_shift, text_scale))
        qkv_audio = self.attn.project(modulate(audio, shift, scale))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(qkv_text, qkv_audio))                 # (B, H, N, A)
        attended = self.attn.attend(q, k, v, rope, visible)                                     # (B, N, D)
        attended_text, attended_audio = attended.split([text.shape[1], audio.shape[1]], dim=1)
        audio = torch.addcmul(audio, gate, self.attn.to_out[0](attended_audio))
        audio = torch.addcmul(audio, mlp[2], self.ff(modulate(audio, *mlp[:2])))
        text = torch.addcmul(text, text_gate, self.attn.to_add_out(attended_text))
        text = torch.addcmul(text, text_mlp[2], self.ff_context(modulate(text, *text_mlp[:2])))
        return text, audio


class SingleBlock(nn.Module):
    """DiT on text and audio as one sequence; attention and MLP run in parallel and share the output projection."""

    def __init__(self, heads, head_width):
        super().__init__()
        width = heads * head_width
        self.norm = AdaLN(width, 3)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = Attention(heads, head_width, joint=False)

    def forward(self, x, silu_temb, rope, visible):
        shift, scale, gate = self.norm(silu_temb)
        h = modulate(x, shift, scale)                                                           # (B, N, D)
        attended = self.attn.attend(*self.attn.project(h), rope, visible)                       # (B, N, D)
        hidden = torch.cat([attended, F.gelu(self.proj_mlp(h), approximate="tanh")], dim=-1)    # (B, N, 5D)
        return torch.addcmul(x, gate, self.proj_out(hidden))


# ----------------------------------------------------------------------------- the network

class FluxTransformer(nn.Module):
    """Velocity of latents (B, L, C) at time t, given text tokens and a pooled text vector."""

    def __init__(self, config):
        super().__init__()
        heads, head_width = config["num_attention_heads"], config["attention_head_dim"]
        width, text_width = heads * head_width, config["joint_attention_dim"]
        self.axes = tuple(config["axes_dims_rope"])
        self.time_text_embed = TimeTextEmbed(text_width, width)
        self.context_embedder = nn.Linear(text_width, width)
        self.x_embedder = nn.Linear(config["in_channels"], width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(heads, head_width) for _ in range(config["num_layers"]))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(heads, head_width) for _ in range(config["num_single_layers"]))
        self.norm_out = AdaLN(width, 2)
        self.proj_out = nn.Linear(width, config["in_channels"])

    def forward(self, latents, t, text, pooled, text_mask=None):
        """latents (B, L, C), t (B,) in [0, 1] with 1 = noise, text (B, S, T), pooled (B, T) -> velocity (B, L, C).

        `text_mask` (B, S) bool: False tokens are invisible as keys; None: all are visible (the official way).
        """
        visible = None
        if text_mask is not None:
            visible = F.pad(text_mask, (0, latents.shape[1]), value=True)[:, None, None]        # (B, 1, 1, N)
        rope = rope_tables(text.shape[1], latents.shape[1], self.axes, latents.device)
        silu_temb = F.silu(self.time_text_embed(t, pooled))                                     # (B, D)
        text, audio = self.context_embedder(text), self.x_embedder(latents)                     # (B, S|L, D)
        for block in self.transformer_blocks:
            text, audio = block(text, audio, silu_temb, rope, visible)
        x = torch.cat([text, audio], dim=1)                                                     # (B, N, D)
        for block in self.single_transformer_blocks:
            x = block(x, silu_temb, rope, visible)
        scale, shift = self.norm_out(silu_temb)                  # in this order, unlike in the blocks
        return self.proj_out(modulate(x[:, text.shape[1]:], shift, scale))                      # (B, L, C)


class Condition(NamedTuple):
    """What a velocity is conditioned on. One row per latent."""
    text: torch.Tensor           # (B, S, T) hidden states of the text encoder
    mask: torch.Tensor | None    # (B, S) bool: what the transformer may see; None = all, padding too (official)
    pooled_mask: torch.Tensor    # (B, S) 1 = real token: what the pooled vector averages
    duration: torch.Tensor       # (B,) seconds


class TangoFlux(nn.Module):
    """The transformer with its conditioning; state_dict as in the official tangoflux.safetensors."""

    def __init__(self, config):
        super().__init__()
        self.config = check_config(config)
        text_width = self.config["joint_attention_dim"]
        self.transformer = FluxTransformer(self.config)
        self.fc = nn.Sequential(nn.Linear(text_width, text_width), nn.ReLU())
        self.duration_emebdder = DurationEmbedder(text_width, self.config["max_duration"])
        init_weights(self)

    def condition_inputs(self, condition):
        """Condition -> text with the duration token at its END (B, S+1, T), pooled (B, T), mask (B, S+1) or None."""
        text = condition.text.to(self.fc[0].weight.dtype)
        weights = condition.pooled_mask[..., None].to(text.dtype)                               # (B, S, 1)
        pooled = self.fc((text * weights).sum(1) / weights.sum(1).clamp(min=1))                 # (B, T)
        text = torch.cat([text, self.duration_emebdder(condition.duration).to(text.dtype)], 1)  # (B, S+1, T)
        mask = None if condition.mask is None else F.pad(condition.mask.bool(), (0, 1), value=True)
        return text, pooled, mask

    def velocity(self, latents, t, condition):
        """Noise minus data at x_t: latents (B, L, C) normalised, t (B,), Condition with B rows -> (B, L, C)."""
        return self.transformer(latents, t, *self.condition_inputs(condition))


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


# ----------------------------------------------------------------------------- conditions

def encode_prompts(text_encoder, prompts, duration, max_length=None):
    """Prompts and seconds (B,) -> Condition, each row blind to the other rows' padding."""
    ids, mask = text_encoder.tokenize(prompts, max_length)
    hidden = text_encoder.encode(ids, mask)
    mask = mask.to(hidden.device)
    return Condition(hidden, mask, mask, duration.to(hidden.device))


def null_condition(text_encoder, condition):
    """The unconditional branch of guidance: the null text at each row's own length, the same duration."""
    ids, attention, visible = null_tokens(condition.pooled_mask.sum(1), condition.text.shape[1])
    hidden = text_encoder.encode(ids, attention)
    return Condition(hidden, None if condition.mask is None else visible.to(hidden.device),
                     attention.to(hidden.device), condition.duration)


def replace_rows(condition, rows, other):
    """`condition` with `rows` (B,) bool taken from `other` (same widths): condition dropout on encoded text."""
    def pick(ours, theirs):
        return None if ours is None else torch.where(rows.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)
    return Condition(*map(pick, condition, other))


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
                         F.pad(condition.pooled_mask, (0, extra)), condition.duration)
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


def load_flow(folder, config, dtype):
    """TangoFlux of a folder and the text encoder's weights that some official files carry along ({} if none)."""
    refuse_pickles(folder, "tangoflux.safetensors")
    path = folder / "tangoflux.safetensors"
    tensors = load_tensors(path)
    text = {name.removeprefix("text_encoder."): tensor for name, tensor in tensors.items()
            if name.startswith("text_encoder.")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("text_encoder.")}
    with torch.device("meta"):             # no random initialisation in vain
        flow = TangoFlux(config)
    flow = flow.to(dtype).to_empty(device="cpu")
    load_exactly(flow, check_finite(tensors, path), str(path))
    return flow, text


def load_model(name, device="cpu", dtype=torch.float32, parts=("flow", "codec", "text")):
    """Read a model folder or hub id -> namespace .flow .codec .text (None where not in `parts`) .config .folder.

    Layout: config.json, tangoflux.safetensors, vae.safetensors, text_encoder/. Everything is in eval mode. Weights
    must fit the config exactly and are cast to `dtype`; the codec stays float32, T5 too if `dtype` is float16.
    """
    folder = model_folder(name)
    config = read_config(folder)
    flow = codec = text = None
    carried = {}
    if "flow" in parts or "text" in parts:
        checked = check_config(read_config(resolve(folder, "flow")))
    if "flow" in parts:
        flow, carried = load_flow(resolve(folder, "flow"), checked, dtype)
        flow = flow.to(device).eval()
    if "text" in parts:
        text = load_text(resolve(folder, "text_encoder"), checked, carried, dtype).to(device)
        if text.width != checked["joint_attention_dim"]:
            raise UserError(f"{folder}: the text encoder is {text.width} wide, "
                            f"but joint_attention_dim is {checked['joint_attention_dim']}")
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
