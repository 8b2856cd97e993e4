"""Losses that learn from preferences: pure functions, side by side, behind `crpo.py --loss`.

  crpo  the paper's Eq. 3, of pairs of clips of a prompt: L_DPO-FM (Eq. 2) + the winners' L_FM
  dpo   L_DPO-FM alone
  nft   DiffusionNFT (arXiv 2509.16117), of all N clips of a prompt, as all below: good ones pull
        the policy, bad ones its mirror image (there sampled at guidance 1, here at any scale)
  dgpo  direct group preference (arXiv 2510.08425): A-weighted errors, weaker as the preference of
        the group is learned
  awm   advantage-weighted matching (arXiv 2509.25050): A-weighted errors, held by `kl_weight` alone
  grpo  the policy gradient of noisy steps, sampled at guidance 1 (A.11; Flow-GRPO, 2505.05470)

Each takes, for rows of K clips of a prompt (K B clips: first clip 0 of all rows, then clip 1, ...),

    velocity, old   (K B, L, C)  of the policy, and of the reference: frozen, as the iteration began
    xt, target      (K B, L, C)  x_t = (1-t) x_1 + t x_0 and v = x_0 - x_1, float32
    t               (K B,)
    A               (B, K)       `advantages`; not used by pairs, whose clip 0 is the winner
    settings                     by the names of crpo.py's flags

and returns the loss, a mean over the clips, and {diagnostic: float}. E is a clip's mean squared
velocity error; kl_weight weighs a mean of |v - old|^2, the KL to the reference but for a factor.
B rows, K and N clips of a prompt, M prompts, L latent frames, C latent channels.
"""
from itertools import pairwise

import torch
import torch.nn.functional as F

from lib.common import generator


def errors(velocity, target):
    """E (B,): a mean over (L, C), in float32 (paper Eq. 5)."""
    return (velocity.float() - target.float()).square().mean((1, 2))


def means(values):
    """{name: tensor of any shape} -> {name: its mean, a float}."""
    return {name: value.detach().float().mean().item() for name, value in values.items()}


# ----------------------------------------------------------------------------- pairs: CRPO

def dpo_fm_loss(winner, loser, reference_winner, reference_loser, beta=2000.0, half=0.5):
    """L_DPO-FM (Eq. 2) of four errors per pair (B,) -> (loss, {"accuracy", "margin", ...: float}).

    half = 0.5 as the official code, 1 as Eq. 2. At policy = reference the loss is log 2."""
    logits = -half * beta * ((winner - loser) - (reference_winner - reference_loser))   # (B,)
    loss = -F.logsigmoid(logits).mean()
    parts = {"accuracy": logits > 0, "margin": logits, "dpo": loss,
             "winner": winner, "loser": loser,
             "reference_winner": reference_winner, "reference_loser": reference_loser}
    return loss, means(parts)


def crpo_loss(winner, loser, reference_winner, reference_loser, beta=2000.0, half=0.5,
              fm_weight=1.0):
    """L_CRPO = L_DPO-FM + L_FM (Eq. 3), the winners' mean error (Eq. 5); paper: fm_weight 1."""
    loss, parts = dpo_fm_loss(winner, loser, reference_winner, reference_loser, beta, half)
    return loss + fm_weight * winner.mean(), parts


def safeguarded(loser, winner_miss, loser_miss, mu=0.9):
    """The losers' errors (B,), their gradient held back (Diffusion-SDPO, arXiv 2511.03317).

    winner_miss, loser_miss (B, L, C): v - target, proportional to the gradients g_w, g_l of the
    errors by the output. If both acted on one output, a step along g_w - s g_l would lower the
    winner's error by |g_w|^2 - s g_l.g_w, to first order: with this s by mu |g_w|^2 at least. That
    shared weights do the same is the paper's approximation."""
    dot = (winner_miss * loser_miss).flatten(1).sum(1)                          # (B,)
    square = winner_miss.square().flatten(1).sum(1)                             # (B,)
    scale = torch.where(dot > 0, ((1 - mu) * square / dot).clamp(0, 1), 1.0).detach()
    return scale * loser + (1 - scale) * loser.detach()


def pair_loss(velocity, old, xt, target, t, A, settings):
    """L_CRPO of pairs, clip 0 the winner; --loss dpo: L_DPO-FM alone.

    The preference sees a difference, so that both errors could rise; the KL (ours) has its unit."""
    winner, loser = errors(velocity, target).chunk(2)                           # (B,) each
    reference = errors(old, target).chunk(2)
    if settings.safeguard is not None:
        winner_miss, loser_miss = (velocity.float() - target).chunk(2)          # (B, L, C) each
        loser = safeguarded(loser, winner_miss, loser_miss, settings.safeguard)
    beta = settings.beta
    if settings.reduction == "sum":                                             # Eq. 2
        beta = beta * target[0].numel()
    fm_weight = 0.0 if settings.loss == "dpo" else settings.fm_weight
    loss, parts = crpo_loss(winner, loser, *reference, beta, settings.half, fm_weight)
    drift = errors(velocity, old).mean()
    kl = settings.kl_weight * settings.half * beta * drift
    return loss + kl, {**parts, "drift": drift.item()}


