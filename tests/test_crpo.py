"""CRPO: losses against the official numbers, the stages, exact resume, that a preference is learned."""
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, kill_at, refused, relative_error, same_file, small_judges
from test_train_fm import stop_in_step

import crpo
from crpo import Loss, Optimisation
from lib import losses
from lib.audio import write_wav
from lib.common import UserError, generator, parse_flags, pick, read_json, read_jsonl, write_json
from lib.losses import crpo_loss, dpo_fm_loss
from lib.mel import griffin_lim
from lib.text import Condition, concat_conditions
from lib.weights import load_tensors, save_tensors, trainable
from model import TangoFlux, load_model
from reward import Clap
from sample import Sampling, sample_latents
from train_fm import flow_matching_loss, interpolate, on_grid

MODEL = str(ROOT / "tests" / "golden" / "model")
CPU = torch.device("cpu")


def test_official_preference_loss_and_gradients(parity):
    fixture = parity("tangoflux_tiny")
    tensors, values = fixture.tensors, fixture.info["values"]["dpo"]
    policy, reference = TangoFlux(fixture.info["config"]), TangoFlux(fixture.info["config"])
    policy.load_state_dict(fixture.weights)
    reference.load_state_dict({**fixture.weights, **fixture.load("tangoflux_tiny_ref")})
    t = on_grid(tensors["dpo.u"], 1000)
    assert torch.equal(t, tensors["dpo.t"])
    condition = Condition(tensors["text.hidden"], None, tensors["text.mask"], tensors["dpo.duration"])
    x1 = torch.cat([tensors["dpo.latents_w"], tensors["dpo.latents_l"]])
    xt, target = interpolate(x1, tensors["dpo.noise"].repeat(2, 1, 1), t.repeat(2))
    both = crpo.two_velocities(policy, reference, xt, t.repeat(2), concat_conditions(condition, condition))
    errors = [error for velocity in both for error in losses.errors(velocity, target).chunk(2)]
    official = [tensors[f"dpo.{which}_losses_{side}"] for which in ("model", "ref") for side in "wl"]
    assert all(relative_error(ours, theirs) < 1e-4 for ours, theirs in zip(errors, official))
    logits = -1000 * ((errors[0] - errors[1]) - (errors[2] - errors[3]))
    assert (logits - tensors["dpo.inside_term"]).abs().max() < 2e-3
    loss, parts = crpo_loss(*errors, beta=values["beta_dpo"])
    assert loss.item() == pytest.approx(values["loss"], abs=1e-3)
    assert parts["dpo"] == pytest.approx(tensors["dpo.dpo_term"].item(), abs=1e-3)
    assert parts["accuracy"] == tensors["dpo.implicit_acc"].item()
    assert 0.5 * (parts["winner"] + parts["loser"]) == pytest.approx(tensors["dpo.raw_model_loss"].item(), rel=1e-4)
    loss.backward()
    parameters = dict(policy.named_parameters())
    for key in (key for key in tensors if key.startswith("dpo.grad.")):
        assert relative_error(parameters[key.removeprefix("dpo.grad.")].grad, tensors[key]) < 5e-3, key
    assert all(parameter.grad is None for parameter in reference.parameters())
    exact, _ = crpo_loss(*(each.double() for each in official))
    assert exact.item() == pytest.approx(tensors["dpo.loss_float64"].item(), abs=1e-3)


