"""Where gates go: in front of which readers, for which of the channels that they read."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.recording import Inputs, skeleton
from morph.errors import EditError
from morph.gate_borders import add_border, top_edge
from morph.graphs import graph_of
from morph.passes.gates import Tap
from morph.readers import Graphed, Mask, Reader, Survey, graphed
from morph.tracing import require_same_way
from morph.weight_readers import with_inner

Where = Literal["auto", "producer", "connection"]
Kind = Literal["producer", "connection"]


@dataclass(frozen=True, eq=False)
class Site:
    """Gates that belong together.

    Attributes:
        name: Path of the reader in front of which they stand, or the name of its weight where no node calls it; with
            ``where="producer"``, and where several such weights share gates, the name of their coupling.
        gates: How many, k.
        kind: ``producer`` if a closed gate takes the channel from whoever makes it, ``connection`` if it takes it from
            this reader alone.
        module: Path of the module that makes the channels (``producer``) or reads them (``connection``).
        couplings: Names of the couplings of the model that they lie on.
        sources: ``k`` paths: who makes the channel of each gate.
        readers: Paths of the modules that read them.
        taps: Where the gates act in the traced graph.
        units: ``[k]`` number of the unit of each gate, in the analysis of the graph with borders.
    """

    name: str
    gates: int
    kind: Kind
    module: str
    couplings: tuple[str, ...]
    sources: tuple[str, ...]
    readers: tuple[str, ...]
    taps: tuple[Tap, ...]
    units: Labels


@dataclass(frozen=True, eq=False)
class Layout:
    """All sites of a model.

    Attributes:
        sites: In the order of execution.
        bordered: The graph with a border wherever a reader may take fewer channels than its source has; or the model's
            own run, where there is no graph.
        borders: For each border's node, the node that reads it.
        left: Why readers have no gates, by path, and weights that no reader has, by name.
        no_graph: Why there is no graph, if there is none: then gates act on weights, and the model keeps its class.
    """

    sites: tuple[Site, ...]
    bordered: Survey
    borders: Mapping[str, str]
    left: Mapping[str, str]
    no_graph: str = ""


def lay_out(model: nn.Module, inputs: Inputs, where: Where) -> Layout:
    """Decide where gates go.

    Args:
        model: Not touched.
        inputs: Example inputs.
        where: See `morph.gating.gate`.

    Raises:
        TraceError: If the model cannot be traced symbolically.
        EditError: If there is no channel that can be gated.
    """
    traced = graph_of(skeleton(model))
    require_same_way(traced, skeleton(model), inputs)
    plain = with_inner(graphed(traced, inputs))
    chosen = chosen_units(plain)
    connections = [
        r
        for r in plain.readers
        if not (r.through or r.inner) and (where == "connection" or (where == "auto" and _reused(plain, chosen, r)))
    ]
    graph = graph_of(skeleton(model))
    left = dict(plain.unread)
    borders: dict[str, str] = {}
    for reader in connections:
        top = top_edge(plain, reader)
        if top is None:
            left[reader.path] = "it reads the input of the model"
        else:
            borders[add_border(graph, *top, reader.axis)] = reader.path
    graph.graph.lint()
    graph.recompile()
    bordered = with_inner(graphed(graph, inputs))
    found = _sites(plain, bordered, set(borders.values()), where, left)
    sites = tuple(found)
    require_sites(model, sites, left)
    readers_of = {n.name: next(iter(n.users)).name for n in graph.graph.nodes if n.name in borders}
    return Layout(sites, bordered, readers_of, left)


def require_sites(model: nn.Module, sites: Sequence[Site], left: Mapping[str, str]) -> None:
    """See that there is something to gate.

    Raises:
        EditError: If there is not; gives the first reasons.
    """
    if not sites:
        reasons = sorted(set(left.values())) or ["what layers read is fixed, under a statistic, or in uneven groups"]
        raise EditError(f"{type(model).__name__} has no channel that can be gated: {'; '.join(reasons[:3])}")


def chosen_units(graph: Survey) -> dict[str, Mask]:
    """For each reader's node which of its pairs of unit and position can be gated there.

    A unit must be over no statistic, be read by readers alone, and lie alike in all groups of a reader whose groups
    share the columns of its weight. Where units overlap, as whole groups and the positions inside them do, those whose
    positions lie together come first; one that another reader cannot have is out.
    """
    picked: dict[str, Mask] = {}
    refused: set[int] = set()
    for reader in graph.readers:
        keep = ~graph.pinned[reader.units] & _alike_in_groups(reader)
        if len(np.unique(reader.positions[keep])) < keep.sum():
            keep &= np.isin(reader.units, _disjoint(reader, keep))
        picked[reader.node] = keep
        refused.update(reader.units[~keep].tolist())
    out = np.array(sorted(refused), np.int64)
    return {r.node: picked[r.node] & ~np.isin(r.units, out) for r in graph.readers}


def _alike_in_groups(reader: Reader) -> Mask:
    """Which pairs are of units that lie at the same positions of every group, so that one column has one gate."""
    if reader.groups == 1 or not reader.into:
        return np.ones(len(reader.units), bool)
    column = reader.positions % (len(reader.roots) // reader.groups)
    held = collections.Counter(zip(reader.units.tolist(), column.tolist(), strict=True))
    uneven = {unit for (unit, _), groups in held.items() if groups < reader.groups}
    return ~np.isin(reader.units, list(uneven))


def _disjoint(reader: Reader, keep: Mask) -> list[int]:
    """Units that share no position, those whose positions lie closest together first."""
    members: dict[int, list[int]] = collections.defaultdict(list)
    for unit, position in zip(reader.units[keep].tolist(), reader.positions[keep].tolist(), strict=True):
        members[unit].append(position)
    taken: set[int] = set()
    found = []
    for unit in sorted(members, key=lambda u: (max(members[u]) - min(members[u]), members[u][0])):
        if taken.isdisjoint(members[unit]):
            taken.update(members[unit])
            found.append(unit)
    return found


def _reused(graph: Graphed, chosen: Mapping[str, Mask], reader: Reader) -> bool:
    """Whether a reader must have gates of its own: some channel has another reader, or none that can go by itself."""
    covered = np.zeros(len(reader.roots), bool)
    here = chosen[reader.node]
    covered[reader.positions[here]] = True
    own = np.unique(reader.units[here])
    others = [np.isin(own, r.units).any() for r in graph.readers if r is not reader]
    return not covered.all() or any(others)


def _sites(
    plain: Graphed, bordered: Graphed, connected: set[str], where: Where, left: dict[str, str]
) -> Iterator[Site]:
    """The sites, in the order of execution."""
    chosen = chosen_units(bordered)
    count = np.zeros(bordered.analysis.units.count, np.int64)
    for reader in bordered.readers:
        count[np.unique(reader.units)] += 1
    names = _Names(plain)
    if where == "producer":
        yield from by_coupling(bordered, chosen)
        return
    before = {reader.name: reader for reader in plain.readers}
    inner = _by_weight(by_coupling(replace(bordered, readers=tuple(r for r in bordered.readers if r.inner)), chosen))
    for reader in bordered.readers:
        if reader.inner:
            yield from (names.known(site, before) for site in inner if site.taps[0].reader == reader.node)
            if not any(tap.reader == reader.node for site in inner for tap in site.taps):
                left[reader.name] = why_not(reader)
            continue
        keep = chosen[reader.node] & (count[reader.units] == 1)
        units, positions = reader.units[keep], reader.positions[keep]
        if reader.through:
            continue
        if reader.path in left or not len(units):
            left.setdefault(reader.path, why_not(reader))
            continue
        own, index, first = _numbered(units, positions, len(reader.roots))
        couplings, sources = names.of(before[reader.path], first)
        connection = reader.path in connected
        yield Site(
            name=reader.path,
            gates=len(own),
            kind="connection" if connection else "producer",
            module=reader.path if connection else sources[0],
            couplings=couplings,
            sources=sources,
            readers=(reader.path,),
            taps=(Tap(reader.node, index),),
            units=own,
        )


def _by_weight(sites: Iterable[Site]) -> list[Site]:
    """Sites of readers that no node calls, named after the weight that reads where that tells them apart."""
    found = list(sites)
    held = collections.Counter(tap.reader for site in found for tap in site.taps)
    return [
        replace(site, name=site.taps[0].reader) if len(site.taps) == held[site.taps[0].reader] == 1 else site
        for site in found
    ]


def by_coupling(graph: Survey, chosen: Mapping[str, Mask]) -> Iterator[Site]:
    """One site for each coupling, whose gates all its readers share."""
    for name, numbers in graph.analysis.numbers.items() if graph.readers else ():
        held = [r.units[chosen[r.node] & np.isin(r.units, numbers)] for r in graph.readers]
        own = np.unique(np.concatenate(held or [numbers[:0]]))
        taps, readers = [], []
        for reader in graph.readers:
            here = chosen[reader.node] & np.isin(reader.units, own)
            if here.any():
                index = np.full(len(reader.roots), -1, np.int64)
                index[reader.positions[here]] = np.searchsorted(own, reader.units[here])
                taps.append(Tap(reader.node, tuple(index.tolist())))
                readers.append(reader.path)
        if taps:
            maker = maker_of(graph.analysis, name)
            yield Site(
                name=name,
                gates=len(own),
                kind="producer",
                module=maker,
                couplings=(name,),
                sources=(maker,) * len(own),
                readers=tuple(readers),
                taps=tuple(taps),
                units=own,
            )


def maker_of(analysis: Analysis, coupling: str) -> str:
    """Path of the module whose weight makes the channels of a coupling."""
    places, sources = analysis.couplings[coupling].places, analysis.recording.sources
    made = [p.tensor for p in places if p.axis == 0 and len(sources[p.tensor].shape) > 1]
    return (made or [places[0].tensor])[0].rpartition(".")[0]


def _numbered(units: Labels, positions: Labels, length: int) -> tuple[Labels, tuple[int, ...], Labels]:
    """Units in the order of their first positions; the gate of each position; the first position of each gate."""
    order = np.argsort(positions, kind="stable")
    _, first, inverse = np.unique(units[order], return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    index = np.full(length, -1, np.int64)
    index[positions[order]] = rank[inverse]
    starts = order[np.sort(first)]
    return units[starts], tuple(index.tolist()), positions[starts]


def why_not(reader: Reader) -> str:
    """Why what a reader reads has no gates."""
    if not reader.roots.any():
        return "all that it reads is fixed by an operator without a rule, or by the shape of the input"
    return "what it reads cannot go by itself"


class _Names:
    """Who makes a channel, and on which coupling of the model it lies."""

    def __init__(self, plain: Graphed) -> None:
        self.plain = plain
        self.owner: dict[int, str] = {}
        for name, numbers in plain.analysis.numbers.items():
            for number in numbers.tolist():
                self.owner.setdefault(number, name)
        chosen = chosen_units(plain)
        self.chosen = {u for r in plain.readers for u in r.units[chosen[r.node]].tolist()}

    def known(self, site: Site, readers: Mapping[str, Reader]) -> Site:
        """A site of the graph with borders, with the couplings of the model."""
        tap = site.taps[0]
        first = np.array([tap.index.index(gate) for gate in range(site.gates) if gate in tap.index], np.int64)
        return replace(site, couplings=self.of(readers[tap.reader], first)[0])

    def of(self, reader: Reader, positions: Labels) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The couplings at some positions of what a reader reads, and who makes each position."""
        units, places = self.plain.analysis.units.on(reader.roots)
        best: dict[int, str] = {}
        for unit, place in zip(units.tolist(), places.tolist(), strict=True):
            if place not in best or unit in self.chosen:
                best[place] = self.owner[unit]
        node = next((n for n in self.plain.graph.graph.nodes if n.name == reader.source), None)
        other = str(node.target) if node is not None and node.op == "call_module" else reader.source
        found = [best.get(p) for p in positions.tolist()]
        makers = {name: maker_of(self.plain.analysis, name) for name in set(found) if name}
        couplings = tuple(dict.fromkeys(name for name in found if name))
        return couplings, tuple(makers[name] if name else other for name in found)
