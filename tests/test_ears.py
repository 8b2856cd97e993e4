"""The ears: readings of hand-made arrays, files, hearing in batches, scores against the truth."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused, tiny_tagger

from lib.common import BASE, generator
from world import ears
from world.ears import Heard, related, scores, tally_all
from world.scenes import Scene, SceneEvent

EVENTS, COUNTABLE = ["hum", "click", "whistle"], ["click"]


def block(*spans, frames=64):
    """Activity (frames,) that is 0.9 in each [start, stop) of `spans` and 0.02 elsewhere."""
    values = np.full(frames, 0.02)
    for start, stop in spans:
        values[start:stop] = 0.9
    return values


def struck(*frames, doubt=0.0, length=128):
    """Strike rate (length, 1) with one strike at each frame, shared with the next; less `doubt`."""
    rate = np.full((length, 1), 0.01)
    for frame in frames:
        rate[frame:frame + 2, 0] += (1 - doubt) / 2
    return rate


def read(columns, presence, rate=struck(), threshold=0.5):
    tagger = SimpleNamespace(events=EVENTS, countable=COUNTABLE, thresholds=[threshold] * 3, strike_threshold=0.4)
    return ears.read_scene(tagger, np.stack(columns, 1), np.array(presence), rate)


def test_order_and_together_are_read():
    reading = read([block((30, 60)), block((0, 28)), block()], [0.9, 0.8, 0.1], struck(0, 20, 40))
    assert list(reading) == ["click", "hum"]
    click, hum = reading.values()
    assert click.count == 3 and hum.count is None
    assert (click.onset, click.offset) == pytest.approx((0, 28 * 0.064), abs=0.065)
    assert hum.onset == pytest.approx(30 * 0.064, abs=0.065)
    assert related(click, hum, "then") and not related(hum, click, "then")
    assert not related(click, hum, "and")
    reading = read([block((0, 40)), block((3, 40)), block()], [0.9, 0.9, 0.1], struck(3))
    for first, second in (("hum", "click"), ("click", "hum")):
        assert related(reading[first], reading[second], "and") and not related(reading[first], reading[second], "then")


def test_thresholds_decide_what_is_heard_and_gaps_do_not_end_it():
    columns = [block((0, 10))] * 3
    assert read(columns, [0.4, 0.3, 0.2]) == {}
    assert read(columns, [0.4, 0.3, 0.2], threshold=0.35).keys() == {"hum"}
    onset, offset = ears.interval(block((10, 14), (20, 24), (30, 34)))
    assert onset <= 10 * 0.064 and offset >= 34 * 0.064


@pytest.mark.parametrize("frames, doubt", [((), 0), ((0,), 0.3), ((5, 10), 0.5), ((0, 5, 10, 126), 0.1),
                                           (range(0, 30, 5), 0.0)])
def test_strikes_are_counted(frames, doubt):
    """Strikes 0.16 s apart are two, doubt does not make them fewer, the clip's edges count too."""
    rate = struck(*frames, doubt=doubt)
    assert ears.strike_times(rate[:, 0], 0.4) == pytest.approx(np.array(frames) * 0.032, abs=0.033)
    reading = read([block(), block((0, 20)), block()], [0, 0.9, 0], rate)
    assert reading["click"].count == max(1, len(frames))


def test_saved_and_loaded(tmp_path, capsys):
    tagger = tiny_tagger().eval()
    tagger.thresholds = [0.3, 0.4, 0.55]
    ears.save_tagger(tmp_path / "tagger.safetensors", tagger)
    loaded = ears.load_tagger(tmp_path)
    assert "cannot hear rain, wind" in capsys.readouterr().err          # of the world's events
    assert loaded.thresholds == tagger.thresholds and loaded.events == EVENTS and not loaded.training
    mel = torch.randn(2, 80, 250, generator=generator("test")) - 3      # of any length
    activity, presence, rate = loaded(mel)
    assert (activity.shape, presence.shape, rate.shape) == ((2, 63, 3), (2, 3), (2, 126, 1)) and rate.min() >= 0
    assert torch.allclose(presence, tagger(mel)[1], atol=1e-2)          # the file is float16
    ears.load_tagger(BASE)
    assert not capsys.readouterr().err                                  # it knows all events


