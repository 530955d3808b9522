"""Labels of channel positions, and which of them are one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Labels = NDArray[np.int64]
FROZEN = 0
_FREE = np.iinfo(np.int64).max
_SILENT = _FREE - 1  # pinned by becoming one with 0, for no reason of its own


class Atoms:
    """Whole numbers with union and find, a vector at a time. Atom 0 stands for what can never go.

    Unions and pins are kept until somebody asks: many small ones are then done as one large one.
    """

    def __init__(self) -> None:
        self._parent: Labels = np.arange(1024, dtype=np.int64)
        self._pin: Labels = np.full(1024, _FREE, np.int64)
        self._pin[0] = _SILENT
        self._unions: list[tuple[Labels, Labels]] = []
        self._pins: list[tuple[Labels, Labels]] = []
        self.count = 1

    def new(self, n: int) -> Labels:
        """``n`` new atoms."""
        while self.count + n > len(self._parent):
            more = max(n, len(self._parent))
            old = len(self._parent)
            self._parent = np.concatenate([self._parent, np.arange(old, old + more, dtype=np.int64)])
            self._pin = np.concatenate([self._pin, np.full(more, _FREE, np.int64)])
        self.count += n
        return np.arange(self.count - n, self.count, dtype=np.int64)

    def union(self, left: Labels, right: Labels) -> None:
        """Make labels one, pair by pair; vectors of the same length. The smaller number represents both."""
        if left is not right:
            self._unions.append((left, right))

    def pin(self, labels: Labels, number: int) -> None:
        """Make labels one with 0, for the reason of that number; of several reasons the lowest number counts."""
        self._pins.append((labels, np.full(len(labels), number)))

    def find(self, labels: ArrayLike) -> Labels:
        """The representative of each label, its own copy; 0 for what is pinned."""
        self._settle()
        roots = self._root(np.asarray(labels, np.int64))
        return np.where(self._pin[roots] == _FREE, roots, 0)

    def roots(self) -> Labels:
        """The representative of every atom, by its number."""
        return self.find(np.arange(self.count))

    def pinned_by(self, labels: Labels) -> Labels:
        """The number of the reason for which each label is pinned; -1 for those that are free or have none."""
        self._settle()
        numbers = self._pin[self._root(labels)]
        return np.where(numbers >= _SILENT, -1, numbers)

    def _settle(self) -> None:
        """Do what was kept."""
        if self._unions:
            left, right = _joined(self._unions)
            self._unite(left, right)
        if self._pins:
            labels, numbers = _joined(self._pins)
            np.minimum.at(self._pin, self._root(labels), numbers)

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
        if lost:  # the reasons of those that are represented by others now
            gone = np.concatenate(lost)
            np.minimum.at(self._pin, self._root(gone), self._pin[gone])

    def _root(self, start: Labels) -> Labels:
        roots: Labels = self._parent[start]
        while True:
            above = self._parent[roots]
            if (above == roots).all():
                break
            roots = above
        self._parent[start] = roots
        return roots


def _joined(pairs: list[tuple[Labels, Labels]]) -> tuple[Labels, Labels]:
    """All first and all second vectors as one; the list is emptied."""
    left, right = pairs[0] if len(pairs) == 1 else (np.concatenate(side) for side in zip(*pairs, strict=True))
    pairs.clear()
    return left, right
