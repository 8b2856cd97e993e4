"""data.py: each manifest format, each wrong input, crop and pad as a model hears it, the split, the preview."""
import errno
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

import data
import vae
from conftest import PICTURES, TINY_MEL, overwrite, refused
from lib.audio import read_audio, write_wav
from lib.common import UserError, locked, read_jsonl, run_main
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
    for name, more, message in (("none.jsonl", {}, "none.jsonl is missing"), ("latin.csv", {}, "line 2 holds the byte 0xff, which is not UTF-8; save"),
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


@pytest.mark.parametrize("name, start", [
    ("abc_def_30.wav", 30), ("abc_def_30_40.wav", 30), ("abc_def_30000_40000.flac", 30), ("Yabc_def_30_40.wav", "30.0"),
    ("abc_def_30.000_40.000.wav", "30"), ("abc_def_000030.ogg", 30), ("abc_def_0_10000.wav", 0), ("abc_def.wav", 50)])
def test_audiocaps_names_with_start_and_end(tmp_path, name, start):
    """In seconds or milliseconds; another clip of the same video is not taken for it."""
    for file in (name, "abc_def_130_140.wav", "abc_def_3_13.wav", "abc_30_40.wav"):
        soundfile.write(tmp_path / file, np.zeros(1600), 16000)
    path = write(tmp_path, "m.jsonl", lines({"youtube_id": "abc_def", "start_time": start, "caption": "x"},
                                            {"youtube_id": "abc_def", "start_time": 4, "caption": "x"}))
    rows = data.read_manifest(path)
    assert rows[0]["audio"] == str(tmp_path / name)
    assert rows[1]["audio"] == str(tmp_path / "abc_def.wav")


@pytest.mark.parametrize("name, text", [
    ("m.jsonl", "\ufeff{}\n{bad}\n\n{}\n"), ("m.jsonl", "{}\r\n{}\r\n{bad}"), ("m.json", "[{}, {bad}, {}]"),
    ("m.json", "{}\n{}\n{bad}\n")])
@pytest.mark.parametrize("bad, reason", [
    ('{"audio": "a.wav", "capt', "Unterminated"), ("nonsense", "Expecting value"), ("7", "no object"), ("null", "no object"),
    ('{"audio": "a.wav", "caption": "x", "duration": 1e400}', "duration is inf"),
    ('{"audio": "a.wav", "caption": "x", "duration": 1' + "0" * 400 + "}", "duration is inf"),
    ('{"audio": "a.wav", "caption": "x", "score": -' + "9" * 5001 + "}", "score is -inf"),
    ('{"audio": "a.wav", "caption": "x", "duration": 0}', "duration is 0"),
    ('{"audio": "a.wav", "caption": "\\ud800"}', "surrogates"), ('{"audio": "a.wav", "caption": "x", "z": "\\ud800"}', "surrog"),
    ('{"audio": ["a.wav", "b.wav"], "caption": ["x", "y"]}', "no audio, or more than one"),
    ('{"audio": "a.wav", "caption": ' + "[" * 100000 + "]" * 100000 + "}", "recursion"),
    ('{"audio": "a.wav"}', "no caption"), ('{"audio": 7, "caption": "x"}', "no audio")])
def test_a_bad_row_is_named_counted_and_left_out(clips, capsys, name, text, bad, reason):
    good = json.dumps({"audio": "a.wav", "caption": "rain"})
    path = write(clips, name, text.replace("{}", good).replace("{bad}", bad))
    whole = text.startswith("[") and reason in ("Unterminated", "Expecting value", "recursion")
    if whole:                                                       # such a list cannot be read at all
        refused(f"{name} cannot be used", data.read_manifest, path)
        return
    number = 3 if text.rstrip().endswith("{bad}") else 2
    assert [row["caption"] for row in data.read_manifest(path)] == ["rain", "rain"]
    named, counted = capsys.readouterr().err.splitlines()
    assert f"{name} row {number} cannot be used" in named and reason in named and len(named) < 700
    assert f"1 of 3 rows of {path} skipped" in counted


def test_torn_csv_rows_and_names_that_begin_with_a_space(clips, capsys):
    write_wav(clips / " street.wav", torch.ones(1, 900), 16000)
    rows = ['" street.wav",  a street ', "the dog is whimpering,,,", "a.wav", 'a.wav,"a dog\nand a cat"', "a.wav,one,two",
            f'a.wav,{"x" * 200000}', " a.wav  ,wind\u2028and rain", 'b.wav,"never closed', "a.wav,lost"]
    found = data.read_manifest(write(clips, "m.csv", " audio,caption \n" + "\n".join(rows) + "\n"))
    assert [row["caption"] for row in found] == ["a street", "a dog\nand a cat", "wind\u2028and rain"]
    assert found[0]["audio"] == str(clips / " street.wav") and data.usable_rows(found) == found
    errors = capsys.readouterr().err
    for line in ("row 2 ", "row 3 ", "row 5 ", "row 6 .*field limit", "row 8 .*unexpected end", "4 of 8 rows", "1 of 4 rows"):
        assert re.search(line, errors), line
    assert data.read_manifest(write(clips, "blank.csv", "audio,caption,score\na.wav,rain, \n"))[0]["score"] is None
    refused("field larger", data.read_manifest, write(clips, "head.csv", f"audio,{'c' * 200000}\na.wav,rain\n"))
    refused("nested.json cannot be used: maximum recursion", data.read_manifest, write(clips, "nested.json", "[" * 100000))
    os.mkfifo(clips / "fifo.csv")
    refused("fifo.csv cannot be used: it is no file", data.read_manifest, clips / "fifo.csv")
    long = write(clips, "long.jsonl", lines({"audio": "x" * 300, "caption": "a"}, {"audio": "a\0b", "caption": "a"}, OURS[0]))
    assert len(data.usable_rows(data.read_manifest(long))) == 1 and "2 of 3 sound files" in capsys.readouterr().err


@pytest.mark.parametrize("name, text, wanted", [
    ("p.txt", "\ufeffrain\n\n  a dog, barking \n", [("rain", None), ("a dog, barking", None)]),
    ("p.csv", "audiocap_id,youtube_id,start_time,caption\n1,abc,30,\"Rain, then wind\"\n", [("Rain, then wind", None)]),
    ("p.json", json.dumps([{"captions": "rain", "location": "a.wav"}, {"captions": ["wind", "a gale"], "duration": 2}]),
     [("rain", None), ("wind", 2.0)]),
    ("p.jsonl", "\ufeff" + lines({"prompt": " rain", "caption": "no", "duration": 3}, {"prompt": "x", "duration": "nan"}),
     [("rain", 3.0)])])
def test_prompts_of_every_layout(tmp_path, capsys, name, text, wanted):
    rows = data.read_prompts(write(tmp_path, name, text))
    assert [(row["prompt"], row["duration"]) for row in rows] == wanted and {*rows[0]} == {"prompt", "duration"}
    assert ("1 of 2 rows" in capsys.readouterr().err) == (name == "p.jsonl")


def test_what_is_no_prompt_file_is_refused(tmp_path):
    for name, text, match in (("p.md", "rain", "must be a .jsonl"), ("p", "rain", "must be"), ("p.txt", " \n", "no rows"),
                              ("p.json", '["rain", "wind"]', "row 1 .* no object"), ("p.csv", "text\nrain\n", "no column prompt")):
        refused(match, data.read_prompts, write(tmp_path, name, text))
    os.mkfifo(tmp_path / "fifo.txt")
    refused("it is no file", data.read_prompts, tmp_path / "fifo.txt")


@pytest.mark.parametrize("name, text, message", [
    ("m.jsonl", lines({"audio": "a.wav"}), "no column caption or captions, but .*audio.*; name its own by .* --caption_key"),
    ("m.csv", "caption,file\nrain,a.wav\n", "no column audio or location"),
    ("m.jsonl", lines({"audio": "a.wav", "caption": []}), "row 1 .* no caption"),
    ("m.csv", "audio,caption,duration\na.wav,x,long\n", "row 1 .* 'long'"),
    ("m.csv", "audio,caption\n", "holds no rows"), ("m.json", "[]", "holds no rows"),
    ("m.txt", "a.wav rain\nb.wav wind", "no column audio"), ("m.tsv", "a.wav\train", "must be a .jsonl, .json or .csv"),
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
           "no_samples.wav": "is empty", "nan.wav": "NaN", "folder.wav": "is no file"}
    good = {"audio": str(clips / "a.wav"), "caption": "rain", "duration": None, "score": None}
    rows = [{**good, "audio": str(clips / name)} for name in bad for _ in range(2)]
    assert data.usable_rows([good, *rows]) == [good]
    *errors, last = capsys.readouterr().err.splitlines()
    assert "6 of 7 sound files (--audio_dir?) skipped" in last
    for line, (name, reason) in zip(errors, bad.items(), strict=True):
        assert name in line and reason in line
        refused(reason, read_audio, clips / name, 16000, 1)
    refused("the 6 sound files .* cannot be used: .*missing.wav is missing", data.usable_rows, rows)


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
        write_wav(tmp_path / f"{name}.wav", torch.full((1, 100), 0.1 if name == "a" else 0.2), 16000)
    write_wav(tmp_path / "c.wav", torch.full((1, 100), 0.3), 16000)
    (tmp_path / "twin.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    row, folder = {"prompt": "rain", "duration": 2.0, "winner": "a.wav", "loser": "b.wav"}, f"{tmp_path}/"
    ours = write(tmp_path, "pairs.jsonl", lines({**row, "reward_winner": 1}, {**row, "loser": "a.wav"},
                                                {**row, "loser": "x.wav"}, {**row, "loser": "twin.wav"},
                                                {**row, "loser": "torn.wav"}, {**row, "duration": "long"}))
    assert data.read_pairs(ours) == [{**row, "winner": folder + "a.wav", "loser": folder + "b.wav"}]
    errors = capsys.readouterr().err
    assert "1 of 6 rows" in errors and "4 of 5 pairs" in errors and "twin.wav hold the same sound" in errors
    pair = {"captions": "rain", "duration": 10, "chosen": "c.wav", "reject": "b.wav"}
    official = write(tmp_path, "alpaca.json", json.dumps([pair]))
    assert data.read_pairs(official)[0]["winner"] == folder + "c.wav"
    assert data.read_pairs(official, tmp_path)[0]["loser"] == folder + "b.wav"
    for text, match in (
            ("[]", "no rows"), ('[{"captions": "a", "chosen": "a.wav"}]', "no column loser or .*rejected, but .*; rename its own"),
            (json.dumps([{**pair, "duration": -1}]), "duration is -1"), ("nonsense", "row 1 cannot be used"),
            (json.dumps([{**pair, "chosen": "candidates.safetensors#7"}]), "#7 is missing")):
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
    refused("torn .4 rows, 7 and 7 clips", data.open_cache, tmp_path / "c")
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
    assert "1 of 3 sounds skipped" in printed and "bad.wav" in printed and "bad.wav" in built.rows[1]["error"]
    refused("stale: crop center there, start now", data.manifest_cache, clips / "c", codec, path, rows, 32768, "start")
    refused("the 1 sounds cannot be used", data.manifest_cache, clips / "all_bad", codec, path, rows[1:2], 32768)


def test_a_manifests_cache_knows_its_sounds_and_columns(clips, codec):
    """Other sounds of the same length, a touched file, other columns: stale. Another score column is none of it."""
    path = write(clips, "m.jsonl", lines({"audio": "a.wav", "other": "twin.wav", "caption": "x", "secs": 0.5, "score": 1}))
    shutil.copy2(clips / "a.wav", clips / "twin.wav")

    def build(**keys):
        return data.manifest_cache(clips / "c", codec, path, data.read_manifest(path, **keys), 32768, workers=0)
    build()
    assert len(build(score_key="secs").rows) == 1
    for keys in ({"audio_key": "other"}, {"duration_key": "secs"}):
        refused("stale: sounds and durations", build, **keys)
    before = os.stat(clips / "a.wav")
    write_wav(clips / "a.wav", torch.linspace(1, -1, 16000), 16000)
    assert os.stat(clips / "a.wav").st_size == before.st_size
    refused("stale: sounds and durations", build)
    os.utime(clips / "a.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    build()
    state = clips / "c" / "settings.json"                           # as older versions wrote it
    settings = json.loads(state.read_text())
    del settings["sounds and durations"]
    state.write_text(json.dumps({**settings, "bytes of audio": 32044}))
    refused("stale: .* delete it", build)


def test_silent_and_cancelling_sounds_are_named_once(clips, codec, capsys):
    wave = 0.5 * torch.sin(torch.arange(16000) / 9)
    write_wav(clips / "cancels.wav", torch.stack([wave, -wave]), 16000)
    write_wav(clips / "silent.wav", torch.zeros(1, 16000), 16000)
    names = "a.wav", "cancels.wav", "silent.wav"
    path = write(clips, "m.jsonl", lines(*({"audio": name, "caption": "x"} for name in names)))
    for workers in (0, 1, 0):                                       # the last one reads what is there
        folder = clips / f"c{workers}"
        data.manifest_cache(folder, codec, path, data.read_manifest(path), 32768, workers=workers, batch=1)
        warnings = [line for line in capsys.readouterr().err.splitlines() if "are silent" in line]
        assert len(warnings) == 1 and "2 sounds are silent, or their channels cancel" in warnings[0]
        assert all((f"/{name}" in warnings[0]) == (name != "a.wav") for name in names)
    row, load = {"audio": str(clips / "cancels.wav")}, data.partial(data.load_clip, sampling_rate=16000, samples=99)
    for channels in (1, 2):
        list(data.usable([row], data.partial(load, channels=channels), "sounds"))
        assert ("cancels.wav" in capsys.readouterr().err) == (channels == 1)


def test_two_builds_of_one_cache_and_damaged_ones_are_refused(tmp_path, codec, whole, monkeypatch):
    folder, render = tmp_path / "c", data.render_batch

    def build():
        return data.world_cache(folder, codec, scenes=7, workers=0, batch=2)

    def renders(*arguments):
        refused("is in use by another process", build)
        return render(*arguments)
    monkeypatch.setattr(data, "render_batch", renders)
    build()
    monkeypatch.setattr(data, "render_batch", render)
    with locked(folder):                                            # it is complete: read without the lock
        assert build().rows == whole.rows
    log = folder / "rows.jsonl"
    log.write_text(log.read_text() * 2)
    refused("torn .14 rows, 7 and 7 clips", build)
    for name in ("rows.jsonl", "mean.npy"):                         # somebody's own file
        own = tmp_path / name[:4] / name
        own.parent.mkdir()
        own.write_text("mine")
        refused(f"{name} is not of a cache", data.world_cache, own.parent, codec, scenes=2, workers=0)
        assert own.read_text() == "mine" and os.listdir(own.parent) == [name]
    started = tmp_path / "started"                                  # killed before its settings were written
    started.mkdir()
    for name in ("rows.jsonl", "mean.npy"):
        (started / name).touch()
    assert len(data.world_cache(started, codec, scenes=2, workers=0).rows) == 2


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve room")
def test_room_for_arrays_is_reserved(tmp_path, codec, monkeypatch):
    """On a full disk there is one line and nothing is left; else every block is there before the first write."""
    folder, reserve = tmp_path / "c", os.posix_fallocate

    def full(file, start, size):
        if (folder / "mean.npy").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, start, size)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        refused("no space left writing .*std.npy .needs more than .* MB", data.world_cache, folder, codec, scenes=9, workers=0)
    assert not folder.exists()
    data.new_array(tmp_path / "a.npy", (300, 400))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 2 * 300 * 400


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


def test_preview_skips_a_sound_that_is_damaged_in_its_middle(clips, monkeypatch, capsys):
    rate = np.random.default_rng(0).standard_normal(64000) * 0.1
    soundfile.write(clips / "damaged.flac", rate, 16000)
    overwrite(clips / "damaged.flac", (clips / "damaged.flac").stat().st_size // 2, bytes(200))
    write(clips, "m.jsonl", lines(OURS[0], {"audio": "damaged.flac", "caption": "x"}, OURS[1]))
    run(monkeypatch, "--data", clips / "m.jsonl", "--out", clips / "out")
    errors = capsys.readouterr().err
    assert "damaged.flac cannot be used" in errors and "1 of 3 sounds skipped" in errors
    assert [row["caption"] for row in read_jsonl(clips / "out" / "captions.jsonl")] == ["rain", "wind"]
    assert soundfile.info(clips / "out" / "0001.wav").frames == 65536
    sounds = list(vae.file_clips(MelVAE(**TINY_MEL), data.read_manifest(clips / "m.jsonl"), 0.5, "center"))
    assert [sound.shape for sound in sounds] == [(1, 8000)] * 2
    assert "1 of 3 sounds skipped" in capsys.readouterr().err


@pytest.mark.parametrize("flags", ["--data only_bad.jsonl", "--degraded nan", "--data m.jsonl --out m.jsonl/out"])
def test_wrong_flags_end_in_one_line_and_code_2(clips, monkeypatch, capsys, flags):
    monkeypatch.chdir(clips)
    write(clips, "m.jsonl", lines(*OURS))
    write(clips, "only_bad.jsonl", lines({"audio": "gone.wav", "caption": "x"}))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags.split())
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
