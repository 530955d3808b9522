"""A traced graph with its analysis, and the layers in it that read channels: sums over what others made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from morph.analysis import Analysis, analysis_of
from morph.analysis.atoms import Labels
from morph.analysis.borders import Border
from morph.analysis.recorder import record_nodes
from morph.analysis.recording import Inputs, Value, without_data
from morph.analysis.tags import Sum, operator_name
from morph.inputs import plain
from morph.passes.gates import input_axis, weight_axis

Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that sums over channels with a weight of its own: a convolution or linear layer that one node calls.

    Attributes:
        node: Name of the node; of the weight, where gates act on it (`inner`).
        path: Path of the module.
        weight: Name of its weight.
        into: The axis of its weight that holds what it reads.
        groups: In how many groups it reads.
        source: Name of the node that it reads.
        shape: Shape of its input.
        axis: The axis of its input that it sums over.
        roots: ``[n]`` final labels of that axis.
        made: ``[m]`` final labels of the axis that it makes.
        units: ``[pairs]`` the units that it sums over; those that go through it whole, as through a depthwise
            convolution, are not among them.
        positions: ``[pairs]`` where on the axis each of them lies.
        through: Whether every unit goes through it whole, so that it reads nothing: a depthwise convolution.
    """

    node: str
    path: str
    weight: str
    into: int
    groups: int
    source: str
    shape: tuple[int, ...]
    axis: int
    roots: Labels
    made: Labels
    units: Labels
    positions: Labels
    through: bool

    @property
    def inner(self) -> bool:
        """Whether no node calls it: its weight is used inside a module, or by a function."""
        return self.node == self.weight

    @property
    def name(self) -> str:
        """What it is called: the path of its module if a node calls that, else the name of its weight."""
        return self.weight if self.inner else self.path


@dataclass(frozen=True, eq=False)
class Survey:
    """A run without data, and the layers in it that read channels.

    Attributes:
        analysis: What hangs together in it.
        readers: Its readers, in the order of execution.
        pinned: ``[units]`` those that something else sums over, or that a statistic runs over.
        unread: Why layers that look like readers are none, by path, and weights that no such layer multiplies with, by
            name.
    """

    analysis: Analysis
    readers: tuple[Reader, ...]
    pinned: Mask
    unread: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Graphed(Survey):
    """A graph that was run without data.

    Attributes:
        graph: The graph; without data.
        inputs: What it was run with; without data.
        values: What each node gave: values in place of tensors.
    """

    graph: fx.GraphModule
    inputs: Inputs
    values: Mapping[str, Any]

    def roots(self, node: str) -> tuple[Labels, ...]:
        """The final labels of each axis of the tensor at a node; empty if it holds none."""
        value = self.values.get(node)
        return tuple(self.analysis.roots(value)) if isinstance(value, Value) else ()


def graphed(graph: fx.GraphModule, inputs: Inputs) -> Graphed:
    """Run a graph without data, analyse it, and find its readers.

    Args:
        graph: Its tensors have no data.
        inputs: Example inputs.

    Raises:
        AnalysisError: If a rule does not fit its operator.
    """
    bare = pytree.tree_map_only(Tensor, without_data, plain(inputs))
    recording, values = record_nodes(graph, bare, (Border,))
    analysis = analysis_of(recording, frozenset(name for name, _ in graph.named_parameters()))
    unread: dict[str, str] = {}
    readers = tuple(_readers(graph, values, analysis, unread))
    unread |= _other_products(graph, analysis, {reader.path for reader in readers} | unread.keys())
    own = {reader.path for reader in readers}
    others = [entry for entry in analysis.state.sums if analysis.recording.calls[entry.call].module not in own]
    return Graphed(analysis, readers, pinned_by(analysis, others), unread, graph, bare, values)


