"""The sounds of the built-in world: 12 synthesised events, 16 recorded ones (sounds/), and damage.

    wave, starts = sound_event(np.random.default_rng(0), "knock", 16000, 3, "train")    # 3 knocks

A new event is one line of EVENTS: how captions call it, and its function in this file, or HELD or
STRUCK with clips in sounds/captions.jsonl. Train taggers and CLAPs anew: all scenes change with it.
Draws of `rng` have a fixed order: a seed means the same sound for good.
"""
from collections import defaultdict
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy import arange, cos, exp, interp, linspace, minimum, pi, sin, zeros
from numpy.fft import irfft, rfft, rfftfreq

from lib.common import HERE, UserError, read_jsonl

SAMPLE_RATE = 16000     # Hz
CLIP_SAMPLES = 65536    # 4.096 s: 64 latent frames of 1024 samples
SOUNDS = HERE / "sounds"
PITCH = 4               # semitones that a recorded note is moved up or down, at the most
SHORTEST = 0.16         # seconds between counted strikes, at least
HELD, STRUCK = "held", "struck"  # recorded: a note that lasts; one that decays
DEGRADATIONS = ("noise", "clipping", "band_limit", "dropouts", "reverberation")


# ----------------------------------------------------------------------------- signals

def seconds(samples):
    """The time of each sample, (samples,)."""
    return arange(samples) / SAMPLE_RATE


def rms(wave):
    """Root mean square, a little above 0."""
    return np.sqrt(np.mean(wave ** 2)) + 1e-9


def noise(rng, samples, low, high, slope):
    """Noise (samples,) of RMS 1 from `low` to `high` Hz, 12 * slope dB less per octave outside."""
    size = 1 << (samples - 1).bit_length()
    spectrum = rfft(rng.standard_normal(size).astype(np.float32))
    hz = rfftfreq(size, 1 / SAMPLE_RATE)
    above_low = 1 + (low / (hz + 1)) ** (2 * slope)
    below_high = 1 + (hz / high) ** (2 * slope)
    wave = irfft(spectrum * (1 / above_low / below_high), size)[:samples]
    return wave / rms(wave)


def slow(rng, samples, rate, depth):
    """A random curve (samples,) between 1 - depth and 1 that moves `rate` times a second."""
    knots = int(samples / SAMPLE_RATE * rate * 2) + 3
    places = linspace(0, knots - 1, samples)
    return 1 - depth * interp(places, arange(knots), rng.random(knots))


def tone(hz, t):
    """A sine at times t (samples,)."""
    return sin(2 * pi * hz * t)


def phase(hz):
    """The running phase (radians) of an instantaneous frequency (samples,) in Hz."""
    return 2 * pi * np.cumsum(hz) / SAMPLE_RATE


def decay(samples, time):
    """exp(-t / time) with an attack of 1 ms, (samples,)."""
    t = seconds(samples)
    return exp(-t / time) * minimum(1, t / 0.001)


def plateau(t, rise):
    """1, but for a rise from 0 over `rise` seconds and a fall at the end; t (samples,): seconds."""
    return minimum(1, minimum(t, t[::-1]) / rise)


def fade_out(wave, samples):
    """Let the last `samples` of a wave fall to 0, in place."""
    end = wave[-samples:]
    end *= linspace(1, 0, len(end))


def place(samples, starts, sounds):
    """Add sounds[i] at sample starts[i] into (samples,), cut at the end."""
    out = zeros(samples)
    for start, sound in zip(starts, sounds):
        part = out[start:start + len(sound)]
        part += sound[:len(part)]
    return out


# ----------------------------------------------------------------------------- synthesised, lasting
# (rng, n) -> wave (n,)

def rain(rng, n):
    hiss = noise(rng, n, rng.uniform(600, 1500), rng.uniform(5000, 9000), 1.5)
    hiss *= slow(rng, n, 1, 0.3)
    number = int(n / SAMPLE_RATE * rng.uniform(60, 160))
    starts = rng.integers(0, n, number)
    drops = []
    for _ in starts:
        size = rng.uniform(1, 5)
        angle = 2 * pi * rng.uniform(2000, 6000) / SAMPLE_RATE * arange(120)
        drops.append(size * sin(angle) * decay(120, 0.0015))
    return hiss + place(n, starts, drops)


def wind(rng, n):
    centre = rng.uniform(250, 500)
    gusts = zeros(n)
    for k in (1, 1.6, 2.5):
        whistle = noise(rng, n, centre * k * 0.8, centre * k * 1.25, 6)
        gusts += whistle * slow(rng, n, 1.2, 0.95) / k
    return gusts


