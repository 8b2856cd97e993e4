"""Sampler: solvers, guidance, parity with the official trajectories, batches, and the command line."""
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import PICTURES, relative_error

import sample
import solvers
from common import UserError, side_by_side
from model import PRESETS, AdaLN, Condition, TangoFlux, concat_conditions, save_model
from text import make_text_encoder


# ----------------------------------------------------------------------------- maths

def growth(x, t):
    """dx/dt = 2x, so that x(0) = x(1) exp(-2)."""
    return 2.0 * x


def error_of(solver, steps):
    x = torch.ones(1, 1, 1, dtype=torch.float64)
    return (solver(growth, x, solvers.schedule(steps).double()) - math.exp(-2.0)).abs().item()


@pytest.mark.parametrize("solver, order", [(solvers.euler, 1), (solvers.heun, 2)])
def test_solvers_converge_at_their_order(solver, order):
    assert math.log2(error_of(solver, 64) / error_of(solver, 128)) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("solver", solvers.SOLVERS.values())
@pytest.mark.parametrize("steps", [1, 3, 25])
def test_straight_paths_are_exact(solver, steps):
    """x_t = (1-t) data + t noise has the constant velocity noise - data: one step reaches the data."""
    data, noise = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    result = solver(lambda x, t: noise - data, noise, solvers.schedule(steps))
    assert torch.allclose(result, data, atol=1e-5)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_number_of_evaluations(name):
    times = []
    solvers.SOLVERS[name](lambda x, t: times.append(float(t)) or x, torch.zeros(1, 1, 1), solvers.schedule(7))
    assert len(times) == 7 * sample.EVALUATIONS[name]
    assert times[0] == 1.0 and min(times) >= 0.0


def test_schedule_runs_from_noise_to_data():
    ts = solvers.schedule(25)
    assert ts.dtype == torch.float32 and len(ts) == 26 and ts[0] == 1 and ts[-1] == 0
    assert torch.allclose(ts, torch.linspace(1, 0, 26), atol=1e-6)


def test_guidance_algebra():
    cond, uncond = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(solvers.guide(cond, cond, 4.5), cond)
    assert torch.equal(solvers.guide(cond, uncond, 0.0), uncond)
    assert torch.allclose(solvers.guide(cond, uncond, 1.0), cond, atol=1e-6)
    assert torch.allclose(solvers.guide(cond, uncond, 3.0), 3 * cond - 2 * uncond, atol=1e-5)


def test_noise_depends_on_seed_and_index_alone():
    some = solvers.noise_for(3, [5, 9], (4, 2))
    assert torch.equal(some[1], solvers.noise_for(3, [9], (4, 2))[0])
    assert not torch.equal(some[0], some[1])
    assert not torch.equal(some[0], solvers.noise_for(4, [5], (4, 2))[0])


# ----------------------------------------------------------------------------- parity

def fixture_conditions(fixture, samples):
    """(condition, null) as the official sampler fed them: every position visible, n null rows then n of the
    prompt.
    """
    states = fixture.tensors["sampler.encoder_hidden_states_before_duration"]
    mask = fixture.tensors["sampler.mask"].bool()
    duration = torch.full((samples,), float(fixture.info["values"]["sampler"]["duration"]))
    null, cond = (Condition(states[rows], None, mask[rows], duration)
                  for rows in (slice(samples), slice(samples, None)))
    return cond, null


def test_official_sampler(parity):
    fixture = parity("tangoflux_tiny")
    settings = fixture.info["values"]["sampler"]
    ts = solvers.schedule(settings["num_inference_steps"])
    assert torch.equal(ts, fixture.tensors["sampler.sigmas"])
    flow = TangoFlux(fixture.info["config"]).eval()
    flow.load_state_dict(fixture.weights)
    condition, null = fixture_conditions(fixture, settings["num_samples_per_prompt"])
    noise = fixture.tensors["sampler.noise"]
    for scale in settings["guidance_scales"]:
        name = f"sampler.w{scale}"
        velocity_fn = solvers.guided_velocity(flow, condition, None if scale == 1 else null, scale)
        with torch.no_grad():
            first = velocity_fn(noise, ts[0])
            steps = [noise]
            for k in range(len(ts) - 1):
                steps.append(solvers.euler(velocity_fn, steps[-1], ts[k:k + 2]))
            whole = solvers.euler(velocity_fn, noise, ts)
        assert relative_error(first, fixture.tensors[f"{name}.guided_velocity_first_step"]) < 1e-4
        assert relative_error(torch.stack(steps[1:]), fixture.tensors[f"{name}.trajectory"]) < 1e-4
        assert relative_error(whole, fixture.tensors[f"{name}.final"]) < 1e-4


