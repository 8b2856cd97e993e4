"""The flow, seen: x_t and the model's guess of x_1 from noise (t = 1) to sound, as spectrograms.

    python -m experiments.flow_picture                              # -> docs/flow.png, README's
    python -m experiments.flow_picture --prompt "three beeps" --out runs/flow.png
    python -m experiments.flow_picture --checkpoint runs/base --seed 1 --out runs/flow.png

The guess is where a straight line from x_t would end: x_1 = x_t - t v (Eq. 4). Needs matplotlib and
a mel codec. Letters: L latent frames, C latent channels, M mel bands, F mel frames.
"""
import torch

from lib.common import CLEAN, UserError, atomic_path, flag, need, parse_flags, run_main
from lib.text import encode_prompts, null_condition
from model import load_model
from sample import guided_velocity, noise_for, schedule

FLAGS = {"what to draw": [
    flag("--prompt", "a violin followed by rain", "what to hear"),
    flag("--checkpoint", str(CLEAN), "model folder"),
    flag("--seed", 0, "of the noise", 0, 2 ** 62),
    flag("--steps", 24, "solver steps (paper 3.3: 50)", 6, 1000),
    flag("--out", "docs/flow.png", "the picture"),
]}
COLUMNS = 6


@torch.inference_mode()
def path_of(model, prompt, seed, steps):
    """[(t, x_t, guess of x_1)] at COLUMNS + 1 times of Euler's path; latents (1, L, C)."""
    condition = encode_prompts(model.text, [prompt], torch.tensor([4.0]))
    null = null_condition(model.text, condition)
    velocity_of = guided_velocity(model.flow, condition, null, 3.0)
    config = model.flow.config
    x = noise_for(seed, [0], (config["audio_seq_len"], config["in_channels"]))
    ts = schedule(steps)
    points = []
    for step in range(steps):
        velocity = velocity_of(x, ts[step])                                     # (1, L, C)
        if step % (steps // COLUMNS) == 0:
            points.append((ts[step].item(), x, x - ts[step] * velocity))
        x = x + (ts[step + 1] - ts[step]) * velocity
    return [*points[:COLUMNS], (0.0, x, x)]


def main(argv=None):
    args = parse_flags(__doc__, FLAGS, argv)
    need("matplotlib", "a picture")
    from matplotlib.figure import Figure
    model = load_model(args.checkpoint)
    if model.codec.kind != "mel":
        raise UserError(f"{args.checkpoint} has no mel codec: no spectrogram")
    points = path_of(model, args.prompt, args.seed, args.steps)
    figure = Figure(figsize=(1.2 * len(points), 2.6), layout="constrained")
    grid = figure.subplots(2, len(points))
    for axes, (t, *both) in zip(grid.T, points):
        axes[0].set_title(f"t = {t:.2f}", fontsize=9)
        for axis, latents in zip(axes, both):
            mel = model.codec.decode_mel(model.codec.denormalise(latents))[0]           # (M, F)
            axis.imshow(mel, origin="lower", aspect="auto", cmap="magma", vmin=-4, vmax=1)
            axis.set(xticks=[], yticks=[])
    grid[0, 0].set_ylabel("x_t")
    grid[1, 0].set_ylabel("guess of x_1")
    figure.suptitle(args.prompt, fontsize=10)
    with atomic_path(args.out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f'wrote {args.out}\nnext: python sample.py --prompt "{args.prompt}"')


if __name__ == "__main__":
    run_main(main)
