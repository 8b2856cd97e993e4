"""What makes it quick, and nothing else: model.py and lib/oobleck.py hold the arithmetic.

    attention(q, k, v, mask)  # torch's own, but in 16 bits on a CPU
    quicken(flow)             # oneDNN multiplies on a CPU, where no gradient is asked for
    quicken(flow, rows)       # and its weights are packed for inputs of so many rows: for good
    quicken_codec(codec)      # Oobleck with channels last on a CPU, its weights computed once
    start_ranks(device)       # torchrun's processes, each with its part of a batch

With ENABLED = False the networks and the numbers stay (tests/test_fast.py). Left out: q, k and v as
one product gained nothing on a CPU; the modulations of all steps ahead 0 to 2 % (one clip: 6 %).
Letters: B batch, N samples or tokens, H channels.
"""
import os
from datetime import timedelta

import torch
import torch.nn.functional as F
from torch import nn

from lib.common import choose_device
from lib.oobleck import Snake, Stack, WeightNormConv

ENABLED = True


# ----------------------------------------------------------------------------- the flow

class QuickLinear(nn.Linear):
    """nn.Linear, or with `gelu` (tanh) behind it: 15 % of a toy's step.
    torch gives float32 products to MKL, which on AMD's processors runs at half the speed of oneDNN
    (two Zen 5 cores, 1332 x 1024 by 1024 x 4096: 212 GFLOP/s against 432, and 487 with a packed
    weight; bfloat16: 795, 823, 999)."""

    gelu = False
    packed = None                       # the weight in oneDNN's own order of storage

    def forward(self, x):
        if self.packed is not None or onednn_multiplies(x):
            weight = self.weight if self.packed is None else self.packed
            after = ("gelu", [], "tanh") if self.gelu else ("none", [], "")
            return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, *after)
        x = super().forward(x)
        return F.gelu(x, approximate="tanh") if self.gelu else x


def onednn_multiplies(x):
    """Whether oneDNN has a product for tensors like x (here, without gradients or autocast)."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    if x.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def quicken(flow, rows=None):
    """Make a TangoFlux quick where no gradient is asked for, in place; returns it.
    rows: about B N of the batches to come; the weights move, no state_dict or training after it."""
    if not ENABLED:
        return flow
    for module in list(flow.modules()):     # a list: the loop replaces modules
        if type(module) is nn.Linear:
            module.__class__ = QuickLinear
        for product, act in (("proj", "act"), ("proj_mlp", "act_mlp")):
            if isinstance(getattr(module, act, None), nn.GELU):
                getattr(module, product).gelu = True
                setattr(module, act, nn.Identity())
    with torch.inference_mode():
        for module in flow.modules():
            if rows and isinstance(module, QuickLinear) and onednn_multiplies(module.bias):
                weight = module.weight.detach()
                module.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                module.weight = None
    return flow


def attention(q, k, v, visible):
    """softmax(q k^T / sqrt(A)) v for (B, H, N, A); visible (B, N) bool hides keys, None: no key.
    Written out for 16 bits on a CPU, where the fused kernel takes three times as long."""
    visible = None if visible is None else visible[:, None, None]           # (B, 1, 1, N)
    if not ENABLED or q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                               # (B, H, N, N)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v                           # (B, H, N, A)


# ----------------------------------------------------------------------------- Oobleck

class QuickSnake(Snake):
    """Snake of (B, H, 1, N), in place: three times as fast, a third of a decoder's work is here."""

    def forward(self, x):
        if x.dim() == 3:
            return super().forward(x)
        a = self.alpha.exp()[..., None]
        b = self.beta.exp()[..., None] + 1e-9
        wave = (a * x).sin_()
        return wave.mul_(wave).div_(b).add_(x)


class QuickConv(WeightNormConv):
    """The convolution of (B, H, 1, N), whose weight is computed once."""

    version = None

    def forward(self, x):
        if x.dim() == 3:
            return super().forward(x)
        version = self.weight_v._version, self.weight_g._version, x.device
        if self.version != version:                 # new, or trained, loaded or moved since
            self.version = version
            self.folded = channels_last(self.weight())
        stride, padding, dilation = self.settings.values()
        convolve = F.conv_transpose2d if self.transposed else F.conv2d
        return convolve(x, self.folded, self.bias, stride=(1, stride), padding=(0, padding),
                        dilation=(1, dilation))


class QuickStack(Stack):
    """The encoder or decoder, in between with tensors (B, H, 1, N)."""

    def forward(self, x):
        if torch.is_grad_enabled():
            return super().forward(x)
        return super().forward(channels_last(x))[:, :, 0].contiguous()


def channels_last(x):
    """(B, H, N) -> (B, H, 1, N), on a CPU with channels last, which takes 0.6 of the time."""
    layout = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
    return x[:, :, None].contiguous(memory_format=layout)


def quicken_codec(codec):
    """Make a codec quick where no gradient is asked for, in place; returns it."""
    if not ENABLED:
        return codec
    quick = {Snake: QuickSnake, WeightNormConv: QuickConv, Stack: QuickStack}
    for module in codec.modules():
        module.__class__ = quick.get(type(module), type(module))
    return codec


# ----------------------------------------------------------------------------- processes

def start_ranks(device_name):
    """(rank, ranks, device) of one process, or of several that torchrun started."""
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name, quiet=rank > 0)
    if ranks == 1:
        return rank, ranks, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    return rank, ranks, device


def wait_for_ranks(ranks):
    if ranks > 1:
        torch.distributed.barrier()


def mean_over_ranks(tensors, ranks):
    """Replace each tensor by its mean over the processes."""
    if ranks > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor /= ranks
