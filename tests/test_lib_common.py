"""lib/common.py and lib/weights.py: errors, flags, files, settings, rates, Muon, the state of a run."""
import json
import math
from typing import NamedTuple

import pytest
import torch
from conftest import refused, relative_error

from lib import common
from lib.common import (UserError, append_jsonl, atomic_path, check_writable, flag, markdown, parse_commands,
                        parse_flags, pick, read_json, read_jsonl, reading, relative_to_here, run_main, side_by_side,
                        whole_blocks, write_jsonl, write_report)
from lib.weights import (Muon, find_weights, learning_rate, load_state, load_tensors, load_weights, make_optimizer,
                         model_folder, orthogonal, read_header, resolve, save_module, save_state, save_tensors,
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


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("x"), RecursionError(), MemoryError(), OSError("disk")])
def test_whatever_fails_while_reading_names_the_file(error):
    with pytest.raises(UserError, match="a.json cannot be used"), reading("a.json"):
        raise error
    with pytest.raises(UserError, match="^mine$"), reading("a.json"):
        raise UserError("mine")


def test_run_main_ends_in_one_line(capsys, monkeypatch):
    def fail(error=UserError("two\nlines")):
        raise error
    for main, code, said in ((fail, 2, "error: two lines\n"), (lambda: fail(KeyboardInterrupt), 130, "")):
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        assert ended.value.code == code and said in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["x.py", "--debug"])
    with pytest.raises(UserError):
        run_main(fail)


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    check_writable(tmp_path / "new" / "folder" / "x")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for bad, message in ((".", "is a folder"), ("file/x", "cannot write"), ("x" * 300, "long")):
        refused(message, check_writable, tmp_path / bad)


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
    for name in (tmp_path / "a" / "config.json", tmp_path / "none", "not a hub id"):
        refused("missing", model_folder, name)


def test_rates_rise_and_fall():
    assert [learning_rate(step, 1.0, 4, 12) for step in (0, 3, 4, 8, 11)] == [0.25, 1.0, 1.0, 0.5, 0.125]
    assert [learning_rate(step, 1.0, 4, 12, "constant") for step in (0, 11)] == [0.25, 1.0]
    assert [learning_rate(step, 1.0, 4, 12, "cosine") for step in (1, 4, 8)] == pytest.approx([0.5, 1.0, 0.5])


def test_muon_equals_torchs_and_steps_orthogonally(monkeypatch):
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(24, 8))
    theirs = torch.nn.Parameter(ours.detach().clone())
    pair = [Muon([ours], lr=0.01, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1)]
    for _ in range(3):
        ours.grad = torch.randn(24, 8)
        theirs.grad = ours.grad.clone()
        for optimizer in pair:
            optimizer.step()
    assert relative_error(ours.detach(), theirs.detach()) < 1e-2                # bfloat16 against perhaps float32
    monkeypatch.setattr("lib.weights.fast_bfloat16", lambda device: False)       # where bfloat16 is slow: in float32
    values = torch.linalg.svdvals(orthogonal(torch.randn(24, 8)))
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


@pytest.mark.parametrize("damage", [{"weights": {"weight": torch.ones(1, 1), "bias": torch.ones(2)}},
                                    {"weights": {"bias": torch.ones(2)}}, {"settings": '["x"]'}, None])
def test_a_damaged_state_is_refused(tmp_path, damage):
    path = tmp_path / "state.pt"
    save_state(tmp_path, *state_of(), 7, {"seed": 0}, 1.5)
    if damage:
        torch.save(torch.load(path, weights_only=True) | damage, path)
    else:
        path.write_bytes(path.read_bytes()[:400])
    refused("state.pt", load_state, tmp_path, *state_of(1), {"seed": 0})
