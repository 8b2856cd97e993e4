"""lib/common.py and lib/weights.py: errors, flags, files, settings, rates, Muon, the state of a run."""
import errno
import importlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, noise, refused
from tqdm import tqdm

from lib import common
from lib.common import (UserError, append_jsonl, atomic_path, check_writable, check_settings, flag, locked,
                        markdown, parse_commands, parse_flags, pick, read_json, read_jsonl, reading, relative_to_here,
                        run_main, side_by_side, stop_on_signal, whole_blocks, write_jsonl, write_report)
from lib.text import print_row
from lib.weights import (Muon, code_hash, find_weights, learning_rate, load_state, load_tensors, load_weights, make_optimizer,
                         model_folder, orthogonal, read_header, resolve, run_folder, save_module, save_state, save_tensors,
                         set_rate, trim_log)

FLAGS = {"numbers": [flag("--steps", 25, "solver steps (paper 3.3: 50)", 1, 1000),
                     flag("--rate", None, "peak", 0, 10, kind=float), flag("--seeds", [0, 1], "of it", nargs="+"),
                     flag("--offline", False, "keep the pairs"), flag("--decay", True, "the rate falls to 0"),
                     flag("--name", "a", "100 % of it", choices=["a", "b"], alias="--old_name")]}


def test_flags_have_defaults_types_aliases_and_help(capsys):
    given = "--steps 3 --rate 1e-3 --seeds 4 --offline --no-decay --old_name b"
    for words, wanted in (("", (25, None, [0, 1], False, True, "a")), (given, (3, 1e-3, [4], True, False, "b"))):
        args = parse_flags("doc", FLAGS, words.split())
        assert (args.steps, args.rate, args.seeds, args.offline, args.decay, args.name) == wanted
    with pytest.raises(SystemExit):
        parse_flags("a docstring", FLAGS, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in ("a docstring", "steps (paper 3.3: 50) (default: 25)", "(default: 0 1)"))


@pytest.mark.parametrize("words, message", [
    ("--steps 0", "between 1 and 1000"), ("--steps nan", "not a whole number"), ("--rate nan", "between 0 and 10"),
    ("--steps 1e999", "not a whole number"), ("--name c", "invalid choice"), ("--step 3", "unrecognized"),
    ("--seeds x", "not a whole number")])
def test_a_wrong_flag_is_one_line(words, message):
    refused(message, parse_flags, "doc", FLAGS, words.split())


def test_commands_profiles_and_tuples_of_flags():
    args = parse_commands("doc", {"score": ("a score", FLAGS)}, ["score", "--steps", "2"])
    assert args.command == "score" and args.steps == 2 and not args.debug
    refused("--help", parse_commands, "doc", {"score": ("a score", FLAGS)}, [])
    assert [parse_flags("doc", FLAGS, words, {"steps": 50}).steps for words in ([], ["--steps", "7"])] == [50, 7]
    refused("no setting setps", parse_flags, "doc", FLAGS, [], {"setps": 50, "debug": True})
    assert pick(NamedTuple("Sampling", [("steps", int), ("name", str)]), args) == (2, "a")


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("x"), RecursionError(), OSError("disk"), SystemExit(0)])
def test_whatever_fails_while_reading_names_the_file(error):
    with pytest.raises(UserError, match="a.json cannot be used"), reading("a.json"):
        raise error
    with pytest.raises(UserError, match="^mine$"), reading("a.json"):
        raise UserError("mine")
    with pytest.raises(MemoryError), reading("a.json"):         # it is not the file that is at fault
        raise MemoryError


