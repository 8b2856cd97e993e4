"""lib/mel.py: front ends, mel VAE and Griffin-Lim against the originals, and what the codec learns."""
import math

import numpy as np
import pytest
import torch

from conftest import TINY_MEL, noise, refused, relative_error
from lib.audio import ClapMel
from lib.common import generator
from lib.mel import MEL_16K, MEL_44K, LogMel, MelVAE, griffin_lim, log_mel_error
from vae import make_codec

OURS = {"16k": MEL_16K, "44k": MEL_44K}


def tone(frequency, samples=16384, rate=16000, level=0.3):
    return level * torch.sin(2 * math.pi * frequency * torch.arange(samples) / rate)[None]  # (1, samples)


def test_log_mel_matches_the_original(parity):
    fixture = parity("mel_converter")
    assert fixture.info["parameters"] == OURS
    for name in fixture.info["cases"]:
        tensors = fixture.load(f"mel_converter_{name}")
        mel = LogMel(**fixture.info["parameters"][name])
        assert relative_error(mel(tensors["audio"]), tensors["mel"]) < 1e-4
        assert relative_error(mel.filters.sum(0), tensors["mel_basis_sum_over_bins"]) < 1e-5
        assert relative_error(mel.filters.sum(1), tensors["mel_basis_sum_over_mels"]) < 1e-5


def test_log_mel_error_is_in_decibel_and_leaves_out_what_cannot_be_heard():
    reference = torch.zeros(1, 80, 4)
    reference[..., 3] = -4.0                                     # 80 dB below the peak
    other = reference + 0.1
    other[..., 3] += 7
    assert log_mel_error(reference, other).item() == pytest.approx(2.0, rel=1e-5)
    natural = math.log(10)
    assert log_mel_error(reference * natural, other * natural, natural=True).item() == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_a_tone_keeps_its_frequency_and_level(name):
    mel = LogMel(**OURS[name])
    audio = tone(1000, 32 * mel.hop, OURS[name]["sampling_rate"])
    ours = griffin_lim(mel(audio), mel)
    assert ours.shape == audio.shape
    peak = torch.fft.rfft(ours[0]).abs().argmax() * OURS[name]["sampling_rate"] / ours.shape[-1]
    assert abs(peak.item() - 1000) < 40                          # within a mel band
    assert 20 * abs(math.log10(ours.std() / audio.std())) < 2    # dB


def test_silence_stays_silent_and_a_spectrogram_sounds_the_same_alone_and_in_a_batch():
    mel = LogMel(**MEL_16K)
    ended = torch.cat([tone(500, 8192), torch.zeros(1, 8192)], dim=1)
    log_mel = mel(torch.cat([ended, tone(900), torch.zeros(1, 16384)]))
    before = torch.get_rng_state()
    together = griffin_lim(log_mel, mel)
    assert torch.equal(before, torch.get_rng_state())            # the global generator is left alone
    assert torch.equal(together, griffin_lim(log_mel, mel))
    assert relative_error(griffin_lim(log_mel[1:2], mel), together[1:2]) < 1e-5
    assert together[2].abs().max() == 0 and together[0, 12288:].abs().max() < 1e-4


def test_tiny_mel_vae_matches_the_original(parity):
    fixture = parity("melvae_tiny")
    expected = fixture.tensors
    codec = MelVAE(**fixture.info["config"])
    assert codec.load_state_dict(fixture.weights, strict=False).missing_keys == ["latent_mean", "latent_std"]
    with torch.no_grad():
        mean, std = codec.encode_mel(expected["mel"])                               # (B, L, C)
        made = {"mean": mean.mT, "std": std.mT, "decoded_mean": codec.decode_mel(mean),
                "decoded_sample": codec.decode_mel(expected["sample"].mT)}
        for name, tensor in made.items():
            assert relative_error(tensor, expected[name]) < 1e-4, name
        kl = codec.losses(expected["mel"], generator(0))["kl"]
        assert kl.item() == pytest.approx(expected["kl_elementwise"].mean().item(), rel=1e-4)


