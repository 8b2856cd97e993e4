"""Expert iteration and stage 3: the blend, the files, the same files after kills, and entries of reproduce.py."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PICTURES, ROOT
from test_ranker import sounds  # noqa: F401  (a fixture)

import crpo
import expert_iteration
import reproduce
import reward
import train_fm
from common import UserError, load_tensors, read_json, read_jsonl
from expert_iteration import best_places, z_blend
from model import load_model


def test_the_blend_weighs_both_alike_and_keeps_the_best():
    reward_scores, clap = np.array([1.0, 2, 3, 4]), np.array([100.0, 290, 300, 0])
    blend = z_blend(reward_scores, clap)
    assert blend == pytest.approx(z_blend(reward_scores * 7 - 3, clap / 50))            # units do not count
    assert blend.mean() == pytest.approx(0) and z_blend(reward_scores, np.ones(4)) == pytest.approx(
        (reward_scores - 2.5) / reward_scores.std())
    assert best_places(blend, 1).tolist() == [2] and best_places(blend, 0.5).tolist() == [2, 1]
    assert len(best_places(np.arange(600.0), 64)) == 64 and len(best_places(np.arange(600.0), 0.1)) == 60
    assert best_places(np.zeros(5), 0.01).tolist() == [0]
    with pytest.raises(UserError, match="a reward is NaN"):
        z_blend(np.array([1.0, np.nan]))


@pytest.fixture(scope="module")
def chain(sounds):  # noqa: F811
    """A scored manifest and a tiny flow of stage 1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                # the same arithmetic as in the processes that are killed
    reward.main(["score_manifest", "--data", str(sounds / "votes" / "clips.jsonl"), "--ranker", str(sounds / "ranker"),
                 "--out", str(sounds / "votes" / "scored.jsonl"), "--plus", "hum", "1.5", "--device", "cpu"])
    train_fm.train(train_fm.parse_args([
        "--checkpoint", str(sounds / "model"), "--data", str(sounds / "votes" / "scored.jsonl"), "--cache",
        str(sounds / "cache"), "--score_column", "score", "--score_head", "v1", "--steps", "4", "--batch_size", "4",
        "--val_clips", "2", "--device", "cpu", "--out", str(sounds / "score")]))
    yield sounds
    torch.set_num_threads(threads)


def flags(chain, out, *more):
    return ["--checkpoint", str(chain / "score"), "--data", str(chain / "votes" / "scored.jsonl"), "--cache",
            str(chain / "cache"), "--ranker", str(chain / "ranker"), "--clap", str(chain / "clap"), "--samples", "12",
            "--keep", "3", "--pool", "40", "--steps", "2", "--tuning_steps", "8", "--polish_steps", "4", "--save_every",
            "2", "--save_clips", "4", "--batch_size", "4", "--device", "cpu", "--dtype", "float32", "--out", str(out),
            *more]


def run(chain, out, *more):
    return expert_iteration.run(expert_iteration.parse_args(flags(chain, out, *more)))


@pytest.fixture(scope="module")
def whole(chain):
    reports = run(chain, chain / "experts", "--rounds", "2")
    return chain / "experts", reports


PRODUCTS = ("prompts.jsonl", "scores.jsonl", "experts.jsonl", "experts.safetensors", "tangoflux.safetensors",
            "candidates.safetensors", "tuned/tangoflux.safetensors")


def test_a_round_leaves_what_it_says(chain, whole):
    out, reports = whole
    for k in (1, 2):
        folder = out / f"round_{k}"
        assert all((folder / name).is_file() for name in PRODUCTS)
        rows, kept = read_jsonl(folder / "scores.jsonl"), read_jsonl(folder / "experts.jsonl")
        assert len(rows) == 12 and len(kept) == 3
        assert [row["index"] for row in kept] == [row["index"] for row in sorted(rows, key=lambda r: -r["blend"])[:3]]
        latents = load_tensors(folder / "candidates.safetensors")["latents"]
        experts = load_tensors(folder / "experts.safetensors")["latents"]
        for row, latent in zip(kept, experts):
            assert row["score"] == row["reward"] and torch.equal(latent, latents[row["index"]].half())
        assert reports[k - 1]["reward of kept"] == pytest.approx(np.mean([row["reward"] for row in kept]))
    tuned = read_json(out / "round_1" / "tuned" / "config.json")["training"]
    assert tuned["oversample"] == 5 and not tuned["experts_only"] and not tuned["decay"]
    polished = read_json(out / "round_1" / "config.json")["training"]
    assert polished["experts_only"] and polished["training clips"] == 3
    assert polished["checkpoint"].endswith("tuned") and reports[1]["policy"] == crpo.policy_hash(str(out / "round_1"))
    assert load_model(out / "round_2").flow.config["score_head"] == "v1"


