"""Fit a cut model through its traced graph: rewrite the sizes that its code has as constants."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from morph.analysis.atoms import Labels
from morph.analysis.bare import Bare
from morph.analysis.edits import times_of
from morph.analysis.group_counts import groups_after
from morph.analysis.picking import padding_after, same_index
from morph.analysis.propagation import Propagation, propagate
from morph.analysis.recorder import record_nodes
from morph.analysis.recording import Inputs, Value, arguments_of, plain_attention, skeleton, without_data
from morph.analysis.table import RULES
from morph.fitting import Misfit
from morph.graphs import graph_of, set_slot, slots, split_at
from morph.heads import SizeEdit, set_sizes
from morph.inputs import plain
from morph.interpreter import Interpreter
from morph.plan import Resize, SetConstant, SplitAt
from morph.resizing import resized
from morph.tracing import require_same_way

_SPLITS = ("chunk", "split", "tensor_split", "split_with_sizes", "unsafe_chunk", "unsafe_split")
_ARITHMETIC = {"add", "sub", "mul", "div", "truediv", "true_divide", "floordiv", "floor_divide", "pow", "rsub"}
_ARITHMETIC |= {f"i{name}" for name in _ARITHMETIC}  # in place
_ARITHMETIC |= {"clamp", "clamp_min", "clamp_max", "clip", "fmod", "remainder", "mod", "masked_fill", "where"}
_ARITHMETIC |= {"lt", "le", "gt", "ge", "eq", "ne", "threshold", "hardtanh", "elu", "celu", "leaky_relu", "softplus"}
_ARITHMETIC |= {"addcmul", "addcdiv", "lerp", "hardshrink", "softshrink", "norm", "vector_norm", "normalize", "renorm"}
_TRIES = 400


class GraphFitter:
    """Runs the cut graph node by node without data, and gives each node the constants that make its shape right.

    Args:
        model: The model before; not touched.
        inputs: What it was analysed with.

    Raises:
        TraceError: If the model has no symbolic graph.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.inputs = pytree.tree_map_only(Tensor, without_data, plain(inputs))
        self.graph = graph_of(skeleton(model))
        require_same_way(self.graph, skeleton(model), self.inputs)
        recording, self.values = record_nodes(self.graph, self.inputs)
        self.state: Propagation = propagate(recording, RULES)

    def fit(
        self, edits: Sequence[Resize], sizes: Sequence[SizeEdit]
    ) -> tuple[list[SetConstant | SplitAt], Misfit | None]:
        """Find the constants with which the graph carries the new sizes."""
        times = times_of(self.state, edits)
        cut = resized(self.graph, [e for e in edits if e.tensor in self.state.recording.sources])
        assert isinstance(cut, fx.GraphModule)
        set_sizes(cut, sizes)
        return mend(cut, self.values, self.state, times, self.inputs)


def mend(
    cut: fx.GraphModule, values: Mapping[str, Any], state: Propagation, times: Labels, inputs: Inputs
) -> tuple[list[SetConstant | SplitAt], Misfit | None]:
    """Run a cut graph without data and give each node the constants that make its shape right.

    Args:
        cut: The graph; changed in place. Nodes that ``values`` does not have are taken as they are.
        values: What each node gave before the cut: values in place of tensors.
        state: The labels of these.
        times: For each label how often it is there.
        inputs: Without data.

    Returns:
        The constants, and where none is right.
    """
    made = _Refit(cut, values, state, times)
    args, kwargs = arguments_of(inputs)
    try:
        with torch.no_grad(), plain_attention(), Bare():  # type: ignore[no-untyped-call]
            made.run(*args, **kwargs)
    except _UnfitError as unfit:
        return made.edits, unfit.misfit
    return made.edits, None


class _UnfitError(Exception):
    """A node that no constant makes right."""

    def __init__(self, misfit: Misfit) -> None:
        super().__init__(misfit.reason)
        self.misfit = misfit


