"""Score as an input: five heads at step 0, one null, joint guidance, cross-loading, sampling."""
import math

import pytest
import torch
from conftest import noise, relative_error

import sample
from lib.common import UserError
from lib.text import concat_conditions, encode_prompts, moved, null_condition, null_score
from model import SCORE_HEADS, load_model, save_model, with_score_head
from sample import guided_velocity
from test_sample import folder  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def parts(folder):
    """A flow whose gates are open and whose output is not zero, a text encoder, x, t, a condition with scores."""
    model = load_model(folder, parts=("flow", "text"))
    with torch.no_grad():
        condition = encode_prompts(model.text, ["rain", "a violin", "wind"], torch.tensor([1.0, 2.0, 3.0]),
                                   score=torch.tensor([-1.5, 0.3, math.nan]))
    return model.flow, model.text, noise(3, 8, 6), torch.tensor([0.2, 0.5, 0.9]), condition


def awake(flow, seed=1):
    """The head's last layer moved away from zero."""
    with torch.no_grad():
        last = flow.transformer.score_embed.linear_2.weight
        last.copy_(0.5 * noise(*last.shape, seed=seed))
    return flow


@pytest.mark.parametrize("head", SCORE_HEADS)
@torch.no_grad()
def test_a_new_head_changes_nothing_but_for_its_token(parts, head):
    flow, _, x, t, condition = parts
    plain = flow.velocity(x, t, condition._replace(score=None))
    new, fresh = with_score_head(flow, head, mean=0.2, std=1.3)
    ours = new.velocity(x, t, condition)
    assert fresh and not new.transformer.score_embed.embed(condition.score).any()
    if head in ("v3", "v5"):                     # e_s is 0, but one more token is attended to
        assert 0 < relative_error(ours, plain) < 0.9
        assert torch.equal(ours, new.velocity(x, t, condition._replace(score=None)))
    else:
        assert torch.equal(ours, plain)          # bit for bit


@pytest.mark.parametrize("head", SCORE_HEADS)
def test_an_awake_head_moves_rows_with_a_score_and_no_others(parts, head):
    flow, _, x, t, condition = parts
    new = awake(with_score_head(flow, head)[0])
    ours, none = new.velocity(x, t, condition), new.velocity(x, t, condition._replace(score=None))
    assert (ours - none)[:2].abs().amax((1, 2)).min() > 1e-4
    assert relative_error(ours[2], none[2]) < 1e-6               # its score is NaN: none
    alone = new.velocity(x[:1], t[:1], moved(condition, "cpu", slice(1)))
    assert relative_error(alone, ours[:1]) < 1e-5                # rows do not see each other
    ours.square().sum().backward()
    named = {name: p for name, p in new.named_parameters() if "score_embed" in name}
    assert set(named) == {f"transformer.score_embed.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())


def test_v1_and_v2_are_one_graph_and_load_into_each_other_strictly(parts, capsys):
    flow, _, x, t, condition = parts
    one, two = (awake(with_score_head(flow, head, "scalar", 0.2, 1.3)[0]) for head in ("v1", "v2"))
    assert len(one.state_dict()) == len(flow.state_dict()) + 5          # as the paper's 203 = 198 + 5 keys
    two.load_state_dict(one.state_dict(), strict=True)
    crossed, fresh = with_score_head(one, "v2", "zero", 0.0, 1.0)       # what it was trained with stays
    assert not fresh and "warning" not in capsys.readouterr().err
    ours, same, other = (each.velocity(x, t, condition) for each in (crossed, two, one))
    assert torch.equal(ours, same) and not torch.equal(ours, other)
    with_score_head(two, "v1")
    assert "the paper found that this collapses" in capsys.readouterr().err
    with pytest.raises(UserError, match="only v1 and v2 take each other's"):
        with_score_head(one, "v4")
    assert crossed.config == {**one.config, "score_head": "v2"} and crossed.config["score_std"] == 1.3


@torch.no_grad()
def test_the_null_is_one_tensor_in_dropout_and_in_guidance(parts):
    flow, encoder, _, _, condition = parts
    guidance = null_condition(encoder, condition).score
    assert guidance.isnan().all()
    dropout = torch.where(torch.tensor([True] * 3), null_score(condition.score), condition.score)
    for null in ("zero", "scalar"):
        new = awake(with_score_head(flow, "v1", null=null, mean=0.7, std=2.0)[0])
        embed = new.transformer.score_embed.embed
        assert torch.equal(embed(guidance), embed(dropout))
        expected = torch.zeros_like(embed(guidance)) if null == "zero" else embed(torch.full((3,), 0.7))
        assert torch.allclose(embed(guidance), expected, atol=1e-6)         # Eq. 2's 0 is the mean score
        assert embed(torch.tensor([5.0])).abs().max() > 1e-3


@torch.no_grad()
def test_joint_guidance_is_equation_2(parts):
    flow, encoder, x, _, condition = parts
    new = awake(with_score_head(flow, "v2")[0])
    condition = condition._replace(score=torch.tensor([-1.0, 0.5, 2.0]))
    null, t = null_condition(encoder, condition), torch.tensor(0.6)

    def v(one):
        return new.velocity(x, t.expand(3), one)
    equation = v(null) + 4.0 * (v(condition) - v(null))                    # second paper, Eq. 2
    assert relative_error(guided_velocity(new, condition, null, 4.0)(x, t), equation) < 1e-5
    both = concat_conditions(null, condition)
    assert both.score[:3].isnan().all() and torch.equal(both.score[3:], condition.score)


def test_sampling_with_a_score(parts, folder, tmp_path, capsys):
    def run(place, *more):
        sample.main(["--checkpoint", str(place), "--prompt", "rain", "--duration", "0.5", "--steps", "2", "--device",
                     "cpu", "--output", str(tmp_path / f"{more[1]}.wav"), *more])
        return (tmp_path / f"{more[1]}.wav").read_bytes()
    with pytest.raises(UserError, match="--score needs a model with a score head"):
        run(folder, "--score", "1")
    flow, _, x, t, condition = parts
    with pytest.raises(ValueError, match="no score head"):
        flow.velocity(x, t, condition)
    model = load_model(folder)
    save_model(tmp_path / "model", awake(with_score_head(flow, "v1")[0]), model.codec, model.text)
    assert run(tmp_path / "model", "--score", "1") != run(tmp_path / "model", "--score", "-1")
    run(tmp_path / "model", "--prompt_prefix", "wind and ")
    assert "wind and rain" in capsys.readouterr().out
