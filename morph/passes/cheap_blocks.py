"""Cheap blocks in place of full convolutions: G(g) and B(b) of Moonshine (Crowley, Gray, Storkey, NeurIPS 2018).

With ``i`` input channels, ``o`` output channels and ``K`` positions in the kernel, a full convolution has ``i o K``
weights. The blocks below take and give tensors of the same shape:

- ``G(g)``: the convolution in ``g`` groups, then a 1x1 convolution that mixes them: ``i² K / g + 2 i + i o``;
- ``B(b)``: 1x1 down to ``m = o / b`` channels, the convolution there, 1x1 up again: ``i m + m² K + m o + 4 m``;
- ``S``: the convolution as it is.

Between the convolutions of a block stand batch normalisation (the ``2 i`` and ``4 m`` above) and ReLU. The last one has
a bias, ``o`` more, where the full convolution has one. Blocks are plain ``Sequential`` modules of `torch.nn` layers.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.errors import EditError, PlanMismatchError

STANDARD = "S"
_FORM = re.compile(r"([GB])([1-9]\d{0,5})", re.ASCII)
_Layer = type[nn.Module]
_LAYERS: dict[_Layer, tuple[_Layer, _Layer]] = {
    nn.Conv1d: (nn.Conv1d, nn.BatchNorm1d),
    nn.Conv2d: (nn.Conv2d, nn.BatchNorm2d),
    nn.Conv3d: (nn.Conv3d, nn.BatchNorm3d),
}


@dataclass(frozen=True)
class Size:
    """What a block costs.

    Attributes:
        params: Elements of its parameters.
        macs: Multiply-adds of one sample.
    """

    params: int
    macs: int


def parse_choice(name: str) -> tuple[str, int]:
    """Read ``G4``, ``B2`` or ``S`` into a kind and its number (1 for ``S``).

    Raises:
        EditError: If it is none of these.
    """
    match = _FORM.fullmatch(name)
    if name != STANDARD and (match is None or int(match[2]) < 2):
        raise EditError(
            f"{name!r} is not a block; write S (as it is), G and a number of groups, or B and a reduction: S, G4, B2"
        )
    return (match[1], int(match[2])) if match else (STANDARD, 1)


def why_not(conv: _ConvNd, choice: str) -> str:
    """Why the block ``choice`` cannot stand for ``conv``; '' if it can."""
    kind, number = parse_choice(choice)
    channels, side = (conv.in_channels, "input") if kind == "G" else (conv.out_channels, "output")
    if kind == STANDARD:
        return ""
    if channels % number:
        return f"{number} does not divide {channels} {side} channels"
    return ""


def block_size(conv: _ConvNd, choice: str, inputs: int, outputs: int) -> Size:
    """Parameters and multiply-adds of the block ``choice`` in place of ``conv``; closed formulas of this module's text.

    Args:
        conv: A convolution with one group.
        choice: A block that fits it; see `why_not`.
        inputs: Positions of its input for one sample, summed over its calls.
        outputs: Positions of its output, likewise.
    """
    kind, number = parse_choice(choice)
    i, o, kernel = conv.in_channels, conv.out_channels, math.prod(conv.kernel_size)
    bias = 0 if conv.bias is None else o
    if kind == STANDARD:
        return Size(i * o * kernel + bias, outputs * i * o * kernel)
    if kind == "G":
        weights = i * i * kernel // number + i * o
        return Size(weights + 2 * i + bias, outputs * weights)
    m = o // number
    middle = m * m * kernel + m * o
    return Size(i * m + middle + 4 * m + bias, inputs * i * m + outputs * middle)


def make_block(conv: _ConvNd, choice: str, seed: int) -> nn.Module:
    """Make the block ``choice`` with the stride, padding, dilation and bias of ``conv``, and weights of its own.

    Convolutions are drawn as in residual networks (normal, variance ``2 / (o K)``: He et al. 2015, "fan out"), biases
    are zero, and batch normalisation starts as `torch.nn` does. Device, precision and training flag are those of
    ``conv``. The global random state stays as it was.

    Raises:
        EditError: If the block does not fit; says why.
    """
    if reason := why_not(conv, choice):
        raise EditError(f"{choice}: {reason}")
    kind, number = parse_choice(choice)
    if kind == STANDARD:
        raise EditError("S is the convolution as it is; there is no block to make")
    layer, norm = _LAYERS[type(conv)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _grouped if kind == "G" else _narrow
        block = nn.Sequential(parts(conv, number, layer, norm))
        for part in block:
            if isinstance(part, _ConvNd):
                nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
    return block.to(conv.weight.device, conv.weight.dtype).train(conv.training)


def _grouped(conv: _ConvNd, groups: int, layer: _Layer, norm: _Layer) -> OrderedDict[str, nn.Module]:
    """The parts of G(g)."""
    i, o = conv.in_channels, conv.out_channels
    return OrderedDict(
        grouped=_like(conv, layer, i, groups),
        norm=norm(i),
        relu=nn.ReLU(),
        point=_point(layer, i, o, bias=conv.bias is not None),
    )


def _narrow(conv: _ConvNd, reduction: int, layer: _Layer, norm: _Layer) -> OrderedDict[str, nn.Module]:
    """The parts of B(b)."""
    i, o = conv.in_channels, conv.out_channels
    m = o // reduction
    return OrderedDict(
        down=_point(layer, i, m, bias=False),
        norm1=norm(m),
        relu1=nn.ReLU(),
        narrow=_like(conv, layer, m, 1),
        norm2=norm(m),
        relu2=nn.ReLU(),
        up=_point(layer, m, o, bias=conv.bias is not None),
    )


def _like(conv: _ConvNd, layer: _Layer, channels: int, groups: int) -> nn.Module:
    """A convolution of the kernel, stride, padding and dilation of ``conv``, from and to ``channels``."""
    return layer(
        channels,
        channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        groups,
        bias=False,
        padding_mode=conv.padding_mode,
    )


def _point(layer: _Layer, i: int, o: int, *, bias: bool) -> nn.Module:
    """A 1x1 convolution."""
    return layer(i, o, 1, bias=bias)


def is_full(module: nn.Module | None) -> bool:
    """Whether ``module`` is a plain convolution with one group and a kernel of more than one position."""
    return (
        type(module) in _LAYERS
        and isinstance(module, _ConvNd)
        and module.groups == 1
        and math.prod(module.kernel_size) > 1
    )


def install_block(model: nn.Module, path: str, choice: str, shape: tuple[int, ...], seed: int) -> None:
    """Put the block ``choice`` in the place of the convolution at ``path``, in place.

    Raises:
        PlanMismatchError: If there is no full convolution with a weight of ``shape``.
        EditError: If the block does not fit; says why.
    """
    conv = dict(model.named_modules(remove_duplicate=False)).get(path)
    present = conv if isinstance(conv, _ConvNd) and is_full(conv) else None
    if present is None or tuple(present.weight.shape) != shape:
        found = "nothing" if conv is None else type(conv).__name__
        if present is not None:
            found = f"one with a weight of {list(present.weight.shape)}"
        done = isinstance(conv, nn.Sequential) and {"grouped", "narrow"} & set(conv._modules)
        raise PlanMismatchError(
            f"this plan was made for another model: {path} should be a convolution with a weight of {list(shape)} and "
            f"one group, there is {found}"
            + ("; it looks applied already: start from the original model" if done else "")
        )
    model.set_submodule(path, make_block(present, choice, seed))
