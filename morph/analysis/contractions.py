"""Rules of matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import on
from morph.analysis.tags import Tag

aten = torch.ops.aten
KERNEL = "positions of a kernel"


@on(aten.mm)
def _(op: Propagation, x: Value, y: Value, **_: Any) -> Tag:
    return op.signature("m k, k n -> m n", x, y)


@on(aten.addmm)
def _(op: Propagation, bias: Value, x: Value, y: Value, **_: Any) -> Tag:
    return op.pointwise(op.signature("m k, k n -> m n", x, y), op.tag(bias))


@on(aten.bmm)
def _(op: Propagation, x: Value, y: Value, **_: Any) -> Tag:
    return op.signature("b m k, b k n -> b m n", x, y)


@on(aten.baddbmm)
def _(op: Propagation, bias: Value, x: Value, y: Value, **_: Any) -> Tag:
    return op.pointwise(op.signature("b m k, b k n -> b m n", x, y), op.tag(bias))


@on(aten.mv)
def _(op: Propagation, x: Value, y: Value) -> Tag:
    return op.signature("m k, k -> m", x, y)


@on(aten.dot, aten.vdot)
def _(op: Propagation, x: Value, y: Value) -> Tag:
    return op.signature("k, k ->", x, y)


@on(aten.linear)
def _(op: Propagation, x: Value, w: Value, bias: Value | None = None) -> Tag:
    return op.signature("... k, n k, n -> ... n", x, w, bias)


@on(aten._grouped_mm)
def _(op: Propagation, x: Value, w: Value, offsets: Value | None = None, *_: Any, **__: Any) -> Tag:
    if len(x.shape) != 2 or len(w.shape) != 3:
        op.freeze_all([op.tag(x), op.tag(w)], "grouped product of another form than tokens by experts")
        return op.frozen(op.shape)
    op.freeze(op.tag(w).axes[0], "experts are counted by the offsets of a grouped product")
    op.same(op.tag(x).axes[1], op.tag(w).axes[1])
    op.sum_over((x, 1), (w, 1))
    return Tag((op.tag(x).axes[0], op.tag(w).axes[2]))


@on(aten.convolution)
def _(
    op: Propagation,
    x: Value,
    w: Value,
    bias: Value | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tag:
    spatial = _spatial(op, x, w, stride, padding)
    if groups > 1:
        return (_grouped_transposed if transposed else _grouped)(op, x, w, bias, groups, spatial)
    own, weight = op.tag(x), op.tag(w)
    op.same(own.axes[1], weight.axes[0 if transposed else 1])
    op.sum_over((x, 1), (w, 0 if transposed else 1))
    made = weight.axes[1 if transposed else 0]
    if bias is not None:
        op.same(made, op.tag(bias).axes[0])
    return Tag((own.axes[0], made, *spatial))


def _spatial(op: Propagation, x: Value, w: Value, stride: list[int], padding: list[int]) -> list[np.ndarray]:
    """Labels of the spatial axes of the output: kept where the kernel is one position, frozen elsewhere."""
    kept = []
    own, weight = op.tag(x).axes, op.tag(w).axes
    for i, n in enumerate(op.shape[2:]):
        labels = own[2 + i]
        op.freeze(weight[2 + i], KERNEL)
        s, p = stride[i % len(stride)], padding[i % len(padding)]
        if w.shape[2 + i] == 1 and s == 1 and p == 0 and len(labels) == n:
            kept.append(labels)
            continue
        op.freeze(labels, "a kernel slides over this axis")
        kept.append(np.zeros(n, np.int64))
    return kept


def _grouped(op: Propagation, x: Value, w: Value, bias: Value | None, groups: int, spatial: list[np.ndarray]) -> Tag:
    own, weight = op.tag(x), op.tag(w)
    channels, made = len(own.axes[1]), len(weight.axes[0])
    ins = op.reshape(Tag((own.axes[1],)), (groups, channels // groups), ("in",))
    outs = op.reshape(Tag((weight.axes[0],)), (groups, made // groups), ("out",))
    op.same(ins.axes[0], outs.axes[0])
    op.same(ins.axes[1], weight.axes[1])
    op.groups[op.number] = ins.axes[0]
    op.sum_over((x, 1), (w, 1))
    if bias is not None:
        op.same(weight.axes[0], op.tag(bias).axes[0])
    return Tag((own.axes[0], weight.axes[0], *spatial))


def _grouped_transposed(
    op: Propagation, x: Value, w: Value, bias: Value | None, groups: int, spatial: list[np.ndarray]
) -> Tag:
    own, weight = op.tag(x), op.tag(w)
    channels, made = len(own.axes[1]), op.shape[1]
    op.same(own.axes[1], weight.axes[0])
    ins = op.reshape(Tag((own.axes[1],)), (groups, channels // groups), ("in",))
    labels = op.tag(bias).axes[0] if bias is not None else op.fresh(made, ("made",))
    outs = op.reshape(Tag((labels,)), (groups, made // groups), ("out",))
    op.same(ins.axes[0], outs.axes[0])
    op.same(outs.axes[1], weight.axes[1])
    op.groups[op.number] = ins.axes[0]
    op.sum_over((x, 1), (w, 0))
    return Tag((own.axes[0], labels, *spatial))
