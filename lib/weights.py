"""Weights: files read one tensor at a time, model folders and the hub, a run's state, optimizer and averages.

    folder = model_folder("declare-lab/TangoFlux")                # a folder as it is, a hub id from the hub's cache
    weights = find_weights(folder, "tangoflux.safetensors")  # names and shapes; nothing is read yet
    load_weights(flow, weights)                          # exact: every name once, every shape right

A model of 2 GB takes 2 GB to load: no second copy lies beside it. Pickles can run code when they are read: a .bin, .pt,
.pth, .ckpt or .pkl is taken only where there is no safetensors file, and only by torch's weights_only reader.

A run's folder is a model folder plus `state.pt` (all that a resume needs, one atomic file), `log.jsonl` and, where
weights are averaged, `ema.safetensors`. What stands beside state.pt can be written again from it, and is when a run
resumes: a kill between two files can't mix steps.
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

from lib.common import (UserError, atomic_path, check_settings, fast_bfloat16, file_hash,
                        read_json, read_jsonl, reading, write_jsonl)

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# what other projects call a file
OTHER_NAMES = {"model": "pytorch_model", "vae": "diffusion_pytorch_model"}


# ----------------------------------------------------------------------------- one reader

class Weights:
    """Tensors of a file by name: `shapes` {name: tuple} is known, `weights[name]` reads one, on the CPU."""

    def __init__(self, what, shapes, read):
        self.what, self.shapes, self.read = str(what), shapes, read

    def __iter__(self):
        return iter(self.shapes)

    def __getitem__(self, name):
        with reading(self.what):
            tensor = self.read(name)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            if tensor.dtype != torch.int64 or tensor.dim():         # BatchNorm counts its batches
                raise UserError(f"{self.what}: {name} is {tensor.dtype}, not floating point")
        check_finite({name: tensor}, self.what)
        return tensor

    def renamed(self, names):
        """The same tensors under other names, {name: stored name}; what is not in it is left out."""
        shapes = {name: self.shapes[stored] for name, stored in names.items()}
        return Weights(self.what, shapes, lambda name: self.read(names[name]))


def open_safetensors(path):
    """Weights of a safetensors file. Raises UserError if it is missing, truncated or no such file."""
    from safetensors import safe_open

    def read(name):
        with safe_open(path, "pt") as file:     # opened anew: what a closed map held is given back
            return file.get_tensor(name)
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    with reading(path, "it is not a whole safetensors file, download or write it again"):
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    return Weights(path, shapes, read)


def open_pickle(path):
    """Weights of a pickled state_dict, by torch's weights_only reader. Raises UserError if that refuses it."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                        # the old format, which can't be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = tensors.get("state_dict", tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except Exception:                               # without torch's advice to run its code
        raise UserError(f"{path} is a pickle that torch's weights_only reader refuses; convert "
                        "the weights to safetensors") from None
    return Weights(path, shapes, tensors.__getitem__)


def find_weights(folder, name):
    """Weights of folder/name, a safetensors file, else of the pickle in its place. Raises UserError if neither is."""
    stem = Path(name).stem
    stems = [stem, OTHER_NAMES.get(stem, stem)]
    for each in stems:
        path = Path(folder) / f"{each}.safetensors"
        if path.is_file():
            return open_safetensors(path)
    for each in stems:
        for suffix in PICKLES:
            path = Path(folder) / f"{each}{suffix}"
            if path.is_file():
                return open_pickle(path)
    raise UserError(f"{Path(folder) / name} is missing; pass a whole model folder")


def check_names(own, shapes, what):
    """UserError listing what separates the tensors that a module has (`own`) from the {name: shape} of a file."""
    problems = [f"missing {name}" for name in own if name not in shapes]
    problems += [f"unknown {name}" for name in shapes if name not in own]
    for name in own:
        if name in shapes and tuple(shapes[name]) != tuple(own[name].shape):
            problems.append(f"{name} is {tuple(shapes[name])}, expected {tuple(own[name].shape)}")
    if len(problems) > 6:
        problems[6:] = [f"and {len(problems) - 6} more"]
    if problems:
        raise UserError(f"{what} does not fit its config: {'; '.join(problems)}")


@torch.no_grad()
def load_weights(module, weights, optional=()):
    """Copy `weights` into `module`, cast to its dtype; missing, unknown or misshapen names: UserError lists them.

    One tensor at a time: beside the module there is never more than one in memory. `optional`: names that either may
    lack.
    """
    own = module.state_dict()
    left_out = set(optional) - (set(own) & set(weights))
    shapes = {name: shape for name, shape in weights.shapes.items() if name not in left_out}
    own = {name: tensor for name, tensor in own.items() if name not in left_out}
    check_names(own, shapes, weights.what)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def empty(module, dtype=torch.float32):
    """A module made on the meta device -> the same with memory, uninitialised, its buffers too, in `dtype`."""
    return module.to(dtype).to_empty(device="cpu")


def check_finite(tensors, what):
    """The tensors themselves, or a UserError naming the first with NaN or infinity (float16 overflows at 65504)."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{what}: {name} holds NaN or infinity; take another checkpoint, or "
                            "save in float32")
    return tensors


def save_tensors(path, tensors, metadata=None):
    """Write a {name: tensor} dict as safetensors, atomically. metadata: {str: str} for its header."""
    from safetensors.torch import save_file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata)


def save_module(path, module, dtype=torch.float32, metadata=None):
    """Write a module's state_dict, its floating point tensors as `dtype`. Raises UserError for NaN or infinity."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    save_tensors(path, check_finite(tensors, str(path)), metadata)


def load_tensors(path):
    """Read a safetensors file into {name: CPU tensor}. Raises UserError if missing, truncated or not safetensors."""
    from safetensors.torch import load_file
    if not Path(path).is_file():
        raise UserError(f"{path} is missing")
    with reading(path, "it is not a whole safetensors file, download or write it again"):
        return load_file(path)


def read_header(path, key):
    """The JSON object stored under `key` in a safetensors header. Raises UserError if there is none."""
    from safetensors import safe_open
    open_safetensors(path)
    with reading(path, f"its header has no config of a {key}; train it again"):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()[key])
    if not isinstance(config, dict):
        raise UserError(f"{path} cannot be used: its header has no config of a {key}")
    return config


