"""Units: the smallest sets of labels that can go together, and the couplings that they make up."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from morph.analysis.atoms import Labels
from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value

Constraint = tuple[tuple[int, ...], int]  # the factors of one position, and the relation


@dataclass(frozen=True, eq=False)
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

    def on(self, roots: Labels) -> tuple[Labels, Labels]:
        """Every pair of a unit and a position that it holds, on an axis with these final labels.

        Returns:
            Units and positions, ``[pairs]`` each, sorted by position.
        """
        first = np.searchsorted(self.atom, roots, "left")
        last = np.searchsorted(self.atom, roots, "right")
        times = np.where(roots == 0, 0, last - first)
        positions = np.repeat(np.arange(len(roots)), times)
        starts = np.repeat(first - np.concatenate([[0], np.cumsum(times)[:-1]]), times)
        return self.unit[starts + np.arange(len(positions))], positions


class _Closure:
    """Finds what must go with a label."""

    def __init__(self, state: Propagation) -> None:
        self.above: dict[int, set[int]] = collections.defaultdict(set)
        self.below: dict[int, list[Constraint]] = collections.defaultdict(list)
        self.of_factor: list[list[dict[int, list[int]]]] = []
        seen = set()
        for relation in state.relations:
            whole = state.atoms.find(relation.whole)
            factors = np.stack([state.atoms.find(f) for f in relation.factors])
            keep = ~(factors == whole).any(0)
            if not keep.any():
                continue
            rows = np.unique(np.vstack([whole[keep], factors[:, keep]]), axis=1)
            if (key := rows.tobytes()) in seen:
                continue
            seen.add(key)
            self._add(rows[0], rows[1:])

    def _add(self, whole: Labels, factors: Labels) -> None:
        number = len(self.of_factor)
        wholes: list[dict[int, list[int]]] = []
        names = whole.tolist()
        for factor in factors:
            order = np.argsort(factor, kind="stable")
            values, starts = np.unique(factor[order], return_index=True)
            parts = np.split(whole[order], starts[1:])
            table = {v: p.tolist() for v, p in zip(values.tolist(), parts, strict=True) if v}
            for v, members in table.items():
                self.above[v].update(members)
            wholes.append(table)
        self.of_factor.append(wholes)
        for w, row in zip(names, map(tuple, factors.T.tolist()), strict=True):
            rows = self.below[w]
            if not any(known == row for known, _ in rows):
                rows.append((row, number))

    def touched(self) -> set[int]:
        """Every label of a relation."""
        return {*self.above, *self.below}

    def wholes(self) -> set[int]:
        """Labels that are wholes: they go only through their factors."""
        return set(self.below)

    def of(self, seed: int) -> frozenset[int] | None:
        """The closed set of ``seed``; None if something in it can never go."""
        gone: set[int] = set()
        unmet: collections.deque[Iterator[Constraint]] = collections.deque()
        todo = [seed]
        chosen = {seed}
        while todo or unmet:
            while todo:
                atom = todo.pop()
                if atom == 0:
                    return None
                if atom not in gone:
                    gone.add(atom)
                    todo.extend(self.above.get(atom, ()))
                    rows = self.below.get(atom)
                    if rows is not None and (len(rows) > 1 or atom in chosen):  # one row: met by how it was reached
                        unmet.appendleft(iter(rows))
            while unmet and not todo:
                broken = next((c for c in unmet[-1] if gone.isdisjoint(c[0])), None)
                if broken is None:
                    unmet.pop()
                else:
                    choice = self._choose(*broken, gone)
                    chosen.add(choice)
                    todo.append(choice)
        return frozenset(gone)

    def _choose(self, factors: tuple[int, ...], number: int, gone: set[int]) -> int:
        """Which factor goes when a whole had to: one all of whose wholes are gone, else the innermost that can go."""
        for k, factor in enumerate(factors):
            if factor and all(w in gone for w in self.of_factor[number][k][factor]):
                return factor
        return next((f for f in reversed(factors) if f), 0)


def find_units(state: Propagation, axes: Sequence[Axis], everywhere: Sequence[Axis]) -> Units:
    """Every smallest closed set of labels that lies on a parameter and empties no axis.

    Args:
        state: A finished propagation.
        axes: The axes of parameters and buffers.
        everywhere: One of each different axis of all tensors.
    """
    closure = _Closure(state)
    present = _unique(a.roots for a in axes)
    touched = np.array(sorted(closure.touched()), np.int64)
    single = np.setdiff1d(present, touched)
    full = _emptied_by_one(everywhere)
    single = np.setdiff1d(single, full)
    seeds = sorted(set(touched.tolist()) - closure.wholes() - {0})
    on_parameters = set(present.tolist())
    sets = dict.fromkeys(u for u in map(closure.of, seeds) if u is not None)
    groups = [u for u in sets if not u.isdisjoint(on_parameters)]
    groups = _without_emptying(groups, everywhere)
    unit = list(range(len(single)))
    atom = single.tolist()
    for number, members in enumerate(groups, len(single)):
        unit += [number] * len(members)
        atom += members
    order = np.argsort(np.array(atom, np.int64), kind="stable")
    return Units(np.array(unit, np.int64)[order], np.array(atom, np.int64)[order], len(single) + len(groups))


def _unique(vectors: Iterable[Labels]) -> Labels:
    """Every label that comes, without 0."""
    found = [v for v in vectors if v.any()]
    if not found:
        return np.zeros(0, np.int64)
    labels = np.unique(np.concatenate(found))
    found_labels: Labels = labels[labels != 0]
    return found_labels


def _emptied_by_one(axes: Sequence[Axis]) -> Labels:
    """Labels that take a whole axis."""
    return np.unique([a.roots[0] for a in axes if (a.roots == a.roots[0]).all()]).astype(np.int64)


def _without_emptying(groups: list[frozenset[int]], axes: Sequence[Axis]) -> list[frozenset[int]]:
    """The groups that leave something of every axis."""
    holders: dict[int, list[int]] = collections.defaultdict(list)
    for number, members in enumerate(groups):
        for atom in members:
            holders[atom].append(number)
    bad: set[int] = set()
    for axis in axes:
        if not axis.roots.all():
            continue
        first = int(axis.roots[0])
        if first in holders:
            labels = set(axis.roots.tolist())
            bad.update(n for n in holders[first] if labels <= groups[n])
    return [g for n, g in enumerate(groups) if n not in bad]


def distinct_axes(state: Propagation) -> Iterator[Axis]:
    """One of each different axis of all tensors, with its final labels."""
    seen: set[tuple[int, bytes]] = set()
    quick: set[int] = set()
    for number, tag in state.tags.items():
        value = state.recording.values[number]
        for axis, labels in enumerate(tag.axes):
            if len(labels) < 2 or id(labels) in quick:
                continue
            quick.add(id(labels))
            roots = state.final[labels]
            if not roots.any():
                continue
            key = (len(roots), roots.tobytes())
            if key not in seen:
                seen.add(key)
                yield Axis(value, axis, roots)
