"""Train one configuration up to one budget, and write down what came of it, also if it failed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

from morph.errors import TargetError, TrainingError
from morph.family.candidate import Outcome, Train
from morph.family.generator import draw_network
from morph.family.study import FamilyStudy, candidate_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FAILURES = (RuntimeError, MemoryError, FloatingPointError, TargetError, TrainingError)
"""What ends a trial and not the search: out of memory, values that are not finite, a network that is too large."""


def train_trial(study: FamilyStudy, trial: FrozenTrial, epochs: int, train: Train, folder: Path) -> Outcome | None:
    """Train the network of a trial until ``epochs`` rounds through the data are done.

    Args:
        study: Where it is written down.
        trial: Which.
        epochs: The budget.
        train: What trains.
        folder: Where the states of trainings are kept.

    Returns:
        What was reached; None if the trial failed, which the study then says with its reason.
    """
    candidate, begun = candidate_of(trial), time.perf_counter()
    kept = study.storage.get_trial(trial._trial_id).user_attrs
    try:
        drawn = draw_network(candidate.family, study.settings.task, candidate.seed)
        study.note(trial, params=drawn.params, width=drawn.width)
        started = time.perf_counter()
        outcome = train(drawn.model, candidate, epochs, checkpoint_of(trial, folder))
        if not math.isfinite(outcome.accuracy):
            raise FloatingPointError(f"the accuracy is {outcome.accuracy}")  # as if train had said so
    except FAILURES as error:
        study.fail(trial, reason_of(error))
        checkpoint_of(trial, folder).unlink(missing_ok=True)
        return None
    ended = time.perf_counter()
    study.note(
        trial,
        seconds=kept.get("seconds", 0.0) + ended - started,
        overhead=kept.get("overhead", 0.0) + started - begun,
    )
    study.report(trial, epochs, outcome)
    return outcome


def checkpoint_of(trial: FrozenTrial, folder: Path) -> Path:
    """Where the state of a trial's training is kept; one that takes it up has the same."""
    return folder / f"trial-{trial.user_attrs['key']}.training"


def reason_of(error: BaseException) -> str:
    """One line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first}"[:400]
