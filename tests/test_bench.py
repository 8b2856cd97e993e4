"""The side-by-side timings: that both ways do the same work, and that the table says how it was made."""
import numpy as np
import pytest
import torch
from test_crpo import tiny  # noqa: F401  (a fixture)

import bench
import crpo
from common import UserError, read_json
from model import load_model
from sample import generate


def test_both_ways_make_the_same_clips(tiny):  # noqa: F811
    model = load_model(tiny / "model")
    args = crpo.parse_args(["--num_samples", "3"])
    row = {"prompt": "rain", "duration": 1.0}
    one = bench.samples_of_one_prompt(args, model, row, 6, steps=4)
    assert torch.allclose(one, generate(model, ["rain"] * 3, [1.0] * 3, args.seed, range(6, 9), steps=4), atol=1e-4)


def test_a_small_bench_writes_its_table(tiny, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(crpo, "REWARD", tiny / "clap0")
    bench.main(["crpo", "--checkpoint", str(tiny / "model"), "--prompts", "3", "--epochs", "2", "--repeats", "1",
                "--official_steps", "12", "--out", str(tmp_path)])
    found = read_json(tmp_path / "bench_crpo.json")
    assert list(found["runs"]) == ["ours, 10 steps", "official way, 10 steps", "official way, 12 steps"]
    assert all(np.isfinite(list(run.values())).all() and len(run) == 3
               for many in found["runs"].values() for run in many)
    text = (tmp_path / "bench_crpo.md").read_text()
    assert "3 prompts x 5 clips, 2 training steps of 3 pairs" in text and "whole iteration" in text
    for flag in ("--prompts", "--epochs", "--official_steps", "--repeats"):
        with pytest.raises(UserError, match=f"{flag} is 0"):
            bench.main(["crpo", flag, "0", "--out", str(tmp_path)])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        bench.main(["crpo", "--out", str(tmp_path / "file")])
