"""Pictures of surgeries: the cells of an expansion, and the units of each coupling before and after.

The figures stand on canvases of their own, and the same rows give the same file.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
)

from morph.atomic import atomic_path
from morph.errors import PictureError

SUFFIXES = (".svg", ".png", ".pdf")

_GROWN, _KEPT, _GREY = "#2b7a3f", "#3f6fa8", "#a3a3a3"
_LINES = 48  # in a column of the picture of units
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
    save_figure(lambda: expansion_figure(rows, title=title), path, len(rows), "cells", force=force)


def save_figure(draw: Callable[[], Figure], path: Path, count: int, what: str, *, force: bool) -> None:
    """Write a figure of ``count`` rows, whole or not at all; errors as `expansion_picture`."""
    if path.suffix.lower() not in SUFFIXES:
        raise PictureError(f"{path}: the suffix does not say a format; end the name in {', '.join(SUFFIXES)}")
    if not count:
        raise PictureError(f"{path}: there are no {what} to draw; give at least one row")
    # A fixed salt and no date: the same rows give the same file.
    fixed: dict[Any, Any] = {"svg.hashsalt": "morph", "svg.fonttype": "none"}
    form = path.suffix.lower()[1:]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
    with matplotlib.rc_context(fixed), atomic_path(path, force=force) as temporary:
        draw().savefig(temporary, format=form, dpi=144, metadata=metadata)


def new_figure(width: float, height: float, title: str, *, solved: bool = True) -> Figure:
    """An empty figure, in inches, on a canvas of its own with a line above it.

    Args:
        width: In inches.
        height: Likewise.
        title: The line; taken as it is, no formula.
        solved: Whether the places of the parts are solved for; else everything is placed by hand, the line too.
    """
    figure = Figure(figsize=(width, height), layout="constrained" if solved else None)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False, **({} if solved else {"y": 1 - 0.2 / height}))
    return figure


def expansion_figure(rows: Sequence[CellRow], *, title: str) -> Figure:
    """The figure of `expansion_picture`, on a canvas of its own."""
    figure = new_figure(10.5, 1.6 + 0.27 * len(rows), title)
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


@dataclass(frozen=True)
class UnitRow:
    """One row of the picture of units.

    Attributes:
        name: The coupling, or whatever else is counted.
        before: How many units there were.
        after: How many there are.
        inverse: Whether fewer means larger, as for groups.
    """

    name: str
    before: int
    after: int
    inverse: bool = False

    @property
    def share(self) -> float:
        """Width afterwards over width before."""
        pair = (self.before, self.after) if self.inverse else (self.after, self.before)
        return pair[0] / max(pair[1], 1)

    @property
    def colour(self) -> str:
        """Grey where nothing changed, green where it grew, blue where it shrank."""
        return _GREY if self.before == self.after else _GROWN if self.share > 1 else _KEPT


Line = tuple[str, UnitRow | None]


def units_picture(rows: Sequence[UnitRow], path: Path, *, title: str, force: bool = False) -> None:
    """Draw one bar for each coupling, the share of its units that are there afterwards, with the numbers beside it.

    Args:
        rows: The couplings, from the input of the model to its output.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there are no rows or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    save_figure(lambda: units_figure(rows, title=title), path, len(rows), "couplings", force=force)


def units_figure(rows: Sequence[UnitRow], *, title: str) -> Figure:
    """The figure of `units_picture`: neighbours of one block stand under its name, in columns of about fifty lines."""
    columns = _columns(_under_headings(rows))
    height = max(map(len, columns))
    figure = new_figure(5.2 * len(columns), 1.1 + 0.17 * height, title)
    widest = max(1.0, *(row.share for row in rows), 1.0)
    for axes, lines in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        _draw_units(axes, lines, height, widest)
    kinds = {_GROWN: "grown", _KEPT: "cut", _GREY: "as it was"}
    present = {row.colour for row in rows}
    handles = [Line2D([], [], marker="s", ls="", color=c, label=text) for c, text in kinds.items() if c in present]
    handles.append(Line2D([], [], color="#888888", lw=0.8, ls="--", label="before"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _under_headings(rows: Sequence[UnitRow]) -> list[Line]:
    """A line for each row; the rows of a block of the model stand together, under its name if there are several."""
    blocks: dict[str, list[UnitRow]] = {}
    for row in rows:
        blocks.setdefault(block_of(row.name) or row.name, []).append(row)
    lines: list[Line] = []
    for block, some in blocks.items():
        if len(some) > 1:
            lines.append((block, None))
            lines += [("    " + row.name.removeprefix(block).lstrip("."), row) for row in some]
        else:
            lines.append((some[0].name, some[0]))
    return [(text.replace(".weight[0]", ""), row) for text, row in lines]


def _columns(lines: Sequence[Line]) -> list[list[Line]]:
    """Lines in columns of about the same length; a heading stays with its rows, and is repeated above the rest."""
    most = math.ceil(len(lines) / _LINES)
    tried = (_split(lines, height) for height in itertools.count(math.ceil(len(lines) / most)))
    return next(columns for columns in tried if len(columns) <= most)


def _split(lines: Sequence[Line], height: int) -> list[list[Line]]:
    """Lines in columns of at most ``height``, the last line of which is no heading."""
    columns: list[list[Line]] = [[]]
    heading = ""
    for line in lines:
        text, row = line
        if row is None:
            heading = text
        if len(columns[-1]) >= height - (row is None) and columns[-1]:
            columns.append([(heading, None)] if row is not None and text.startswith(" ") else [])
        columns[-1].append(line)
    return columns


def block_of(name: str) -> str:
    """The path up to the first part that ends in a number: ``cells.3``, ``layer1``, ``encoder.layers.layer_0``."""
    found = re.match(r"(?:[^.]*[^.\d]\.)*?(?:[^.]*\d)(?=\.)", name)
    return found.group() if found else ""


def _draw_units(axes: Axes, lines: Sequence[Line], height: int, widest: float) -> None:
    """One column of bars."""
    for y, (_, row) in enumerate(lines):
        if row is not None:
            axes.barh(y, row.share, height=0.62, color=row.colour)
            text = f"{row.before:,}" if row.before == row.after else f"{row.before:,} \u2192 {row.after:,}"
            axes.text(max(row.share, 1.0) + 0.03 * widest, y, text, va="center", fontsize=6.5, parse_math=False)
    axes.axvline(1.0, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xlim(0, widest * 1.45)
    axes.set_ylim(height - 0.4, -0.6)
    axes.xaxis.set_major_locator(MultipleLocator(0.5 if widest <= 2 else math.ceil(widest / 4)))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(lines)), [text for text, _ in lines], fontsize=6.5, parse_math=False, ha="left")
    longest = max(len(text) for text, _ in lines)
    axes.tick_params(axis="y", pad=3.4 * longest + 4)
    for label, (_, row) in zip(axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if row is None else "normal")
    axes.spines[["top", "right"]].set_visible(False)
