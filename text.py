"""The text encoder: a T5 encoder in Hugging Face layout with its tokenizer, and the toy one with a byte fallback.

    encoder = TextEncoder.load("checkpoints/toy/base/text_encoder")
    ids, mask = encoder.tokenize(["a violin followed by rain"])
    hidden = encoder.encode(ids, mask)

Importing transformers takes longer than importing torch, so it happens inside the functions that need it.

Letters: B batch, S text tokens, T width of the text encoder.
"""
import re
import string
from pathlib import Path

import torch
import torch.nn as nn

from common import UserError, atomic_path, read_json, save_tensors, warn, write_json
from weights import check_finite, empty, find_weights, load_weights

PAD, END, UNKNOWN = 0, 1, 2                # as in T5
MAX_TOKENS = 64                            # the official training length (its sampler uses 512)
PUNCTUATION = ",.;:!?'\"-()&"
WORD = rf"\w+|[^\w\s{re.escape(string.punctuation)}]+"       # letters and digits, or a run of symbols such as emoji


class TextEncoder(nn.Module):
    """A `T5EncoderModel` (self.t5) and a `tokenizers.Tokenizer`. In train() mode `encode` keeps gradients."""

    def __init__(self, t5, tokenizer, max_tokens=MAX_TOKENS):
        super().__init__()
        self.t5, self.tokenizer, self.max_tokens = t5, tokenizer, max_tokens
        tokenizer.no_padding()             # padding happens in `tokenize`, to the longest prompt
        self.unfamiliar = {UNKNOWN, *(i for piece, i in tokenizer.get_vocab().items()
                                      if re.fullmatch("<0x[0-9A-F]{2}>", piece))}

    @property
    def width(self):
        return self.t5.config.d_model

    def tokenize(self, prompts, max_length=None):
        """Prompts -> ids (B, S) long and mask (B, S) bool, padded to the longest; each ends with </s>.

        Longer than `max_length` tokens (default self.max_tokens) is cut, with a warning; the </s> stays.
        """
        max_length = max_length or self.max_tokens
        self.tokenizer.enable_truncation(max_length)
        encodings = self.tokenizer.encode_batch([well_formed(prompt) for prompt in prompts])
        cut = [prompt for prompt, encoding in zip(prompts, encodings) if encoding.overflowing]
        if cut:
            warn(f"{len(cut)} of {len(encodings)} prompts cut to {max_length} tokens, first: {cut[0][:40]!r}...")
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings])
        ids = torch.full((len(encodings), int(lengths.max())), PAD)                             # (B, S)
        for row, encoding in zip(ids, encodings):
            row[:len(encoding.ids)] = torch.tensor(encoding.ids)
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    def encode(self, ids, mask):
        """ids, mask (B, S) -> hidden (B, S, T), on the encoder's device; each row as if it were alone."""
        device = self.t5.shared.weight.device
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.t5(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state

    def unknown_words(self, prompt):
        """The words of a prompt that are spelt in bytes because no piece holds them, in order, each once."""
        self.tokenizer.no_truncation()
        words = re.findall(WORD, well_formed(prompt))
        return [word for word in dict.fromkeys(words)
                if self.unfamiliar & set(self.tokenizer.encode(word, add_special_tokens=False).ids)]

    def save(self, folder, dtype=torch.float32):
        """Write the folder that `load` and transformers' from_pretrained both read."""
        folder = Path(folder)
        # encoder.embed_tokens is the same tensor as shared: stored once, as T5 checkpoints do
        tensors = {name: tensor.to(dtype) for name, tensor in self.t5.state_dict().items()
                   if name != "encoder.embed_tokens.weight"}
        save_tensors(folder / "model.safetensors", check_finite(tensors, "text encoder"), {"format": "pt"})
        with atomic_path(folder / "tokenizer.json") as temporary:
            self.tokenizer.no_truncation()
            self.tokenizer.save(str(temporary))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_tokens,
            "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
        write_json(folder / "config.json", {**self.t5.config.to_dict(), "architectures": ["T5EncoderModel"]})

    @classmethod
    def load(cls, folder, weights=None, dtype=torch.float32):
        """Read a folder in Hugging Face layout (config.json, model.safetensors, tokenizer.json).

        `weights`: Weights in place of model.safetensors. Of a whole T5 (FLAN-T5) the decoder is not even read.
        Prompts are cut where tokenizer_config.json says (FLAN-T5: 512 tokens), else at 64.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"text encoder folder {folder} is missing; a model folder needs text_encoder/")
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise UserError(f"{folder}/config.json is not a JSON object; take the one of a T5 encoder")
        weights = weights or find_weights(folder, "model.safetensors")
        whole = config.get("architectures") != ["T5EncoderModel"]
        names = {name: name for name in weights if not (whole and name.startswith(("decoder.", "lm_head.")))}
        if "shared.weight" in names:                                    # one tensor under two names, saved as either
            names["encoder.embed_tokens.weight"] = "shared.weight"
        elif "encoder.embed_tokens.weight" in names:
            names["shared.weight"] = "encoder.embed_tokens.weight"
        t5 = empty_t5(config, dtype)
        load_weights(t5, weights.named(names))
        path = folder / "tokenizer_config.json"
        found = read_json(path) if path.is_file() else {}
        limit = found.get("model_max_length") if isinstance(found, dict) else None
        limit = limit if type(limit) is int and 2 <= limit <= 100_000 else MAX_TOKENS     # some say 1e30: none
        return cls(t5, read_tokenizer(folder), limit).eval()


def well_formed(prompt):
    """The prompt with lone surrogates (broken bytes of a command line) replaced by "?": they have no UTF-8."""
    return prompt.encode("utf-8", "replace").decode()


def empty_t5(config, dtype):
    """A T5EncoderModel of a config dict with uninitialised weights: no random numbers are drawn in vain."""
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel
    try:
        with torch.device("meta"):
            t5 = T5EncoderModel(T5Config(**config))
    except Exception as error:             # transformers validates with exceptions of its own
        raise UserError(f"the text encoder's config.json does not describe a T5 encoder: {error}") from None
    t5 = empty(t5, dtype)
    t5.encoder.embed_tokens = t5.shared    # to_empty parts the tied pair
    return t5


def read_tokenizer(folder):
    """tokenizer.json read directly (quick); a folder with spiece.model only goes through transformers."""
    from tokenizers import Tokenizer
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except Exception as error:             # tokenizers raises plain Exception
        raise UserError(f"no usable tokenizer in {folder}: {error}") from None


def fetch(hub_id, patterns, remedy="pass the path of a downloaded folder"):
    """Download (or find in the cache) the files of a hub repository; if that fails, one line with the `remedy`."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:             # no network, unknown id, gated, full disk: each is the user's to mend
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{hub_id} is no folder here and could not be fetched from the hub ({reason}); "
                        f"{remedy}") from None