# ----------------------------------------------------------------------------- wiring

WORDS = "a violin followed by rain three beeps and wind".split()
PROMPTS = ["rain", "a violin followed by rain", "three beeps and wind", "wind and a violin and rain and three beeps",
           "beeps", "a violin", "zebra", "rain followed by wind"]


def make_folder(path, frames=8):
    """Write a model folder with small random networks: quick, and no layer is zero. Clips of frames * 64
    ms.
    """
    from vae import make_codec
    config = PRESETS["toy"] | dict(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=24,
                                   axes_dims_rope=[8, 8, 8], joint_attention_dim=16,
                                    audio_seq_len=frames, in_channels=6,
                                   max_duration=frames * 0.064)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        flow = TangoFlux(config)
        torch.nn.init.normal_(flow.transformer.proj_out.weight, std=0.3)
        for module in flow.modules():
            if isinstance(module, AdaLN):
                torch.nn.init.normal_(module.linear.weight, std=0.3)
        codec = make_codec("mel", dict(data_dim=80, embed_dim=6, hidden_dim=8, ch_mult=[1, 1, 1], num_res_blocks=1,
                                       down_layers=[0, 1]))
    save_model(path, flow, codec, make_text_encoder(WORDS, width=16, layers=1, heads=2, d_ff=16, seed=1))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "toy")


@pytest.fixture(scope="module")
def model(folder):
    return sample.load_model(folder)


@pytest.mark.parametrize("negative", [None, "rain followed by wind and rain"])
@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_no_row_depends_on_its_batch(model, solver, negative):
    """Sample 3 of 8 unequal prompts equals the same sample alone."""
    durations = [0.1 + 0.05 * i for i in range(8)]
    options = dict(seed=7, steps=4, guidance_scale=4.5, solver=solver, negative_prompt=negative)
    whole = sample.generate(model, PROMPTS, durations, **options)
    alone = sample.generate(model, PROMPTS[3:4], durations[3:4], indices=[3], **options)
    assert whole.shape == (8, 8, 6)
    assert (whole[3] - alone[0]).abs().max() < 1e-4
    shortest = sample.generate(model, PROMPTS[:1], durations[:1], indices=[0], **options)
    assert (whole[0] - shortest[0]).abs().max() < 1e-4
    batches = sample.generate(model, PROMPTS, durations, batch_size=3, **options)
    assert (whole - batches).abs().max() < 1e-4


def test_guidance_one_is_the_conditional_branch(model):
    options = dict(seed=1, steps=3)
    conditional = sample.generate(model, PROMPTS[:2], [0.5, 0.5], guidance_scale=1, **options)
    nearly = sample.generate(model, PROMPTS[:2], [0.5, 0.5], guidance_scale=1 + 1e-6, **options)
    assert torch.allclose(conditional, nearly, atol=1e-4)
    guided = sample.generate(model, PROMPTS[:2], [0.5, 0.5], guidance_scale=3, **options)
    assert (guided - conditional).abs().max() > 1e-2


def test_negative_prompt_takes_the_place_of_the_null(model):
    options = dict(seed=1, steps=3, guidance_scale=3.0)
    plain = sample.generate(model, PROMPTS[:3], [0.5] * 3, **options)
    against = sample.generate(model, PROMPTS[:3], [0.5] * 3, negative_prompt="wind", **options)
    assert (plain - against).abs().max() > 1e-3
    # guiding away from the prompt itself leaves nothing but the prompt
    conditional = sample.generate(model, PROMPTS[2:3], [0.5], **options | dict(guidance_scale=1))
    itself = sample.generate(model, PROMPTS[2:3], [0.5], negative_prompt=PROMPTS[2], **options)
    assert torch.allclose(conditional, itself, atol=1e-4)


