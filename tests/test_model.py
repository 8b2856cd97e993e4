"""model.py and text.py: the official numbers, the masks, the null, the tokenizer, and model folders good and bad."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import PARITY, ROOT, relative_error

import model as model_file
from common import UserError, load_exactly, load_tensors, read_json, save_tensors, write_json
from model import (PRESETS, Condition, TangoFlux, check_config, concat_conditions, encode_prompts, load_model,
                   null_condition, replace_rows, save_model)
from text import END, TextEncoder, empty_t5, make_text_encoder, make_tokenizer, null_tokens

WORDS = "a violin followed by rain and then three beeps church-organ".split()
SMALL = dict(num_layers=1, num_single_layers=1, in_channels=6, attention_head_dim=12, num_attention_heads=2,
             joint_attention_dim=16, audio_seq_len=9, max_duration=4.0, axes_dims_rope=[4, 4, 4])


def random_flow(config=SMALL, seed=0):
    """A flow whose zero-initialised layers are redrawn, so that every path changes the output."""
    flow = TangoFlux(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return flow


@pytest.fixture(scope="module")
def encoder():
    return make_text_encoder(WORDS, width=16, layers=1, heads=2, d_ff=24, seed=3).eval()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- the original's numbers

@pytest.mark.parametrize("name", ["tangoflux_tiny", "tangoflux_heads2"])
def test_network_matches_the_original(parity, name):
    fixture = parity(name)
    given, heads = fixture.tensors, fixture.info["config"]["num_attention_heads"]
    flow = TangoFlux(fixture.info["config"]).eval()
    load_exactly(flow, fixture.weights, name)
    condition = Condition(given["text.hidden"], None, given["text.mask"], given["text.duration"])
    seen = {}
    network = flow.transformer
    hooks = {"temb": network.time_text_embed, "x_embed": network.x_embedder,
             "context_embed": network.context_embedder}
    hooks |= {f"double{i}": block for i, block in enumerate(network.transformer_blocks)}
    hooks |= {f"single{i}": block for i, block in enumerate(network.single_transformer_blocks)}
    for key, module in hooks.items():
        module.register_forward_hook(lambda _, __, out, key=key: seen.__setitem__(key, out))

    velocity = flow.velocity(given["forward.latents"], given["forward.t"], condition)
    text, pooled, mask = flow.condition_inputs(condition)
    for key in [key for key in seen if key.startswith("single")]:
        seen[key] = seen[key].split([text.shape[1], velocity.shape[1]], dim=1)
    for key in [key for key in seen if key.startswith(("double", "single"))]:
        seen[f"{key}.text"], seen[f"{key}.audio"] = seen.pop(key)
    cos, sin = model_file.rope_tables(text.shape[1], velocity.shape[1], network.axes, "cpu")
    signs = torch.tensor([-1.0, 1.0]).repeat(cos.shape[1] // 2)  # our sin table carries the sign of the rotation
    seen |= {"velocity": velocity, "rope_cos": cos, "rope_sin": sin * signs}

    expected = {key.removeprefix("forward."): value for key, value in given.items() if key.startswith("forward.")}
    assert set(seen) == set(expected) - {"latents", "t"}         # every stored intermediate value is compared
    for key, value in seen.items():
        assert relative_error(value, expected[key]) < 1e-5, key
    assert mask is None and heads == network.transformer_blocks[0].attn.heads
    assert relative_error(pooled, given["text.pooled_projection"]) < 1e-5
    assert relative_error(text, given["text.encoder_hidden_states"]) < 1e-5
    assert relative_error(flow.duration_emebdder(condition.duration), given["text.duration_embedding"]) < 1e-5
    average = []
    flow.fc.register_forward_pre_hook(lambda _, arguments: average.append(arguments[0]))
    flow.condition_inputs(condition)
    assert relative_error(average[0], given["text.pooled_before_fc"]) < 1e-5


def test_text_encoder_matches_the_original(parity):
    fixture = parity("tangoflux_tiny")
    tensors = fixture.load("tangoflux_tiny_t5")
    bias = tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    config = dict(
        vocab_size=tensors["shared.weight"].shape[0], d_model=tensors["shared.weight"].shape[1],
        d_ff=tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"].shape[1], num_heads=bias.shape[1],
        d_kv=tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // bias.shape[1],
        relative_attention_num_buckets=bias.shape[0], feed_forward_proj="gated-gelu",
        num_layers=sum(name.endswith("SelfAttention.q.weight") for name in tensors))
    t5 = empty_t5(config, torch.float32).eval()
    load_exactly(t5, {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}, "tiny T5")
    encoder = TextEncoder(t5, make_tokenizer(["a"])).eval()
    hidden = encoder.encode(fixture.tensors["text.input_ids"], fixture.tensors["text.mask"])
    assert relative_error(hidden, fixture.tensors["text.hidden"]) < 1e-5


def test_full_size_has_the_official_names_and_parameters():
    if not PARITY.is_dir():
        pytest.skip("the parity fixtures are not beside this checkout")
    official = json.loads((PARITY / "tangoflux_keys.json").read_text())
    with torch.device("meta"):
        flow = TangoFlux(PRESETS["tangoflux"])
        also = TangoFlux(official["config"])                     # lacks axes_dims_rope: has the default
    ours = {name: list(tensor.shape) for name, tensor in flow.state_dict().items()}
    assert ours == official["keys"] and len(ours) == official["num_keys"]
    assert sum(p.numel() for p in flow.parameters()) == official["params"]["total"] == 518_009_536
    for part in ("transformer", "fc", "duration_emebdder"):
        assert sum(p.numel() for p in getattr(flow, part).parameters()) == official["params"][part]
    assert also.transformer.axes == flow.transformer.axes


def test_network_matches_diffusers():
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel
    config = {**SMALL, "num_layers": 2, "num_single_layers": 2}
    theirs = FluxTransformer2DModel(
        num_layers=2, num_single_layers=2, in_channels=6, attention_head_dim=12, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=False,
        axes_dims_rope=(4, 4, 4)).eval()
    flow = random_flow(config)
    theirs.load_state_dict(flow.transformer.state_dict())
    latents, text, pooled = noise(3, 7, 6), noise(3, 5, 16, seed=1), noise(3, 16, seed=2)
    t = torch.tensor([0.1, 0.6, 1.0])
    with torch.no_grad():
        ours = flow.transformer(latents, t, text, pooled)
        ids = torch.arange(7.0)[:, None].expand(7, 3)
        other = theirs(latents, text, pooled, t, txt_ids=torch.zeros(5, 3), img_ids=ids, return_dict=False)[0]
    assert relative_error(ours, other) < 1e-5


# ----------------------------------------------------------------------------- conditioning

def test_a_row_never_sees_another_rows_padding(encoder):
    flow = random_flow()
    prompts = ["rain", "a violin followed by rain and then three beeps", "zzz 雨", "rain"]
    latents, t, seconds = noise(4, 9, 6), torch.tensor([0.2, 0.5, 0.9, 0.2]), torch.tensor([1.0, 2.0, 3.0, 1.0])
    with torch.no_grad():
        batch = encode_prompts(encoder, prompts, seconds)
        both = flow.velocity(latents, t, batch), flow.velocity(latents, t, null_condition(encoder, batch))
        for row, prompt in enumerate(prompts):
            alone = encode_prompts(encoder, [prompt], seconds[row:row + 1])
            length = alone.text.shape[1]
            assert (alone.text - batch.text[row, :length]).abs().max() < 1e-5
            for together, condition in zip(both, (alone, null_condition(encoder, alone))):
                single = flow.velocity(latents[row:row + 1], t[row:row + 1], condition)
                official = flow.velocity(latents[row:row + 1], t[row:row + 1], condition._replace(mask=None))
                assert relative_error(together[row:row + 1], single) < 1e-5
                assert relative_error(single, official) < 1e-5   # alone, the mask changes nothing
        shown = flow.velocity(latents, t, batch._replace(mask=None))
    assert relative_error(shown[:1], both[0][:1]) > 1e-3         # without the mask the padding is visible
    assert shown.isfinite().all()


def test_null_is_the_empty_text_at_each_rows_own_length(encoder):
    ids, attention, visible = null_tokens(torch.tensor([3, 1, 5]))
    assert ids.tolist() == [[END, 0, 0, 0, 0]] * 3
    assert attention.sum(1).tolist() == [1, 1, 1] and visible.sum(1).tolist() == [3, 1, 5]
    condition = encode_prompts(encoder, ["rain", "three beeps"], torch.tensor([1.0, 2.0]))
    null = null_condition(encoder, condition)
    empty = encode_prompts(encoder, [""], torch.tensor([1.0]))
    assert relative_error(null.text[0, :1], empty.text[0]) < 1e-5
    assert torch.equal(null.duration, condition.duration) and torch.equal(null.mask, condition.mask)
    assert null_condition(encoder, condition._replace(mask=None)).mask is None
    flow = random_flow()
    pooled = flow.condition_inputs(null)[1]
    assert relative_error(pooled, flow.condition_inputs(empty)[1].expand(2, -1)) < 1e-5
    assert torch.equal(null_tokens(torch.tensor([2]), size=4)[2], torch.tensor([[True, True, False, False]]))


def test_conditions_are_mixed_and_stacked_by_row(encoder):
    condition = encode_prompts(encoder, ["rain", "three beeps"], torch.tensor([1.0, 2.0]))
    null = null_condition(encoder, condition)
    mixed = replace_rows(condition, torch.tensor([False, True]), null)
    for field, ours, theirs in zip(mixed[:4], condition, null):
        assert torch.equal(field[0], ours[0]) and torch.equal(field[1], theirs[1])
    open_rows = replace_rows(condition._replace(mask=None), torch.tensor([True, True]), null._replace(mask=None))
    assert open_rows.mask is None
    longer = encode_prompts(encoder, ["a violin and rain and beeps"], torch.tensor([3.0]))
    stacked = concat_conditions(longer, condition)
    flow, latents, t = random_flow(), noise(3, 9, 6), torch.full((3,), 0.4)
    with torch.no_grad():
        apart = torch.cat([flow.velocity(latents[:1], t[:1], longer), flow.velocity(latents[1:], t[1:], condition)])
        assert relative_error(flow.velocity(latents, t, stacked), apart) < 1e-5
    with pytest.raises(ValueError, match="mask"):
        concat_conditions(longer._replace(mask=None), condition._replace(mask=None))


def test_duration_is_clamped_and_audio_length_is_free():
    flow = random_flow()
    embed = flow.duration_emebdder
    assert torch.equal(embed(torch.tensor([99.0, -1.0])), embed(torch.tensor([4.0, 0.0])))
    text = Condition(noise(1, 3, 16), None, torch.ones(1, 3), torch.ones(1))
    for frames in (1, 20):
        assert flow.velocity(noise(1, frames, 6), torch.ones(1), text).shape == (1, frames, 6)


def test_16_bit_training_path_agrees_with_float32():
    """On a CPU the attention of autocast training is written out: same numbers, and gradients everywhere."""
    flow = random_flow()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    condition = Condition(noise(2, 3, 16), mask, mask, torch.ones(2))
    arguments = noise(2, 9, 6), torch.tensor([0.3, 0.8]), condition
    exact = flow.velocity(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        half = flow.velocity(*arguments)
    half.float().square().mean().backward()
    assert relative_error(half.float(), exact) < 0.05
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_fresh_network_predicts_zero_and_learns_from_there():
    flow = TangoFlux(SMALL)
    condition = Condition(noise(1, 3, 16), None, torch.ones(1, 3), torch.ones(1))
    out = flow.velocity(noise(1, 9, 6), torch.ones(1), condition)
    assert not out.any()
    (out - 1).square().mean().backward()
    assert flow.transformer.proj_out.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------- tokenizer

def test_every_string_becomes_ids_that_end_and_hold_no_unknown(encoder, capsys):
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


def test_long_prompts_are_cut_with_a_warning(encoder, capsys):
    ids, _ = encoder.tokenize(["rain " * 2000, "rain"])
    assert ids.shape == (2, 64) and ids[0, -1] == END
    assert capsys.readouterr().err.startswith("warning: 1 of 2 prompts cut to 64 tokens")
    assert encoder.tokenize(["rain rain rain"], max_length=3)[0].shape[1] == 3
    assert encoder.tokenize(["rain rain rain"])[0].shape[1] == 4


def test_unknown_words_in_order_and_once(encoder):
    assert encoder.unknown_words("a Violin, then zebra; rain & zebra 雨 🎻! and beeps") == ["zebra", "雨", "🎻"]
    assert encoder.unknown_words("A church-organ (followed by) RAIN...") == []
    assert encoder.unknown_words("") == []


def test_a_new_text_encoder_tells_word_order_apart():
    """The flow has no positions of text: "wind then rain" and "rain then wind" must differ as SETS of vectors."""
    from text import look_both_ways
    encoder = make_text_encoder(WORDS, width=64, layers=2, heads=4, d_ff=64, seed=3).eval()

    def apart():
        ids, mask = encoder.tokenize(["wind then rain", "rain then wind"])
        first, second = encoder.encode(ids, mask)
        return ((first[0] - second[2]).norm() / first[0].norm()).item()     # "wind", said first or last
    biases = encoder.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    started = apart()
    with torch.no_grad():
        biases.zero_()
    assert apart() < 1e-5 and started > 0.1
    look_both_ways(encoder.t5.encoder.block[0].layer[0].SelfAttention)
    assert apart() == pytest.approx(started, rel=1e-3)
    assert biases[3].tolist() == [-1.5, -5, -5, -5]                         # 3 tokens back
    assert biases[16 + 2].tolist() == [-5, -1, -5, -4]                      # 2 tokens ahead


def test_reading_targets_say_place_and_count():
    from reading import PLACES, reading_targets
    from world import Scene, SceneEvent
    events = ["rain", "beep", "violin"]
    scenes = [Scene(0, "", "then", [SceneEvent("violin", 0, 1), SceneEvent("beep", 1, 2, count=3)], 2.0),
              Scene(1, "", "and", [SceneEvent("violin", 0, 2), SceneEvent("rain", 0, 2)], 2.0),
              Scene(2, "", "single", [SceneEvent("rain", 0, 2)], 2.0)]
    targets = reading_targets(scenes, events, ["beep"], {2: "two", 3: "three"})
    names = [f"{place} {event}" for place in PLACES for event in events] + ["2 beep", "3 beep"]
    said = [{names[i] for i in row.nonzero()[:, 0].tolist()} for row in targets]
    assert said == [{"first violin", "second beep", "3 beep"}, {"together violin", "together rain"}, {"first rain"}]


def test_an_encoder_learns_to_read():
    from reading import learn_to_read
    from world import known_words
    encoder = make_text_encoder(known_words())
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert learn_to_read(encoder, steps=2) < 0.05
    assert learn_to_read(encoder, steps=600) > 0.6           # about half of the captions need no word order
    assert torch.equal(state, torch.get_rng_state()) and not encoder.training
    assert not [name for name, tensor in encoder.state_dict().items() if torch.equal(before[name], tensor)]
    assert all(p.grad is None for p in encoder.parameters())


def test_text_encoder_keeps_gradients_only_in_train_mode(encoder):
    ids, mask = encoder.tokenize(["rain"])
    assert not encoder.encode(ids, mask).requires_grad
    encoder.train()
    assert encoder.encode(ids, mask).requires_grad
    encoder.eval()
    twin = make_text_encoder(WORDS, width=16, layers=1, heads=2, d_ff=24, seed=3).eval()
    before = torch.get_rng_state()
    assert torch.equal(twin.encode(ids, mask), encoder.encode(ids, mask))
    assert torch.equal(before, torch.get_rng_state())


# ----------------------------------------------------------------------------- folders

def test_folder_round_trip_with_references(tmp_path, encoder):
    flow = random_flow()
    save_model(tmp_path / "base", flow=flow, text=encoder, extra={"steps": 7})
    base = load_model(tmp_path / "base", parts=("flow", "text"))
    assert base.config["steps"] == 7 and base.folder == tmp_path / "base" and base.codec is None
    for name, tensor in flow.state_dict().items():
        assert torch.equal(base.flow.state_dict()[name], tensor)
    prompts = ["a violin", "zebra"]
    assert torch.equal(base.text.encode(*base.text.tokenize(prompts)), encoder.encode(*encoder.tokenize(prompts)))
    assert base.text.unknown_words("zebra rain") == ["zebra"] and not base.flow.training and not base.text.training
    assert base.text.t5.encoder.embed_tokens is base.text.t5.shared

    save_model(tmp_path / "aligned", flow=flow, references={"text_encoder": "../base"}, dtype=torch.float16)
    aligned = load_model(tmp_path / "aligned", parts=("flow", "text"))
    assert not (tmp_path / "aligned" / "text_encoder").exists()
    weight = aligned.flow.fc[0].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, flow.fc[0].weight.half().float())
    assert torch.equal(aligned.text.t5.shared.weight, base.text.t5.shared.weight)
    short = load_model(tmp_path / "aligned", dtype=torch.bfloat16, parts=("flow",)).flow
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    with torch.no_grad():                                        # 16-bit weights, float32 condition
        condition = encode_prompts(aligned.text, prompts, torch.tensor([1.0, 2.0]))
        t, latents = torch.tensor([0.3, 0.8]), noise(2, 9, 6)
        half = short.velocity(latents.bfloat16(), t, condition)
        assert relative_error(half, flow.velocity(latents, t, condition)) < 0.05
    assert not [path for path in tmp_path.rglob(".*")]           # no temporary files stay
    save_model(tmp_path / "aligned", text=encoder)               # its own text encoder now: the reference goes
    assert read_json(tmp_path / "aligned" / "config.json")["references"] == {}


def test_text_folder_reads_in_transformers(tmp_path, encoder):
    from transformers import AutoTokenizer, T5EncoderModel
    encoder.save(tmp_path)
    theirs, tokenizer = T5EncoderModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = encoder.tokenize(["a violin followed by zebra 雨"])
    assert tokenizer(["a violin followed by zebra 雨"])["input_ids"] == ids.tolist()
    with torch.no_grad():
        assert relative_error(theirs(ids, mask).last_hidden_state, encoder.encode(ids, mask)) < 1e-6


def test_official_files_with_a_text_encoder_inside(tmp_path, encoder):
    """A file that carries text_encoder.* serves both parts; a whole T5's decoder is left out."""
    flow = random_flow()
    save_model(tmp_path, flow=flow, text=encoder)
    inside = {f"text_encoder.{name}": tensor for name, tensor in encoder.t5.state_dict().items()}
    inside = {name: tensor.clone() for name, tensor in inside.items()}
    save_tensors(tmp_path / "tangoflux.safetensors", {**flow.state_dict(), **inside})
    assert load_model(tmp_path, parts=("flow",)).flow is not None
    folder = tmp_path / "text_encoder"
    weights = load_tensors(folder / "model.safetensors")
    whole = {**weights, "decoder.x": torch.ones(1), "lm_head.weight": torch.ones(1)}
    save_tensors(folder / "model.safetensors", whole)
    with pytest.raises(UserError, match="unknown decoder.x"):
        TextEncoder.load(folder)
    write_json(folder / "config.json",
               {**read_json(folder / "config.json"), "architectures": ["T5ForConditionalGeneration"]})
    assert torch.equal(TextEncoder.load(folder).t5.shared.weight, encoder.t5.shared.weight)


