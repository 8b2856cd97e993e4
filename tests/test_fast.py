"""lib/fast.py may only make things quick: each test switches it off and compares."""
import copy

import pytest
import torch
from conftest import noise, relative_error
from test_model import inputs, random_flow  # noqa: F401  (a fixture)
from test_oobleck import small

from lib import fast

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rows", [None, 26])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_quick_flow_gives_the_same_velocity(inputs, rows, dtype, tolerance):
    flow = random_flow().to(dtype)
    quick = fast.quicken(copy.deepcopy(flow), rows)
    x, t, condition = inputs
    with torch.inference_mode():
        ours, plain = (each.velocity(x.to(dtype), t, condition) for each in (quick, flow))
    assert relative_error(ours, plain) < tolerance
    with torch.inference_mode():        # an older CPU has no product of its own in bfloat16
        packs = rows is not None and fast.onednn_multiplies(torch.zeros(1, dtype=dtype))
    assert ("fc.0.weight" in quick.state_dict()) == (not packs)


def test_without_rows_a_quick_flow_trains_as_before(inputs):
    flow = random_flow()
    quick = fast.quicken(fast.quicken(copy.deepcopy(flow)))         # twice is once
    assert list(quick.state_dict()) == list(flow.state_dict())
    for each in (flow, quick):
        each.velocity(*inputs).square().mean().backward()
    for ours, plain in zip(quick.parameters(), flow.parameters()):
        assert torch.equal(ours.grad, plain.grad)                   # bit for bit
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quick.velocity(*inputs), flow.velocity(*inputs))


@pytest.mark.parametrize("strides", [[2, 4, 4], [3, 2, 5]])
def test_a_quick_codec_gives_the_same_numbers(strides):
    codec = small(downsampling_ratios=strides).eval()
    quick = fast.quicken_codec(fast.quicken_codec(copy.deepcopy(codec)))
    assert list(quick.state_dict()) == list(codec.state_dict())
    audio = noise(2, 2, 20 * codec.hop + 3)
    with torch.inference_mode():
        mean, std = codec.encode(audio)
        for ours, plain in zip(quick.encode(audio), (mean, std)):
            assert relative_error(ours, plain) < 1e-5
        assert relative_error(quick.decode(mean, frames=7), codec.decode(mean, frames=7)) < 1e-5


def test_a_quick_codec_follows_its_weights():
    quick, other = fast.quicken_codec(small(0)), small(1)
    audio = noise(1, 2, 320)

    def same():
        with torch.no_grad():
            ours, plain = (codec.decode(codec.encode(audio)[0]) for codec in (quick, other))
            return relative_error(ours, plain) < 1e-5
    assert not same()
    quick.load_state_dict(other.state_dict())
    assert same()
    for codec in (quick, other):
        codec.losses(audio, torch.Generator().manual_seed(0))["stft"].backward()
        torch.optim.SGD(codec.parameters(), lr=1e-3).step()
    for ours, plain in zip(quick.parameters(), other.parameters()):
        assert torch.equal(ours, plain)
    assert same()


def test_switched_off_nothing_changes(monkeypatch):
    monkeypatch.setattr(fast, "ENABLED", False)
    both = torch.nn.ModuleList([random_flow(), small()])
    kinds = [type(module) for module in both.modules()]
    fast.quicken(both[0], 26)
    fast.quicken_codec(both[1])
    assert kinds == [type(module) for module in both.modules()]
