"""CLAP, ranking, and the ranker: the originals' numbers, closed forms, that a preference is learned, wrong input."""
import math
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import PARITY, overwrite, planted, refused, relative_error

import ranker
import reward
from lib.audio import read_audio, write_wav
from lib.common import UserError, generator, read_json, read_jsonl, write_jsonl
from experiments.alignment import best_of
from reward import build_clap, load_clap, make_pairs, usable_pairs
from world import ears, train_ranker
from world.train_clap import new_clap

FIXTURE = dict(feature_size=64, sampling_rate=48000, hop_length=480, fft_window_size=1024, frequency_min=50,
               frequency_max=14000, padding="repeatpad", truncation="rand_trunc")


def small():
    """A Clap as small as the layout allows, random weights."""
    return new_clap(16, 16, 0).eval()


def test_network_matches_the_original(parity):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    fixture = parity("clap")
    tensors, weights = fixture.load("clap_tiny_tensors"), fixture.load("clap_tiny")
    config = {"text_config": fixture.info["text_config"], "audio_config": fixture.info["audio_config"],
              "projection_dim": fixture.info["text_config"]["projection_dim"]}
    ours = build_clap(config, Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), FIXTURE)
    ours.clap.load_state_dict({name: weights.get(name, own) for name, own in ours.clap.state_dict().items()})
    ours.eval()
    with torch.no_grad():
        longer = tensors["is_longer"].bool()
        audio = ours.clap.get_audio_features(tensors["input_features"], longer).pooler_output
        text = ours.clap.get_text_features(tensors["input_ids"], tensors["attention_mask"]).pooler_output
    assert relative_error(audio, tensors["audio_embeds"]) < 1e-5
    assert relative_error(text, tensors["text_embeds"]) < 1e-5
    assert relative_error(audio @ text.T, tensors["similarity_matrix_audio_by_text"]) < 1e-4
    assert relative_error((audio * text).sum(1), tensors["cosine_similarity_per_pair"]) < 1e-4


def test_clap_score_matches_the_original(parity, monkeypatch):
    arrays, fixed = np.load(PARITY / "metrics.npz"), parity("metrics").info["clap_score"]
    clap = small()
    for name in ("audio", "text"):                              # the towers' outputs are given, of any length
        monkeypatch.setattr(getattr(clap.clap, f"{name}_projection"), "forward",
                            lambda _, name=name: torch.from_numpy(arrays[f"clap_{name}"]))
    scores = clap.scores([torch.ones(9000)] * 6, 16000, list("abcdef"))
    assert scores.tolist() == pytest.approx(fixed["per_item"], abs=1e-6)
    assert scores.mean().item() == pytest.approx(fixed["mean"], abs=1e-6)