def saved(tmp_path, encoder):
    save_model(tmp_path / "m", flow=random_flow(), text=encoder)
    return tmp_path / "m"


def test_bad_folders_are_one_line(tmp_path, encoder):
    folder = saved(tmp_path, encoder)
    path = folder / "tangoflux.safetensors"
    whole = path.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in load_tensors(path).items()}   # not a map of the file

    def refused(match, target=folder, parts=("flow",)):
        with pytest.raises(UserError, match=match) as caught:
            load_model(target, parts=parts)
        assert "\n" not in str(caught.value).strip()

    refused("missing", tmp_path / "nowhere")
    refused("pass the model folder", path)
    path.write_bytes(whole[:len(whole) // 2])
    refused("not a whole safetensors file")
    path.write_bytes(b"")
    refused("not a whole safetensors file")
    save_tensors(path, {**tensors, "fc.0.bias": torch.zeros(3)})
    refused(r"fc.0.bias is \(3,\), expected \(16,\)")
    save_tensors(path, {**tensors, "surprise": torch.zeros(3)})
    refused("unknown surprise")
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != "fc.0.bias"})
    refused("missing fc.0.bias")
    save_tensors(path, {**tensors, "fc.0.bias": torch.full((16,), float("nan"))})
    refused("fc.0.bias holds NaN")
    path.unlink()
    refused("tangoflux.safetensors is missing")
    (folder / "tangoflux.bin").write_bytes(b"x")
    refused("tangoflux.bin is a pickle that torch's weights_only reader refuses")
    write_json(folder / "config.json", {**SMALL, "references": {"flow": "../gone"}})
    refused("gone is missing")
    write_json(folder / "config.json", {**SMALL, "references": {"flow": "../m"}})
    refused("circle")
    (folder / "config.json").write_text("{")
    refused("not readable JSON")


