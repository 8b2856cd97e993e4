"""data.py: each manifest format, each wrong input, crop and pad as a model hears it, the split, the preview."""
import json
import math
import sys

import numpy as np
import pytest
import soundfile
import torch

import data
from conftest import PICTURES
from audio import write_wav
from common import UserError, read_jsonl, run_main
from test_audio import bad_files


@pytest.fixture
def clips(tmp_path):
    """A folder with a.wav (1 s), b.wav (3 s) and sub/c.flac (0.5 s), all 16 kHz mono."""
    for name, seconds in (("a.wav", 1.0), ("b.wav", 3.0)):
        write_wav(tmp_path / name, torch.linspace(-1, 1, int(16000 * seconds)), 16000)
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "sub" / "c.flac", np.full(8000, 0.25), 16000)
    return tmp_path


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


# ----------------------------------------------------------------------------- manifest formats

OURS = [{"audio": "a.wav", "caption": "rain", "duration": 0.5, "score": 0.62},
        {"audio": "sub/c.flac", "caption": "wind"}]
TANGOFLUX = [{"dataset": "x", "location": "a.wav", "captions": "rain", "duration": 0.5, "score": 0.62},
             {"dataset": "x", "location": "sub/c.flac", "captions": "wind", "duration": None}]
CSV = "\ufeffaudio,caption,duration,score\r\na.wav,rain,0.5,0.62\r\nsub/c.flac,\"wind\",,\r\n"


@pytest.mark.parametrize("name, text", [
    ("m.jsonl", lines(*OURS)), ("m.json", json.dumps(OURS, indent=1)), ("m.csv", CSV),
    ("m.json", lines(*TANGOFLUX)), ("m.jsonl", lines(*TANGOFLUX)), ("m.json", json.dumps(TANGOFLUX)),
    ("m.json", lines({**TANGOFLUX[0], "captions": ["rain", "a shower"]}, TANGOFLUX[1])),
], ids=["ours jsonl", "ours json", "csv", "tangoflux json lines", "tangoflux jsonl", "tangoflux list", "captions"])
def test_formats(clips, name, text):
    rows = data.read_manifest(write(clips, name, text))
    assert rows == [
        {"audio": str(clips / "a.wav"), "caption": "rain", "duration": 0.5, "score": 0.62},
        {"audio": str(clips / "sub" / "c.flac"), "caption": "wind", "duration": None, "score": None}]
    assert data.usable_rows(rows) == rows


def test_other_column_names_and_folders(clips, monkeypatch):
    text = "file,text,secs,aesthetics,caption\na.wav,rain,2,-1.5,ignored\n"
    path = write(clips, "m.csv", text)
    row = data.read_manifest(path, "text", "file", "secs", "aesthetics")[0]
    assert (row["caption"], row["duration"], row["score"]) == ("rain", 2.0, -1.5)
    path = write(clips / "sub", "m.csv", text)
    assert data.read_manifest(path, "text", "file", audio_dir=clips)[0]["audio"] == str(clips / "a.wav")
    monkeypatch.chdir(clips)  # as the official code: relative to the working folder
    assert data.read_manifest(path, "text", "file")[0]["audio"] == str(clips / "a.wav")