# ----------------------------------------------------------------------------- all N clips

def advantages(rewards, cut=2.0):
    """Rewards (M, N) -> A (M, N): distances from the mean of their prompt, in its deviations.

    At most `cut`: then a prompt's A do not sum to 0 exactly, as DGPO's proof has them."""
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()                   # (M, 1)
    return (centred / deviation).clamp(-cut, cut)


def diagnostics(velocity, old, target, A):
    """How errors moved, names as of pairs; A (K B,): "winner" is weighted by A, "loser" by -A."""
    now = errors(velocity, target)
    before = errors(old, target)
    good = A.clamp(min=0)
    bad = (-A).clamp(min=0)
    return means({"accuracy": (before - now) * A > 0,
                  "drift": errors(velocity, old),
                  "winner": good * now,
                  "loser": bad * now,
                  "reference_winner": good * before,
                  "reference_loser": bad * before})


def image_error(velocity, target, t):
    """Mean of (x - x_1)^2 over the mean of |x - x_1|, detached (B,); x = x_t - t v is the data that
    a velocity points to."""
    miss = t[:, None, None] * (velocity - target)                               # x_1 - x
    size = miss.detach().abs().mean((1, 2)).clamp(min=1e-5)                     # (B,)
    return miss.square().mean((1, 2)) / size


def nft_loss(velocity, old, xt, target, t, A, settings):
    """r e(v+) + (1 - r) e(v-) with v+- = old +- b (v - old) and e the `image_error`.

    r = 1/2 + slope A, between 0 and 1, is how good a clip is (official: slope 0.1, and both terms
    times 5 / b, which weighs the KL less)."""
    A = A.T.flatten()                                                           # (K B,)
    r = (0.5 + settings.advantage_slope * A).clamp(0, 1)
    old = old.float()
    change = settings.nft_beta * (velocity.float() - old)                       # b (v - old)
    positive = image_error(old + change, target, t)                             # (K B,)
    negative = image_error(old - change, target, t)
    kl = settings.kl_weight * errors(velocity, old)
    loss = r * positive + (1 - r) * negative + kl
    return loss.mean(), diagnostics(velocity, old, target, A)


def dgpo_loss(velocity, old, xt, target, t, A, settings):
    """s A E with s = sigmoid(mean of beta A (E - E_old) over the group of a prompt), detached.

    s is 1/2 at first; it goes to 0 as good clips' errors fall and bad ones' rise."""
    count = A.shape[1]
    E = errors(velocity, target).view(count, -1).T                              # (B, K)
    E_old = errors(old, target).view(count, -1).T
    gained = settings.beta * A * (E - E_old)
    s = gained.mean(1, keepdim=True).sigmoid().detach()                         # (B, 1)
    kl = settings.kl_weight * errors(velocity, old).mean()
    loss = (s * A * E).mean() + kl
    return loss, diagnostics(velocity, old, target, A.T.flatten())


def awm_loss(velocity, old, xt, target, t, A, settings):
    """A E, an error in the place of a negative log-likelihood; without a KL it has no bound."""
    A = A.T.flatten()                                                           # (K B,)
    kl = settings.kl_weight * errors(velocity, old)
    loss = A * errors(velocity, target) + kl
    return loss.mean(), diagnostics(velocity, old, target, A)


# ----------------------------------------------------------------------------- GRPO

def noisy_step(velocity, x, t, t_next, noise):
    """Mean (B, L, C) and deviation of a step of the SDE that has the flow's marginals.

    The score of p_t is -x0_hat / t, where x0_hat = x + (1 - t) v is the noise that v expects in x.
    Of all SDEs dx = (v - sigma^2 score / 2) dt + sigma dw backwards in t have p_t at every t (the
    Fokker-Planck equation); sigma = noise sqrt(t / (1 - t)) is Flow-GRPO's. At t = 1, where it has
    no bound, t_next stands for t in it; the last step, to t = 0, has no noise."""
    t, t_next = torch.as_tensor(t), torch.as_tensor(t_next)
    inner = torch.where(t >= 1, t_next, t)
    sigma = noise * (t / (1 - inner)).sqrt() * (t_next > 0)                     # as t
    x0_hat = x + (1 - t) * velocity                                             # (B, L, C)
    mean = x + (t_next - t) * (velocity + sigma ** 2 / (2 * t) * x0_hat)
    return mean, sigma * (t - t_next).sqrt()


