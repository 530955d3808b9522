"""Readers that no node of a graph calls: weights that a run was seen to sum over channels with."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.analysis import Analysis, analyse
from morph.analysis.borders import Border
from morph.analysis.recording import Inputs, Value
from morph.analysis.tags import Sum, operator_name
from morph.readers import Graphed, Mask, Reader, Survey, pinned_by, summed

_aten = torch.ops.aten
_TURNS = (_aten.t.default, _aten.transpose.int)


@dataclass(frozen=True, eq=False)
class _Use:
    """A sum whose second operand is a parameter, or one turned round.

    Attributes:
        entry: The sum.
        weight: Name of the parameter.
        into: The axis of it that is summed over.
    """

    entry: Sum
    weight: str
    into: int


def survey(model: nn.Module, inputs: Inputs) -> Survey:
    """Run a model without data, analyse it, and find the weights that read channels.

    Args:
        model: Not touched.
        inputs: Example inputs.

    Raises:
        TraceError, AnalysisError: As `morph.analysis.analyse`.
    """
    analysis = analyse(model, inputs)
    unread: dict[str, str] = {}
    uses, readers = _of_weights(model, analysis, unread)
    return Survey(analysis, tuple(readers), pinned_by(analysis, _others(analysis, uses, readers)), unread)


def with_inner(graph: Graphed) -> Graphed:
    """A graph with the readers inside its modules, as in attention, and weights that its functions multiply with.

    Such a reader has no edge of its own to put a border on. So it is one only of what nothing but its like reads;
    everything else that it reads stays pinned.

    Args:
        graph: With the readers that its nodes call.
    """
    analysis, called = graph.analysis, {reader.weight for reader in graph.readers}
    uses, found = _of_weights(graph.graph, analysis, {})
    inner = [reader for reader in found if reader.weight not in called and not reader.through]
    kinds = _kinds(graph, inner)
    pinned = pinned_by(analysis, _others(analysis, uses, [*graph.readers, *inner])) | _shared(graph, inner, kinds)
    inner = [reader for reader in inner if not pinned[reader.units].all()]
    if not inner:
        return graph
    first = {name: some[0].entry.call for name, some in uses.items()}
    readers = sorted([*graph.readers, *inner], key=lambda reader: first.get(reader.weight, -1))
    unread = {name: why for name, why in graph.unread.items() if name not in {reader.weight for reader in inner}}
    pinned |= pinned_by(analysis, _others(analysis, uses, readers))
    return replace(graph, readers=tuple(readers), pinned=pinned, unread=unread)


def _kinds(graph: Graphed, inner: Sequence[Reader]) -> dict[str, str]:
    """By the name of its weight, how gates get to a reader: by its node, its weight's node, or the module it is in."""
    fetched = {str(node.target) for node in graph.graph.graph.nodes if node.op == "get_attr"}
    own = {reader.weight: "attribute" if reader.weight in fetched else "module" for reader in inner}
    return dict.fromkeys((reader.weight for reader in graph.readers), "node") | own


def _shared(graph: Graphed, inner: Sequence[Reader], kinds: Mapping[str, str]) -> Mask:
    """Units ``[units]`` of these readers in front of a border, or whose coupling has readers of two kinds."""
    analysis = graph.analysis
    owner = np.full(analysis.units.count, -1, np.int64)
    for number, units in enumerate(analysis.numbers.values()):
        owner[units] = number
    seen: dict[int, set[str]] = collections.defaultdict(set)
    for reader in [*graph.readers, *inner]:
        for number in np.unique(owner[reader.units]).tolist():
            seen[number].add(kinds[reader.weight])
    shared = np.isin(owner, [number for number, some in seen.items() if len(some) > 1])
    for node in graph.graph.graph.nodes:
        border = graph.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(border, Border):
            roots = graph.roots(node.all_input_nodes[0].name)[border.axis]
            shared[analysis.units.on(roots)[0]] = True
    own = np.zeros(analysis.units.count, bool)
    for reader in inner:
        own[reader.units] = True
    return shared & own


