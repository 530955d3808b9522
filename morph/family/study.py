"""The record of a search: one Optuna study, whose trials are configurations, with what was found at each budget."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from morph.errors import SearchStateError
from morph.family.budgets import Budgets
from morph.family.candidate import TEACHING, Candidate, Outcome, TrialRow
from morph.family.generator import Task
from morph.family.settings import ALLOWED, RANGES, FamilySettings, Range, checked_range
from morph.family.storage import look_into, open_storage, quiet, reached, require_packages

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

NAME = "morph-search"
_SETTINGS = "settings"
_ENOUGH = 20  # trials, to tell what matters
_STARTUP = 10  # configurations that are drawn uniformly before the model of good ones is used, as Optuna does


@dataclass(frozen=True)
class SearchSettings:
    """What all trials of one study share; a study is gone on with only by the same.

    Attributes:
        task: What the networks are for.
        budgets: After how many rounds through the data configurations are compared.
        distil: Whether students learn from a teacher, whose two numbers are then searched too.
        seed: Of the proposals, the networks and their weights.
        asynchronous: Whether many workers share the study, instead of brackets that run in their order.
        training: Everything else that decides what an accuracy means, such as the data and the learning rate; plain
            values.
        ranges: Which part of its range a number is searched in, by its name, where that is not all of it.

    Raises:
        FamilyError: As `morph.family.settings.checked_range`.
    """

    task: Task
    budgets: Budgets
    distil: bool = True
    seed: int = 0
    asynchronous: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.searched  # noqa: B018  (refuses wrong ranges)

    @property
    def searched(self) -> dict[str, Range]:
        """All numbers that are searched, with their ranges."""
        teaching = TEACHING if self.distil else {}
        allowed = {**ALLOWED, **teaching}
        return {
            **RANGES,
            **teaching,
            **{name: checked_range(name, ends, allowed) for name, ends in self.ranges.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        return dict(json.loads(json.dumps(plain)))


def require_fitting(where: str, settings: SearchSettings, *, name: str = NAME) -> None:
    """See that a study could be begun or gone on with, and write nothing.

    Args:
        where: As `FamilyStudy`.
        settings: Likewise.
        name: Likewise.

    Raises:
        StorageError: As there.
        SearchStateError: Likewise.
    """
    storage = look_into(where)
    with reached(where):
        studies = storage.get_all_studies() if storage else []
    for study in studies:
        if study.study_name == name and _SETTINGS in study.user_attrs:
            _require_same(study.user_attrs[_SETTINGS], settings.to_json(), where)


class FamilyStudy:
    """One study in its storage. Every change is written at once, so that a process may be killed at any moment.

    Args:
        where: As `morph.family.storage.open_storage`.
        settings: What the trials share.
        name: Name of the study, where the storage holds several.

    Raises:
        StorageError: As there.
        SearchStateError: If the study that is there was made with other settings; names them.
    """

    def __init__(self, where: str, settings: SearchSettings, *, name: str = NAME) -> None:
        self.settings = settings
        self.storage: BaseStorage = open_storage(where)
        self.study = _open_study(self.storage, name, where)
        self.id = self.study._study_id
        self._distributions = _distributions(settings.searched)
        found = self.study.user_attrs.get(_SETTINGS)
        if found is None:
            self.study.set_user_attr(_SETTINGS, settings.to_json())
        else:
            _require_same(found, settings.to_json(), where)

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number, as the storage has them now; not those that stand for another one."""
        trials = self.storage.get_all_trials(self.id, deepcopy=True)
        return [t for t in sorted(trials, key=lambda t: t.number) if "surplus" not in t.user_attrs]

    def rows(self) -> list[TrialRow]:
        """All trials as plain values."""
        return [row_of(trial) for trial in self.trials()]

    def propose(self, salt: Iterable[int] = ()) -> Candidate:
        """The next configuration, by the tree-structured Parzen estimator over all numbers jointly.

        It depends on the trials so far, the seed of the study and ``salt`` alone. (Estimator: Bergstra et al. 2011;
        stopped trials rank behind complete ones, those with larger budgets first; ones that run count as bad.)
        """
        import optuna

        trials = self.trials()
        draws = np.random.SeedSequence([self.settings.seed, len(trials), *salt])
        first, second = (int(number) for number in draws.generate_state(2))
        with quiet():
            sampler = optuna.samplers.TPESampler(
                seed=first, multivariate=True, n_startup_trials=_STARTUP, constant_liar=True
            )
            copied = optuna.create_study(direction="maximize", sampler=sampler)
            copied.add_trials([_as_stopped(t) for t in trials if t.state != optuna.trial.TrialState.FAIL])
            found = copied.ask(self._distributions).params
        family = FamilySettings(**{name: found[name] for name in RANGES})
        return Candidate(family, second, found.get("temperature"), found.get("weight"))

    def add(self, candidate: Candidate, **attributes: Any) -> FrozenTrial:
        """Write a trial that runs from now on; ``attributes`` are kept beside it. Returns it."""
        import optuna

        values = asdict(candidate.family) | {"temperature": candidate.temperature, "weight": candidate.weight}
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            params={name: values[name] for name in self._distributions},
            distributions=dict(self._distributions),
            user_attrs={"seed": candidate.seed, **attributes},
        )
        return self.storage.get_trial(self.storage.create_new_trial(self.id, template_trial=trial))

    def note(self, trial: FrozenTrial, **attributes: Any) -> None:
        """Keep plain values beside a trial."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(trial._trial_id, name, value)

    def report(self, trial: FrozenTrial, epochs: int, outcome: Outcome) -> None:
        """Write what a trial reached at a budget; the value comes last, so that it is never there alone."""
        self.note(trial, curve=[round(value, 6) for value in outcome.curve])
        self.storage.set_trial_intermediate_value(trial._trial_id, epochs, outcome.accuracy)

    def finish(self, trial: FrozenTrial) -> None:
        """End a trial: complete at the last budget, stopped below it."""
        from optuna.trial import TrialState

        values = self.storage.get_trial(trial._trial_id).intermediate_values
        last = max(values)
        state = TrialState.COMPLETE if last == self.settings.budgets.last else TrialState.PRUNED
        self.storage.set_trial_state_values(trial._trial_id, state, [values[last]])

    def pause(self, trial: FrozenTrial) -> None:
        """Let a trial wait, for anybody to `claim` it."""
        from optuna.trial import TrialState

        self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def claim(self, trial: FrozenTrial) -> bool:
        """Let a trial that waits run again; false where another process has done so."""
        from optuna.trial import TrialState

        return self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)

    def fail(self, trial: FrozenTrial, reason: str) -> None:
        """End a trial that could not be trained."""
        from optuna.trial import TrialState

        self.note(trial, reason=reason)
        self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _as_stopped(trial: FrozenTrial) -> FrozenTrial:
    """A trial that waits as one that was stopped, which it is as far as is known; others as they are."""
    from optuna.trial import TrialState

    if trial.state == TrialState.WAITING:
        trial.values = [trial.intermediate_values[max(trial.intermediate_values)]]
        trial.state = TrialState.PRUNED
        trial.datetime_complete = trial.datetime_start
    return trial


def row_of(trial: FrozenTrial) -> TrialRow:
    """A trial as plain values."""
    attributes = trial.user_attrs
    states = {"RUNNING": "running", "WAITING": "stopped", "PRUNED": "stopped", "COMPLETE": "complete", "FAIL": "failed"}
    return TrialRow(
        number=trial.number,
        candidate=candidate_of(trial),
        state=states[trial.state.name],
        bracket=attributes.get("bracket", 0),
        accuracies=dict(sorted(trial.intermediate_values.items())),
        curve=tuple(attributes.get("curve", ())),
        **{key: attributes[key] for key in ("seconds", "overhead", "params", "width", "reason") if key in attributes},
    )


def candidate_of(trial: FrozenTrial) -> Candidate:
    """The configuration of a trial."""
    family = FamilySettings(**{name: trial.params[name] for name in RANGES})
    return Candidate(family, trial.user_attrs["seed"], trial.params.get("temperature"), trial.params.get("weight"))


def importances(rows: Iterable[TrialRow], searched: Mapping[str, Range] | None = None) -> dict[str, float]:
    """How much each searched number matters, as shares of one, the largest first.

    Measured by PED-ANOVA (Watanabe et al., IJCAI 2023) at the largest budget that twenty trials reached, or else at the
    smallest. Empty where there are too few, or all are equal.

    Args:
        rows: The trials.
        searched: The numbers and the ranges that they were searched in; by default the full ones.
    """
    require_packages()
    import optuna

    rows = [row for row in rows if row.accuracies and row.state != "failed"]
    reached = sorted({budget for row in rows for budget in row.accuracies}, reverse=True)
    enough = [budget for budget in reached if sum(budget in row.accuracies for row in rows) >= _ENOUGH]
    budget = enough[0] if enough else reached[-1] if reached else 0
    used = [row for row in rows if budget in row.accuracies]
    if len({row.accuracies[budget] for row in used}) < 2:
        return {}
    with quiet():
        study = optuna.create_study(direction="maximize")
        full = {**RANGES, **(TEACHING if used[0].candidate.temperature is not None else {})}
        distributions = _distributions(searched or full)
        for row in used:
            values = asdict(row.candidate.family) | asdict(row.candidate)
            params = {name: values[name] for name in distributions}
            study.add_trial(
                optuna.trial.create_trial(value=row.accuracies[budget], params=params, distributions=distributions)
            )
        found = optuna.importance.get_param_importances(study)
    return {name: share for name, share in sorted(found.items(), key=lambda item: -item[1]) if math.isfinite(share)}


def _distributions(searched: Mapping[str, Range]) -> dict[str, BaseDistribution]:
    """What is searched, as Optuna has it."""
    from optuna.distributions import FloatDistribution, IntDistribution

    return {
        name: IntDistribution(int(low), int(high)) if isinstance(low, int) else FloatDistribution(low, high)
        for name, (low, high) in searched.items()
    }


def _open_study(storage: BaseStorage, name: str, where: str) -> Study:
    import optuna

    with quiet(), reached(where):
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """See that a study was made with the same settings.

    Raises:
        SearchStateError: If not; names those that differ.
    """
    there, here = _flat(found), _flat(wanted)
    differ = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if differ:
        first = f"{differ[0]} is {there.get(differ[0])!r} there and {here.get(differ[0])!r} here"
        more = f" (and {len(differ) - 1} more: {', '.join(differ[1:5])})" if len(differ) > 1 else ""
        raise SearchStateError(
            f"{where}: holds a study made with other settings: {first}{more}; give the same options or another folder"
        )


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found
