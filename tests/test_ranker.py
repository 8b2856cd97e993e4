"""Quality, votes and the ranker: closed forms, noise of known strength, that a preference is learned, wrong input."""
import json
import math

import numpy as np
import pytest
import torch

import ranker
import reward
import votes
from common import UserError, read_json, read_jsonl, write_jsonl
from tagger import Tagger, load_tagger, quality, save_tagger
from vocoder import MEL_16K, LogMel
from world import DEGRADATIONS, World, degrade

# ----------------------------------------------------------------------------- quality


def test_quality_is_one_when_whole_and_falls_with_the_level():
    log_mel, audio = LogMel(**MEL_16K), World("val").render(3)[0]
    clean = torch.from_numpy(audio)[None]
    assert votes.true_quality(clean, clean, log_mel).item() == 1
    for kind in DEGRADATIONS:
        takes = [torch.from_numpy(degrade(audio, kind, level, np.random.default_rng(0))) for level in (0.1, 0.5, 0.95)]
        levels = [votes.true_quality(clean, take[None], log_mel).item() for take in takes]
        assert 1 > levels[0] > levels[1] > levels[2] > 0, kind


def test_takes_depend_on_their_place_alone_and_a_hum_leaves_the_quality():
    log_mel, world = LogMel(**MEL_16K), World("train", seed=5000)
    audio, rows = votes.takes_of(world, 4, 3, 0.0, log_mel)
    again, _ = votes.takes_of(world, 4, 2, 0.0, log_mel)
    assert np.array_equal(audio[:2], again) and not np.array_equal(audio[0], audio[1])
    hummed, others = votes.takes_of(world, 4, 3, 1.0, log_mel)
    assert [row["quality"] for row in others] == [row["quality"] for row in rows]
    assert all(row["hum"] == 1 for row in others) and not np.allclose(hummed, audio)
    spectrum = np.abs(np.fft.rfft(hummed[0] - 0 * audio[0]))
    assert spectrum[round(240 * 65536 / 16000)] > 5 * np.median(spectrum)


# ----------------------------------------------------------------------------- votes

def clips_of(count, rng):
    return [{"audio": f"{i}.wav", "caption": f"prompt {i // 2}", "scene": i // 2, "quality": float(rng.random()),
             "degradation": "noise", "level": 0.0} for i in range(count)]


def test_votes_have_the_noise_they_say():
    clips = clips_of(400, np.random.default_rng(0))
    cast = votes.cast_votes(clips, 20000, seed=1)
    assert cast == votes.cast_votes(clips, 20000, seed=1)
    decided = [vote for vote in cast if vote["preference"] != 0.5]
    chance, told = np.array([(vote["chance"], vote["preference"]) for vote in decided]).T
    for low in np.arange(0, 1, 0.2):
        inside = (chance >= low) & (chance < low + 0.2)
        assert told[inside].mean() == pytest.approx(chance[inside].mean(), abs=0.03)
    best = np.maximum(chance, 1 - chance).mean()
    assert ((chance > 0.5) == (told == 1)).mean() == pytest.approx(best, abs=0.01) and 0.7 < best < 0.9
    assert 0.02 < 1 - len(decided) / len(cast) < 0.15
    assert {vote["source"] for vote in cast} == set(votes.SOURCES)
    for vote in cast[:200]:
        assert ("prompt_b" in vote) <= (not votes.SOURCES[vote["source"]].one_prompt)
    for_a, for_b = votes.chances(votes.Source(0.1, 0.05, 0.0), 0.3)
    assert for_a + for_b < 1 and for_a > 0.9 and votes.chances(votes.Source(0.1, 0, 0), 0.0) == (0.5, 0.5)
    with pytest.raises(UserError, match="at least 2 --takes"):
        votes.cast_votes(clips[:1], 10)


# ----------------------------------------------------------------------------- the ranker's maths

def test_ranknet_and_its_measures_have_closed_forms():
    zero = torch.zeros(4)
    assert ranker.ranknet_loss(zero, zero, torch.tensor([1.0, 0, 0.5, 1])).item() == pytest.approx(math.log(2))
    a, b = torch.tensor([1.0]), torch.tensor([-0.5])
    assert ranker.ranknet_loss(a, b, torch.ones(1)).item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-5)
    both = ranker.ranknet_loss(a, b, torch.zeros(1)) + ranker.ranknet_loss(a, b, torch.ones(1))
    assert 2 * ranker.ranknet_loss(a, b, torch.full((1,), 0.5)).item() == pytest.approx(both.item(), rel=1e-6)
    difference, preference = np.array([2.0, -1.0, 0.5, 3.0]), np.array([1.0, 0.0, 0.0, 0.5])
    assert ranker.pairwise_accuracy(difference, preference) == pytest.approx(2 / 3)         # the tie does not count
    rng = np.random.default_rng(0)
    chance = rng.random(20000)
    told = (rng.random(20000) < chance).astype(float)
    assert ranker.calibration_error(chance, told) < 0.02
    assert ranker.calibration_error(np.where(chance > 0.5, 0.99, 0.01), told) > 0.15
    network = ranker.Ranker(2048)
    widths = [tuple(layer.weight.shape) for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    assert widths == [(1024, 2048), (512, 1024), (256, 512), (128, 256), (1, 128)]          # second paper, III-C
    kinds = [type(layer).__name__ for layer in network.layers][:4]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] and network.layers[3].p == 0.5


