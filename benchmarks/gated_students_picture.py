"""Draw the comparison of students: error for each way, with every seed as a point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(table: Mapping[str, Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Means as bars and seeds as points; below, error against the penalty and against kl0 where that was varied."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, sweep = figure.subplots(1, 2, width_ratios=(3, 2))
    names = list(table)
    bars.barh(names, [100 * table[n]["error_mean"] for n in names], color="#9db8d9")
    for row, name in enumerate(names):
        errors = [100 * r["error"] for r in lines if not r["options"] and f"{r['way']}, {r['weights']} weights" == name]
        bars.plot(errors, [row] * len(errors), "k.", markersize=5)
    bars.invert_yaxis()
    lowest = min(100 * r["error"] for r in lines)
    bars.set_xlim(left=max(0.0, lowest - 3))
    bars.set_xlabel("test error, %")
    for option, mark in (("lambda2", "o-"), ("kl0", "s--")):
        points = sorted((r["options"][option], 100 * r["error"]) for r in lines if option in r["options"])
        if points:
            sweep.plot(*zip(*points, strict=True), mark, label=option)
    sweep.set_xscale("log")
    sweep.set_xlabel("value of the number that is varied (kd-weighted, seed 0)")
    sweep.set_ylabel("test error, %")
    if sweep.get_legend_handles_labels()[0]:
        sweep.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