def test_negative_empty_text_is_the_null(model):
    """The two ways to make the unconditional branch agree: "" is the null text, padded to each row's own
    length.
    """
    condition = sample.encode_prompts(model.text, PROMPTS[:4], torch.full((4,), 0.5))
    null, empty = sample.null_condition(model.text, condition), sample.negative_condition(model.text, "", condition)
    for ours, theirs in zip(empty[:4], null[:4]):
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-6)


def test_guidance_is_one_batch_null_first(model):
    seen = []

    class Spy(torch.nn.Linear):
        config, transformer = model.flow.config, SimpleNamespace(run=lambda x, prepared: seen.append(x.shape) or x)

        def prepare(self, ts, condition, frames):
            seen.append((ts, condition, frames))
            return list(ts)
    condition = sample.encode_prompts(model.text, PROMPTS[:2], torch.tensor([0.2, 0.5]))
    null = sample.null_condition(model.text, condition)
    solvers.guided_velocity(Spy(1, 1), condition, null, 2.0)(torch.zeros(2, 8, 6), torch.tensor(0.25))
    (t, both, frames), shape = seen
    assert shape == (4, 8, 6) and t.tolist() == [0.25] and frames == 8
    assert torch.equal(both.text, concat_conditions(null, condition).text)
    assert torch.equal(both.duration, torch.tensor([0.2, 0.5, 0.2, 0.5]))
    assert both.pooled_mask[:2].sum() == 2  # the end token alone


def test_steps_prepared_ahead_are_those_of_the_network(model, monkeypatch):
    """However many steps are prepared at once, the velocity is flow.velocity's; packed weights change nothing."""
    condition = sample.encode_prompts(model.text, PROMPTS[:2], torch.tensor([0.2, 0.5]))
    ts, x = solvers.schedule(5), torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    packed = copy.deepcopy(model.flow).pack(40)
    with torch.inference_mode():
        expected = [model.flow.velocity(x, t.expand(2), condition) for t in ts]
        for ahead in (1, 20000, 2 ** 26):
            monkeypatch.setattr(solvers, "AHEAD", ahead)
            for flow in (model.flow, packed):
                velocity_fn = solvers.prepared_velocity(flow, condition, ts)
                for t, velocity in zip(ts, expected):
                    assert relative_error(velocity_fn(x, t), velocity) < 1e-5
            assert relative_error(velocity_fn(x, torch.tensor(0.123)),
                                  model.flow.velocity(x, torch.full((2,), 0.123), condition)) < 1e-5
    assert not any("to_q" in name for name in packed.state_dict())


def test_a_condition_without_a_mask_is_sampled(model, monkeypatch):
    """README's ablation of visible padding: encode_prompts gives None for the mask."""
    encode = sample.encode_prompts
    monkeypatch.setattr(sample, "encode_prompts", lambda *args, **more: encode(*args, **more)._replace(mask=None))
    assert sample.generate(model, PROMPTS[:3], [0.5] * 3, steps=1).isfinite().all()


def test_cropped_rows_are_those_of_a_shorter_model(model):
    """--crop_latents: a row is what the network makes of its own frames alone, whatever the batch."""
    durations = [0.5, 0.1, 0.3, 0.1]
    codec = SimpleNamespace(sampling_rate=16000, hop=1024, denormalise=lambda latents: latents)
    cropped = SimpleNamespace(flow=model.flow, text=model.text, codec=codec)
    latents = sample.generate(cropped, PROMPTS[:4], durations, steps=2, crop=True)
    for i, (seconds, frames) in enumerate(zip(durations, (8, 2, 5, 2))):
        assert sample.frames_for(codec, seconds) == frames and not latents[i, frames:].any()
        condition, null = sample.encode_conditions(model.text, [PROMPTS[i]], [seconds])[0]
        with torch.inference_mode():
            velocity_fn = solvers.guided_velocity(model.flow, condition, null, 3.0)
            alone = solvers.euler(velocity_fn, solvers.noise_for(0, [i], (8, 6))[:, :frames], solvers.schedule(2))
        assert relative_error(latents[i:i + 1, :frames], alone) < 1e-4
    whole = sample.decode(model, latents, durations, cropped=True)
    assert [audio.shape[1] for audio in whole] == [8000, 1600, 4800, 1600]
    assert torch.equal(whole[3], model.codec.decode(latents[[1, 3], :2])[1, :, :1600])


