"""Draw the comparison of students: error for each way, with every seed as a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw(table: Mapping[str, Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Means as bars and seeds as points; below, error against the penalty and against kl0 where that was varied."""
    varied = {
        option: sorted((r["options"][option], 100 * r["error"]) for r in lines if option in r["options"])
        for option in ("lambda2", "kl0")
    }
    figure = Figure(figsize=(11, 4.2) if any(varied.values()) else (7.5, 3.6), layout="constrained")
    bars = figure.add_subplot(1, 2 if any(varied.values()) else 1, 1)
    names = list(table)
    bars.barh(names, [100 * table[n]["error_mean"] for n in names], color="#9db8d9")
    for row, name in enumerate(names):
        errors = [100 * r["error"] for r in lines if not r["options"] and f"{r['way']}, {r['weights']} weights" == name]
        bars.plot(errors, [row] * len(errors), "k.", markersize=5)
    bars.invert_yaxis()
    lowest = min(100 * r["error"] for r in lines)
    bars.set_xlim(left=max(0.0, lowest - 3))
    bars.set_xlabel("test error, % (each seed a point; the axis does not begin at zero)")
    if any(varied.values()):
        _sweeps(figure.add_subplot(1, 2, 2), varied)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def _sweeps(axes: Axes, varied: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Error against a number of the search."""
    for (option, points), mark in zip(varied.items(), ("o-", "s--"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), mark, label=option)
    axes.set_xscale("log")
    axes.set_xlabel("value of the number that is varied (kd-weighted, seed 0)")
    axes.set_ylabel("test error, %")
    axes.legend()
