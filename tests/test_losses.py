"""Losses that learn from preferences: closed forms, what each gradient is, what does not matter."""
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import noise, refused
from test_crpo import CPU, MODEL, claps, opposite_sides, rows_of, run, settings  # noqa: F401

import crpo
from crpo import interpolate
from lib import losses
from lib.common import generator, read_json, read_jsonl
from lib.losses import advantages, grpo_loss, noisy_path, noisy_step, path_step, safeguarded
from lib.weights import load_tensors
from reward import groups_of
from sample import schedule

How = namedtuple("How", "loss beta half reduction fm_weight safeguard advantage_slope nft_beta kl_weight sde_noise clip_range steps")
HOW = How("nft", 100.0, 0.5, "mean", 1.0, None, 0.8, 1.0, 0.0, 0.7, 1e-3, 10)
GROUPED = ("nft", "dgpo", "awm")


def inputs(rows=3, count=4, seed=0):
    """velocity = old (K B, L, C), xt, target, t, A (B, K)"""
    rng = generator(seed)
    x1, x0, old = torch.randn(3, rows * count, 5, 2, generator=rng)
    t = torch.rand(rows * count, generator=rng)
    A = advantages(torch.randn(rows, count, generator=rng))
    return old, *interpolate(x1, x0, t), t, A


def gradient(name, velocity, old, xt, target, t, A, how=HOW):
    velocity = velocity.clone().requires_grad_()
    return torch.autograd.grad(losses.LOSSES[name][0](velocity, old, xt, target, t, A, how)[0], velocity)[0]


@pytest.mark.parametrize("name", GROUPED)
def test_at_the_reference_the_gradient_is_the_formulas(name):
    old, xt, target, t, A = inputs()
    flat = A.T.flatten()[:, None, None]
    size = old[0].numel()
    miss = old - target
    by_hand = {"awm": 2 * flat * miss / size, "dgpo": flat * miss / size,               # s = 1/2
               "nft": (2 * (0.5 + 0.8 * flat).clamp(0, 1) - 1) * 2 * t[:, None, None] * miss / size
               / miss.abs().mean((1, 2), keepdim=True)}[name] / len(old)
    assert torch.allclose(gradient(name, old, old, xt, target, t, A), by_hand, atol=1e-6)
    assert torch.allclose(gradient(name, old, old, xt, target, t, -A), -by_hand, atol=1e-6)     # the sign turns
    moved = old + 0.1 * noise(*old.shape)
    held, free = (gradient(name, moved, old, xt, target, t, 0 * A, HOW._replace(kl_weight=w)) for w in (0.5, 0.0))
    assert torch.allclose(held - free, (moved - old) / size / len(old), atol=1e-6)      # A = 0: the KL
    assert name == "nft" or not free.any()                  # alone, but for nft's images, at r = 1/2 both
    assert not gradient(name, old, old, xt, target, t, 0 * A).any()


def test_advantages_are_in_deviations_and_cut():
    A = advantages(torch.tensor([[0.0] * 7 + [8], [1, 2, 3, 4, 5, 6, 7, 8]]))
    assert A[0].max() == 2 and A[0, 0] == pytest.approx(-1 / 7 ** 0.5)          # uncut: 7 / sqrt(7)
    assert A[1].sum().abs() < 1e-6 and A[1].square().mean() == pytest.approx(1)


@pytest.mark.parametrize("name", GROUPED)
def test_the_order_of_clips_does_not_matter(name):
    old, xt, target, t, _ = inputs()
    rewards, velocity = noise(3, 4), old + 0.1 * noise(*old.shape)
    value = losses.LOSSES[name][0](velocity, old, xt, target, t, advantages(rewards), HOW)[0]
    place = torch.arange(12).view(4, 3)                                         # clip k of row b: 3 k + b
    order = place[[2, 0, 3, 1]].flatten()
    again = [each[order] for each in (velocity, old, xt, target, t)]
    same = losses.LOSSES[name][0](*again, advantages(rewards[:, [2, 0, 3, 1]]), HOW)[0]
    assert torch.allclose(value, same, atol=1e-6)