def _of_weights(
    model: nn.Module, analysis: Analysis, unread: dict[str, str]
) -> tuple[dict[str, list[_Use]], list[Reader]]:
    """The sums over channels of each weight, and the readers among the weights; why not, goes into ``unread``."""
    turned = _turned(analysis)
    uses: dict[str, list[_Use]] = collections.defaultdict(list)
    for entry in analysis.state.sums:
        if use := _use(entry, analysis, turned):
            uses[use.weight].append(use)
    return uses, list(_readers(model, analysis, uses, turned, unread))


def _others(analysis: Analysis, uses: Mapping[str, Sequence[_Use]], readers: Sequence[Reader]) -> list[Sum]:
    """The sums that are not of these readers."""
    own = {use.entry for reader in readers for use in uses.get(reader.weight, ())}
    return [entry for entry in analysis.state.sums if entry not in own]


def _turned(analysis: Analysis) -> dict[int, str]:
    """By the number of its value, the parameter of two axes that it is, turned round."""
    found = {}
    for call in analysis.recording.calls:
        if call.target in _TURNS and len(call.reads[0].shape) == 2 and isinstance(call.output, Value):
            found[call.output.number] = call.reads[0].source
    return {number: name for number, name in found.items() if name in analysis.parameters}


def _use(entry: Sum, analysis: Analysis, turned: Mapping[int, str]) -> _Use | None:
    """What a sum is to the parameter that it reads; None if it reads none as its second operand."""
    if len(entry.operands) < 2:
        return None
    value, axis = entry.operands[1]
    if value.number in turned:
        return _Use(entry, turned[value.number], 1 - axis)
    return _Use(entry, value.source, axis) if value.source in analysis.parameters else None


def _readers(
    model: nn.Module,
    analysis: Analysis,
    uses: Mapping[str, Sequence[_Use]],
    turned: Mapping[int, str],
    unread: dict[str, str],
) -> Iterator[Reader]:
    """Every weight that can be gated, in the order of execution; why not, for the others, goes into ``unread``."""
    reads: dict[str, list[int]] = collections.defaultdict(list)
    for number, call in enumerate(analysis.recording.calls):
        if not (isinstance(call.output, Value) and call.output.number in turned):
            for value in call.reads:
                reads[turned.get(value.number, value.source)].append(number)
    owners = collections.Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    tensors = dict(model.named_parameters())
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and f"{path}.weight" not in uses:
            unread[path] = "its weight is not used as it is"
    for name, some in uses.items():
        path, axes = name.rpartition(".")[0], {use.into for use in some}
        if owners[id(tensors[name])] > 1 or reads[name] != [use.entry.call for use in some] or len(axes) > 1:
            unread[path] = "its weight is used for something else as well"
            continue
        reader = _reader(path, some[0], analysis)
        if reader.groups > 1 and not reader.through:
            unread[path] = "its groups read channels of their own, which takes a model that can be traced symbolically"
        else:
            yield reader


def _reader(path: str, use: _Use, analysis: Analysis) -> Reader:
    """The reader whose weight is first used so, in the module at ``path``."""
    (x, axis), call = use.entry.operands[0], analysis.recording.calls[use.entry.call]
    convolution = "convolution" in operator_name(call.target)
    groups = int(call.args[8]) if convolution else 1
    assert isinstance(call.output, Value)
    made = analysis.roots(call.output)[1 if convolution else -1]
    roots = analysis.roots(x)[axis]
    units, positions = summed(analysis, roots, made, groups)
    return Reader(
        node=use.weight,
        path=path,
        weight=use.weight,
        into=use.into,
        groups=groups,
        source="",
        shape=x.shape,
        axis=axis,
        roots=roots,
        made=made,
        units=units,
        positions=positions,
        through=groups > 1 and not len(units),
    )
