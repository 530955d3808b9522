"""Networks of a family: wiring, width, shapes, and what the passes make of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import morph
from morph.errors import DataError, FamilyError, TargetError
from morph.family.generator import Task, draw_network, fit_width
from morph.family.settings import RANGES, FamilySettings, settings_from
from morph.family.wiring import draw_blueprint
from morph.zoo.random_graph import Blueprint, Merge, RandomGraphNet, halvings, outputs_of, stage_of

SMALL = FamilySettings(3, 2, 0.5, 2, 0.5, 3, 2, 0.5)


def draw_settings(draws: random.Random) -> FamilySettings:
    """Anything within the ranges."""
    whole = {name: draws.randint(*map(int, ends)) for name, ends in RANGES.items() if isinstance(ends[0], int)}
    return FamilySettings(**{name: whole.get(name, draws.uniform(*ends)) for name, ends in RANGES.items()})


def graphs_of(blueprint: Blueprint):
    """All graphs of a blueprint, with their number of nodes as settings would have it."""
    yield "top", blueprint.top
    for middle, bottoms in blueprint.cells:
        yield "middle", middle
        for bottom in bottoms:
            yield "bottom", bottom


def directed(sources):
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(sources) + 1))
    graph.add_edges_from((value, node) for node, read in enumerate(sources, start=1) for value in read)
    return graph


def wrong_graph(sources) -> str | None:
    """What is wrong with a graph, if anything."""
    graph = directed(sources)
    if any(value >= node for value, node in graph.edges):
        return "an edge goes backwards"
    if set(graph) - {0} - nx.descendants(graph, 0):
        return "a node is not reached from the input"
    inner = graph.subgraph(set(graph) - {0})
    if not nx.is_connected(inner.to_undirected()):
        return "not connected"
    if any(0 in read and len(read) > 1 for read in sources):
        return "a node reads the input beside other nodes"
    return None


@pytest.mark.parametrize("seed", range(30))
def test_wiring_is_connected_and_runs_from_low_to_high(seed):
    settings = draw_settings(random.Random(seed))
    blueprint = draw_blueprint(settings, seed)
    nodes = {"top": settings.top_nodes, "middle": settings.middle_nodes, "bottom": settings.bottom_nodes}
    for level, sources in graphs_of(blueprint):
        assert wrong_graph(sources) is None
        assert len(sources) == nodes[level]
        if level != "middle":  # rewiring keeps the number of edges of the ring
            near = min(getattr(settings, f"{level}_neighbours"), nodes[level] - 1)
            assert sum(len([v for v in read if v]) for read in sources) == nodes[level] * (near // 2)
    assert blueprint.units == math.prod(nodes.values())
    assert draw_blueprint(settings, seed) == blueprint


def test_a_wrong_graph_is_seen():
    assert wrong_graph(((0,), (3,), (0,))) == "an edge goes backwards"
    assert wrong_graph(((0,), (0,), (1,))) == "not connected"
    assert wrong_graph(((0,), (), (1,))) == "a node is not reached from the input"
    assert wrong_graph(((0,), (0, 1))) == "a node reads the input beside other nodes"


def test_cells_have_wirings_of_their_own_and_seeds_give_other_networks():
    settings = FamilySettings(8, 4, 0.7, 5, 0.5, 6, 4, 0.7)
    blueprint = draw_blueprint(settings, 3)
    assert len({middle for middle, _ in blueprint.cells}) > 1
    assert len({bottom for _, bottoms in blueprint.cells for bottom in bottoms}) > 10
    assert len({draw_blueprint(settings, seed).top for seed in range(10)}) > 5


def test_the_least_likely_middle_graph_is_found():
    sources = draw_blueprint(replace(SMALL, middle_nodes=10, middle_probability=0.1), 0).cells[0][0]
    assert len(sources) == 10
    assert wrong_graph(sources) is None


def test_thirds_give_every_stage_nodes():
    assert [stage_of(node, 10) for node in range(10)] == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    for nodes in range(3, 11):
        stages = [stage_of(node, nodes) for node in range(nodes)]
        assert sorted(set(stages)) == [0, 1, 2]
        assert stages == sorted(stages)


def twin(net: RandomGraphNet, blueprint: Blueprint, x: torch.Tensor) -> torch.Tensor:
    """The network in evaluation mode, from the blueprint and the tensors alone."""
    state = net.state_dict()

    def norm(name, y):
        n, part = name, {k: state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        assert n
        scale = part["weight"] / torch.sqrt(part["running_var"] + 1e-5)
        return y * scale[:, None, None] + (part["bias"] - part["running_mean"] * scale)[:, None, None]

    def gather(values, read, name):
        if len(read) == 1:
            return values[read[0]]
        shares = 1 / (1 + torch.exp(-state[f"{name}.weight"]))
        return sum(share * values[v] for share, v in zip(shares, read, strict=True))

    def graph(name, sources, node, y):
        values = [y]
        for i, read in enumerate(sources):
            values.append(node(i, gather(values, read, f"{name}.merges.{i}")))
        return torch.stack([values[v] for v in outputs_of(sources)]).mean(0)

    def unit(name, y):
        return norm(f"{name}.2", F.conv2d(F.relu(y), state[f"{name}.1.weight"], padding=1))

    nodes = len(blueprint.top)
    first = F.relu(norm("stem.1", F.conv2d(x, state["stem.0.weight"], padding=1)))
    values = [norm("stem.4", F.conv2d(first, state["stem.3.weight"], padding=1))]
    stages = [0] + [3 * i // nodes for i in range(nodes)]

    def adapted(read, node, stage):
        out = dict(enumerate(values))
        for v in read:
            if stages[v] < stage:
                y = values[v]
                for _ in range(stage - stages[v]):
                    y = (y[..., ::2, ::2] + y[..., 1::2, ::2] + y[..., ::2, 1::2] + y[..., 1::2, 1::2]) / 4
                out[v] = F.conv2d(y, state[f"adapters.{v}_to_{node}.1.weight"])
        return out

    for i, (middle, bottoms) in enumerate(blueprint.cells):

        def module(j, y, i=i, bottoms=bottoms):
            name = f"cells.{i}.nodes.{j}"
            return graph(name, bottoms[j], lambda k, z: unit(f"{name}.nodes.{k}", z), y)

        read = blueprint.top[i]
        y = gather(adapted(read, i, stages[i + 1]), read, f"merges.{i}")
        values.append(graph(f"cells.{i}", middle, module, y))
    last = outputs_of(blueprint.top)
    out = adapted(last, nodes, 2)
    y = torch.stack([out[v] for v in last]).mean(0)
    y = F.relu(norm("head.2", F.conv2d(F.relu(y), state["head.1.weight"]))).mean((2, 3))
    return y @ state["classifier.weight"].T + state["classifier.bias"]


def randomised(net: nn.Module, seed: int) -> nn.Module:
    """The network in float64 and evaluation mode with no tensor at its value of birth."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor.ndim < 2 else torch.randn_like(tensor) * 0.3)
    return net.double().eval()


