"""Shared by all tests: the repository on the path, and the fixtures of the original implementations."""
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PARITY = ROOT.parent / "shared" / "parity"


# pictures are an extra: tests of them run where matplotlib is installed (as in CI's second round)
PICTURES = importlib.util.find_spec("matplotlib") is not None


class Fixture:
    """One set of numbers of an original implementation: `info` (json), `weights` and `tensors` (safetensors)."""

    def __init__(self, name):
        from safetensors.torch import load_file
        self.info = json.loads((PARITY / f"{name}.json").read_text())
        self.load = lambda stem: load_file(PARITY / f"{stem}.safetensors")
        self.weights = self.load(name) if (PARITY / f"{name}.safetensors").exists() else {}
        tensors = PARITY / f"{name}_tensors.safetensors"
        self.tensors = self.load(f"{name}_tensors") if tensors.exists() else {}


@pytest.fixture
def parity():
    """parity("tangoflux_tiny") -> Fixture; skips where the numbers are absent (they must be there in CI)."""
    def open_fixture(name):
        if not PARITY.is_dir():
            if os.environ.get("CI"):
                pytest.fail("the parity fixtures are absent in CI")
            pytest.skip("the parity fixtures are not beside this checkout")
        return Fixture(name)
    return open_fixture


def relative_error(ours, reference):
    """Largest absolute difference over the largest absolute value of the reference."""
    return ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def pytest_collection_modifyitems(items):
    """Mark what compares with an original implementation: `pytest -m original` (CI runs it with nothing skipped)."""
    for item in items:
        named = any(word in item.name for word in ("diffusers", "scipy", "picture", "pyloudnorm"))
        if named or "parity" in getattr(item, "fixturenames", ()):
            item.add_marker("original")


def pytest_configure(config):
    config.addinivalue_line("markers", "original: compares with an original implementation, or needs an extra")
