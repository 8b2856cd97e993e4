"""What every script shares: one-line errors, flags, device, randomness, files, tables, pictures.

    FLAGS = {"sampler": [flag("--steps", 25, "solver steps (paper 3.3: 50)", 1, 1000)]}
    args = parse_flags(__doc__, FLAGS)             # --help, ranges, --debug: from those lines alone

Nothing here knows about audio or models. Skip it at a first reading.
"""
import argparse
import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

fcntl = importlib.util.find_spec("fcntl") and importlib.import_module("fcntl")  # not on Windows
HERE = Path(__file__).resolve().parents[1]                  # the repository
CLEAN = HERE / "checkpoints/toy/clean"      # learned from true captions: sample.py's default
BASE = HERE / "checkpoints/toy/base"        # CLEAN after weak captions: crpo.py's default
ALIGNED = HERE / "checkpoints/toy/aligned"  # BASE after crpo.py: evaluate.py's default


# ----------------------------------------------------------------------------- errors

class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, and the remedy."""


@contextlib.contextmanager
def reading(path, remedy="download or write it again"):
    """Whatever fails inside, while the file `path` is read, becomes one UserError that names it:
    no list of checks can foresee what a damaged or made-up file holds."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename or path} is missing; check the path") from error
    except (Exception, SystemExit) as error:                # a user's own code may exit
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if re.search("weights_only|PytorchStream", reason):     # torch's long advice
            reason = "it is no file of torch, or torn"
        raise UserError(f"{path} cannot be used: {reason[:300]}; {remedy}") from error


def run_main(main):
    """Call a script's `main()`. What the user can mend ends in one line and exit code 2 (--debug:
    a traceback), a reader of stdout that went away in 1, Ctrl-C in 130."""
    logging.raiseExceptions = False     # a library's broken log message prints no traceback
    with contextlib.suppress(AttributeError):               # there may be no stdout
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
    except KeyboardInterrupt as error:
        print("; ".join(["stopped", *error.args]), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # a full stdout fails no second time
        if isinstance(error, MemoryError) or re.search("allocate memory|out of memory", text):
            text = f"not enough memory: {text}; ask for less at a time"
        elif not isinstance(error, (UserError, OSError)):
            raise
        if "--debug" in sys.argv:
            raise
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)


@contextlib.contextmanager
def stop_on_signal():
    """Around a loop that saves: yield a list that the first Ctrl-C or SIGTERM fills; a second one
    stops at once. Raises KeyboardInterrupt when the block ends after a signal."""
    caught = []
    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        with contextlib.suppress(OSError):      # os.write, because print may be at work
            os.write(2, b"\nstopping after this step; again: at once\n")
    here = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
    old = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if caught:
        raise KeyboardInterrupt("the same command goes on")


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
    shown = " ".join("none" if value is None else str(value) for value in values) or "none"
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
                group.add_argument(*filter(None, [one["name"], one["alias"]]), **one["options"])
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


def command_line(script, argv=None):
    return f"python {script} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def pick(kind, args):
    """The NamedTuple `kind` filled from the flags of the same names."""
    return kind(*(getattr(args, name) for name in kind._fields))


DEVICE = flag("--device", "auto", "auto, cuda, mps or cpu")
DTYPE = flag("--dtype", "auto", "precision of matrix products; auto: bfloat16 where it is fast "
             "(official: float32)", choices=["auto", "float32", "bfloat16"])


# ----------------------------------------------------------------------- device, precision

def choose_device(name="auto", quiet=False):
    """"auto" takes cuda, then mps, then cpu, and prints it. UserError: `name` is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    reason = "chosen automatically" if name == "auto" else "as asked"
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
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
    say(f"dtype: {str(dtype).removeprefix('torch.')} ({reason}); weights, optimizer stay float32")
    # no cache of lowered weights: a step uses each once, and threads would share it (crpo.py)
    return lambda: torch.autocast(device.type, dtype if lower else None, lower, cache_enabled=False)


def side_by_side(function, pieces, device):
    """[function(piece) for piece in pieces]; on a CPU in threads, because small matrix products do
    not fill the cores. Gradient mode and autocast are a thread's own: `function` enters them."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(pieces) == 1:
        return [function(piece) for piece in pieces]
    torch.set_num_threads(1)                        # new threads take it over; nested calls find 1
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(function, pieces))
    finally:
        torch.set_num_threads(threads)


