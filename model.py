"""FluxTransformer and its conditioning (paper 2.2, 2.3), score heads, model folders.

    model = load_model("checkpoints/toy/base")          # or a hub id in the official layout
    condition = encode_prompts(model.text, ["a violin"], torch.tensor([3.0]))      # of lib.text
    velocity = model.flow.velocity(torch.randn(1, 64, 48), torch.ones(1), condition)

After the official code (declare-lab/TangoFlux on diffusers' Flux blocks), under its state_dict
names, the misspelt `duration_emebdder` included, so that official weights load. Where we differ:
  - `Condition.mask` hides a row's text padding from attention; in the official code (mask=None)
    every row attends to its padding, and its result depends on the other prompts of the batch;
  - the number of audio tokens comes from the latents, not from `audio_seq_len`.
The paper says 515M parameters; the official layout has 518,009,536.
Letters: B batch, L latent frames, C latent channels, S text tokens (S+1 with the duration token),
M blocks, N all tokens, D width, H heads, A width of a head, T width of the text encoder.
"""
import math
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.common import UserError, read_json, reading, warn, write_json
from lib.fast import attention, quicken
from lib.text import load_text, null_score
from lib.weights import find_weights, load_weights, model_folder, resolve, save_module
from vae import load_codec, save_codec

# where a score enters (second paper, Table I)
SCORE_HEADS = {"v1": "GlobalAdaLN", "v2": "InputAdd", "v3": "AudioPrepend",
               "v4": "PerBlockAdaLN", "v5": "TextPrepend"}


@dataclass
class ModelConfig:
    """A model's size, as in the official config.json; the defaults are the paper's."""
    num_layers: int = 6                 # double blocks (MMDiT): text and audio have own weights
    num_single_layers: int = 18         # single blocks (DiT) on text and audio as one sequence
    in_channels: int = 64               # C
    attention_head_dim: int = 128       # A
    num_attention_heads: int = 8        # H; the width D is H A
    joint_attention_dim: int = 1024     # T
    audio_seq_len: int = 645            # L of a sample: 30 s of Oobleck latents
    max_duration: float = 30            # seconds, where the duration's embedding ends
    axes_dims_rope: tuple = (16, 56, 56)    # rotated widths, which add up to A
    uncondition: bool = False           # in the official files; not used
    text_encoder_name: str = "google/flan-t5-large"     # a hub id, or a folder beside the weights
    score_head: str | None = None       # "v1" to "v5": SCORE_HEADS; None: the network takes none
    score_null: str = "zero"            # no score is e_s = 0; "scalar": e_s of the mean score
    score_mean: float = 0.0             # mean of the training scores,
    score_std: float = 1.0              # and deviation: a score is standardised by both

    @classmethod
    def from_dict(cls, config, folder=""):
        """The config in a dict; its other keys (vae, references) are left out. Raises UserError."""
        self = cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})
        with reading(Path(folder) / "config.json", "take the config.json of a model folder"):
            check_config(self)
        return self

    def to_dict(self):
        """What config.json holds; without a score head none of its keys."""
        fields = vars(self).items()
        return {key: value for key, value in fields if self.score_head or "score" not in key}


# toy: learns the built-in world on two CPU cores (train_fm.py takes C and L from the codec)
TOY = ModelConfig(num_layers=2, num_single_layers=4, in_channels=48, attention_head_dim=48,
                  num_attention_heads=4, joint_attention_dim=128, audio_seq_len=64,
                  max_duration=4.096, axes_dims_rope=[8, 20, 20], text_encoder_name="text_encoder")
PRESETS = {"tangoflux": ModelConfig().to_dict(), "toy": TOY.to_dict()}


# ----------------------------------------------------------------------------- embeddings

def chain(**layers):
    """The layers one after the other, under these names."""
    return nn.Sequential(OrderedDict(layers))


def mlp(inputs, width):
    """Linear, SiLU, Linear."""
    return chain(linear_1=nn.Linear(inputs, width), act=nn.SiLU(), linear_2=nn.Linear(width, width))


