"""Power-function averages: closed forms, and any width from stored ones equals the one tracked directly."""
import numpy as np
import pytest
import torch
from conftest import relative_error
from test_score import flags, scored  # noqa: F401  (a fixture)

import averages
import train_fm
from common import UserError, load_tensors


def test_gamma_has_the_width_and_decay_makes_the_profile():
    for sigma in (0.02, 0.05, 0.1, 0.2, 0.28):
        gamma = averages.gamma_of(sigma)
        assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma, rel=1e-9)
    assert averages.gamma_of(0.05) == pytest.approx(16.97, abs=0.01)              # EDM2's table
    assert averages.gamma_of(0.1) == pytest.approx(6.94, abs=0.01)
    gamma, steps, weights = 3.0, 400, np.zeros(401)
    for step in range(1, steps + 1):                                              # which share step k has at the end
        beta = averages.power_decay(step, gamma)
        weights *= beta
        weights[step] = 1 - beta
    k = np.arange(1, steps + 1)
    assert weights.sum() == pytest.approx(1)
    assert weights[1:] == pytest.approx((k / steps) ** (gamma + 1) - ((k - 1) / steps) ** (gamma + 1), abs=1e-12)
    with pytest.raises(UserError, match="must be above 0 and at most"):
        averages.gamma_of(0.3)


def test_overlap_is_the_integral():
    tau = (np.arange(200000) + 0.5) / 200000 * 30

    def profile(t, gamma):
        return np.where(tau <= t, (gamma + 1) * tau ** gamma / t ** (gamma + 1), 0)
    for a in ((30, 2.0), (20, 6.9)):
        for b in ((25, 16.97), (20, 0.5)):
            integral = (profile(*a) * profile(*b)).sum() * 30 / 200000
            assert averages.overlap(*a, *b) == pytest.approx(integral, rel=1e-3)


def test_a_stored_average_is_its_own_best_combination():
    steps, gammas = [100, 100, 200, 200], [6.9, 17.0, 6.9, 17.0]
    assert averages.combination(steps, gammas, 200, 17.0) == pytest.approx([0, 0, 0, 1], abs=1e-8)
    assert averages.combination(steps, gammas, 200, 10.0).sum() == pytest.approx(1, abs=0.05)


def test_a_synthesised_width_equals_one_tracked_directly(scored, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "run"
    train_fm.train(train_fm.parse_args(flags(scored, out, "--steps", "96", "--sigma_rel", "0.05", "0.1",
                                             "--snapshot_every", "6", "--learning_rate", "1e-3")))
    for width in ("0.07", "0.12"):
        direct = tmp_path / width
        train_fm.train(train_fm.parse_args(flags(scored, direct, "--steps", "96", "--sigma_rel", width,
                                                 "--snapshot_every", "96", "--learning_rate", "1e-3")))
        tracked = load_tensors(direct / "averages" / f"{width}_{96:09d}.safetensors")
        made = averages.synthesise(out, float(width))
        total = sum((made[name] - tracked[name]).double().square().sum() for name in tracked)
        error = (total / sum(tensor.double().square().sum() for tensor in tracked.values())).sqrt().item()
        print(f"sigma_rel {width}: relative error of all weights {error:.1e}")
        assert error < 1e-3
        last = load_tensors(out / "tangoflux.safetensors")
        assert relative_error(made["fc.0.weight"], last["fc.0.weight"]) > 1e-4          # it is another average
    averages.main(["--run", str(out), "--sigma_rel", "0.08", "--out", str(tmp_path / "model")])
    assert torch.isfinite(load_tensors(tmp_path / "model" / "tangoflux.safetensors")["fc.0.weight"]).all()
    with pytest.raises(UserError, match="has no stored averages"):
        averages.main(["--run", str(scored / "model"), "--sigma_rel", "0.08", "--out", str(tmp_path / "model")])
