"""Run a graph node by node, as the code that is generated from it runs."""

from __future__ import annotations

from typing import Any

from torch import fx


class Interpreter(fx.Interpreter):
    """Gives functions lists of their own: those in a graph are immutable, and some functions write into theirs."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_own(item) for item in args), {key: _own(item) for key, item in kwargs.items()}


def _own(tree: Any) -> Any:
    """Lists and dicts as plain ones; everything else is itself."""
    if isinstance(tree, list):
        return [_own(item) for item in tree]
    if isinstance(tree, dict):
        return {key: _own(item) for key, item in tree.items()}
    return tuple([_own(item) for item in tree]) if type(tree) is tuple else tree
