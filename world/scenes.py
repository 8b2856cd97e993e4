"""The scenes of the built-in world: up to three events, a caption, its truth and its near misses.

    audio, scene = World("train").render(11)    # float32 (65536,), 16 kHz; scene.prompt: a caption

The truth (events, order, onsets, counts, duration) is known, as in no captioned data set. Scene i
follows from (seed, split, i). Test scenes play recorded clips that no training scene plays; the
pairs of events in sounds/unseen_pairs.json sound in no training scene: they make the test prompts.
"""
import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain, combinations

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lib.common import UserError, derive_seed, read_json
from world.sounds import (CLIP_SAMPLES, DEGRADATIONS, EVENT_NAMES, EVENTS, SAMPLE_RATE, SHORTEST,
                          SOUNDS, degrade, sound_event)

FIRST_EVENTS = 4078116935113008665              # derive_seed(*EVENT_NAMES)
NUMBERS = {2: "two", 3: "three", 4: "four"}     # what a prompt may count
IN_ORDER = " then |followed by|, then| after "
CAPTIONS = {                                    # (relation, number of events): forms of a caption
    ("single", 1): ("{0}", "{0}", "the sound of {0}", "{0} can be heard"),
    ("and", 2): (
        "{0} and {1}", "{0} with {1}", "{0} together with {1}", "{0} and {1} at the same time"),
    ("then", 2): ("{0} followed by {1}", "{0}, then {1}", "{0} and then {1}",
                  "first {0}, then {1}", "{1} after {0}"),
    ("then", 3): ("{0}, then {1}, then {2}", "{0} followed by {1} and then {2}",
                  "first {0}, then {1}, and finally {2}")}
# what a near miss changes, and how often: order and count are learned slowest
CHANGES = ("order", "count", "relation", "event", "number")
CHANCES = (0.3, 0.3, 0.1, 0.15, 0.15)


@dataclass
class SceneEvent:
    """Truth about one event of a scene; times in seconds from the start of the clip."""
    name: str
    onset: float
    offset: float
    count: int = None   # what the prompt asks for, if it counts
    hits: int = None    # true number of strikes, known for countable events
    strikes: list = field(default_factory=list)  # onset of each strike


@dataclass
class Scene:
    """What the prompt says and what is to be heard."""
    index: int
    prompt: str
    relation: str               # "single", "and" or "then"
    events: list                # of SceneEvent, in order for "then"
    duration: float             # seconds of sound; silence follows
    degradation: tuple = None   # (kind, level in 0..1)

    @property
    def asked(self):
        """[(name, count or None)]: what captions say of the events."""
        return [(event.name, event.count) for event in self.events]


def known_words():
    """All words of captions of the world, sorted: the vocabulary of the toy text encoder."""
    texts = [*NUMBERS.values(), *chain(*CAPTIONS.values())]
    for event in EVENTS.values():
        texts += event.names, event.counted
    return sorted(set(re.findall("[a-z]+", " ".join(texts))))


def event_phrase(rng, name, count):
    """How a caption names an event: one of its phrases, or "three beeps" where it is counted."""
    if count:
        return f"{NUMBERS[count]} {EVENTS[name].counted}"
    return rng.choice(EVENTS[name].names.split(", "))


def caption(rng, relation, events):
    """A caption of [(name, count or None)], in order for "then"."""
    phrases = [event_phrase(rng, *event) for event in events]
    return rng.choice(CAPTIONS[relation, len(phrases)]).format(*phrases)


def changed(rng, relation, events):
    """One random change of a scene -> (relation, events); the same where it is impossible."""
    change = rng.choice(CHANGES, p=CHANCES)
    place = rng.integers(len(events))
    count = events[place][1]
    others = [name for name in EVENT_NAMES if name not in dict(events)]
    if change == "order" and relation == "then":
        place = rng.integers(len(events) - 1)
        events.insert(place, events.pop(place + 1))
    elif change == "count" and count:
        numbers = [number for number in NUMBERS if number != count]
        events[place] = events[place][0], int(rng.choice(numbers))
    elif change == "relation" and len(events) == 2:
        relation = "then" if relation == "and" else "and"
        events = events if rng.random() < 0.5 else events[::-1]
    elif change == "event":
        events[place] = str(rng.choice(others)), None
    elif change == "number" and len(events) > 1 and rng.random() < 0.5:
        del events[place]
        relation = relation if len(events) > 1 else "single"
    elif change == "number" and len(events) < 3 and relation != "and":
        events.insert(rng.integers(len(events) + 1), (str(rng.choice(others)), None))
        relation = "then" if relation == "then" or rng.random() < 0.5 else "and"
    return relation, events


