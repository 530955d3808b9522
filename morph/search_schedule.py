"""What changes while a student is searched for: the strength of the penalty, and the learning rate of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MILESTONES = (0.5, 0.85)
"""Shares of the search at which the learning rate falls by ten: epochs 150 and 255 of the paper's 300."""

_LAST = 0.1  # of the gates of a site: those that close last when time is short
_FROM, _TO = 0.1, 0.8  # shares of the search between which the network comes down to the budget
_FAR, _FASTEST = 0.05, 20.0  # behind by this, the penalty grows by this power of e in the time of a whole search,
_MOST = 0.5  # and by this at most from one look to the next
_SOON = 0.3  # of the search, in which even the least penalty closes a gate that the loss does not pull


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


def wanted_size(start: int, target: int, step: int, steps: int) -> float:
    """The size that the network should have come down to at a step: ``start`` at first, ``target`` from `_TO` on."""
    share = (step / steps - _FROM) / (_TO - _FROM)
    return start + (target - start) * min(max(share, 0.0), 1.0)


def least_penalty(alpha: Tensor, lr: float, momentum: float, steps: int) -> float:
    """The penalty that closes the costliest gate in three tenths of the search if the loss does not pull.

    A gate of one moves by ``lr lambda2 alpha / (1 - momentum)`` in a step. With the paper's numbers this is 2.8e-4.

    Args:
        alpha: Weights of the gates in the penalty.
        lr: Step size of the gates.
        momentum: Of the gates.
        steps: Of the whole search.
    """
    heaviest = float(alpha.max()) or 1.0
    return (1 - momentum) / (lr * heaviest * _SOON * steps)


def paced(lambda2: float, least: float, behind: float, passed: float) -> float:
    """The penalty from here on.

    Args:
        lambda2: That of late.
        least: What it is at least as long as the network is too large.
        behind: By what share of the way from the first size to the budget the network is larger than it should be;
            below zero where it is ahead.
        passed: Share of the search since it was looked at last.
    """
    power = min(_FASTEST * passed, _MOST) * min(max(behind / _FAR, -1.0), 1.0)
    return max(lambda2, least if behind > 0 else 0.0) * math.exp(power)