def test_generate_puts_the_mode_back_and_gives_trainable_data(model):
    model.flow.train()
    latents = sample.generate(model, PROMPTS[:1], [0.5], steps=1)
    assert model.flow.training and not model.text.training
    model.flow.eval()
    assert not latents.is_inference() and latents.isfinite().all()


def test_decode_crops_to_the_duration(model):
    latents = sample.generate(model, PROMPTS[:3], [0.5] * 3, steps=1)
    whole = sample.decode(model, latents)
    cut = sample.decode(model, latents, [0.1, 0.25, 0.512], batch_size=2)
    assert [audio.shape for audio in whole] == [(1, 8192)] * 3
    assert [audio.shape for audio in cut] == [(1, 1600), (1, 4000), (1, 8192)]
    assert torch.equal(cut[1], whole[1][:, :4000])


# ----------------------------------------------------------------------------- command line

def run(folder, *arguments):
    sample.main(["--checkpoint", str(folder), "--steps", "2", "--device", "cpu", *map(str, arguments)])


def test_same_seed_same_file(folder, tmp_path, capsys):
    for name, seed in (("a.wav", 3), ("b.wav", 3), ("c.wav", 4)):
        run(folder, "--prompt", "rain", "--output", tmp_path / name, "--seed", seed, "--duration", 0.3)
    first, second, other = ((tmp_path / name).read_bytes() for name in ("a.wav", "b.wav", "c.wav"))
    assert first == second != other
    assert len(first) == 44 + 2 * 4800
    out = capsys.readouterr().out
    assert "wrote" in out and "next:" in out


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


def test_first_index_makes_a_sample_of_a_batch_again(folder, tmp_path):
    run(folder, "--prompt", "rain", "--duration", "0.4", "--num_samples", "4", "--output", tmp_path / "four")
    run(folder, "--prompt", "rain", "--duration", "0.4", "--first_index", "2", "--output", tmp_path / "one.wav")
    ours, theirs = (sf.read(path)[0] for path in (tmp_path / "one.wav", tmp_path / "four" / "0002_rain.wav"))
    assert np.abs(ours - theirs).mean() < 1e-3 and np.abs(theirs).max() > 1e-3


