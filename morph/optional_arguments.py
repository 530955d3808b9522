"""Arguments that may be None: to a tracer an argument never is, so code that asks takes the way of a given one."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from morph.in_place import InPlaceProxy


class Tracer(fx.Tracer):
    """Knows of assignments in place; the arguments named in ``absent`` are None to the code that is traced."""

    absent: Collection[str] = ()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Of a kind that knows of assignments in place."""
        return InPlaceProxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """What the code is called with."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [None if isinstance(a, fx.Proxy) and a.node.target in self.absent else a for a in args]


def optional_arguments(root: nn.Module) -> list[str]:
    """The names of the arguments of a model that are None where they are not given."""
    parameters = inspect.signature(type(root).forward).parameters
    return [name for name, parameter in parameters.items() if parameter.default is None]


def steps(graph: fx.Graph) -> list[str]:
    """What a graph does, step by step."""
    return [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]
