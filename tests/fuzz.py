"""Throws made-up inputs at every script, and counts what does not end as it should.

    python tests/fuzz.py --inputs 2000 --seed 0          # needs hypothesis; prints a table, then each finding once

An input is a command in small with one thing in it broken: its flags, a manifest, a sound, a model, prompts, pairs, votes, a
ranker, or the files of a run or a cache. Right is exit code 0, or 2 and one line "error: ..." at the end of stderr; nothing
is written outside of the working folder, no empty folder and no temporary file stays, and 20 s are enough.
"""
import argparse
import contextlib
import importlib
import io
import json
import os
import re
import resource
import shutil
import struct
import sys
import tempfile
from collections import Counter
from copy import deepcopy
from itertools import permutations
from pathlib import Path

import kills                                    # one thread, no network: before torch comes
import numpy as np
import soundfile
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies as st
from kills import GOLDEN, ROOT
from safetensors.torch import load, save

from lib import common

SECONDS, MEMORY, FILE_SIZE = 20, 6 << 30, 1 << 30                       # limits of one input
MODEL = "--checkpoint golden/model"
COMMANDS = {                                    # {command: flags}, where golden/ and checkpoints/ lie
    "sample": f"{MODEL} --steps 1 --duration 0.5 --dtype float32", "data": "--count 2",
    "vae": "--config golden/vae_config.json --clips 2 --validation_clips 1 --train_steps 1 --batch_size 1 --crop_seconds 0.256",
    "train_fm": f"{MODEL} --train_steps 1 --scenes 3 --val_scenes 2 --val_clips 2 --batch_size 2 --dtype float32",
    "crpo": f"{MODEL} --iterations 1 --prompts 2 --num_samples 2 --eval_prompts 2 --pool 4 --steps 1 --epochs 1",
    "expert_iteration": "--checkpoint golden/score --data golden/many.jsonl --ranker golden/ranker --prompts 3 --keep 2 --pool 4 "
                        "--steps 1 --tuning_steps 1 --polish_steps 1",
    "evaluate": f"{MODEL} --against golden/model --prompts 2 --steps 1 --draws 20",
    "reward": "--audio golden/0.wav --prompt rain", "lib.audio": "golden/0.wav",
    "ranker": "--data golden/many.jsonl --ranker golden/ranker --column new",
    "world.votes": "--scenes 2 --takes 2 --votes 4 --codec golden/model",
    "world.train_ranker": "--votes golden/votes.jsonl --widths 4 --epochs 1 --batch_size 4",
    "world.train_ears": "--scenes 3 --val_scenes 2 --width 12 --layers 1 --train_steps 1 --batch_size 2",
    "world.reader": "--width 4 --train_steps 1", "world.bundle": "--flow golden/model",
    "experiments.toy text": f"{MODEL} --prompts 2 --steps 1", "experiments.flow_picture": f"{MODEL} --steps 6"}
OLD = json.loads((GOLDEN / "commands.json").read_text())                # commands that go on with stopped runs
# (what is broken, command, flags behind its own, folder of the broken file); FILE: the broken file
CASES = [*[("manifest", name, "--data golden/FILE", "") for name in (
             "data", "vae", "train_fm", "train_fm", "ranker", "expert_iteration", "evaluate")],
         ("manifest", "train_fm", "--data golden/FILE --score_column score", ""), ("sound", "data", "--data golden/one.jsonl", ""),
         ("sound", "reward", "--audio golden/FILE", ""), ("sound", "lib.audio", "golden/FILE", ""),
         *[("prompts", name, "--prompt_file golden/FILE", "") for name in ("sample", "crpo", "expert_iteration")],
         ("pairs", "crpo", "--pairs golden/FILE", ""), ("votes", "world.train_ranker", "--votes golden/FILE", ""),
         *[("model", name, "", "model") for name in ("sample", "train_fm", "crpo", "evaluate", "world.bundle", "world.votes")],
         ("model", "vae", MODEL, "model"), ("clap", "reward", "--clap golden/clap", "clap"),
         ("ranker", "ranker", "", "ranker"), ("ranker", "expert_iteration", "", "ranker"),
         *[("run", name, OLD[run], run.replace("flow_", "flow/")) for name, run in (
             ("train_fm", "run_flow_adamw"), ("train_fm", "run_flow_muon"), ("vae", "run_vae"), ("crpo", "run_crpo"),
             ("expert_iteration", "run_experts"), ("world.train_ears", "run_tagger"))],
         ("cache", "train_fm", OLD["run_flow_muon"].replace("run_flow/muon", "new"), "latents"),
         *[("flags", name, "", "") for name in COMMANDS]]
