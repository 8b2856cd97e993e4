"""The official layout in and out, a fake hub, and the official method on diffusers' blocks, number by number."""
import filecmp
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TINY_OFFICIAL, noise, relative_error
from safetensors.torch import save_file

import crpo
import sample
import train_fm
from bench.full_size import random_folder
from bench.official import Official
from lib.common import BASE, read_json, write_json, write_jsonl
from lib.fast import quicken
from lib.oobleck import Oobleck, kl
from lib.text import encode_prompts, make_text_encoder
from lib.weights import load_tensors, save_tensors
from model import PRESETS, TangoFlux, load_model, save_model
from sample import Sampling, official_noise, sample_latents

PROMPTS = ["rain", "Hammer slowly hitting the wooden table", "a dog barks far away and rain falls on a tin roof"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder in the official layout: of what only we write into config.json, the codec's size alone."""
    folder = random_folder(tmp_path_factory.mktemp("official") / "model", **TINY_OFFICIAL)
    config = {**read_json(folder / "config.json"), "text_encoder_name": "google/flan-t5-large"}
    del config["references"]
    write_json(folder / "config.json", config)
    tokenizer = folder / "text_encoder" / "tokenizer_config.json"
    write_json(tokenizer, {**read_json(tokenizer), "model_max_length": 512})
    return folder


def same_bytes(folder, other, name):
    return filecmp.cmp(folder / name, other / name, shallow=False)


def test_saving_gives_back_every_byte(folder, tmp_path):
    model = load_model(folder)
    save_model(tmp_path, model.flow, model.codec, model.text)
    for name in ("tangoflux.safetensors", "vae.safetensors", "text_encoder/model.safetensors",
                 "text_encoder/tokenizer.json"):
        assert same_bytes(folder, tmp_path, name), name
    before, after = read_json(folder / "config.json"), read_json(tmp_path / "config.json")
    assert {name: after[name] for name in before} == before
    assert model.text.max_tokens == load_model(tmp_path, parts=("text",)).text.max_tokens == 512


@pytest.fixture(scope="module")
def hub(folder, tmp_path_factory):
    """A hub cache as huggingface_hub lays it out: TangoFlux with its T5 elsewhere, a whole T5, and both CLAPs."""
    from world.train_clap import new_clap
    cache = tmp_path_factory.mktemp("hub")

    def repository(name):
        place = cache / f"models--{name.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("0123abcd")
        (place / "snapshots" / "0123abcd").mkdir(parents=True)
        return place / "snapshots" / "0123abcd"
    place = repository("declare-lab/TangoFlux")
    for name in ("config.json", "tangoflux.safetensors", "vae.safetensors"):
        shutil.copy(folder / name, place / name)
    place = repository("google/flan-t5-large")
    shutil.copytree(folder / "text_encoder", place, dirs_exist_ok=True)
    decoder = {"lm_head.weight": torch.ones(3), "decoder.block.0.layer.0.x": torch.ones(2)}
    save_tensors(place / "model.safetensors", {**load_tensors(place / "model.safetensors"), **decoder})
    config = place / "config.json"
    write_json(config, read_json(config) | {"architectures": ["T5ForConditionalGeneration"]})
    for seed, name in enumerate(("laion/clap-htsat-unfused", "laion/clap-htsat-fused")):
        new_clap(16, 16, seed).save(repository(name))
    return cache


@pytest.fixture
def offline(hub, monkeypatch):
    """This process as a machine without network that has the hub's files."""
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def loads_and_samples(place, tmp_path):
    """The model of a folder, whose flow was trained, after sampling from it."""
    sample.main(["--checkpoint", str(place), "--prompt", "rain", "--duration", "0.5", "--steps", "2", "--output",
                 str(tmp_path / "again.wav"), "--device", "cpu"])
    model, official = load_model(place), load_model("declare-lab/TangoFlux")
    assert not torch.equal(model.flow.fc[0].weight, official.flow.fc[0].weight)
    return model, official


def test_sampling_from_the_hub(hub, tmp_path):
    def run(cache, wanted, *flags):
        return subprocess.run(
            [sys.executable, "sample.py", "--checkpoint", wanted, "--steps", "2", *flags], cwd=ROOT, text=True,
            capture_output=True, env={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": ""})
    done = run(hub, "declare-lab/TangoFlux", "--prompt", PROMPTS[1], "--duration", "0.5", "--profile", "official",
               "--output", str(tmp_path / "a.wav"), "--device", "cpu")
    assert done.returncode == 0 and (tmp_path / "a.wav").is_file(), done.stderr
    assert "dtype: float32 (as asked)" in done.stdout
    for wanted, cache in (("declare-lab/NoSuchThing", hub), ("declare-lab/TangoFlux", tmp_path / "empty")):
        done = run(cache, wanted)
        error, = done.stderr.strip().splitlines()
        assert done.returncode == 2 and "could not be fetched from the hub" in error
        assert "pass the path of a downloaded folder" in error


def test_training_from_the_hub_writes_a_folder_that_loads(offline, tmp_path, monkeypatch):
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(1400) / (6 + i)) * 0.5, 1536)
    write_jsonl(tmp_path / "m.jsonl", [{"audio": f"{i}.wav", "caption": PROMPTS[i % 3]} for i in range(6)])
    monkeypatch.setattr(sys, "argv", [
        "train_fm.py", "--checkpoint", "declare-lab/TangoFlux", "--data", str(tmp_path / "m.jsonl"), "--cache",
        str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--steps", "2", "--batch_size", "2", "--workers", "0",
        "--val_clips", "1", "--device", "cpu", "--dtype", "float32"])
    train_fm.main()
    model, official = loads_and_samples(tmp_path / "run", tmp_path)
    assert torch.equal(model.text.t5.shared.weight, official.text.t5.shared.weight)
    assert same_bytes(tmp_path / "run", official.folder, "vae.safetensors")


def test_crpo_from_the_hub_writes_a_folder_that_loads(offline, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    crpo.main(["--checkpoint", "declare-lab/TangoFlux", "--reward", "laion/clap-htsat-unfused", "--judge",
               "laion/clap-htsat-fused", "--prompt_file", str(tmp_path / "prompts.txt"), "--prompts", "3",
               "--iterations", "1", "--num_samples", "2", "--evaluate", "2", "--batch_size", "2", "--epochs", "1",
               "--steps", "2", "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "float32"])
    loads_and_samples(tmp_path / "run" / "iteration_1", tmp_path)


def test_guidance_follows_the_codec(folder, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "sample_latents", lambda *given, **more: (
        seen.append(more["sampling"].guidance_scale) or sample_latents(*given, **more)))
    for place, flags in ((folder, ()), (BASE, ()), (folder, ("--guidance_scale", "2")),
                         (BASE, ("--profile", "tangoflux"))):
        sample.main(["--checkpoint", str(place), "--prompt", "rain", "--duration", "0.5", "--steps", "1", "--output",
                     str(tmp_path / "a.wav"), *flags])
    assert seen == [4.5, 3.0, 2.0, 4.5]


# ----------------------------------------------------------------------------- against diffusers

@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A model of middle size with random weights: width 256 in 4 heads, 2 + 4 blocks."""
    folder, config = tmp_path_factory.mktemp("middle"), dict(
        PRESETS["tangoflux"], num_layers=2, num_single_layers=4, in_channels=16, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=96, audio_seq_len=60, max_duration=2.0, axes_dims_rope=[16, 24, 24])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = TangoFlux(config)
        for parameter in flow.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, 0, 0.02)
        codec = Oobleck(encoder_hidden_size=32, downsampling_ratios=[2, 4, 4], channel_multiples=[1, 2, 4],
                        decoder_channels=32, decoder_input_channels=16, sampling_rate=960)
    save_model(folder, flow, codec, make_text_encoder(" ".join(PROMPTS).split(), 96, 2, 4, 128))
    return folder


def same_codec(codec, peer, audio):
    """The codec gives the numbers of diffusers' AutoencoderOobleck."""
    with torch.no_grad():
        mean, std = codec.encode(audio)
        posterior = peer.encode(audio).latent_dist
        pairs = ((mean.mT, posterior.mean), (std.mT, posterior.std), (kl(mean, std), posterior.kl()),
                 (codec.decode(mean), peer.decode(posterior.mean).sample))
        assert all(relative_error(ours, theirs) < 1e-5 for ours, theirs in pairs)


def diffusers_velocity(transformer, latents, t, text, pooled):
    """What a FluxTransformer2DModel of diffusers gives, fed as the official code does."""
    return transformer(latents, text, pooled, t, return_dict=False, txt_ids=torch.zeros(text.shape[1], 3),
                       img_ids=torch.arange(float(latents.shape[1]))[:, None].expand(-1, 3))[0]


def read_and_written_by_diffusers(folder, again):
    """The official networks of our folder; what they write to the folder `again` has the same bytes."""
    peer = Official(folder)
    for name, network in (("tangoflux", peer.model), ("vae", peer.vae)):
        save_file(network.state_dict(), again / f"{name}.safetensors")
        assert same_bytes(folder, again, f"{name}.safetensors")
    return peer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_transformer_codec_and_trajectory_equal_diffusers(middle, tmp_path):
    pytest.importorskip("diffusers")
    peer, model, seconds = read_and_written_by_diffusers(middle, tmp_path), load_model(middle), [0.5, 1.0, 1.7]
    latents, t = noise(3, 60, 16), torch.tensor([0.1, 0.5, 1.0])
    condition = encode_prompts(model.text, PROMPTS, torch.tensor(seconds))
    packed = quicken(load_model(middle, parts=("flow",)).flow, 150)
    ours = [flow.velocity(latents, t, condition) for flow in (model.flow, packed)]
    for row, prompt in enumerate(PROMPTS):                               # a row alone: no padding there
        states, mask = peer.encode([prompt])
        text = torch.cat([states, peer.model.duration_emebdder(condition.duration[row:row + 1])], dim=1)
        theirs = diffusers_velocity(peer.model.transformer, latents[row:row + 1], t[row:row + 1], text,
                                    peer.pooled(states, mask))
        assert all(relative_error(velocity[row:row + 1], theirs) < 1e-5 for velocity in ours)
    same_codec(model.codec, peer.vae, noise(3, 2, 60 * 32 + 5))
    start = official_noise(5, [1] * 3, (60, 16))
    for steps, scale in ((10, 4.5), (4, 2.0)):
        ours = sample_latents(model, PROMPTS, seconds, sampling=Sampling(steps, scale), noise=start)
        theirs = torch.cat([peer.inference_flow(prompt, duration, steps, scale, seed=5)
                            for prompt, duration in zip(PROMPTS, seconds)])
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_command_line_gives_the_official_audio_of_diffusers(folder, tmp_path):
    pytest.importorskip("diffusers")
    sample.main(["--checkpoint", str(folder), "--prompt", PROMPTS[1], "--duration", "0.7", "--profile", "official",
                 "--seed", "4", "--output", str(tmp_path / "a.wav"), "--device", "cpu"])
    ours, rate = soundfile.read(tmp_path / "a.wav", always_2d=True)
    theirs = Official(folder).generate(PROMPTS[1], 0.7, seed=4).T.numpy()
    assert rate == 768 and ours.shape == theirs.shape == (537, 2)
    assert np.abs(ours - theirs.clip(-1, 1)).max() < 2 ** -15 + 1e-4 * np.abs(theirs).max()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@torch.no_grad()
def test_full_size_goes_both_ways_to_diffusers(tmp_path, request):
    """518 M + 156 M parameters: equal outputs, and what diffusers' classes write has the bytes that we write."""
    if request.config.getoption("markexpr") != "original":
        pytest.skip("two minutes: python -m pytest -m original runs it")
    pytest.importorskip("diffusers")
    folder, latents = random_folder(tmp_path / "model"), noise(1, 24, 64, seed=1)
    given = latents, torch.tensor([0.7]), noise(1, 5, 1024, seed=2), torch.ones(1, 1024)
    model = load_model(folder, parts=("flow", "codec"))
    velocity, audio = model.flow.transformer(*given), model.codec.decode(latents[:, :6])
    del model                                                            # 2.7 GB
    peer = read_and_written_by_diffusers(folder, tmp_path)
    assert relative_error(velocity, diffusers_velocity(peer.model.transformer, *given)) < 1e-5
    assert relative_error(audio, peer.vae.decode(latents[:, :6].transpose(1, 2)).sample) < 1e-5