def planted(seed=0, count=1200):
    """Features in which two columns decide the quality, and votes on them."""
    rng = np.random.default_rng(seed)
    clips = clips_of(count, rng)
    features = torch.from_numpy(rng.standard_normal((count, 12))).float()
    truth = 1 / (1 + np.exp(-(features[:, 0] - features[:, 1]).numpy()))
    for row, value in zip(clips, truth):
        row["quality"] = float(value)
    cast = votes.cast_votes(clips, 12000, seed)
    place = {row["audio"]: i for i, row in enumerate(clips)}
    named = {"a": np.array([place[v["a"]] for v in cast]), "b": np.array([place[v["b"]] for v in cast]),
             "preference": np.array([v["preference"] for v in cast], np.float32),
             "chance": np.array([v["chance"] for v in cast]), "source": np.array([v["source"] for v in cast])}
    return clips, features, truth, named


def test_a_preference_is_learned_near_its_ceiling_and_calibrated():
    clips, features, truth, named = planted()
    parts = ranker.split_votes(clips, named, 0)
    held = {row["caption"] for i, row in enumerate(clips) if i in set(named["a"][parts[2]])}
    assert not held & {clips[i]["caption"] for i in named["a"][parts[0]]}                  # split by prompt
    network, log = ranker.fit(features, named, parts, widths=(32, 16), epochs=6, batch_size=128, learning_rate=3e-3)
    found = ranker.report(network, features, named, parts[2], truth)
    assert found["accuracy"] > found["ceiling"] - 0.05 and found["spearman"] > 0.93
    assert found["calibration error"] < 0.12 and len(log) == 6
    scores = network(features).detach()
    assert abs(scores.mean()) < 0.1 and abs(scores.std() - 1) < 0.1                        # standardised
    again, _ = ranker.fit(features, named, parts, widths=(32, 16), epochs=6, batch_size=128, learning_rate=3e-3)
    assert torch.equal(scores, again(features).detach())


# ----------------------------------------------------------------------------- from sounds to scores

@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """Twenty scenes of two takes with votes, small taggers, a small CLAP, a tiny codec."""
    from test_train_fm import tiny_parts

    from model import save_model
    from train_clap import new_clap
    from vae import make_codec
    folder = tmp_path_factory.mktemp("sounds")
    flow, encoder = tiny_parts()
    codec = make_codec("mel", dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1],
                                   num_res_blocks=1, attn_layers=[], down_layers=[0, 1])).eval()
    save_model(folder / "model", flow, codec, encoder)
    new_clap(16, 16, 0).save(folder / "clap")
    torch.manual_seed(0)
    for which, name in (("features", "tagger_features.safetensors"), ("judge", "tagger.safetensors")):
        save_tagger(folder / "model" / name, Tagger(["rain", "wind", "violin"], ["rain"], 24, 1))
    save_tagger(folder / "model" / "tagger_quality.safetensors", Tagger(["quality"], [], 24, 1))
    votes.main(["--scenes", "20", "--takes", "2", "--votes", "400", "--through_codec", "0.3", "--codec",
                str(folder / "model"), "--out", str(folder / "votes"), "--workers", "1", "--device", "cpu"])
    reward.main(["train_ranker", "--votes", str(folder / "votes" / "votes.jsonl"), "--clap", str(folder / "clap"),
                 "--encoder", str(folder / "model"), "--widths", "16", "8", "--epochs", "2", "--batch_size", "64",
                 "--out", str(folder / "ranker"), "--device", "cpu"])
    return folder


def test_votes_and_ranker_leave_what_they_say(sounds, capsys):
    rows, cast = (read_jsonl(sounds / "votes" / f"{name}.jsonl") for name in ("clips", "votes"))
    assert len(rows) == 40 and len(cast) == 400 and 0 < sum(row["coded"] for row in rows) < 40
    assert all((sounds / "votes" / row["audio"]).is_file() for row in rows)
    found = read_json(sounds / "ranker" / "report.json")
    assert 0 <= found["accuracy"] <= 1 and "spearman" in found and found["ceiling"] > 0.6
    before = (sounds / "votes" / "clips.jsonl").read_text()
    torn = "\n".join(before.splitlines()[:37]) + '\n{"audio": "cl'                       # as a kill leaves it
    (sounds / "votes" / "clips.jsonl").write_text(torn)
    again = ["--scenes", "20", "--takes", "2", "--votes", "400", "--through_codec", "0.3", "--codec",
             str(sounds / "model"), "--out", str(sounds / "votes"), "--workers", "1", "--device", "cpu"]
    votes.main(again)
    assert (sounds / "votes" / "clips.jsonl").read_text() == before
    with pytest.raises(UserError, match="were made with takes = 2, now it is 3"):
        votes.main([*again, "--takes", "3"])


