"""The picture of an expansion: for each cell its score, its groups before and after, and the parameters it gained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from morph.atomic import atomic_path
from morph.errors import PictureError

SUFFIXES = (".svg", ".png", ".pdf")

_GROWN, _KEPT, _GREY = "#2b7a3f", "#3f6fa8", "#a3a3a3"
_DECADES = 30.0  # ratio of scores from which on their axis is logarithmic


@dataclass(frozen=True)
class CellRow:
    """One row of the picture.

    Attributes:
        name: The cell.
        score: Its score before the expansion; None if it was not scored.
        groups_before: The largest number of groups in it; None if it has no grouped convolution.
        groups_after: The same afterwards.
        params_added: Parameters that it gained.
    """

    name: str
    score: float | None
    groups_before: int | None
    groups_after: int | None
    params_added: int

    @property
    def can_grow(self) -> bool:
        """Whether it had groups to merge."""
        return self.groups_before is not None and self.groups_before > 1

    @property
    def colour(self) -> str:
        """Green for a cell that grew, blue for one that could have, grey for one that cannot."""
        if not self.can_grow:
            return _GREY
        return _GROWN if self.groups_after != self.groups_before or self.params_added else _KEPT


def expansion_picture(rows: Sequence[CellRow], path: Path, *, title: str, force: bool = False) -> None:
    """Draw one row for each cell: its Fisher score, its groups (an arrow from before to after), the parameters added.

    Args:
        rows: The cells, from the input of the model to its output.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there are no rows or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"{path}: the suffix does not say a format; end the name in {', '.join(SUFFIXES)}")
    if not rows:
        raise PictureError(f"{path}: there are no cells to draw; give at least one row")
    # A fixed salt and no date: the same rows give the same file.
    fixed: dict[Any, Any] = {"svg.hashsalt": "morph", "svg.fonttype": "none"}
    form = path.suffix.lower()[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with matplotlib.rc_context(fixed), atomic_path(path, force=force) as temporary:
        expansion_figure(rows, title=title).savefig(temporary, format=form, dpi=144, metadata=metadata)


def expansion_figure(rows: Sequence[CellRow], *, title: str) -> Figure:
    """The figure of `expansion_picture`, on a canvas of its own."""
    figure = Figure(figsize=(10.5, 1.6 + 0.27 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    scores, groups, added = figure.subplots(1, 3, sharey=True)
    _draw_scores(scores, rows)
    _draw_groups(groups, rows)
    _draw_added(added, rows)
    for axes in (scores, groups, added):
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    for axes in (groups, added):
        axes.tick_params(axis="y", left=False)
    scores.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8, parse_math=False)
    scores.set_ylim(len(rows) - 0.4, -0.6)
    for label, row in zip(scores.get_yticklabels(), rows, strict=True):
        label.set_color("black" if row.can_grow else _GREY)
    kinds = {_GROWN: "grown", _KEPT: "left as it was", _GREY: "cannot grow"}
    present = {row.colour for row in rows}
    handles = [Line2D([], [], marker="o", ls="", color=c, label=text) for c, text in kinds.items() if c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw_scores(axes: Axes, rows: Sequence[CellRow]) -> None:
    """A stem with a dot for each score; on a logarithmic axis if they span decades, where 0 stands at the left end."""
    axes.set_title("Fisher score before", fontsize=9)
    known = [row.score for row in rows if row.score is not None and math.isfinite(row.score)]
    positive = [score for score in known if score > 0]
    low = 0.0
    if positive and max(positive) >= _DECADES * min(positive):
        low = 10.0 ** math.floor(math.log10(min(positive)) - 0.2)
        axes.set_xscale("log")
        axes.set_xlim(low, max(positive) * 2)
    else:
        axes.set_xlim(0, max(positive, default=1.0) * 1.1)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))
        axes.xaxis.get_offset_text().set_fontsize(8)
    placed = []
    for y, row in enumerate(rows):
        if row.score is None or not math.isfinite(row.score):
            axes.text(0.02, y, "not scored", **_aside(axes))
        else:
            placed.append((max(row.score, low), y, row.colour))
    if placed:
        x, ys, colours = zip(*placed, strict=True)
        axes.hlines(ys, low, x, colors=colours, linewidth=1.2)
        axes.scatter(x, ys, s=26, c=colours, clip_on=False, zorder=3)


def _aside(axes: Axes) -> dict[str, Any]:
    """How a remark stands at the left end of a panel."""
    return {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7, "color": _GREY}


def _draw_groups(axes: Axes, rows: Sequence[CellRow]) -> None:
    """A dot for the groups before and, if they changed, an arrow to those after, on an axis of powers of two."""
    axes.set_title("groups, before to after", fontsize=9)
    most = max((g for row in rows for g in (row.groups_before, row.groups_after) if g is not None), default=1)
    top = math.ceil(math.log2(most)) if most > 1 else 1
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0 ** (top + 0.4), 2.0**-0.4)  # fewer groups are more parameters: growth goes to the right
    step = math.ceil((top + 1) / 8)
    axes.xaxis.set_major_locator(FixedLocator([2.0**i for i in range(0, top + 1, step)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    for y, row in enumerate(rows):
        before, after, colour = row.groups_before, row.groups_after, row.colour
        if before is None or after is None:
            axes.text(0.02, y, "no grouped convolution", **_aside(axes))
            continue
        axes.scatter([before, after], [y, y], s=26, c=["white", colour], edgecolors=colour, zorder=3)
        if before != after:
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 3.5, "shrinkB": 2.5}
            axes.annotate("", (after, y), (before, y), arrowprops=arrow)


def _draw_added(axes: Axes, rows: Sequence[CellRow]) -> None:
    """A bar with its number for the parameters added."""
    axes.set_title(f"parameters added ({sum(row.params_added for row in rows):,} in all)", fontsize=9)
    most = max(1, *(row.params_added for row in rows), 1)
    axes.set_xlim(0, most * 1.35)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    colours = [row.colour for row in rows]
    bars = axes.barh(range(len(rows)), [row.params_added for row in rows], height=0.55, color=colours)
    axes.bar_label(bars, [f"{row.params_added:,}" if row.params_added else "" for row in rows], padding=3, fontsize=7)
