"""Every command that README, docs and docstrings show is understood; those of the afternoon run, in small."""
import argparse
import ast
import importlib
import re
import shlex
import shutil
import sys
from functools import lru_cache

import pytest
from conftest import PICTURES, ROOT
from house import AFTERNOON, sources

GOLDEN = ROOT / "tests" / "golden"
# last on the command line, so that each run takes seconds
SMALL = {
    "model": [], "vae": "--clips 2 --validation_clips 1 --train_steps 1 --batch_size 1",
    "train_fm": "--train_steps 1 --scenes 4 --val_scenes 2 --val_clips 2 --workers 0 --batch_size 2 --dtype float32",
    "sample": "--steps 1 --duration 1 --dtype float32",
    "crpo": "--iterations 1 --prompts 2 --num_samples 2 --eval_prompts 2 --pool 4 --steps 1 --epochs 1 --dtype float32",
    "expert_iteration": "--rounds 1 --prompts 4 --keep 2 --pool 6 --steps 1 --tuning_steps 1 --polish_steps 1 "
                        "--dtype float32",
    "evaluate": "--prompts 2 --steps 1"}


def shown(text):
    """(module, arguments) of each `python SCRIPT.py ...`, `python -m MODULE ...` or torchrun of a text."""
    text = re.sub(r"\\+\n\s*", " ", text)                                     # lines that go on
    lines = [re.split(r"\s+#|\s{3,}|\s->\s", line.strip())[0] for line in text.splitlines()]
    inside = re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    for line in [*lines, *inside]:
        match = re.fullmatch(r"(?:python|torchrun --\w+ \d+) (?:-m )?([\w.]+?)(?:\.py)?( .*)?", line)
        if match and match[1] in sources():
            yield match[1], (match[2] or "").strip()


@lru_cache(maxsize=None)
def commands():
    """All of them, as (where they stand, module, arguments)."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        found += [(path.name, *command) for command in shown(path.read_text())]
    for name, path in sources().items():
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        found += [(name, *command) for command in shown(docstring)]
    return list(dict.fromkeys(found))


class Understood(Exception):
    pass


def run(module, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *words])
    importlib.import_module(module).main()


@pytest.mark.parametrize("where, module, arguments", commands(), ids=lambda text: text[:40])
def test_a_command_shown_is_understood(where, module, arguments, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Understood
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises((Understood, SystemExit)) as ended:
        run(module, shlex.split(arguments), monkeypatch)
    assert ended.type is Understood or ended.value.code == 0                        # --help


def test_each_file_of_the_afternoon_shows_three_commands():
    for name in AFTERNOON:
        if name != "model":                                                         # which is no script
            assert len([1 for where, module, _ in commands() if where == module == name]) >= 3, name
    assert len(commands()) > 80


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the commands of README find what they name, all of it tiny."""
    place = tmp_path_factory.mktemp("workplace")
    for name in ("checkpoints", "docs", "sounds"):
        (place / name).symlink_to(ROOT / name)
    (place / "golden").symlink_to(GOLDEN)
    for name in ("base", "sounds", "vae", "crpo/iteration_6",
                 "quick/iteration_1", "a", "b", "c", "NAME", "ablation", "control"):
        shutil.copytree(GOLDEN / "model", place / "runs" / name)
    for name in ("score", "other", "experts/round_1"):
        shutil.copytree(GOLDEN / "model", place / "runs" / name)
        shutil.copy(GOLDEN / "score" / "tangoflux.safetensors", place / "runs" / name)
        config = (GOLDEN / "score" / "config.json").read_text().replace("../model", str(GOLDEN / "model"))
        (place / "runs" / name / "config.json").write_text(config)
    shutil.copytree(GOLDEN / "ranker", place / "runs" / "ranker")
    (place / "runs" / "scored").mkdir()
    rows = (GOLDEN / "manifest.jsonl").read_text().replace("../sounds", str(ROOT / "sounds"))
    for path in ("runs/scored/scored.jsonl", "runs/scored/clips.jsonl", "my.jsonl"):
        (place / path).write_text(rows)
    (place / "prompts.txt").write_text("rain\n")
    return place


def runnable():
    """The commands of README and of the afternoon's docstrings that need no network, each script in small."""
    for where, module, arguments in commands():
        needs_hub = re.search(r"declare-lab|laion|google|FOLDER|stabilityai|alpaca", arguments)
        if where in ("README.md", *AFTERNOON) and module in SMALL and not needs_hub:
            yield module, arguments


@pytest.mark.parametrize("module, arguments", dict.fromkeys(runnable()), ids=lambda text: text[:40])
def test_a_command_of_the_afternoon_runs(module, arguments, workplace, monkeypatch, capsys):
    if "--plot" in arguments and not PICTURES:
        pytest.skip("pictures are an extra")
    monkeypatch.chdir(workplace)
    words = [*shlex.split(arguments), *shlex.split(SMALL[module]), "--device", "cpu"]
    if module not in ("sample", "reward"):
        words += ["--out", f"out/{abs(hash((module, arguments)))}"]
    run(module, words, monkeypatch)
    assert "next: " in capsys.readouterr().out


def test_equations_name_functions_and_tests_that_exist():
    text = (ROOT / "docs" / "equations.md").read_text()
    functions = re.findall(r"`([\w.]+)\.(\w+)`", text)
    assert len(functions) > 30
    for module, name in functions:
        assert hasattr(importlib.import_module(module), name), (module, name)
    tests = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    assert len(tests) > 30
    for file, name in tests:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_readme_lists_only_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"\]\(((?:docs|sounds|results)/[\w./]+)\)", text):
        assert (ROOT / name).exists(), name