def test_audiocaps_table(clips, capsys):
    """Files are found by youtube_id and start_time, youtube_id or audiocap_id, in any folder and sound format."""
    folder = clips / "audio"
    for name in ("train/-abc_30.wav", "Yxyz.flac", "91139.ogg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.zeros(16000), 16000)
    path = write(clips, "train.csv", "audiocap_id,youtube_id,start_time,caption\n1,-abc,30,\"Rain, then wind\"\n"
                                     "2,xyz,0,A dog\n91139,qqq,130,A cat\n4,gone,10,A door\n")
    rows = data.read_manifest(path, audio_dir=folder)
    assert [row["audio"][len(str(folder)) + 1:] for row in rows] == ["train/-abc_30.wav", "Yxyz.flac", "91139.ogg",
                                                                    "gone.wav"]
    assert rows[0]["caption"] == "Rain, then wind"
    assert len(data.usable_rows(rows)) == 3 and "gone.wav is missing" in capsys.readouterr().err
    with pytest.raises(UserError, match="--audio_dir"):
        data.read_manifest(path, audio_dir=clips / "sub")


# ----------------------------------------------------------------------------- wrong input

@pytest.mark.parametrize("name, text, message", [
    ("m.jsonl", lines({"audio": "a.wav"}), "no column caption or captions; name one of audio with --caption_key"),
    ("m.csv", "caption,file\nrain,a.wav\n", "no column audio or location"),
    ("m.csv", "audio,caption\na.wav,x\nb.wav, \n", r"row 2 \(b.wav\) has no caption"),
    ("m.jsonl", lines({"audio": "a.wav", "caption": "x"}, {"audio": "b.wav"}), r"row 2 \(b.wav\) has no caption"),
    ("m.jsonl", lines({"audio": "a.wav", "caption": []}), r"row 1 \(a.wav\) has no caption"),
    ("m.jsonl", lines({"audio": None, "caption": "x"}), "row 1 has no audio path"),
    ("m.jsonl", '{"audio": "a.wav", "caption": "x", "duration": NaN}\n', "row 1: duration is nan"),
    ("m.csv", "audio,caption,duration\na.wav,x,1\nb.wav,x,-2\n", "row 2: duration is '-2'"),
    ("m.csv", "audio,caption,duration\na.wav,x,long\n", "row 1: duration is 'long'"),
    ("m.csv", "audio,caption,score\na.wav,x,nan\n", "row 1: score is 'nan'"),
    ("m.csv", "audio,caption\na.wav,rain, then wind\n", "row 1 is longer than the header"),
    ("m.csv", "", "holds no rows"), ("m.csv", "audio,caption\n", "holds no rows"), ("m.json", "[]", "holds no rows"),
    ("m.json", '[{"audio": "a.wav",', "not readable JSON"), ("m.jsonl", "rain\nwind\n", "line 1 is not JSON"),
    ("m.json", '["a.wav"]', "row 1 is not an object"), ("m.txt", "a.wav rain", "must end in"),
])
def test_wrong_manifests(clips, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        data.read_manifest(write(clips, name, text))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_manifest_folder_and_column(clips):
    with pytest.raises(UserError, match="none.jsonl is missing"):
        data.read_manifest(clips / "none.jsonl")
    path = write(clips, "m.jsonl", lines(*OURS))
    with pytest.raises(UserError, match="no column length"):
        data.read_manifest(path, duration_key="length")
    with pytest.raises(UserError, match="not a folder"):
        data.read_manifest(path, audio_dir=clips / "nowhere")
    (clips / "m.csv").write_bytes(b"audio,caption\na.wav,\xff\xfe\n")
    with pytest.raises(UserError, match="not readable"):
        data.read_manifest(clips / "m.csv")


def test_bad_sound_files_are_named_skipped_and_counted(clips, capsys):
    bad = bad_files(clips)
    good = {"audio": str(clips / "a.wav"), "caption": "rain", "duration": None, "score": None}
    rows = [{**good, "audio": str(clips / name)} for name in bad for _ in range(2)]
    assert data.usable_rows([good, *rows]) == [good]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == len(bad) + 1 and f"{len(rows)} of {len(rows) + 1} rows skipped" in errors[-1]
    for line, (name, reason) in zip(errors, bad.items()):
        assert name in line and reason in line
    with pytest.raises(UserError, match="none of the 12 rows has a usable sound file"):
        data.usable_rows(rows)


# ----------------------------------------------------------------------------- clips and split

def test_load_clip_crops_pads_and_doubles(clips):
    row = {"audio": str(clips / "b.wav"), "duration": None}  # a ramp from -1 to 1 in 3 s
    center, seconds = data.load_clip(row, 16000, 1, 16000)
    start, _ = data.load_clip(row, 16000, 1, 16000, "start")
    assert center.shape == (1, 16000) and seconds == 1.0
    assert center.mean().abs() < 1e-3 and start[0, 0] < -0.999 and abs(start.mean() + 2 / 3) < 1e-3
    padded, seconds = data.load_clip({"audio": str(clips / "sub" / "c.flac")}, 44100, 2, 44100)
    assert padded.shape == (2, 44100) and seconds == 0.5 and padded[0].equal(padded[1])
    assert (padded[:, 22050:] == 0).all() and (padded[:, 1000:21000] - 0.25).abs().max() < 1e-3


@pytest.mark.parametrize("listed, heard", [(None, 3.0), (1.2, 1.2), (50.0, 3.0)])
def test_load_clip_duration(clips, listed, heard):
    row = {"audio": str(clips / "b.wav"), "duration": listed}
    assert data.load_clip(row, 16000, 1, 64000)[1] == pytest.approx(heard)
    assert data.load_clip(row, 16000, 1, 8000)[1] == 0.5


def test_split_rows_is_stable_and_keeps_files_whole(tmp_path):
    rows = [{"audio": str(tmp_path / f"{i % 500}.wav"), "caption": str(i)} for i in range(1000)]
    training, validation = data.split_rows(rows, 0.1, 0)
    assert len(training) + len(validation) == 1000 and 60 <= len(validation) <= 140
    assert not {row["audio"] for row in training} & {row["audio"] for row in validation}
    moved = [{**row, "audio": row["audio"].replace(str(tmp_path), "/elsewhere")} for row in reversed(rows)]
    assert {row["caption"] for row in data.split_rows(moved, 0.1, 0)[1]} == {row["caption"] for row in validation}
    assert data.split_rows(rows, 0.1, 1)[1] != validation
    assert [len(part) for part in data.split_rows(rows, 0.0)] == [1000, 0]
    assert [len(part) for part in data.split_rows(rows[:2], 0.01)] == [1, 1]
    assert [len(part) for part in data.split_rows(rows[:1], 0.5)] == [1, 0]
    with pytest.raises(UserError):
        data.split_rows(rows, math.nan)


# ----------------------------------------------------------------------------- the command

def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, flags)])
    run_main(data.main)


