"""Training of the ears: truth and augmentation, thresholds, exact resume, and that they learn."""
import json
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refused, tiny_tagger
from test_train_fm import stop_in_step

from lib.common import UserError, generator, read_jsonl
from lib.weights import make_optimizer
from world import train_ears
from world.ears import FILES, MEL_FLOOR, load_tagger, quality, strike_times
from world.scenes import Scene, SceneEvent
from world.sounds import COUNTABLE, EVENT_NAMES


def toy_scenes(number=96, frames=56):
    """Log-mels of "hum" (low bands), "click" (all bands, 4 frames, 1 to 3 times) or both, with their truth."""
    random = np.random.default_rng(0)
    mel = random.normal(-4, 0.3, (number, 80, 4 * frames))
    activity, rate = np.zeros((number, frames, 3)), np.zeros((number, 2 * frames, 1))
    for i in range(number):
        if i % 3 != 1:
            start = random.integers(0, 20)
            mel[i, :20, 4 * start:4 * start + 100] += 3
            activity[i, start:start + 25, 0] = 1
        if i % 3 != 0:
            for start in range(20, 20 + 10 * random.integers(1, 4), 10):
                mel[i, 30:, 4 * start:4 * start + 4] += 3
                activity[i, start, 1], rate[i, 2 * start, 0] = 1, 1
    return [torch.from_numpy(part.astype(np.float16)) for part in (mel, activity, rate)]


def fit(tagger, clips, out, steps, batch_size, rate=3e-3, killed_at=None):
    training = train_ears.Training(0, steps, batch_size, rate)
    optimizer = make_optimizer(dict(tagger.named_parameters()), (0.9, 0.98), 0.05)

    def loss_of(step):
        if step == killed_at:
            raise KeyboardInterrupt
        return train_ears.batch_loss(tagger, clips, training, nullcontext, step)
    rate_of = partial(train_ears.tagger_rate, training)
    train_ears.fit(out, "model.safetensors", tagger, optimizer, training, loss_of, rate_of, 2.0)


def test_thresholds_take_the_middle_of_the_best_and_maximise_right_counts():
    presence, truth = np.array([[0.9], [0.8], [0.2], [0.1]]), np.array([[True], [True], [False], [False]])
    assert train_ears.best_thresholds(presence, truth) == pytest.approx([0.505], abs=0.02)
    rate = np.full((2, 128, 1), 0.01)
    rate[0, [10, 11, 30, 31]] += 0.2                            # two strikes of which 0.6 is missing, and
    rate[1, [50, 51]] += 0.225
    rate[:, 100] += 0.2                                         # a false one, to be passed over
    threshold = train_ears.best_strike_threshold(rate, np.array([[2], [1]]))
    assert [len(strike_times(curve[:, 0], threshold)) for curve in rate] == [2, 1]


def test_targets_hold_the_count_and_the_span():
    scene = Scene(0, "", "and", [SceneEvent("beep", 0.5, 2.0, 3, 3, [0.5, 1.0, 1.5]),
                                 SceneEvent("knock", 3.9, 4.0, None, 1, [3.9])], 4.0)
    activity, rate = train_ears.targets(scene)
    k, q = EVENT_NAMES.index("beep"), COUNTABLE.index("beep")
    assert activity[:, k].sum() * 0.064 == pytest.approx(1.5, abs=0.01) and np.count_nonzero(activity.max(0)) == 2
    assert rate.sum() == pytest.approx(4, abs=0.01) and abs(np.argmax(rate[:, q]) * 0.032 - 0.5) < 0.04
    faster, slower = train_ears.targets(scene, 2.0)[1], train_ears.targets(scene, 0.9)[1]
    assert abs(np.flatnonzero(faster[:, q])[0] * 0.032 - 0.25) < 0.04 and faster.sum() == pytest.approx(4, abs=0.01)
    assert slower.sum() == pytest.approx(3, abs=0.01)           # the knock would sound after the end


def test_augmentation_moves_truth_with_sound():
    mel = torch.full((16, 80, 256), MEL_FLOOR)
    mel[:, :, 40:80] = 0.0
    activity, rate = torch.zeros(16, 64, 3), torch.zeros(16, 128, 1)
    activity[:, 10:20], rate[:, 20] = 1, 1
    moved, active, strikes = train_ears.augment(mel, activity, rate, generator("test"))
    assert moved.shape == mel.shape and moved.min() >= MEL_FLOOR and mel.max() == 0
    loud = moved.median(1).values > -2.5                        # (B, F)
    for row in range(16):
        first, truth = loud[row].float().argmax() / 4, active[row, :, 0].argmax()
        assert abs(first - truth) <= 1 and strikes[row].argmax() == 2 * truth and strikes[row].sum() == 1