def test_a_column_is_written_and_a_contaminated_one(sounds, tmp_path):
    out = tmp_path / "scored.jsonl"
    arguments = ["score_manifest", "--data", str(sounds / "votes" / "clips.jsonl"), "--ranker", str(sounds / "ranker"),
                 "--out", str(out), "--device", "cpu"]
    reward.main([*arguments, "--plus", "level", "2"])
    rows = read_jsonl(out)
    from audio import read_audio
    judged = ranker.Judged(sounds / "ranker")
    for row in rows[:3]:
        audio = read_audio(tmp_path / row["audio"], 16000, 1)
        assert judged.scores([audio], 16000, [row["caption"]]).item() == pytest.approx(row["score"], abs=1e-4)
        assert row["score_plus_level"] == pytest.approx(row["score"] + 2 * row["level"])
    with pytest.raises(UserError, match="has no column nothing of numbers"):
        reward.main([*arguments, "--plus", "nothing", "2"])
    with pytest.raises(UserError, match="must be another file than --data"):
        reward.main([*arguments, "--out", str(sounds / "votes" / "clips.jsonl")])


def test_wrong_votes_are_one_line(sounds, tmp_path, capsys):
    cast = read_jsonl(sounds / "votes" / "votes.jsonl")
    folder = sounds / "votes"

    def read(rows):
        write_jsonl(tmp_path / "votes.jsonl", rows)
        return ranker.read_votes(tmp_path / "votes.jsonl", folder)
    read([{**vote, "source": "one"} for vote in cast])
    assert "all votes are of one source, one" in capsys.readouterr().err
    clips, kept = read([*cast[:9], {**cast[9], "a": "gone.wav"}])
    assert len(kept["a"]) == 9 and "1 of 10 votes are on unknown clips; first:" in capsys.readouterr().err
    for rows, what in (([{**vote, "b": "gone.wav"} for vote in cast[:5]], "5 of 5 votes are on unknown clips"),
                       ([{"prompt": "x"}], "row 1 is no vote"), ([{**cast[0], "preference": 0.7}], "row 1 is no vote"),
                       ([], "holds no votes")):
        with pytest.raises(UserError, match=what):
            read(rows)
    with pytest.raises(UserError, match="ranker.safetensors is missing; python reward.py train_ranker"):
        ranker.Judged(tmp_path)
    (tmp_path / "votes.jsonl").write_text(json.dumps(cast[0]) + "\n")
    with pytest.raises(UserError, match="are too few; give more"):
        reward.main(["train_ranker", "--votes", str(tmp_path / "votes.jsonl"), "--audio_dir", str(folder), "--clap",
                     str(sounds / "clap"), "--encoder", str(sounds / "model"), "--out", str(tmp_path / "r"), "--device",
                     "cpu"])
    with pytest.raises(UserError, match="neither a folder with a tagger nor an audio model"):
        ranker.Encoders(sounds / "clap", tmp_path / "nothing")


def test_any_audio_model_of_transformers_is_an_encoder(sounds, tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model
    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                 conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
                                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=8)
                  ).save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    encoders = ranker.Encoders(sounds / "clap", str(tmp_path / "model"))
    audio = [torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * 0.1 for size in (16000, 9000)]
    both = encoders.features(audio, 16000, ["rain", ""])
    assert both.shape[0] == 2 and torch.allclose(both[1], encoders.features(audio[1:], 16000, [""])[0], atol=1e-5)
    assert not both[1, -16:].any() and both[0, -16:].any()                       # no prompt: the zero vector


# ----------------------------------------------------------------------------- the quality judge

def test_the_quality_judge_learns_and_events_are_not_quality(sounds, tmp_path):
    import train_quality
    from test_train_fm import same

    from common import load_tensors
    arguments = ["--scenes", "48", "--val_scenes", "16", "--codec", str(sounds / "model"), "--width", "24", "--layers",
                 "1", "--steps", "60", "--batch_size", "16", "--workers", "1", "--device", "cpu", "--dtype", "float32"]
    train_quality.main([*arguments, "--out", str(tmp_path / "q")])
    log = read_jsonl(tmp_path / "q" / "log.jsonl")
    assert log[-1]["loss"] < log[0]["loss"]
    judge = load_tagger(tmp_path / "q" / "tagger_quality.safetensors")
    heard = quality(judge, torch.zeros(2, 65536))
    assert heard.shape == (2,) and ((heard >= 0) & (heard <= 1)).all()
    with pytest.raises(UserError, match="hears events, not quality"):
        quality(load_tagger(sounds / "model"), torch.zeros(1, 65536))
    truth, logit = torch.tensor([0.2, 1.0]), torch.tensor([[0.3], [-0.1]])
    loss, _ = train_quality.quality_loss((None, logit, None), truth)
    p = logit[:, 0].sigmoid()
    assert loss.item() == pytest.approx(-(truth * p.log() + (1 - truth) * (1 - p).log()).mean().item(), rel=1e-5)
    assert same(load_tensors(tmp_path / "q" / "tagger_quality.safetensors"),
                {name: t.half() if t.is_floating_point() else t for name, t in judge.state_dict().items()})
