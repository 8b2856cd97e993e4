"""lib/oobleck.py: the official numbers and names, exact chunks, losses, learning."""
import pytest
import torch
from conftest import assert_layout, noise, relative_error

from lib import oobleck
from lib.common import generator
from lib.oobleck import OOBLECK_DEFAULTS, Oobleck, kl, multi_resolution_stft_loss

pytestmark = pytest.mark.usefixtures("one_thread")
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


def test_matches_the_original(parity):
    fixture = parity("oobleck_tiny")
    codec = Oobleck(**fixture.info["config"])
    codec.load_state_dict(fixture.weights)
    assert codec.hop == fixture.info["hop_length"]
    for case in fixture.info["cases"]:
        expected = {name.split(".", 1)[1]: tensor for name, tensor in fixture.tensors.items()
                    if name.startswith(f"{case}.")}
        with torch.no_grad():
            mean, std = codec.encode(expected["audio"])
            sample = mean + std * expected["noise"].mT
            ours = {"moments": codec.encoder(expected["audio"]), "mean": mean.mT, "std": std.mT, "sample": sample.mT,
                    "kl": kl(mean, std), "decoded_mean": codec.decode(mean), "decoded_sample": codec.decode(sample)}
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


def test_shapes_and_a_config_that_no_codec_has():
    codec = small()
    audio = noise(3, 2, 10 * codec.hop + 5)
    mean, std = codec.encode(audio)
    assert mean.shape == std.shape == (3, 10, 4) and std.min() >= 1e-4
    assert codec.example(audio[0]).shape == (2, 11 * codec.hop)
    with pytest.raises(ValueError):
        small(channel_multiples=[1, 2])


def test_stft_loss_by_hand():
    audio = 0.1 * noise(2, 2, 4096)
    assert multi_resolution_stft_loss(audio, audio) < 1e-6
    assert multi_resolution_stft_loss(audio, -audio) < 1e-6         # phase is free
    louder = 1000 * audio                                           # half of it: convergence 0.5, log magnitude ln 2
    assert multi_resolution_stft_loss(louder, louder / 2).item() == pytest.approx(0.5 + 0.6931, abs=2e-3)
    flipped = audio * torch.tensor([1.0, -1.0])[:, None]            # changes mid and side alone
    assert multi_resolution_stft_loss(audio, flipped) > 0.1
    short = audio[:, :1, :100]                                      # under most of the resolutions
    assert multi_resolution_stft_loss(short, short) < 1e-6 < multi_resolution_stft_loss(short, 2 * short)


def test_oobleck_learns_a_sound():
    torch.manual_seed(0)
    codec = Oobleck(**{**SMALL, "downsampling_ratios": [4, 4, 4], "channel_multiples": [1, 2, 4],
                       "decoder_input_channels": 8, "audio_channels": 1})
    chord = sum(torch.sin(torch.arange(2048) * pitch) for pitch in (0.16, 0.2, 0.24))[None, None] / 5
    optimizer = torch.optim.AdamW(codec.parameters(), 1e-2, (0.8, 0.99))
    before = codec.error_db(chord)
    for step in range(60):
        parts = codec.losses(chord, generator(step))
        optimizer.zero_grad()
        (parts["stft"] + parts["waveform"] + 1e-4 * parts["kl"]).backward()
        optimizer.step()
    assert codec.error_db(chord) < 0.5 * before
    for name, parameter in codec.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