KINDS = list(dict.fromkeys(case[0] for case in CASES))
NAMES = [f"{i}.wav" for i in range(4)]
TWO = list(permutations(NAMES, 2))
ROWS = {"manifest": [{"audio": name, "caption": f"rain {name}", "duration": 0.4, "score": i} for i, name in enumerate(NAMES)],
        "prompts": [{"prompt": "rain", "duration": 0.5}, {"prompt": "a bell"}] * 2,
        "pairs": [{"prompt": "rain", "duration": 0.5, "winner": a, "loser": b} for a, b in TWO[:3]],
        "votes": [{"prompt": f"rain {i}", "a": a, "b": b, "source": "s", "preference": i % 3 / 2} for i, (a, b) in enumerate(4 * TWO)]}
HUGE, LONG = "@1e400@", "@digits@"                                      # numbers that json.dumps cannot write
ODD = [None, True, -1, 0, 1, 0.5, 2 ** 31, 2 ** 63, 1e300, float("nan"), float("-inf"), 10 ** 400, HUGE, LONG, "", " ", "x" * 300,
       "\ud800", "é\u202e\0", "nan", "../../x", "/", "a.wav", [], {}, [[]], ["0.wav", "1.wav"], {"a": 1}, [None], "I64", "F8_E4M3"]
TEXTS = ["", "\ufeff", "{", "[]", "[[" * 50_000, "null\n", "\0" * 40, '{"a": ' * 50_000, "a,b\n1\n", ",,,\n,,,,\n", "\r\n \r\n"]
WORDS = ["nan", "-1", "0", "1e400", "inf", "-0.0", "1e-400", "9" * 20, "", " ", "é", "\udcff", "golden", "/dev/null", "golden/fifo",
         "missing/x.json", "x" * 300, "a\nb", "{}", "[1", "golden/0.wav", "golden/model/config.json", "\t", "True", "0x10", "1_0",
         "３", "golden/many.jsonl", "mel", "cuda", "--out", "out/a/b"]
TENSORS = [None, [], "x", -1, 10 ** 9, float("nan"), {}, torch.zeros(1), torch.zeros(3, 3), torch.zeros(2).int(), "[1]", "[[["]
SAID = []                                                               # how the last input was broken, in words


# ----------------------------------------------------------------------------- how things are broken

def choose(draw, *values):
    return draw(st.sampled_from(values))


