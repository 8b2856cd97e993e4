"""The 1D mel VAE of the second paper's backbone (MMAudio, MeanAudio), which is the toy's codec too.

    audio -> log-mel -> encoder -> mean, std (B, L, C) -> decoder -> log-mel -> Griffin-Lim -> audio

A convolutional network over time, the mel bands as channels, whose layers keep the magnitude of what they
pass on (EDM2, Karras et al. 2024): normalised weights without bias, pixel norm, weighted sums. State_dict
names and layout are those of the official file; its weights are RAW, normalised in the forward pass.
`latent_mean` and `latent_std` are ours.

Two options are ours, off in the official layout. `patch` lays that many mel frames side by side as channels, in
place of halvings. `linear_skip` adds to mean and output the whitened principal components of the patches
(`start_linear`), so that the network only has to learn what a linear codec can't do: from scratch it needs hours
for what these hold at once.

Letters: B batch, M mel bands, F mel frames, L latent frames, C latent channels, D hidden width.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from vocoder import MEL_16K, MEL_44K, LogMel, griffin_lim


# ----------------------------------------------------------------------------- layers that keep magnitudes

def unit_magnitude(x, dims):
    """Scale x to root mean square 1 over `dims` (EDM2, `normalize`)."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    count = math.prod(x.shape[dim] for dim in dims)
    return x / (1e-4 + norm / math.sqrt(count)).to(x.dtype)


def silu(x):
    """SiLU over its root mean square for a standard normal input (EDM2, equation 81)."""
    return F.silu(x) / 0.596


def weighted_sum(a, b, weight=0.3):
    """Sum of a branch and its residual that keeps the magnitude of independent inputs (EDM2, equation 88)."""
    return torch.lerp(a, b, weight) / math.sqrt((1 - weight) ** 2 + weight ** 2)


