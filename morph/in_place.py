"""Assignments like ``x += y`` and ``x[i] = y`` in traced code.

`torch.fx` takes the first for ``x = x + y``, whoever else sees ``x``, and refuses the second.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

_NAMES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
IN_PLACE = frozenset([*(getattr(operator, f"i{name}") for name in _NAMES), operator.setitem])
_WRITES = "written_by"  # in the meta of a node: the operator that the code has there
_FRESH = (_ConvNd, nn.Linear, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.MultiheadAttention)
_VIEWS = frozenset(
    [
        "getitem",
        "getattr",
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "ravel",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "t",
        "chunk",
        "split",
        "tensor_split",
        "split_with_sizes",
        "hsplit",
        "vsplit",
        "dsplit",
        "unbind",
        "squeeze",
        "unsqueeze",
        "narrow",
        "select",
        "diagonal",
        "expand",
        "broadcast_to",
        "expand_as",
        "view_as",
        "reshape_as",
        "contiguous",
        "to",
        "type",
        "type_as",
        "float",
        "double",
        "half",
        "bfloat16",
        "detach",
        "alias",
        "real",
        "imag",
        "view_as_real",
        "view_as_complex",
        "unfold",
        "atleast_1d",
        "atleast_2d",
        "atleast_3d",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "rearrange",
    ]
)


class InPlaceProxy(fx.Proxy):
    """Remembers that the code assigns in place; `write_in_place` decides whether that matters."""

    def __setitem__(self, index: Any, value: Any) -> None:
        """A node that nobody reads; it stands where the code writes."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _assigning(name: str) -> Callable[[InPlaceProxy, Any], Any]:
    plain: Callable[[Any, Any], Any] = getattr(operator, f"{name}_" if name in ("and", "or") else name)
    writing = getattr(operator, f"i{name}")

    def assign(self: InPlaceProxy, other: Any) -> Any:
        result = plain(self, other)
        if isinstance(result, fx.Proxy):
            result.node.meta[_WRITES] = writing
        return result

    return assign


for _name in _NAMES:
    setattr(InPlaceProxy, f"__i{_name}__", _assigning(_name))


def write_in_place(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Write in place what the code assigns in place, where another name for the same memory is read later on.

    Elsewhere both are the same, and the plain operator is what passes look for.

    Args:
        graph: As traced with `InPlaceProxy`; changed.
        root: Holds its modules.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    same: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        writing, source = node.meta.pop(_WRITES, None), _source(node)
        if writing is not None and source is not None:
            others = (user for name in same[source] for user in name.users)
            if any(place[user] > place[node] for user in others):
                node.target = writing
        _join(node, same, root)
    return graph


class Writings:
    """Which nodes of a graph may be names of one memory, and where that is written over.

    Args:
        graph: Not touched.
        root: Holds its modules.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.place = {node: number for number, node in enumerate(graph.nodes)}
        self.same: dict[fx.Node, list[fx.Node]] = {}
        self.writers: list[fx.Node] = []
        for node in graph.nodes:
            _join(node, self.same, root)
            module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if _source(node) is not None and writes_over(node, module):
                self.writers.append(node)

    def between(self, node: fx.Node, user: fx.Node | None = None) -> bool:
        """Whether something may write into what ``node`` gave before ``user`` reads it, or at any time."""
        end = len(self.place) if user is None else self.place[user]
        names = self.same[node]
        return any(self.place[node] < self.place[w] < end and _source(w) in names for w in self.writers)


def writes_over(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node writes over its first argument; ``module`` is what it calls, if it calls one."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return bool(
        getattr(module, "inplace", False)
        or node.kwargs.get("inplace")
        or (module is None and (name.endswith("_") or node.target in IN_PLACE))
    )


def _source(node: fx.Node) -> fx.Node | None:
    """The first argument of a node, if that is a node."""
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _join(node: fx.Node, same: dict[fx.Node, list[fx.Node]], root: nn.Module) -> None:
    """Note whether a node may be another name of the memory of its first argument; the nodes before it are noted."""
    source = _source(node)
    joins = source is not None and (node.target in IN_PLACE or _may_share(node, root))
    same[node] = same[source] if joins and source is not None else []
    same[node].append(node)


def _may_share(node: fx.Node, root: nn.Module) -> bool:
    """Whether what a node gives may lie in the memory of its first argument."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return not isinstance(module, _FRESH)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    home = getattr(node.target, "__module__", None) or "torch"  # functions written in C name none
    if node.op == "call_function" and not home.startswith(("torch", "_operator")):
        return True
    return bool(name in _VIEWS or name.endswith("_") or node.kwargs.get("inplace"))


def writes(node: fx.Node) -> bool:
    """Whether a node must stay though nobody reads what it gives."""
    return bool(node.is_impure() or node.target in IN_PLACE)
