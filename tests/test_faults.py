"""One-character faults that other tests let pass (tests/mutants.py makes them): loops by hand, closed forms, who gets what."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_MEL, noise, planted, relative_error
from test_crpo import CPU, MODEL, opposite_sides, settings
from test_train_fm import of_tiny, parts_and_data, state_of, tiny  # noqa: F401  (a fixture)

import crpo
import evaluate
import sample
import train_fm
import vae
from lib import audio, common, fast
from lib.common import generator, read_jsonl
from lib.mel import MelVAE
from lib.weights import copy_weights, load_tensors, trainable
from model import load_model
from ranker import Ranker, as_mono, ranknet_loss
from world import train_clap, train_ranker, votes as poll

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_best_of_some_clips_is_never_one_without_a_reward(capsys):
    for rewards, best in (([math.nan, 0.2, 0.9], "c"), ([math.nan] * 3, "a"), ([-0.5, math.nan, -0.4], "c")):
        assert sample.best_audio(lambda audios, rate, prompts: rewards, list("abc"), 16000, "rain") == best
    assert "candidate 2, reward 0.9000 (mean 0.5500)" in capsys.readouterr().out


def test_roundings():
    """t: level floor(1000 u) of 1000 that fall from 1; a clip: int(seconds * rate); the ends of a flag's range are in it."""
    assert train_fm.on_grid(torch.tensor([0.0, 0.0004, 0.5, 0.9999]), 1000).tolist() == pytest.approx([1, 1, 0.5, 0.001])
    codec = SimpleNamespace(hop=4, sampling_rate=10, parameters=lambda: iter([torch.zeros(1)]),
                            decode=lambda latents, frames: torch.zeros(len(latents), 1, 4 * frames))
    assert [clip.shape[-1] for clip in sample.decode(codec, torch.zeros(3, 6, 1), [0.19, 1.79, 0.01])] == [1, 17, 1]
    assert [common.value_of(text, int, 1, 3) for text in ("1", "3")] == [1, 3]
    assert audio.ClapMel.starts(None, 9) == [1, 4, 7]                   # the middles of three thirds


def test_attention_written_out_for_16_bits_is_torchs_own():
    given = (2 * noise(3, 2, 2, 5, 8)).requires_grad_()                 # q, k, v
    visible = torch.tensor([[True, True, True, False, False], 5 * [True]])
    exact = torch.nn.functional.scaled_dot_product_attention(*given, visible[:, None, None])
    ours = fast.attention(*given.bfloat16(), visible).float()
    assert relative_error(ours, exact) < 0.03
    assert relative_error(*(torch.autograd.grad(each.square().sum(), given)[0] for each in (ours, exact))) < 0.1


