"""Weights: files read one tensor at a time, model folders, the hub, optimizer, averages, state.pt.

    folder = model_folder("declare-lab/TangoFlux")           # a folder as it is, a hub id fetched
    weights = find_weights(folder, "tangoflux.safetensors")  # names and shapes; nothing is read yet
    load_weights(flow, weights)                              # every name once, every shape right

A model of 2 GB takes 2 GB to load: no second copy lies beside it. Pickles can run code when they
are read: one is taken only where there is no safetensors file, by torch's weights_only reader.

A run's folder is a model folder plus `log.jsonl` and `state.pt`, all that a resume needs in one
atomic file. What stands beside it is written again then: a kill between two files mixes no steps.
"""
import contextlib
import functools
import hashlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lib.common import (HERE, UserError, atomic_path, check_settings, fast_bfloat16, file_hash,
                        locked, picture, read_json, read_jsonl, reading, write_jsonl)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHER_NAMES = {"model": "pytorch_model", "vae": "diffusion_pytorch_model"}      # elsewhere
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
parsed_config = functools.lru_cache(64)(lambda path, changed: read_json(path, dict))    # once
MARKS = {"crpo.py": '"ears"', "expert_iteration.py": '"tuning_steps"', "vae.py": '"validation_db"',
         "train_fm.py": '"references"'}         # what config.json or log.jsonl of their runs hold
BROKEN = "it is not a whole safetensors file; download or write it again"


# ----------------------------------------------------------------------------- files

class Weights:
    """Tensors of a file: `shapes` {name: tuple} is known, `weights[name]` reads one to the CPU."""

    def __init__(self, what, shapes, read):
        self.what, self.shapes, self.read = str(what), shapes, read

    def __iter__(self):
        return iter(self.shapes)

    def __getitem__(self, name):
        with reading(self.what):
            tensor = self.read(name)
            if tensor.dtype not in FLOATS and tensor.ndim:      # BatchNorm counts its batches
                raise ValueError(f"{name} is {tensor.dtype}, not floating point")
        return check_finite(tensor, f"{self.what}: {name}")

    def renamed(self, names):
        """The tensors of {name: stored name} under their new names."""
        shapes = {name: self.shapes[stored] for name, stored in names.items()}
        return Weights(self.what, shapes, lambda name: self.read(names[name]))


def open_safetensors(path):
    """Weights of a safetensors file. Raises UserError if it is missing or truncated."""
    def read(name):
        with safe_open(path, "pt") as file:     # opened anew: what a closed map held is given back
            return file.get_tensor(name)
    with reading(path, BROKEN), safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return Weights(path, shapes, read)


def open_pickle(path):
    """Weights of a pickled state_dict; UserError if torch's weights_only reader refuses it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except Exception:                               # without torch's advice to run its code
        raise UserError(f"{path} is a pickle that torch's weights_only reader refuses; convert "
                        "the weights to safetensors") from None
    return Weights(path, shapes, tensors.__getitem__)


def find_weights(folder, name):
    """Weights of folder/name, a safetensors file, else of the pickle in its place, or UserError."""
    path = Path(folder) / name
    names = path.stem, OTHER_NAMES.get(path.stem, path.stem)
    for suffix in (".safetensors", *PICKLES):
        for each in names:
            place = path.with_name(f"{each}{suffix}")
            if place.is_file():
                return open_pickle(place) if suffix in PICKLES else open_safetensors(place)
    raise UserError(f"{path} is missing; pass a whole model folder")


@torch.no_grad()
def load_weights(module, weights, optional=(), dtype=None):
    """Copy `weights` into `module`, cast -> the module; with `dtype` it comes from the meta device
    and gets memory after the check. `optional`: names that either may lack. Raises UserError."""
    here = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    there = dict(weights.shapes)
    for name in set(optional) - (here.keys() & there.keys()):
        here.pop(name, None)
        there.pop(name, None)
    differ = [name for name in here | there if here.get(name) != there.get(name)]
    problems = [f"{name} is {there.get(name)}, expected {here.get(name)}" for name in differ]
    if problems:
        first = "; ".join(problems[:6])
        raise UserError(f"{weights.what} does not fit its config in {len(problems)} names: {first}")
    if dtype:
        module.to(dtype).to_empty(device="cpu")
    own = module.state_dict()
    for name in here:
        own[name].copy_(weights[name])
    return module


def check_finite(tensor, what):
    """The tensor; UserError if it holds NaN or infinity (float16 ends at 65504)."""
    if not tensor.isfinite().all():
        raise UserError(f"{what} holds NaN or infinity; take other weights, or save in float32")
    return tensor


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors, atomically. metadata: {str: str} for its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def save_module(path, module, dtype=torch.float32, metadata=None):
    """Write a module's state_dict, what is floating point as `dtype`. UserError: not finite."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        tensors[name] = check_finite(tensor, f"{path}: {name}")
    save_tensors(path, tensors, metadata)