def test_nft_with_a_small_b_is_a_weighted_regression():
    """r e+ + (1 - r) e-, divided by b, loses all but (2 r - 1) times the slope of the error."""
    old, xt, target, t, A = inputs()
    moved, b = old + 0.3 * noise(*old.shape), 1e-3
    r = (0.5 + 0.8 * A.T.flatten()).clamp(0, 1)[:, None, None]
    scale = (old - target).abs().mean((1, 2), keepdim=True)
    slope = (2 * r - 1) * 2 * t[:, None, None] * (old - target) / scale / old[0].numel() / len(old)
    assert torch.allclose(gradient("nft", moved, old, xt, target, t, A, HOW._replace(nft_beta=b)) / b, slope, atol=2e-4)
    best = gradient("nft", target, old, xt, target, t, 9 + 0 * A)               # r = 1: the data is a fixed point
    assert best.abs().max() < 1e-3                                              # but for rounding


def test_dgpo_rests_when_the_preference_is_learned():
    old, xt, target, t, A = inputs()
    flat = A.T.flatten()[:, None, None]
    learned = target + (old - target) * (1 - 0.4 * flat)                        # better where A > 0
    first, last = (gradient("dgpo", each, old, xt, target, t, A, HOW._replace(beta=1e3)).norm() for each in (old, learned))
    assert last < 1e-3 * first
    half = learned.clone()                                  # prompt 0 has learned, prompt 1 has the opposite
    half[1::3] = (target + (old - target) * (1 + 0.4 * flat))[1::3]
    norms = gradient("dgpo", half, old, xt, target, t, A, HOW._replace(beta=1e3)).square().sum((1, 2)).view(4, 3).sum(0)
    assert norms[0] < 1e-6 < norms[1]                       # each prompt has its own s


def test_the_safeguard_keeps_the_winners_error_to_first_order():
    winner, other = torch.randn(2, 50, 5, 2, generator=generator(0))            # misses v - target
    loser = (torch.arange(50)[:, None, None] / 25 - 1) * winner + 0.3 * other   # against it, then along
    gw, errors = 2 * winner / 10, []
    for each in (winner, loser):
        errors.append(each.square().mean((1, 2)))
    loser.requires_grad_()
    free = loser.square().mean((1, 2))
    held = safeguarded(free, winner, loser.detach(), 0.9)
    assert torch.allclose(held, errors[1])                                      # the value is the same
    (held_gradient,), (gradient,) = (torch.autograd.grad(each.sum(), loser, retain_graph=True) for each in (held, free))
    square, dot = gw.square().sum((1, 2)), (gw * gradient).sum((1, 2))
    held_dot = (gw * held_gradient).sum((1, 2))
    along = dot > 0.1 * square
    assert 10 < along.sum() < 40
    assert torch.allclose(held_dot[along], 0.1 * square[along], rtol=1e-4)      # 90 % of the winner's step remains
    assert torch.allclose(held_gradient[~along], gradient[~along])              # else it is left alone


