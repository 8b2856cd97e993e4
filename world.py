"""The built-in world: sounds, scenes and captions with known truth.

28 events, 12 synthesised here with numpy and 16 recorded (sounds/), are put together into scenes of one to three
events: "A", "A and B", "A followed by B", "A, then B, then C", some with a count ("three beeps"). Because the truth
of each scene (events, order, onsets, counts, duration) is known, faithfulness to a prompt can be checked, which no
captioned data set offers. Everything about scene i follows from (seed, split, i), so that nothing need be stored.

    from world import World
    audio, scene = World("train").render(11)   # float32 (65536,), 16 kHz; scene.prompt: "knocking followed by rain"

The recorded clips are split by clip: a test scene plays clips that no training scene has played. The pairs in
sounds/unseen_pairs.json never sound in one training scene (pairs="seen"); they make the test prompts (pairs="unseen").
Degradations of known strength (`degrade`) are part of the world: codec and tagger train on a share of degraded scenes.

Only numpy is imported here; soundfile is needed for rendering recorded events, not for captions.
"""
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from common import UserError, derive_seed, read_json, read_jsonl

SAMPLE_RATE = 16000          # Hz
CLIP_SAMPLES = 65536         # 4.096 s: 64 latent frames of 1024 samples
MIN_DURATION, MAX_DURATION = 1.0, 4.0  # seconds of sound in a scene; silence follows
MAX_HITS = 6                 # strikes of an uncounted "beeping"
SOUNDS = Path(__file__).parent / "sounds"
PITCH = 4                    # semitones that a recorded note is moved up or down, at the most
NUMBERS = {2: "two", 3: "three", 4: "four"}  # what a prompt may count
SHORTEST = 0.16              # seconds between counted strikes, at least


@dataclass(frozen=True)
class Event:
    """A sound of the world: how captions call it, and for countable events how they count it ("knocks on a door")."""
    name: str
    kind: str                 # "synth" or "recorded"
    phrases: tuple
    counted: str = ""         # plural noun: "three {counted}"; empty: not countable
    sustained: bool = False   # recorded: a held note (else it decays and is struck again)

    @property
    def countable(self):
        return bool(self.counted)


EVENTS = {event.name: event for event in (
    Event("rain", "synth", ("rain", "rain falling", "a rain shower")),
    Event("wind", "synth", ("wind", "wind blowing", "howling wind")),
    Event("thunder", "synth", ("thunder", "thunder rumbling", "a rumble of thunder")),
    Event("siren", "synth", ("a siren", "a siren wailing", "an emergency siren")),
    Event("phone", "synth", ("a phone ringing", "a ringing phone", "a telephone ringing"), "phone rings"),
    Event("clock", "synth", ("a clock ticking", "a ticking clock", "the ticking of a clock")),
    Event("engine", "synth", ("an engine", "an engine running", "a car engine")),
    Event("bird", "synth", ("a bird chirping", "a bird", "birdsong"), "bird chirps"),
    Event("beep", "synth", ("beeping", "electronic beeps", "a beeping device"), "beeps"),
    Event("cricket", "synth", ("crickets", "crickets chirping", "the chirping of crickets")),
    Event("knock", "synth", ("knocking on a door", "someone knocking", "knocking"), "knocks on a door"),
    Event("drip", "synth", ("dripping water", "water dripping", "a dripping tap"), "water drops"),
    Event("violin", "recorded", ("a violin", "a violin playing", "violin music"), sustained=True),
    Event("piano", "recorded", ("a piano", "a piano playing", "piano music"), "piano notes"),
    Event("flute", "recorded", ("a flute", "a flute playing", "flute music"), sustained=True),
    Event("choir", "recorded", ("a choir", "a choir singing", "people singing in a choir"), sustained=True),
    Event("church organ", "recorded", ("a church organ", "a church organ playing", "church organ music"),
          sustained=True),
    Event("trumpet", "recorded", ("a trumpet", "a trumpet playing", "a trumpet blowing"), "trumpet notes", True),
    Event("harmonica", "recorded", ("a harmonica", "a harmonica playing", "harmonica music"), sustained=True),
    Event("electric guitar", "recorded", ("an electric guitar", "a distorted electric guitar",
                                          "an electric guitar playing"), sustained=True),
    Event("harp", "recorded", ("a harp", "a harp playing", "harp music")),
    Event("music box", "recorded", ("a music box", "a music box playing", "a tinkling music box")),
    Event("saxophone", "recorded", ("a saxophone", "a saxophone playing", "saxophone music"), sustained=True),
    Event("snare drum", "recorded", ("a snare drum", "a snare drum playing", "snare drumming"), "snare drum hits"),
    Event("cymbal", "recorded", ("a cymbal", "a cymbal crashing", "cymbals"), "cymbal crashes"),
    Event("acoustic guitar", "recorded", ("an acoustic guitar", "an acoustic guitar strumming", "guitar chords"),
          "guitar strums"),
    Event("bagpipe", "recorded", ("bagpipes", "a bagpipe playing", "a bagpipe"), sustained=True),
    Event("bass guitar", "recorded", ("a bass guitar", "a bass guitar playing", "a bass line")),
)}
EVENT_NAMES = list(EVENTS)
COUNTABLE = [name for name, event in EVENTS.items() if event.countable]

