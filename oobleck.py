"""Oobleck, the waveform VAE of Stable Audio Open: the codec of TangoFlux at full size.

    audio (B, channels, samples) -> encode -> mean, std (B, L, C) -> decode -> audio (B, channels, L * hop)

Written after the layout of diffusers' AutoencoderOobleck, so that the official weights load by name.
Train it with `python vae.py --codec oobleck`; this file holds the network, chunked encoding and decoding,
and the losses.

Letters: B batch, L latent frames, C latent channels, N audio samples, H hidden channels.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from weights import empty

# Stable Audio Open 1.0, vae/config.json: hop 2048, 44.1 kHz stereo, C = 64, 156,112,514 parameters.
OOBLECK_DEFAULTS = {
    "encoder_hidden_size": 128, "downsampling_ratios": [2, 4, 4, 8, 8], "channel_multiples": [1, 2, 4, 8, 16],
    "decoder_channels": 128, "decoder_input_channels": 64, "audio_channels": 2, "sampling_rate": 44100,
}

# Small enough for two cores: hop 256, 62.5 latent frames a second, 0.5 M parameters. The width stays low
# where there are many samples and grows where there are few; the first stride is large for the same
# reason.
TOY_OOBLECK = {
    "encoder_hidden_size": 8, "downsampling_ratios": [8, 8, 4], "channel_multiples": [4, 8, 16],
    "decoder_channels": 8, "decoder_input_channels": 32, "audio_channels": 1, "sampling_rate": 16000,
}

# Weights of the parts of `oobleck_losses`. STFT and KL as in Stable Audio 2.0, whose waveform weight is 0:
# without its adversarial terms, left out here, the waveform term is the only one that sees the phase.
LOSS_WEIGHTS = {"stft": 1.0, "waveform": 1.0, "kl": 1e-4}

# How TOY_OOBLECK is trained: flags of vae.py, found by experiment on eight one-second clips. Its other flags
# (beta2 0.99, 50 steps of warm-up, cosine decay, gradients clipped to norm 1) are right for both codecs.
TOY_OOBLECK_TRAINING = {"learning_rate": 3e-3, "beta1": 0.8, "batch_size": 4, "crop_seconds": 1.0, "steps": 3000,
                        "kl_weight": LOSS_WEIGHTS["kl"]}

DILATIONS = (1, 3, 9)
KERNEL = 7
INITIAL_SCALE = -4.0            # softplus(-4) = 0.018: see Oobleck.__init__
CHUNK = 128                     # frames decoded at a time: at full size activations of 0.6 GB


# ----------------------------------------------------------------------------- layers

class Snake(nn.Module):
    """Snake: x + sin(a x)^2 / b per channel, with a = exp(alpha), b = exp(beta); (B, H, N) or (B, H, 1, N)."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1))

    def forward(self, x):
        a, b = self.alpha.exp(), self.beta.exp() + 1e-9
        if x.dim() == 4:
            a, b = a[..., None], b[..., None]
        if torch.is_grad_enabled():
            return x + torch.sin(a * x).square() / b
        wave = (a * x).sin_()           # the same in place, three times as fast: a third of a decoder's work is here
        return wave.mul_(wave).div_(b).add_(x)


