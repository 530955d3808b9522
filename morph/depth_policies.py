"""Decide how many copies each residual unit gets. No tensor is written here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from morph.errors import TargetError
from morph.policies import Fit

DepthMetric = Literal["params", "macs", "blocks"]
DepthPolicy = Literal["uniform", "fisher"]

MOST = 1000
"""Most copies of units that one plan inserts."""

WORDS: Mapping[DepthMetric, str] = {"params": "parameters", "macs": "multiply-adds", "blocks": "new blocks"}


@dataclass(frozen=True)
class DepthStep:
    """One turn of the loop: one more copy of one unit.

    Attributes:
        unit: Number of the unit.
        params: Parameters of the whole model after the step.
        macs: Multiply-adds of the whole model after the step.
        blocks: Blocks inserted by then.
    """

    unit: int
    params: int
    macs: int
    blocks: int


Size = Mapping[DepthMetric, int]


def decide_copies(
    costs: Sequence[Size],
    stages: Sequence[object],
    start: Size,
    metric: DepthMetric,
    target: int,
    *,
    fit: Fit = "first",
    scores: Sequence[float] | None = None,
) -> list[DepthStep]:
    """Choose copies until the model is as large as ``target``.

    Without scores the stages take turns, from the first, and so do the units within each stage. With scores the copies
    are dealt in proportion to them: the next goes to the unit of the largest score divided by one more than the copies
    that it has. (Copying a block exactly does not move the scores, so the largest score alone would take all.)

    Args:
        costs: What one copy of each unit adds.
        stages: The stage that each unit belongs to; units of a stage are neighbours.
        start: The present size.
        metric: What the target counts.
        target: Size wanted.
        fit: ``first`` stops at the first size that is not below the target, ``under`` one step before, ``closest`` at
            the nearer of the two.
        scores: One for each unit, or None.

    Raises:
        TargetError: If the target is not above the present size, needs more than `MOST` copies, or no step fits below.
    """
    if target <= start[metric]:
        raise TargetError(
            f"the target of {target:,} {WORDS[metric]} is not above the {start[metric]:,} that the model has; "
            "deepening only adds"
        )
    choose = _by_score(scores) if scores is not None else _in_turn(stages)
    copies = [0] * len(costs)
    now = dict(start)
    steps: list[DepthStep] = []
    while now[metric] < target:
        if len(steps) == MOST:
            raise TargetError(
                f"{target:,} {WORDS[metric]} would take more than {MOST:,} copies of blocks; with so many the model "
                f"has {now[metric]:,}: take a target up to that"
            )
        unit = choose(copies)
        copies[unit] += 1
        now = {key: now[key] + costs[unit][key] for key in now}
        steps.append(DepthStep(unit, **now))
    return _fitted(steps, metric, target, fit, start[metric])


def _by_score(scores: Sequence[float]) -> Callable[[Sequence[int]], int]:
    def choose(copies: Sequence[int]) -> int:
        return max(range(len(scores)), key=lambda unit: scores[unit] / (1 + copies[unit]))

    return choose


def _in_turn(stages: Sequence[object]) -> Callable[[Sequence[int]], int]:
    members: dict[object, list[int]] = {}
    for unit, stage in enumerate(stages):
        members.setdefault(stage, []).append(unit)
    order = list(members.values())

    def choose(copies: Sequence[int]) -> int:
        given = [sum(copies[unit] for unit in stage) for stage in order]
        return min(order[given.index(min(given))], key=lambda unit: copies[unit])

    return choose


def _fitted(steps: list[DepthStep], metric: DepthMetric, target: int, fit: Fit, start: int) -> list[DepthStep]:
    """Drop the last step if ``fit`` prefers the size before it."""
    last: int = getattr(steps[-1], metric)
    before: int = getattr(steps[-2], metric) if len(steps) > 1 else start
    too_far = last > target and (fit == "under" or (fit == "closest" and target - before < last - target))
    kept = steps[:-1] if too_far else steps
    if not kept:
        raise TargetError(
            f"--fit {fit}: the first copy leads from {start:,} to {last:,} {WORDS[metric]}, past the target of "
            f"{target:,}; the nearest that deepening gives is {last:,}: take a higher target or --fit first"
        )
    return kept
