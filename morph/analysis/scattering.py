"""Rules for operators that gather rows into bags, or write rows at numbers: other axes stay as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import axis_of, on
from morph.analysis.tags import Tag

aten = torch.ops.aten


@on(aten.index_add, aten.index_copy)
def _(op: Propagation, x: Value, axis: int, index: Value, source: Value, **_: Any) -> Tag:
    return _written(op, axis, op.tag(x), op.tag(source))


@on(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def _(op: Propagation, x: Value, axis: int, index: Value, source: Any, *_: Any, **__: Any) -> Tag:
    return _written(op, axis, op.tag(x), op.tag(index), *([op.tag(source)] if isinstance(source, Value) else []))


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
