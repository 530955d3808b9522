"""What a propagation knows of tensors and calls."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from morph.analysis.atoms import Labels
from morph.analysis.recording import Value, collect
from morph.analysis.recording import values_in as values_in


@dataclass(eq=False, slots=True)
class Tag:
    """The labels of a tensor: for each axis, one for each position.

    Attributes:
        axes: As many vectors as the tensor has axes, each as long as that axis.
    """

    axes: tuple[Labels, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(map(len, self.axes))


@dataclass(eq=False, slots=True)
class Sum:
    """A sum over an axis of an operand: who reads the positions of that axis.

    Attributes:
        call: Number of the call.
        operands: Values and axes that are summed over together.
    """

    call: int
    operands: tuple[tuple[Value, int], ...]


@dataclass(frozen=True, eq=False)
class Statistic:
    """A norm, mean or softmax over an axis: removing positions changes it for those that stay.

    Attributes:
        call: Number of the call.
        kind: The operator's name.
        value: The tensor.
        axes: The axes that it runs over.
        labels: The labels that it runs over.
    """

    call: int
    kind: str
    value: Value
    axes: tuple[int, ...]
    labels: tuple[Labels, ...]


@dataclass(eq=False, slots=True)
class Pin:
    """Labels were pinned.

    Attributes:
        call: Number of the call, -1 for what comes from outside any call.
        reason: Why.
    """

    call: int
    reason: str


@dataclass(frozen=True)
class Pinned:
    """How much a pin has pinned.

    Attributes:
        call: Number of the call, -1 for what comes from outside any call.
        reason: Why.
        positions: Positions of parameters that its labels stand for.
    """

    call: int
    reason: str
    positions: int


def tags_in(tree: Any) -> list[Tag]:
    """Every tag in nested lists and tuples."""
    return collect(tree, Tag, [])


@functools.cache
def operator_name(target: Any) -> str:
    """Name of an operator for messages: ``aten.add.Tensor`` or the name of a class."""
    return target.__name__ if isinstance(target, type) else str(target)