def test_batches_are_epochs_without_repeats_and_need_no_strikes():
    drawn = torch.cat([train_ears.batch_indices(3, step, 20, 5) for step in range(4)])
    assert sorted(drawn.tolist()) == list(range(20))
    assert not torch.equal(train_ears.batch_indices(3, 0, 20, 5), train_ears.batch_indices(3, 4, 20, 5))
    mel, activity, rate = (part.float() for part in toy_scenes(6))                    # learned where there are some:
    assert train_ears.tagger_loss(tiny_tagger()(mel), activity, rate, torch.zeros(6, 1))["strikes"] == 0


def test_a_killed_run_goes_on_exactly(tmp_path, monkeypatch):
    scenes, state = toy_scenes(8), tmp_path / "parts" / "state.pt"
    whole, parts, again = tiny_tagger(), tiny_tagger(), tiny_tagger(seed=1)
    monkeypatch.setattr(train_ears, "EVERY", 2)
    fit(whole, scenes, tmp_path / "whole", 5, 2)
    with pytest.raises(KeyboardInterrupt):
        fit(parts, scenes, tmp_path / "parts", 5, 2, killed_at=3)
    refused("started with batch_size = 2, now it is 4", fit, tiny_tagger(), scenes, tmp_path / "parts", 5, 4)
    fit(again, scenes, tmp_path / "parts", 5, 2)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert read_jsonl(tmp_path / "whole" / "log.jsonl") == read_jsonl(tmp_path / "parts" / "log.jsonl")
    stop_in_step(monkeypatch, train_ears, 3, lambda: fit(tiny_tagger(), scenes, tmp_path / "signal", 5, 2))
    fit(again, scenes, tmp_path / "signal", 5, 2)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())
    state.write_bytes(b"torn")
    refused("state.pt cannot be used", fit, again, scenes, tmp_path / "parts", 5, 2)


def test_a_foreign_model_and_a_loss_that_is_not_finite_are_told_in_one_line(tmp_path):
    (tmp_path / "model.safetensors").touch()
    refused("holds a model but no state.pt", fit, tiny_tagger(), toy_scenes(8), tmp_path, 2, 2)
    mel, *truth = toy_scenes(8)
    with pytest.raises(UserError, match="step 0: the loss .* give a lower --learning_rate"):
        fit(tiny_tagger(), [mel * float("nan"), *truth], tmp_path / "out", 2, 2)
    assert not (tmp_path / "out").exists()


def test_two_events_and_their_counts_are_learned(tmp_path, monkeypatch):
    scenes, model = toy_scenes(64), tiny_tagger()
    monkeypatch.setattr(train_ears, "augment", lambda *parts: parts[:3])
    fit(model, scenes, tmp_path, 80, 12, 5e-3)
    with torch.no_grad():
        activity, presence, rate = model(scenes[0].float())
    truth = scenes[1].amax(1) > 0
    assert ((presence > 0) == truth).float().mean() > 0.95
    clicked = torch.nonzero(truth[:, 1])[:, 0]
    right = [len(strike_times(rate[i, :, 0].numpy(), 0.4)) == scenes[2][i].sum().round() for i in clicked]
    assert np.mean(right) > 0.8
    assert ((activity > 0) == (scenes[1] > 0.5)).float().mean() > 0.95


@pytest.mark.parametrize("which", ["features", "quality"])
def test_a_command_trains_an_ear_that_loads(which, tmp_path, capsys):
    train_ears.main(["--which", which, "--scenes", "16", "--val_scenes", "4", "--width", "24", "--layers", "1",
                     "--train_steps", "10", "--batch_size", "4", "--workers", "0", "--device", "cpu",
                     "--dtype", "float32", "--out", str(tmp_path)])
    assert read_jsonl(tmp_path / "log.jsonl")[-1]["step"] == 10
    told = json.loads(torch.load(tmp_path / "state.pt", weights_only=True)["settings"])
    assert (told["which"], told["scenes"], told["width"], told["dtype"]) == (which, 16, 24, "float32")
    assert (told["codec"] is None) == (which == "features")         # the hash of the one it heard
    ear = load_tagger(tmp_path / FILES[which], which)
    assert ear.width == 24
    if which == "quality":
        heard = quality(ear, torch.zeros(2, 65536))
        assert heard.shape == (2,) and ((heard >= 0) & (heard <= 1)).all()
        assert "100% through the codec" in capsys.readouterr().out
    else:
        assert ear.thresholds != [0.5] * len(EVENT_NAMES)
