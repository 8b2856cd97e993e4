"""The built-in world: determinism, splits, truth, near misses, workers, a new event."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, refused

from lib.common import UserError, read_jsonl
from world import scenes, sounds
from world.scenes import CAPTIONS, NUMBERS, World, in_workers, near_misses, relative, story, unseen_pairs
from world.sounds import EVENT_NAMES, EVENTS, SAMPLE_RATE


def pairs(scene):
    names = [event.name for event in scene.events]
    return {tuple(sorted((a, b))) for a in names for b in names if a != b}


def test_a_scene_depends_on_seed_split_and_index_only():
    first, second = World("train", seed=3), World("train", seed=3)
    second.render(11)                               # another order of calls changes nothing
    for index in (7, 0):
        (audio, scene), (again, same) = first.render(index), second.render(index)
        assert np.array_equal(audio, again) and scene == same and scene.prompt == first.scene(index).prompt
    assert first.scene(7) != World("train", seed=4).scene(7) != World("val", seed=4).scene(7)
    clips, truth = scenes.render_clips(first, [7, 0])
    assert clips.shape == (2, 65536) and np.array_equal(clips[1], audio) and truth[1] == scene


def test_unseen_pairs_are_enough_and_never_in_training():
    unseen, seen, others = set(map(tuple, scenes.unseen_pairs())), World("train"), World("test", pairs="unseen")
    assert len(unseen) >= 40 and all(set(pair) <= set(EVENTS) for pair in unseen)
    assert not any(pairs(seen.scene(index)) & unseen for index in range(1500))
    assert all(pairs(others.scene(index)) <= unseen for index in range(100))


def test_recorded_clips_are_split_by_clip_and_licensed(monkeypatch):
    rows = read_jsonl(sounds.SOUNDS / "captions.jsonl")
    assert len({row["audio"] for row in rows}) == len(rows)
    for name in (name for name in EVENTS if EVENTS[name].sound in (sounds.HELD, sounds.STRUCK)):
        splits = [row["split"] for row in rows if row["event"] == name]
        assert len(splits) >= 6 and splits.count("test") >= 2 and len(set(splits)) == 3
    assert {row["license"] for row in rows} <= {"MIT", "CC0-1.0", "CC-BY-3.0"}
    assert all(row["attribution"] and row["caption"] for row in rows)
    assert sum(path.stat().st_size for path in sounds.SOUNDS.rglob("*") if path.is_file()) <= 4e6
    monkeypatch.setitem(sounds.recorded_clips("train"), "violin", [])
    refused("no train clip of violin", sounds.sound_event, np.random.default_rng(0), "violin", 9000, None, "train")


@pytest.mark.parametrize("name", list(EVENTS))
def test_every_event_fills_its_segment(name):
    """It sounds from its first to its last tenth, and counted strikes are as many as asked."""
    count = 3 if EVENTS[name].counted else None
    wave, strikes = sounds.sound_event(np.random.default_rng(0), name, 24000, count, "train")
    assert wave.shape == (24000,) and np.isfinite(wave).all()
    assert (strikes is None) if count is None else (len(strikes) == count and strikes[0] == 0)
    frames = wave[:23808].reshape(-1, 256)                              # of 16 ms
    heard = np.flatnonzero(np.sqrt(np.mean(frames ** 2, axis=1)) > 0.01)
    assert heard[0] <= 10 and heard[-1] >= 93 * (0.66 if count else 0.85)


def test_truth_fits_the_sound():
    world = World("test", pairs="all")
    for index in range(40):
        audio, scene = world.render(index)
        assert audio.shape == (65536,) and audio.dtype == np.float32
        assert 0.4 < np.abs(audio).max() <= 1
        assert not audio[int(scene.duration * SAMPLE_RATE) + 1:].any()      # silence after that
        assert scene.events[0].onset == 0 and abs(scene.events[-1].offset - scene.duration) < 0.02
        if scene.relation == "then":
            assert all(a.offset < b.onset for a, b in zip(scene.events, scene.events[1:]))
        for event in scene.events:
            assert event.count is None or event.hits == event.count
            assert NUMBERS.get(event.count, "") in scene.prompt
    prompts = " ".join(world.scene(i).prompt for i in range(300))
    assert set(prompts.replace(",", "").split()) <= set(scenes.known_words())


def fits(events, relation, truth):
    """Is a scene of (name, count or None) true of `truth`? One that nobody counts has any count."""
    heard = truth.asked
    if relation != truth.relation and len(events) > 1 or len(events) != len(heard):
        return False
    if relation != "then":
        events, heard = sorted(events, key=str), sorted(heard, key=str)
    return all(a[0] == b[0] and a[1] in (None, b[1]) for a, b in zip(events, heard))


def test_near_misses_are_never_true():
    world = World("train", pairs="all", relations=(.2, .3, .25, .25), counted=0.8)
    kinds = set()
    for index in range(150):
        scene, rng = world.scene(index), np.random.default_rng(index)
        assert len(set(near_misses(rng, scene.relation, scene.asked, 4))) == 4
        near = [scenes.almost(rng, scene.relation, scene.asked) for _ in range(5)]
        for relation, events in near:
            assert not fits(events, relation, scene) and (relation, len(events)) in CAPTIONS
            assert all(count is None or EVENTS[name].counted for name, count in events)
        kinds |= {(index, relation, len(events)) for relation, events in near}
    assert len(kinds) > 250                                          # more than one kind a scene


def test_relatives_sound_as_their_captions_say():
    world, durations = World("train", pairs="all", counted=0.8), 0
    for index in range(60):
        scene = world.scene(index)
        near = relative(scene, np.random.default_rng(index))
        assert story(near) != story(scene)
        durations += near.duration == scene.duration
        audio = scenes.perform(near, "train", np.random.default_rng(index), None)
        assert audio.shape == (65536,) and not audio[int(near.duration * 16000) + 1:].any()
        assert all(event.count in (None, event.hits) for event in near.events)
        onsets = [event.onset for event in near.events]
        assert onsets == sorted(onsets) and (near.relation == "then") == (len(set(onsets)) > 1)
    assert durations > 36


def threads_and_prompt(index):
    import torch
    return os.getpid(), torch.get_num_threads(), World().scene(index).prompt


def failing(index):
    raise UserError(f"scene {index} is broken")


def test_workers_give_the_same_in_order():
    here, there = (list(zip(*in_workers(threads_and_prompt, range(7), workers))) for workers in (0, 2))
    assert here[2] == there[2] and set(there[1]) == {1}
    assert set(here[0]) == {os.getpid()} and os.getpid() not in there[0]
    for workers in (0, 1):
        refused("^scene 0 is broken$", list, in_workers(failing, range(3), workers))


def test_a_new_event_is_added_in_one_place(tmp_path):
    """One function and one line in world/sounds.py: prompts, words and a warning of the taggers."""
    text = (ROOT / "world" / "sounds.py").read_text()
    horn = 'EVENTS = {\n    "horn": Event(lambda rng, n: tone(440, seconds(n)), "a foghorn, a foghorn blaring"),\n'
    (tmp_path / "world").mkdir()
    (tmp_path / "world" / "sounds.py").write_text(text.replace("EVENTS = {\n", horn))
    for name in ("world/scenes.py", "world/ears.py", "lib"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = ("from world.scenes import *\nfrom world.ears import *\nfrom lib.common import BASE\n"
            "world = World('test', pairs='all')\nassert 'events' in world.settings()\n"
            "scene = next(s for s in map(world.scene, range(99)) if 'foghorn' in s.prompt)\n"
            "assert 'foghorn' in known_words()\nclips, _ = render_clips(world, [scene.index])\n"
            "reading, = hear(load_tagger(BASE), clips)\nassert 'horn' not in reading\n")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "cannot hear horn" in run.stderr and len(run.stderr.splitlines()) == 1


def test_a_counted_prompt_gets_the_seconds_that_it_fills():
    """As long as scenes of the world stretch counted strikes; all else keeps what is usual."""
    assert scenes.fitting_seconds("three beeps", 4.0) == 1.5                    # 0.5 s apart at most
    assert scenes.fitting_seconds("Three beeps followed by rain", 4.0) == 3.0   # half of it
    assert scenes.fitting_seconds("four cymbal crashes", 4.0) == 3.6
    assert scenes.fitting_seconds("beeping", 4.0) == scenes.fitting_seconds("", 4.0) == 4.0
    told = "rain", "first rain, then wind, and finally two beeps", "a bird and rain, then a violin after wind"
    assert list(map(scenes.sounds_named, told)) == [1, 3, 4]


def test_a_small_world_sounds_of_its_events_alone():
    """Of three names there are scenes of three; of names that may not meet none, which no draw could find."""
    small = World("train", only=("rain", "beep", "violin"))
    events = [{event.name for event in small.scene(index).events} for index in range(60)]
    assert set.union(*events) == {"rain", "beep", "violin"} and max(map(len, events)) == 3
    assert json.loads(json.dumps(small.settings())) == small.settings()         # a cache compares them
    weak = World("train", only=("rain", "beep", "violin"), weak=1.0)
    phrases = [phrase for name in EVENT_NAMES if name not in weak.only for phrase in EVENTS[name].names.split(", ")]
    assert not any(phrase in weak.scene(index).prompt for phrase in phrases for index in range(40))
    assert "only" in small.settings() and "only" not in World().settings()      # older caches stay valid
    refused("the world has no rein; its events: rain, wind", World, only=("rein", "beep", "violin", "rain"))
    for names in (("rain", "beep"), ("rain", "rain", "beep"), ("beep", "clock", "drip")):
        refused(f"no three of {', '.join(dict.fromkeys(names))} may meet", World, only=names)


def test_weak_captions_are_false_in_one_thing():
    """In their share; the sound and the truth stay; names that never meet in training are not said together."""
    true, weak = World("train", seed=3), World("train", seed=3, weak=0.5)
    assert "weak" not in true.settings() and weak.settings()["weak"] == 0.5     # older caches stay valid
    different = 0
    for index in range(400):
        scene, told = true.scene(index), weak.scene(index)
        assert told.events == scene.events and told.duration == scene.duration
        different += told.prompt != scene.prompt
        phrases = {name: [*EVENTS[name].names.split(", "), EVENTS[name].counted or "-"] for name in EVENT_NAMES}
        said = [name for name in EVENT_NAMES if any(phrase in told.prompt for phrase in phrases[name])]
        assert not any(set(said).issuperset(pair) for pair in unseen_pairs()) or told.prompt == scene.prompt
    assert 160 < different < 240
    assert (true.render(1)[0] == weak.render(1)[0]).all()