def places_in(value):
    """[(container, key)] of all that a nested value holds."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in pairs for place in [(value, key), *places_in(inner)]]


def break_value(draw, value, odd=ODD):
    """The value with one to three of its places replaced, renamed, wrapped or taken out, in place."""
    for _ in range(draw(st.integers(1, 3))):
        if not (spots := places_in(value)):
            break
        container, key = choose(draw, *spots)
        how = choose(draw, "odd", "odd", "odd", "out", "wrapped", "renamed")
        old = container.pop(key) if how in ("out", "renamed") else container[key]
        if how == "renamed" and isinstance(container, dict):
            container[choose(draw, "location", "captions", "youtube_id", "audiocap_id", "chosen", "x")] = old
        elif how in ("odd", "wrapped"):
            container[key] = deepcopy(choose(draw, *odd)) if how == "odd" else [old]     # else the next one breaks `odd`
        SAID.append(f"{how}: {key!r} is {str(container[key])[:40] if how in ('odd', 'wrapped') else how}")
    return value


def break_bytes(draw, data):
    """The bytes cut, overwritten, followed or replaced by others."""
    how = choose(draw, "cut", "cut", "overwritten", "overwritten", "start", "followed", "noise")
    at = draw(st.integers(0, max(0, min(len(data), 100 if how == "start" else len(data)) - 1)))
    more = draw(st.binary(min_size=1, max_size=24))
    SAID.append(f"{how} at {at} of {len(data)} bytes: {more!r}")
    return {"cut": data[:at], "followed": data + more, "noise": more}.get(how, data[:at] + more + data[at + len(more):])


def json_text(value):
    return json.dumps(value).replace(f'"{HUGE}"', "1e400").replace(f'"{LONG}"', "9" * 5001)


def table(draw, rows, suffix):
    """Rows with odd values as .jsonl, .json or .csv, perhaps torn, marked or of another encoding -> bytes."""
    rows = break_value(draw, json.loads(json.dumps(rows)))
    text = json_text(rows) if suffix == "json" else "".join(f"{json_text(row)}\n" for row in rows)
    if suffix == "csv":
        objects = [row if isinstance(row, dict) else {"x": row} for row in rows]
        keys = list(dict.fromkeys(key for row in objects for key in row))
        lines = [keys, *[[str(row.get(key, ""))[:6000] for key in keys] for row in objects]]
        text = "\n".join(map(",".join, lines))
    marked = ["\ufeff" + text, text.replace("\n", "\r\n"), text[:-9], text + text[:20], text * 2]
    text = choose(draw, *[text] * 5, *marked, *TEXTS)
    return text.encode(choose(draw, *["utf-8"] * 7, "utf-16"), "surrogatepass")


def sound(draw):
    """A sound whose header lies, whose samples are odd, or whose bytes are broken."""
    rate, channels = choose(draw, 0, 1, 999, 16000, 44100, 99_999_989, 2 ** 31 - 1, 2 ** 32 - 1), choose(draw, 0, 1, 2, 7, 65535)
    kind, samples, bits = choose(draw, "header", "WAV", "FLAC", "OGG", "FLOAT"), choose(draw, 0, 1, 3000, 40000), choose(draw, 0, 8, 16, 64)
    size = choose(draw, 0, 3, 8000, 2 ** 31, 2 ** 32 - 1)
    SAID.append(f"{kind}, {rate} Hz, {channels} channels, {samples} samples, {bits} bits, {size} bytes")
    form = struct.pack("<HHIIHH", choose(draw, 0, 1, 3, 85), channels, rate, 2 * rate % 2 ** 32, channels * bits // 8 % 2 ** 16, bits)
    data = b"RIFF" + struct.pack("<I", size) + b"WAVEfmt \x10\0\0\0" + form + b"data" + struct.pack("<I", size) + bytes(8000)
    if kind != "header":
        wave, file = np.full((samples, max(1, min(channels, 7))), choose(draw, 0.0, 0.5, 1e-6)), io.BytesIO()
        wave[::2] = choose(draw, np.nan, np.inf, 1e38) if kind == "FLOAT" else 0.1
        soundfile.write(file, wave, rate if 1 < rate < 50_000 and kind != "OGG" else 16000,
                        "FLOAT" if kind == "FLOAT" else None, format=kind.replace("FLOAT", "WAV"))
        data = file.getvalue()
    return break_bytes(draw, data) if draw(st.booleans()) else data


def tensors(draw, data):
    """The bytes of a .safetensors, its header or one of its tensors changed."""
    if choose(draw, "header", "tensor", "tensor") == "header":
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json_text(break_value(draw, json.loads(data[8:end]))).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header)) + header + data[end:]
    state = load(data)
    name = choose(draw, *sorted(state))
    old = state.pop(name)
    dtypes = [old.to(dtype) for dtype in (torch.int64, torch.complex64, torch.bool, torch.float8_e4m3fn, torch.float64)]
    numbers = [torch.full_like(old, value) for value in (np.nan, np.inf, 6e4, 0)] if old.is_floating_point() else []
    new = choose(draw, *dtypes, *numbers, old.flatten(), old[None], old.flatten()[:1].clone(), old.flatten()[:0], old.sum(), old)
    SAID.append(f"{name} {tuple(old.shape)} is {new.dtype} {tuple(new.shape)} {new.flatten()[:1].tolist()}")
    return save({**state, "other" if new is old else name: new.contiguous()})


def broken_file(draw, path):
    """Bytes in the place of a file of a model, ranker, run or cache; None: it is missing."""
    data, how = path.read_bytes(), draw(st.integers(0, 9))
    if how < 2 or not data:
        SAID.append("missing" if how == 0 else "a text")
        return None if how == 0 else choose(draw, *TEXTS).encode()
    if path.suffix == ".safetensors" and how > 3:
        return tensors(draw, data)
    if path.suffix == ".pt" and how > 3:
        torch.save(break_value(draw, torch.load(path, weights_only=True), TENSORS), file := io.BytesIO())
        return file.getvalue()
    if path.suffix == ".jsonl" and how > 3:
        return table(draw, common.read_jsonl(path), "jsonl")
    if path.suffix == ".json" and how > 3:
        return json_text(break_value(draw, json.loads(data))).encode("utf-8", "surrogatepass")
    return break_bytes(draw, data)


def flags_of(command):
    """The names of a script's flags; --debug, which asks for tracebacks, is none of them."""
    module = importlib.import_module(command.split()[0])
    groups = module.COMMANDS[command.split()[1]][1] if " " in command else module.FLAGS
    return [one["name"] for group in groups.values() for one in group if one["name"].startswith("--")]


