"""What every script shares: one-line errors, flags, device, randomness, files, tables, pictures.

    FLAGS = {"sampler": [flag("--steps", 25, "solver steps (paper 3.3: 50)", 1, 1000)]}
    args = parse_flags(__doc__, FLAGS)             # --help, ranges, --debug: from those lines alone
    run_main(main)                                 # a UserError is one line on stderr, exit code 2

Nothing here knows about audio or models. Skip it at a first reading.
"""
import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parents[1]                  # the repository
BASE = HERE / "checkpoints" / "toy" / "base"
ALIGNED = HERE / "checkpoints" / "toy" / "aligned"          # what sample.py takes by default


# ----------------------------------------------------------------------------- errors

class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, and the remedy."""


@contextlib.contextmanager
def reading(path, remedy="download or write it again"):
    """Whatever fails inside, while the file `path` is read, becomes one UserError that names it:
    no list of checks can foresee what a damaged or made-up file holds."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path} is missing") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be used: {reason[:300]}; {remedy}") from error


def run_main(main):
    """Call a script's `main()`; a UserError ends in one line and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def warn(message):
    """One line on stderr for something that is odd but does not stop the run."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


def relative_to_here(value):
    """Paths without the way to this repository, also in lists and dicts: for what is printed."""
    if isinstance(value, dict):
        return {key: relative_to_here(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [relative_to_here(each) for each in value]
    if isinstance(value, (str, Path)):
        return str(value).replace(f"{HERE}/", "")
    return value


# ----------------------------------------------------------------------------- flags

def flag(name, default, what, low=-math.inf, high=math.inf, *, choices=None, kind=None, nargs=None,
         alias=None):
    """One setting of a script, for `parse_flags`; default True or False makes a switch (--no-name).
    what: a noun phrase, with the paper's value in brackets. kind: the type where the default does
    not tell. alias: an older name."""
    values = default if isinstance(default, list) else [default]
    shown = " ".join("none" if value is None else str(value) for value in values)
    about = f"{what} (default: {relative_to_here(shown)})"
    options = {"default": default, "help": about.replace("%", "%%")}
    if isinstance(default, bool):
        options["action"] = argparse.BooleanOptionalAction if default else "store_true"
    else:
        kind = kind or (str if default is None else type(values[0]))
        options |= {"type": lambda text: value_of(text, kind, low, high), "choices": choices}
        options |= {"action": "append"} if nargs == "append" else {"nargs": nargs}
    return {"name": name, "alias": alias, "default": default, "options": options}


def value_of(text, kind, low, high):
    """The number or text that was typed; ArgumentTypeError if out of range, as NaN always is."""
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if kind in (int, float) and not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} must lie between {low:g} and {high:g}")
    return value


class Parser(argparse.ArgumentParser):
    """A parser of `flag`s whose --help is a docstring and whose errors are UserErrors."""

    def __init__(self, **more):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=raw, allow_abbrev=False, **more)

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")

    def add_flags(self, groups):
        """Add the groups {title: [flag, ...]} and --debug."""
        for title, flags in groups.items():
            group = self.add_argument_group(title)
            for one in flags:
                names = [one["name"], one["alias"]]
                group.add_argument(*filter(None, names), **one["options"])
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")


def parse_flags(doc, groups, argv=None, defaults=None):
    """The flags of a script as a namespace; `defaults` {name: value} in the place of its own."""
    parser = Parser(description=doc)
    parser.add_flags(groups)
    if defaults:
        unknown = defaults.keys() - vars(parser.parse_args([]))
        if unknown:
            raise UserError(f"there is no setting {', '.join(sorted(unknown))}")
        parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def parse_commands(doc, commands, argv=None):
    """The same for a script with commands {name: (what it does, groups)}; args.command is one."""
    parser = Parser(description=doc)
    parser.add_flags({})
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (what, groups) in commands.items():
        choices.add_parser(name, help=what, description=what).add_flags(groups)
    return parser.parse_args(argv)


def pick(kind, args):
    """The NamedTuple `kind` filled from the flags of the same names."""
    return kind(*(getattr(args, name) for name in kind._fields))


DEVICE = flag("--device", "auto", "auto, cuda, mps or cpu")
DTYPE = flag("--dtype", "auto", "precision of matrix products; auto: bfloat16 where the hardware "
             "multiplies in it (official code: float32)", choices=["auto", "float32", "bfloat16"])


# ------------------------------------------------------------- device, precision, processes

def choose_device(name="auto", quiet=False):
    """"auto" takes cuda, then mps, then cpu, and prints it. UserError: `name` is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    reason = "as asked"
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
        reason = "chosen automatically"
    if not available.get(name):
        raise UserError(f"--device {name} is not on this machine; use cuda, mps, cpu or auto")
    if not quiet:
        print(f"device: {name} ({reason})")
    return torch.device(name)


def fast_bfloat16(device):
    """Whether this device multiplies in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_dtype(name, device):
    """(torch dtype, why): "auto" is bfloat16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if fast_bfloat16(device):
        return torch.bfloat16, f"this {device.type} multiplies in it"
    return torch.float32, f"this {device.type} has no fast bfloat16"


def autocast_for(name, device, say=print):
    """-> autocast() for a `with`, in the precision of `choose_dtype`, which is told once."""
    dtype, reason = choose_dtype(name, device)
    lower = dtype != torch.float32
    name = str(dtype).removeprefix("torch.")
    say(f"dtype: {name} ({reason}); weights and optimizer stay float32")
    # no cache of lowered weights: a step uses each once, and threads would share it (crpo.py)
    return lambda: torch.autocast(device.type, dtype if lower else None, lower, cache_enabled=False)


def side_by_side(function, pieces, device):
    """[function(piece) for piece in pieces]; on a CPU as many at a time as torch has threads: small
    matrix products do not fill the cores when each is split over all. Gradient mode and autocast
    belong to a thread: `function` enters them itself."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(pieces) == 1:
        return [function(piece) for piece in pieces]
    torch.set_num_threads(1)                        # new threads take it over; nested calls find 1
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, pieces))
    finally:
        torch.set_num_threads(threads)