class WeightNormConv(nn.Module):
    """A (transposed) 1D convolution with weight = g v / ||v||; the norm is over all dimensions but the first.

    The parameters are called weight_g and weight_v as in the official file. The first dimension of a
    transposed convolution's weight is its INPUT channel, so g is (in, 1, 1) there. Takes (B, H, N), or (B, H, 1, N)
    with channels last (see `spread`).
    """

    def __init__(self, channels_in, channels_out, kernel, stride=1, padding=0, dilation=1, bias=True,
                 transposed=False):
        super().__init__()
        kind = nn.ConvTranspose1d if transposed else nn.Conv1d
        initial = kind(channels_in, channels_out, kernel, bias=bias)    # for torch's default initialisation
        self.bias = initial.bias
        self.weight_g = nn.Parameter(initial.weight.detach().norm(dim=(1, 2), keepdim=True))
        self.weight_v = nn.Parameter(initial.weight.detach().clone())
        self.settings = {"stride": stride, "padding": padding, "dilation": dilation}
        self.settings_2d = {"stride": (1, stride), "padding": (0, padding), "dilation": (1, dilation)}
        self.convolve = F.conv_transpose1d if transposed else F.conv1d
        self.convolve_2d = F.conv_transpose2d if transposed else F.conv2d
        self.register_buffer("folded", None, persistent=False)
        self.fold = False

    def weight(self):
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=(1, 2), keepdim=True))

    def forward(self, x):
        if self.fold and self.folded is None:           # at first use: a sampler never uses the encoder
            with torch.inference_mode(False), torch.no_grad():          # for who trains through the codec later
                self.folded = self.weight()
                if x.dim() == 4:
                    self.folded = self.folded[:, :, None].contiguous(memory_format=torch.channels_last)
        weight = self.weight() if self.folded is None else self.folded
        if x.dim() == 4:
            weight = weight if weight.dim() == 4 else weight[:, :, None]
            return self.convolve_2d(x, weight, self.bias, **self.settings_2d)
        return self.convolve(x, weight if weight.dim() == 3 else weight[:, :, 0], self.bias, **self.settings)

    def train(self, mode=True):
        if mode:
            self.fold, self.folded = False, None        # g and v are about to change
        return super().train(mode)

    def _load_from_state_dict(self, *arguments):
        self.folded = None
        super()._load_from_state_dict(*arguments)


def spread(x):
    """(B, H, N) -> (B, H, 1, N) with channels last on a CPU without gradients, where that takes 0.6 of the time."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return x
    return x[:, :, None].contiguous(memory_format=torch.channels_last)


def gather(x):
    """The inverse of `spread`."""
    return x if x.dim() == 3 else x[:, :, 0].contiguous()


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, Snake, 1x1 convolution, and the input added; (B, H, N) -> (B, H, N)."""

    def __init__(self, channels, dilation):
        super().__init__()
        self.snake1 = Snake(channels)
        self.conv1 = WeightNormConv(channels, channels, KERNEL, padding=KERNEL // 2 * dilation,
                                    dilation=dilation)
        self.snake2 = Snake(channels)
        self.conv2 = WeightNormConv(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


class EncoderBlock(nn.Module):
    """Three residual units, then a strided convolution: (B, H_in, N) -> (B, H_out, N / stride)."""

    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(channels_in, d) for d in DILATIONS)
        self.snake1 = Snake(channels_in)
        self.conv1 = WeightNormConv(channels_in, channels_out, 2 * stride, stride, stride_padding(stride))

    def forward(self, x):
        x = self.res_unit3(self.res_unit2(self.res_unit1(x)))
        return self.conv1(self.snake1(x))                               # (B, H_out, N / stride)


class DecoderBlock(nn.Module):
    """A transposed convolution, then three residual units: (B, H_in, N) -> (B, H_out, N * stride)."""

    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.snake1 = Snake(channels_in)
        self.conv_t1 = WeightNormConv(channels_in, channels_out, 2 * stride, stride, stride_padding(stride),
                                      transposed=True)
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(channels_out, d) for d in DILATIONS)

    def forward(self, x):
        x = self.conv_t1(self.snake1(x))                                # (B, H_out, N * stride)
        return self.res_unit3(self.res_unit2(self.res_unit1(x)))


