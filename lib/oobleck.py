"""Oobleck, the waveform VAE of Stable Audio Open: the codec of TangoFlux at full size.

    audio (B, channels, N) -> encode -> mean, std (B, L, C) -> decode -> audio (B, channels, L hop)

In the layout of diffusers' AutoencoderOobleck: the official weights load by name. `python vae.py
--codec oobleck` trains it; what makes it quick on a CPU is in lib/fast.py.

Letters: B batch, L latent frames, C latent channels, N audio samples, H hidden channels.
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import UserError
from lib.mel import MEL_16K, MEL_44K, LogMel, log_mel_error

# Stable Audio Open 1.0: hop 2048, 44.1 kHz stereo, C = 64, 156,112,514 parameters.
OOBLECK_DEFAULTS = dict(
    encoder_hidden_size=128, downsampling_ratios=[2, 4, 4, 8, 8],
    channel_multiples=[1, 2, 4, 8, 16], decoder_channels=128, decoder_input_channels=64,
    audio_channels=2, sampling_rate=44100)

# For two cores: hop 256, 62.5 latent frames a second, 0.5 M parameters. A low width and a large
# stride where there are many samples.
TOY_OOBLECK = dict(
    encoder_hidden_size=8, downsampling_ratios=[8, 8, 4], channel_multiples=[4, 8, 16],
    decoder_channels=8, decoder_input_channels=32, audio_channels=1, sampling_rate=16000)

CHUNK = 128                     # frames decoded at a time: 0.6 GB of activations at full size
RESOLUTIONS = (2048, 1024, 512, 256, 128, 64, 32)       # FFT sizes of Stable Audio's training


# ----------------------------------------------------------------------------- layers

class Snake(nn.Module):
    """x + sin(a x)^2 / b for each channel of (B, H, N), with a = exp(alpha), b = exp(beta)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x):
        a, b = self.alpha.exp(), self.beta.exp() + 1e-9
        return x + torch.sin(a * x).square() / b


class WeightNormConv(nn.Module):
    """A 1D convolution with weight = g v / ||v||; the norm is over all dimensions but the first.

    The first dimension of a transposed convolution's weight is its INPUT channel: g is (in, 1, 1).
    """

    def __init__(self, channels_in, channels_out, kernel, stride=1, padding=0, dilation=1,
                 bias=True, transposed=False):
        super().__init__()
        kind = nn.ConvTranspose1d if transposed else nn.Conv1d
        initial = kind(channels_in, channels_out, kernel, bias=bias)    # torch's initialisation
        self.bias = initial.bias
        self.weight_g = nn.Parameter(initial.weight.detach().norm(dim=(1, 2), keepdim=True))
        self.weight_v = initial.weight
        self.transposed = transposed
        self.settings = {"stride": stride, "padding": padding, "dilation": dilation}

    def weight(self):
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))

    def forward(self, x):
        convolve = F.conv_transpose1d if self.transposed else F.conv1d
        return convolve(x, self.weight(), self.bias, **self.settings)


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, Snake, 1x1 convolution; the input added. (B, H, N) -> same."""

    def __init__(self, width, dilation):
        super().__init__()
        self.snake1 = Snake(width)
        self.conv1 = WeightNormConv(width, width, 7, 1, 3 * dilation, dilation)
        self.snake2 = Snake(width)
        self.conv2 = WeightNormConv(width, width, 1)

    def forward(self, x):
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


def encoder_block(width_in, width_out, stride):
    """Three residual units, then a strided convolution: (B, H_in, N) -> (B, H_out, N / stride)."""
    return nn.Sequential(OrderedDict(
        res_unit1=ResidualUnit(width_in, 1),
        res_unit2=ResidualUnit(width_in, 3),
        res_unit3=ResidualUnit(width_in, 9),
        snake1=Snake(width_in),
        conv1=WeightNormConv(width_in, width_out, 2 * stride, stride, (stride + 1) // 2)))


def decoder_block(width_in, width_out, stride):
    """A transposed convolution, then three residual units: (B, H_in, N) -> (B, H_out, N stride)."""
    half = (stride + 1) // 2
    return nn.Sequential(OrderedDict(
        snake1=Snake(width_in),
        conv_t1=WeightNormConv(width_in, width_out, 2 * stride, stride, half, transposed=True),
        res_unit1=ResidualUnit(width_out, 1),
        res_unit2=ResidualUnit(width_out, 3),
        res_unit3=ResidualUnit(width_out, 9)))


class Stack(nn.Module):
    """Encoder: audio (B, channels, N) -> moments (B, 2C, L), the mean, then the raw scale.

    Decoder: latents (B, C, L) -> audio; there is no tanh, the output is not bounded.
    """

    def __init__(self, block, rows_in, widths, strides, rows_out, kernel, bias):
        super().__init__()
        self.conv1 = WeightNormConv(rows_in, widths[0], 7, padding=3)
        self.block = nn.ModuleList(map(block, widths[:-1], widths[1:], strides))
        self.snake1 = Snake(widths[-1])
        self.conv2 = WeightNormConv(widths[-1], rows_out, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x):
        x = self.conv1(x)
        for block in self.block:
            x = block(x)                # (B, H, N), its length over or times the block's stride
        return self.conv2(self.snake1(x))


# ----------------------------------------------------------------------------- chunks
#
# Chunks are exact because every layer is a convolution. A chunk is decoded with `margin` more
# frames on either side, whose samples (spoilt by the zero padding at a cut) are thrown away.
#
# The margin follows from which inputs one output sees: an interval [low, high], walked backwards.
#   convolution, kernel 7     low - 3, high + 3
#   three residual units      low - 39, high + 39       3 * (1 + 3 + 9); 1x1 convolutions add none
#   transposed convolution    ceil((low + p - 2s + 1) / s), floor((high + p) / s)
# with stride s, kernel 2s and padding p = ceil(s / 2). An odd stride changes the length (by a
# sample at the right end of a stage) but not the shift. Stable Audio Open: 10 frames.

def decode_margin(strides):
    """Latent frames beyond a frame's own samples, on either side, that these can depend on."""
    low, high = -3, math.prod(strides) + 2
    for stride in strides:                              # the decoder's last stage comes first
        padding = (stride + 1) // 2
        low = math.ceil((low - 39 + padding - 2 * stride + 1) / stride)
        high = (high + 39 + padding) // stride
    return max(3 - low, high + 3)