def _readers(
    graph: fx.GraphModule, values: Mapping[str, Any], analysis: Analysis, unread: dict[str, str]
) -> Iterator[Reader]:
    """Every convolution and linear layer that can be gated; why not, for the others, goes into ``unread``."""
    owners = Counter(id(p) for m in graph.modules() for p in m._parameters.values() if p is not None)
    calls = Counter(n.target for n in graph.graph.nodes if n.op in ("call_module", "get_attr"))
    for node in graph.graph.nodes:
        module = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        path, weight = str(node.target), module._parameters.get("weight")
        source = node.args[0] if node.args else node.kwargs.get("input")
        value = values.get(source.name) if isinstance(source, fx.Node) else None
        out = values.get(node.name)
        if weight is None:
            unread[path] = "its weight is parametrised"
        elif module._forward_hooks or module._forward_pre_hooks:  # a gate calls what the layer computes, not the layer
            unread[path] = "it has hooks"
        elif owners[id(weight)] > 1 or calls[path] > 1 or calls[f"{path}.weight"]:
            unread[path] = "its weight is used more than once"
        elif not isinstance(value, Value) or not isinstance(out, Value):
            unread[path] = "its input is not a plain tensor"
        elif isinstance(module, _ConvNd) and len(value.shape) != weight.dim():
            unread[path] = "its input has no batch axis"
        else:
            assert isinstance(source, fx.Node)
            axis = input_axis(module, len(value.shape))
            roots, made = analysis.roots(value)[axis], analysis.roots(out)[axis]
            groups = int(getattr(module, "groups", 1))
            units, positions = summed(analysis, roots, made, groups)
            yield Reader(
                node=node.name,
                path=path,
                weight=f"{path}.weight",
                into=weight_axis(module),
                groups=groups,
                source=source.name,
                shape=value.shape,
                axis=axis,
                roots=roots,
                made=made,
                units=units,
                positions=positions,
                through=groups > 1 and not len(units),
            )


def _other_products(graph: fx.GraphModule, analysis: Analysis, known: Collection[str]) -> dict[str, str]:
    """Weights with which something else than the layers in ``known`` sums over channels, and what does."""
    recording = analysis.recording
    weights = {value.number: name for name, value in recording.sources.items()}
    for call in recording.calls:  # transposed, reshaped and so on they are still weights
        origins = [weights.get(value.number) for value in call.reads]
        if isinstance(call.output, Value) and origins and all(origins):
            weights.setdefault(call.output.number, str(origins[0]))
    found: dict[str, str] = {}
    for entry in analysis.state.sums:
        call = recording.calls[entry.call]
        names = [weights.get(value.number) for value, _ in entry.operands]
        if call.module in known or len(names) < 2 or all(names):
            continue
        kind = type(graph.get_submodule(call.module))
        traced_through = kind is nn.Module or issubclass(kind, fx.GraphModule)
        user = f"by {operator_name(call.target)}" if traced_through else f"inside {kind.__name__}"
        reason = f"it is used {user}, not by a convolution or linear layer"
        found |= {name: reason for name in names if name and name not in found}
    return found


def summed(analysis: Analysis, roots: Labels, made: Labels, groups: int) -> tuple[Labels, Labels]:
    """Units that a layer sums over, and their positions: not those that hold all that their groups make."""
    units, positions = analysis.units.on(roots)
    if groups == 1:
        return units, positions
    own, other = len(roots) // groups, len(made) // groups
    makers, places = analysis.units.on(made)
    held = Counter(zip(makers.tolist(), (places // other).tolist(), strict=True))
    mixed = {u for u, group in zip(units.tolist(), (positions // own).tolist(), strict=True) if held[u, group] < other}
    keep = np.isin(units, list(mixed))
    return units[keep], positions[keep]


def pinned_by(analysis: Analysis, others: Iterable[Sum]) -> Mask:
    """Units that one of these sums, or a statistic, runs over."""
    pinned = np.zeros(analysis.units.count, bool)
    for entry in others:
        for value, axis in entry.operands:
            pinned[analysis.units.on(analysis.roots(value)[axis])[0]] = True
    for statistic in analysis.state.statistics:
        for labels in statistic.labels:
            pinned[analysis.units.on(analysis.state.atoms.find(labels))[0]] = True
    return pinned
