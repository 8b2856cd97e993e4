"""Weight averages of any width, also after training (Karras et al. 2024, "EDM2", section 3 and appendix C).

    python averages.py --run runs/score --sigma_rel 0.08 --out runs/score_0.08     # a width that was not tracked

An exponential average forgets at a fixed rate, so that its best decay depends on the length of a run. A power-function
average weighs step tau of t by tau^gamma: its width is a share of the run, sigma_rel. train_fm.py --sigma_rel tracks a
few of them (the second paper: 0.05 and 0.1) and stores them every --snapshot_every steps. Any other profile is then
the linear combination of what is stored that is nearest to it.
"""
import argparse
import re
from pathlib import Path

import numpy as np
import torch

from common import UserError, in_range, load_tensors, parse_arguments, run_main, save_tensors

WIDEST = 0.2886         # sigma_rel of gamma = 0, the plain mean, is 12^-0.5


def gamma_of(sigma_rel):
    """Exponent gamma of the power function whose standard deviation is sigma_rel of the run: EDM2 Eq. 126, its root.

    sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). Raises UserError outside of (0, 0.2886].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise UserError(f"--sigma_rel {sigma_rel:g} must be above 0 and at most {WIDEST}, the plain mean of all steps")
    inverse = sigma_rel ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * max(1, abs(root.real))))


def power_decay(step, gamma):
    """beta of step 1, 2, ...: (1 - 1/t)^(gamma + 1) (EDM2 Eq. 127), so that the first step is taken whole."""
    return (1 - 1 / step) ** (gamma + 1)


def overlap(t_a, gamma_a, t_b, gamma_b):
    """Inner product of two profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]; arrays broadcast.

    The integral up to the smaller t of both: (g_a + 1)(g_b + 1) / (g_a + g_b + 1) t_min^(g_a + g_b + 1) over
    t_a^(g_a + 1) t_b^(g_b + 1), in logarithms, for gamma is large for narrow averages.
    """
    t_a, gamma_a, t_b, gamma_b = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (t_a, gamma_a, t_b, gamma_b)))
    total = gamma_a + gamma_b + 1
    power = total * np.log(np.minimum(t_a, t_b)) - (gamma_a + 1) * np.log(t_a) - (gamma_b + 1) * np.log(t_b)
    return (gamma_a + 1) * (gamma_b + 1) / total * np.exp(power)


def combination(steps, gammas, step, gamma):
    """Weights (K,) of K stored averages whose profile is nearest to that of (step, gamma): least squares, EDM2 C.3."""
    steps, gammas = (np.asarray(x, np.float64) for x in (steps, gammas))
    gram = overlap(steps[:, None], gammas[:, None], steps, gammas)                     # (K, K)
    wanted = overlap(steps, gammas, step, gamma)                                       # (K,)
    return np.linalg.lstsq(gram, wanted, rcond=None)[0]


@torch.no_grad()
def update(averages, named, step):
    """One training step (1, 2, ...) into {sigma_rel: {name: tensor}}, in place."""
    for sigma_rel, average in averages.items():
        beta = power_decay(step, gamma_of(float(sigma_rel)))
        torch._foreach_lerp_([average[name] for name in named], [p.detach() for p in named.values()], 1 - beta)


# ----------------------------------------------------------------------------- on disk

def store(out, averages, step):
    """averages/SIGMA_STEP.safetensors of each width, in float32."""
    for sigma_rel, average in averages.items():
        save_tensors(Path(out) / "averages" / f"{sigma_rel}_{step:09d}.safetensors", average)


def stored(out):
    """[(path, sigma_rel, step)] of a run. Raises UserError if there are none."""
    found = []
    for path in sorted((Path(out) / "averages").glob("*.safetensors")):
        match = re.fullmatch(r"([\d.]+)_(\d+)", path.stem)
        if match:
            found.append((path, float(match[1]), int(match[2])))
    if not found:
        raise UserError(f"{out} has no stored averages; python train_fm.py --sigma_rel 0.05 0.1 stores them")
    return found


def synthesise(out, sigma_rel, step=None):
    """The average of width `sigma_rel` after `step` steps (default: all) from what is stored -> {name: tensor}."""
    gamma, found = gamma_of(sigma_rel), stored(out)
    step = step or max(at for _, _, at in found)
    found = [(path, gamma_of(width), at) for path, width, at in found if at <= step]
    if not found:
        raise UserError(f"--step {step}: nothing was stored so early")
    weights = combination([at for _, _, at in found], [g for _, g, _ in found], step, gamma)
    total = {}
    for weight, (path, _, _) in zip(weights, found):
        for name, tensor in load_tensors(path).items():
            part = tensor.double() * weight
            total[name] = part if name not in total else total[name].add_(part)
    return {name: tensor.float() for name, tensor in total.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of train_fm.py --sigma_rel")
    parser.add_argument("--sigma_rel", type=float, required=True, help="width wanted, a share of the run (paper: 0.05 "
                        "and 0.1)")
    parser.add_argument("--step", type=int, help="average as it was after so many steps (default: all)")
    parser.add_argument("--out", required=True, help="model folder to write")
    args = parse_arguments(parser, argv)
    if args.step is not None:
        in_range("--step", args.step, 1, 1e9)
    from model import load_model, save_model
    from training import copy_weights, trainable
    tensors, model = synthesise(args.run, args.sigma_rel, args.step), load_model(args.run)
    named = trainable(model.flow, model.text if any(name.startswith("text_encoder.") for name in tensors) else None)
    if named.keys() != tensors.keys():
        raise UserError(f"{args.run}: its averages do not fit its model; they belong to another run")
    copy_weights(named, tensors)
    save_model(args.out, model.flow, model.codec, model.text)
    print(f"wrote {args.out}, the average of width {args.sigma_rel:g}")
    print(f'next: python sample.py --checkpoint {args.out} --prompt "three beeps, then rain"')


if __name__ == "__main__":
    run_main(main)
