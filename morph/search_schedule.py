"""What changes while a student is searched for: the strength of the penalty, and the learning rate of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from morph.search_budget import Meter, close_in_order

MILESTONES = (0.5, 0.85)
"""Shares of the search at which the learning rate falls by ten: epochs 150 and 255 of the paper's 300."""

_LAST = 0.1  # of the gates of a site: those that close last when time is short


def learning_rate(base: float, step: int, steps: int) -> float:
    """The learning rate of the weights at a step, from 0 on."""
    return base * float(0.1 ** sum(step >= share * steps for share in MILESTONES))


def distances(sparse: Tensor, alpha: Tensor) -> Tensor:
    """How long each gate has to go until it closes, ``[total]``: ``|S(z)| / alpha``; infinite where alpha is zero."""
    return torch.where(alpha > 0, sparse.abs() / alpha.clamp(min=1e-30), torch.inf)


def floor_of(gates: int) -> int:
    """How many gates of a site stay open as long as the budget can be met without them: a tenth, at least one."""
    return max(1, round(_LAST * gates))


def last_gates(distance: Tensor, lengths: Iterable[int]) -> Tensor:
    """Of each site the gates that are farthest from zero, as many as `floor_of` says; bool ``[total]``.

    Args:
        distance: How far each gate has to go, ``[total]``.
        lengths: How many gates each site has.
    """
    last = torch.zeros(len(distance), dtype=torch.bool)
    start = 0
    for gates in lengths:
        order = torch.argsort(distance[start : start + gates], stable=True)
        last[start + order[-floor_of(gates) :]] = True
        start += gates
    return last


def order_of_closing(distance: Tensor, last: Tensor) -> Tensor:
    """Numbers of the gates that are open: the nearest to zero first, equal ones in the order of their numbers.

    Gates are all alike at birth, so in a short search those of the costliest layers arrive first, and all at once.
    Those in ``last`` therefore come after all others, whatever their distance: no layer empties before every layer is
    down to its last tenth.
    """
    order = torch.argsort(distance, stable=True)
    order = order[torch.argsort(last[order].to(torch.uint8), stable=True)]
    return order[distance[order] > 0]


def needed_lambda2(
    meter: Meter,
    closed: Tensor,
    distance: Tensor,
    last: Tensor,
    target: int,
    *,
    lr: float,
    momentum: float,
    steps: int,
) -> tuple[float, bool]:
    """The penalty with which, if the loss did not pull, enough gates would be closed after so many steps.

    Without a gradient a gate moves by ``lr lambda2 alpha / (1 - momentum)`` in a step, so those close whose distance is
    at most ``steps lr lambda2 / (1 - momentum)``. The loss does pull: asked again and again on the way, this gives what
    still meets the target in time.

    Returns:
        The penalty, zero if nothing has to close or not enough can; and whether the budget is met without the gates in
        ``last``.
    """
    order = order_of_closing(torch.where(closed, 0.0, distance), last)
    number = close_in_order(meter, closed, order, target)
    if not number:  # nothing left to close, or not enough that can be
        return 0.0, number == 0
    farthest = float(distance[order[:number]].max())
    needed = farthest * (1 - momentum) / (lr * max(steps, 1)) if farthest < float("inf") else 0.0
    return needed, not bool(last[order[:number]].any())
