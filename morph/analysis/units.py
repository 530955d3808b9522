"""Units: the smallest sets of labels that can go together, and the couplings that they make up."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from morph.analysis.atoms import Labels
from morph.analysis.closures import Lists, closed_sets, rows_of
from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value


@dataclass(eq=False, slots=True)
class Axis:
    """One axis of one tensor with its final labels.

    Attributes:
        value: The tensor.
        axis: The axis.
        roots: ``[n]`` final labels.
    """

    value: Value
    axis: int
    roots: Labels


@dataclass(frozen=True, eq=False)
class Units:
    """Every unit of a model.

    Attributes:
        unit: ``[pairs]`` numbers of units.
        atom: ``[pairs]`` final labels: pair i says that unit ``unit[i]`` holds label ``atom[i]``; sorted by atom.
        count: How many units there are.
    """

    unit: Labels
    atom: Labels
    count: int

    @functools.cached_property
    def _only(self) -> Labels | None:
        """For each label the unit that holds it, -1 for none; None if some label is held by several."""
        if self.shared:
            return None
        table = np.full(int(self.atom.max(initial=0)) + 2, -1, np.int64)
        table[self.atom] = self.unit
        return table

    @functools.cached_property
    def _lists(self) -> Lists:
        """The units of each label, none for one behind the last."""
        return Lists(self.atom, self.unit, int(self.atom.max(initial=0)) + 2)

    @functools.cached_property
    def shared(self) -> list[Labels]:
        """The units of labels that several hold: for each number of units an array ``[labels, number]``."""
        if not len(self.atom):
            return []
        first = np.flatnonzero(np.concatenate([[True], self.atom[1:] != self.atom[:-1]]))
        times = np.diff(first, append=len(self.atom))
        counts = np.flatnonzero(np.bincount(times))
        return [self.unit[first[times == n][:, None] + np.arange(n)] for n in counts[counts > 1].tolist()]

    def on(self, roots: Labels) -> tuple[Labels, Labels]:
        """Every pair of a unit and a position that it holds, on an axis with these final labels.

        Returns:
            Units and positions, ``[pairs]`` each, sorted by position.
        """
        if self._only is not None:
            unit = self._only[np.minimum(roots, len(self._only) - 1)]
            positions = np.flatnonzero(unit >= 0)
            return unit[positions], positions
        positions, unit = self._lists.of(np.minimum(roots, len(self._lists.start) - 1))
        return unit, positions


def find_units(state: Propagation, axes: Sequence[Axis], everywhere: Sequence[Axis]) -> Units:
    """Every smallest closed set of labels that lies on a parameter and empties no axis.

    Args:
        state: A finished propagation.
        axes: The axes of parameters and buffers.
        everywhere: One of each different axis of all tensors.
    """
    rows = rows_of(state)
    present = np.zeros(state.atoms.count, bool)
    for axis in axes:
        present[axis.roots] = True
    touched = np.zeros(state.atoms.count, bool)
    touched[rows.wholes] = True
    for factors in rows.factors:
        touched[factors] = True
    single = present & ~touched
    single[_emptied_by_one(everywhere)] = False
    single[0] = False
    alone = np.flatnonzero(single)
    touched[rows.wholes] = False  # wholes go only through their factors
    touched[0] = False
    groups = closed_sets(rows, np.flatnonzero(touched), state.atoms.count)
    groups = _without_emptying(_present(groups, present), everywhere)
    unit = np.repeat(np.arange(len(alone) + len(groups)), [1] * len(alone) + [len(g) for g in groups])
    atom = np.concatenate([alone, *groups])
    order = np.argsort(atom, kind="stable")
    return Units(unit[order], atom[order], len(alone) + len(groups))


def _present(groups: list[Labels], present: NDArray[np.bool_]) -> list[Labels]:
    """The groups of which a label is present."""
    if not groups:
        return groups
    starts = np.cumsum([0, *map(len, groups[:-1])])
    found = np.logical_or.reduceat(present[np.concatenate(groups)], starts)
    return list(itertools.compress(groups, found.tolist()))


def _emptied_by_one(axes: Sequence[Axis]) -> Labels:
    """Labels that take a whole axis."""
    taking = [a.roots[0] for a in axes if a.roots[0] == a.roots[-1] and (a.roots == a.roots[0]).all()]
    return np.array(taking, np.int64)


def _without_emptying(groups: list[Labels], axes: Sequence[Axis]) -> list[Labels]:
    """The groups that leave something of every axis."""
    if not groups:
        return groups
    number = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    atom = np.concatenate(groups)
    order = np.argsort(atom, kind="stable")
    number, atom = number[order], atom[order]
    ends = np.array([(axis.roots[0], axis.roots[-1]) for axis in axes]).ravel()
    low, high = (np.searchsorted(atom, ends, side).reshape(-1, 2).tolist() for side in ("left", "right"))
    bad: set[int] = set()
    for axis, starts, stops in zip(axes, low, high, strict=True):
        first, last = (set(number[start:stop].tolist()) for start, stop in zip(starts, stops, strict=True))
        bad.update(n for n in first & last if np.isin(axis.roots, groups[n]).all())
    return [g for n, g in enumerate(groups) if n not in bad]


def distinct_axes(state: Propagation) -> Iterator[Axis]:
    """One of each different axis of all tensors, with its final labels."""
    seen: set[int] = set()
    quick: set[int] = set()
    for number, tag in state.tags.items():
        value = state.recording.values[number]
        for axis, labels in enumerate(tag.axes):
            if len(labels) < 2 or id(labels) in quick:
                continue
            quick.add(id(labels))
            roots = state.forms.of(labels)
            if id(roots) not in seen:
                seen.add(id(roots))
                if np.count_nonzero(roots):
                    yield Axis(value, axis, roots)
