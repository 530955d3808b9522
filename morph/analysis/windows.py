"""Rules of padding, pooling, resizing and windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import axis_of, on
from morph.analysis.tags import Tag

aten = torch.ops.aten


@on(aten.constant_pad_nd)
def _(op: Propagation, x: Value, padding: list[int], *_: Any) -> Tag:
    axes = list(op.tag(x).axes)
    for i in range(len(padding) // 2):
        at = len(axes) - 1 - i
        left, right = padding[2 * i], padding[2 * i + 1]
        if left == right == 0:
            continue
        inside = axes[at][max(0, -left) : len(axes[at]) - max(0, -right)]
        if len(axes[at]) == 1 or not op.atoms.find(inside).any():
            op.freeze(inside, "padded")
            axes[at] = np.zeros(op.shape[at], np.int64)
            continue
        sides = [_padding(op, n, (at, side)) for side, n in enumerate((max(left, 0), max(right, 0)))]
        axes[at] = np.concatenate([sides[0], inside, sides[1]])
    return Tag(tuple(axes))


def _padding(op: Propagation, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Labels of positions that only padding makes."""
    return op.fresh(n, key) if n > 1 else op.atoms.new(n)


@on(
    aten.reflection_pad1d,
    aten.reflection_pad2d,
    aten.replication_pad1d,
    aten.replication_pad2d,
    aten.replication_pad3d,
    aten.max_pool2d_with_indices,
    aten.max_pool3d_with_indices,
    aten.max_pool2d,
    aten.avg_pool1d,
    aten.avg_pool2d,
    aten.avg_pool3d,
    aten._adaptive_avg_pool2d,
    aten._adaptive_avg_pool3d,
    aten.adaptive_avg_pool2d,
    aten.adaptive_max_pool2d,
    aten.adaptive_max_pool3d,
    aten.upsample_nearest1d,
    aten.upsample_nearest2d,
    aten.upsample_nearest3d,
    aten._upsample_nearest_exact1d,
    aten._upsample_nearest_exact2d,
    aten.upsample_linear1d,
    aten.upsample_bilinear2d,
    aten._upsample_bilinear2d_aa,
    aten.upsample_bicubic2d,
    aten._upsample_bicubic2d_aa,
    aten.upsample_trilinear3d,
)
def _(op: Propagation, x: Value, *_: Any, **__: Any) -> list[Tag]:
    tags = []
    for shape in op.shapes:
        assert shape is not None
        axes = list(op.tag(x).axes)
        first = len(axes) - _SPATIAL[next(d for d in "123" if d + "d" in op.name)]
        for a in range(first, len(axes)):
            op.freeze(axes[a], "pooled, padded or resized over this axis")
            axes[a] = np.zeros(shape[a], np.int64)
        tags.append(Tag(tuple(axes)))
    return tags


_SPATIAL = {"1": 1, "2": 2, "3": 3}


@on(aten.pixel_shuffle)
def _(op: Propagation, x: Value, factor: int) -> Tag:
    axes = op.tag(x).axes
    for labels in axes[-2:]:
        op.freeze(labels, "mixed with channels by pixel_shuffle")
    parts = op.reshape(Tag((axes[-3],)), (op.shape[-3], factor * factor))
    op.freeze(parts.axes[1], "channels become pixels")
    return Tag((*axes[:-3], parts.axes[0], *(np.zeros(n, np.int64) for n in op.shape[-2:])))


@on(aten.pixel_unshuffle)
def _(op: Propagation, x: Value, factor: int) -> Tag:
    axes = op.tag(x).axes
    for labels in axes[-2:]:
        op.freeze(labels, "mixed with channels by pixel_unshuffle")
    channels = np.repeat(axes[-3], factor * factor)
    return Tag((*axes[:-3], channels, *(np.zeros(n, np.int64) for n in op.shape[-2:])))


@on(aten.im2col)
def _(op: Propagation, x: Value, kernel: list[int], *_: Any) -> Tag:
    axes = op.tag(x).axes
    for labels in axes[-2:]:
        op.freeze(labels, "a window slides over this axis")
    channels = np.repeat(axes[-3], int(np.prod(kernel)))
    return Tag((*axes[:-3], channels, np.zeros(op.shape[-1], np.int64)))


@on(aten.col2im)
def _(op: Propagation, x: Value, size: list[int], kernel: list[int], *_: Any) -> Tag:
    axes = op.tag(x).axes
    op.freeze(axes[-1], "windows are put together")
    parts = op.reshape(Tag((axes[-2],)), (op.shape[-3], int(np.prod(kernel))))
    op.freeze(parts.axes[1], "positions in a window")
    return Tag((*axes[:-2], parts.axes[0], *(np.zeros(n, np.int64) for n in op.shape[-2:])))


@on(aten.unfold)
def _(op: Propagation, x: Value, axis: int, size: int, step: int) -> Tag:
    axes = list(op.tag(x).axes)
    at = axis_of(axis, len(axes))
    op.freeze(axes[at], "a window slides over this axis")
    axes[at] = np.zeros(op.shape[at], np.int64)
    return Tag((*axes, np.zeros(size, np.int64)))
