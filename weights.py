"""Weights on disk: found, checked, and read one tensor at a time into networks whose memory is there already.

    tensors = find_weights(folder, "tangoflux.safetensors")       # names and shapes; nothing is read yet
    load_weights(flow, tensors)                                   # exact: every name once, every shape right

A model of 2 GB takes 2 GB to load, and in bfloat16 half of that: no second copy lies beside it, and the pages of a
mapped file are given back after each tensor. Pickles can run code when they are read: a .bin, .pt, .pth, .ckpt
or .pkl is taken only where there is no safetensors file, and only by torch's weights_only reader.
"""
from pathlib import Path

import torch

from common import UserError, missing_and_unknown

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# our name of a file -> what other projects call it
OTHER_NAMES = {"model": ("pytorch_model",), "vae": ("diffusion_pytorch_model",)}


class Weights:
    """Tensors of a file by name: `shapes` {name: tuple} is known, `weights[name]` reads one, on the CPU."""

    def __init__(self, what, shapes, read):
        self.what, self.shapes, self.read = str(what), shapes, read

    @classmethod
    def of(cls, what, tensors):
        """Those of a {name: tensor} dict."""
        return cls(what, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)

    def __iter__(self):
        return iter(self.shapes)

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, name):
        tensor = self.read(name)
        check_finite({name: tensor}, self.what)
        return tensor

    def named(self, names):
        """The same tensors under other names, {name: stored name}; what is not in it is left out."""
        return Weights(self.what, {name: self.shapes[stored] for name, stored in names.items()},
                       lambda name: self.read(names[name]))


def open_safetensors(path):
    """Weights of a safetensors file. Raises UserError if it is missing, truncated or no such file."""
    from safetensors import SafetensorError, safe_open
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing")

    def read(name):
        with safe_open(path, "pt") as file:         # opened anew for each: what a closed map held is given back
            return file.get_tensor(name)
    try:
        with safe_open(path, "pt") as file:
            return Weights(path, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, read)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); download or write it again") from None


def open_pickle(path):
    """Weights of a pickled state_dict, read by torch's weights_only reader. Raises UserError if that refuses it."""
    try:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:                        # the old format, which can't be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:                               # pickle, zip, key and end-of-file errors have no common type
        raise UserError(f"{path} is a pickle that torch's weights_only reader refuses, for it is broken or could run "
                        "code; convert the weights to safetensors") from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else tensors
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise UserError(f"{path} holds no state_dict; convert the weights to safetensors")
    return Weights.of(path, tensors)


def find_weights(folder, name):
    """Weights of folder/name, a safetensors file, else of the pickle in its place. Raises UserError if neither is."""
    folder, stem = Path(folder), Path(name).stem
    for other in (stem, *OTHER_NAMES.get(stem, ())):
        if (folder / f"{other}.safetensors").is_file():
            return open_safetensors(folder / f"{other}.safetensors")
    for other in (stem, *OTHER_NAMES.get(stem, ())):
        for suffix in PICKLES:
            if (folder / f"{other}{suffix}").is_file():
                return open_pickle(folder / f"{other}{suffix}")
    raise UserError(f"{folder / name} is missing; pass a whole model folder")


@torch.no_grad()
def load_weights(module, weights, optional=()):
    """Copy `weights` into `module`, cast to its dtype; missing, unknown or misshapen names: UserError lists them.

    One tensor at a time: beside the module there is never more than one in memory. `optional`: names that either may
    lack.
    """
    own = module.state_dict()
    names = [name for name in weights if name in own or name not in optional]
    own = {name: tensor for name, tensor in own.items() if name in names or name not in optional}
    missing_and_unknown(own, {name: weights.shapes[name] for name in names}, weights.what)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def empty(module, dtype=torch.float32):
    """A module made on the meta device -> the same with memory, uninitialised, its buffers too, in `dtype`."""
    return module.to(dtype).to_empty(device="cpu")


def check_finite(tensors, what):
    """The tensors themselves, or a UserError naming the first with NaN or infinity (float16 overflows at 65504)."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{what}: {name} holds NaN or infinity; take another checkpoint, or save in float32")
    return tensors
