"""What compares two models: distances against the original tools, paired intervals, the tables."""
import numpy as np
import pytest
import torch
from conftest import PARITY
from test_train_fm import tiny_parts

import alignment
import metrics


def test_frechet_distance_matches_the_original(parity):
    fixed, arrays = parity("metrics").info["frechet_distance"], np.load(PARITY / "metrics.npz")
    x, y = arrays["feat_x"], arrays["feat_y"]
    assert metrics.frechet_distance(x, y) == pytest.approx(fixed["feat_x_vs_feat_y"]["float64"], rel=1e-6)
    few = fixed["first 8 rows of feat_x vs first 10 rows of feat_y (rank deficient)"]
    assert metrics.frechet_distance(x[:8], y[:10]) == pytest.approx(few["stable_audio_metrics"], rel=1e-3)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_kl_divergence_matches_the_original(parity):
    fixed, arrays = parity("metrics").info["kl_passt"], np.load(PARITY / "metrics.npz")
    windows = arrays["window_logits_generated"], arrays["window_logits_reference"]
    for pool, name in ((np.mean, "mean_over_windows"), (np.max, "max_over_windows")):
        ours = metrics.kl_divergence(*(pool(one, axis=1) for one in windows))
        assert ours == pytest.approx(fixed[name]["per_item"], rel=1e-4)
        assert ours.mean() == pytest.approx(fixed[name]["mean_over_items"], rel=1e-4)


def test_frechet_distance_closed_form():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 3))
    assert metrics.frechet_distance(x, x + [3, 0, 4]) == pytest.approx(25, rel=1e-6)       # only the mean moves
    assert metrics.frechet_distance(x, 2 * x) == pytest.approx(
        np.trace(np.cov(x.T)) + (x.mean(0) ** 2).sum(), rel=1e-6)                          # (2 - 1)^2 tr, and the mean


def test_paired_bootstrap_sees_small_differences_that_are_always_there():
    rng = np.random.default_rng(0)
    hard = rng.standard_normal(400) * 5                     # prompts differ a lot, the models by 0.1 on each
    low, high = metrics.paired_bootstrap(np.mean, hard + 0.1 + 0.01 * rng.standard_normal(400), hard)
    assert 0.09 < low < 0.1 < high < 0.11
    low, high = metrics.paired_bootstrap(np.mean, hard, rng.permutation(hard))
    assert low < 0 < high


def arrays(rng, number, gain):
    tally = np.zeros((number, len(metrics.COLUMNS)), dtype=np.int64)
    tally[:, metrics.COLUMNS.index("clips")] = 1
    right = rng.random(number) < 0.5 + gain
    for name, value in (("hits", 1), ("ordered", 1), ("order_right", right), ("counted", 1), ("counts_right", right),
                        ("exact", right)):
        tally[:, metrics.COLUMNS.index(name)] = value
    return {"reward": rng.random(number) + gain, "judge": rng.random(number) + gain, "tally": tally,
            "features": rng.standard_normal((number, 4)) * (2 - gain), "logits": rng.standard_normal((number, 5))}


def test_gains_have_the_right_sign_and_pool_seeds():
    rng = np.random.default_rng(1)
    base, real = arrays(rng, 300, 0.0), arrays(rng, 300, 0.4)
    real["features"] = rng.standard_normal((300, 4))
    better = [arrays(rng, 300, 0.4) for _ in range(3)]
    change = alignment.gains(better, base, real, draws=200)
    for name in ("reward", "judge", "order", "exact"):
        value, low, high = change[name]
        assert low > 0 and low < value < high and 0.3 < value < 0.5, name
    ratio, low, high = change["frechet"]
    assert low < ratio < high < 1                            # nearer to the real scenes
    same = alignment.gains([base], base, real, draws=50)
    assert all(same[name] == (0, 0, 0) for name in ("reward", "judge", "exact")) and same["frechet"] == (1, 1, 1)
    assert len(alignment.cells(alignment.summary(base, real))) == len(alignment.HEADS)


def test_both_tables(tmp_path):
    from model import save_model
    from train_clap import new_clap
    from vae import make_codec
    flow, encoder = tiny_parts()
    codec = make_codec("mel", dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1], num_res_blocks=1,
                                   attn_layers=[], down_layers=[0, 1])).eval()
    save_model(tmp_path / "a", flow, codec, encoder)
    with torch.no_grad():
        flow.transformer.proj_out.weight.mul_(0.5)
        for name in ("b", "c"):
            save_model(tmp_path / name, flow, codec, encoder)
            flow.transformer.proj_out.weight.mul_(0.5)
    for name in ("reward", "judge"):
        new_clap(16, 16, 0 if name == "reward" else 1).save(tmp_path / name)
    common = ["--reward", tmp_path / "reward", "--judge", tmp_path / "judge", "--prompts", 6, "--steps", 2,
              "--draws", 20, "--cache", tmp_path / "cache", "--out", tmp_path / "results"]
    alignment.main([str(x) for x in ["--checkpoint", tmp_path / "b", tmp_path / "c", "--against", tmp_path / "a",
                                     *common]])
    text = (tmp_path / "results" / "alignment.md").read_text()
    assert all(text.count(f"| {tmp_path / name}") == 2 for name in ("b", "c")) and "all 2 pooled" in text
    alignment.main([str(x) for x in ["best_of", "--checkpoint", tmp_path / "a", "--counts", 1, 3, *common]])
    rows = [line for line in (tmp_path / "results" / "best_of.md").read_text().splitlines() if line.startswith("| ")]
    rewards = {row.split("|")[1].strip(): float(row.split("|")[2]) for row in rows[1:3]}
    assert rewards["3"] >= rewards["1"]
