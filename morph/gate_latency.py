"""How long each layer takes, and how much of that one channel less would save: measured, then interpolated."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from morph.passes.gates import weight_axis
from morph.readers import Reader

_ROUNDS = 5


@dataclass(frozen=True)
class Slope:
    """Seconds that one position less saves in a layer.

    Attributes:
        read: Of what it reads.
        made: Of what it makes.
    """

    read: float
    made: float


def slopes(readers: Iterable[Reader], model: nn.Module) -> dict[str, Slope]:
    """Measure each reader at full width, at half of what it reads, and at half of what it makes.

    Between these the time is taken to be linear. A layer whose groups tie both is halved on both sides at once. Noise
    can make a layer look faster at full width; that counts as no saving.

    Args:
        readers: Those to measure.
        model: The model that they are from, on the device that shall be measured; not touched.

    Returns:
        One entry for each reader, by the name of its weight.
    """
    return {reader.weight: _slope(_layer(model, reader), reader) for reader in readers}


def _layer(model: nn.Module, reader: Reader) -> nn.Module:
    """The layer of a reader; for one that is neither convolution nor linear layer, a linear layer of its size."""
    module = model.get_submodule(reader.path)
    if isinstance(module, _ConvNd | nn.Linear):
        return module
    weight = model.get_parameter(reader.weight)
    return nn.Linear(len(reader.roots), len(reader.made), device=weight.device, dtype=weight.dtype)


def _slope(module: nn.Module, reader: Reader) -> Slope:
    read, made = len(reader.roots), len(reader.made)
    if reader.groups != 1:
        half = _seconds(module, reader, 0.5, 0.5)
        return Slope(max(0.0, (_seconds(module, reader, 1, 1) - half) / max(1, read - read // 2)), 0.0)
    whole = _seconds(module, reader, 1, 1)
    less_read = whole - _seconds(module, reader, 0.5, 1)
    less_made = whole - _seconds(module, reader, 1, 0.5)
    return Slope(max(0.0, less_read / max(1, read - read // 2)), max(0.0, less_made / max(1, made - made // 2)))


def _seconds(module: nn.Module, reader: Reader, read: float, made: float) -> float:
    """Median time of a copy of a layer with a share of its channels."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    twin = copy.deepcopy(module).requires_grad_(False)
    groups = reader.groups
    sizes = list(weight.shape)
    into = weight_axis(module)
    new_groups = max(1, int(groups * read)) if groups > 1 else 1
    wide = max(1, int(len(reader.roots) * read)) // new_groups * new_groups or new_groups
    out = max(1, int(len(reader.made) * made)) // new_groups * new_groups or new_groups
    if isinstance(module, _ConvTransposeNd):
        sizes[0], sizes[1] = wide, out // new_groups
    else:
        sizes[into], sizes[0] = wide // new_groups, out
    twin._parameters["weight"] = nn.Parameter(torch.randn(sizes).to(weight), requires_grad=False)
    if twin._parameters.get("bias") is not None:
        twin._parameters["bias"] = nn.Parameter(torch.zeros(out).to(weight), requires_grad=False)
    if isinstance(twin, _ConvNd):
        twin.groups, twin.in_channels, twin.out_channels = new_groups, wide, out
    x = torch.randn([wide if axis == reader.axis else size for axis, size in enumerate(reader.shape)]).to(weight)
    with torch.no_grad():
        twin(x)
        return statistics.median(_timed(twin, x) for _ in range(_ROUNDS))


def _timed(module: nn.Module, x: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    start = time.perf_counter()
    module(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - start
