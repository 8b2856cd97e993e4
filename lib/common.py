"""What every script shares: one-line errors, flags, device, randomness, files, tables, pictures.

    FLAGS = {"sampler": [flag("--steps", 25, "solver steps (paper 3.3: 50)", 1, 1000)]}
    args = parse_flags(__doc__, FLAGS)             # --help, ranges, --debug: from those lines alone
    run_main(main)                                  # an Error is one line on stderr and exit code 2

Nothing here knows about audio or models. Skip it at a first reading.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]                  # the repository
BASE = HERE / "checkpoints" / "toy" / "base"
ALIGNED = HERE / "checkpoints" / "toy" / "aligned"          # what sample.py takes by default


# ----------------------------------------------------------------------------- errors

class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, and the remedy."""


@contextlib.contextmanager
def reading(path, remedy="download or write it again"):
    """Whatever fails inside, while the file `path` is read, becomes one UserError that names it.

    The one net for config.json, weights, tokenizers, sounds, manifests, votes, state.pt: no list of checks can foresee
    what a damaged or made-up file holds.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path} is missing") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be used: it is nested too deeply; {remedy}") from error
    except MemoryError as error:
        raise UserError(f"{path} cannot be used: it asks for more memory than there is") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be used: {reason[:300]}; {remedy}") from error


def run_main(main):
    """Call a script's `main()`; a UserError ends in one line and exit code 2, Ctrl-C in 130.

    --debug shows the traceback.
    """
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


# ----------------------------------------------------------------------------- flags

def flag(name, default, what, low=None, high=None, *, choices=None, kind=None, nargs=None,
         alias=None):
    """One setting of a script, for `parse_flags`.

    what: a noun phrase, with the paper's value in brackets. low, high: range of a number. kind: its
    type where the default is None. default True or False makes a switch (--name, --no-name).
    alias: an older name.
    """
    return dict(name=name, default=default, what=what, low=low, high=high, choices=choices,
                kind=kind, nargs=nargs, alias=alias)


def value_of(text, kind, low, high):
    """The number or text that was typed.

    Raises ArgumentTypeError if it is out of range; NaN is out of every range.
    """
    try:
        value = kind(text)
    except (ValueError, OverflowError):
        wanted = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
    if kind not in (int, float):
        return value
    lowest = -math.inf if low is None else low
    highest = math.inf if high is None else high
    if not lowest <= value <= highest:
        raise argparse.ArgumentTypeError(f"{text} must lie between {lowest:g} and {highest:g}")
    return value


def add_flag(group, name, default, what, low, high, choices, kind, nargs, alias):
    """Add one `flag` to a group of an argparse parser."""
    names = [name] if alias is None else [name, alias]
    shown = what.replace("%", "%%")
    if isinstance(default, bool):
        action = argparse.BooleanOptionalAction if default else "store_true"
        group.add_argument(*names, action=action, default=default,
                           help=f"{shown} (default: {default})")
        return
    example = default[0] if isinstance(default, list) and default else default
    kind = kind or (str if example is None else type(example))
    default_shown = "none" if default is None else relative_to_here(default)
    if isinstance(default, list):
        default_shown = " ".join(str(value) for value in default)
    more = {"nargs": nargs} if nargs else {}
    if nargs == "append":
        more = {"action": "append"}
    group.add_argument(*names, default=default, choices=choices,
                       type=lambda text: value_of(text, kind, low, high),
                       metavar=None if choices else name.lstrip("-").upper(),
                       help=f"{shown} (default: {default_shown})", **more)


def add_flags(parser, groups):
    """Add the groups {title: [flag, ...]} and --debug to a parser, whose errors become UserErrors."""
    def fail(message):
        raise UserError(f"{message}; see python {parser.prog} --help")
    parser.error = fail
    for title, flags in groups.items():
        group = parser.add_argument_group(title)
        for one in flags:
            add_flag(group, **one)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def new_parser(doc):
    """A parser whose --help is a script's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)


def parse_flags(doc, groups, argv=None, defaults=None):
    """The flags of a script as a namespace; `defaults` {name: value} in the place of its own (a profile's)."""
    parser = new_parser(doc)
    add_flags(parser, groups)
    parser.set_defaults(**(defaults or {}))
    return parser.parse_args(argv)