def thunder(rng, n):
    t = seconds(n)
    rumble = noise(rng, n, 25, rng.uniform(90, 180), 2)
    rumble *= slow(rng, n, 3, 0.7)
    crack = noise(rng, n, 100, rng.uniform(800, 2000), 1)
    crack *= exp(-t / rng.uniform(0.1, 0.25))
    rumble *= 0.6 + exp(-t)
    return rumble + rng.uniform(0.5, 1.5) * crack


def siren(rng, n):
    low, high = rng.uniform(450, 700), rng.uniform(1000, 1500)
    period = rng.uniform(0.5, 1.4)
    swing = 0.5 - 0.5 * cos(2 * pi * seconds(n) / period)
    if rng.random() < 0.4:
        swing = (swing > 0.5) * 0.8 + 0.1
    angle = phase(low + (high - low) * swing)
    return sin(angle) + 0.4 * sin(2 * angle) + 0.2 * sin(3 * angle)


def clock(rng, n):
    period = rng.uniform(0.22, 0.34)
    tick = 2 * pi * rng.uniform(2200, 3800)
    starts = (arange(0, n / SAMPLE_RATE, period) * SAMPLE_RATE).astype(int)
    sounds = []
    for i in range(len(starts)):
        pitch = tick if i % 2 else tick * 0.78
        ring = sin(pitch / SAMPLE_RATE * arange(640)) * decay(640, 0.006)
        click = 0.5 * rng.standard_normal(640) * decay(640, 0.002)
        sounds.append(ring + click)
    return place(n, starts, sounds) + 1e-4 * rng.standard_normal(n)


def engine(rng, n):
    rate = rng.uniform(28, 55)
    speed = 1 + 0.12 * (slow(rng, n, 1.5, 1.0) - 0.5)
    angle = phase(rate * speed)
    harmonics = zeros(n)
    for k in range(1, 24):
        harmonic = sin(k * angle + rng.uniform(0, 6.28))
        harmonics += harmonic * rng.uniform(0.4, 1) / k ** 0.7
    puffs = (0.5 + 0.5 * sin(angle)) ** 2
    return harmonics + 1.2 * (noise(rng, n, 80, 1200, 1) * puffs)


def cricket(rng, n):
    t = seconds(n)
    song = tone(rng.uniform(3800, 5200), t)
    rate = rng.uniform(45, 65)
    pulses = (0.5 - 0.5 * cos(2 * pi * rate * t)) ** 2
    period = rng.uniform(0.25, 0.4)
    return song * pulses * (t % period < 0.62 * period)


# ----------------------------------------------------------------------------- synthesised, struck
# (rng, lengths) -> a strike of at most so many samples for each length, all in one timbre