def test_beta_counts_summed_errors():
    """The same loss and gradient norm for the same summed errors, whatever L x C (docs/differences.md)."""
    found = []
    for length in (6, 24):
        beta = losses.OFFICIAL_BETA * length * 4
        errors = torch.tensor([[3.0, 5.0, 3.5, 4.5]]).T / (length * 4)          # sums over L x C: 3, 5, ...
        found.append(losses.dpo_fm_loss(*errors, beta=beta)[0].item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert losses.OFFICIAL_BETA * 645 * 64 == pytest.approx(2000) and round(losses.OFFICIAL_BETA * 64 * 48) == 149


# ----------------------------------------------------------------------------- GRPO

def gaussian_flow(deviation):
    """The velocity between N(0, 1) at t = 1 and N(2, deviation^2) at t = 0."""
    def velocity_fn(x, t):
        spread = (1 - t) ** 2 * deviation ** 2 + t ** 2
        centred = x - (1 - t) * 2
        return (t - (1 - t) * deviation ** 2) / spread * centred - 2
    return velocity_fn


def test_noisy_steps_have_the_marginals_of_the_flow():
    """Mean and deviation of 4,096 samples at the end and half way: 2 and 0.5; 1 and 0.56."""
    start = torch.randn(4096, 1, 1, generator=generator(0))
    path = noisy_path(gaussian_flow(0.5), start, schedule(200), 0.7)
    half = (0.25 * 0.25 + 0.25) ** 0.5
    for place, mean, deviation in ((-1, 2.0, 0.5), (100, 1.0, half)):
        assert abs(path[:, place].mean() - mean) < 0.04, place
        assert abs(path[:, place].std() - deviation) < 0.03, place
    drift = noisy_path(gaussian_flow(0.5), start, schedule(200), 1e-6)          # without noise: Euler's
    correlation = np.corrcoef(path[:, -1, 0, 0], drift[:, -1, 0, 0])[0, 1]
    assert correlation < 0.9                                                    # the noise does something


def test_a_path_follows_from_its_start_alone_and_its_last_step_has_no_noise():
    start = noise(3, 4, 2)
    whole = noisy_path(gaussian_flow(0.5), start, schedule(5), 0.7)
    assert torch.equal(whole[1:2], noisy_path(gaussian_flow(0.5), start[1:2], schedule(5), 0.7))
    _, deviation = noisy_step(start, start, torch.tensor(0.2), torch.tensor(0.0), 0.7)
    assert deviation == 0
    assert noisy_step(start, start, torch.tensor(1.0), torch.tensor(0.9), 0.7)[1] == pytest.approx(0.7)
    assert noisy_step(start, start, torch.tensor(0.8), torch.tensor(0.7), 0.7)[1] == pytest.approx(0.7 * (4 * 0.1) ** 0.5)
    t = torch.tensor([0.999, 0.61, 0.0])                                        # of the four steps with noise
    xt, after, began = path_step(whole, t)
    assert torch.equal(xt[0], whole[0, 0]) and torch.equal(after[1], whole[1, 2])
    assert torch.allclose(began, torch.tensor([1.0, 0.8, 0.4])) and torch.equal(xt[2], whole[2, 3])


def test_grpos_ratio_is_1_at_first_and_its_gradient_that_of_the_policy():
    path = noisy_path(gaussian_flow(0.5), noise(6, 4, 2), schedule(10), 0.7)
    xt, target, t = path_step(path, torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.15]))
    old = torch.cat([gaussian_flow(0.5)(row, at) for row, at in zip(xt.split(1), t)])
    A = torch.tensor([[1.0, -1, 0.5, -2, 1, 0.3]]).T
    loss, parts = grpo_loss(old, old, xt, target, t, A, HOW)
    assert parts["ratio"] == 1 and parts["kl"] == 0 and loss.item() == pytest.approx(-A.mean().item(), rel=1e-6)
    by_hand = old.clone().requires_grad_()
    mean, deviation = noisy_step(by_hand, xt, t[:, None, None], t[:, None, None] - 0.1, 0.7)
    density = torch.distributions.Normal(mean, deviation.expand_as(mean)).log_prob(target).mean((1, 2))
    wanted, = torch.autograd.grad(-(A[:, 0] * density).mean(), by_hand)         # REINFORCE
    assert torch.allclose(gradient("grpo", old, old, xt, target, t, A), wanted, atol=1e-6)
    after = old - 3 * wanted
    assert grpo_loss(after, old, xt, target, t, A, HOW)[1]["gained"] > 0
    tight = HOW._replace(clip_range=1e-6)
    assert not gradient("grpo", after, old, xt, target, t, A, tight).any()      # clipped: what has gained rests
    back = gradient("grpo", old + 3 * wanted, old, xt, target, t, A, tight)     # what has lost is pulled as before
    assert (back.flatten(1).abs().amax(1) > 0).all()
    assert not gradient("grpo", old, old, xt, target, t, 0 * A).any()
    kl = gradient("grpo", old + 0.1, old, xt, target, t, 0 * A, HOW._replace(kl_weight=1.0))
    assert (kl > 0).all()                                                       # downhill is back to old


# ----------------------------------------------------------------------------- wiring

def test_groups_hold_all_clips_of_prompts_that_differ():
    scored = [{"prompt": f"p{i // 3}", "duration": 1.0, "reward": value}
              for i, value in enumerate([1, 2, 4, 5, 5, 5, 0, float("nan"), 1, 3, 2, 1.0])]
    latents = torch.arange(12.0)[:, None, None].expand(12, 2, 1)
    rows, data = groups_of(scored, latents, 3, 3)
    assert [row["prompt"] for row in rows] == ["p0", "p3"]
    assert data["clips"][:, :, 0, 0].tolist() == [[0, 1, 2], [9, 10, 11]]
    assert data["advantage"].sum(1).abs().max() < 1e-6 and data["advantage"].argmax(1).tolist() == [2, 0]
    alone, single = groups_of(scored, latents, 3, 1)
    assert len(alone) == 6 and single["clips"].shape == (6, 1, 2, 1)
    assert torch.equal(single["advantage"].flatten(), data["advantage"].flatten())


