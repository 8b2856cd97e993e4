"""model.py: the official numbers, the masks, the null, and model folders good and bad."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_layout, noise, relative_error

from lib.common import write_json, UserError, read_json
from lib.text import Condition, encode_prompts, make_text_encoder, null_condition, null_tokens
from lib.weights import read_config, save_tensors
from model import PRESETS, ModelConfig, TangoFlux, load_model, rope_tables, save_model

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


@pytest.fixture(scope="module")
def inputs():
    """x, t and a condition of two rows, the second shorter."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return noise(2, 9, 6), torch.tensor([0.3, 0.8]), Condition(noise(2, 3, 16), mask, mask, torch.tensor([1.0, 3.0]))


@pytest.mark.parametrize("name", ["tangoflux_tiny", "tangoflux_heads2"])
def test_network_matches_the_original(parity, name):
    fixture = parity(name)
    given, heads = fixture.tensors, fixture.info["config"]["num_attention_heads"]
    flow = TangoFlux(fixture.info["config"]).eval()
    flow.load_state_dict(fixture.weights)
    condition = Condition(given["text.hidden"], None, given["text.mask"], given["text.duration"])
    seen = {}
    network = flow.transformer
    hooks = {"temb": network.time_text_embed, "x_embed": network.x_embedder, "context_embed": network.context_embedder}
    hooks |= {f"double{i}": block for i, block in enumerate(network.transformer_blocks)}
    hooks |= {f"single{i}": block for i, block in enumerate(network.single_transformer_blocks)}
    for key, module in hooks.items():
        module.register_forward_hook(lambda _, __, out, key=key: seen.__setitem__(key, out))
    means = []
    flow.fc.register_forward_pre_hook(lambda _, arguments: means.append(arguments[0]))

    velocity = flow.velocity(given["forward.latents"], given["forward.t"], condition)
    text, pooled, mask, _ = flow.condition_inputs(condition)
    for key in [key for key in seen if key.startswith(("double", "single"))]:
        both = seen.pop(key)
        both = both.split([text.shape[1], velocity.shape[1]], dim=1) if key.startswith("single") else both
        seen[f"{key}.text"], seen[f"{key}.audio"] = both
    cos, sin = rope_tables(text.shape[1], velocity.shape[1], network.axes, velocity.device)
    signs = torch.tensor([-1.0, 1.0]).repeat(cos.shape[1] // 2)  # our sin table carries the sign of the rotation
    seen |= {"velocity": velocity, "rope_cos": cos, "rope_sin": sin * signs}

    expected = {key.removeprefix("forward."): value for key, value in given.items() if key.startswith("forward.")}
    assert set(seen) == set(expected) - {"latents", "t"}         # every stored intermediate value is compared
    for key, value in seen.items():
        assert relative_error(value, expected[key]) < 1e-5, key
    assert mask is None and heads == network.transformer_blocks[0].attn.heads
    for key, value in {"pooled_projection": pooled, "encoder_hidden_states": text, "pooled_before_fc": means[0],
                       "duration_embedding": flow.duration_emebdder(condition.duration)}.items():
        assert relative_error(value, given[f"text.{key}"]) < 1e-5, key


def test_full_size_has_the_official_names_and_parameters(parity):
    official = parity("tangoflux_keys").info
    with torch.device("meta"):
        flow, also = TangoFlux(PRESETS["tangoflux"]), TangoFlux(official["config"])     # the latter: axes by default
    assert_layout(flow, official)
    assert official["params"]["total"] == 518_009_536 and also.transformer.axes == flow.transformer.axes


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
    condition = encode_prompts(encoder, ["rain", "three beeps"], torch.tensor([1.0, 2.0]))
    null = null_condition(encoder, condition)
    empty = encode_prompts(encoder, [""], torch.tensor([1.0]))
    assert relative_error(null.text[0, :1], empty.text[0]) < 1e-5
    ids, attends, visible = null_tokens(condition.mask.sum(1))          # those of condition dropout
    assert torch.equal(null.text, encoder.encode(ids, attends)) and torch.equal(null.pooled_mask, attends)
    assert torch.equal(null.duration, condition.duration) and torch.equal(null.mask, visible)
    assert null_condition(encoder, condition._replace(mask=None)).mask is None
    pooled, alone = (random_flow().condition_inputs(each)[1] for each in (null, empty))
    assert relative_error(pooled, alone.expand(2, -1)) < 1e-5


def test_duration_is_clamped_and_audio_length_is_free():
    flow = random_flow()
    embed = flow.duration_emebdder
    assert torch.equal(embed(torch.tensor([99.0, -1.0])), embed(torch.tensor([4.0, 0.0])))
    text = Condition(noise(1, 3, 16), None, torch.ones(1, 3), torch.ones(1))
    for frames in (1, 20):
        assert flow.velocity(noise(1, frames, 6), torch.ones(1), text).shape == (1, frames, 6)


def test_fresh_network_predicts_zero_and_learns_from_there(inputs):
    flow = TangoFlux(SMALL)
    out = flow.velocity(*inputs)
    assert not out.any()
    (out - 1).square().mean().backward()
    assert flow.transformer.proj_out.weight.grad.abs().sum() > 0
    weight = flow.transformer.transformer_blocks[0].attn.to_q.weight
    assert 0.9 < weight.abs().max() / (6 / sum(weight.shape)) ** 0.5 <= 1         # Xavier uniform
    assert not any(parameter.any() for name, parameter in flow.named_parameters() if name.endswith(".bias"))


# ----------------------------------------------------------------------------- folders

def test_folder_round_trip_with_references(tmp_path, encoder, inputs):
    flow = random_flow()
    save_model(tmp_path / "base", flow=flow, text=encoder, extra={"steps": 7})
    base = load_model(tmp_path / "base", parts=("flow", "text"))
    assert base.config["steps"] == 7 and base.folder == tmp_path / "base" and base.codec is None
    loaded = base.flow.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in flow.state_dict().items())
    assert not base.flow.training and not base.text.training

    save_model(tmp_path / "aligned", flow=flow, references={"text_encoder": "../base"}, dtype=torch.float16)
    aligned = load_model(tmp_path / "aligned", parts=("flow", "text"))
    assert not (tmp_path / "aligned" / "text_encoder").exists()
    weight = aligned.flow.fc[0].weight
    assert weight.dtype == torch.float32 and torch.equal(weight, flow.fc[0].weight.half().float())
    assert torch.equal(aligned.text.t5.shared.weight, base.text.t5.shared.weight)
    short = load_model(tmp_path / "aligned", dtype=torch.bfloat16, parts=("flow",)).flow
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    x, t, condition = inputs
    with torch.no_grad():                                        # 16-bit weights, float32 condition
        half = short.velocity(x.bfloat16(), t, condition)
        assert relative_error(half, flow.velocity(x, t, condition)) < 0.05
    save_model(tmp_path / "aligned", text=encoder)               # its own text encoder now: the reference goes
    assert read_json(tmp_path / "aligned" / "config.json")["references"] == {}
    path = tmp_path / "base" / "tangoflux.safetensors"           # as some official files: a text encoder inside
    save_tensors(path, {**flow.state_dict(), "text_encoder.x": torch.ones(1)})
    assert torch.equal(load_model(tmp_path / "base", parts=("flow",)).flow.fc[0].weight, flow.fc[0].weight)