def phone(rng, lengths):
    low = rng.uniform(900, 1200)
    high = low * rng.uniform(1.2, 1.35)
    warble = rng.uniform(18, 26)
    for n in minimum(lengths * 3 // 4, 6400):
        t = seconds(n)
        first_half = t * warble % 1 < 0.5
        angle = phase(np.where(first_half, low, high))
        yield (sin(angle) + 0.3 * sin(3 * angle)) * plateau(t, 0.01)


def bird(rng, lengths):
    start = rng.uniform(2600, 4000)
    sweep = rng.uniform(600, 1800)
    rises = rng.choice([-1, 1]) > 0
    for length in lengths:
        chirp = int(rng.uniform(0.09, 0.16) * SAMPLE_RATE)
        x = linspace(0, 1, min(length * 3 // 4, chirp))
        way = x if rises else 1 - x
        angle = phase(start + sweep * way + 300 * sin(9 * x))
        yield sin(angle) * sin(pi * x) ** 0.7


def beep(rng, lengths):
    pitch = rng.uniform(700, 2000)
    longest = int(rng.uniform(0.1, 0.25) * SAMPLE_RATE)
    for n in minimum(lengths * 7 // 10, longest):
        t = seconds(n)
        yield tone(pitch, t) * plateau(t, 0.004)


def knock(rng, lengths):
    body, wood = rng.uniform(130, 260), rng.uniform(500, 900)
    for n in minimum(lengths, 2400):
        t = seconds(n)
        low = tone(body, t) * decay(n, 0.03)
        high = 0.5 * tone(wood, t) * decay(n, 0.012)
        click = 0.4 * rng.standard_normal(n) * decay(n, 0.004)
        yield low + high + click


def drip(rng, lengths):
    low, rise = rng.uniform(500, 900), rng.uniform(1.6, 2.6)
    for n in minimum(lengths, 2200):
        curve = linspace(0, 1, n) * rng.uniform(0.8, 1.2)
        yield sin(phase(low * rise ** curve)) * decay(n, 0.035)


class Event(NamedTuple):
    """A sound of the world. One with `counted` is struck: a prompt may count it."""
    sound: object               # a function above; HELD or STRUCK: recorded
    names: str                  # how captions call it, commas between
    counted: str = ""           # plural noun: "three {counted}"
    spacing: tuple = (0, 0)     # seconds between strikes that nobody counts, from and to
    tuned: bool = False         # recorded strikes differ in pitch, as notes of a melody


EVENTS = {
    "rain": Event(rain, "rain, rain falling, a rain shower"),
    "wind": Event(wind, "wind, wind blowing, howling wind"),
    "thunder": Event(thunder, "thunder, thunder rumbling, a rumble of thunder"),
    "siren": Event(siren, "a siren, a siren wailing, an emergency siren"),
    "phone": Event(phone, "a phone ringing, a ringing phone, a telephone ringing", "phone rings",
                   (0.4, 0.7)),
    "clock": Event(clock, "a clock ticking, a ticking clock, the ticking of a clock"),
    "engine": Event(engine, "an engine, an engine running, a car engine"),
    "bird": Event(bird, "a bird chirping, a bird, birdsong", "bird chirps", (0.2, 0.4)),
    "beep": Event(beep, "beeping, electronic beeps, a beeping device", "beeps", (0.25, 0.5)),
    "cricket": Event(cricket, "crickets, crickets chirping, the chirping of crickets"),
    "knock": Event(knock, "knocking on a door, someone knocking, knocking", "knocks on a door",
                   (0.18, 0.35)),
    "drip": Event(drip, "dripping water, water dripping, a dripping tap", "water drops",
                  (0.25, 0.5)),
    "violin": Event(HELD, "a violin, a violin playing, violin music"),
    "piano": Event(STRUCK, "a piano, a piano playing, piano music", "piano notes", (0.35, 0.7),
                   tuned=True),
    "flute": Event(HELD, "a flute, a flute playing, flute music"),
    "choir": Event(HELD, "a choir, a choir singing, people singing in a choir"),
    "church organ": Event(HELD, "a church organ, a church organ playing, church organ music"),
    "trumpet": Event(HELD, "a trumpet, a trumpet playing, a trumpet blowing", "trumpet notes",
                     (0.35, 0.6), tuned=True),
    "harmonica": Event(HELD, "a harmonica, a harmonica playing, harmonica music"),
    "electric guitar": Event(HELD, "an electric guitar, a distorted electric guitar, "
                             "an electric guitar playing"),
    "harp": Event(STRUCK, "a harp, a harp playing, harp music"),
    "music box": Event(STRUCK, "a music box, a music box playing, a tinkling music box"),
    "saxophone": Event(HELD, "a saxophone, a saxophone playing, saxophone music"),
    "snare drum": Event(STRUCK, "a snare drum, a snare drum playing, snare drumming",
                        "snare drum hits", (0.2, 0.45)),
    "cymbal": Event(STRUCK, "a cymbal, a cymbal crashing, cymbals", "cymbal crashes", (0.45, 0.9)),
    "acoustic guitar": Event(STRUCK, "an acoustic guitar, an acoustic guitar strumming, "
                             "guitar chords", "guitar strums", (0.4, 0.75)),
    "bagpipe": Event(HELD, "bagpipes, a bagpipe playing, a bagpipe"),
    "bass guitar": Event(STRUCK, "a bass guitar, a bass guitar playing, a bass line"),
}
EVENT_NAMES = list(EVENTS)
COUNTABLE = [name for name in EVENTS if EVENTS[name].counted]


@lru_cache(maxsize=None)
def recorded_clips(split):
    """{event: [clip (samples,) float32, ...]} of a split, silence trimmed, peak 1."""
    from lib.audio import read_audio
    clips = defaultdict(list)
    for row in read_jsonl(SOUNDS / "captions.jsonl"):
        if row["split"] == split:
            clip = read_audio(SOUNDS / row["audio"], SAMPLE_RATE, 1)[0].numpy()
            peak = np.abs(clip).max()
            loud = np.flatnonzero(np.abs(clip) > 0.02 * peak)
            first = max(0, loud[0] - 80)
            clips[row["event"]].append(clip[first:loud[-1] + 1] / peak)
    return clips


def note(clip, length, semitones):
    """The clip played faster or slower, at most `length` samples of it, with a faded end."""
    times = arange(0, len(clip) - 1, 2 ** (semitones / 12))
    sound = interp(times, arange(len(clip)), clip)[:length]
    fade_out(sound, 640)
    return sound


def melody(event, clips, rng, n):
    """Notes of one recorded instrument, one after the other, until `n` samples are full."""
    beat = int(rng.uniform(0.3, 0.75) * SAMPLE_RATE)
    start, starts, notes = 0, [], []
    while start < n:
        clip = clips[rng.integers(len(clips))]
        sound = note(clip, n - start, rng.integers(-PITCH, PITCH + 1))
        step = beat
        if event.sound == HELD:  # until the note ends, for two beats at most
            step = max(1600, min(len(sound) - 320, 2 * beat))
            sound = sound[:step + 640]
        fade_out(sound, 400)
        notes.append(sound)
        starts.append(start)
        start += step
    return place(n, starts, notes)


def struck(event, clips, rng, lengths):
    """One recorded clip, struck for each of `lengths`."""
    clip = clips[rng.integers(len(clips))]
    pitches = rng.integers(-PITCH, PITCH + 1, 1).repeat(len(lengths))
    if event.tuned:
        pitches += rng.integers(-4, 5, len(lengths))
    if event.sound == HELD:
        lengths = (lengths * 0.85).astype(int)
    return map(partial(note, clip), lengths, pitches)


def sound_event(rng, name, n, count, split):
    """Event `name` -> wave (n,) of loudness 1, start samples of its strikes (None: not countable).
    count: strikes asked for; None: as many as fit, at most 6. UserError: the split has no clip."""
    event = EVENTS[name]
    sound = event.sound
    starts = None
    if sound in (HELD, STRUCK):
        clips = recorded_clips(split)[name]
        if not clips:
            raise UserError(f"{SOUNDS}/captions.jsonl has no {split} clip of {name}; add some")
        sound = partial(struck if event.counted else melody, event, clips)
    if event.counted:
        if not count:
            fitting = n / SAMPLE_RATE / rng.uniform(*event.spacing)
            count = min(max(round(fitting), 1), 6)
        times = arange(count) * (n / count)             # evenly but for a little jitter
        times[1:] += rng.uniform(-0.06, 0.06, count - 1) * (n / count)
        starts = times.astype(int)
        wave = place(n, starts, sound(rng, np.diff(starts, append=n)))
    else:
        wave = sound(rng, n)
    fade_out(wave, min(n // 4, 480))
    wave[:40] *= linspace(0, 1, 40)
    frames = wave[:n // 256 * 256].reshape(-1, 256)     # of 16 ms
    levels = np.sqrt(np.mean(frames ** 2, axis=1))      # ticks shall be as loud as hiss:
    loud = levels[levels >= 0.1 * levels.max()]         # the frames within 20 dB of the top
    return wave / rms(loud), starts


def degrade(audio, kind, level, rng):
    """Damage `audio` (n,) by `kind` with strength `level` in 0..1 -> float32 (n,).
    noise: SNR 40 to 0 dB; clipping: 100 % to 6 % of the peak; band_limit: 8 kHz down to 500 Hz;
    dropouts: up to half of the time; reverberation: 0.1 to 1.5 s, wet share 0 to 80 %."""
    n = len(audio)
    if kind == "noise":
        level_db = 40 * level - 40
        out = audio + noise(rng, n, 50, 7000, 1) * rms(audio) * 10 ** (level_db / 20)
    elif kind == "clipping":
        peak = np.abs(audio).max() + 1e-9
        limit = peak * 0.06 ** level
        out = np.clip(audio, -limit, limit) * (peak / limit) ** 0.5
    elif kind == "band_limit":
        edge = 8000 * 0.0625 ** level
        hz = rfftfreq(n, 1 / SAMPLE_RATE)
        out = irfft(rfft(audio) / (1 + (hz / edge) ** 12) ** 0.5, n)
    elif kind == "dropouts":
        out = audio.astype(float)
        removed = 0
        while removed < 0.5 * level * n:
            gap = int(rng.uniform(0.02, 0.08) * SAMPLE_RATE)
            start = rng.integers(0, n - gap)
            out[start:start + gap] *= 0
            removed += gap
    else:  # reverberation
        m = int((0.1 + 1.4 * level) * SAMPLE_RATE)
        tail = rng.standard_normal(m) * exp(-6.9 * arange(m) / m)
        size = 1 << (n + m).bit_length()
        wet = irfft(rfft(audio, size) * rfft(tail, size), size)[:n]
        wet *= rms(audio) / rms(wet)
        share = 0.8 * level
        out = (1 - share) * audio + share * wet
    return (out * min(1.0, 0.98 / (np.abs(out).max() + 1e-9))).astype(np.float32)
