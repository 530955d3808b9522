"""Labels of channel positions, and which of them are one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Labels = NDArray[np.int64]
FROZEN = 0


class Atoms:
    """Whole numbers with union and find, a vector at a time. Atom 0 stands for what can never go."""

    def __init__(self) -> None:
        self._parent: Labels = np.zeros(1024, np.int64)
        self.count = 1
        self.version = 0

    def new(self, n: int) -> Labels:
        """``n`` new atoms."""
        while self.count + n > len(self._parent):
            self._parent = np.concatenate([self._parent, np.zeros(max(n, len(self._parent)), np.int64)])
        fresh = np.arange(self.count, self.count + n, dtype=np.int64)
        self._parent[fresh] = fresh
        self.count += n
        return fresh

    def find(self, labels: ArrayLike) -> Labels:
        """The representative of each label, its own copy."""
        start = np.asarray(labels, np.int64)
        roots = self._parent[start]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[start] = roots
        return roots

    def union(self, left: ArrayLike, right: ArrayLike) -> None:
        """Make labels one, pair by pair (with broadcasting); the smaller number represents both."""
        left, right = np.broadcast_arrays(np.asarray(left, np.int64), np.asarray(right, np.int64))
        a, b = left.ravel(), right.ravel()
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))
            self.version += 1

    def roots(self) -> Labels:
        """The representative of every atom, by its number."""
        return self.find(np.arange(self.count))
