"""The tables of experiments/ at a very small size: closed forms, each command, the chain of the second paper."""
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refused
from test_evaluate import place, quick_vocoder  # noqa: F401  (fixtures)

import crpo
import expert_iteration
import ranker
from experiments import alignment, attm, models, toy
from lib.common import read_json, read_jsonl


def narrow(path):
    """The report's text; its tables fit into 100 columns and hold no -0.000."""
    text = path.read_text()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert tables and not re.search(r"(?<!\d)-0\.0+\b", text)
    assert max(map(len, tables)) <= 100
    return text


def test_sounding_length():
    clip = torch.zeros(65536)
    assert toy.sounding_length(clip) == 0
    clip[1600:32000] = 0.5
    clip[40000] = 1e-3  # a click over 60 dB below
    assert toy.sounding_length(clip) == pytest.approx(2.0)
    clip[48000:48320] = 0.02  # 28 dB below the loudest frame
    assert toy.sounding_length(clip) == pytest.approx(3.02)
    assert toy.sounding_length(clip, 1e-2) == pytest.approx(2.0)


SMALL = {"scenes": "--prompts 3 --seeds 2", "codec": "--prompts 3", "duration": "--num_samples 2",
         "steps": "--prompts 2", "text": "--prompts 3 --batch_size 2"}