# ----------------------------------------------------------------------------- randomness

def derive_seed(*parts):
    """A 63-bit seed from numbers and strings, the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts):
    """A generator seeded by `derive_seed`, on the CPU: its noise is the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


# ----------------------------------------------------------------------------- files

@contextlib.contextmanager
def folder_for(path):
    """In the block there is the folder of a file; made for it and still empty, it goes again."""
    new = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in new:
            with contextlib.suppress(OSError):      # it has gone, or holds something
                folder.rmdir()


@contextlib.contextmanager
def writing(path, temporary=None):
    """An OSError in the block becomes a UserError that names the file `path`; so do those that
    safetensors and torch do not raise as such while they write `temporary`."""
    try:
        try:
            yield
        except Exception as error:
            if code := re.search(r"os error (\d+)", str(error)):        # safetensors' words
                raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
            if isinstance(error, RuntimeError) and temporary:   # torch's: this write fails alike
                with open(temporary, "ab") as file:
                    file.write(bytes(1 << 20))
            raise
    except OSError as error:
        reason = f"cannot write {path}: {error.strerror}; choose another place"
        if error.errno == errno.ENOSPC:
            there = next(filter(os.path.exists, Path(path).absolute().parents))
            size = os.path.getsize(temporary) if temporary and temporary.exists() else 0
            size = (size + shutil.disk_usage(there).free) / 1e6
            reason = f"no space left writing {path} (needs more than {size:.2f} MB)"
        raise UserError(reason) from error


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path that replaces `path` when the block ends well: no torn file, no
    temporary one, no empty folder is left. Raises UserError."""
    path = Path(path)
    # in a folder, because safetensors makes a temporary file of its own
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing") / path.name
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.writing"):
        dead = os.path.isdir("/proc/self") and not os.path.isdir(f"/proc/{old.suffixes[-2][1:]}")
        if dead or time.time() - os.path.getmtime(old) > 3600:      # of a killed run
            shutil.rmtree(old, ignore_errors=True)
    with writing(path), folder_for(temporary):
        try:
            with writing(path, temporary):
                yield temporary
                temporary.chmod(0o644)                      # safetensors lets only the owner read
                temporary.replace(path)
        finally:
            shutil.rmtree(temporary.parent, ignore_errors=True)


def check_writable(*paths):
    """UserError if a file cannot be written: known before minutes of work. Leaves no folder."""
    for path in map(Path, paths):
        if os.path.isdir(path):
            raise UserError(f"cannot write {path}: it is a folder; choose another output")
        with contextlib.suppress(EOFError), atomic_path(path):
            raise EOFError                                  # so that nothing is written


@contextlib.contextmanager
def locked(folder):
    """Make a folder and lock it for the block. UserError if another process holds the lock, which
    dies with its process. Of torchrun's processes the first one locks."""
    if fcntl is None or int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    path = Path(folder) / ".lock"
    check_writable(path)
    with folder_for(path), open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; wait for it, or choose "
                            "another folder") from None
        except OSError as error:            # some network file systems know no locks
            warn(f"{folder} cannot be locked ({error.strerror}): start one run at a time there")
        if os.path.exists(path) and os.path.samefile(path, file.fileno()):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
    with locked(folder):                # the file was removed by the process that had it: again
        yield


def write_text(path, text):
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")    # surrogates


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
    surrogates = {"encoding": "utf-8", "errors": "backslashreplace"}
    with writing(path), folder_for(Path(path)), open(path, "a", **surrogates) as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_jsonl(path, rows):
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


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
    """UserError if the run in `place` had other settings; names that only one has pass, and another
    code_hash() as "code" is but a warning."""
    for name, value in json.loads(json.dumps(wanted)).items():
        if name == "code" and started.get(name, value) != value:
            warn(f"the run in {place} was begun by other code, and goes on by this one")
        elif name in started and started[name] != value:
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
    text = relative_to_here("\n\n".join([f"# {title}", f"    {command}", *paragraphs]) + "\n")
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