def by_hand(parameters, rates, loss_of, clip, ema, betas, weight_decay):
    """A loop in plain formulas, of AdamW whose vectors do not decay -> rows [loss, gradient norm, rate], average weights.
    loss_of(step): a number; it leaves gradients."""
    groups = [{"params": [p for p in parameters if (p.ndim >= 2) == matrix], "weight_decay": weight_decay * matrix}
              for matrix in (True, False)]
    optimizer, rows = torch.optim.AdamW(groups, lr=0.0, betas=betas), []
    average = [p.detach().clone() for p in parameters]
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        loss = loss_of(step)
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt().item()
        for p in parameters:
            p.grad *= min(1.0, clip / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        share = min(ema, (1 + step) / (10 + step))
        for p, mean in zip(parameters, average):
            mean.copy_(share * mean + (1 - share) * p.detach())
        rows.append([loss, norm, rate])
    assert max(row[1] for row in rows) > clip                           # else nothing was clipped
    return rows, average


@pytest.mark.parametrize("decay", [True, False])
def test_a_run_is_the_loop_by_hand(tiny, tmp_path, decay):  # noqa: F811
    """Positions, dropout, t, warm-up, decay, betas, clipping, the averages, which is published, what validation judges."""
    more = dict(train_steps=6, warmup_steps=3, decay=decay, clip=0.5, ema=0.999, learning_rate=0.01, dropout=0.5, t_mean=-1.0,
                t_std=0.5, beta1=0.8, beta2=0.9, weight_decay=0.1, sigma_rel=[0.2], seed=7, save_every=2, dtype="float32")
    flow, codec, encoder, data, held = parts_and_data(of_tiny(tiny, tmp_path, **more))
    named = trainable(flow, encoder)
    parameters = list(named.values())

    def loss_of(step):
        batch = train_fm.training_batch(data, codec, 7, 4 * step, 4, 0.5, -1.0, 0.5)
        loss, _ = train_fm.batch_loss(flow, encoder, batch)
        loss.backward()
        return loss.item()
    rates = [0.01 * ((step + 1) / 3 if step < 3 else (6 - step) / 3 if decay else 1) for step in range(6)]
    expected, average = by_hand(parameters, rates, loss_of, 0.5, 0.999, (0.8, 0.9), 0.1)
    train_fm.train(**of_tiny(tiny, tmp_path, **more))
    state, rows = state_of(tmp_path), read_jsonl(tmp_path / "log.jsonl")
    written = [[row["loss"], row["grad_norm"], row["lr"]] for row in rows[1:]]
    assert np.array(written) == pytest.approx(np.array(expected), rel=1e-4)
    published, ema = load_model(tmp_path), load_tensors(tmp_path / "ema.safetensors")
    published = trainable(published.flow, published.text.requires_grad_())
    for name, p, mean in zip(named, parameters, average):
        assert torch.allclose(state["weights"][name], p, atol=1e-5), name
        assert all(torch.allclose(kept[name], mean, atol=1e-5) for kept in (state["average"], published, ema)), name
    grid = list(train_fm.validation_batches(held, codec, 6))
    for key in ("val_loss", "val_loss_ema"):                            # of the raw weights, of the average
        found = train_fm.validate(flow, encoder, grid, torch.no_grad)["val_loss"]
        assert rows[-1][key] == pytest.approx(found, rel=1e-4)
        copy_weights(named, dict(zip(named, average)))
    assert rows[-1]["val_loss"] != pytest.approx(rows[-1]["val_loss_ema"], rel=1e-3)


def test_ranks_share_a_step_among_them(tiny, tmp_path, monkeypatch):  # noqa: F811
    """Process r of two takes examples (2 step + r) B; an epoch of steps counts both; gradients are means, not sums."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(3))
        tensors = [torch.ones(2), torch.tensor(4.0)]
        for ranks in (3, 1):                                            # one process has nobody to ask
            train_fm.mean_over_ranks(tensors, ranks)
            assert tensors[0].tolist() == [1, 1] and tensors[1] == 4
    firsts, real = {0: [], 1: []}, train_fm.training_batch
    monkeypatch.setattr(train_fm, "mean_over_ranks", lambda tensors, ranks: None)
    monkeypatch.setattr(train_fm, "wait_for_ranks", lambda ranks: None)
    for rank in (0, 1):
        monkeypatch.setattr(train_fm, "start_ranks", lambda device, rank=rank: (rank, 2, CPU))
        monkeypatch.setattr(train_fm, "training_batch", lambda data, codec, seed, first, count, *rest, rank=rank: (
            firsts[rank].append((first, count)) or real(data, codec, seed, first, count, *rest)))
        train_fm.train(**of_tiny(tiny, tmp_path / str(rank), epochs=1.3, batch_size=3))         # 13 examples
    assert firsts == {0: [(0, 3), (6, 3), (12, 3)], 1: [(3, 3), (9, 3), (15, 3)]}               # ceil(1.3 * 13 / 6)


def test_the_official_null_hides_text_and_duration_of_dropped_rows_alone(tiny, tmp_path):  # noqa: F811
    flow, codec, encoder, data, _ = parts_and_data(of_tiny(tiny, tmp_path))
    batch = train_fm.training_batch(data, codec, 0, 0, 4)._replace(drop_text=torch.tensor([True, False, True, False]))
    seen = []
    flow.transformer.register_forward_hook(lambda module, given, out: seen.append(given))
    with torch.no_grad():
        for null in ("official_zeros", "empty_prompt"):
            train_fm.batch_loss(flow, encoder, batch, null)
    (_, t, zeros, pooled, *_), (_, _, kept, *_) = seen
    assert not zeros[batch.drop_text].any() and torch.equal(zeros[1], kept[1]) and kept.abs().amax((1, 2)).min() > 0
    whole = flow.condition_inputs(train_fm.text_condition(encoder, batch._replace(drop_text=torch.zeros(4).bool())))
    assert torch.allclose(pooled, whole[1], atol=1e-5) and torch.equal(t, batch.t)             # the pooled text stays


def crpo_training(rows, tensors, loss, micro_batch):
    model = load_model(MODEL)
    reference = load_model(MODEL).flow.requires_grad_(False)
    for p in reference.parameters():
        p.mul_(1.01)                                                    # so that the margin is not 0
    pairs = crpo.training_data(rows, tensors, model)
    return model.flow, crpo.Training(model.flow, reference, model.text, pairs, loss, micro_batch, CPU, torch.enable_grad)


def test_pieces_of_a_step_add_up_whatever_their_size():
    """Five pairs at once, or in pieces of 2, 2 and 1: the same loss, the same gradients."""
    (rows, tensors), found = opposite_sides(0), []
    for micro_batch in (5, 2):
        flow, training = crpo_training(rows, tensors, settings(beta=20.0, kl_weight=0.4)[0], micro_batch)
        parts = crpo.loss_and_gradients(training, list(flow.parameters()), range(3, 8), 0)
        found.append(({**parts}, [p.grad for p in flow.parameters()]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4, abs=2e-6)    # the margin is a small difference
    for one, other in zip(found[0][1], found[1][1]):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6) and one.any()


@pytest.mark.parametrize("decay", [True, False])
def test_optimise_is_the_loop_by_hand(tmp_path, decay):
    """Steps rounded up, warm-up a quarter at most, decay, clipping, and the average that goes on."""
    rows, tensors = opposite_sides(0)
    rows, tensors = rows[:5], {name: tensor[:5] for name, tensor in tensors.items()}
    loss, how = settings(beta=20.0, kl_weight=0.4, epochs=5, batch_size=4, warmup_steps=10, decay=decay, dropout=0.5, clip=0.5,
                         ema=0.99, beta1=0.8, beta2=0.9, weight_decay=0.1, learning_rate=0.01)
    losses = crpo.optimise(tmp_path, MODEL, rows, tensors, loss, how, 3, "report", CPU)
    flow, training = crpo_training(rows, tensors, loss, 4)
    training = training._replace(reference=load_model(MODEL).flow)
    parameters = list(flow.parameters())
    rates = [0.01 * (1 if step < 1 or not decay else (7 - step) / 6) for step in range(7)]      # ceil(5 * 5 / 4)
    expected, average = by_hand(parameters, rates, lambda step: crpo.loss_and_gradients(
        training, parameters, range(4 * step, 4 * step + 4), 3)["loss"], 0.5, 0.99, (0.8, 0.9), 0.1)
    written = [[row["loss"], row["grad_norm"], row["lr"]] for row in read_jsonl(tmp_path / "log.jsonl")]
    assert np.array(written) == pytest.approx(np.array(expected), rel=1e-4)
    for p, mean in zip(load_model(tmp_path).flow.parameters(), average):
        assert torch.allclose(p, mean, atol=1e-5)
    copy_weights(dict(enumerate(parameters)), average)
    plain = training._replace(settings=loss._replace(dropout=0.0))
    assert losses == pytest.approx(crpo.loss_and_gradients(plain, [], range(5), "report"), rel=1e-3, abs=1e-4)


def test_scores_stand_under_the_names_of_their_scorers(tmp_path, monkeypatch):
    """Expert iteration has two: the ranker's reward and CLAP's fit."""
    monkeypatch.setattr(crpo, "decode", lambda codec, latents, durations: [[value] for value in latents.tolist()])
    scorers = {name: SimpleNamespace(scores=lambda audios, rate, prompts, unit=unit: unit * torch.tensor(audios)[:, 0])
               for name, unit in (("reward", 1), ("clap", 10))}
    rows = [{"prompt": str(i), "duration": 1.0} for i in range(3)]
    codec = SimpleNamespace(sampling_rate=16000)
    scored = crpo.score_candidates(tmp_path, codec, rows, torch.tensor([1.0, 2.0, 3.0]), scorers, {"seed": 5}, 2)
    assert scored == read_jsonl(tmp_path / "scores.jsonl") == [
        {**row, "seed": 5, "index": i, "reward": 1.0 + i, "clap": 10.0 + 10 * i} for i, row in enumerate(rows)]


def test_prompts_are_drawn_anew_in_each_iteration_and_no_longer_than_the_model(tmp_path):
    (tmp_path / "p.jsonl").write_text("".join('{"prompt": "%d", "duration": %s}\n' % (i, i or "null") for i in range(9)))
    pool = crpo.prompt_pool(str(tmp_path / "p.jsonl"), 1, 9, 4.096)
    assert [row["duration"] for row in pool] == [4.0, 1, 2, 3, 4, 4.096, 4.096, 4.096, 4.096]
    one, other, of_seed_1 = (crpo.draw_prompts(tmp_path / f"{key}", pool, 5, *key) for key in ((0, 1), (0, 2), (1, 1)))
    assert len({row["prompt_id"] for row in one}) == 5 and one != other and one != of_seed_1


def test_pairs_of_recorded_sounds_are_samples_of_their_posteriors():
    """--pairs: mean and deviation, both in the codec's units; each epoch has its own order, --shared_noise is obeyed."""
    model = load_model(MODEL)
    shape = model.flow.config["audio_seq_len"], model.flow.config["in_channels"]
    model.codec.latent_mean, model.codec.latent_std = torch.full(shape[1:], 2.0), torch.full(shape[1:], 4.0)
    place = torch.arange(3.0)[:, None, None].expand(3, *shape)
    tensors = {"winner_mean": place, "winner_std": 8 + 0 * place, "loser_mean": -place, "loser_std": 12 + 0 * place}
    data = crpo.training_data([{"prompt": "rain", "duration": 1.0}] * 3, tensors, model)
    assert (data["mean"][1, 0] == (1 - 2) / 4).all() and (data["mean"][1, 1] == (-1 - 2) / 4).all()
    loss = settings(shared_noise=False)[0]
    batch, _ = crpo.draw_rows(data, range(30), loss, 0, CPU)
    assert abs(batch.x1[:30].std() - 2) < 0.2 and abs(batch.x1[30:].std() - 3) < 0.2 and not torch.equal(*batch.x0.chunk(2))
    six = {name: data[name][[0] * 6] for name in ("mean", "std", "text", "advantage")}
    six = {**data, **six, "duration": torch.arange(6)}
    orders = [crpo.draw_rows(six, range(6 * k, 6 * k + 6), loss, 0, CPU)[0].duration[:6].tolist() for k in range(3)]
    assert all(sorted(order) == list(range(6)) for order in orders) and len({*map(tuple, orders)}) > 1


def test_a_codec_is_validated_by_the_mean_over_all_its_examples():
    """Eleven, in batches of 8 and 3; noise k is batch k's; the KL term has its weight."""
    codec, examples, expected = vae.make_codec("mel", TINY_MEL).eval(), noise(11, 80, 16) - 2, []
    with torch.no_grad():
        for number, batch in enumerate((examples[:8], examples[8:])):
            parts = codec.losses(batch, generator("validation", number))
            expected += len(batch) * [parts["mel"].item() + 0.3 * parts["kl"].item()]
    assert vae.validate(codec, examples, {"kl": 0.3})["validation_loss"] == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("linear_skip", [True, False])
def test_normalised_latents_have_variance_one_or_that_of_their_reach(linear_skip):
    """Of posterior samples: 1, or behind a linear skip in proportion to each channel's reach, 1 on average."""
    torch.manual_seed(0)
    codec = MelVAE(data_dim=80, embed_dim=5, hidden_dim=8, ch_mult=[1], num_res_blocks=1, down_layers=[], patch=4,
                   linear_skip=linear_skip).eval()
    mels = noise(200, 80, 16) + 3 * noise(200, 1, 16, seed=1) + noise(200, 1, 16, seed=2) * torch.linspace(-2, 2, 80)[:, None]
    codec.start(mels)
    codec.finish(mels)
    mean, std = codec.encode_mel(mels)
    variance = codec.normalise(mean + std * noise(*mean.shape)).var((0, 1))
    reach = codec.skip_decoder.norm(dim=1) if linear_skip else torch.ones(5)
    assert variance.tolist() == pytest.approx((reach / reach.mean()).tolist(), rel=0.15)
    assert not linear_skip or reach.max() > 2 * reach.min()
    assert codec.normalise(mean).mean().abs() < 1e-4


def test_a_ranker_keeps_its_best_epoch_and_knows_the_clips_of_the_training_votes_alone():
    clips, features, _, votes = planted(120, 600)
    features[:, 2] += torch.arange(120) / 60                            # the parts differ in their statistics
    parts = train_ranker.split_votes(clips, votes, 0)
    prompts = [{clips[i]["caption"] for i in (*votes.a[part], *votes.b[part])} for part in parts]
    source = poll.SOURCES["crowd"]                                      # who likes the better one, less often by chance
    assert source.prefers(0.3) == pytest.approx(0.03 + 0.94 / (1 + math.exp((source.tie - 0.3) / source.noise)))
    assert sum(map(len, prompts)) == len(set.union(*prompts)) and sum(map(len, parts)) < 600    # no vote crosses the split
    votes.preference[:] = np.random.default_rng(0).integers(0, 2, 600)  # nothing to learn: it overfits
    ranker, log = train_ranker.fit(features, votes, parts, train_ranker.Fit((64,), 0.0, 12, 32, 3e-2, 0.0, 0))
    a, b = ranker.utility(features).detach()[np.stack([votes.a, votes.b])[:, parts[1]]]
    held = ranknet_loss(a, b, torch.from_numpy(votes.preference[parts[1]])).item()
    assert held == pytest.approx(min(row["validation"] for row in log), rel=1e-4) and log[-1]["validation"] > 1.01 * held
    training = np.unique(np.stack([votes.a, votes.b])[:, parts[0]])
    for ours, known in ((ranker.mean, features[training].mean(0)), (ranker.std, features[training].std(0))):
        assert torch.allclose(ours, known, atol=1e-6) and len(training) < 110


def test_clips_are_heard_as_the_mean_of_their_channels_up_to_their_duration():
    """By CLAP, by the taggers, by the judges; true peaks lie between samples; a ranker overlooks more than 6 deviations."""
    wave = torch.sin(torch.pi / 2 * torch.arange(400) + torch.pi / 4)[None]     # its samples reach 0.71, it reaches 1
    assert wave.abs().max() < 0.708 and audio.true_peak(wave, 16000) == pytest.approx(1, abs=0.02)
    stereo = torch.tensor([[1.0, 3.0], [3.0, -3.0]])
    assert [clip.tolist() for clip in as_mono([stereo, stereo[0]], 16000, 16000)] == [[2, 0], [1, 3]]
    assert evaluate.as_clips(SimpleNamespace(sampling_rate=16000), [stereo, stereo[:1]], samples=3).tolist() == [[2, 0, 0], [1, 3, 0]]
    heard, asked = [], [evaluate.Asked("rain", 0.5), evaluate.Asked("wind", 1.0)]
    clap = SimpleNamespace(embed_audio=lambda audios, rate: heard.extend(map(len, audios)) or torch.eye(2),
                           embed_text=lambda prompts: torch.tensor([[0.25, 0], [1, 0.5]]),
                           scores=lambda audios, rate, prompts: torch.tensor([float(len(audio)) for audio in audios]))
    found = evaluate.Judges.judge(SimpleNamespace(judge_clap=clap, reward=clap), torch.ones(2, 100), asked, 100)
    assert heard == found["reward"].tolist() == [50, 100] and found["judge"].tolist() == [0.25, 0.5]
    ranker = Ranker(2, (4,)).eval()
    ranker.std *= 2
    assert torch.equal(ranker(torch.tensor([[1e6, -1e6]])), ranker(torch.tensor([[12.0, -12.0]])))


def test_intervals_hold_95_percent_and_pools_hold_all_seeds():
    values = np.random.default_rng(0).standard_normal(400)
    low, high = evaluate.bootstrap(lambda rows: values[rows].mean(), 400, 2000)
    assert [low, high] == pytest.approx(values.mean() + np.array([-1.96, 1.96]) * values.std() / 20, abs=0.006)
    sets = {name: {key: np.full(9, value) for key in ("reward", "judge", "silent")} | {
        "features": np.random.default_rng(i).standard_normal((9, 2))}
        for i, (name, value) in enumerate({"real": 0.9, "base": 0.5, "a": 0.6, "b": 0.9}.items())}
    _, numbers = evaluate.compare(sets, "base", 5, pooled=("a", "b"))
    gained = {what.split(" against")[0]: number["reward"][0] for what, number in numbers.items() if "against" in what}
    assert gained == pytest.approx({"a": 0.1, "b": 0.4, "all 2 pooled": 0.25})


def test_the_shares_of_held_out_families_are_each_of_its_own_axis(monkeypatch):
    """Caption 0 of each pair is nearer to the relative than to its clip; both clips know their caption among all."""
    cosines = torch.block_diag(*32 * [torch.tensor([[0.5, 0.3], [0.6, 0.9]])])          # clips, captions
    misses = 0.7 * torch.eye(64).repeat_interleave(2, 0)
    monkeypatch.setattr(train_clap, "texts_of", lambda *given: [])
    monkeypatch.setattr(train_clap, "embed", lambda *given: (torch.eye(64), torch.cat([cosines.T, misses]), 0))
    found = train_clap.check(SimpleNamespace(device=CPU), torch.zeros(64, 1), range(64), 2)
    assert found == {"val_captions": 0.5, "val_clips": 0.5, "val_recall": 1.0}
