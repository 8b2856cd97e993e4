"""A few inputs of tests/fuzz.py, always the same; `python tests/fuzz.py` tries thousands."""
import subprocess
import sys

import pytest
from conftest import ROOT


def test_made_up_inputs_work_or_end_in_one_line(tmp_path):
    pytest.importorskip("hypothesis")
    command = [sys.executable, ROOT / "tests" / "fuzz.py", "--inputs", "24", "--seed", "0"]   # a process that may fork
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "seed 0: 0 findings" in done.stdout, done.stdout + done.stderr
    total = next(line for line in done.stdout.splitlines() if line.startswith("| all"))
    assert int(total.split("|")[3]) >= 5                                # else it tried nothing but nonsense
