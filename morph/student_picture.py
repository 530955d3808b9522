"""The picture of students side by side: error against parameters and against multiply-adds.

Source: figure 3 of Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from morph.picture import new_figure, save_figure


@dataclass(frozen=True)
class StudentRow:
    """One student.

    Attributes:
        name: Of its architecture.
        params: Its parameters.
        macs: Its multiply-adds for one sample.
        error: Test error in percent, trained without a teacher; None if it was not.
        error_distilled: Test error in percent, trained with the teacher; None likewise.
    """

    name: str
    params: int
    macs: int
    error: float | None
    error_distilled: float | None


def students_picture(rows: Sequence[StudentRow], path: Path, *, title: str, force: bool = False) -> None:
    """Draw a circle for each student trained without the teacher and a cross for each trained with it.

    Args:
        rows: The students.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there are no rows or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    save_figure(lambda: students_figure(rows, title=title), path, len(rows), "students", force=force)


def students_figure(rows: Sequence[StudentRow], *, title: str) -> Figure:
    """The figure of `students_picture`, on a canvas of its own."""
    figure = new_figure(10.5, 4.6, title)
    colours = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed colour map has them
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label, sizes in (
        (left, "parameters", [row.params for row in rows]),
        (right, "multiply-adds", [row.macs for row in rows]),
    ):
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            _draw(axes, size, row, colours[i % len(colours)])
        axes.set_xlabel(label, fontsize=9)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("test error in percent", fontsize=9)
    names = [Line2D([], [], marker="s", ls="", color=colours[i % len(colours)]) for i in range(len(rows))]
    marks = [Line2D([], [], marker=m, ls="", color="#555555") for m in ("o", "x")]
    labels = [*(row.name for row in rows), "from scratch", "distilled"]
    figure.legend([*names, *marks], labels, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, size: int, row: StudentRow, colour: tuple[float, ...]) -> None:
    """Both marks of one student, with a line between."""
    both = [error for error in (row.error, row.error_distilled) if error is not None]
    axes.plot([size] * len(both), both, color=colour, linewidth=0.8)
    for error, mark in ((row.error, "o"), (row.error_distilled, "x")):
        if error is not None:
            axes.plot([size], [error], color=colour, marker=mark, markersize=6)
