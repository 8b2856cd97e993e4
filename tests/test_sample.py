"""Sampler: solvers, guidance, parity with the official trajectories, batches, and the command line."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import PICTURES, noise, refused, relative_error

import sample
from lib.audio import limited
from lib.text import Condition, encode_prompts, make_text_encoder
from lib.weights import load_tensors, save_tensors
from model import PRESETS, TangoFlux, load_model, save_model
from sample import SOLVERS, Sampling, decode, sample_latents
from vae import make_codec
from world.train_clap import new_clap


@pytest.mark.parametrize("solver, order", [(sample.euler, 1), (sample.heun, 2)])
def test_solvers_converge_at_their_order(solver, order):
    one, times = torch.ones(1, dtype=torch.float64), [sample.schedule(steps).double() for steps in (64, 128)]
    coarse, fine = (abs(solver(lambda x, t: 2 * t * x, one, ts) - math.exp(-1)) for ts in times)     # dx/dt = 2tx
    assert (coarse / fine).log2().item() == pytest.approx(order, abs=0.1)
    # dx/dt = 2t: Euler takes the slope of each step's beginning
    reached = sample.euler(lambda x, t: 2 * t.expand_as(x), torch.ones(1), sample.schedule(4))
    assert reached.item() == pytest.approx(1 - 2 * (1 + 0.75 + 0.5 + 0.25) / 4)
    # x_t = (1-t) data + t noise has the constant velocity noise - data: one step reaches the data
    data, start = noise(2, 3, 5, 4)
    for steps in (1, 3, 25):
        assert torch.allclose(solver(lambda x, t: start - data, start, sample.schedule(steps)), data, atol=1e-5)


def test_guidance_algebra():
    cond, uncond = noise(2, 4, 3, 2)
    assert torch.equal(sample.guide(cond, cond, 4.5), cond)
    assert torch.equal(sample.guide(cond, uncond, 0.0), uncond)
    assert torch.allclose(sample.guide(cond, uncond, 1.0), cond, atol=1e-6)
    assert torch.allclose(sample.guide(cond, uncond, 3.0), 3 * cond - 2 * uncond, atol=1e-5)


def test_official_sampler(parity):
    fixture = parity("tangoflux_tiny")
    settings = fixture.info["values"]["sampler"]
    ts = sample.schedule(settings["num_inference_steps"])
    assert torch.equal(ts, fixture.tensors["sampler.sigmas"])
    flow = TangoFlux(fixture.info["config"]).eval()
    flow.load_state_dict(fixture.weights)
    states, visible = (fixture.tensors[f"sampler.{name}"] for name in ("encoder_hidden_states_before_duration", "mask"))
    samples = settings["num_samples_per_prompt"]
    duration = torch.full((samples,), float(settings["duration"]))
    null, condition = (Condition(states[rows], None, visible[rows].bool(), duration)      # every position is visible
                       for rows in (slice(samples), slice(samples, None)))
    start = fixture.tensors["sampler.noise"]
    for scale in settings["guidance_scales"]:
        name = f"sampler.w{scale}"
        velocity_fn = sample.guided_velocity(flow, condition, None if scale == 1 else null, scale)
        steps = [start]
        with torch.no_grad():
            first, whole = velocity_fn(start, ts[0]), sample.euler(velocity_fn, start, ts)
            for pair in ts.unfold(0, 2, 1):
                steps.append(sample.euler(velocity_fn, steps[-1], pair))
        assert relative_error(first, fixture.tensors[f"{name}.guided_velocity_first_step"]) < 1e-4
        assert relative_error(torch.stack(steps[1:]), fixture.tensors[f"{name}.trajectory"]) < 1e-4
        assert relative_error(whole, fixture.tensors[f"{name}.final"]) < 1e-4


# ----------------------------------------------------------------------------- wiring

WORDS = "a violin followed by rain three beeps and wind".split()
PROMPTS = ["rain", "a violin followed by rain", "three beeps and wind", "wind and a violin and rain and three beeps",
           "beeps", "a violin", "zebra", "rain followed by wind"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with small random networks, no layer zero; clips of 8 * 64 ms."""
    path = tmp_path_factory.mktemp("model") / "toy"
    config = PRESETS["toy"] | dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=24,
                                   axes_dims_rope=[8, 8, 8], joint_attention_dim=16, audio_seq_len=8, in_channels=6,
                                   max_duration=0.512)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = TangoFlux(config)
        for parameter in flow.parameters():
            if parameter.ndim == 2 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
        codec = make_codec("mel", dict(embed_dim=6, hidden_dim=8, ch_mult=[1, 1, 1], num_res_blocks=1,
                                       down_layers=[0, 1]))
    save_model(path, flow, codec, make_text_encoder(WORDS, width=16, layers=1, heads=2, d_ff=16, seed=1))
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.mark.parametrize("negative", [None, "rain followed by wind and rain"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_no_row_depends_on_its_batch(model, solver, negative):
    durations = [0.1 + 0.05 * i for i in range(8)]
    options = dict(seed=7, sampling=Sampling(4, 4.5, solver, negative_prompt=negative))
    whole = sample_latents(model, PROMPTS, durations, **options)
    assert whole.shape == (8, 8, 6)
    for i in (0, 3):
        alone = sample_latents(model, PROMPTS[i:i + 1], durations[i:i + 1], indices=[i], **options)
        assert (whole[i] - alone[0]).abs().max() < 1e-4
    batches = sample_latents(model, PROMPTS, durations, batch_size=3, **options)
    assert (whole - batches).abs().max() < 1e-4


def sampled(model, prompts, seed=1, steps=3, **settings):
    return sample_latents(model, prompts, [0.5] * len(prompts), seed, sampling=Sampling(steps, **settings))


def test_guidance_one_is_the_conditional_branch_and_a_negative_prompt_the_null(model):
    plain = sampled(model, PROMPTS[:3])
    conditional = sampled(model, PROMPTS[:3], guidance_scale=1)
    nearly = sampled(model, PROMPTS[:3], guidance_scale=1 + 1e-6)
    assert torch.allclose(conditional, nearly, atol=1e-4) and (plain - conditional).abs().max() > 1e-2
    assert (sampled(model, PROMPTS[:3], guidance_scale=0.5) - conditional).abs().max() > 1e-2       # below 1, too
    against = sampled(model, PROMPTS[:3], negative_prompt=PROMPTS[2])
    assert (plain - against)[:2].abs().max() > 1e-3
    assert torch.allclose(conditional[2], against[2], atol=1e-4)    # away from itself: nothing but the prompt


def test_a_condition_without_a_mask_is_sampled(model, monkeypatch):
    """README's ablation of visible padding: encode_prompts gives None for the mask."""
    monkeypatch.setattr(sample, "encode_prompts", lambda *given: encode_prompts(*given)._replace(mask=None))
    assert sampled(model, PROMPTS[:3], steps=1).isfinite().all()


def test_decode_crops_to_the_duration(model):
    latents = sampled(model, PROMPTS[:3], steps=1)
    assert not latents.is_inference()                            # usable as training data
    whole = decode(model.codec, latents)
    cut = decode(model.codec, latents, [0.1, 0.25, 0.512], batch_size=2)
    assert torch.equal(cut[1], whole[1][:, :4000])


# ----------------------------------------------------------------------------- command line

def run(folder, *arguments):
    sample.main(["--checkpoint", str(folder), "--steps", "2", "--device", "cpu", *map(str, arguments)])


def test_many_prompts_and_files(folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (
        {"prompt_id": 1, "prompt": "rain", "duration": 0.2}, {"prompt_id": 2, "prompt": "wind"})))
    run(folder, "--prompt", "a violin", "--prompt_file", tmp_path / "prompts.jsonl", "--num_samples", 2,
        *(["--plot"] if PICTURES else []), "--output", tmp_path / "out", "--duration", 0.4,
        "--negative_prompt", "wind", "--solver", "heun")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.wav")}
    assert sizes == {f"{i:04d}_{name}.wav": 44 + 2 * samples for i, (name, samples) in enumerate(
        [("a-violin", 6400)] * 2 + [("rain", 3200)] * 2 + [("wind", 6400)] * 2)}
    assert len(list((tmp_path / "out").glob("*.png"))) == 6 * PICTURES


@pytest.mark.parametrize("own", [False, True])
def test_best_of_keeps_the_clip_that_the_reward_scores_highest(folder, tmp_path, capsys, own):
    new_clap(16, 16, 0).eval().save(tmp_path / "clap")
    mine = tmp_path / "mine.py"
    mine.write_text("def scores(audios, rate, prompts):\n    return [float(i) for i in range(len(audios))]\n")
    some = "--prompt", "rain", "--duration", "0.4"
    run(folder, *some, "--best_of", "3", "--reward", f"{mine}:scores" if own else tmp_path / "clap",
        "--output", tmp_path / "best.wav")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("best of 3"))
    chosen, best, mean = (float(value) for value in re.findall(r"(?:candidate|reward|mean) (-?[0-9.]+)", line))
    assert (chosen, best, mean) == (2, 2, 1) if own else best >= mean
    run(folder, *some, "--first_index", int(chosen), "--output", tmp_path / "a.wav")
    assert np.abs(sf.read(tmp_path / "a.wav")[0] - sf.read(tmp_path / "best.wav")[0]).mean() < 1e-3
    mine.write_text("def one(*given):\n    return [1.0]\n\ndef fails(*given):\n    return 1 / 0\n")
    for name, message in (("nothing", "it must define nothing"), ("one", "one cannot be used: its scores of 2 clips are"),
                          ("fails", "fails cannot be used: division by zero; it must give a number for each")):
        refused(f"mine.py.*{message}", run, folder, "--best_of", "2", "--reward", f"{mine}:{name}")


