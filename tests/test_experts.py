"""Expert iteration and stage 3: the blend, what a round leaves, the same files after kills."""
import numpy as np
import pytest
import torch
from conftest import kill_at, refused, same_file
from test_crpo import CPU, MODEL, rows_of

import crpo
import expert_iteration
import ranker
import train_fm
from expert_iteration import best_places, z_blend
from lib.common import derive_seed, parse_flags, pick, read_json, read_jsonl
from lib.weights import load_tensors
from model import load_model


def test_the_blend_weighs_both_alike_and_keeps_the_best():
    rewards, clap = np.array([1.0, 2, 3, 4]), np.array([100.0, 290, 300, 0])
    blend = z_blend(rewards, clap)
    assert blend == pytest.approx(z_blend(rewards * 7 - 3, clap / 50))                  # units do not count
    assert blend.mean() == pytest.approx(0)
    assert z_blend(rewards, np.ones(4)) == pytest.approx((rewards - 2.5) / rewards.std())
    assert best_places(blend, 1).tolist() == [2] and best_places(blend, 0.5).tolist() == [2, 1]
    assert len(best_places(np.arange(600.0), 64)) == 64 and len(best_places(np.arange(600.0), 0.1)) == 60
    assert best_places(np.zeros(5), 0.01).tolist() == [0]
    refused("a reward is NaN", z_blend, np.array([1.0, np.nan]))


@pytest.fixture(scope="module")
def chain(sounds, one_thread):
    """A scored manifest and a tiny flow of stage 1."""
    scored = str(sounds / "votes" / "scored.jsonl")
    ranker.main(["--data", str(sounds / "votes" / "clips.jsonl"), "--ranker", str(sounds / "ranker"),
                 "--out", scored, "--device", "cpu"])
    train_fm.train(checkpoint=MODEL, data=scored, cache=str(sounds / "cache"), score_column="score", score_head="v1",
                   train_steps=4, batch_size=4, val_clips=2, device="cpu", out=str(sounds / "score"))
    return sounds


def settings(chain, out, **more):
    return {"checkpoint": str(chain / "score"), "data": str(chain / "votes" / "scored.jsonl"), "cache":
            str(chain / "cache"), "ranker": str(chain / "ranker"), "clap": str(chain / "judge"), "prompts": 8,
            "keep": 3.0, "pool": 40, "steps": 1, "tuning_steps": 6, "polish_steps": 4, "save_every": 2,
            "save_clips": 4, "batch_size": 4, "device": "cpu", "dtype": "float32", "out": str(out), **more}


def run(chain, out, **more):
    return expert_iteration.run(**settings(chain, out, **more))


@pytest.fixture(scope="module")
def whole(chain):
    return chain / "experts", run(chain, chain / "experts", rounds=2)


PRODUCTS = ("prompts.jsonl", "scores.jsonl", "experts.jsonl", "experts.safetensors", "tangoflux.safetensors",
            "candidates.safetensors", "tuned/tangoflux.safetensors")


def test_a_round_leaves_what_it_says(whole):
    out, reports = whole
    for k, report in enumerate(reports, 1):
        folder = out / f"round_{k}"
        assert all((folder / name).is_file() for name in PRODUCTS)
        rows, kept = read_jsonl(folder / "scores.jsonl"), read_jsonl(folder / "experts.jsonl")
        assert len(rows) == 8 and len(kept) == 3 and rows[0]["seed"] == derive_seed(0, "round", k) % 2 ** 40
        assert [row["index"] for row in kept] == [row["index"] for row in sorted(rows, key=lambda r: -r["blend"])[:3]]
        latents, experts = (load_tensors(folder / f"{at}.safetensors")["latents"] for at in ("candidates", "experts"))
        for row, latent in zip(kept, experts):
            assert row["score"] == row["reward"] and torch.equal(latent, latents[row["index"]].half())
        assert report["reward of kept"] == pytest.approx(np.mean([row["reward"] for row in kept]))
    tuned, polished = (read_json(out / "round_1" / at / "config.json")["training"] for at in ("tuned", ""))
    assert tuned["oversample"] == 5 and not tuned["experts_only"] and not tuned["decay"]
    assert polished["experts_only"] and polished["training clips"] == 3
    assert polished["checkpoint"].endswith("tuned") and reports[1]["policy"] == crpo.policy_hash(str(out / "round_1"))
    assert load_model(out / "round_2").flow.config["score_head"] == "v1"


def test_killed_twice_it_ends_with_the_same_files(chain, whole, tmp_path):
    flags = [f"--{name}={value}" for name, value in settings(chain, tmp_path).items()]
    for name, wanted in (("scores.jsonl", 5), ("tuned/log.jsonl", 1)):
        kill_at("expert_iteration.py", flags, tmp_path / "round_1" / name, wanted)
    run(chain, tmp_path)
    for name in PRODUCTS:
        assert same_file(tmp_path / "round_1" / name, whole[0] / "round_1" / name), name


def test_stage_3_runs_v1_weights_as_v2(chain, whole, tmp_path):
    small = dict(checkpoint=str(whole[0] / "round_1"), score_head="v2", score=1.5, iterations=1, prompts=4,
                 num_samples=2, pool=20, eval_prompts=2, epochs=1, steps=2, batch_size=2, reward=str(chain / "reward"),
                 judge=str(chain / "judge"), tagger=str(chain), device="cpu")
    crpo.run(**small, out=str(tmp_path / "crpo"))
    made, before = (load_model(folder).flow for folder in (tmp_path / "crpo" / "iteration_1", whole[0] / "round_1"))
    assert made.config["score_head"] == "v2" and before.config["score_head"] == "v1"
    assert list(made.state_dict()) == list(before.state_dict())
    moved = [name for name, p in made.state_dict().items() if not torch.equal(p, before.state_dict()[name])]
    assert any("score_embed.linear_2" in name for name in moved) and len(moved) > 20
    loss = pick(crpo.Loss, parse_flags("", crpo.FLAGS, [], small))
    batch, _ = crpo.draw_rows(rows_of(torch.zeros(2, 2, 4, 4)), range(400), loss, 0, CPU)
    lost = batch.score.isnan()
    assert lost[batch.drop_text].all() and 0.05 < lost[~batch.drop_text].float().mean() < 0.16
    assert (batch.score[~lost] == 1.5).all()
    more = {"score_head": "v5", "out": str(tmp_path / "x")}
    refused("only v1 and v2 take each other's", crpo.run, **{**small, **more})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("more, what", [
    ({"checkpoint": MODEL}, "needs a model with a score head"),
    ({"ranker": "nowhere"}, "ranker.safetensors is missing"), ({"data": "nowhere.jsonl"}, "nowhere.jsonl is missing"),
    ({"prompts": 41}, "is more than the 40 of --pool"), ({"keep": 9.0}, "--keep 9 is more than --prompts 8"),
    ({"out": "score"}, "score holds a run of train_fm.py"), ({"cache": "out"}, "out holds the latents"),
    ({"score": 1.0, "out": "experts"}, "was started with score = 1.5, now it is 1.0")])
def test_wrong_input_is_one_line(chain, whole, monkeypatch, more, what):
    monkeypatch.chdir(chain)                                                            # where `whole` is
    refused(what, run, chain, **{"out": "out", **more})
    assert not (chain / "out").exists()
