"""The picture of wirings: the graph of cells, and in each cell its graph of modules, coloured by what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from morph.picture import save_figure
from morph.zoo.random_graph import Blueprint, Sources, outputs_of, stage_of

_INPUT, _OUTPUT, _BOTH, _BETWEEN = "#e8c34a", "#3f6fa8", "#6fa86a", "#c4c4c4"
_STAGES = ("#fbfaf4", "#f2f4f8", "#f3eff6")
_APART = 2.0  # sides of a cell between the middles of two, along the circle
_PANEL = 5.2  # inches

Point = tuple[float, float]


def wiring_picture(networks: Mapping[str, Blueprint], path: Path, *, title: str, force: bool = False) -> None:
    """Draw wirings side by side.

    In each cell a dot is a module: one that reads the cell's input, one that the cell's output is made of, or one in
    between. Arrows between cells are those of the top graph; the shade of a cell is its stage.

    Args:
        networks: Blueprints by what stands above them.
        path: ``.svg``, ``.png`` or ``.pdf``.
        title: The line above.
        force: Whether an existing file may be replaced.

    Raises:
        PictureError: If there is no network, or the suffix is unknown.
        OutputError: If the picture cannot be written.
    """
    save_figure(lambda: wiring_figure(networks, title=title), path, len(networks), "networks", force=force)


def wiring_figure(networks: Mapping[str, Blueprint], *, title: str) -> Figure:
    """The figure of `wiring_picture`, on a canvas of its own."""
    figure = Figure(figsize=(_PANEL * len(networks), _PANEL + 1.0))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False, y=0.98)
    share = 1 / len(networks)
    for i, (name, blueprint) in enumerate(networks.items()):
        axes = figure.add_axes((share * (i + 0.01), 0.07, share * 0.98, 0.83))
        _draw_network(axes, blueprint)
        axes.set_title(name, fontsize=9, parse_math=False)
    kinds = {"input": _INPUT, "output": _OUTPUT, "input and output": _BOTH, "operation": _BETWEEN}
    handles = [Patch(facecolor=colour, edgecolor="#555555", label=what) for what, colour in kinds.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def on_a_circle(number: int, centre: Point, radius: float) -> list[Point]:
    """Places of so many nodes, clockwise from the left; one alone stands in the middle."""
    if number == 1:
        return [centre]
    angles = [math.pi - 2 * math.pi * i / number for i in range(number)]
    return [(centre[0] + radius * math.cos(angle), centre[1] + radius * math.sin(angle)) for angle in angles]


def role_colours(sources: Sources) -> list[str]:
    """A colour for each node, by what it is in its graph."""
    ends = set(outputs_of(sources))
    colours = []
    for number, read in enumerate(sources, start=1):
        first, last = 0 in read, number in ends
        colours.append(_BOTH if first and last else _INPUT if first else _OUTPUT if last else _BETWEEN)
    return colours


def _draw_network(axes: Axes, blueprint: Blueprint) -> None:
    """Cells on a circle, arrows between them, and what is inside."""
    axes.set_axis_off()
    axes.set_aspect("equal")
    cells = len(blueprint.top)
    radius = cells * _APART / (2 * math.pi)
    boxes = []
    colours = role_colours(blueprint.top)
    for node, (x, y) in enumerate(on_a_circle(cells, (0.0, 0.0), radius)):
        shade = _STAGES[stage_of(node, cells)]
        box = FancyBboxPatch(
            (x - 0.5, y - 0.5), 1, 1, boxstyle="round,pad=0.08", fc=shade, ec=colours[node], lw=2.0, zorder=2
        )
        boxes.append((axes.add_patch(box), (x, y)))
        axes.text(x, y - 0.55, f"cell {node}", ha="center", va="bottom", fontsize=5, zorder=4)
        _draw_cell(axes, blueprint.cells[node][0], (x, y))
    for node, read in enumerate(blueprint.top):
        for value in (value for value in read if value):
            _arrow(axes, boxes[value - 1], boxes[node])
    axes.set_xlim(-radius - 0.8, radius + 0.8)
    axes.set_ylim(-radius - 0.8, radius + 0.8)


def _draw_cell(axes: Axes, middle: Sources, centre: Point) -> None:
    """The modules of a cell on a circle, in their order, with the edges between them."""
    points = on_a_circle(len(middle), centre, 0.4)
    for node, read in enumerate(middle):
        for value in (value for value in read if value):
            a, b = points[value - 1], points[node]
            arrow = FancyArrowPatch(
                a, b, shrinkA=3, shrinkB=3, arrowstyle="-|>", mutation_scale=4, color="#aaaaaa", lw=0.4, zorder=3
            )
            axes.add_patch(arrow)
    for point, colour in zip(points, role_colours(middle), strict=True):
        axes.plot(*point, "o", color=colour, markeredgecolor="#555555", markeredgewidth=0.3, markersize=5, zorder=4)


def _arrow(axes: Axes, start: tuple[Patch, Point], end: tuple[Patch, Point]) -> None:
    """From one cell to another, behind both."""
    arrow = FancyArrowPatch(
        start[1], end[1], patchA=start[0], patchB=end[0], arrowstyle="-|>", mutation_scale=8, color="#777777", lw=1.0,
        zorder=1,
    )  # fmt: skip
    axes.add_patch(arrow)
