"""The parts of FluxTransformer: matrix products; embeddings of t, text, duration, score; attention; both blocks.

Names and arithmetic are those of the official code (diffusers' Flux blocks); model.py puts the parts together.

Letters: B batch, L latent frames, S text tokens, N all tokens, M blocks, D width, H heads, A width of a head, T width
of the text encoder.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ----------------------------------------------------------------------------- matrix products

class Linear(nn.Linear):
    """nn.Linear, on request with GELU (tanh) behind it. On a CPU, without gradients, oneDNN multiplies.

    torch gives float32 products to MKL, which on AMD's processors runs at half the speed of oneDNN (two Zen 5 cores,
    1332 x 1024 by 1024 x 4096: 212 GFLOP/s against 432, and 487 with a packed weight; bfloat16: 795, 823, 999).
    """

    packed = None                       # the weight in oneDNN's own order of storage, after `pack`

    def forward(self, x, gelu=False):
        if self.packed is not None or onednn_multiplies(x):
            weight = self.weight if self.packed is None else self.packed
            after = ("gelu", [], "tanh") if gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, *after)
        x = F.linear(x, self.weight, self.bias)
        return F.gelu(x, approximate="tanh") if gelu else x

    def pack(self, rows):
        """Let oneDNN store the weight, for inputs of about `rows` rows; the module then has no weight of its own."""
        if not onednn_multiplies(self.weight):
            return
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        self.weight = None


def onednn_multiplies(x):
    """Whether oneDNN has a product for tensors like x (on this machine, without gradients, outside of autocast)."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


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
        self.linear_1 = Linear(width_in, width)
        self.linear_2 = Linear(width, width)

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
        self.time_positional_embedding = nn.Sequential(LearnedFourier(), Linear(257, text_width))

    def forward(self, duration):
        fraction = duration.float().clamp(0, self.max_duration) / self.max_duration             # (B,)
        return self.time_positional_embedding(fraction[:, None])[:, None]                       # (B, 1, T)


class ScoreEmbed(nn.Module):
    """Score (B,), NaN = none -> e_s: Fourier features and an MLP whose last layer starts at zero (second paper, III-B).

    (B, D), or for v4 (B, M+1, D), one for each block and the output layer. The score is standardised by the mean and
    deviation that training scores had; frequencies are Gaussian (Tancik et al. 2020), cycles per deviation. No score is
    the zero embedding, by a mask (null "zero"), or what the network makes of 0 ("scalar": the paper's Eq. 2).
    """

    def __init__(self, config, width):
        super().__init__()
        self.mean, self.std, self.null = config["score_mean"], config["score_std"], config["score_null"]
        self.outputs = config["num_layers"] + config["num_single_layers"] + 1 if config["score_head"] == "v4" else 1
        self.register_buffer("frequencies", 0.5 * torch.randn(32))
        self.linear_1 = Linear(64, width)
        self.linear_2 = Linear(width, self.outputs * width)

    def forward(self, score):
        absent = score.isnan()                                                                  # (B,)
        standard = (score.nan_to_num() - self.mean) / self.std
        if self.null == "scalar":
            standard = torch.where(absent, 0.0, standard)
        angles = 2 * math.pi * standard.float()[:, None] * self.frequencies.float()             # (B, 32)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.linear_1.bias.dtype)
        embedded = self.linear_2(F.silu(self.linear_1(features)))                               # (B, (M+1) D)
        if self.null == "zero":
            embedded = embedded.masked_fill(absent[:, None], 0.0)
        return embedded.unflatten(-1, (self.outputs, -1)) if self.outputs > 1 else embedded


# ----------------------------------------------------------------------------- blocks

class AdaLN(nn.Module):
    """temb (B, D) -> `chunks` modulations, each (B, 1, D). Takes SiLU(temb), which is the same for every block."""

    def __init__(self, width, chunks):
        super().__init__()
        self.chunks = chunks
        self.linear = Linear(width, chunks * width)

    def forward(self, silu_temb):
        return self.linear(silu_temb)[:, None].chunk(self.chunks, dim=-1)


