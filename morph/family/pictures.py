"""Pictures of a search: accuracy by budget, correlation of ranks, importance of the numbers, students and teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from morph.family.candidate import TrialRow
from morph.family.statistics import Correlation, not_dominated
from morph.picture import save_figure

_BY_BUDGET = ("#9db7d5", "#3f6fa8", "#b5482a", "#5b3c88", "#2e7d4f")
_FRONT, _REST, _TEACHER = "#b5482a", "#9db7d5", "#5b3c88"


@dataclass(frozen=True)
class Point:
    """A network in the picture of accuracy over cost.

    Attributes:
        name: What stands beside it.
        accuracy: Share of images whose class was found.
        cost: In the unit of the axis.
        teacher: Whether it is the teacher.
    """

    name: str
    accuracy: float
    cost: float
    teacher: bool = False


def curves_picture(rows: Sequence[TrialRow], path: Path, *, title: str, force: bool = False) -> None:
    """Draw accuracy against epochs, one line for each trial, coloured by the budget that it reached.

    Args:
        rows: The trials; those without a curve are left out.
        path: ``.svg``, ``.png`` or ``.pdf``.
        title: The line above.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If no trial has a curve, or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    drawn = [row for row in rows if row.curve]
    save_figure(lambda: _curves(drawn, title), path, len(drawn), "trained networks", force=force)


def _curves(rows: Sequence[TrialRow], title: str) -> Figure:
    figure, (axes,) = _figure(1, title)
    budgets = sorted({row.epochs for row in rows})
    for row in rows:
        colour = _BY_BUDGET[budgets.index(row.epochs) % len(_BY_BUDGET)]
        axes.plot(range(1, len(row.curve) + 1), row.curve, color=colour, linewidth=0.8, alpha=0.7)
        axes.plot(len(row.curve), row.curve[-1], "o", color=colour, markersize=3)
    for i, budget in enumerate(budgets):
        number = sum(row.epochs == budget for row in rows)
        axes.plot([], [], color=_BY_BUDGET[i % len(_BY_BUDGET)], label=f"ended after epoch {budget} ({number})")
    axes.set_xlabel("epochs", fontsize=8)
    axes.set_ylabel("accuracy in validation", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, loc="best")
    return figure


def correlations_picture(
    searches: Mapping[str, Sequence[Correlation]], path: Path, *, title: str, force: bool = False
) -> None:
    """Draw the rank correlation between budgets as a matrix, one for each search.

    Args:
        searches: Correlations by what stands above the matrix, e.g. ``with a teacher``; each with a pair at least.
        path: As `curves_picture`; errors as there.
        title: Likewise.
        force: Likewise.
    """
    drawn = {name: found for name, found in searches.items() if found}
    save_figure(lambda: _correlations(drawn, title), path, len(drawn), "pairs of budgets", force=force)


def _correlations(searches: Mapping[str, Sequence[Correlation]], title: str) -> Figure:
    figure, all_axes = _figure(len(searches), title, width=3.8)
    for axes, (name, found) in zip(all_axes, searches.items(), strict=True):
        budgets = sorted({c.first for c in found} | {c.second for c in found})
        cells = [[1.0 if a == b else math.nan for b in budgets] for a in budgets]
        for c in found:
            i, j = budgets.index(c.first), budgets.index(c.second)
            cells[i][j] = cells[j][i] = c.rho
        axes.imshow(cells, vmin=-1.8, vmax=1.8, cmap="RdBu_r")
        for c in found:
            i, j = budgets.index(c.first), budgets.index(c.second)
            shown = "unknown" if math.isnan(c.rho) else f"{c.rho:.2f}"
            for x, y in ((i, j), (j, i)):
                axes.text(x, y, f"{shown}\nn = {c.trials}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(budgets)), [str(b) for b in budgets], fontsize=8)
        axes.set_yticks(range(len(budgets)), [str(b) for b in budgets], fontsize=8)
        axes.set_xlabel("epochs", fontsize=8)
        axes.set_title(name, fontsize=9, parse_math=False)
    return figure


def importances_picture(shares: Mapping[str, float], path: Path, *, title: str, force: bool = False) -> None:
    """Draw how much each searched number matters; arguments and errors as `curves_picture`."""
    save_figure(lambda: _importances(shares, title), path, len(shares), "importances", force=force)


def _importances(shares: Mapping[str, float], title: str) -> Figure:
    figure, (axes,) = _figure(1, title, left=0.24)
    names = sorted(shares, key=lambda name: shares[name])
    axes.barh([name.replace("_", " ") for name in names], [shares[name] for name in names], color=_BY_BUDGET[1])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("importance (PED-ANOVA)", fontsize=8)
    axes.tick_params(labelsize=8)
    return figure


def front_picture(points: Mapping[str, Sequence[Point]], path: Path, *, title: str, force: bool = False) -> None:
    """Draw accuracy over costs, with those that no other network beats in both.

    Args:
        points: By the label of the axis of the cost, e.g. ``parameters``.
        path: As `curves_picture`; errors as there.
        title: Likewise.
        force: Likewise.
    """
    number = max((len(found) for found in points.values()), default=0)
    save_figure(lambda: _front(points, title), path, number, "students", force=force)


def _front(points: Mapping[str, Sequence[Point]], title: str) -> Figure:
    figure, all_axes = _figure(len(points), title, width=3.4)
    for axes, (label, found) in zip(all_axes, points.items(), strict=True):
        best = not_dominated([(point.accuracy, point.cost) for point in found])
        costs = [point.cost for point in found]
        for point, front in zip(found, best, strict=True):
            colour = _TEACHER if point.teacher else _FRONT if front else _REST
            axes.plot(point.cost, point.accuracy, "s" if point.teacher else "o", color=colour, markersize=5)
            to_left = point.cost - min(costs) > max(costs) - point.cost  # so that no name leaves the frame
            axes.annotate(
                point.name,
                (point.cost, point.accuracy),
                (-4 if to_left else 4, 4),
                textcoords="offset points",
                ha="right" if to_left else "left",
                fontsize=6,
                parse_math=False,
            )
        line = sorted((p.cost, p.accuracy) for p, front in zip(found, best, strict=True) if front)
        axes.plot([x for x, _ in line], [y for _, y in line], color=_FRONT, linewidth=0.8, zorder=0)
        _scale_costs(axes, costs)
        axes.set_xlabel(label, fontsize=8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.tick_params(labelsize=7, which="both")
        axes.margins(0.15)
    return figure


def _scale_costs(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis for costs of different size, a plain one with few numbers for those that are alike."""
    if costs and 0 < 10 * min(costs) < max(costs):
        axes.set_xscale("log")
        few = (1.0, 3.0) if max(costs) < 1000 * min(costs) else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(subs=few))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _figure(number: int, title: str, *, width: float = 7.0, left: float = 0.12) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, on a canvas of its own."""
    figure = Figure(figsize=(width * number, 3.8), layout=None)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False, y=0.97)
    share = 1 / number
    margin = left if number == 1 else 0.16
    found = [figure.add_axes((share * (i + margin), 0.14, share * (0.96 - margin), 0.7)) for i in range(number)]
    return figure, found
