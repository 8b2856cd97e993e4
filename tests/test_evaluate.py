"""Metrics on readings made by hand, and each table of evaluate.py at a very small size."""
import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_sample import make_folder

import evaluate
import melvae
import metrics
import vocoder
from conftest import PICTURES
from tagger import FILES, Heard, Reading, Tagger, save_tagger
from world import COUNTABLE, EVENT_NAMES, SAMPLE_RATE, Scene, SceneEvent, World


def scene(relation, **counts):
    """A truth that asks for the named events in order; value None: no count is asked."""
    return Scene(0, "", relation, [SceneEvent(name, 0, 0, count) for name, count in counts.items()], 3.0)


def reading(**events):
    """reading(rain=(0, 1)) or reading(beep=(0, 1, 3)): onset, offset, count."""
    return Reading({name: Heard(span[0], span[1], 0.9, span[2] if len(span) > 2 else None)
                    for name, span in events.items()})


def scored(heard, truth):
    return metrics.scores(metrics.tally_all([heard], [truth]))


# ----------------------------------------------------------------------------- metrics

THEN = scene("then", violin=None, rain=None)
AND = scene("and", violin=None, rain=None)
BEEPS = scene("single", beep=3)


@pytest.mark.parametrize("heard, truth, f1, exact", [
    (reading(violin=(0, 1), rain=(1, 2)), THEN, 1, 1),
    (reading(rain=(0, 1), violin=(1, 2)), THEN, 1, 0),               # the wrong order
    (reading(violin=(0, 2), rain=(0.5, 2)), THEN, 1, 0),             # not after each other but together
    (reading(violin=(0, 2), rain=(0, 2)), AND, 1, 1),
    (reading(violin=(0, 1), rain=(1, 2)), AND, 1, 0),                # not together
    (reading(violin=(0, 1)), THEN, 2 / 3, 0),                        # a missing event
    (reading(violin=(0, 1), rain=(1, 2), wind=(0, 2)), THEN, 0.8, 0),  # one too many
    (reading(), THEN, 0, 0),
    (reading(beep=(0, 1, 3)), BEEPS, 1, 1),
    (reading(beep=(0, 1, 2)), BEEPS, 1, 0),                          # miscounted
    (reading(beep=(0, 1, 5)), scene("single", beep=None), 1, 1),     # nobody asked for a count
])
def test_one_clip(heard, truth, f1, exact):
    result = scored(heard, truth)
    assert result["f1"] == pytest.approx(f1)
    assert result["exact"] == exact


def test_order_is_over_all_ordered_prompts():
    """A missing event is wrong, and prompts without an order do not count."""
    rows = metrics.tally_all([reading(violin=(0, 1), rain=(1, 2)), reading(violin=(0, 1)),
                              reading(violin=(0, 1), rain=(0, 1)),
                              reading(rain=(0, 1), violin=(1, 2))], [THEN, THEN, AND, THEN])
    assert metrics.scores(rows)["order"] == pytest.approx(1 / 3)
    assert math.isnan(scored(reading(), AND)["order"])


def test_three_in_order():
    truth = scene("then", violin=None, rain=None, wind=None)
    assert scored(reading(violin=(0, 1), rain=(1, 2), wind=(2, 3)), truth)["exact"] == 1
    assert scored(reading(violin=(0, 1), wind=(1, 2), rain=(2, 3)), truth)["order"] == 0


def test_count_is_over_all_asked_counts():
    rows = metrics.tally_all([reading(beep=(0, 1, 3)), reading(beep=(0, 1, 2)), reading()], [BEEPS] * 3)
    assert metrics.scores(rows)["count"] == pytest.approx(1 / 3)


def test_event_f1_is_micro():
    """Two events right in one clip and none in another: sums over clips, not the mean of clips."""
    rows = metrics.tally_all([reading(violin=(0, 1), rain=(1, 2)), reading(wind=(0, 1))], [THEN, BEEPS])
    result = metrics.scores(rows)
    assert result["precision"] == result["recall"] == result["f1"] == pytest.approx(2 / 3)