def test_run_main_ends_in_one_line(capsys, monkeypatch):
    def fail(error=UserError("two\nlines")):
        raise error
    for error, code, said in ((UserError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "stopped\n"),
                              (KeyboardInterrupt("go on"), 130, "stopped; go on\n"),
                              (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
                              (MemoryError(), 2, "error: not enough memory: MemoryError; ask for less at a time\n"),
                              (RuntimeError("can't allocate memory"), 2, "error: not enough memory: can't")):
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: fail(error))
        assert ended.value.code == code and capsys.readouterr().err.startswith(said)
    with pytest.raises(RuntimeError, match="of the program"):       # no fault of the user's is hidden
        run_main(lambda: fail(RuntimeError("a fault of the program")))
    monkeypatch.setattr("sys.argv", ["x.py", "--debug"])
    for error in (UserError("x"), MemoryError(), FileNotFoundError(2, "No such file", "x")):
        with pytest.raises(type(error)):
            run_main(lambda: fail(error))


def test_a_librarys_broken_log_message_prints_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", True)
    logger = logging.getLogger("loud")
    logger.propagate = False                                        # pytest's own handler would raise
    logger.addHandler(logging.StreamHandler(sys.stderr))
    run_main(lambda: logger.warning("%d", "no number"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("output, code, said", [("| head -n 1", 1, ""), ("> /dev/full", 2, "error: [Errno 28]"), ("", 0, "")])
def test_stdout_may_be_full_closed_or_ascii(output, code, said):
    """A pipe that is read no further ends quietly, a full disk in one line; an accent is escaped."""
    script = "from lib.common import run_main\nrun_main(lambda: [print('\\u00e9', i) for i in range(20000)])"
    line = f'"{sys.executable}" -c "$SCRIPT" {output}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "SCRIPT": script, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == code and done.stderr.startswith(said) and len(done.stderr.splitlines()) == bool(said)
    assert done.stdout.startswith("\\xe9 0\n") or ">" in output


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []               # nor a folder made for it
    check_writable(tmp_path / "new" / "folder" / "x")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for bad, message in ((".", "is a folder"), ("file/x", "cannot write"), ("x" * 300, "long")):
        refused(message, check_writable, tmp_path / bad)


def test_what_a_killed_run_was_writing_goes_when_the_file_is_written(tmp_path):
    script = ("from pathlib import Path\nfrom lib.common import atomic_path\nwith atomic_path(__import__('sys').argv[1])"
              " as path: path.write_text('half'), path.with_name('.tmp123').write_text(''), print(flush=True), input()")
    other = subprocess.Popen([sys.executable, "-c", script, tmp_path / "a.txt"], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    other.stdout.readline()
    other.kill()
    other.wait()
    assert [path.name[:3] for path in tmp_path.iterdir()] == [".a."]
    if not os.path.isdir("/proc/self"):
        os.utime(next(tmp_path.iterdir()), (0, 0))              # where nobody tells, it must be old
    common.write_text(tmp_path / "a.txt", "whole")
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"] and (tmp_path / "a.txt").read_text() == "whole"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"),
                                   Exception("Error while serializing: No space left on device (os error 28)")])
def test_a_full_disk_is_one_line_whoever_writes(tmp_path, error):
    with pytest.raises(UserError, match=r"no space left writing .*a.pt \(needs more than [0-9.]+ MB\)"):
        with atomic_path(tmp_path / "new" / "a.pt") as temporary:
            temporary.write_text("half")
            raise error
    assert list(tmp_path.iterdir()) == []
    refused("no space left writing /dev/full", append_jsonl, "/dev/full", {"a": 1})


