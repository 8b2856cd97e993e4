"""CLAP: the front end and the network against the originals, saving, and the world's training of it."""
import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import relative_error

import train_clap
from audio import resample
from clap import POSITIONS, FrontEnd, build, load_clap
from common import UserError, generator, load_tensors, read_jsonl
from weights import Weights, load_weights
from world import EVENTS, World, perform


def small(seed=0):
    """A Clap as small as the layout allows, random weights."""
    return train_clap.new_clap(16, 16, seed)


# ----------------------------------------------------------------------------- front end

FIXTURE = dict(feature_size=64, sampling_rate=48000, hop_length=480, fft_window_size=1024, frequency_min=50,
               frequency_max=14000, padding="repeatpad")


@pytest.mark.parametrize("name", ["short", "exact"])
def test_log_mel_matches_both_original_pipelines(parity, name):
    tensors = parity("clap").load("clap_tiny_tensors")
    length = parity("clap").info["frontend_max_length_used_here"]
    audio = tensors[f"frontend.{name}.audio"]
    for truncation, reference in (("rand_trunc", "transformers_rand_trunc"),
                                  ("rand_trunc", "laion_unfused_logmel_no_quantisation"),
                                  ("fusion", "transformers_fusion_first_of_4")):
        front = FrontEnd(**FIXTURE, max_length_s=length / 48000, truncation=truncation)
        mel, longer = front([audio])
        assert mel.shape[1] == (4 if truncation == "fusion" else 1) and not longer.any()
        assert (mel[0, 0] - tensors[f"frontend.{name}.{reference}"]).abs().max() < 1e-3, reference      # dB


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
def test_front_end_equals_the_feature_extractor_at_every_length(truncation, padding):
    from transformers import ClapFeatureExtractor
    settings = {**FIXTURE, "max_length_s": 1, "truncation": truncation, "padding": padding}
    extractor, front = ClapFeatureExtractor(**settings), FrontEnd(**settings)
    for samples in (700, 20000, 24000, 48000, 48100, 100000):
        audio = 0.3 * torch.randn(samples, generator=generator(samples))
        np.random.seed(samples)                           # transformers draws its crops from the global state
        theirs = extractor([audio.numpy()], sampling_rate=48000, return_tensors="pt")
        ours, longer = front([audio], np.random.RandomState(samples))
        assert ours.shape == theirs["input_features"].shape
        assert (ours - theirs["input_features"]).abs().max() < 1e-3, samples
        # 48100 has as many frames as 48000: not longer. Of clips that aren't, transformers marks a random one
        assert longer[0, 0] == (samples > 48480 or (samples > 48000 and truncation == "rand_trunc"))
    middle = front([torch.arange(100000) / 1e5])[0]
    assert torch.equal(middle, front([torch.arange(100000) / 1e5])[0])             # nothing random by default


def test_a_batch_of_unequal_clips_equals_each_alone():
    front = FrontEnd(**FIXTURE, max_length_s=1, truncation="fusion")
    clips = [0.1 * torch.randn(n, generator=generator(n)) for n in (9000, 60000, 48000, 30000)]
    together, longer = front(clips)
    for i, clip in enumerate(clips):
        assert torch.equal(together[i], front([clip])[0][0]) and longer[i, 0] == (len(clip) > 48000)


def test_ten_seconds_of_the_official_rate_are_heard_whole():
    """TangoFlux's 441,000 samples are 480,000 at CLAP's rate, what it hears: nothing is cut, fused or not."""
    audio = 0.1 * torch.randn(441000, generator=generator(0))
    for truncation in ("rand_trunc", "fusion"):
        front = FrontEnd(truncation=truncation)
        heard = resample(audio, 44100, front.sampling_rate)
        assert len(heard) == front.samples and not front([heard])[1].any()
        assert front([torch.cat([heard, heard[:481]])])[1].all()


# ----------------------------------------------------------------------------- the network

