"""A module that runs stored graphs node by node: what a user's own class becomes when it is opened from a file.

No code is generated from the graph, so a name in it can only ever be looked up, never executed.
"""

from __future__ import annotations

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

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the graph of the present mode on ``inputs``, in the order of the traced signature."""
        output: Tensor = Interpreter(self, graph=self.graph_of_mode()).run(*inputs)
        return output

    def forward(self, *inputs: Tensor) -> Tensor:
        """See `run`."""
        return self.run(*inputs)


class SingleInputGraphNetwork(GraphNetwork):
    """A graph network of one input; its plain signature lets it be traced again."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # one input, not any number
        """See `run`."""
        return self.run(x)