def test_saved_folder_is_read_here_and_by_transformers(tmp_path):
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel
    ours = small()
    ours.save(tmp_path)
    again, theirs = load_clap(tmp_path), ClapModel.from_pretrained(tmp_path).eval()
    audio, prompts = [0.2 * torch.randn(1, 30000, generator=generator(0))], ["rain, then \U0001f600"]
    assert torch.equal(ours.scores(audio, 16000, prompts), again.scores(audio, 16000, prompts))
    extractor = ClapFeatureExtractor.from_pretrained(tmp_path)
    mel = extractor([audio[0][0].numpy()], sampling_rate=16000, return_tensors="pt")["input_features"]
    ids = AutoTokenizer.from_pretrained(tmp_path)(prompts, return_tensors="pt")
    with torch.no_grad():
        heard = theirs.get_audio_features(mel).pooler_output
        read = theirs.get_text_features(ids["input_ids"], ids["attention_mask"]).pooler_output
    assert (heard * read).sum().item() == pytest.approx(again.scores(audio, 16000, prompts).item(), abs=1e-5)
    (tmp_path / "config.json").write_text('{"text_config": 7}')
    refused("the CLAP's config or preprocessor cannot be used", load_clap, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused("weights_only", load_clap, tmp_path)


def test_scores_do_not_depend_on_the_batch_and_long_texts_are_cut():
    ours = small()
    clips = [0.1 * torch.randn(n, generator=generator(n)) for n in (8000, 64000, 70000, 16000, 3000)]
    prompts = ["rain", "wind, then rain", "a violin and rain", "three beeps", "rain " * 500]
    together = ours.scores(clips, 16000, prompts, batch_size=5)
    for i in range(5):
        assert ours.scores([clips[i]], 16000, [prompts[i]]).item() == pytest.approx(together[i].item(), abs=1e-5)
    refused("a clip is empty", ours.embed_audio, [clips[0], torch.zeros(0)], 16000)


def test_score_prints_the_cosine(tmp_path, capsys):
    clap, path = small(), str(tmp_path / "a.wav")
    clap.save(tmp_path / "clap")
    write_wav(path, 0.1 * torch.sin(torch.arange(20000) / 7)[None], 16000)
    reward.main(["--audio", path, "--prompt", "rain", "--clap", str(tmp_path / "clap")])
    printed = float(capsys.readouterr().out.split("\n")[1].split()[0])
    assert printed == pytest.approx(clap.scores([read_audio(path, 16000, 1)], 16000, ["rain"]).item(), abs=1e-6)
    refused("give sounds by --audio, and by --prompt", reward.main, ["--audio", path])


def test_pairs_match_the_official_choice(parity):
    fixed = parity("metrics").info["crpo_pair_selection"]
    prompts, winners, losers = make_pairs(np.round(fixed["clap_scores"], 3))    # the official code ranks rounded scores
    assert winners.tolist() == fixed["chosen_index"] and losers.tolist() == fixed["rejected_index"]
    assert prompts.tolist() == list(range(len(winners)))


def test_best_and_worst_ties_and_nan(capsys):
    scores = [[0.1, 0.5, 0.5, 0.0], [0.2, 0.2, 0.2, 0.2], [0.3, np.nan, 0.9, 0.1], [-1e-9, 0.0, 0.0, -1e-9]]
    pairs = [part.tolist() for part in make_pairs(scores)]
    assert pairs == [[0, 3], [1, 1], [3, 0]]                                    # the first of equals
    assert [part.tolist() for part in make_pairs(scores, 2)] == [[0, 3, 0, 3], [1, 1, 2, 2], [3, 0, 0, 3]]
    assert [part.tolist() for part in make_pairs([[3, 1, 2.]], 9)] == [[0], [0], [1]]       # none with itself
    refused("scores are equal", usable_pairs, np.ones((2, 3)))
    assert len(usable_pairs(np.array([[1, 2, 3, 4.]]), 3)[0]) == 2 and "make 2 pairs, not 3" in capsys.readouterr().err
    refused("scores are NaN or infinite: mend --reward", usable_pairs, np.array([[1, np.nan, 2], [0, 0, 0]]))
    assert best_of(scores).tolist() == [1, 0, 2, 1]
    refused("all rewards of a prompt are NaN", best_of, [[1.0, 2.0], [np.nan, np.nan]])
    assert ears.spearman(np.array([1, 2, 2, 4]), np.array([1, 3, 2, 9])) == pytest.approx(0.9486832980505138)
    assert math.isnan(ears.spearman(np.arange(50), np.ones(50)))


def test_ranknet_and_its_measures_have_closed_forms():
    zero = torch.zeros(4)
    assert ranker.ranknet_loss(zero, zero, torch.tensor([1.0, 0, 0.5, 1])).item() == pytest.approx(math.log(2))
    a, b = torch.tensor([1.0]), torch.tensor([-0.5])
    assert ranker.ranknet_loss(a, b, torch.ones(1)).item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-5)
    both = ranker.ranknet_loss(a, b, torch.zeros(1)) + ranker.ranknet_loss(a, b, torch.ones(1))
    assert 2 * ranker.ranknet_loss(a, b, torch.full((1,), 0.5)).item() == pytest.approx(both.item(), rel=1e-6)
    difference, preference = np.array([2.0, -1.0, 0.5, 3.0]), np.array([1.0, 0.0, 0.0, 0.5])
    assert train_ranker.pairwise_accuracy(difference, preference) == pytest.approx(2 / 3)   # the tie does not count
    rng = np.random.default_rng(0)
    chance = rng.random(20000)
    told = (rng.random(20000) < chance).astype(float)
    assert train_ranker.calibration_error(chance, told) < 0.02
    assert train_ranker.calibration_error(np.where(chance > 0.5, 0.99, 0.01), told) > 0.15
    network = ranker.Ranker(2048)
    widths = [tuple(layer.weight.shape) for layer in network.layers if isinstance(layer, torch.nn.Linear)]
    assert widths == [(1024, 2048), (512, 1024), (256, 512), (128, 256), (1, 128)]          # second paper, III-C
    kinds = [type(layer).__name__ for layer in network.layers][:4]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] and network.layers[3].p == 0.5


