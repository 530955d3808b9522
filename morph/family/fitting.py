"""Train candidates with `morph.fit`: with a teacher where they are distilled, with the labels alone where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import nn

from morph.family.candidate import Candidate, Outcome
from morph.teaching.distillation import Distillation
from morph.teaching.losses import SoftLabels
from morph.teaching.objective import Labels
from morph.training.fitting import fit
from morph.training.progress import FitProgress

NUMBERS: Mapping[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "step",
    "step_epochs": 20,
    "gamma": 0.5,
}
"""The numbers of a training run as the public code of NAGO has them."""


class FitTrain:
    """A `morph.family.candidate.Train`: every budget is a part of one run, paused and gone on with.

    The learning rates are those of the largest budget, so what a network reaches at a smaller one is what it would
    reach on the way to the largest.

    Args:
        teacher: Maps inputs to logits; None for labels alone, as NAGO trains. Not touched.
        data: What is trained on, as `morph.fit` takes it.
        validation: What accuracies are measured on, likewise.
        epochs: The largest budget.
        fabric: Where it runs; by default one device.
        on_progress: Told how far a training is.
        should_stop: Asked after every step; if it says so, the state is written and KeyboardInterrupt raised.
        **options: Fields of `morph.training.options.FitOptions`; by default `NUMBERS`.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        data: Any,
        validation: Any,
        epochs: int,
        *,
        fabric: Fabric | None = None,
        on_progress: Callable[[FitProgress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        **options: Any,
    ) -> None:
        self.teacher, self.data, self.validation, self.epochs = teacher, data, validation, epochs
        self.fabric, self.on_progress, self.should_stop = fabric, on_progress, should_stop
        self.options = {**NUMBERS, **options}

    def __call__(self, model: nn.Module, candidate: Candidate, epochs: int, checkpoint: Path) -> Outcome:
        """Train; errors as `morph.fit`."""
        fitted = fit(
            self.objective(model, candidate),
            self.data,
            validation=self.validation,
            fabric=self.fabric,
            checkpoint=checkpoint,
            identity={"temperature": candidate.temperature, "weight": candidate.weight},
            on_progress=self.on_progress,
            should_stop=self.should_stop,
            pause_after=epochs,
            epochs=self.epochs,
            seed=candidate.seed % 2**31,
            **self.options,
        )
        curve = tuple(row["val_top1"] for row in fitted.history[:epochs])
        return Outcome(curve[-1], curve)

    def objective(self, model: nn.Module, candidate: Candidate) -> nn.Module:
        """What is minimised: Eq. 2 of AutoKD, without the square of the temperature, or the labels' cross-entropy."""
        if self.teacher is None or candidate.temperature is None or candidate.weight is None:
            return Labels(model)
        return Distillation(model, self.teacher, [SoftLabels(candidate.temperature, candidate.weight)])