def test_network_matches_the_original(parity):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    fixture = parity("clap")
    tensors, weights = fixture.load("clap_tiny_tensors"), fixture.load("clap_tiny")
    config = {"text_config": fixture.info["text_config"], "audio_config": fixture.info["audio_config"],
              "projection_dim": fixture.info["text_config"]["projection_dim"]}
    ours = build(config, Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), {**FIXTURE, "truncation": "rand_trunc"})
    load_weights(ours.clap, Weights.of("clap_tiny", weights), (POSITIONS,))
    ours.eval()
    with torch.no_grad():
        audio = ours.audio_features(tensors["input_features"], tensors["is_longer"].bool())
        text = ours.text_features(tensors["input_ids"], tensors["attention_mask"])
    assert relative_error(audio, tensors["audio_embeds"]) < 1e-5
    assert relative_error(text, tensors["text_embeds"]) < 1e-5
    assert relative_error(audio @ text.T, tensors["similarity_matrix_audio_by_text"]) < 1e-4
    assert relative_error((audio * text).sum(1), tensors["cosine_similarity_per_pair"]) < 1e-4


def test_saved_folder_is_read_here_and_by_transformers(tmp_path):
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel
    ours = small().eval()
    ours.save(tmp_path)
    again, theirs = load_clap(tmp_path), ClapModel.from_pretrained(tmp_path).eval()
    audio, prompts = [0.2 * torch.randn(1, 30000, generator=generator(0))], ["rain, then \U0001f600"]
    assert torch.equal(ours.scores(audio, 16000, prompts), again.scores(audio, 16000, prompts))
    mel = ClapFeatureExtractor.from_pretrained(tmp_path)([audio[0][0].numpy()], sampling_rate=16000,
                                                         return_tensors="pt")["input_features"]
    ids = AutoTokenizer.from_pretrained(tmp_path)(prompts, return_tensors="pt")
    with torch.no_grad():
        score = (theirs.get_audio_features(mel).pooler_output * theirs.get_text_features(
            ids["input_ids"], ids["attention_mask"]).pooler_output).sum()
    assert score.item() == pytest.approx(again.scores(audio, 16000, prompts).item(), abs=1e-5)


def test_scores_do_not_depend_on_the_batch_and_long_texts_are_cut():
    ours = small().eval()
    clips = [0.1 * torch.randn(n, generator=generator(n)) for n in (8000, 64000, 70000, 16000, 3000)]
    prompts = ["rain", "wind, then rain", "a violin and rain", "three beeps", "rain " * 500]
    together = ours.scores(clips, 16000, prompts, batch_size=5)
    for i in range(5):
        assert ours.scores([clips[i]], 16000, [prompts[i]]).item() == pytest.approx(together[i].item(), abs=1e-5)
    with pytest.raises(UserError, match="clip 1 is empty"):
        ours.embed_audio([clips[0], torch.zeros(0)], 16000)


def test_a_model_with_few_positions_cuts_earlier_here_and_in_transformers(tmp_path):
    from transformers import AutoTokenizer
    config = small().clap.config.to_dict()
    config["text_config"]["max_position_embeddings"] = 40
    ours = build(config, small().tokenizer, train_clap.PREPROCESSOR)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)("rain " * 500, truncation=True)["input_ids"]
    assert ours.max_tokens == load_clap(tmp_path).max_tokens == 38
    assert ours.tokenize(["rain " * 500])[0][0].tolist() == theirs and len(theirs) == 38
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 38