def module_hash(module):
    """SHA-256 over the names, types and bytes of a module's tensors: the weights as they are in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------- model folders and the hub

def fetch(hub_id, patterns, remedy="pass the path of a downloaded folder"):
    """Download (or find in the hub's cache) the files of a repository; if that fails, one line with the `remedy`."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:      # no network, unknown id, gated, full disk: the user's to mend
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{hub_id} is no folder here and could not be fetched from the hub "
                        f"({reason}); {remedy}") from error


def model_folder(name, files=("config.json", "*.safetensors", "text_encoder/*")):
    """A local model folder as it is; anything else in the form owner/name: its `files`, fetched from the hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file; pass the model folder that holds it")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) or folder.parent.exists():
        raise UserError(f"model folder {name} is missing; pass a folder, or a hub id owner/name")
    return fetch(str(name), list(files))


@functools.lru_cache(maxsize=64)
def parsed_config(path, changed):
    """The dict in a config.json, parsed once for each time that it was `changed`."""
    return read_json(path, dict)


def read_config(folder):
    """The dict in folder/config.json. Raises UserError if it is missing or no JSON object."""
    path = Path(folder) / "config.json"
    return parsed_config(path, path.stat().st_mtime_ns if path.is_file() else 0)


def resolve(folder, part):
    """(folder that really holds `part`, its config): "flow", "vae" or "text_encoder", through "references"."""
    folder = Path(folder)
    for _ in range(8):
        config = read_config(folder)
        references = config.get("references", {})
        with reading(folder / "config.json", "references must map a part to a relative folder"):
            if part not in references:
                return folder, config
            target = folder / references[part]
        if not target.is_dir():
            raise UserError(f"{folder}/config.json looks for {part} in {references[part]}, which is "
                            "missing")
        folder = target
    raise UserError(f"{folder}/config.json: the references for {part} lead in a circle")


def links(policy, folder):
    """References of save_model: where a model in `folder` finds the other parts of `policy`."""
    places = {part: resolve(policy, part)[0].resolve() for part in ("vae", "text_encoder")}
    here = Path(folder).resolve()
    return {part: os.path.relpath(place, here) for part, place in places.items()}


def policy_hash(folder):
    """What scores.jsonl calls a model: the hash of its flow's weights; UserError if it has none."""
    path = resolve(model_folder(folder), "flow")[0] / "tangoflux.safetensors"
    with reading(path, "of a run of crpo.py pass an iteration_1, iteration_2, ..."):
        return f"sha256:{file_hash(path)[:16]}"