def almost(rng, relation, events):
    """(relation, [(name, count or None)]) nearly as given; only counts that are named change."""
    near = relation, events
    while near == (relation, events):
        near = changed(rng, relation, list(events))
    return near


def fitting_seconds(prompt, seconds):
    """`seconds`, or fewer where a prompt counts: scenes of `World` never stretch counted strikes."""
    parts = len(re.split(IN_ORDER, prompt))
    for event in EVENTS.values():
        for count, word in NUMBERS.items():
            if event.counted and f"{word} {event.counted}" in prompt.lower():
                seconds = min(seconds, parts * count * event.spacing[1])
    return round(seconds, 2)


def sounds_named(prompt):
    """How many sounds a prompt names, told by the words that join them; scenes have at most 3."""
    parts = re.split(f"{IN_ORDER}| and | with |,", prompt.lower())
    return sum(part.strip() != "" for part in parts)


def near_misses(rng, relation, events, number):
    """`number` different false captions, each of a scene that is `almost` the given one."""
    wrong = set()
    while len(wrong) < number:
        wrong.add(caption(rng, *almost(rng, relation, events)))
    return sorted(wrong)


def relative(scene, rng):
    """A Scene that is `almost` the given one: other events, laid out anew, no shorter."""
    shortest = 0.0
    while shortest < SHORTEST:
        relation, near = almost(rng, scene.relation, scene.asked)
        duration = max(scene.duration, 0.7 * len(near) if relation == "then" else 0)
        laid = laid_out(near, spans(rng, relation, len(near), duration))
        shortest = min((event.offset - event.onset) / (event.count or 1) for event in laid)
    return Scene(scene.index, caption(rng, relation, near), relation, laid, duration,
                 scene.degradation)


def story(scene):
    """What makes two scenes the same to a caption: relation, names, counts, in order for "then"."""
    asked = scene.asked if scene.relation == "then" else sorted(scene.asked, key=str)
    return scene.relation, tuple(asked)


# ----------------------------------------------------------------------------- scenes

@lru_cache(maxsize=1)
def unseen_pairs():
    """Sorted pairs [a, b] of names that no training scene holds (sounds/unseen_pairs.json)."""
    return sorted(map(sorted, read_json(SOUNDS / "unseen_pairs.json", list)))


def spans(rng, relation, number, duration):
    """When each of `number` events sounds, [(onset, offset)], seconds; "then": with short gaps."""
    if relation != "then":  # together: all fill the duration
        return [(0.0, duration)] * number
    edges = np.cumsum([0, *rng.dirichlet([12] * number)]) * duration
    gaps = [*rng.uniform(0.02, 0.1, number - 1), 0]
    return list(zip(edges.tolist(), (edges[1:] - gaps).tolist()))


def laid_out(asked, times):
    """SceneEvents of [(name, count)] and their [(onset, offset)], rounded."""
    return [SceneEvent(name, round(onset, 4), round(offset, 4), count)
            for (name, count), (onset, offset) in zip(asked, times)]


def perform(scene, split, rng, damage_rng):
    """The sound of a Scene, float32 (65536,) in [-1, 1]; sets strikes and hits of its events."""
    audio = np.zeros(CLIP_SAMPLES)
    for event in scene.events:
        start = int(event.onset * SAMPLE_RATE)
        part = audio[start:int(event.offset * SAMPLE_RATE)]
        wave, strikes = sound_event(rng, event.name, len(part), event.count, split)
        part += wave * 10 ** (rng.uniform(-4, 0) / 20)
        if strikes is not None:
            event.strikes = [round(event.onset + strike / SAMPLE_RATE, 4) for strike in strikes]
            event.hits = len(strikes)
    audio *= rng.uniform(0.5, 0.9) / (np.abs(audio).max() + 1e-9)
    if scene.degradation:
        audio = degrade(audio, *scene.degradation, damage_rng)
    return audio.astype(np.float32)


