"""Search for the family of students that learns best, and what such a search found.

Source: "Students in the Right Family Can Learn from Good Teachers" (AutoKD): the numbers of a random graph generator
and of distillation are searched together, each configuration judged by one network of its family.
"""

from __future__ import annotations

import fcntl
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from morph.errors import OutputError, SearchError, SearchStateError, TargetError
from morph.family.candidate import Train, TrialRow, best_of
from morph.family.rounds import run_rounds
from morph.family.statistics import Correlation, overhead, rank_correlations
from morph.family.storage import lost_is_said
from morph.family.study import NAME, FamilyStudy, SearchSettings, importances
from morph.family.takeover import Patience
from morph.family.workers import work
from morph.zoo.random_graph import Blueprint, Sources

JOURNAL = "study.journal"


@dataclass(frozen=True)
class FamilySearch:
    """What a search found.

    Attributes:
        rows: All configurations, by number.
        best: The most accurate one at the largest budget.
        correlations: How well ranks at one budget tell those at another.
        importances: Share of each searched number, the largest first; empty where there are too few trials.
        overhead: Time of the search itself over that of the trainings.
    """

    rows: list[TrialRow]
    best: TrialRow
    correlations: list[Correlation]
    importances: dict[str, float]
    overhead: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; None for what is not a number."""
        return {
            "best": self.best.to_json(),
            "correlations": [asdict(c) | {"rho": None if math.isnan(c.rho) else c.rho} for c in self.correlations],
            "importances": self.importances,
            "overhead": None if math.isnan(self.overhead) else self.overhead,
            "trials": [row.to_json() for row in self.rows],
        }


def search_family(
    settings: SearchSettings,
    train: Train,
    folder: Path,
    *,
    rounds: int = 1,
    storage: str | None = None,
    name: str = NAME,
    patience: Patience | None = None,
    on_change: Callable[[FamilyStudy], None] = lambda study: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> FamilySearch:
    """Search for the best family, or go on with a search.

    Args:
        settings: What all trials share. With ``asynchronous`` this call is one worker of any number; each of them calls
            this, with the same settings, and returns when all configurations are done.
        train: What trains one network, such as `morph.family.fitting.FitTrain`.
        folder: Where the study and the states of trainings are kept; made if it is not there.
        rounds: In all, those included that are done; each has the configurations of `Budgets.plan`.
        storage: Where the study is kept instead of a journal in ``folder``; see `morph.family.storage.open_storage`.
        name: Of the study in its storage.
        patience: When other workers count as dead.
        on_change: Given the study after each change.
        should_stop: Asked while a worker has nothing to do but wait for others; ``train`` asks for itself.

    Raises:
        TargetError: If not even the smallest network of all families meets the limit; says its parameters.
        SearchStateError: If the study was made with other settings, or another process searches in ``folder``.
        StorageError: If the storage cannot be reached, or is lost.
        SearchError: If every trial failed; says the first reason.
        KeyboardInterrupt: As ``train`` raises it; the same call goes on from there.
    """
    require_reachable(settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: no folder to write to: {error.strerror}") from error
    study = FamilyStudy(storage or str(folder / JOURNAL), settings, name=name)
    if settings.asynchronous:
        number = settings.budgets.plan().configurations * rounds
        tell = partial(on_change, study)
        work(study, number, train, folder, patience=patience, on_change=tell, should_stop=should_stop)
    else:
        with _alone(folder), lost_is_said():
            run_rounds(study, rounds, train, folder, lambda: on_change(study))
    return found_in(study)


def found_in(study: FamilyStudy) -> FamilySearch:
    """What a study holds.

    Raises:
        SearchError: If no trial was trained.
    """
    rows = study.rows()
    best = best_of(rows)
    if best is None:
        reasons = [row.reason for row in rows if row.reason]
        why = f"all {len(rows)} trials failed, the first with {reasons[0]}" if reasons else "no trial was trained yet"
        raise SearchError(f"there is no best family: {why}")
    budgets = study.settings.budgets.epochs
    return FamilySearch(
        rows, best, rank_correlations(rows, budgets), importances(rows, study.settings.searched), overhead(rows)
    )


def require_reachable(settings: SearchSettings) -> None:
    """See that the smallest of all networks meets the limit.

    Raises:
        TargetError: If not; says its parameters.
    """
    top, middle, bottom = (int(settings.searched[f"{level}_nodes"][0]) for level in ("top", "middle", "bottom"))
    cell = (_chain(middle), (_small(bottom),) * middle)
    params = settings.task.params(Blueprint(_small(top), (cell,) * top), 1)
    if params > settings.task.max_params:
        raise TargetError(
            f"no network meets a limit of {settings.task.max_params:,} parameters: the smallest of all families has "
            f"{params:,} for images of {'x'.join(map(str, settings.task.input_shape))} and "
            f"{settings.task.num_classes} classes"
        )


def _chain(nodes: int) -> Sources:
    """A graph that no connected one of so many nodes has fewer parameters than."""
    return tuple((node,) for node in range(nodes))


def _small(nodes: int) -> Sources:
    """The same of Watts-Strogatz graphs, whose only one of three nodes is a ring."""
    return ((0,), (1,), (1, 2)) if nodes == 3 else _chain(nodes)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder; whoever dies lets it go."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SearchStateError(
                f"{folder}: another process searches here; wait for it, or give another folder"
            ) from error
        yield
