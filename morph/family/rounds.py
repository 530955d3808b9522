"""Synchronous search: the brackets of a round in their order, the same for the same seed, to be taken up at any moment.

Nothing is remembered but the study: what a killed process had done is read from it, and the rest follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from morph.family.budgets import Rung
from morph.family.candidate import Train
from morph.family.running import forget, train_trial
from morph.family.study import FamilyStudy

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

OnChange = Callable[[], None]


def run_rounds(study: FamilyStudy, rounds: int, train: Train, folder: Path, on_change: OnChange = lambda: None) -> None:
    """Run rounds of brackets, or what is missing of them.

    Args:
        study: The record; made before, or a new one.
        rounds: In all, those included that are done.
        train: What trains one network.
        folder: Where the states of trainings are kept.
        on_change: Told after each change of the study.

    Raises:
        KeyboardInterrupt: As ``train`` raises it; the same call goes on from there.
    """
    for number in range(rounds):
        for bracket, rungs in enumerate(study.settings.budgets.brackets()):
            _run_bracket(study, (number, bracket), rungs, train, folder, on_change)


def _run_bracket(
    study: FamilyStudy, place: tuple[int, int], rungs: tuple[Rung, ...], train: Train, folder: Path, tell: OnChange
) -> None:
    """Propose, train, keep the best, until the last budget."""
    alive = _members(study, place)
    while len(alive) < rungs[0].configurations:
        begun = time.perf_counter()
        candidate = study.propose()
        # The name of the checkpoint is the place in the plan, so that it is the same however often one is killed.
        key = "-".join(map(str, (*place, len(alive))))
        alive.append(
            study.add(candidate, round=place[0], bracket=place[1], key=key, overhead=time.perf_counter() - begun)
        )
        tell()
    for rung, following in zip(rungs, (*rungs[1:], None), strict=True):
        for trial in alive:
            if not trial.state.is_finished() and rung.epochs not in trial.intermediate_values:
                train_trial(study, trial, rung.epochs, train, folder)
                tell()
        names = {trial.number for trial in alive}
        trained = [t for t in _members(study, place) if t.number in names and rung.epochs in t.intermediate_values]
        trained.sort(key=lambda t: (-t.intermediate_values[rung.epochs], t.number))
        alive = trained[: following.configurations] if following else []
        going_on = {trial.number for trial in alive}
        for trial in trained:
            if trial.number not in going_on:
                _end(study, trial, folder)
        tell()


def _members(study: FamilyStudy, place: tuple[int, int]) -> list[FrozenTrial]:
    """The trials of one bracket of one round."""
    return [t for t in study.trials() if (t.user_attrs["round"], t.user_attrs["bracket"]) == place]


def _end(study: FamilyStudy, trial: FrozenTrial, folder: Path) -> None:
    """End a trial; the state of its training is not needed any more."""
    if not trial.state.is_finished():
        study.finish(trial)
    forget(trial, folder)