class TimeTextEmbed(nn.Module):
    """The global condition of adaLN: time t (B,) in [0, 1] + pooled text (B, T) -> (B, D)."""

    def __init__(self, text_width, width):
        super().__init__()
        self.timestep_embedder = mlp(256, width)
        self.text_embedder = mlp(text_width, width)

    def forward(self, t, pooled):
        frequencies = torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        angles = (1000 * t.float())[:, None] * frequencies      # (B, 128); too much for 16 bits
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)             # (B, 256)
        return self.timestep_embedder(waves.to(pooled.dtype)) + self.text_embedder(pooled)


class DurationEmbedder(nn.Module):
    """Seconds (B,), clamped to [0, max_duration] -> one token (B, 1, T); paper 2.2."""

    def __init__(self, text_width, max_duration):
        super().__init__()
        self.max_duration = max_duration
        frequencies = nn.ParameterDict({"weights": torch.randn(128)})       # learned
        self.time_positional_embedding = nn.ModuleList([frequencies, nn.Linear(257, text_width)])

    def forward(self, duration):
        frequencies, linear = self.time_positional_embedding
        x = duration.float().clamp(0, self.max_duration)[:, None] / self.max_duration       # (B, 1)
        angles = 2 * math.pi * x * frequencies["weights"]                   # (B, 128)
        features = torch.cat([x, angles.sin(), angles.cos()], dim=-1)       # (B, 257)
        return linear(features.to(linear.bias.dtype))[:, None]              # (B, 1, T)


def with_visible(mask, before, after):
    """mask (B, S) with `before` and `after` more visible tokens; None (all visible) stays None."""
    return None if mask is None else F.pad(mask, (before, after), value=True)


# ----------------------------------------------------------------------------- attention

@lru_cache(32)
@torch.inference_mode(False)        # else a later training could not use the cached tables
def rope_tables(tokens, frames, axes, device):
    """cos and signed sin, each (N, A), for `apply_rope`; theta 10000, angles in float64.

    The first `tokens` (text, duration) stand at position 0, audio frame i at i on every axis."""
    exponents = torch.cat([torch.arange(0, axis, 2).double() / axis for axis in axes])  # (A/2,)
    positions = F.pad(torch.arange(frames).double(), (tokens, 0))           # (N,)
    angles = torch.outer(positions, 10000.0 ** -exponents).repeat_interleave(2, dim=1)  # (N, A)
    signs = torch.tensor([-1.0, 1.0]).repeat(len(exponents))                # (A,)
    return angles.cos().float().to(device), (signs * angles.sin().float()).to(device)


def apply_rope(x, cos, sin):
    """Rotate adjacent pairs of x (B, H, N, A): (a, b) -> (a cos - b sin, b cos + a sin)."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)                 # (B, H, N, A)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


class Attention(nn.Module):
    """Attention over text and audio; a double block has projections of its own for the text."""

    def __init__(self, width, heads, double):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        if double:
            self.to_out = nn.ModuleList([nn.Linear(width, width)])
            self.norm_added_q = nn.RMSNorm(width // heads)
            self.norm_added_k = nn.RMSNorm(width // heads)
            self.add_q_proj = nn.Linear(width, width)
            self.add_k_proj = nn.Linear(width, width)
            self.add_v_proj = nn.Linear(width, width)
            self.to_add_out = nn.Linear(width, width)

    def heads_of(self, x, norm=None):
        """(B, N, D) -> (B, H, N, A); norm: RMS over A in x's dtype (float32 slows autocast)."""
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)               # (B, H, N, A)
        return x if norm is None else F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), 1e-6)

    def forward(self, x, rope, visible, text=None):
        """x: the audio (B, L, D) with its text (B, S, D), or both as one -> (B, N, D)."""
        q = self.heads_of(self.to_q(x), self.norm_q)                        # (B, H, L, A)
        k = self.heads_of(self.to_k(x), self.norm_k)
        v = self.heads_of(self.to_v(x))
        if text is not None:
            text_q = self.heads_of(self.add_q_proj(text), self.norm_added_q)        # (B, H, S, A)
            text_k = self.heads_of(self.add_k_proj(text), self.norm_added_k)
            text_v = self.heads_of(self.add_v_proj(text))
            q = torch.cat([text_q, q], dim=2)                               # (B, H, N, A)
            k = torch.cat([text_k, k], dim=2)
            v = torch.cat([text_v, v], dim=2)
        q = apply_rope(q, *rope).to(v.dtype)
        k = apply_rope(k, *rope).to(v.dtype)
        return attention(q, k, v, visible).transpose(1, 2).flatten(2)       # (B, N, D)