def test_torch_does_not_say_that_the_disk_is_full(tmp_path):
    """It raises a RuntimeError of positions; the file may then not grow, and that is found out."""
    import resource
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        refused("cannot write .*state.pt: File too large", save_state, tmp_path / "r", {}, state_of()[1],
                {"x": torch.zeros(100_000)}, 1, {}, 0.0)
        refused("cannot write .*x.safetensors: File too large", save_tensors, tmp_path / "r" / "x.safetensors",
                {"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time_in_a_folder(tmp_path):
    """The second is refused; after a kill the lock is free; what was made for it goes again."""
    folder = tmp_path / "new" / "run"
    script = "from lib.common import locked\nwith locked(__import__('sys').argv[1]): print(flush=True), input()"
    other = subprocess.Popen([sys.executable, "-c", script, folder], cwd=ROOT, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    other.stdout.readline()
    refused("new/run is in use by another process; wait for it, or choose another folder", locked(folder).__enter__)
    assert (folder / ".lock").exists()
    other.kill()
    other.wait()
    with locked(folder):
        (folder / "result").write_text("")
        refused("in use", locked(folder).__enter__)
        with locked(folder / "inner"):                      # crpo.py trains in folders of its own
            pass
        pid = os.fork()                                     # a worker that outlives the run holds nothing
        if not pid:
            signal.pause()
    try:
        with locked(folder):
            assert {path.name for path in folder.iterdir()} == {"result", ".lock"}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    (folder / "result").unlink()
    with pytest.raises(ValueError), locked(tmp_path / "a" / "b"):
        raise ValueError
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
    (tmp_path / "file").write_text("")
    refused("cannot write", locked(tmp_path / "file").__enter__)


@pytest.mark.parametrize("name", "train_fm vae crpo expert_iteration world.votes world.reader world.train_clap world.train_ears "
                         "world.train_ranker".split())
def test_each_command_locks_its_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["x.py", "--out", "x", "--device", "cpu"])
    with locked("x"):
        refused("x is in use by another process", importlib.import_module(name).main)
    assert not (tmp_path / "x").exists()


def test_a_lock_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """Between opening .lock and locking it another process may end and remove it: taken anew."""
    import fcntl
    lock, tries = fcntl.flock, []

    def slow(file, how):
        tries.append(file)
        if len(tries) == 1:
            (tmp_path / ".lock").unlink()
        lock(file, how)
    monkeypatch.setattr(common.fcntl, "flock", slow)
    with locked(tmp_path):
        assert len(tries) == 2 and (tmp_path / ".lock").exists()
        monkeypatch.setattr(common.fcntl, "flock", lock)
        refused("in use", locked(tmp_path).__enter__)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("RANK", "1")                         # of torchrun's processes the first one locks
    with locked(tmp_path / "x"):
        assert not (tmp_path / "x").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(common, "fcntl", None)
    with locked(tmp_path / "x"), locked(tmp_path / "x"):    # Windows has no lock
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_loop_after_its_step(number, capfd):
    before, steps = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"), stop_on_signal() as stopped:
        while not stopped:
            os.kill(os.getpid(), number)
            steps.append("whole")
    assert steps == ["whole"] and capfd.readouterr().err.strip() == "stopping after this step; again: at once"
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        steps.append("after the second")
    assert steps == ["whole"] and signal.getsignal(number) is before
    with stop_on_signal() as stopped:                       # without a signal it ends as any block
        pass
    threads = [threading.Thread(target=lambda: stop_on_signal().__enter__())]
    threads[0].start()
    threads[0].join()
    assert not stopped and signal.getsignal(number) is before


def test_a_run_whose_reader_went_away_goes_on_to_its_save(monkeypatch):
    def closed(*given, **more):
        raise BrokenPipeError
    monkeypatch.setattr("lib.text.print", closed, raising=False)
    monkeypatch.setattr(os, "dup2", lambda *given: None)
    print_row(tqdm(disable=True), {"step": 3, "val_bins": [None]}, stopped := [])
    assert stopped


def test_each_kind_of_run_has_a_folder_of_its_own(tmp_path):
    runs = {"train_fm.py": "run_flow/adamw", "vae.py": "run_vae", "crpo.py": "run_crpo", "expert_iteration.py": "run_experts"}
    for folder in (*runs.values(), "model", "model/text_encoder"):
        shutil.copytree(ROOT / "tests" / "golden" / folder, tmp_path / folder, dirs_exist_ok=True)
    before = set(tmp_path.rglob("*"))
    for script, folder in runs.items():
        for other in runs.keys() - {script}:
            refused(f"{folder} holds a run of {script}; choose another folder", run_folder(tmp_path / folder, other).__enter__)
        with run_folder(tmp_path / folder, script):
            pass
        for out, what in ((tmp_path, "other runs, such as .*/"), (ROOT, "this repository"), (ROOT.parent, "this repository"),
                          (tmp_path / "model/text_encoder", "another model or run"), (tmp_path / "c_val", "the latents .--cache.")):
            refused(f"{out} holds {what}", run_folder(out, script, tmp_path / "c").__enter__)
    assert set(tmp_path.rglob("*")) == before


def test_other_code_is_said_once_and_goes_on(tmp_path, capsys, monkeypatch):
    assert len(code_hash()) == 16 and code_hash() == code_hash()
    check_settings("runs/x", {"a": 1}, {"a": 1, "code": code_hash()})               # an older run does not tell
    assert capsys.readouterr().err == ""
    check_settings("runs/x", {"code": "other"}, {"code": code_hash()})
    assert capsys.readouterr().err.startswith("warning: the run in runs/x was begun by other code")
    for name in ("a.py", "lib/b.py", "world/c.py", "tests/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr("lib.weights.HERE", tmp_path)
    hashes = [code_hash.__wrapped__()]
    for name in ("tests/d.py", "a.py", "lib/b.py", "world/c.py"):
        (tmp_path / name).write_text("x")
        hashes.append(code_hash.__wrapped__())
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_json_lines_forgive_a_torn_end_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"a": 1}])
    append_jsonl(path, {"a": 2})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('\ufeff{"a": 1}\n{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": 1\n{"a": 2}\n')
    refused("line 1", read_jsonl, path)
    write_jsonl(path, [{"a": i} for i in range(5)])
    assert len(whole_blocks(path, 2, 5)) == 5 and len(whole_blocks(path, 2, 8)) == 4 and len(read_jsonl(path)) == 4