def parse_commands(doc, commands, argv=None):
    """The same for a script with subcommands {name: (what it does, groups)}; args.command says which."""
    parser = new_parser(doc)
    add_flags(parser, {})
    choices = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (what, groups) in commands.items():
        command = choices.add_parser(name, help=what, description=what, allow_abbrev=False)
        add_flags(command, groups)
    return parser.parse_args(argv)


def pick(kind, args):
    """The NamedTuple or dataclass `kind` filled from the flags of the same names."""
    names = getattr(kind, "_fields", None) or kind.__dataclass_fields__
    return kind(**{name: getattr(args, name) for name in names})


DEVICE = flag("--device", "auto", "auto, cuda, mps or cpu")
DTYPE = flag("--dtype", "auto", "precision of matrix products; auto: bfloat16 where the hardware "
             "multiplies in it (official code: float32)", choices=["auto", "float32", "bfloat16"])


# ----------------------------------------------------------------------------- device, precision, processes

def choose_device(name="auto", quiet=False):
    """"auto" takes cuda, then mps, then cpu; the choice is printed once. Raises UserError if asked in vain."""
    import torch
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    reason = "as asked"
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
        reason = "chosen automatically"
    if name not in available:
        raise UserError(f"--device {name} is unknown; use auto, cuda, mps or cpu")
    if not available[name]:
        raise UserError(f"--device {name} is not on this machine; use --device cpu or auto")
    if not quiet:
        print(f"device: {name} ({reason})")
    return torch.device(name)


def fast_bfloat16(device):
    """Whether this device multiplies in bfloat16."""
    import torch
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_dtype(name, device):
    """(torch dtype, why): "auto" is bfloat16 where the hardware multiplies in it, else float32."""
    import torch
    if name != "auto":
        return getattr(torch, name), "as asked"
    if fast_bfloat16(device):
        return torch.bfloat16, f"this {device.type} multiplies in it"
    return torch.float32, f"this {device.type} has no fast bfloat16"


def autocast_for(name, device, say=print):
    """-> autocast() for a `with`, in the precision that `choose_dtype` gives, which is told once."""
    import torch
    dtype, reason = choose_dtype(name, device)
    lower = dtype != torch.float32
    name = str(dtype).removeprefix("torch.")
    say(f"dtype: {name} ({reason}); weights and optimizer stay float32")
    # no cache of lowered weights: a step uses each once, and threads would share it (crpo.py)
    return lambda: torch.autocast(device.type, dtype if lower else None, lower, cache_enabled=False)


def side_by_side(function, pieces, device):
    """[function(piece) for piece in pieces]; on a CPU as many at a time as torch has threads, each on one.

    Small matrix products do not fill the cores when each of them is split over all; whole pieces do. Gradient mode and
    autocast belong to a thread: `function` enters them itself. Results do not depend on the number of threads.
    """
    import torch
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
    """(rank, ranks, device): one process, or several started by torchrun, which average their gradients."""
    import torch
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
    """All processes meet here."""
    import torch
    if ranks > 1:
        torch.distributed.barrier()


def mean_over_ranks(tensors, ranks):
    """Replace each tensor by its mean over the processes."""
    import torch
    if ranks == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= ranks


# ----------------------------------------------------------------------------- randomness

