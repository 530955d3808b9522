"""Decisions as values: an edit, a plan of edits, and the record of what was done. All of them go to JSON and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from morph.atomic import write_text
from morph.errors import PlanMismatchError

SCHEMA = 1


@dataclass(frozen=True)
class Regroup:
    """Give the convolution at ``module`` another number of groups.

    Attributes:
        module: Path of the convolution.
        groups: Groups before.
        to: Groups after.
        shape: Shape of its weight before, by which a plan knows its model.
    """

    module: str
    groups: int
    to: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Reinitialise:
    """Draw all weights afresh, as for a teacher that shall be untrained; the model's function is lost on purpose.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int


Edit = Regroup | Reinitialise
_KINDS: dict[str, type[Edit]] = {"regroup": Regroup, "reinitialise": Reinitialise}


@dataclass(frozen=True)
class Plan:
    """Edits in the order in which they are applied."""

    edits: tuple[Edit, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The edits as plain values."""
        return [{"edit": type(edit).__name__.lower(), **dataclasses.asdict(edit)} for edit in self.edits]

    def preserving(self) -> Plan:
        """The edits that keep the model's function."""
        return Plan(tuple(edit for edit in self.edits if not isinstance(edit, Reinitialise)))

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse of `to_json`.

        Raises:
            PlanMismatchError: If ``value`` does not have that form.
        """
        if not isinstance(value, list):
            raise PlanMismatchError(f"a plan is a list of edits, got {type(value).__name__}")
        return cls(tuple(_edit(item, i) for i, item in enumerate(value)))


def _edit(item: Any, position: int) -> Edit:
    """Read one edit."""
    kind = _KINDS.get(str(item.get("edit"))) if isinstance(item, dict) else None
    if kind is None:
        raise PlanMismatchError(f"edit {position} of the plan is not one that this version knows: {', '.join(_KINDS)}")
    values: dict[str, Any] = {}
    for field_ in dataclasses.fields(kind):
        value = item.get(field_.name)
        if not _FORMS[field_.name](value):
            raise PlanMismatchError(f"edit {position} of the plan: {field_.name} cannot be {value!r}")
        values[field_.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FORMS: dict[str, Callable[[Any], bool]] = {
    "module": lambda value: isinstance(value, str),
    "groups": _whole,
    "to": _whole,
    "seed": _whole,
    "shape": lambda value: isinstance(value, list) and all(map(_whole, value)),
}


@dataclass(frozen=True)
class Check:
    """One verification: what was compared, what was measured, and the limit.

    Attributes:
        name: What was compared.
        max_abs_diff: Largest absolute difference.
        relative: The same over the largest absolute value before.
        limit: What ``relative`` may not exceed.
        samples: How many samples were compared.
        dtype: In which precision.
    """

    name: str
    max_abs_diff: float
    relative: float
    limit: float
    samples: int
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the limit holds; not-a-number never passes."""
        return self.relative <= self.limit


@dataclass(frozen=True)
class Record:
    """What was decided, done and measured.

    Attributes:
        command: Name of the surgery, e.g. ``expand``.
        options: What was asked for.
        plan: The decision; it alone is needed to replay.
        before: Counts of the model that came in (``params``, ``macs``).
        after: Counts of the model that came out.
        checks: What was verified; empty if verification was switched off.
        details: Facts of this surgery: scores, steps, distance from the target, what was left whole, how the scores
            came about.
        environment: Versions, device, seed, data.
    """

    command: str
    options: Mapping[str, Any]
    plan: Plan
    before: Mapping[str, int]
    after: Mapping[str, int]
    checks: tuple[Check, ...]
    details: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON document; ``details`` are at its top level."""
        checks = [{**dataclasses.asdict(check), "passed": check.passed} for check in self.checks]
        return {
            "schema": SCHEMA,
            "command": self.command,
            **{f"{key}_before": value for key, value in self.before.items()},
            **{f"{key}_after": value for key, value in self.after.items()},
            "max_abs_diff": max((check.max_abs_diff for check in self.checks), default=None),
            **self.details,
            "checks": checks,
            "options": dict(self.options),
            "environment": dict(self.environment),
            "plan": self.plan.to_json(),
        }

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the record as JSON, whole or not at all.

        Raises:
            OutputError: If it cannot be written.
        """
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n", force=force)


def load_plan(path: Path) -> Plan:
    """Read the plan out of a saved record.

    Raises:
        PlanMismatchError: If the file is missing, is not JSON, or is not a record of this schema.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanMismatchError(f"{path}: {error.strerror}; give a record written by morph") from error
    except ValueError as error:
        raise PlanMismatchError(f"{path}: not a JSON document ({error}); give a record written by morph") from error
    if not isinstance(value, dict) or "plan" not in value:
        raise PlanMismatchError(f"{path}: not a record: it has no plan")
    if value.get("schema") != SCHEMA:
        raise PlanMismatchError(f"{path}: a record of schema {value.get('schema')!r}, this version reads {SCHEMA}")
    return Plan.from_json(value["plan"])
