"""Successive halving without waiting: which trials of an asynchronous search go on, wait, or have no chance any more.

Source: Li et al., "A System for Massively Parallel Hyperparameter Tuning" (ASHA), MLSys 2020, algorithm 2: a trial goes
on when it is among the best of one in eta that have reached its budget so far, at once or later, when others turned out
worse. Each bracket is halved by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from morph.family.budgets import Budgets

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


class Halving:
    """The trials of a study as they stand.

    Args:
        budgets: Of the search.
        configurations: How many trials there will be in all.
        trials: Those that are there.
    """

    def __init__(self, budgets: Budgets, configurations: int, trials: Iterable[FrozenTrial]) -> None:
        self.budgets, self.configurations, self.trials = budgets, configurations, list(trials)

    def goes_on(self, trial: FrozenTrial) -> bool:
        """Whether a trial below the last budget is among the best of one in eta so far."""
        better, reached = self._place(trial)
        return better < self.budgets.kept(reached)

    def has_chance(self, trial: FrozenTrial) -> bool:
        """Whether it could still be among them when all trials of its bracket have reached its budget."""
        order = bracket_order(self.budgets)
        members = sum(order[i % len(order)] == bracket_of(trial) for i in range(self.configurations))
        return self._place(trial)[0] < self.budgets.kept(members)

    def promotable(self) -> list[FrozenTrial]:
        """Those that wait and may go on; the ones with the largest budget first, and among them the best."""
        found = [trial for trial in self.waiting() if self.goes_on(trial)]
        return sorted(found, key=lambda t: (-max(t.intermediate_values), -_value(t, max(t.intermediate_values))))

    def waiting(self) -> list[FrozenTrial]:
        """Those that were trained up to a budget and may go on later."""
        return [trial for trial in self.trials if trial.state.name == "WAITING"]

    def _place(self, trial: FrozenTrial) -> tuple[int, int]:
        """How many of its bracket are better at its budget, the earlier one of two that are equal; of how many."""
        epochs = max(trial.intermediate_values)
        others = [
            t for t in self.trials if bracket_of(t) == bracket_of(trial) and epochs in t.intermediate_values
        ]  # fmt: skip
        mine = (-_value(trial, epochs), trial.number)
        return sum((-_value(t, epochs), t.number) < mine for t in others), len(others)


def bracket_of(trial: FrozenTrial) -> int:
    """Which bracket a trial belongs to."""
    return int(trial.user_attrs.get("bracket", 0))


def bracket_order(budgets: Budgets) -> Sequence[int]:
    """The brackets of the trials of a round, in their order, as a synchronous search has them."""
    return [b for b, rungs in enumerate(budgets.brackets()) for _ in range(rungs[0].configurations)]


def _value(trial: FrozenTrial, epochs: int) -> float:
    return trial.intermediate_values[epochs]