SINGLE = ("{a}", "{a}", "the sound of {a}", "{a} can be heard")
AND = ("{a} and {b}", "{a} with {b}", "{a} together with {b}", "{a} and {b} at the same time")
THEN = ("{a} followed by {b}", "{a}, then {b}", "{a} and then {b}", "first {a}, then {b}", "{b} after {a}")
THEN3 = ("{a}, then {b}, then {c}", "{a} followed by {b} and then {c}", "first {a}, then {b}, and finally {c}")
FORMS = ("single", "and", "then", "then")  # with one, two, two, three events


@dataclass
class SceneEvent:
    """Truth about one event of a scene; times in seconds from the start of the clip."""
    name: str
    onset: float
    offset: float
    count: int | None = None   # what the prompt asks for, if it counts
    hits: int | None = None    # true number of strikes, known for countable events
    strikes: list = field(default_factory=list)  # onset of each strike, seconds


@dataclass
class Scene:
    """One scene: what the prompt says and what is to be heard. `duration`: seconds of sound; silence follows."""
    index: int
    prompt: str
    relation: str              # "single", "and" or "then"
    events: list               # of SceneEvent, in order for "then"
    duration: float
    degradation: tuple | None = None  # (kind, level in 0..1)


@lru_cache(maxsize=1)
def unseen_pairs():
    """The set of frozensets {a, b} of event names that no training scene holds (sounds/unseen_pairs.json)."""
    return {frozenset(pair) for pair in read_json(SOUNDS / "unseen_pairs.json")}


def known_words():
    """All words that captions of the world may use, sorted: the vocabulary of the toy text encoder."""
    texts = [phrase for event in EVENTS.values() for phrase in (*event.phrases, event.counted)]
    texts += [*SINGLE, *AND, *THEN, *THEN3, *NUMBERS.values()]
    words = set(re.findall(r"[a-z]+", " ".join(re.sub(r"\{.\}", " ", text) for text in texts)))
    return sorted(words)


# ----------------------------------------------------------------------------- signals

def shaped_noise(rng, samples, gain):
    """White noise (samples,) whose spectrum is multiplied by gain(frequencies in Hz); unit RMS."""
    size = 1 << (max(samples, 2) - 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size).astype(np.float32))
    noise = np.fft.irfft(spectrum * gain(np.fft.rfftfreq(size, 1 / SAMPLE_RATE)), size)[:samples]
    return noise / (np.sqrt(np.mean(noise ** 2)) + 1e-9)


def band(low, high, slope=2.0):
    """A smooth band-pass gain between `low` and `high` Hz for shaped_noise."""
    return lambda f: 1 / (1 + (low / (f + 1)) ** (2 * slope)) / (1 + (f / high) ** (2 * slope))


def slow(rng, samples, rate, depth):
    """A positive random curve (samples,) that moves `rate` times a second between 1 - depth and 1."""
    knots = rng.random(max(3, int(samples / SAMPLE_RATE * rate * 2) + 3))
    return 1 - depth * np.interp(np.linspace(0, len(knots) - 1, samples), np.arange(len(knots)), knots)


