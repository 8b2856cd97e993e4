"""Score as an input: five heads at step 0, one null, joint guidance, cross-loading, training on a column."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import relative_error
from test_train_fm import TINY, same, tiny_parts

import sample
import train_fm
from common import UserError, load_tensors
from model import (SCORE_HEADS, TangoFlux, concat_conditions, encode_prompts, load_model, null_condition, null_score,
                   save_model, with_score_head)
from solvers import guided_velocity

HEADS = list(SCORE_HEADS)


@pytest.fixture(scope="module")
def parts():
    flow, encoder = tiny_parts()
    x = torch.randn(3, 8, TINY["in_channels"], generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.9])
    with torch.no_grad():
        condition = encode_prompts(encoder, ["rain", "a violin", "wind"], torch.tensor([1.0, 2.0, 3.0]),
                                   score=torch.tensor([-1.5, 0.3, math.nan]))
    return flow.eval(), encoder, x, t, condition


def awake(flow, seed=1):
    """The head's last layer moved away from zero."""
    with torch.no_grad():
        last = flow.transformer.score_embed.linear_2.weight
        last.copy_(0.5 * torch.randn(last.shape, generator=torch.Generator().manual_seed(seed)))
    return flow


# ----------------------------------------------------------------------------- the heads

@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_a_new_head_changes_nothing_but_for_its_token(parts, head):
    flow, _, x, t, condition = parts
    plain = flow.velocity(x, t, condition._replace(score=None))
    new, fresh = with_score_head(flow, head, mean=0.2, std=1.3)
    ours = new.velocity(x, t, condition)
    assert fresh and not new.transformer.score_embed(condition.score).any()
    if head in ("v3", "v5"):                     # e_s is 0, but one more token is attended to
        change = relative_error(ours, plain)
        print(f"{head}: the extra token changes the velocity by {change:.3f} of its largest value")
        assert 0 < change < 0.5
        assert torch.equal(ours, new.velocity(x, t, condition._replace(score=None)))
    else:
        assert torch.equal(ours, plain)          # bit for bit
    assert ours.shape == x.shape


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_an_awake_head_moves_rows_with_a_score_and_no_others(parts, head):
    flow, _, x, t, condition = parts
    new = awake(with_score_head(flow, head)[0])
    ours, none = new.velocity(x, t, condition), new.velocity(x, t, condition._replace(score=None))
    assert (ours - none)[:2].abs().amax((1, 2)).min() > 1e-4
    assert relative_error(ours[2], none[2]) < 1e-6               # its score is NaN: none
    alone = new.velocity(x[:1], t[:1], type(condition)(*(part[:1] for part in condition)))
    assert relative_error(alone, ours[:1]) < 1e-5                # rows do not see each other