def test_json_files_of_the_wrong_kind(tmp_path):
    for text, message in (("[1]", "list, not a dict"), ("{", "cannot be used"), ("[" * 100000, "recursion")):
        (tmp_path / "config.json").write_text(text)
        refused(message, read_json, tmp_path / "config.json", dict)
    refused("is missing", read_json, tmp_path / "none.json")


def test_reports_hold_no_path_to_this_folder(tmp_path, capsys):
    write_report(tmp_path, "table", "Title", f"python x.py --out {common.HERE}/runs", [markdown(["a"], [["bb"]])],
                 {"path": f"{common.HERE}/runs", "list": [common.HERE / "a"]})
    text = (tmp_path / "table.md").read_text()
    assert "python x.py --out runs" in text and "| a  |\n|----|\n| bb |" in text
    assert json.loads((tmp_path / "table.json").read_text()) == {"path": "runs", "list": ["a"]}
    assert relative_to_here(3.5) == 3.5


def test_pieces_side_by_side_keep_their_order_and_the_threads():
    threads = torch.get_num_threads()
    assert side_by_side(lambda piece: 2 * piece, [3, 1, 2], torch.device("cpu")) == [6, 2, 4]
    assert torch.get_num_threads() == threads


def test_weights_fit_exactly_or_are_refused(tmp_path):
    module, other, path = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3), tmp_path / "model.safetensors"
    save_module(path, module, torch.float16, {"x": '{"a": 1}'})
    assert read_header(path, "x") == {"a": 1} and load_tensors(path)["weight"].dtype == torch.float16
    found = find_weights(tmp_path, "model.safetensors")
    load_weights(other, found)
    assert torch.equal(other.weight, module.weight.half().float())
    with torch.device("meta"):
        unborn, huge = torch.nn.Linear(2, 3), torch.nn.Linear(10 ** 7, 10 ** 7)
    assert torch.equal(load_weights(unborn, found, dtype=torch.float32).weight, other.weight)
    refused("expected", load_weights, huge, found, dtype=torch.float32)         # 400 TB are not asked for
    assert huge.weight.is_meta
    refused("bias is .3,., expected None", load_weights, torch.nn.Linear(2, 3, bias=False), found)
    load_weights(torch.nn.Linear(2, 3, bias=False), found, optional=("bias",))
    refused(r"weight is \(3, 2\), expected \(3, 4\)", load_weights, torch.nn.Linear(4, 3), found)
    refused("no config of a tagger", read_header, path, "tagger")
    save_tensors(path, {"weight": torch.full((3, 2), math.nan), "bias": torch.zeros(3)})
    refused("weight holds NaN", load_weights, torch.nn.Linear(2, 3), found)
    path.write_bytes(path.read_bytes()[:60])
    for name, message in ((path.name, "whole safetensors"), ("vae.safetensors", "missing")):
        refused(message, find_weights, tmp_path, name)