def test_what_is_there_is_kept_and_the_same_command_goes_on(folder, tmp_path, capsys):
    """A killed command goes on; another seed, prompt or model never replaces what was made; batches change nothing."""
    some = *"--prompt rain --num_samples 3 --duration 0.3 --batch_size 1 --dtype float32 --output".split(), tmp_path
    run(folder, *some)
    names = [f"000{i}_rain" for i in range(3)]
    first = {name: (tmp_path / f"{name}.wav").read_bytes() for name in names}
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
    assert [record["index"] for record in records] == [0, 1, 2] and records[0]["checkpoint"].startswith("sha256:")
    assert records[0]["prompt"] == "rain" and records[0]["seed"] == 0 and records[0]["duration"] == 0.3
    (tmp_path / "0001_rain.wav").unlink()
    (tmp_path / "0002_rain.wav").unlink()
    capsys.readouterr()
    run(folder, *some)
    out = capsys.readouterr().out
    assert out.count("is there already") == 1 and out.count("wrote") == 2
    assert {name: (tmp_path / f"{name}.wav").read_bytes() for name in names} == first
    run(folder, *some, "--seed", 1)
    assert (tmp_path / "0000_rain.wav").read_bytes() == first["0000_rain"] != (tmp_path / "0000_rain_2.wav").read_bytes()
    run(folder, *some, "--batch_size", 3, "--output", tmp_path / "three")
    for name in names:
        one, three = (sf.read(place / f"{name}.wav")[0] for place in (tmp_path, tmp_path / "three"))
        assert np.abs(one - three).max() < 3 / 32767


