"""Trace a model: the graph of what it does, with shapes, source lines, and the place where each module's output is."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from morph.copying import own_copy
from morph.errors import SymbolicTraceError, TraceError
from morph.in_place import write_in_place
from morph.inputs import Inputs, arguments_of, by_position, images_in
from morph.interpreter import Interpreter
from morph.optional_arguments import Tracer, optional_arguments, steps
from morph.reloading import Reloaded

_LIBRARIES = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")


@dataclass(frozen=True)
class Trace:
    """A model as an fx graph, in evaluation mode.

    Attributes:
        root: The copy of the model that was traced; nothing done to it reaches the model.
        graph_module: The graph; its leaf modules are those of ``root``.
        outputs: For each module path that was called, the nodes that hold its (first) output, one for each call.
        shapes: Shape of the tensor at each node, by node name; nodes that hold no tensor are absent.
        inputs: The example inputs, by position.
    """

    root: nn.Module
    graph_module: fx.GraphModule
    outputs: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[Any, ...]

    def node(self, name: str) -> fx.Node:
        """Return the node called ``name``."""
        found: fx.Node = next(n for n in self.graph_module.graph.nodes if n.name == name)
        return found

    def calls(self) -> Iterator[tuple[fx.Node, nn.Module]]:
        """Every call of a leaf module, in the order of execution."""
        for node in self.graph_module.graph.nodes:
            if node.op == "call_module":
                yield node, self.graph_module.get_submodule(str(node.target))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in evaluation mode and give every module its own training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, flag in flags:
            module.training = flag


def place_of(error: BaseException) -> str:
    """The innermost line outside torch and morph that ``error`` passed, as ``file:line, in function``; or ''."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((*_LIBRARIES, "<"))]
    return f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}" if own else ""


class _Tracer(Tracer):
    """Remembers which node holds the output of which module; convolutions and attention are leaves."""

    def __init__(self, lines: bool, absent: Collection[str], buffers: bool) -> None:
        super().__init__()
        self.record_stack_traces = lines
        self.proxy_buffer_attributes = buffers
        self.absent = absent
        self.outputs: dict[str, list[str]] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _ConvNd | nn.MultiheadAttention) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        first = _first_proxy(result)
        if first is not None:
            self.outputs.setdefault(self.path_of_module(m), []).append(first.node.name)
        return result


def _first_proxy(value: Any) -> fx.Proxy | None:
    """The first proxy in a tensor, tuple, list or dict of proxies."""
    if isinstance(value, fx.Proxy):
        return value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((p for p in map(_first_proxy, items) if p is not None), None)


