"""The picture of a training run: loss and accuracy, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from morph.picture import save_figure

Rows = Sequence[Mapping[str, Any]]

_SEEN, _UNSEEN, _TEACHER = "#3f6fa8", "#b5482a", "#5b3c88"
_WIDTH, _HEIGHT = 9.5, 3.6  # inches


def training_picture(
    history: Rows, path: Path, *, title: str, teacher: float | None = None, force: bool = False
) -> None:
    """Draw the loss on the left and top-1 on the right, on the batches of training and in validation.

    Args:
        history: Rows of `morph.training.progress.Fitted`.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        teacher: Its top-1 in validation, drawn as a line; None for no line.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there are no rows or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    save_figure(
        lambda: training_figure(history, title=title, teacher=teacher), path, len(history), "rounds", force=force
    )


def training_figure(history: Rows, *, title: str, teacher: float | None = None) -> Figure:
    """The figure of `training_picture`, on a canvas of its own."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False, y=0.97)
    losses, hits = (figure.add_axes((left, 0.15, 0.4, 0.65)) for left in (0.07, 0.57))
    for axes, what, name in ((losses, "loss", "loss"), (hits, "top1", "top-1")):
        _draw(axes, history, what, "training, as the batches came", _SEEN)
        _draw(axes, history, f"val_{what}", "validation", _UNSEEN)
        axes.set_title(name, fontsize=9)
    if teacher is not None:
        hits.axhline(teacher, color=_TEACHER, linewidth=1, linestyle="--", label="teacher, validation")
    hits.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    losses.set_ylim(bottom=0)
    hits.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _draw(axes: Axes, history: Rows, what: str, label: str, colour: str) -> None:
    """One curve, of the rows that have it."""
    rows = [row for row in history if what in row]
    marker = "o" if len(rows) < 30 else None
    if rows:
        axes.plot(
            [row["epoch"] for row in rows],
            [row[what] for row in rows],
            color=colour,
            linewidth=1.3,
            marker=marker,
            markersize=2.5,
            label=label,
        )
    axes.set_xlabel("round through the data", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(labelsize=7)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
