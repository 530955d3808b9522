"""How a traced graph that was pickled becomes a graph again: `torch.fx` traces the code that it had made of it."""

from __future__ import annotations

import types
from typing import Any

from torch import fx, nn

from morph.in_place import write_in_place
from morph.optional_arguments import Tracer


class Reloaded(Tracer):
    """Keeps each function that the code of the graph names as one node, as it was; torch puts it to use by itself."""

    proxy_buffer_attributes = True

    def trace(self, root: nn.Module | types.FunctionType, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of the code of ``root``."""
        code: Any = type(root).forward if isinstance(root, nn.Module) else root
        named = [f for f in code.__globals__.values() if isinstance(f, types.FunctionType)]
        self._autowrap_function_ids.update(map(id, named))
        graph = super().trace(root, concrete_args)
        return write_in_place(graph, self.root)