@pytest.mark.parametrize("loss", ["nft", "dgpo", "awm", "grpo"])
def test_every_loss_runs_resumes_and_learns_from_all_clips(claps, tmp_path, loss):      # noqa: F811
    more = {"loss": loss, "kl_weight": 0.01, "iterations": 1, "epochs": 1, "steps": 3, "learning_rate": 1e-3}
    numbers = run(claps, tmp_path / "a", **more)
    assert "iteration 1" in numbers and not (tmp_path / "a" / "iteration_1" / "pairs.jsonl").exists()
    folder = tmp_path / "a" / "iteration_1"
    latents = load_tensors(folder / "candidates.safetensors")["latents"]
    assert latents.shape[:-2] == ((12, 4) if loss == "grpo" else (12,))
    first = read_jsonl(folder / "log.jsonl")[0]
    assert np.isfinite(list(first.values())).all() and first["drift"] < 1e-12      # the policy is the reference
    assert read_json(folder / "report.json")["pairs"] == (4 if loss == "dgpo" else 12)
    assert read_json(folder / "report.json")["drift"] > 0
    (folder / "report.json").unlink()
    (folder / "heard.safetensors").unlink()
    run(claps, tmp_path / "a", **more)                                          # what is there is kept
    assert "drift" in read_json(folder / "report.json")


@pytest.mark.parametrize("loss", GROUPED)
def test_a_preference_is_learned_from_all_clips(tmp_path, loss):
    """Good clips on one side of zero, bad ones on the other, as test_crpo.py's winners and losers."""
    rows, pairs = opposite_sides(0)
    clips = torch.stack([pairs["winner_mean"], pairs["loser_mean"]], 1)         # (P, 2, L, C)
    tensors = {"clips": clips, "advantage": torch.tensor([1.0, -1]).expand(8, 2)}
    if loss != "dgpo":                                                          # a clip in a row
        tensors = {"clips": clips.flatten(0, 1)[:, None], "advantage": tensors["advantage"].reshape(16, 1)}
        rows = [row for row in rows for _ in range(2)]
    how = settings(loss=loss, learning_rate=4e-3, epochs=12, beta=20.0)
    report = crpo.optimise(tmp_path, MODEL, rows, tensors, *how, 0, "report", CPU)
    assert report["accuracy"] >= 0.95 and report["winner"] < report["reference_winner"], report
    assert report["loser"] > report["reference_loser"]


def test_each_row_keeps_its_own_prompt_seconds_clips_and_advantages():
    number = torch.arange(5.0)
    both = torch.stack([number, number + 0.5], 1)
    data = rows_of(both[:, :, None, None].expand(5, 2, 4, 2), hidden=number[:, None, None].expand(5, 3, 8), duration=number,
                   advantage=both)
    batch, A = crpo.draw_rows(data, range(3, 7), settings()[0], 0, CPU)
    own = batch.x1[:4, 0, 0]
    assert len(set(own.tolist())) > 2 and torch.equal(batch.x1[4:, 0, 0], own + 0.5)
    assert torch.equal(A, torch.stack([own, own + 0.5], 1))
    for each in (batch.hidden[:, 0, 0], batch.duration):
        assert torch.equal(each, own.repeat(2))


def test_the_policy_of_grpo_is_the_one_that_made_the_paths(claps, tmp_path, monkeypatch):       # noqa: F811
    """Under the prompt, without guidance: what a step added to its mean is standard noise."""
    seen, original = [], losses.LOSSES["grpo"][0]

    def spy(velocity, old, xt, target, t, A, how):
        t = t[:, None, None]
        mean, deviation = noisy_step(old, xt, t, t - 1 / how.steps, how.sde_noise)
        seen.append(((target - mean) / deviation).flatten())
        return original(velocity, old, xt, target, t[:, 0, 0], A, how)
    monkeypatch.setitem(losses.LOSSES, "grpo", (spy, "clips"))
    run(claps, tmp_path / "a", loss="grpo", iterations=1, epochs=2, steps=4, guidance_scale=3.0)
    noises = torch.cat(seen)
    assert abs(noises.mean()) < 0.05 and abs(noises.std() - 1) < 0.03


