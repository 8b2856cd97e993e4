"""The CLAPs' training and the reader: closed forms, families, exact resume, that they learn; bundling the parts."""
import numpy as np
import pytest
import torch
from conftest import refused, same_file

from lib.common import BASE, read_json, read_jsonl
from lib.text import make_text_encoder
from world import bundle, train_clap, train_ears
from world.reader import COLUMNS, learn_to_read, reading_targets
from world.scenes import Scene, SceneEvent, known_words

def test_contrastive_loss_closed_forms():
    eye = torch.eye(4)
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    loss = train_clap.contrastive_loss(eye, eye, -eye, 0.0, 0.0, nothing)                  # all logits equal
    assert loss.item() == pytest.approx((np.log(8) + np.log(4)) / 2, rel=1e-6)
    loss = train_clap.contrastive_loss(eye, eye, eye, 100.0, 100.0, nothing)               # its miss is as near
    assert loss.item() == pytest.approx(np.log(2) / 2, abs=1e-5)
    assert train_clap.ranked_right(eye, eye, -eye).all() and not train_clap.ranked_right(eye, eye, eye).any()
    twins = torch.tensor([[1.0, 0], [1.0, 0]])
    same = torch.ones(2, 2, dtype=torch.bool)
    loss = train_clap.contrastive_loss(twins, twins, -twins, 50.0, 50.0, same)             # the twin is no mistake
    assert loss.item() == pytest.approx(0, abs=1e-6)


def run(out, steps, **changes):
    """Training as small as it comes, on 16 scenes in 4 families; 64 held-out ones."""
    training = train_clap.Training(
        seed=0, scenes=16, family=4, degraded=0.0, width=16, text_width=16, train_steps=steps,
        batch_size=16, learning_rate=2e-3, weight_decay=0.0, muon=10.0, reading_weight=0.1, hearing_weight=0.5,
        dtype="float32")
    train_clap.train(training._replace(**changes), out, 64, 0, torch.device("cpu"))


def test_a_family_is_rendered_together():
    mels, scenes = train_clap.render_scenes({"split": "val"}, 9, 4, 0)
    assert mels.shape == (8, 126, 128) and [scene.index for scene in scenes] == [0] * 4 + [1] * 4
    alone, single = train_clap.render_scenes({"split": "val"}, 2, 1, 0)
    assert torch.equal(alone, mels[::4]) and single == scenes[::4]


def test_training_learns(tmp_path):
    run(tmp_path, 25)                       # whoever knows nothing is at (log(80) + log(16)) / 2 = 3.58 or above
    assert read_jsonl(tmp_path / "log.jsonl")[-1]["contrast"] < 3.3


def test_a_killed_run_goes_on_exactly_and_with_its_own_settings(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    monkeypatch.setattr(train_ears, "EVERY", 4)
    run(whole, 10, batch_size=8)
    real = train_clap.batch_loss

    def killed(*arguments):
        if arguments[-1] == 6:
            raise KeyboardInterrupt
        return real(*arguments)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_clap, "batch_loss", killed)
        run(parts, 10, batch_size=8)
    for more, what in (({"dtype": "bfloat16"}, "dtype = float32, now it is bfloat16"), ({"family": 2}, "family = 4")):
        refused("started with " + what, run, parts, 10, batch_size=8, **more)
    run(parts, 10, batch_size=8)
    assert all(same_file(whole / name, parts / name) for name in ("model.safetensors", "log.jsonl"))


@pytest.mark.parametrize("flags, message", [
    (["--width", "10"], "config.* cannot be used: The hidden size"), (["--scenes", "2"], "--scenes 2"),
    (["--batch_size", "6"], "must be a multiple of --family 4"), (["--learning_rate", "nan"], "must lie between")])
def test_wrong_flags_are_told_before_anything_is_written(flags, message, tmp_path):
    refused(message, train_clap.main, ["--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_reading_targets_say_place_and_count():
    scenes = [Scene(0, "", "then", [SceneEvent("violin", 0, 1), SceneEvent("beep", 1, 2, count=3)], 2.0),
              Scene(1, "", "and", [SceneEvent("violin", 0, 2), SceneEvent("rain", 0, 2)], 2.0),
              Scene(2, "", "single", [SceneEvent("rain", 0, 2)], 2.0)]
    said = [{COLUMNS[i] for i in row.nonzero()[:, 0]} for row in reading_targets(scenes)]
    assert said == [{("first", "violin"), ("second", "beep"), (3, "beep")},
                    {("together", "violin"), ("together", "rain")}, {("first", "rain")}]


def test_an_encoder_learns_to_read():
    encoder = make_text_encoder(known_words())
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert learn_to_read(encoder, steps=100) > 0.02             # 0.08; 1.0 after 4000 steps
    assert torch.equal(state, torch.get_rng_state())
    assert not [name for name, tensor in encoder.state_dict().items() if torch.equal(before[name], tensor)]


def test_parts_are_bundled_as_in_the_bundled_model(tmp_path):
    flags = ["--tagger", str(BASE), "--tagger_quality", str(BASE), "--clap_reward", str(BASE / "clap_reward")]
    bundle.main(["--flow", str(BASE), "--out", str(tmp_path / "base"), *flags])
    bundle.main(["--flow", str(BASE), "--parts_of", "../base", "--out", str(tmp_path / "aligned")])
    for name in ("tangoflux", "vae", "tagger", "tagger_quality", "clap_reward/model", "text_encoder/model"):
        assert same_file(BASE / f"{name}.safetensors", tmp_path / "base" / f"{name}.safetensors"), name
    assert {path.name for path in (tmp_path / "aligned").iterdir()} == {"config.json", "tangoflux.safetensors"}
    config = read_json(tmp_path / "aligned" / "config.json")
    assert config["references"] == {"vae": "../base", "text_encoder": "../base"}
