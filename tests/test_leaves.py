"""What torch's own layers are written down to call, against what they really call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from morph import analyse
from morph.analysis.leaves import quick_forward
from morph.analysis.recorder import record
from morph.errors import TraceError

LAYERS = {
    "conv": (nn.Conv2d(6, 4, (3, 5), (2, 1), (1, 0), (1, 2), groups=2, bias=False), (2, 6, 11, 13)),
    "conv1d": (nn.Conv1d(3, 5, 3, padding=2), (2, 3, 7)),
    "conv3d": (nn.Conv3d(3, 5, 2), (2, 3, 4, 5, 6)),
    "batch norm": (nn.BatchNorm2d(5, eps=1e-2, momentum=None), (3, 5, 2, 2)),
    "no affine": (nn.BatchNorm2d(5, affine=False), (3, 5, 2, 2)),
    "linear": (nn.Linear(7, 3), (2, 5, 7)),
    "no bias": (nn.Linear(7, 3, bias=False), (7,)),
    "layer norm": (nn.LayerNorm((3, 5), eps=1e-3), (2, 3, 5)),
    "no elements": (nn.LayerNorm(5, elementwise_affine=False), (2, 3, 5)),
    "relu": (nn.ReLU(), (2, 3)),
    "relu6": (nn.ReLU6(), (2, 3)),
    "silu": (nn.SiLU(), (2, 3)),
    "hardswish": (nn.Hardswish(), (2, 3)),
    "hardsigmoid": (nn.Hardsigmoid(), (2, 3)),
    "sigmoid": (nn.Sigmoid(), (2, 3)),
    "tanh": (nn.Tanh(), (2, 3)),
    "gelu": (nn.GELU(), (2, 3)),
    "global pool": (nn.AdaptiveAvgPool2d(1), (2, 3, 5, 4)),
    "global pool of two": (nn.AdaptiveAvgPool2d((1, 1)), (2, 1, 1, 1)),
    "max pool": (nn.MaxPool2d(3, 2, 1), (2, 3, 8, 7)),
    "max pool by its kernel": (nn.MaxPool2d((2, 3)), (2, 3, 8, 7)),
    "max pool, dilated": (nn.MaxPool2d(2, 1, 0, dilation=2), (2, 3, 8, 7)),
    "max pool, rounded up": (nn.MaxPool2d(3, 2, ceil_mode=True), (2, 3, 8, 7)),
    "max pool, not behind the end": (nn.MaxPool2d(2, 3, 1, ceil_mode=True), (2, 3, 8, 9)),
    "gelu by tanh": (nn.GELU("tanh"), (2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_written_down_computes_what_the_layer_computes(name):
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    torch.manual_seed(0)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2)
    bare = type(layer).__new__(type(layer))
    bare.__dict__ = dict(layer.__dict__)
    bare._parameters = {k: None if p is None else p.to("meta") for k, p in layer._parameters.items()}
    bare._buffers = {k: None if b is None else b.to("meta") for k, b in layer._buffers.items()}
    real = {id(bare._parameters[k]): p for k, p in layer._parameters.items() if p is not None}
    real |= {id(bare._buffers[k]): b for k, b in layer._buffers.items() if b is not None}
    written = []
    left_over = []
    forward = quick_forward(bare, left_over.append, lambda *call: written.append(call))
    x = torch.randn(shape, dtype=torch.float64)
    out = forward(x.to("meta"))
    (target, args, kwargs, output), expected = written[0], layer(x)
    assert len(written) == 1
    assert not left_over
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert (output[0] if isinstance(output, tuple) else output) is out
    args = [real.get(id(a), x) if isinstance(a, torch.Tensor) else a for a in args]
    got = target(*args, **kwargs)
    assert torch.equal(got[0] if isinstance(got, tuple) else got, expected)


@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Hardsigmoid])
def test_in_place_gives_back_its_input(kind):
    written = []
    x = torch.empty(2, 3, device="meta")
    assert quick_forward(kind(inplace=True), None, lambda *call: written.append(call))(x) is x
    assert written[0][0].overloadpacket.__name__.endswith("_")


def test_what_is_not_plain_is_left_to_the_layer():
    def own(x):
        return "own"

    def write(*_):
        raise AssertionError

    conv, norm, linear = (m.to("meta") for m in (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3), nn.Linear(3, 4)))
    image = torch.empty(2, 3, 8, 8, device="meta")
    assert quick_forward(conv, own, write)(image.contiguous(memory_format=torch.channels_last)) == "own"
    assert quick_forward(conv, own, write)(image[:, :2]) == "own"
    assert quick_forward(conv, own, write)(image[:, :, :2]) == "own"
    assert quick_forward(conv, own, write)(image.half()) == "own"
    assert quick_forward(norm.train(), own, write)(image) == "own"
    assert quick_forward(linear, own, write)(image.half()) == "own"
    assert quick_forward(linear, own, write)(torch.empty(2, 3)) == "own"
    assert quick_forward(nn.Conv2d(3, 4, 3, padding="same"), own, write) is None
    assert quick_forward(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), own, write) is None
    assert quick_forward(nn.Softmax(1), own, write) is None
    assert quick_forward(nn.AdaptiveAvgPool2d(2), own, write) is None
    assert quick_forward(nn.MaxPool2d(2, return_indices=True), own, write) is None
    assert quick_forward(nn.MaxPool2d(9), own, write)(image) == "own"
    assert quick_forward(nn.MaxPool2d(2, padding=2), own, write)(image) == "own"
    assert quick_forward(nn.MaxPool2d(2), own, write)(image[0]) == "own"
    assert quick_forward(nn.AdaptiveAvgPool2d(1), own, write)(image.int()) == "own"
    hooked = nn.Linear(3, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert quick_forward(hooked, own, write) is None
    mine = nn.Linear(3, 4)
    mine.forward = own
    assert quick_forward(mine, own, write) is None
    assert quick_forward(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), own, write) is None

    class Mine(nn.Linear):
        pass

    assert quick_forward(Mine(3, 4), own, write) is None


def test_a_model_keeps_its_forward_and_refuses_what_does_not_fit():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5 * 36, 2))
    before = [dict(vars(m)) for m in model.modules()]
    recording = record(model, torch.randn(2, 3, 8, 8))
    assert [list(vars(m)) for m in model.modules()] == [list(b) for b in before]
    assert all("forward" not in vars(m) for m in [*model.modules(), *recording.twin.modules()])
    assert [c.module for c in recording.calls] == ["0", "1", "2", "3"]
    with pytest.raises(TraceError, match=r"does not accept inputs of shape \[2, 4, 8, 8\]"):
        analyse(model, torch.randn(2, 4, 8, 8))
    with pytest.raises(TraceError, match="does not accept inputs"):
        analyse(model, torch.randn(2, 3, 9, 9))


def test_a_mode_of_the_users_own_sees_nothing_of_it():
    class Counts(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += "convolution" in str(func)
            return func(*args, **(kwargs or {}))

    with Counts() as counts:
        record(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))
    assert counts.calls == 0