# ----------------------------------------------------------------------------- blocks, score heads

def ada_ln(width, chunks):
    """SiLU of a global condition (B, D) -> `chunks` modulations (B, chunks, 1, D)."""
    return chain(linear=nn.Linear(width, chunks * width), each=nn.Unflatten(-1, (chunks, 1, width)))


def modulate(x, shift, scale):
    """LayerNorm without affine, eps 1e-6, then scale and shift: x (B, N, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def feed_forward(width):
    """Linear, GELU (tanh), Linear; 4x wide, under diffusers' names net.0.proj and net.2."""
    wide = chain(proj=nn.Linear(width, 4 * width), act=nn.GELU("tanh"))
    return chain(net=nn.Sequential(wide, nn.Identity(), nn.Linear(4 * width, width)))


class DoubleBlock(nn.Module):
    """MMDiT: text and audio have their own weights and meet in attention only."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm1_context = ada_ln(width, 6), ada_ln(width, 6)
        self.attn = Attention(width, heads, double=True)
        self.ff, self.ff_context = feed_forward(width), feed_forward(width)

    def forward(self, text, audio, silu_temb, rope, visible):
        # modulations, (B, 1, D) each: three around attention, three around the MLP
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(silu_temb).unbind(1)
        (text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale,
         text_mlp_gate) = self.norm1_context(silu_temb).unbind(1)
        text_in = modulate(text, text_shift, text_scale)                    # (B, S, D)
        audio_in = modulate(audio, shift, scale)                            # (B, L, D)
        x = self.attn(audio_in, rope, visible, text_in)                     # (B, N, D)
        text_out, audio_out = x.tensor_split([text.shape[1]], dim=1)        # (B, S|L, D)
        audio = torch.addcmul(audio, gate, self.attn.to_out[0](audio_out))  # audio + gate * out
        text = torch.addcmul(text, text_gate, self.attn.to_add_out(text_out))

        audio_out = self.ff(modulate(audio, mlp_shift, mlp_scale))          # (B, L, D)
        audio = torch.addcmul(audio, mlp_gate, audio_out)
        text_out = self.ff_context(modulate(text, text_mlp_shift, text_mlp_scale))
        text = torch.addcmul(text, text_mlp_gate, text_out)                 # (B, S, D)
        return text, audio


class SingleBlock(nn.Module):
    """DiT on text and audio as one sequence; attention and MLP in parallel, one projection out."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = ada_ln(width, 3)
        self.proj_mlp, self.act_mlp = nn.Linear(width, 4 * width), nn.GELU("tanh")
        self.proj_out = nn.Linear(5 * width, width)
        self.attn = Attention(width, heads, double=False)

    def forward(self, x, silu_temb, rope, visible):
        shift, scale, gate = self.norm(silu_temb).unbind(1)                 # (B, 1, D) each
        h = modulate(x, shift, scale)                                       # (B, N, D)
        attended = self.attn(h, rope, visible)      # first: so autograd sums the gradients of h
        wide = self.act_mlp(self.proj_mlp(h))                               # (B, N, 4D)
        hidden = torch.cat([attended, wide], dim=-1)                        # (B, N, 5D)
        return torch.addcmul(x, gate, self.proj_out(hidden))                # (B, N, D)


