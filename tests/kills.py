"""Ends small runs at random times, goes on with them, and compares what they leave, bit for bit.

    python tests/kills.py --kills 200 --seed 0      # counts by command and end; --only 17: trial 17 of that seed again

A trial ends one command one to three times, by SIGKILL, SIGTERM or SIGINT at random times or by a full disk (a tmpfs), then
runs it to its end: all files must be there, no other, and equal those of an undisturbed run.
"""
import argparse
import contextlib
import importlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import soundfile                                                        # noqa: E402
import torch                                                            # noqa: E402

from lib.common import markdown, run_main, write_jsonl, write_text      # noqa: E402
from world import scenes                                                # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
SAVES = "--save_every 3 --log_every 1"
TUNES = f"--checkpoint golden/model --batch_size 4 --val_every 6 --val_clips 3 --cache cache {SAVES}"
COMMANDS = {                                                            # {command: flags}, where golden/ lies
    "train_fm": f"--data golden/many.jsonl --train_steps 20 --sigma_rel 0.1 --snapshot_every 7 {TUNES}",
    "train_fm world": f"--muon 10 --train_text --scenes 66 --val_scenes 3 --train_steps 12 {TUNES}",
    "vae": "--config golden/vae_config.json --clips 3 --validation_clips 1 --batch_size 2 --train_steps 15 --crop_seconds 0.256 "
           f"{SAVES}",
    "crpo": "--checkpoint golden/model --iterations 2 --prompts 3 --num_samples 2 --pool 9 --eval_prompts 2 --steps 2 "
            f"--batch_size 4 --epochs 5 --save_clips 2 {SAVES}",
    "expert_iteration": "--checkpoint golden/score --data golden/many.jsonl --ranker golden/ranker --cache cache --prompts 6 --keep 3 "
                        "--pool 12 --steps 1 --tuning_steps 5 --polish_steps 3 --save_every 2 --save_clips 4 --batch_size 4",
    "sample": "--checkpoint golden/model --prompt_file golden/prompts.txt --batch_size 2 --steps 4 --duration 1",
    "world.votes": "--codec golden/model --scenes 20 --takes 2 --votes 50"}
for loss in ("dpo", "crpo --safeguard 0.9", "nft", "dgpo", "awm", "grpo"):
    COMMANDS[f"crpo {loss}"] = f"{COMMANDS['crpo']} --loss {loss}"
ENDS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "full disk": None}
TIMES = {"minutes", "seconds"}                                          # of a row: never twice the same


def set_up(work):
    """Fill the folder: golden/ with a model, a ranker, a manifest of many rows on four sounds, prompts."""
    golden = work / "golden"
    for name in ("model", "score", "ranker"):
        shutil.copytree(GOLDEN / name, golden / name)
    shutil.copy(GOLDEN / "vae_config.json", golden)
    for number in range(4):
        soundfile.write(golden / f"{number}.wav", [0.3 * math.sin(i * (0.05 + 0.1 * number)) for i in range(8000)], 16000)
    write_jsonl(golden / "many.jsonl", [{"audio": f"{i % 4}.wav", "caption": f"rain {i}", "score": i % 7} for i in range(80)])
    write_text(golden / "prompts.txt", "".join(f"rain {i}\n" for i in range(9)))
    for path in golden.iterdir():
        os.utime(path, (0, 0))                                          # caches may remember the time of a sound


def warm_up(commands):
    """Import here what the children would import one by one. No backward pass: it forbids to fork."""
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    scenes.DataLoader = lambda jobs, *_, collate_fn, **more: map(collate_fn, jobs)     # no processes below the children
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    with contextlib.suppress(ImportError):
        importlib.import_module("matplotlib.backends.backend_agg")
    mains = {command.split()[0]: importlib.import_module(command.split()[0]).main for command in (*commands, "ranker")}
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work), open(os.devnull, "w") as null:
        set_up(Path(work))
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            mains["sample"]([*COMMANDS["sample"].split(), "--device", "cpu"])
            mains["ranker"]("--data golden/many.jsonl --ranker golden/ranker --column new".split())


