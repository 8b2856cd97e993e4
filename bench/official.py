"""The official TangoFlux method on diffusers' own blocks: tests compare with it, bench times it.

    peer = Official(folder)                     # config.json, tangoflux, vae and T5, as the hub's
    audio = peer.generate("a dog barks", duration=10, steps=25, guidance_scale=4.5, seed=0)

After the facts of declare-lab/TangoFlux (inference_flow and TangoFluxInference.generate) on
FluxTransformer2DModel, AutoencoderOobleck and T5EncoderModel: float32, one prompt at a time, the
text encoder kept, all frames denoised and decoded, then cut. Needs diffusers, an extra. Letters:
B batch, L latent frames, C latent channels, S text tokens, T width of the text encoder.
"""
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from lib.common import need, read_json
from lib.text import read_tokenizer
from model import DurationEmbedder


class Official:
    """The networks of a folder in the official layout, and the official sampler.

    seconds: of the stages of the last `generate`.
    """

    def __init__(self, folder):
        need("diffusers", "the official method")
        from safetensors.torch import load_file
        from transformers import T5EncoderModel
        folder = Path(folder)
        self.config = read_json(folder / "config.json", dict)
        width = self.config["joint_attention_dim"]
        self.model = nn.Module()
        self.model.transformer = transformer_of(self.config)
        self.model.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.model.duration_emebdder = DurationEmbedder(width, self.config["max_duration"])
        self.model.load_state_dict(load_file(folder / "tangoflux.safetensors"))
        place = folder / "text_encoder"
        self.text_encoder = T5EncoderModel.from_pretrained(place, trust_remote_code=False)
        self.tokenizer = read_tokenizer(place)
        self.vae = vae_of(folder)
        for network in (self.vae, self.model, self.text_encoder):
            network.eval()
        self.seconds = {}

    def encode(self, prompt, length=None):
        """T5's states (1, S, T) and mask (1, S) of a prompt, padded to `length` tokens."""
        self.tokenizer.no_padding()
        ids = self.tokenizer.encode(prompt).ids
        length = length or len(ids)
        mask = torch.zeros(1, length, dtype=torch.long)
        mask[:, :len(ids)] = 1
        ids = torch.tensor([ids + [0] * (length - len(ids))])
        return self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask

    def pooled(self, states, mask):
        """Mean of the real tokens' states, then fc: (B, T)."""
        weights = mask[..., None].to(states.dtype)
        return self.model.fc((states * weights).sum(1) / weights.sum(1))

    @torch.no_grad()
    def inference_flow(self, prompt, duration=10, steps=25, guidance_scale=4.5, seed=0, count=1):
        """Latents (count, L, C) of one prompt and a duration in seconds."""
        began = time.perf_counter()
        frames = self.config["audio_seq_len"]
        states, mask = self.encode(prompt)
        empty, empty_mask = self.encode("", mask.shape[1])
        states = torch.cat([empty.expand(count, -1, -1), states.expand(count, -1, -1)])
        mask = torch.cat([empty_mask.expand(count, -1), mask.expand(count, -1)])
        pooled = self.pooled(states, mask)                                            # (2 count, T)
        seconds = torch.full((2 * count,), float(duration))
        states = torch.cat([states, self.model.duration_emebdder(seconds)], dim=1)
        rest = {"encoder_hidden_states": states, "pooled_projections": pooled,
                "txt_ids": torch.zeros(states.shape[1], 3),
                "img_ids": torch.arange(frames)[:, None].expand(-1, 3).float()}             # (L, 3)
        torch.manual_seed(seed)
        latents = torch.randn(count, frames, self.config["in_channels"])             # (count, L, C)
        sigmas = np.append(np.linspace(1.0, 1 / steps, steps), 0.0).astype(np.float32)
        self.seconds["text"] = time.perf_counter() - began

        began = time.perf_counter()
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            timestep = torch.full((2 * count,), float(sigma))
            both = torch.cat([latents] * 2)
            velocity = self.model.transformer(hidden_states=both, timestep=timestep, guidance=None,
                                              return_dict=False, **rest)[0]
            uncond, cond = velocity.chunk(2)
            velocity = uncond + guidance_scale * (cond - uncond)
            latents = latents + float(sigma_next - sigma) * velocity
        self.seconds["steps"] = time.perf_counter() - began
        return latents

    @torch.no_grad()
    def decode(self, latents, duration):
        """All latents (1, L, C) -> audio (channels, samples), cut to the duration in seconds."""
        began = time.perf_counter()
        audio = self.vae.decode(latents.transpose(1, 2)).sample[0]             # (channels, samples)
        self.seconds["decode"] = time.perf_counter() - began
        return audio[:, :int(duration * self.vae.config.sampling_rate)]

    def generate(self, prompt, duration=10, steps=25, guidance_scale=4.5, seed=0):
        """TangoFluxInference.generate: audio (channels, samples)."""
        latents = self.inference_flow(prompt, duration, steps, guidance_scale, seed)
        return self.decode(latents, duration)


def transformer_of(config):
    """A FluxTransformer2DModel of a model's config."""
    from diffusers import FluxTransformer2DModel
    same = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim",
            "num_attention_heads", "joint_attention_dim")
    settings = {name: config[name] for name in same}
    settings["pooled_projection_dim"] = config["joint_attention_dim"]
    settings["axes_dims_rope"] = tuple(config.get("axes_dims_rope", (16, 56, 56)))
    return FluxTransformer2DModel(guidance_embeds=False, **settings)


def vae_of(folder):
    """AutoencoderOobleck with the weights of a folder in the official layout."""
    import warnings

    from diffusers import AutoencoderOobleck
    from safetensors.torch import load_file
    config = read_json(Path(folder) / "config.json", dict)
    config = dict(config.get("vae", {}))        # without it: Stable Audio Open's
    config.pop("codec", None)
    with warnings.catch_warnings():             # torch's older weight norm
        warnings.simplefilter("ignore", FutureWarning)
        vae = AutoencoderOobleck(**config)
    vae.load_state_dict(load_file(Path(folder) / "vae.safetensors"))
    return vae.eval()
