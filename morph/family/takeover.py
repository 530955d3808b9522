"""Signs of life of workers, and how the trial of one that is gone is taken up.

A worker changes a mark beside its trial again and again. Whoever sees the same mark for too long, by a clock of its
own, takes the trial up: times of two machines are never compared, so their clocks may differ.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from morph.errors import FamilyError
from morph.family.study import FamilyStudy, candidate_of

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_GIVEN_BACK = 0.0  # the mark of a trial whose worker let it go


@dataclass(frozen=True)
class Patience:
    """When a worker counts as dead.

    Attributes:
        beat: Seconds between two signs of life.
        limit: Seconds without one after which its trial is taken up.

    Raises:
        FamilyError: If ``limit`` is not at least twice ``beat``, so that a worker that lives would count as dead.
    """

    beat: float = 30.0
    limit: float = 180.0

    def __post_init__(self) -> None:
        if not 0 < 2 * self.beat <= self.limit:
            raise FamilyError(
                f"a sign of life every {self.beat:g} seconds and a patience of {self.limit:g}; the patience must be at "
                "least twice as long, or workers that live count as dead"
            )


class Watch:
    """Remembers since when it has seen the mark of each trial unchanged.

    Args:
        limit: Seconds after which the worker counts as dead.
        clock: Seconds that never go back; compared with nothing but itself.
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self.seen: dict[int, tuple[float, float]] = {}

    def is_dead(self, trial: FrozenTrial) -> bool:
        """Whether nobody trains a trial that is said to run."""
        mark, now = trial.user_attrs["beat"], self.clock()
        if mark == _GIVEN_BACK:
            return True
        before, since = self.seen.get(trial.number, (None, now))
        if before != mark:
            since = now
        self.seen[trial.number] = (mark, since)
        return now - since >= self.limit


def new_mark() -> float:
    """A mark that no other worker sets; the time of this machine, for whoever reads a study."""
    return time.time()


def take_up(study: FamilyStudy, watch: Watch) -> FrozenTrial | None:
    """Take up a trial whose worker is gone; None where there is none.

    A copy that runs is added first, and the old trial ended then: whoever ends it has it. Where a process dies between,
    nobody marks either later, and the same happens with both.
    """
    dead = [trial for trial in study.trials() if trial.state.name == "RUNNING" and watch.is_dead(trial)]
    for trial in dead:
        copied = study.add(candidate_of(trial), **{**trial.user_attrs, "beat": new_mark()})
        for epochs, accuracy in sorted(trial.intermediate_values.items()):
            study.storage.set_trial_intermediate_value(copied._trial_id, epochs, accuracy)
        if _end(study, trial, surplus=f"taken up as {copied.number}"):
            return study.storage.get_trial(copied._trial_id)
        discard(study, copied)
    return None


def discard(study: FamilyStudy, trial: FrozenTrial) -> None:
    """End a trial that stands for another one."""
    _end(study, trial, surplus="not needed")


def _end(study: FamilyStudy, trial: FrozenTrial, **attributes: Any) -> bool:
    """Fail a trial with a note; false where another process has ended it."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        study.note(trial, **attributes)
        return study.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


@contextmanager
def given_back(study: FamilyStudy, trial: FrozenTrial) -> Iterator[None]:
    """Let others take a trial up at once where this worker stops because it was told to, or may not go on."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the error itself is what counts; a trial that stays behind is found by its mark
            study.note(trial, beat=_GIVEN_BACK)
        raise


@contextmanager
def signs_of_life(study: FamilyStudy, trial: FrozenTrial, every: float) -> Iterator[None]:
    """Change the mark beside a trial while the block runs."""
    from optuna.exceptions import UpdateFinishedTrialError

    done = threading.Event()

    def beat() -> None:
        while not done.wait(every):
            try:
                study.note(trial, beat=new_mark())
            except UpdateFinishedTrialError:
                return  # another one has it, which the block finds out
            except Exception:  # a storage that is away for a moment; if for longer, the block meets it
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
