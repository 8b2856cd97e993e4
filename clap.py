"""CLAP: how well audio fits a text, as one number (paper 2.5: the reward; 3.3, A.10: a metric, by another CLAP).

    clap = load_clap("checkpoints/toy/base/clap_reward")     # or "laion/clap-htsat-unfused", the paper's
    scores = clap.scores(audios, sampling_rate, prompts)     # (N,), cosines in [-1, 1]

The network is transformers' ClapModel. Its log-mel front end runs here, batched in torch, and equals
ClapFeatureExtractor, whose settings it reads from the folder's preprocessor_config.json. Where the original
pipelines differ, we do this:
  - a clip longer than the model hears (10 s) is cut in the middle, or in fused models given as three chunks from the
    middle of its thirds and the whole shrunk (both originals: at random places, so that scores change from call to
    call; official CRPO scored clips of 10.2 s that way);
  - in fused models a clip that is not longer is marked so (transformers marks a random one as longer, even alone);
  - nothing is rounded, to 16 bit before (laion_clap) or to three decimals afterwards (official CRPO).

Letters: B batch, N clips, D embedding width, K bins of the spectrum, M mel bands, F mel frames that the model hears,
F' those of a whole longer clip, S text tokens.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as functional

from audio import resample
from common import UserError, read_json, save_tensors, write_json
from model import model_folder
from text import read_tokenizer, well_formed
from weights import check_finite, find_weights, load_weights

FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
         "vocab.json", "merges.txt"]
MAX_TOKENS = 77         # laion_clap pads and cuts texts to this; a model with fewer positions cuts earlier
BEFORE_LOG = 1e-10      # power below this is -100 dB
POSITIONS = "text_model.embeddings.position_ids"        # 0, 1, 2, ...: transformers saved it once, not now


# ----------------------------------------------------------------------------- audio -> log-mel

class FrontEnd(nn.Module):
    """ClapFeatureExtractor in torch; the keywords are those of preprocessor_config.json.

    truncation "rand_trunc" (unfused models, Slaney's mel scale and norm) or "fusion" (HTK's scale, no norm: one
    clip becomes 4 mels); padding "repeatpad" (repeated while it fits, then silence), "repeat" or "pad".
    """

    def __init__(self, feature_size=64, sampling_rate=48000, hop_length=480, max_length_s=10, fft_window_size=1024,
                 frequency_min=0, frequency_max=14000, truncation="fusion", padding="repeatpad", **_):
        super().__init__()
        from transformers.audio_utils import mel_filter_bank
        if truncation not in ("rand_trunc", "fusion") or padding not in ("repeatpad", "repeat", "pad"):
            raise UserError(f"preprocessor_config.json: truncation {truncation!r} with padding {padding!r} is unknown")
        self.sampling_rate, self.hop, self.n_fft, self.padding = sampling_rate, hop_length, fft_window_size, padding
        self.samples, self.fused = int(max_length_s * sampling_rate), truncation == "fusion"
        slaney = {"norm": None, "mel_scale": "htk"} if self.fused else {"norm": "slaney", "mel_scale": "slaney"}
        filters = mel_filter_bank(fft_window_size // 2 + 1, feature_size, frequency_min, frequency_max, sampling_rate,
                                  **slaney)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)            # (K, M)
        self.register_buffer("window", torch.hann_window(fft_window_size), persistent=False)

    def fit(self, audio):
        """(samples,), at most self.samples of them -> (self.samples,): repeated or silence added."""
        repeats = self.samples // len(audio)
        if self.padding == "repeat" and len(audio) < self.samples:
            audio = audio.repeat(repeats + 1)[:self.samples]
        elif self.padding == "repeatpad":
            audio = audio.repeat(repeats)
        return functional.pad(audio, (0, self.samples - len(audio)))

    def log_mel(self, audio):
        """(B, samples) -> power mel spectrogram in dB (B, F, M), frames centred on multiples of the hop."""
        # a quiet band beside a loud one is lost in float32; a device without float64 makes do
        exact = torch.float32 if audio.device.type == "mps" else torch.float64
        spectrum = torch.stft(audio.to(exact), self.n_fft, self.hop, window=self.window.to(exact), center=True,
                              pad_mode="reflect", return_complex=True)                                  # (B, K, F)
        power = spectrum.real ** 2 + spectrum.imag ** 2
        mel = power.transpose(1, 2) @ self.filters.to(exact)                                            # (B, F, M)
        return (10 * mel.clamp(min=BEFORE_LOG).log10()).float()

    def long_mel(self, audio, random=None):
        """A clip longer than the model hears -> (1 or 4, F, M); is it really longer, in frames?

        random: a numpy RandomState that chooses the places as the originals do; None takes the middle ones.
        """
        if not self.fused:
            start = random.randint(0, len(audio) - self.samples + 1) if random else (len(audio) - self.samples) // 2
            return self.log_mel(audio[None, start:start + self.samples]), True
        mel, frames = self.log_mel(audio[None])[0], self.samples // self.hop + 1                        # (F', M)
        if len(mel) == frames:
            return mel.expand(4, -1, -1), False
        thirds = [third if len(third) else [0] for third in np.array_split(np.arange(len(mel) - frames + 1), 3)]
        starts = [random.choice(third) if random else third[len(third) // 2] for third in thirds]
        whole = functional.interpolate(mel[None, None], (frames, mel.shape[1]), mode="bilinear", align_corners=False)
        return torch.cat([whole[0], torch.stack([mel[start:start + frames] for start in starts])]), True

    def forward(self, audios, random=None):
        """A list of (samples,) at self.sampling_rate -> input_features (B, 1 or 4, F, M), is_longer (B, 1) bool."""
        long = [len(audio) > self.samples for audio in audios]
        device, features = self.window.device, [None] * len(audios)
        longer = torch.zeros(len(audios), 1, dtype=torch.bool, device=device)
        short = [i for i, too_long in enumerate(long) if not too_long]
        if short:
            mels = self.log_mel(torch.stack([self.fit(audios[i].to(device)) for i in short]))[:, None]
            for i, mel in zip(short, mels.expand(-1, 4 if self.fused else 1, -1, -1)):
                features[i] = mel
        for i in np.flatnonzero(long):
            features[i], longer[i] = self.long_mel(audios[i].to(device), random)
        return torch.stack(features), longer


# ----------------------------------------------------------------------------- the two towers

class Clap(nn.Module):
    """A ClapModel (self.clap), its tokenizer and its front end; embeddings are of unit length."""

    def __init__(self, clap, tokenizer, front, preprocessor):
        super().__init__()
        self.clap, self.tokenizer, self.front, self.preprocessor = clap, tokenizer, front, preprocessor
        self.max_tokens = min(MAX_TOKENS, clap.config.text_config.max_position_embeddings - 2)
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)

    @property
    def device(self):
        return self.front.window.device

    def tokenize(self, prompts):
        """Prompts -> ids (B, S), mask (B, S), padded to the longest; a text's end beyond max_tokens is cut off."""
        encodings = self.tokenizer.encode_batch([well_formed(prompt) for prompt in prompts])
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings])
        ids = torch.full((len(encodings), int(lengths.max())), self.clap.config.text_config.pad_token_id)
        for row, encoding in zip(ids, encodings):
            row[:len(encoding.ids)] = torch.tensor(encoding.ids)
        return ids.to(self.device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(self.device)

    def text_features(self, ids, mask):
        """-> (B, D) of unit length, with gradients if enabled."""
        return self.clap.get_text_features(ids, mask.long()).pooler_output

    def audio_features(self, mels, longer):
        """Log-mels (B, 1 or 4, F, M), is_longer (B, 1) -> (B, D) of unit length, with gradients if enabled."""
        return self.clap.get_audio_features(mels, longer).pooler_output

    @torch.inference_mode()
    def embed_text(self, prompts, batch_size=64):
        """Prompts -> (N, D) float32 on the CPU; equal prompts are embedded once."""
        unique = list(dict.fromkeys(prompts))
        pieces = [self.text_features(*self.tokenize(unique[start:start + batch_size])).float().cpu()
                  for start in range(0, len(unique), batch_size)]
        return torch.cat(pieces)[[unique.index(prompt) for prompt in prompts]]

    @torch.inference_mode()
    def embed_audio(self, audios, sampling_rate, batch_size=32):
        """A list of (channels, samples) or (samples,) in [-1, 1] -> (N, D) float32 on the CPU."""
        pieces = []
        for start in range(0, len(audios), batch_size):
            batch = audios[start:start + batch_size]
            lengths = [audio.shape[-1] for audio in batch]
            if 0 in lengths:
                raise UserError(f"clip {start + lengths.index(0)} is empty: it has no CLAP score")
            mono = [audio.reshape(-1, audio.shape[-1]).mean(0) for audio in batch]
            mono = [resample(audio, sampling_rate, self.front.sampling_rate) for audio in mono]
            pieces.append(self.audio_features(*self.front(mono)).float().cpu())
        return torch.cat(pieces)

    def scores(self, audios, sampling_rate, prompts, batch_size=32):
        """Cosine of each clip with its own prompt, (N,) float32; never rounded."""
        return (self.embed_audio(audios, sampling_rate, batch_size) * self.embed_text(prompts)).sum(1)

    def save(self, folder, dtype=torch.float32):
        """Write the folder that load_clap and transformers' from_pretrained both read."""
        folder = Path(folder)
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                   for name, tensor in self.clap.state_dict().items()}
        save_tensors(folder / "model.safetensors", check_finite(tensors, "CLAP"), {"format": "pt"})
        self.tokenizer.no_truncation()
        write_json(folder / "tokenizer.json", json.loads(self.tokenizer.to_str()))
        self.tokenizer.enable_truncation(self.max_tokens)
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_tokens, "bos_token": "<s>",
            "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
        write_json(folder / "preprocessor_config.json", self.preprocessor)
        write_json(folder / "config.json", {**self.clap.config.to_dict(), "architectures": ["ClapModel"]})


