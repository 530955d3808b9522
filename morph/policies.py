"""Decide which cells grow, and how far: Fisher expansion (Whettam 2020, Algorithm 1) and its rivals.

No tensor is written here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from morph.errors import TargetError
from morph.passes.regroup import smallest_prime_factor
from morph.plan import Regroup

Policy = Literal["fisher", "fisher-per-param", "uniform", "random"]
Fit = Literal["first", "closest", "under"]
Metric = Literal["params", "macs"]


@dataclass(frozen=True)
class Grouped:
    """A grouped convolution as it is before anything grows."""

    module: str
    groups: int
    shape: tuple[int, ...]
    params: int
    macs: int


@dataclass(frozen=True)
class Step:
    """One turn of the loop: every grouped convolution of one cell gives up its smallest prime factor of groups.

    Attributes:
        cell: Which cell.
        score: Its Fisher score at that time; None where the policy does not ask.
        groups: Groups of each convolution after the step.
        params: Parameters of the whole model after the step.
        macs: Multiply-adds of the whole model after the step.
    """

    cell: str
    score: float | None
    groups: Mapping[str, int]
    params: int
    macs: int


@dataclass
class Ledger:
    """The groups that each cell's convolutions have by now, and the size of the whole model.

    Attributes:
        cells: For each cell, its convolutions that can grow.
        params: Parameters of the whole.
        macs: Multiply-adds of the whole.
    """

    cells: Mapping[str, Sequence[Grouped]]
    params: int
    macs: int
    now: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.now = {conv.module: conv.groups for convs in self.cells.values() for conv in convs}

    def can_grow(self, cell: str) -> bool:
        """Whether a convolution of ``cell`` has more than one group."""
        return any(self.now[conv.module] > 1 for conv in self.cells[cell])

    def next_step(self, cell: str, score: float | None) -> Step:
        """What the next step of ``cell`` would give; nothing changes."""
        groups = {c.module: n // smallest_prime_factor(n) for c in self.cells[cell] if (n := self.now[c.module]) > 1}
        grown = [
            (c, c.groups // groups[c.module] - c.groups // self.now[c.module])
            for c in self.cells[cell]
            if c.module in groups
        ]
        params = self.params + sum(c.params * times for c, times in grown)
        macs = self.macs + sum(c.macs * times for c, times in grown)
        return Step(cell, score, groups, params, macs)

    def take(self, step: Step) -> None:
        """Carry out ``step``."""
        self.now.update(step.groups)
        self.params, self.macs = step.params, step.macs

    def reach(self) -> dict[Metric, int]:
        """The size with every convolution dense."""
        convs = [conv for cell in self.cells.values() for conv in cell]
        return {
            "params": self.params + sum(c.params * (c.groups - c.groups // self.now[c.module]) for c in convs),
            "macs": self.macs + sum(c.macs * (c.groups - c.groups // self.now[c.module]) for c in convs),
        }

    def edits(self, steps: Sequence[Step]) -> tuple[Regroup, ...]:
        """One edit for each convolution that ``steps`` changed."""
        final = {module: groups for step in steps for module, groups in step.groups.items()}
        convs = {conv.module: conv for cell in self.cells.values() for conv in cell}
        return tuple(Regroup(name, convs[name].groups, to, convs[name].shape) for name, to in final.items())


def decide(
    ledger: Ledger,
    policy: Policy,
    metric: Metric,
    target: int,
    *,
    fit: Fit = "first",
    seed: int = 0,
    probe: Callable[[], Mapping[str, float]],
    on_step: Callable[[Step], None] = lambda step: None,
) -> list[Step]:
    """Choose steps until the model is as large as ``target``.

    Args:
        ledger: The model's present state; advanced by the steps tried.
        policy: ``fisher`` takes the highest score first and the next when that cell is saturated; ``fisher-per-param``
            the highest score per parameter that the step adds; ``uniform`` goes round from the first cell; ``random``
            draws.
        metric: What the target counts.
        target: Size wanted.
        fit: ``first`` stops at the first size that is not below the target, ``under`` one step before, ``closest`` at
            the nearer of the two.
        seed: For ``random``.
        probe: Gives the score of each cell; called before each step, by the Fisher policies only.
        on_step: Told of each step.

    Raises:
        TargetError: If the target is not above the present size, is out of reach, or no step fits below it.
    """
    start, reach = getattr(ledger, metric), ledger.reach()[metric]
    _check_target(metric, target, start, reach)
    draw = random.Random(seed)
    order = list(ledger.cells)
    steps: list[Step] = []
    while getattr(ledger, metric) < target:
        scores = probe() if policy in ("fisher", "fisher-per-param") else {}
        candidates = [ledger.next_step(cell, scores.get(cell)) for cell in order if ledger.can_grow(cell)]
        step = _choose(policy, candidates, ledger.params, order, steps[-1].cell if steps else None, draw)
        ledger.take(step)
        steps.append(step)
        on_step(step)
    return _fitted(steps, metric, target, fit, start)


def _choose(
    policy: Policy, candidates: list[Step], params: int, order: list[str], last: str | None, draw: random.Random
) -> Step:
    """The best of the possible steps."""
    if policy == "fisher":
        return max(candidates, key=lambda step: step.score or 0.0)
    if policy == "fisher-per-param":
        return max(candidates, key=lambda step: (step.score or 0.0) / (step.params - params))
    if policy == "random":
        return draw.choice(candidates)
    after = order.index(last) + 1 if last is not None else 0
    return min(candidates, key=lambda step: (order.index(step.cell) - after) % len(order))


def _check_target(metric: Metric, target: int, start: int, reach: int) -> None:
    """Refuse targets that growth cannot meet."""
    unit = "parameters" if metric == "params" else "multiply-adds"
    if target <= start:
        raise TargetError(
            f"the target of {target:,} {unit} is not above the {start:,} that the model has; growing only adds"
        )
    if target > reach:
        raise TargetError(
            f"no regrouping reaches {target:,} {unit}: with every grouped convolution dense the model has {reach:,}; "
            f"widening is another move"
        )


def _fitted(steps: list[Step], metric: Metric, target: int, fit: Fit, start: int) -> list[Step]:
    """Drop the last step if ``fit`` prefers the size before it."""
    last = getattr(steps[-1], metric)
    before = getattr(steps[-2], metric) if len(steps) > 1 else start
    too_far = last > target and (fit == "under" or (fit == "closest" and target - before < last - target))
    kept = steps[:-1] if too_far else steps
    if not kept:
        raise TargetError(
            f"--fit {fit}: the first step leads from {start:,} to {last:,}, past the target of {target:,}; take a "
            f"higher target or --fit first"
        )
    return kept