def derive_seed(*parts):
    """A 63-bit seed from any numbers and strings, the same on every machine: sample i of a run is (seed, i)."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts):
    """A CPU torch.Generator seeded by `derive_seed(*parts)`: noise drawn from it is the same on every device."""
    import torch
    return torch.Generator().manual_seed(derive_seed(*parts))


# ----------------------------------------------------------------------------- files

@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path` that replaces it when the block ends well: no half-written files."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(path.suffix, f".{path.stem}.", path.parent)
        os.close(handle)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    try:
        yield Path(temporary)
        os.chmod(temporary, 0o644)      # mkstemp and safetensors let only the owner read
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def check_writable(*paths):
    """Raise UserError if a file cannot be written: known before the minutes of work. Leaves no folder behind."""
    for path in map(Path, paths):
        if len(os.fsencode(path.name)) > 200:       # of 255; temporary names are longer
            raise UserError(f"cannot write {path.name[:40]}...: its name is too long")
        if path.is_dir():
            raise UserError(f"cannot write {path}: it is a folder; choose another output")
    for folder in {Path(path).parent for path in paths}:
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            for place in new:
                place.rmdir()
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}") from None


def write_text(path, text):
    """Write a text file, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path, kind=object):
    """The value in a JSON file. Raises UserError if it is missing, broken or not of `kind` (dict, list)."""
    with reading(path):
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(value, kind):
        found = type(value).__name__
        raise UserError(f"{path} cannot be used: it holds a {found}, not a {kind.__name__}")
    return value


def append_jsonl(path, row):
    """Append one JSON object as a line; a killed run leaves at most one torn last line (see read_jsonl)."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_jsonl(path, rows):
    """Write rows as JSON lines, atomically."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(path, "".join(lines))


def read_jsonl(path):
    """The rows of a JSON-lines file. A torn last line (from a kill) is dropped; any other broken line is an error."""
    with reading(path):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def file_hash(*paths):
    """SHA-256 over the bytes of files, for cache keys."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def settings_key(settings):
    """One short word for a dict of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def check_settings(place, started, wanted):
    """Raise UserError if a run found in `place` was started with other settings; names that only one has pass."""
    wanted = json.loads(json.dumps(wanted))
    for name, value in wanted.items():
        if name in started and started[name] != value:
            raise UserError(f"the run in {place} was started with {name} = {started[name]}, now it "
                            f"is {value}; give the same flags to go on, or another --out")


def whole_blocks(path, size, count):
    """The rows of a killed run's JSON lines, cut to whole blocks of `size` unless all `count` are there."""
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


def relative_to_here(value):
    """Paths without the way to this repository, also in lists and dicts: for tables and results."""
    if isinstance(value, dict):
        return {key: relative_to_here(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [relative_to_here(each) for each in value]
    if isinstance(value, (str, Path)):
        return str(value).replace(f"{HERE}/", "")
    return value


def write_report(out, name, title, command, paragraphs, numbers):
    """Print a report and write out/NAME.md and .json. paragraphs: texts and tables, in order."""
    text = "\n\n".join([f"# {title}", f"    {relative_to_here(command)}", *paragraphs]) + "\n"
    path = Path(out) / f"{name}.md"
    write_text(path, relative_to_here(text))
    write_json(path.with_suffix(".json"), relative_to_here(numbers))
    print(f"{text}\nwrote {path} and {path.with_suffix('.json')}")


def need(package, what):
    """Raise UserError if an extra is not installed."""
    from importlib.util import find_spec
    if find_spec(package) is None:
        raise UserError(f"{what} needs {package}, which is not installed: pip install {package}")


@contextlib.contextmanager
def picture(path, width=6.4, height=4.8, columns=1):
    """Yield the axes (a list) of the picture `path`, or None, after one notice, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure        # without pyplot: no window, no global state
    except ImportError:
        warn(f"matplotlib is not installed: {path} is skipped; pip install matplotlib draws it")
        yield None
        return
    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    yield list(axes)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f"wrote {path}")


def value_in(row, curve):
    """A number of a row of a log, or None: curve is its key or a function of the row."""
    return curve(row) if callable(curve) else row.get(curve)


def draw_log(out, panels, name="loss.png"):
    """The picture `name` of out/log.jsonl: a panel for each (title, "log" or "linear", {label: key or function})."""
    rows = read_jsonl(Path(out) / "log.jsonl")
    with picture(Path(out) / name, 5.5, 4, len(panels)) as axes:
        for axis, (title, scale, curves) in zip(axes or [], panels):
            for label, curve in curves.items():
                points = [(row["step"], value_in(row, curve)) for row in rows]
                points = [point for point in points if point[1] is not None]
                if points:
                    axis.plot(*zip(*points), label=label)
                    axis.legend()
            axis.set(title=title, xlabel="step", yscale=scale)
