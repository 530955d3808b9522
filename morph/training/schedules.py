"""Learning rates as functions of the step alone, so that a run that is taken up needs no state for them."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["multistep", "step", "cosine", "constant"]


def learning_rate(
    schedule: Schedule,
    base: float,
    step: int,
    *,
    epochs: int,
    length: int,
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8),
    gamma: float = 0.2,
    step_epochs: int = 20,
    warmup_epochs: float = 0.0,
) -> float:
    """The learning rate of a step.

    ``multistep``: ``base * gamma ** k``, where ``k`` is the number of milestones passed. With the defaults these are
    epochs 60, 120 and 160 of 200 (Zagoruyko and Komodakis, "Wide Residual Networks", 2016); ``(0.5, 0.85)`` and a gamma
    of 0.1 are epochs 150 and 255 of 300. ``step``: ``base * gamma ** (epoch // step_epochs)``. ``cosine``:
    ``base * (1 + cos(pi * step / steps)) / 2`` (Loshchilov and Hutter, "SGDR", 2017, equation 5, without restarts).

    Args:
        schedule: Which.
        base: The learning rate at first.
        step: From 0 on.
        epochs: Rounds through the data.
        length: Steps of a round.
        milestones: Shares of the whole run, of ``multistep``.
        gamma: Factor of ``multistep`` and ``step``.
        step_epochs: Of ``step``.
        warmup_epochs: Rounds in which the rate grows linearly from ``base / steps of the warm-up``, on top of the rest.
    """
    steps = epochs * length
    warm = round(warmup_epochs * length)
    rate = base * min(1.0, (step + 1) / warm) if warm else base
    if schedule == "multistep":
        return float(rate * gamma ** sum(step >= round(share * steps) for share in milestones))
    if schedule == "step":
        return float(rate * gamma ** (step // (step_epochs * length)))
    return rate * (1 + math.cos(math.pi * step / steps)) / 2 if schedule == "cosine" else rate
