"""What changes while a student is searched for: the strength of the penalty, and the learning rate of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from morph.search_budget import Meter, close_in_order

MILESTONES = (0.5, 0.85)
"""Shares of the search at which the learning rate falls by ten: epochs 150 and 255 of the paper's 300."""


def learning_rate(base: float, step: int, steps: int) -> float:
    """The learning rate of the weights at a step, from 0 on."""
    return base * float(0.1 ** sum(step >= share * steps for share in MILESTONES))


def distances(sparse: Tensor, alpha: Tensor) -> Tensor:
    """How long each gate has to go until it closes, ``[total]``: ``|S(z)| / alpha``; infinite where alpha is zero."""
    return torch.where(alpha > 0, sparse.abs() / alpha.clamp(min=1e-30), torch.inf)


def order_of_closing(distance: Tensor) -> Tensor:
    """Numbers of the gates that are open, the nearest to zero first; equal ones in the order of their numbers."""
    order = torch.argsort(distance, stable=True)
    return order[distance[order] > 0]


def needed_lambda2(
    meter: Meter, closed: Tensor, distance: Tensor, target: int, *, lr: float, momentum: float, steps: int
) -> float:
    """The penalty with which, if the loss did not pull, enough gates would be closed after so many steps.

    Without a gradient a gate moves by ``lr lambda2 alpha / (1 - momentum)`` in a step, so those close whose distance is
    at most ``steps lr lambda2 / (1 - momentum)``. The loss does pull: asked again and again on the way, this gives what
    still meets the target in time.
    """
    order = order_of_closing(torch.where(closed, 0.0, distance))
    number = close_in_order(meter, closed, order, target)
    if not number:  # nothing left to close, or not enough that can be
        return 0.0
    farthest = float(distance[order[number - 1]])
    return farthest * (1 - momentum) / (lr * max(steps, 1)) if farthest < float("inf") else 0.0
