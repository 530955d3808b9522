"""Reshapes: to cut and then reshape must be to reshape and then cut, whatever the shapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from morph.analysis.atoms import Atoms, Labels
from morph.analysis.relations import Reshaper, aligned

Ids = NDArray[np.int64]


class Bench:
    """A reshaper, and a second way of doing what its labels say: on an array of numbers."""

    def __init__(self, seed: int) -> None:
        self.atoms = Atoms()
        self.reshaper = Reshaper(self.atoms, lambda n, _: self.fresh(n), lambda labels, _: self.atoms.pin(labels, 0))
        self.generator = np.random.default_rng(seed)

    def fresh(self, n: int) -> Labels:
        return self.atoms.new(n) if n > 1 else np.zeros(1, np.int64)

    def gone(self) -> NDArray[np.bool_]:
        """A random choice of what goes such that in every relation a whole goes if and only if a factor goes."""
        gone = np.zeros(self.atoms.count, bool)
        roots = np.unique(self.atoms.roots())
        seeds = self.generator.choice(roots, min(3, len(roots)), replace=False)
        gone[seeds] = True
        while True:
            before = gone.copy()
            for relation in self.reshaper.relations:
                factors = np.stack([self.atoms.find(f) for f in relation.factors])
                whole = self.atoms.find(relation.whole)
                gone[whole[gone[factors].any(0)]] = True
                for unmet in np.flatnonzero(gone[whole] & ~gone[factors].any(0)):
                    if not gone[factors[:, unmet]].any():
                        gone[self.generator.choice(factors[:, unmet])] = True
            if gone[0]:  # something that can never go had to
                return np.zeros(self.atoms.count, bool)
            if np.array_equal(before, gone):
                return gone


def cut(array: Ids, axes: list[Labels], atoms: Atoms, gone: NDArray[np.bool_]) -> Ids:
    for a, labels in enumerate(axes):
        array = array.take(np.flatnonzero(~gone[atoms.find(labels)]), axis=a)
    return array


def steps(generator: np.random.Generator) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    """A random shape, and random reshapes and permutations from there."""
    factors = [int(f) for f in generator.choice([1, 2, 2, 3, 3, 5], 5)]

    def grouped(items: list[int]) -> tuple[int, ...]:
        cuts = [0, *sorted(generator.choice(range(1, 5), int(generator.integers(0, 4)), replace=False).tolist()), 5]
        return tuple(math.prod(items[a:b]) for a, b in itertools.pairwise(cuts))

    first = shape = grouped(factors)
    path: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(int(generator.integers(1, 4))):
        if generator.random() < 0.5:
            order = tuple(generator.permutation(len(shape)).tolist())
            path.append(("permute", order))
            shape = tuple(shape[a] for a in order)
            continue
        total = math.prod(shape)
        new = []
        while total > 1 and len(new) < 4:
            divisor = int(generator.choice([d for d in range(2, total + 1) if total % d == 0]))
            new.append(divisor)
            total //= divisor
        shape = (*new, total) if total > 1 or not new else tuple(new)
        path.append(("reshape", shape))
    return first, path


def test_cutting_commutes_with_reshapes_and_permutations():
    compared = sum(_commutes(seed) for seed in range(150))
    assert compared > 200


def _commutes(seed: int) -> int:
    """Compare for some choices of what goes; how many of them took something."""
    bench = Bench(seed)
    first, path = steps(bench.generator)
    array = np.arange(math.prod(first)).reshape(first)
    start = [bench.fresh(n) for n in first]
    stages = [(array, start)]
    for kind, how in path:
        before, axes = stages[-1]
        if kind == "permute":
            stages.append((before.transpose(how), [axes[a] for a in how]))
        else:
            stages.append((before.reshape(how), bench.reshaper.reshape(axes, how, (len(stages),))))
    compared = 0
    for _ in range(5):
        gone = bench.gone()
        now = cut(array, start, bench.atoms, gone)
        if now.size == 0:
            continue
        for (kind, how), (after, axes) in zip(path, stages[1:], strict=True):
            wanted = cut(after, axes, bench.atoms, gone)
            now = now.transpose(how) if kind == "permute" else now.reshape(wanted.shape)
            assert np.array_equal(now, wanted), (seed, first, path)
        compared += now.size < array.size
    return compared


def test_the_comparison_notices_a_wrong_label():
    bench = Bench(0)
    array, start = np.arange(12).reshape(3, 4), [bench.fresh(3), bench.fresh(4)]
    merged = bench.reshaper.reshape(start, (12,))
    gone = np.zeros(bench.atoms.count, bool)
    gone[start[0][1]] = True  # and none of the wholes that contain it
    assert cut(array, start, bench.atoms, gone).size == 8
    assert cut(array.reshape(12), merged, bench.atoms, gone).size == 12


@pytest.mark.parametrize(
    ("shape", "splits"),
    [((12,), (3, 4)), ((3, 4), (12,)), ((2, 3, 5), (6, 5)), ((30,), (2, 3, 5)), ((6, 10), (2, 3, 2, 5))],
)
def test_a_way_there_and_back_gives_the_same_labels(shape, splits):
    bench = Bench(1)
    start = [bench.fresh(n) for n in shape]
    there = bench.reshaper.reshape(start, splits)
    back = bench.reshaper.reshape(there, shape)
    for a, b in zip(start, back, strict=True):
        assert np.array_equal(bench.atoms.find(a), bench.atoms.find(b))
    relations = len(bench.reshaper.relations)
    again = bench.reshaper.reshape(back, splits)
    for a, b in zip(there, again, strict=True):
        assert np.array_equal(bench.atoms.find(a), bench.atoms.find(b))
    assert len(bench.reshaper.relations) == relations


def test_a_split_of_frozen_and_of_repeated_labels():
    bench = Bench(2)
    assert not any(a.any() for a in bench.reshaper.reshape([np.zeros(12, np.int64)], (3, 4)))
    labels = bench.fresh(5)
    rows = bench.reshaper.reshape([np.tile(labels, 3)], (3, 5))  # [a b c d e a b c ...]: only the inner axis has labels
    assert not rows[0].any()
    assert np.array_equal(rows[1], labels)
    columns = bench.reshaper.reshape([np.repeat(labels, 3)], (5, 3))
    assert np.array_equal(columns[0], labels)
    assert not columns[1].any()
    assert bench.reshaper.relations == []


def test_a_constant_axis_spread_over_another_is_frozen():
    bench = Bench(3)
    labels = np.full(6, bench.atoms.new(1)[0])
    result = bench.reshaper.reshape([labels], (2, 3))
    assert not any(bench.atoms.find(a).any() for a in result)
    assert bench.atoms.find(labels).tolist() == [0] * 6


def test_an_empty_tensor_freezes():
    bench = Bench(4)
    labels = bench.fresh(3)
    assert [len(a) for a in bench.reshaper.reshape([labels, np.zeros(0, np.int64)], (0, 5))] == [0, 5]
    assert not bench.atoms.find(labels).any()


def test_a_group_that_fits_no_finer_grid():
    """(4, 3) to (6, 2): the axes cut across each other, so what can go is all or nothing of some sets."""
    for seed in range(20):
        bench = Bench(seed)
        array, start = np.arange(12).reshape(4, 3), [bench.fresh(4), bench.fresh(3)]
        after = bench.reshaper.reshape(start, (6, 2))
        gone = bench.gone()
        left, right = cut(array, start, bench.atoms, gone), cut(array.reshape(6, 2), after, bench.atoms, gone)
        assert sorted(left.ravel().tolist()) == sorted(right.ravel().tolist())


def test_aligned_pairs_the_smallest_groups():
    assert aligned((2, 12, 5), (2, 3, 4, 5)) == [([0], [0]), ([1], [1, 2]), ([2], [3])]
    assert aligned((6, 10), (4, 15)) == [([0, 1], [0, 1])]
    assert aligned((1, 7, 1), (7,)) == [([1], [0])]
    assert aligned((2, 3), (3, 2)) == [([0, 1], [0, 1])]
    for before, after in (((4, 3, 5, 2), (2, 6, 10)), ((8, 9), (2, 4, 3, 3))):
        for ins, outs in aligned(before, after):
            assert math.prod(before[i] for i in ins) == math.prod(after[o] for o in outs)