class Conv(nn.Module):
    """1D convolution without bias whose weight is normalised per output channel (EDM2, equation 66).

    Gradients flow through the normalisation. For inference `MelVAE.fold` does it once; `train()` and
    loading weights undo that, and the state_dict keeps the raw weight either way.
    """

    def __init__(self, channels_in, channels_out, kernel_size):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels_out, channels_in, kernel_size))
        self.register_buffer("folded", None, persistent=False)

    def normalised_weight(self):
        """w / (1e-4 + ||w|| / sqrt(n)) / sqrt(n), with n elements per output channel."""
        return unit_magnitude(self.weight, (1, 2)) / math.sqrt(self.weight[0].numel())

    def train(self, mode=True):
        if mode:
            self.folded = None          # the raw weight is about to change
        return super().train(mode)

    def _load_from_state_dict(self, *arguments):
        self.folded = None
        super()._load_from_state_dict(*arguments)

    def forward(self, x, gain=None):
        weight = self.normalised_weight() if self.folded is None else self.folded
        if gain is not None:
            weight = weight * gain
        return F.conv1d(x, weight.to(x.dtype), padding=self.weight.shape[-1] // 2)


class ResnetBlock(nn.Module):
    """Two convolutions beside a residual; the pixel-normalised input is also the residual branch."""

    def __init__(self, channels_in, channels_out, kernel_size, clip):
        super().__init__()
        self.conv1 = Conv(channels_in, channels_out, kernel_size)
        self.conv2 = Conv(channels_out, channels_out, kernel_size)
        if channels_in != channels_out:
            self.nin_shortcut = Conv(channels_in, channels_out, 1)
        self.clip = clip

    def forward(self, x):
        x = unit_magnitude(x, (1,))
        branch = self.conv2(silu(self.conv1(silu(x))))                              # (B, D_out, F)
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return weighted_sum(x, branch).clamp(-self.clip, self.clip)


class Attention(nn.Module):
    """Self-attention over time, one head, with normalised queries, keys and values."""

    def __init__(self, channels):
        super().__init__()
        self.qkv = Conv(channels, 3 * channels, 1)
        self.proj_out = Conv(channels, channels, 1)

    def forward(self, x):
        batch, channels, length = x.shape
        qkv = self.qkv(x).reshape(batch, 1, channels, 3, length)                    # q, k, v interleaved
        q, k, v = unit_magnitude(qkv, (2,)).transpose(2, 4).unbind(3)               # each (B, 1, F, D)
        y = F.scaled_dot_product_attention(q, k, v)
        return weighted_sum(x, self.proj_out(y[:, 0].transpose(1, 2)))              # (B, D, F)


class Downsample(nn.Module):
    """Halve the length: 1x1 convolution, mean of neighbours, 1x1 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = Conv(channels, channels, 1)

    def forward(self, x):
        return self.conv2(F.avg_pool1d(self.conv1(x), 2))                           # (B, D, F / 2)


class Upsample(nn.Module):
    """Double the length: repeat each frame, then a convolution."""

    def __init__(self, channels, kernel_size):
        super().__init__()
        self.conv = Conv(channels, channels, kernel_size)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))  # (B, D, 2 F)


# ----------------------------------------------------------------------------- encoder and decoder

class Level(nn.Module):
    """The blocks of one resolution; `resample` is ("downsample" | "upsample", module) or None."""

    def __init__(self, widths, attention, resample, kernel_size, clip):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, kernel_size, clip) for a, b in zip(widths, widths[1:]))
        self.attn = nn.ModuleList(Attention(b) for b in widths[1:] if attention)
        self.resample = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, x):
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        return getattr(self, self.resample)(x) if self.resample else x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution, (B, D, L) -> (B, D, L)."""

    def __init__(self, channels, kernel_size, clip):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, kernel_size, clip)
        self.attn_1 = Attention(channels)
        self.block_2 = ResnetBlock(channels, channels, kernel_size, clip)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Patches (B, M patch, F / patch) -> moments (B, 2C, L): the mean, then the log variance."""

    def __init__(self, channels_in, channels_out, widths, blocks, attn_layers, down_layers, kernel_size, clip):
        super().__init__()
        self.conv_in = Conv(channels_in, widths[0], kernel_size)
        self.down = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths):
            resample = ("downsample", Downsample(width)) if level in down_layers else None
            self.down.append(Level([before] + [width] * blocks, level in attn_layers, resample, kernel_size, clip))
            before = width
        self.mid = Middle(before, kernel_size, clip)
        self.conv_out = Conv(before, channels_out, kernel_size)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(silu(self.mid(x)), gain=self.learnable_gain + 1)


class Decoder(nn.Module):
    """Latents (B, C, L) -> patches (B, M patch, F / patch)."""

    def __init__(self, channels_in, channels_out, widths, blocks, attn_layers, down_layers, kernel_size, clip):
        super().__init__()
        self.conv_in = Conv(channels_in, widths[-1], kernel_size)
        self.mid = Middle(widths[-1], kernel_size, clip)
        self.up = nn.ModuleList()                            # indexed like the encoder's levels, run from last to first
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            resample = ("upsample", Upsample(width, kernel_size)) if level - 1 in down_layers else None
            self.up.append(Level([before] + [width] * (blocks + 1), level in attn_layers, resample, kernel_size, clip))
        self.conv_out = Conv(widths[0], channels_out, kernel_size)
        self.learnable_gain = nn.Parameter(torch.zeros(()))

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(silu(x), gain=self.learnable_gain + 1)


# ----------------------------------------------------------------------------- the codec

class MelVAE(nn.Module):
    """Mel codec: `encode(audio) -> mean, std`, `decode(latents) -> audio`, latents RAW (B, L, C).

    The defaults after `hidden_dim` are those of the second paper's codec (down_layers [0]: one halving).
    `mel` holds the parameters of the front end; None takes the paper's for that number of bands.
    """

    audio_channels = 1

    def __init__(self, data_dim=80, embed_dim=20, hidden_dim=384, ch_mult=(1, 2, 4), num_res_blocks=2, attn_layers=(3,),
                 down_layers=(0,), kernel_size=3, clip_act=256.0, patch=1, linear_skip=False, mel=None):
        super().__init__()
        mel = dict(mel or (MEL_16K if data_dim == 80 else MEL_44K), num_mels=data_dim)
        self.config = dict(data_dim=data_dim, embed_dim=embed_dim, hidden_dim=hidden_dim, ch_mult=list(ch_mult),
                           num_res_blocks=num_res_blocks, attn_layers=list(attn_layers),
                           down_layers=list(down_layers), kernel_size=kernel_size, clip_act=clip_act,
                           patch=patch, linear_skip=linear_skip, mel=mel)
        self.mel = LogMel(**mel)
        self.sampling_rate, self.latent_channels = mel["sampling_rate"], embed_dim
        self.patch, self.frames_per_latent = patch, patch * 2 ** len(down_layers)
        self.hop = mel["hop_size"] * self.frames_per_latent
        widths = [hidden_dim * multiple for multiple in ch_mult]
        rest = (widths, num_res_blocks, attn_layers, down_layers, kernel_size, clip_act)
        self.encoder = Encoder(data_dim * patch, 2 * embed_dim, *rest)
        self.decoder = Decoder(embed_dim, data_dim * patch, *rest)
        self.register_buffer("data_mean", torch.zeros(1, data_dim, 1))
        self.register_buffer("data_std", torch.ones(1, data_dim, 1))
        self.linear_skip = linear_skip
        if linear_skip:
            if down_layers:
                raise ValueError("a linear skip needs down_layers [], that is a latent frame per patch")
            self.register_buffer("skip_encoder", torch.zeros(data_dim * patch, embed_dim))
            self.register_buffer("skip_decoder", torch.zeros(embed_dim, data_dim * patch))
            self.skip_logvar = nn.Parameter(torch.full((embed_dim,), -4.0))
        self.register_buffer("latent_mean", torch.zeros(embed_dim))
        self.register_buffer("latent_std", torch.ones(embed_dim))

    def encode_mel(self, log_mel):
        """Log-mel (B, M, F), F a multiple of `frames_per_latent` -> mean, std of the posterior, (B, L, C) raw."""
        x = self.to_patches(log_mel)                                                # (B, M patch, F / patch)
        moments = self.encoder(x)                                                   # (B, 2 C, L)
        mean, logvar = moments.float().transpose(1, 2).chunk(2, dim=-1)             # (B, L, C)
        if self.linear_skip:
            mean = mean + x.transpose(1, 2) @ self.skip_encoder                     # (B, L, C)
            logvar = logvar + self.skip_logvar
        return mean, (0.5 * logvar.clamp(-30, 20)).exp()

    def decode_mel(self, latents):
        """Raw latents (B, L, C) -> log-mel (B, M, F)."""
        x = self.decoder(latents.transpose(1, 2)).float()                           # (B, M patch, F / patch)
        if self.linear_skip:
            x = x + (latents @ self.skip_decoder).transpose(1, 2)
        x = x.unflatten(1, (-1, self.patch)).transpose(2, 3).flatten(2)             # (B, M, F)
        return x * self.data_std + self.data_mean

    def to_patches(self, log_mel):
        """Log-mel (B, M, F), normalised per band, `patch` frames to a column -> (B, M patch, F / patch)."""
        x = (log_mel - self.data_mean) / self.data_std                              # (B, M, F)
        return x.unflatten(-1, (-1, self.patch)).transpose(2, 3).flatten(1, 2)

    @torch.no_grad()
    def start_linear(self, log_mels):
        """Set the linear skip to the whitened principal components of log_mels (N, M, F), and the network's share to 0.

        The first decode then is the best linear one; training adds what a network can on top of it.
        """
        device = self.skip_encoder.device
        columns = torch.cat([self.to_patches(part.float().to(device)).transpose(1, 2).flatten(0, 1)  # (N L, M patch)
                             for part in log_mels.split(256)])
        variance, axes = torch.linalg.eigh(columns.T @ columns / len(columns))
        variance, axes = variance[-self.latent_channels:].clamp(min=1e-6), axes[:, -self.latent_channels:]
        self.skip_encoder.copy_(axes / variance.sqrt())                             # (M patch, C)
        self.skip_decoder.copy_((axes * variance.sqrt()).T)                         # (C, M patch)
        self.encoder.learnable_gain.fill_(-1)
        self.decoder.learnable_gain.fill_(-1)

    def encode(self, audio):
        """Audio (B, channels, samples) in [-1, 1] -> mean, std (B, L, C) raw; zeros fill up the last latent frame."""
        audio = audio.mean(1)                                                       # (B, samples)
        audio = F.pad(audio, (0, -audio.shape[-1] % self.hop))
        return self.encode_mel(self.mel(audio))

    def decode(self, latents, frames=None):
        """Raw latents (B, L, C) -> audio (B, 1, L * hop), through the log-mel and Griffin-Lim.

        frames: only the samples of so many first frames; all are computed, for attention and phases see the whole.
        """
        audio = griffin_lim(self.decode_mel(latents), self.mel)[:, None]
        return audio if frames is None else audio[..., :frames * self.hop]

    def normalise(self, latents):
        """Raw latents -> zero mean and unit variance per channel over the codec's training data."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalise(self, latents):
        """Inverse of `normalise`."""
        return latents * self.latent_std + self.latent_mean

    def kl(self, mean, std):
        """Divergence of the posterior from a standard normal, elementwise, the OFFICIAL way.

        The textbook has 0.5 (mean^2 + var - 1 - logvar). In the official line the 0.5 multiplies mean^2
        alone. Both are zero only at mean 0 and variance 1; the official one pulls the variance twice as
        hard. We follow the official.
        """
        return 0.5 * mean ** 2 + std ** 2 - 1 - 2 * std.log()

    def fold(self):
        """Normalise every convolution once, for inference. The raw weights stay in the state_dict."""
        for module in self.eval().modules():
            if isinstance(module, Conv):
                module.folded = module.normalised_weight().detach()
        return self


def mel_losses(codec, log_mel, generator):
    """The unweighted parts of the training loss for log-mels (B, M, F): {"mel", "kl"}, scalars.

    "mel" is the mean absolute error in units of each band's standard deviation, of a reconstruction from
    latents drawn from the posterior with `generator` (on the CPU, so that a seed means the same
    everywhere). "kl" is a mean over (B, L, C). The adversarial terms that others add sharpen details which
    Griffin-Lim would not render.
    """
    mean, std = codec.encode_mel(log_mel)                                           # (B, L, C)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    reconstruction = codec.decode_mel(mean + std * noise)                           # (B, M, F)
    error = (reconstruction - log_mel).abs() / codec.data_std
    return {"mel": error.mean(), "kl": codec.kl(mean, std).mean()}