def decay(samples, seconds):
    """exp(-t / seconds) with a 1 ms attack, (samples,)."""
    t = np.arange(samples) / SAMPLE_RATE
    return np.exp(-t / seconds) * np.minimum(1, t / 0.001)


def phase(frequency):
    """The running phase (radians) of an instantaneous frequency (samples,) in Hz."""
    return 2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE


def place(samples, starts, sounds):
    """Add sounds[i] at sample starts[i] into (samples,), cut at the end."""
    out = np.zeros(samples)
    for start, sound in zip(starts, sounds):
        stop = min(samples, start + len(sound))
        if stop > start:
            out[start:stop] += sound[:stop - start]
    return out


# ----------------------------------------------------------------------------- synthesised events that sustain

def rain(rng, n):
    hiss = shaped_noise(rng, n, band(rng.uniform(600, 1500), rng.uniform(5000, 9000), 1.5)) * slow(rng, n, 1, 0.3)
    starts = rng.integers(0, n, int(n / SAMPLE_RATE * rng.uniform(60, 160)))
    drops = [rng.uniform(1, 5) * np.sin(2 * np.pi * rng.uniform(2000, 6000) / SAMPLE_RATE * np.arange(120))
             * decay(120, 0.0015) for _ in starts]
    return hiss + place(n, starts, drops)


def wind(rng, n):
    centre = rng.uniform(250, 500)
    gusts = sum(shaped_noise(rng, n, band(centre * k * 0.8, centre * k * 1.25, 6)) * slow(rng, n, 1.2, 0.95) / k
                for k in (1, 1.6, 2.5))
    return gusts


def thunder(rng, n):
    rumble = shaped_noise(rng, n, band(25, rng.uniform(90, 180), 2)) * slow(rng, n, 3, 0.7)
    t = np.arange(n) / SAMPLE_RATE
    crack = shaped_noise(rng, n, band(100, rng.uniform(800, 2000), 1)) * np.exp(-t / rng.uniform(0.1, 0.25))
    return rumble * (0.6 + np.exp(-t / 1.0)) + rng.uniform(0.5, 1.5) * crack


def siren(rng, n):
    t = np.arange(n) / SAMPLE_RATE
    low, high, period = rng.uniform(450, 700), rng.uniform(1000, 1500), rng.uniform(0.5, 1.4)
    swing = 0.5 - 0.5 * np.cos(2 * np.pi * t / period)
    if rng.random() < 0.4:
        swing = (swing > 0.5) * 0.8 + 0.1
    angle = phase(low + (high - low) * swing)
    return np.sin(angle) + 0.4 * np.sin(2 * angle) + 0.2 * np.sin(3 * angle)


def clock(rng, n):
    period, pitch = rng.uniform(0.22, 0.34), rng.uniform(2200, 3800)
    starts = (np.arange(0, n / SAMPLE_RATE, period) * SAMPLE_RATE).astype(int)
    t = np.arange(640)
    ticks = [np.sin(2 * np.pi * pitch * (1 if i % 2 else 0.78) / SAMPLE_RATE * t) * decay(640, 0.006)
             + 0.5 * rng.standard_normal(640) * decay(640, 0.002) for i in range(len(starts))]
    return place(n, starts, ticks) + 1e-4 * rng.standard_normal(n)


def engine(rng, n):
    rate = rng.uniform(28, 55) * (1 + 0.12 * (slow(rng, n, 1.5, 1.0) - 0.5))
    angle = phase(rate)
    harmonics = sum(np.sin(k * angle + rng.uniform(0, 6.28)) * rng.uniform(0.4, 1) / k ** 0.7 for k in range(1, 24))
    exhaust = shaped_noise(rng, n, band(80, 1200, 1)) * (0.5 + 0.5 * np.sin(angle)) ** 2
    return harmonics + 1.2 * exhaust