def test_full_size_names_shapes_and_parameter_totals(parity):
    info = parity("melvae_bigvgan_keys").info
    for full in (info["vae_16k"], info["vae_44k"]):
        with torch.device("meta"):
            codec = MelVAE(**{key: full[key] for key in ("data_dim", "embed_dim", "hidden_dim", "mel")})
        shapes = {key: list(tensor.shape) for key, tensor in codec.state_dict().items() if key[:7] != "latent_"}
        assert shapes == full["keys"] and len(shapes) == full["num_keys"]
        assert sum(p.numel() for p in codec.parameters()) == full["params_total"]


def test_latents_of_any_length_and_configs_that_no_codec_has():
    torch.manual_seed(0)
    codec = MelVAE(**{**TINY_MEL, "attn_layers": [1]})
    names = codec.state_dict().keys()                           # attention in levels: as in the first edition
    assert {"encoder.down.1.attn.0.qkv.weight", "decoder.up.1.attn.1.proj_out.weight"} <= names
    assert (codec.hop, codec.sampling_rate, codec.latent_channels, codec.audio_channels) == (1024, 16000, 4, 1)
    with torch.no_grad():
        mean, std = codec.encode(torch.zeros(2, 1, 3000))                           # the last frame is filled up
        assert mean.shape == std.shape == (2, 3, 4) and (std > 0).all()
        assert codec.decode_mel(mean).shape == (2, 80, 12) and codec.decode(mean).shape == (2, 1, 3072)
    for changes in ({"linear_skip": True}, {"colour": 1}):
        with pytest.raises((TypeError, ValueError)):
            MelVAE(**TINY_MEL, **changes)


def test_the_mel_codec_learns_a_handful_of_clips(one_thread):
    torch.manual_seed(0)
    codec = MelVAE(**{**TINY_MEL, "ch_mult": [1, 2, 2], "hidden_dim": 24, "embed_dim": 16})
    log_mel = codec.mel(torch.stack([tone_clip(i) for i in range(4)]))              # (4, M, F)
    codec.start(log_mel)
    optimizer = torch.optim.AdamW(codec.parameters(), 2e-2)
    losses = []
    for step in range(80):
        parts = codec.losses(log_mel, generator(step))
        optimizer.zero_grad()
        (parts["mel"] + 1e-3 * parts["kl"]).backward()
        optimizer.step()
        losses.append(parts["mel"].item())
    assert losses[-1] < 0.4 * losses[0]
    codec.finish(log_mel)
    with torch.no_grad():
        latents = codec.normalise(codec.encode_mel(log_mel)[0])
        assert latents.mean().abs() < 1e-3 and 0.5 < latents.std() < 1.05       # posterior noise is the rest
        assert codec.error_db(log_mel).mean() < 8


def tone_clip(index, samples=16384):
    time = torch.arange(samples) / 16000
    return 0.3 * torch.sin(2 * torch.pi * 300 * (index + 1) * time) * torch.exp(-5 * (time % 0.25))


def test_linear_skip_starts_as_principal_components():
    torch.manual_seed(0)
    columns = torch.randn(40, 16, 6) @ torch.randn(6, 80 * 4)                        # rank 6: six channels hold it
    mels = columns.unflatten(-1, (80, 4)).permute(0, 2, 1, 3).flatten(2)             # (N, M, F)
    errors = []
    for channels in (7, 3):                                                          # one more for the mean
        codec = MelVAE(data_dim=80, embed_dim=channels, hidden_dim=8, ch_mult=[1], num_res_blocks=1, down_layers=[],
                       patch=4, linear_skip=True).eval()
        codec.start(mels)
        mean, std = codec.encode_mel(mels)
        assert mean.shape == std.shape == (40, 16, channels)
        assert torch.allclose(mean.square().mean((0, 1)), torch.ones(channels), atol=0.1)    # whitened
        errors.append((codec.decode_mel(mean) - mels).abs().max())
    assert errors[0] < 1e-2 < errors[1]