def load_tensors(path):
    """A safetensors file as {name: CPU tensor}. Raises UserError if it is missing or truncated."""
    with reading(path, BROKEN):
        return load_file(path)


def read_header(path, key):
    """The JSON object under `key` in a safetensors header. Raises UserError if there is none."""
    open_safetensors(path)
    with reading(path, f"its header has no config of a {key}; train it again"):
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()[key]))


@functools.cache
def code_hash():
    """A short hash of this repository's code: what other code kept is not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("lib/*.py"), *HERE.glob("world/*.py")]):
        digest.update(path.relative_to(HERE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def module_hash(module):
    """SHA-256 over the names, types and bytes of a module's tensors, as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- model folders

def fetch(hub_id, patterns, remedy="pass the path of a downloaded folder"):
    """The folder of a repository's files, downloaded or in the hub's cache. Raises UserError."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:      # no network, unknown id, gated, full disk: the user's to mend
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{hub_id} is no folder here and could not be fetched from the hub "
                        f"({reason}); {remedy}") from error


def model_folder(name, files=("config.json", "*.safetensors", "text_encoder/*")):
    """A local model folder as it is; else, of owner/name on the hub, its `files`. UserError."""
    folder = Path(name)
    some = "*_[0-9]*" if (folder / "config.json").exists() else "*"     # a run's
    inside = max(folder.glob(f"{some}/tangoflux.safetensors"), key=os.path.getmtime, default=None)
    if inside and not (folder / "tangoflux.safetensors").exists():
        raise UserError(f"{folder} holds models, and is none: take {inside.parent}")
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise UserError(f"{name} is a file; pass the model folder (a reward: FILE.py:FUNCTION)")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) or folder.parent.exists():
        raise UserError(f"{name} is missing; pass the model folder, or a hub id owner/name")
    return fetch(str(name), list(files))


def read_config(folder):
    """The dict in folder/config.json. Raises UserError if it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    return parsed_config(path, path.is_file() and (path.stat().st_mtime_ns, path.stat().st_ino))


def resolve(folder, part):
    """(folder that holds `part`, its config), through the references {part: folder}; UserError."""
    folder = Path(folder)
    for _ in range(8):
        config = read_config(folder)
        with reading(folder / "config.json", "its references map a part to a relative folder"):
            target = config.get("references", {}).get(part)
            if target is None:
                return folder, config
            if not (folder / target).is_dir():
                raise ValueError(f"{part} is to be in {target}, which is missing")
        folder = folder / target
    raise UserError(f"{folder}/config.json: the references for {part} lead in a circle")


def links(policy, folder):
    """References of save_model: where a model in `folder` finds the other parts of `policy`."""
    places = {part: resolve(policy, part)[0].resolve() for part in ("vae", "text_encoder")}
    here = Path(folder).resolve()
    return {part: os.path.relpath(place, here) for part, place in places.items()}


def policy_hash(folder):
    """What scores.jsonl calls a model: the hash of its flow's weights; UserError if it has none."""
    return weights_hash(resolve(model_folder(folder), "flow")[0], "tangoflux.safetensors")


def weights_hash(folder, name):
    """What a record calls the weights in folder/name, or in the pickle in its place; UserError."""
    return f"sha256:{file_hash(find_weights(folder, name).what)[:16]}"


# ----------------------------------------------------------------------------- optimizer