def test_preview_of_the_world(tmp_path, monkeypatch, capsys):
    pytest.importorskip("world")
    run(monkeypatch, "--count", 3, "--split", "test", "--pairs", "unseen", "--degraded", 1, "--out", tmp_path)
    assert "next:" in capsys.readouterr().out
    rows = read_jsonl(tmp_path / "captions.jsonl")
    assert [row["audio"] for row in rows] == ["0000.wav", "0001.wav", "0002.wav"]
    for row in rows:
        assert len(row["events"]) == 2 and row["degradation"] and row["relation"] in ("and", "then")
        assert {"name", "onset", "offset", "count", "hits"} <= set(row["events"][0])
    assert not PICTURES or (tmp_path / "spectrograms.png").stat().st_size > 10000
    assert data.read_manifest(tmp_path / "captions.jsonl")[0]["duration"] == rows[0]["duration"]  # a manifest too


def test_preview_of_a_manifest(clips, monkeypatch, capsys):
    path = write(clips, "m.jsonl", lines(*OURS))
    run(monkeypatch, "--data", path, "--out", clips / "out", "--sampling_rate", 44100, "--channels", 2)
    assert "2 usable rows" in capsys.readouterr().out
    info = soundfile.info(clips / "out" / "0001.wav")
    assert (info.channels, info.samplerate, info.frames) == (2, 44100, round(4.096 * 44100))
    assert [row["duration"] for row in read_jsonl(clips / "out" / "captions.jsonl")] == [0.5, 0.5]


@pytest.mark.parametrize("flags", [
    ("--data", "none.jsonl"), ("--data", "only_bad.jsonl"), ("--count", 0), ("--degraded", "nan"), ("--degraded", 2),
    ("--data", "m.jsonl", "--out", "m.jsonl/out"), ("--data", "m.jsonl", "--max_duration", "nan"),
    ("--data", "m.jsonl", "--caption_key", "text"),
], ids=lambda flags: " ".join(map(str, flags)))
def test_wrong_flags_end_in_one_line_and_code_2(clips, monkeypatch, capsys, flags):
    monkeypatch.chdir(clips)
    write(clips, "m.jsonl", lines(*OURS))
    write(clips, "only_bad.jsonl", lines({"audio": "gone.wav", "caption": "x"}))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
