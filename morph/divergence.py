"""A run whose loss or weights are no numbers any more ends, and says where its last good state is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from morph.errors import DivergedError
from morph.search_progress import Keep


def kept_at(keep: Keep | None) -> str:
    """Where the last good state is, as the end of an error; empty if there is none."""
    return f"; the last good state is in {keep.path}" if keep is not None and keep.path.exists() else ""


def require_finite(
    finite: Tensor, loss: Tensor, parameters: Iterable[nn.Parameter], step: int, keep: Keep | None
) -> None:
    """Stop a run where a loss or a weight is no number; waits for the device.

    Args:
        finite: Whether all losses so far were finite, a bool of no axes.
        loss: The last one, for the message.
        parameters: What learns.
        step: Steps done.
        keep: Where the state is kept; None for nowhere.

    Raises:
        DivergedError: If one is infinite or not a number.
    """
    norms = torch.stack(torch._foreach_norm([p.detach() for p in parameters]))
    if not bool(finite & torch.isfinite(norms).all()):
        raise DivergedError(
            f"the loss or a weight is not a finite number after step {step} (loss {float(loss):g}); "
            f"give a smaller learning rate{kept_at(keep)}"
        )
