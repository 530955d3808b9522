"""Record what a model does: every ATen operator that one run calls, without data where that is possible."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from morph.analysis.caches import forget_tensors
from morph.copying import copy_module, uncopied
from morph.inputs import Inputs as Inputs
from morph.inputs import arguments_of as arguments_of
from morph.inputs import tensors_of as tensors_of
from morph.module_tree import Modules as Modules
from morph.module_tree import named_modules as named_modules
from morph.module_tree import named_tensors as named_tensors
from morph.module_tree import tensors_in as tensors_in
from morph.unfused import plain_attention as plain_attention

T = TypeVar("T")
How = Literal["shapes", "data"]


@dataclass(eq=False, slots=True)
class Value:
    """One tensor of a recorded run.

    Attributes:
        number: Its place in the order of appearance.
        shape: Its shape.
        source: Name of the parameter or buffer that it is; ``""`` for anything else.
        data: The tensor itself, for constants that are neither parameter, buffer nor computed.
        input: Whether it came in from outside.
        floating: Whether it holds real numbers.
        form: Its type and strides, if the run had data.
    """

    number: int
    shape: tuple[int, ...]
    source: str = ""
    data: Tensor | None = None
    input: bool = False
    floating: bool = True
    form: tuple[Any, ...] = ()


@dataclass(eq=False, slots=True)
class Call:
    """One operator call; tensors are replaced by their `Value`.

    Attributes:
        target: The operator, or the class of a module that a rule takes as a whole.
        args: Positional arguments.
        kwargs: Named arguments.
        output: What came out: a value, a list of values, or None.
        module: Path of the module in whose forward it happened.
        frame: File, line and function of the user's code.
        reads: Every value among the arguments, in order.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    module: str
    frame: tuple[str, int, str]
    reads: list[Value]

    @property
    def where(self) -> str:
        """The user's line, as ``file:line, in function``; empty if there is none."""
        file, line, function = self.frame
        return f"{file}:{line}, in {function}" if file else ""


