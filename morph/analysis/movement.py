"""Rules of data movement: the labels move as the data does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import axes_of, axis_of, on
from morph.analysis.tags import Tag, values_in

aten = torch.ops.aten


@on(
    aten.clone,
    aten.alias,
    aten.detach,
    aten.contiguous,
    aten._to_copy,
    aten.lift_fresh,
    aten.lift_fresh_copy,
    aten.zeros_like,
    aten.ones_like,
    aten.full_like,
    aten.empty_like,
    aten.fill,
    aten.zero,
    aten.nan_to_num,
    aten._conj,
    aten.positive,
)
def _(op: Propagation, x: Value, *_: Any, **__: Any) -> Tag:
    return op.tag(x)


@on(aten.native_dropout, aten._fused_dropout)
def _(op: Propagation, x: Value, *_: Any, **__: Any) -> list[Tag]:
    return [op.tag(x)] * 2


@on(aten.copy_, aten.copy, aten.where, aten.masked_fill, aten._prelu_kernel, aten.hardswish, aten.bernoulli, aten.lerp)
def _(op: Propagation, *args: Any, **_: Any) -> Tag:
    return op.pointwise(*(op.tag(v) for v in values_in(args)))


@on(
    aten.view,
    aten._unsafe_view,
    aten.reshape,
    aten._reshape_alias,
    aten.unsqueeze,
    aten.squeeze,
    aten.flatten,
    aten.unflatten,
)
def _(op: Propagation, x: Value, *args: Any) -> Any:
    if args and isinstance(args[0], torch.dtype):
        op.freeze_all([op.tag(x)], "bits read as another type")
        return op.frozen(op.shape)
    return op.reshape(op.tag(x), op.shape)


@on(aten.glu)
def _(op: Propagation, x: Value, axis: int = -1) -> Tag:
    tag = op.tag(x)
    at = axis_of(axis, len(tag.axes))
    first, gates = np.split(tag.axes[at], 2)
    op.same(first, gates)
    return _with(op, tag, at, first)


@on(aten.permute)
def _(op: Propagation, x: Value, order: list[int]) -> Tag:
    return Tag(tuple(op.tag(x).axes[a] for a in order))


@on(aten.transpose)
def _(op: Propagation, x: Value, first: int, second: int) -> Tag:
    axes = list(op.tag(x).axes)
    if axes:
        axes[first], axes[second] = axes[second], axes[first]
    return Tag(tuple(axes))


@on(aten.t)
def _(op: Propagation, x: Value) -> Tag:
    return Tag(op.tag(x).axes[::-1])


@on(aten.expand)
def _(op: Propagation, x: Value, *_: Any, **__: Any) -> Tag:
    axes = op.tag(x).axes
    new = len(op.shape) - len(axes)
    return Tag(
        tuple(
            axes[i - new] if i >= new and len(axes[i - new]) == n else op.fresh(n, (i,)) for i, n in enumerate(op.shape)
        )
    )


@on(aten.repeat)
def _(op: Propagation, x: Value, times: list[int]) -> Tag:
    axes = op.tag(x).axes
    new = len(times) - len(axes)
    return Tag(
        tuple(
            op.fresh(n, (i,)) if i < new or len(axes[i - new]) == 1 else np.tile(axes[i - new], times[i])
            for i, n in enumerate(op.shape)
        )
    )


@on(aten.repeat_interleave)
def _(op: Propagation, x: Value, times: Any = None, axis: int | None = None, **_: Any) -> Tag:
    if not isinstance(times, int) or axis is None:
        op.freeze_all([op.tag(v) for v in values_in((x, times))], "repeated by a tensor")
        return op.frozen(op.shape)
    axes = list(op.tag(x).axes)
    at = axis_of(axis, len(axes))
    axes[at] = np.repeat(axes[at], times) if len(axes[at]) > 1 else op.fresh(op.shape[at], (at,))
    return Tag(tuple(axes))


@on(aten.cat)
def _(op: Propagation, xs: list[Value], axis: int = 0) -> Tag:
    tags = [op.tag(x) for x in xs if x.shape != (0,)] or [op.frozen(op.shape)]  # an empty one goes with any shape
    at = axis_of(axis, len(op.shape))
    axes = []
    for a in range(len(op.shape)):
        if a == at:
            axes.append(np.concatenate([t.axes[a] for t in tags]))
            continue
        for other in tags[1:]:
            op.same(tags[0].axes[a], other.axes[a])
        axes.append(tags[0].axes[a])
    return Tag(tuple(axes))


@on(aten.stack)
def _(op: Propagation, xs: list[Value], axis: int = 0) -> Tag:
    inner = op.pointwise(*(op.tag(x) for x in xs))
    at = axis_of(axis, len(op.shape))
    return Tag((*inner.axes[:at], np.zeros(op.shape[at], np.int64), *inner.axes[at:]))


@on(aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.chunk, aten.unsafe_chunk)
def _(op: Propagation, x: Value, sizes: Any, axis: int = 0) -> list[Tag]:
    tag = op.tag(x)
    at = axis_of(axis, len(tag.axes))
    parts, start = [], 0
    for shape in op.shapes:
        assert shape is not None
        labels = tag.axes[at][start : start + shape[at]]
        start += shape[at]
        parts.append(_with(op, tag, at, labels))
    return parts


def _with(op: Propagation, tag: Tag, axis: int, labels: np.ndarray) -> Tag:
    """``tag`` with other labels on one axis; a single position taken from many is pinned, since ones are broadcast."""
    if len(labels) == 1 and len(tag.axes[axis]) > 1:
        op.freeze(labels, "a single position is taken by its number")
        labels = np.zeros(1, np.int64)
    return Tag((*tag.axes[:axis], labels, *tag.axes[axis + 1 :]))


@on(aten.slice)
def _(op: Propagation, x: Value, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tag:
    tag = op.tag(x)
    at = axis_of(axis, len(tag.axes))
    op.takes_part(x, tag.axes[at], slice(start, end, step))
    return _with(op, tag, at, tag.axes[at][slice(start, end, step)])


@on(aten.select)
def _(op: Propagation, x: Value, axis: int, index: int) -> Tag:
    tag = op.tag(x)
    at = axis_of(axis, len(tag.axes))
    op.freeze(tag.axes[at], "a position is taken by its number")
    return Tag((*tag.axes[:at], *tag.axes[at + 1 :]))


@on(aten.unbind)
def _(op: Propagation, x: Value, axis: int = 0) -> list[Tag]:
    tag = op.tag(x)
    at = axis_of(axis, len(tag.axes))
    op.freeze(tag.axes[at], "positions are taken by their number")
    return [Tag((*tag.axes[:at], *tag.axes[at + 1 :]))] * len(op.shapes)


@on(aten.slice_scatter, aten.select_scatter)
def _(op: Propagation, x: Value, source: Value, axis: int = 0, *_: Any) -> Tag:
    tag = op.tag(x)
    op.freeze_all([op.tag(source)], "written into a part of another tensor")
    op.freeze_all([tag], "a part of it is written over")
    return op.frozen(op.shape)


@on(aten.roll, aten.flip)
def _(op: Propagation, x: Value, shifts: Any, axes: Any = None) -> Tag:
    over = axes_of(axes if "roll" in op.name else shifts, len(x.shape))
    for a in over:
        op.freeze(op.tag(x).axes[a], "positions change places by their number")
    return op.tag(x)


@on(aten.tril, aten.triu)
def _(op: Propagation, x: Value, *_: Any) -> Tag:
    for labels in op.tag(x).axes[-2:]:
        op.freeze(labels, "a triangle by position")
    return op.tag(x)


@on(aten.diagonal)
def _(op: Propagation, x: Value, *_: Any) -> Tag:
    op.freeze_all([op.tag(x)], "a diagonal by position")
    return op.frozen(op.shape)


@on(aten.index_select)
def _(op: Propagation, x: Value, axis: int, index: Value) -> Tag:
    axes = list(op.tag(x).axes)
    at = axis_of(axis, len(axes))
    op.freeze(axes[at], "positions are taken by an index tensor")
    axes[at] = np.zeros(op.shape[at], np.int64)
    return Tag(tuple(axes))


@on(aten.gather)
def _(op: Propagation, x: Value, axis: int, index: Value, **_: Any) -> Tag:
    axes = list(op.tag(x).axes)
    at = axis_of(axis, len(axes))
    op.freeze(axes[at], "positions are taken by an index tensor")
    return op.pointwise(
        Tag(
            tuple(
                np.zeros(op.shape[a], np.int64) if a == at or len(t) != op.shape[a] else t for a, t in enumerate(axes)
            )
        ),
        op.tag(index),
    )


@on(aten.index)
def _(op: Propagation, x: Value, indices: list[Value | None]) -> Tag:
    tag = op.tag(x)
    given = [i for i, v in enumerate(indices) if v is not None]
    for i in given:
        op.freeze(tag.axes[i], "positions are taken by an index tensor")
        op.freeze_all([op.tag(v) for v in values_in(indices[i])], "used as an index")
    rank = max(len(v.shape) for v in indices if v is not None)
    rest = [t for i, t in enumerate(tag.axes) if i not in given]
    if len(op.shape) != rank + len(rest):  # a mask over several axes
        op.freeze_all([tag], "positions are taken by a mask")
        return op.frozen(op.shape)
    at = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    made = [np.zeros(n, np.int64) for n in op.shape[at : at + rank]]
    return Tag((*rest[:at], *made, *rest[at:]))


@on(aten.embedding_renorm)
def _(op: Propagation, table: Value, *_: Any) -> Tag:
    tag = op.tag(table)
    op.freeze(tag.axes[1], "the length of each row is bounded (max_norm)")
    return Tag((tag.axes[0], op.zeros(len(tag.axes[1]))))


@on(aten.embedding)
def _(op: Propagation, weight: Value, index: Value, *_: Any) -> Tag:
    op.freeze(op.tag(weight).axes[0], "rows are taken by number")
    return Tag((*op.tag(index).axes, op.tag(weight).axes[1]))


@on(
    aten.zeros,
    aten.ones,
    aten.full,
    aten.empty,
    aten.new_zeros,
    aten.new_ones,
    aten.new_full,
    aten.new_empty,
    aten.scalar_tensor,
    aten.empty_strided,
    aten.new_empty_strided,
)
def _(op: Propagation, *_: Any, **__: Any) -> Tag:
    return Tag(tuple(op.fresh(n, (a,)) for a, n in enumerate(op.shape)))


@on(aten.arange, aten.linspace, aten.eye, aten.rand, aten.randn, aten.randint, aten.randperm, aten.tril_indices)
def _(op: Propagation, *_: Any, **__: Any) -> Tag:
    return op.frozen(op.shape)


@on(aten.as_strided)
def _(op: Propagation, x: Value, size: list[int], *_: Any) -> Tag:
    if tuple(size) == x.shape:
        return op.tag(x)
    op.freeze_all([op.tag(x)], "memory read in another form")
    return op.frozen(op.shape)


@on(aten._assert_async, aten._assert_tensor_metadata, aten.sym_size, aten._assert_scalar)
def _(op: Propagation, *_: Any, **__: Any) -> None:
    return None
