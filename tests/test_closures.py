"""Closed sets found all at once are those that are found one by one."""

from __future__ import annotations

import numpy as np
import pytest

from morph.analysis.closures import Rows, _Closure, _Reach, closed_sets


def random_rows(random: np.random.Generator) -> tuple[Rows, int]:
    """Channels in random orders, split into groups and positions in them; now and then one that can never go."""
    groups, size, relations = (int(n) for n in random.integers((2, 2, 1), (4, 5, 5)))
    channels, count = groups * size * 2, groups * size * 2 + 1
    wholes, factors, bounds = [], [], [0]
    for _ in range(relations):
        whole = random.permutation(np.arange(1, channels + 1))[: groups * size]
        outer = np.repeat(count + np.arange(groups), size)
        inner = np.tile(count + groups + np.arange(size), groups)
        count += groups + size
        if random.random() < 0.3:
            outer[:] = 0
        if random.random() < 0.2:
            whole[0] = 0
        wholes.append(whole)
        factors.append(np.stack([outer, inner]))
        bounds.append(bounds[-1] + len(whole))
    return Rows(np.concatenate(wholes), tuple(factors), tuple(bounds)), count


def factors_of(rows: Rows) -> np.ndarray:
    """Every label that is a factor."""
    return np.setdiff1d(np.concatenate([f.ravel() for f in rows.factors]), [0])


def test_components_are_the_sets_found_one_by_one():
    random, known, others = np.random.default_rng(0), 0, 0
    for _ in range(200):
        rows, count = random_rows(random)
        seeds = factors_of(rows)
        found = _Reach(rows, count).components(seeds)
        for seed, members in found.items():
            assert members.tolist() == _Closure(rows).of(seed).tolist()
        known, others = known + len(found), others + len(seeds) - len(found)
    assert known > 500
    assert others > 500


@pytest.mark.parametrize("seed", range(20))
def test_closed_sets_are_closed_and_as_found_one_by_one(seed: int):
    rows, count = random_rows(np.random.default_rng(seed))
    seeds = factors_of(rows)
    alone = [found for found in map(_Closure(rows).of, seeds.tolist()) if found is not None]
    found = closed_sets(rows, seeds, count)
    assert {tuple(members) for members in found} == {tuple(members) for members in alone}
    for members in map(set, map(np.ndarray.tolist, found)):
        for factors, start, end in zip(rows.factors, rows.bounds, rows.bounds[1:], strict=False):
            for whole, column in zip(rows.wholes[start:end].tolist(), factors.T.tolist(), strict=True):
                assert (whole in members) == (not members.isdisjoint(column))
