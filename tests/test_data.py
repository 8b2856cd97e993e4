"""data.py: each manifest format, each wrong input, crop and pad as a model hears it, the split, the preview."""
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

import data
from conftest import PICTURES, TINY_MEL, refused
from lib.audio import read_audio, write_wav
from lib.common import UserError, read_jsonl, run_main
from lib.mel import MelVAE
from lib.text import make_text_encoder
from world.scenes import World


@pytest.fixture
def clips(tmp_path):
    """A folder with a.wav (1 s), b.wav (3 s) and sub/c.flac (0.5 s), all 16 kHz mono."""
    write_wav(tmp_path / "a.wav", torch.linspace(-1, 1, 16000), 16000)
    write_wav(tmp_path / "b.wav", torch.linspace(-1, 1, 48000), 16000)
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "sub" / "c.flac", np.full(8000, 0.25), 16000)
    return tmp_path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


OURS = [{"audio": "a.wav", "caption": "rain", "duration": 0.5, "score": 0.62},
        {"audio": "sub/c.flac", "caption": "wind"}]
TANGOFLUX = [{"dataset": "x", "location": "a.wav", "captions": "rain", "duration": 0.5, "score": 0.62},
             {"dataset": "x", "location": "sub/c.flac", "captions": "wind", "duration": None}]
CSV = "\ufeffaudio,caption,duration,score\r\na.wav,rain,0.5,0.62\r\nsub/c.flac,\"wind\",,\r\n"


@pytest.mark.parametrize("name, text", [
    ("m.jsonl", lines(*OURS)), ("m.json", json.dumps(OURS, indent=1)), ("m.csv", CSV),
    ("m.json", lines(*TANGOFLUX)), ("m.jsonl", "\ufeff" + lines(*TANGOFLUX)), ("m.json", json.dumps(TANGOFLUX)),
    ("m.json", lines({**TANGOFLUX[0], "captions": ["rain", "a shower"]}, TANGOFLUX[1])),
], ids=["ours jsonl", "ours json", "csv", "tangoflux json lines", "jsonl with a BOM", "tangoflux list", "captions"])
def test_formats(clips, name, text):
    rows = data.read_manifest(write(clips, name, text))
    assert data.usable_rows(rows) == rows == [
        {"audio": str(clips / "a.wav"), "caption": "rain", "duration": 0.5, "score": 0.62},
        {"audio": str(clips / "sub" / "c.flac"), "caption": "wind", "duration": None, "score": None}]


def test_other_column_names_and_folders(clips, monkeypatch):
    path = write(clips / "sub", "m.csv", "file,text,secs,aesthetics,caption\na.wav,rain,2,-1.5,ignored\n")
    row = data.read_manifest(path, "text", "file", "secs", "aesthetics", audio_dir=clips)[0]
    assert row == {"audio": str(clips / "a.wav"), "caption": "rain", "duration": 2.0, "score": -1.5}
    monkeypatch.chdir(clips)  # as the official code: relative to the working folder
    assert data.read_manifest(path, "text", "file")[0]["audio"] == str(clips / "a.wav")
    write(clips, "m.jsonl", lines(*OURS))
    (clips / "latin.csv").write_bytes(b"audio,caption\na.wav,\xff\xfe\n")
    for name, more, message in (("none.jsonl", {}, "none.jsonl is missing"), ("latin.csv", {}, "cannot be used"),
                                ("m.jsonl", {"duration_key": "length"}, "no column length")):
        refused(message, data.read_manifest, clips / name, **more)


def test_audiocaps_table(clips, capsys):
    """Files are found by youtube_id and start_time, youtube_id or audiocap_id, in any folder and sound format."""
    folder, files = clips / "audio", ["train/-abc_30.wav", "Yxyz.flac", "91139.ogg", "gone.wav"]
    for name in files[:3]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.zeros(16000), 16000)
    path = write(clips, "train.csv", "audiocap_id,youtube_id,start_time,caption\n1,-abc,30,\"Rain, then wind\"\n"
                                     "2,xyz,0,A dog\n91139,qqq,130,A cat\n4,gone,10,A door\n")
    rows = data.read_manifest(path, audio_dir=folder)
    assert [row["audio"] for row in rows] == [str(folder / name) for name in files]
    assert rows[0]["caption"] == "Rain, then wind"
    assert len(data.usable_rows(rows)) == 3 and "gone.wav is missing" in capsys.readouterr().err
    refused("--audio_dir", data.usable_rows, data.read_manifest(path, audio_dir=clips / "sub"))


