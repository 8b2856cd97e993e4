"""Plumbing that every script shares: one-line errors, the device, generators, atomic files.

Nothing here knows about audio or models. It lives once so that the scripts can read as stories.
"""
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong and the remedy."""


def run_main(main):
    """Call a script's `main()`; a UserError ends in one line on stderr and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def parse_arguments(parser, argv=None, commands=()):
    """parse_args, but a wrong argument is one line (UserError) and not the usage. `commands`: its subparsers."""
    def fail(message):
        raise UserError(f"{message}; see python {parser.prog} --help")
    for one in (parser, *commands):
        one.error = fail
    return parser.parse_args(argv)


def in_range(name, value, low, high):
    """Return `value` if low <= value <= high, else raise UserError; NaN is out of every range."""
    if not low <= value <= high:
        raise UserError(f"{name} is {value}, but must lie between {low:g} and {high:g}")
    return value


def warn(message):
    """One line on stderr for something that is odd but does not stop the run."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


# ----------------------------------------------------------------------------- device and randomness

def choose_device(name="auto", quiet=False):
    """"auto" takes cuda, then mps, then cpu; the choice is printed once. Raises UserError if asked in vain."""
    import torch
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind]())
        reason = "chosen automatically"
    else:
        reason = "as asked"
    if name not in available:
        raise UserError(f"--device {name} is unknown; use auto, cuda, mps or cpu")
    if not available[name]():
        raise UserError(f"--device {name} is not available on this machine; use --device cpu or auto")
    if not quiet:
        print(f"device: {name} ({reason})")
    return torch.device(name)


def side_by_side(function, pieces, device):
    """[function(piece) for piece in pieces]; on a CPU as many at a time as torch has threads, each on one.

    Small matrix products do not fill the cores when each of them is split over all, whole pieces do. Gradient mode and
    autocast belong to a thread: `function` has to enter them itself. Results do not depend on the number of threads.
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
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        os.chmod(temporary, 0o644)      # mkstemp makes files that only their owner may read
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another output folder") from None
    try:
        yield Path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def check_writable(paths, keep=True):
    """Raise UserError if a file cannot be written: known before the minutes of work, not after.

    Folders that this had to make are removed again unless `keep`.
    """
    for path in map(Path, paths):
        if os.path.isdir(path):
            raise UserError(f"cannot write {path}: it is a folder; choose another output")
        if len(os.fsencode(path.name)) > 200:       # file systems end at 255, and temporary names are longer
            raise UserError(f"cannot write {path.name[:40]}...: its name is too long; choose a shorter output")
    for folder in {Path(path).parent for path in paths}:
        new = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            for place in [] if keep else new:
                place.rmdir()
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}; choose another output folder") from None


def write_json(path, value):
    """Write `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON file. Raises UserError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None


def append_jsonl(path, row):
    """Append one JSON object as a line; a killed run leaves at most one torn last line (see read_jsonl)."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_jsonl(path, rows):
    """Write rows as JSON lines, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path):
    """The rows of a JSON-lines file. A torn last line (from a kill) is dropped; any other broken line is an error."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not JSON: {error}") from None
    return rows


def save_tensors(path, tensors, metadata=None):
    """Write a {name: tensor} dict as safetensors, atomically."""
    from safetensors.torch import save_file
    with atomic_path(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        os.chmod(temporary, 0o644)      # safetensors writes files that only their owner may read


def load_tensors(path):
    """Read a safetensors file into {name: CPU tensor}. Raises UserError if missing, truncated or not safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download or write it again") from None


def load_exactly(module, tensors, what):
    """Load `tensors` into `module`; missing, unknown or misshapen names are a UserError that lists them.

    Tensors are cast to the module's dtype (the bundled weights are float16, the modules float32).
    """
    missing_and_unknown(module.state_dict(), {name: tensor.shape for name, tensor in tensors.items()}, what)
    module.load_state_dict(tensors)


def missing_and_unknown(own, shapes, what):
    """UserError listing what separates the tensors that a module has ("own") from the {name: shape} of a file."""
    problems = [f"missing {name}" for name in own if name not in shapes]
    problems += [f"unknown {name}" for name in shapes if name not in own]
    problems += [f"{name} is {tuple(shapes[name])}, expected {tuple(own[name].shape)}"
                 for name in own if name in shapes and tuple(shapes[name]) != tuple(own[name].shape)]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(f"{what} does not fit its config: {shown}")


def file_hash(*paths):
    """SHA-256 over the bytes of files, for cache keys."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
