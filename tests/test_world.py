"""The built-in world: determinism, held-out pairs and clips, truth that fits the sound, degradations."""
import json

import numpy as np
import pytest

import world
from common import UserError
from world import EVENTS, SAMPLE_RATE, World


def loud_frames(audio):
    """RMS of 16 ms frames (4096 / 16,)."""
    return np.sqrt(np.mean(audio.reshape(-1, 256) ** 2, axis=1))


def test_a_scene_depends_on_seed_split_and_index_only():
    first, second = World("train", seed=3), World("train", seed=3)
    second.render(11)                                            # another order of calls changes nothing
    for index in (7, 0):
        (audio, scene), (again, same) = first.render(index), second.render(index)
        assert np.array_equal(audio, again) and scene == same
        assert scene.prompt == first.scene(index).prompt
    assert first.scene(7) != World("train", seed=4).scene(7) != World("val", seed=4).scene(7)


def test_unseen_pairs_are_enough_and_never_in_training():
    unseen = world.unseen_pairs()
    assert len(unseen) >= 40 and all(pair <= set(EVENTS) and len(pair) == 2 for pair in unseen)

    def pairs(scene):
        names = [event.name for event in scene.events]
        return {frozenset((a, b)) for a in names for b in names if a != b}
    source = World("train")
    assert not any(pairs(source.scene(index)) & unseen for index in range(1500))
    source = World("test", pairs="unseen")
    assert all(pairs(source.scene(index)) <= unseen for index in range(100))


def test_recorded_clips_are_split_by_clip_and_licensed():
    rows = [json.loads(line) for line in (world.SOUNDS / "captions.jsonl").read_text().splitlines()]
    assert len({row["audio"] for row in rows}) == len(rows)
    for name, event in EVENTS.items():
        if event.kind == "recorded":
            mine = [row for row in rows if row["event"] == name]
            assert len(mine) >= 6 and sum(row["split"] == "test" for row in mine) >= 2
            assert {row["split"] for row in mine} == {"train", "val", "test"}
    assert {row["license"] for row in rows} <= {"MIT", "CC0-1.0", "CC-BY-3.0"}
    assert all(row["attribution"] and row["caption"] for row in rows)
    size = sum(path.stat().st_size for path in world.SOUNDS.rglob("*") if path.is_file())
    assert size <= 4e6


@pytest.mark.parametrize("name", list(EVENTS))
def test_every_event_fills_its_segment(name):
    """It sounds from its first to its last tenth, and counted strikes are as many as asked."""
    count = 3 if EVENTS[name].countable else None
    wave, strikes = world.sound_event(np.random.default_rng(0), name, 24000, count, "train")
    assert wave.shape == (24000,) and np.isfinite(wave).all()
    assert (strikes is None) == (not EVENTS[name].countable)
    assert count is None or (len(strikes) == count and strikes[0] == 0)
    heard = np.flatnonzero(loud_frames(wave[:23808]) > 0.01)
    assert heard[0] <= 10 and heard[-1] >= 93 * (0.66 if count else 0.85)


def test_truth_fits_the_sound():
    source = World("test", pairs="all")
    for index in range(40):
        audio, scene = source.render(index)
        assert audio.shape == (world.CLIP_SAMPLES,) and audio.dtype == np.float32 and 0.4 < np.abs(audio).max() <= 1
        assert not audio[int(scene.duration * SAMPLE_RATE) + 1:].any()          # silence after the duration
        assert scene.events[0].onset == 0 and abs(scene.events[-1].offset - scene.duration) < 0.02
        if scene.relation == "then":
            assert all(a.offset < b.onset for a, b in zip(scene.events, scene.events[1:]))
        for event in scene.events:
            assert event.count is None or event.hits == event.count
            words = world.NUMBERS.get(event.count, "")
            assert words in scene.prompt
    prompts = " ".join(source.scene(i).prompt for i in range(300))
    assert set(prompts.replace(",", "").split()) <= set(world.known_words())


@pytest.mark.parametrize("kind", world.DEGRADATIONS)
def test_degradations_grow_with_their_level(kind):
    audio = World("val").render(5)[0]
    spoiled = [world.degrade(audio, kind, level, np.random.default_rng(1)) for level in (0.0, 0.5, 1.0)]
    assert all(np.isfinite(one).all() and np.abs(one).max() <= 1 for one in spoiled)

    def distance(one):                                          # of log spectra, blind to the level
        spectra = [np.log(np.abs(np.fft.rfft(x.reshape(-1, 512), axis=1)) + 1e-2) for x in (audio, one)]
        return np.abs(spectra[0] - spectra[1]).mean()
    near, middle, far = map(distance, spoiled)
    assert near < middle < far


def test_unknown_names_are_one_line_errors():
    with pytest.raises(UserError, match="split"):
        World("training")
    with pytest.raises(UserError, match="echo"):
        world.degrade(np.ones(100), "echo", 0.5, np.random.default_rng(0))