def test_a_pickle_is_read_as_plain_weights_or_refused(tmp_path):
    torch.save({"state_dict": torch.nn.Linear(2, 3).state_dict()}, tmp_path / "model.bin")
    load_weights(torch.nn.Linear(2, 3), find_weights(tmp_path, "model.safetensors"))
    torch.save({"weight": type("Evil", (), {"__reduce__": lambda self: (print, ("ran",))})()}, tmp_path / "model.bin")
    refused("weights_only", find_weights, tmp_path, "model.safetensors")


def test_parts_may_live_elsewhere(tmp_path):
    for name, references in (("a", {"vae": "../b"}), ("b", {"flow": "../c"}), ("c", {"flow": "../b", "vae": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"references": references}))
    assert resolve(tmp_path / "a", "vae")[0].resolve() == (tmp_path / "b").resolve()
    for folder, part, message in (("b", "flow", "circle"), ("c", "vae", "references"), ("d", "vae", "missing")):
        refused(message, resolve, tmp_path / folder, part)
    for wrong in (["vae"], "flow", 3, None, {"vae": {}}, {"vae": "a\0b"}, {"vae": "x" * 300}):
        (tmp_path / "a" / "config.json").write_text(json.dumps({"references": wrong}))
        refused("references map a part", resolve, tmp_path / "a", "vae")
    for name, message in ((tmp_path / "a" / "config.json", "is a file; pass the model folder"), ("not a hub id", "is missing")):
        refused(message, model_folder, name)
    for name in ("flow", "iteration_1", "iteration_2"):
        assert name == "iteration_2" or model_folder(tmp_path / "a") == tmp_path / "a"      # a part may have a folder of its own
        (tmp_path / "a" / name).mkdir()
        (tmp_path / "a" / name / "tangoflux.safetensors").write_text("")
    refused("a holds models, and is none: take .*a/iteration_2$", model_folder, tmp_path / "a")
    (tmp_path / "a" / "tangoflux.safetensors").write_text("")
    assert model_folder(tmp_path / "a") == tmp_path / "a"           # expert_iteration.py's tuned model holds more


def test_rates_rise_and_fall():
    assert [learning_rate(step, 1.0, 4, 12) for step in (0, 3, 4, 8, 11)] == [0.25, 1.0, 1.0, 0.5, 0.125]
    assert [learning_rate(step, 1.0, 4, 12, "constant") for step in (0, 11)] == [0.25, 1.0]
    assert [learning_rate(step, 1.0, 4, 12, "cosine") for step in (1, 4, 8)] == pytest.approx([0.5, 1.0, 0.5])


