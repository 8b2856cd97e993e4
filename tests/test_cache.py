"""The latent cache: what it holds, resuming, refusing, manifests with bad files, text features."""
import json

import numpy as np
import pytest
import torch

import cache
from common import UserError

TINY_MEL = dict(data_dim=80, embed_dim=4, hidden_dim=8, ch_mult=[1, 1, 1], num_res_blocks=1, attn_layers=[],
                down_layers=[0, 1])


@pytest.fixture(scope="module")
def codec():
    from vae import make_codec
    torch.manual_seed(0)
    return make_codec("mel", TINY_MEL).eval()


@pytest.fixture(scope="module")
def encoder():
    from text import make_text_encoder
    return make_text_encoder(["rain", "wind", "and", "a"], width=16, layers=1, heads=2, d_ff=16, seed=1).eval()


def test_world_cache_holds_the_posterior_and_the_truth(tmp_path, codec):
    from world import World
    built = cache.world_cache(tmp_path / "c", codec, scenes=5, workers=0, batch=2)
    assert built.mean.shape == built.std.shape == (5, 64, 4) and built.mean.dtype == np.float16
    assert isinstance(built.mean, np.memmap) and list(built.kept) == [0, 1, 2, 3, 4]
    for index in (0, 4):
        audio, scene = World("train").render(index)
        mean, std = codec.encode(torch.from_numpy(audio)[None, None])
        assert torch.allclose(torch.from_numpy(np.array(built.mean[index])).float(), mean[0], atol=2e-3, rtol=2e-3)
        assert torch.allclose(torch.from_numpy(np.array(built.std[index])).float(), std[0], atol=2e-3, rtol=2e-3)
        row = built.rows[index]
        assert (row["prompt"], row["duration"]) == (scene.prompt, scene.duration)
        assert [event["name"] for event in row["events"]] == [event.name for event in scene.events]


def test_worker_processes_give_the_same(tmp_path, codec):
    alone = cache.world_cache(tmp_path / "alone", codec, scenes=6, workers=0, batch=2)
    together = cache.world_cache(tmp_path / "together", codec, scenes=6, workers=1, batch=2)
    assert np.array_equal(alone.mean, together.mean) and alone.rows == together.rows and alone.key == together.key