def test_bad_folders_are_told(tmp_path):
    """Of torn files, NaN and circles of references: test_lib_common.py."""
    folder, flow = tmp_path / "m", random_flow()
    path = folder / "tangoflux.safetensors"
    save_model(folder, flow, text=make_text_encoder(["a"], width=8, layers=1, heads=2, d_ff=8))

    def refused(match, target=folder, part="flow"):
        with pytest.raises(UserError, match=match):
            load_model(target, parts=(part,))
    refused("missing", tmp_path / "nowhere")
    refused("pass the model folder", path)
    refused("8 wide, but joint_attention_dim is 16", part="text")
    save_tensors(path, {**flow.state_dict(), "fc.0.bias": torch.zeros(3)})
    refused(r"fc.0.bias is \(3,\), expected \(16,\)")
    (folder / "config.json").write_text("{")
    refused("config.json cannot be used")


@pytest.mark.parametrize("change, match", [
    ({"num_layers": -1}, "num_layers is -1"), ({"num_attention_heads": True}, "heads is True"), ({"in_channels": "64"}, "in_channels is '64'"),
    ({"max_duration": float("nan")}, "max_duration is nan"), ({"text_encoder_name": 7}, "text_encoder_name is 7"),
    ({"axes_dims_rope": [4, 4]}, "add up to"), ({"axes_dims_rope": [5, 5, 6]}, "even widths"),
    ({"axes_dims_rope": [-4, 10, 10]}, "even widths"), ({"max_duration": 1e300}, "max_duration is"), ({"axes_dims_rope": 12}, "cannot be used"),
    ({"score_head": "v9"}, "score_head is 'v9'")])
def test_bad_config_values_are_named(change, match):
    with pytest.raises(UserError, match=match):
        ModelConfig.from_dict({**SMALL, **change})


def test_a_config_is_what_its_file_holds():
    """The keys and their order in config.json, with and without a head; foreign keys are left out."""
    config = {**SMALL, "uncondition": False, "text_encoder_name": "text_encoder"}
    assert list(TangoFlux({**config, "vae": {}, "steps": 7}).config.items()) == list(config.items())
    scored = TangoFlux({**config, "score_head": "v2"}).config
    assert scored == {**config, "score_head": "v2", "score_null": "zero", "score_mean": 0.0, "score_std": 1.0}
    assert TangoFlux(scored).config == scored


def test_importing_model_does_not_import_transformers():
    code = "import sys, model; sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_config_is_parsed_once_for_each_time_that_it_changes(tmp_path):
    for value in (1, 2, 2):
        write_json(tmp_path / "config.json", {"num_layers": value})
        assert read_config(tmp_path) == {"num_layers": value} and read_config(tmp_path) is read_config(tmp_path)
