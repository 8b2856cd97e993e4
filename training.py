"""What the training loops share: schedules, optimizer, weight average, resume, precision, log and picture.

A run's folder is a model folder plus `state.pt` (all that a resume needs, one atomic file, read with
weights_only), `log.jsonl` and, where weights are averaged, `ema.safetensors` (the average of every trained
tensor). Everything beside state.pt can be written again from it, and is when a run resumes: a kill between
two files can't mix steps. `reading.json` says how a new text encoder learned to read (reading.new_encoder).
"""
import contextlib
import json
import math
import os
from datetime import timedelta
from pathlib import Path

import torch

from common import UserError, atomic_path, choose_device, read_jsonl, save_tensors, warn, write_jsonl

# ----------------------------------------------------------------------------- schedules, optimizer, average

def linear_decay(step, peak, warmup, steps, decay=True):
    """Learning rate of step 0, 1, ...: linear warm-up to `peak` over `warmup` steps, linear decay to 0 at `steps`.

    Without `decay` it stays at its peak (second paper, III-D b).

    For the flow. Paper A.5: "a linear learning rate scheduler for 2000 steps", read as its length of warm-up,
    as the official code.
    """
    falling = (steps - step) / max(steps - warmup, 1) if decay else 1.0
    return peak * min((step + 1) / max(warmup, 1), falling, 1.0)


def cosine_decay(step, peak, warmup, steps):
    """The same warm-up, then half a cosine down to 0 at `steps`: for the codecs, whose rates are high."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def trainable(flow, encoder=None):
    """{name: parameter} of all that is trained; the text encoder's names begin with "text_encoder."."""
    named = dict(flow.named_parameters())
    if encoder is not None:
        named |= {f"text_encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def make_optimizer(named, betas=(0.9, 0.95), weight_decay=1e-2, muon=0.0, takes=None):
    """AdamW over {name: parameter}; matrices decay, vectors (biases, gains, frequencies) don't.

    muon > 0: the tensors for which `takes(name, tensor)`, default muon_takes, go to torch.optim.Muon, which steps along
    the orthogonal matrix nearest to the momentum (Jordan et al. 2024, kellerjordan.github.io/posts/muon), at `muon`
    times AdamW's rate (tall matrices sqrt(rows / columns) times that, as torch does; weight decay at `muon` times,
    too). The rate is 0 until the loop sets it by `set_rate`, which it does before each step.
    """
    taken = [p for name, p in named.items() if muon and (takes or muon_takes)(name, p)]
    chosen = {id(p) for p in taken}
    rest = [p for p in named.values() if id(p) not in chosen]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas)
    if not taken:
        return adamw
    return Together([adamw, torch.optim.Muon([{"params": taken, "scale": muon}], lr=0.0, weight_decay=weight_decay)])


def set_rate(optimizer, rate):
    """Set the learning rate of the next step; a group with a "scale" gets that times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def muon_takes(name, parameter):
    """Whether Muon trains this tensor: the attention and MLP matrices of the flow's blocks.

    Not what embeds and projects at both ends, nor the adaLN linears (after 300 toy steps the validation loss was
    0.484 with AdamW for these, 0.496 with Muon, and 0.543 with AdamW for everything).
    """
    return parameter.ndim == 2 and "transformer_blocks." in name and ".norm" not in name


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


def average_decay(step, decay):
    """Decay of the weight average at step n = 0, 1, ...: min(decay, (1 + n) / (10 + n)), short at first."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average, named, decay):
    """average <- decay * average + (1 - decay) * weights, in place."""
    torch._foreach_lerp_([average[name] for name in named], [p.detach() for p in named.values()], 1 - decay)


@torch.no_grad()
def copy_weights(named, tensors):
    """Put `tensors` {name: tensor} into the parameters of the same names."""
    for name, parameter in named.items():
        parameter.copy_(tensors[name])


@contextlib.contextmanager
def weights_replaced(named, tensors):
    """Inside the block the parameters hold `tensors`; afterwards their own values again, bit for bit."""
    own = {name: parameter.detach().clone() for name, parameter in named.items()}
    copy_weights(named, tensors)
    try:
        yield
    finally:
        copy_weights(named, own)


# ----------------------------------------------------------------------------- the run's folder

def save_state(out, named, optimizer, average, step, settings, minutes):
    """Write state.pt: weights, average and optimizer after `step` steps, and the settings of the run.

    named: {name: parameter or buffer}; average: the same for averaged weights, {} where there are none. No
    state of a generator: whatever a step draws follows from (seed, step).
    """
    state = {"step": step, "weights": {name: p.detach() for name, p in named.items()}, "average": average,
             "optimizer": optimizer.state_dict(), "settings": json.dumps(settings), "minutes": minutes}
    with atomic_path(Path(out) / "state.pt") as temporary:
        torch.save(state, temporary)


