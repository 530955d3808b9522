"""The plan that takes closed gates out: cut tensors, and readers that read parts of what they read before."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from morph.analysis import analyse
from morph.analysis.atoms import Labels
from morph.analysis.edits import times_of
from morph.analysis.group_counts import new_groups
from morph.analysis.recording import Inputs, Value, skeleton
from morph.branches import Branch, constant_of
from morph.carriers import Carried, Carrier
from morph.errors import EditError
from morph.gate_sites import Layout
from morph.graph_fitting import mend
from morph.graphs import graph_of
from morph.heads import attention_edits, set_sizes
from morph.in_place import Writings
from morph.liveness import Closing
from morph.plan import DropBranch, Edit, Plan, Reroute, Resize, SetAttribute, UseGraph
from morph.readers import Graphed
from morph.recurrent import recurrent_edits
from morph.rerouting import drop_branches, reroute
from morph.resizing import resized

_CATS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Removal:
    """How gates are taken out.

    Attributes:
        resizes: The tensors that change.
        groups: Numbers of groups that change.
        reroutes: Readers that read parts; empty if every reader reads all that its source still has.
        drops: Sums that go without one of their operands.
        gone: Names of the tensors that leave with layers that nobody needs.
        tensors: Names of all tensors that the graph uses.
    """

    resizes: tuple[Resize, ...]
    groups: tuple[SetAttribute, ...]
    reroutes: tuple[Reroute, ...]
    drops: tuple[DropBranch, ...]
    gone: tuple[str, ...]
    tensors: tuple[str, ...]


def plan_removal(layout: Layout, closing: Closing, gates: Mapping[str, Tensor], model: nn.Module) -> Removal:
    """Find what changes.

    Args:
        layout: The sites.
        closing: What goes.
        gates: The gates of each site ``[k]``, zero where closed; what is not one goes into the readers' weights.
        model: Holds the weights; not touched.
    """
    run, times = layout.bordered, closing.times
    scales = dict(_scales(layout, gates))
    resizes: list[Resize] = []
    gone = []
    sources = run.analysis.recording.sources
    for name, value in sources.items():
        kept = [np.flatnonzero(times[labels]) for labels in run.analysis.state.tag(value).axes]
        if name in closing.leaving:
            gone.append(name)
            continue
        for axis, (index, size) in enumerate(zip(kept, value.shape, strict=True)):
            scale = scales.get((name, axis), np.ones(size))[index]
            if len(index) < size or (scale != 1).any():
                factors = tuple(scale.tolist()) if (scale != 1).any() else ()
                resizes.append(Resize(name, axis, size, tuple(index.tolist()), factors))
    left = set(closing.dead)
    groups = tuple(g for g in new_groups(model, run.analysis, times) if g.module not in left and g.new)
    nodes = {branch.reader.node for branch in closing.dropped}
    reroutes = tuple(_reroutes(layout, run, times, nodes)) if isinstance(run, Graphed) else ()
    drops = tuple(_drop(branch, model, times) for branch in closing.dropped)
    return Removal(tuple(resizes), groups, reroutes, drops, tuple(gone), tuple(sources))


def _drop(branch: Branch, model: nn.Module, times: Labels) -> DropBranch:
    """The edit that drops a branch, with what it would still have added."""
    reader = branch.reader
    shift = constant_of(branch, model)[times[reader.made] != 0] if branch.shifts else torch.zeros(0)
    shape = (int((times[reader.made] != 0).sum()), *(1,) * (len(reader.shape) - 1 - reader.axis))
    return DropBranch(branch.addition, branch.chain[-1], reader.path, shape, tuple(shift.tolist()))


def graph_plan(layout: Layout, closing: Closing, removal: Removal, model: fx.GraphModule) -> Plan:
    """The whole plan for the traced graph, with the constants that go with it.

    Args:
        layout: The sites.
        closing: What goes.
        removal: What changes.
        model: The traced graph before, without data; changed in place.

    Raises:
        EditError: If the graph cannot carry the new sizes.
    """
    cut = resized(model, removal.resizes)
    assert isinstance(cut, fx.GraphModule)
    groups = [g for g in removal.groups if hasattr(cut.get_submodule(g.module), g.attribute)]  # not looked through
    inside = [*attention_edits(model, removal.resizes), *recurrent_edits(model, removal.resizes)]
    sizes = [*groups, *inside]
    set_sizes(cut, sizes)
    if removal.reroutes:
        reroute(cut, removal.reroutes)
    if removal.drops:
        drop_branches(cut, removal.drops)
    graph = layout.bordered
    assert isinstance(graph, Graphed)
    constants, misfit = mend(cut, graph.values, graph.analysis.state, closing.times, graph.inputs)
    if misfit is not None:
        raise EditError(
            f"the traced graph cannot carry the removal: {misfit.reason} (in {misfit.module or 'the model'})"
        )
    everything: list[Edit] = [UseGraph("symbolic"), *removal.resizes, *sizes]
    everything += [*removal.reroutes, *removal.drops, *constants]
    return Plan(tuple(everything))


def class_plan(model: nn.Module, inputs: Inputs, removal: Removal) -> Plan | str:
    """The plan for the model's own class; or why there is none.

    Args:
        model: The model before; not touched.
        inputs: Example inputs.
        removal: What changes.
    """
    if removal.reroutes:
        return "readers read parts of what their sources give"
    if removal.gone:
        return "layers that nobody reads leave"
    analysis = analyse(model, inputs)
    if set(removal.tensors) != set(analysis.recording.sources):
        return "parts of it are used in training alone"
    times = times_of(analysis.state, removal.resizes)
    for edit in removal.resizes:
        roots = analysis.roots(analysis.recording.sources[edit.tensor])[edit.axis]
        gone = np.setdiff1d(np.arange(edit.size), edit.index)
        if not roots[gone].all() or tuple(np.flatnonzero(times[roots]).tolist()) != edit.index:
            return f"{edit.tensor} cannot be cut like that in the class"
    found = Carrier(model, inputs, analysis, "class").carry(removal.resizes, times)
    return found.plan if isinstance(found, Carried) else f"{found.reason} (in {found.module or 'the model'})"


def bare_graph(model: nn.Module) -> fx.GraphModule:
    """The traced graph of a model, without data."""
    return graph_of(skeleton(model))


def _scales(layout: Layout, gates: Mapping[str, Tensor]) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """For each reader's weight and axis, the factor of each position."""
    for reader in layout.bordered.readers:
        factor = np.ones(len(reader.roots))
        for site in layout.sites:
            for tap in site.taps:
                if tap.reader == reader.node:
                    index = np.array(tap.index)
                    own = gates[site.name].detach().cpu().double().numpy()
                    factor = factor * np.where(index < 0, 1.0, own[np.maximum(index, 0)])
        size = len(factor) // reader.groups
        yield (reader.weight, reader.into), factor[:size] if reader.into else factor