# ----------------------------------------------------------------------------- the codec

class Oobleck(nn.Module):
    """The codec: waveforms to latents and back. Arguments: those of OOBLECK_DEFAULTS that differ.

    downsampling_ratios: stride of each stage, from the audio inwards; hop is their product.
    channel_multiples: widths over encoder_hidden_size and decoder_channels. The encoder puts out 2C
    channels; the official code encoder_hidden_size, which works only where that is 2C.
    """

    kind = "oobleck"
    TOY = TOY_OOBLECK
    # flags of vae.py, found on eight one-second clips; kl_weight is that of Stable Audio 2.0
    TRAINING = dict(clips=512, crop_seconds=1.0, train_steps=3000, batch_size=4,
                    learning_rate=3e-3, beta1=0.8, kl_weight=1e-4, dtype="float32")

    def __init__(self, **config):
        super().__init__()
        self.config = {**OOBLECK_DEFAULTS, **config}
        width, strides, multiples, decoder_width, latents, channels, rate = self.config.values()
        if len(multiples) != len(strides):
            raise ValueError("channel_multiples and downsampling_ratios must be equally long")
        self.sampling_rate = int(rate)
        self.audio_channels = channels
        self.latent_channels = latents
        self.hop = self.columns = math.prod(strides)        # columns of an example, a latent frame
        self.decode_margin = decode_margin(strides)
        widths = [width, *(width * multiple for multiple in multiples)]
        self.encoder = Stack(encoder_block, channels, widths, strides, 2 * latents, 3, bias=True)
        widths = [decoder_width * multiple for multiple in multiples[::-1]] + [decoder_width]
        self.decoder = Stack(decoder_block, latents, widths, strides[::-1], channels, 7, bias=False)
        # with torch's own bias the posterior would start at std = softplus(0) = 0.69, wider than
        # the means are apart: mostly noise; softplus(-4) = 0.018, which the KL term widens
        nn.init.constant_(self.encoder.conv2.bias[latents:].detach(), -4.0)

    @property
    def latent_mean(self):          # TangoFlux uses raw latents
        return self.encoder.conv2.bias.new_zeros(self.latent_channels)

    @property
    def latent_std(self):
        return self.latent_mean + 1

    def normalise(self, latents):
        """Raw latents (B, L, C) -> what training and sampling see: here the same."""
        return latents

    denormalise = normalise

    def fold(self):
        """Ready for inference; lib.fast.quicken_codec computes the weights once."""
        return self.eval()

    def encode(self, audio):
        """Audio (B, channels, N) in [-1, 1] -> mean, std, each (B, L, C), L = floor(N / hop).

        Samples after the last whole frame are lost. Raises UserError if the clip has no frame.
        """
        if audio.shape[-1] < self.hop:
            raise UserError(f"audio has {audio.shape[-1]} samples, under one frame of {self.hop}")
        mean, scale = self.encoder(audio).transpose(1, 2).chunk(2, dim=-1)      # (B, L, C) each
        return mean, F.softplus(scale) + 1e-4

    def decode(self, latents, frames=None):
        """Raw latents (B, L, C) -> audio (B, channels, L * hop); odd strides lose a few samples.

        frames: only the first frames, the same as in the whole, in chunks: memory is bounded.
        """
        latents = latents.mT                                            # (B, C, L)
        if frames is None:
            return self.decoder(latents)                                # (B, channels, L hop)
        margin = self.decode_margin
        latents = latents[..., :frames + margin]
        length = latents.shape[-1]
        size = math.ceil(length / math.ceil(length / CHUNK))
        pieces = []
        for first in range(0, length, size):
            start = max(first - margin, 0)
            piece = self.decoder(latents[..., start:first + size + margin])
            pieces.append(piece[..., (first - start) * self.hop:][..., :size * self.hop])
        return torch.cat(pieces, dim=-1)[..., :frames * self.hop]

    def example(self, audio):
        """For the loop of vae.py: audio (channels, N) of a clip, zeros up to a whole frame."""
        return F.pad(audio, (0, -audio.shape[-1] % self.hop))

    def losses(self, audio, generator, resolutions=RESOLUTIONS):
        """The unweighted parts of the loss for audio (B, channels, N): {name: scalar}.

        As Stable Audio 2.0, without its adversarial and feature-matching terms. Its waveform weight
        is 0; here that term alone sees the phase. Noise comes from `generator`, on the CPU.
        """
        mean, std = self.encode(audio)
        noise = torch.randn(mean.shape, generator=generator).to(mean)   # (B, L, C)
        decoded = self.decode(mean + std * noise).float()       # the STFT knows no bfloat16
        audio = audio[..., :decoded.shape[-1]]
        stft = multi_resolution_stft_loss(audio, decoded, resolutions)
        return {"stft": stft, "waveform": (audio - decoded).abs().mean(), "kl": kl(mean, std)}

    def error_db(self, audio):
        """Log-mel error (B,) in dB of audio (B, channels, N), its posterior mean decoded."""
        mel = LogMel(**(MEL_16K if self.sampling_rate < 32000 else MEL_44K)).to(audio.device)
        decoded = self.decode(self.encode(audio)[0])
        audio = audio[..., :decoded.shape[-1]]
        ours, theirs = mel(decoded.flatten(0, 1)), mel(audio.flatten(0, 1))     # (B channels, M, F)
        return log_mel_error(theirs, ours, mel.natural).view(len(audio), -1).mean(1)

    def start(self, examples):
        """Nothing is measured before training, nor after it (`finish`)."""

    finish = start