def test_a_preference_is_learned_near_its_ceiling_and_calibrated():
    clips, features, truth, named = planted(1200, 12000)
    parts = train_ranker.split_votes(clips, named, 0)
    held = {clips[i]["caption"] for i in named.a[parts[2]]}
    assert not held & {clips[i]["caption"] for i in named.a[parts[0]]}                  # split by prompt
    settings = train_ranker.Fit((32, 16), 0.5, 6, 128, 3e-3, 1e-2, 0)
    network, log = train_ranker.fit(features, named, parts, settings)
    utility = network.utility(features).detach().numpy()
    found = train_ranker.report(utility, train_ranker.Votes(*(column[parts[2]] for column in named)), truth)
    assert found["accuracy"] > found["ceiling"] - 0.05 and found["spearman"] > 0.93
    assert found["calibration error"] < 0.12 and len(log) == 6
    scores = network(features).detach()
    assert abs(scores.mean()) < 0.1 and abs(scores.std() - 1) < 0.1                     # standardised
    again, _ = train_ranker.fit(features, named, parts, settings)
    assert torch.equal(scores, again(features).detach())


def test_a_column_is_written_and_a_contaminated_one(sounds, tmp_path):
    found = read_json(sounds / "ranker" / "report.json")
    assert 0 <= found["accuracy"] <= 1 and "spearman" in found and found["ceiling"] > 0.6
    assert len(list((sounds / "ranker" / "features").iterdir())) == 1       # used again by the same clips and encoders
    arguments = ["--data", str(sounds / "votes" / "clips.jsonl"), "--ranker", str(sounds / "ranker"),
                 "--out", str(tmp_path / "scored.jsonl"), "--device", "cpu"]
    ranker.main([*arguments, "--plus", "level", "2"])
    trained = ranker.TrainedRanker(sounds / "ranker")
    for row in read_jsonl(tmp_path / "scored.jsonl")[:3]:
        audio = read_audio(tmp_path / row["audio"], 16000, 1)
        assert trained.scores([audio], 16000, [row["caption"]]).item() == pytest.approx(row["score"], abs=1e-4)
        assert row["score_plus_level"] == pytest.approx(row["score"] + 2 * row["level"])
    scored = tmp_path / "scored.jsonl"
    for flags, what in ((["--column", "audio"], "--column audio is a column already"), (["--column", "caption"], "caption is"),
                        (["--column", "level"], "level is a column already"), (["--column", "duration"], "duration is"),
                        (["--data", str(scored), "--out", str(tmp_path / "more.jsonl")], "--column score is a column already"),
                        (["--plus", "nothing", "2"], "--plus takes a column of numbers"),
                        (["--out", str(sounds / "votes" / "clips.jsonl")], "must be another file than --data")):
        refused(what, ranker.main, [*arguments, *flags])


