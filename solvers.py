"""From noise to latents: the schedule, Euler and Heun, guidance, and the noise itself (paper 2.4, A.6, A.7).

    ts = schedule(25)
    latents = euler(guided_velocity(flow, condition, null, 4.5, ts=ts), noise, ts)

x_t = (1-t) x_1 + t x_0 with x_0 noise and x_1 data (Eq. 4); the network gives v = dx/dt = x_0 - x_1, so
that sampling runs from t = 1 down to 0 and every step is negative. Letters: B batch, L latent frames, C latent
channels.
"""
import numpy as np
import torch

from common import generator
from model import concat_conditions, null_score

AHEAD = 2 ** 26             # numbers of modulations held for steps to come: 0.1 to 0.3 GB


def schedule(steps):
    """Times 1 = t_0 > ... > t_N = 0 of N steps, (N + 1,) float32: linspace(1, 1/N, N), then 0 (official code)."""
    return torch.from_numpy(np.append(np.linspace(1.0, 1.0 / steps, steps), 0.0).astype(np.float32))


def euler(velocity_fn, x, ts):
    """Integrate dx/dt = velocity_fn(x, t) along `ts`: x <- x + (t_next - t) v (paper 2.4), one evaluation a step."""
    for t, t_next in zip(ts[:-1], ts[1:]):
        x = x + (t_next - t) * velocity_fn(x, t)                                   # (B, L, C)
    return x


def heun(velocity_fn, x, ts):
    """Heun's trapezium rule (paper A.7): two evaluations a step, so N steps cost as much as 2N of Euler.

    The last step is a full one as well: the velocity of a rectified flow is finite at t = 0 (unlike the
    slope of diffusion ODEs, whose samplers end on an Euler step).
    """
    for t, t_next in zip(ts[:-1], ts[1:]):
        slope = velocity_fn(x, t)                                                  # (B, L, C)
        slope_next = velocity_fn(x + (t_next - t) * slope, t_next)                 # (B, L, C)
        x = x + (t_next - t) * 0.5 * (slope + slope_next)
    return x


SOLVERS = {"euler": euler, "heun": heun}
EVALUATIONS = {"euler": 1, "heun": 2}  # network calls a step; guidance makes each of them twice as wide


def guide(cond, uncond, guidance_scale):
    """Classifier-free guidance (paper A.6): uncond + w (cond - uncond); w = 1 is cond, w = 0 is uncond."""
    return uncond + guidance_scale * (cond - uncond)


def guide_two(both, text, neither, guidance_scale, score_scale):
    """Text and score guided apart: neither + w (text - neither) + w_s (both - text). w = w_s is Eq. 2.

    Equation 2 of the second paper has one w for both together; this is our extension (after Brooks et al. 2023).
    """
    return neither + guidance_scale * (text - neither) + score_scale * (both - text)


def prepared_velocity(flow, condition, ts=None):
    """velocity(x (B, L, C), t scalar) of a condition's rows, in x's own precision.

    What does not depend on x (text, rotations, and the modulations of every block) is computed for many of the times
    `ts` at once: as many as AHEAD numbers hold. None: for each time when it comes.
    """
    dtype, ready = next(flow.parameters()).dtype, {}
    config, rows = flow.config, len(condition.text)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    numbers = rows * width * (12 * config["num_layers"] + 3 * config["num_single_layers"] + 2)     # of one time
    times = [] if ts is None else ts.tolist()

    def velocity(x, t):
        key = t.item()
        if key not in ready:
            first = times.index(key) if key in times else None
            some = t[None] if first is None else ts[first:first + max(1, AHEAD // numbers)]
            ready.clear()
            ready.update(zip(some.tolist(), flow.prepare(some.to(condition.text.device), condition, x.shape[1])))
        return flow.transformer.run(x.to(dtype), ready[key]).to(x.dtype)           # (B, L, C)
    return velocity


def guided_velocity(flow, condition, null, guidance_scale, score_scale=None, ts=None):
    """velocity_fn(x (B, L, C), t scalar) for the solvers, in x's own precision; `ts`: the times to come, if known.

    Both branches are one batch [uncond; cond], in the official order; without `null` (None) there is the
    conditional one alone. A condition with a score is guided jointly (second paper, Eq. 2: the null has neither text
    nor score), or with `score_scale` in three branches [uncond; text alone; text and score].
    """
    if null is None:
        return prepared_velocity(flow, condition, ts)
    if score_scale is not None and condition.score is not None:
        text_alone = condition._replace(score=null_score(condition.score))
        three = concat_conditions(concat_conditions(null, text_alone), condition)              # 3B rows
        three_branches = prepared_velocity(flow, three, ts)

        def velocity_fn(x, t):
            neither, text, both = three_branches(torch.cat([x, x, x]), t).chunk(3)             # (B, L, C) each
            return guide_two(both, text, neither, guidance_scale, score_scale)
        return velocity_fn
    two_branches = prepared_velocity(flow, concat_conditions(null, condition), ts)             # 2B rows

    def velocity_fn(x, t):
        uncond, cond = two_branches(torch.cat([x, x]), t).chunk(2)                             # (B, L, C) each
        return guide(cond, uncond, guidance_scale)
    return velocity_fn


def noise_for(seed, indices, shape):
    """Noise of the samples `indices`, (B, *shape) float32 on the CPU: row i depends on (seed, i) alone."""
    return torch.stack([torch.randn(shape, generator=generator(seed, index)) for index in indices])


def official_noise(seed, counts, shape):
    """The noise of the official sampler: torch's generator seeded anew for each prompt, whose samples are one draw.

    counts: samples of each prompt in a row -> (sum of counts, *shape) float32.
    """
    return torch.cat([torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)) for count in counts])
