"""The table of rules: which operator carries labels how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from morph.analysis.propagation import Rule

RULES: dict[Any, Rule] = {}


def on(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a built-in rule for operators (overloads or packets)."""

    def register(function: Rule) -> Rule:
        for target in targets:
            assert target not in RULES, target
            RULES[target] = function
        return function

    return register


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from 0."""
    return axis + rank if axis < 0 else axis


def axes_of(axes: int | list[int] | tuple[int, ...] | None, rank: int) -> list[int]:
    """Axes counted from 0; None and the empty list mean all."""
    if axes is None or axes == []:
        return list(range(rank))
    return [axis_of(a, rank) for a in (axes if isinstance(axes, list | tuple) else [axes])]