def load_text(folder, config, weights, dtype):
    """The text encoder: text_encoder/ of the folder, else the folder or hub id that text_encoder_name gives.

    `weights`: those inside tangoflux.safetensors, None if there are none; the hub then only gives config and
    tokenizer.
    """
    name = config["text_encoder_name"]
    local = next((path for path in (folder / "text_encoder", folder / name) if path.is_dir()), None)
    if local is None and ("/" not in name or name.startswith(("/", "."))):
        raise UserError(f"{folder / name} is missing; a model folder needs its text_encoder/")
    if local is None:
        small = ["config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"]
        patterns = small if weights else [*small, "model.safetensors"]
        local = fetch(name, patterns, f"download it elsewhere and put its files into {folder / 'text_encoder'}")
    else:
        weights = None
    return TextEncoder.load(local, weights, dtype)


# ----------------------------------------------------------------------------- the toy encoder

def make_tokenizer(words, special=("<pad>", "</s>", "<unk>"), template="$A </s>"):
    """Whole words (and punctuation) as pieces, everything else in UTF-8 bytes, so no caption is out of reach.

    Lower-cased, NFKC. Ids: the `special` tokens in their order (T5's: 0 <pad>, 1 </s>, 2 <unk>, the last never used),
    256 bytes, a lone space mark, then the words. `template`: where the special tokens stand around a text $A.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Metaspace("▁", prepend_scheme="always")])
    split = [piece for word in [*words, *PUNCTUATION]
             for piece, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(word))]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = dict.fromkeys([*special, *byte_pieces, "▁", *sorted(split)])
    # equal scores: the fewest pieces win; bytes (unknown characters: 10 below the lowest score) are the last resort
    scores = [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(Unigram(scores, unk_id=special.index("<unk>"), byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(piece, special.index(piece)) for piece in template.split() if piece != "$A"])
    return tokenizer


def make_text_encoder(words, width=128, layers=2, heads=4, d_ff=256, seed=0):
    """A small T5 encoder (gated GELU, as FLAN-T5) with random weights and a tokenizer that knows `words`.

    No dropout: it would draw from the global random stream.
    """
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel
    tokenizer = make_tokenizer(words)
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), d_model=width, d_kv=width // heads, d_ff=d_ff,
                      num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                      pad_token_id=PAD, eos_token_id=END)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = T5EncoderModel(config)
    look_both_ways(t5.encoder.block[0].layer[0].SelfAttention)
    return TextEncoder(t5, tokenizer)


@torch.no_grad()
def look_both_ways(attention):
    """Start a T5 attention's relative position biases so that half the heads look back and half look ahead.

    The flow gives all text tokens one position: word order reaches it through these biases alone. T5 starts them
    near 0, so that "rain, then wind" and "wind, then rain" are the same bag of words until Adam has moved them, a
    thousandth a step. Here a head's bias falls by 0.5 a token (phrases) or 2 (the neighbour) to one side, down to
    -5, and is -5 on the other side.
    """
    table, furthest = attention.relative_attention_bias.weight, attention.relative_attention_max_distance
    heads = torch.arange(table.shape[1])                                                        # table (buckets, heads)
    side, slope = 2 * (heads % 2) - 1, torch.where(heads // 2 % 2 == 0, 0.5, 2.0)               # (heads,)
    for offset in sorted(range(-furthest, furthest + 1), key=abs):      # the furthest of a bucket comes last and stays
        bucket = attention._relative_position_bucket(torch.tensor(offset), True, len(table), furthest)
        table[bucket] = torch.where(offset * side >= 0, -slope * abs(offset), -5.0).clamp(min=-5)


def null_tokens(lengths, size=None):
    """The one null text: "" (a lone </s>) padded to each prompt's OWN length, lengths (B,) in tokens.

    -> ids (B, S), attention mask (B, S) for T5 and the pooled vector: the </s> alone; visible mask (B, S) for the
    flow: the row's own length, as in the official sampler, where one prompt is its own batch; beyond it lies another
    row's padding. Used by condition dropout and by guidance. `size` sets S, default the longest.
    """
    size = size or int(lengths.max())
    positions = torch.arange(size, device=lengths.device)                                       # (S,)
    ids = (positions == 0).long().mul(END).expand(len(lengths), size).clone()                   # PAD is 0
    attention = (positions == 0).expand(len(lengths), size).clone()
    return ids, attention, positions < lengths[:, None]
