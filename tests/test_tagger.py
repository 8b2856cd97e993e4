"""The tagger: reading functions on hand-made arrays, wiring (gradients, resume, files), and that it learns."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tagger as ear
import train_tagger as school
from common import UserError, generator

EVENTS, COUNTABLE = ["hum", "click", "whistle"], ["click"]


def block(*spans, frames=64):
    """Activity (frames,) that is 0.9 in each [start, stop) of `spans` and 0.02 elsewhere."""
    values = np.full(frames, 0.02)
    for start, stop in spans:
        values[start:stop] = 0.9
    return values


def struck(*frames, doubt=0.0, length=128):
    """Strike rate (length, 1) with one strike at each frame, shared with the next; `doubt` of it is missing."""
    rate = np.full((length, 1), 0.01)
    for frame in frames:
        rate[frame:frame + 2, 0] += (1 - doubt) / 2
    return rate


def read(columns, presence, rate=struck(), thresholds=(0.5, 0.5, 0.5)):
    return ear.read_scene(np.stack(columns, 1), np.array(presence), rate, EVENTS, COUNTABLE, thresholds)


# ----------------------------------------------------------------------------- reading

def test_order_is_read():
    reading = read([block((30, 60)), block((0, 28)), block()], [0.9, 0.8, 0.1], struck(0, 20, 40))
    assert reading.names() == {"hum", "click"} and list(reading.events) == ["click", "hum"]
    click, hum = reading.events["click"], reading.events["hum"]
    assert click.count == 3 and hum.count is None and click.probability == 0.8
    assert (click.onset, click.offset) == pytest.approx((0, 28 * 0.064), abs=0.065)
    assert hum.onset == pytest.approx(30 * 0.064, abs=0.065)
    assert ear.before(click, hum) and not ear.before(hum, click) and not ear.together(click, hum)


def test_together_is_read():
    reading = read([block((0, 40)), block((3, 40)), block()], [0.9, 0.9, 0.1], struck(3))
    hum, click = reading.events["hum"], reading.events["click"]
    assert ear.together(hum, click) and ear.together(click, hum)
    assert not ear.before(hum, click) and not ear.before(click, hum)


def test_gaps_inside_an_event_do_not_end_it():
    onset, offset = ear.interval(block((10, 14), (20, 24), (30, 34)))
    assert onset <= 10 * 0.064 and offset >= 34 * 0.064


def test_missing_thresholds_and_empty():
    columns = [block((0, 10)), block((0, 10)), block((0, 10))]
    assert read(columns, [0.4, 0.3, 0.2]).events == {}
    assert read(columns, [0.4, 0.3, 0.2], thresholds=(0.35, 0.35, 0.35)).names() == {"hum"}


@pytest.mark.parametrize("frames, doubt", [((), 0), ((0,), 0.3), ((5, 10), 0.5), ((0, 5, 10, 126), 0.1),
                                           (tuple(range(0, 30, 5)), 0.0)])
def test_strikes_are_counted(frames, doubt):
    """Strikes 0.16 s apart are told apart, doubt does not make them fewer, the edges of the clip count too."""
    rate = struck(*frames, doubt=doubt)
    assert ear.strike_times(rate[:, 0], 0.4) == pytest.approx(np.array(frames) * 0.032, abs=0.033)
    reading = read([block(), block((0, 20)), block()], [0, 0.9, 0], rate)
    assert reading.events["click"].count == max(1, len(frames))


def test_overlap_is_symmetric_and_bounded():
    random = np.random.default_rng(0)
    for _ in range(50):
        a, b = (ear.Heard(start, start + length, 1.0, None)
                for start, length in zip(random.uniform(0, 3, 2), random.uniform(0.05, 1, 2)))
        assert 0 <= ear.overlap(a, b) <= 1 and ear.overlap(a, b) == ear.overlap(b, a)
        assert ear.before(a, b) + ear.before(b, a) + ear.together(a, b) <= 1


def test_thresholds_take_the_middle_of_the_best():
    truth = np.array([[1], [1], [0], [0]])
    assert school.best_thresholds(np.array([[0.9], [0.8], [0.2], [0.1]]), truth) == pytest.approx([0.505], abs=0.02)


def test_strike_threshold_maximises_right_counts():
    rate = np.stack([struck(10, 30, doubt=0.6), struck(50, doubt=0.55), struck(5, 60, 90, doubt=0.6)])
    rate[:, 100, 0] += 0.2                                      # a false strike that the threshold must pass over
    hits = np.array([[2], [1], [3]])
    threshold = school.best_strike_threshold(rate, hits)
    assert [len(ear.strike_times(curve[:, 0], threshold)) for curve in rate] == [2, 1, 3]


# ----------------------------------------------------------------------------- truth and augmentation

def test_targets_hold_the_count_and_the_span():
    event = SimpleNamespace(name="click", onset=0.5, offset=2.0, count=3, hits=3, strikes=[0.5, 1.0, 1.5])
    activity, rate, hits = school.targets(SimpleNamespace(events=[event]), EVENTS, COUNTABLE)
    assert activity.sum() * 0.064 == pytest.approx(1.5, abs=0.01) and activity[:, [0, 2]].max() == 0
    assert rate.sum() == pytest.approx(3, abs=0.01) and hits.tolist() == [3]
    assert abs(np.argmax(rate[:, 0]) * 0.032 - 0.5) < 0.04
    late = SimpleNamespace(name="click", onset=4.0, offset=4.096, count=None, hits=1, strikes=[4.095])
    assert school.targets(SimpleNamespace(events=[late]), EVENTS, COUNTABLE)[1].sum() == pytest.approx(1, abs=0.01)


def test_augmentation_moves_truth_with_sound():
    mel = torch.full((16, 80, 256), ear.MEL_FLOOR)
    mel[:, :, 40:80] = 0.0
    activity, rate = torch.zeros(16, 64, 3), torch.zeros(16, 128, 1)
    activity[:, 10:20], rate[:, 20] = 1, 1
    moved, active, struck = school.augment(mel, activity, rate, generator("test"))
    assert moved.shape == mel.shape and moved.min() >= ear.MEL_FLOOR and mel.max() == 0
    loud = moved.median(1).values > -2.5                        # (B, F)
    for row in range(16):
        first, truth = loud[row].float().argmax() / 4, active[row, :, 0].argmax()
        assert abs(first - truth) <= 1 and struck[row].argmax() == 2 * truth and struck[row].sum() == 1


# ----------------------------------------------------------------------------- wiring

def tiny(seed=0, width=24, layers=1):
    torch.manual_seed(seed)
    return ear.Tagger(EVENTS, COUNTABLE, width, layers)


def toy_scenes(number=96, frames=56):
    """Log-mels of "hum" (low bands), "click" (all bands, 4 frames, 1 to 3 times) or both, with their truth."""
    random = np.random.default_rng(0)
    mel = random.normal(-4, 0.3, (number, 80, 4 * frames))
    activity, rate = np.zeros((number, frames, 3)), np.zeros((number, 2 * frames, 1))
    hits = np.zeros((number, 1), dtype=np.int8)
    for i in range(number):
        if i % 3 != 1:
            start = random.integers(0, 20)
            mel[i, :20, 4 * start:4 * start + 100] += 3
            activity[i, start:start + 25, 0] = 1
        if i % 3 != 0:
            hits[i] = random.integers(1, 4)
            for start in range(20, 20 + 10 * hits[i, 0], 10):
                mel[i, 30:, 4 * start:4 * start + 4] += 3
                activity[i, start, 1], rate[i, 2 * start, 0] = 1, 1
    return [torch.from_numpy(part.astype(np.float16)) for part in (mel, activity, rate)] + [torch.from_numpy(hits)]


def test_shapes_and_all_parameters_learn():
    model, (mel, activity, rate, hits) = tiny(), toy_scenes(6)
    outputs = model(mel.float())
    assert [tuple(part.shape) for part in outputs] == [(6, 56, 3), (6, 3), (6, 112, 1)] and outputs[2].min() >= 0
    loss, parts = school.tagger_loss(outputs, activity.float(), rate.float(), hits)
    assert loss.item() == pytest.approx(sum(parts.values()), rel=1e-5)
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not silent
    assert model(torch.zeros(2, 80, 250))[0].shape == (2, 63, 3)  # any length


def test_unknown_hits_do_not_train_the_strikes():
    model, (mel, activity, rate, hits) = tiny(), toy_scenes(4)
    parts = school.tagger_loss(model(mel.float()), activity.float(), rate.float(), torch.full_like(hits, -1))[1]
    assert parts["strikes"] == 0


def test_batches_are_epochs_without_repeats():
    drawn = torch.cat([school.batch_indices(3, step, 20, 5) for step in range(4)])
    assert sorted(drawn.tolist()) == list(range(20))
    assert not torch.equal(school.batch_indices(3, 0, 20, 5), school.batch_indices(3, 4, 20, 5))


def test_resume_is_exact(tmp_path):
    scenes = toy_scenes(8)
    settings = dict(steps=5, batch_size=2, save_every=2)
    whole, halves = tiny(), tiny()
    assert school.fit(whole, scenes, tmp_path / "whole", **settings)
    assert not school.fit(halves, scenes, tmp_path / "halves", max_minutes=0.0, **settings)   # one step, then stop
    again = tiny(seed=1)
    assert school.fit(again, scenes, tmp_path / "halves", **settings)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
            for run in ("whole", "halves")]
    assert logs[0] == logs[1]


def test_saved_and_loaded(tmp_path):
    model = tiny().eval()
    model.thresholds = [0.3, 0.4, 0.55]
    ear.save_tagger(tmp_path / "tagger.safetensors", model, torch.float32)
    loaded = ear.load_tagger(tmp_path)
    assert loaded.config() == model.config() and not loaded.training
    mel = toy_scenes(2)[0].float()
    assert all(torch.equal(a, b) for a, b in zip(model(mel), loaded(mel)))
    ear.save_tagger(tmp_path / "tagger_features.safetensors", model)                       # float16
    assert torch.allclose(ear.load_tagger(tmp_path, "features")(mel)[1], model(mel)[1], atol=1e-2)
    with pytest.raises(UserError, match="missing"):
        ear.load_tagger(tmp_path / "nowhere.safetensors")
    torch.save({}, tmp_path / "other.safetensors")
    with pytest.raises(UserError):
        ear.load_tagger(tmp_path / "other.safetensors")


def test_hearing_does_not_depend_on_the_batch():
    model = tiny().eval()
    model.thresholds = [0.0] * 3
    audio = torch.randn(3, 65536, generator=generator("test")) * 0.1
    together, alone = ear.hear(model, audio, batch_size=3), ear.hear(model, audio.numpy(), batch_size=1)
    assert [r.names() for r in together] == [set(EVENTS)] * 3
    for a, b in zip(together, alone):
        assert all(a.events[n].probability == pytest.approx(b.events[n].probability, abs=1e-5) for n in EVENTS)
    assert ear.features(model, audio).shape == (3, 24) and ear.posteriors(model, audio).shape == (3, 3)


# ----------------------------------------------------------------------------- does it learn

def test_two_events_and_their_counts_are_learned(tmp_path):
    scenes, model = toy_scenes(), tiny()
    school.fit(model, scenes, tmp_path, steps=120, batch_size=12, learning_rate=5e-3, augmented=False)
    model.eval()
    with torch.no_grad():
        activity, presence, rate = model(scenes[0].float())
    truth = scenes[1].amax(1) > 0
    assert ((presence > 0) == truth).float().mean() > 0.97
    clicked = truth[:, 1]
    right = [len(ear.strike_times(rate[i, :, 0].numpy(), 0.4)) == scenes[3][i, 0] for i in torch.nonzero(clicked)[:, 0]]
    assert np.mean(right) > 0.9
    assert ((activity > 0) == (scenes[1] > 0.5)).float().mean() > 0.97


def test_world_scenes_render_to_training_tensors():
    pytest.importorskip("soundfile")
    import world
    settings = {"split": "val", "seed": 0, "degraded": 0.5, "pairs": "all"}
    mel, activity, rate, hits = (torch.from_numpy(part) for part in school._render((settings, range(4), 3.0)))
    assert mel.shape == (4, 80, 256) and activity.shape == (4, 64, len(world.EVENT_NAMES))
    assert torch.allclose(rate.float().sum(1), hits.float(), atol=0.02)
    for i in range(4):
        names = {event.name for event in world.World(**settings).scene(i).events}
        assert {world.EVENT_NAMES[k] for k in torch.nonzero(activity[i].amax(0))[:, 0]} == names