class ScoreEmbed(nn.Module):
    """A score's embedding e_s, and where it enters the network.

    Second paper (Kim et al., "Improving Text-to-Music Generation with Human Preference Rewards",
    III-B), whose code is not published: all but the five names of its Table I is our reading.
    e_s: Fourier features at Gaussian frequencies (Tancik et al. 2020), cycles per deviation of the
    training scores, and an MLP whose last layer starts at zero. No score (NaN): see `score_null`.
    """

    def __init__(self, config, width):
        super().__init__()
        self.config = config
        each = config.num_layers + config.num_single_layers + 1             # blocks and output
        self.outputs = each if config.score_head == "v4" else 1
        self.register_buffer("frequencies", 0.5 * torch.randn(32))
        self.linear_1 = nn.Linear(64, width)
        self.linear_2 = nn.Linear(width, self.outputs * width)

    def embed(self, score):
        """score (B,), NaN = none -> e_s (B, 1, D), of v4 (B, M+1, D)."""
        x = (score.float() - self.config.score_mean) / self.config.score_std
        angles = 2 * math.pi * x.nan_to_num()[:, None] * self.frequencies   # (B, 32)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)          # (B, 64)
        hidden = F.silu(self.linear_1(features.to(self.linear_1.bias.dtype)))
        embedded = self.linear_2(hidden).unflatten(-1, (self.outputs, -1))
        if self.config.score_null == "zero":
            embedded = embedded.masked_fill(score.isnan()[:, None, None], 0.0)
        return embedded

    def forward(self, score, text, audio, tembs, mask):
        """text (B, S, D), audio (B, L, D), tembs [global condition (B, D)], mask (B, S) or None."""
        head = self.config.score_head
        embedded = self.embed(score.to(text.device))                        # (B, 1 or M+1, D)
        if head in ("v1", "v4"):        # added to the global condition; v4: one e_s for each block
            tembs = [tembs[0] + own for own in embedded.unbind(1)]          # 1 or M+1 of (B, D)
        if head == "v2":                # added to every audio latent
            audio = audio + embedded                                        # (B, L, D)
        if head == "v3":                # one more token before the audio, also without a score
            audio = torch.cat([embedded.to(audio.dtype), audio], dim=1)     # (B, 1+L, D)
        if head == "v5":                # one more token before the text, also without a score
            text = torch.cat([embedded.to(text.dtype), text], dim=1)        # (B, 1+S, D)
            mask = with_visible(mask, 1, 0)
        return text, audio, tembs, mask


class FluxTransformer(nn.Module):
    """Velocity of latents (B, L, C) at time t, given text, its pooled vector, perhaps a score."""

    def __init__(self, config):
        super().__init__()
        text_width, heads = config.joint_attention_dim, config.num_attention_heads
        width = heads * config.attention_head_dim
        self.axes = tuple(config.axes_dims_rope)
        self.time_text_embed = TimeTextEmbed(text_width, width)
        self.context_embedder = nn.Linear(text_width, width)
        self.x_embedder = nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(width, heads) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, heads) for _ in range(config.num_single_layers))
        self.norm_out = ada_ln(width, 2)
        self.proj_out = nn.Linear(width, config.in_channels)
        self.score_embed = ScoreEmbed(config, width) if config.score_head else None

    def forward(self, latents, t, text, pooled, mask=None, score=None):
        """latents (B, L, C), t (B,) with 1 = noise, text (B, S, T), pooled (B, T) -> (B, L, C).

        mask (B, S) bool: True = attended to; None: all (official code). score (B,), NaN = none,
        or None; ValueError if the network has no score head."""
        text, audio = self.context_embedder(text), self.x_embedder(latents)     # (B, S|L, D)
        tembs = [self.time_text_embed(t, pooled)]                               # (B, D)
        if self.score_embed is not None:
            score = null_score(latents) if score is None else score
            text, audio, tembs, mask = self.score_embed(score, text, audio, tembs, mask)
        elif score is not None:
            raise ValueError("this network has no score head")
        mask = with_visible(mask, 0, audio.shape[1])                            # (B, N)

        frames = latents.shape[1]
        tokens = text.shape[1] + audio.shape[1] - frames                        # N - L
        rope = rope_tables(tokens, frames, self.axes, text.device)              # (N, A) twice
        tembs = cycle([F.silu(temb) for temb in tembs])     # one for all, or (v4) one for each use
        for block in self.transformer_blocks:
            text, audio = block(text, audio, next(tembs), rope, mask)           # (B, S|L, D)
        x = torch.cat([text, audio], dim=1)                                     # (B, N, D)
        for block in self.single_transformer_blocks:
            x = block(x, next(tembs), rope, mask)                               # (B, N, D)
        scale, shift = self.norm_out(next(tembs)).unbind(1)     # this order, unlike in the blocks
        return self.proj_out(modulate(x[:, -frames:], shift, scale))            # (B, L, C)


