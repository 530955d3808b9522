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
from morph.graph_edits import DropBranch as DropBranch
from morph.graph_edits import Reroute as Reroute
from morph.graph_edits import SetConstant as SetConstant
from morph.graph_edits import SplitAt as SplitAt
from morph.graph_edits import UseGraph as UseGraph
from morph.module_edits import FreeAttention as FreeAttention
from morph.module_edits import SetAttribute as SetAttribute
from morph.module_edits import SetConfig as SetConfig
from morph.random_edits import Perturb as Perturb
from morph.random_edits import PutLabelHead as PutLabelHead
from morph.random_edits import PutVotingHead as PutVotingHead
from morph.random_edits import Reinitialise as Reinitialise
from morph.random_edits import Substitute as Substitute
from morph.random_edits import SwapHead as SwapHead

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
class Resize:
    """Keep, drop or copy positions along one axis of one parameter or buffer.

    Attributes:
        tensor: Its name in the state_dict.
        axis: The axis.
        size: Length of that axis before, by which a plan knows its model.
        index: For each position afterwards, the position that it comes from. A position that is missing was dropped,
            one that comes several times was copied.
        scale: Factor for each position afterwards; empty if all are one. Where the sum over the copies must stay as it
            was (a reader's columns), it is one over the number of copies.
    """

    tensor: str
    axis: int
    size: int
    index: tuple[int, ...]
    scale: tuple[float, ...] = ()


@dataclass(frozen=True)
class Deepen:
    """Insert copies of blocks into a chain of modules, with some tensors zero so that they hand on their input.

    Names are those of the model at the time of the edit, so the edits of a plan go from the last block to the first.

    Attributes:
        container: Path of the ``Sequential`` or ``ModuleList``.
        blocks: Names of neighbouring children of it; their copies go behind the last of them.
        copies: How many copies of all of them.
        zeroed: Parameters that are zero in each copy, named from the container on: ``1.bn2.weight``.
        length: Number of children of the container before, and
        params: elements of the parameters of the blocks, by which a plan knows its model.
    """

    container: str
    blocks: tuple[str, ...]
    copies: int
    zeroed: tuple[str, ...]
    length: int
    params: int


Edit = (
    Regroup
    | Reinitialise
    | Resize
    | Deepen
    | Substitute
    | SwapHead
    | PutLabelHead
    | PutVotingHead
    | SetAttribute
    | SetConfig
    | FreeAttention
    | UseGraph
    | SetConstant
    | SplitAt
    | Perturb
    | Reroute
    | DropBranch
)
_KINDS: dict[str, type[Edit]] = {
    "regroup": Regroup,
    "reinitialise": Reinitialise,
    "resize": Resize,
    "deepen": Deepen,
    "substitute": Substitute,
    "swaphead": SwapHead,
    "putlabelhead": PutLabelHead,
    "putvotinghead": PutVotingHead,
    "setattribute": SetAttribute,
    "setconfig": SetConfig,
    "freeattention": FreeAttention,
    "usegraph": UseGraph,
    "setconstant": SetConstant,
    "splitat": SplitAt,
    "perturb": Perturb,
    "reroute": Reroute,
    "dropbranch": DropBranch,
}


DRAWING = Reinitialise | Substitute | SwapHead | PutLabelHead | PutVotingHead | Perturb
"""Edits that draw random numbers and so do not keep the function."""


@dataclass(frozen=True)
class Plan:
    """Edits in the order in which they are applied."""

    edits: tuple[Edit, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """The edits as plain values."""
        return [{"edit": type(edit).__name__.lower(), **dataclasses.asdict(edit)} for edit in self.edits]

    def preserving(self) -> Plan:
        """The edits that keep the model's function."""
        return Plan(tuple(e for e in self.edits if not isinstance(e, DRAWING)))

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
        values[field_.name] = _frozen(value)
    return kind(**values)


def _frozen(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wholes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "module": lambda value: isinstance(value, str),
    "groups": _whole,
    "num_heads": _whole,
    "head_dim": _whole,
    "to": _whole,
    "seed": _whole,
    "shape": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "tensor": lambda value: isinstance(value, str),
    "axis": _whole,
    "size": _whole,
    "positions": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "deviation": lambda value: isinstance(value, float | int) and 0 <= value < float("inf"),
    "index": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "scale": lambda value: isinstance(value, list) and all(isinstance(x, float | int) for x in value),
    "shift": lambda value: isinstance(value, list) and all(isinstance(x, float | int) for x in value),
    "attribute": lambda value: isinstance(value, str) and value.isidentifier(),
    "value": lambda value: _whole(value) or (isinstance(value, list) and all(map(_whole, value))),
    "new": lambda value: _whole(value) or (isinstance(value, list) and all(map(_whole, value))),
    "setting": lambda value: isinstance(value, str) and all(part.isidentifier() for part in value.split(".")),
    "front": lambda value: value == "symbolic",
    "node": lambda value: isinstance(value, str),
    "slot": lambda value: isinstance(value, str) and value.startswith(("args.", "kwargs.")),
    "number": lambda value: isinstance(value, float | int) and not isinstance(value, bool),
    "sizes": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "source": lambda value: isinstance(value, str),
    "pieces": lambda value: isinstance(value, list) and bool(value) and all(isinstance(x, str) for x in value),
    "indices": lambda value: isinstance(value, list) and all(map(_wholes, value)),
    "choice": lambda value: isinstance(value, str),
    "container": lambda value: isinstance(value, str),
    "blocks": lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
    "copies": _whole,
    "head": lambda value: isinstance(value, str),
    "removed": lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
    "channels": _whole,
    "kernel": _whole,
    "stride": _whole,
    "zeroed": lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value),
    "length": _whole,
    "params": _whole,
}


@dataclass(frozen=True)
class Check:
    """One verification: what was compared, what was measured, and the limit.

    Attributes:
        name: What was compared.
        max_abs_diff: Largest absolute difference.
        relative: The same over the largest absolute value before.
        limit: What ``relative`` may not exceed; None where the difference is only told, as that of noise.
        samples: How many samples were compared.
        dtype: In which precision.
    """

    name: str
    max_abs_diff: float
    relative: float
    limit: float | None
    samples: int
    dtype: str

    @property
    def passed(self) -> bool:
        """Whether the limit holds; not-a-number never passes."""
        return self.relative < float("inf") if self.limit is None else self.relative <= self.limit


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
    if value.get("trained") and not value["plan"]:
        raise PlanMismatchError(
            f"{path}: has nothing to replay: the weights were trained, the structure stayed as it was; open the model"
        )
    if value.get("architecture") and not value["plan"]:
        raise PlanMismatchError(
            f"{path}: has nothing to replay: its network was built afresh as {value.get('architecture')}, seed "
            f"{value.get('seed')}"
        )
    return Plan.from_json(value["plan"])