def start(module, words, work, stderr, prepare=list):
    """Run a script in the folder `work`, in a forked child -> its process id. prepare(): called there first."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        for stream, name in enumerate((os.devnull, os.devnull, stderr)):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(work)
        prepare()
        sys.argv = [f"{module}.py", *words]
        run_main(importlib.import_module(module).main)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(process, seconds=60):
    """Exit code of a child, or minus its signal; None: it did not end in time, and is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def plain(value):
    """A nested value without times; tensors as (dtype, numbers), so that == compares bits (but of NaN)."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items() if key not in TIMES}
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def content(path):
    """What a file holds, to be compared; of a picture or a temporary file nothing."""
    if path.suffix == ".png" or path.name.startswith("."):
        return None
    if path.suffix == ".jsonl":
        return [plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    return plain(torch.load(path, weights_only=True)) if path.suffix == ".pt" else path.read_bytes()


def contents(work):
    """{path: content} of all files but those of golden/; the lock of a killed process does no harm."""
    files = [path.relative_to(work) for path in work.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): content(work / path) for path in files if path.parts[0] != "golden"}


def spoken(text):
    """The lines of a stderr, without progress bars."""
    lines = [re.sub(r"\x1b\[\w", "", line.split("\r")[-1]).strip() for line in text.splitlines()]
    return [line for line in lines if line and not re.search(r"%\||it/s|s/it|it \[", line)] or [""]


def complaints(code, text, allowed):
    """What is wrong with how a process ended and with what it said: a list of at most one sentence."""
    lines = spoken(text)
    errors = [line for line in lines if line.startswith("error: ")]
    if "Traceback" in text or code not in allowed:
        return [f"exit code {code}: {lines[-1][:200]}"]
    if code == 2 and (errors != lines[-1:] or len(lines[-1]) > 1000):
        return [f"not one line: {lines[-1][:200]}"]
    return []


def mount(folder, size, option=""):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"{option}size={size}", "tmpfs", folder], check=True, capture_output=True)


def run(command, work, end=None, seconds=0.0):
    """Run it in `work` and send the signal `end` after some seconds -> (exit code, stderr)."""
    stderr = work.parent / "stderr"
    stderr.write_text("")
    process = start(command.split()[0], [*COMMANDS[command].split(), "--device", "cpu"], work, stderr)
    if end:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, end)
    return wait(process), stderr.read_text()


def undisturbed(command, work):
    """Its contents, seconds and bytes."""
    work.mkdir()
    set_up(work)
    began = time.monotonic()
    code, text = run(command, work)
    seconds, reference = time.monotonic() - began, contents(work)
    size = sum((work / name).stat().st_size for name in reference)
    print(f"{command}: {seconds:.1f} s, {len(reference)} files, {size / 1e6:.1f} MB", flush=True)
    if code:
        sys.exit(f"it ends with {code}: {text[-500:]}")
    shutil.rmtree(work)
    return reference, seconds, size


def trial(rng, command, end, work, reference, seconds, size):
    """A run that is ended, and goes on -> (what is wrong, was it ended before its end)."""
    wrong, ended, full = [], False, end == "full disk"
    work.mkdir()
    if full:
        mount(work, "64m")
    set_up(work)
    if full:
        mount(work, shutil.disk_usage(work).used + int(1.1 * size * rng.random()), "remount,")
    for _ in range(1 if full else rng.choice([1, 1, 2, 3])):
        code, text = run(command, work, ENDS[end], rng.random() * seconds)
        allowed = {"SIGKILL": (0, -9), "full disk": (0, 2)}.get(end, (0, 130, -15, -2))
        wrong += [f"when ended, {each}" for each in complaints(code, text, allowed)]
        ended = ended or code != 0
    if full:
        mount(work, "64m", "remount,")
    wrong += [f"going on, {each}" for each in complaints(*run(command, work), (0,))]
    now = contents(work)
    if end in ("SIGTERM", "SIGINT"):                    # who is asked to stop saves, and logs, at that step
        now = {name: reference.get(name) if name.endswith("/log.jsonl") else now[name] for name in now
               if name in reference or "averages/" not in name}
    other = [name for name in reference.keys() & now if reference[name] != now[name]]
    for what, names in (("other", other), ("missing", reference.keys() - now), ("left over", now.keys() - reference)):
        wrong += [f"{what}: {', '.join(sorted(names)[:4])}"] if names else []
    return wrong, ended


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="number of trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one trial")
    parser.add_argument("--commands", default=list(COMMANDS), nargs="+", choices=list(COMMANDS))
    args = parser.parse_args()
    warm_up(COMMANDS)
    counts, references, ends = Counter(), {}, list(ENDS)
    top = tempfile.TemporaryDirectory(prefix="kills_")
    work = Path(top.name, "work")                       # always the same, because caches hold paths
    try:
        mount(top.name, "1m")
        subprocess.run(["umount", top.name], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        ends.remove("full disk")
        print(f"no full disk is tried, because no tmpfs can be mounted: {error}")
    for number in range(args.kills) if args.only is None else [args.only]:
        rng = random.Random(f"{args.seed} {number}")
        command, end = args.commands[number % len(args.commands)], rng.choice(["SIGKILL", "SIGKILL", *ends])
        if command not in references:
            references[command] = undisturbed(command, work)
        try:
            wrong, ended = trial(rng, command, end, work, *references[command])
        finally:
            if os.path.ismount(work):
                subprocess.run(["umount", work], check=True)
            shutil.rmtree(work)
        counts[command, end if ended else "ended first"] += 1
        if wrong:
            counts["failures"] += 1
            print(f"trial {number}, {command}, {end}: {'; '.join(wrong)}", flush=True)
    heads = [*ends, "ended first"]
    print(markdown(["command", *heads], [[command, *[counts[command, head] for head in heads]] for command in args.commands]))
    print(f"seed {args.seed}: {counts.total() - counts['failures']} trials, {counts['failures']} failures")
    sys.exit(bool(counts["failures"]))


if __name__ == "__main__":
    main()
