"""Asynchronous search: workers that share nothing but the study; one that dies loses no trial.

A worker takes what it finds first: a trial whose worker is gone, a trial that waits and may go on, a new one. It trains
from budget to budget while that is among the best (`morph.family.halving`), and then lets it wait for others to judge.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from morph.errors import StorageError
from morph.family.candidate import Train
from morph.family.halving import Halving, bracket_of, bracket_order
from morph.family.running import forget, train_trial
from morph.family.storage import lost_is_said
from morph.family.study import FamilyStudy
from morph.family.takeover import Patience, Watch, discard, given_back, new_mark, signs_of_life, take_up

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_LOOK = 2.0  # seconds between two looks at what the other workers do


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

    worker = _Worker(study, configurations, train, folder, patience or Patience(), on_change, should_stop)
    while True:
        try:
            with lost_is_said():
                if not worker.work_once():
                    return
        except StorageError as error:
            if not isinstance(error.__cause__, UpdateFinishedTrialError):
                raise
            on_change()  # this process stood still, and another one has taken the trial up


class _Worker:
    """The state of `work`, whose arguments it has."""

    def __init__(
        self,
        study: FamilyStudy,
        configurations: int,
        train: Train,
        folder: Path,
        patience: Patience,
        on_change: Callable[[], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.study, self.configurations, self.train, self.folder = study, configurations, train, folder
        self.patience, self.on_change, self.should_stop = patience, on_change, should_stop
        self.watch = Watch(patience.limit)

    def work_once(self) -> bool:
        """Train one trial, or wait a moment for those of others; false where all are done."""
        trial = take_up(self.study, self.watch) or self.promote() or self.begin()
        if trial is None:
            if any(other.state.name == "RUNNING" for other in self.study.trials()):
                if self.should_stop():
                    raise KeyboardInterrupt
                time.sleep(min(self.patience.beat, _LOOK))
                return True
            self.tidy()
            return False
        self.on_change()
        with signs_of_life(self.study, trial, self.patience.beat), given_back(self.study, trial):
            self.train_through(trial)
        self.end_hopeless()
        self.on_change()
        return True

    def halving(self) -> Halving:
        """The trials as they stand."""
        return Halving(self.study.settings.budgets, self.configurations, self.study.trials())

    def promote(self) -> FrozenTrial | None:
        """A trial that waits and may go on, if there is one.

        Where two ask for it in the same moment, some storages give it to both; that costs time alone, as both train it
        alike.
        """
        for trial in self.halving().promotable():
            self.study.note(trial, beat=new_mark())  # before it runs, so that nobody takes it for one that is dead
            if self.study.claim(trial):
                return self.study.storage.get_trial(trial._trial_id)
        return None

    def begin(self) -> FrozenTrial | None:
        """A new trial, if one is missing."""
        study = self.study
        if len(study.trials()) >= self.configurations:
            return None
        begun = time.perf_counter()
        candidate = study.propose([secrets.randbits(32)])  # two workers that ask at once shall not get the same
        trial = study.add(
            candidate, key=secrets.token_hex(8), beat=new_mark(), overhead=time.perf_counter() - begun
        )  # fmt: skip
        place = [other.number for other in study.trials()].index(trial.number)
        if place >= self.configurations:  # another worker was faster
            discard(study, trial)
            return None
        order = bracket_order(study.settings.budgets)
        study.note(trial, bracket=order[place % len(order)])
        return study.storage.get_trial(trial._trial_id)

    def train_through(self, trial: FrozenTrial) -> None:
        """Train from budget to budget while it is good enough; then it waits, or ends."""
        budgets = self.study.settings.budgets
        for epochs in budgets.epochs[bracket_of(trial) :]:
            if epochs not in trial.intermediate_values:
                outcome = train_trial(self.study, trial, epochs, self.train, self.folder)
                self.on_change()
                if outcome is None:
                    return
                trial = self.study.storage.get_trial(trial._trial_id)
            if epochs == budgets.last:
                self.end(trial)
            elif epochs == max(trial.intermediate_values) and not self.halving().goes_on(trial):
                self.study.pause(trial)
                return

    def end_hopeless(self) -> None:
        """End the trials that wait and can never be among the best any more."""
        halving = self.halving()
        for trial in halving.waiting():
            if not halving.has_chance(trial):
                self.end(trial)

    def end(self, trial: FrozenTrial) -> None:
        """End a trial; the state of its training is not needed any more."""
        self.study.finish(trial)
        forget(trial, self.folder)

    def tidy(self) -> None:
        """End what still waits when all is done, and remove what is left in this folder of trials that others ended."""
        for trial in self.study.trials():
            if trial.state.name == "WAITING":
                self.study.finish(trial)
            forget(trial, self.folder)