def test_best_of_keeps_the_clip_that_the_reward_scores_highest(folder, tmp_path, capsys):
    from audio import read_audio
    from train_clap import new_clap
    clap = new_clap(16, 16, 0).eval()
    clap.save(tmp_path / "clap")
    prompts = ["--prompt", "rain", "--prompt", "wind", "--duration", "0.4"]
    run(folder, *prompts, "--num_samples", "3", "--output", tmp_path / "all")
    run(folder, *prompts, "--best_of", "3", "--reward", tmp_path / "clap", "--output", tmp_path / "best")
    chosen = [int(line.split("sample ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("best of 3")]
    every = sorted((tmp_path / "all").glob("*.wav"))
    rate = sf.info(every[0]).samplerate
    scores = clap.scores([read_audio(path, rate, 1) for path in every], rate, ["rain"] * 3 + ["wind"] * 3)
    for row, best in enumerate(sorted((tmp_path / "best").glob("*.wav"))):
        assert scores[chosen[row]] > scores[3 * row:3 * row + 3].max() - 1e-3
        assert np.abs(sf.read(best)[0] - sf.read(every[chosen[row]])[0]).mean() < 1e-3
    for wrong, message in ((["--best_of", "0"], "--best_of is 0"), (["--reward", "x"], "--reward would have no effect"),
                           (["--first_index", "-1"], "--first_index is -1")):
        with pytest.raises(UserError, match=message):
            run(folder, *wrong)


def test_file_names_keep_letters_of_any_script():
    paths = sample.output_paths("out", ["\u0434\u043e\u0436\u0434\u044c!", "\U0001f600", "A  violin"])
    assert [path.name for path in paths] == ["0000_\u0434\u043e\u0436\u0434\u044c.wav", "0001_prompt.wav",
                                             "0002_a-violin.wav"]


@pytest.mark.parametrize("prompt, shown", [
    ("a zebra", "no words for: zebra"), ("\U0001f600 rain", "no words for: \U0001f600"),
    ("\u4e0b\u96e8", "\u4e0b\u96e8"),
    ("rain and wind " * 720, "cut to 64 tokens"), (" ", "any sound at all")])
def test_odd_prompts_warn(folder, tmp_path, capsys, prompt, shown):
    run(folder, "--prompt", prompt, "--output", tmp_path / "x.wav")
    warnings = capsys.readouterr().err
    assert shown in warnings and (tmp_path / "x.wav").exists()
    if "words" in shown:
        assert "violin" in warnings and "--checkpoint declare-lab/TangoFlux" in warnings


def broken_copy(folder, target, name, size):
    """The model folder with one file cut to `size` bytes."""
    import shutil
    shutil.copytree(folder, target)
    (target / name).write_bytes((target / name).read_bytes()[:size])
    return target


@pytest.mark.parametrize("arguments, message", [
    (["--steps", "0"], "--steps is 0"), (["--steps", "1001"], "between 1 and 1000"), (["--steps", "nan"], "--steps"),
    (["--guidance_scale", "nan"], "--guidance_scale is nan"), (["--guidance_scale", "-1"], "between 0 and 50"),
    (["--duration", "nan"], "--duration is nan"), (["--duration", "0"], "must be above 0"),
    (["--duration", "99"], "at most 0.512"),
    (["--duration", "inf"], "duration is inf"), (["--num_samples", "0"], "--num_samples is 0"),
    (["--solver", "rk4"], "rk4"),
    (["--prompt_file", "missing.txt"], "missing.txt is missing"),
    (["--prompt_file", "empty.txt"], "has no prompt in it"),
    (["--prompt_file", "rows.jsonl"], 'has no "prompt"'),
    (["--prompt_file", "nan.jsonl"], "nan.jsonl row 1: duration is nan"),
    (["--prompt_file", "binary.txt"], "is not readable text"),
    (["--output", "a.mp3"], "only WAV files"), (["--output", "empty.txt/inside"], "cannot write into"),
    (["--num_samples", "2", "--output", "one.wav"], "is one file"),
    (["--checkpoint", "nowhere"], "nowhere is missing"), (["--checkpoint", "cut"], "not a whole safetensors file"),
    (["--checkpoint", "no_config"], "config.json"), (["--device", "abacus"], "abacus"),
    (["--frobnicate"], "--frobnicate")])
def test_wrong_input_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "rows.jsonl").write_text('{"caption": "rain"}\n')
    (tmp_path / "nan.jsonl").write_text('{"prompt": "rain", "duration": NaN}\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    if "cut" in arguments:
        broken_copy(folder, tmp_path / "cut", "tangoflux.safetensors", 5000)
    if "no_config" in arguments:
        broken_copy(folder, tmp_path / "no_config", "config.json", 20)
    with pytest.raises(SystemExit) as exit_info:
        sample.run_main(lambda: run(folder, *arguments))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.rglob("*.wav"))


def test_plot_without_matplotlib(folder, tmp_path, monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        run(folder, "--plot", "--output", tmp_path / "x.wav")


def test_side_by_side_keeps_order_and_thread_count():
    """Pieces side by side give what they give one after the other; torch has its threads back, even after an error."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert side_by_side(lambda i: i * i, range(20), torch.device("cpu")) == [i * i for i in range(20)]
        with pytest.raises(UserError, match="piece 5"):
            def fail(i):
                if i == 5:
                    raise UserError("piece 5")
            side_by_side(fail, range(9), torch.device("cpu"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
