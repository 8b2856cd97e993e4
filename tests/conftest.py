"""Shared by all tests: the repository on the path, and the fixtures of the original implementations."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PARITY = ROOT.parent / "shared" / "parity"
# pictures are an extra: tests of them run where matplotlib is installed (as in CI's second round)
PICTURES = importlib.util.find_spec("matplotlib") is not None
TINY = dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, audio_seq_len=64, max_duration=4.096, axes_dims_rope=[2, 2, 4])
TINY_MEL = dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1], num_res_blocks=1, attn_layers=[], down_layers=[0, 1])
TINY_OOBLECK = dict(encoder_hidden_size=4, downsampling_ratios=[4, 8, 8], channel_multiples=[1, 2, 2],
                    decoder_channels=4, decoder_input_channels=4, audio_channels=1, sampling_rate=16000)
TINY_OFFICIAL = dict(                           # of bench.full_size.random_folder
    flow=dict(num_layers=1, num_single_layers=1, in_channels=4, attention_head_dim=16, num_attention_heads=2,
              joint_attention_dim=32, audio_seq_len=24, max_duration=1.0, axes_dims_rope=[4, 6, 6]),
    codec=dict(encoder_hidden_size=8, downsampling_ratios=[2, 4, 4], channel_multiples=[1, 1, 2], decoder_channels=8,
               decoder_input_channels=4, sampling_rate=768), text=dict(width=32, layers=1, heads=2, d_ff=32), words=200)


class Fixture:
    """One set of numbers of an original implementation: `info` (json), `weights` and `tensors` (safetensors)."""

    def __init__(self, name):
        self.name = name
        self.info = json.loads((PARITY / f"{name}.json").read_text())

    def load(self, stem):
        from safetensors.torch import load_file
        return load_file(PARITY / f"{stem}.safetensors")

    weights = cached_property(lambda self: self.load(self.name))
    tensors = cached_property(lambda self: self.load(f"{self.name}_tensors"))


@pytest.fixture
def parity():
    """parity("tangoflux_tiny") -> Fixture; skips where the numbers are absent (they must be there in CI)."""
    if not PARITY.is_dir():
        assert not os.environ.get("CI"), "the parity fixtures are absent in CI"
        pytest.skip("the parity fixtures are not beside this checkout")
    return Fixture


def assert_layout(module, official):
    """The names, shapes and numbers of parameters are those that were recorded of the original."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == official["keys"] and len(shapes) == official["num_keys"]
    for part in ("total", *dict(module.named_children())):
        parameters = module.get_submodule(part.removeprefix("total")).parameters()
        assert sum(parameter.numel() for parameter in parameters) == official["params"][part], part


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_error(ours, reference):
    """Largest absolute difference over the largest absolute value of the reference."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def refused(match, call, *arguments, **more):
    """The call ends with the error of one line that holds `match`."""
    from lib.common import UserError
    with pytest.raises(UserError, match=match):
        call(*arguments, **more)


def overwrite(path, place, value):
    """Put these bytes into a file."""
    content = bytearray(path.read_bytes())
    content[place:place + len(value)] = value
    path.write_bytes(content)


def tiny_tagger(seed=0):
    from world.ears import Tagger
    torch.manual_seed(seed)
    return Tagger(["hum", "click", "whistle"], ["click"], 24, 1)


def small_judges(folder):
    """In a folder: the tiny CLAPs reward/ and judge/, three tiny taggers. Returns it."""
    from world.ears import FILES, Tagger, save_tagger
    from world.sounds import COUNTABLE, EVENT_NAMES
    from world.train_clap import new_clap
    for seed, name in enumerate(("reward", "judge")):
        new_clap(16, 16, seed).save(folder / name)
    for which, width in (("judge", 48), ("features", 24)):
        save_tagger(folder / FILES[which], Tagger(EVENT_NAMES, COUNTABLE, width, 1))
    save_tagger(folder / FILES["quality"], Tagger(["quality"], [], 24, 1))
    return folder


@pytest.fixture(scope="session")
def sounds(tmp_path_factory):
    """Small judges, votes on twenty scenes of two takes (with a hum), a ranker trained on them."""
    from world import train_ranker, votes
    folder = small_judges(tmp_path_factory.mktemp("sounds"))
    votes.main(["--scenes", "20", "--takes", "2", "--votes", "400", "--through_codec", "0", "--hum", "0.4", "--out",
                str(folder / "votes"), "--workers", "0", "--device", "cpu"])
    train_ranker.main(["--votes", str(folder / "votes" / "votes.jsonl"), "--clap", str(folder / "judge"), "--encoder",
                       str(folder), "--widths", "16", "8", "--epochs", "2", "--batch_size", "64", "--out",
                       str(folder / "ranker"), "--device", "cpu"])
    return folder


def planted(count, number):
    """Clips, features (count, 12) of which two columns decide the quality, it, and Votes on it."""
    import numpy as np
    from world import votes
    from world.train_ranker import Votes
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((count, 12))).float()
    truth = 1 / (1 + np.exp(-(features[:, 0] - features[:, 1]).numpy()))
    clips = [{"audio": i, "caption": f"prompt {i // 2}", "scene": i // 2, "quality": float(value),
              "degradation": "noise", "level": 0.0} for i, value in enumerate(truth)]
    cast = votes.cast_votes(clips, number, 0)
    a, b, preference, chance, source = (np.array([vote[name] for vote in cast]) for name in Votes._fields)
    return clips, features, truth, Votes(a, b, preference.astype(np.float32), chance, source)


@pytest.fixture(scope="module")
def one_thread():
    """The same arithmetic as in the processes that are killed; and quickest where other programs run beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kill_at(script, flags, path, wanted):
    """Run a script until the file `path` has `wanted` lines, or the folder as many files, and kill it."""
    def found():
        if path.is_dir():
            return sum(not each.name.startswith(".") for each in path.iterdir())
        return path.read_text().count("\n") if path.is_file() else 0
    process = subprocess.Popen([sys.executable, ROOT / script, *flags], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and found() < wanted:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def same_file(one, other):
    """Have two files the same text, or two safetensors files the same tensors?"""
    from lib.weights import load_tensors
    if one.suffix != ".safetensors":
        return one.read_text() == other.read_text()
    mine, full = load_tensors(one), load_tensors(other)
    return mine.keys() == full.keys() and all(torch.equal(mine[name], full[name]) for name in full)


def pytest_collection_modifyitems(items):
    """Mark what compares with an original implementation: `pytest -m original` (CI runs it with nothing skipped)."""
    for item in items:
        named = any(word in item.name for word in ("diffusers", "scipy", "picture", "pyloudnorm"))
        if named or "parity" in getattr(item, "fixturenames", ()):
            item.add_marker("original")


def pytest_configure(config):
    config.addinivalue_line("markers", "original: compares with an original implementation, or needs an extra")
