"""A block graph in the DOT language: what the boxes say, their colours, and where they stand."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import networkx as nx
import pydot
from matplotlib.colors import LogNorm, Normalize, to_hex, to_rgb

from morph.block_graph import Vertex

Places = Mapping[str, tuple[float, float]]

_FONT = "Helvetica"
_CHARACTER, _LINE = 0.085, 0.185  # inches, roughly, at 11 points
_GAP_X, _GAP_Y = 0.85, 0.6  # inches between columns and between rows
_PAGE = 1.5  # width over height of a pleasant picture
_MOST_ABREAST = 4  # graphs with more vertices side by side than this are left to Graphviz
_DENSE = 3  # edges for each vertex from which on those are left out that a longer way stands for
_FILL = {"input": "#d9d9d9", "output": "#d9d9d9", "other": "#f0f0f0", "cell": "#ffffff"}
_GROWN = "#c7e9c0"
_DECADES = 30.0  # ratio of values from which on colours are logarithmic


def to_dot(graph: nx.DiGraph[str], value_name: str = "value") -> str:
    """Write a graph of `morph.block_graph.block_graph` in the DOT language: the same text for the same graph.

    A graph that is nearly a chain is folded into rows that run in turn to the right and to the left, at fixed places;
    others are left to Graphviz. In a dense graph (more than three edges for each vertex) those edges are left out for
    which a longer way exists.
    """
    vertices: dict[str, Vertex] = {name: data["vertex"] for name, data in graph.nodes(data=True)}
    texts = {name: _lines(vertex, value_name) for name, vertex in vertices.items()}
    drawn = _thinned(graph)
    places = _places(drawn, texts)
    colours = Colours(vertices.values())
    left_out = graph.number_of_edges() - drawn.number_of_edges()
    note = f"{left_out} edges are not drawn, since longer ways join the same boxes" if left_out else ""
    legend = _legend(colours, value_name, note)
    picture = pydot.Dot(graph_type="digraph", **legend, **_layout(drawn, places, texts))
    for name, vertex in vertices.items():
        at: dict[str, Any] = {"pos": _quoted("{:.2f},{:.2f}!".format(*places[name]))} if places else {}
        picture.add_node(pydot.Node(name, **_box(texts[name], colours.fill(vertex), vertex), **at))
    for a, b, data in drawn.edges(data=True):
        picture.add_edge(pydot.Edge(a, b, **_arrow(vertices[a], vertices[b], data["shapes"])))
    return str(picture.to_string())


def _box(lines: Iterable[str], fill: str, vertex: Vertex) -> dict[str, Any]:
    return {
        "label": "<" + "<BR/>".join(lines) + ">",
        "shape": "box",
        "style": _quoted("rounded,filled"),
        "fillcolor": _quoted(fill),
        "fontcolor": _quoted(ink(fill)),
        "fontname": _FONT,
        "fontsize": "11",
        "tooltip": _quoted(", ".join(vertex.modules) or vertex.title),
    }


def _arrow(a: Vertex, b: Vertex, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """An edge; it shows its shapes only where they are not that of the box it leaves."""
    text = ", ".join(map(_shape, shapes))
    tip = _quoted(f"{a.title} → {b.title}" + (f": {text}" if text else ""))
    label = "" if set(shapes) <= {a.shape} else text
    return {
        "label": f'"\\n{_quoted(label)[1:]}' if label else _quoted(""),  # the empty line keeps the text off the edge
        "fontname": _FONT,
        "fontsize": "9",
        "color": _quoted("#555555"),
        "arrowsize": "0.7",
        "tooltip": tip,
        "labeltooltip": tip,
    }


def _thinned(graph: nx.DiGraph[str]) -> nx.DiGraph[str]:
    """The graph, or, if it is dense, its transitive reduction."""
    if graph.number_of_edges() <= _DENSE * graph.number_of_nodes():
        return graph
    kept: nx.DiGraph[str] = nx.DiGraph()
    kept.add_nodes_from(graph)
    kept.add_edges_from((a, b, graph.edges[a, b]) for a, b in nx.transitive_reduction(graph).edges)
    return kept


# What a box says


def _lines(vertex: Vertex, value_name: str) -> list[str]:
    """The lines of a box, the title (one or more) in DOT's markup."""
    first, dots, last = vertex.title.partition(" … ")
    title = [*_broken(first), "…", *_broken(last)] if dots else _broken(first)
    facts = [
        "input" if vertex.kind == "input" else vertex.module_class,
        f"{vertex.params:,} parameters" if vertex.params else "",
        _shape(vertex.shape),
        "" if vertex.value is None else f"{value_name} {vertex.value:.3g}",
        vertex.growth,
    ]
    return [f"<B>{_markup(line)}</B>" for line in title] + [_markup(fact) for fact in facts if fact]


def _broken(path: str) -> list[str]:
    """A long path on two lines, broken after its last dot."""
    head, dot, tail = path.rpartition(".")
    return [head + dot, tail] if dot and len(path) > 22 else [path]


def _shape(shape: Iterable[int]) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, shape))


def _clean(text: str) -> str:
    """Text in which neither markup nor entities are special."""
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _markup(text: str) -> str:
    """Text for a label in DOT's markup, where a backslash before some letters cannot be escaped, only kept apart."""
    return _clean(text).replace("\\", "\\\N{WORD JOINER}")


