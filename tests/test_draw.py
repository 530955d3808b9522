from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
import torch
import torchvision
from torch import Tensor, nn

from morph.block_graph import Vertex
from morph.blocks import find_cells
from morph.cli.main import main
from morph.dot import Colours, ink, to_dot
from morph.drawing import block_graph, draw, picture_format, render
from morph.errors import OutputError, PictureError, TraceError
from morph.tracing import Trace, trace
from morph.zoo.darts import DartsNet

TIMES = "\N{MULTIPLICATION SIGN}"
needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv2(torch.relu(self.conv1(x)))) + x)


class Skipping(nn.Module):
    """Blocks with a long shortcut, one of them called twice, and a parameter of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7))
        self.one, self.two = Block(7), Block(7)
        self.scale = nn.Parameter(torch.ones(7, 1, 1))
        self.side = nn.Conv2d(7, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        a = self.one(x)
        b = self.one(self.two(a) * self.scale)
        c = self.side(x) + b + a
        return self.head(nn.functional.adaptive_avg_pool2d(c, 1).flatten(1)), b


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.after = Block(3), Block(3), Block(3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.after(self.left(x) + self.right(y))


def darts(layers: int) -> DartsNet:
    return DartsNet(layers=layers, channels=4)


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=7)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], list[str] | None]] = {
    "darts": (lambda: darts(5), ((3, 32, 32),), None),
    "skipping": (Skipping, ((3, 11, 11),), None),
    "skipping at layers": (Skipping, ((3, 11, 11),), ["*.conv?"]),
    "skipping at nodes": (Skipping, ((3, 11, 11),), ["add*"]),
    "nested cells": (Skipping, ((3, 11, 11),), ["one", "one.conv2", "stem"]),
    "two inputs": (TwoInputs, ((3, 5, 5), (3, 5, 5)), None),
    "no blocks": (lambda: nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1)), ((3, 7, 7),), None),
    "no convolutions": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 2)), ((3, 2, 2),), None),
    "nothing to name": (nn.ReLU, ((3, 2, 2),), None),
    "resnet": (resnet, ((3, 32, 32),), None),
    "resnet inside": (resnet, ((3, 32, 32),), ["layer[12].*.conv?", "add_?"]),
    "half of the cells": (lambda: darts(7), ((3, 32, 32),), ["cells.[135]"]),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=7), ((3, 32, 32),), None),
    "densenet": (lambda: torchvision.models.DenseNet(4, (3, 4), 6, num_classes=5), ((3, 32, 32),), None),
}


@pytest.fixture(scope="module", params=MODELS)
def condensed(request: pytest.FixtureRequest) -> tuple[Trace, nx.DiGraph[str]]:
    build, shapes, at = MODELS[request.param]
    traced = trace(build(), tuple(torch.randn(2, *shape) for shape in shapes))
    return traced, block_graph(traced, None if at is None else find_cells(traced, at))


def vertices_of(graph: nx.DiGraph[str]) -> list[Vertex]:
    return [graph.nodes[name]["vertex"] for name in graph]


def titles(graph: nx.DiGraph[str]) -> list[str]:
    return [vertex.title for vertex in vertices_of(graph)]


def wrong_about(traced: Trace, graph: nx.DiGraph[str]) -> list[str]:
    """What is wrong with a block graph, found node by node on the fx graph."""
    nodes = list(traced.graph_module.graph.nodes)
    home = {member: name for name in graph for member in graph.nodes[name]["vertex"].members}
    faults = [f"{node} is in no vertex" for node in nodes if node.name not in home]
    faults += [] if sum(len(v.members) for v in vertices_of(graph)) == len(nodes) else ["a node is in two vertices"]
    faults += [] if nx.is_directed_acyclic_graph(graph) else ["there is a cycle"]
    needed: set[tuple[str, str]] = set()
    for node in nodes:
        for user in node.users:
            if home[node.name] != home[user.name]:
                needed.add((home[node.name], home[user.name]))
    faults += [f"edge {edge} is missing" for edge in needed - set(graph.edges)]
    return faults + [f"edge {edge} stands for nothing" for edge in set(graph.edges) - needed]


def reached(traced: Trace, start: Sequence[str]) -> set[str]:
    """Nodes that data from ``start`` can reach, by walking."""
    by_name = {node.name: node for node in traced.graph_module.graph.nodes}
    found, waiting = set[str](), list(start)
    while waiting:
        for user in by_name[waiting.pop()].users:
            if user.name not in found:
                found.add(user.name)
                waiting.append(user.name)
    return found


def test_the_graph_is_acyclic_and_complete(condensed: tuple[Trace, nx.DiGraph[str]]) -> None:
    assert wrong_about(*condensed) == []


def test_every_path_of_data_is_kept(condensed: tuple[Trace, nx.DiGraph[str]]) -> None:
    traced, graph = condensed
    for name in graph:
        far = reached(traced, graph.nodes[name]["vertex"].members)
        for other in graph:
            if other != name and far.intersection(graph.nodes[other]["vertex"].members):
                assert nx.has_path(graph, name, other)


def test_the_checker_rejects_wrong_graphs() -> None:
    traced = trace(darts(3), torch.randn(2, 3, 32, 32))
    good = block_graph(traced)
    for a, b in list(good.edges):
        bad = good.copy()
        bad.remove_edge(a, b)
        assert wrong_about(traced, bad) == [f"edge {(a, b)} is missing"]
    bad = good.copy()
    bad.add_edge("v3", "v1", shapes=())
    assert "there is a cycle" in wrong_about(traced, bad)


def test_edges_carry_the_shapes_that_pass(condensed: tuple[Trace, nx.DiGraph[str]]) -> None:
    traced, graph = condensed
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    for a, b, data in graph.edges(data=True):
        there = set(graph.nodes[b]["vertex"].members)
        leaving = [n for n in graph.nodes[a]["vertex"].members if there & {user.name for user in nodes[n].users}]
        assert set(data["shapes"]) == {traced.shapes[n][1:] for n in leaving if len(traced.shapes.get(n, ())) > 1}


def test_parameters_add_up() -> None:
    for model in (darts(5), resnet(), TwoInputs()):
        shapes = ((3, 32, 32), (3, 32, 32)) if isinstance(model, TwoInputs) else ((3, 32, 32),)
        graph = block_graph(trace(model, tuple(torch.randn(2, *shape) for shape in shapes)))
        unused = sum(p.numel() for name, p in model.named_parameters() if name.startswith("auxiliary."))
        assert sum(v.params for v in vertices_of(graph)) == sum(p.numel() for p in model.parameters()) - unused


def test_cells_stem_and_head_are_one_vertex_each() -> None:
    model = DartsNet(layers=10)
    graph = block_graph(trace(model, torch.randn(2, 3, 32, 32)))
    assert titles(graph) == ["x", "stem", *(f"cells.{i}" for i in range(10)), "pool … classifier", "output"]
    cells = [v for v in vertices_of(graph) if v.kind == "cell"]
    assert [v.params for v in cells] == [sum(p.numel() for p in cell.parameters()) for cell in model.cells]
    assert [v.shape for v in cells][::3] == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (256, 8, 8)]
    assert {v.module_class for v in cells} == {"Cell"}
    near = {(f"v{i}", f"v{i + 1}") for i in range(13)}
    assert set(graph.edges) == near | {(f"v{i}", f"v{i + 2}") for i in range(1, 10)}


def test_what_lies_between_is_named_and_merged() -> None:
    names = titles(block_graph(trace(resnet(), torch.randn(2, 3, 32, 32))))
    assert names[:3] == ["x", "conv1 … maxpool", "layer1.0"]
    assert names[-3:] == ["layer4.1", "avgpool … fc", "output"]
    densenet = torchvision.models.DenseNet(4, (3, 4), 6, num_classes=5)
    names = titles(block_graph(trace(densenet, torch.randn(2, 3, 32, 32))))
    assert [name for name in names if "denselayer" not in name] == [
        "x",
        "features.conv0 … features.pool0",
        "features.transition1",
        "features.norm5 … classifier",
        "output",
    ]


def test_nodes_without_a_kernel_are_folded_into_their_neighbour() -> None:
    first = nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.MaxPool2d(2)
    model = nn.Sequential(*first, nn.Conv2d(5, 2, 1), nn.ReLU())
    graph = block_graph(trace(model, torch.randn(2, 3, 8, 8)))
    assert [(v.title, v.modules) for v in vertices_of(graph)] == [
        ("input_1", ()),
        ("1", ("0", "1", "2", "3")),
        ("4", ("4", "5")),
        ("output", ()),
    ]
    assert graph.nodes["v1"]["vertex"].shape == (5, 6, 6)  # of the convolution itself
    assert graph.edges["v1", "v2"]["shapes"] == ((5, 3, 3),)  # of what comes out after pooling


def test_a_cell_that_is_called_twice_has_two_vertices() -> None:
    traced = trace(Skipping(), torch.randn(2, 3, 11, 11))
    graph = block_graph(traced, values={"one": 0.5, "two": 0.25}, notes={"one": "groups 4 → 1"})
    found = {v.title: (v.value, v.growth) for v in vertices_of(graph) if v.kind == "cell"}
    assert found == {"one": (0.5, "groups 4 → 1"), "two": (0.25, ""), "one (2)": (0.5, "groups 4 → 1")}
    assert len({v.params for v in vertices_of(graph) if v.title.startswith("one")}) == 1


def test_the_model_is_not_touched(tmp_path: Path) -> None:
    model = darts(3)
    model.cells[1].eval()
    state, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    draw(model, tmp_path / "p.dot", inputs=torch.randn(2, 3, 32, 32))
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# The text of the picture


def chain(count: int, **changes: object) -> nx.DiGraph[str]:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for i in range(count):
        facts = {
            "title": f"cells.{i}",
            "kind": "cell",
            "module_class": "Cell",
            "params": 1234,
            "shape": (3, 5, 7),
            "members": (f"n{i}",),
            "modules": (f"cells.{i}.conv",),
            **changes,
        }
        graph.add_node(f"v{i}", vertex=Vertex(**facts))  # type: ignore[arg-type]
        if i:
            graph.add_edge(f"v{i - 1}", f"v{i}", shapes=((3, 5, 7),))
    return graph


def fills(text: str) -> dict[str, str]:
    return dict(re.findall(r'^(v\d+) \[.*?fillcolor="(#\w+)"', text, re.MULTILINE))


def test_the_text_is_the_same_twice() -> None:
    texts = []
    for _ in range(2):
        traced = trace(darts(5), torch.randn(2, 3, 32, 32))
        texts.append(to_dot(block_graph(traced, values={"cells.0": 1.0, "cells.1": 2.0}), "score"))
    assert texts[0] == texts[1]
    assert texts[0] != to_dot(block_graph(traced), "score")


def test_colours_go_from_light_to_dark_with_the_value() -> None:
    names = [f"cells.{i}" for i in range(5)]
    values = dict(zip(names, [3.0, 1.0, 4.0, 1.5, 9.0], strict=True))
    text = to_dot(block_graph(trace(darts(5), torch.randn(2, 3, 32, 32)), values=values), "Fisher score")
    colours = [fills(text)[f"v{i + 2}"] for i in range(5)]
    assert len(set(colours)) == 5

    def light(colour: str) -> int:
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    by_value = [colour for _, colour in sorted(zip(values.values(), colours, strict=True))]
    assert [light(c) for c in by_value] == sorted((light(c) for c in by_value), reverse=True)
    assert "colour: Fisher score" in text
    assert all(f"Fisher score {value:.3g}" in text for value in values.values())


def test_values_over_decades_are_spread_by_their_logarithm() -> None:
    vertices = [Vertex(str(v), "cell", "", 0, (), (), (), v) for v in (1e-5, 1e-3, 1e-1)]
    colours = [Colours(vertices).fill(v) for v in vertices]
    even = [Vertex(str(v), "cell", "", 0, (), (), (), v) for v in (1.0, 2.0, 3.0)]
    assert colours == [Colours(even).fill(v) for v in even]
    with_zero = [*vertices, Vertex("0", "cell", "", 0, (), (), (), 0.0)]
    assert Colours(with_zero).fill(with_zero[-1]) == colours[0]


def test_cells_without_a_value_stay_white_and_the_legend_says_so() -> None:
    vertices = [Vertex("a", "cell", "", 0, (), (), (), 2.0), Vertex("b", "cell", "", 0, (), (), ())]
    nan = Vertex("c", "cell", "", 0, (), (), (), float("nan"))
    colours = Colours([*vertices, nan])
    assert colours.fill(vertices[1]) == colours.fill(nan) == "#ffffff" != colours.fill(vertices[0])
    assert list(colours.swatches()) == [(colours.of(2.0), "2"), ("#ffffff", "none")]


def test_without_values_the_cells_that_grew_are_coloured() -> None:
    text = to_dot(block_graph(trace(darts(3), torch.randn(2, 3, 32, 32)), notes={"cells.1": "groups 4 → 1"}))
    found = fills(text)
    assert found["v3"] == "#c7e9c0"
    assert found["v2"] == found["v4"] == "#ffffff"
    assert "groups 4 → 1" in text
    assert "grown" in text
    assert "TABLE" not in to_dot(chain(3))  # nothing coloured, no legend


def test_text_is_readable_on_every_colour() -> None:
    assert ink("#ffffff") == "black"
    assert ink("#000000") == "white"
    assert ink("#253494") == "white"
    assert ink("#ffffcc") == "black"


def positions(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'pos="(-?[\d.]+),(-?[\d.]+)!"', text)]


@pytest.mark.parametrize("count", [1, 4, 14, 29, 65])
def test_chains_are_folded_to_a_page(count: int) -> None:
    places = positions(to_dot(chain(count)))
    assert len(set(places)) == count
    columns, rows = len({x for x, _ in places}), len({y for _, y in places})
    if count > 4:
        assert 0.5 < columns * 2.2 / (rows * 1.4) < 4
    steps = [abs(x - u) + abs(y - v) for (x, y), (u, v) in pairwise(places)]
    assert all(step < 3 for step in steps)  # each box is beside or below the one before


def test_wide_graphs_are_left_to_graphviz() -> None:
    graph = chain(2)
    for i in range(2, 8):
        graph.add_node(f"v{i}", vertex=Vertex(f"cells.{i}", "cell", "", 0, (), (), ()))
        graph.add_edge("v0", f"v{i}", shapes=())
    text = to_dot(graph)
    assert "layout=dot" in text
    assert positions(text) == []


def test_dense_graphs_lose_edges_but_no_path_and_say_so() -> None:
    graph = chain(12)
    graph.add_edges_from(((f"v{i}", f"v{j}") for i in range(12) for j in range(i + 1, 12)), shapes=((3, 5, 7),))
    text = to_dot(graph)
    assert len(re.findall(r"^v\d+ -> v\d+", text, re.MULTILINE)) == 11
    assert "55 edges are not drawn" in text
    assert graph.number_of_edges() == 66
    assert "not drawn" not in to_dot(chain(12))


def test_an_edge_shows_its_shape_only_where_that_is_news() -> None:
    graph = chain(3)
    graph.edges["v1", "v2"]["shapes"] = ((3, 2, 2),)
    text = to_dot(graph)
    assert re.findall(r'v\d -> v\d .*?label="(.*?)"', text) == ["", f"\\n3 {TIMES} 2 {TIMES} 2"]
    assert f"cells.0 → cells.1: 3 {TIMES} 5 {TIMES} 7" in text


# Files


ODD = 'a:b "quoted" <b>&amp; {x|y} \\n \\N 100% é \x01'


def odd_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))


@needs_graphviz
def test_odd_characters_stand_for_themselves(tmp_path: Path) -> None:
    graph = chain(3, title=ODD, module_class="<Odd>&", growth='groups "2" → 1', modules=(ODD,))
    graph.nodes["v1"]["vertex"] = Vertex("graph", "cell", "", 0, (), (), ("node",))
    render(graph, tmp_path / "p.svg", value_name='<&">')
    root = ET.parse(tmp_path / "p.svg").getroot()
    texts = [
        "".join(e.itertext()).replace("\N{WORD JOINER}", "") for e in root.iter("{http://www.w3.org/2000/svg}text")
    ]
    shown = [" ".join(text.split()) for text in texts]
    plain = " ".join(ODD.replace("\x01", "\N{REPLACEMENT CHARACTER}").split())
    assert shown.count(plain) == 2
    assert "<Odd>&" in shown
    assert 'groups "2" → 1' in shown
    tips = [e.get("{http://www.w3.org/1999/xlink}title", "") for e in root.iter("{http://www.w3.org/2000/svg}a")]
    assert [" ".join(tip.replace("\N{WORD JOINER}", "").split()) for tip in tips].count(plain) == 2


@needs_graphviz
@pytest.mark.parametrize(
    ("suffix", "magic"), [(".svg", b"<?xml"), (".png", b"\x89PNG\r\n\x1a\n"), (".pdf", b"%PDF"), (".dot", b"digraph")]
)
def test_files_have_the_format_of_their_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"p{suffix}"
    draw(odd_model(), path, inputs=torch.randn(2, 3, 5, 5), values={"0": 1.0, "2": 3.0}, notes={"0": "grown"})
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@needs_graphviz
def test_the_dot_file_gives_the_same_picture(tmp_path: Path) -> None:
    graph = block_graph(trace(darts(4), torch.randn(2, 3, 32, 32)))
    render(graph, tmp_path / "p.svg")
    render(graph, tmp_path / "p.dot")
    done = subprocess.run(["dot", "-Tsvg", str(tmp_path / "p.dot")], capture_output=True, check=True)
    assert done.stdout == (tmp_path / "p.svg").read_bytes()
    assert done.stderr == b""


@needs_graphviz
def test_edges_go_around_boxes(tmp_path: Path) -> None:
    graph = block_graph(trace(darts(4), torch.randn(2, 3, 32, 32)))
    done = subprocess.run(["dot", "-Tjson"], input=to_dot(graph).encode(), capture_output=True, check=True)
    drawn = json.loads(done.stdout)
    boxes = {
        o["_gvid"]: (*map(float, o["pos"].split(",")), float(o["width"]) * 36, float(o["height"]) * 36)
        for o in drawn["objects"]
    }
    for edge in drawn["edges"]:
        points = [tuple(map(float, p.split(","))) for p in edge["pos"].removeprefix("e,").split()[1:]]
        ends = {edge["tail"], edge["head"]}
        for i, (x, y, half_width, half_height) in boxes.items():
            if i not in ends:
                for t in range(21):
                    u, v = curve(points, t / 20)
                    assert not (abs(u - x) < half_width * 0.95 and abs(v - y) < half_height * 0.95)


def curve(points: Sequence[tuple[float, ...]], t: float) -> tuple[float, float]:
    """A point of a chain of cubic Bezier curves."""
    pieces = (len(points) - 1) // 3
    piece = min(int(t * pieces), pieces - 1)
    s = t * pieces - piece
    weights = ((1 - s) ** 3, 3 * s * (1 - s) ** 2, 3 * s * s * (1 - s), s**3)
    part = points[3 * piece : 3 * piece + 4]
    x, y = (sum(w * p[axis] for w, p in zip(weights, part, strict=True)) for axis in (0, 1))
    return x, y


def test_unknown_suffixes_and_missing_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"p\.jpg: the suffix does not say a format; end the name in \.svg"):
        draw(odd_model(), tmp_path / "p.jpg", inputs=torch.randn(2, 3, 5, 5))
    with pytest.raises(PictureError, match="Sequential cannot be drawn without inputs; give inputs="):
        draw(odd_model(), tmp_path / "p.dot")
    with pytest.raises(TraceError, match="does not accept inputs of shape"):
        draw(odd_model(), tmp_path / "p.dot", inputs=torch.randn(2, 4, 5, 5))
    assert not list(tmp_path.iterdir())


def test_without_graphviz_only_dot_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for suffix in (".svg", ".png", ".pdf"):
        with pytest.raises(PictureError, match=r"no program 'dot' on the PATH; install Graphviz \(apt install"):
            draw(odd_model(), tmp_path / f"p{suffix}", inputs=torch.randn(2, 3, 5, 5))
    assert not list(tmp_path.iterdir())
    assert picture_format(tmp_path / "p.DOT") == "dot"
    draw(odd_model(), tmp_path / "p.dot", inputs=torch.randn(2, 3, 5, 5))
    assert (tmp_path / "p.dot").read_text().startswith("digraph")


@pytest.mark.parametrize("script", ["echo 'syntax error near <here>' >&2; exit 3", "exit 0"])
def test_a_failure_of_graphviz_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], script: str
) -> None:
    programs, pictures = tmp_path / "programs", tmp_path / "pictures"
    programs.mkdir()
    pictures.mkdir()
    (programs / "dot").write_text(f"#!/bin/sh\n/bin/cat > /dev/null\n{script}\n")
    (programs / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    (pictures / "p.svg").write_text("old")
    said = "syntax error near <here>" if "echo" in script else "exit status 0"
    with pytest.raises(PictureError, match=rf"p\.svg: Graphviz failed: {said}; write a \.dot file instead") as caught:
        render(chain(3), pictures / "p.svg", force=True)
    assert "\n" not in str(caught.value)
    assert (pictures / "p.svg").read_text() == "old"
    assert [p.name for p in pictures.iterdir()] == ["p.svg"]
    assert capfd.readouterr() == ("", "")


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "p.dot"
    path.write_text("old")
    with pytest.raises(OutputError, match=r"p\.dot: exists already; give another name, or --force to replace it"):
        render(chain(2), path)
    assert path.read_text() == "old"
    render(chain(2), path, force=True)
    assert path.read_text().startswith("digraph")


# The command


def record(path: Path, names: Sequence[str], **changes: object) -> Path:
    rows = [
        {"name": name, "score": 10.0**-i, "groups_before": 16, "groups_after": 2, "params_added": 5 * i, **changes}
        for i, name in enumerate(names)
    ]
    path.write_text(json.dumps({"schema": 1, "cells": rows}))
    return path


def test_the_command_draws_a_zoo_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.dot"
    assert main(["draw", "zoo:darts-10", "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": 1, "out": str(out), "vertices": 14, "edges": 22}
    assert main(["draw", "zoo:darts-10", "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"morph: {out}: exists already; give another name, or --force to replace it\n"
    assert main(["draw", "zoo:darts-10", "--out", str(out), "--force", "--at", "cells.[0-4]"]) == 0
    assert capsys.readouterr().out == f"written: {out} (9 boxes, 13 edges)\n"


def test_the_command_draws_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.dot"
    sheet = record(tmp_path / "r.json", [f"cells.{i}" for i in range(10)])
    assert main(["draw", "zoo:darts-10", "--out", str(out), "--record", str(sheet)]) == 0
    text = out.read_text()
    assert text.count("groups 16 → 2") == 10
    assert "colour: Fisher score" in text
    assert len({fills(text)[f"v{i + 2}"] for i in range(10)}) == 10
    record(sheet, ["cells.1"], score=None, groups_before=None, groups_after=None)
    assert main(["draw", "zoo:darts-10", "--out", str(out), "--record", str(sheet), "--force"]) == 0
    assert "colour" not in out.read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, [], "No such file or directory; give a record written by morph expand"),
        ("{", [], r"not JSON \(.*\); give a record written by morph expand"),
        ("[]", [], "has no cells with scores and groups; give a record written by morph expand"),
        ('{"cells": []}', [], "has no cells with scores and groups"),
        ('{"cells": [{"name": "cells.0", "score": "high"}]}', [], "has no cells with scores and groups"),
        ("cells.77", [], "its cell cells.77 is not in zoo:darts-10; give the model it is of"),
        ("cells.0", ["--at", "cells.1"], "its cell cells.0 is not drawn with this --at; leave --at away"),
    ],
)
def test_the_command_refuses_records_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, arguments: list[str], said: str
) -> None:
    sheet = tmp_path / "r.json"
    if content is not None:
        sheet.write_text(content)
    if content is not None and content.startswith("cells."):
        record(sheet, [content])
    out = tmp_path / "p.dot"
    assert main(["draw", "zoo:darts-10", "--out", str(out), "--record", str(sheet), *arguments]) == 2
    assert re.fullmatch(f"morph: {re.escape(str(sheet))}: {said}.*\n", capsys.readouterr().err)
    assert not out.exists()


def test_the_command_names_the_picture_after_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["draw", "zoo:darts-10"]) == 2
    assert capsys.readouterr().err.startswith("morph: darts-10.svg: no program 'dot' on the PATH; install Graphviz")
