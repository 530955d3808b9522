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
_CELL, _GAP = 1.0, 0.55  # of the side of a cell, and between two

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
    places = {name: cell_places(blueprint.top) for name, blueprint in networks.items()}
    wide = [max(x for x, _ in found) + _CELL + _GAP for found in places.values()]
    high = max(max(y for _, y in found) - min(y for _, y in found) + 2 * _CELL for found in places.values())
    figure = Figure(figsize=(max(6.0, 1.15 * sum(wide)), 1.15 * high + 1.2))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, parse_math=False, y=0.98)
    at, total = 0.01, sum(wide)
    for (name, blueprint), width in zip(networks.items(), wide, strict=True):
        share = 0.98 * width / total
        axes = figure.add_axes((at, 0.12, share * 0.97, 0.72))
        at += share
        _draw_network(axes, blueprint, places[name])
        axes.set_title(name, fontsize=9, parse_math=False)
    kinds = {"input": _INPUT, "output": _OUTPUT, "input and output": _BOTH, "operation": _BETWEEN}
    handles = [Patch(facecolor=colour, edgecolor="#555555", label=what) for what, colour in kinds.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def cell_places(sources: Sources) -> list[Point]:
    """Lower left corners of cells: to the right by how many lie before, and those of one depth above one another."""
    depths = depths_of(sources)
    places: list[Point] = []
    for node, depth in enumerate(depths):
        same = [other for other, found in enumerate(depths) if found == depth]
        shift = same.index(node) - (len(same) - 1) / 2
        # A little off the axis, so that arrows past a cell do not run through it.
        places.append((depth * (_CELL + _GAP), shift * (_CELL + _GAP) + 0.25 * math.sin(2.4 * depth)))
    return places


def depths_of(sources: Sources) -> list[int]:
    """For each node the length of the longest way from the input to it."""
    depths: list[int] = []
    for read in sources:
        depths.append(max((depths[value - 1] + 1 for value in read if value), default=0))
    return depths


def role_colours(sources: Sources) -> list[str]:
    """A colour for each node, by what it is in its graph."""
    ends = set(outputs_of(sources))
    colours = []
    for number, read in enumerate(sources, start=1):
        first, last = 0 in read, number in ends
        colours.append(_BOTH if first and last else _INPUT if first else _OUTPUT if last else _BETWEEN)
    return colours


def _draw_network(axes: Axes, blueprint: Blueprint, places: list[Point]) -> None:
    """Cells, arrows between them, and what is inside."""
    axes.set_axis_off()
    axes.set_aspect("equal")
    cells = len(places)
    edges = role_colours(blueprint.top)
    for node, ((x, y), (middle, _)) in enumerate(zip(places, blueprint.cells, strict=True)):
        shade = _STAGES[stage_of(node, cells)]
        axes.add_patch(
            FancyBboxPatch((x, y), _CELL, _CELL, boxstyle="round,pad=0.06", fc=shade, ec=edges[node], lw=2.0)
        )
        axes.text(x + _CELL / 2, y - 0.1, f"cell {node}", ha="center", va="top", fontsize=5)
        _draw_cell(axes, middle, (x, y))
    for node, read in enumerate(blueprint.top):
        for value in read:
            if value:
                _arrow(axes, _right(places[value - 1]), _left(places[node]), "#777777", 0.9, 0.12 * (node - value))
    xs, ys = [x for x, _ in places], [y for _, y in places]
    axes.set_xlim(min(xs) - 0.3, max(xs) + _CELL + 0.3)
    axes.set_ylim(min(ys) - 0.5, max(ys) + _CELL + 0.3)


def _draw_cell(axes: Axes, middle: Sources, corner: Point) -> None:
    """The modules of a cell on a circle, in their order, with the edges between them."""
    number, radius = len(middle), 0.36
    centre = (corner[0] + _CELL / 2, corner[1] + _CELL / 2)
    angles = [math.pi - 2 * math.pi * i / number for i in range(number)]
    points = [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles]
    if number == 1:
        points = [centre]
    for node, read in enumerate(middle):
        for value in read:
            if value:
                _arrow(axes, points[value - 1], points[node], "#999999", 0.4, 0.0, 3.0)
    for point, colour in zip(points, role_colours(middle), strict=True):
        axes.plot(*point, "o", color=colour, markeredgecolor="#555555", markeredgewidth=0.3, markersize=5)


def _right(corner: Point) -> Point:
    return corner[0] + _CELL + 0.06, corner[1] + _CELL / 2


def _left(corner: Point) -> Point:
    return corner[0] - 0.06, corner[1] + _CELL / 2


def _arrow(axes: Axes, a: Point, b: Point, colour: str, width: float, bend: float, shrink: float = 0.0) -> None:
    style = f"arc3,rad={max(-0.35, min(0.35, bend))}"
    axes.add_patch(
        FancyArrowPatch(
            a, b, arrowstyle="-|>", mutation_scale=4 + 3 * width, color=colour, lw=width, connectionstyle=style,
            shrinkA=shrink, shrinkB=shrink,
        )
    )  # fmt: skip
