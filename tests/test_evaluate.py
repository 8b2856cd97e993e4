"""Distances against the original tools, intervals, tables, and the command on any set of clips."""
import json
import math
import re
from functools import partial

import numpy as np
import pytest
import torch

import evaluate
import lib.mel
from conftest import PARITY, TINY, TINY_MEL, refused, small_judges
from experiments import toy
from lib.audio import write_wav
from lib.common import read_jsonl, write_jsonl
from lib.text import make_text_encoder
from lib.weights import save_tensors
from model import TangoFlux, save_model
from sample import Sampling
from vae import make_codec
from world.ears import COLUMNS, scores
from world.scenes import World
from world.sounds import SAMPLE_RATE


@pytest.fixture(autouse=True, scope="module")
def quick_vocoder():
    with pytest.MonkeyPatch.context() as monkeypatch:           # these tests look at the plumbing, not at the sound
        monkeypatch.setattr(lib.mel.MelVAE, "vocoder_steps", 2)
        for module in (lib.mel, toy):
            monkeypatch.setattr(module, "griffin_lim", partial(lib.mel.griffin_lim, iterations=2))
        monkeypatch.setattr(lib.mel, "MEL_STEPS", 2)
        yield


def test_frechet_distance_matches_the_original(parity):
    fixed, arrays = parity("metrics").info["frechet_distance"], np.load(PARITY / "metrics.npz")
    x, y = arrays["feat_x"], arrays["feat_y"]
    assert evaluate.frechet_distance(x, y) == pytest.approx(fixed["feat_x_vs_feat_y"]["float64"], rel=1e-6)
    few = fixed["first 8 rows of feat_x vs first 10 rows of feat_y (rank deficient)"]
    assert evaluate.frechet_distance(x[:8], y[:10]) == pytest.approx(few["stable_audio_metrics"], rel=1e-3)
    assert evaluate.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet_distance(x, x + 3) == pytest.approx(9 * x.shape[1], rel=1e-5)    # only the mean moves


def test_kl_divergence_matches_the_original(parity):
    fixed, arrays = parity("metrics").info["kl_passt"], np.load(PARITY / "metrics.npz")
    windows = arrays["window_logits_generated"], arrays["window_logits_reference"]
    for pool, name in ((np.mean, "mean_over_windows"), (np.max, "max_over_windows")):
        ours = evaluate.kl_divergence(*(pool(one, axis=1) for one in windows))
        assert ours == pytest.approx(fixed[name]["per_item"], rel=1e-4)
        assert ours.mean() == pytest.approx(fixed[name]["mean_over_items"], rel=1e-4)


def arrays(rng, number, gain):
    tally = np.ones((number, len(COLUMNS)), dtype=np.int64)
    right = [COLUMNS.index(name) for name in ("order_right", "counts_right", "exact")]
    tally[:, right] = rng.random((number, 1)) < 0.5 + gain
    return {"reward": rng.random(number) + gain, "judge": rng.random(number) + gain, "tally": tally,
            "features": rng.standard_normal((number, 4)) * (2 - gain), "logits": rng.standard_normal((number, 5)),
            "silent": rng.random(number) < 0.5 - gain}


def test_gains_have_the_right_sign_and_pool_seeds():
    rng = np.random.default_rng(1)
    base, real = arrays(rng, 300, 0.0), arrays(rng, 300, 0.4)
    real["features"] = rng.standard_normal((300, 4))
    better = [arrays(rng, 300, 0.4) for _ in range(3)]
    changes = evaluate.gains(better, [base], real, draws=200)
    for name in ("reward", "judge", "order", "exact"):
        value, low, high = changes[name]
        assert low > 0 and low < value < high and 0.3 < value < 0.5, name
    ratio, low, high = changes["frechet"]
    assert low < ratio < high < 1                            # nearer to the real scenes
    real["tally"][7:, COLUMNS.index("counted")] = 0
    changes = evaluate.gains(better, [base], real, draws=200)       # seven prompts count: "-", as in tables of few prompts
    assert math.isnan(changes["count"][1]) and not math.isnan(changes["order"][1])
    values = evaluate.summary(base, real)
    assert values.keys() == evaluate.MEASURES.keys() and values["exact"] == scores(base["tally"])["exact"]