class TangoFlux(nn.Module):
    """The transformer with its conditioning; state_dict as in the official files."""

    def __init__(self, config):
        super().__init__()
        config = ModelConfig.from_dict(config)
        self.config = config.to_dict()
        width = config.joint_attention_dim
        self.transformer = FluxTransformer(config)
        self.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.duration_emebdder = DurationEmbedder(width, config.max_duration)
        init_weights(self)

    def condition_inputs(self, condition):
        """Text with the duration token at its END (B, S+1, T), pooled (B, T), mask, score."""
        text = condition.text.to(self.fc[0].bias.dtype)
        real = condition.pooled_mask[..., None].to(text.dtype)                  # (B, S, 1)
        pooled = self.fc((text * real).sum(1) / real.sum(1).clamp(min=1))       # (B, T)
        duration = self.duration_emebdder(condition.duration).to(text.dtype)    # (B, 1, T)
        text = torch.cat([text, duration], dim=1)                               # (B, S+1, T)
        return text, pooled, with_visible(condition.mask, 0, 1), condition.score

    def velocity(self, latents, t, condition):
        """Noise minus data at x_t: latents (B, L, C) normalised, t (B,), Condition -> (B, L, C)."""
        return self.transformer(latents, t, *self.condition_inputs(condition))


def init_weights(flow):
    """Xavier uniform, biases 0, as DiT; the official code kept PyTorch's defaults.

    Zero: the adaLN linears, so that every gate is shut and each block starts as the identity; the
    last projection, so that the first prediction is 0; a score head's last layer. DiT starts the
    embedders of t and text at std 0.02: text so faint is learned late."""
    zero = (".linear", "transformer.proj_out", "score_embed.linear_2")
    for name, module in flow.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, 0.0 if name.endswith(zero) else 1.0)
            nn.init.zeros_(module.bias)


def with_score_head(flow, head, null="zero", mean=0.0, std=1.0, seed=0):
    """A TangoFlux with a score head and the weights of `flow` -> (flow, whether its head is new).

    v1 and v2 take each other's, null, mean and deviation too (the paper's cross-loading, IV-B)."""
    before = flow.config.get("score_head")
    if before not in (None, head) and {before, head} != {"v1", "v2"}:
        raise UserError(f"{head} can't take the weights of score head {before}: "
                        "only v1 and v2 take each other's")
    if (before, head) == ("v2", "v1"):
        warn("v2 run as v1: the paper found that this collapses (Table III: -0.50, v1 as v2 +0.01)")
    new = dict(score_null=null, score_mean=float(mean), score_std=float(std))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        result = TangoFlux({**new, **flow.config, "score_head": head})
    result.load_state_dict(result.state_dict() | flow.state_dict())        # strict
    like = next(flow.parameters())        # device and dtype
    return result.to(like).train(flow.training), before is None


# ----------------------------------------------------------------------------- model folders

