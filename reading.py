"""A new toy text encoder learns to read the world's captions, before the flow is trained behind it.

FLAN-T5 comes with an understanding of language. An encoder from scratch has to get it from the flow's loss, which
pays for the right events early and for their order late. Trained together by AdamW, the flow had event F1 0.64 after
2250 steps, but exchanging the two sounds of a prompt raised its loss at t = 0.95 by 0.04 % only. Behind an encoder
that learned to read first and then stays as it is, by 2 % after 300 steps. (If it goes on learning with the flow, by
0.0 % after 500: Adam makes steps of full size out of gradients that are mostly noise, and the order is forgotten.)

Letters: B batch, S text tokens, T width of the text encoder; K events of the world, Q countable ones.
"""
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from common import UserError, read_json, write_json
from text import TextEncoder, make_text_encoder
from world import COUNTABLE, EVENT_NAMES, NUMBERS, World, known_words

PLACES = ("first", "second", "third", "together")


def reading_targets(scenes, event_names, countable, numbers):
    """What the captions of world.Scenes say, as 0 and 1 (B, 4 K + 3 Q): event k is first, second, third in order or
    one of several together; countable event q is asked for two, three or four times (the keys of `numbers`).
    """
    columns = {(place, name): i for i, (place, name) in enumerate((p, n) for p in PLACES for n in event_names)}
    columns |= {(count, name): len(columns) + i for i, (count, name) in enumerate(
        (c, n) for c in numbers for n in countable)}
    targets = torch.zeros(len(scenes), len(columns))
    for row, scene in zip(targets, scenes):
        for place, event in zip(PLACES, scene.events):
            row[columns["together" if scene.relation == "and" else place, event.name]] = 1
            if event.count is not None:
                row[columns[event.count, event.name]] = 1
    return targets


def learn_to_read(encoder, steps, batch_size=64, learning_rate=2e-3, seed=0):
    """Teach `encoder` in place to read captions of the world; minutes on a CPU.

    A linear layer on the mean of the hidden states, what the flow's pooled vector is made of, must tell from the
    caption alone which event has which place, and counts. Training captions only, no audio; the layer is thrown away.
    Returns the share of captions read without a mistake in the last tenth of the steps.
    """
    world, names = World("train", seed=f"reading {seed}"), (EVENT_NAMES, COUNTABLE, NUMBERS)
    device = encoder.t5.shared.weight.device
    head = nn.utils.skip_init(nn.Linear, encoder.width, len(PLACES) * len(EVENT_NAMES) + len(NUMBERS) * len(COUNTABLE),
                              device=device)                 # draws nothing from the global generator
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, -4.0)                       # most things are not said
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=learning_rate, betas=(0.9, 0.98))
    encoder.train().t5.eval()                                # gradients, no dropout
    accuracy = []
    for step in tqdm(range(steps), desc="learning to read", unit="step", disable=None):
        scenes = [world.scene(step * batch_size + i) for i in range(batch_size)]
        ids, mask = encoder.tokenize([scene.prompt for scene in scenes])                        # (B, S)
        hidden, mask = encoder.encode(ids, mask), mask.to(device)[..., None]                    # (B, S, T), (B, S, 1)
        logits = head((hidden * mask).sum(1) / mask.sum(1))                                     # (B, 4 K + 3 Q)
        targets = reading_targets(scenes, *names).to(device)
        for group in optimizer.param_groups:                 # warm-up, constant to the half, then linear to 0
            group["lr"] = learning_rate * min(1, (step + 1) / 50, 2 * (1 - step / steps))
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean().backward()
        optimizer.step()
        accuracy.append(((logits > 0) == targets.bool()).all(1).float().mean().item())
    optimizer.zero_grad()                                    # a frozen encoder holds no gradients
    encoder.eval()
    last = accuracy[-max(1, steps // 10):]
    return sum(last) / len(last)


def new_encoder(out, width, steps, seed, device, say=print):
    """A toy encoder that has learned to read for `steps`; it is in out/text_encoder at once, where a resume finds it.

    out/reading.json says how it was made. UserError if `out` holds a model with another one.
    """
    out, made = Path(out), {"seed": seed, "reading_steps": steps}
    folder, note = out / "text_encoder", out / "reading.json"
    found = read_json(note) if note.is_file() else None
    if found == made:
        encoder = TextEncoder.load(folder)
        if encoder.width == width:
            return encoder.to(device)
    if (out / "state.pt").exists() or (out / "tangoflux.safetensors").exists():     # never touch another run's
        was = f"--seed {found['seed']} --reading_steps {found['reading_steps']}" if found else "none made here"
        was += f", {encoder.width} wide" if found == made else ""
        raise UserError(f"{out} holds a model with another text encoder ({was}; now --seed {seed} --reading_steps "
                        f"{steps}, {width} wide); give the same flags to go on, or another --out")
    encoder = make_text_encoder(known_words(), width, seed=seed).to(device)
    if steps:
        share = learn_to_read(encoder, steps, seed=seed)
        say(f"text encoder: reads {100 * share:.1f} % of the world's captions without a mistake")
    encoder.save(folder)
    write_json(note, made)                      # last: it says that the folder is whole
    return encoder
