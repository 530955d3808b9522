"""Tap functions and methods: the model's graph runs, node by node, with the model's own modules and parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from morph.errors import TapError
from morph.inputs import in_order
from morph.interpreter import Interpreter
from morph.search_checkpoint import random_states, set_random_states
from morph.teaching.capture import Enough, Kept, Memory, Tapped, Wanted, numbered, tensor_of
from morph.tracing import trace_calls

Key = tuple[tuple[int, bool], ...]


@dataclass(frozen=True)
class Place:
    """Where a function is called: the graphs of training and evaluation name their nodes each in its own way.

    Attributes:
        name: Of the node in the graph of evaluation mode.
        what: Kind of node, what it calls, and the innermost call of a module that it happens in.
        number: Which of those it is, from 0.
        among: How many of those there are.
    """

    name: str
    what: tuple[str, str, str]
    number: int
    among: int


@dataclass(frozen=True)
class Names:
    """What of a model can be tapped by a graph, in evaluation mode: calls of modules by path, and functions by node."""

    calls: dict[str, tuple[str, ...]]
    places: dict[str, Place]


def graph_names(model: nn.Module) -> Names:
    """Trace a copy of ``model`` in evaluation mode.

    Raises:
        TraceError: If it cannot be traced.
    """
    module, calls = _traced(copy.deepcopy(model).eval())
    places = {}
    by_what = _by_what(module.graph)
    for what, nodes in by_what.items():
        for i, node in enumerate(nodes):
            places[node.name] = Place(node.name, what, i, len(nodes))
    order = {node.name: i for i, node in enumerate(module.graph.nodes)}
    named = {path: tuple(nodes) for path, nodes in calls.items() if path}
    return Names(named, {name: places[name] for name in sorted(places, key=lambda name: order[name])})


class GraphTaps:
    """Taps on nodes, and on modules beside them.

    Args:
        model: Its parameters and modules are used; its forward is traced anew for each set of training flags, and the
            graph is compared with it before it is used.
        wanted: Module paths, each with the number of the call or None for all calls, and places.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[Wanted | Place]) -> None:
        self.model, self.wanted = model, list(dict.fromkeys(wanted))
        self.memory = Memory()
        self.graphs: dict[Key, _Graph] = {}

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, to_the_end: bool) -> Tapped:
        """One forward pass; see `morph.teaching.module_taps.ModuleTaps.run`. Without its end, only what the taps need.

        Raises:
            TapError: If the graph does not compute what the model computes, or a node is not there in this mode.
        """
        key = tuple((id(module), module.training) for module in self.model.modules())
        if key not in self.graphs:
            self.graphs = {k: g for k, g in self.graphs.items() if [i for i, _ in k] == [i for i, _ in key]}
            self.graphs[key] = _open(self.model, self.wanted, args, kwargs)
        graph = self.graphs[key]
        runner = graph.runner
        runner.begin(self.memory, key, graph.nodes, graph.needed if not to_the_end else None)
        output = None
        try:
            output = runner.run(*graph.bind(args, kwargs))
        except Enough:
            pass
        finally:
            runner.env = {}
        kept, runner.kept = runner.kept, {}
        features = {name: self.memory.check((key, node), name, kept[node]) for name, node in graph.names.items()}
        return Tapped(output, features)


@dataclass(frozen=True)
class _Graph:
    """A graph for one set of training flags.

    Attributes:
        runner: Runs it.
        names: The node of each tap.
        nodes: The nodes of taps.
        needed: Names of the nodes without which these cannot be had.
        parameters: Names and defaults of the forward's arguments.
    """

    runner: _Runner
    names: dict[str, str]
    nodes: frozenset[str]
    needed: frozenset[str]
    parameters: inspect.Signature

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments by position, as the graph takes them."""
        return in_order(self.parameters, args, kwargs)


class _Runner(Interpreter):
    """Runs a graph over the model itself and keeps what is tapped."""

    def __init__(self, model: nn.Module, graph: fx.Graph, constants: Mapping[str, Any]) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.constants = constants
        self.kept: dict[str, Kept] = {}

    def begin(self, memory: Memory, key: Key, nodes: frozenset[str], needed: frozenset[str] | None) -> None:
        """What the next run shall keep, and which nodes it needs for that; None for all."""
        self.memory, self.key, self.nodes, self.needed = memory, key, nodes, needed
        self.kept = {}

    def fetch_attr(self, target: str) -> Any:
        """A parameter or buffer of the model as it is now, or a constant of the trace."""
        return self.constants[target] if target in self.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        """Run, keep, and leave after the last."""
        if self.needed is not None and n.name not in self.needed and n.op != "placeholder":
            return None
        result = super().run_node(n)
        if n.name in self.nodes:
            self.kept[n.name] = self.memory.keep((self.key, n.name), tensor_of(n.name, result))
            if self.needed is not None and len(self.kept) == len(self.nodes):
                raise Enough
        return result


def _traced(root: nn.Module) -> tuple[fx.GraphModule, dict[str, list[str]]]:
    """`trace_calls`, after which the random states are what they were: a forward may draw while it is traced."""
    states = random_states()
    try:
        return trace_calls(root)
    finally:
        set_random_states(states)


def _open(model: nn.Module, wanted: Sequence[Wanted | Place], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Graph:
    """Trace a copy of the model in the mode that it is in, and see that the graph is true."""
    root = copy.deepcopy(model)
    module, calls = _traced(root)
    _refuse_hooks(model, module.graph)
    names = _nodes_of(model, wanted, module.graph, calls)
    constants = {
        str(node.target): _fetch(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr" and not _has(model, str(node.target))
    }
    nodes = frozenset(names.values())
    graph = _Graph(
        _Runner(model, module.graph, constants),
        names,
        nodes,
        _needed(module.graph, nodes, dict(model.named_modules())),
        inspect.signature(model.forward),
    )
    _compare(model, _Runner(root, module.graph, constants), graph, args, kwargs)
    return graph


def _compare(model: nn.Module, runner: _Runner, graph: _Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run both on these inputs, from the same random state, on copies."""
    twin = copy.deepcopy(model)
    states = random_states()
    runner.begin(Memory(), (), frozenset(), None)
    try:
        with torch.no_grad():
            expected = twin(*args, **kwargs)
            after = random_states()
            set_random_states(states)
            found = runner.run(*graph.bind(args, kwargs))
            drawn = _same(after, random_states())
    finally:
        set_random_states(states)
    both = (expected, dict(twin.named_buffers())), (found, dict(runner.module.named_buffers()))
    if not drawn or not _same(*both):
        raise TapError(
            f"the graph of {type(model).__name__} does not compute what its forward computes: some branch or random "
            "number was fixed when it was traced; tap modules in place of functions"
        )


