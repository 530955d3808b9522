"""Where a search stands, what it found, and where its state is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Progress:
    """Where a search stands.

    Attributes:
        step: Steps done.
        steps: After how many it ends at the latest.
        loss: Of the last batch.
        kl: Divergence from the teacher on the last batch, at the temperature of the options; None if not computed.
        gates_open: Gates whose sparse iterate is not zero.
        gates_total: All gates.
        params: Of the network that would come out.
        macs: Likewise, of one sample.
        lambda2: Strength of the penalty.
    """

    step: int
    steps: int
    loss: float
    kl: float | None
    gates_open: int
    gates_total: int
    params: int
    macs: int
    lambda2: float


@dataclass(frozen=True)
class Keep:
    """Where and how often the state of a search is written.

    Attributes:
        path: The file.
        every: Steps between two writings; None for once in each round through the data.
        identity: What a search that goes on from it must share with this one.
    """

    path: Path
    every: int | None
    identity: Mapping[str, Any]


@dataclass
class Found:
    """What a search found, or has found so far.

    Attributes:
        step: Steps done.
        closed: Gates that are closed at the end, bool ``[total]``.
        values: Gates at the end, ``[total]``; zero where they are closed.
        reopened: Gates that closed together with others in the last steps, and were not needed for the budget.
        forced: Gates that were closed at the end of the time, the nearest to zero first.
        history: One row for each time that sizes were counted.
        lambda2: ``[step, value]`` at first, and each time that it had changed by a hundredth.
        gate_lr: Step size of the gates.
    """

    step: int = 0
    closed: Tensor | None = None
    values: Tensor | None = None
    reopened: int = 0
    forced: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    lambda2: list[list[float]] = field(default_factory=list)
    gate_lr: float = 0.0
