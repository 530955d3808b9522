"""What the trials of a search say together: correlation between budgets, overhead, and who is not dominated."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from morph.family.candidate import TrialRow


@dataclass(frozen=True)
class Correlation:
    """How well ranks at a smaller budget tell those at a larger one.

    Attributes:
        first: The smaller budget.
        second: The larger one.
        rho: Spearman's rank correlation of the accuracies; not a number below three trials, or where all are equal.
        trials: How many were trained for the larger budget.
    """

    first: int
    second: int
    rho: float
    trials: int


def rank_correlations(rows: Iterable[TrialRow], budgets: Sequence[int]) -> list[Correlation]:
    """Correlations between all pairs of budgets, over the trials that were trained for the larger one.

    Each trial gives its accuracies on the way, also at budgets at which nobody compared it: those that began with a
    large budget are not selected by a smaller one.
    """
    from scipy import stats

    trained = [row for row in rows if row.state != "failed"]
    found = []
    for i, first in enumerate(budgets):
        for second in budgets[i + 1 :]:
            pairs = [(row.curve[first - 1], row.curve[second - 1]) for row in trained if len(row.curve) >= second]
            lower, upper = [a for a, _ in pairs], [b for _, b in pairs]
            known = len(pairs) > 2 and len(set(lower)) > 1 and len(set(upper)) > 1
            rho = float(stats.spearmanr(lower, upper).statistic) if known else math.nan
            found.append(Correlation(first, second, rho, len(pairs)))
    return found


def overhead(rows: Iterable[TrialRow]) -> float:
    """Time of proposing and drawing over time of training; not a number where nothing was trained."""
    rows = list(rows)
    spent = sum(row.seconds for row in rows)
    return sum(row.overhead for row in rows) / spent if spent else math.nan


def not_dominated(values: Sequence[tuple[float, float]]) -> list[bool]:
    """Which pairs of (accuracy, cost) are on the Pareto front: no other is as good in both and better in one."""
    return [
        not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in values) and all(map(math.isfinite, a)) for a in values
    ]


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of a sample: divided by n - 1; 0 for one alone) and largest of some accuracies."""

    mean: float
    sd: float
    best: float


def spread(accuracies: Sequence[float]) -> Spread | None:
    """Of some accuracies; None for none."""
    if not accuracies:
        return None
    sd = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
    return Spread(statistics.fmean(accuracies), sd, max(accuracies))
