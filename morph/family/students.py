"""The second phase: several networks of the best family, trained for long, measured and compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from morph.atomic import write_text
from morph.errors import SearchStateError
from morph.family.candidate import Candidate, Outcome, Train, candidate_from
from morph.family.generator import Drawn, Task, draw_network
from morph.family.measures import Measures, measure
from morph.family.running import FAILURES, reason_of
from morph.files import save_model

SCHEMA = 1
_PHASE = 2  # so that these seeds are others than those of the search
COSTS = ("memory", "params", "macs", "latency")


@dataclass(frozen=True)
class StudentRow:
    """One student of the second phase.

    Attributes:
        name: Of its file, without the suffix.
        candidate: What it was drawn from and how it was taught.
        accuracy: After the last round; None if it failed.
        width: Channels of its first stage.
        measures: What it costs.
        reason: Why it failed.
    """

    name: str
    candidate: Candidate
    accuracy: float | None
    width: int | None
    measures: Measures | None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def candidates_of(best: Candidate, number: int) -> list[Candidate]:
    """So many networks of the family of ``best``, taught as it was; none of them is that of the search."""
    seeds = np.random.SeedSequence([best.seed, _PHASE]).generate_state(number)
    return [replace(best, seed=int(seed)) for seed in seeds]


def train_students(
    best: Candidate,
    task: Task,
    number: int,
    epochs: int,
    train: Train,
    folder: Path,
    on_change: Callable[[list[StudentRow]], None] = lambda rows: None,
) -> list[StudentRow]:
    """Draw, train, measure and save students; what was done before is read from ``students.json``.

    Args:
        best: The best configuration of a search.
        task: What the networks are for.
        number: How many.
        epochs: Rounds through the data for each.
        train: What trains one network.
        folder: Where ``students.json``, ``student-N.pt`` and the states of trainings go.
        on_change: Given the rows so far after each student.

    Raises:
        SearchStateError: If the students that are there are of another family, or were trained otherwise.
        OutputError: If something cannot be written.
    """
    identity = {"best": best.to_json(), "task": _plain(asdict(task)), "epochs": epochs}
    path = folder / "students.json"
    rows = _read(path, identity)
    for place, candidate in enumerate(candidates_of(best, number)):
        if place < len(rows):
            continue
        rows.append(_train(f"student-{place}", candidate, task, epochs, train, folder))
        content = {"schema": SCHEMA, "identity": identity, "rows": [row.to_json() for row in rows]}
        write_text(path, json.dumps(content, indent=1), force=True)
        (folder / f"student-{place}.training").unlink(missing_ok=True)
        on_change(rows)
    return rows[:number]


def _train(name: str, candidate: Candidate, task: Task, epochs: int, train: Train, folder: Path) -> StudentRow:
    """One student; one that fails says why."""
    try:
        drawn = draw_network(candidate.family, task, candidate.seed)
        outcome = train(drawn.model, candidate, epochs, folder / f"{name}.training")
        if not math.isfinite(outcome.accuracy):
            raise FloatingPointError(f"the accuracy is {outcome.accuracy}")
    except FAILURES as error:
        return StudentRow(name, candidate, None, None, None, reason_of(error))
    row = StudentRow(
        name, candidate, outcome.accuracy, drawn.width, measure(drawn.model, task.input_shape, torch.device("cpu"))
    )
    _save(drawn, task, row, outcome, folder / f"{name}.pt")
    return row


def _save(drawn: Drawn, task: Task, row: StudentRow, outcome: Outcome, path: Path) -> None:
    """Write the network as a plain model file that says what it is."""
    record = row.to_json() | {"blueprint": asdict(drawn.blueprint), "curve": list(outcome.curve)}
    save_model(drawn.model, path, input_shape=task.input_shape, record=record, force=True)


def _read(path: Path, identity: dict[str, Any]) -> list[StudentRow]:
    """The students that are there."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, rows = content["identity"], content["rows"]
        made = [
            StudentRow(
                **{
                    **row,
                    "candidate": candidate_from(row["candidate"]),
                    "measures": None if row["measures"] is None else Measures(**row["measures"]),
                }
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchStateError(f"{path}: not the students of a search ({error}); remove it to begin anew") from error
    differ = [key for key in identity if found.get(key) != identity[key]]
    if differ:
        raise SearchStateError(
            f"{path}: holds students made with another {' and '.join(differ)}; give the same options, or remove it"
        )
    return made


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(values)))


def best_student(rows: list[StudentRow]) -> StudentRow | None:
    """The most accurate one, the first of several; None where all failed."""
    return max((row for row in rows if row.accuracy is not None), key=lambda row: row.accuracy or 0.0, default=None)
