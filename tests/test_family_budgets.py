"""Brackets and what they cost."""

from __future__ import annotations

import math

import pytest

from morph.errors import FamilyError
from morph.family.budgets import Budgets, Plan, Rung


def test_the_paper():
    brackets = Budgets((30, 60, 120)).brackets()
    assert brackets == ((Rung(4, 30), Rung(2, 60), Rung(1, 120)), (Rung(3, 60), Rung(1, 120)), (Rung(3, 120),))
    assert Budgets((30, 60, 120)).plan() == Plan(10, 14, 1020, 840)
    assert Budgets((30, 60, 120)).plan().times(30) == Plan(300, 420, 30_600, 25_200)


def slow(epochs: list[int]) -> tuple[int, int, int, int]:
    """The same by going through every single training."""
    eta = epochs[1] / epochs[0] if len(epochs) > 1 else 2
    last = len(epochs) - 1
    configurations = trainings = total = resumed = 0
    for s in reversed(range(last + 1)):
        alive = math.ceil(round((last + 1) / (s + 1) * eta**s, 9))
        configurations += alive
        for i in range(last - s, last + 1):
            for _ in range(alive):
                trainings += 1
                total += epochs[i]
                resumed += epochs[i] - (epochs[i - 1] if i > last - s else 0)
            alive = int(alive / eta)
    return configurations, trainings, total, resumed


@pytest.mark.parametrize(
    "epochs", [(7,), (1, 2), (1, 2, 4), (1, 3, 9), (2, 4, 8, 16), (4, 6, 9), (1, 10), (3, 9, 27, 81)]
)
def test_any_budgets(epochs):
    plan = Budgets(epochs).plan()
    assert (plan.configurations, plan.trainings, plan.epochs, plan.epochs_resumed) == slow(list(epochs))


def test_the_slow_count_can_differ():
    assert slow([30, 60, 120]) != slow([30, 60, 121])


@pytest.mark.parametrize("epochs", [(), (0, 1), (-1,), (30, 60, 121), (30, 30), (4, 2), (120, 60, 30)])
def test_budgets_without_one_factor_are_refused(epochs):
    with pytest.raises(FamilyError, match=r"budgets of .*e\.g\. 30,60,120"):
        Budgets(epochs)
