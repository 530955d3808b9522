"""What `morph search` writes and prints at the end."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.search_table import duration, numbers

if TYPE_CHECKING:
    from morph.cli.search_setup import Job
    from morph.family.search import FamilySearch
    from morph.family.students import StudentRow

_COSTS = {
    "memory": "memory of a sample in training, bytes",
    "params": "parameters",
    "macs": "multiply-adds of a sample",
    "latency": "latency of a sample, seconds",
}
_SHOWN = 5  # trials


def read_other(folder: Path | None) -> dict[str, Any] | None:
    """The record of the search to compare with.

    Raises:
        SearchStateError: If there is none, or it cannot be read.
    """
    from morph.errors import SearchStateError

    if folder is None:
        return None
    path = folder / "search.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        record["correlations"], record["best"]["candidate"], record["settings"]["distil"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchStateError(f"{path}: not the record of a search that has ended ({error})") from error
    return record


def write(
    args: argparse.Namespace,
    job: Job,
    found: FamilySearch,
    students: list[StudentRow],
    other: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write best.json, the best student, the pictures and search.json; gives the record."""
    import shutil

    from morph.atomic import atomic_path, write_text
    from morph.family.students import best_student
    from morph.family.wiring import draw_blueprint

    best = found.best.candidate
    blueprint = draw_blueprint(best.family, best.seed)
    family = {"schema": 1, **found.best.to_json(), "blueprint": asdict(blueprint)}
    write_text(args.out / "best.json", json.dumps(family, indent=1), force=True)
    written = ["best.json"]
    top = best_student(students)
    if top is not None:
        with atomic_path(args.out / "student.pt", force=True) as temporary:
            shutil.copyfile(args.out / f"{top.name}.pt", temporary)
        written += [*(f"{row.name}.pt" for row in students if row.accuracy is not None), "student.pt"]
    record = _record(args, job, found, students)
    written += _draw(args, job, found, record, other)
    record["written"] = [str(args.out / name) for name in (*written, "search.json")]
    write_text(args.out / "search.json", json.dumps(record, indent=1), force=True)
    return record


def _record(args: argparse.Namespace, job: Job, found: FamilySearch, students: list[StudentRow]) -> dict[str, Any]:
    """Everything that was found; plain values."""
    from morph.family.statistics import not_dominated, spread
    from morph.surgery import environment

    plan = job.settings.budgets.plan()
    rows = [row.to_json() for row in students]
    teacher = _teacher(job) if students else None
    measured = [row for row in rows if row["accuracy"] is not None]
    points = [*measured, *([teacher] if teacher else [])]
    for cost in _COSTS:
        best = not_dominated([(point["accuracy"], float(point["measures"][cost])) for point in points])
        for point, front in zip(points, best, strict=True):
            point.setdefault("pareto", []).extend([cost] if front else [])
    found_spread = spread([row["accuracy"] for row in measured])
    surroundings = {} if job.teacher is None else dict(environment(job.teacher, job.part.images[:1].float()))
    return {
        "schema": 1,
        "command": args.command,
        **asdict(plan),
        "rounds": args.rounds,
        "settings": job.settings.to_json(),
        **found.to_json(),
        "teacher": teacher,
        "students": rows,
        "student_epochs": args.student_epochs if students else None,
        "spread": None if found_spread is None else asdict(found_spread),
        "environment": surroundings,
    }


def _teacher(job: Job) -> dict[str, Any] | None:
    """What the teacher costs, and how good it is on what the students are judged on."""
    import torch

    from morph.family.measures import measure
    from morph.training.evaluation import evaluate

    if job.teacher is None:
        return None
    scores = evaluate(job.teacher, job.test, fabric=job.fabric)
    costs = measure(job.teacher, job.settings.task.input_shape, torch.device("cpu"))
    return {"name": job.teacher_name, "accuracy": scores.top1, "measures": asdict(costs)}


def _draw(
    args: argparse.Namespace, job: Job, found: FamilySearch, record: dict[str, Any], other: dict[str, Any] | None
) -> list[str]:
    """Draw all that there is enough of; gives the names of the files."""
    from morph.family.pictures import (
        correlations_picture,
        curves_picture,
        front_picture,
        importances_picture,
    )
    from morph.family.wiring_picture import wiring_picture

    out, name = args.out, _words(job.settings.distil)
    written = ["accuracy.svg", "families.svg"]
    curves_picture(found.rows, out / "accuracy.svg", title=f"networks of the search, {name}", force=True)
    searches = {name: found.correlations}
    if other is not None:
        searches[_other_name(other, name)] = _correlations(other)
    if any(searches.values()):
        correlations_picture(searches, out / "correlation.svg", title="rank correlation of accuracies", force=True)
        written.append("correlation.svg")
    if found.importances:
        importances_picture(found.importances, out / "importance.svg", title="what the accuracy depends on", force=True)
        written.append("importance.svg")
    wiring_picture(
        _networks(found, other, name), out / "families.svg", title="networks of the best families", force=True
    )
    points = _points(record)
    if any(points.values()):
        front_picture(points, out / "front.svg", title="students of the best family", force=True)
        written.append("front.svg")
    return written


