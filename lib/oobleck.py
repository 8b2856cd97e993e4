"""Oobleck, the waveform VAE of Stable Audio Open: the codec of TangoFlux at full size.

    audio (B, channels, N) -> encode -> mean, std (B, L, C) -> decode -> audio (B, channels, L hop)

In the layout of diffusers' AutoencoderOobleck: the official weights load by name. `python vae.py
--codec oobleck` trains it; what makes it quick on a CPU is in lib/fast.py.

Letters: B batch, L latent frames, C latent channels, N audio samples, H hidden channels.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from lib.mel import MEL_16K, MEL_44K, LogMel, chain, log_mel_error

# Stable Audio Open 1.0: hop 2048, 44.1 kHz stereo, C = 64, 156,112,514 parameters.
OOBLECK_DEFAULTS = dict(
    encoder_hidden_size=128, downsampling_ratios=[2, 4, 4, 8, 8],
    channel_multiples=[1, 2, 4, 8, 16], decoder_channels=128, decoder_input_channels=64,
    audio_channels=2, sampling_rate=44100)
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
        a = self.alpha.exp()
        b = self.beta.exp() + 1e-9
        return x + torch.sin(a * x).square() / b


class WeightNormConv(nn.Module):
    """A 1D convolution with weight = g v / ||v||; the norm is over all dimensions but the first,
    which in a transposed convolution's weight is the INPUT channel: g is (in, 1, 1)."""

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
        norm = self.weight_v.norm(dim=(1, 2), keepdim=True)
        return self.weight_v * (self.weight_g / norm)

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
    padding = (stride + 1) // 2
    return chain(
        res_unit1=ResidualUnit(width_in, 1),
        res_unit2=ResidualUnit(width_in, 3),
        res_unit3=ResidualUnit(width_in, 9),
        snake1=Snake(width_in),
        conv1=WeightNormConv(width_in, width_out, 2 * stride, stride, padding))


def decoder_block(width_in, width_out, stride):
    """A transposed convolution, then three residual units: (B, H_in, N) -> (B, H_out, N stride)."""
    padding = (stride + 1) // 2
    return chain(
        snake1=Snake(width_in),
        conv_t1=WeightNormConv(width_in, width_out, 2 * stride, stride, padding, transposed=True),
        res_unit1=ResidualUnit(width_out, 1),
        res_unit2=ResidualUnit(width_out, 3),
        res_unit3=ResidualUnit(width_out, 9))


class Stack(nn.Module):
    """Encoder: audio (B, channels, N) -> moments (B, 2C, L), the mean, then the raw scale.
    Decoder: latents (B, C, L) -> audio; there is no tanh, the output is not bounded."""

    def __init__(self, block, rows_in, widths, strides, rows_out, kernel, bias):
        super().__init__()
        self.conv1 = WeightNormConv(rows_in, widths[0], 7, padding=3)
        shapes = zip(widths[:-1], widths[1:], strides, strict=True)
        self.block = nn.ModuleList(block(*shape) for shape in shapes)
        self.snake1 = Snake(widths[-1])
        self.conv2 = WeightNormConv(widths[-1], rows_out, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x):
        x = self.conv1(x)
        for block in self.block:
            x = block(x)                # (B, H, N), its length over or times the block's stride
        return self.conv2(self.snake1(x))


