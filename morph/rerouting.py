"""Let nodes of a traced graph read other nodes, and take out what nobody reads any more."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from morph.errors import PlanMismatchError
from morph.in_place import Writings
from morph.plan import DropBranch, Reroute

INDEX = "morph_index_"
SHIFT = "morph_shift_"


def reroute(module: nn.Module, edits: Sequence[Reroute]) -> None:
    """Change what nodes read, in place.

    Raises:
        PlanMismatchError: If it is no graph, a node does not exist, or it does not read what the plan says.
    """
    module = _checked(module)
    graph, nodes = module.graph, {node.name: node for node in module.graph.nodes}
    writings = Writings(graph, module)
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
        written = any(writings.between(nodes[name], user) for name in edit.pieces)
        known = {} if written else made  # right behind its node a part would not have what is written there later
        parts = []
        for name, index in zip(edit.pieces, edit.indices, strict=True):
            with graph.inserting_before(user) if written else graph.inserting_after(nodes[name]):
                parts.append(_part(module, nodes[name], edit.axis, index, known))
        with graph.inserting_before(user) if written else graph.inserting_after(source):
            user.replace_input_with(source, _joined(graph, source, parts, edit.axis, known))
        left.append(source)
    _tidy(module, left)


def drop_branches(module: nn.Module, edits: Sequence[DropBranch]) -> None:
    """Take operands out of sums, in place.

    Raises:
        PlanMismatchError: If it is no graph, or a node does not exist, or it is no sum of what the plan says.
    """
    module = _checked(module)
    nodes = {node.name: node for node in module.graph.nodes}
    for edit in edits:
        node, source = nodes.get(edit.node), nodes.get(edit.source)
        if node is None or source is None:
            missing = edit.node if node is None else edit.source
            raise PlanMismatchError(f"this plan was made for another model: its graph has no node {missing!r}")
        if len(node.args) != 2 or source not in node.args or len(node.all_input_nodes) != 2:
            raise PlanMismatchError(
                f"this plan was made for another model: node {edit.node!r} does not add {edit.source!r} to another node"
            )
        if source not in _behind(module, edit.module):
            raise PlanMismatchError(
                f"this plan was made for another model: {edit.source!r} is not what {edit.module!r} leads to"
            )
        if len(edit.shift) not in (0, math.prod(edit.shape)):
            raise PlanMismatchError(f"{len(edit.shift)} numbers do not fill the shape {list(edit.shape)}")
        rest = next(other for other in node.all_input_nodes if other is not source)
        node.replace_all_uses_with(_shifted(module, node, rest, edit) if edit.shift else rest)
    _tidy(module, [nodes[edit.node] for edit in edits])


def _behind(module: fx.GraphModule, path: str) -> list[fx.Node]:
    """The node that calls a module, and those that follow one after another, each the only reader of the one before."""
    found = [node for node in module.graph.nodes if node.op == "call_module" and node.target == path]
    while found and len(found[-1].users) == 1:
        found.append(next(iter(found[-1].users)))
    return found


def _shifted(module: fx.GraphModule, node: fx.Node, rest: fx.Node, edit: DropBranch) -> fx.Node:
    """What is left of a sum: the other operand and a new parameter."""
    name = f"{SHIFT}{sum(n.startswith(SHIFT) for n in module._parameters)}"
    like = next(t for t in module.parameters() if t.is_floating_point())
    values = torch.tensor(edit.shift, dtype=like.dtype, device=like.device).reshape(edit.shape)
    module.register_parameter(name, nn.Parameter(values))
    with module.graph.inserting_before(node):
        return module.graph.call_function(operator.add, (rest, module.graph.get_attr(name)))


def _checked(module: nn.Module) -> fx.GraphModule:
    """The module as the graph that it must be."""
    if not isinstance(module, fx.GraphModule):
        raise PlanMismatchError("a plan that changes the traced graph must first go on with that graph")
    return module


def _tidy(module: fx.GraphModule, left: list[fx.Node]) -> None:
    """Take out what nobody reads any more."""
    _take_out(module.graph, left)
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()


def _part(
    module: fx.GraphModule, node: fx.Node, axis: int, index: tuple[int, ...], made: dict[object, fx.Node]
) -> fx.Node:
    """The positions ``index`` of a node, inserted where the graph is at; the node itself if the index is empty."""
    if not index:
        return node
    key = (node, axis, index)
    if key not in made:
        graph = module.graph
        run = index == tuple(range(index[0], index[0] + len(index)))
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
    """The parts one after another, inserted where the graph is at; readers of the same parts share them."""
    if len(parts) == 1:
        return parts[0]
    key = (source, axis, *parts)
    if key not in made:
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