def test_scores_of_stacked_rows_equal_single_ones():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 3, (4, 10, len(metrics.COLUMNS))) + 1
    together = metrics.scores(rows)
    assert all(together[name][2] == pytest.approx(value) for name, value in metrics.scores(rows[2]).items())


def test_bootstrap_covers_and_is_seeded():
    rng = np.random.default_rng(0)
    heard = [reading(beep=(0, 1, 3 if right else 2)) for right in rng.random(200) < 0.7]
    rows = metrics.tally_all(heard, [BEEPS] * 200)
    low, high = metrics.bootstrap(rows, draws=300)["exact"]
    value = metrics.scores(rows)["exact"]
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(value * (1 - value) / 200), rel=0.25)
    assert metrics.bootstrap(rows, draws=50, seed=1)["f1"] == metrics.bootstrap(rows, draws=50, seed=1)["f1"]
    repeated = np.stack([rows] * 3, axis=1)  # the same sample three times says nothing new
    assert metrics.bootstrap(repeated, draws=300)["exact"] == pytest.approx((low, high))


def test_match_prefers_the_better_reading():
    order = [reading(), reading(violin=(0, 1)), reading(rain=(0, 1), violin=(1, 2)),
             reading(violin=(0, 1), rain=(1, 2))]
    values = [metrics.match(heard, THEN) for heard in order]
    assert values == sorted(values) and len(set(values)) == 4


@pytest.mark.parametrize("number", [2, 3, 50])
def test_derangement(number):
    partner = metrics.derangement(number, 0)
    assert sorted(partner) == list(range(number)) and all(partner != np.arange(number))


def test_sounding_length():
    clip = np.zeros(65536)
    assert metrics.sounding_length(clip, SAMPLE_RATE) == 0
    clip[1600:32000] = 0.5
    clip[40000] = 1e-3  # a click over 60 dB below
    assert metrics.sounding_length(clip, SAMPLE_RATE) == pytest.approx(2.0)
    clip[48000:48320] = 0.02  # 28 dB below the loudest frame
    assert metrics.sounding_length(clip, SAMPLE_RATE) == pytest.approx(3.02)
    assert metrics.sounding_length(clip, SAMPLE_RATE, -20) == pytest.approx(2.0)


def test_spearman_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (2, 40))
    assert metrics.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
    assert metrics.spearman(a, np.exp(a / 3)) == pytest.approx(1)
    assert math.isnan(metrics.spearman(a, np.zeros(40)))


def test_ridge_recovers_a_line():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 3)) * [1, 10, 0.1] + [0, 5, 1]
    targets = features @ [0.5, -0.2, 3.0] + 1
    assert np.allclose(metrics.fit_ridge(features, targets, 1e-9)(features[:5]), targets[:5], atol=1e-5)


def test_world_scenes_read_perfectly_score_one():
    """The truth of the world, taken as a reading, is exact: the metrics and the world speak of the same
    things.
    """
    truths = [World("test", pairs="all").scene(index) for index in range(60)]
    heard = [Reading({e.name: Heard(e.onset, e.offset, 1.0, e.count) for e in truth.events}) for truth in truths]
    result = metrics.scores(metrics.tally_all(heard, truths))
    assert result["f1"] == result["order"] == result["count"] == result["exact"] == 1


