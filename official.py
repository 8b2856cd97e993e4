"""The official TangoFlux method on diffusers' own blocks: what tests compare with, and what bench.py runs beside ours.

    peer = Official(folder)                                  # config.json, tangoflux, vae and T5, as the hub has them
    audio = peer.generate("a dog barks", duration=10, steps=25, guidance_scale=4.5, seed=0)       # (channels, samples)

Written after the facts of declare-lab/TangoFlux (its inference_flow and TangoFluxInference.generate) on
FluxTransformer2DModel, AutoencoderOobleck and T5EncoderModel: float32, one prompt at a time, the text encoder
kept, all frames denoised and decoded, then cut. Needs diffusers, an extra. Letters: B batch, L latent frames, C
latent channels, S text tokens, T width of the text encoder.
"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from blocks import DurationEmbedder
from common import UserError, read_json


def need_diffusers():
    """UserError if diffusers, an extra, is not installed."""
    from importlib.util import find_spec
    if find_spec("diffusers") is None:
        raise UserError("the official method needs diffusers: pip install diffusers")


class Official:
    """The networks of a folder in the official layout, and the official sampler. `seconds`: of the last generate."""

    def __init__(self, folder):
        need_diffusers()
        from safetensors.torch import load_file
        from transformers import T5EncoderModel

        from text import read_tokenizer
        folder = Path(folder)
        self.config = read_json(folder / "config.json")
        self.vae = vae_of(folder)
        self.model = nn.Module()
        width = self.config["joint_attention_dim"]
        self.model.transformer = transformer_of(self.config)
        self.model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.model.duration_emebdder = DurationEmbedder(width, self.config["max_duration"])
        self.model.load_state_dict(load_file(folder / "tangoflux.safetensors"))
        self.text_encoder = T5EncoderModel.from_pretrained(folder / "text_encoder")
        self.tokenizer = read_tokenizer(folder / "text_encoder")
        for network in (self.vae, self.model, self.text_encoder):
            network.eval()
        self.seconds = {}

    def encode(self, prompt, length=None):
        """T5's states (1, S, T) and mask (1, S) of a prompt, padded to `length` tokens."""
        self.tokenizer.no_padding()
        ids = self.tokenizer.encode(prompt).ids
        mask = torch.zeros(1, length or len(ids), dtype=torch.long)
        mask[:, :len(ids)] = 1
        ids = torch.tensor([ids + [0] * (mask.shape[1] - len(ids))])
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def pooled(self, states, mask):
        """Mean of the real tokens' states, then fc: (B, T)."""
        weights = mask[..., None].to(states.dtype)
        return self.model.fc((states * weights).sum(1) / weights.sum(1))

    @torch.no_grad()
    def inference_flow(self, prompt, duration=10, steps=25, guidance_scale=4.5, seed=0, count=1):
        """Latents (count, L, C) of one prompt and a duration in seconds."""
        began = time.perf_counter()
        config = self.config
        states, mask = self.encode(prompt)
        empty, empty_mask = self.encode("", mask.shape[1])
        states = torch.cat([empty.expand(count, -1, -1), states.expand(count, -1, -1)])          # (2 count, S, T)
        mask = torch.cat([empty_mask.expand(count, -1), mask.expand(count, -1)])
        seconds = torch.full((2 * count,), float(duration))
        pooled = self.pooled(states, mask)                                                       # (2 count, T)
        states = torch.cat([states, self.model.duration_emebdder(seconds)], dim=1)               # (2 count, S+1, T)
        text_ids = torch.zeros(states.shape[1], 3)
        audio_ids = torch.arange(config["audio_seq_len"])[:, None].expand(-1, 3).float()         # (L, 3)
        torch.manual_seed(seed)
        latents = torch.randn(count, config["audio_seq_len"], config["in_channels"])             # (count, L, C)
        sigmas = np.append(np.linspace(1.0, 1 / steps, steps), 0.0).astype(np.float32)
        self.seconds["text"] = time.perf_counter() - began
        self.seconds["steps"] = []
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            began = time.perf_counter()
            velocity = self.model.transformer(
                hidden_states=torch.cat([latents] * 2), encoder_hidden_states=states, pooled_projections=pooled,
                timestep=torch.full((2 * count,), float(sigma)), img_ids=audio_ids, txt_ids=text_ids, guidance=None,
                return_dict=False)[0]                                                            # (2 count, L, C)
            uncond, cond = velocity.chunk(2)
            latents = latents + float(sigma_next - sigma) * (uncond + guidance_scale * (cond - uncond))
            self.seconds["steps"].append(time.perf_counter() - began)
        return latents

    @torch.no_grad()
    def decode(self, latents, duration):
        """Latents (1, L, C), all of them, to audio (channels, samples) cut to the duration in seconds."""
        began = time.perf_counter()
        audio = self.vae.decode(latents.transpose(1, 2)).sample[0]                               # (channels, samples)
        self.seconds["decode"] = time.perf_counter() - began
        return audio[:, :int(duration * self.vae.config.sampling_rate)]

    def generate(self, prompt, duration=10, steps=25, guidance_scale=4.5, seed=0):
        """TangoFluxInference.generate: audio (channels, samples)."""
        return self.decode(self.inference_flow(prompt, duration, steps, guidance_scale, seed), duration)


def transformer_of(config):
    """A FluxTransformer2DModel of a model's config."""
    from diffusers import FluxTransformer2DModel
    return FluxTransformer2DModel(
        in_channels=config["in_channels"], num_layers=config["num_layers"],
        num_single_layers=config["num_single_layers"], attention_head_dim=config["attention_head_dim"],
        num_attention_heads=config["num_attention_heads"], joint_attention_dim=config["joint_attention_dim"],
        pooled_projection_dim=config["joint_attention_dim"], guidance_embeds=False,
        axes_dims_rope=tuple(config.get("axes_dims_rope", (16, 56, 56))))


def vae_of(folder):
    """AutoencoderOobleck with the weights of a folder in the official layout."""
    import warnings

    from diffusers import AutoencoderOobleck
    from safetensors.torch import load_file
    config = read_json(Path(folder) / "config.json").get("vae", {})     # official files lack it: Stable Audio Open's
    with warnings.catch_warnings():                                     # torch's older weight norm is deprecated
        warnings.simplefilter("ignore", FutureWarning)
        vae = AutoencoderOobleck(**{name: value for name, value in config.items() if name != "codec"})
    vae.load_state_dict(load_file(Path(folder) / "vae.safetensors"))
    return vae.eval()
