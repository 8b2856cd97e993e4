"""lib/text.py: T5 against the original, tokens, folders that transformers reads, and the one null text."""
import pytest
import torch
from conftest import refused, relative_error

from lib.text import (END, TIED, TextEncoder, load_text, look_both_ways, make_t5, make_text_encoder, make_tokenizer,
                      warn_of_unknown_words)
from lib.weights import load_tensors, save_tensors

WORDS = ["rain", "a", "violin", "followed", "by", "then", "wind", "church-organ", "beeps", "and", "three"]


@pytest.fixture
def encoder():
    return make_text_encoder(WORDS, width=16, layers=1, heads=2, d_ff=24, seed=3).eval()


def test_text_encoder_matches_the_original(parity):
    fixture = parity("tangoflux_tiny")
    tensors = fixture.load("tangoflux_tiny_t5")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = tensors[f"{attention}.relative_attention_bias.weight"].shape
    vocabulary, width = tensors["shared.weight"].shape
    t5 = make_t5(
        vocab_size=vocabulary, d_model=width, num_heads=heads, relative_attention_num_buckets=buckets,
        d_ff=tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1], feed_forward_proj="gated-gelu",
        d_kv=tensors[f"{attention}.q.weight"].shape[0] // heads,
        num_layers=sum(name.endswith("SelfAttention.q.weight") for name in tensors)).eval()
    t5.load_state_dict(tensors)
    hidden = TextEncoder(t5, make_tokenizer(["a"])).eval().encode(
        fixture.tensors["text.input_ids"], fixture.tensors["text.mask"])
    assert relative_error(hidden, fixture.tensors["text.hidden"]) < 1e-5


def test_any_string_becomes_tokens_that_end_once(encoder, capsys):
    strings = ["", " ", "rain", "RAIN, then   Violin!", "狗叫", "🎻🎻", "</s><pad><unk><0x41>", "\x00\ud800",
               "é ﬁ Ａ", "a" * 50]
    ids, mask = encoder.tokenize(strings)
    assert ids.dtype == torch.long and mask.dtype == torch.bool
    for row, valid in zip(ids, mask):
        real = row[valid].tolist()
        assert real[-1] == END and END not in real[:-1] and not {0, 2} & set(real) and not row[~valid].any()
    assert mask[0].sum() == mask[1].sum() == 1                   # empty and blank prompts are the lone </s>
    words = encoder.tokenize(["a violin, then rain"])[0]
    assert words.shape[1] == 6                                   # five pieces and </s>
    assert torch.equal(words, encoder.tokenize(["A  VIOLIN , then rain"])[0])
    assert capsys.readouterr().err == ""


def test_long_prompts_are_cut_and_unknown_words_told(encoder, capsys):
    ids, _ = encoder.tokenize(["rain " * 2000, "rain"])
    assert ids.shape == (2, 64) and ids[0, -1] == END
    assert capsys.readouterr().err.startswith("warning: 1 of 2 prompts cut to 64 tokens")
    assert [encoder.tokenize(["rain rain rain"], size)[0].shape[1] for size in (3, None)] == [3, 4]
    warn_of_unknown_words(encoder, ["a Violin, then zebra; rain", "& zebra 雨 🎻! and beeps"], ["rain"])
    told = capsys.readouterr().err
    assert 'no words for: zebra, 雨, 🎻. They stand in "a Violin, then zebra; rain", "& zebra 雨 🎻! and beeps".' in told
    assert "The bundled ones know these sounds: rain." in told and "mean" not in told
    warn_of_unknown_words(encoder, ["rain", "a Viollin and rein", "a viol"], ["rain"])
    told = capsys.readouterr().err
    assert "no words for: Viollin (did you mean violin?), rein (did you mean rain?), viol (did you mean violin?)." in told
    assert 'They stand in "a Viollin and rein", "a viol".' in told
    warn_of_unknown_words(encoder, ["A church-organ (followed by) RAIN...", ""], ["rain"])
    assert capsys.readouterr().err == ""


