"""The house in figures: lines, density, imports. `python tests/house.py [FOLDER]` prints them beside other projects'.

Measured on code lines (neither blank, nor a comment, nor a docstring): expression nodes (ast.expr) a line, characters a
line, statements with two comprehensions or more, lines above 100 characters; functions that take `args`, functions over
60 lines. The same figures of the projects that this one learns from, taken with the same rules (2026-11):

    nodes a line   characters a line   two comprehensions
    nanoGPT          5.1   47.5   0 to 3 each
    nanochat         4.6   50.1
    minRF            4.8   39
    DiT              4.9   47
    FLUX             4.5   39
    nanoVLM          4.7   53
    first edition    7.3   61.6   55
"""
import ast
import sys
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
AFTERNOON = ("model", "vae", "train_fm", "sample", "reward", "crpo", "expert_iteration", "evaluate")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# a file imports only from what stands in an earlier row, or to its left
ORDER = [name for row in (
    "lib.common lib.weights lib.audio lib.mel lib.oobleck lib.text lib.fast lib.losses", "world.sounds world.scenes world.ears",
    "data vae model reward sample train_fm ranker evaluate crpo expert_iteration",
    "world.reader world.votes world.train_ears world.train_clap world.train_ranker world.bundle",
    "experiments.flow_picture experiments.toy experiments.models experiments.alignment experiments.attm",
    "bench.official bench.crpo bench.full_size") for name in row.split()]


@lru_cache(maxsize=None)
def sources(root=ROOT):
    """The Python files outside of tests: {dotted name: path}."""
    root, found = Path(root), {}
    for path in sorted([*root.glob("*.py"), *root.glob("[!.]*/**/*.py")]):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] != "tests":
            found[".".join(parts)] = path
    return found


@lru_cache(maxsize=None)
def parsed(path):
    """(text, syntax tree) of a file."""
    text = Path(path).read_text(encoding="utf-8")
    return text, ast.parse(text)


def docstring_lines(tree):
    """The numbers of the lines that docstrings fill."""
    lines = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            lines |= set(range(body[0].lineno, body[0].end_lineno + 1))
    return lines


def figures(paths):
    """{what: number} over files."""
    found = dict.fromkeys(("lines", "code lines", "nodes", "characters", "two comprehensions", "lines over 100",
                           "functions taking args", "functions over 60 lines"), 0)
    for path in paths:
        text, tree = parsed(path)
        inside_docstrings = docstring_lines(tree)
        for number, line in enumerate(text.splitlines(), 1):
            found["lines"] += 1
            if line.strip() and not line.strip().startswith("#") and number not in inside_docstrings:
                found["code lines"] += 1
                found["characters"] += len(line)
                found["lines over 100"] += len(line) > 100
        for node in ast.walk(tree):
            found["nodes"] += isinstance(node, ast.expr)
            if isinstance(node, FUNCTIONS):
                arguments = node.args.args + node.args.kwonlyargs
                found["functions taking args"] += any(one.arg == "args" for one in arguments)
                found["functions over 60 lines"] += node.end_lineno - node.lineno + 1 > 60
            if isinstance(node, ast.stmt) and not hasattr(node, "body"):
                inner = sum(isinstance(each, COMPREHENSIONS) for each in ast.walk(node))
                found["two comprehensions"] += inner >= 2
    return found


def imports(path, known):
    """The repository's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(parsed(path)[1]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(known)


def closure(name, known):
    """All modules of the repository that a module needs, itself among them."""
    needed, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one not in needed:
            needed.add(one)
            waiting += imports(known[one], known)
    return needed


def main():
    """Print the table above with a row of this project, or of FOLDER; then all its figures."""
    total = figures(sources(*sys.argv[1:]).values())
    nodes, characters = (total[what] / total["code lines"] for what in ("nodes", "characters"))
    print(f"{__doc__}    {'this project':16} {nodes:.1f}   {characters:.1f}   {total['two comprehensions']}\n")
    for what, number in total.items():
        print(f"{what:24} {number}")


if __name__ == "__main__":
    main()