class _Shapes(Interpreter):
    """Runs the graph once and keeps the shape at each node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        return result


def try_inputs(model: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> None:
    """Run ``model`` once in evaluation mode, to see that it accepts ``inputs``.

    Args:
        model: Left in the mode that it is in.
        inputs: Positional arguments.
        named: Named arguments.

    Raises:
        TraceError: If it does not; names the shapes and the innermost line of the user's own code.
    """
    with evaluation(model), torch.no_grad():
        try:
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (inputs, dict(named or {})))  # it may write into them
            model(*args, **kwargs)
        except Exception as error:
            shapes = ", ".join(str(list(x.shape)) for x in tree_leaves((inputs, named)) if isinstance(x, Tensor))
            where = place_of(error)
            images = not named and images_in(inputs) is not None
            what = "images of the shape" if images else "inputs of the shapes, types and names"
            raise TraceError(
                f"{type(model).__name__} does not accept inputs of shape {shapes}: {_first_line(error)}"
                + (f" (at {where})" if where else "")
                + f"; give {what} it was made for"
            ) from error


def trace(model: nn.Module, inputs: Inputs) -> Trace:
    """Trace a copy of ``model`` in evaluation mode; the model itself is not touched.

    Args:
        model: Any module that `torch.fx` can trace symbolically.
        inputs: One batch of example inputs, on the model's device: a tensor, a tuple of arguments, or a mapping of
            named ones.

    Raises:
        TraceError: If the model does not accept the inputs or cannot be traced; names the line of the user's code.
    """
    root = own_copy(model).eval()
    try_inputs(root, *arguments_of(inputs))
    args = by_position(root, inputs)
    module, found = trace_calls(root, lines=True)
    runner = _Shapes(module)
    with torch.no_grad():
        runner.run(*args)
    outputs = {path: tuple(names) for path, names in found.items()}
    return Trace(root, module, outputs, runner.shapes, args)


def trace_graph(root: nn.Module) -> fx.GraphModule:
    """The symbolic graph of ``root``, whose modules it shares; its nodes do not know the lines that they come from.

    Looking those up takes a fifth of the time and of the memory of a cut through the graph.

    Raises:
        TraceError: If it cannot be traced; names the line of the user's code.
    """
    return trace_calls(root)[0]


def trace_calls(
    root: nn.Module, *, lines: bool = False, absent: Collection[str] = ()
) -> tuple[fx.GraphModule, dict[str, list[str]]]:
    """The symbolic graph of ``root`` and, by module path, the nodes that hold its (first) output, one for each call.

    Args:
        root: The graph shares its modules.
        lines: Whether nodes know the lines of the user's code that they come from.
        absent: Names of arguments that are None to the code.

    Raises:
        SymbolicTraceError: If it cannot be traced; names the line of the user's code.
    """
    if root._forward_hooks or root._forward_pre_hooks:
        raise SymbolicTraceError(
            f"{type(root).__name__} cannot be traced: it has hooks of its own, which no graph would call; put "
            f"what they do into its forward, or remove them"
        )
    tracer = _Tracer(lines, absent, buffers=True)
    try:
        try:
            graph = write_in_place(tracer.trace(root), root)
        except Exception:  # code may look at the values of its buffers, which then are constants
            tracer = _Tracer(lines, absent, buffers=False)
            graph = write_in_place(tracer.trace(root), root)
    except Exception as error:
        where = place_of(error)
        raise SymbolicTraceError(
            f"{type(root).__name__} cannot be traced: {_first_line(error)}"
            + (f" (at {where})" if where else "")
            + f"; {_way_out(root)}"
        ) from error
    graph._tracer_cls = Reloaded
    return fx.GraphModule(root, graph, type(root).__name__), tracer.outputs


def require_same_way(graph: fx.GraphModule, root: nn.Module, inputs: Inputs) -> None:
    """See that the code does what its graph does with ``inputs``: to a tracer an argument is never None.

    Args:
        graph: The traced graph of ``root``.
        root: Not touched.
        inputs: Example inputs.

    Raises:
        SymbolicTraceError: If it does something else where arguments are None that are not among them; names these.
    """
    optional = optional_arguments(root)
    if not optional:
        return
    args, kwargs = arguments_of(inputs)
    names = list(inspect.signature(root.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    absent = [name for name in optional if given.get(name) is None]
    try:
        found = trace_calls(root, absent=absent)[0] if absent else graph
    except SymbolicTraceError:  # which is another way in any case
        found = None
    if found is None or steps(found.graph) != steps(graph.graph):
        raise SymbolicTraceError(
            f"{type(root).__name__} cannot be traced: its code does something else where {', '.join(absent)} is None, "
            f"which no graph can tell; give it among the inputs, or take it out of the arguments of its forward"
        )


def _way_out(root: nn.Module) -> str:
    """What to do about a model that cannot be traced."""
    if hasattr(type(root).forward, "__wrapped__"):
        return (
            "its forward is wrapped by a decorator, as those of Hugging Face are, which symbolic tracing cannot look "
            "through; analyse, prune, widen and the objectives of teaching do without it"
        )
    return "control flow must not depend on the values of tensors: rewrite that line or wrap it with torch.fx.wrap"


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