def _reroutes(layout: Layout, graph: Graphed, times: Labels, dropped: Container[str]) -> Iterator[Reroute]:
    """What readers read instead, where that is less than their source still has, or a part of it is gone whole."""
    nodes = {node.name: node for node in graph.graph.graph.nodes}
    tracer = _Sources(graph, times)
    for name, node in nodes.items():
        if name in layout.borders:
            source, user = node.all_input_nodes[0], layout.borders[name]
            module = graph.graph.get_submodule(str(node.target))
            axis = int(module.axis)  # type: ignore[arg-type]
            if tracer.dead(nodes[user]) or user in dropped:
                continue
            pieces = tracer.gather(source, axis, np.flatnonzero(times[graph.roots(name)[axis]]))
            if pieces != [(source.name, ())]:
                yield Reroute(user, source.name, axis, tuple(p for p, _ in pieces), tuple(i for _, i in pieces))
            continue
        for source in node.all_input_nodes:
            along = tracer.cat_axis(source)
            if along is None or tracer.dead(node) or not tracer.loses(source):
                continue
            pieces = tracer.gather(source, along, tracer.kept(source, along))
            yield Reroute(name, source.name, along, tuple(p for p, _ in pieces), tuple(i for _, i in pieces))


class _Sources:
    """Where the channels at a node come from, through concatenations."""

    def __init__(self, graph: Graphed, times: Labels) -> None:
        self.graph, self.times = graph, times
        self.writings = Writings(graph.graph.graph, graph.graph)

    def kept(self, node: fx.Node, axis: int) -> Labels:
        """The positions of an axis that stay."""
        return np.flatnonzero(self.times[self.graph.roots(node.name)[axis]])

    def dead(self, node: fx.Node) -> bool:
        """Whether some axis of what a node gives has no position left."""
        return any(len(roots) and not self.times[roots].any() for roots in self.graph.roots(node.name))

    def cat_axis(self, node: fx.Node) -> int | None:
        """The axis along which a node joins others; None if it does not, or what it gave is written over."""
        if node.op != "call_function" or node.target not in _CATS or not self._operands(node):
            return None
        if self.writings.between(node):
            return None
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        rank = len(self.graph.roots(node.name))
        return axis % rank if isinstance(axis, int) and rank else None

    def loses(self, node: fx.Node) -> bool:
        """Whether a whole operand of a concatenation is gone, but not all of them."""
        return not self.dead(node) and any(self.dead(operand) for operand in self._operands(node))

    def gather(self, node: fx.Node, axis: int, positions: Labels) -> list[tuple[str, tuple[int, ...]]]:
        """Nodes, and positions counted among those that stay, which joined give ``positions`` of a node."""
        kept = self.kept(node, axis)
        whole = len(kept) == len(positions)
        if self.cat_axis(node) == axis and (not whole or self.loses(node)):
            found: list[tuple[str, tuple[int, ...]]] = []
            start = 0
            for operand in self._operands(node):
                width = len(self.graph.roots(operand.name)[axis])
                own = positions[(positions >= start) & (positions < start + width)] - start
                found += self.gather(operand, axis, own) if len(own) else []
                start += width
            return found
        return [(node.name, () if whole else tuple(np.searchsorted(kept, positions).tolist()))]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """What a concatenation joins; empty for anything else."""
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        if node.target not in _CATS or not isinstance(parts, list | tuple):
            return []
        found = [p for p in parts if isinstance(p, fx.Node) and isinstance(self.graph.values.get(p.name), Value)]
        return found if len(found) == len(parts) else []