class Sink:
    """Where quick forwards of modules tell what they would have called; whoever runs the model sets ``take``."""

    def __init__(self) -> None:
        self.take: Callable[[str, Any, tuple[Any, ...], dict[str, Any], Any], None] = Sink.nowhere

    @staticmethod
    def nowhere(path: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Nobody listens."""


@dataclass(eq=False)
class Recording:
    """A run of a model as a list of calls.

    Attributes:
        sources: The value of each parameter and buffer, by its first name.
        inputs: The values of the tensors that came in, in the order of `tensors_of`.
        calls: The calls, in order.
        outputs: The values that came out.
        evaluated: How many of the calls belong to the run in evaluation mode; a run in training mode may follow.
        outputs_in_training: The values that came out of that.
        values: Every value, by number.
        traced: Whether the run had shapes only, or data.
        shared: Names of parameters or buffers that share memory with another one of a different form.
        twin: The copy that was run, without data where ``traced`` says shapes; None if a run
            in training mode may have changed its data.
        kept: What the modules of ``twin`` are, before and after the run.
        skeleton: Beside a twin with data, a copy without, where code cannot tell it from one with data on a processor.
        whole: Module classes that were recorded as one call.
        quick: Of modules of ``twin``, their attributes, and a forward that calls nothing.
        sink: Told by these forwards what they would have called.
    """

    sources: dict[str, Value] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    evaluated: int = 0
    outputs_in_training: list[Value] = field(default_factory=list)
    traced: How = "shapes"
    shared: tuple[str, ...] = ()
    twin: nn.Module | None = None
    kept: Kept | None = None
    skeleton: nn.Module | None = None
    whole: tuple[type[nn.Module], ...] = ()
    quick: list[tuple[dict[str, Any], Callable[[Tensor], Any]]] = field(default_factory=list)
    sink: Sink = field(default_factory=Sink)

    @functools.cached_property
    def settled(self) -> int:
        """How many calls of the run in evaluation mode come before the first whose shape depends on values."""
        calls = self.calls[: self.evaluated]
        return next((n for n, call in enumerate(calls) if _depends_on_values(call.target)), self.evaluated)

    def new(self, tensor: Tensor, source: str = "", data: Tensor | None = None, *, outside: bool = False) -> Value:
        """Add a value for ``tensor``."""
        values = self.values
        form = (tensor.dtype, tensor.stride()) if self.traced == "data" and tensor.layout == torch.strided else ()
        value = Value(len(values), tuple(tensor.shape), source, data, outside, tensor.is_floating_point(), form)
        values.append(value)
        return value

    def has(self, value: Value) -> bool:
        """Whether a value is of this run, and not of another whose tensors the model has kept."""
        return value.number < len(self.values) and self.values[value.number] is value

    def nothing(self) -> Value:
        """Add a value for an output that nobody asked for: a tensor without elements."""
        value = Value(len(self.values), (0,))
        self.values.append(value)
        return value


@functools.cache
def _depends_on_values(target: Any) -> bool:
    """Whether the shape that an operator gives depends on values."""
    name = str(target)
    dynamic = torch.Tag.dynamic_output_shape in getattr(target, "tags", ())
    return "nms" in name or (dynamic and "index" not in name)


def values_in(tree: Any) -> list[Value]:
    """Every value in nested lists, tuples and dicts."""
    return collect(tree, Value, [])


def collect(tree: Any, kind: type[T], found: list[T]) -> list[T]:
    """``found`` and every object of a kind in nested lists, tuples and dicts."""
    if type(tree) is kind:
        found.append(tree)
    elif isinstance(tree, tuple | list | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            if type(item) is kind:
                found.append(item)
            elif isinstance(item, tuple | list | dict):
                collect(item, kind, found)
    return found


def sharing(tensors: Sequence[tuple[str, Tensor]]) -> tuple[str, ...]:
    """Names of those parameters and buffers that share their memory with another one; copies of the model do not."""
    by_memory: dict[int, list[str]] = {}
    for name, tensor in tensors:
        if tensor.layout == torch.strided and tensor.numel():
            by_memory.setdefault(tensor.untyped_storage()._cdata, []).append(name)
    if len(by_memory) == len(tensors):
        return ()
    return tuple(name for names in by_memory.values() if len(names) > 1 for name in names)


_META = torch.device("meta")


def bare(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of the usual layout without data; faster than ``torch.empty``."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n or 1
    strides.reverse()
    return torch.empty_strided(shape, strides, dtype=dtype, device=_META)


def without_data(tensor: Tensor) -> Tensor:
    """A tensor of the same form without data; whole numbers keep theirs: they are small, and code may look at them."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
        if tensor.is_contiguous():
            return bare(tensor.shape, tensor.dtype)
        return torch.empty_like(tensor, device="meta")
    return tensor.detach().cpu().clone()


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")  # dicts of a class of their own


class Kept:
    """What the modules of a model are now: their classes, attributes, tensors and hooks, and dicts that they fill.

    Args:
        modules: The `named_modules` of a model.
        tensors: Their parameters and buffers, if they are at hand.
    """

    def __init__(self, modules: Modules, tensors: Sequence[tuple[str, Tensor]] | None = None) -> None:
        self.modules = modules
        self.tensors = dict(tensors_in(modules) if tensors is None else tensors)
        self.kinds = [type(module) for _, module in self.modules]
        self.filled: list[tuple[dict[str, Any], dict[str, Any]]] = []  # a dict, and a copy of it
        self.empty: list[dict[str, Any]] = []
        for _, module in self.modules:
            attributes = vars(module)
            self.filled.append((attributes, attributes.copy()))
            tables = [value for value in attributes.values() if type(value) is dict]
            for table in (*tables, *[attributes[name] for name in _HOOKS]):
                if table:
                    self.filled.append((table, table.copy()))
                else:
                    self.empty.append(table)

    def put_back(self) -> None:
        """Make the modules what they were."""
        for (_, module), kind in zip(self.modules, self.kinds, strict=True):
            if type(module) is not kind:
                module.__class__ = kind
        for now, was in self.filled:
            if len(now) != len(was) or not all(map(operator.is_, now.values(), was.values())) or list(now) != list(was):
                now.clear()
                now.update(was)
        for table in self.empty:
            if table:
                table.clear()


@contextmanager
def put_back(kept: Kept) -> Iterator[None]:
    """Give every module its class, attributes, tensors and hooks back: some keep what a run computed, or add hooks.

    So do dicts that they fill, and functions that keep their results: a run neither finds nor leaves tensors there.

    Args:
        kept: What they are now.
    """
    forget_tensors(kept.kinds)
    try:
        yield
    finally:
        kept.put_back()
        forget_tensors(kept.kinds)


def skeleton(model: nn.Module, tensors: Sequence[tuple[str, Tensor]] | None = None) -> nn.Module:
    """A copy of ``model`` in evaluation mode whose floating-point tensors have shapes but no data.

    Whole-number buffers keep their data (they are small, and code may look at them).

    Args:
        model: Not touched.
        tensors: Its parameters and buffers, if they are at hand.

    Raises:
        TraceError: If the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(model) if tensors is None else tensors:
        if type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter):  # the class takes long to say no
            memo[id(tensor)] = nn.Parameter(without_data(tensor), requires_grad=False)
        else:
            memo[id(tensor)] = without_data(tensor)
    try:
        return evaluating(copy_module(model, memo))
    except Exception as error:
        raise uncopied(model, error) from error


def evaluating(model: nn.Module) -> nn.Module:
    """What ``model.eval()`` gives, faster: modules that only keep a flag of it are not asked."""
    modules = [module for _, module in named_modules(model)]
    if any(type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval for m in modules):
        return model.eval()
    for module in modules:
        vars(module)["training"] = False
    return model


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
