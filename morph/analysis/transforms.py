"""Rules of Fourier transforms and complex numbers, and of the product of two inputs with a weight (bilinear layers)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import axes_of, on
from morph.analysis.tags import Tag

aten = torch.ops.aten


@on(aten._fft_r2c, aten._fft_c2r, aten._fft_c2c)
def _(op: Propagation, x: Value, axes: list[int], *_: Any) -> Tag:
    found = list(op.tag(x).axes)
    for axis in axes_of(axes, len(found)):
        op.freeze(found[axis], "a Fourier transform mixes the positions of this axis")
        found[axis] = np.zeros(op.shape[axis], np.int64)
    return Tag(tuple(found))


@on(aten.view_as_real)
def _(op: Propagation, x: Value) -> Tag:
    return Tag((*op.tag(x).axes, op.zeros(2)))


@on(aten.view_as_complex)
def _(op: Propagation, x: Value) -> Tag:
    *axes, parts = op.tag(x).axes
    op.freeze(parts, "real and imaginary part")
    return Tag(tuple(axes))


@on(aten._trilinear)
def _(op: Propagation, one: Value, weight: Value, two: Value, *options: Any) -> Tag:
    """The sum that `torch.nn.Bilinear` is: ``... i, o i j, ... j -> ... o``, with axes of one put in by `options`."""
    if [list(o) for o in options[:4]] != [[1, 3], [0], [1, 2], [2, 3]]:
        op.freeze_all([op.tag(v) for v in (one, weight, two)], "a product of three tensors of another form")
        return op.frozen(op.shape)
    op.same(op.tag(one).axes[-1], op.tag(weight).axes[1])
    op.same(op.tag(two).axes[-1], op.tag(weight).axes[2])
    op.sum_over((one, len(one.shape) - 1), (weight, 1))
    op.sum_over((two, len(two.shape) - 1), (weight, 2))
    return Tag((op.tag(one).axes[0], op.tag(weight).axes[0]))
