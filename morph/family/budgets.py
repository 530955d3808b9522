"""How many configurations are trained for how long: the brackets of a round.

Source: Li et al., "Hyperband", JMLR 2018, in the form of "Students in the Right Family Can Learn from Good Teachers",
algorithm 1: bracket s begins with ceil((s_max + 1) / (s + 1) * eta^s) configurations at the largest budget over eta^s,
and keeps one of eta at each step. (As printed the first budget is eta^s times the largest; only its inverse is one.)
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction

from morph.errors import FamilyError


@dataclass(frozen=True)
class Rung:
    """A step of a bracket.

    Attributes:
        configurations: How many are trained.
        epochs: Up to how many rounds through the data.
    """

    configurations: int
    epochs: int


@dataclass(frozen=True)
class Plan:
    """What rounds cost.

    Attributes:
        configurations: Families that are tried, with one network each.
        trainings: How often one is trained up to a budget.
        epochs: Rounds through the data if every training begins anew.
        epochs_resumed: The same if each goes on where the budget before ended, as it does here.
    """

    configurations: int
    trainings: int
    epochs: int
    epochs_resumed: int

    def times(self, rounds: int) -> Plan:
        """What so many rounds cost."""
        return Plan(**{name: value * rounds for name, value in asdict(self).items()})


@dataclass(frozen=True)
class Budgets:
    """Rounds through the data after which configurations are compared, each a constant factor above the one before.

    Attributes:
        epochs: For example ``(30, 60, 120)``; one alone is a search without early stopping.

    Raises:
        FamilyError: If they do not rise by one factor, or one is below 1.
    """

    epochs: tuple[int, ...]

    def __post_init__(self) -> None:
        given = ",".join(map(str, self.epochs))
        if not self.epochs or min(self.epochs) < 1:
            raise FamilyError(
                f"budgets of {given or 'nothing'}; give whole numbers of epochs of 1 or more, e.g. 30,60,120"
            )
        factors = {Fraction(b, a) for a, b in zip(self.epochs, self.epochs[1:], strict=False)}
        if len(factors) > 1 or any(factor <= 1 for factor in factors):
            raise FamilyError(f"budgets of {given}; each must be the same factor above the one before, e.g. 30,60,120")

    @property
    def eta(self) -> Fraction:
        """The factor between two budgets; 2 where there is one budget alone."""
        return Fraction(self.epochs[1], self.epochs[0]) if len(self.epochs) > 1 else Fraction(2)

    @property
    def last(self) -> int:
        """The largest budget."""
        return self.epochs[-1]

    def kept(self, configurations: int) -> int:
        """How many of so many go on to the next budget."""
        return math.floor(configurations / self.eta)

    def brackets(self) -> tuple[tuple[Rung, ...], ...]:
        """The brackets of a round; the one that begins with the smallest budget comes first."""
        most = len(self.epochs) - 1
        found = []
        for s in range(most, -1, -1):
            number = math.ceil(Fraction(most + 1, s + 1) * self.eta**s)
            rungs = []
            for epochs in self.epochs[most - s :]:
                if number:
                    rungs.append(Rung(number, epochs))
                number = self.kept(number)
            found.append(tuple(rungs))
        return tuple(found)

    def plan(self) -> Plan:
        """What one round costs."""
        brackets = self.brackets()
        rungs = [rung for bracket in brackets for rung in bracket]
        before = dict(zip(self.epochs[1:], self.epochs, strict=False))
        return Plan(
            configurations=sum(bracket[0].configurations for bracket in brackets),
            trainings=sum(rung.configurations for rung in rungs),
            epochs=sum(rung.configurations * rung.epochs for rung in rungs),
            epochs_resumed=sum(
                rung.configurations * (rung.epochs - (before[rung.epochs] if i else 0))
                for bracket in brackets
                for i, rung in enumerate(bracket)
            ),
        )
