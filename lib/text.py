"""Text: a T5 encoder with its tokenizer, and the toy's; tables; what a velocity is conditioned on.

    encoder = TextEncoder.load("checkpoints/toy/base/text_encoder")
    ids, mask = encoder.tokenize(["a violin followed by rain"])
    hidden = encoder.encode(ids, mask)

Letters: B batch, S text tokens, T width of the text encoder.
"""
import csv
import difflib
import io
import json
import math
import os
import re
import string
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from lib.audio import usable
from lib.common import UserError, markdown, read_json, reading, warn, write_json, write_text
from lib.weights import (check_finite, fetch, find_weights, load_weights, model_folder, resolve,
                         save_tensors, weights_hash)

PAD, END, UNKNOWN = 0, 1, 2                                 # as in T5
MAX_TOKENS = 64                     # the official training length (its sampler uses 512)
PUNCTUATION = ",.;:!?'\"-()&"
WORD = rf"\w+|[^\w\s{re.escape(string.punctuation)}]+"      # a word, or symbols such as emoji
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TIED = ("shared.weight", "encoder.embed_tokens.weight")     # one tensor of T5 under two names
HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"]


class TextEncoder(nn.Module):
    """A `T5EncoderModel` and a `tokenizers.Tokenizer`. In train() mode `encode` keeps gradients."""

    def __init__(self, t5, tokenizer, max_tokens=MAX_TOKENS):
        super().__init__()
        self.t5 = t5
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.width = t5.config.d_model
        tokenizer.no_padding()              # padding happens in `tokenize`, to the longest prompt

    def tokenize(self, prompts, max_length=None):
        """Prompts -> ids (B, S) long, mask (B, S) bool; beyond max_length cut, with a warning."""
        max_length = max_length or self.max_tokens
        self.tokenizer.enable_truncation(max_length)
        encodings = self.tokenizer.encode_batch([well_formed(prompt) for prompt in prompts])
        cut = sum(bool(encoding.overflowing) for encoding in encodings)
        if cut:
            warn(f"{cut} of {len(prompts)} prompts cut to {max_length} tokens")
        return pad_tokens([encoding.ids for encoding in encodings], PAD)

    def encode(self, ids, mask):
        """ids, mask (B, S) -> hidden (B, S, T) on the encoder's device; each row as if alone."""
        device = self.t5.device
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return self.t5(ids.to(device), mask.to(device)).last_hidden_state

    def save(self, folder, dtype=torch.float32):
        """Write the folder that `load` and transformers' from_pretrained both read."""
        folder = Path(folder)
        tensors = self.t5.state_dict()
        del tensors[TIED[1]]                # stored once, as T5 checkpoints do
        for name, tensor in tensors.items():
            tensors[name] = check_finite(tensor.to(dtype), f"text encoder: {name}")
        save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        self.tokenizer.no_truncation()
        write_text(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_tokens,
            "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})
        config = self.t5.config.to_dict()
        write_json(folder / "config.json", {**config, "architectures": ["T5EncoderModel"]})

    @classmethod
    def load(cls, folder, weights=None):
        """Read a folder in Hugging Face layout, but no decoder. weights: in place of its own.
        Prompts are cut where tokenizer_config.json says (FLAN-T5: 512 tokens; more than 100,000 is
        no limit), else at 64. Raises UserError."""
        folder = Path(folder)
        config = read_json(folder / "config.json", dict)
        weights = weights or find_weights(folder, "model.safetensors")
        decoder = ("decoder.", "lm_head.")
        names = {name: name for name in weights if not name.startswith(decoder)}
        names[TIED[0]] = names.pop(TIED[1], TIED[0])        # the tied pair is read once
        path = folder / "tokenizer_config.json"
        with reading(folder, "take the config.json and weights of one T5 encoder"):
            if config.get("num_layers", 0) > len(names):    # each block costs memory, even empty
                raise ValueError(f"num_layers is {config['num_layers']}")
            with torch.device("meta"):      # no random numbers are drawn in vain
                t5 = make_t5(**config)
            load_weights(t5, weights.renamed(names), TIED[1:], torch.float32)
            t5.encoder.embed_tokens = t5.shared         # memory parts the tied pair
            limit = read_json(path).get("model_max_length") if path.is_file() else None
            limit = limit if limit and limit <= 1e5 else MAX_TOKENS
        return cls(t5, read_tokenizer(folder), limit).eval()


def load_text_encoder(name):
    """The text encoder of a model folder, of a folder of its own, or of a hub id."""
    files = [*HUB_FILES, "model.safetensors"]
    folder, _ = resolve(model_folder(name, files), "text_encoder")
    inner = folder / "text_encoder"
    return TextEncoder.load(inner if inner.is_dir() else folder)


def text_place(folder, name):
    """The folder of a text encoder in a model folder: text_encoder/ or `name`; None: on the hub."""
    return next(filter(Path.is_dir, (folder / "text_encoder", folder / name)), None)


def text_hash(folder, name):
    """What a record calls a model's text encoder: a hash of its weights; else its hub id `name`."""
    place = text_place(resolve(folder, "text_encoder")[0], name)
    return weights_hash(place, "model.safetensors") if place else name


def load_text(folder, config, weights):
    """The text encoder in text_encoder/, else in the folder or hub id that text_encoder_name gives.
    weights: those inside tangoflux.safetensors or None; with them the hub gives no others."""
    name = config["text_encoder_name"]
    if place := text_place(folder, name):
        return TextEncoder.load(place)
    if not re.fullmatch(r"[\w-][^/]*/.+", name):
        raise UserError(f"{folder / name} is missing; a model folder needs its text_encoder/")
    files = HUB_FILES if weights else [*HUB_FILES, "model.safetensors"]
    place = fetch(name, files, f"put its files into {folder / 'text_encoder'}")
    return TextEncoder.load(place, weights)


def warn_of_unknown_words(text, prompts, sounds):
    """One warning for all words that the toy's tokenizer has no piece for (it spells them),
    the nearest that it has, and the prompts that they stand in."""
    tokenizer = text.tokenizer
    tokenizer.no_truncation()
    spelling = {UNKNOWN, *map(tokenizer.token_to_id, BYTES)}
    known = [piece.lstrip("▁") for piece in tokenizer.get_vocab() if len(piece) > 3]
    unknown, shown = {}, []     # {word: the first prompt that holds it}
    for prompt in map(well_formed, prompts):
        words = re.findall(WORD, prompt)
        for word, pieces in zip(words, tokenizer.encode_batch(words, add_special_tokens=False)):
            if spelling & set(pieces.ids):
                unknown.setdefault(word, prompt)
    words = sorted(unknown)[:8]
    holders = [f'"{prompt[:80]}"' for prompt in dict.fromkeys(map(unknown.get, words))]
    for word in words:
        near = difflib.get_close_matches(word.lower(), known, 1, 0.75)
        shown.append(f"{word[:40]} (did you mean {near[0]}?)" if near else word[:40])
    if shown:
        warn(f"this model has no words for: {', '.join(shown)}. They stand in "
             f"{', '.join(holders)}. The bundled ones know these sounds: {', '.join(sounds)}. "
             "For all else: --checkpoint declare-lab/TangoFlux")


def well_formed(prompt):
    """The prompt with "?" in place of lone surrogates (broken bytes of a command line)."""
    return prompt.encode("utf-8", "replace").decode()


def pad_tokens(rows, pad):
    """Lists of token ids -> ids (B, S) long, padded to the longest, and mask (B, S) bool."""
    rows = [torch.tensor(row) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])                          # (B,)
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)               # (B, S)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def make_t5(**config):
    """A T5EncoderModel. Importing transformers takes seconds, so it happens here."""
    from transformers.models.t5 import configuration_t5, modeling_t5
    return modeling_t5.T5EncoderModel(configuration_t5.T5Config(**config))


