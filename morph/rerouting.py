"""Let nodes of a traced graph read other nodes, and take out what nobody reads any more."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn

from morph.errors import PlanMismatchError
from morph.plan import Reroute

INDEX = "morph_index_"


def reroute(module: nn.Module, edits: Sequence[Reroute]) -> None:
    """Change what nodes read, in place.

    Raises:
        PlanMismatchError: If it is no graph, a node does not exist, or it does not read what the plan says.
    """
    if not isinstance(module, fx.GraphModule):
        raise PlanMismatchError("a plan that changes the traced graph must first go on with that graph")
    graph = module.graph
    nodes = {node.name: node for node in graph.nodes}
    made: dict[object, fx.Node] = {}
    left: list[fx.Node] = []
    for edit in edits:
        missing = [n for n in (edit.node, edit.source, *edit.pieces) if n not in nodes]
        if missing or len(edit.pieces) != len(edit.indices):
            what = f"its graph has no node {missing[0]!r}" if missing else "a part has no positions"
            raise PlanMismatchError(f"this plan was made for another model: {what}")
        user, source = nodes[edit.node], nodes[edit.source]
        if source not in user.all_input_nodes:
            raise PlanMismatchError(
                f"this plan was made for another model: node {edit.node!r} does not read {edit.source!r}"
            )
        parts = [
            _part(module, nodes[name], edit.axis, index, made)
            for name, index in zip(edit.pieces, edit.indices, strict=True)
        ]
        user.replace_input_with(source, _joined(graph, source, parts, edit.axis, made))
        left.append(source)
    _take_out(graph, left)
    graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def _part(
    module: fx.GraphModule, node: fx.Node, axis: int, index: tuple[int, ...], made: dict[object, fx.Node]
) -> fx.Node:
    """The positions ``index`` of a node, right behind it; the node itself if the index is empty."""
    if not index:
        return node
    key = (node, axis, index)
    if key not in made:
        graph = module.graph
        run = index == tuple(range(index[0], index[0] + len(index)))
        with graph.inserting_after(node):
            if run:
                made[key] = graph.call_method("narrow", (node, axis, index[0], len(index)))
            else:
                name = f"{INDEX}{sum(n.startswith(INDEX) for n in module._buffers)}"
                device = next((t.device for t in module.parameters()), torch.device("cpu"))
                module.register_buffer(name, torch.tensor(index, dtype=torch.long, device=device), persistent=False)
                where = graph.get_attr(name)
                with graph.inserting_after(where):
                    made[key] = graph.call_method("index_select", (node, axis, where))
    return made[key]


def _joined(graph: fx.Graph, source: fx.Node, parts: list[fx.Node], axis: int, made: dict[object, fx.Node]) -> fx.Node:
    """The parts one after another; readers of the same parts share them."""
    if len(parts) == 1:
        return parts[0]
    key = (source, axis, *parts)
    if key not in made:
        with graph.inserting_after(source):
            made[key] = graph.call_function(torch.cat, (parts, axis))
    return made[key]


def _take_out(graph: fx.Graph, left: list[fx.Node]) -> None:
    """Erase nodes that lost their last reader, and what only they read."""
    todo = list(left)
    gone: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in gone or node.users or node.op in ("placeholder", "output"):
            continue
        inputs = list(node.all_input_nodes)
        gone.add(node)
        graph.erase_node(node)
        todo += inputs
