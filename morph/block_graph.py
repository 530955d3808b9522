"""Condense the graph of a traced model: a vertex for each block, and as few as possible for what lies between."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx
from torch import Tensor, fx, nn

from morph.blocks import Cell, find_cells
from morph.errors import NothingToGrowError
from morph.tracing import Trace


@dataclass(frozen=True)
class Vertex:
    """One vertex of a block graph; the attribute ``vertex`` of the node in networkx.

    Attributes:
        title: Module path of the block; of other vertices their module, or the first and the last one (``a … b``).
        kind: ``input``, ``output``, ``cell``, or ``other`` for what lies between cells.
        module_class: Class of the block or single module; else ''.
        params: Parameters that its nodes use, each counted once.
        shape: Shape of its output without the batch axis; empty if that is not a tensor.
        members: Names of its fx nodes, in the order of execution.
        modules: Paths of the leaf modules that it calls.
        value: A number for the cell, e.g. its score.
        growth: What was done to the cell, e.g. ``groups 16 → 1``.
    """

    title: str
    kind: str
    module_class: str
    params: int
    shape: tuple[int, ...]
    members: tuple[str, ...]
    modules: tuple[str, ...]
    value: float | None = None
    growth: str = ""


@dataclass
class _Group:
    """A vertex while it is being collected; ``cell`` is None for what lies between cells."""

    kind: str
    cell: Cell | None = None
    nodes: list[fx.Node] = field(default_factory=list)


def block_graph(
    trace: Trace,
    cells: Sequence[Cell] | None = None,
    *,
    values: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> nx.DiGraph[str]:
    """Condense the fx graph of ``trace`` to an acyclic graph of blocks that keeps every path of data between them.

    A cell that is called twice, or that encloses another cell, has several vertices; their titles end in ``(2)`` and so
    on. What lies between cells is merged wherever that closes no cycle; if it holds no weight matrix or kernel
    (activations, normalisation, pooling, reshaping) it is folded into the only vertex before it, or else into the only
    one after it.

    Args:
        trace: The traced model.
        cells: The blocks. None takes `morph.blocks.find_cells`, or each layer with parameters if that finds none.
        values: A number for each cell, by cell name.
        notes: What was done to each cell, by cell name.

    Returns:
        A graph whose nodes ``v0, v1, ...`` carry a `Vertex` as ``vertex``, and whose edges carry ``shapes``: the shapes
        of the tensors that pass, without the batch axis.
    """
    values, notes = values or {}, notes or {}
    condenser = _Condenser(trace, _default_cells(trace) if cells is None else cells)
    condenser.collect()
    condenser.join()
    condenser.fold()
    graph: nx.DiGraph[str] = nx.DiGraph()
    called = [str(node.target) for node, _ in trace.calls()]
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    for key, group in condenser.in_order():
        cell = group.cell.name if group.cell else ""
        seen[cell] = seen.get(cell, 0) + 1
        title = (cell if seen[cell] == 1 else f"{cell} ({seen[cell]})") if cell else _title(group, called)
        names[key] = f"v{len(names)}"
        graph.add_node(names[key], vertex=_vertex(trace, group, title, values.get(cell), notes.get(cell, "")))
    for a, b, shapes in condenser.edges():
        graph.add_edge(names[a], names[b], shapes=shapes)
    return graph


def _default_cells(trace: Trace) -> Sequence[Cell]:
    try:
        return find_cells(trace)
    except NothingToGrowError:
        layers = [str(node.target) for node, module in trace.calls() if any(True for _ in module.parameters())]
        return [Cell(path, trace.outputs[path], 1, (path,)) for path in dict.fromkeys(layers)]


class _Condenser:
    """Puts each fx node into a group, so that the graph of groups stays acyclic."""

    def __init__(self, trace: Trace, cells: Sequence[Cell]) -> None:
        self.trace = trace
        self.groups: dict[int, _Group] = {}
        self.group_of: dict[fx.Node, int] = {}
        self.graph: nx.DiGraph[int] = nx.DiGraph()
        self.by_path = {cell.name: cell for cell in cells if cell.name in trace.outputs}
        order = {node.name: i for i, node in enumerate(trace.graph_module.graph.nodes)}
        self.loose = sorted((order[cell.nodes[0]], cell) for cell in cells if cell.name not in trace.outputs)

    def collect(self) -> None:
        """Walk the nodes in the order of execution, each into a group that may take it, or into a new one."""
        latest: dict[str, int] = {}  # the last group of each call of a module, and of each probed node
        for position, node in enumerate(self.trace.graph_module.graph.nodes):
            if node.op == "get_attr" and node.users:
                continue  # a parameter goes where it is used first
            before = self._before(node)
            if node.op in ("placeholder", "output"):
                key = self._new(_Group("input" if node.op == "placeholder" else "output"))
            else:
                call, cell = self._owner(node, position)
                calls = [call] if cell else self._calls_without_cells(node)
                near = [] if cell else [k for k in before if self.groups[k].kind == "other"]
                candidates = [*near, *(latest[c] for c in calls if c in latest)]
                key = next((k for k in candidates if self._may_join(k, before)), -1)
                if key < 0:
                    key = self._new(_Group("cell" if cell else "other", cell))
                latest |= dict.fromkeys(calls, key)
            self._put(node, key, before)

    def _before(self, node: fx.Node) -> list[int]:
        """The groups that ``node`` takes its inputs from, those that give it tensors first."""
        sources = sorted(node.all_input_nodes, key=lambda n: n.name not in self.trace.shapes)
        return list(dict.fromkeys(self.group_of[n] for n in sources if n in self.group_of))

    def _owner(self, node: fx.Node, position: int) -> tuple[str, Cell | None]:
        """The innermost cell around the node, told apart by call, or else the next probed node downstream."""
        after = bisect.bisect_left([place for place, _ in self.loose], position)
        probed = after < len(self.loose)
        if not (probed and self.loose[after][0] == position):
            for call, (path, _) in reversed(_around(node).items()):
                if path in self.by_path:
                    return call, self.by_path[path]
        return (f"node {after}", self.loose[after][1]) if probed else ("", None)

    def _calls_without_cells(self, node: fx.Node) -> list[str]:
        """The calls of modules around ``node`` that have no cell in them."""
        return [
            call
            for call, (path, _) in _around(node).items()
            if not any(cell.startswith(path + ".") for cell in self.by_path)
        ]

    def _new(self, group: _Group) -> int:
        key = len(self.groups)
        self.groups[key] = group
        self.graph.add_node(key)
        return key

    def _may_join(self, key: int, before: Iterable[int]) -> bool:
        """Whether no way leads from the group out and back in by ``before``."""
        return nx.descendants(self.graph, key).isdisjoint(before)

    def _put(self, node: fx.Node, key: int, before: Iterable[int]) -> None:
        attributes = [n for n in node.all_input_nodes if n not in self.group_of]
        for member in [*attributes, node]:
            self.group_of[member] = key
            self.groups[key].nodes.append(member)
        self.graph.add_edges_from((other, key) for other in before if other != key)

    def join(self) -> None:
        """Contract each edge between two groups that are no cells, if there is no other way from one to the other."""
        waiting = list(self.graph.edges)
        while waiting:
            a, b = waiting.pop(0)
            if self.graph.has_edge(a, b) and self.groups[a].kind == self.groups[b].kind == "other":
                self.graph.remove_edge(a, b)
                if nx.has_path(self.graph, a, b):
                    self.graph.add_edge(a, b)
                else:
                    self._merge(b, a)
                    waiting += [*self.graph.in_edges(a), *self.graph.out_edges(a)]

    def fold(self) -> None:
        """Fold the groups between cells that hold no weight matrix into the neighbour that they hang on."""
        for key in list(self.groups):
            group = self.groups[key]
            if group.kind != "other" or any(p.dim() > 1 for p in _parameters(self.trace, group.nodes)):
                continue
            for near in (list(self.graph.pred[key]), list(self.graph.succ[key])):
                if len(near) == 1 and self.groups[near[0]].kind in ("cell", "other"):
                    self._merge(key, near[0])
                    break

    def _merge(self, key: int, into: int) -> None:
        """Contract the edge between two groups; closes no cycle if that is the only way from one to the other."""
        group = self.groups.pop(key)
        self.groups[into].nodes.extend(group.nodes)
        for node in group.nodes:
            self.group_of[node] = into
        self.graph.add_edges_from((a, into) for a in list(self.graph.pred[key]) if a != into)
        self.graph.add_edges_from((into, b) for b in list(self.graph.succ[key]) if b != into)
        self.graph.remove_node(key)

    def in_order(self) -> Iterable[tuple[int, _Group]]:
        """The groups so that edges run forward, otherwise in the order of execution; the nodes of each likewise."""
        order = {node: i for i, node in enumerate(self.trace.graph_module.graph.nodes)}
        for group in self.groups.values():
            group.nodes.sort(key=order.__getitem__)
        for key in nx.lexicographical_topological_sort(self.graph, key=lambda k: order[self.groups[k].nodes[0]]):
            yield key, self.groups[key]

    def edges(self) -> Iterable[tuple[int, int, tuple[tuple[int, ...], ...]]]:
        """Each pair of groups between which data passes, with the shapes of the tensors."""
        found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for node in self.trace.graph_module.graph.nodes:
            for source in node.all_input_nodes:
                a, b = self.group_of[source], self.group_of[node]
                if a != b:
                    shapes = found.setdefault((a, b), [])
                    shape = self.trace.shapes.get(source.name, ())[1:]
                    if shape and shape not in shapes:
                        shapes.append(shape)
        return [(a, b, tuple(shapes)) for (a, b), shapes in found.items()]


def _around(node: fx.Node) -> dict[str, tuple[str, type]]:
    """The calls of modules around a node, outermost first, each with the path and class of the module."""
    stack: dict[str, tuple[str, type]] = node.meta.get("nn_module_stack", {})
    return stack


def _parameters(trace: Trace, nodes: Iterable[fx.Node]) -> list[nn.Parameter]:
    """The parameters that the nodes use, each once."""
    found: dict[int, nn.Parameter] = {}
    for node in nodes:
        if node.op == "call_module":
            found |= {id(p): p for p in trace.graph_module.get_submodule(str(node.target)).parameters()}
        elif node.op == "get_attr":
            value = _attribute(trace, str(node.target))
            if isinstance(value, nn.Parameter):
                found[id(value)] = value
    return list(found.values())


def _attribute(trace: Trace, path: str) -> Tensor | nn.Module:
    owner, _, name = path.rpartition(".")
    value: Tensor | nn.Module = getattr(trace.graph_module.get_submodule(owner), name)
    return value


def _vertex(trace: Trace, group: _Group, title: str, value: float | None, growth: str) -> Vertex:
    members = set(group.nodes)
    own = set(group.cell.nodes) if group.cell else set()
    leaving = [n for n in group.nodes if n.users.keys() - members]
    exits = [n for n in group.nodes if n.name in own] or leaving or group.nodes
    path = "" if group.kind in ("input", "output") else group.cell.name if group.cell else title
    known = dict(trace.root.named_modules())
    return Vertex(
        title=title,
        kind=group.kind,
        module_class=type(known[path]).__name__ if path and path in known else "",
        params=sum(p.numel() for p in _parameters(trace, group.nodes)),
        shape=trace.shapes.get(exits[-1].name, ())[1:],
        members=tuple(node.name for node in group.nodes),
        modules=_called(group),
        value=value,
        growth=growth,
    )


def _called(group: _Group) -> tuple[str, ...]:
    """Paths of the leaf modules that the group calls."""
    return tuple(dict.fromkeys(str(node.target) for node in group.nodes if node.op == "call_module"))


def _title(group: _Group, all_called: Iterable[str]) -> str:
    """What a vertex that is no cell is called: its first and last module, each by the outermost one wholly inside."""
    own = _called(group)
    if group.kind == "output" or not own:
        return "output" if group.kind == "output" else group.nodes[-1].name
    outside = set(all_called) - set(own)
    first, last = _outermost(own[0], outside), _outermost(own[-1], outside)
    return first if first == last else f"{first} … {last}"


def _outermost(path: str, outside: Iterable[str]) -> str:
    """The outermost module around ``path`` that has no module of ``outside`` in it."""
    parts = path.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next(whole for whole in around if not any(other.startswith(whole + ".") for other in outside))