def read_tokenizer(folder):
    """tokenizer.json read directly (quick), else through transformers. Raises UserError."""
    path = Path(folder) / "tokenizer.json"
    with reading(folder, "it needs a usable tokenizer.json"):
        if path.is_file():
            from tokenizers import Tokenizer
            return Tokenizer.from_file(str(path))
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer


# ----------------------------------------------------------------------------- tables of captions

# hundreds of digits become infinity, which no column takes: Python refuses some thousands
read_object = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) < 300 else float(n)).decode


def next_row(table):
    """The next row of a csv.DictReader, None at its end; in the place of a torn row its error."""
    try:
        return next(table, None)
    except csv.Error as error:
        return error


def read_row(named):
    """(its name, a row as a dict, JSON or csv.Error) -> the dict. Raises UserError."""
    name, row = named
    with reading(name, "mend or delete it"):
        if isinstance(row, Exception):
            raise row
        row = read_object(row) if isinstance(row, str) else row
        if not isinstance(row, dict) or None in row:    # None: csv's mark of too many fields
            raise ValueError("it is no object, or longer than the header (quote its commas)")
        json.dumps(row, ensure_ascii=False).encode()    # fails on half a character (a surrogate)
        return row


def read_table(path):
    """[(its name, row)] of a .csv file, of JSON (a list, or an object a line), or of a .txt file
    with a prompt a line. Bad rows are named and counted. Raises UserError."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv", ".txt"):
        raise UserError(f"{path} must be a .jsonl, .json or .csv file, or .txt with prompts")
    with reading(path):
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no file")
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path} line {line} holds the byte {error.object[error.start]:#x}, "
                            "which is not UTF-8; save the file as UTF-8") from error
        if suffix == ".csv":
            table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            table.fieldnames = [name.strip() for name in table.fieldnames or []]
            rows = table.fieldnames and list(iter(partial(next_row, table), None))
        elif suffix == ".txt":
            rows = [{"prompt": line} for line in text.splitlines() if line.strip()]
        elif text.lstrip().startswith("["):
            rows = read_object(text)
            rows = [row if isinstance(row, dict) else [row] for row in rows]
        else:
            rows = map(str.strip, text.split("\n"))
    named = [(f"{path} row {i}", row) for i, row in enumerate(rows or [], 1) if row != ""]
    if not named:
        raise UserError(f"{path} holds no rows; write one a line")
    return [(name, row) for (name, _), row in usable(named, read_row, f"rows of {path}")]


def number(value, digits, sign=""):
    """A number of a table, "-" for NaN; never "-0.000"."""
    return "-" if value != value else f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def print_row(bar, row, stopped):
    """Print a row of a log and flush it. Where nobody reads any more (Ctrl-C ends a pipe's reader
    as well) the loop with `stopped`, the list of stop_on_signal, goes on until it has saved."""
    shown = [f"{name} {value:.4g}" for name, value in row.items() if not isinstance(value, list)]
    bar.clear()
    try:
        print("  ".join(shown), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        stopped.append("stdout")


def tables(heads, rows):
    """A Markdown table; wider than 100 characters, its halves, each with the first column."""
    table = markdown(heads, rows)
    if len(heads) < 3 or table.index("\n") <= 100:
        return table
    middle = len(heads) // 2 + 1
    left = tables(heads[:middle], [row[:middle] for row in rows])
    rest = [row[:1] + row[middle:] for row in rows]
    return f"{left}\n\n{tables(heads[:1] + heads[middle:], rest)}"


# ----------------------------------------------------------------------------- the toy encoder

def make_tokenizer(words, special=("<pad>", "</s>", "<unk>"), template="$A </s>"):
    """Whole words as pieces, all else in UTF-8 bytes: no caption is out of reach. Lower case, NFKC.
    Ids: the `special` tokens in their order (T5's: 0 <pad>, 1 </s>, 2 <unk>, the last never used),
    256 bytes, a space mark, the words. template: where special tokens stand around a text $A."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated"),
        pre_tokenizers.Metaspace("▁", prepend_scheme="always")])
    text = normalizer.normalize_str(" ".join([*words, *PUNCTUATION]))
    split = {piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)}
    # equal scores: the fewest pieces win; bytes (10 below the lowest score) are the last resort
    pieces = dict.fromkeys([*special, *BYTES, "▁", *sorted(split)], -1.0)
    unigram = models.Unigram([*pieces.items()], special.index("<unk>"), byte_fallback=True)
    tokenizer = Tokenizer(unigram)
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    around = [(piece, special.index(piece)) for piece in special if piece in template]
    tokenizer.post_processor = processors.TemplateProcessing(template, None, around)
    return tokenizer