@st.composite
def inputs(draw):
    """(what is broken, command, words behind it, {path below golden: bytes, or None: missing}, broken folder)."""
    kind = choose(draw, *KINDS)
    _, command, more, folder = choose(draw, *[case for case in CASES if case[0] == kind])
    words, path, data = f"{COMMANDS[command]} {more}".split(), "", None
    SAID.clear()
    if kind == "flags":
        for _ in range(draw(st.integers(1, 2))):
            odd = draw(st.lists(st.sampled_from(WORDS) | st.text(max_size=8), min_size=1, max_size=choose(draw, 1, 1, 3)))
            words += [choose(draw, *flags_of(command)), *[word.replace("\0", "0") for word in odd]]
    elif kind in ("sound", *ROWS):
        path = "broken." + choose(draw, *(["wav", "flac", "ogg"] if kind == "sound" else ["jsonl", "jsonl", "json", "csv", "txt"]))
        data = sound(draw) if kind == "sound" else table(draw, ROWS[kind], path.split(".")[1])
    else:
        source = common.BASE / "clap_reward" if kind == "clap" else GOLDEN / folder
        file = choose(draw, *sorted(file for file in source.rglob("*") if file.is_file()))
        path, data = f"{folder}/{file.relative_to(source)}", broken_file(draw, file)
        words = words if kind not in ("run", "cache") else more.split()[2:]
    return kind, command, [word.replace("FILE", path) for word in words], {path: data} if path else {}, folder


# ----------------------------------------------------------------------------- one input

def set_up(work, files, folder):
    """Fill the working folder: whole files of every kind in golden/, and the broken ones."""
    golden = work / "golden"
    kills.set_up(work)
    for name in {folder, "latents"} - {"", "clap", "model", "ranker"}:
        shutil.copytree(GOLDEN / name, golden / name)
    if folder == "clap":
        shutil.copytree(common.BASE / "clap_reward", golden / folder)
    for name in ("checkpoints", "sounds"):
        (work / name).symlink_to(ROOT / name)
    os.mkfifo(golden / "fifo")
    common.write_jsonl(golden / "many.jsonl", ROWS["manifest"])
    common.write_jsonl(golden / "votes.jsonl", ROWS["votes"])
    common.write_jsonl(golden / "one.jsonl", [{"audio": path, "caption": "rain"} for path in files])
    for path, data in files.items():
        (golden / path).unlink(missing_ok=True)
        if data is not None:
            (golden / path).write_bytes(data)