def decode_margin(strides):
    """Latent frames beyond a frame's own samples, on either side, that these can depend on.
    Every layer is a convolution, so chunks are exact: each is decoded with so many more frames,
    whose samples (spoilt by the zero padding at a cut) are thrown away. The margin follows from
    which inputs one output sees, an interval [low, high], walked backwards:
        convolution, kernel 7     low - 3, high + 3
        three residual units      low - 39, high + 39       3 * (1 + 3 + 9); 1x1 ones add none
        transposed convolution    ceil((low + p - 2s + 1) / s), floor((high + p) / s)
    with stride s, kernel 2s and padding p = ceil(s / 2). An odd stride changes the length (by a
    sample at the right end of a stage) but not the shift. Stable Audio Open: 10 frames."""
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
    channels; the official code encoder_hidden_size, which works only where that is 2C."""

    kind = "oobleck"
    # for two cores: hop 256, 62.5 latent frames a second, 0.5 M parameters; a low width and a large
    # stride where there are many samples
    TOY = dict(
        encoder_hidden_size=8, downsampling_ratios=[8, 8, 4], channel_multiples=[4, 8, 16],
        decoder_channels=8, decoder_input_channels=32, audio_channels=1, sampling_rate=16000)

    def __init__(self, **config):
        super().__init__()
        self.config = {**OOBLECK_DEFAULTS, **config}
        width, strides, multiples, decoder_width, latents, channels, rate = self.config.values()
        self.sampling_rate = int(rate)
        self.audio_channels = channels
        self.latent_channels = latents
        self.hop = self.columns = math.prod(strides)        # columns of an example, a latent frame
        self.decode_margin = decode_margin(strides)
        widths = [width * multiple for multiple in (1, *multiples)]
        self.encoder = Stack(encoder_block, channels, widths, strides, 2 * latents, 3, bias=True)
        widths = [decoder_width * multiple for multiple in (*multiples[::-1], 1)]
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
        return latents

    denormalise = normalise

    def encode(self, audio):
        """Audio (B, channels, N) in [-1, 1] -> mean, std, each (B, L, C), L = floor(N / hop)."""
        moments = self.encoder(audio).mT                                # (B, L, 2C)
        mean, scale = moments.chunk(2, dim=-1)                          # (B, L, C) each
        return mean, F.softplus(scale) + 1e-4

    def decode(self, latents, frames=None):
        """Raw latents (B, L, C) -> audio (B, channels, L * hop); odd strides lose a few samples.
        frames: only the first of them. In chunks, so that memory is bounded."""
        margin = self.decode_margin
        frames = frames or latents.shape[1]
        latents = latents[:, :frames + margin].mT                       # (B, C, length)
        length = latents.shape[-1]
        size = math.ceil(length / math.ceil(length / CHUNK))
        pieces = []
        for first in range(0, length, size):
            start = max(first - margin, 0)
            piece = self.decoder(latents[..., start:first + size + margin])
            piece = piece[..., (first - start) * self.hop:]
            pieces.append(piece[..., :size * self.hop])
        audio = torch.cat(pieces, dim=-1)                               # (B, channels, length hop)
        return audio[..., :frames * self.hop]

    def example(self, audio):
        """For the loop of vae.py: audio (channels, N) of a clip, zeros up to a whole frame."""
        return F.pad(audio, (0, -audio.shape[-1] % self.hop))

    def losses(self, audio, generator):
        """Audio (B, channels, N) -> {"stft", "waveform", "kl"}: unweighted scalars, as Stable Audio
        2.0, without its adversarial and feature-matching terms. Its waveform weight is 0; here that
        term alone sees the phase. Noise comes from `generator`, on the CPU."""
        mean, std = self.encode(audio)
        noise = torch.randn(mean.shape, generator=generator).to(mean)   # (B, L, C)
        decoded = self.decode(mean + std * noise).float()       # the STFT knows no bfloat16
        audio = audio[..., :decoded.shape[-1]]
        stft = multi_resolution_stft_loss(audio, decoded)
        waveform = (audio - decoded).abs().mean()
        return {"stft": stft, "waveform": waveform, "kl": kl(mean, std)}

    def error_db(self, audio):
        """Log-mel error (B,) in dB of audio (B, channels, N), its posterior mean decoded."""
        mean, _ = self.encode(audio)
        decoded = self.decode(mean)
        audio = audio[..., :decoded.shape[-1]]
        mel = LogMel(**(MEL_16K if self.sampling_rate < 32000 else MEL_44K)).to(audio.device)
        log_mel = mel(audio.flatten(0, 1))                              # (B channels, M, F)
        error = log_mel_error(log_mel, mel(decoded.flatten(0, 1)), mel.natural)
        return error.view(len(audio), -1).mean(1)

    def start(self, examples):
        """Nothing is measured before training, nor after it (`finish`)."""

    finish = start


# ----------------------------------------------------------------------------- losses

def kl(mean, std):
    """KL to N(0, 1) as in Stable Audio: sum over C, mean over B and L, no factor 0.5; -> ()."""
    variance = std.square()
    divergence = mean.square() + variance - variance.log() - 1          # (B, L, C)
    return divergence.sum(-1).mean()


def multi_resolution_stft_loss(audio, decoded):
    """Spectral convergence + L1 of the log magnitude of (B, channels, N), mean over RESOLUTIONS.
    auraloss (Steinmetz & Reiss 2020), with which Stable Audio trains, without its A-weighting:
    || |Y| - |X| ||_F / || |Y| ||_F per clip and mean | ln|Y| - ln|X| |, Y the audio. Resolutions
    longer than the clip are left out."""
    losses = []
    for n_fft in RESOLUTIONS:
        if n_fft <= audio.shape[-1]:
            target = stft_magnitude(audio, n_fft)                       # (B channels, bins, frames)
            ours = stft_magnitude(decoded, n_fft)
            convergence = (target - ours).norm(dim=(1, 2)) / target.norm(dim=(1, 2))
            log_error = (target.log() - ours.log()).abs()
            losses.append(convergence.mean() + log_error.mean())
    return torch.stack(losses).mean()


def stft_magnitude(audio, n_fft):
    """Audio (B, channels, N) -> |STFT| (B channels, bins, frames), Hann, hop n_fft/4, floor 1e-4.
    Stereo adds mid (L + R) and side (L - R)."""
    if audio.shape[1] == 2:
        left, right = audio.unbind(1)
        audio = torch.stack([left, right, left + right, left - right], dim=1)
    window = torch.hann_window(n_fft, device=audio.device)
    spectrum = torch.stft(audio.flatten(0, 1), n_fft, n_fft // 4, window=window,
                          return_complex=True)
    return spectrum.abs().clamp(min=1e-4)
