"""The traced graph of a model as a module that stands in for it, and constants in it that can be changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from morph.copying import own_copy
from morph.errors import PlanMismatchError
from morph.plan import SetConstant, SplitAt
from morph.tracing import trace_graph


def graph_of(model: nn.Module) -> fx.GraphModule:
    """The symbolic trace of a copy of ``model``; the training flags are those of the model.

    Raises:
        TraceError: If the model cannot be traced symbolically.
    """
    flags = {path: module.training for path, module in model.named_modules()}
    module = trace_graph(own_copy(model).eval())
    for path, child in module.named_modules():
        child.training = flags.get(path, model.training)
    return module


def set_constants(module: nn.Module, edits: Sequence[SetConstant | SplitAt]) -> None:
    """Change constants of the graph, in place.

    Raises:
        PlanMismatchError: If it is no graph, or a node does not exist.
    """
    if not isinstance(module, fx.GraphModule):
        raise PlanMismatchError("a plan that changes constants of the traced graph must first go on with that graph")
    nodes = {node.name: node for node in module.graph.nodes}
    for edit in edits:
        if edit.node not in nodes:
            raise PlanMismatchError(f"this plan was made for another model: its graph has no node {edit.node!r}")
        if isinstance(edit, SplitAt):
            split_at(nodes[edit.node], edit)
        else:
            set_slot(nodes[edit.node], edit.slot, edit.number)
    module.graph.lint()
    module.recompile()


def split_at(node: fx.Node, edit: SplitAt) -> None:
    """Make a node a split into parts of the given sizes."""
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (node.args[0], list(edit.sizes), edit.axis), {}


def slots(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """Every argument that is a constant or another node's result, with where it stands."""
    for i, value in enumerate(node.args):
        yield from _inside(f"args.{i}", value)
    for key, value in node.kwargs.items():
        yield from _inside(f"kwargs.{key}", value)


def _inside(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _inside(f"{place}.{i}", item)
    elif isinstance(value, slice):
        for i, item in enumerate((value.start, value.stop, value.step)):
            yield from _inside(f"{place}.{i}", item)
    else:
        yield place, value


def set_slot(node: fx.Node, slot: str, value: Any) -> None:
    """Put ``value`` where ``slot`` says."""
    first, key, *rest = slot.split(".")
    if first == "kwargs":
        node.kwargs = {**node.kwargs, key: _put(node.kwargs.get(key), rest, value)}
    else:
        args = list(node.args)
        args[int(key)] = _put(args[int(key)], rest, value)
        node.args = tuple(args)


def _put(holder: Any, path: list[str], value: Any) -> Any:
    """``holder`` with ``value`` at ``path``."""
    if not path:
        return value
    at = int(path[0])
    if isinstance(holder, slice):
        parts = [holder.start, holder.stop, holder.step]
        parts[at] = _put(parts[at], path[1:], value)
        return slice(*parts)
    items = list(holder)
    items[at] = _put(items[at], path[1:], value)
    return type(holder)(items) if type(holder) in (list, tuple) else items
