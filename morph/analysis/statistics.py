"""Rules of norms, softmax and reductions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import axes_of, axis_of, on
from morph.analysis.tags import Tag

aten = torch.ops.aten
_EXTREMES = {aten.max.dim, aten.min.dim}


@on(
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten.cudnn_batch_norm,
    aten.miopen_batch_norm,
    aten._batch_norm_with_update,
    aten.batch_norm,
)
def _(
    op: Propagation,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    mean: Value | None = None,
    var: Value | bool | None = None,
    training: bool = False,
    *_: Any,
) -> Tag:
    buffers = [v for v in (mean, var) if isinstance(v, Value)]
    if len(buffers) < 2 or training is True:
        op.statistic(x, [a for a in range(len(x.shape)) if a != 1])
    return _normalised(op, x, weight, bias, buffers)


@on(aten._native_batch_norm_legit_no_training, aten._batch_norm_no_update)
def _(op: Propagation, x: Value, weight: Value | None, bias: Value | None, mean: Value, var: Value, *_: Any) -> Tag:
    return _normalised(op, x, weight, bias, [mean, var])


def _normalised(op: Propagation, x: Value, weight: Value | None, bias: Value | None, buffers: list[Value]) -> Tag:
    tag = op.tag(x)
    for other in [weight, bias, *buffers]:
        if other is not None:
            op.same(tag.axes[1], op.tag(other).axes[0])
    return tag


@on(aten.native_layer_norm, aten._fused_rms_norm, aten.layer_norm, aten.rms_norm)
def _(
    op: Propagation,
    x: Value,
    shape: list[int],
    weight: Value | None = None,
    bias: Value | float | None = None,
    *_: Any,
) -> Tag:
    rank = len(x.shape)
    op.statistic(x, list(range(rank - len(shape), rank)))
    others = [op.tag(v) for v in (weight, bias) if isinstance(v, Value)]
    return op.pointwise(op.tag(x), *others)


@on(aten.native_group_norm)
def _(
    op: Propagation,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    n: int,
    channels: int,
    pixels: int,
    groups: int,
    eps: float,
) -> list[Tag]:
    tag = op.tag(x)
    for axis in tag.axes[2:]:
        op.freeze(axis, "a statistic over space")
    _normalised(op, x, weight, bias, [])
    parts = op.reshape(Tag((tag.axes[1],)), (groups, channels // groups))
    op.groups[op.number] = parts.axes[0]
    op.statistic(x, [1], [parts.axes[1]])
    normed = Tag((*tag.axes[:2], *(np.zeros(k, np.int64) for k in x.shape[2:])))
    numbers = Tag((tag.axes[0], parts.axes[0]))  # mean and deviation of each group, [N, groups]
    none = Tag((np.zeros(0, np.int64),))  # where shapes alone are run, nobody asks for them
    return [normed, *(numbers if shape == (n, groups) else none for shape in op.shapes[1:])]


@on(aten._weight_norm_interface)
def _(op: Propagation, v: Value, g: Value, axis: int = 0) -> list[Tag]:
    tag = op.tag(v)
    op.same(tag.axes[axis], op.tag(g).axes[axis])
    op.statistic(v, [a for a in range(len(v.shape)) if a != axis])
    return [tag, op.tag(g)]


@on(aten._softmax, aten._log_softmax, aten._safe_softmax, aten.softmax, aten.log_softmax)
def _(op: Propagation, x: Value, axis: int, *_: Any, **__: Any) -> Tag:
    if x.shape:
        op.statistic(x, [axis_of(axis, len(x.shape))])
    return op.tag(x)


def _reduced(op: Propagation, x: Value, axes: list[int]) -> Tag:
    """The labels that are left, whether the axes are kept as ones or not."""
    tag = op.tag(x)
    if len(op.shape) == len(x.shape):
        return Tag(tuple(np.zeros(1, np.int64) if a in axes else labels for a, labels in enumerate(tag.axes)))
    return Tag(tuple(labels for a, labels in enumerate(tag.axes) if a not in axes))


@on(aten.sum, aten.nansum)
def _(op: Propagation, x: Value, axes: Any = None, *_: Any, **__: Any) -> Tag:
    over = axes_of(axes, len(x.shape))
    for axis in over:
        op.sum_over((x, axis))
    return _reduced(op, x, over)


@on(aten.linalg_vector_norm)
def _(op: Propagation, x: Value, order: float = 2, axes: Any = None, *_: Any, **__: Any) -> Tag:
    over = axes_of(axes, len(x.shape))
    for axis in over:
        op.sum_over((x, axis))
    return _reduced(op, x, over)


@on(aten.norm)
def _(op: Propagation, x: Value, order: Any = 2, axes: Any = None, *_: Any, **__: Any) -> Tag:
    over = axes_of(axes, len(x.shape))
    for axis in over:
        op.sum_over((x, axis))
    return _reduced(op, x, over)


@on(aten.mean, aten.amax, aten.amin, aten.var, aten.std, aten.logsumexp)
def _(op: Propagation, x: Value, axes: Any = None, *_: Any, **__: Any) -> Tag:
    over = axes_of(None if isinstance(axes, bool) else axes, len(x.shape))
    op.statistic(x, over)
    return _reduced(op, x, over)


@on(aten.var_mean, aten.std_mean)
def _(op: Propagation, x: Value, axes: Any = None, *_: Any, **__: Any) -> list[Tag]:
    over = axes_of(None if isinstance(axes, bool) else axes, len(x.shape))
    op.statistic(x, over)
    return [_reduced(op, x, over)] * 2


@on(aten.max, aten.min, aten.median, aten.aminmax)
def _(op: Propagation, x: Value, *rest: Any, **_: Any) -> Any:
    if rest and isinstance(rest[0], Value):
        return op.pointwise(op.tag(x), op.tag(rest[0]))
    over = axes_of(rest[0] if rest else None, len(x.shape))
    if op.call.target in _EXTREMES and not op.is_read(1):  # an extreme alone is that of the positions that stay
        op.statistic(x, over)
        return [_reduced(op, x, over)] * 2
    for axis in over:
        op.freeze(op.tag(x).axes[axis], "an extreme and its index over this axis")
    return [_reduced(op, x, over)] * len(op.shapes)


@on(aten.argmax, aten.argmin, aten.any, aten.all, aten.prod)
def _(op: Propagation, x: Value, axes: Any = None, *_: Any, **__: Any) -> Tag:
    over = axes_of(None if isinstance(axes, bool) else axes, len(x.shape))
    for axis in over:
        op.freeze(op.tag(x).axes[axis], f"{op.name} over this axis")
    return _reduced(op, x, over)


@on(aten.topk, aten.sort, aten.kthvalue)
def _(op: Propagation, x: Value, *rest: Any, **named: Any) -> list[Tag]:
    numbers = [r for r in rest if isinstance(r, int) and not isinstance(r, bool)]
    takes_k = "sort" not in op.name
    axis = named.get(
        "dim", numbers[1] if takes_k and len(numbers) > 1 else numbers[0] if not takes_k and numbers else -1
    )
    axis = axis_of(axis, len(x.shape))
    op.freeze(op.tag(x).axes[axis], "an order over this axis")
    tag = op.tag(x)
    return [
        Tag(tuple(np.zeros(s[a], np.int64) if a == axis else t for a, t in enumerate(tag.axes)))
        if s is not None and len(s) == len(tag.axes)
        else op.frozen(s or ())
        for s in op.shapes
    ]


@on(aten.cumsum, aten.cumprod, aten.logcumsumexp)
def _(op: Propagation, x: Value, axis: int, *_: Any, **__: Any) -> Tag:
    if x.shape:
        op.freeze(op.tag(x).axes[axis_of(axis, len(x.shape))], "an order over this axis")
    return op.tag(x)