@dataclass
class World:
    """Scenes of one split: `scene(i)` is the truth and the prompt, `render(i)` also the audio."""
    split: str = "train"    # train, val or test: the recorded clips and the random stream
    seed: int = 0
    pairs: str = "seen"     # seen: no unseen pair; unseen: two events, an unseen pair; all
    degraded: float = 0.0   # share of degraded scenes
    duration: float = None  # seconds of sound; None: 1 to 4
    relations: tuple = (0.14, 0.24, 0.34, 0.28)  # weights of the rows of CAPTIONS
    counted: float = 0.35   # share of the countable events that prompts count
    weak: float = 0.0       # share of the captions that are false in one thing, as on the web
    only: tuple = ()        # names of the events that may sound, of which three may meet; (): all

    def __post_init__(self):
        self.names = list(dict.fromkeys(self.only)) or EVENT_NAMES
        unknown = ", ".join(name for name in self.names if name not in EVENT_NAMES)
        if unknown:
            raise UserError(f"the world has no {unknown}; its events: {', '.join(EVENT_NAMES)}")
        if not any(map(self.allowed, combinations(self.names, 3))):
            raise UserError(f"no three of {', '.join(self.names)} may meet in training "
                            "(sounds/unseen_pairs.json): name more events")

    def settings(self):
        """What decides the scenes, for cache keys, so that older caches stay valid: "weak" and
        "only" where they are given, "events" unless the first table."""
        table = derive_seed(*EVENT_NAMES)
        settings = {"world": 1, **asdict(self), "relations": list(self.relations),
                    "only": list(self.only)}
        for name in ("weak", "only"):
            if not settings[name]:
                del settings[name]
        if table != FIRST_EVENTS:
            settings["events"] = table
        return settings

    def rng(self, index, purpose):
        """The random stream of scene `index`: "scene", "audio", "degradation" or "weak"."""
        return np.random.default_rng(derive_seed("world", self.split, self.seed, index, purpose))

    def draw_names(self, rng, number):
        """`number` different event names whose pairs are allowed."""
        if self.pairs == "unseen":
            return rng.permutation(rng.choice(unseen_pairs())).tolist()
        while True:
            names = rng.permutation(self.names)[:number].tolist()
            if self.allowed(names):
                return names

    def draw_count(self, rng, name, seconds):
        """How often an event strikes in `seconds` if the prompt says so, else None."""
        longest = 1.6 * EVENTS[name].spacing[1]  # 0 for what cannot be counted
        fitting = [count for count in NUMBERS if SHORTEST <= seconds / count <= longest]
        if fitting and rng.random() < self.counted:
            return int(rng.choice(fitting))

    def scene(self, index):
        """The truth of scene `index`, without strikes; the order of draws is fixed for good."""
        rng = self.rng(index, "scene")
        duration = round(self.duration or rng.uniform(1, 4), 2)
        weights = np.array(self.relations) * (1, 1, duration >= 1.4, duration >= 2.1)
        if self.pairs == "unseen":
            weights *= (0, 1, 1, 0)
        relation, number = list(CAPTIONS)[rng.choice(4, p=weights / weights.sum())]
        names = self.draw_names(rng, number)
        times = spans(rng, relation, number, duration)
        asked, phrases = [], []
        for name, (onset, offset) in zip(names, times):
            asked.append((name, self.draw_count(rng, name, offset - onset)))
            phrases.append(event_phrase(rng, *asked[-1]))
        prompt = rng.choice(CAPTIONS[relation, number]).format(*phrases)
        scene = Scene(index, prompt, relation, laid_out(asked, times), duration)
        if rng.random() < self.degraded:
            scene.degradation = str(rng.choice(DEGRADATIONS)), round(rng.random(), 4)
        if self.weak:
            scene.prompt = self.weak_caption(scene)
        return scene

    def weak_caption(self, scene):
        """The prompt of a scene, or, in a share `weak`, a false one of names that may meet."""
        rng = self.rng(scene.index, "weak")
        if rng.random() >= self.weak:
            return scene.prompt
        while True:
            relation, events = almost(rng, scene.relation, scene.asked)
            if self.allowed(dict(events)) and set(dict(events)) <= set(self.names):
                return caption(rng, relation, events)

    def allowed(self, names):
        """Whether scenes of this world may hold these events together."""
        unseen = any(set(names).issuperset(pair) for pair in unseen_pairs())
        return self.pairs != "seen" or not unseen

    def render(self, index):
        """-> (audio float32 (65536,) in [-1, 1], Scene with strikes), always the same."""
        scene = self.scene(index)
        rng, damage_rng = self.rng(index, "audio"), self.rng(index, "degradation")
        return perform(scene, self.split, rng, damage_rng), scene


def render_clips(world, indices):
    """Scenes `indices` of a World -> (N, 65536) float32 tensor, list of N Scenes."""
    audios, scenes = zip(*map(world.render, indices))
    return torch.from_numpy(np.stack(audios)), list(scenes)


def in_workers(function, jobs, workers, desc=None, unit="it"):
    """function(job) of `jobs` in order, by `workers` processes (0: this one), each at most two jobs
    ahead; desc: of a bar."""
    jobs = list(jobs)
    context = "spawn" if workers else None                  # a fork of torch's threads can hang
    results = DataLoader(jobs, None, num_workers=workers, collate_fn=function,
                         multiprocessing_context=context,
                         generator=torch.Generator())       # leaves the global one alone
    try:
        yield from tqdm(results, desc, unit=unit, disable=desc is None)
    except UserError as error:
        if not workers:
            raise
        raise UserError(str(error).split("UserError: ")[-1]) from None  # no worker's traceback