class Encoder(nn.Module):
    """Audio (B, channels, N) -> moments (B, 2C, L): the mean, then the raw scale."""

    def __init__(self, hidden, audio_channels, strides, multiples, latent_channels):
        super().__init__()
        widths = [hidden * multiple for multiple in (1, *multiples)]
        self.conv1 = WeightNormConv(audio_channels, hidden, KERNEL, padding=KERNEL // 2)
        self.block = nn.ModuleList(map(EncoderBlock, widths[:-1], widths[1:], strides))
        self.snake1 = Snake(widths[-1])
        self.conv2 = WeightNormConv(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, audio):
        x = self.conv1(spread(audio))                                   # (B, H, N)
        for block in self.block:
            x = block(x)
        return gather(self.conv2(self.snake1(x)))                       # (B, 2C, L)


class Decoder(nn.Module):
    """Latents (B, C, L) -> audio (B, channels, N); no tanh at the end, the output is not bounded."""

    def __init__(self, hidden, audio_channels, strides, multiples, latent_channels):
        super().__init__()
        widths = [hidden * multiple for multiple in (1, *multiples)][::-1]
        self.conv1 = WeightNormConv(latent_channels, widths[0], KERNEL, padding=KERNEL // 2)
        self.block = nn.ModuleList(map(DecoderBlock, widths[:-1], widths[1:], strides[::-1]))
        self.snake1 = Snake(hidden)
        self.conv2 = WeightNormConv(hidden, audio_channels, KERNEL, padding=KERNEL // 2, bias=False)

    def forward(self, latents):
        x = self.conv1(spread(latents))                                 # (B, H, L)
        for block in self.block:
            x = block(x)
        return gather(self.conv2(self.snake1(x)))                       # (B, channels, N)


# ----------------------------------------------------------------------------- lengths and margins
#
# Chunks are exact because every layer is a convolution: shift the input by whole frames and the output
# shifts with it. A chunk is computed with `margin` more frames on either side, whose results (spoilt by
# the zero padding at a cut) are thrown away; at the true ends of the clip nothing is cut, so the padding
# there is the official one.
#
# The margin follows from which inputs one output sees: an interval [low, high], walked backwards by layer.
#   conv, kernel 7           low - 3, high + 3
#   three residual units     low - 39, high + 39           3 * (1 + 3 + 9); the 1x1 convolutions add nothing
#   strided conv             s low - p, s high - p + 2s - 1        output j reads inputs s j - p ... + 2s - 1
#   transposed conv          ceil((low + p - 2s + 1) / s), floor((high + p) / s)      input i writes the same
# with stride s, kernel 2s and padding p = ceil(s / 2). An odd stride changes the length (by a sample at the
# right end of a stage) but not the shift, so the same margins hold. Stable Audio Open: 8 frames for encoding,
# 10 for decoding.

RESIDUAL_REACH = KERNEL // 2 * sum(DILATIONS)


def stride_padding(stride):
    """Padding of a (transposed) convolution of this stride, whose kernel is twice as long."""
    return math.ceil(stride / 2)


def encode_margin(strides):
    """Frames of audio beyond a latent frame, on either side, that this frame can depend on."""
    low, high = -1, 1                                                   # the last convolution has kernel 3
    for stride in reversed(strides):
        low = low * stride - stride_padding(stride) - RESIDUAL_REACH
        high = high * stride - stride_padding(stride) + 2 * stride - 1 + RESIDUAL_REACH
    low, high, hop = low - KERNEL // 2, high + KERNEL // 2, math.prod(strides)
    return max(math.ceil(-low / hop), math.ceil((high - (hop - 1)) / hop))


def decode_margin(strides):
    """Latent frames beyond a frame's own `hop` samples, on either side, that these samples can depend on."""
    low, high = -(KERNEL // 2), math.prod(strides) - 1 + KERNEL // 2
    for stride in strides:                                              # the decoder's last stage comes first
        low, high = low - RESIDUAL_REACH, high + RESIDUAL_REACH
        low = math.ceil((low + stride_padding(stride) - 2 * stride + 1) / stride)
        high = math.floor((high + stride_padding(stride)) / stride)
    return max(KERNEL // 2 - low, high + KERNEL // 2)


def frames_of(samples, strides):
    """Latent frames that the encoder makes of `samples`: floor(samples / hop) for even strides."""
    for stride in strides:
        samples = (samples + 2 * stride_padding(stride)) // stride - 1
    return samples


def run_in_chunks(network, source, frames, chunk_frames, margin, source_hop, result_hop):
    """`network(source)`, `chunk_frames` frames at a time: the same result, memory bounded by the chunk.

    source (B, H, about frames * source_hop) -> (B, H', about frames * result_hop). None: all at once.
    """
    if chunk_frames is not None and chunk_frames < 1:
        raise UserError(f"chunk_frames is {chunk_frames}, but must be 1 or more")
    if chunk_frames is None or chunk_frames >= frames:
        return network(source)
    pieces = []
    for first in range(0, frames, chunk_frames):
        last = first + chunk_frames
        start, stop = max(first - margin, 0), last + margin
        piece = network(source[..., start * source_hop:stop * source_hop if stop < frames else None])
        end = (last - start) * result_hop if last < frames else None
        pieces.append(piece[..., (first - start) * result_hop:end])
    return torch.cat(pieces, dim=-1)


# ----------------------------------------------------------------------------- the codec

class Oobleck(nn.Module):
    """The codec: waveforms to latents and back. Arguments: the keys of OOBLECK_DEFAULTS.

    downsampling_ratios: stride of each stage, from the audio inwards; hop is their product.
    channel_multiples: width of each stage over encoder_hidden_size (encoder) and decoder_channels (decoder).
    decoder_input_channels: C. The encoder puts out 2C channels; the official code puts out
    encoder_hidden_size, which works only where that is 2C, so the two agree there.

    decode_margin, encode_margin: frames of context that make a part of a clip equal to the whole.
    """

    def __init__(self, encoder_hidden_size, downsampling_ratios, channel_multiples, decoder_channels,
                 decoder_input_channels, audio_channels, sampling_rate):
        super().__init__()
        strides, multiples = list(downsampling_ratios), list(channel_multiples)
        if len(strides) != len(multiples) or not strides or min(strides + multiples) < 1:
            raise UserError(f"channel_multiples {multiples} and downsampling_ratios {strides} must be two "
                            "lists of positive numbers of the same length")
        self.sampling_rate, self.audio_channels = sampling_rate, audio_channels
        self.latent_channels, self.strides, self.hop = decoder_input_channels, strides, math.prod(strides)
        self.config = {"encoder_hidden_size": encoder_hidden_size, "downsampling_ratios": strides,
                       "channel_multiples": multiples, "decoder_channels": decoder_channels,
                       "decoder_input_channels": decoder_input_channels, "audio_channels": audio_channels,
                       "sampling_rate": sampling_rate}
        self.encode_margin, self.decode_margin = encode_margin(strides), decode_margin(strides)
        shape = audio_channels, strides, multiples, decoder_input_channels
        self.encoder = Encoder(encoder_hidden_size, *shape)
        self.decoder = Decoder(decoder_channels, *shape)
        # With torch's default bias the posterior starts at std = softplus(0) = 0.69, wider than the means
        # are apart: at first the decoder would see mostly noise. Start with a narrow posterior; the KL
        # term widens it.
        nn.init.constant_(self.encoder.conv2.bias[decoder_input_channels:].detach(), INITIAL_SCALE)
        # TangoFlux uses raw latents. Not saved: the official file has no such entries.
        self.register_buffer("latent_mean", torch.zeros(decoder_input_channels), persistent=False)
        self.register_buffer("latent_std", torch.ones(decoder_input_channels), persistent=False)

    def normalise(self, latents):
        """Raw latents (B, L, C) -> what training and sampling see (here the same)."""
        return (latents - self.latent_mean) / self.latent_std

    def denormalise(self, latents):
        """The inverse of `normalise`."""
        return latents * self.latent_std + self.latent_mean

    def fold(self):
        """Compute g v / ||v|| once, where it is first used, for inference; the state_dict stays. Training undoes it."""
        for module in self.eval().modules():
            if isinstance(module, WeightNormConv):
                module.fold, module.folded = True, None
        return self

    def encode(self, audio, chunk_frames=None):
        """Audio (B, channels, N) in [-1, 1] -> mean, std, each (B, L, C); even strides: L = floor(N / hop).

        Nothing is padded: samples after the last whole frame are lost. chunk_frames: see `run_in_chunks`.
        Raises UserError if the clip is shorter than a frame or has the wrong number of channels.
        """
        frames = frames_of(audio.shape[-1], self.strides)
        if audio.shape[1] != self.audio_channels:
            raise UserError(f"audio has {audio.shape[1]} channel(s), this codec takes {self.audio_channels}")
        if frames < 1:
            raise UserError(f"audio has {audio.shape[-1]} samples, under one frame; pad it to {self.hop}")
        moments = run_in_chunks(self.encoder, audio, frames, chunk_frames, self.encode_margin, self.hop, 1)
        mean, scale = moments.transpose(1, 2).chunk(2, dim=-1)          # (B, L, C) each
        return mean, F.softplus(scale) + 1e-4

    def decode(self, latents, chunk_frames=None, frames=None):
        """Raw latents (B, L, C) -> audio (B, channels, L * hop); odd strides lose a few samples.

        frames: only the samples of so many first frames, the same as in the whole; no more is computed than they
        depend on, a chunk at a time.
        """
        source, length = latents.transpose(1, 2), latents.shape[1]      # (B, C, L)
        if frames is not None:
            length = min(frames + self.decode_margin, length)
            source = source[..., :length]
            chunk_frames = chunk_frames or math.ceil(length / math.ceil(length / CHUNK))
        audio = run_in_chunks(self.decoder, source, length, chunk_frames, self.decode_margin, 1, self.hop)
        return audio if frames is None else audio[..., :frames * self.hop]


def empty_oobleck(**config):
    """An Oobleck whose weights are memory and nothing else yet: they will be loaded."""
    with torch.device("meta"):
        codec = Oobleck(**config)
    codec = empty(codec)
    codec.latent_mean.zero_()
    codec.latent_std.fill_(1.0)
    return codec


# ----------------------------------------------------------------------------- losses

# FFT sizes of Stable Audio's autoencoder training; hop a quarter of each.
RESOLUTIONS = (2048, 1024, 512, 256, 128, 64, 32)


def kl(mean, std):
    """KL to N(0, 1) as in Stable Audio: sum over C, mean over B and L, no factor 0.5; (B, L, C) -> ()."""
    variance = std.square()
    return (mean.square() + variance - variance.log() - 1).sum(-1).mean()


def stft_magnitude(audio, n_fft):
    """Audio (B, N) -> |STFT| (B, n_fft/2 + 1, frames), Hann, hop n_fft/4, floor 1e-4 as in auraloss."""
    window = torch.hann_window(n_fft, device=audio.device)
    spectrum = torch.stft(audio, n_fft, n_fft // 4, window=window, return_complex=True)
    return (spectrum.real.square() + spectrum.imag.square()).clamp(min=1e-8).sqrt()


def multi_resolution_stft_loss(audio, reconstruction, resolutions=RESOLUTIONS):
    """Spectral convergence + L1 of the log magnitude, averaged over resolutions; both (B, channels, N) -> ().

    The formulation of auraloss (Steinmetz & Reiss 2020, after Yamamoto et al. 2020), with which Stable
    Audio trains, without its A-weighting filter: || |Y| - |X| ||_F / || |Y| ||_F per clip and mean |
    ln|Y| - ln|X| |, Y the audio. Stereo adds mid (L + R) and side (L - R), at equal weight with left and
    right. Resolutions longer than the clip are left out. The phase goes free here; the waveform term of
    `oobleck_losses` sees it.
    """
    if audio.shape[1] == 2:
        audio, reconstruction = with_mid_side(audio), with_mid_side(reconstruction)
    audio, reconstruction = audio.flatten(0, 1), reconstruction.flatten(0, 1)           # (B * channels, N)
    usable = [n_fft for n_fft in resolutions if n_fft <= audio.shape[-1]]
    if not usable:
        raise UserError(f"audio has {audio.shape[-1]} samples, less than any of {list(resolutions)}")
    total = 0
    for n_fft in usable:
        ours, target = stft_magnitude(reconstruction, n_fft), stft_magnitude(audio, n_fft)
        convergence = (target - ours).norm(dim=(1, 2)) / target.norm(dim=(1, 2))        # (B * channels,)
        total = total + convergence.mean() + (target.log() - ours.log()).abs().mean()
    return total / len(usable)


def with_mid_side(audio):
    """(B, 2, N) left, right -> (B, 4, N) left, right, mid, side."""
    left, right = audio.unbind(1)
    return torch.stack([left, right, left + right, left - right], dim=1)                # (B, 4, N)


def oobleck_losses(codec, audio, generator, resolutions=RESOLUTIONS):
    """The unweighted parts of the training loss for audio (B, channels, N): {"stft", "waveform", "kl"}.

    The latents are drawn from the posterior with `generator`, on the CPU: a seed means the same everywhere.
    Stable Audio adds adversarial and feature-matching terms, which are left out here.
    """
    mean, std = codec.encode(audio)
    noise = torch.randn(mean.shape, generator=generator).to(mean)                       # (B, L, C)
    reconstruction = codec.decode(mean + std * noise).float()       # the STFT knows no bfloat16 (autocast)
    audio = audio[..., :reconstruction.shape[-1]]       # the codec drops what does not fill a frame
    return {"stft": multi_resolution_stft_loss(audio, reconstruction, resolutions),
            "waveform": (audio - reconstruction).abs().mean(), "kl": kl(mean, std)}
