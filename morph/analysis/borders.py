"""A border in a traced graph: behind it, positions of one axis may go although they stay before it."""

from __future__ import annotations

from torch import Tensor, nn

from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.table import on
from morph.analysis.tags import Tag

__all__ = ["Border"]


class Border(nn.Module):
    """Stands in a graph where one reader may take fewer positions than its source has; hands on what it gets.

    To the analysis, what lies behind it is free of what lies before it.

    Args:
        axis: The axis, counted from 0.
    """

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Return a copy of ``x``."""
        return x.clone()


@on(Border)
def _(op: Propagation, x: Value) -> Tag:
    border = op.call.args[0]
    assert isinstance(border, Border)
    axes = list(op.tag(x).axes)
    axes[border.axis] = op.fresh(len(axes[border.axis]), ("border",))
    return Tag(tuple(axes))
