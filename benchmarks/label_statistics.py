"""Do ways of teaching differ? One-way analysis of variance, and Tukey's test of every pair.

    python benchmarks/label_statistics.py accuracies.json

The file holds, by the name of each way, the accuracies of its runs, one for each fold:
``{"logits": [0.683, ...], "distillation": [...]}``. The statistics are those of the report on multi-channel labels
("CMPUT 466 Mini Project", 2017, section 5): `scipy.stats.f_oneway` and statsmodels' `pairwise_tukeyhsd`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from statsmodels.stats.multicomp import pairwise_tukeyhsd

REPORT: dict[str, list[float]] = {
    "baseline": [0.634, 0.629, 0.630, 0.636, 0.631, 0.638],
    "logits": [0.683, 0.684, 0.673, 0.679, 0.684, 0.676],
    "distillation": [0.698, 0.694, 0.698, 0.695, 0.697, 0.700],
    "multi-channel": [0.708, 0.702, 0.697, 0.706, 0.708, 0.700],
}
"""Figure 7 of the report: accuracies on six test sets, each a mean of a hundred runs, rounded to three digits."""


@dataclass(frozen=True)
class Variance:
    """One-way analysis of variance.

    Attributes:
        f: Variance between the groups over that inside them.
        p: How likely such an ``f`` or a larger one is if all groups have one mean.
        between: Degrees of freedom between groups, and
        within: inside them.
    """

    f: float
    p: float
    between: int
    within: int


@dataclass(frozen=True)
class Comparison:
    """Tukey's test of two groups.

    Attributes:
        first: Name of one.
        second: Name of the other.
        difference: Mean of the second less that of the first.
        lower: Lower end of the simultaneous confidence interval of the difference, and
        upper: its upper end.
        p: Adjusted for the number of pairs.
        differ: Whether the interval leaves zero out.
    """

    first: str
    second: str
    difference: float
    lower: float
    upper: float
    p: float
    differ: bool


def p_of(f: float, between: int, within: int) -> float:
    """How likely an F of this size or a larger one is by chance."""
    return float(stats.f.sf(f, between, within))


def analyse_variance(groups: Mapping[str, Sequence[float]]) -> Variance:
    """One-way analysis of variance.

    Args:
        groups: By name, two groups or more of two numbers or more.

    Raises:
        ValueError: If there are fewer, or a number is not finite; names the group.
    """
    _check(groups)
    result = stats.f_oneway(*groups.values())
    total = sum(map(len, groups.values()))
    return Variance(float(result.statistic), float(result.pvalue), len(groups) - 1, total - len(groups))


def compare_pairs(groups: Mapping[str, Sequence[float]], error: float = 0.05) -> list[Comparison]:
    """Tukey's honestly significant differences of every pair, the better of the two named second.

    Args:
        groups: As for `analyse_variance`.
        error: How likely one false difference among all pairs may be.

    Raises:
        ValueError: As `analyse_variance`, or if ``error`` is not between 0 and 1.
    """
    _check(groups)
    if not 0 < error < 1:
        raise ValueError(f"an error of {error}; give a probability between 0 and 1, such as 0.05")
    names = [name for name, values in groups.items() for _ in values]
    result = pairwise_tukeyhsd(np.concatenate([np.asarray(v, float) for v in groups.values()]), names, error)
    unique = [str(name) for name in result.groupsunique]
    pairs = [(a, b) for i, a in enumerate(unique) for b in unique[i + 1 :]]
    found = []
    for (a, b), mean, (low, high), p, differ in zip(
        pairs, result.meandiffs, result.confint, result.pvalues, result.reject, strict=True
    ):
        ends = (a, b, mean, low, high) if mean >= 0 else (b, a, -mean, -high, -low)
        found.append(Comparison(*ends[:2], *map(float, ends[2:]), float(p), bool(differ)))
    return found


def summarise(groups: Mapping[str, Sequence[float]], error: float = 0.05) -> dict[str, object]:
    """Means, standard deviations (of the population, as in the report), both tests; plain values for a result file."""
    return {
        "groups": {
            name: {"runs": len(v), "mean": float(np.mean(v)), "sd": float(np.std(v))} for name, v in groups.items()
        },
        "anova": asdict(analyse_variance(groups)),
        "tukey": [asdict(pair) for pair in compare_pairs(groups, error)],
        "error": error,
    }


def _check(groups: Mapping[str, Sequence[float]]) -> None:
    """Refuse groups of which nothing can be said."""
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} groups; give two or more")
    for name, values in groups.items():
        if len(values) < 2:
            raise ValueError(f"{name}: {len(values)} numbers; give two or more")
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{name}: a number is not finite")
    if all(len(set(values)) == 1 for values in groups.values()):
        raise ValueError("the numbers of each group are all the same, so there is nothing to compare differences with")


def main() -> None:
    """Print the summary of a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "file", type=Path, nargs="?", help="accuracies by way of teaching; the report's own without one"
    )
    parser.add_argument("--error", type=float, default=0.05, help="probability of one false difference (default 0.05)")
    args = parser.parse_args()
    groups = json.loads(args.file.read_text()) if args.file else {k: v for k, v in REPORT.items() if k != "baseline"}
    print(json.dumps(summarise(groups, args.error), indent=1))


if __name__ == "__main__":
    main()