# ----------------------------------------------------------------------------- losses

def kl(mean, std):
    """KL to N(0, 1) as in Stable Audio: sum over C, mean over B and L, no factor 0.5; -> ()."""
    variance = std.square()
    return (mean.square() + variance - variance.log() - 1).sum(-1).mean()


def stft_magnitude(audio, n_fft):
    """Audio (B, N) -> |STFT| (B, n_fft/2 + 1, frames), Hann, hop n_fft/4, floor 1e-4."""
    window = torch.hann_window(n_fft, device=audio.device)
    spectrum = torch.stft(audio, n_fft, n_fft // 4, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-8).sqrt()


def multi_resolution_stft_loss(audio, decoded, resolutions=RESOLUTIONS):
    """Spectral convergence + L1 of the log magnitude of (B, channels, N), mean over resolutions.

    auraloss (Steinmetz & Reiss 2020), with which Stable Audio trains, without its A-weighting:
    || |Y| - |X| ||_F / || |Y| ||_F per clip and mean | ln|Y| - ln|X| |, Y the audio. Stereo adds
    mid (L + R) and side (L - R). Resolutions longer than the clip are left out.
    """
    audio, decoded = with_mid_side(audio).flatten(0, 1), with_mid_side(decoded).flatten(0, 1)
    usable = [n_fft for n_fft in resolutions if n_fft <= audio.shape[-1]]
    total = 0
    for n_fft in usable:
        target, ours = stft_magnitude(audio, n_fft), stft_magnitude(decoded, n_fft)
        convergence = (target - ours).norm(dim=(1, 2)) / target.norm(dim=(1, 2))    # (B channels,)
        total = total + convergence.mean() + (target.log() - ours.log()).abs().mean()
    return total / len(usable)


def with_mid_side(audio):
    """(B, 2, N) left, right -> (B, 4, N) left, right, mid, side; mono (B, 1, N) stays."""
    if audio.shape[1] == 1:
        return audio
    left, right = audio.unbind(1)
    return torch.stack([left, right, left + right, left - right], dim=1)