def test_wrong_folders_are_one_line(tmp_path):
    small().save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"truncation": "fusion"}')
    with pytest.raises(UserError, match="disagree about fusion"):
        load_clap(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights_only reader refuses"):
        load_clap(tmp_path)


# ----------------------------------------------------------------------------- training on the world

def fits(events, relation, truth):
    """Does a caption of (name, count) events in a relation hold for the scene `truth`?"""
    heard = [(event.name, event.count) for event in truth.events]
    if relation != truth.relation and len(events) > 1 or len(events) != len(heard):
        return False
    if relation != "then":
        events, heard = sorted(events, key=str), sorted(heard, key=str)
    return all(a[0] == b[0] and a[1] in (None, b[1]) for a, b in zip(events, heard))


def test_near_misses_are_never_true(monkeypatch):
    told = []
    real = train_clap.caption
    monkeypatch.setattr(train_clap, "caption", lambda rng, relation, events: (
        told.append((list(events), relation)), real(rng, relation, events))[1])
    world, kinds = World("train", pairs="all", relations=(.2, .3, .25, .25), counted=0.8), 0
    for index in range(150):
        scene, told[:] = world.scene(index), []
        misses = train_clap.near_misses(np.random.default_rng(index), scene.relation,
                                        [(event.name, event.count) for event in scene.events], 4)
        assert len(set(misses)) == 4
        for events, relation in told:
            assert not fits(events, relation, scene), (scene.prompt, events, relation)
            assert all(name in EVENTS and (count is None or EVENTS[name].counted) for name, count in events)
        kinds += len({(len(events), relation) for events, relation in told})
    assert kinds > 300                                     # more than one kind a scene


def test_heads_tell_before_from_after_from_the_start():
    for stage in small().clap.audio_model.audio_encoder.layers:
        for block in stage.blocks:
            bias = block.attention.self.relative_position_bias_table.view(15, 15, -1)      # rows, columns, heads
            assert torch.equal(bias, bias[:1].expand_as(bias))                             # the same for all pitches
            slope = bias[0, 1:] - bias[0, :-1]
            assert slope.min() < -0.5 and slope.max() > 0.5 and bias[:, 7].abs().max() == 0


def test_relatives_sound_as_their_captions_say():
    world, durations = World("train", pairs="all", counted=0.8), 0
    for index in range(100):
        scene = world.scene(index)
        near = train_clap.relative(scene, np.random.default_rng(index))
        assert train_clap.story(near) != train_clap.story(scene)
        durations += near.duration == scene.duration
        audio = perform(near, np.random.default_rng(index), "train")
        assert audio.shape == (65536,) and np.abs(audio[int(near.duration * 16000) + 1:]).max(initial=0) == 0
        for event in near.events:
            assert event.count is None or event.hits == event.count
            assert np.abs(audio[int(event.onset * 16000):int(event.offset * 16000)]).max() > 0.01
        onsets = [event.onset for event in near.events]
        assert onsets == sorted(onsets) and (near.relation == "then") == (len(set(onsets)) > 1)
    assert durations > 60


def test_a_family_is_rendered_together(tmp_path):
    settings = {"split": "val", "pairs": "all"}
    mels, scenes = train_clap.render_scenes(tmp_path / "a", settings, 8, 4, 1, chunk=1)
    again, same = train_clap.render_scenes(tmp_path / "b", settings, 8, 4, 1, chunk=2)
    assert torch.equal(mels, again) and scenes == same and mels.shape == (8, 126, 128)
    assert [scene.index for scene in scenes] == [0] * 4 + [1] * 4
    alone, single = train_clap.render_scenes(tmp_path / "c", settings, 2, 1, 1)
    assert torch.equal(alone, mels[::4]) and single == scenes[::4]


def test_contrastive_loss_closed_forms():
    eye = torch.eye(4)
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    loss, ranked = train_clap.contrastive_loss(eye, eye, -eye, 0.0, 0.0, nothing)          # all logits equal
    assert loss.item() == pytest.approx((np.log(8) + np.log(4)) / 2, rel=1e-6) and ranked == 1
    loss, ranked = train_clap.contrastive_loss(eye, eye, eye, 100.0, 100.0, nothing)       # its miss is as near
    assert loss.item() == pytest.approx(np.log(2) / 2, abs=1e-5) and ranked == 0
    twins = torch.tensor([[1.0, 0], [1.0, 0]])
    same = torch.ones(2, 2, dtype=torch.bool)
    loss, _ = train_clap.contrastive_loss(twins, twins, -twins, 50.0, 50.0, same)          # the twin is no mistake
    assert loss.item() == pytest.approx(0, abs=1e-6)


def run(out, steps, **changes):
    """Training as small as it comes, on 16 scenes in 4 families; 64 held-out ones."""
    args = dict(out=out, device="cpu", dtype="float32", scene_seed=3000, seed=0, scenes=16, val_scenes=64,
                degraded=0.0, workers=1, width=16, text_width=16, steps=steps, batch_size=16, learning_rate=2e-3,
                muon=10.0, weight_decay=0.0, reading_weight=0.1, hearing_weight=0.5, family=4, max_minutes=None,
                val_every=1000)
    return train_clap.train(argparse.Namespace(**{**args, **changes}))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """A function that gives a folder the scenes of `run`, rendered once."""
    made = tmp_path_factory.mktemp("clap")
    run(made, 1)

    def copy_to(folder):
        for name in ("scenes", "val_scenes"):
            shutil.copytree(made / name, folder / name)
        return folder
    return copy_to


def test_training_learns(rendered, tmp_path):
    assert run(rendered(tmp_path), 60)
    last = read_jsonl(tmp_path / "log.jsonl")[-1]
    assert set(last) >= {"val_captions", "val_clips", "val_recall"}
    # one batch of 16 clips and 64 near misses, each time in other words and otherwise spoiled: whoever knows nothing
    # is at (log(80) + log(16)) / 2 = 3.58 or above; six runs of other seeds and rates ended between 1.67 and 2.11
    assert last["contrast"] < 2.8
    trained, start = load_tensors(tmp_path / "model.safetensors"), small(0).clap.state_dict()
    still = [name for name, tensor in start.items() if tensor.is_floating_point()
             and torch.equal(tensor.half(), trained[name])]
    assert not [name for name in still if not name.endswith("bias") and "logit_scale" not in name]


def test_a_stopped_and_killed_run_goes_on_exactly(rendered, tmp_path, monkeypatch):
    whole, parts = rendered(tmp_path / "whole"), rendered(tmp_path / "parts")
    assert run(whole, 30, batch_size=8)
    assert not run(parts, 30, batch_size=8, max_minutes=0.0)           # one step
    real, calls = train_clap.contrastive_loss, []

    def killed(*tensors):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(*tensors)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_clap, "contrastive_loss", killed)
        run(parts, 30, batch_size=8)
    assert read_jsonl(parts / "log.jsonl")[-1]["step"] == 20           # written after the state of step 1
    assert run(parts, 30, batch_size=8)
    one, other = (load_tensors(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = ([{**row, "minutes": 0} for row in read_jsonl(folder / "log.jsonl")] for folder in (whole, parts))
    assert one == other[1:] and other[0]["step"] == 1


def test_a_run_with_other_settings_or_a_foreign_model_is_told_before_rendering(tmp_path, rendered, monkeypatch):
    run(rendered(tmp_path), 2)
    monkeypatch.setattr(train_clap, "render_scenes", lambda *_: pytest.fail("rendered"))
    for name, value in (("dtype", "bfloat16"), ("family", 2), ("steps", 3)):
        with pytest.raises(UserError, match=f"started with {name} = .*, now it is {value}"):
            run(tmp_path, **{"steps": 2, name: value})
    (tmp_path / "state.pt").unlink()
    with pytest.raises(UserError, match="holds a model but no state.pt"):
        run(tmp_path, 2)


def test_a_loss_that_is_not_finite_ends_in_one_line_and_leaves_no_model(rendered, tmp_path, monkeypatch):
    real = train_clap.contrastive_loss
    monkeypatch.setattr(train_clap, "contrastive_loss", lambda *tensors: (
        real(*tensors)[0] * float("nan"), torch.tensor(0.0)))
    with pytest.raises(UserError, match="step 0: the loss is nan, .* give a lower --learning_rate"):
        run(rendered(tmp_path), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "scenes", "val_scenes"]
    assert not read_jsonl(tmp_path / "log.jsonl")


def test_rendering_that_was_killed_is_not_taken_for_whole(tmp_path, monkeypatch):
    settings = {"split": "val", "pairs": "all"}
    train_clap.render_scenes(tmp_path, settings, 1, 1, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_clap, "write_jsonl", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train_clap.render_scenes(tmp_path, {**settings, "seed": 1}, 1, 1, 1)      # other log-mels, the old scenes.jsonl
    assert not (tmp_path / "scenes.json").exists()
