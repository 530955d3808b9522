"""What a search tries: a family, how its student is taught, and what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from morph.family.settings import FamilySettings, Range, settings_from

TEACHING: Mapping[str, Range] = {"temperature": (1.0, 10.0), "weight": (0.0, 1.0)}
"""Ranges of the two numbers of distillation; both ends belong to them."""


@dataclass(frozen=True)
class Candidate:
    """A configuration of the search.

    Attributes:
        family: The family.
        seed: Which network of it is trained.
        temperature: Of the softened outputs; None where there is no teacher.
        weight: Share of the teacher's term in the loss, from 0 to 1; None likewise.
    """

    family: FamilySettings
    seed: int
    temperature: float | None = None
    weight: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `candidate_from` makes it again."""
        return asdict(self)


def candidate_from(values: Mapping[str, Any]) -> Candidate:
    """The inverse of `Candidate.to_json`; errors as `morph.family.settings.settings_from`."""
    return Candidate(settings_from(values["family"]), values["seed"], values["temperature"], values["weight"])


@dataclass(frozen=True)
class Outcome:
    """What a training gave.

    Attributes:
        accuracy: Share of the validation images whose class was found, after the last round.
        curve: The same after each round, the last one included.
    """

    accuracy: float
    curve: tuple[float, ...] = ()


class Train(Protocol):
    """Trains one network; any function of this form will do."""

    def __call__(self, model: nn.Module, candidate: Candidate, epochs: int, checkpoint: Path) -> Outcome:
        """Train ``model`` in place until ``epochs`` rounds through the data are done.

        Args:
            model: The network, with the fresh weights of its seed.
            candidate: What it was drawn from, and how it is taught.
            epochs: Rounds in all. If the file holds the state after fewer rounds of this candidate, go on from it.
            checkpoint: Where the state is kept; if it is missing, begin anew.

        Raises:
            RuntimeError, MemoryError, FloatingPointError, TrainingError: This candidate failed; the search goes on.
        """


@dataclass(frozen=True)
class TrialRow:
    """What is known of one configuration; plain values.

    Attributes:
        number: Its number in the study.
        candidate: The configuration.
        state: ``running``, ``stopped`` (below the last budget), ``complete`` or ``failed``.
        bracket: Which bracket of a round it belongs to; 0 begins with the smallest budget.
        accuracies: Validation accuracy by budget.
        curve: Validation accuracy after each round, as far as it was trained.
        seconds: Time that its trainings took.
        overhead: Time that proposing it and drawing its network took.
        params: Number of parameters, where the network was drawn.
        width: Channels of its first stage, likewise.
        reason: Why it failed.
    """

    number: int
    candidate: Candidate
    state: str
    bracket: int
    accuracies: Mapping[int, float] = field(default_factory=dict)
    curve: tuple[float, ...] = ()
    seconds: float = 0.0
    overhead: float = 0.0
    params: int | None = None
    width: int | None = None
    reason: str | None = None

    @property
    def epochs(self) -> int:
        """The largest budget that it was trained for."""
        return max(self.accuracies, default=0)

    @property
    def accuracy(self) -> float:
        """The accuracy there; not a number where there is none."""
        return self.accuracies[self.epochs] if self.accuracies else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = asdict(self)
        return values | {"accuracies": {str(b): a for b, a in self.accuracies.items()}, "curve": list(self.curve)}


def best_of(rows: list[TrialRow]) -> TrialRow | None:
    """The most accurate among those with the largest budget; the first of several. None where nothing was trained."""
    trained = [row for row in rows if row.accuracies and row.state != "failed"]
    return max(trained, key=lambda row: (row.epochs, row.accuracy, -row.number), default=None)
