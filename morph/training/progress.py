"""Where a training run stands, and what it found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class FitProgress:
    """Where a training run stands.

    Attributes:
        step: Steps done.
        steps: After how many it ends.
        epoch: The round through the data that the last step belongs to, from 1 on.
        epochs: How many there are.
        loss: Of the last batch.
        lr: Learning rate of the last step.
        row: At the end of a round, its row of the history.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    lr: float
    row: dict[str, Any] | None = None


@dataclass
class Fitted:
    """What a training run found; the objective and its student hold the last weights.

    Attributes:
        step: Steps done.
        history: A row for each round: ``epoch``, ``step``, ``lr``, ``loss`` and ``top1`` on the training batches as
            they came (no ``top1`` where the student is not run to its end), ``part_NAME`` for each term of the loss,
            ``seconds``, and after a validation ``val_loss``, ``val_top1``, ``val_top5``.
        best: The student's state_dict, on the CPU, after the round with the largest ``val_top1``, the first of equal
            ones; None without validation.
        best_epoch: That round.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_epoch: int | None = None

    @property
    def last(self) -> dict[str, Any]:
        """The last row of the history."""
        return self.history[-1]