def test_closed_forms():
    winner, loser = torch.rand(2, 6, generator=generator(0))
    loss, parts = dpo_fm_loss(winner, loser, winner, loser)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)                    # policy = reference
    assert parts["accuracy"] == 0 and parts["margin"] == 0                      # strictly above 0, as the official code
    assert dpo_fm_loss(winner / 2, loser, winner, loser)[0] < np.log(2)         # a winner better than its reference
    both = crpo_loss(winner, loser, winner, loser)[0].item()
    assert both == pytest.approx(np.log(2) + winner.mean().item(), rel=1e-6)
    reference = torch.rand(2, 6, generator=generator(1))
    one = dpo_fm_loss(winner, loser, *reference, beta=3.0, half=1.0)
    other = dpo_fm_loss(loser, winner, *reference.flip(0), beta=3.0, half=1.0)[1]
    assert one[1]["margin"] == pytest.approx(-other["margin"], rel=1e-5)        # exchanged: the sign turns
    assert one[1]["accuracy"] == pytest.approx(1 - other["accuracy"])
    assert dpo_fm_loss(winner, loser, *reference, beta=6.0, half=0.5)[0] == one[0]      # one factor together
    velocity, target = torch.randn(2, 3, 5, 4, generator=generator(2))
    assert torch.allclose(flow_matching_loss(velocity, target)[1][1], ((velocity - target)[1] ** 2).sum() / 20)
    assert crpo_loss(winner, loser, *reference, fm_weight=0)[0] == dpo_fm_loss(winner, loser, *reference)[0]


def rows_of(mean, **more):
    """What crpo.draw_rows draws from: the latents `mean` (P, K, L, C), `more` or zeros and ones beside them."""
    rows = len(mean)
    return {"hidden": torch.zeros(rows, 3, 8), "mask": torch.ones(rows, 3).bool(), "text": torch.arange(rows), "mean": mean,
            "std": torch.zeros_like(mean), "duration": torch.ones(rows), "advantage": torch.ones(mean.shape[:2]), **more}


def test_a_pair_shares_noise_and_t_and_depends_on_its_position_alone():
    pairs = rows_of(torch.tensor([1.0, -1.0])[None, :, None, None].expand(5, 2, 4, 2))
    batch, _ = crpo.draw_rows(pairs, range(7), settings()[0], 0, CPU)
    assert (batch.x1[:7] == 1).all() and (batch.x1[7:] == -1).all()             # winners first
    assert torch.equal(*batch.x0.chunk(2)) and torch.equal(*batch.t.chunk(2))
    assert torch.equal(crpo.draw_rows(pairs, [6], settings()[0], 0, CPU)[0].x0[0], batch.x0[6])


def opposite_sides(seed):
    """Winners on one side of zero, losers on the other, so that the sign is all there is to learn."""
    config = load_model(MODEL, parts=("flow",)).flow.config
    side = 0.5 + 0.1 * torch.randn(8, config["audio_seq_len"], config["in_channels"], generator=generator(seed))
    rows = [{"prompt": "rain" if i % 2 else "a dog", "duration": 1.0} for i in range(len(side))]
    return rows, {"winner_mean": side, "loser_mean": -side}


def test_a_preference_is_learned(tmp_path):
    loss, how = settings(beta=50.0, learning_rate=4e-3, epochs=12)
    report = crpo.optimise(tmp_path, MODEL, *opposite_sides(0), loss, how, 0, "report", CPU)
    assert read_jsonl(tmp_path / "log.jsonl")[0]["dpo"] == pytest.approx(np.log(2), abs=1e-4)
    assert report["accuracy"] >= 0.95 and report["margin"] > 1 and report["dpo"] < 0.3, report
    assert report["winner"] - report["reference_winner"] < report["loser"] - report["reference_loser"]


SMALL = dict(checkpoint=MODEL, iterations=2, prompts=4, num_samples=3, eval_prompts=2, batch_size=4, epochs=6, steps=2,
             pool=40, learning_rate=3e-3, log_every=1, save_clips=4, device="cpu", dtype="float32")


def settings(**more):
    """A Loss and an Optimisation."""
    args = parse_flags("", crpo.FLAGS, [], {**SMALL, **more})
    return pick(Loss, args), pick(Optimisation, args)


@pytest.fixture(scope="module")
def claps(tmp_path_factory, one_thread):
    return small_judges(tmp_path_factory.mktemp("claps"))