@pytest.mark.parametrize("seed", range(6))
def test_the_network_computes_what_its_blueprint_says(seed):
    settings = replace(draw_settings(random.Random(100 + seed)), middle_nodes=3, bottom_nodes=4)
    drawn = draw_network(settings, Task((3, 16, 16), 7, 60_000), seed)
    net = randomised(drawn.model, seed)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = twin(net, drawn.blueprint, x)
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        next(m for m in net.modules() if isinstance(m, Merge)).weight[0] += 0.1
    assert not torch.allclose(net(x), expected, rtol=1e-6)


def params_of(blueprint: Blueprint, width: int, classes: int) -> int:
    """Parameters by arithmetic, for RGB images of at most 40 pixels."""
    nodes = len(blueprint.top)
    stages = [0] + [3 * i // nodes for i in range(nodes)]
    channels = [width * 2**s for s in stages]
    total = 27 * width + 9 * width**2 + 4 * width
    for _, sources in graphs_of(blueprint):
        total += sum(len(read) for read in sources if len(read) > 1)
    for i, (_, bottoms) in enumerate(blueprint.cells, start=1):
        total += sum(len(b) for b in bottoms) * (9 * channels[i] ** 2 + 2 * channels[i])
        total += sum(channels[v] * channels[i] for v in blueprint.top[i - 1] if channels[v] != channels[i])
    total += sum(channels[v] * 4 * width for v in outputs_of(blueprint.top) if channels[v] != 4 * width)
    wide = min(1280, 16 * width)
    return total + 4 * width * wide + 2 * wide + (wide + 1) * classes


@pytest.mark.parametrize("limit", [40_000, 100_000, 1_000_000, 4_000_000, 6_000_000])
def test_the_width_is_the_largest_within_the_limit(limit):
    draws = random.Random(limit)
    for seed in range(3):
        settings = replace(draw_settings(draws), bottom_nodes=3, middle_nodes=draws.randint(1, 3))
        task = Task((3, 32, 32), 10, limit)
        blueprint = draw_blueprint(settings, seed)
        width, params = fit_width(blueprint, task)
        assert params == params_of(blueprint, width, 10) <= limit < params_of(blueprint, width + 1, 10)
        if limit <= 1_000_000:
            drawn = draw_network(settings, task, seed)
            assert sum(p.numel() for p in drawn.model.parameters()) == params == drawn.params


def test_a_limit_that_no_width_meets_is_refused_with_the_least():
    settings = FamilySettings(10, 5, 0.5, 10, 0.5, 10, 5, 0.5)
    least = params_of(draw_blueprint(settings, 0), 1, 10)
    with pytest.raises(TargetError, match=rf"1000 units with one channel has {least:,} parameters, the limit is 5,000"):
        draw_network(settings, Task((3, 32, 32), 10, 5000))


def test_drawing_is_deterministic_and_leaves_the_global_random_state():
    mixed = replace(SMALL, top_nodes=7, top_neighbours=4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = draw_network(mixed, Task((3, 32, 32), 10, 90_000), 7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = draw_network(mixed, Task((3, 32, 32), 10, 90_000), 7)
    third = draw_network(mixed, Task((3, 32, 32), 10, 90_000), 8)
    assert first.blueprint == second.blueprint != third.blueprint
    states = [drawn.model.state_dict() for drawn in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize(("side", "maps"), [(28, 28), (32, 32), (41, 21), (64, 32), (96, 24), (224, 28), (299, 38)])
def test_stages_halve_the_map_and_double_the_channels(side, maps):
    drawn = draw_network(SMALL, Task((3, side, side), 5, 50_000))
    shapes = []
    for cell in drawn.model.cells:
        cell.register_forward_hook(lambda m, i, y: shapes.append(tuple(y.shape[1:])))
    assert drawn.model.eval()(torch.randn(1, 3, side, side)).shape == (1, 5)
    width = drawn.width
    assert shapes == [(width << s, maps >> s, maps >> s) for s in range(3)]
    assert -(-side // 2 ** halvings(side)) == maps


def test_grey_images_and_one_node_inside():
    drawn = draw_network(replace(SMALL, middle_nodes=1), Task((1, 8, 12), 2, 9_000))
    assert drawn.model(torch.randn(4, 1, 8, 12)).shape == (4, 2)
    assert drawn.blueprint.units == 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_nodes": 2}, "top_nodes must lie between 3 and 10, got 2"),
        ({"top_nodes": 3.0}, "top_nodes must be a whole number from 3 to 10, got 3.0"),
        ({"bottom_rewiring": math.nan}, "bottom_rewiring must lie between 0.1 and 1.0, got nan"),
        ({"middle_probability": "0.5"}, "middle_probability must be a number from 0.1 to 1.0, got '0.5'"),
        ({"middle_nodes": True}, "middle_nodes must be a whole number"),
        ({"bottom_neighbours": 6}, "bottom_neighbours must lie between 2 and 5, got 6"),
    ],
)
def test_settings_outside_their_ranges_are_refused(change, message):
    with pytest.raises(FamilyError, match=message):
        replace(SMALL, **change)


def test_settings_from_a_mapping_name_what_is_wrong():
    assert settings_from(vars(SMALL)) == SMALL
    values = {**vars(SMALL), "depth": 3}
    del values["top_nodes"]
    with pytest.raises(FamilyError, match=r"top_nodes is missing; depth is not known"):
        settings_from(values)


@pytest.mark.parametrize("shape", [(3, 3, 32), (0, 32, 32), (32, 32)])
def test_tasks_without_images_are_refused(shape):
    with pytest.raises(DataError, match="images must be of shape"):
        Task(shape, 10, 10_000)
    with pytest.raises(DataError, match="there must be a class"):
        Task((3, 32, 32), 0, 10_000)


@pytest.mark.parametrize("seed", range(2))
def test_every_pass_works_on_the_networks(seed, tmp_path):
    settings = replace(draw_settings(random.Random(seed)), top_nodes=5, middle_nodes=3, bottom_nodes=3)
    net = draw_network(settings, Task((3, 16, 16), 10, 40_000), seed).model.eval()
    x = torch.randn(4, 3, 16, 16)
    expected = net(x)

    analysis = morph.analyse(net, x)
    assert not analysis.unknown
    assert analysis.free() > 0.95

    pruned = morph.prune(net, x, ratio=0.5)
    assert type(pruned.model) is RandomGraphNet
    assert pruned.record.checks[0].relative <= 1e-9
    assert pruned.record.after["params"] < pruned.record.before["params"] / 2

    wider = morph.widen(net, x, ratio=1.5).model
    assert type(wider) is RandomGraphNet
    torch.testing.assert_close(wider.double()(x.double()), net.double()(x.double()), rtol=1e-9, atol=1e-9)
    net.float()

    gated = morph.gate(net, x)
    assert torch.equal(gated.model.eval()(x), expected)
    assert torch.equal(net(x), expected)

    morph.save_model(pruned.model, tmp_path / "half.pt", input_shape=(3, 16, 16))
    opened = morph.open_model(tmp_path / "half.pt").model
    assert type(opened) is RandomGraphNet
    assert torch.equal(opened.eval()(x), pruned.model.eval()(x))
    assert morph.trace(net, x).graph_module is not None
