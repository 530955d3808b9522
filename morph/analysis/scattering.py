"""Rules for operators that gather rows into bags, or write rows at numbers: other axes stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import axis_of, on
from morph.analysis.tags import Tag, values_in

aten = torch.ops.aten
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "logical_not", "logical_and", "logical_or"}


@on(aten.index_add, aten.index_copy)
def _(op: Propagation, x: Value, axis: int, index: Value, source: Value, **_: Any) -> Tag:
    return _written(op, axis, op.tag(x), op.tag(source))


@on(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def _(op: Propagation, x: Value, axis: int, index: Value, source: Any, *_: Any, **__: Any) -> Tag:
    return _written(op, axis, op.tag(x), op.tag(index), *([op.tag(source)] if isinstance(source, Value) else []))


@on(aten.index_put)
def _(op: Propagation, x: Value, indices: list[Value | None], source: Value, accumulate: bool = False) -> Tag:
    """Positions of the first axes are taken by number or by a mask; those of the others are written into their like."""
    tag, values = op.tag(x), op.tag(source)
    given = [v for v in indices if v is not None]
    if (
        len(given) == 1
        and given[0].shape == x.shape
        and not any(len(a) > 1 for a in values.axes)
        and _is_mask(op, given[0])
    ):
        return op.pointwise(tag, op.tag(given[0]))
    op.freeze_all([op.tag(v) for v in given], "used as an index")
    taken = max(len(indices), *(len(v.shape) for v in given))
    rest = max(len(tag.axes) - taken, 0) if len(given) == len(indices) else 0
    for labels in [*tag.axes[: len(tag.axes) - rest], *values.axes[: max(len(values.axes) - rest, 0)]]:
        op.freeze(labels, "positions are written by an index tensor")
    if not rest:
        return tag
    last = op.pointwise(Tag(tag.axes[-rest:]), Tag(values.axes[-rest:]))
    return Tag((*tag.axes[:-rest], *last.axes))


def _is_mask(op: Propagation, value: Value) -> bool:
    """Whether a comparison made a value."""
    makers = (call for call in op.recording.calls if any(value is v for v in values_in(call.output)))
    return any(str(call.target).split(".")[1] in _COMPARISONS for call in makers)


def _written(op: Propagation, axis: int, *tags: Tag) -> Tag:
    """Along one axis positions are taken by number; along the others each is written into its like."""
    at = axis_of(axis, len(op.shape))
    plain = []
    for tag in tags:
        axes = list(tag.axes)
        for a, labels in enumerate(axes):
            if a == at or len(labels) != op.shape[a]:
                op.freeze(labels, "positions are written by an index tensor")
                axes[a] = np.zeros(op.shape[a], np.int64)
        plain.append(Tag(tuple(axes)))
    return op.pointwise(*plain)


@on(aten._embedding_bag, aten._embedding_bag_forward_only)
def _(op: Propagation, weight: Value, *_: Any, **__: Any) -> list[Tag]:
    rows, columns = op.tag(weight).axes
    op.freeze(rows, "rows are taken by number")
    shape = op.shapes[0]
    assert shape is not None
    return [Tag((np.zeros(shape[0], np.int64), columns))]