def judges(claps):
    return {**SMALL, "reward": str(claps / "reward"), "judge": str(claps / "judge"), "tagger": str(claps)}


def run(claps, out, **more):
    return crpo.run(**{**judges(claps), "out": str(out), **more})


@pytest.fixture(scope="module")
def whole(claps):
    """An undisturbed run."""
    return claps / "whole", run(claps, claps / "whole")


def test_the_loop_leaves_what_it_says(whole):
    out, numbers = whole
    assert list(numbers)[:4] == ["real", "base", "iteration 1", "iteration 2"]
    assert "iteration 2" in (out / "crpo.md").read_text()
    assert read_json(out / "config.json")["noise"] == "evaluation 7"            # that of no candidates (test_golden: 7)
    assert read_json(out / "crpo.json")["iteration 2 against base"]["reward"][0] == pytest.approx(
        numbers["iteration 2"]["reward"] - numbers["base"]["reward"])
    for k, maker in ((1, MODEL), (2, str(out / "iteration_1"))):
        folder = out / f"iteration_{k}"
        scores, pairs = read_jsonl(folder / "scores.jsonl"), read_jsonl(folder / "pairs.jsonl")
        assert len(scores) == 12 and len({row["prompt_id"] for row in scores}) == 4
        latents, tensors = (load_tensors(folder / f"{name}.safetensors") for name in ("candidates", "pairs"))
        latents = latents["latents"]
        for i, pair in enumerate(pairs):
            for which, extreme in (("winner", max), ("loser", min)):
                index = int(pair[which].split("#")[1])
                assert scores[index]["reward"] == pair[f"reward_{which}"] and scores[index]["prompt"] == pair["prompt"]
                assert torch.equal(tensors[f"{which}_mean"][i], latents[index])
                same = [row["reward"] for row in scores if row["prompt_id"] == scores[index]["prompt_id"]]
                assert pair[f"reward_{which}"] == extreme(same)
        row = scores[7]                                                         # from the seed that its row names
        again = sample_latents(load_model(maker), [row["prompt"]], [row["duration"]], row["seed"], [row["index"]],
                               Sampling(steps=2))
        assert torch.allclose(again[0], latents[7], atol=1e-4)
        assert row["index"] == 7 and row["checkpoint"] == crpo.policy_hash(maker) and row["seed"] == k
    with pytest.raises(UserError, match="holds models, and is none: take .*iteration_2$"):
        crpo.policy_hash(str(out))                                              # a run, and no model


def test_a_signal_saves_and_the_optimisation_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    loss, how = settings(epochs=3)
    train = [partial(crpo.optimise, tmp_path / name, MODEL, *opposite_sides(0), loss, how, 0, "report", CPU)
             for name in ("whole", "parts")]
    whole = train[0]()
    stop_in_step(monkeypatch, crpo, 4, train[1])
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 4
    assert not (tmp_path / "parts" / "tangoflux.safetensors").exists()
    assert train[1]() == whole
    assert same_file(*(tmp_path / name / "tangoflux.safetensors" for name in ("whole", "parts")))


def test_other_code_in_the_middle_of_a_run_is_said(tmp_path, capsys):
    flags = parse_flags("", crpo.FLAGS, [], {})
    (tmp_path / "real.safetensors").touch()
    write_json(tmp_path / "config.json", {"code": "other", "noise": "x", "ears": []})
    for said in (True, False):                                                  # once
        crpo.begin(tmp_path / "config.json", "crpo.py", flags, "policy", SimpleNamespace())
        assert ("begun by other code" in capsys.readouterr().err) == said
    refused("was started with other files at --checkpoint", crpo.begin, tmp_path / "config.json", "", flags, "other",
            SimpleNamespace())
    (tmp_path / "real.safetensors").unlink()                                    # nothing was made: another may begin
    crpo.begin(tmp_path / "config.json", "crpo.py", flags, "other", SimpleNamespace())
    write_json(tmp_path / "config.json", {"num_layers": 2})                     # of a model that train_fm.py made
    refused("holds another model or run", crpo.run, out=str(tmp_path))
    assert read_json(tmp_path / "config.json") == {"num_layers": 2}