def test_a_new_text_encoder_tells_word_order_apart():
    """The flow has no positions of text: "wind then rain" and "rain then wind" must differ as SETS of vectors."""
    encoder = make_text_encoder(WORDS, width=64, layers=2, heads=4, d_ff=64, seed=3).eval()

    def apart():
        ids, mask = encoder.tokenize(["wind then rain", "rain then wind"])
        first, second = encoder.encode(ids, mask)
        return ((first[0] - second[2]).norm() / first[0].norm()).item()     # "wind", said first or last
    attention = encoder.t5.encoder.block[0].layer[0].SelfAttention
    biases = attention.relative_attention_bias.weight
    started = apart()
    with torch.no_grad():
        biases.zero_()
    assert apart() < 1e-5 and started > 0.1
    look_both_ways(attention)
    assert biases[3].tolist() == [-1.5, -5, -5, -5]                         # 3 tokens back
    assert biases[16 + 2].tolist() == [-5, -1, -5, -4]                      # 2 tokens ahead


def test_text_encoder_keeps_gradients_only_in_train_mode(encoder):
    ids, mask = encoder.tokenize(["rain"])
    assert not encoder.encode(ids, mask).requires_grad and encoder.train().encode(ids, mask).requires_grad
    before = torch.get_rng_state()
    twin = make_text_encoder(WORDS, width=16, layers=1, heads=2, d_ff=24, seed=3)
    assert torch.equal(twin.encode(ids, mask), encoder.encode(ids, mask))
    assert torch.equal(before, torch.get_rng_state())


def test_text_folder_reads_in_transformers_and_here(tmp_path, encoder):
    from transformers import AutoTokenizer, T5EncoderModel
    encoder.max_tokens = 40
    encoder.save(tmp_path)
    theirs, tokenizer = T5EncoderModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = encoder.tokenize(["a violin followed by zebra 雨"])
    assert tokenizer(["a violin followed by zebra 雨"])["input_ids"] == ids.tolist()
    hidden = encoder.encode(ids, mask)
    with torch.no_grad():
        assert relative_error(theirs(ids, mask).last_hidden_state, hidden) < 1e-6
    weights = load_tensors(tmp_path / "model.safetensors")       # of a whole T5 the decoder is left out
    more = {name: torch.ones(1) for name in ("decoder.x", "lm_head.weight")}
    save_tensors(tmp_path / "model.safetensors", {TIED[1]: weights.pop(TIED[0]), **weights, **more})
    again = load_text(tmp_path.parent, {"text_encoder_name": tmp_path.name}, None)
    assert torch.equal(again.encode(ids, mask), hidden) and again.max_tokens == 40
    assert again.t5.encoder.embed_tokens is again.t5.shared


@pytest.mark.parametrize("name, text, match", [
    ("config.json", None, "config.json is missing"), ("tokenizer_config.json", "[]", "cannot be used"),
    ("config.json", '{"d_model": "wide"}', "cannot be used"), ("config.json", '{"num_layers": 1000000000}', "num_layers is 1000000000"),
    ("config.json", '{"num_layers": 1, "d_model": 8000000}', r"does not fit its config in \d+ names"), ("tokenizer.json", "{}", "tokenizer.json"),
    ("model.safetensors", None, "is missing")])
def test_broken_folders_are_told(tmp_path, encoder, name, text, match, monkeypatch):
    encoder.save(tmp_path)
    if name == "config.json":                                   # before anything large is allocated
        monkeypatch.delattr(torch.nn.Module, "to_empty")
    (tmp_path / name).unlink()
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(match, TextEncoder.load, tmp_path)


@pytest.mark.parametrize("name", ["/etc/nothing", "../t5"])
def test_a_model_folder_without_text_encoder_is_told(tmp_path, name):
    refused("needs its text_encoder", load_text, tmp_path, {"text_encoder_name": name}, None)