def start_ranks(device_name):
    """(rank, ranks, device) of one process, or of several that torchrun started."""
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name, quiet=rank > 0)
    if ranks == 1:
        return rank, ranks, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    return rank, ranks, device


def wait_for_ranks(ranks):
    if ranks > 1:
        torch.distributed.barrier()


def mean_over_ranks(tensors, ranks):
    """Replace each tensor by its mean over the processes."""
    if ranks > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= ranks


# ----------------------------------------------------------------------------- randomness

def derive_seed(*parts):
    """A 63-bit seed from numbers and strings, the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts):
    """A generator seeded by `derive_seed`, on the CPU: its noise is the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


# ----------------------------------------------------------------------------- files

def temporary_beside(path):
    """A new file in the folder of `path`, which is made. Raises UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(path.suffix, f".{path.stem}.", path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
    os.close(handle)
    return Path(temporary)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path that replaces `path` when the block ends well: no torn files."""
    temporary = temporary_beside(Path(path))
    try:
        yield temporary
        temporary.chmod(0o644)          # mkstemp and safetensors let only the owner read
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(*paths):
    """UserError if a file cannot be written: known before minutes of work. Leaves no folder."""
    for path in map(Path, paths):
        if os.path.isdir(path):
            raise UserError(f"cannot write {path}: it is a folder; choose another output")
        new = [folder for folder in path.parents if not os.path.exists(folder)]
        temporary_beside(path).unlink()
        with contextlib.suppress(OSError):      # another process may have put something in
            for folder in new:
                folder.rmdir()


def write_text(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path, kind=object):
    """The value in a JSON file; UserError if missing, broken or not of `kind` (dict, list)."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        if not isinstance(value, kind):
            raise ValueError(f"it holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def append_jsonl(path, row):
    """Append a JSON object as a line; a kill leaves at most a torn last line (see read_jsonl)."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def read_jsonl(path):
    """The rows of a JSON-lines file, without a torn last one; UserError for any other."""
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise UserError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def file_hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def settings_key(settings):
    """One short word for a dict of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_settings(place, started, wanted):
    """UserError if the run in `place` had other settings; names that only one has pass."""
    for name, value in json.loads(json.dumps(wanted)).items():
        if name in started and started[name] != value:
            raise UserError(f"the run in {place} was started with {name} = {started[name]}, now it "
                            f"is {value}; give the same flags to go on, or another --out")


def whole_blocks(path, size, count):
    """Rows of a killed run's JSON lines, cut to whole blocks of `size` unless all are there."""
    rows = read_jsonl(path) if Path(path).is_file() else []
    if len(rows) < count:
        rows = rows[:len(rows) // size * size]
        write_jsonl(path, rows)
    return rows


# ----------------------------------------------------------------------------- tables and pictures

def markdown(heads, rows):
    """A Markdown table, its columns aligned so that it reads as plain text too."""
    cells = [[str(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        padded = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"| {' | '.join(padded)} |")
    rules = ["-" * (width + 2) for width in widths]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])


def write_report(out, name, title, command, paragraphs, numbers):
    """Print a report and write out/NAME.md and .json. paragraphs: texts and tables, in order."""
    text = "\n\n".join([f"# {title}", f"    {command}", *paragraphs]) + "\n"
    text = relative_to_here(text)
    path = Path(out) / f"{name}.md"
    write_text(path, text)
    write_json(path.with_suffix(".json"), relative_to_here(numbers))
    print(f"{text}\nwrote {path} and {path.with_suffix('.json')}")


def need(package, what):
    """Raise UserError if an extra is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install {package}")


@contextlib.contextmanager
def picture(path, width=6.4, height=4.8, columns=1):
    """Yield the axes of the picture `path`, or, where matplotlib is missing, None and a notice."""
    try:
        from matplotlib.figure import Figure        # without pyplot: no window, no global state
    except ImportError:
        warn(f"matplotlib is not installed: {path} is skipped; pip install matplotlib draws it")
        yield None
        return
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    yield list(figure.subplots(1, columns, squeeze=False)[0])
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f"wrote {path}")


def draw_log(out, panels, name="loss.png"):
    """Draw out/log.jsonl: a panel for each (title, "log" or "linear", {label: key of a row})."""
    rows = read_jsonl(Path(out) / "log.jsonl")
    with picture(Path(out) / name, 5.5, 4, len(panels)) as axes:
        for axis, (title, scale, curves) in zip(axes or [], panels):
            for label, key in curves.items():
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points), label=label)
                    axis.legend()
            axis.set(title=title, xlabel="step", yscale=scale)
