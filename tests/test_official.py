"""The official layout in and out, a fake hub, and the official method on diffusers' blocks, number by number."""
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, relative_error

import crpo
import race
import sample
import solvers
import train_fm
from common import UserError, load_tensors, read_json, save_tensors, write_json
from model import PRESETS, TangoFlux, load_model, save_model
from oobleck import OOBLECK_DEFAULTS, Oobleck
from text import MAX_TOKENS, make_text_encoder
from weights import find_weights

PROMPTS = ["rain", "Hammer slowly hitting the wooden table", "a dog barks far away and rain falls on a tin roof"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder in the official layout: of what only we write into config.json, the codec's size alone."""
    folder = race.random_folder(tmp_path_factory.mktemp("official") / "model", "tiny")
    config = {name: value for name, value in read_json(folder / "config.json").items() if name != "references"}
    write_json(folder / "config.json", {**config, "text_encoder_name": "google/flan-t5-large"})
    tokenizer = folder / "text_encoder" / "tokenizer_config.json"
    write_json(tokenizer, {**read_json(tokenizer), "model_max_length": 512})
    return folder


def same_file(one, other):
    return one.read_bytes() == other.read_bytes()


# ----------------------------------------------------------------------------- layout

def test_saving_gives_back_every_byte(folder, tmp_path):
    model = load_model(folder)
    save_model(tmp_path, model.flow, model.codec, model.text)
    for name in ("tangoflux.safetensors", "vae.safetensors", "text_encoder/model.safetensors",
                 "text_encoder/tokenizer.json"):
        assert same_file(folder / name, tmp_path / name), name
    before, after = read_json(folder / "config.json"), read_json(tmp_path / "config.json")
    assert {name: after[name] for name in before} == before
    assert model.text.max_tokens == load_model(tmp_path, parts=("text",)).text.max_tokens == 512


def test_a_text_encoder_says_how_long_a_prompt_may_be(folder, capsys):
    text = load_model(folder, parts=("text",)).text
    assert text.tokenize(["rain " * 200])[0].shape[1] == 201 and not capsys.readouterr().err
    assert text.tokenize(["rain " * 200], max_length=MAX_TOKENS)[0].shape[1] == MAX_TOKENS     # as in training
    assert load_model(sample.BASE, parts=("text",)).text.max_tokens == MAX_TOKENS


def test_diffusers_own_layout_of_the_codec_is_read(folder, tmp_path):
    """Stable Audio Open: vae/config.json and vae/diffusion_pytorch_model.safetensors."""
    from vae import load_codec
    (tmp_path / "vae").mkdir()
    config = read_json(folder / "config.json")["vae"]
    write_json(tmp_path / "vae" / "config.json", {"_class_name": "AutoencoderOobleck", "_diffusers_version": "0.30.0",
                                                  **{name: config[name] for name in config if name != "codec"}})
    shutil.copy(folder / "vae.safetensors", tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    latents = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    ours = load_codec(folder)
    for place in (tmp_path, tmp_path / "vae"):
        assert torch.equal(load_codec(place).decode(latents), ours.decode(latents))


@pytest.mark.parametrize("inside", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_tied_name_of_t5_may_be_either(folder, tmp_path, inside):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "text_encoder" / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()}
    tensors[inside] = tensors.pop("shared.weight")
    save_tensors(path, tensors)
    t5 = load_model(tmp_path / "m", parts=("text",)).text.t5
    assert torch.equal(t5.shared.weight, tensors[inside]) and t5.encoder.embed_tokens is t5.shared


# ----------------------------------------------------------------------------- wrong files

class Harm:
    def __reduce__(self):
        return (open, ("harm_was_done", "w"))


def test_pickles_are_read_as_plain_weights_or_not_at_all(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / "tangoflux.safetensors"
    tensors = load_tensors(folder / "tangoflux.safetensors")
    path.unlink()
    torch.save(tensors, tmp_path / "m" / "tangoflux.pt")
    loaded = load_model(tmp_path / "m", parts=("flow",)).flow.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    torch.save({"state_dict": tensors}, tmp_path / "m" / "tangoflux.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(find_weights(tmp_path / "m", "tangoflux.safetensors")["fc.0.bias"], tensors["fc.0.bias"])
    (tmp_path / "m" / "tangoflux.pt").write_bytes(pickle.dumps({"fc.0.bias": Harm()}, 2))
    with pytest.raises(UserError, match="tangoflux.pt is a pickle that torch's weights_only reader refuses"):
        load_model(tmp_path / "m", parts=("flow",))
    torch.save({"epoch": 3}, tmp_path / "m" / "tangoflux.pt")
    with pytest.raises(UserError, match="holds no state_dict"):
        load_model(tmp_path / "m", parts=("flow",))
    assert not (tmp_path / "harm_was_done").exists()


@pytest.mark.parametrize("broken, match", [
    ("missing flow", "tangoflux.safetensors is missing"), ("missing vae", "vae.safetensors is missing"),
    ("truncated", "not a whole safetensors file"), ("value", "num_layers is 'many'"),
    ("rate", "sampling_rate of the codec is None"), ("no text", "put its files into"),
    ("codec", "does not describe a codec of kind oobleck|does not fit its config")])
def test_a_broken_folder_is_one_line_before_anything_is_written(folder, tmp_path, broken, match, monkeypatch):
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "m"
    shutil.copytree(folder, place)
    config = read_json(place / "config.json")
    if broken.startswith("missing"):
        (place / ("vae.safetensors" if broken.endswith("vae") else "tangoflux.safetensors")).unlink()
    elif broken == "truncated":
        path = place / "vae.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    elif broken == "no text":
        shutil.rmtree(place / "text_encoder")
    else:
        wrong = {"rate": {"sampling_rate": None}, "codec": {"decoder_channels": 9}}.get(broken)
        config |= {"vae": {**config["vae"], **wrong}} if wrong else {"num_layers": "many"}
        write_json(place / "config.json", config)
    with pytest.raises(UserError, match=match):
        sample.main(["--checkpoint", str(place), "--steps", "1", "--output", str(tmp_path / "new" / "a.wav")])
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------- a fake hub

@pytest.fixture(scope="module")
def hub(folder, tmp_path_factory):
    """A hub cache as huggingface_hub lays it out: TangoFlux with its T5 elsewhere, a whole T5, and both CLAPs."""
    from train_clap import new_clap
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
    weights = load_tensors(place / "model.safetensors")
    save_tensors(place / "model.safetensors", {**weights, "lm_head.weight": torch.ones(3),
                                               "decoder.block.0.layer.0.x": torch.ones(2)})
    write_json(place / "config.json", {**read_json(place / "config.json"),
                                       "architectures": ["T5ForConditionalGeneration"]})
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
    model = load_model(place)
    sample.main(["--checkpoint", str(place), "--prompt", "rain", "--duration", "0.5", "--steps", "2", "--output",
                 str(tmp_path / "again.wav"), "--device", "cpu"])
    return model


def test_sampling_from_the_hub(hub, tmp_path):
    done = subprocess.run(
        [sys.executable, "sample.py", "--checkpoint", "declare-lab/TangoFlux", "--prompt", PROMPTS[1], "--duration",
         "0.5", "--profile", "official", "--steps", "2", "--output", str(tmp_path / "a.wav"), "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, env={"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "PATH": ""})
    assert done.returncode == 0 and (tmp_path / "a.wav").is_file(), done.stderr
    assert "dtype: float32 (as asked)" in done.stdout
    for wanted, cache in (("declare-lab/NoSuchThing", hub), ("declare-lab/TangoFlux", tmp_path / "empty")):
        done = subprocess.run([sys.executable, "sample.py", "--checkpoint", wanted, "--steps", "1"], cwd=ROOT,
                              capture_output=True, text=True,
                              env={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PATH": ""})
        error = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(error) == 1 and "could not be fetched from the hub" in error[0]
        assert "pass the path of a downloaded folder" in error[0]


def test_training_from_the_hub_writes_a_folder_that_loads(offline, tmp_path, monkeypatch, capsys):
    import soundfile
    rows = []
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.sin(np.arange(700) / (3 + i)) * 0.5, 768)
        rows.append({"audio": f"{i}.wav", "caption": PROMPTS[i % 3]})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", [
        "train_fm.py", "--checkpoint", "declare-lab/TangoFlux", "--data", str(tmp_path / "m.jsonl"), "--cache",
        str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--steps", "2", "--batch_size", "2", "--workers", "0",
        "--val_clips", "1", "--device", "cpu", "--dtype", "float32"])
    train_fm.main()
    model = loads_and_samples(tmp_path / "run", tmp_path)
    official = load_model("declare-lab/TangoFlux")
    assert torch.equal(model.text.t5.shared.weight, official.text.t5.shared.weight)
    assert not torch.equal(model.flow.fc[0].weight, official.flow.fc[0].weight)
    assert same_file(tmp_path / "run" / "vae.safetensors", official.folder / "vae.safetensors")


def test_crpo_from_the_hub_writes_a_folder_that_loads(offline, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    crpo.main(["--checkpoint", "declare-lab/TangoFlux", "--reward", "laion/clap-htsat-unfused", "--judge",
               "laion/clap-htsat-fused", "--prompt_file", str(tmp_path / "prompts.txt"), "--prompts", "3",
               "--iterations", "1", "--num_samples", "2", "--evaluate", "2", "--batch_size", "2", "--epochs", "1",
               "--steps", "2", "--out", str(tmp_path / "run"), "--device", "cpu", "--dtype", "float32"])
    model = loads_and_samples(tmp_path / "run" / "iteration_1", tmp_path)
    assert not torch.equal(model.flow.fc[0].weight, load_model("declare-lab/TangoFlux").flow.fc[0].weight)


# ----------------------------------------------------------------------------- semantics of the official sampler

def test_official_noise_is_torchs_own_for_each_prompt():
    torch.manual_seed(3)
    one = torch.randn(2, 5, 4)
    noise = solvers.official_noise(3, [2, 2], (5, 4))
    assert torch.equal(noise[:2], one) and torch.equal(noise[2:], one)


def test_guidance_follows_the_codec(folder, tmp_path, monkeypatch):
    seen = []
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **more: seen.append(args[6]) or generate(*args, **more))
    for place, flags in ((folder, ()), (sample.BASE, ()), (folder, ("--guidance_scale", "2")),
                         (sample.BASE, ("--profile", "tangoflux", "--steps", "1"))):
        sample.main(["--checkpoint", str(place), "--prompt", "rain", "--duration", "0.5", "--steps", "1", "--output",
                     str(tmp_path / "a.wav"), *flags])
    assert seen == [4.5, 3.0, 2.0, 4.5]


def test_part_of_a_clip_decodes_as_in_the_whole(folder):
    codec = load_model(folder, parts=("codec",)).codec
    latents = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0))
    longest = []
    codec.decoder.register_forward_hook(lambda module, inputs, output: longest.append(inputs[0].shape[-1]))
    with torch.no_grad():
        whole = codec.decode(latents)
        longest.clear()
        for frames in (1, 7, 128, 250, 299, 300):
            part = codec.decode(latents, frames=frames)
            assert part.shape[-1] == frames * codec.hop
            assert (part - whole[..., :part.shape[-1]]).abs().max() < 1e-5 * whole.abs().max()
    assert max(longest) <= 128 + 2 * codec.decode_margin


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
        with torch.no_grad():
            for parameter in flow.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.02)
        codec = Oobleck(32, [2, 4, 4], [1, 2, 4], 32, 16, 2, 960)
    save_model(folder, flow, codec, make_text_encoder(" ".join(PROMPTS).split(), 96, 2, 4, 128))
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformer_codec_and_trajectory_equal_diffusers(middle):
    pytest.importorskip("diffusers")
    from official import Official
    peer, model = Official(middle), load_model(middle)
    latents = torch.randn(3, 60, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.1, 0.5, 1.0])
    condition = sample.encode_prompts(model.text, PROMPTS, torch.tensor([0.5, 1.0, 1.7]))
    packed = load_model(middle, parts=("flow",)).flow.pack(150)
    with torch.no_grad():
        ours = [flow.velocity(latents, t, condition) for flow in (model.flow, packed)]
        for row, prompt in enumerate(PROMPTS):                           # a row alone: no padding there
            states, mask = peer.encode(prompt)
            pooled = peer.pooled(states, mask)
            states = torch.cat([states, peer.model.duration_emebdder(condition.duration[row:row + 1])], dim=1)
            theirs = peer.model.transformer(
                latents[row:row + 1], states, pooled, t[row:row + 1], return_dict=False,
                img_ids=torch.arange(60.0)[:, None].expand(60, 3), txt_ids=torch.zeros(states.shape[1], 3))[0]
            for velocity in ours:
                assert relative_error(velocity[row:row + 1], theirs) < 1e-5
        audio = torch.randn(3, 2, 60 * 32 + 5, generator=torch.Generator().manual_seed(2))
        mean, std = model.codec.encode(audio)
        posterior = peer.vae.encode(audio).latent_dist
        assert relative_error(mean.transpose(1, 2), posterior.mean) < 1e-5
        assert relative_error(std.transpose(1, 2), posterior.std) < 1e-5
        assert relative_error(model.codec.decode(mean), peer.vae.decode(posterior.mean).sample) < 1e-5
    noise = solvers.official_noise(5, [1] * 3, (60, 16))
    for steps, scale in ((10, 4.5), (4, 2.0)):
        ours = sample.generate(model, PROMPTS, [0.5, 1.0, 1.7], steps=steps, guidance_scale=scale, noise=noise)
        theirs = torch.cat([peer.inference_flow(prompt, seconds, steps, scale, seed=5)
                            for prompt, seconds in zip(PROMPTS, (0.5, 1.0, 1.7))])
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_command_line_gives_the_official_audio_of_diffusers(folder, tmp_path):
    pytest.importorskip("diffusers")
    import soundfile
    from official import Official
    sample.main(["--checkpoint", str(folder), "--prompt", PROMPTS[1], "--duration", "0.7", "--profile", "official",
                 "--seed", "4", "--output", str(tmp_path / "a.wav"), "--device", "cpu"])
    ours, rate = soundfile.read(tmp_path / "a.wav", always_2d=True)
    theirs = Official(folder).generate(PROMPTS[1], 0.7, seed=4).T.numpy()
    assert rate == 768 and ours.shape == theirs.shape == (537, 2)
    assert np.abs(ours - theirs.clip(-1, 1)).max() < 2 ** -15 + 1e-4 * np.abs(theirs).max()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_full_size_goes_both_ways_to_diffusers(tmp_path):
    """518 M + 156 M parameters: written by us and read by diffusers' classes, and the reverse; equal outputs."""
    diffusers = pytest.importorskip("diffusers")
    from safetensors.torch import load_file, save_file

    from official import transformer_of
    config = PRESETS["tangoflux"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = TangoFlux(config).eval()
        torch.nn.init.normal_(flow.transformer.proj_out.weight, std=0.02)
        for block in [*flow.transformer.transformer_blocks, *flow.transformer.single_transformer_blocks]:
            for name, parameter in block.named_parameters():
                if name.startswith("norm") and parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.01)
    save_model(tmp_path / "ours", flow=flow)
    save_model(tmp_path / "ours", codec=Oobleck(**OOBLECK_DEFAULTS))
    ours = load_file(tmp_path / "ours" / "tangoflux.safetensors")
    latents, t = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7])
    text, pooled = torch.randn(1, 5, 1024, generator=torch.Generator().manual_seed(2)), torch.ones(1, 1024)
    with torch.no_grad():
        expected = flow.transformer(latents, t, text, pooled)
    del flow
    peer = transformer_of(config).eval()
    peer.load_state_dict({name.removeprefix("transformer."): tensor for name, tensor in ours.items()
                          if name.startswith("transformer.")})
    with torch.no_grad():
        theirs = peer(latents, text, pooled, t, img_ids=torch.arange(24.0)[:, None].expand(24, 3),
                      txt_ids=torch.zeros(5, 3), return_dict=False)[0]
    assert relative_error(expected, theirs) < 1e-5
    vae = diffusers.AutoencoderOobleck().eval()
    vae.load_state_dict(load_file(tmp_path / "ours" / "vae.safetensors"))
    with torch.no_grad():
        decoded = vae.decode(latents[:, :6].transpose(1, 2)).sample

    # the reverse: what diffusers' classes hold, written under the official names, read by us, written again
    (tmp_path / "theirs").mkdir()
    rest = {name: tensor for name, tensor in ours.items() if not name.startswith("transformer.")}
    save_file({**{f"transformer.{name}": tensor for name, tensor in peer.state_dict().items()}, **rest},
              tmp_path / "theirs" / "tangoflux.safetensors")
    save_file(vae.state_dict(), tmp_path / "theirs" / "vae.safetensors")
    official = {name: config[name] for name in config if name != "axes_dims_rope"}
    write_json(tmp_path / "theirs" / "config.json", official)
    del peer, vae, ours, rest
    model = load_model(tmp_path / "theirs", parts=("flow", "codec"))
    with torch.no_grad():
        assert relative_error(model.flow.transformer(latents, t, text, pooled), theirs) < 1e-5
        assert relative_error(model.codec.decode(latents[:, :6]), decoded) < 1e-5
    save_model(tmp_path / "again", model.flow, model.codec)
    for name in ("tangoflux.safetensors", "vae.safetensors"):
        assert same_file(tmp_path / "theirs" / name, tmp_path / "again" / name)


# ----------------------------------------------------------------------------- the race

def test_a_small_race_against_diffusers_writes_its_tables(folder, tmp_path):
    pytest.importorskip("diffusers")
    import bench
    common = ["--checkpoint", str(folder), "--repeats", "1", "--out", str(tmp_path)]
    bench.main(["generate", *common, "--steps", "2", "--duration", "0.5"])
    found = read_json(tmp_path / "bench_generate.json")
    assert found["apart"]["ours, float32"] < 1e-4 and found["apart"]["ours, bfloat16"] < 0.1
    assert all(len(runs) == 1 and runs[0]["peak"] > 1e8 for runs in found["runs"].values())
    bench.main(["vae", *common, "--longest", "2.5"])
    bench.main(["load", *common])
    assert {path.name for path in tmp_path.glob("*.md")} == {f"bench_{name}.md" for name in ("generate", "vae", "load")}


def test_flops_of_a_full_step_are_those_of_the_paper_s_network():
    flops = race.flops_of_step(PRESETS["tangoflux"], 21)
    assert flops == pytest.approx(0.80e12 + 0.09e12, rel=0.01)
