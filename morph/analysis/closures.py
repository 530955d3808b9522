"""What must go together because of reshapes: sets of labels that are closed under what relations say."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from morph.analysis.atoms import Atoms, Labels, parts_of
from morph.analysis.propagation import Propagation

_AT_ONCE = 512  # labels whose sets are found together: few, because a set can be as large as the model
Constraint = tuple[tuple[int, ...], int]  # the factors of one position, and the relation


@dataclass(frozen=True, eq=False)
class Rows:
    """What relations say, one row for each whole and each relation of its own.

    Attributes:
        wholes: ``[rows]`` wholes, no row twice in a relation.
        factors: Of each relation, ``[factors, rows of it]``.
        bounds: Where the rows of each relation begin, and the end.
    """

    wholes: Labels
    factors: tuple[Labels, ...]
    bounds: tuple[int, ...]


def rows_of(state: Propagation) -> Rows:
    """The different rows of all relations with final labels; rows whose whole is one of its factors say nothing."""
    wholes, parts, bounds = [np.zeros(0, np.int64)], [], [0]
    seen = set()
    for relation in state.relations:
        whole = state.final[relation.whole]
        factors = np.stack([state.final[f] for f in relation.factors])
        keep = ~(factors == whole).any(0)
        if not keep.any():
            continue
        rows = distinct_columns(np.vstack([whole[keep], factors[:, keep]]))
        if (key := rows.tobytes()) in seen:
            continue
        seen.add(key)
        wholes.append(rows[0])
        parts.append(rows[1:])
        bounds.append(bounds[-1] + rows.shape[1])
    return Rows(np.concatenate(wholes), tuple(parts), tuple(bounds))


def distinct_columns(rows: Labels) -> Labels:
    """The different columns, in the order of their first rows."""
    order = np.lexsort(rows[::-1])
    rows = rows[:, order]
    new = np.ones(rows.shape[1], bool)
    new[1:] = (np.diff(rows) != 0).any(0)
    distinct: Labels = rows[:, new]
    return distinct


class _Reach:
    """Finds what goes with each of many labels at once, as long as that leaves no choice.

    Args:
        rows: What the relations say.
        count: How many labels there are.
    """

    def __init__(self, rows: Rows, count: int) -> None:
        self.count, self.wholes = count, rows.wholes
        self.relation = np.repeat(np.arange(len(rows.factors)), np.diff(rows.bounds))
        width = max((len(f) for f in rows.factors), default=0)
        self.factors = np.zeros((len(rows.wholes), width), np.int64)
        for factors, start in zip(rows.factors, rows.bounds, strict=False):
            self.factors[start : start + factors.shape[1], : len(factors)] = factors.T
        row, column = np.nonzero(self.factors)
        pairs = distinct_columns(np.stack([self.factors[row, column], rows.wholes[row]]))
        self.above = Lists(pairs[0], pairs[1], count)
        order = np.argsort(rows.wholes, kind="stable")
        self.rows = Lists(rows.wholes[order], order, count)

    def components(self, seeds: Labels) -> dict[int, Labels]:
        """The closed sets of those seeds for which it is all that hangs together by innermost factors.

        So it is where all that hangs together is the innermost factor wherever it is one, and where no other factor
        loses all its wholes with it: then nothing but innermost factors can be chosen, and each leads to all others.
        A channel shuffle is like that.

        Returns:
            The labels of the set, ascending, by the seed.
        """
        every = np.arange(len(self.wholes))
        last = self.factors.shape[1] - 1 - (self.factors[:, ::-1] != 0).argmax(1)
        together = Atoms()
        together.new(self.count - 1)
        together.union(self.factors[every, last], self.wholes)
        root = together.roots()
        outer = self.factors.copy()
        outer[every, last] = 0
        row, place = np.nonzero(outer)
        bad = np.zeros(self.count, bool)
        bad[root[outer[row, place]]] = bad[0] = True
        factor = (self.relation[row] * outer.shape[1] + place) * self.count + outer[row, place]
        _, number = np.unique(factor, return_inverse=True)
        low, high = np.full(len(row), self.count), np.zeros(len(row), np.int64)
        np.minimum.at(low, number, root[self.wholes[row]])
        np.maximum.at(high, number, root[self.wholes[row]])
        bad[low[low == high]] = True
        order = np.argsort(root, kind="stable")
        start, end = (np.searchsorted(root[order], root[seeds], side) for side in ("left", "right"))
        spans = zip(seeds.tolist(), start.tolist(), end.tolist(), bad[root[seeds]].tolist(), strict=True)
        return {seed: order[first:stop] for seed, first, stop, no in spans if not no}

    def of(self, seeds: Labels) -> tuple[list[Labels], Labels]:
        """The closed set of each seed, without those in which something can never go; and the seeds with a choice."""
        sets: list[Labels] = []
        left = [np.zeros(0, np.int64)]
        for start in range(0, len(seeds), _AT_ONCE):
            some, rest = self._of_some(seeds[start : start + _AT_ONCE])
            sets += some
            left.append(rest)
        return sets, np.concatenate(left)

    def _of_some(self, seeds: Labels) -> tuple[list[Labels], Labels]:
        pairs = _Pairs(np.arange(len(seeds)), seeds, self.count)
        number, atom = pairs.number, pairs.atom
        frozen = np.zeros(len(seeds), bool)
        while len(number):
            which, whole = self.above.of(atom)
            number = number[which]
            frozen[number[whole == 0]] = True
            goes_on = ~frozen[number]
            number, atom = pairs.add(number[goes_on], whole[goes_on])
        which, row = self.rows.of(pairs.atom)
        owner = pairs.number[which]
        met = np.zeros(len(row), bool)
        for column in self.factors[row].T:
            met |= (column != 0) & pairs.has(owner, column)
        choice = np.zeros(len(seeds), bool)
        choice[owner[~met]] = True
        sets = parts_of(pairs.atom, np.searchsorted(pairs.number, np.arange(1, len(seeds))))
        fine = np.flatnonzero(~choice & ~frozen).tolist()
        return [sets[n] for n in fine], seeds[choice & ~frozen]


class Lists:
    """Several numbers for each label.

    Args:
        key: ``[n]`` labels, ascending.
        value: ``[n]`` what belongs to each.
        count: How many labels there are.
    """

    def __init__(self, key: Labels, value: Labels, count: int) -> None:
        self.value = value
        first = np.flatnonzero(np.diff(key, prepend=-1))
        self.start, self.times = np.zeros(count, np.int64), np.zeros(count, np.int64)  # few labels have something
        self.start[key[first]] = first
        self.times[key[first]] = np.diff(first, append=len(key))

    def of(self, labels: Labels) -> tuple[Labels, Labels]:
        """Everything that belongs to the labels, and to which of them."""
        start = self.start[labels]
        times = self.times[labels]
        which = np.repeat(np.arange(len(labels)), times)
        offset = np.arange(len(which)) - np.repeat(np.cumsum(times) - times, times)
        return which, self.value[start[which] + offset]


class _Pairs:
    """A growing set of pairs of a number and a label, sorted.

    Args:
        number: ``[n]``.
        atom: ``[n]`` labels.
        count: How many labels there are.
    """

    def __init__(self, number: Labels, atom: Labels, count: int) -> None:
        self.count = count
        self._key = number * count + atom

    @property
    def number(self) -> Labels:
        """The number of each pair."""
        return self._key // self.count

    @property
    def atom(self) -> Labels:
        """The label of each pair."""
        return self._key % self.count

    def add(self, number: Labels, atom: Labels) -> tuple[Labels, Labels]:
        """Add pairs; give those that are new."""
        key = np.sort(number * self.count + atom, kind="stable")  # mostly in order already
        key = key[np.diff(key, prepend=-1) != 0]
        key = key[~self._holds(key)]
        self._key = np.sort(np.concatenate([self._key, key]), kind="stable")
        return key // self.count, key % self.count

    def has(self, number: Labels, atom: Labels) -> NDArray[np.bool_]:
        """Which pairs there are."""
        return self._holds(number * self.count + atom)

    def _holds(self, key: Labels) -> NDArray[np.bool_]:
        if not len(self._key):
            return np.zeros(len(key), bool)
        place = np.minimum(np.searchsorted(self._key, key), len(self._key) - 1)
        held: NDArray[np.bool_] = self._key[place] == key
        return held


class _Closure:
    """Finds what must go with a label."""

    def __init__(self, rows: Rows) -> None:
        self.above: dict[int, set[int]] = collections.defaultdict(set)
        self.below: dict[int, list[Constraint]] = collections.defaultdict(list)
        self.of_factor: list[list[dict[int, list[int]]]] = []
        for factors, start, end in zip(rows.factors, rows.bounds, rows.bounds[1:], strict=False):
            self._add(rows.wholes[start:end], factors)

    def _add(self, whole: Labels, factors: Labels) -> None:
        number = len(self.of_factor)
        wholes: list[dict[int, list[int]]] = []
        names = whole.tolist()
        for factor in factors:
            order = np.argsort(factor, kind="stable")
            values, starts = np.unique(factor[order], return_index=True)
            parts = parts_of(whole[order], starts[1:])
            table = {v: p.tolist() for v, p in zip(values.tolist(), parts, strict=True) if v}
            for v, members in table.items():
                self.above[v].update(members)
            wholes.append(table)
        self.of_factor.append(wholes)
        for w, row in zip(names, map(_without_end, factors.T.tolist()), strict=True):
            rows = self.below[w]
            if not any(known == row for known, _ in rows):
                rows.append((row, number))

    def of(self, seed: int) -> Labels | None:
        """The closed set of ``seed``, ascending; None if something in it can never go."""
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
                for factors, number in unmet[-1]:
                    if gone.isdisjoint(factors):
                        choice = self._choose(factors, number, gone)
                        chosen.add(choice)
                        todo.append(choice)
                        break
                else:
                    unmet.pop()
        return np.sort(np.fromiter(gone, np.int64, len(gone)))

    def _choose(self, factors: tuple[int, ...], number: int, gone: set[int]) -> int:
        """Which factor goes when a whole had to: one all of whose wholes are gone, else the innermost that can go."""
        for k, factor in enumerate(factors[:-1]):
            if factor and gone.issuperset(self.of_factor[number][k][factor]):
                return factor
        return factors[-1] if factors else 0


def _without_end(factors: list[int]) -> tuple[int, ...]:
    """Without zeros at the end, so that the last is the innermost that can go."""
    while factors and not factors[-1]:
        factors.pop()
    return tuple(factors)


def closed_sets(rows: Rows, seeds: Labels, count: int) -> list[Labels]:
    """The closed set of each seed, without those in which something can never go; each set once."""
    if not len(seeds):
        return []
    reach = _Reach(rows, count)
    sets, left = reach.of(seeds)
    if len(left):
        known = reach.components(left)
        closure = _Closure(rows)
        for seed in left.tolist():
            members = known[seed] if seed in known else closure.of(seed)
            if members is not None:
                sets.append(members)
    sets.sort(key=lambda members: int(members[0]))
    return list({members.tobytes(): members for members in sets}.values())