CLAP = dict(feature_size=64, sampling_rate=48000, hop_length=480, fft_window_size=1024, frequency_min=50,
            frequency_max=14000, padding="repeatpad")


@pytest.mark.parametrize("name", ["short", "exact"])
def test_log_mel_matches_both_original_pipelines(parity, name):
    fixture = parity("clap")
    tensors, length = fixture.load("clap_tiny_tensors"), fixture.info["frontend_max_length_used_here"]
    for reference, truncation in (("laion_unfused_logmel_no_quantisation", "rand_trunc"),
                                  ("transformers_fusion_first_of_4", "fusion")):
        mel, longer = ClapMel(**CLAP, max_length_s=length / 48000, truncation=truncation)(
            [tensors[f"frontend.{name}.audio"]])
        assert not longer.any()
        assert (mel[0, 0] - tensors[f"frontend.{name}.{reference}"]).abs().max() < 1e-3, reference      # dB


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("padding", ["repeatpad", "pad"])
def test_front_end_equals_the_feature_extractor_at_every_length(truncation, padding, monkeypatch):
    from transformers import ClapFeatureExtractor
    settings = {**CLAP, "max_length_s": 1, "truncation": truncation, "padding": padding}
    extractor, front = ClapFeatureExtractor(**settings), ClapMel(**settings)
    for samples in (700, 20000, 24000, 48000, 48100, 100000):
        audio = 0.3 * noise(samples)
        np.random.seed(samples)                           # transformers draws its crops from the global state
        theirs = extractor([audio.numpy()], sampling_rate=48000, return_tensors="pt")["input_features"]
        random = np.random.RandomState(samples)
        monkeypatch.setattr(front, "starts", lambda count: [random.choice(third if len(third) else [0])
                                                            for third in np.array_split(np.arange(count), 3)])
        if truncation == "rand_trunc" and samples > 48000:
            audio = audio[random.randint(0, samples - 48000 + 1):][:48000]
        ours, longer = front([audio])
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1e-3, samples
        # 48100 has as many frames as 48000: not longer. Of clips that aren't, transformers marks a random one
        assert longer[0, 0] == (samples > 48480 and truncation == "fusion")
    monkeypatch.undo()
    ramp = torch.arange(100000) / 1e5
    middle, longer = front([ramp, ramp[:700]])
    assert torch.equal(middle[:1], front([ramp])[0]) and longer[:, 0].tolist() == [True, False]     # nothing random
    refused("'repeat' is unknown", ClapMel, padding="repeat")


def test_decoded_bands_stay_within_full_scale():
    """A sine at full scale reaches its band's bound; latents that ask for more do not pass it."""
    for settings in (MEL_16K, MEL_44K):
        log_mel = LogMel(**settings)
        rate = settings["sampling_rate"]
        sine = tone(1000, 64 * settings["hop_size"], rate, 1.0)
        over = (log_mel(sine) - log_mel.full_scale()).amax(dim=(1, 2)).item()
        assert -0.3 < over < 0.02
    codec = MelVAE(**TINY_MEL)
    codec.decode_mel = lambda latents: torch.full((1, 80, 8), 3.0)
    loud = codec.decode(torch.zeros(1, 2, TINY_MEL.get("latent_channels", 4)))
    bound = griffin_lim(codec.mel.full_scale().expand(1, 80, 8), codec.mel)
    assert torch.allclose(loud[0], bound, atol=1e-2)


@pytest.mark.parametrize("odd", [{"hop_size": 0}, {"hop_size": -256}, {"hop_size": 300}, {"win_size": 0}, {"sampling_rate": 0},
                                 {"n_fft": 1 << 20, "win_size": 1 << 20}, {"hop_size": "256"}, {"hop_size": True}])
def test_a_mel_that_cannot_be_is_one_line(odd):
    refused("must describe a codec", make_codec, "mel", {"mel": {**MEL_16K, **odd}})
