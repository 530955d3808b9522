"""Graphs as plain data: tracing a user's class, writing its nodes, checking and rebuilding them."""

from __future__ import annotations

import copy
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from morph.errors import ModelFileError, UnsafeFileError
from morph.files import names, values
from morph.files.spec import Json, NodeSpec
from morph.files.values import Found, NotPlainError, Scope
from morph.in_place import write_in_place
from morph.optional_arguments import Tracer, optional_arguments, steps

_OPS = ("placeholder", "get_attr", "call_module", "call_function", "call_method", "output")


def known_throughout(module: nn.Module) -> bool:
    """Whether every module in ``module`` is of a known class."""
    return all(names.class_name(type(m)) is not None for m in module.modules())


def calls_known(module: fx.GraphModule) -> bool:
    """Whether every module that a graph calls is of a known class."""
    called = [str(node.target) for node in module.graph.nodes if node.op == "call_module"]
    return all(known_throughout(module.get_submodule(path)) for path in called)


class _Tracer(Tracer):
    """Keeps modules of known classes whole and records what is read from buffers."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return known_throughout(m)


def trace_both(module: nn.Module) -> tuple[dict[str, list[NodeSpec]], dict[str, Tensor]]:
    """Trace a module of a user's own class in training and in evaluation mode.

    Returns:
        The graphs, one if they agree, and the constant tensors in them by the name under which they shall be buffers.

    Raises:
        ModelFileError: If it cannot be traced, draws random numbers while traced, or uses something that no file may
            name; says which and what to do.
    """
    constants: dict[str, Tensor] = {}
    graphs: dict[str, list[NodeSpec]] = {}
    for mode in ("train", "eval"):
        graphs[mode] = _trace(module, mode == "train", constants)
        count = len(constants)
        if _trace(module, mode == "train", constants) != graphs[mode] or len(constants) != count:
            raise ModelFileError(
                f"cannot save {type(module).__name__}: its forward computes with values that change "
                f"from call to call without coming from the input{_WAY_OUT}"
            )
    if graphs["train"] == graphs["eval"]:
        graphs = {"always": graphs["train"]}
    return graphs, constants


_WAY_OUT = "; save its state_dict instead and open that with --arch package.module:callable"


def _trace(module: nn.Module, training: bool, constants: dict[str, Tensor]) -> list[NodeSpec]:
    memo: dict[int, object] = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    try:
        root = copy.deepcopy(module, memo).train(training)
    except Exception as error:
        raise ModelFileError(f"cannot save {type(module).__name__}: it cannot be copied ({error}){_WAY_OUT}") from error
    if any(m.training is not training for m in root.modules()):
        raise ModelFileError(
            f"cannot save {type(module).__name__}: its own train() keeps parts of it in another mode, "
            f"which would be lost{_WAY_OUT}"
        )
    try:
        graph = write_in_place(_Tracer().trace(root), root)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelFileError(
            f"cannot save {type(module).__name__}: it is not of a known class and cannot be traced ({first}){_WAY_OUT}"
        ) from error
    asked_for = [name for name in optional_arguments(root) if not _same_without(name, graph, root)]
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in asked_for:
            node.args = ()  # so that it must be given
    return write(graph, root, constants)


def _same_without(name: str, graph: fx.Graph, root: nn.Module) -> bool:
    """Whether the code does the same where an argument is None."""
    tracer = _Tracer()
    tracer.absent = [name]
    try:
        return steps(write_in_place(tracer.trace(root), root)) == steps(graph)
    except Exception:
        return False


def write(graph: fx.Graph, root: nn.Module, constants: dict[str, Tensor]) -> list[NodeSpec]:
    """Write the nodes of ``graph``, whose paths are in ``root``.

    Args:
        graph: The graph.
        root: The module it belongs to.
        constants: Tensors in it that are neither parameters nor buffers are added here; equal ones share a name.

    Raises:
        ModelFileError: If a node uses something that no file may name.
    """
    registered = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    registered |= {name for name, _ in root.named_buffers(remove_duplicate=False)}

    def special(value: object) -> Json:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        raise NotPlainError(type(value).__name__)

    result = []
    for node in graph.nodes:
        target = _target(node)
        if node.op == "get_attr" and target not in registered:
            target = _constant(_look_up(root, target), root, constants)
        try:
            args = [values.encode(arg, special) for arg in node.args]
            kwargs = {key: values.encode(arg, special) for key, arg in node.kwargs.items()}
        except NotPlainError as error:
            raise ModelFileError(
                f"cannot save {type(root).__name__}: {node.op} {target} has an argument of type {error}{_WAY_OUT}"
            ) from error
        result.append(NodeSpec(node.op, node.name, target, args, kwargs))
    return result


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        if node.op == "call_method" and node.target not in names.METHODS:
            raise ModelFileError(
                f"cannot save the graph: it calls the method {node.target!r}, which is not among those a file may "
                f"name{_WAY_OUT}"
            )
        return node.target
    if node.target is getattr:
        return "getattr"
    name = names.function_name(node.target)
    if name is None:
        wanted = f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__qualname__', node.target)}"
        raise ModelFileError(
            f"cannot save the graph: it calls {wanted}, which is not among the functions a file may name{_WAY_OUT}"
        )
    return name


def _look_up(root: nn.Module, path: str) -> Tensor:
    found: object = root
    for part in path.split("."):
        found = getattr(found, part)
    if not isinstance(found, Tensor):
        raise ModelFileError(
            f"cannot save {type(root).__name__}: its graph reads {path}, a {type(found).__name__}{_WAY_OUT}"
        )
    return found.detach()


def _constant(tensor: Tensor, root: nn.Module, constants: dict[str, Tensor]) -> str:
    """The name of a constant, new if no equal one is there."""
    for name, other in constants.items():
        if other.dtype == tensor.dtype and other.shape == tensor.shape and _same_bits(tensor, other):
            return name
    number = len(constants)
    while hasattr(root, f"constant_{number}"):
        number += 1
    constants[f"constant_{number}"] = tensor.clone()
    return f"constant_{number}"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return a is b
    return torch.equal(a.reshape(-1).contiguous().view(torch.uint8), b.reshape(-1).contiguous().view(torch.uint8))


@dataclass(frozen=True)
class Surroundings:
    """What paths of a graph may lead to: whether there is a tensor, and whether there is a module, at a path."""

    has_tensor: Callable[[str], bool]
    has_module: Callable[[str], bool]


def check(nodes: list[NodeSpec], around: Surroundings) -> None:
    """Refuse a graph that names something it must not. Imports and builds nothing.

    Args:
        nodes: The nodes.
        around: What stands at and below the network.

    Raises:
        ModelFileError: If the graph is not one that `write` makes.
        UnsafeFileError: If it wants a name, path, method, function or attribute outside the lists.
    """
    seen: set[str] = set()
    for node in nodes:
        where = f"node {node.name!r}"
        if not _is_name(node.name) or node.name in seen:
            raise UnsafeFileError(f"has a graph node called {node.name!r}, which is not a new identifier; refused")
        if node.op not in _OPS or (node.op == "output") is not (node is nodes[-1]):
            raise values.bad(f"{node.op!r} is not the kind of a node in this place", where)
        scope = Scope(nodes=seen)
        for key, value in node.kwargs.items():
            if not _is_name(key):
                raise UnsafeFileError(f"has a graph argument called {key!r}, which is not an identifier; refused")
            values.check(value, scope, where)
        values.check(node.args, scope, where)
        _CHECKS[node.op](node, around)
        seen.add(node.name)
    if not nodes:
        raise values.bad("it has no nodes", "a graph")


def _is_name(name: str) -> bool:
    return names.is_identifier(name) and not keyword.iskeyword(name)


def _check_placeholder(node: NodeSpec, around: Surroundings) -> None:
    if not _is_name(node.target):
        raise UnsafeFileError(f"has a graph input called {node.target!r}, which is not an identifier; refused")


def _check_get_attr(node: NodeSpec, around: Surroundings) -> None:
    if not around.has_tensor(node.target):
        raise UnsafeFileError(f"has a graph that reads {node.target!r}, not a parameter or buffer of it; refused")


def _check_call_module(node: NodeSpec, around: Surroundings) -> None:
    if not around.has_module(node.target):
        raise UnsafeFileError(f"has a graph that calls {node.target!r}, not a module of it; refused")


def _check_call_method(node: NodeSpec, around: Surroundings) -> None:
    if node.target not in names.METHODS or not node.args:
        raise UnsafeFileError(
            f"has a graph that calls the method {node.target!r}, not among those a file may name; refused"
        )


def _check_call_function(node: NodeSpec, around: Surroundings) -> None:
    if node.target == "getattr":
        name = node.args[1] if len(node.args) == 2 else None
        if not isinstance(name, str) or node.kwargs or name not in names.ATTRIBUTES:
            raise UnsafeFileError(
                f"has a graph that reads the attribute {node.args[1:]!r}, not among those a file may "
                f"name ({', '.join(sorted(names.ATTRIBUTES))}); refused"
            )
    elif node.target not in names.FUNCTIONS:
        raise UnsafeFileError(
            f"has a graph that calls {node.target!r}, not among the functions a file may name; refused"
        )


def _check_output(node: NodeSpec, around: Surroundings) -> None:
    if len(node.args) != 1 or node.kwargs:
        raise values.bad("the output has not one argument", f"node {node.name!r}")


_CHECKS: Mapping[str, Callable[[NodeSpec, Surroundings], None]] = {
    "placeholder": _check_placeholder,
    "get_attr": _check_get_attr,
    "call_module": _check_call_module,
    "call_function": _check_call_function,
    "call_method": _check_call_method,
    "output": _check_output,
}


def build(nodes: list[NodeSpec]) -> fx.Graph:
    """Build a checked graph. It is made to be interpreted; nothing is compiled from it."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for node in nodes:
        target: object = node.target
        if node.op == "call_function":
            target = getattr if node.target == "getattr" else names.resolve(node.target)
        found = Found({}, {}, made)
        args = tuple(values.decode(arg, found) for arg in node.args)
        kwargs = {key: values.decode(arg, found) for key, arg in node.kwargs.items()}
        made[node.name] = graph.create_node(node.op, target, args, kwargs, name=node.name)  # type: ignore[arg-type]
    return graph