def limits(work):
    """Of a child: memory and file size; what it writes outside of `work` is noted."""
    log = os.open(work.parent / "outside", os.O_WRONLY | os.O_CREAT)

    def hook(event, arguments):
        opened = event == "open" and isinstance(arguments[0], (str, bytes)) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opened or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink"):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not f"{path}/".startswith((f"{work}/", "/dev/")):
                os.write(log, f"{path}\n".encode("utf-8", "replace"))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    sys.addaudithook(hook)


def run(command, words, files, folder, place):
    """One input in the empty folder `place` -> (exit code, lines of stderr, {what is wrong: where})."""
    work, wrong = place / "work", {}
    work.mkdir()
    set_up(work, files, folder)
    before = set(work.rglob("*"))
    module, *first = command.split()
    code = kills.wait(kills.start(module, [*first, *words], work, place / "stderr", lambda: limits(work)), SECONDS)
    text = (place / "stderr").read_text(errors="replace")
    lines = kills.spoken(text)
    places = re.findall(rf'File "{ROOT}/((?!tests/).*), in', text)
    if code is None:
        wrong["slow"] = command
    elif code not in (0, 2):
        wrong["traceback" if code > 0 else f"signal {-code}"] = f"{lines[-1].partition(': ')[0][:80]} | {(places or [command])[-1]}"
    elif kills.complaints(code, text, (0, 2)):
        wrong["not one line"] = f"{command}: {lines[-1][:60]}"
    new = [path for path in work.rglob("*") if path not in before]
    left = [path.name for path in new if path.name[0] == "." and path.name not in "".join(words)        # not what was asked for
            or path.is_dir() and not any(path.iterdir())]
    if left and code is not None:
        wrong["left behind"] = f"{command}: {re.sub(r'[.][^.]*$', '', min(left))}"
    if outside := (place / "outside").read_text().splitlines():
        wrong["outside"] = outside[0]
    return code, lines, wrong


# ----------------------------------------------------------------------------- all of them

def fuzz(count, number, accepted=False):
    """`count` different inputs of a seed -> (Counter of (what is broken, outcome), {(kind, where): its smallest input, ...})."""
    counts, findings, known = Counter(), {}, set()

    @seed(number)
    @settings(max_examples=10 * count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(inputs())
    def one(made):
        kind, command, words, files, folder = made
        if len(known) == count:
            raise InterruptedError
        if repr(made) in known:                                         # hypothesis repeats itself
            return
        known.add(repr(made))
        with tempfile.TemporaryDirectory(prefix="fuzz_") as place:
            code, lines, wrong = run(command, words, files, folder, Path(place).resolve())
        counts.update((kind, what) for what in ("inputs", *["accepted"] * (code == 0), *wrong))
        size = sum(len(data or "") for data in files.values()) + len("".join(words))
        told = [f"{command} {' '.join(map(ascii, words))}", *[f"{path}: {ascii(data)[:300]}" for path, data in files.items()],
                f"broken: {ascii(SAID)}", *[f"> {line[:300]}" for line in lines[-3:]]]
        for found in wrong.items():
            findings[found] = min(findings.get(found, (size + 1,)), (size, told))
        if accepted and code == 0:
            print("accepted:", *told, sep="\n    ")
    with contextlib.suppress(InterruptedError):
        one()
    return counts, findings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accepted", action="store_true", help="print what was accepted, too")
    args = parser.parse_args()
    kills.warm_up(COMMANDS)
    counts, findings = fuzz(args.inputs, args.seed, args.accepted)
    heads = ["inputs", "accepted", *sorted({what for _, what in counts} - {"inputs", "accepted"})]
    rows = [[kind, *[counts[kind, head] for head in heads]] for kind in KINDS]
    rows.append(["all", *[sum(counts[kind, head] for kind in KINDS) for head in heads]])
    print(common.markdown(["broken", *heads], rows))
    for (what, where), (_, told) in sorted(findings.items()):
        print(f"\n{what}: {ascii(where)}", *told, sep="\n    ")
    print(f"\nseed {args.seed}: {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
