"""The statistics of the report on multi-channel labels, from its own table, and against slow ones."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("statsmodels")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from label_statistics import (
    REPORT,
    analyse_variance,
    compare_pairs,
    p_of,
    summarise,
)

TAUGHT = {name: values for name, values in REPORT.items() if name != "baseline"}


def test_the_printed_p_follows_from_the_printed_f():
    assert p_of(54.9707565915, 2, 15) == pytest.approx(1.24561472079e-07, rel=1e-10)
    assert p_of(54.9707565915, 3, 15) != pytest.approx(1.24561472079e-07, rel=0.1)


def test_the_table_gives_nearly_that_f():
    """The table is rounded to three digits, so its F is not the printed one to the digit."""
    found = analyse_variance(TAUGHT)
    assert (found.between, found.within) == (2, 15)
    assert found.f == pytest.approx(57.4217638691, abs=1e-9)
    assert found.p == p_of(found.f, 2, 15) < 1e-6
    drawn = np.random.default_rng(0).uniform(-0.0005, 0.0005, (2000, 3, 6))
    values = np.array(list(TAUGHT.values())) + drawn
    possible = [slow_f(table) for table in values]
    assert min(possible) < 54.9707565915 < max(possible)


def slow_f(table: np.ndarray) -> float:
    """F from sums of squares; ``[groups, runs]``."""
    groups, runs = table.shape
    between = runs * sum((row.mean() - table.mean()) ** 2 for row in table) / (groups - 1)
    within = sum((value - row.mean()) ** 2 for row in table for value in row) / (groups * (runs - 1))
    return between / within


def test_variance_against_sums_of_squares():
    table = np.random.default_rng(1).normal(size=(4, 7)) + np.arange(4)[:, None] * 0.3
    found = analyse_variance({str(i): list(row) for i, row in enumerate(table)})
    assert found.f == pytest.approx(slow_f(table), rel=1e-12)
    assert found.f != pytest.approx(slow_f(table[:3]), rel=1e-3)


def test_the_printed_interval_is_as_wide_as_that_of_the_table():
    """Printed: multi-channel less distillation 0.0064, [0.0004, 0.0123]; the rounded table has a mean 0.0065."""
    pair = next(p for p in compare_pairs(TAUGHT) if {p.first, p.second} == {"distillation", "multi-channel"})
    assert (pair.first, pair.second, pair.differ) == ("distillation", "multi-channel", True)
    half = (pair.upper - pair.lower) / 2
    assert half == pytest.approx((0.0123 - 0.0004) / 2, abs=5e-5)
    assert pair.difference == pytest.approx(0.0065, abs=1e-12)
    assert [round(x, 4) for x in (pair.lower, pair.upper)] == [0.0006, 0.0124]
    centre = 0.00636  # a mean that is printed as 0.0064
    assert [round(x, 4) for x in (centre, centre - half, centre + half)] == [0.0064, 0.0004, 0.0123]


def test_every_pair_of_the_report_differs_in_its_order():
    pairs = compare_pairs(TAUGHT)
    assert {(p.first, p.second) for p in pairs} == {
        ("logits", "distillation"),
        ("logits", "multi-channel"),
        ("distillation", "multi-channel"),
    }
    assert all(p.differ and p.lower > 0 and p.p < 0.05 for p in pairs)
    strict = {(p.first, p.second): p.differ for p in compare_pairs(TAUGHT, error=0.01)}
    assert strict == {
        ("logits", "distillation"): True,
        ("logits", "multi-channel"): True,
        ("distillation", "multi-channel"): False,
    }


def test_the_interval_against_the_studentised_range():
    from scipy.stats import studentized_range

    rng = np.random.default_rng(2)
    table = rng.normal(size=(3, 5))
    groups = {name: list(row) for name, row in zip("abc", table, strict=True)}
    within = np.mean([row.var(ddof=1) for row in table])
    half = studentized_range.ppf(0.9, 3, 12) * np.sqrt(within / 5)
    for pair in compare_pairs(groups, error=0.1):
        assert pair.upper - pair.difference == pytest.approx(half, rel=1e-6)
        assert pair.difference == pytest.approx(np.mean(groups[pair.second]) - np.mean(groups[pair.first]))
        assert pair.difference >= 0


def test_the_means_and_deviations_of_the_report():
    found = summarise(REPORT)["groups"]
    assert [round(g["mean"], 4) for g in found.values()] == [0.633, 0.6798, 0.697, 0.7035]
    assert [round(g["sd"], 3) for g in found.values()] == [0.003, 0.004, 0.002, 0.004]


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ({"a": [1.0, 2.0]}, "1 groups; give two or more"),
        ({"a": [1.0, 2.0], "b": [1.0]}, "b: 1 numbers; give two or more"),
        ({"a": [1.0, 2.0], "b": [1.0, float("nan")]}, "b: a number is not finite"),
        ({"a": [1.0, 1.0], "b": [2.0, 2.0]}, "are all the same"),
    ],
)
def test_bad_groups(groups, text):
    for call in (analyse_variance, compare_pairs):
        with pytest.raises(ValueError, match=text):
            call(groups)
    with pytest.raises(ValueError, match="an error of 1; give a probability"):
        compare_pairs(TAUGHT, error=1)