def test_muon_equals_torchs_and_steps_orthogonally(monkeypatch):
    """Movements from zero: by sqrt(rows / columns) times the rate where that is above 1; bfloat16 against perhaps float32."""
    for shape in ((24, 6), (6, 24)):
        ours, theirs = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
        pair = [kind([p], lr=0.1, weight_decay=1.0) for kind, p in ((Muon, ours), (torch.optim.Muon, theirs))]
        for step in range(3):
            ours.grad, theirs.grad = (noise(*shape, seed=step) for _ in range(2))
            for optimizer in pair:
                optimizer.step()
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    monkeypatch.setattr("lib.weights.fast_bfloat16", lambda device: False)       # where bfloat16 is slow: in float32
    values = torch.linalg.svdvals(orthogonal(noise(24, 8)))
    assert values.dtype == torch.float32 and 0.6 < values.min() and values.max() < 1.3


def state_of(seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Linear(3, 2)
    parameters = dict(module.named_parameters())
    optimizer = make_optimizer(parameters)
    set_rate(optimizer, 0.1)
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    return parameters, optimizer, {name: p.detach().clone() for name, p in parameters.items()}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    parameters, optimizer, average = state_of()
    save_state(tmp_path, parameters, optimizer, average, 7, {"seed": 0, "gone": 1, "pair": (1, 2)}, 1.5)
    others = state_of(1)                        # settings that only one of both knows do not matter
    assert load_state(tmp_path, *others, {"seed": 0, "new": 1, "pair": (1, 2)}) == (7, 1.5)
    for ours, theirs in ((parameters, others[0]), (average, others[2])):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_state(tmp_path / "none", *others, {}) == (0, 0.0)
    refused("seed = 0, now it is 1", load_state, tmp_path, *others, {"seed": 1})
    write_jsonl(tmp_path / "log.jsonl", [{"step": 1}, {"step": 2}, {"step": 3}])
    trim_log(tmp_path, 2)                       # the log loses what a killed run wrote too much
    assert read_jsonl(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


BIAS, WEIGHT = torch.ones(2), torch.ones(2, 3)
DAMAGES = [{"weights": {"weight": torch.ones(1, 1), "bias": BIAS}}, {"weights": {"weight": WEIGHT, "bias": torch.ones(1)}},
           {"weights": {"bias": BIAS}}, {"weights": {"weight": WEIGHT.double(), "bias": BIAS}},
           {"weights": {"weight": WEIGHT, "bias": BIAS.long()}}, {"average": {"weight": WEIGHT, "bias": torch.ones(1)}},
           {"average": {"weight": WEIGHT.half(), "bias": BIAS}}, {"average": {}}, {"average": [BIAS]}, {"step": "x"},
           {"settings": '["x"]'}, {"settings": "[]"}, {"settings": ["x"]}, {"settings": "{"}, {"optimizer": []}]


@pytest.mark.parametrize("damage", [*DAMAGES, "moments", "list", "torn", "text"])
def test_a_damaged_state_is_refused(tmp_path, damage):
    path = tmp_path / "state.pt"
    save_state(tmp_path, *state_of(), 7, {"seed": 0}, 1.5)
    state = torch.load(path, weights_only=True)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:400])
    elif damage == "text":
        path.write_text("garbage")
    elif damage == "list":
        torch.save([state], path)
    elif damage == "moments":                               # of one number, which would be broadcast
        state["optimizer"]["state"][0]["exp_avg"] = torch.ones(1)
        torch.save(state, path)
    else:
        torch.save(state | damage, path)
    refused("state.pt cannot be used: .{1,150}; delete it to start anew", load_state, tmp_path, *state_of(1), {"seed": 0})


def test_half_a_character_is_written_and_read_again(tmp_path):
    """A lone surrogate, which JSON may hold as an escape and UTF-8 may not."""
    common.write_json(tmp_path / "a.json", {"prompt": "\ud800 rain"})
    append_jsonl(tmp_path / "a.jsonl", {"prompt": "\ud800 rain"})
    assert read_json(tmp_path / "a.json") == read_jsonl(tmp_path / "a.jsonl")[0] == {"prompt": "\ud800 rain"}
