"""Train one configuration up to one budget, and write down what came of it, also if it failed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
_DEATHS = 2  # of a process at the same place of a training, after which that is taken to be why


def train_trial(study: FamilyStudy, trial: FrozenTrial, epochs: int, train: Train, folder: Path) -> Outcome | None:
    """Train the network of a trial until ``epochs`` rounds through the data are done.

    A trial whose process was killed twice at the same place, as where memory is short, is not tried again: it fails.

    Args:
        study: Where it is written down.
        trial: Which.
        epochs: The budget.
        train: What trains.
        folder: Where the states of trainings are kept.

    Returns:
        What was reached; None if the trial failed, which the study then says with its reason.
    """
    checkpoint = checkpoint_of(trial, folder)
    place = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    deaths, before = study.storage.get_trial(trial._trial_id).user_attrs.get("deaths", (0, None))
    deaths = deaths if before == place else 0  # it got further since
    if deaths >= _DEATHS:
        study.fail(trial, f"its process was killed {deaths} times, perhaps for want of memory")
        forget(trial, folder)
        return None
    with _survived(study, trial, deaths, place):
        return _train(study, trial, epochs, train, folder)


@contextmanager
def _survived(study: FamilyStudy, trial: FrozenTrial, deaths: int, place: int | None) -> Iterator[None]:
    """Leave one death more behind, unless the block is left alive, be it by an error or because it was told to stop."""
    study.note(trial, deaths=(deaths + 1, place))
    try:
        yield
    finally:
        if not study.storage.get_trial(trial._trial_id).state.is_finished():
            study.note(trial, deaths=(deaths, place))


def _train(study: FamilyStudy, trial: FrozenTrial, epochs: int, train: Train, folder: Path) -> Outcome | None:
    """Train, and write down what came of it."""
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
        forget(trial, folder)
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


def forget(trial: FrozenTrial, folder: Path) -> None:
    """Remove the state of a training that nobody goes on with."""
    checkpoint_of(trial, folder).unlink(missing_ok=True)


def reason_of(error: BaseException) -> str:
    """One line."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first}"[:400]