@pytest.mark.parametrize("name, text, message", [
    ("m.jsonl", lines({"audio": "a.wav"}), "no column caption or captions; name its own by .* --caption_key"),
    ("m.csv", "caption,file\nrain,a.wav\n", "no column audio or location"),
    ("m.jsonl", lines({"audio": "a.wav", "caption": "x"}, {"audio": "b.wav"}), "row 2 .* no caption"),
    ("m.jsonl", lines({"audio": "a.wav", "caption": []}), "row 1 .* no caption"),
    ("m.jsonl", lines({"audio": None, "caption": "x"}), "row 1 .* no audio"),
    ("m.jsonl", '{"audio": "a.wav", "caption": "x", "duration": NaN}\n', "row 1 .* duration is nan"),
    ("m.csv", "audio,caption,duration\na.wav,x,long\n", "row 1 .* 'long'"),
    ("m.csv", "audio,caption\na.wav,rain, then wind\n", "row 1 is not an object, or longer"),
    ("m.csv", "audio,caption\n", "holds no rows"), ("m.json", "[]", "holds no rows"),
    ("m.json", '[{"audio": "a.wav",', "cannot be used"), ("m.json", '["a.wav"]', "row 1 is not an object"),
    ("m.txt", "a.wav rain\nb.wav wind", "must be a .jsonl, .json or .csv file"),
])
def test_wrong_manifests(clips, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        data.read_manifest(write(clips, name, text))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_bad_sound_files_are_named_skipped_and_counted(clips, capsys):
    (clips / "corrupt.wav").write_bytes(b"RIFF not really a sound file" * 20)
    (clips / "empty.wav").write_bytes(b"")
    soundfile.write(clips / "no_samples.wav", np.zeros(0, np.float32), 16000)
    soundfile.write(clips / "nan.wav", np.array([0.1, np.nan, 0.2], np.float32), 16000, subtype="FLOAT")
    (clips / "folder.wav").mkdir()
    bad = {"missing.wav": "is missing", "corrupt.wav": "cannot be used", "empty.wav": "cannot be used",
           "no_samples.wav": "is empty", "nan.wav": "NaN", "folder.wav": "is missing"}
    good = {"audio": str(clips / "a.wav"), "caption": "rain", "duration": None, "score": None}
    rows = [{**good, "audio": str(clips / name)} for name in bad for _ in range(2)]
    assert data.usable_rows([good, *rows]) == [good]
    *errors, last = capsys.readouterr().err.splitlines()
    assert f"{len(rows)} of {len(rows) + 1} rows skipped" in last
    for line, (name, reason) in zip(errors, bad.items(), strict=True):
        assert name in line and reason in line
        refused(reason, read_audio, clips / name, 16000, 1)
    refused("none of the 12 rows has a usable sound file", data.usable_rows, rows)


def test_load_clip_crops_pads_and_doubles(clips):
    row = {"audio": str(clips / "b.wav"), "duration": None}  # a ramp from -1 to 1 in 3 s
    center, seconds = data.load_clip(row, 16000, 1, 16000)
    start, _ = data.load_clip(row, 16000, 1, 16000, "start")
    assert center.shape == (1, 16000) and seconds == 1.0
    assert [data.load_clip({**row, "duration": n}, 16000, 1, 64000)[1] for n in (None, 1.2, 50.0)] == [3.0, 1.2, 3.0]
    assert center.mean().abs() < 1e-3 and start[0, 0] < -0.999 and abs(start.mean() + 2 / 3) < 1e-3
    padded, seconds = data.load_clip({"audio": str(clips / "sub" / "c.flac")}, 44100, 2, 44100)
    assert padded.shape == (2, 44100) and seconds == 0.5 and padded[0].equal(padded[1])
    assert (padded[:, 22050:] == 0).all() and (padded[:, 1000:21000] - 0.25).abs().max() < 1e-3


def test_split_rows_is_stable_and_keeps_files_whole(tmp_path):
    rows = [{"audio": str(tmp_path / f"{i % 500}.wav"), "caption": str(i)} for i in range(1000)]
    training, validation = data.split_rows(rows, 0.1, 0)
    assert len(training) + len(validation) == 1000 and 60 <= len(validation) <= 140
    assert not {row["audio"] for row in training} & {row["audio"] for row in validation}
    moved = [{**row, "audio": row["audio"].replace(str(tmp_path), "/elsewhere")} for row in reversed(rows)]
    assert {row["caption"] for row in data.split_rows(moved, 0.1, 0)[1]} == {row["caption"] for row in validation}
    assert data.split_rows(rows, 0.1, 1)[1] != validation
    for count, fraction, sizes in ((1000, 0.0, [1000, 0]), (2, 0.01, [1, 1]), (1, 0.5, [1, 0])):
        assert [len(part) for part in data.split_rows(rows[:count], fraction)] == sizes


def test_static_sets_of_both_kinds(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write_wav(tmp_path / f"{name}.wav", torch.zeros(1, 100), 16000)
    row, folder = {"prompt": "rain", "duration": 2.0, "winner": "a.wav", "loser": "b.wav"}, f"{tmp_path}/"
    ours = write(tmp_path, "pairs.jsonl", lines({**row, "reward_winner": 1}, {**row, "loser": "a.wav"},
                                                {**row, "loser": "x.wav"}))
    assert data.read_pairs(ours) == [{**row, "winner": folder + "a.wav", "loser": folder + "b.wav"}]
    assert "2 of 3 rows" in capsys.readouterr().err
    pair = {"captions": "rain", "duration": 10, "chosen": "c.wav", "reject": "b.wav"}
    official = write(tmp_path, "alpaca.json", json.dumps([pair]))
    assert data.read_pairs(official)[0]["winner"] == folder + "c.wav"
    assert data.read_pairs(official, tmp_path)[0]["loser"] == folder + "b.wav"
    for text, match in (
            ("[]", "no rows"), ('[{"captions": "a", "chosen": "a.wav"}]', "no column loser or .*rejected; rename its own"),
            (json.dumps([{**pair, "duration": -1}]), "duration is -1"), ("nonsense", "no rows"),
            ('{"captions": "a"}\n{"capt\n{"captions": "c"}', "line 2 is not JSON"),
            (json.dumps([{**pair, "chosen": "candidates.safetensors#7"}]), "two sounds")):
        refused(match, data.read_pairs, write(tmp_path, "pairs.json", text))


@pytest.fixture(scope="module")
def codec():
    torch.manual_seed(0)
    return MelVAE(**TINY_MEL).eval()


@pytest.fixture(scope="module")
def whole(codec, tmp_path_factory):
    """The latents of seven scenes."""
    return data.world_cache(tmp_path_factory.mktemp("whole") / "c", codec, scenes=7, workers=0, batch=2)


@pytest.fixture(scope="module")
def encoder():
    return make_text_encoder(["rain", "wind", "and", "a"], width=16, layers=1, heads=2, d_ff=16, seed=1).eval()


def test_world_cache_holds_the_posterior_and_the_truth(whole, codec):
    assert whole.mean.shape == whole.std.shape == (7, 64, 4) and whole.mean.dtype == np.float16
    assert isinstance(whole.mean, np.memmap) and list(whole.kept) == list(range(7))
    for index in (0, 6):
        audio, scene = World("train").render(index)
        for ours, exact in zip((whole.mean, whole.std), codec.encode(torch.from_numpy(audio)[None, None])):
            assert torch.allclose(torch.tensor(ours[index]).float(), exact[0], atol=2e-3, rtol=2e-3)
        row = whole.rows[index]
        assert (row["prompt"], row["duration"]) == (scene.prompt, scene.duration)
        assert [event["name"] for event in row["events"]] == [event.name for event in scene.events]


def test_killed_build_goes_on_where_it_stopped(tmp_path, codec, whole, monkeypatch):
    rendered, render = [], data.render_batch

    def build(**changes):
        return data.world_cache(tmp_path / "c", codec, **dict(scenes=7, workers=0, batch=2) | changes)

    def dies_at_the_third_batch(*args):
        rendered.append(list(args[-1]))
        if len(rendered) == 3:
            raise KeyboardInterrupt
        return render(*args)
    monkeypatch.setattr(data, "render_batch", dies_at_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        build()
    refused("incomplete .4 of 7", data.open_cache, tmp_path / "c")
    with open(tmp_path / "c" / "rows.jsonl", "a") as file:          # a batch of which only one and a half rows came
        file.write(json.dumps(whole.rows[4]) + "\n" + json.dumps(whole.rows[5])[:20])
    resumed = build()
    assert rendered[3:] == [[4, 5], [6]]
    assert np.array_equal(resumed.mean, whole.mean) and np.array_equal(resumed.std, whole.std)
    assert resumed.rows == whole.rows
    build()                                                         # complete: nothing is rendered
    assert len(rendered) == 5
    refused("stale: seed 0 there, 1 now; delete it", build, seed=1)
    codec = MelVAE(**TINY_MEL).eval()
    refused("stale: codec weights", build)
    refused("settings.json is missing", data.open_cache, tmp_path)


def test_manifest_cache_skips_bad_files(clips, codec, capsys):
    (clips / "bad.wav").write_bytes(b"no sound at all")
    names = ("sub/c.flac", "bad.wav", "b.wav")
    path = write(clips, "m.jsonl", lines(*({"audio": name, "caption": name} for name in names)))
    rows = data.read_manifest(path)
    built = data.manifest_cache(clips / "c", codec, path, rows, 32768, batch=2)
    assert list(built.kept) == [0, 2] and built.mean.shape == (3, 32, 4) and not built.mean[1].any()
    assert [built.rows[i]["duration"] for i in (0, 2)] == [0.5, 2.048]
    printed = capsys.readouterr().err
    assert "1 of 3 rows skipped" in printed and "bad.wav" in printed and "bad.wav" in built.rows[1]["error"]
    refused("stale: crop center there, start now", data.manifest_cache, clips / "c", codec, path, rows, 32768, "start")
    refused("none of the 1", data.manifest_cache, clips / "all_bad", codec, path, rows[1:2], 32768)


def test_text_features_equal_the_live_encoder(tmp_path, codec, encoder, monkeypatch):
    built = data.world_cache(tmp_path / "c", codec, scenes=4, workers=0)
    tokens = encoder.tokenize([row["prompt"] for row in built.rows], 64)
    data.text_cache(built, encoder, *tokens, 64, batch=2)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", None)                      # it is read from the disk
        hidden, offsets = data.text_cache(built, encoder, *tokens, 64)
    for index, row in enumerate(built.rows):
        live = encoder.encode(*encoder.tokenize([row["prompt"]], 64))[0]
        stored = torch.from_numpy(hidden[offsets[index]:offsets[index + 1]].astype(np.float32))
        assert torch.allclose(stored, live, atol=5e-3)
    other = make_text_encoder(["rain"], width=16, layers=1, heads=2, d_ff=16, seed=2).eval()
    refused("text.npy is stale: text encoder", data.text_cache, built, other, *tokens, 64)


@pytest.mark.parametrize("frozen", [False, True])
def test_gather_pads_to_the_longest_of_the_batch(whole, encoder, frozen):
    ready = data.prepare(whole, whole.kept, encoder, 64, frozen)
    chosen = np.array([4, 1, 1])
    mean, std, ids, hidden, mask, durations = data.gather(ready, chosen)
    assert torch.equal(mean, torch.from_numpy(whole.mean[chosen]).float()) and std.shape == mean.shape
    assert mask.shape == ids.shape and mask.sum(1).max() == mask.shape[1]
    assert durations.tolist() == pytest.approx([whole.rows[i]["duration"] for i in chosen])
    for row, index in enumerate(chosen):
        own, _ = encoder.tokenize([whole.rows[index]["prompt"]], 64)
        assert torch.equal(ids[row][mask[row]], own[0])
        if frozen:
            assert torch.allclose(hidden[row][mask[row]], encoder.encode(own, own > 0)[0], atol=5e-3)
    assert (hidden is not None) == frozen


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
    run_main(data.main)


def test_preview_of_the_world_and_of_a_manifest(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--count", 3, "--split", "test", "--pairs", "unseen", "--degraded", 1, "--out", tmp_path)
    assert "next:" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "captions.jsonl")                  # it is a manifest, too
    assert [row["audio"] for row in rows] == ["0000.wav", "0001.wav", "0002.wav"]
    for row in rows:
        assert len(row["events"]) == 2 and row["degradation"] and row["relation"] in ("and", "then")
        assert {"name", "onset", "offset", "count", "hits"} <= set(row["events"][0])
    assert not PICTURES or (tmp_path / "spectrograms.png").stat().st_size > 10000
    again = tmp_path / "again"
    run(monkeypatch, "--data", tmp_path / "captions.jsonl", "--out", again)
    info = soundfile.info(again / "0001.wav")
    assert (info.channels, info.samplerate, info.frames) == (1, 16000, 65536)
    assert [row["duration"] for row in read_jsonl(again / "captions.jsonl")] == [row["duration"] for row in rows]


@pytest.mark.parametrize("flags", ["--data only_bad.jsonl", "--degraded nan", "--data m.jsonl --out m.jsonl/out"])
def test_wrong_flags_end_in_one_line_and_code_2(clips, monkeypatch, capsys, flags):
    monkeypatch.chdir(clips)
    write(clips, "m.jsonl", lines(*OURS))
    write(clips, "only_bad.jsonl", lines({"audio": "gone.wav", "caption": "x"}))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags.split())
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
