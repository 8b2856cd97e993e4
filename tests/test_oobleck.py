"""oobleck.py: the official numbers and names, exact chunks, losses, and that it learns."""
import json

import pytest
import torch
from conftest import PARITY, relative_error

import oobleck
from common import UserError
from oobleck import OOBLECK_DEFAULTS, Oobleck, kl, multi_resolution_stft_loss, oobleck_losses

SMALL = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4, 4], "channel_multiples": [1, 2, 2],
         "decoder_channels": 8, "decoder_input_channels": 4, "audio_channels": 2, "sampling_rate": 16000}


def small(seed=0, **changes):
    """A small codec whose snakes and biases are no longer at their initial values."""
    torch.manual_seed(seed)
    codec = Oobleck(**{**SMALL, **changes})
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith(("alpha", "beta", "bias")):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return codec


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- the original's numbers

def test_matches_the_original(parity):
    fixture = parity("oobleck_tiny")
    codec = Oobleck(**fixture.info["config"])
    codec.load_state_dict(fixture.weights)
    assert codec.hop == fixture.info["hop_length"]
    for case, facts in fixture.info["cases"].items():
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
        assert expected["audio"].shape[-1] == facts["audio_length"]
        frames = oobleck.frames_of(facts["audio_length"], codec.strides)
        assert mean.shape[1] == facts["latent_length"] == frames
        assert ours["decoded_mean"].shape[-1] == facts["decoded_length"]


def test_official_names_and_size(parity):
    parity("oobleck_tiny")      # skips without the fixtures
    official = json.loads((PARITY / "oobleck_keys.json").read_text())
    with torch.device("meta"):
        codec = Oobleck(**official["config"])
    assert official["config"] == OOBLECK_DEFAULTS and codec.hop == official["hop_length"]
    shapes = {name: list(tensor.shape) for name, tensor in codec.state_dict().items()}
    assert shapes == official["keys"] and len(shapes) == official["num_keys"]
    for part, count in official["params"].items():
        module = codec if part == "total" else getattr(codec, part)
        assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.filterwarnings("ignore::FutureWarning")       # diffusers uses torch's deprecated weight norm
@pytest.mark.parametrize("strides", [[2, 4, 4], [3, 2, 5]])
def test_equals_diffusers(strides):
    diffusers = pytest.importorskip("diffusers")
    codec = small(downsampling_ratios=strides).eval()
    peer = diffusers.AutoencoderOobleck(**codec.config).eval()
    peer.load_state_dict(codec.state_dict())
    audio = noise(2, 2, 611)
    with torch.no_grad():
        mean, std = codec.encode(audio)
        posterior = peer.encode(audio).latent_dist
        assert relative_error(mean.transpose(1, 2), posterior.mean) < 1e-5
        assert relative_error(std.transpose(1, 2), posterior.std) < 1e-5
        assert relative_error(codec.decode(mean), peer.decode(posterior.mean).sample) < 1e-5
        assert relative_error(kl(mean, std), posterior.kl()) < 1e-5


# ----------------------------------------------------------------------------- chunks, folding, shapes

@pytest.mark.parametrize("strides, tail", [([2, 4, 4], 0), ([2, 4, 4], 7), ([4, 2], 3),
                                           ([3, 5, 2], 0), ([5, 3], 7), ([2, 3, 1], 1)])
def test_chunks_equal_the_whole(strides, tail):
    codec = small(downsampling_ratios=strides, channel_multiples=[1] * len(strides)).eval()
    audio = noise(1, 2, 61 * codec.hop + tail)
    with torch.no_grad():
        mean, std = codec.encode(audio)
        whole = codec.decode(mean)
        for chunk in (7, 25, 60, 1000):
            chunked_mean, chunked_std = codec.encode(audio, chunk_frames=chunk)
            torch.testing.assert_close(chunked_mean, mean, atol=1e-5, rtol=0)
            torch.testing.assert_close(chunked_std, std, atol=1e-5, rtol=0)
            torch.testing.assert_close(codec.decode(mean, chunk_frames=chunk), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strides", [[2, 4, 4], [8, 4, 2], [3, 5, 2]])
def test_margins_are_exactly_the_reach(strides):
    """Gradients of one frame reach `margin` frames, none farther: neither short nor wasteful."""
    codec = small(downsampling_ratios=strides).double()
    frames, middle = 81, 40
    audio = noise(1, 2, frames * codec.hop).double().requires_grad_()
    codec.encode(audio)[0][0, middle].sum().backward()
    touched = audio.grad[0].abs().sum(0).nonzero().flatten() // codec.hop
    assert max(middle - touched.min(), touched.max() - middle) == codec.encode_margin
    latents = noise(1, frames, 4).double().requires_grad_()
    codec.decode(latents)[..., middle * codec.hop:(middle + 1) * codec.hop].sum().backward()
    touched = latents.grad[0].abs().sum(1).nonzero().flatten()
    assert max(middle - touched.min(), touched.max() - middle) == codec.decode_margin


def test_chunks_bound_the_memory():
    codec = small().eval()
    lengths = []
    codec.encoder.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[-1]))
    with torch.no_grad():
        codec.encode(noise(1, 2, 300 * codec.hop), chunk_frames=10)
    assert max(lengths) == (10 + 2 * codec.encode_margin) * codec.hop