def cricket(rng, n):
    pitch, pulse, period = rng.uniform(3800, 5200), rng.uniform(45, 65), rng.uniform(0.25, 0.4)
    t = np.arange(n) / SAMPLE_RATE
    chirp = (t % period) < 0.62 * period
    return np.sin(2 * np.pi * pitch * t) * (0.5 - 0.5 * np.cos(2 * np.pi * pulse * t)) ** 2 * chirp


# ----------------------------------------------------------------------------- synthesised events that are struck
# strike(rng) draws one timbre; the function it returns makes one strike of at most `length` samples.

def phone_strike(rng):
    low, ratio, warble = rng.uniform(900, 1200), rng.uniform(1.2, 1.35), rng.uniform(18, 26)

    def ring(rng, length):
        m = min(length * 3 // 4, 6400)
        t = np.arange(m) / SAMPLE_RATE
        angle = phase(np.where((t * warble) % 1 < 0.5, low, low * ratio))
        return (np.sin(angle) + 0.3 * np.sin(3 * angle)) * np.minimum(1, np.minimum(t, t[::-1]) / 0.01)
    return ring


def bird_strike(rng):
    start, sweep, bend = rng.uniform(2600, 4000), rng.uniform(600, 1800), rng.choice([-1, 1])

    def chirp(rng, length):
        m = min(length * 3 // 4, int(rng.uniform(0.09, 0.16) * SAMPLE_RATE))
        x = np.linspace(0, 1, m)
        pitch = start + sweep * (x if bend > 0 else 1 - x) + 300 * np.sin(9 * x)
        return np.sin(phase(pitch)) * np.sin(np.pi * x) ** 0.7
    return chirp


def beep_strike(rng):
    pitch, seconds = rng.uniform(700, 2000), rng.uniform(0.1, 0.25)

    def beep(rng, length):
        m = min(length * 7 // 10, int(seconds * SAMPLE_RATE))
        t = np.arange(m) / SAMPLE_RATE
        return np.sin(2 * np.pi * pitch * t) * np.minimum(1, np.minimum(t, t[::-1]) / 0.004)
    return beep


def knock_strike(rng):
    body, wood = rng.uniform(130, 260), rng.uniform(500, 900)

    def knock(rng, length):
        m = min(length, 2400)
        t = np.arange(m) / SAMPLE_RATE
        return (np.sin(2 * np.pi * body * t) * decay(m, 0.03) + 0.5 * np.sin(2 * np.pi * wood * t) * decay(m, 0.012)
                + 0.4 * rng.standard_normal(m) * decay(m, 0.004))
    return knock


def drip_strike(rng):
    low, rise = rng.uniform(500, 900), rng.uniform(1.6, 2.6)

    def drop(rng, length):
        m = min(length, 2200)
        x = np.linspace(0, 1, m)
        return np.sin(phase(low * rise ** (x * rng.uniform(0.8, 1.2)))) * decay(m, 0.035)
    return drop


SUSTAINED = {"rain": rain, "wind": wind, "thunder": thunder, "siren": siren, "clock": clock, "engine": engine,
             "cricket": cricket}
STRUCK = {"phone": phone_strike, "bird": bird_strike, "beep": beep_strike, "knock": knock_strike, "drip": drip_strike}
SPACING = {"phone": (0.4, 0.7), "bird": (0.2, 0.4), "beep": (0.25, 0.5), "knock": (0.18, 0.35), "drip": (0.25, 0.5),
           "piano": (0.35, 0.7), "trumpet": (0.35, 0.6), "snare drum": (0.2, 0.45), "cymbal": (0.45, 0.9),
           "acoustic guitar": (0.4, 0.75)}  # seconds between strikes of an uncounted event


# ----------------------------------------------------------------------------- recorded events

@lru_cache(maxsize=None)
def recorded_clips(split):
    """{event name: [clip (samples,) float32, ...]} of a split, silence trimmed, peak 1. Raises UserError if missing."""
    from audio import read_audio
    listing = SOUNDS / "captions.jsonl"
    if not listing.is_file():
        raise UserError(f"{listing} is missing; restore the sounds folder of the repository")
    clips = {}
    for row in read_jsonl(listing):
        if row["split"] == split:
            clip = read_audio(SOUNDS / row["audio"], SAMPLE_RATE, 1)[0].numpy()
            loud = np.flatnonzero(np.abs(clip) > 0.02 * np.abs(clip).max())
            clip = clip[max(0, loud[0] - 80):loud[-1] + 1]
            clips.setdefault(row["event"], []).append(clip / np.abs(clip).max())
    return clips


def repitched(clip, semitones):
    """The clip played faster or slower (linear interpolation), as a sampler does."""
    step = 2 ** (semitones / 12)
    return np.interp(np.arange(0, len(clip) - 1, step), np.arange(len(clip)), clip)


def note(rng, clip, length, semitones):
    """One note of at most `length` samples with a faded end."""
    sound = repitched(clip, semitones)[:length].copy()
    fade = min(len(sound), 640)
    sound[-fade:] *= np.linspace(1, 0, fade)
    return sound


def melody(rng, event, clips, n):
    """Notes of one recorded instrument, one after the other, until `n` samples are full."""
    beat = int(rng.uniform(0.3, 0.75) * SAMPLE_RATE)
    starts, sounds, at = [], [], 0
    while at < n:
        clip = clips[rng.integers(len(clips))]
        sound = note(rng, clip, n - at, rng.integers(-PITCH, PITCH + 1))
        step = max(1600, min(len(sound) - 320, 2 * beat) if event.sustained else beat)
        starts.append(at)
        sounds.append(sound[:step + 640] if event.sustained else sound)
        at += step
    for i, sound in enumerate(sounds):
        fade = min(len(sound), 400)
        sounds[i] = sound.copy()
        sounds[i][-fade:] *= np.linspace(1, 0, fade)
    return place(n, starts, sounds)


# ----------------------------------------------------------------------------- one event in its segment

def loudness(wave):
    """RMS of the 16 ms frames within 20 dB of the loudest: ticks and hiss of equal loudness don't mask each other."""
    frames = np.sqrt(np.mean(wave[:len(wave) // 256 * 256].reshape(-1, 256) ** 2, axis=1))
    return np.sqrt(np.mean(frames[frames >= 0.1 * frames.max()] ** 2)) + 1e-9


def strike_times(rng, n, hits):
    """Start samples of `hits` strikes that fill `n` samples: evenly spaced with a little jitter, first at 0."""
    gap = n / hits
    times = np.arange(hits) * gap
    times[1:] += rng.uniform(-0.06, 0.06, hits - 1) * gap
    return times.astype(int)


def sound_event(rng, name, n, count, split):
    """Render event `name` into `n` samples -> wave (n,) of loudness 1, start samples of its strikes or None.

    count: strikes that the prompt asks for, None: as many as fit; starts are None for what is not countable.
    """
    event = EVENTS[name]
    if name in SUSTAINED:
        wave, starts = SUSTAINED[name](rng, n), None
    elif not event.countable:
        wave, starts = melody(rng, event, recorded_clips(split)[name], n), None
    else:
        low, high = SPACING[name]
        hits = count or int(np.clip(round(n / SAMPLE_RATE / rng.uniform(low, high)), 1, MAX_HITS))
        starts = strike_times(rng, n, hits)
        lengths = np.diff(np.append(starts, n))
        if name in STRUCK:
            strike = STRUCK[name](rng)
            sounds = [strike(rng, int(length)) for length in lengths]
        else:
            clips = recorded_clips(split)[name]
            clip, pitch = clips[rng.integers(len(clips))], rng.integers(-PITCH, PITCH + 1)
            shift = rng.integers(-4, 5, hits) if name in ("piano", "trumpet") else np.zeros(hits, int)
            gate = 0.85 if event.sustained else 1.0
            sounds = [note(rng, clip, int(length * gate), pitch + s) for length, s in zip(lengths, shift)]
        wave = place(n, starts, sounds)
    fade = min(n // 4, 480)
    wave[-fade:] *= np.linspace(1, 0, fade)
    wave[:40] *= np.linspace(0, 1, 40)
    return wave / loudness(wave), starts


# ----------------------------------------------------------------------------- degradations

def degrade(audio, kind, level, rng):
    """Damage `audio` (samples,) by `kind` with strength `level` in 0..1; 0 hardly hurts, 1 ruins.

    noise: SNR 40 to 0 dB; clipping: 100 % to 6 % of the peak; band_limit: 8 kHz down to 500 Hz; dropouts: 0 to half of
    the time in gaps of 20 to 80 ms; reverberation: 0.1 to 1.5 s, wet share 0 to 80 %. Raises UserError for other kinds.
    """
    n, rms = len(audio), np.sqrt(np.mean(audio ** 2)) + 1e-9
    peak = np.abs(audio).max() + 1e-9
    if kind == "noise":
        out = audio + shaped_noise(rng, n, band(50, 7000, 1)) * rms * 10 ** (-(40 - 40 * level) / 20)
    elif kind == "clipping":
        limit = peak * 0.06 ** level
        out = np.clip(audio, -limit, limit) * (peak / limit) ** 0.5
    elif kind == "band_limit":
        f = np.fft.rfftfreq(n, 1 / SAMPLE_RATE)
        out = np.fft.irfft(np.fft.rfft(audio) / (1 + (f / (8000 * (500 / 8000) ** level)) ** 12) ** 0.5, n)
    elif kind == "dropouts":
        keep, gone = np.ones(n), 0
        while gone < 0.5 * level * n:
            gap = int(rng.uniform(0.02, 0.08) * SAMPLE_RATE)
            start = rng.integers(0, n - gap)
            keep[start:start + gap] = 0
            gone += gap
        out = audio * keep
    elif kind == "reverberation":
        m = int((0.1 + 1.4 * level) * SAMPLE_RATE)
        tail = rng.standard_normal(m) * np.exp(-6.9 * np.arange(m) / m)
        size = 1 << (n + m).bit_length()
        wet = np.fft.irfft(np.fft.rfft(audio, size) * np.fft.rfft(tail, size), size)[:n]
        wet *= rms / (np.sqrt(np.mean(wet ** 2)) + 1e-9)
        out = (1 - 0.8 * level) * audio + 0.8 * level * wet
    else:
        raise UserError(f"degradation {kind} is unknown; the world has {', '.join(DEGRADATIONS)}")
    return (out * min(1.0, 0.98 / (np.abs(out).max() + 1e-9))).astype(np.float32)


DEGRADATIONS = ("noise", "clipping", "band_limit", "dropouts", "reverberation")


# ----------------------------------------------------------------------------- scenes

def event_phrase(rng, name, count=None):
    """How a caption names an event: one of its phrases, or "three beeps" where it is counted."""
    event = EVENTS[name]
    return f"{NUMBERS[count]} {event.counted}" if count else event.phrases[rng.integers(len(event.phrases))]


def joined(rng, relation, phrases):
    """A caption of one, two or three phrases in a relation ("single", "and", "then")."""
    forms = {"single": SINGLE, "and": AND, "then": THEN if len(phrases) < 3 else THEN3}[relation]
    return forms[rng.integers(len(forms))].format(**dict(zip("abc", phrases)))


def caption(rng, relation, events):
    """One of the captions of a scene with these (name, count or None), in order for "then"."""
    return joined(rng, relation, [event_phrase(rng, *event) for event in events])


def spans(rng, relation, number, duration):
    """When each of `number` events sounds: [(onset, offset)] in seconds; "then" shares `duration` with short gaps."""
    if relation != "then":                                  # together: all fill the duration
        return [(0.0, duration)] * number
    edges = np.concatenate([[0], np.cumsum(rng.dirichlet([12] * number))]) * duration
    return [(edges[i], edges[i + 1] - (rng.uniform(0.02, 0.1) if i < number - 1 else 0)) for i in range(number)]


def perform(scene, rng, split):
    """The sound of a Scene without its degradation -> (65536,); writes strikes and hits into its events."""
    audio = np.zeros(CLIP_SAMPLES)
    for event in scene.events:
        start, stop = int(event.onset * SAMPLE_RATE), int(event.offset * SAMPLE_RATE)
        wave, strikes = sound_event(rng, event.name, stop - start, event.count, split)
        audio[start:stop] += wave * 10 ** (rng.uniform(-4, 0) / 20)
        if strikes is not None:
            event.strikes = [round(event.onset + s / SAMPLE_RATE, 4) for s in strikes]
            event.hits = len(strikes)
    return audio * (rng.uniform(0.5, 0.9) / (np.abs(audio).max() + 1e-9))


class World:
    """Scenes of one split. `scene(i)` gives the truth and the prompt, `render(i)` also the audio.

    split: "train", "val" or "test" (chooses the recorded clips and the random stream); pairs: "seen" (no unseen pair),
    "unseen" (two events, an unseen pair) or "all"; degraded: share of degraded scenes; duration: fixed seconds of
    sound instead of 1 to 4; relations: weights of single, and, then with two, then with three events.
    """

    def __init__(self, split="train", seed=0, pairs="seen", degraded=0.0, duration=None,
                 relations=(0.14, 0.24, 0.34, 0.28), counted=0.35):
        if split not in ("train", "val", "test") or pairs not in ("seen", "unseen", "all"):
            raise UserError(f"split {split} or pairs {pairs} is unknown; use train, val, test and seen, unseen, all")
        self.split, self.seed, self.pairs, self.degraded = split, seed, pairs, degraded
        self.duration, self.relations, self.counted = duration, relations, counted

    def settings(self):
        """What decides the scenes, for cache keys."""
        return {"world": 1, "split": self.split, "seed": self.seed, "pairs": self.pairs, "degraded": self.degraded,
                "duration": self.duration, "relations": list(self.relations), "counted": self.counted}

    def _rng(self, index, *what):
        return np.random.default_rng(derive_seed("world", self.split, self.seed, index, *what))

    def _names(self, rng, number):
        """`number` different event names whose pairs are allowed."""
        if self.pairs == "unseen":
            pairs = sorted(sorted(pair) for pair in unseen_pairs())
            return list(rng.permutation(pairs[rng.integers(len(pairs))]))
        while True:
            names = [EVENT_NAMES[i] for i in rng.permutation(len(EVENT_NAMES))[:number]]
            clash = any(frozenset((a, b)) in unseen_pairs() for a in names for b in names if a != b)
            if self.pairs == "all" or not clash:
                return names

    def scene(self, index):
        """The truth of scene `index` -> Scene (strikes and hits of uncounted events are known only after render)."""
        return self._compose(index)

    def _compose(self, index):
        """Scene `index`; its choices are drawn in a fixed order, so that an index always means the same scene."""
        rng = self._rng(index, "scene")
        duration = round(self.duration or rng.uniform(MIN_DURATION, MAX_DURATION), 2)
        weights = np.array(self.relations, float)
        weights[2:] *= (duration >= 1.4, duration >= 2.1)   # shorter segments than 0.7 s cannot be told apart
        if self.pairs == "unseen":
            weights[[0, 3]] = 0
        form = rng.choice(4, p=weights / weights.sum())
        number = (1, 2, 2, 3)[form]
        names = self._names(rng, number)
        events, phrases = [], []
        for name, (onset, offset) in zip(names, spans(rng, FORMS[form], number, duration)):
            event, count = EVENTS[name], None
            low, high = SHORTEST, 1.6 * SPACING[name][1] if event.countable else 0
            fits = [c for c in NUMBERS if event.countable and low <= (offset - onset) / c <= high]
            if fits and rng.random() < self.counted:
                count = int(rng.choice(fits))
            events.append(SceneEvent(name, round(float(onset), 4), round(float(offset), 4), count))
            phrases.append(event_phrase(rng, name, count))
        prompt = joined(rng, FORMS[form], phrases)
        degradation = None
        if rng.random() < self.degraded:
            degradation = (str(rng.choice(DEGRADATIONS)), round(float(rng.random()), 4))
        return Scene(index, prompt, FORMS[form], events, duration, degradation)

    def render(self, index):
        """-> (audio float32 (65536,) in [-1, 1], Scene with strikes): the same for the same (split, seed, index)."""
        scene = self._compose(index)
        audio = perform(scene, self._rng(index, "audio"), self.split)
        if scene.degradation:
            audio = degrade(audio, *scene.degradation, self._rng(index, "degradation"))
        return audio.astype(np.float32), scene
