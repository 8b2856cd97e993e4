"""Power-function averages: closed forms, and what a killed run stores is the average of its weights."""
import numpy as np
import pytest
import torch
from test_train_fm import of_scored, run, same, tiny  # noqa: F401  (a fixture)

from lib.weights import gamma_of, load_tensors, power_decay


def test_gamma_has_the_width_and_decay_makes_the_profile():
    for sigma in (0.001, 0.02, 0.05, 0.1, 0.2, 0.2886):
        gamma = gamma_of(sigma)
        assert gamma > -1e-3
        assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma, rel=1e-9)
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.01)              # EDM2's table
    gamma, steps, weights = 3.0, 400, np.zeros(401)
    for step in range(1, steps + 1):                                              # which share step k has at the end
        weights *= power_decay(step, gamma)
        weights[step] = 1 - power_decay(step, gamma)
    assert weights[1:] == pytest.approx(np.diff((np.arange(steps + 1) / steps) ** (gamma + 1)), abs=1e-12)


def test_a_run_stores_the_average_of_its_weights(tiny, tmp_path):  # noqa: F811
    """Stopped after each step, so that its weights are known; a run in one piece ends with the same bits."""
    widths, name, expected = [0.05, 0.2], "fc.0.weight", {0.05: 0.0, 0.2: 0.0}
    more = dict(sigma_rel=widths, learning_rate=1e-2, save_weights="power", train_steps=4)
    run(of_scored(tiny, tmp_path / "whole", **more))
    for step in range(1, 5):
        state = run(of_scored(tiny, tmp_path / "run", **more, snapshot_every=1, max_minutes=0))
        for width in widths:
            decay = power_decay(step, gamma_of(width))
            expected[width] = decay * expected[width] + (1 - decay) * state["weights"][name].double()
            stored = load_tensors(tmp_path / "run" / "averages" / f"{width}_{step:09d}.safetensors")[name]
            assert torch.allclose(stored.double(), expected[width], atol=1e-6)
    assert not torch.allclose(expected[0.05], expected[0.2], atol=1e-4)
    published = load_tensors(tmp_path / "run" / "tangoflux.safetensors")[name]
    assert torch.allclose(published.double(), expected[0.05], atol=1e-6)          # the first width
    for file in ("tangoflux", "ema", "averages/0.05_000000004", "averages/0.2_000000004"):
        assert same(*(load_tensors(tmp_path / which / f"{file}.safetensors") for which in ("run", "whole"))), file