def test_killed_three_times_it_ends_with_the_same_files(chain, whole, tmp_path):
    out = tmp_path / "killed"
    stages = [("scores.jsonl", 5), ("tuned/log.jsonl", 1), ("log.jsonl", 1)]

    def progress(path):
        return path.read_text().count("\n") if path.is_file() else 0
    kills = 0
    for name, wanted in stages:
        process = subprocess.Popen([sys.executable, ROOT / "expert_iteration.py", *flags(chain, out)],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and progress(out / "round_1" / name) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3, "it ended before it was killed"
    run(chain, out)
    for name in PRODUCTS:
        ours, theirs = out / "round_1" / name, whole[0] / "round_1" / name
        if name.endswith(".safetensors"):
            mine, full = load_tensors(ours), load_tensors(theirs)
            assert mine.keys() == full.keys() and all(torch.equal(mine[key], full[key]) for key in full), name
        elif name == "scores.jsonl":                    # another batch after a kill: the last bits of a float
            assert [row["blend"] for row in read_jsonl(ours)] == pytest.approx(
                [row["blend"] for row in read_jsonl(theirs)], abs=1e-4)
        else:
            assert [row["prompt"] for row in read_jsonl(ours)] == [row["prompt"] for row in read_jsonl(theirs)], name


def test_stage_3_runs_v1_weights_as_v2(chain, whole, tmp_path):
    arguments = ["--checkpoint", str(whole[0] / "round_1"), "--score_head", "v2", "--score", "1.5", "--iterations", "1",
                 "--prompts", "4", "--num_samples", "2", "--pool", "20", "--evaluate", "2", "--epochs", "1", "--steps",
                 "2", "--batch_size", "2", "--reward", str(chain / "clap"), "--judge", str(chain / "clap"), "--tagger",
                 str(chain / "model"), "--device", "cpu", "--out", str(tmp_path / "crpo")]
    crpo.run(crpo.parse_args(arguments))
    made, before = (load_model(folder).flow for folder in (tmp_path / "crpo" / "iteration_1", whole[0] / "round_1"))
    assert made.config["score_head"] == "v2" and before.config["score_head"] == "v1"
    assert list(made.state_dict()) == list(before.state_dict())
    moved = [name for name, p in made.state_dict().items() if not torch.equal(p, before.state_dict()[name])]
    assert any("score_embed.linear_2" in name for name in moved) and len(moved) > 20
    args = crpo.parse_args(arguments)
    pairs = {"hidden": torch.zeros(2, 3, 16), "mask": torch.ones(2, 3), "duration": torch.ones(2)}
    pairs |= {f"{which}_{part}": torch.zeros(2, 4, 4) for which in ("winner", "loser") for part in ("mean", "std")}
    batch, *_ = crpo.draw_pairs(pairs, range(400), args, 0, torch.device("cpu"))
    lost = batch.score.isnan()
    assert lost[batch.dropped].all() and 0.05 < lost[~batch.dropped].float().mean() < 0.16
    assert (batch.score[~lost] == 1.5).all()
    for more, what in ((["--checkpoint", str(chain / "model")], "--score needs a model with a score head"),
                       (["--score_head", "v5"], "only v1 and v2 take each other's")):
        with pytest.raises(UserError, match=what):
            crpo.run(crpo.parse_args([*arguments, *more, "--out", str(tmp_path / "x")]))
        assert not list((tmp_path / "x").iterdir())


def test_wrong_input_is_one_line(chain, whole, tmp_path):
    for more, what in ((["--checkpoint", str(chain / "model")], "has no score head; python train_fm.py"),
                       (["--ranker", str(tmp_path)], "ranker.safetensors is missing; python reward.py train_ranker"),
                       (["--data", str(tmp_path / "x.jsonl")], "x.jsonl is missing; python reward.py score_manifest"),
                       (["--samples", "41", "--pool", "40"], "is more than the 40 prompts of the pool"),
                       (["--keep", "13"], "--keep 13 is more than --samples 12"),
                       (["--score", "nan"], "--score is nan")):
        with pytest.raises(UserError, match=what):
            run(chain, tmp_path / "out", *more)
    with pytest.raises(UserError, match="was started with score = 1.5, now it is 1.0"):
        run(chain, whole[0], "--score", "1")


# ----------------------------------------------------------------------------- reproduce.py

def entry(chain, name, out, *more):
    reproduce.main([name, "--checkpoint", str(chain / "model"), "--data", str(chain / "votes" / "scored.jsonl"),
                    "--ranker", str(chain / "ranker"), "--judge", str(chain / "clap"), "--tagger", str(chain / "model"),
                    "--hum_data", str(chain / "votes" / "scored.jsonl"), "--seeds", "0", "--sft_steps", "2",
                    "--prompts", "6", "--steps", "2", "--samples", "12", "--tuning_steps", "2", "--polish_steps", "2",
                    "--crpo_prompts", "4", "--crpo_epochs", "1", "--batch_size", "4", "--device", "cpu", "--runs",
                    str(chain / "reproduce"), "--out", str(out), *more])


@pytest.mark.parametrize("name", [entry.__name__ for entry in reproduce.ENTRIES])
def test_every_entry_ends_with_a_table_numbers_and_a_verdict(chain, tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(chain)                                            # cache/ goes there
    more = {"attm_table1": ["--heads", "v1", "v5"], "attm_figure2": ["--grid", "0", "2", "6"],
            "attm_guidance": ["--scales", "1", "3"], "attm_reward_column": ["--heads", "v2"]}.get(name, [])
    if name == "attm_reward_column":
        rows = read_jsonl(chain / "votes" / "scored.jsonl")             # 20 clips; some have to hum
        for i, row in enumerate(rows):
            row["hum"] = float(i % 3 == 0)
        (chain / "votes" / "hum.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        more += ["--hum_data", str(chain / "votes" / "hum.jsonl")]
        monkeypatch.setattr(reproduce, "HELD_OUT", 10)
    entry(chain, name, tmp_path, *more)
    text, numbers = (tmp_path / f"{name}.md").read_text(), read_json(tmp_path / f"{name}.json")
    assert "Hypothesis: " in text and "Verdict: " in text and "Budget: 1 training seeds" in text
    assert numbers["verdict"] in text and numbers["settings"]["seeds"] == [0] and "nan" not in text.lower()
    assert (tmp_path / f"{name}.png").is_file() == PICTURES
    assert "hypothesis: " in capsys.readouterr().out


def test_entries_say_what_is_missing(chain, tmp_path):
    with pytest.raises(UserError, match="python reward.py score_manifest makes it"):
        entry(chain, "attm_table1", tmp_path, "--data", str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="sft_plain was made with other flags"):
        entry(chain, "attm_table1", tmp_path, "--sft_steps", "3")
    with pytest.raises(UserError, match="--prompts is 2"):
        entry(chain, "attm_table1", tmp_path, "--prompts", "2")


def test_paired_t_matches_scipy():
    stats = pytest.importorskip("scipy.stats")
    import metrics
    rng = np.random.default_rng(0)
    for count, shift in ((5, 0.3), (100, 0.2), (40, -1.0)):
        a, b = rng.standard_normal(count) + shift, rng.standard_normal(count)
        theirs = stats.ttest_rel(a, b, alternative="greater")
        assert metrics.paired_t(a, b) == pytest.approx(((a - b).mean(), theirs.statistic, theirs.pvalue), abs=1e-6)
    assert metrics.paired_t(np.ones(4), np.ones(4)) == (0.0, 0.0, 0.5)