def test_another_codec_text_encoder_or_reward_is_another_sample(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    mine = tmp_path / "mine.py"
    mine.write_text("scores = lambda audios, rate, prompts: list(range(len(audios)))\n")
    some = "--prompt", "rain", "--duration", 0.3, "--best_of", 2, "--reward", f"{mine}:scores", "--output", tmp_path / "out"
    for count in range(1, 5):
        for _ in range(2):                                          # the same command makes nothing new
            run(tmp_path / "model", *some)
            assert len(list((tmp_path / "out").glob("*.wav"))) == count
        if count == 3:
            mine.write_text(mine.read_text() + "# another\n")
        else:
            path = tmp_path / "model" / ("vae.safetensors" if count == 1 else "text_encoder/model.safetensors")
            save_tensors(path, {name: tensor + 1e-3 for name, tensor in load_tensors(path).items()})


def test_a_new_solver_is_one_entry(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(SOLVERS, "midpoint", (lambda velocity, x, ts: x, 2))
    run(folder, "rain", "--prompt", "wind", "--solver", "midpoint", "--duration", 0.3, "--output", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["0000_rain.wav", "0001_wind.wav"]


def test_file_names_keep_letters_of_any_script():
    paths = sample.output_paths("out", ["дождь!", "\U0001f600", "A  violin"])
    assert [path.name for path in paths] == ["0000_дождь.wav", "0001_prompt.wav", "0002_a-violin.wav"]


def test_odd_prompts_warn(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "CLIP_SAMPLES", 0.512 * 16000)      # a model of the world
    odd = "a zebra", "\U0001f600 rain", "\u4e0b\u96e8", "rain and wind " * 720, " "
    run(folder, "rain", "wind", "rain", *(word for prompt in odd for word in ("--prompt", prompt)), "--output", tmp_path)
    warnings = capsys.readouterr().err
    for shown in ("no words for: zebra, \u4e0b\u96e8, \U0001f600.", "violin", "--checkpoint declare-lab/TangoFlux",
                  "1 of 8 prompts cut to 64 tokens", "any sound at all", "3 prompts of a word each", "more than three sounds, as 1 prompts name: rain and"):
        assert shown in warnings
    assert len(list(tmp_path.glob("*.wav"))) == 8
    own = shutil.copytree(folder, tmp_path / "own")                 # fine-tuned on captions with these words
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "training": {"train_text": True}}))
    run(own, "--prompt", "a zebra", "--output", tmp_path / "zoo")
    assert "no words for" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    ("--steps 0", "--steps: 0 must lie between 1 and 1000"), ("--guidance_scale -1", "between 0 and 50"),
    ("--duration 0", "must lie between"), ("--duration 99", "at most 0.512 s"), ("--num_samples 0", "--num_samples: 0"),
    ("--best_of 0", "--best_of: 0"), ("--first_index -1", "--first_index: -1"),
    ("--prompt_file missing.txt", "missing.txt is missing"), ("--prompt_file empty.txt", "holds no rows"),
    ("--output a.mp3", "only WAV files"), ("--output empty.txt/inside", "cannot write"),
    ("--num_samples 2 --output one.wav", "is one file"),
    ("--solver foo", "there are euler, heun"), ("--checkpoint nowhere", "nowhere is missing"), ("--device abacus", "abacus")])
