"""lib/oobleck.py: the official numbers and names, exact chunks, losses."""
import pytest
import torch
from conftest import assert_layout, noise, relative_error

from lib import oobleck
from lib.common import UserError
from lib.oobleck import OOBLECK_DEFAULTS, Oobleck, kl, multi_resolution_stft_loss

SMALL = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4, 4], "channel_multiples": [1, 2, 2],
         "decoder_channels": 8, "decoder_input_channels": 4, "audio_channels": 2, "sampling_rate": 16000}


def same_codec(codec, peer, audio):
    """The codec gives the numbers of diffusers' AutoencoderOobleck."""
    with torch.no_grad():
        mean, std = codec.encode(audio)
        posterior = peer.encode(audio).latent_dist
        pairs = ((mean.transpose(1, 2), posterior.mean), (std.transpose(1, 2), posterior.std),
                 (codec.decode(mean), peer.decode(posterior.mean).sample), (kl(mean, std), posterior.kl()))
        assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in pairs)


def small(seed=0, **changes):
    """A small codec whose snakes and biases are no longer at their initial values."""
    torch.manual_seed(seed)
    codec = Oobleck(**{**SMALL, **changes})
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith(("alpha", "beta", "bias")):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return codec


def test_matches_the_original(parity):
    fixture = parity("oobleck_tiny")
    codec = Oobleck(**fixture.info["config"])
    codec.load_state_dict(fixture.weights)
    assert codec.hop == fixture.info["hop_length"]
    for case in fixture.info["cases"]:
        expected = {name.split(".", 1)[1]: tensor for name, tensor in fixture.tensors.items()
                    if name.startswith(f"{case}.")}
        with torch.no_grad():
            moments = codec.encoder(expected["audio"])
            mean, std = codec.encode(expected["audio"])
            sample = mean + std * expected["noise"].transpose(1, 2)
            ours = {"moments": moments, "mean": mean.transpose(1, 2), "std": std.transpose(1, 2),
                    "sample": sample.transpose(1, 2), "kl": kl(mean, std),
                    "decoded_mean": codec.decode(mean), "decoded_sample": codec.decode(sample)}
        assert ours.keys() | {"audio", "noise"} == expected.keys()
        for name, value in ours.items():
            assert value.shape == expected[name].shape, (case, name)
            assert relative_error(value, expected[name]) < 1e-4, (case, name)


def test_official_names_and_size(parity):
    official = parity("oobleck_keys").info
    with torch.device("meta"):
        codec = Oobleck(**official["config"])
    assert official["config"] == OOBLECK_DEFAULTS and codec.hop == official["hop_length"]
    assert_layout(codec, official)


@pytest.mark.filterwarnings("ignore::FutureWarning")       # diffusers uses torch's deprecated weight norm
@pytest.mark.parametrize("strides", [[2, 4, 4], [3, 2, 5]])
def test_equals_diffusers(strides):
    diffusers = pytest.importorskip("diffusers")
    codec = small(downsampling_ratios=strides).eval()
    peer = diffusers.AutoencoderOobleck(**codec.config).eval()
    peer.load_state_dict(codec.state_dict())
    same_codec(codec, peer, noise(2, 2, 611))


@pytest.mark.parametrize("strides", [[2, 4, 4], [4, 2], [3, 5, 2], [5, 3], [2, 3, 1]])
def test_chunks_equal_the_whole(strides, monkeypatch):
    codec = small(downsampling_ratios=strides, channel_multiples=[1] * len(strides)).eval()
    lengths = []
    codec.decoder.register_forward_hook(lambda _, inputs, __: lengths.append(inputs[0].shape[-1]))
    latents = noise(1, 61, 4)
    with torch.no_grad():
        whole = codec.decode(latents)
        for chunk, frames in ((7, 61), (25, 60), (60, 61), (7, 20), (1000, 33), (7, 1)):
            monkeypatch.setattr(oobleck, "CHUNK", chunk)
            lengths.clear()
            part = codec.decode(latents, frames=frames)
            torch.testing.assert_close(part, whole[..., :frames * codec.hop], atol=1e-5, rtol=0)
            assert max(lengths) <= chunk + 2 * codec.decode_margin


@pytest.mark.parametrize("strides", [[2, 4, 4], [8, 4, 2], [3, 5, 2]])
def test_the_margin_is_exactly_the_reach(strides):
    """Gradients of one frame reach `margin` frames, none farther: neither short nor wasteful."""
    codec = small(downsampling_ratios=strides).double()
    frames, middle = 81, 40
    latents = noise(1, frames, 4).double().requires_grad_()
    codec.decode(latents)[..., middle * codec.hop:(middle + 1) * codec.hop].sum().backward()
    touched = latents.grad[0].abs().sum(1).nonzero().flatten()
    assert max(middle - touched.min(), touched.max() - middle) == codec.decode_margin


@pytest.mark.parametrize("channels", [1, 2])
def test_shapes_and_normalisation(channels):
    codec = small(audio_channels=channels)
    mean, std = codec.encode(noise(3, channels, 10 * codec.hop + 5))
    assert mean.shape == std.shape == (3, 10, 4) and std.min() >= 1e-4
    assert codec.decode(mean).shape == (3, channels, 10 * codec.hop)
    torch.testing.assert_close(codec.denormalise(codec.normalise(mean)), mean)
    assert torch.equal(codec.latent_mean, torch.zeros(4)) and torch.equal(codec.latent_std, torch.ones(4))
    assert codec.example(noise(channels, 10 * codec.hop + 5)).shape == (channels, 11 * codec.hop)
    error = codec.error_db(noise(3, channels, 12000))
    assert error.shape == (3,) and error.isfinite().all() and (error > 0).all()
    with pytest.raises(UserError, match="under one frame"):
        codec.encode(noise(1, channels, codec.hop - 1))
    with pytest.raises(ValueError, match="equally long"):
        small(channel_multiples=[1, 2])


def test_stft_loss_by_hand():
    audio = 0.1 * noise(2, 2, 4096)
    assert multi_resolution_stft_loss(audio, audio) < 1e-6
    assert multi_resolution_stft_loss(audio, -audio) < 1e-6         # phase is free
    # Half as loud: convergence 0.5 and log magnitude ln 2 at each resolution (nothing comes near the floor).
    louder = 1000 * audio
    expected = torch.tensor(0.5 + 0.6931)
    torch.testing.assert_close(multi_resolution_stft_loss(louder, louder / 2), expected, atol=2e-3, rtol=0)
    # Only stereo sees the side: swapping the polarity of one channel changes mid and side alone.
    flipped = audio * torch.tensor([1.0, -1.0])[:, None]
    assert multi_resolution_stft_loss(audio, flipped) > 0.1
    assert multi_resolution_stft_loss(audio[:, :1], audio[:, :1], (64, 100000)) < 1e-6


def test_every_parameter_gets_a_gradient():
    codec = small(0)
    parts = codec.losses(noise(2, 2, 1603), torch.Generator().manual_seed(0), (64, 256))
    assert set(parts) == {"stft", "waveform", "kl"}
    sum(parts.values()).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