def test_bad_text_encoders_are_one_line(tmp_path, encoder):
    folder = saved(tmp_path, encoder)
    text = folder / "text_encoder"

    def refused(match):
        with pytest.raises(UserError, match=match):
            load_model(folder, parts=("text",))

    (text / "tokenizer.json").write_text("{}")
    refused("no usable tokenizer")
    write_json(text / "config.json", {**read_json(text / "config.json"), "d_model": 8})
    refused("does not fit its config")
    write_json(text / "config.json", {**read_json(text / "config.json"), "d_model": "wide"})
    refused("does not describe a T5 encoder")
    text.rename(folder / "elsewhere")
    write_json(folder / "config.json", {**SMALL, "text_encoder_name": "text_encoder"})
    refused("needs its text_encoder/")
    wide = make_text_encoder(["a"], width=8, layers=1, heads=2, d_ff=8)
    wide.save(folder / "text_encoder")
    refused("8 wide, but joint_attention_dim is 16")


def test_float16_overflow_is_refused(tmp_path):
    flow = random_flow()
    with torch.no_grad():
        flow.fc[0].bias[0] = 1e6
    with pytest.raises(UserError, match="fc.0.bias holds NaN or infinity"):
        save_model(tmp_path, flow=flow, dtype=torch.float16)


@pytest.mark.parametrize("change, match", [
    ({"num_layers": -1}, "num_layers is -1"), ({"in_channels": "64"}, "in_channels is '64'"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"max_duration": float("nan")}, "max_duration is nan"),
    ({"max_duration": 0}, "max_duration is 0"), ({"axes_dims_rope": [4, 4]}, "adds up to 8"),
    ({"axes_dims_rope": [3, 3, 6]}, "even widths"), ({"axes_dims_rope": 12}, "even widths"),
    ({"text_encoder_name": 5}, "text_encoder_name is 5")])
def test_bad_config_values_are_named(change, match):
    with pytest.raises(UserError, match=match):
        check_config({**SMALL, **change})
    missing = {name: value for name, value in SMALL.items() if name != "num_layers"}
    with pytest.raises(UserError, match="num_layers is None"):
        check_config(missing)


def test_importing_model_does_not_import_transformers():
    code = "import sys, model; sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
