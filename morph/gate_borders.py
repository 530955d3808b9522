"""Borders: how far up a reader alone looks at channels, so that it may take fewer of them from there on."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import numpy as np
from torch import fx

from morph.analysis.atoms import Labels
from morph.analysis.borders import Border
from morph.in_place import writes_over
from morph.readers import Graphed, Reader

_BORDER = "morph_border_"


def top_edge(graph: Graphed, reader: Reader) -> tuple[str, str] | None:
    """The highest edge ``(source, node)`` that only ``reader`` lies behind, channel by channel; None at an input."""
    nodes = {node.name: node for node in graph.graph.graph.nodes}
    calls = collections.Counter(n.target for n in nodes.values() if n.op == "call_module")
    source, node = nodes[reader.source], nodes[reader.node]
    while source.op != "placeholder" and _channelwise(graph, source, reader, calls):
        node, source = source, source.all_input_nodes[0]
    return None if source.op == "placeholder" else (source.name, node.name)


def _channelwise(graph: Graphed, node: fx.Node, reader: Reader, calls: Mapping[object, int]) -> bool:
    """Whether a node hands each channel on by itself, to one node alone, so that a border can stand above it."""
    if len(node.users) != 1 or len(node.all_input_nodes) != 1:
        return False
    above, here = graph.roots(node.all_input_nodes[0].name), graph.roots(node.name)
    if min(len(above), len(here)) <= reader.axis or not here[reader.axis].all():
        return False
    if not np.array_equal(above[reader.axis], here[reader.axis]) or _mixes(graph, node, here[reader.axis]):
        return False
    module = graph.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is not None and calls[node.target] > 1 and any(True for _ in module.parameters()):
        return False
    shared = len(node.all_input_nodes[0].users) > 1
    return not (shared and writes_over(node, module))


def _mixes(graph: Graphed, node: fx.Node, roots: Labels) -> bool:
    """Whether a node sums over these channels, or computes a statistic over them."""
    if any(r.node == node.name and len(r.units) for r in graph.readers):
        return True
    state, calls = graph.analysis.state, graph.analysis.recording.calls
    path = str(node.target) if node.op == "call_module" else None
    read = [graph.values.get(n.name) for n in node.all_input_nodes]
    own = set(roots.tolist())
    over = [(s.call, s.value, labels) for s in state.statistics for labels in s.labels]
    over += [(s.call, value, state.tag(value).axes[axis]) for s in state.sums for value, axis in s.operands[:1]]
    return any(
        (calls[call].module == path or any(value is v for v in read))
        and not own.isdisjoint(state.atoms.find(labels).tolist())
        and not any(r.node == node.name for r in graph.readers)
        for call, value, labels in over
    )


def add_border(graph: fx.GraphModule, source: str, node: str, axis: int) -> str:
    """Put a border on the edge from ``source`` to ``node``, in place; gives the name of its node."""
    number = sum(isinstance(module, Border) for module in graph.modules())
    nodes = {n.name: n for n in graph.graph.nodes}
    graph.add_module(f"{_BORDER}{number}", Border(axis))
    with graph.graph.inserting_before(nodes[node]):
        border = graph.graph.call_module(f"{_BORDER}{number}", (nodes[source],))
    nodes[node].replace_input_with(nodes[source], border)
    return border.name
