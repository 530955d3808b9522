"""Draw the comparison of students: error for each way, with every seed as a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Mapping[str, Mapping[str, Any]]


def draw(table: Rows, sweeps: Rows, path: Path) -> None:
    """Means as bars and seeds as points; beside them, error against the penalty and against kl0."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(sweeps), width_ratios=[2] + [1] * len(sweeps), squeeze=False)
    bars, *others = axes[0]
    names = list(table)
    colours = ["#e3b587" if "inherited" in name else "#9db8d9" for name in names]
    bars.barh(names, [100 * table[n]["error_mean"] for n in names], color=colours)
    for row, name in enumerate(names):
        errors = [100 * run["error"] for run in table[name]["runs"]]
        bars.plot(errors, [row] * len(errors), "k.", markersize=5)
    bars.invert_yaxis()
    lowest = min(100 * run["error"] for row in table.values() for run in row["runs"])
    bars.set_xlim(left=max(0.0, lowest - 3))
    bars.set_xlabel("test error, % (a point for each seed; does not begin at zero)")
    for beside, (name, sweep) in zip(others, sweeps.items(), strict=True):
        _sweep(beside, name, [(row[name], 100 * row["error"]) for row in sweep["rows"]])
        beside.sharey(others[0])
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def _sweep(axes: Axes, name: str, points: Sequence[tuple[float, float]]) -> None:
    """Error against one number of the search."""
    axes.plot(*zip(*points, strict=True), "o-", markersize=5)
    if all(value > 0 for value, _ in points):
        axes.set_xscale("log")
    axes.set_xlabel(f"{name} (kd-weighted, seed 0)")
    axes.set_ylabel("test error, %")
