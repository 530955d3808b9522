"""Draw the errors of one student after different teachers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(table: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Means and deviations, one row for each teacher."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    names = [name.split(" -> ")[0] for name in table]
    means = [100 * row["error_mean"] for row in table.values()]
    spread = [100 * (row["error_sd"] or 0) for row in table.values()]
    axes.errorbar(means, range(len(names)), xerr=spread, fmt="o", capsize=3, color="#35608f")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("test error of the student, %")
    axes.set_ylabel("teacher")
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