@pytest.mark.parametrize("head", HEADS)
def test_every_tensor_of_a_head_gets_a_gradient(parts, head):
    flow, _, x, t, condition = parts
    new = awake(with_score_head(flow, head)[0])
    new.velocity(x, t, condition).square().sum().backward()
    named = {name: p for name, p in new.named_parameters() if "score_embed" in name}
    assert set(named) == {f"transformer.score_embed.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in named.values())


def test_v1_and_v2_are_one_graph_and_load_into_each_other_strictly(parts, capsys):
    flow, _, x, t, condition = parts
    one, two = (awake(with_score_head(flow, head)[0]) for head in ("v1", "v2"))
    assert list(one.state_dict()) == list(two.state_dict())
    assert len(one.state_dict()) == len(flow.state_dict()) + 5          # as the paper's 203 = 198 + 5 keys
    assert all(a.shape == b.shape for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    two.load_state_dict(one.state_dict(), strict=True)
    one.load_state_dict(two.state_dict(), strict=True)
    crossed, fresh = with_score_head(one, "v2")
    assert not fresh and "warning" not in capsys.readouterr().err
    with torch.no_grad():
        assert torch.equal(crossed.velocity(x, t, condition), two.velocity(x, t, condition))
        assert not torch.equal(crossed.velocity(x, t, condition), one.velocity(x, t, condition))
    with_score_head(two, "v1")
    assert "the paper found that this collapses" in capsys.readouterr().err
    with pytest.raises(UserError, match="only v1 and v2 take each other's"):
        with_score_head(one, "v4")
    assert crossed.config["score_head"] == "v2" and crossed.config["score_mean"] == one.config["score_mean"]


@torch.no_grad()
def test_the_null_is_one_tensor_in_dropout_and_in_guidance(parts):
    flow, encoder, _, _, condition = parts
    guidance = null_condition(encoder, condition).score
    assert guidance.isnan().all()
    dropout = torch.where(torch.tensor([True] * 3), null_score(condition.score), condition.score)
    for null in ("zero", "scalar"):
        embed = awake(with_score_head(flow, "v1", null=null, mean=0.7, std=2.0)[0]).transformer.score_embed
        assert torch.equal(embed(guidance), embed(dropout))
        expected = torch.zeros(3, embed(guidance).shape[1]) if null == "zero" else embed(torch.full((3,), 0.7))
        assert torch.allclose(embed(guidance), expected, atol=1e-6)         # Eq. 2's 0 is the mean score
        assert embed(torch.tensor([5.0])).abs().max() > 1e-3


def test_config_of_a_head_is_checked():
    for wrong, what in (({"score_head": "v9"}, "score_head is 'v9'"), ({"score_std": 0}, "score_std is 0"),
                        ({"score_null": 3}, "score_null is 3")):
        with pytest.raises(UserError, match=what):
            TangoFlux({**TINY, "score_head": "v1", **wrong})
    with pytest.raises(ValueError, match="no score head"):
        flow, encoder = tiny_parts()
        flow.velocity(torch.zeros(1, 8, TINY["in_channels"]), torch.ones(1),
                      encode_prompts(encoder, ["rain"], torch.ones(1), score=torch.ones(1)))


# ----------------------------------------------------------------------------- guidance

@torch.no_grad()
def test_joint_guidance_is_equation_2_and_two_scales_contain_it(parts):
    flow, encoder, x, _, condition = parts
    new = awake(with_score_head(flow, "v2")[0])
    condition = condition._replace(score=torch.tensor([-1.0, 0.5, 2.0]))
    null, t = null_condition(encoder, condition), torch.tensor(0.6)

    def v(one):
        return new.velocity(x, t.expand(3), one)
    equation = v(null) + 4.0 * (v(condition) - v(null))                    # second paper, Eq. 2
    assert relative_error(guided_velocity(new, condition, null, 4.0)(x, t), equation) < 1e-5
    assert relative_error(guided_velocity(new, condition, null, 4.0, 4.0)(x, t), equation) < 1e-5
    text = v(condition._replace(score=null_score(x)))
    apart = v(null) + 4.0 * (text - v(null)) + 1.5 * (v(condition) - text)
    assert relative_error(guided_velocity(new, condition, null, 4.0, 1.5)(x, t), apart) < 1e-5
    both = concat_conditions(null, condition)
    assert both.score[:3].isnan().all() and torch.equal(both.score[3:], condition.score)


# ----------------------------------------------------------------------------- training on a column

@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A tiny model folder and a manifest: eight clips whose score is their loudness."""
    from audio import write_wav
    from vae import make_codec
    folder = tmp_path_factory.mktemp("scored")
    flow, encoder = tiny_parts()
    codec = make_codec("mel", dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1],
                                   num_res_blocks=1, attn_layers=[], down_layers=[0, 1])).eval()
    save_model(folder / "model", flow, codec, encoder)
    rows = []
    for i in range(8):
        write_wav(folder / f"{i}.wav", 0.1 * (i + 1) * torch.sin(torch.arange(8000) * (0.02 + 0.01 * i)), 16000)
        rows.append({"audio": f"{i}.wav", "caption": "rain" if i % 2 else "a violin", "score": 0.5 * i, "same": 1.0,
                     "bad": math.nan if i == 3 else 1.0 * i, "sparse": "" if i < 4 else 1.0 * i})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def flags(scored, out, *more):
    return ["--checkpoint", str(scored / "model"), "--data", str(scored / "rows.jsonl"), "--cache",
            str(scored / "cache"), "--score_column", "score", "--steps", "6", "--batch_size", "4", "--val_clips", "2",
            "--validation_fraction", "0.2", "--device", "cpu", "--out", str(out), *more]


def test_a_column_of_scores_trains_a_head(scored, tmp_path):
    train_fm.train(train_fm.parse_args(flags(scored, tmp_path / "run", "--score_head", "v4", "--sigma_rel", "0.1",
                                             "--snapshot_every", "3")))
    model = load_model(tmp_path / "run")
    assert model.flow.config["score_head"] == "v4" and 1 < model.flow.config["score_mean"] < 2.5
    before, after = load_tensors(scored / "model" / "tangoflux.safetensors"), model.flow.state_dict()
    assert all(name in after for name in before)
    assert after["transformer.score_embed.linear_2.weight"].abs().max() > 0
    assert len(list((tmp_path / "run" / "averages").glob("*.safetensors"))) == 2
    train_fm.train(train_fm.parse_args(flags(scored, tmp_path / "more", "--checkpoint", str(tmp_path / "run"))))
    assert load_model(tmp_path / "more").flow.config["score_head"] == "v4"          # its own head goes on


def test_scores_reach_their_rows_and_dropped_text_loses_its_score(scored, tmp_path):
    args = train_fm.parse_args(flags(scored, tmp_path))
    flow, codec, encoder, _ = train_fm.load_parts(args, torch.device("cpu"))
    data, _ = train_fm.load_data(args, codec, encoder, False, flow.config["max_duration"])
    by_row = {i: row["score"] for i, row in enumerate(data.cache.rows)}
    assert all(data.scores[i] == by_row[i] for i in data.rows)
    batch = train_fm.training_batch(data, codec, 0, 0, 400, dropout=0.1, score_dropout=0.1)
    lost = batch.score.isnan()
    assert lost[batch.dropped].all() and 0.05 < lost[~batch.dropped].float().mean() < 0.16
    whole = train_fm.training_batch(data, codec, 0, 0, 400, dropout=0.1, score_dropout=0.0)
    assert torch.equal(whole.x0, batch.x0) and torch.equal(whole.t, batch.t)        # its draw comes last
    assert torch.equal(whole.score.isnan(), whole.dropped)
    given = train_fm.text_condition(encoder, batch, "empty_prompt").score
    assert torch.equal(given.isnan(), lost) and torch.equal(given[~lost], batch.score[~lost])


def test_a_score_is_learned(scored, tmp_path):
    """Clips of one prompt that differ by their score alone: the flow tells them apart by it."""
    flow, encoder = tiny_parts()
    flow = with_score_head(flow, "v1")[0].train()
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    pattern = torch.randn(8, TINY["in_channels"], generator=rng)
    with torch.no_grad():
        condition = encode_prompts(encoder, ["rain"] * 16, torch.ones(16))
    for _ in range(150):
        score = torch.randint(0, 2, (16,), generator=rng).float() * 2 - 1
        x1, x0 = score[:, None, None] * pattern, torch.randn(16, 8, TINY["in_channels"], generator=rng)
        xt, target = train_fm.interpolate(x1, x0, torch.full((16,), 0.95))
        loss = train_fm.flow_matching_loss(flow.velocity(xt, torch.full((16,), 0.95), condition._replace(score=score)),
                                           target)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, t = torch.randn(16, 8, TINY["in_channels"], generator=rng), torch.ones(16)
        high, low = (x - flow.velocity(x, t, condition._replace(score=torch.full((16,), s))) for s in (1.0, -1.0))
    assert ((high - low) * pattern).mean() > 0.5 * (pattern ** 2).mean()


def test_a_killed_scored_run_resumes_bit_for_bit(scored, tmp_path):
    more = ["--sigma_rel", "0.05", "0.1", "--save_every", "3"]
    train_fm.train(train_fm.parse_args(flags(scored, tmp_path / "a", *more)))
    stopped = train_fm.parse_args(flags(scored, tmp_path / "b", *more, "--max_minutes", "0"))
    for _ in range(9):
        if train_fm.train(stopped)[1] == 6:
            break
    names = ["tangoflux.safetensors", "ema.safetensors", *(f"averages/{s}_{6:09d}.safetensors" for s in (0.05, 0.1))]
    for name in names:
        assert same(load_tensors(tmp_path / "a" / name), load_tensors(tmp_path / "b" / name)), name


def test_wrong_input_is_one_line(scored, tmp_path, capsys):
    def fails(what, *more):
        with pytest.raises(UserError, match=what):
            train_fm.train(train_fm.parse_args(flags(scored, tmp_path / "x", *more)))
        assert not (tmp_path / "x" / "tangoflux.safetensors").exists()
    fails("has no column missing", "--score_column", "missing")
    fails("score is nan, but must be a number", "--score_column", "bad")
    fails("column same is 1 in every row", "--score_column", "same")
    fails("holds no experts.jsonl", "--experts", str(tmp_path))
    fails("power needs --sigma_rel", "--save_weights", "power")
    fails("--sigma_rel 0.5 must be above 0 and at most", "--sigma_rel", "0.5")
    for more, what in ((["--score_head", "v1"], "would have no effect without --score_column"),
                       (["--experts_only"], "would have no effect without --experts")):
        arguments = ["--data", str(scored / "rows.jsonl"), *more]
        with pytest.raises(UserError, match=what):
            train_fm.parse_args(arguments)
    with pytest.raises(UserError, match="--score_column would have no effect without --data"):
        train_fm.parse_args(["--score_column", "score"])
    train_fm.train(train_fm.parse_args(flags(scored, tmp_path / "y", "--score_column", "sparse", "--steps", "1")))
    assert "4 of 8 rows have no sparse" in capsys.readouterr().err


def test_sampling_with_a_score(scored, tmp_path, capsys):
    arguments = ["--checkpoint", str(scored / "model"), "--prompt", "rain", "--duration", "0.5", "--steps", "2",
                 "--device", "cpu"]
    with pytest.raises(UserError, match="has none: python train_fm.py --score_column"):
        sample.main([*arguments, "--score", "1", "--output", str(tmp_path / "a.wav")])
    with pytest.raises(UserError, match="--score_scale would have no effect without --score"):
        sample.main([*arguments, "--score_scale", "2"])
    model = load_model(scored / "model")
    model.flow = awake(with_score_head(model.flow, "v1")[0])
    save_model(tmp_path / "model", model.flow, model.codec, model.text)
    arguments[1] = str(tmp_path / "model")
    waves = []
    for i, more in enumerate((["--score", "1"], ["--score", "-1"])):
        sample.main([*arguments, *more, "--output", str(tmp_path / f"{i}.wav")])
        waves.append((tmp_path / f"{i}.wav").read_bytes())
    assert waves[0] != waves[1]
    none, unmoved = (sample.generate(model, ["rain"], [0.5], steps=2, **how) for how in (
        {}, {"score": 1, "score_scale": 0}))
    assert relative_error(unmoved, none) < 1e-4                       # a scale of 0 is no score
    profile = sample.parse_args(["--profile", "attm_sub2", "--steps", "7"])
    assert (profile.score, profile.guidance_scale, profile.seed, profile.steps) == (5.0, 4.0, 55, 7)
    assert profile.lufs == -16.5
    assert profile.prompt_prefix == "high quality instrumental music, "
    sample.main([*arguments, "--prompt_prefix", "wind and ", "--output", str(tmp_path / "p.wav")])
    assert "wind and rain" in capsys.readouterr().out


def test_latents_of_experts_join_the_mixture(scored, tmp_path):
    from common import save_tensors, write_jsonl
    args = train_fm.parse_args(flags(scored, tmp_path))
    flow, codec, encoder, _ = train_fm.load_parts(args, torch.device("cpu"))
    plain, _ = train_fm.load_data(args, codec, encoder, False, flow.config["max_duration"])
    shape = plain.cache.mean.shape[1:]
    latents = torch.arange(2 * shape[0] * shape[1]).reshape(2, *shape).half() / 64
    save_tensors(tmp_path / "experts.safetensors", {"latents": latents})
    write_jsonl(tmp_path / "experts.jsonl", [{"prompt": "wind", "duration": 1.0, "score": 7.0},
                                             {"prompt": "rain", "duration": 2.0, "score": 8.0}])
    args = train_fm.parse_args(flags(scored, tmp_path, "--experts", str(tmp_path), "--oversample", "5"))
    mixed, held = train_fm.load_data(args, codec, encoder, False, flow.config["max_duration"])
    assert len(mixed.rows) == len(plain.rows) + 10 and not set(held.rows) & set(mixed.rows)
    own = np.array([8, 9, 0])
    assert np.array_equal(mixed.cache.mean[own][:2], latents.numpy())
    assert np.array_equal(mixed.cache.mean[own][2], plain.cache.mean[0]) and not mixed.cache.std[own][:2].any()
    assert mixed.scores[8:].tolist() == [7.0, 8.0] and mixed.cache.key != plain.cache.key
    args = train_fm.parse_args(flags(scored, tmp_path, "--experts", str(tmp_path), "--experts_only"))
    only = train_fm.load_data(args, codec, encoder, False, flow.config["max_duration"])[0]
    assert only.rows.tolist() == [8, 9]
