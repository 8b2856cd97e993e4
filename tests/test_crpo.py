"""CRPO: losses against the official numbers, the stages, exact resume, that a preference is learned."""
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, relative_error
from test_train_fm import tiny_parts

import crpo
from common import UserError, generator, load_tensors, read_json, read_jsonl
from crpo import crpo_loss, dpo_fm_loss, four_errors, pair_errors
from training import choose_dtype

# ----------------------------------------------------------------------------- losses


def test_official_preference_loss_and_gradients(parity):
    from model import Condition, TangoFlux
    from train_fm import interpolate, on_grid
    fixture = parity("tangoflux_tiny")
    tensors, values = fixture.tensors, fixture.info["values"]["dpo"]
    policy, reference = TangoFlux(fixture.info["config"]), TangoFlux(fixture.info["config"])
    policy.load_state_dict(fixture.weights)
    reference.load_state_dict({**fixture.weights, **fixture.load("tangoflux_tiny_ref")})
    t = on_grid(tensors["dpo.u"], 1000)
    assert torch.equal(t, tensors["dpo.t"])
    condition = Condition(tensors["text.hidden"], None, tensors["text.mask"], tensors["dpo.duration"])
    x1 = torch.cat([tensors["dpo.latents_w"], tensors["dpo.latents_l"]])
    x0, both_t = tensors["dpo.noise"].repeat(2, 1, 1), t.repeat(2)
    errors = four_errors(policy, reference, condition, x1, x0, both_t)
    for ours, name in zip(errors, ("model_losses_w", "model_losses_l", "ref_losses_w", "ref_losses_l")):
        assert relative_error(ours, tensors[f"dpo.{name}"]) < 1e-4, name
    winner, loser, reference_winner, reference_loser = errors
    inside = -1000 * ((winner - loser) - (reference_winner - reference_loser))
    assert (inside - tensors["dpo.inside_term"]).abs().max() < 2e-3
    loss, parts = crpo_loss(*errors, beta=values["beta_dpo"])
    assert loss.item() == pytest.approx(values["loss"], abs=1e-3)
    assert parts["dpo"] == pytest.approx(tensors["dpo.dpo_term"].item(), abs=1e-3)
    assert parts["accuracy"] == tensors["dpo.implicit_acc"].item()
    assert 0.5 * (parts["winner"] + parts["loser"]) == pytest.approx(tensors["dpo.raw_model_loss"].item(), rel=1e-4)
    loss.backward()
    named = dict(policy.named_parameters())
    for key in (key for key in tensors if key.startswith("dpo.grad.")):
        assert relative_error(named[key.removeprefix("dpo.grad.")].grad, tensors[key]) < 5e-3, key
    assert all(parameter.grad is None for parameter in reference.parameters())
    exact, _ = crpo_loss(*(tensors[f"dpo.{name}"].double() for name in (
        "model_losses_w", "model_losses_l", "ref_losses_w", "ref_losses_l")))
    assert exact.item() == pytest.approx(tensors["dpo.loss_float64"].item(), abs=1e-3)


def test_closed_forms():
    winner, loser = torch.rand(2, 6, generator=generator(0))
    loss, parts = dpo_fm_loss(winner, loser, winner, loser)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)                    # policy = reference
    assert parts["accuracy"] == 0 and parts["margin"] == 0                      # strictly above 0, as the official code
    both = crpo_loss(winner, loser, winner, loser)[0].item()
    assert both == pytest.approx(np.log(2) + winner.mean().item(), rel=1e-6)
    reference = torch.rand(2, 6, generator=generator(1))
    one = dpo_fm_loss(winner, loser, *reference, beta=3.0, half=1.0)[1]
    other = dpo_fm_loss(loser, winner, *reference.flip(0), beta=3.0, half=1.0)[1]
    assert one["margin"] == pytest.approx(-other["margin"], rel=1e-5)           # exchanged: the sign turns
    assert one["accuracy"] == pytest.approx(1 - other["accuracy"])
    assert dpo_fm_loss(winner, loser, *reference, beta=6.0, half=0.5)[0] == dpo_fm_loss(
        winner, loser, *reference, beta=3.0, half=1.0)[0]                       # half and beta are one factor
    velocity, target = torch.randn(2, 3, 5, 4, generator=generator(2))
    assert torch.allclose(pair_errors(velocity, target, "sum"), 20 * pair_errors(velocity, target))
    assert crpo_loss(winner, loser, *reference, fm_weight=0)[0] == dpo_fm_loss(winner, loser, *reference)[0]