def check_config(config):
    """ValueError or TypeError for a ModelConfig with a field out of range."""
    right = {"max_duration": 0 < config.max_duration <= 86400,
             "text_encoder_name": isinstance(config.text_encoder_name, str),
             "score_head": config.score_head in (None, *SCORE_HEADS)}
    for name, field in config.__dataclass_fields__.items():
        value = getattr(config, name)
        if field.type is int:        # a bool is no number here
            low, high = (0, 1000) if "_layers" in name else (1, 100_000)
            right[name] = type(value) is int and low <= value <= high
        if not right.get(name, True):
            raise ValueError(f"{name} is {value!r}")
    axes = config.axes_dims_rope
    if sum(axes) != config.attention_head_dim or any(a < 2 or a % 2 for a in axes):
        raise ValueError("axes_dims_rope: even widths that add up to attention_head_dim")


def load_model(name, device="cpu", dtype=torch.float32, parts=("flow", "codec", "text")):
    """Read a model folder or hub id -> namespace .flow .codec .text .config .folder.

    What is not in `parts` is None; everything is in eval mode. The flow is cast to `dtype`, the
    rest stays float32. Raises UserError: weights must fit the config exactly, and parts each other.
    """
    folder = model_folder(name)
    flow_folder, config_json = resolve(folder, "flow")
    config = ModelConfig.from_dict(config_json, flow_folder).to_dict()
    model = SimpleNamespace(flow=None, codec=None, text=None, config=config_json, folder=folder)
    widths = {}                         # of the other parts, which must be the flow's
    t5_names = {}                       # of a T5 that some official files hold inside the flow's
    if "flow" in parts or "/" in config["text_encoder_name"]:
        weights = find_weights(flow_folder, "tangoflux.safetensors")
        names = [name for name in weights if name.startswith("text_encoder.")]
        t5_names = {name.removeprefix("text_encoder."): name for name in names}
    if "flow" in parts:
        with torch.device("meta"):      # no random numbers are drawn in vain
            flow = TangoFlux(config)
        model.flow = load_weights(flow, weights, t5_names.values(), dtype).to(device).eval()
    if "codec" in parts:
        model.codec = load_codec(folder, device)
        widths["in_channels"] = model.codec.latent_channels
    if "text" in parts:
        t5 = weights.renamed(t5_names) if t5_names else None
        text_folder, _ = resolve(folder, "text_encoder")
        model.text = load_text(text_folder, config, t5).to(device)
        widths["joint_attention_dim"] = model.text.width
    for key, width in widths.items():
        if width != config[key]:
            raise UserError(f"{folder}: the part is {width} wide, but {key} is {config[key]}")
    return model


def load_policy(folder, device, score_head=None, batch_size=0, dtype=torch.float32):
    """load_model, its head run as `score_head`; quick at sampling batch_size clips, if not 0."""
    model = load_model(folder, device, dtype)
    if score_head:
        model.flow, is_new = with_score_head(model.flow, score_head)
        if is_new:
            raise UserError(f"--score_head needs a model with a score head, which {folder} has not")
    if batch_size:
        quicken(model.flow, 2 * batch_size * model.flow.config["audio_seq_len"])
    return model


def save_model(folder, flow=None, codec=None, text=None, references=None, extra=None,
               dtype=torch.float32):
    """Write the given parts as a model folder, whose config.json keeps the keys that it has.

    references {"vae": "../base"}: parts that stay in another folder. extra: keys of config.json."""
    folder = Path(folder)
    path = folder / "config.json"
    config = read_json(path, dict) if path.exists() else {}
    if flow is not None:
        save_module(folder / "tangoflux.safetensors", flow, dtype)
        config |= flow.config
    if text is not None:
        text.save(folder / "text_encoder", dtype)
    given = {"flow": flow, "vae": codec, "text_encoder": text}
    with reading(path, "its references must map parts to folders"):
        linked = dict(config.get("references", {})) | (references or {})
    config["references"] = {part: at for part, at in linked.items() if given.get(part) is None}
    write_json(path, config | (extra or {}))
    if codec is not None:
        save_codec(folder, codec, dtype)        # adds its own key "vae"