def learning_rate(step, peak, warmup, steps, shape="linear"):
    """Rate of step 0, 1, ...: linear warm-up, then to 0 at `steps`, "linear" or "cosine" ("a linear
    learning rate scheduler for 2000 steps", paper A.5, read as the warm-up, as the official code),
    or "constant" (second paper, III-D b)."""
    if step < warmup:
        return peak * ((step + 1) / warmup)
    if shape == "constant":
        return peak
    if shape == "linear":
        return peak * ((steps - step) / max(1, steps - warmup))
    angle = math.pi * (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(angle))


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), whose Newton-Schulz steps run in float32 where
    bfloat16 is slow: torch's own take six times as long on a CPU without it."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"]))       # Nesterov's
                tall = math.sqrt(max(1, p.shape[0] / p.shape[1]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * tall)


def orthogonal(matrix, a=3.4445, b=-4.775, c=2.0315, steps=5):
    """The orthogonal matrix nearest to one, by Newton-Schulz steps of the fifth order."""
    x = matrix.bfloat16() if fast_bfloat16(matrix.device) else matrix.float()
    wide = matrix.shape[0] <= matrix.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x if wide else x.T


class Together(list):
    """Optimizers that step as one; its state is the list of theirs."""

    @property
    def param_groups(self):
        return [group for part in self for group in part.param_groups]

    @property
    def state(self):
        return {p: moments for part in self for p, moments in part.state.items()}

    def zero_grad(self):
        for part in self:
            part.zero_grad()

    def step(self):
        for part in self:
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self]

    def load_state_dict(self, states):
        for part, state in zip(self, states, strict=True):
            part.load_state_dict(state)


def make_optimizer(parameters, betas=(0.9, 0.95), weight_decay=1e-2, muon=0.0, muon_takes=None):
    """AdamW over {name: parameter}; matrices decay, vectors (biases, gains, frequencies) don't.
    muon > 0: the tensors for which `muon_takes(name, tensor)` go to Muon at `muon` times AdamW's
    rate (tall matrices sqrt(rows / columns) times that). A loop calls `set_rate` before a step."""
    taken = {name: p for name, p in parameters.items() if muon and muon_takes(name, p)}
    rest = [p for name, p in parameters.items() if name not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)
    if not taken:
        return adamw
    matrices = {"params": list(taken.values()), "scale": muon}
    return Together([adamw, Muon([matrices], lr=0.0, weight_decay=weight_decay)])


def trainable(flow, encoder=None):
    """{name: parameter} of all that is trained; the encoder's begin with "text_encoder."."""
    parameters = dict(flow.named_parameters())
    if encoder is not None:
        parameters |= dict(encoder.named_parameters("text_encoder"))
    return {name: p for name, p in parameters.items() if p.requires_grad}


def muon_takes(name, parameter):
    """Whether Muon trains this tensor: the attention and MLP matrices of the flow's blocks.
    Validation loss after 300 toy steps: 0.484 so, 0.496 with adaLN too, 0.543 with AdamW alone."""
    return parameter.ndim == 2 and "transformer_blocks." in name and ".norm" not in name