def export(out, save, named, average, which="ema"):
    """Write ema.safetensors and, by `save()`, the model folder, with averaged or, `which` "raw", latest weights."""
    with weights_replaced(named, average) if which != "raw" else contextlib.nullcontext():
        save()
    save_tensors(Path(out) / "ema.safetensors", average)


def load_state(out, named, optimizer, average, settings, product="tangoflux.safetensors"):
    """Put the run found in `out` back, in place, and return (steps done, minutes); (0, 0.0) if there is none.

    `named` and `average` as in `save_state`. Raises UserError if the run was started with other settings, if
    its state can't be read, or if `out` holds weights (the file `product`) that no run of this kind made.
    """
    path = Path(out) / "state.pt"
    if not path.is_file():
        if (Path(out) / product).exists():
            raise UserError(f"{out} holds a model but no state.pt to go on from; choose another --out")
        return 0, 0.0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        started = json.loads(state["settings"])
    except Exception as error:  # noqa: BLE001  (pickle, zip and key errors have no common type)
        raise UserError(f"{path} is not a whole training state ({type(error).__name__}); "
                        f"delete it to start anew, or choose another --out") from None
    wanted = json.loads(json.dumps(settings))
    for name in {**started, **wanted}:
        if started.get(name) != wanted.get(name):
            raise UserError(f"the run in {out} was started with {name} = {started.get(name)}, now it is "
                            f"{wanted.get(name)}; give the same flags to go on, or another --out")
    try:
        copy_weights(named, state["weights"])
        for name, tensor in average.items():
            tensor.copy_(state["average"][name])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["minutes"]
    except (KeyError, RuntimeError, ValueError) as error:       # written by another version of the code
        raise UserError(f"{path} does not fit this model ({error}); choose another --out") from None


def trim_log(out, step):
    """Drop the lines of log.jsonl that a killed run wrote after its last saved step."""
    path = Path(out) / "log.jsonl"
    rows = [row for row in read_jsonl(path) if row["step"] <= step] if path.is_file() else []
    write_jsonl(path, rows)


def log_line(row, steps):
    """One line of progress from a row of a flow's log.jsonl."""
    value = ""
    if "val_loss" in row:
        value = f"  val {row['val_loss']:.4f}, averaged weights {row['val_loss_ema']:.4f}"
    return (f"step {row['step']}/{steps}  loss {row['loss']:.4f}{value}  lr {row['lr']:.1e}  "
            f"grad {row['grad_norm']:.2f}  {row['seconds_per_step']:.2f} s/step  {row['minutes']:.1f} min")


def draw_log(out, panels, name="loss.png"):
    """The picture `name` of out/log.jsonl: a panel per (title, scale "log" or "linear", {label: curve}).

    A curve is a function of a row of the log to a number, or None where the row has none; curves without a
    point are left out. Returns False, with a notice, without matplotlib.
    """
    rows = read_jsonl(Path(out) / "log.jsonl")
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError:
        warn(f"matplotlib is not installed, so {name} is skipped; `pip install matplotlib` draws it")
        return False
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, scale, curves) in zip(axes[0], panels):
        for label, curve in curves.items():
            points = [(row["step"], curve(row)) for row in rows if curve(row) is not None]
            if points:
                axis.plot(*zip(*points), label=label)
                axis.legend()
        axis.set(title=title, xlabel="step", yscale=scale)
        if scale == "linear":
            axis.set_ylim(bottom=0)
    with atomic_path(Path(out) / name) as temporary:
        figure.savefig(temporary, dpi=100)
    return True


# ----------------------------------------------------------------------------- precision and processes

def dtype_for(name, device):
    """("float32", "bfloat16", ...; why): "auto" is bfloat16 where the hardware multiplies in it, else float32."""
    if name != "auto":
        return name, "as asked"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return ("bfloat16", f"this {device.type} multiplies in it") if fast else (
        "float32", f"this {device.type} has no fast bfloat16")


def choose_dtype(name, device, say=print):
    """-> autocast() for a `with`, of the dtype_for training, told once."""
    name, reason = dtype_for(name, device)
    say(f"dtype: {name} ({reason}); weights and optimizer stay float32")
    dtype = getattr(torch, name)
    lower = dtype != torch.float32
    # no cache of lowered weights: a step uses each once, and threads would share it (crpo.loss_and_gradients)
    return lambda: torch.autocast(device.type, dtype if lower else None, lower, cache_enabled=False)


def start_ranks(device_name):
    """(rank, ranks, device): one process, or several started by torchrun, which average their gradients."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name, quiet=rank > 0)
    if ranks > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    return rank, ranks, device


def wait_for_ranks(ranks):
    """All processes meet here."""
    if ranks > 1:
        torch.distributed.barrier()


@torch.no_grad()
def mean_over_ranks(tensors, ranks):
    """Replace each tensor by its mean over the processes."""
    for tensor in tensors if ranks > 1 else []:
        torch.distributed.all_reduce(tensor)
        tensor /= ranks