def test_folding_changes_nothing_but_speed():
    codec, other, audio = small(0), small(1), noise(1, 2, 320)
    before = codec.state_dict().keys()
    with torch.no_grad():
        expected = codec.decode(codec.encode(audio)[0])
        codec.fold()
        torch.testing.assert_close(codec.decode(codec.encode(audio)[0]), expected)
        assert codec.state_dict().keys() == before
        codec.load_state_dict(other.state_dict())       # new weights: nothing stale may stay behind
        torch.testing.assert_close(codec.decode(codec.encode(audio)[0]), other.decode(other.encode(audio)[0]))
    assert all(parameter.grad is None for parameter in codec.parameters())
    oobleck_losses(codec.fold().train(), audio, torch.Generator(), (64,))["stft"].backward()
    assert codec.encoder.conv1.weight_v.grad is not None


@pytest.mark.parametrize("channels", [1, 2])
def test_shapes_and_normalisation(channels):
    codec = small(audio_channels=channels)
    mean, std = codec.encode(noise(3, channels, 10 * codec.hop + 5))
    assert mean.shape == std.shape == (3, 10, 4) and std.min() >= 1e-4
    assert codec.decode(mean).shape == (3, channels, 10 * codec.hop)
    torch.testing.assert_close(codec.denormalise(codec.normalise(mean)), mean)


def test_wrong_input_is_a_user_error():
    codec = small()
    for bad in (lambda: codec.encode(noise(1, 1, 320)), lambda: codec.encode(noise(1, 2, codec.hop - 1)),
                lambda: codec.encode(noise(1, 2, 3200), chunk_frames=0),
                lambda: small(channel_multiples=[1, 2]),
                lambda: multi_resolution_stft_loss(noise(1, 1, 16), noise(1, 1, 16))):
        with pytest.raises(UserError):
            bad()


# ----------------------------------------------------------------------------- losses and learning

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


def test_losses_survive_silence():
    codec, silence = small(), torch.zeros(1, 2, 640)
    sum(oobleck_losses(codec, silence, torch.Generator(), (64, 256)).values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in codec.parameters())


def test_every_parameter_gets_a_gradient():
    codec = small(0)
    parts = oobleck_losses(codec, noise(2, 2, 1603), torch.Generator().manual_seed(0), (64, 256))
    assert set(parts) == {"stft", "waveform", "kl"}
    sum(parts.values()).backward()
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_losses_depend_on_the_generator_alone():
    codec, audio = small(), noise(1, 2, 1600)
    first, second, other = (oobleck_losses(codec, audio, torch.Generator().manual_seed(seed), (64,))["stft"]
                            for seed in (3, 3, 4))
    assert first == second != other


def test_learns_one_clip():
    """Thirty steps on one half-second chord: the loss falls by more than a third."""
    torch.manual_seed(0)
    codec = Oobleck(**{**SMALL, "audio_channels": 1})
    time = torch.arange(8000) / 16000
    pitches = 2 * torch.pi * torch.tensor([220.0, 277.0, 330.0])
    clip = 0.2 * torch.sin(pitches[:, None] * time).sum(0)[None, None]         # (1, 1, N)
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    noise_generator = torch.Generator().manual_seed(0)
    history = []
    for _ in range(30):
        parts = oobleck_losses(codec, clip, noise_generator, (512, 128))
        loss = sum(oobleck.LOSS_WEIGHTS[name] * part for name, part in parts.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) / 5 < 0.65 * history[0], history
