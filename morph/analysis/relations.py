"""Reshapes: a position of a merged axis goes if and only if one of the positions that it was made of goes."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from morph.analysis.atoms import Atoms, Labels

Key = tuple[object, ...]
_ONE = np.zeros(1, np.int64)  # the labels of an axis of one position
_ONE.flags.writeable = False


@dataclass(frozen=True, eq=False)
class Relation:
    """``whole[i]`` goes if and only if one of ``factors[k][i]`` goes.

    Attributes:
        whole: ``[n]`` atoms.
        factors: For each axis that the whole was split into (outer first), ``[n]`` atoms.
        call: Number of the call that made it.
        grid: How many positions each factor has, if the whole is all their combinations in order; else empty.
    """

    whole: Labels
    factors: tuple[Labels, ...]
    call: int
    grid: tuple[int, ...]


class Reshaper:
    """Carries labels through reshapes.

    Args:
        atoms: Where labels live.
        fresh: Gives ``n`` new labels for a key that is the same in every pass over the same recording.
        freeze: Pins labels, with a reason.
    """

    def __init__(
        self, atoms: Atoms, fresh: Callable[[int, Key], Labels], freeze: Callable[[Labels, str], None]
    ) -> None:
        self.atoms, self.fresh, self.freeze = atoms, fresh, freeze
        self.relations: list[Relation] = []
        self.call = 0
        self._highest: list[tuple[int, int]] = []  # of wholes and factors; labels only ever become smaller
        self._generator = np.random.default_rng(0)
        self._random = np.zeros(1, np.int64)

    def reshape(self, axes: Sequence[Labels], shape: Sequence[int], key: Key = ()) -> list[Labels]:
        """Labels of each axis after a reshape to ``shape``."""
        before = tuple(len(a) for a in axes)
        if 0 in before or 0 in shape:
            for axis in axes:
                self.freeze(axis, "empty tensor")
            return [np.zeros(n, np.int64) for n in shape]
        result = [_ONE] * len(shape)
        for ins, outs in aligned(before, shape):
            if len(ins) == len(outs) == 1:
                result[outs[0]] = axes[ins[0]]
                continue
            parts = self._group([axes[i] for i in ins], [shape[o] for o in outs], (*key, ins[0]))
            for out, labels in zip(outs, parts, strict=True):
                result[out] = labels
        return result

    def _group(self, axes: list[Labels], sizes: list[int], key: Key) -> list[Labels]:
        """Reshape one group of axes into another group with the same number of elements."""
        if len(axes) > 1 and len(sizes) > 1:
            fine = _refinement([len(a) for a in axes], sizes)
            if fine is not None:
                return self.reshape(self.reshape(axes, fine, (*key, "split")), sizes, (*key, "merge"))
        grids = []
        for i, labels in enumerate(axes):
            roots = self.atoms.find(labels)
            if roots.any():
                form = [-1 if j == i else 1 for j in range(len(axes))]
                full = np.broadcast_to(roots.reshape(form), [len(a) for a in axes])
                grids.append(full.reshape(sizes))
        tracks: list[list[Labels]] = [[] for _ in sizes]
        while grids:
            grids = self._factor(grids.pop(0), sizes, tracks, key) + grids
        return [self._merged(found, n) for found, n in zip(tracks, sizes, strict=True)]

    def _factor(self, grid: Labels, sizes: list[int], tracks: list[list[Labels]], key: Key) -> list[Labels]:
        """Add what one grid of labels says of each axis to ``tracks``; return finer grids that are still to be done."""
        varying = [a for a in range(len(sizes)) if (grid != grid.take([0], axis=a)).any()]
        if not varying:
            self.freeze(grid.ravel()[:1], "one position spread over a whole axis")
            return []
        if len(varying) == 1:
            axis = varying[0]
            tracks[axis].append(np.moveaxis(grid, axis, 0).reshape(sizes[axis], -1)[:, 0].copy())
            return []
        known = self._known_factors(grid)
        if known is not None:
            return known
        small = grid[tuple(slice(None) if a in varying else slice(0, 1) for a in range(len(sizes)))]
        factors = []
        for axis in varying:
            labels = self.fresh(sizes[axis], (*key, axis, len(tracks[axis])))
            tracks[axis].append(labels)
            form = [-1 if a == axis else 1 for a in range(len(sizes))]
            factors.append(np.broadcast_to(labels.reshape(form), small.shape).ravel())
        self._add(small.ravel(), factors, tuple(sizes[a] for a in varying))
        return []

    def _known_factors(self, grid: Labels) -> list[Labels] | None:
        """The factors of all labels of ``grid``, if one relation has them and each varies along one axis at most."""
        flat = grid.ravel()
        lowest = flat[flat != 0].min()  # labels only ever become smaller, or none
        if all(highest < lowest for highest, _ in self._highest):
            return None
        flat = self.atoms.find(flat)
        alive = flat != 0
        low, high = flat[alive].min(), flat.max()
        for number in range(len(self.relations) - 1, -1, -1):
            if self._highest[number][0] < low:
                continue
            relation = self.relations[number]
            whole = self.atoms.find(relation.whole)
            if whole.max() < high or whole.min() > low:
                continue
            order = np.argsort(whole, kind="stable")
            place = np.searchsorted(whole[order], flat)
            row = order[np.minimum(place, len(order) - 1)]
            if not (whole[row] == flat)[alive].all():
                continue
            columns = [np.where(alive, self.atoms.find(f)[row], 0).reshape(grid.shape) for f in relation.factors]
            if all(_axes_varying(c) <= 1 for c in columns):
                return [c for c in columns if c.any()]
        return None

    def _merged(self, tracks: list[Labels], n: int) -> Labels:
        """One label for each position, given labels of each of which the going is enough."""
        if len(tracks) == 1:  # as it came, so that vectors that are blocks are united as such
            return tracks[0]
        distinct: list[Labels] = []
        for track in map(self.atoms.find, tracks):
            if not any(np.array_equal(track, other) for other in distinct):
                distinct.append(track)
        if not distinct:
            return np.zeros(n, np.int64)
        if len(distinct) == 1:
            return distinct[0]
        rows = np.stack(distinct)
        several = (rows != 0).sum(0) > 1
        merged: Labels = rows.max(0)
        if several.any():
            merged = merged.copy()
            merged[several] = self._wholes(rows[:, several])
        return merged

    def _wholes(self, rows: Labels) -> Labels:
        """The atoms that stand for each column's set of factors: known ones, or new ones with a new relation."""
        marks = self._marks(rows)
        found = np.zeros(rows.shape[1], np.int64)
        low, high = rows[rows != 0].min(), rows.max()
        for number in range(len(self.relations) - 1, -1, -1):
            if self._highest[number][1] < low:
                continue
            relation = self.relations[number]
            factors = np.stack([self.atoms.find(f) for f in relation.factors])
            if factors.max() < low or factors[factors != 0].min(initial=high + 1) > high:
                continue
            theirs = self._marks(factors)
            order = np.argsort(theirs, kind="stable")
            row = order[np.minimum(np.searchsorted(theirs[order], marks), len(order) - 1)]
            hit = (theirs[row] == marks) & (found == 0)
            found[hit] = self.atoms.find(relation.whole)[row][hit]
            if found.all():
                return found
        missing = found == 0
        unique, inverse = np.unique(marks[missing], return_inverse=True)
        fresh = self.atoms.new(len(unique))
        found[missing] = fresh[inverse]
        self._add(found[missing], list(rows[:, missing]))
        return found

    def _marks(self, rows: Labels) -> Labels:
        """One number for each column's set of labels: the sum of a random number for each, zeros left out."""
        while len(self._random) < self.atoms.count:
            more = self._generator.integers(1, 2**63, max(1024, len(self._random)), np.int64)
            self._random = np.concatenate([self._random, more])
        with np.errstate(over="ignore"):
            marks: Labels = self._random[rows].sum(0)
        return marks

    def _add(self, whole: Labels, factors: list[Labels], grid: tuple[int, ...] = ()) -> None:
        self._highest.append((int(whole.max()), max(int(f.max()) for f in factors)))
        self.relations.append(Relation(whole.copy(), tuple(f.copy() for f in factors), self.call, grid))


def aligned(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair the axes of two shapes of the same size in the smallest groups of equal products; axes of 1 are left out."""
    ins, outs = [i for i, n in enumerate(before) if n != 1], [o for o, n in enumerate(after) if n != 1]
    groups = []
    i = o = 0
    while i < len(ins):
        left, right = [ins[i]], [outs[o]]
        a, b = before[ins[i]], after[outs[o]]
        while a != b:
            if a < b:
                i += 1
                left.append(ins[i])
                a *= before[ins[i]]
            else:
                o += 1
                right.append(outs[o])
                b *= after[outs[o]]
        groups.append((left, right))
        i, o = i + 1, o + 1
    return groups


def _refinement(before: list[int], after: list[int]) -> list[int] | None:
    """The sizes into which both shapes can be split, if there are such."""
    cuts = sorted({*itertools.accumulate(before, operator.mul), *itertools.accumulate(after, operator.mul)})
    if any(b % a for a, b in itertools.pairwise(cuts)):
        return None
    fine = [b // a for a, b in itertools.pairwise([1, *cuts])]
    return None if fine in (before, after) else fine


def _axes_varying(grid: Labels) -> int:
    return sum(bool((grid != grid.take([0], axis=a)).any()) for a in range(grid.ndim))
