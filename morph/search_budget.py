"""How small a network would come out if these gates were closed, and which gates to close to meet a budget.

Source: early stopping at a budget of Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI
2020, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from morph.analysis import Sizes
from morph.errors import TargetError
from morph.policies import Metric

Counting = Literal["contractions", "paper"]
Closed = Mapping[str, Tensor]


class Sized(Protocol):
    """What a meter needs of a gated model; see `morph.gating.Gated`."""

    def sizes(self, closed: Closed) -> Sizes:
        """Parameters and multiply-adds of one sample of what would come out."""


@dataclass(frozen=True)
class Flat:
    """All gates in one row: names in order, and how many of each."""

    lengths: Mapping[str, int]

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One row ``[total]``, on the CPU, of a value for each gate."""
        return torch.cat([parts[name].detach().cpu() for name in self.lengths])

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`."""
        return dict(zip(self.lengths, row.split(list(self.lengths.values())), strict=True))


class Meter:
    """Measures the network that would come out in the unit of a budget.

    Args:
        gated: The gated model.
        flat: The order of its gates.
        metric: Which size.
        norms: Where the count is the paper's, gives two for each element of a batch norm of the network that would come
            out; these are added to the multiply-adds. None otherwise.
    """

    def __init__(self, gated: Sized, flat: Flat, metric: Metric, norms: Callable[[Closed], int] | None = None) -> None:
        self.gated, self.flat, self.metric, self.norms = gated, flat, metric, norms
        self._last: tuple[Tensor, Sizes] | None = None  # for long nothing closes

    def sizes(self, closed: Tensor) -> Sizes:
        """Parameters and multiply-adds where these, bool ``[total]``, are closed."""
        if self._last is None or not torch.equal(self._last[0], closed):
            self._last = closed.clone(), self.gated.sizes(self.flat.split(closed))
        return self._last[1]

    def size(self, closed: Tensor) -> int:
        """The size in the unit of the budget."""
        sizes = self.sizes(closed)
        if self.metric == "params":
            return sizes.params
        return sizes.macs + (self.norms(self.flat.split(closed)) if self.norms else 0)


def close_in_order(meter: Meter, closed: Tensor, order: Tensor, target: int) -> int | None:
    """How many gates have to be closed in this order to meet a target; None if all of them do not.

    Args:
        meter: Measures.
        closed: Gates that are closed in any case, bool ``[total]``.
        order: Numbers of gates, the first to close first.
        target: Largest size allowed.
    """
    low, high = 0, len(order)
    if meter.size(also(closed, order, high)) > target:
        return None
    while low < high:
        middle = (low + high) // 2
        if meter.size(also(closed, order, middle)) <= target:
            high = middle
        else:
            low = middle + 1
    return high


def also(closed: Tensor, order: Tensor, number: int) -> Tensor:
    """``closed`` with the first ``number`` of ``order`` closed too."""
    more = closed.clone()
    more[order[:number]] = True
    return more


def check_budget(meter: Meter, target: int, what: str) -> int:
    """The size with all gates open, if the target is below it and can be reached.

    Raises:
        TargetError: If it is met already, or out of reach; says the nearest size.
    """
    total = sum(meter.flat.lengths.values())
    start = meter.size(torch.zeros(total, dtype=torch.bool))
    if target >= start:
        raise TargetError(f"the teacher has {start:,} {what}, within the target of {target:,}: nothing to search for")
    least = meter.size(torch.ones(total, dtype=torch.bool))
    if least > target:
        raise TargetError(
            f"{target:,} {what} are out of reach: with all {total:,} gates closed the model still has {least:,}; give "
            "at least that"
        )
    return start