@pytest.mark.parametrize("command", SMALL)
def test_each_table_of_the_toy(place, tmp_path, monkeypatch, capsys, command):  # noqa: F811
    grid = [("euler", 1), ("euler", 2), ("heun", 1)]
    for name, values in (("DURATIONS", [1.0, 2.0]), ("GRID", grid), ("LEVELS", [0.5, 1.0])):
        monkeypatch.setattr(toy, name, values)
    flags = [command, *SMALL[command].split(), "--checkpoint", str(place / "a"), "--tagger", str(place), "--steps",
             "1", "--device", "cpu", "--out", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")]
    toy.main(flags)
    report, numbers = (tmp_path / "results" / f"{command}.{kind}" for kind in ("md", "json"))
    text, numbers = narrow(report), read_json(numbers)
    assert f"python -m experiments.toy {command}" in text and "next:" in capsys.readouterr().out
    assert numbers["settings"]["command"] == command and len(numbers["rows"][0]) == len(numbers["heads"])
    if command == "text":
        assert len({tuple(row[1:]) for row in numbers["rows"]}) == 4        # four kinds of prompt, four losses
    if command == "steps":
        assert len(list((tmp_path / "cache").iterdir())) == len(grid)
    monkeypatch.setattr("evaluate.sample_latents", None)                    # kept latents are read, not sampled
    toy.main(flags)
    assert report.read_text() == text


def test_small_runs_leave_the_tracked_results_alone():
    """Fault of the first edition: a try with few prompts replaced results/."""
    for commands in (toy.COMMANDS, alignment.COMMANDS, attm.COMMANDS):
        for _, groups in commands.values():
            (out,) = [flag for flags in groups.values() for flag in flags if flag["name"] == "--out"]
            assert out["default"] == "runs/results"


def test_the_best_of_more_scores_higher(place, tmp_path):  # noqa: F811
    alignment.main(["best_of", *"--prompts 4 --counts 1 3 --steps 2 --draws 20 --device cpu --checkpoint".split(),
                    str(place / "a"), "--reward", str(place / "reward"), "--judge", str(place / "judge"), "--tagger",
                    str(place), "--out", str(tmp_path), "--cache", str(tmp_path / "cache")])
    narrow(tmp_path / "best_of.md")
    numbers = read_json(tmp_path / "best_of.json")
    assert numbers["best of 3"]["reward"] > numbers["best of 1"]["reward"]


TINY = ("--num_samples 3 --prompts 4 --eval_prompts 8 --steps 2 --draws 20 --device cpu --runs runs --out out "
        "--cache cache").split()


def run_alignment(place, monkeypatch, command, *more):  # noqa: F811
    monkeypatch.chdir(place)
    pool = crpo.prompt_pool
    monkeypatch.setattr(crpo, "prompt_pool", lambda file, size, *more: pool(file, 50, *more))
    for how in (alignment.PAIRED, *alignment.METHODS.values()):
        monkeypatch.setitem(how, "epochs", 1)
    ears = ["--reward", str(place / "reward"), "--judge", str(place / "judge"), "--tagger", str(place)]
    alignment.main([command, *more, *ears])
    return narrow(place / "out" / f"{command}.md"), read_json(place / "out" / f"{command}.json")


def test_the_room_of_a_base(place, monkeypatch):  # noqa: F811
    exact = np.zeros((2, 3, len(alignment.COLUMNS)))
    exact[0, 1:, alignment.COLUMNS.index("exact")] = 1              # clips 1, 2 of prompt 0; none of prompt 1
    found = alignment.room_of({"reward": np.array([1, 0, 2, 5, 6, 7.0]), "tally": exact.reshape(6, -1)}, 3)
    assert found["one clip"].tolist() == [pytest.approx(2 / 3), 0] and found["best of 3 by truth"].tolist() == [1, 0]
    assert found["best of 3 by the reward"].tolist() == [1, 0]
    assert found["exact above not"][0] == 0.5 and np.isnan(found["exact above not"][1])
    row = dict.fromkeys(alignment.COLUMNS, 0) | {"hits": 2, "extras": 1, "misses": 1, "ordered": 1, "order_right": 1,
                                                 "counted": 2, "counts_right": 1, "exact": 0, "clips": 1}
    rows = [list(row.values()), list((row | {"extras": 3}).values()), list((row | {"exact": 1}).values())]
    assert alignment.truth(rows).tolist() == pytest.approx([4 / 6 + 0.75, 4 / 8 + 0.75, 4 / 6 + 1.75])
    monkeypatch.setattr(alignment, "truth", lambda tallies: np.arange(len(tallies)) % 7)        # these ears hear nothing
    text, numbers = run_alignment(place, monkeypatch, "room", "--bases", str(place / "a"), "--betas", "149", "20", *TINY)
    assert "a, truth, beta 149" in text and "best of 3 by truth" in text
    paths = sorted((place / "runs").glob("a_*/iteration_1/scores.jsonl"))       # clap, shuffled, truth: each at 149, 20
    clap, _, shuffled, _, truth, again = ([row["reward"] for row in read_jsonl(path)] for path in paths)
    assert shuffled == clap != truth == again and min(truth) >= 0
    pairs = [read_jsonl(place / "runs" / f"a_{name}_149" / "iteration_1" / "pairs.jsonl") for name in ("clap", "shuffled")]
    assert [row["reward_winner"] for row in pairs[0]] == [row["reward_winner"] for row in pairs[1]] and pairs[0] != pairs[1]


def test_losses_side_by_side(place, monkeypatch):  # noqa: F811
    text, numbers = run_alignment(place, monkeypatch, "methods", "--base", str(place / "a"), "--losses", "nft",
                                  "control", "--iterations", "1", "--seeds", "0", "1", *TINY)
    assert all(f"| {name} " in text for name in ("nft", "control"))
    assert [len(seeds) for seeds in numbers["curves"]["nft"]] == [2, 2]     # base, iteration 1; two seeds
    assert numbers["curves"]["nft"][0] == numbers["curves"]["control"][0]      # the same base


def test_progress_over_clips(place, monkeypatch):  # noqa: F811
    crpo.run(out=str(place / "one"), checkpoint=str(place / "a"), iterations=2, prompts=4, num_samples=3, epochs=1,
             eval_prompts=8, steps=2, device="cpu", **{name: str(place / name) for name in ("reward", "judge")},
             tagger=str(place), pool=50)
    flags = "--runs one --control one --draws 20 --device cpu --out out --cache cache".split()
    text, numbers = run_alignment(place, monkeypatch, "progress", *flags, "--clean", str(place / "a"))
    assert "aligned, 24 clips" in text and "shuffled rewards, 12 clips" in text and "Slope" in text
    base = numbers["curves"]["aligned"][0][0]
    assert numbers["levels"]["true captions"]["judge"] == pytest.approx(base["judge"])      # the base, judged again
    means = [seeds[0]["judge"] for seeds in numbers["curves"]["aligned"]]
    assert numbers["slopes"]["judge"] == pytest.approx((means[2] - means[0]) / 0.024)       # of three even points


def test_guidance_shows_a_front(place, monkeypatch):  # noqa: F811
    flags = ["--prompts", "8", "--steps", "2", "--scales", "1", "3", "--draws", "20", "--device", "cpu", "--out", "out",
             "--cache", "cache", "--models", str(place / "a"), str(place / "b")]
    text, numbers = run_alignment(place, monkeypatch, "guidance", *flags)
    assert "a at 3" in text and len(numbers["fronts"]["b"]) == 2 and len(numbers["changes"]) == 1


def test_silent_clips_are_counted(place, monkeypatch):  # noqa: F811
    clips = torch.tensor([[0.05, 0.2], [0.3, -0.05], [-0.3, 0], [0, 0], [0, 0.05], [0.01, 0]])     # 0, 1, 2 of a prompt
    monkeypatch.setattr(models, "sampled", lambda model, asked, sampler: (clips, None))
    flags = "--prompts 3 --num_samples 2 --device cpu --out out --cache cache".split()
    text, numbers = run_alignment(place, monkeypatch, "silent", *flags, "--models", str(place / "a"))
    assert numbers["rows"] == [["a", "3 of 6", 2]]


def test_what_is_recovered(place, monkeypatch):  # noqa: F811
    rows, found = np.arange(4), {"base": [0.2], "clean": [0.6], "aligned": [0.3, 0.5]}
    sets = {name: [{"judge": np.full(4, value)} for value in values] for name, values in found.items()}
    assert models.share("judge", sets, None, rows) == pytest.approx(0.5)
    flags = ["--prompts", "8", "--steps", "2", "--draws", "20", "--device", "cpu", "--out", "out", "--cache", "cache"]
    folders = {"base": "a", "clean": "b", "aligned": "c", "control": "a"}
    flags += [word for name, folder in folders.items() for word in (f"--{name}", str(place / folder))]
    text, numbers = run_alignment(place, monkeypatch, "recovered", *flags)
    assert set(numbers["changes"]) == {"aligned - base", "control - base", "aligned - control", "clean - base"}
    assert numbers["changes"]["control - base"]["judge"][0] == 0 and "by the second tagger" in text


def test_a_paired_test_sees_a_difference_of_each_prompt():
    hard = np.random.default_rng(0).standard_normal(100) * 5
    seeds = [{"reward": hard + 0.1}, {"reward": hard + 0.3}]
    assert attm.test(seeds, [{"reward": hard}] * 2, "reward") == pytest.approx((0.2, 0.2, 0.2))
    levels = {score: [{"reward": np.full(4, score)}, {"reward": np.full(4, -score)}] for score in (0.0, 1.0, 2.0)}
    assert attm.score_r(levels) == pytest.approx([1, -1])
    for entry in attm.ENTRIES.values():                             # they compare rows that they have
        assert {name for first, second, _ in entry.pairs for name in (first, second)} <= set(entry.ways)
    tests = {"a minus b": {"reward": (0.2, 0.1, 0.3)}, "c minus d": {"reward": (0.2, -0.1, 0.3)}}
    assert attm.verdict(tests, "++", "reward") == ("reward as expected: a minus b (+); not as expected: "
                                                   "c minus d (0).")


@pytest.fixture(scope="module")
def chain(place, sounds):  # noqa: F811
    """The ranker and a scored manifest with a contaminated column, and the chain of table2 trained on them."""
    pool = crpo.prompt_pool
    ranker.main(["--data", str(sounds / "votes" / "clips.jsonl"), "--ranker", str(sounds / "ranker"),
                 "--out", str(sounds / "votes" / "hummed.jsonl"), "--plus", "hum", "1.5", "--device", "cpu"])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(place)                                        # cache/ goes there
        for script in (crpo, expert_iteration):                         # 50 prompts are enough
            monkeypatch.setattr(script, "prompt_pool", lambda file, size, *more: pool(file, 50, *more))
        yield partial(run_attm, place, sounds)


FLAGS = ("--seeds 0 --sft_steps 2 --prompts 6 --steps 1 --samples 6 --tuning_steps 1 --polish_steps 1 --crpo_prompts 2 "
         "--batch_size 4 --device cpu --runs reproduce --out out")


def run_attm(place, sounds, name, *more):  # noqa: F811
    """The report and the numbers of an entry."""
    scored = str(sounds / "votes" / "hummed.jsonl")
    attm.main([name, "--checkpoint", str(place / "a"), "--data", scored, "--hum_data", scored, "--ranker",
               str(sounds / "ranker"), "--judge", str(place / "judge"), "--tagger", str(place), *FLAGS.split(), *more])
    out = place / "out" / f"attm_{name}"
    return narrow(out.with_suffix(".md")), read_json(out.with_suffix(".json"))


def test_the_chain_is_trained_once_and_with_one_setting(chain, place, monkeypatch):  # noqa: F811
    first, weights = chain("table2"), place / "reproduce" / "seed_0" / "sft_v1" / "tangoflux.safetensors"
    before = weights.stat().st_mtime_ns
    monkeypatch.setattr("evaluate.sample_latents", None)                # all is kept
    assert chain("table2") == first and weights.stat().st_mtime_ns == before
    for name, flags, what in (("table2", ["--sft_steps", "3"], "was started with train_steps = 2, now it is 3"),
                              ("table1", ["--data", "x.jsonl", "--runs", "other"], "x.jsonl is missing"),
                              ("table1", ["--prompts", "2"], "2 must lie between 4")):
        refused(what, chain, name, *flags)


@pytest.mark.parametrize("name", ["table1", "table2", "figure2", "reward_column"])
def test_every_entry_ends_with_tables_numbers_and_a_verdict(chain, name, monkeypatch, capsys):
    monkeypatch.setattr(attm, "HELD_OUT", 10)
    monkeypatch.setitem(attm.ENTRIES, "table1", attm.table1(["v1", "v5"]))
    monkeypatch.setitem(attm.ENTRIES, "figure2", attm.figure2([0, 1.5]))
    text, numbers = chain(name)
    assert "Hypothesis: " in text and "Budget: 1 training seeds" in text and numbers["verdict"] in text
    assert numbers["rows"] and f"python -m experiments.attm {name}" in text and "nan" not in text.lower()
    assert ("score-r" in text) == (name in ("table1", "figure2")) and ("| hum" in text) == (name == "reward_column")
    assert "Hypothesis: " in capsys.readouterr().out
