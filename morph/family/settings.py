"""The eight numbers that describe a family of networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from morph.errors import FamilyError

Range = tuple[int, int] | tuple[float, float]
"""The least and the largest value; both belong to it. Whole numbers stand for whole numbers alone."""

RANGES: Mapping[str, Range] = {
    "top_nodes": (3, 10),
    "top_neighbours": (2, 5),
    "top_rewiring": (0.1, 1.0),
    "middle_nodes": (3, 10),
    "middle_probability": (0.2, 1.0),
    "bottom_nodes": (3, 10),
    "bottom_neighbours": (2, 5),
    "bottom_rewiring": (0.1, 1.0),
}
"""What is searched unless something else is said."""

ALLOWED: Mapping[str, Range] = {**RANGES, "middle_nodes": (1, 10), "middle_probability": (0.1, 1.0)}
"""What the numbers may be at all."""


@dataclass(frozen=True)
class FamilySettings:
    """A family: every seed gives another network of it.

    The ranges are those of the public code of NAGO (`RANGES`). Beside what is searched, a middle graph of one or two
    nodes is accepted (cells without an inner level), and a probability down to 0.1.

    Attributes:
        top_nodes: Number of cells, 3 to 10.
        top_neighbours: Neighbours of each in the ring that the Watts-Strogatz graph starts from, 2 to 5. An odd number
            is that below it, as a ring has as many on both sides; there are never more than nodes beside it.
        top_rewiring: Probability that an edge of it is rewired, 0.1 to 1.
        middle_nodes: Number of modules of each cell, 1 to 10.
        middle_probability: Probability of each edge of the Erdos-Renyi graph, 0.1 to 1.
        bottom_nodes: Number of units of each module, 3 to 10.
        bottom_neighbours: As ``top_neighbours``, of the graph of units.
        bottom_rewiring: As ``top_rewiring``.

    Raises:
        FamilyError: If a number is outside its range, or not a number of its kind.
    """

    top_nodes: int
    top_neighbours: int
    top_rewiring: float
    middle_nodes: int
    middle_probability: float
    bottom_nodes: int
    bottom_neighbours: int
    bottom_rewiring: float

    def __post_init__(self) -> None:
        for name, (low, high) in ALLOWED.items():
            value = getattr(self, name)
            whole = isinstance(low, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
                kind = "a whole number" if whole else "a number"
                raise FamilyError(f"{name} must be {kind} from {low} to {high}, got {value!r}")
            if not low <= value <= high:
                raise FamilyError(f"{name} must lie between {low} and {high}, got {value}")


def settings_from(values: Mapping[str, Any]) -> FamilySettings:
    """Settings from a mapping, such as the JSON of a best family.

    Raises:
        FamilyError: If a number is missing, unknown or outside its range; names it.
    """
    names = {field.name for field in fields(FamilySettings)}
    wrong = [f"{name} is missing" for name in sorted(names - values.keys())]
    wrong += [f"{name} is not known" for name in sorted(values.keys() - names)]
    if wrong:
        raise FamilyError(f"a family needs the numbers {', '.join(RANGES)}: {'; '.join(wrong)}")
    return FamilySettings(**values)


def checked_range(name: str, ends: tuple[float, float], allowed: Mapping[str, Range] = ALLOWED) -> Range:
    """A part of what a number may be, to search that alone; the same number twice fixes it.

    Args:
        name: Of the number.
        ends: The least and the largest value.
        allowed: What numbers may be; by default those of a family.

    Raises:
        FamilyError: If there is no such number, or the range is empty, reaches too far or is not of its kind.
    """
    if name not in allowed:
        raise FamilyError(f"there is no number {name} to search; these are: {', '.join(allowed)}")
    low, high = allowed[name]
    whole = isinstance(low, int)
    if not low <= ends[0] <= ends[1] <= high or (whole and any(end != int(end) for end in ends)):
        kind = "two whole numbers" if whole else "two numbers"
        raise FamilyError(
            f"the range of {name} must be {kind} from {low} to {high}, the smaller one first, got "
            f"{ends[0]:g},{ends[1]:g}"
        )
    return (int(ends[0]), int(ends[1])) if whole else (float(ends[0]), float(ends[1]))
