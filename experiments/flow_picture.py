"""The flow, seen: x_t and the model's guess of x_1, from noise (t = 1) to sound (t = 0), as spectrograms.

    python -m experiments.flow_picture                                     # -> docs/flow.png, README's picture
    python -m experiments.flow_picture --prompt "three beeps" --out runs/flow.png
    python -m experiments.flow_picture --checkpoint runs/base --seed 1 --out runs/flow.png

The guess is where a straight line from x_t would end: x_1 = x_t - t v (Eq. 4). Needs matplotlib and a mel codec.
Letters: L latent frames, C latent channels, M mel bands, F mel frames.
"""
import torch

from lib.common import BASE, UserError, flag, need, parse_flags, picture, run_main
from lib.text import encode_prompts, null_condition
from model import load_model
from sample import guided_velocity, noise_for, schedule

FLAGS = {"what to draw": [
    flag("--prompt", "a violin followed by rain", "what to hear"),
    flag("--checkpoint", str(BASE), "model folder"),
    flag("--seed", 0, "of the noise", 0, 2 ** 62),
    flag("--steps", 24, "solver steps (paper 3.3: 50)", 6, 1000),
    flag("--out", "docs/flow.png", "the picture"),
]}
COLUMNS = 6


@torch.inference_mode()
def path_of(model, prompt, seed, steps):
    """[(t, x_t, guess of x_1)] along Euler's path, latents (1, L, C), COLUMNS + 1 times from t = 1 to 0."""
    condition = encode_prompts(model.text, [prompt], torch.tensor([4.0]))
    velocity_of = guided_velocity(model.flow, condition, null_condition(model.text, condition), 3.0)
    x = noise_for(seed, [0], (model.flow.config["audio_seq_len"], model.flow.config["in_channels"]))
    ts = schedule(steps)
    points = []
    for step, (t, t_next) in enumerate(zip(ts[:-1], ts[1:])):
        velocity = velocity_of(x, t)                                        # (1, L, C)
        if step % (steps // COLUMNS) == 0:
            points.append((t.item(), x, x - t * velocity))
        x = x + (t_next - t) * velocity
    return [*points[:COLUMNS], (0.0, x, x)]


def main():
    args = parse_flags(__doc__, FLAGS)
    need("matplotlib", "a picture")
    model = load_model(args.checkpoint)
    if model.codec.kind != "mel":
        raise UserError(f"{args.checkpoint} has no mel codec, whose latents decode to a spectrogram")
    points = path_of(model, args.prompt, args.seed, args.steps)
    with picture(args.out, 1.5, 2.9, 2 * len(points)) as axes:
        figure = axes[0].figure
        figure.set_size_inches(1.2 * len(points), 2.6)
        figure.clear()
        grid = figure.subplots(2, len(points))
        for column, (t, x, guess) in enumerate(points):
            for row, latents in enumerate((x, guess)):
                mel = model.codec.decode_mel(model.codec.denormalise(latents))[0]       # (M, F)
                axis = grid[row][column]
                axis.imshow(mel, origin="lower", aspect="auto", cmap="magma", vmin=-4, vmax=1)
                axis.set(xticks=[], yticks=[])
            grid[0][column].set_title(f"t = {t:.2f}", fontsize=9)
        grid[0][0].set_ylabel("x_t")
        grid[1][0].set_ylabel("guess of x_1")
        figure.suptitle(args.prompt, fontsize=10)
    print(f'next: python sample.py --prompt "{args.prompt}"')


if __name__ == "__main__":
    run_main(main)