# ----------------------------------------------------------------------------- a tiny loop

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model folder and two CLAPs."""
    from model import save_model
    from train_clap import new_clap
    from vae import make_codec
    folder = tmp_path_factory.mktemp("tiny")
    flow, encoder = tiny_parts()
    codec = make_codec("mel", dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1],
                                   num_res_blocks=1, attn_layers=[], down_layers=[0, 1])).eval()
    save_model(folder / "model", flow, codec, encoder)
    for seed in range(2):
        new_clap(16, 16, seed).save(folder / f"clap{seed}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                # the same arithmetic as in the processes that are killed
    yield folder
    torch.set_num_threads(threads)


def flags(tiny, out, *more):
    return ["--checkpoint", str(tiny / "model"), "--reward", str(tiny / "clap0"), "--judge", str(tiny / "clap1"),
            "--out", str(out), "--iterations", "2", "--prompts", "6", "--num_samples", "3", "--evaluate", "8",
            "--batch_size", "4", "--epochs", "4", "--steps", "3", "--pool", "40", "--learning_rate", "3e-3",
            "--log_every", "1", "--save_clips", "4", "--device", "cpu", *more]


def run(tiny, out, *more):
    return crpo.run(crpo.parse_args(flags(tiny, out, *more)))


@pytest.fixture(scope="module")
def whole(tiny):
    """An undisturbed run."""
    rows = run(tiny, tiny / "whole")
    return tiny / "whole", rows


def test_the_table_of_runs_gives_each_run_its_command(whole, tmp_path):
    import alignment
    out, _ = whole
    assert alignment.main(["crpo_search", "--runs", str(out), "--draws", "20", "--out", str(tmp_path)]) is None
    found = read_json(tmp_path / "crpo_search.json")
    words = found[str(out / "iteration_1")]["command"].split()
    assert words[:2] == ["python", "crpo.py"] and "--out" not in words and "--no-decay" not in words
    assert words[words.index("--learning_rate") + 1] == "0.003" and f"{out}/iteration_2" in found
    assert words == crpo.command_of(crpo.parse_args(words[2:])).split()
    args = crpo.parse_args([*words[2:], "--no-decay", "--offline", "--prompt_file", "a file.txt"])
    assert crpo.parse_args(shlex.split(crpo.command_of(args))[2:]) == args
    for command in ("crpo_search", "crpo_pairs"):
        with pytest.raises(UserError, match="is no run of crpo.py; pass --runs"):
            alignment.main([command, "--runs", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is no model folder"):
        crpo.policy_hash(out)


def test_what_winners_have_that_losers_lack(tiny, whole, tmp_path):
    import alignment
    out, _ = whole
    alignment.main(["crpo_pairs", "--runs", str(out), "--against", str(tiny / "model"), "--draws", "20",
                    "--reward", str(tiny / "clap0"), "--judge", str(tiny / "clap1"), "--out", str(tmp_path)])
    found = read_json(tmp_path / "crpo_pairs.json")
    rows = [row for k in (1, 2) for row in read_jsonl(out / f"iteration_{k}" / "pairs.jsonl")]
    for which in ("winner", "loser"):                   # heard again, they score what they scored
        scores = [row[f"reward_{which}"] for row in rows]
        assert found[f"{which}s"]["reward"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert found["winners against losers"]["reward"][1] > 0


def test_the_loop_leaves_what_it_says(tiny, whole):
    from model import load_model
    from sample import generate
    out, rows = whole
    assert [row["name"] for row in rows] == ["real scenes", "base", "iteration 1", "iteration 2"]
    assert "iteration 2" in (out / "crpo.md").read_text()
    assert (out / "listen.html").read_text().count("<audio") == 24
    for k in (1, 2):
        folder = out / f"iteration_{k}"
        scores, pairs = read_jsonl(folder / "scores.jsonl"), read_jsonl(folder / "pairs.jsonl")
        assert len(scores) == 18 and len({row["prompt_id"] for row in scores}) == 6
        latents = load_tensors(folder / "candidates.safetensors")["latents"]
        tensors = load_tensors(folder / "pairs.safetensors")
        for i, pair in enumerate(pairs):
            assert pair["reward_winner"] > pair["reward_loser"]
            for which in ("winner", "loser"):
                index = int(pair[which].split("#")[1])
                assert scores[index]["reward"] == pair[f"reward_{which}"]
                assert scores[index]["prompt"] == pair["prompt"]
                assert torch.equal(tensors[f"{which}_mean"][i], latents[index])
            same = [row["reward"] for row in scores if row["prompt_id"] == scores[index]["prompt_id"]]
            assert (pair["reward_winner"], pair["reward_loser"]) == (max(same), min(same))
        maker = load_model(tiny / "model" if k == 1 else out / "iteration_1")
        row = scores[7]                                                         # from the seed that its row names
        again = generate(maker, [row["prompt"]], [row["duration"]], row["seed"], [row["index"]], steps=3)
        assert torch.allclose(again[0], latents[7], atol=1e-4)
        assert row["checkpoint"] == crpo.policy_hash(str(tiny / "model") if k == 1 else str(out / "iteration_1"))
    seeds = {row["seed"] for k in (1, 2) for row in read_jsonl(out / f"iteration_{k}" / "scores.jsonl")}
    assert len(seeds) == 2                                                      # new noise in each iteration


def test_every_trained_tensor_moves_and_nothing_else(tiny, whole):
    from model import load_model
    from training import trainable
    before, after = load_model(tiny / "model"), load_model(whole[0] / "iteration_1")
    state = torch.load(whole[0] / "iteration_1" / "state.pt", weights_only=True)
    named = trainable(before.flow)
    assert state["weights"].keys() == named.keys()
    assert not [name for name, p in named.items() if torch.equal(p, state["weights"][name])]
    assert all(torch.equal(a, b) for a, b in zip(before.text.parameters(), after.text.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before.codec.parameters(), after.codec.parameters()))
    assert all(torch.equal(p, state["average"][name]) for name, p in trainable(after.flow).items())     # carry ema


def test_the_reference_is_the_policy_as_it_came(tiny, whole, tmp_path, monkeypatch):
    seen = []
    real = crpo.four_errors

    def spy(flow, reference, *rest):
        seen.append({name: p.clone() for name, p in reference.named_parameters()})
        return real(flow, reference, *rest)
    monkeypatch.setattr(crpo, "four_errors", spy)
    run(tiny, tmp_path / "r", "--iterations", "1")
    from model import load_model
    start = dict(load_model(tiny / "model").flow.named_parameters())
    assert len(seen) > 5
    assert all(torch.equal(copy[name], start[name]) for copy in (seen[0], seen[-1]) for name in start)
    first = read_jsonl(tmp_path / "r" / "iteration_1" / "log.jsonl")[0]
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(first["dpo"] + first["winner"], rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_preference_is_learned(tiny, tmp_path, seed):
    """Winners on one side of zero, losers on the other, so that the sign is all there is to learn."""
    from model import load_model
    config = load_model(tiny / "model").flow.config
    side = 0.5 + 0.1 * torch.randn(8, config["audio_seq_len"], config["in_channels"], generator=generator(seed))
    zeros = torch.zeros_like(side)
    tensors = {"winner_mean": side, "loser_mean": -side, "winner_std": zeros, "loser_std": zeros}
    rows = [{"prompt": "rain" if i % 2 else "a dog", "duration": 1.0} for i in range(len(side))]
    args = crpo.parse_args(flags(tiny, tmp_path, "--beta", "20", "--learning_rate", "1e-3", "--epochs", "20",
                                 "--seed", str(seed)))
    report = crpo.optimise(args, tmp_path, str(tiny / "model"), rows, tensors, seed, torch.device("cpu"),
                           choose_dtype(args.dtype, torch.device("cpu")))
    log = read_jsonl(tmp_path / "log.jsonl")
    assert log[0]["dpo"] == pytest.approx(np.log(2), abs=1e-4)
    assert report["accuracy"] >= 0.95 and report["margin"] > 1 and report["dpo"] < 0.3, report
    assert report["winner"] - report["reference_winner"] < report["loser"] - report["reference_loser"]


STAGES = {"generation": ("candidates", 1), "scoring": ("scores.jsonl", 5), "training": ("log.jsonl", 2)}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_any_stage_it_ends_with_the_same_bits(tiny, whole, tmp_path, stage):
    name, wanted = STAGES[stage]
    out = tmp_path / "killed"
    arguments = flags(tiny, out, "--iterations", "1", "--save_every", "2")
    process = subprocess.Popen([sys.executable, ROOT / "crpo.py", *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    watched = out / "iteration_1" / name

    def progress():
        if watched.is_dir():
            return len([path for path in watched.iterdir() if not path.name.startswith(".")])
        return watched.read_text().count("\n") if watched.is_file() else 0
    while process.poll() is None and progress() < wanted:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (out / "iteration_1" / "report.json").exists()
    run(tiny, out, "--iterations", "1", "--save_every", "2")
    ours, theirs = out / "iteration_1", whole[0] / "iteration_1"
    assert (ours / "pairs.jsonl").read_text() == (theirs / "pairs.jsonl").read_text()
    assert [row["reward"] for row in read_jsonl(ours / "scores.jsonl")] == pytest.approx(
        [row["reward"] for row in read_jsonl(theirs / "scores.jsonl")], abs=1e-6)
    mine, full = (load_tensors(folder / "tangoflux.safetensors") for folder in (ours, theirs))
    assert all(torch.equal(mine[name], full[name]) for name in full)


def test_offline_raw_reencoded_and_static_sets(tiny, whole, tmp_path):
    run(tiny, tmp_path / "offline", "--offline", "--carry", "raw", "--reencode", "--epochs", "1", "--reduction", "sum",
        "--t_distribution", "uniform", "--no-shared_noise", "--no-decay", "--beta", "1")
    assert not (tmp_path / "offline" / "iteration_2" / "pairs.jsonl").exists()
    rates = [row["lr"] for row in read_jsonl(tmp_path / "offline" / "iteration_2" / "log.jsonl")]
    assert rates[-1] == 3e-3                                                    # no decay
    state = torch.load(tmp_path / "offline" / "iteration_2" / "state.pt", weights_only=True)
    kept = load_tensors(tmp_path / "offline" / "iteration_2" / "tangoflux.safetensors")
    assert all(torch.equal(kept[name], state["weights"][name]) for name in state["average"])       # raw, not averaged
    assert not torch.equal(state["weights"]["fc.0.weight"], state["average"]["fc.0.weight"])
    tensors = load_tensors(tmp_path / "offline" / "iteration_1" / "pairs.safetensors")
    assert tensors["winner_std"].min() > 0                      # a posterior, not the sampled latent
    from audio import write_wav
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", 0.1 * torch.randn(1, 9000, generator=generator(name)), 16000)
    rows = [{"captions": "rain", "duration": 10, "chosen": "a.wav", "reject": "b.wav"},
            {"captions": "wind", "chosen": "b.wav", "reject": "a.wav"},
            {"captions": "wind", "chosen": "b.wav", "reject": "b.wav"}]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    loop = ("--iterations", "--prompts", "--num_samples", "--pool")             # they belong to the online loop
    given = flags(tiny, tmp_path / "static", "--pairs", str(tmp_path / "set.json"), "--epochs", "1")
    table = crpo.run(crpo.parse_args([word for i, word in enumerate(given)
                                      if word not in loop and given[max(i - 1, 0)] not in loop]))
    assert table[-1]["name"] == "iteration 1"
    assert read_json(tmp_path / "static" / "iteration_1" / "report.json")["pairs"] == 2
    lasts = [row["duration"] for row in read_jsonl(tmp_path / "static" / "iteration_1" / "pairs.jsonl")]
    assert lasts == [9000 / 16000] * 2                              # the winner's own, not the row's 10 s


def test_nan_rewards_and_ties_are_counted_and_skipped(tiny, tmp_path, monkeypatch, capsys):
    from clap import Clap
    real = Clap.scores

    def broken(self, audios, *rest, **more):
        scores = real(self, audios, *rest, **more)
        if len(audios) == 18:
            scores[4], scores[6:9] = float("nan"), 0.25
        return scores
    monkeypatch.setattr(Clap, "scores", broken)
    run(tiny, tmp_path / "r", "--iterations", "1", "--epochs", "1", "--save_clips", "18")
    assert len(read_jsonl(tmp_path / "r" / "iteration_1" / "pairs.jsonl")) == 4
    assert "2 of 6 prompts make no pair" in capsys.readouterr().err


def test_wrong_input_is_one_line(tiny, whole, tmp_path):
    with pytest.raises(UserError, match="--num_samples 1 makes no pairs"):
        run(tiny, tmp_path, "--num_samples", "1")
    with pytest.raises(UserError, match="--prompts 50 is more than the 40 prompts of the pool"):
        run(tiny, tmp_path / "a", "--prompts", "50")
    with pytest.raises(UserError, match="started with beta = 2000.0, now it is 5.0"):
        run(tiny, whole[0], "--beta", "5")
    with pytest.raises(UserError, match="--prompts, --offline would have no effect beside --pairs"):
        crpo.parse_args(["--pairs", "x.json", "--offline", "--prompts", "7"])
    with pytest.raises(UserError, match="without --pairs leave it out"):
        run(tiny, tmp_path, "--audio_dir", str(tmp_path))
    for flag, value in (("--beta", "nan"), ("--epochs", "0"), ("--dropout", "1.5"), ("--learning_rate", "-1")):
        with pytest.raises(UserError, match=f"{flag} is"):
            run(tiny, tmp_path, flag, value)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("rain\n\n\nwind\n\n")                                    # empty lines are no prompts
    with pytest.raises(UserError, match="more than the 2 prompts"):
        run(tiny, tmp_path / "b", "--prompt_file", str(prompts))
    prompts.write_text("\n\n")
    with pytest.raises(UserError, match="has no prompt"):
        run(tiny, tmp_path / "c", "--prompt_file", str(prompts))


def test_warnings_name_the_known_failures():
    def row(name, reward, judge, winner, accuracy):
        return {"name": name, "reward": reward, "judge": judge,
                "pairs": {"winner": winner, "reference_winner": 0.2, "accuracy": accuracy}}
    good = [row("base", 0.5, 0.5, 0.2, 0.5), row("iteration 1", 0.6, 0.6, 0.2, 0.99)]
    assert crpo.warnings_of(good) == []
    bad = [good[0], row("iteration 1", 0.6, 0.4, 0.25, 0.99)]
    lines = crpo.warnings_of(bad)
    assert len(lines) == 2 and "rose by 25 %" in lines[0] and "being fooled" in lines[1]


def test_what_a_kill_leaves_beside_the_candidates_is_not_read(tiny, whole, tmp_path):
    """A half-written file of an atomic write, sorted before all others."""
    from common import save_tensors
    parts = tmp_path / "left" / "iteration_1" / "candidates"
    save_tensors(parts / ".0000000.x.safetensors", {"latents": torch.zeros(4, 1, 1)})
    run(tiny, tmp_path / "left", "--iterations", "1", "--epochs", "1")
    latents = [load_tensors(out / "iteration_1" / "candidates.safetensors")["latents"]
               for out in (tmp_path / "left", whole[0])]
    assert torch.equal(*latents) and not parts.exists()


def test_a_pair_shares_noise_and_t_and_depends_on_its_position_alone(tiny, tmp_path):
    pairs = {"hidden": torch.zeros(5, 3, 8), "mask": torch.ones(5, 3).bool(), "duration": torch.ones(5)}
    for which, value in (("winner", 1.0), ("loser", -1.0)):
        pairs |= {f"{which}_mean": torch.full((5, 4, 2), value), f"{which}_std": torch.zeros(5, 4, 2)}
    args = crpo.parse_args(flags(tiny, tmp_path))
    _, x1, x0, t = crpo.draw_pairs(pairs, range(7), args, 0, "cpu")
    assert (x1[:7] == 1).all() and (x1[7:] == -1).all()                         # winners first
    assert torch.equal(*x0.chunk(2)) and torch.equal(*t.chunk(2))
    assert torch.equal(crpo.draw_pairs(pairs, [6], args, 0, "cpu")[2][0], x0[6])
    args.shared_noise = False
    _, _, x0, t = crpo.draw_pairs(pairs, range(7), args, 0, "cpu")
    assert not torch.equal(*x0.chunk(2)) and torch.equal(*t.chunk(2))
