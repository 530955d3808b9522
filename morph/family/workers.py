"""Asynchronous search: workers that share nothing but the study; one that dies loses no trial.

Each trial is trained from budget to budget and goes on while it is among the best of one in eta that have reached that
budget so far (successive halving without waiting: Li et al., "A System for Massively Parallel Hyperparameter Tuning",
MLSys 2020; a trial that was stopped is not taken up when others turn out worse). A worker writes the time beside its
trial; where that is too old, another worker takes the trial up from its last state.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.errors import StorageError
from morph.family.candidate import Train
from morph.family.running import checkpoint_of, train_trial
from morph.family.storage import lost_is_said
from morph.family.study import FamilyStudy, candidate_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_LOOK = 2.0  # seconds between two looks at what the other workers do
_ATTEMPTS = 3  # a trial whose workers died so often is taken to be why


@dataclass(frozen=True)
class Patience:
    """When a worker counts as dead. Clocks of several machines must agree to within the difference of both.

    Attributes:
        beat: Seconds between two signs of life.
        limit: Seconds without one after which its trial is taken up.
    """

    beat: float = 30.0
    limit: float = 180.0


def work(
    study: FamilyStudy,
    configurations: int,
    train: Train,
    folder: Path,
    *,
    patience: Patience | None = None,
    on_change: Callable[[], None] = lambda: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Be one worker, until all configurations are done, those of the other workers included.

    Args:
        study: The shared record; each process opens its own.
        configurations: How many the study shall have in all.
        train: What trains one network.
        folder: Where the states of trainings are kept. Where workers do not share it, a trial that is taken up begins
            anew, and ends with the same accuracy.
        patience: When other workers count as dead.
        on_change: Told after each change of the study by this worker.
        should_stop: Asked while there is nothing to do but wait for others; if it says so, KeyboardInterrupt is raised.

    Raises:
        StorageError: If the storage is lost; what was found so far is in it, and the checkpoints are kept.
    """
    from optuna.exceptions import UpdateFinishedTrialError

    waits = patience or Patience()
    while True:
        try:
            with lost_is_said():
                if not _work_once(study, configurations, train, folder, waits, on_change, should_stop):
                    return
        except StorageError as error:
            if not isinstance(error.__cause__, UpdateFinishedTrialError):
                raise
            on_change()  # this process stood still, and another one has taken the trial up


def _work_once(
    study: FamilyStudy,
    configurations: int,
    train: Train,
    folder: Path,
    waits: Patience,
    on_change: Callable[[], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Train one trial, or wait a moment for those of others; false where all are done."""
    trial = _take_up(study, waits) or _begin(study, configurations)
    if trial is None:
        if not any(other.state.name == "RUNNING" for other in study.trials()):
            return False
        if should_stop():
            raise KeyboardInterrupt
        time.sleep(min(waits.beat, _LOOK))
        return True
    on_change()
    with _signs_of_life(study, trial, waits.beat), _given_back(study, trial):
        _train_through(study, trial, train, folder, on_change)
    return True


def _begin(study: FamilyStudy, configurations: int) -> FrozenTrial | None:
    """A new trial, if one is missing."""
    if len(study.trials()) >= configurations:
        return None
    begun = time.perf_counter()
    candidate = study.propose([secrets.randbits(32)])  # two workers that ask at once shall not get the same
    trial = study.add(candidate, key=secrets.token_hex(8), beat=time.time(), overhead=time.perf_counter() - begun)
    place = [other.number for other in study.trials()].index(trial.number)
    if place >= configurations:  # another worker was faster
        _discard(study, trial)
        return None
    study.note(trial, bracket=_bracket(study, place))
    return study.storage.get_trial(trial._trial_id)


def _bracket(study: FamilyStudy, place: int) -> int:
    """Brackets follow one another as in the rounds of a synchronous search."""
    order = [b for b, rungs in enumerate(study.settings.budgets.brackets()) for _ in range(rungs[0].configurations)]
    return order[place % len(order)]


def _take_up(study: FamilyStudy, patience: Patience) -> FrozenTrial | None:
    """Take up a trial whose worker is gone, or give it up where that happened too often.

    A copy that runs is added first, and the old trial ended then: whoever ends it has it. Where a process dies between,
    both are old later, and the same happens with both.
    """
    for trial in study.trials():
        if trial.state.name != "RUNNING" or time.time() - trial.user_attrs["beat"] < patience.limit:
            continue
        attempts = trial.user_attrs.get("attempts", 1)
        if attempts >= _ATTEMPTS:
            _end(study, trial, reason=f"its worker died {attempts} times")
            continue
        copied = study.add(candidate_of(trial), **{**trial.user_attrs, "beat": time.time(), "attempts": attempts + 1})
        for epochs, accuracy in sorted(trial.intermediate_values.items()):
            study.storage.set_trial_intermediate_value(copied._trial_id, epochs, accuracy)
        if _end(study, trial, surplus=f"taken up as {copied.number}"):
            return study.storage.get_trial(copied._trial_id)
        _discard(study, copied)
    return None


def _end(study: FamilyStudy, trial: FrozenTrial, **attributes: Any) -> bool:
    """Fail a trial with a note; false where another process has ended it."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        study.note(trial, **attributes)
        return study.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def _discard(study: FamilyStudy, trial: FrozenTrial) -> None:
    """End a trial that stands for another one."""
    _end(study, trial, surplus="not needed")


def _train_through(
    study: FamilyStudy, trial: FrozenTrial, train: Train, folder: Path, tell: Callable[[], None]
) -> None:
    """Train from budget to budget while it is good enough."""
    budgets = study.settings.budgets
    for epochs in budgets.epochs[trial.user_attrs.get("bracket", 0) :]:
        known = trial.intermediate_values.get(epochs)
        if known is None:
            outcome = train_trial(study, trial, epochs, train, folder)
            tell()
            if outcome is None:
                return
            known = outcome.accuracy
        others = [t.intermediate_values[epochs] for t in study.trials() if epochs in t.intermediate_values]
        better = sum(value > known for value in others)
        if epochs == budgets.last or better >= max(1, budgets.kept(len(others))):
            break
    study.finish(trial)
    if epochs < budgets.last:
        checkpoint_of(trial, folder).unlink(missing_ok=True)
    tell()


@contextmanager
def _given_back(study: FamilyStudy, trial: FrozenTrial) -> Iterator[None]:
    """Let others take a trial up at once where this worker stops because it was told to, or may not go on."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the error itself is what counts; a trial that stays behind is found by its age
            study.note(trial, beat=0.0, attempts=trial.user_attrs.get("attempts", 1) - 1)
        raise


@contextmanager
def _signs_of_life(study: FamilyStudy, trial: FrozenTrial, every: float) -> Iterator[None]:
    """Write the time beside a trial while the block runs."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(every):
            try:
                study.note(trial, beat=time.time())
            except Exception:  # the block itself meets whatever is wrong with the storage
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