# ----------------------------------------------------------------------------- optimizer and averages

def learning_rate(step, peak, warmup, steps, shape="linear"):
    """Rate of step 0, 1, ...: linear warm-up over `warmup` steps, then to 0 at `steps`: "linear" or "cosine".

    linear is paper A.5, "a linear learning rate scheduler for 2000 steps", read as its length of warm-up, as the
    official code. "constant" stays at its peak (second paper, III-D b).
    """
    if shape == "cosine" and step < warmup:
        return peak * (step + 1) / warmup
    if shape == "cosine":
        angle = math.pi * (step - warmup) / max(1, steps - warmup)
        return peak * 0.5 * (1 + math.cos(angle))
    rising = (step + 1) / max(warmup, 1)
    falling = (steps - step) / max(steps - warmup, 1) if shape == "linear" else 1.0
    return peak * min(rising, falling, 1.0)


class Muon(torch.optim.Muon):
    """torch.optim.Muon (Jordan et al. 2024), whose Newton-Schulz steps run in float32 where bfloat16 is slow.

    torch's own always run in bfloat16: on a CPU without it a step takes six times as long.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
                update = orthogonal(update, *group["ns_coefficients"], group["ns_steps"],
                                    group["eps"])
                tall = math.sqrt(max(1, p.shape[0] / p.shape[1]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * tall)


def orthogonal(matrix, a, b, c, steps, eps):
    """The orthogonal matrix nearest to `matrix` (rows, columns), by Newton-Schulz steps of the fifth order."""
    x = matrix.bfloat16() if fast_bfloat16(matrix.device) else matrix.float()
    wide = matrix.shape[0] <= matrix.shape[1]
    x = x if wide else x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x if wide else x.T


class Together:
    """Optimizers that step as one; its state is the list of theirs."""

    def __init__(self, parts):
        self.parts = parts

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def step(self):
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def make_optimizer(parameters, betas=(0.9, 0.95), weight_decay=1e-2, muon=0.0, muon_takes=None):
    """AdamW over {name: parameter}; matrices decay, vectors (biases, gains, frequencies) don't.

    muon > 0: the tensors for which `muon_takes(name, tensor)` go to Muon at `muon` times AdamW's rate (tall matrices
    sqrt(rows / columns) times that). The rate is 0 until the loop sets it by `set_rate`, which it does before each step.
    """
    taken = {name for name, p in parameters.items() if muon and muon_takes(name, p)}
    rest = [p for name, p in parameters.items() if name not in taken]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)
    if not taken:
        return adamw
    matrices = {"params": [parameters[name] for name in parameters if name in taken], "scale": muon}
    return Together([adamw, Muon([matrices], lr=0.0, weight_decay=weight_decay)])


def trainable(flow, encoder=None):
    """{name: parameter} of all that is trained; the encoder's begin with "text_encoder."."""
    parameters = dict(flow.named_parameters())
    if encoder is not None:
        parameters |= dict(encoder.named_parameters("text_encoder"))
    return {name: p for name, p in parameters.items() if p.requires_grad}