def make_text_encoder(words, width=128, layers=2, heads=4, d_ff=256, seed=0):
    """A small T5 encoder (gated GELU, as FLAN-T5) with random weights that knows `words`."""
    tokenizer = make_tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        t5 = make_t5(vocab_size=tokenizer.get_vocab_size(), d_model=width, d_kv=width // heads,
                     d_ff=d_ff, num_layers=layers, num_heads=heads, feed_forward_proj="gated-gelu",
                     dropout_rate=0.0, pad_token_id=PAD, eos_token_id=END)
    look_both_ways(t5.encoder.block[0].layer[0].SelfAttention)
    return TextEncoder(t5, tokenizer)


@torch.no_grad()
def look_both_ways(attention):
    """Start T5's position biases so that half the heads look back and half look ahead.
    Word order reaches the flow through these alone, and T5 starts them near 0: until Adam has moved
    them, a thousandth a step, captions are bags of words. Here a head's bias falls by 0.5 a token
    (phrases) or 2 (the neighbour) to one side, down to -5, and is -5 on the other side."""
    table = attention.relative_attention_bias.weight            # (buckets, heads)
    buckets, heads = table.shape
    slope = torch.tensor([-0.5, 0.5, -2, 2]).repeat(heads)[:heads]
    furthest = attention.relative_attention_max_distance
    for offset in sorted(range(-furthest, furthest + 1), key=abs):  # a bucket's furthest stays
        place = torch.tensor(offset)
        bucket = attention._relative_position_bucket(place, True, buckets, furthest)
        fall = place * slope                                    # (heads,)
        table[bucket] = torch.where(fall >= 0, -fall.abs(), -5).clamp(min=-5)