def test_broken_files_are_one_line_errors(tmp_path):
    torch.save({}, tmp_path / "other.safetensors")
    tagger = tiny_tagger()
    tagger.width = "wide"
    ears.save_tagger(tmp_path / "odd.safetensors", tagger)
    for path, what in ((tmp_path / "nowhere.safetensors", "missing"),
                       (tmp_path / "other.safetensors", "whole safetensors"),
                       (BASE / "vae.safetensors", "config of a tagger"),
                       (tmp_path / "odd.safetensors", "odd.safetensors cannot be used")):
        refused(what, ears.load_tagger, path)


def test_hearing_does_not_depend_on_the_batch():
    tagger = tiny_tagger().eval()
    tagger.thresholds = [0.0] * 3
    audio = torch.randn(3, 65536, generator=generator("test")) * 0.1
    for whole, alone in zip(ears.probabilities(tagger, audio), ears.probabilities(tagger, audio[1:2].numpy())):
        assert torch.allclose(whole[1:2], alone, atol=1e-5)
    assert [reading.keys() for reading in ears.hear(tagger, audio)] == [set(EVENTS)] * 3
    assert ears.features(tagger, audio).shape == (3, 24)
    refused("tagger_quality", ears.quality, tagger, audio)


def scene(relation, **counts):
    """A truth that asks for the named events in order; value None: no count is asked."""
    return Scene(0, "", relation, [SceneEvent(name, 0, 0, count) for name, count in counts.items()], 3.0)


def heard(**events):
    """heard(rain=(0, 1)) or heard(beep=(0, 1, 3)): onset, offset, count."""
    return {name: Heard(*span) for name, span in events.items()}


THEN, AND = (scene(relation, violin=None, rain=None) for relation in ("then", "and"))
THREE, BEEPS = scene("then", violin=None, rain=None, wind=None), scene("single", beep=3)


@pytest.mark.parametrize("reading, truth, f1, exact", [
    (heard(violin=(0, 1), rain=(1, 2)), THEN, 1, 1),
    (heard(rain=(0, 1), violin=(1, 2)), THEN, 1, 0),                    # the wrong order
    (heard(violin=(0, 2), rain=(0.5, 2)), THEN, 1, 0),                  # not in order but together
    (heard(violin=(0, 2), rain=(0, 2)), AND, 1, 1),
    (heard(violin=(0, 1), rain=(1, 2)), AND, 1, 0),                     # not together
    (heard(violin=(0, 1)), THEN, 2 / 3, 0),                             # a missing event
    (heard(violin=(0, 1), rain=(1, 2), wind=(0, 2)), THEN, 0.8, 0),     # one too many
    (heard(violin=(0, 1), rain=(1, 2), wind=(2, 3)), THREE, 1, 1),
    (heard(violin=(0, 1), wind=(1, 2), rain=(2, 3)), THREE, 1, 0),
    (heard(), THEN, 0, 0),
    (heard(beep=(0, 1, 3)), BEEPS, 1, 1),
    (heard(beep=(0, 1, 2)), BEEPS, 1, 0),                               # miscounted
    (heard(beep=(0, 1, 5)), scene("single", beep=None), 1, 1),          # nobody asked for a count
])
def test_one_clip(reading, truth, f1, exact):
    result = scores(tally_all([reading], [truth]))
    assert result["f1"] == pytest.approx(f1) and result["exact"] == exact


def test_sums_are_over_clips():
    """Order: over all ordered prompts, a missing event is wrong. Counts: over all asked. F1: micro."""
    readings = [heard(violin=(0, 1), rain=(1, 2)), heard(violin=(0, 1)),
                heard(violin=(0, 1), rain=(0, 1)), heard(rain=(0, 1), violin=(1, 2))]
    assert scores(tally_all(readings, [THEN, THEN, AND, THEN]))["order"] == pytest.approx(1 / 3)
    assert math.isnan(scores(tally_all(readings[:1], [AND]))["order"])
    rows = tally_all([heard(beep=(0, 1, 3)), heard(beep=(0, 1, 2)), heard()], [BEEPS] * 3)
    assert scores(rows)["count"] == pytest.approx(1 / 3)
    result = scores(tally_all([heard(violin=(0, 1), rain=(1, 2)), heard(wind=(0, 1))], [THEN, BEEPS]))
    assert result["precision"] == result["recall"] == result["f1"] == pytest.approx(2 / 3)