def test_killed_build_goes_on_where_it_stopped(tmp_path, codec, monkeypatch):
    whole = cache.world_cache(tmp_path / "whole", codec, scenes=7, workers=0, batch=2)
    folder, rendered = tmp_path / "killed", []
    render = cache.render_scenes

    def dies_at_the_third_batch(*args):
        rendered.append(list(args[-1]))
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return render(*args)
    monkeypatch.setattr(cache, "render_scenes", dies_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        cache.world_cache(folder, codec, scenes=7, workers=0, batch=2)
    with pytest.raises(UserError, match="incomplete .4 of 7"):
        cache.open_cache(folder)
    with open(folder / "rows.jsonl", "a") as file:                  # a batch of which only one and a half rows came
        file.write(json.dumps(whole.rows[4]) + "\n" + json.dumps(whole.rows[5])[:20])
    resumed = cache.world_cache(folder, codec, scenes=7, workers=0, batch=2)
    assert rendered[3:] == [[4, 5], [6]]
    assert np.array_equal(resumed.mean, whole.mean) and np.array_equal(resumed.std, whole.std)
    assert resumed.rows == whole.rows
    cache.world_cache(folder, codec, scenes=7, workers=0, batch=2)  # complete: nothing is rendered
    assert len(rendered) == 5


def test_stale_cache_is_refused_with_the_reason(tmp_path, codec):
    from vae import make_codec
    cache.world_cache(tmp_path / "c", codec, scenes=3, workers=0)
    with pytest.raises(UserError, match="stale: seed 0 there, 1 now.*--rebuild"):
        cache.world_cache(tmp_path / "c", codec, scenes=3, seed=1, workers=0)
    with pytest.raises(UserError, match="scenes 3 there, 4 now"):
        cache.world_cache(tmp_path / "c", codec, scenes=4, workers=0)
    torch.manual_seed(1)
    with pytest.raises(UserError, match="stale: codec weights"):
        cache.world_cache(tmp_path / "c", make_codec("mel", TINY_MEL).eval(), scenes=3, workers=0)
    with pytest.raises(UserError, match="no latent cache"):
        cache.open_cache(tmp_path)
    with pytest.raises(UserError, match="not a latent cache"):
        cache.discard(tmp_path)
    cache.discard(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def write_manifest(folder, sounds):
    soundfile = pytest.importorskip("soundfile")
    rows = []
    for name, samples in sounds.items():
        if samples is None:
            (folder / name).write_bytes(b"no sound at all")
        else:
            soundfile.write(folder / name, np.sin(np.arange(samples) / 9).astype(np.float32) * 0.5, 16000)
        rows.append({"audio": str(folder / name), "caption": f"a {name}", "duration": None, "score": None})
    path = folder / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def test_manifest_cache_skips_bad_files(tmp_path, codec, capsys):
    path, rows = write_manifest(tmp_path, {"short.wav": 8000, "bad.wav": None, "long.wav": 100000})
    built = cache.manifest_cache(tmp_path / "c", codec, path, rows, 65536, batch=2)
    assert list(built.kept) == [0, 2] and built.mean.shape == (3, 64, 4)
    assert built.rows[0]["duration"] == 0.5 and built.rows[2]["duration"] == pytest.approx(4.096)
    assert "bad.wav" in built.rows[1]["error"] and not built.mean[1].any()
    printed = capsys.readouterr()
    assert "bad.wav" in printed.err and "1 of 3 audio files skipped" in printed.out
    with pytest.raises(UserError, match="stale: crop center there, start now"):
        cache.manifest_cache(tmp_path / "c", codec, path, rows, 65536, crop="start")
    path, rows = write_manifest(tmp_path, {"bad.wav": None, "worse.wav": None})
    with pytest.raises(UserError, match="none of the 2"):
        cache.manifest_cache(tmp_path / "all_bad", codec, path, rows, 65536)


def test_text_features_equal_the_live_encoder(tmp_path, codec, encoder, monkeypatch):
    from text import make_text_encoder
    built = cache.world_cache(tmp_path / "c", codec, scenes=5, workers=0)
    encode, calls = encoder.encode, []

    def dies_once(ids, mask):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(ids, mask)
    monkeypatch.setattr(encoder, "encode", dies_once)
    with pytest.raises(KeyboardInterrupt):
        cache.text_cache(built, encoder, 64, batch=2)
    hidden, offsets = cache.text_cache(built, encoder, 64, batch=2)
    assert calls == [1, 2, 2, 2, 1]                                 # width probe, batch, killed batch, and the rest
    monkeypatch.undo()
    for index, row in enumerate(built.rows):
        live = encoder.encode(*encoder.tokenize([row["prompt"]], 64))[0]
        stored = torch.from_numpy(hidden[offsets[index]:offsets[index + 1]].astype(np.float32))
        assert torch.allclose(stored, live, atol=5e-3)
    other = make_text_encoder(["rain"], width=16, layers=1, heads=2, d_ff=16, seed=2).eval()
    with pytest.raises(UserError, match="text.npy is stale: text encoder"):
        cache.text_cache(built, other, 64)


@pytest.mark.parametrize("frozen", [False, True])
def test_gather_pads_to_the_longest_of_the_batch(tmp_path, codec, encoder, frozen):
    built = cache.world_cache(tmp_path / "c", codec, scenes=6, workers=0)
    data = cache.prepare(built, built.kept, encoder, 64, frozen)
    chosen = np.array([4, 1, 1])
    mean, std, ids, hidden, mask, durations = cache.gather(data, chosen)
    assert torch.equal(mean, torch.from_numpy(built.mean[chosen]).float()) and std.shape == mean.shape
    assert mask.shape == ids.shape and mask.sum(1).max() == mask.shape[1]
    assert durations.tolist() == pytest.approx([built.rows[i]["duration"] for i in chosen])
    for row, index in enumerate(chosen):
        own, _ = encoder.tokenize([built.rows[index]["prompt"]], 64)
        assert torch.equal(ids[row][mask[row]], own[0])
        if frozen:
            assert torch.allclose(hidden[row][mask[row]], encoder.encode(own, own > 0)[0], atol=5e-3)
    assert (hidden is not None) == frozen


def test_world_flags_decide_the_scenes_and_the_key(tmp_path, codec):
    import argparse
    from cache import add_world_flags, world_mix
    parser = argparse.ArgumentParser()
    add_world_flags(parser)
    assert world_mix(parser.parse_args([])) == {"seed": 0}
    mix = world_mix(parser.parse_args(["--world_seed", "3", "--counted", "1", "--relations", "1", "0", "0", "0"]))
    made = cache.world_cache(tmp_path / "a", codec, scenes=12, workers=0, **mix)
    assert {row["relation"] for row in made.rows} == {"single"}
    plain = cache.world_cache(tmp_path / "b", codec, scenes=12, workers=0, seed=3)
    assert plain.key != made.key and [row["prompt"] for row in plain.rows] != [row["prompt"] for row in made.rows]
    for wrong in (["--counted", "2"], ["--relations", "0", "1", "1", "1"], ["--relations", "1", "nan", "1", "1"]):
        with pytest.raises(UserError):
            world_mix(parser.parse_args(wrong))
