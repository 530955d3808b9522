"""A trainer that costs nothing: accuracies are a smooth function of the configuration, and it keeps a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from morph.family.budgets import Budgets
from morph.family.candidate import Candidate, Outcome
from morph.family.generator import Drawn, Task
from morph.family.study import SearchSettings

TASK = Task((3, 8, 8), 4, 400_000)
SMALL_RANGES = {
    "top_nodes": (3, 3),
    "top_neighbours": (2, 3),
    "top_rewiring": (0.1, 1.0),
    "middle_nodes": (1, 2),
    "middle_probability": (0.2, 1.0),
    "bottom_nodes": (3, 3),
    "bottom_neighbours": (2, 3),
    "bottom_rewiring": (0.1, 1.0),
}
"""Families of the smallest networks."""
SETTINGS = SearchSettings(TASK, Budgets((1, 2, 4)))


def accuracy(candidate: Candidate, epochs: int) -> float:
    """Best near 8 cells, a large weight, and more epochs."""
    family = candidate.family
    good = 0.4 - 0.02 * abs(family.top_nodes - 8) - 0.01 * family.bottom_nodes + 0.2 * (candidate.weight or 0)
    return good * epochs / (epochs + 1)


def draw_nothing(settings, task, seed):
    """In the place of a network that nobody looks at."""
    return Drawn(None, None, 1, settings.top_nodes)


class FakeTrain:
    """See the module.

    Args:
        stop_after: Raise KeyboardInterrupt at this many calls, as a kill between two writings.
        broken: Calls, counted from 1, that fail, with what they raise or return.
    """

    def __init__(self, stop_after: int | None = None, broken: dict[int, object] | None = None) -> None:
        self.stop_after, self.broken = stop_after, broken or {}
        self.calls: list[tuple[int, int]] = []  # epochs there and epochs wanted

    def __call__(self, model, candidate: Candidate, epochs: int, checkpoint: Path) -> Outcome:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        done = json.loads(checkpoint.read_text())["epochs"] if checkpoint.exists() else 0
        self.calls.append((done, epochs))
        trouble = self.broken.get(len(self.calls))
        if isinstance(trouble, BaseException):
            raise trouble
        if trouble is not None:
            return Outcome(trouble)
        checkpoint.write_text(json.dumps({"epochs": epochs}))
        curve = tuple(accuracy(candidate, e) for e in range(1, epochs + 1))
        return Outcome(curve[-1], curve)
