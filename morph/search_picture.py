"""Pictures of a search: what was dropped from each connection, and how gates and multiply-adds went down.

Source of the map: figure 5 of Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from morph.picture import block_of, new_figure, save_figure

Rows = Sequence[Mapping[str, Any]]

_MAP = "Purples"
_GATES, _MACS = "#5b3c88", "#2b7a3f"
_WIDTH, _HEIGHT, _MAP_HEIGHT = 10.5, 1.9, 2.7  # inches
_MOST = 60  # layers whose names can be read below their bars


def search_picture(drops: Rows, history: Rows, path: Path, *, title: str, force: bool = False) -> None:
    """Draw a map for each dense block, a bar for each layer, and the course of the search.

    Args:
        drops: ``layer``, ``source``, ``gates`` and ``closed`` of each connection, as in the record of a search.
        history: ``step``, ``gates_open``, ``gates_total`` and ``macs``, likewise.
        path: Where the picture shall stand; ``.svg``, ``.png`` or ``.pdf``.
        title: The line above it.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there are no rows or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    save_figure(lambda: search_figure(drops, history, title=title), path, len(drops), "gates", force=force)


def search_figure(drops: Rows, history: Rows, *, title: str) -> Figure:
    """The figure of `search_picture`, on a canvas of its own.

    Everything has its place in inches: a layout that is solved for differs in its last bits from run to run.
    """
    blocks = drop_maps(drops)
    names = max(len(row["layer"]) for row in drops) if len({row["layer"] for row in drops}) <= _MOST else 3
    below = 0.25 + 0.045 * names
    bars = 0.8 + _MAP_HEIGHT * bool(blocks) + 0.6 * bool(blocks)
    course = bars + _HEIGHT + below + 0.4
    height = course + _HEIGHT + 0.5 if history else course
    figure = new_figure(_WIDTH, height, title, solved=False)

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        return figure.add_axes((left / _WIDTH, 1 - (top + tall) / height, width / _WIDTH, tall / height))

    inside = _WIDTH - 1.6
    share = inside / max(1, len(blocks))
    for i, (name, ratios) in enumerate(blocks.items()):
        image = _draw_map(place(0.7 + i * share, 0.8, share - 0.5, _MAP_HEIGHT), name, ratios, first=i == 0)
        if i == len(blocks) - 1:
            percent = PercentFormatter(1.0, decimals=0)
            bar = figure.colorbar(image, cax=place(0.45 + inside, 0.8, 0.12, _MAP_HEIGHT), format=percent)
            bar.ax.tick_params(labelsize=7)
            bar.set_label("dropped", fontsize=8)
    _draw_layers(place(0.7, bars, inside, _HEIGHT), drops)
    if history:
        _draw_course(place(0.7, course, inside, _HEIGHT), history)
    return figure


def drop_maps(drops: Rows) -> dict[str, np.ndarray]:
    """By block, the share that was dropped of each connection.

    Args:
        drops: As in `search_picture`.

    Returns:
        For each block with several layers that read several sources, ``[sources, layers]`` in the order of execution,
        not-a-number where there is no connection.
    """
    of_block: dict[str, list[Mapping[str, Any]]] = {}
    for row in drops:
        if row["kind"] == "connection":
            of_block.setdefault(block_of(row["layer"]), []).append(row)
    found = {}
    for block, rows in of_block.items():
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        sources = list(dict.fromkeys(row["source"] for row in rows))
        if len(layers) < 2 or len(sources) < 2:
            continue
        ratios = np.full((len(sources), len(layers)), np.nan)
        for row in rows:
            ratios[sources.index(row["source"]), layers.index(row["layer"])] = row["closed"] / row["gates"]
        found[block] = ratios
    return found


def _draw_map(axes: Axes, name: str, ratios: np.ndarray, *, first: bool) -> AxesImage:
    """One block: a column for each layer, a row for each source; the first is what comes into the block."""
    axes.set_title(name, fontsize=9, parse_math=False)
    axes.set_facecolor("#eeeeee")
    image = axes.imshow(ratios, cmap=_MAP, vmin=0, vmax=1, origin="lower", interpolation="nearest", aspect="auto")
    axes.set_xlabel("layer", fontsize=8)
    if first:
        axes.set_ylabel("reads from (0: what comes in)", fontsize=8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True))
    axes.tick_params(labelsize=7)
    return image


def _draw_layers(axes: Axes, drops: Rows) -> None:
    """A bar for each layer: the share of its gates that are closed."""
    sums: dict[str, list[int]] = {}
    for row in drops:
        both = sums.setdefault(row["layer"], [0, 0])
        both[0] += row["gates"]
        both[1] += row["closed"]
    axes.set_title("dropped from what each layer reads", fontsize=9)
    axes.bar(range(len(sums)), [closed / gates for gates, closed in sums.values()], width=0.8, color=_GATES)
    axes.set_xlim(-0.6, len(sums) - 0.4)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.tick_params(labelsize=7)
    if len(sums) <= _MOST:
        axes.set_xticks(range(len(sums)), list(sums), rotation=90, fontsize=5.5, parse_math=False)
    else:
        axes.set_xlabel(f"the {len(sums)} layers with gates, in the order of execution", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_course(axes: Axes, history: Rows) -> None:
    """Gates open, on the left, and multiply-adds, on the right, against steps."""
    steps = [row["step"] for row in history]
    axes.set_title("course of the search", fontsize=9)
    axes.plot(steps, [row["gates_open"] for row in history], color=_GATES, linewidth=1.4)
    axes.set_ylabel("gates open", fontsize=8, color=_GATES)
    axes.set_ylim(0, history[0]["gates_total"] * 1.05)
    axes.set_xlabel("step", fontsize=8)
    other = axes.twinx()
    other.plot(steps, [row["macs"] for row in history], color=_MACS, linewidth=1.4, linestyle="--")
    other.set_ylabel("multiply-adds", fontsize=8, color=_MACS)
    other.set_ylim(0, max(row["macs"] for row in history) * 1.05)
    other.yaxis.set_major_formatter(EngFormatter(sep=""))
    for each in (axes, other):
        each.tick_params(labelsize=7)
        each.spines["top"].set_visible(False)
