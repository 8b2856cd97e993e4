"""Every command that README and the heads of the scripts show is one that its script understands."""
import argparse
import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT


def shown(text):
    """(script, arguments) of each `python SCRIPT.py ...` of a text: lines of their own, and inside backticks."""
    text = re.sub(r"\\\n\s*", " ", text)                                     # lines that go on
    lines = [re.split(r"\s+#|\s{3,}", line.strip())[0] for line in text.splitlines()]
    inside = re.findall(r"`(python [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " "))
    for line in [*lines, *inside]:
        match = re.fullmatch(r"(?:python|torchrun --\w+ \d+) (\w+)\.py( .*)?", line)
        if match:
            yield match[1], match[2] or ""


def commands():
    """All of them, as (where they stand, script, arguments)."""
    found = [("README.md", *command) for command in shown((ROOT / "README.md").read_text())]
    for path in sorted(ROOT.glob("*.py")):
        head = ast.get_docstring(ast.parse(path.read_text())) or ""
        found += [(path.name, *command) for command in shown(head)]
    return list(dict.fromkeys(found))


class Understood(Exception):
    pass


@pytest.mark.parametrize("where, script, arguments", commands(), ids=lambda text: text[:40])
def test_a_command_shown_is_understood(where, script, arguments, monkeypatch):
    if script == "train_fm":                                                # its flags must go together, too
        importlib.import_module(script).parse_args(shlex.split(arguments))
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv=None, namespace=None):
        parse(parser, argv, namespace)
        raise Understood
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(arguments)])
    with pytest.raises((Understood, SystemExit)) as ended:
        importlib.import_module(script).main()
    assert ended.type is Understood or ended.value.code == 0                        # --help


def test_the_commands_are_found():
    found = {(where, script) for where, script, _ in commands()}
    assert {("README.md", script) for script in ("sample", "vae", "train_tagger", "cache", "train_fm", "evaluate",
                                                 "tagger", "data")} <= found
    assert ("train_fm.py", "train_fm") in found and len(commands()) > 40