def test_every_trained_tensor_moves_and_nothing_else(whole):
    before, after = load_model(MODEL), load_model(whole[0] / "iteration_1")
    state, parameters = torch.load(whole[0] / "iteration_1" / "state.pt", weights_only=True), trainable(before.flow)
    assert state["weights"].keys() == parameters.keys()
    assert not [name for name, p in parameters.items() if torch.equal(p, state["weights"][name])]
    for part in ("text", "codec"):
        assert all(map(torch.equal, getattr(before, part).parameters(), getattr(after, part).parameters()))
    assert all(torch.equal(p, state["average"][name]) for name, p in trainable(after.flow).items())


def test_the_reference_nan_rewards_ties_and_what_a_kill_left(claps, whole, tmp_path, monkeypatch, capsys):
    """The reference is the policy as it came; two prompts make no pair; a half-written file is not read."""
    seen, loads, rounds, real, two_velocities = [], [], [], Clap.scores, crpo.two_velocities

    def spy(flow, reference, *rest):
        seen.append({name: p.clone() for name, p in reference.named_parameters()})
        return two_velocities(flow, reference, *rest)

    def broken(self, audios, *rest, **more):
        scores = real(self, audios, *rest, **more)
        if len(audios) == 12:
            scores[4], scores[6:9] = float("nan"), 0.25
        return scores
    monkeypatch.setattr(crpo, "two_velocities", spy)
    monkeypatch.setattr("lib.mel.griffin_lim", lambda mel, log_mel, iterations: rounds.append(iterations) or griffin_lim(
        mel, log_mel, 1))
    monkeypatch.setattr("model.load_model", lambda *rest, **more: loads.append(rest) or load_model(*rest, **more))
    monkeypatch.setattr(Clap, "scores", broken)
    folder = tmp_path / "iteration_1"
    save_tensors(folder / "candidates" / ".0000000.x.safetensors", {"latents": torch.zeros(4, 1, 1)})
    run(claps, tmp_path, iterations=1, save_clips=12, vocoder_steps=3)
    assert rounds == [24, 3, 24]                                                # base, candidates, iteration 1
    latents = [load_tensors(at / "candidates.safetensors")["latents"] for at in (folder, whole[0] / "iteration_1")]
    assert torch.allclose(*latents, atol=1e-4) and not (folder / "candidates").exists()
    assert len(read_jsonl(folder / "pairs.jsonl")) == 2
    assert "2 of 4 prompts make no pair" in capsys.readouterr().err
    start, first = dict(load_model(MODEL).flow.named_parameters()), read_jsonl(folder / "log.jsonl")[0]
    assert len(loads) <= 3 and all(torch.equal(copy[name], start[name]) for copy in seen for name in start)
    assert first["dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["loss"] == pytest.approx(first["dpo"] + 0.1 * first["winner"], rel=1e-5)


def test_killed_in_two_stages_it_ends_with_the_same_bits(claps, whole, tmp_path):
    more = {"out": str(tmp_path), "iterations": 1, "save_every": 2}
    flags = [f"--{name}={value}" for name, value in (judges(claps) | more).items()]
    for name, wanted in (("candidates", 1), ("log.jsonl", 2)):                  # test_experts.py: scoring
        kill_at("crpo.py", flags, tmp_path / "iteration_1" / name, wanted)
    assert not (tmp_path / "iteration_1" / "report.json").exists()
    run(claps, **more)
    for name in ("iteration_1/pairs.jsonl", "iteration_1/scores.jsonl", "iteration_1/tangoflux.safetensors"):
        assert same_file(tmp_path / name, whole[0] / name), name


def test_dtype_is_of_sampling_not_of_what_is_saved(claps, tmp_path, monkeypatch):
    dtypes, real = [], crpo.load_policy

    def spy(*rest, **more):
        model = real(*rest, **more)
        dtypes.append(next(model.flow.parameters()).dtype)
        return model
    monkeypatch.setattr(crpo, "load_policy", spy)
    run(claps, tmp_path, iterations=1, epochs=1, dtype="bfloat16")
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]            # samples, trains, is judged
    saved = load_tensors(tmp_path / "iteration_1" / "tangoflux.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_offline_raw_and_static_sets(claps, tmp_path):
    how = dict(offline=True, ema=0.0, epochs=1, reduction="sum", beta=1.0, t_distribution="uniform", prompts=2)
    run(claps, tmp_path / "offline", iterations=1, **how)
    assert "iteration 2" in run(claps, tmp_path / "offline", **how)             # a run goes on to more iterations
    second = tmp_path / "offline" / "iteration_2"
    assert not (second / "pairs.jsonl").exists()
    state, kept = torch.load(second / "state.pt", weights_only=True), load_tensors(second / "tangoflux.safetensors")
    assert all(torch.equal(kept[name], state["weights"][name]) for name in state["average"])    # raw, not averaged
    for name in ("a", "b"):
        write_wav(tmp_path / f"{name}.wav", 0.1 * torch.randn(1, 9000, generator=generator(name)), 16000)
    rows = [{"captions": "rain", "duration": 10, "chosen": "a.wav", "reject": "b.wav"},
            *({"captions": "wind", "chosen": "b.wav", "reject": loser} for loser in ("a.wav", "b.wav"))]
    (tmp_path / "set.json").write_text(json.dumps(rows))
    numbers = run(claps, tmp_path / "static", pairs=str(tmp_path / "set.json"), epochs=1)
    assert "iteration 2" not in numbers                                         # one iteration is all there is
    folder = tmp_path / "static" / "iteration_1"
    assert read_json(folder / "report.json")["pairs"] == 2
    assert [row["duration"] for row in read_jsonl(folder / "pairs.jsonl")] == [9000 / 16000] * 2    # the winner's own
    tensors = load_tensors(folder / "pairs.safetensors")
    assert torch.equal(tensors["winner_mean"][0], tensors["loser_mean"][1]) and tensors["winner_std"].min() > 0


def test_wrong_input_is_one_line(claps, whole, tmp_path, monkeypatch):
    for flags, what in ((["--num_samples", "1"], "--num_samples: 1 must lie between 2"),
                        (["--beta", "nan"], "--beta: nan must lie between")):
        refused(what, crpo.main, flags)
    (tmp_path / "prompts.txt").write_text("rain\n\n\nwind\n\n")                # empty lines are no prompts
    for more, what in (({"prompts": 50}, "--prompts 50 is more than the 40"),
                       ({"score": 1.0}, "needs a model with a score head"),
                       ({"prompt_file": str(tmp_path / "prompts.txt")}, "more than the 2 of .*prompts.txt"),
                       ({"out": whole[0], "beta": 5.0}, "started with beta = None, now it is 5.0")):
        refused(what, run, claps, **{"out": tmp_path / "out", **more})
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("one process", run, claps, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_alarms_name_the_known_failures():
    losses = {"winner": 0.2, "reference_winner": 0.2, "accuracy": 0.99}
    before, better, fooled = ({name: np.full(8, value) for name, value in zip(("reward", "judge"), pair)}
                              for pair in ((0.5, 0.5), (0.6, 0.6), (0.6, 0.4)))
    assert crpo.alarms("iteration 1", losses, before, better) == []
    lines = crpo.alarms("iteration 1", {**losses, "winner": 0.25}, before, fooled)
    assert len(lines) == 2 and "loss rose" in lines[0] and "being fooled" in lines[1]
    assert "reward itself fell" in crpo.alarms("iteration 1", {"accuracy": 0.99}, better, before)[0]    # grpo: no errors