def test_wrong_input_is_one_line(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    refused(re.escape(message), run, folder, *arguments.split())
    assert not list(tmp_path.rglob("*.wav"))


def test_a_clip_that_passes_full_scale_is_turned_down_around_its_peaks():
    quiet = 0.3 * torch.randn(2, 1600, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    assert limited(quiet, 16000) is quiet
    loud = quiet.clone()
    loud[1, 800], loud[0, 0] = -7.0, 1.5
    turned = limited(loud, 16000)
    assert turned.abs().max() <= 0.98 + 1e-6 and turned[1, 800] < -0.97
    far = (torch.arange(1600) > 160) & ((torch.arange(1600) - 800).abs() > 160)
    assert torch.equal(turned[:, far], loud[:, far])            # 10 ms away nothing changes
    ratio = turned[:, 800] / loud[:, 800]
    assert ratio[0] == ratio[1]                                 # the same in all channels: the place stays


def test_decoded_clips_do_not_pass_full_scale(model, monkeypatch):
    """What judges and rewards hear is what is written."""
    monkeypatch.setattr(model.codec, "decode", lambda latents, frames: 3 * torch.ones(len(latents), 1, frames * 256))
    told = []
    assert decode(model.codec, torch.zeros(2, 4, 8), [0.01] * 2, say=told.append)[1].max() <= 0.98 + 1e-6
    assert told == ["a clip passes full scale by 9.5 dB: limited"] * 2
