"""Clips of known quality and the votes on them: closed forms, noise of known strength, resume, wrong input."""
import numpy as np
import pytest
import torch
from conftest import refused

from lib.common import BASE, read_json, read_jsonl, write_json
from lib.mel import MEL_16K, LogMel
from world import votes
from world.scenes import World
from world.sounds import DEGRADATIONS, degrade


LOG_MEL = LogMel(**MEL_16K)


def test_quality_is_one_when_whole_and_falls_with_the_level():
    audio = World("val").render(3)[0]
    clean = torch.from_numpy(audio)[None]
    assert votes.true_quality(clean, clean, LOG_MEL).item() == 1
    for kind in DEGRADATIONS:
        takes = [degrade(audio, kind, level, np.random.default_rng(0)) for level in (0.1, 0.5, 0.95)]
        levels = [votes.true_quality(clean, torch.from_numpy(take)[None], LOG_MEL).item() for take in takes]
        assert 1 > levels[0] > levels[1] > levels[2] > 0, kind


def test_takes_depend_on_their_place_alone_and_a_hum_leaves_the_quality():
    world = {"split": "train", "seed": 5000}
    (audio, rows), (again, _), (hummed, others) = (
        votes.render_block(world, *more, [4]) for more in ((3, 0.0), (2, 0.0), (3, 1.0)))
    assert np.array_equal(audio[:2], again) and not np.array_equal(audio[0], audio[1])
    assert [row["quality"] for row in others] == [row["quality"] for row in rows]
    assert all(row["hum"] == 1 for row in others) and not np.allclose(hummed, audio)
    spectrum = np.abs(np.fft.rfft(hummed[0]))
    assert spectrum[round(240 * 65536 / 16000)] > 5 * np.median(spectrum)


def test_votes_have_the_noise_they_say():
    rng = np.random.default_rng(0)
    clips = [{"audio": f"{i}.wav", "caption": f"prompt {i // 2}", "scene": i // 2, "quality": rng.random(),
              "degradation": "noise", "level": 0.0} for i in range(400)]
    cast = votes.cast_votes(clips, 20000, 1)
    assert cast == votes.cast_votes(clips, 20000, 1)
    decided = [(vote["chance"], vote["preference"]) for vote in cast if vote["preference"] != 0.5]
    chance, told = np.array(decided).T
    for low in np.arange(0, 1, 0.2):
        inside = (chance >= low) & (chance < low + 0.2)
        assert told[inside].mean() == pytest.approx(chance[inside].mean(), abs=0.03)
    best = np.maximum(chance, 1 - chance).mean()
    assert ((chance > 0.5) == (told == 1)).mean() == pytest.approx(best, abs=0.01) and 0.7 < best < 0.9
    assert 0.02 < 1 - len(decided) / len(cast) < 0.15
    assert {vote["source"] for vote in cast} == set(votes.SOURCES)
    for vote in cast[:200]:
        assert ("prompt_b" in vote) <= (not votes.SOURCES[vote["source"]].one_prompt)
    refused("at least 2 --takes", votes.cast_votes, clips[:1], 10, 0)


def test_a_killed_command_goes_on_and_other_settings_are_refused(tmp_path, capsys, monkeypatch):
    flags = ["--scenes", "20", "--takes", "2", "--votes", "400", "--through_codec", "0.3", "--codec", str(BASE),
             "--out", str(tmp_path), "--workers", "0", "--device", "cpu"]
    votes.main(flags)
    assert "train_ranker" in capsys.readouterr().out.splitlines()[-1]
    rows = read_jsonl(tmp_path / "clips.jsonl")
    assert len(rows) == 40 and 0 < sum(row["coded"] for row in rows) < 40
    assert len(read_jsonl(tmp_path / "votes.jsonl")) == 400
    assert all((tmp_path / row["audio"]).is_file() for row in rows)
    before = (tmp_path / "clips.jsonl").read_text()
    torn = before.splitlines()[:37] + ['{"audio": "cl']                                    # as a kill leaves it
    (tmp_path / "clips.jsonl").write_text("\n".join(torn))
    votes.main(flags)
    assert (tmp_path / "clips.jsonl").read_text() == before
    refused("started with takes = 2, now it is 3", votes.main, [*flags, "--takes", "3"])
    with monkeypatch.context() as patch:
        codec = votes.load_codec(BASE)
        next(codec.parameters()).data.mul_(1.5)
        patch.setattr(votes, "load_codec", lambda *_: codec)
        refused("started with codec = ", votes.main, flags)
    settings = read_json(tmp_path / "settings.json")
    del settings["codec"]                                           # of an older version: goes on
    write_json(tmp_path / "settings.json", settings)
    votes.main(flags)
    assert (tmp_path / "clips.jsonl").read_text() == before


def test_without_the_codec_another_one_is_no_matter(tmp_path, monkeypatch):
    flags = ["--scenes", "2", "--takes", "2", "--votes", "9", "--through_codec", "0", "--out", str(tmp_path), "--workers", "0"]
    votes.main(flags)
    codec = votes.load_codec(BASE)
    next(codec.parameters()).data.mul_(1.5)
    monkeypatch.setattr(votes, "load_codec", lambda *_: codec)
    votes.main(flags)