def set_rate(optimizer, rate):
    """Set the rate of the next step; a group with a "scale" gets that times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


# ----------------------------------------------------------------------------- averages

@torch.no_grad()
def update_average(average, parameters, decay):
    """average <- decay * average + (1 - decay) * weights, in place; both {name: tensor}."""
    averages = [average[name] for name in parameters]
    torch._foreach_lerp_(averages, list(parameters.values()), 1 - decay)


def average_decay(step, decay):
    """Decay at step n = 0, 1, ...: min(decay, (1 + n) / (10 + n)), short at first."""
    return min(decay, (1 + step) / (10 + step))


def gamma_of(sigma_rel):
    """Weights tau^gamma have sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2 126)."""
    return float(np.roots([1, 7, 16 - sigma_rel ** -2, 12 - sigma_rel ** -2]).real.max())


def power_decay(step, gamma):
    """Decay of their average at step 1, 2, ... (EDM2, Karras et al. 2024, Eq. 127)."""
    return (1 - 1 / step) ** (gamma + 1)


def start_averages(parameters, widths):
    """Averages {"": exponential, width: power function}; all tensors, as state.pt names them."""
    averages, memory = {}, {}
    for width in ("", *widths):
        averages[width] = {name: p.detach().clone() for name, p in parameters.items()}
        for name, average in averages[width].items():
            memory[f"{width} {name}" if width else name] = average
    return averages, memory


def update_averages(averages, parameters, step, ema):
    """Take the weights after step 1, 2, ... into all averages."""
    for width, average in averages.items():
        decay = power_decay(step, gamma_of(width)) if width else average_decay(step - 1, ema)
        update_average(average, parameters, decay)


@torch.no_grad()
def copy_weights(parameters, tensors):
    """Put `tensors` {name: tensor} into the parameters of the same names."""
    for name, parameter in parameters.items():
        kinds = [(tuple(each.shape), each.dtype) for each in (parameter, tensors[name])]
        if kinds[0] != kinds[1]:                    # copy_ would broadcast and cast
            raise ValueError(f"{name} is {kinds[1]}, expected {kinds[0]}")
        parameter.copy_(tensors[name])


@contextlib.contextmanager
def weights_replaced(parameters, tensors):
    """In the block the parameters hold `tensors`; then their own values again, bit for bit."""
    own = {name: p.detach().clone() for name, p in parameters.items()}
    copy_weights(parameters, tensors)
    try:
        yield
    finally:
        copy_weights(parameters, own)


# ----------------------------------------------------------------------------- the state of a run

@contextlib.contextmanager
def run_folder(out, script, cache=None):
    """Lock the folder of a run of `script` for the block. UserError, and nothing is written: it is
    also --cache, or holds this repository, other runs, or a run of another script."""
    out = Path(out)
    files = [out / "config.json", out / "log.jsonl"]
    text = "".join(path.read_text(errors="replace") for path in files if path.is_file())
    found = " and of ".join(name for name, mark in MARKS.items() if mark in text)
    inside = [*out.glob("*/config.json"), *out.glob("*/log.jsonl")]
    inside = [path.parent for path in inside if path.parent.name != "tuned"]    # a round's
    real, *latents = map(os.path.realpath, (out, cache or out / "x", f"{cache}_val"))
    holds = None
    if HERE.is_relative_to(real):
        holds = "this repository"
    elif real in latents:
        holds = "the latents (--cache)"
    elif found != script and found:
        holds = f"a run of {found}"
    elif not found and (files[0].is_file() or (out / "state.pt").is_file()):
        holds = "another model or run"
    elif not found and inside:
        holds = f"other runs, such as {inside[0]}"
    if holds:
        raise UserError(f"{out} holds {holds}; choose another folder (--out)")
    with locked(out):
        yield


def save_state(out, parameters, optimizer, average, step, settings, minutes):
    """Write state.pt: {name: parameter or buffer}, {name: average}, optimizer, settings; of no
    generator, because whatever a step draws follows from (seed, step)."""
    weights = {name: p.detach() for name, p in parameters.items()}
    state = {"step": step, "weights": weights, "average": average, "minutes": minutes,
             "optimizer": optimizer.state_dict(),
             "settings": json.dumps({**settings, "code": code_hash()})}
    with atomic_path(Path(out) / "state.pt") as temporary:
        torch.save(state, temporary)


def load_state(out, parameters, optimizer, average, settings, product="tangoflux.safetensors"):
    """Put the run found in `out` back, in place -> (steps done, minutes); (0, 0.0): there is none.
    UserError: it had other settings, does not fit, or only the file `product` is there."""
    path = Path(out) / "state.pt"
    if not path.is_file():
        if (Path(out) / product).exists():
            raise UserError(f"{out} holds a model but no state.pt; choose another --out")
        return 0, 0.0
    with reading(path, "delete it to start anew, or choose another --out"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = state.get("weights") or state["tagger"]       # a tagger of the first edition
        started = json.loads(state.get("settings", "{}"))
        check_settings(out, started, {**settings, "code": code_hash()})
        copy_weights(parameters, weights)
        copy_weights(average, state.get("average", {}))
        optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in optimizer.state.items():
            shapes = {moment.shape for moment in moments.values() if moment.ndim}
            known = moments.keys() in ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})
            if shapes - {parameter.shape} or not known:
                raise ValueError("the optimizer's moments are not those of its weights")
        return int(state["step"]), state.get("minutes", 0.0)


def trim_log(out, step):
    """Drop the lines of log.jsonl that a killed run wrote after its last saved step."""
    path = Path(out) / "log.jsonl"
    if path.is_file():
        with reading(path):
            rows = [row for row in read_jsonl(path) if row["step"] <= step]
        write_jsonl(path, rows)


def draw_log(out, panels, name="loss.png"):
    """Draw out/log.jsonl: a panel for each (title, "log" or "linear", {label: key of a row})."""
    rows = read_jsonl(Path(out) / "log.jsonl")
    with reading(f"the log in {out}"), picture(Path(out) / name, 5.5, 4, len(panels)) as axes:
        for axis, (title, scale, curves) in zip(axes or [], panels):
            for label, key in curves.items():
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points), label=label)
                    axis.legend()
            axis.set(title=title, xlabel="step", yscale=scale)
