"""Loudness: the numbers of the original package, the target under the ceiling, and its absence in one line."""
import math
import sys

import numpy as np
import pytest
import torch

from common import UserError

SAMPLES = 20


def rebuilt(recipe):
    """The signal of a recipe of shared/parity/metrics.json -> float64 (channels, samples)."""
    count = round(recipe["rate"] * recipe["seconds"])
    t = np.arange(count) / recipe["rate"]
    if recipe["kind"] == "sine":
        channels = [gain * np.sin(2 * np.pi * recipe["freq"] * t) for gain in recipe["gains"]]
    elif recipe["kind"] == "chirp":
        rate = (recipe["freq2"] - recipe["freq"]) / (2 * recipe["seconds"])
        channels = [gain * np.sin(2 * np.pi * (recipe["freq"] * t + rate * t ** 2)) for gain in recipe["gains"]]
    elif recipe["kind"] == "noise":
        random = np.random.RandomState(recipe["seed"])
        channels = [gain * random.randn(count) for gain in recipe["gains"]]
    else:
        channels = [np.zeros(count) for _ in recipe["gains"]]
    signal = np.stack(channels)
    for start, end, factor in recipe.get("envelope", []):
        signal[:, int(start * recipe["rate"]):int(end * recipe["rate"])] *= factor
    return signal


def test_pyloudnorm_numbers_are_matched(parity):
    pytest.importorskip("pyloudnorm")
    from loudness import loudness, normalise
    signals = parity("metrics").info["loudness"]["signals"]
    assert len(signals) >= 10
    for name, wanted in signals.items():
        signal = rebuilt(wanted["recipe"])
        assert signal.sum() == pytest.approx(wanted["sum"], abs=1e-6), name
        rate = wanted["recipe"]["rate"]
        if not math.isfinite(float(wanted["lufs"])):
            assert loudness(signal, rate) == -math.inf
            continue
        assert loudness(signal, rate) == pytest.approx(wanted["lufs"], abs=1e-4), name
        gain = wanted["after_normalising_to_-16.5"]["gain"]
        audio, ours, reached = normalise(torch.from_numpy(signal).float(), rate, -16.5, 60.0)       # no ceiling
        assert ours == pytest.approx(gain, rel=1e-4) and reached == pytest.approx(-16.5, abs=1e-3)
        assert loudness(audio.numpy(), rate) == pytest.approx(-16.5, abs=0.01)


def test_pyloudnorm_brings_twenty_varied_clips_to_the_target_or_says_so():
    pytest.importorskip("pyloudnorm")
    from loudness import loudness, normalise, true_peak
    from world import SAMPLE_RATE, World
    world, limited = World("test", degraded=0.5), 0
    for i in range(SAMPLES):
        audio, scene = world.render(i)
        audio = torch.from_numpy(audio)[None, :int(scene.duration * SAMPLE_RATE)] * 10 ** (-i / 10)
        made, _, reached = normalise(audio, SAMPLE_RATE)
        assert loudness(made.numpy(), SAMPLE_RATE) == pytest.approx(reached, abs=0.05)
        peak = 20 * math.log10(true_peak(made, SAMPLE_RATE))
        assert peak < -0.99
        if abs(reached + 16.5) > 0.1:
            limited += 1
            assert peak == pytest.approx(-1, abs=0.01) and reached < -16.5      # it is the ceiling that stopped it
    print(f"{SAMPLES - limited} of {SAMPLES} clips within 0.1 LU, {limited} limited by the ceiling")
    assert limited < SAMPLES // 2


def test_pyloudnorm_ends_quiet_and_short_clips_well():
    pytest.importorskip("pyloudnorm")
    from loudness import loudness, normalise
    silence = torch.zeros(1, 16000)
    made, gain, reached = normalise(silence, 16000)
    assert torch.equal(made, silence) and gain == 1 and reached == -math.inf
    tone = 0.5 * torch.sin(torch.arange(1600) * 0.3)[None]                       # 0.1 s: shorter than a block
    assert loudness(tone, 16000) == pytest.approx(loudness(tone.repeat(1, 20), 16000), abs=0.3)
    assert loudness(torch.zeros(1, 0), 16000) == -math.inf


def test_pyloudnorm_levels_files_beside_their_originals(tmp_path, capsys):
    pytest.importorskip("pyloudnorm")
    import loudness
    from audio import read_audio, write_wav
    write_wav(tmp_path / "a.wav", 0.05 * torch.randn(2, 32000, generator=torch.Generator().manual_seed(0)), 16000)
    loudness.main([str(tmp_path / "a.wav"), "--out", str(tmp_path / "levelled"), "--lufs", "-20"])
    made = read_audio(tmp_path / "levelled" / "a.wav", 16000, 2)
    assert loudness.loudness(made.numpy(), 16000) == pytest.approx(-20, abs=0.1)
    assert "-20.0 LUFS" in capsys.readouterr().out
    for arguments, what in (([str(tmp_path / "a.wav"), "--out", str(tmp_path)], "is where the files are"),
                            ([str(tmp_path / "b.wav")], "b.wav"),
                            ([str(tmp_path / "a.wav"), "--lufs", "3"], "--lufs is 3")):
        with pytest.raises(UserError, match=what):
            loudness.main([*arguments, *([] if "--out" in arguments else ["--out", str(tmp_path / "x")])])


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path):
    import sample
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    with pytest.raises(UserError, match="pip install pyloudnorm"):
        sample.main(["--prompt", "rain", "--lufs", "-16.5", "--output", str(tmp_path / "a.wav")])
    assert not list(tmp_path.iterdir())