def _quoted(text: str) -> str:
    """Text as a quoted string of the DOT language, in which nothing is special."""
    return '"' + _markup(text).replace("\\", "\\\\") + '"'


# Colours


class Colours:
    """The colour of each box: by value, from light to dark; without values, by whether the cell has grown."""

    def __init__(self, vertices: Iterable[Vertex]) -> None:
        cells = [vertex for vertex in vertices if vertex.kind == "cell"]
        values = [v.value for v in cells if v.value is not None and math.isfinite(v.value)]
        self.by_value = bool(values)
        self.grown = any(v.growth for v in cells)
        self.without = len(values) < len(cells)
        self.low, self.high = (min(values), max(values)) if values else (0.0, 1.0)
        logarithmic = self.low > 0 and self.high >= _DECADES * self.low
        self.norm = LogNorm(self.low, self.high) if logarithmic else Normalize(self.low, self.high)

    def of(self, value: float) -> str:
        """The colour of a value."""
        return str(to_hex(matplotlib.colormaps["YlGnBu"](0.05 + 0.8 * float(self.norm(value)))))

    def fill(self, vertex: Vertex) -> str:
        """The colour of a box."""
        if self.by_value:
            known = vertex.value is not None and math.isfinite(vertex.value)
            return self.of(vertex.value or 0.0) if known else _FILL[vertex.kind]
        return _GROWN if vertex.growth else _FILL[vertex.kind]

    def swatches(self) -> Iterator[tuple[str, str]]:
        """Pairs of a colour and what it stands for."""
        if self.by_value:
            steps = (0.0, 0.25, 0.5, 0.75, 1.0) if self.low < self.high else (0.0,)
            for value in (float(self.norm.inverse(step)) for step in steps):
                yield self.of(value), f"{value:.2g}"
            if self.without:
                yield _FILL["cell"], "none"
        elif self.grown:
            yield _GROWN, "grown"
            yield _FILL["cell"], "as before"


def ink(fill: str) -> str:
    """Black or white, whichever is easier to read on ``fill`` (WCAG 2.2, contrast by relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 >= 1.05 / (luminance + 0.05) else "white"


def _legend(colours: Colours, value_name: str, note: str) -> dict[str, Any]:
    """The graph's label: a row of swatches, and a line for the note."""
    cells = "".join(
        f'<TD BGCOLOR="{colour}" BORDER="1"><FONT COLOR="{ink(colour)}">&nbsp;{_markup(text)}&nbsp;</FONT></TD>'
        for colour, text in colours.swatches()
    )
    meaning = f"colour: {value_name}" if colours.by_value else "colour:"
    rows = f"<TR><TD>{_markup(meaning)}</TD>{cells}</TR>" if cells else ""
    rows += f'<TR><TD COLSPAN="8">{_markup(note)}</TD></TR>' if note else ""
    table = {"label": f'<<TABLE BORDER="0" CELLSPACING="4">{rows}</TABLE>>', "labelloc": "b"} if rows else {}
    return {"fontname": _FONT, "fontsize": "11", "bgcolor": _quoted("white"), **table}


# Places


def _pitch(texts: Mapping[str, list[str]]) -> tuple[float, float]:
    """Width and height of the place of one box, in inches."""
    lines = [line.removeprefix("<B>").removesuffix("</B>") for text in texts.values() for line in text]
    longest = max(len(html.unescape(line)) for line in lines)
    return longest * _CHARACTER + 0.25 + _GAP_X, max(map(len, texts.values())) * _LINE + 0.15 + _GAP_Y


def _places(graph: nx.DiGraph[str], texts: Mapping[str, list[str]]) -> dict[str, tuple[float, float]]:
    """Where each box stands, in inches, if the graph is nearly a chain; else nothing."""
    levels = [sorted(level, key=list(graph).index) for level in nx.topological_generations(graph)]
    most = max(map(len, levels), default=0)
    if most > _MOST_ABREAST:
        return {}
    width, height = _pitch(texts)
    columns = min(
        range(1, len(levels) + 1),
        key=lambda n: abs(math.log(n * width / (math.ceil(len(levels) / n) * height * most) / _PAGE)),
    )
    places: dict[str, tuple[float, float]] = {}
    top = 0.0
    for start in range(0, len(levels), columns):
        row = levels[start : start + columns]
        deep = max(map(len, row)) * height
        for i, level in enumerate(row):
            x = (i if start // columns % 2 == 0 else columns - 1 - i) * width
            for j, name in enumerate(level):
                places[name] = (x, top - deep * (j + 0.5) / len(level))
        top -= deep
    return places


def _layout(graph: nx.DiGraph[str], places: Places, texts: Mapping[str, list[str]]) -> dict[str, Any]:
    """How Graphviz shall place the boxes and lead the edges."""
    if places:
        return {"layout": "neato", "splines": "true", "esep": _quoted("+4"), "sep": _quoted("+6")}
    levels = list(nx.topological_generations(graph))
    width, height = _pitch(texts)
    long, most = len(levels), max(map(len, levels), default=1)
    down = abs(math.log(most * width / (long * height) / _PAGE))
    across = abs(math.log(long * width / (most * height) / _PAGE))
    return {"layout": "dot", "rankdir": "TB" if down <= across else "LR", "nodesep": "0.3", "ranksep": "0.5"}