def test_numbers_tables_and_the_listening_page(tmp_path):
    assert evaluate.number(-0.0001, 3) == "0.000" and evaluate.number(-0.0001, 3, "+") == "+0.000"
    assert evaluate.number(-0.5, 2) == "-0.50" and evaluate.number(math.nan, 3) == "-"
    heads = [f"head {i}" for i in range(12)]
    text = evaluate.tables(heads, [["x" * 18] * 12, [1] * 12])
    parts = text.split("\n\n")
    assert len(parts) > 1 and max(map(len, text.split("\n"))) <= 100
    assert all(part.startswith("| head 0 ") for part in parts)
    assert all(text.count(head + " ") == 1 for head in heads[1:])
    columns = {"base": [tmp_path / "a" / "0.wav", tmp_path / "a" / "1.wav"], "<b>": [tmp_path / "2.wav"] * 2}
    evaluate.listening_page(tmp_path / "listen.html", columns, ["rain & wind", "a bell"])
    page = (tmp_path / "listen.html").read_text()
    assert page.count("<audio") == 4 and 'src="a/1.wav"' in page
    assert "rain &amp; wind" in page and "&lt;b&gt;" in page and str(tmp_path) not in page
    prompts = [f"bell {i}" for i in range(20)]                      # blind: no column is always the same model
    columns = {"base": [tmp_path / "a.wav"] * 20, "ours": [tmp_path / "b.wav"] * 20}
    evaluate.listening_page(tmp_path / "blind.html", columns, prompts, blind=True)
    rows = (tmp_path / "blind.html").read_text().split("<tr>")[2:]
    assert {row.index("a.wav") < row.index("b.wav") for row in rows} == {True, False}
    assert all((row.index("a.wav") < row.index("b.wav")) == (row.index("base") < row.index("ours")) for row in rows)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Model folders a, b and c, small judges beside them."""
    folder = small_judges(tmp_path_factory.mktemp("place"))
    torch.manual_seed(0)
    flow, codec = TangoFlux(TINY), make_codec("mel", TINY_MEL).eval()
    text = make_text_encoder(["rain", "wind", "a", "violin"], width=16, layers=1, heads=2, d_ff=16)
    with torch.no_grad():
        for name in "abc":
            for parameter in flow.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
            save_model(folder / name, flow, codec, text)
    return folder


def run(place, out, *more):
    """The command; the numbers and the text that it writes."""
    flags = ["--reward", place / "reward", "--judge", place / "judge", "--tagger", place, "--against", place / "a",
             "--prompts", 8, "--steps", 2, "--draws", 20, "--cache", place / "cache", "--out", out, "--device", "cpu"]
    evaluate.main([str(flag) for flag in (*flags, *more)])
    return json.loads(next(out.glob("*.json")).read_text()), next(out.glob("*.md")).read_text()


def test_judged_sets_are_kept(place, tmp_path):
    judges = evaluate.Judges(place / "reward", place / "judge", place)
    clips, scenes = evaluate.render_clips(World("test"), range(3))
    first = evaluate.judged(tmp_path / "x.safetensors", judges, lambda: clips, scenes)
    again = evaluate.judged(tmp_path / "x.safetensors", None, None, None)
    assert first.keys() == again.keys() == {"reward", "judge", "silent", "tally", "features", "logits"}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    plain = [evaluate.Asked(scene.prompt, scene.duration) for scene in scenes]
    outside = judges.judge(clips, plain)
    assert outside.keys() == {"reward", "judge", "silent", "features"} and np.array_equal(outside["judge"], first["judge"])
    save_tensors(tmp_path / "y.safetensors", {"reward": torch.zeros(2, dtype=torch.float8_e4m3fn)})
    refused("y.safetensors cannot be used", evaluate.judged, tmp_path / "y.safetensors", None, None, None)
    assert outside["features"].shape != first["features"].shape                              # CLAP's, not the tagger's


def test_the_seconds_of_sampling_belong_to_batch_size_and_threads(place, tmp_path):
    """Fault of the first edition: seconds were read back that another batch size had taken."""
    model = evaluate.load_model(place / "a")
    asked = [evaluate.Asked("rain", 1.0), evaluate.Asked("wind", 2.0)]
    for batch_size in (1, 2):
        sampler = evaluate.Sampler(Sampling(2), 0, batch_size, str(tmp_path))
        clips, seconds = evaluate.sampled(model, asked, sampler)
        again, kept = evaluate.sampled(model, asked, sampler)
        assert clips.shape == (2, 65536) and torch.equal(clips, again) and seconds == kept > 0
        assert not clips[0, SAMPLE_RATE:].any() and clips[1, SAMPLE_RATE:].any()             # cut at the duration
    assert len(list(tmp_path.iterdir())) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    evaluate.sampled(model, asked, sampler)
    torch.set_num_threads(threads)
    model.flow.config["score_head"] = "v2"                  # the same weights in another forward
    evaluate.sampled(model, asked, sampler)
    assert len(list(tmp_path.iterdir())) == 4


def test_models_side_by_side_on_the_world(place, tmp_path, capsys):
    numbers, text = run(place, tmp_path, "--checkpoint", place / "b", place / "c")
    for name in ("b", "c"):
        change = numbers[f"{place / name} against {place / 'a'}"]
        assert len(change) == 8 and change["reward"][1] <= change["reward"][0] <= change["reward"][2]
    assert "all 2 pooled" in text and "python evaluate.py --reward" in text and not re.search(r"-0\.0+\b", text)
    assert numbers["real"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert "next: " in capsys.readouterr().out


def test_clips_that_exist_answer_the_prompts_of_the_world(place, tmp_path):
    audios, scenes = evaluate.render_clips(World("test", pairs="unseen"), range(8))
    for i in range(8):
        write_wav(tmp_path / "mine" / f"{i}.wav", audios[i:i + 1], SAMPLE_RATE)
    numbers, _ = run(place, tmp_path, "--checkpoint", "--clips", tmp_path / "mine")
    assert [row["prompt"] for row in read_jsonl(tmp_path / "prompts.jsonl")] == [scene.prompt for scene in scenes]
    assert numbers[str(tmp_path / "mine")]["f1"] == pytest.approx(numbers["real"]["f1"], abs=0.05)
    refused("holds 8 sounds for 9 prompts", evaluate.folder_clips, tmp_path / "mine", 9, 16000, 65536)


def test_a_manifest_brings_prompts_and_reference(place, tmp_path):
    audios, scenes = evaluate.render_clips(World("val"), range(4))
    for i in range(4):
        write_wav(tmp_path / f"{i}.wav", audios[i:i + 1], SAMPLE_RATE)
    write_jsonl(tmp_path / "mine.jsonl", [{"audio": f"{i}.wav", "caption": scene.prompt, "duration": scene.duration}
                                          for i, scene in enumerate(scenes)])
    numbers, text = run(place, tmp_path / "out", "--checkpoint", place / "b", "--data", tmp_path / "mine.jsonl")
    assert numbers["real"].keys() == {"reward", "judge", "frechet", "silent"}
    change = numbers[f"{place}/b against {place}/a"]
    assert change.keys() == numbers["real"].keys() and all(math.isnan(each[1]) for each in change.values())  # 4 prompts
    assert "4 prompts of" in text and "event F1" not in text and (tmp_path / "out" / "mine.md").is_file()


@pytest.mark.parametrize("flags, message", [
    (["--prompts", "1"], "1 must lie between 2"), (["--checkpoint", "nowhere"], "nowhere is missing"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--tagger", "."], "tagger.safetensors is missing"),
    (["--judge", "nowhere"], "nowhere is missing"), (["--clips", "."], "[.] holds 0 sounds for 8 prompts")])
def test_wrong_input_is_one_line(place, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    refused(message, run, place, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_reward_is_fooled_only_where_the_judge_surely_fell():
    wobble = np.tile([1.0, -1.02], 32)                              # its mean's interval holds 0
    before = {"reward": np.zeros(64), "judge": np.zeros(64)}
    for judge, said in ((wobble, False), (wobble - 1, True), (wobble + 1, False)):
        assert evaluate.fooled(before, {"reward": wobble + 2, "judge": judge}) == said
        assert not evaluate.fooled(before, {"reward": wobble, "judge": judge})      # nor surely better by the reward
