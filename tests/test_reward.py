"""Ranking, pairs, static preference sets, and the script around them."""
import json

import numpy as np
import pytest
import torch
from conftest import PARITY

import reward
from audio import read_audio, write_wav
from common import UserError
from reward import best_of, make_pairs, read_pairs
from train_clap import new_clap


def test_pairs_match_the_official_choice(parity):
    fixed = parity("metrics").info["crpo_pair_selection"]
    winners, losers, kept = make_pairs(np.round(fixed["clap_scores"], 3))       # the official code ranks rounded scores
    assert winners.tolist() == fixed["chosen_index"] and losers.tolist() == fixed["rejected_index"]
    assert kept.all()


def test_clap_score_matches_the_original(parity, monkeypatch):
    arrays, fixed = np.load(PARITY / "metrics.npz"), parity("metrics").info["clap_score"]
    clap = new_clap(16, 16, 0).eval()
    for name in ("audio", "text"):                              # the towers' outputs are given, of any length
        monkeypatch.setattr(getattr(clap.clap, f"{name}_projection"), "forward",
                            lambda _, name=name: torch.from_numpy(arrays[f"clap_{name}"]))
    scores = clap.scores([torch.ones(9000)] * 6, 16000, [f"prompt {i}" for i in range(6)])
    assert scores.tolist() == pytest.approx(fixed["per_item"], abs=1e-6)
    assert scores.mean().item() == pytest.approx(fixed["mean"], abs=1e-6)


def test_best_and_worst_ties_and_nan():
    scores = [[0.1, 0.5, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2], [0.3, np.nan, 0.9, 0.1], [-1e-9, 0.0, 0.0, -1e-9]]
    winners, losers, kept = make_pairs(scores)
    assert kept.tolist() == [True, False, False, True]
    assert (winners[0], losers[0]) == (1, 3) and (winners[3], losers[3]) == (1, 0)     # the first of equals
    assert best_of(scores).tolist() == [1, 0, 2, 1]
    with pytest.raises(UserError, match="all rewards of prompt 1 are NaN"):
        best_of([[1.0, 2.0], [np.nan, np.nan]])
    with pytest.raises(UserError, match="at least 2 clips"):
        make_pairs([[1.0], [2.0]])


def test_static_sets_of_both_kinds(tmp_path):
    for name in ("a", "b", "c"):
        write_wav(tmp_path / f"{name}.wav", torch.zeros(1, 100), 16000)
    ours = tmp_path / "pairs.jsonl"
    ours.write_text("".join(json.dumps(row) + "\n" for row in (
        {"prompt": "rain", "duration": 2.0, "winner": "a.wav", "loser": "b.wav", "reward_winner": 1},
        {"prompt": "wind", "winner": "a.wav", "loser": "a.wav"},
        {"prompt": "wind", "winner": "a.wav", "loser": "x.wav"})))
    rows, notes = read_pairs(ours)
    assert rows == [{"prompt": "rain", "duration": 2.0, "winner": str(tmp_path / "a.wav"),
                     "loser": str(tmp_path / "b.wav")}]
    assert len(notes) == 2 and "1 of 3 rows left out, a sound is missing; first: row 3" in notes[0]
    assert "winner and loser are one file; first: row 2" in notes[1]
    official = tmp_path / "alpaca.json"
    official.write_text(json.dumps([{"captions": "rain", "duration": 10, "chosen": "c.wav", "reject": "b.wav"}]))
    assert read_pairs(official)[0][0]["winner"] == str(tmp_path / "c.wav")
    assert read_pairs(official, tmp_path)[0][0]["loser"] == str(tmp_path / "b.wav")
    for text, match in (("[]", "holds no pairs"), ('[{"captions": "a", "chosen": "a.wav"}]', "row 1 has no loser or"),
                        ('[{"captions": "a", "chosen": "a.wav", "reject": "b.wav", "duration": -1}]', "duration -1"),
                        ("nonsense", "not whole JSON"), ("", "not whole JSON"),
                        ('[{"captions": "a", "chosen": "a.w', "not whole JSON"),             # cut off, on one line
                        ('[\n{"captions": "a",\n "chosen": "a.w', "not whole JSON"),         # or several
                        ('{"captions": "a"}\n{"capt\n{"captions": "c"}', "line 2 is not JSON")):
        official.write_text(text)
        with pytest.raises(UserError, match=match):
            read_pairs(official)
    with pytest.raises(UserError, match="missing"):
        read_pairs(tmp_path / "none.jsonl")


def test_pairs_of_latents_are_told_with_a_remedy(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "rain", "duration": 2.0, "reward_winner": 0.5,
                                                      "winner": "candidates.safetensors#7", "reward_loser": 0.1,
                                                      "loser": "candidates.safetensors#3"}) + "\n")
    with pytest.raises(UserError, match=r"row 1: candidates.safetensors#7 is latents .* as --out") as told:
        read_pairs(tmp_path / "pairs.jsonl")
    assert "\n" not in str(told.value)


def test_score_prints_the_cosine(tmp_path, capsys):
    clap = new_clap(16, 16, 0).eval()
    clap.save(tmp_path / "clap")
    write_wav(tmp_path / "a.wav", 0.1 * torch.sin(torch.arange(20000) / 7)[None], 16000)
    audio = read_audio(tmp_path / "a.wav", 16000, 1)
    reward.main(["score", "--audio", str(tmp_path / "a.wav"), "--prompt", "rain", "--clap", str(tmp_path / "clap")])
    printed = float(capsys.readouterr().out.split("\n")[1].split()[0])
    assert printed == pytest.approx(clap.scores([audio], 16000, ["rain"]).item(), abs=1e-6)
    with pytest.raises(UserError, match="2 --prompt for 1 --audio"):
        reward.main(["score", "--audio", "a.wav", "--prompt", "rain", "--prompt", "wind"])


@pytest.mark.parametrize("flags, message", [
    (["--width", "12"], "--width must be a multiple of 8"), (["--scenes", "2"], "--scenes 2 do not fill one batch"),
    (["--batch_size", "6"], "must be a multiple of --family 4"), (["--learning_rate", "nan"], "--learning_rate is nan"),
    (["--scene_seed", "-1"], "--scene_seed is -1"), (["--family", "65"], "--family is 65")])
def test_wrong_training_flags_are_told_before_anything_is_written(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        reward.main(["train_clap", "--out", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()