class _Refit(Interpreter):
    """Runs a cut graph and mends each node whose shape is not the one expected."""

    def __init__(self, cut: fx.GraphModule, values: Mapping[str, Any], state: Propagation, times: Labels) -> None:
        super().__init__(cut)
        self.graph_module = cut
        self.values, self.state, self.times = values, state, times
        self.edits: list[SetConstant | SplitAt] = []
        self.arguments: Any = ()  # of the node at hand before the cut
        self.numbers: dict[str, Any] = {}  # the same, by where they stand

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on positional and named inputs."""
        names = [str(n.target) for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        return super().run(*args, *(kwargs[n] for n in names[len(args) :] if n in kwargs))

    def run_node(self, n: fx.Node) -> Any:
        expected = self.values.get(n.name)
        if n.op in ("placeholder", "output", "get_attr") or n.name not in self.values:
            return super().run_node(n)
        self._keep_scale(n)
        self.arguments = fx.node.map_arg(n.args, self._old)
        self.numbers = {slot: self._old(v) for slot, v in slots(n)}
        result, why = self._attempt(n, expected)
        if not why:
            return result
        if n.op != "call_module":
            for trial in self._trials(n, expected):
                old = (n.op, n.target, n.args, n.kwargs)
                for edit in trial:
                    split_at(n, edit) if isinstance(edit, SplitAt) else set_slot(n, edit.slot, edit.number)
                result, still = self._attempt(n, expected)
                if not still:
                    self.edits += trial
                    return result
                n.op, n.target = old[0], old[1]
                n.args, n.kwargs = old[2], old[3]
        raise _UnfitError(Misfit(0, str(n.target) if n.op == "call_module" else _module_of(n), f"node {n.name}: {why}"))

    def _attempt(self, n: fx.Node, expected: Any) -> tuple[Any, str]:
        """Run one node; say what is wrong with its shape."""
        try:
            result = super().run_node(n)
        except Exception as error:
            return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
        wanted, got = self._shapes(expected), _tensor_shapes(result)
        if wanted != got:
            return result, f"shape {got}, expected {wanted}"
        return result, "" if self._takes_the_same(n) else "it takes other positions than before"

    def _takes_the_same(self, n: fx.Node) -> bool:
        """Whether brackets and paddings take the positions, and arithmetic the numbers, that they took before."""
        if any(True for _ in self._kept(n)):
            return False
        if n.target not in (operator.getitem, operator.setitem) or not isinstance(self.arguments[0], Value):
            return True
        source, before = self.arguments[:2]
        now = fx.node.map_arg(n.args[1], lambda node: self.env[node])
        return same_index([*map(self.state.atoms.find, self.state.tag(source).axes)], self.times, before, now)

    def _kept(self, n: fx.Node) -> Iterator[SetConstant]:
        """The numbers that are no sizes, and the sides of a padding, that are not what they must be."""
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        output = self.values.get(n.name)
        if n.op == "call_module" or not isinstance(output, Value):
            return
        wanted = {slot: old for slot, old in self.numbers.items() if type(old) is float}  # never a size
        if name.strip("_") in _ARITHMETIC:
            wanted |= {slot: old for slot, old in self.numbers.items() if type(old) is int}
        elif name == "pad":
            sides = {slot: old for slot, old in self.numbers.items() if type(old) is int}
            axes = self.state.tag(output).axes
            wanted = dict(zip(sides, padding_after(axes, self.times, list(sides.values())), strict=True))
        elif name == "group_norm":
            groups = groups_after(self.state, output, self.times)
            wanted |= {slot: groups for slot in ("args.1", "kwargs.num_groups") if slot in self.numbers and groups}
        for slot, v in slots(n):
            if slot in wanted and wanted[slot] != (self.env[v] if isinstance(v, fx.Node) else v):
                yield SetConstant(n.name, slot, wanted[slot])

    def _shapes(self, expected: Any) -> list[tuple[int, ...]]:
        return [self._shape(v) for v in pytree.tree_leaves(expected, is_leaf=_is_value) if isinstance(v, Value)]

    def _shape(self, value: Value) -> tuple[int, ...]:
        axes = self.state.tag(value).axes
        return tuple(int(self.times[a].sum()) if len(a) > 1 else len(a) for a in axes)

    def _keep_scale(self, n: fx.Node) -> None:
        """Attention divides by the root of the head size: after a cut inside heads, the old one is written out."""
        if n.target is not torch.nn.functional.scaled_dot_product_attention or n.kwargs.get("scale") is not None:
            return
        value = self.values.get(n.args[0].name) if n.args and isinstance(n.args[0], fx.Node) else None
        if isinstance(value, Value) and self._shape(value)[-1] != value.shape[-1]:
            edit = SetConstant(n.name, "kwargs.scale", value.shape[-1] ** -0.5)
            set_slot(n, edit.slot, edit.number)
            self.edits.append(edit)

    def _trials(self, n: fx.Node, expected: Any) -> Iterator[list[SetConstant | SplitAt]]:
        """Changes of constants that could make the shape of a node right, the likeliest first."""
        kept = list(self._kept(n))
        if kept:
            yield list(kept)
        name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
        values = [v for v in pytree.tree_leaves(expected, is_leaf=_is_value) if isinstance(v, Value)]
        if name in _SPLITS and values:
            shapes = [self._shape(v) for v in values]
            source = self.values.get(n.args[0].name) if isinstance(n.args[0], fx.Node) else None
            if isinstance(source, Value):
                for axis in range(len(source.shape)):
                    if sum(v.shape[axis] for v in values) == source.shape[axis] and len(values) > 1:
                        yield [SplitAt(n.name, axis, tuple(s[axis] for s in shapes))]
        if len(values) == 1:
            yield from self._by_shape(n, values[0])
        bounds = n.target in (operator.getitem, operator.setitem)  # which may count from the end
        places = [(slot, self._old(v), self._now(v)) for slot, v in slots(n)]
        whole = [
            (slot, old, now) for slot, old, now in places if type(old) is int and (old > 1 or (bounds and old < 0))
        ]
        tables = [self._new_sizes(n, values, old) for _, old, _ in whole]
        for combination in itertools.islice(itertools.product(*tables), _TRIES):
            trial = [
                SetConstant(n.name, slot, new)
                for (slot, _, now), new in zip(whole, combination, strict=True)
                if new is not None and new != now
            ]
            if trial:
                yield list(trial)

    def _by_shape(self, n: fx.Node, value: Value) -> Iterator[list[SetConstant | SplitAt]]:
        """Where the last constants spell the shape of the output, axis by axis."""
        new = self._shape(value)
        rank = len(value.shape)
        places = [(slot, v, self._old(v)) for slot, v in slots(n)]
        last = [place for place in places if isinstance(place[2], int)][-rank:]
        if len(last) == rank and all(old in (-1, k) for (_, _, old), k in zip(last, value.shape, strict=True)):
            sizes = {slot: size for (slot, _, _), size in zip(last, new, strict=True)}
            wrong = {slot: v for slot, v, old in last if old != -1 and sizes[slot] != self._now(v)}
            computed = [slot for slot, v in wrong.items() if isinstance(v, fx.Node)]
            if computed and n.target in ("view", "reshape", torch.reshape):  # from a batch, which may be another
                other = {slot: sizes[slot] for slot, _, old in last if old == -1 or slot in wrong}
                yield [SetConstant(n.name, slot, size) for slot, size in (other | {computed[0]: -1}).items()]
            if wrong:
                yield [SetConstant(n.name, slot, sizes[slot]) for slot in wrong]

    def _now(self, value: Any) -> Any:
        """The constant, or the number that a node gives now."""
        return self.env.get(value) if isinstance(value, fx.Node) else value

    def _old(self, value: Any) -> Any:
        """The constant, or the number that a node gave before the cut."""
        return self.values.get(value.name) if isinstance(value, fx.Node) else value

    def _new_sizes(self, n: fx.Node, values: Sequence[Value], old: int) -> list[int | None]:
        """What a constant may become: itself, a new size of an axis of that size, or a boundary that has moved."""
        found: dict[int | None, None] = {None: None}
        inputs = [self.values.get(i.name) for i in n.all_input_nodes]
        tensors = [v for v in [*inputs, *values] if isinstance(v, Value)]
        for value in tensors:
            for labels in self.state.tag(value).axes:
                if len(labels) >= abs(old) and (self.times[labels] != 1).any():
                    count = int(self.times[labels[:old] if old > 0 else labels[old:]].sum())
                    found[count if old > 0 else -count] = None
        return list(found)


def _is_value(x: Any) -> bool:
    return isinstance(x, Value)


def _tensor_shapes(result: Any) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def _module_of(n: fx.Node) -> str:
    """Path of the module whose forward made a node."""
    stack: Mapping[str, Any] = n.meta.get("nn_module_stack") or {}
    return next((str(entry[0]) for entry in reversed(list(stack.values()))), "")