def modulate(x, shift, scale):
    """LayerNorm without affine, eps 1e-6, then scale and shift: x (B, N, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), Linear; 4x wide. The list mirrors diffusers' names net.0.proj and net.2."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.ModuleList([nn.Module(), nn.Identity(), Linear(4 * width, width)])
        self.net[0].proj = Linear(width, 4 * width)

    def forward(self, x):
        return self.net[2](self.net[0].proj(x, gelu=True))


class HeadNorm(nn.Module):
    """RMS norm over a head's A channels, eps 1e-6, in its input's dtype (a float32 weight slows autocast)."""

    def __init__(self, head_width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), eps=1e-6)


def attention(q, k, v, visible):
    """softmax(q k^T / sqrt(A)) v for (B, H, N, A); `visible` (B, 1, 1, N) bool hides keys, None shows all."""
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    # the same written out: in 16 bits on a CPU the fused kernel takes three times as long, its backward pass four
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
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        if joint:
            self.to_out = nn.ModuleList([Linear(width, width)])
            self.norm_added_q, self.norm_added_k = HeadNorm(head_width), HeadNorm(head_width)
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (Linear(width, width) for _ in range(3))
            self.to_add_out = Linear(width, width)

        self.qkv = self.added_qkv = None                # one product in the place of three, after `fuse`

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)                                # (B, H, N, A)

    def project(self, x):
        """q, k, v of the audio, or of all tokens in a single block; q and k are normalised per head."""
        q, k, v = self.qkv(x).chunk(3, dim=-1) if self.qkv else (self.to_q(x), self.to_k(x), self.to_v(x))
        return self.norm_q(self.split(q)), self.norm_k(self.split(k)), self.split(v)

    def project_text(self, x):
        q, k, v = self.added_qkv(x).chunk(3, dim=-1) if self.added_qkv else (
            self.add_q_proj(x), self.add_k_proj(x), self.add_v_proj(x))
        return self.norm_added_q(self.split(q)), self.norm_added_k(self.split(k)), self.split(v)

    def fuse(self):
        """Join the three projections into one; those are gone afterwards."""
        self.qkv = fused(self.to_q, self.to_k, self.to_v)
        self.to_q = self.to_k = self.to_v = None
        if hasattr(self, "add_q_proj"):
            self.added_qkv = fused(self.add_q_proj, self.add_k_proj, self.add_v_proj)
            self.add_q_proj = self.add_k_proj = self.add_v_proj = None

    def attend(self, q, k, v, rope, visible):
        """Rotate q and k, attend, join the heads: (B, H, N, A) -> (B, N, D)."""
        q, k = apply_rope(q, *rope).to(v.dtype), apply_rope(k, *rope).to(v.dtype)
        return attention(q, k, v, visible).transpose(1, 2).flatten(2)                           # (B, N, D)


def fused(*linears):
    """Linears of the same input as one, whose output is theirs side by side."""
    with torch.device("meta"):
        joined = Linear(linears[0].in_features, sum(linear.out_features for linear in linears))
    joined.weight, joined.bias = (nn.Parameter(torch.cat([getattr(linear, name).detach() for linear in linears]), False)
                                  for name in ("weight", "bias"))
    return joined


class DoubleBlock(nn.Module):
    """MMDiT: text and audio have their own weights and meet in attention only."""

    def __init__(self, heads, head_width):
        super().__init__()
        width = heads * head_width
        self.norm1, self.norm1_context = AdaLN(width, 6), AdaLN(width, 6)
        self.attn = Attention(heads, head_width, joint=True)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def modulations(self, silu_temb):
        """(B, D) -> those of the audio and of the text: shift, scale, gate of attention, then of the MLP (official)."""
        return self.norm1(silu_temb), self.norm1_context(silu_temb)                             # 6 x (B, 1, D) each

    def forward(self, text, audio, modulations, rope, visible):
        (shift, scale, gate, *mlp), (text_shift, text_scale, text_gate, *text_mlp) = modulations
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
        self.proj_mlp = Linear(width, 4 * width)
        self.proj_out = Linear(5 * width, width)
        self.attn = Attention(heads, head_width, joint=False)

    def modulations(self, silu_temb):
        """(B, D) -> shift, scale, gate, each (B, 1, D)."""
        return self.norm(silu_temb)

    def forward(self, x, modulations, rope, visible):
        shift, scale, gate = modulations
        h = modulate(x, shift, scale)                                                           # (B, N, D)
        attended = self.attn.attend(*self.attn.project(h), rope, visible)                       # (B, N, D)
        hidden = torch.cat([attended, self.proj_mlp(h, gelu=True)], dim=-1)                     # (B, N, 5D)
        return torch.addcmul(x, gate, self.proj_out(hidden))
