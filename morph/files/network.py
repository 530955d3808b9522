"""A module that runs stored graphs node by node: what a user's own class becomes when it is opened from a file.

No code is generated from the graph, so a name in it can only ever be looked up, never executed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from morph.interpreter import Interpreter


class GraphNetwork(nn.Module):
    """Runs one graph, or one in training and another in evaluation mode.

    The children, parameters and buffers are those of the traced model under their own names; modules that were
    traced through are plain containers, so that the state_dict is the same.

    Attributes:
        graphs: ``"always"`` -> graph, or ``"train"`` and ``"eval"`` -> graphs.
    """

    graphs: dict[str, fx.Graph]

    def graph_of_mode(self) -> fx.Graph:
        """The graph that runs in the present mode."""
        return self.graphs.get("always") or self.graphs["train" if self.training else "eval"]

    def run(self, *inputs: Any, **named: Any) -> Any:
        """Run the graph of the present mode on ``inputs``, in the order of the traced signature, and on named ones.

        Raises:
            TypeError: If there is no input of a name, or one before a named one is missing.
        """
        graph = self.graph_of_mode()
        names = [str(node.target) for node in graph.nodes if node.op == "placeholder"][len(inputs) :]
        given = [named.pop(name) for name in names[: len(named)] if name in named]
        if named:
            raise TypeError(f"the inputs of this network are {', '.join(names)}; {', '.join(named)} cannot be given so")
        return Interpreter(self, graph=graph).run(*inputs, *given)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """See `run`."""
        return self.run(*inputs, **named)


class SingleInputGraphNetwork(GraphNetwork):
    """A graph network of one input; its plain signature lets it be traced again."""

    def forward(self, x: Tensor) -> Any:  # one input, not any number
        """See `run`."""
        return self.run(x)