def _same(left: Any, right: Any) -> bool:
    """Whether two trees hold the same tensors, up to the order of sums, and the same other values."""
    a, b = tree_leaves(left), tree_leaves(right)
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return type(x) is type(y) and bool(x == y)
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    exact = x.device.type == "cpu" or not x.is_floating_point()
    return torch.equal(x, y) if exact else torch.allclose(x, y, 1e-3, 1e-5, equal_nan=True)


def _refuse_hooks(model: nn.Module, graph: fx.Graph) -> None:
    """The graph calls leaf modules only, so hooks of modules around them would not fire."""
    leaves = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    for path, module in model.named_modules():
        if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves):
            continue
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            where = path or type(model).__name__
            raise TapError(f"{where} has hooks, which a graph would not call; tap modules in place of functions")


def _nodes_of(
    model: nn.Module, wanted: Sequence[Wanted | Place], graph: fx.Graph, calls: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """The node of each tap in a graph."""
    by_what = _by_what(graph)
    mode = "training" if model.training else "evaluation"
    found = {}
    for tap in wanted:
        if isinstance(tap, Place):
            nodes = by_what.get(tap.what, [])
            if len(nodes) != tap.among:
                raise TapError(
                    f"the node {tap.name} of evaluation mode cannot be told among the {len(nodes)} of its kind in "
                    f"{mode} mode (there are {tap.among} in evaluation mode); tap a module around it"
                )
            found[tap.name] = nodes[tap.number].name
            continue
        path, call = tap
        names = numbered(path, len(calls.get(path, ())))
        if not names or (call is not None and call > len(names)):
            raise TapError(f"the module {path} is called {len(names)} times in {mode} mode; choose one that is called")
        for i, name in enumerate(names):
            if call in (None, i + 1):
                found[name if call is None else f"{path}#{call}"] = calls[path][i]
    return found


def _by_what(graph: fx.Graph) -> dict[tuple[str, str, str], list[fx.Node]]:
    """Calls of functions and methods by what they call and where."""
    found: dict[tuple[str, str, str], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            stack = node.meta.get("nn_module_stack") or {"": None}
            target = node.target if isinstance(node.target, str) else _name_of(node.target)
            found.setdefault((node.op, target, next(reversed(stack))), []).append(node)
    return found


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"


def _needed(graph: fx.Graph, nodes: frozenset[str], modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The nodes that the tapped ones are made from, and, before the last of those, what may write in place."""
    order = list(graph.nodes)
    last = max((i for i, node in enumerate(order) if node.name in nodes), default=-1)
    waiting = [node for node in order[: last + 1] if node.name in nodes or _may_write(node, modules)]
    needed: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in needed:
            needed.add(node.name)
            waiting += node.all_input_nodes
    return frozenset(needed)


def _may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node may write into what it is given, as far as its name or its options tell."""
    if node.op == "call_module":
        return any(getattr(inner, "inplace", False) for inner in modules[str(node.target)].modules())
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    writes = name.endswith("_") and not name.endswith("__")
    in_place = name.strip("_") in _IN_PLACE or name.strip("_") == "setitem"
    return writes or in_place or "out" in node.kwargs or bool(node.kwargs.get("inplace", False))


_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_IN_PLACE = {f"i{name}" for name in _OPERATORS}


def _fetch(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _has(module: nn.Module, target: str) -> bool:
    try:
        _fetch(module, target)
    except AttributeError:
        return False
    return True