# ----------------------------------------------------------------------------- tables

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model that makes 4.096 s, with two random taggers."""
    path = make_folder(tmp_path_factory.mktemp("model") / "toy", frames=64)
    for width, name in zip((48, 24), FILES.values()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            save_tagger(path / name, Tagger(EVENT_NAMES, COUNTABLE, width, layers=1))
    return path


SMALL = {"scenes": ["--prompts", "3", "--seeds", "2", "--steps", "1"],
         "gate": ["--prompts", "2", "--candidates", "2", "--steps", "1"],
         "codec": ["--prompts", "3", "--fit_scenes", "8"],
         "duration": ["--clips", "2", "--durations", "1", "2", "--steps", "1"],
         "steps": ["--prompts", "2", "--grid", "1", "2"],
         "text": ["--prompts", "3", "--levels", "0.5", "1", "--batch_size", "2"]}


@pytest.fixture(autouse=True)
def quick_vocoder(monkeypatch):
    """Two rounds of the vocoder instead of sixteen: these tests look at the plumbing, not at the sound."""
    quick = partial(vocoder.griffin_lim, iterations=2, mel_steps=2)
    monkeypatch.setattr(melvae, "griffin_lim", quick)
    monkeypatch.setattr(evaluate, "griffin_lim", quick)


def run(folder, where, command):
    evaluate.main([command, *SMALL[command], "--checkpoint", str(folder), "--tagger", str(folder), "--device", "cpu",
                   "--out", str(where / "results"), "--cache", str(where / "cache")])


@pytest.mark.parametrize("command", SMALL)
def test_each_table(folder, tmp_path, monkeypatch, capsys, command):
    run(folder, tmp_path, command)
    report = (tmp_path / "results" / f"{command}.md").read_text()
    assert report.count("|") > 20 and "python evaluate.py" in report
    numbers = json.loads((tmp_path / "results" / f"{command}.json").read_text())
    assert numbers["settings"]["command"] == command and len(numbers) > 1
    assert (tmp_path / "results" / f"{command}.png").exists() == (PICTURES and command in ("duration", "steps"))
    assert "next:" in capsys.readouterr().out

    def generate(*_, **__):
        raise AssertionError("sampled again, though all latents are there")
    if command != "codec":  # a second run reads the latents back and reports the same
        monkeypatch.setattr(evaluate, "generate", generate)
        run(folder, tmp_path, command)
        assert (tmp_path / "results" / f"{command}.md").read_text() == report


def test_exchanged_sounds():
    beeps, wind = SceneEvent("beep", 0, 1, count=2), SceneEvent("wind", 1, 2)
    asked = Scene(0, "first two beeps, then howling wind", "then", [beeps, wind], 2.0)
    assert evaluate.exchanged(asked) == "first howling wind, then two beeps"
    world = World("val", pairs="all", relations=(0, 0, 1, 0), duration=4.0)
    for truth in map(world.scene, range(100)):
        other = evaluate.exchanged(truth)
        assert other != truth.prompt and evaluate.exchanged(replace(truth, prompt=other)) == truth.prompt


def test_text_table_compares_prompts(folder, tmp_path):
    run(folder, tmp_path, "text")
    numbers = json.loads((tmp_path / "results" / "text.json").read_text())
    assert numbers["t"] == [0.5, 1.0]
    rows = [numbers[kind] for kind in ("its own", "its two sounds exchanged", "another scene's", "empty")]
    assert all(0 < value < 100 for row in rows for value in row)
    assert len({tuple(row) for row in rows}) == 4                           # four kinds of prompt, four losses


def test_other_settings_are_other_latents(folder, tmp_path):
    run(folder, tmp_path, "steps")
    assert len(list((tmp_path / "cache").glob("*"))) == 3  # Euler 1 and 2, Heun 1


@pytest.mark.parametrize("arguments, message", [
    ([], "required"), (["listen"], "listen"), (["scenes", "--prompts", "0"], "--prompts is 0"),
    (["duration", "--durations", "nan"], "--durations is nan"), (["steps", "--grid", "0"], "--grid is 0"),
    (["scenes", "--guidance_scale", "nan"], "--guidance_scale is nan"), (["scenes", "--steps", "many"], "many"),
    (["scenes", "--checkpoint", "nowhere"], "nowhere is missing"),
    (["codec", "--tagger", "."], "tagger.safetensors is missing")])
def test_wrong_input_is_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    known = arguments
    if len(arguments) > 1:
        known = arguments[:1] + ["--checkpoint", str(folder), "--device", "cpu"] + arguments[1:]
    with pytest.raises(SystemExit) as exit_info:
        evaluate.run_main(lambda: evaluate.main(known))
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