def muon_takes(name, parameter):
    """Whether Muon trains this tensor: the attention and MLP matrices of the flow's blocks.

    Validation loss after 300 toy steps: 0.484 so, 0.496 with adaLN too, 0.543 with AdamW alone.
    """
    return parameter.ndim == 2 and "transformer_blocks." in name and ".norm" not in name


def set_rate(optimizer, rate):
    """Set the learning rate of the next step; a group with a "scale" gets that times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


@torch.no_grad()
def update_average(average, parameters, decay):
    """average <- decay * average + (1 - decay) * weights, in place; both {name: tensor}."""
    weights = [parameter.detach() for parameter in parameters.values()]
    torch._foreach_lerp_([average[name] for name in parameters], weights, 1 - decay)


def average_decay(step, decay):
    """Decay of the weight average at step n = 0, 1, ...: min(decay, (1 + n) / (10 + n)), short at first."""
    return min(decay, (1 + step) / (10 + step))


def gamma_of(sigma_rel):
    """Weights tau^gamma have sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2 126)."""
    inverse = sigma_rel ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay(step, gamma):
    """Decay of their average at step 1, 2, ... (EDM2, Karras et al. 2024, Eq. 127)."""
    return (1 - 1 / step) ** (gamma + 1)


def start_averages(parameters, widths):
    """Averages {"": exponential, width: power function}; all tensors, as state.pt names them."""
    averages, memory = {}, {}
    for width in ("", *widths):
        averages[width] = {name: p.detach().clone() for name, p in parameters.items()}
        memory |= {f"{width} {name}".strip(): p for name, p in averages[width].items()}
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
        parameter.copy_(tensors[name])


@contextlib.contextmanager
def weights_replaced(parameters, tensors):
    """Inside the block the parameters hold `tensors`; afterwards their own values again, bit for bit."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    copy_weights(parameters, tensors)
    try:
        yield
    finally:
        copy_weights(parameters, own)


# ----------------------------------------------------------------------------- the state of a run

def save_state(out, parameters, optimizer, average, step, settings, minutes):
    """Write state.pt: weights, average and optimizer after `step` steps, and the settings of the run.

    parameters: {name: parameter or buffer}; average: the same for averaged weights, {} where there are none. No state
    of a generator: whatever a step draws follows from (seed, step).
    """
    weights = {name: p.detach() for name, p in parameters.items()}
    state = {"step": step, "weights": weights, "average": average, "minutes": minutes,
             "optimizer": optimizer.state_dict(), "settings": json.dumps(settings)}
    with atomic_path(Path(out) / "state.pt") as temporary:
        torch.save(state, temporary)


def load_state(out, parameters, optimizer, average, settings, product="tangoflux.safetensors"):
    """Put the run found in `out` back, in place, and return (steps done, minutes); (0, 0.0) if there is none.

    `parameters` and `average` as in `save_state`. Raises UserError if the run was started with other settings, if its
    state can't be read, or if `out` holds weights (the file `product`) that no run of this kind made.
    """
    path = Path(out) / "state.pt"
    if not path.is_file():
        if (Path(out) / product).exists():
            raise UserError(f"{out} holds a model but no state.pt; choose another --out")
        return 0, 0.0
    with reading(path, "delete it to start anew, or choose another --out"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        started = dict(json.loads(state["settings"]))
    check_settings(out, started, settings)
    with reading(path, "it does not fit this model; choose another --out"):
        for name, tensor in state["weights"].items():
            if tensor.shape != parameters[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}")
        copy_weights(parameters, state["weights"])
        for name, tensor in average.items():
            tensor.copy_(state["average"][name])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["minutes"]


def trim_log(out, step):
    """Drop the lines of log.jsonl that a killed run wrote after its last saved step."""
    path = Path(out) / "log.jsonl"
    rows = read_jsonl(path) if path.is_file() else []
    write_jsonl(path, [row for row in rows if row["step"] <= step])
