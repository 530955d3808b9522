"""Whether a run of a cut model takes by number the positions that the run before took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from morph.analysis.atoms import Labels
from morph.analysis.group_counts import groups_after
from morph.analysis.propagation import Propagation
from morph.analysis.recording import Call
from morph.analysis.table import axis_of

_aten = torch.ops.aten
_BY_NUMBER = {_aten.roll.default, _aten.select.int, _aten.tril.default, _aten.triu.default, _aten.diagonal.default}
_ORDERS = {_aten.linalg_vector_norm.default, _aten.norm.ScalarOpt_dim, _aten.renorm.default}  # of a norm


def takes_the_same(
    call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], state: Propagation, times: Labels
) -> bool:
    """Whether an operator that takes positions by number takes those that it took before; shapes do not tell.

    Args:
        call: As it was recorded.
        args: What the operator is called with now.
        kwargs: The same, by name.
        state: The labels of the recording.
        times: For each label how often it is there now.
    """
    if call.target in _BY_NUMBER:
        return list(call.args[1:]) == list(args[1:])
    if call.target is _aten.constant_pad_nd.default:
        now = args[1]
        return list(now) == padding_after(state.tag(call.output).axes, times, call.args[1])
    if call.target is _aten.native_group_norm.default:
        return bool(args[6] == groups_after(state, call.output[0], times))
    if call.target is not _aten.slice.Tensor:
        return same_numbers(call, args, kwargs)
    axes = state.tag(call.args[0]).axes
    labels = state.atoms.find(axes[axis_of(call.args[1] if len(call.args) > 1 else 0, len(axes))])
    return same_slice(labels, times, slice(*_bounds(call.args)), slice(*_bounds(args)))


def same_numbers(call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operator computes with the numbers that it had, where they are values and not sizes."""
    if any(type(old) is float and kwargs.get(name) != old for name, old in call.kwargs.items()):
        return False
    if call.target in _ORDERS:
        return list(call.args[1:2]) == list(args[1:2])
    if torch.Tag.pointwise not in getattr(call.target, "tags", ()):
        return True
    before, now = [*call.args, *call.kwargs.values()], [*args, *(kwargs.get(name) for name in call.kwargs)]
    return len(before) == len(now) and all(old == new for old, new in zip(before, now, strict=True) if type(old) is int)


def padding_after(axes: Sequence[Labels], times: Labels, padding: Sequence[int]) -> list[int]:
    """What a padding must be after a cut: on each side as many as stay of the positions that it makes.

    Args:
        axes: The labels of what came out before.
        times: For each label how often it is there now.
        padding: Before and behind, from the last axis on.
    """
    found = list(padding)
    for i in range(min(len(padding) // 2, len(axes))):
        labels = axes[len(axes) - 1 - i]
        before, behind = (max(n, 0) for n in padding[2 * i : 2 * i + 2])
        if len(labels) > 1 and (before or behind):
            count = times[labels]
            new = int(count[:before].sum()), int(count[len(labels) - behind :].sum())
            found[2 * i : 2 * i + 2] = [n if o > 0 else o for n, o in zip(new, padding[2 * i : 2 * i + 2], strict=True)]
    return found


def same_slice(labels: Labels, times: Labels, before: slice, now: slice) -> bool:
    """Whether a slice of an axis takes what another took before some of its positions were cut or copied.

    Args:
        labels: Final ones, of the axis before.
        times: For each label how often it is there now; positions of one label that lie together are copied together.
        before: In positions of the axis before.
        now: In those of the axis now.
    """
    old = range(len(labels))[before]
    count = times[labels] if len(labels) > 1 else np.ones(len(labels), np.int64)
    if (count == 1).all():
        return old == range(len(labels))[now]
    there = np.arange(len(labels))
    return np.array_equal(_copied(there, labels, count)[now], _copied(there[before], labels, count))


def _copied(positions: Labels, labels: Labels, count: Labels) -> Labels:
    """Some positions of an axis with their copies."""
    if (count <= 1).all():
        return np.repeat(positions, count[positions])
    runs = np.split(positions, np.flatnonzero(np.diff(labels[positions])) + 1)
    return np.concatenate([np.tile(run, count[run[:1]].sum()) for run in runs])


def _bounds(args: Sequence[Any]) -> tuple[int | None, int | None, int]:
    """Start, end and step of a slice."""
    given = dict(enumerate(args))
    return given.get(2), given.get(3), given.get(4, 1)


def same_index(axes: Sequence[Labels], times: Labels, before: Any, now: Any) -> bool:
    """Whether ``x[now]`` takes from a tensor that was cut what ``x[before]`` took; slices and numbers are compared.

    Args:
        axes: The labels of the tensor before, axis by axis.
        times: For each label how often it is there now.
        before: What stood between the brackets.
        now: What stands there now.
    """
    old, new = (list(i) if isinstance(i, tuple) else [i] for i in (before, now))
    named = [i for i in old if i is not None and i is not Ellipsis]
    if len(old) != len(new) or any(isinstance(i, torch.Tensor) for i in old):
        return True
    axis = 0
    for one, other in zip(old, new, strict=True):
        if type(one) is int and one != other:
            return False
        if isinstance(one, slice) and not same_slice(axes[axis], times, one, other):
            return False
        axis += len(axes) - len(named) if one is Ellipsis else one is not None
    return True
