"""Labels of channel positions, and which of them are one."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Labels = NDArray[np.int64]
FROZEN = 0
_FREE = np.iinfo(np.int64).max
_AT_ONCE = 2**15  # numbers that are made ready together
_SILENT = _FREE - 1  # pinned by becoming one with 0, for no reason of its own


def parts_of(values: Labels, starts: Labels) -> list[Labels]:
    """What ``np.split`` gives, faster: the parts before, between and behind some positions."""
    bounds = [0, *starts.tolist(), len(values)]
    return [values[start:end] for start, end in itertools.pairwise(bounds)]


class Atoms:
    """Whole numbers with union and find, a vector at a time. Atom 0 stands for what can never go.

    Unions and pins are kept until somebody asks: many small ones are then done as one large one. Most unions are of two
    vectors as `new` gave them: of these blocks it is known which are one already.
    """

    def __init__(self) -> None:
        self._parent: Labels = np.zeros(1, np.int64)
        self._pin: Labels = np.array([_SILENT], np.int64)
        self._blocks: list[Labels] = []
        self._numbers: dict[int, int] = {}  # of blocks, by the identity of the vector
        self._above: list[int] = []  # for each block one with smaller numbers that it is one with, or itself
        self._ready: Labels = np.zeros(0, np.int64)  # the numbers of the next atoms
        self._placed = 0  # blocks that are in ``_parent``
        self._pinned: set[int] = set()  # first blocks of which something may be pinned
        self._whole = True  # whether only whole blocks have been made one or pinned so far
        self._unions: list[tuple[Labels, Labels]] = []
        self._pins: list[tuple[Labels, int]] = []
        self.count = 1

    def new(self, n: int) -> Labels:
        """``n`` new atoms."""
        if n > len(self._ready):
            self._ready = np.arange(self.count, self.count + max(n, _AT_ONCE), dtype=np.int64)
            self._ready.flags.writeable = False
        labels, self._ready = self._ready[:n], self._ready[n:]
        self.count += n
        self._numbers[id(labels)] = len(self._blocks)
        self._above.append(len(self._blocks))
        self._blocks.append(labels)
        return labels

    def block(self, labels: Labels) -> int:
        """The number of the first block that a vector is one with as a whole; -1 if it is no block."""
        number = self._numbers.get(id(labels), -1)
        return number if number < 0 else self._first(number)

    def _first(self, number: int) -> int:
        above = self._above
        while above[number] != number:
            above[number] = number = above[above[number]]
        return number

    def union(self, left: Labels, right: Labels) -> None:
        """Make labels one, pair by pair; vectors of the same length. The smaller number represents both."""
        low, high = self.block(left), self.block(right)
        if low > high:
            low, high = high, low
        if low < 0:
            free = left.any(), right.any()
            if any(free):  # else both are frozen, as those of a mask that is written into many times
                self._unions.append((left, right))
                if high >= 0 and not all(free):
                    self._pinned.add(high)
                else:
                    self._whole = False
        elif low != high:
            self._above[high] = low
            if high in self._pinned:
                self._pinned.add(low)
            if high < self._placed:
                self._unions.append((self._blocks[high], self._blocks[low]))

    def pin(self, labels: Labels, number: int) -> None:
        """Make labels one with 0, for the reason of that number; of several reasons the lowest number counts."""
        self._pins.append((labels, number))
        block = self.block(labels)
        if block >= 0:
            self._pinned.add(block)
        else:
            self._whole = False

    def find(self, labels: ArrayLike | slice) -> Labels:
        """The representative of each label, its own copy; 0 for what is pinned."""
        if self._whole and isinstance(labels, np.ndarray):
            block = self.block(labels)
            if block >= 0 and block not in self._pinned:  # known without doing what was kept
                return self._blocks[block].copy()
        self._settle()
        roots = self._root(labels if isinstance(labels, slice) else np.asarray(labels, np.int64))
        return np.where(self._pin[roots] == _FREE, roots, 0)

    def roots(self) -> Labels:
        """The representative of every atom, by its number."""
        return self.find(slice(0, self.count))

    def pinned_by(self, labels: Labels) -> Labels:
        """The number of the reason for which each label is pinned; -1 for those that are free or have none."""
        self._settle()
        numbers = self._pin[self._root(labels)]
        return np.where(numbers >= _SILENT, -1, numbers)

    def count_pinned(self, vectors: Iterable[Labels], pins: int) -> list[int]:
        """How many labels of some vectors, as `new` gave them, are pinned for each of the reasons before ``pins``."""
        times = collections.Counter(map(self.block, vectors))  # vectors that are one have the same reasons
        labels = [self._blocks[number] for number in times]
        if not labels:
            return [0] * pins
        numbers = self.pinned_by(np.concatenate(labels))
        weights = np.repeat(list(times.values()), [len(some) for some in labels])
        counts = np.bincount(numbers + 1, weights, pins + 1)  # exact: whole numbers
        return [int(n) for n in counts[1 : pins + 1]]

    def _settle(self) -> None:
        """Do what was kept."""
        if self._placed < len(self._blocks):
            self._place()
        if self._unions:
            left, right = (np.concatenate(side) for side in zip(*self._unions, strict=True))
            self._unions.clear()
            self._unite(left, right)
        if self._pins:
            vectors, reasons = zip(*self._pins, strict=True)
            self._pins.clear()
            numbers = np.repeat(reasons, [len(labels) for labels in vectors])
            np.minimum.at(self._pin, self._root(np.concatenate(vectors)), numbers)

    def _place(self) -> None:
        """Give new atoms their place: below those that their whole block is one with."""
        blocks = self._blocks
        above = [blocks[self._first(n)] for n in range(self._placed, len(blocks))]
        start = self.count - sum(map(len, above))
        if self.count > len(self._parent):
            parent, pin = self._parent, self._pin
            room = max(self.count, 2 * start)
            self._parent, self._pin = np.empty(room, np.int64), np.full(room, _FREE, np.int64)
            self._parent[:start], self._pin[:start] = parent[:start], pin[:start]
        np.concatenate(above, out=self._parent[start : self.count])
        self._placed = len(blocks)

    def _unite(self, a: Labels, b: Labels) -> None:
        lost = []
        while True:
            a, b = self._root(a), self._root(b)
            differ = a != b
            if not differ.any():
                break
            a, b = a[differ], b[differ]
            high = np.maximum(a, b)
            np.minimum.at(self._parent, high, np.minimum(a, b))
            lost.append(high)
        for high in lost:
            self._hand_on(high)

    def _hand_on(self, gone: Labels) -> None:
        """Give the reasons of labels that are represented by others now to these."""
        pinned = gone[self._pin[gone] != _FREE]
        if len(pinned):
            np.minimum.at(self._pin, self._root(pinned), self._pin[pinned])

    def _root(self, start: Labels | slice) -> Labels:
        roots: Labels = self._parent[start]
        while True:
            above = self._parent[roots]
            if not np.count_nonzero(above != roots):
                break
            roots = above
        self._parent[start] = roots
        return roots


class Forms:
    """The final labels of axes; axes that have the same share one vector.

    Args:
        atoms: In which nothing becomes one any more.
    """

    def __init__(self, atoms: Atoms) -> None:
        self.atoms = atoms
        self.final = atoms.roots()
        self._known: dict[int, tuple[Labels, Labels]] = {}
        self._forms: dict[object, Labels] = {}

    def of(self, labels: Labels) -> Labels:
        """The final labels of an axis."""
        known = self._known.get(id(labels))
        if known is not None:
            return known[1]
        block = self.atoms.block(labels)
        found = self._forms.get(block)
        if found is None:
            found = self.final[labels]
            found.flags.writeable = False
            found = self._forms.setdefault(found.tobytes(), found)
            if block >= 0:
                self._forms[block] = found
        self._known[id(labels)] = (labels, found)
        return found