def test_a_sound_damaged_in_its_middle_is_left_out_and_changed_sounds_are_heard_anew(sounds, tmp_path, capsys):
    rows = read_jsonl(sounds / "votes" / "clips.jsonl")[:3]
    for number, row in enumerate(rows):
        sound = read_audio(sounds / "votes" / row["audio"], 16000, 1)
        soundfile.write(tmp_path / f"{number}.flac", sound[0].numpy() + (number == 1) * 0.01, 16000)
        rows[number] = {"audio": f"{number}.flac", "caption": row["caption"], "number": number}
    overwrite(tmp_path / "1.flac", (tmp_path / "1.flac").stat().st_size // 2, bytes(200))
    write_jsonl(tmp_path / "m.jsonl", rows)

    def scores():
        ranker.main(["--data", str(tmp_path / "m.jsonl"), "--ranker", str(sounds / "ranker"), "--device", "cpu"])
        return {row["number"]: row["score"] for row in read_jsonl(tmp_path / "scored.jsonl")}
    first = scores()
    errors = capsys.readouterr().err
    assert first.keys() == {0, 2} and "1.flac cannot be used" in errors and "1 of 3 sounds skipped" in errors
    assert scores() == first and len(list((tmp_path / "features_scored").iterdir())) == 1       # used again
    shutil.copy2(tmp_path / "2.flac", tmp_path / "0.flac")
    (tmp_path / "1.flac").unlink()
    shutil.copy2(tmp_path / "2.flac", tmp_path / "1.flac")
    changed = scores()
    assert changed.keys() == {0, 1, 2} and changed[0] != first[0] and changed[2] == pytest.approx(first[2], abs=1e-4)


def test_votes_on_sounds_that_cannot_be_read_do_not_train(sounds, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train_ranker, "clip_features", lambda encoders, clips, folder: torch.tensor(
        [[math.nan if row["audio"].endswith("000003_01.wav") else 1.0] for row in clips]))

    def fit(features, votes, *_):
        seen.append(features[votes.a].isfinite().all() and features[votes.b].isfinite().all())
        raise UserError(f"{len(votes.a)} votes")
    monkeypatch.setattr(train_ranker, "fit", fit)
    cast = read_jsonl(sounds / "votes" / "votes.jsonl")
    whole = sum("clips/000003_01.wav" not in (vote["a"], vote["b"]) for vote in cast)
    assert whole < len(cast)
    refused(f"{whole} votes", train_ranker.main, [
        "--votes", str(sounds / "votes" / "votes.jsonl"), "--clap", str(sounds / "reward"), "--encoder", str(sounds),
        "--out", str(tmp_path / "r"), "--device", "cpu"])
    assert seen == [True]


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_score_reads_only_what_is_heard(tmp_path, monkeypatch, truncation, capsys):
    clap, path, read = small(), tmp_path / "long.flac", []
    front = clap.front
    seconds = front.samples / front.sampling_rate
    soundfile.write(path, np.full(round(16000 * (seconds + 3)), 0.1), 16000)
    original = reward.read_audio

    def counting(*arguments, **more):
        read.append(original(*arguments, **more))
        return read[-1]
    monkeypatch.setattr(reward, "read_audio", counting)
    monkeypatch.setattr(reward, "load_clap", lambda *_: clap)
    monkeypatch.setattr(front, "fused", truncation == "fusion")
    monkeypatch.setattr(reward.Clap, "scores", lambda self, audios, rate, prompts: torch.ones(1))
    reward.main(["--audio", str(path), str(tmp_path / "gone.wav"), "--prompt", "rain", "--device", "cpu"])
    heard = read[0].shape[1] / front.sampling_rate
    assert heard == pytest.approx(seconds + (3 if truncation == "fusion" else 0.1), abs=0.01)
    assert "gone.wav is missing" in capsys.readouterr().err


def test_wrong_votes_are_one_line(sounds, tmp_path, capsys):
    folder, file = sounds / "votes", tmp_path / "votes.jsonl"
    cast = read_jsonl(folder / "votes.jsonl")

    def read(rows):
        write_jsonl(file, rows)
        return train_ranker.read_votes(file, folder)
    clips, kept = read([*cast[:9], {**cast[9], "a": "gone.wav"}])
    assert len(kept.a) == 9 and "1 votes are on missing clips, left out" in capsys.readouterr().err
    odd = [{**cast[0], **change} for change in ({"chance": "0.7"}, {"chance": None})]
    clips, kept = read([{**cast[0], "prompt": 5, "source": ["x"]}, {**cast[1], "prompt_b": None}])
    assert clips[0]["caption"] == "5" and kept.source.tolist() == ["['x']", cast[1]["source"]]
    for rows, what in (([odd[0]], "its chance '0.7'"), ([odd[1]], "its chance None"), ([{**cast[0], "a": "x" * 300}], "has no votes on clips in"),
                       ([{**vote, "b": "gone.wav"} for vote in cast[:5]], "has no votes on clips in"),
                       ([{"prompt": "x"}], "votes.jsonl cannot be used: 'preference'; a vote is"),
                       ([{**cast[0], "preference": 0.7}], "a preference is 0.7"), ([], "has no votes")):
        refused(what, read, rows)
    refused("ranker.safetensors is missing", ranker.TrainedRanker, tmp_path)
    write_jsonl(file, cast[:1])
    with pytest.raises(UserError, match="are too few"):
        train_ranker.main(["--votes", str(file), "--audio_dir", str(folder), "--clap", str(sounds / "reward"),
                           "--encoder", str(sounds), "--out", str(tmp_path / "r"), "--device", "cpu"])
    refused("name a folder with a tagger, or an audio model", ranker.Encoders, sounds / "reward", tmp_path / "nothing")


def test_any_audio_model_of_transformers_is_an_encoder(sounds, tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model
    torch.manual_seed(0)
    Wav2Vec2Model(Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                 conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
                                 num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, vocab_size=8)
                  ).save_pretrained(tmp_path / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "model")
    encoders = ranker.Encoders(sounds / "reward", str(tmp_path / "model"))
    audio = [torch.randn(1, size, generator=generator(size)) * 0.1 for size in (16000, 9000)]
    both = encoders.features(audio, 16000, ["rain", ""])
    assert both.shape[0] == 2 and torch.allclose(both[1], encoders.features(audio[1:], 16000, [""])[0], atol=1e-5)
    assert not both[1, -16:].any() and both[0, -16:].any()                       # no prompt: the zero vector