def _words(distil: bool) -> str:
    return "with a teacher" if distil else "labels alone"


def _other_name(other: dict[str, Any], name: str) -> str:
    found = _words(other["settings"]["distil"])
    return found if found != name else f"{found} (the other search)"


def _correlations(record: dict[str, Any]) -> list[Any]:
    from morph.family.statistics import Correlation

    return [Correlation(**{**c, "rho": math.nan if c["rho"] is None else c["rho"]}) for c in record["correlations"]]


def _networks(found: FamilySearch, other: dict[str, Any] | None, name: str) -> dict[str, Any]:
    """The network of the best trial of each search."""
    from morph.family.candidate import candidate_from
    from morph.family.wiring import draw_blueprint

    best = {name: found.best.candidate}
    if other is not None:
        best[_other_name(other, name)] = candidate_from(other["best"]["candidate"])
    return {f"{key}: {' '.join(numbers(c)[:3])}": draw_blueprint(c.family, c.seed) for key, c in best.items()}


def _points(record: dict[str, Any]) -> dict[str, list[Any]]:
    """Accuracy over each cost, of the students and the teacher."""
    from morph.family.pictures import Point

    rows = [row for row in record["students"] if row["accuracy"] is not None]
    points: dict[str, list[Any]] = {}
    for cost, label in _COSTS.items():
        points[label] = [
            Point(row["name"].removeprefix("student-"), row["accuracy"], row["measures"][cost]) for row in rows
        ]
        if record["teacher"]:
            teacher = record["teacher"]
            points[label].append(Point("teacher", teacher["accuracy"], teacher["measures"][cost], teacher=True))
    return points


def show(record: dict[str, Any]) -> None:
    """Print what was found."""
    from morph.cli import console
    from morph.family.candidate import candidate_from

    rows = sorted(
        (row for row in record["trials"] if row["accuracies"] and row["state"] != "failed"),
        key=lambda row: (-max(map(int, row["accuracies"])), -list(row["accuracies"].values())[-1]),
    )
    console.table(
        "best configurations",
        ("trial", "top", "middle", "bottom", "T", "weight", "parameters", "epochs", "accuracy"),
        [
            (
                str(row["number"]),
                *numbers(candidate_from(row["candidate"])),
                f"{row['params']:,}",
                str(max(map(int, row["accuracies"]))),
                f"{list(row['accuracies'].values())[-1]:.2%}",
            )
            for row in rows[:_SHOWN]
        ],
    )
    console.line()
    failed = [row for row in record["trials"] if row["state"] == "failed"]
    trained = sum(len(row["curve"]) for row in record["trials"])
    spent = sum(row["seconds"] for row in record["trials"])
    console.line(f"configurations  {len(record['trials']):,}, {trained:,} epochs, {duration(spent)} of training")
    if record["overhead"] is not None:
        console.line(f"overhead        {record['overhead']:.2%} of that for proposing and drawing")
    if failed:
        console.line(f"failed          {len(failed)}, the first with {failed[0]['reason']}")
    for c in record["correlations"]:
        rho = "-" if c["rho"] is None else f"{c['rho']:.2f}"
        console.line(f"ranks           {c['first']} and {c['second']} epochs: correlation {rho}, {c['trials']} trials")
    if record["students"]:
        _show_students(record)
    console.line("written: " + ", ".join(record["written"]))


def _show_students(record: dict[str, Any]) -> None:
    """Print the students, and the teacher for comparison."""
    from morph.cli import console

    cells = []
    for row in [*record["students"], *([record["teacher"]] if record["teacher"] else [])]:
        if row["accuracy"] is None:
            cells.append((row["name"], f"failed: {row['reason']}"[:40], "", "", "", "", ""))
            continue
        costs = row["measures"]
        cells.append((
            row["name"], f"{row['accuracy']:.2%}", f"{costs['params']:,}", f"{costs['macs']:,}",
            f"{costs['memory'] / 1e6:.2f} MB", f"{costs['latency'] * 1e3:.1f} ms", " ".join(row["pareto"]) or "-",
        ))  # fmt: skip
    console.line()
    header = ("student", "accuracy", "parameters", "multiply-adds", "memory", "latency", "on the front of")
    console.table(f"students of the best family, {record['student_epochs']:,} epochs", header, cells)
    if record["spread"]:
        s = record["spread"]
        console.line(f"accuracy        mean {s['mean']:.2%}, sd {s['sd']:.2%}, best {s['best']:.2%}")