def noisy_path(velocity_fn, x, ts, noise):
    """A solver, as sample.euler: all states (B, steps + 1, L, C) from t = 1 to 0.

    A row's noise follows from its start, hence from (seed, i), whatever the batch."""
    rngs = [generator("path", row.cpu().numpy().tobytes().hex()) for row in x]
    path = [x]
    for t, t_next in pairwise(ts):
        mean, deviation = noisy_step(velocity_fn(x, t), x, t, t_next, noise)
        draws = [torch.randn(x.shape[1:], generator=rng) for rng in rngs]
        fresh = torch.stack(draws)                                              # (B, L, C)
        x = mean + deviation * fresh.to(x)
        path.append(x)
    return torch.stack(path, 1)


def path_step(path, t):
    """A noisy step of paths (B, steps + 1, L, C), drawn by t (B,), uniform in (0, 1) -> x_t, the
    next state, and the t at which it began."""
    steps = path.shape[1] - 1
    step = ((1 - t) * (steps - 1)).long().clamp(max=steps - 2)  # the last has no noise
    rows = torch.arange(len(path), device=path.device)
    return path[rows, step], path[rows, step + 1], 1 - step / steps


def grpo_loss(velocity, old, xt, target, t, A, settings):
    """-min(ratio A, clipped ratio A) + kl_weight KL of a noisy step xt -> target of `old`.

    ratio = p(target | xt) / p_old(target | xt), Gaussians of `noisy_step`; log-probabilities and
    KL are means over (L, C), as Flow-GRPO's, so that `clip_range` does not depend on the size."""
    A = A.T.flatten()                                                           # (B,)
    t = t[:, None, None]                                                        # (B, 1, 1)
    next_t = t - 1 / settings.steps
    mean, deviation = noisy_step(velocity.float(), xt, t, next_t, settings.sde_noise)
    old_mean, _ = noisy_step(old.float(), xt, t, next_t, settings.sde_noise)
    variance = 2 * deviation ** 2                                               # (B, 1, 1)

    change = (target - old_mean).square() - (target - mean).square()            # (B, L, C)
    ratio = (change / variance).mean((1, 2)).exp()                              # (B,)
    clipped = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
    kl = ((mean - old_mean).square() / variance).mean((1, 2))                   # (B,)
    gained = torch.minimum(ratio * A, clipped * A)
    loss = (settings.kl_weight * kl - gained).mean()
    return loss, means({"accuracy": (ratio - 1) * A > 0, "ratio": ratio, "kl": kl,
                        "clipped": ratio != clipped, "gained": gained - A,
                        "drift": errors(velocity, old)})


# ----------------------------------------------------------------------------- settings

OFFICIAL_BETA = 2000 / (645 * 64)       # of squared errors summed over (L, C), as BETAS
BETAS = {"crpo": 20 / (64 * 48), "dgpo": 100 / (16 * 64 * 64)}  # dgpo: its code
KL_WEIGHTS = {"crpo": 0.4, "dgpo": 1.0, "awm": 1.0, "grpo": 0.04}  # see docs/log.md


def with_defaults(settings, length, channels):
    """Settings with those that depend on the loss and on the size L x C of the latents.

    beta: as strong per summed squared error at any size (official: dpo, dgpo). grpo: steps are
    drawn uniformly, and under the text that made them: the ratio is to the policy that did."""
    name = settings.loss
    size = length * channels
    if settings.kl_weight is None:
        settings = settings._replace(kl_weight=KL_WEIGHTS.get(name, 0.0))
    if name == "grpo":
        settings = settings._replace(dropout=0.0, score_dropout=0.0, t_distribution="uniform")
    if settings.reduction == "sum":
        size = 1
    if settings.beta is None:
        settings = settings._replace(beta=BETAS.get(name, OFFICIAL_BETA) * size)
    if LOSSES[name][1] == "pairs":
        print(f"beta {settings.beta:.6g}: {settings.half * settings.beta / size:.3g} per squared "
              f"error, summed over {length} x {channels} (official: {OFFICIAL_BETA / 2:.3g})")
    return settings


# each loss and its rows: "pairs" (winner, loser), single "clips", or "groups" of a prompt's N. One of
# your own: an entry here, and in KL_WEIGHTS if it has a KL. crpo.py's alarms read its "accuracy"
LOSSES = {"crpo": (pair_loss, "pairs"), "dpo": (pair_loss, "pairs"), "nft": (nft_loss, "clips"),
          "awm": (awm_loss, "clips"), "grpo": (grpo_loss, "clips"), "dgpo": (dgpo_loss, "groups")}
