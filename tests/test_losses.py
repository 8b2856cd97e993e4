"""Losses that learn from preferences: closed forms, what each gradient is, what does not matter."""
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import noise
from test_crpo import CPU, MODEL, claps, run, settings  # noqa: F401

import crpo
from crpo import interpolate
from lib import losses
from lib.common import generator, read_json, read_jsonl
from lib.losses import advantages, grpo_loss, noisy_path, noisy_step, path_step, safeguarded
from lib.weights import load_tensors
from reward import groups_of
from sample import schedule

How = namedtuple("How", "loss beta half reduction fm_weight safeguard slope mirror pull sde_noise clip_range steps")
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
    return torch.autograd.grad(losses.LOSSES[name](velocity, old, xt, target, t, A, how)[0], velocity)[0]


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
    pulled = gradient(name, moved, old, xt, target, t, 0 * A, HOW._replace(pull=0.5))
    if name == "nft":           # at r = 1/2 the images' own terms pull as well, to old
        assert not gradient(name, old, old, xt, target, t, 0 * A).any()
    else:
        assert torch.allclose(pulled, (moved - old) / size / len(old), atol=1e-6)       # A = 0: the pull alone


@pytest.mark.parametrize("name", GROUPED)
def test_the_order_of_clips_and_the_scale_of_rewards_do_not_matter(name):
    old, xt, target, t, _ = inputs()
    rewards, velocity = noise(3, 4), old + 0.1 * noise(*old.shape)
    value = losses.LOSSES[name](velocity, old, xt, target, t, advantages(rewards), HOW)[0]
    other = losses.LOSSES[name](velocity, old, xt, target, t, advantages(3 * rewards + 7), HOW)[0]
    assert torch.allclose(value, other, atol=1e-5)
    place = torch.arange(12).view(4, 3)                                         # clip k of row b: 3 k + b
    order = place[[2, 0, 3, 1]].flatten()
    again = [each[order] for each in (velocity, old, xt, target, t)]
    same = losses.LOSSES[name](*again, advantages(rewards[:, [2, 0, 3, 1]]), HOW)[0]
    assert torch.allclose(value, same, atol=1e-6)


def test_a_step_down_lowers_good_clips_errors_and_raises_bad_ones():
    old, xt, target, t, A = inputs()
    for name in GROUPED:
        after = old - 20 * gradient(name, old, old, xt, target, t, A)
        change = losses.errors(after, target) - losses.errors(old, target)
        assert (change * A.T.flatten() < 0).all(), name
        _, parts = losses.LOSSES[name](after, old, xt, target, t, A, HOW)
        assert parts["accuracy"] == 1 and parts["winner"] < parts["reference_winner"]
        assert parts["loser"] > parts["reference_loser"] and parts["drift"] > 0


def test_nft_with_a_small_b_is_a_weighted_regression():
    """r e+ + (1 - r) e-, divided by b, loses all but (2 r - 1) times the slope of the error."""
    old, xt, target, t, A = inputs()
    moved, b = old + 0.3 * noise(*old.shape), 1e-3
    r = (0.5 + 0.8 * A.T.flatten()).clamp(0, 1)[:, None, None]
    scale = (old - target).abs().mean((1, 2), keepdim=True)
    slope = (2 * r - 1) * 2 * t[:, None, None] * (old - target) / scale / old[0].numel() / len(old)
    assert torch.allclose(gradient("nft", moved, old, xt, target, t, A, HOW._replace(mirror=b)) / b, slope, atol=2e-4)
    best = gradient("nft", target, old, xt, target, t, 9 + 0 * A)               # r = 1: the data is a fixed point
    assert best.abs().max() < 1e-3                                              # but for rounding


def test_dgpo_rests_when_the_preference_is_learned():
    old, xt, target, t, A = inputs()
    flat = A.T.flatten()[:, None, None]
    learned = target + (old - target) * (1 - 0.4 * flat)                        # better where A > 0
    first, last = (gradient("dgpo", each, old, xt, target, t, A, HOW._replace(beta=1e3)).norm() for each in (old, learned))
    assert last < 1e-3 * first


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
        beta = crpo.OFFICIAL_BETA * length * 4
        errors = torch.tensor([[3.0, 5.0, 3.5, 4.5]]).T / (length * 4)          # sums over L x C: 3, 5, ...
        found.append(losses.dpo_fm_loss(*errors, beta=beta)[0].item())
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert crpo.OFFICIAL_BETA * 645 * 64 == pytest.approx(2000) and round(crpo.OFFICIAL_BETA * 64 * 48) == 149


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
    t = torch.tensor([0.999, 0.61, 0.05])
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
    far = gradient("grpo", old - 1000 * wanted, old, xt, target, t, A)          # clipped: what is rewarded rests
    assert far.abs().sum() < wanted.abs().sum()
    assert not gradient("grpo", old, old, xt, target, t, 0 * A).any()


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
    more = {"loss": loss, "pull": 0.01, "iterations": 1, "epochs": 1, "steps": 3, "learning_rate": 1e-3}
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
