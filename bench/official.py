"""The official TangoFlux method on diffusers' own blocks: tests compare with it, bench times it.

    peer = Official(folder)                     # config.json, tangoflux, vae and T5, as the hub's
    audio = peer.generate("a dog barks", duration=10, steps=25, guidance_scale=4.5, seed=0)

After the facts of declare-lab/TangoFlux (inference_flow and TangoFluxInference.generate) on
FluxTransformer2DModel, AutoencoderOobleck and T5EncoderModel: float32, one prompt at a time, the
text encoder kept, all frames denoised and decoded, then cut. Needs diffusers, an extra. Letters:
L latent frames, C latent channels, S text tokens, T width of the text encoder.
"""
import statistics
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from lib.common import need, read_json
from lib.text import read_tokenizer
from lib.weights import load_tensors
from model import DurationEmbedder

SHARED = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim",
          "num_attention_heads", "joint_attention_dim")         # names of both configs


class Official:
    """The networks of a folder in the official layout, and the official sampler."""

    def __init__(self, folder):
        need("diffusers", "the official method")
        from diffusers import AutoencoderOobleck, FluxTransformer2DModel  # noqa: F401
        from transformers import T5EncoderModel
        self.clock = Clock()                    # importing is not loading
        folder = Path(folder)
        self.config = read_json(folder / "config.json", dict)
        width = self.config["joint_attention_dim"]
        self.model = nn.Module()
        settings = {name: self.config[name] for name in SHARED}
        axes = tuple(self.config.get("axes_dims_rope", (16, 56, 56)))
        self.model.transformer = FluxTransformer2DModel(
            guidance_embeds=False, axes_dims_rope=axes, pooled_projection_dim=width,
            **settings)
        self.model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.model.duration_emebdder = DurationEmbedder(width, self.config["max_duration"])
        self.model.load_state_dict(load_tensors(folder / "tangoflux.safetensors"))
        self.model.eval()
        place = folder / "text_encoder"
        self.text_encoder = T5EncoderModel.from_pretrained(place, trust_remote_code=False).eval()
        self.tokenizer = read_tokenizer(place)
        self.vae = vae_of(folder)
        self.clock("load")

    def encode(self, prompts):
        """T5's states (n, S, T) and mask (n, S) of n prompts, padded to the longest."""
        self.tokenizer.enable_padding()
        rows = self.tokenizer.encode_batch(prompts)
        ids = torch.tensor([row.ids for row in rows])
        mask = torch.tensor([row.attention_mask for row in rows])
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def pooled(self, states, mask):
        """Mean of the real tokens' states, then fc: (n, T)."""
        weights = mask[..., None].to(states.dtype)
        return self.model.fc((states * weights).sum(1) / weights.sum(1))

    @torch.no_grad()
    def inference_flow(self, prompt, duration=10, steps=25, guidance_scale=4.5, seed=0):
        """Latents (1, L, C) of one prompt and a duration in seconds."""
        frames = self.config["audio_seq_len"]
        states, mask = self.encode(["", prompt])                                # (2, S, T)
        pooled = self.pooled(states, mask)                                      # (2, T)
        seconds = self.model.duration_emebdder(torch.full((2,), float(duration)))
        states = torch.cat([states, seconds], dim=1)                            # (2, S+1, T)
        inputs = {"encoder_hidden_states": states,
                  "pooled_projections": pooled,
                  "txt_ids": torch.zeros(states.shape[1], 3),
                  "img_ids": torch.arange(float(frames))[:, None].expand(-1, 3)}
        self.clock("text")

        random = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, frames, self.config["in_channels"], generator=random)
        sigmas = np.append(np.linspace(1.0, 1 / steps, steps), 0.0).astype(np.float32)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            both = torch.cat([latents, latents])                                # (2, L, C)
            timestep = torch.full((2,), float(sigma))
            velocity = self.model.transformer(both, timestep=timestep, return_dict=False, **inputs)
            uncond, cond = velocity[0].chunk(2)
            velocity = uncond + guidance_scale * (cond - uncond)
            latents = latents + float(sigma_next - sigma) * velocity            # (1, L, C)
        self.clock("steps")
        return latents

    @torch.no_grad()
    def generate(self, prompt, duration=10, steps=25, guidance_scale=4.5, seed=0):
        """TangoFluxInference.generate: all frames, then cut -> audio (channels, samples)."""
        latents = self.inference_flow(prompt, duration, steps, guidance_scale, seed)
        audio = self.vae.decode(latents.transpose(1, 2)).sample[0]
        self.clock("decode")
        return audio[:, :int(duration * self.vae.config.sampling_rate)]


def vae_of(folder):
    """AutoencoderOobleck with the weights of a folder in the official layout."""
    from diffusers import AutoencoderOobleck
    config = dict(read_json(Path(folder) / "config.json", dict).get("vae", {}))
    config.pop("codec", None)                   # without "vae": Stable Audio Open's
    with warnings.catch_warnings():             # torch's older weight norm
        warnings.simplefilter("ignore", FutureWarning)
        vae = AutoencoderOobleck(**config)
    vae.load_state_dict(load_tensors(Path(folder) / "vae.safetensors"))
    return vae.eval()


# ----------------------------------------------------------------------------- timing

class Clock:
    """Seconds of stages: clock(stage) adds what passed since the call before."""

    def __init__(self):
        self.seconds = Counter()
        self.last = time.perf_counter()

    def __call__(self, stage):
        now = time.perf_counter()
        self.seconds[stage] += now - self.last
        self.last = now


def comparison(runs, measures):
    """Rows of a table from {way: [{measure: number} of each round]}.

    Medians over rounds, and how many times the first way's, round by round, with the range.
    """
    rows = []
    first = next(iter(runs.values()))
    for way, rounds in runs.items():
        row = [way]
        for measure in measures:
            cell = f"{statistics.median([found[measure] for found in rounds]):.2f}"
            if rounds is not first:
                ratios = [a[measure] / b[measure] for a, b in zip(rounds, first)]
                middle = statistics.median(ratios)
                cell += f"; x {middle:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            row.append(cell)
        rows.append(row)
    return rows