def test_pair_loss_has_dpo_alone_and_holds_the_loser_back():
    old, xt, target, t, A = inputs(rows=6, count=2)
    how = HOW._replace(loss="crpo", safeguard=None)
    values = [losses.pair_loss(old, old, xt, target, t, A, how._replace(loss=name))[0].item() for name in ("crpo", "dpo")]
    winner = losses.errors(old, target)[:6].mean().item()
    assert values[1] == pytest.approx(np.log(2), rel=1e-6) and values[0] == pytest.approx(np.log(2) + winner, rel=1e-6)
    free, held = (gradient("dpo", old, old, xt, target, t, A, how._replace(safeguard=mu)) for mu in (None, 0.9))
    assert torch.equal(free[:6], held[:6]) and held[6:].norm() < free[6:].norm()        # losers alone
    plain, kl = (losses.pair_loss(old + 0.1, old, xt, target, t, A, how._replace(kl_weight=weight)) for weight in (0, 0.4))
    assert (kl[0] - plain[0]).item() == pytest.approx(0.4 * 50 * 0.01, rel=1e-3) and kl[1]["drift"] == pytest.approx(0.01)
    tenth = how._replace(kl_weight=0.4, reduction="sum", beta=how.beta / 10)            # L C = 10; L_FM stays a mean
    assert losses.pair_loss(old + 0.1, old, xt, target, t, A, tenth)[0].item() == pytest.approx(kl[0].item(), rel=1e-5)


def test_defaults_follow_from_the_loss_and_the_size(capsys):
    none = settings()[0]._replace(kl_weight=None)
    kinds = {name: losses.with_defaults(none._replace(loss=name), 64, 48) for name in losses.LOSSES}
    assert [round(kinds[name].beta) for name in ("crpo", "dpo")] == [20, 149] and round(kinds["dgpo"].beta, 1) == 4.7
    assert [kinds[name].kl_weight for name in ("crpo", "dpo", "dgpo", "awm", "grpo")] == [0.4, 0, 1, 1, 0.04]
    assert kinds["grpo"].dropout == 0 and kinds["grpo"].t_distribution == "uniform" and kinds["nft"].dropout == 0.1
    assert losses.with_defaults(none._replace(reduction="sum"), 64, 48).beta == losses.BETAS["crpo"]
    assert losses.with_defaults(none._replace(beta=7.0), 64, 48).beta == 7 and "0.00326 per squared error, summed over 64 x 48 (official: 0.0242)" in capsys.readouterr().out


def test_losses_refuse_what_they_cannot_learn_from(claps, tmp_path):                    # noqa: F811
    for more, what in (({"loss": "nft", "pairs": "x.json"}, "--pairs has no clips to shuffle or to group"),
                       ({"shuffle": True, "pairs": "x.json"}, "--pairs has no clips to shuffle"),
                       ({"loss": "grpo", "offline": True}, "--loss grpo needs new paths in each iteration"),
                       ({"loss": "grpo", "steps": 1}, "of 2 steps or more")):
        refused(what, run, claps, tmp_path / "x", **more)


def test_a_reward_of_a_file(claps, tmp_path):                                           # noqa: F811
    code = "import torch\ndef dark(audios, rate, prompts):\n    return [-float(a.diff().abs().mean()) for a in audios]\n"
    (tmp_path / "mine.py").write_text(code)
    mine = str(tmp_path / "mine.py")
    run(claps, tmp_path / "a", reward=f"{mine}:dark", iterations=1, epochs=1)
    scored = read_jsonl(tmp_path / "a" / "iteration_1" / "scores.jsonl")
    assert all(row["reward"] < 0 for row in scored)
    refused("must define none", run, claps, tmp_path / "none", reward=f"{mine}:none", iterations=1)
    (tmp_path / "mine.py").write_text(code + "\n")
    refused("was started with other files at --reward", run, claps, tmp_path / "a", reward=f"{mine}:dark", iterations=1, epochs=1)