def build(config, tokenizer, preprocessor, seed=0):
    """A Clap with random weights from config dicts; UserError if transformers cannot make a ClapModel of them."""
    from transformers import ClapConfig, ClapModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            clap = ClapModel(ClapConfig(**config))
        except Exception as error:             # transformers validates with exceptions of its own
            raise UserError(f"config.json does not describe a CLAP model: {error}") from None
    front = FrontEnd(**preprocessor)
    if front.fused != clap.config.audio_config.enable_fusion:
        raise UserError("preprocessor_config.json and config.json disagree about fusion: one is another model's")
    return Clap(clap, tokenizer, front, preprocessor)


def load_clap(source, device="cpu"):
    """A Clap in eval mode, float32, from a folder or a hub id."""
    if Path(source).parent.is_dir() and not Path(source).exists() and Path(source).name.startswith("clap_"):
        raise UserError(f"{source} is missing; python reward.py train_clap trains a CLAP, --reward, --judge or --clap "
                        "names its folder")
    folder = model_folder(source, FILES)
    if not (Path(source).is_dir() or (folder / "model.safetensors").is_file()):
        folder = model_folder(source, [*FILES, "pytorch_model.bin"])            # an older repository of the hub
    weights = find_weights(folder, "model.safetensors")
    configs = [read_json(folder / name) for name in ("config.json", "preprocessor_config.json")]
    if not all(isinstance(config, dict) for config in configs):
        raise UserError(f"{folder}: config.json or preprocessor_config.json is not a JSON object")
    clap = build(configs[0], read_tokenizer(folder), configs[1])
    load_weights(clap.clap, weights, optional=(POSITIONS,))
    return clap.to(device).eval()