# ----------------------------------------------------------------------------- conditions

class Condition(NamedTuple):
    """What a velocity is conditioned on. One row per latent."""
    text: torch.Tensor                  # (B, S, T) hidden states of the text encoder
    mask: torch.Tensor | None           # (B, S) bool: what the transformer may see; None: all
    pooled_mask: torch.Tensor           # (B, S) 1 = real token: what the pooled vector averages
    duration: torch.Tensor              # (B,) seconds
    score: torch.Tensor | None = None   # (B,) NaN = none; None: none for all rows


def encode_prompts(text_encoder, prompts, duration, score=None):
    """Prompts, seconds (B,), perhaps scores (B,) -> Condition; no row sees another's padding."""
    ids, mask = text_encoder.tokenize(prompts)                                  # (B, S)
    hidden = text_encoder.encode(ids, mask)                                     # (B, S, T)
    return moved(Condition(hidden, mask, mask, duration, score), hidden.device)


def null_score(like):
    """The one null of the score, in dropout and guidance: NaN (B,) for the rows of `like`."""
    return torch.full((len(like),), math.nan, device=like.device)


def null_tokens(lengths):
    """The one null text, "" (a lone </s>), padded to each prompt's OWN length (B,) -> ids (B, S);
    attention mask (B, S) for T5 and the pooled vector: the </s> alone; visible mask (B, S) for the
    flow: the row's own length, as the official sampler, a prompt at a time, has it."""
    positions = torch.arange(int(lengths.max()), device=lengths.device)         # (S,)
    attention = (positions == 0).repeat(len(lengths), 1)                        # (B, S)
    return attention.long() * END, attention, positions < lengths[:, None]      # PAD is 0


def null_condition(text_encoder, condition, prompt=""):
    """The unconditional branch: the null text "" (or a negative prompt), no score, same duration.
    The null is padded to each row's own length (official), with the tokens of `null_tokens`."""
    ids, mask = text_encoder.tokenize([prompt])                                 # (1, S')
    lengths = condition.pooled_mask.sum(1).clamp(min=ids.shape[1])              # (B,)
    padding = 0, max(0, condition.text.shape[1] - ids.shape[1])
    mask = F.pad(mask, padding).expand(len(lengths), -1).to(lengths.device)     # (B, S)
    hidden = text_encoder.encode(F.pad(ids, padding).expand_as(mask), mask)     # (B, S, T)
    visible = score = None
    if condition.mask is not None:
        visible = torch.arange(mask.shape[1], device=lengths.device) < lengths[:, None]
    if condition.score is not None:
        score = null_score(condition.score)
    return Condition(hidden, visible, mask, condition.duration, score)


def moved(condition, device, rows=slice(None)):
    """A condition, or the part `rows` (a slice or an index) of it, on `device`."""
    parts = [part if part is None else part[rows].to(device) for part in condition]
    return Condition(*parts)


def joined(first, second):
    """Tensors (B, ...) as one batch, (B, S, ...) with zeros up to the longer S; None stays."""
    if first is None:
        return None
    if first.ndim == 1:
        return torch.cat([first, second])
    return pad_sequence([*first, *second], batch_first=True)


def concat_conditions(first, second):
    """Stack two conditions along the batch. Unequal S is padded, invisibly, so needs masks."""
    if first.text.shape[1] != second.text.shape[1] and (first.mask is None or second.mask is None):
        raise ValueError("conditions without a mask must have the same number of tokens")
    return Condition(*map(joined, first, second))
