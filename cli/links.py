"""The links of a chain from teacher to student: each is one network that teaches the next."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.caching import cached
from morph.cli.stages import HINTS, stage_files, stages_of, teach
from morph.cli.teaching_arguments import teaching_options
from morph.cli.training_arguments import options_from
from morph.cli.training_results import (
    choose_weights,
    details_of,
    make_result,
    measure,
    scores_of,
    write,
)
from morph.cli.training_runs import augmented

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from morph.cli.stages import Taught
    from morph.files import OpenedModel
    from morph.images import LabelledImages
    from morph.plan import Plan


@dataclass
class Chain:
    """Everything that the links share.

    Attributes:
        args: What was asked for.
        models: The teacher, the assistants, the student.
        images: What is learned from.
        validation: What is validated on; None for nothing.
        fabric: Where it runs.
        paths: Model, record and picture of the student.
        files: State and history of the student.
        plans: How those got their heads that were given one, by their number in ``models``.
        state: The state of the run that is on the way.
    """

    args: argparse.Namespace
    models: list[OpenedModel]
    images: LabelledImages
    validation: LabelledImages | None
    fabric: Fabric
    paths: tuple[Path, ...]
    files: tuple[Path, Path]
    plans: dict[int, Plan] = field(default_factory=dict)
    state: Path = field(init=False)

    def __post_init__(self) -> None:
        from morph.training.evaluation import check_fit

        self.state = self.files[0]
        self.data = augmented(self.args, self.images)
        self.names = [opened.source for opened in self.models]  # as they were given
        for opened in self.models[1:]:
            self.sample = check_fit(opened.model, self.images, self.args.batch_size, opened.source)

    def link_paths(self, number: int) -> tuple[tuple[Path, ...], tuple[Path, Path]]:
        """Where the results of link ``number`` go, from 1 on, and its state and history."""
        if number == len(self.models) - 1:
            return self.paths, self.files
        model = self.paths[0].with_name(f"{self.paths[0].stem}-assistant{number}{self.paths[0].suffix}")
        state = self.files[0].with_name(f"{self.files[0].stem}-assistant{number}{self.files[0].suffix}")
        beside = tuple(model.with_suffix(path.suffix) for path in self.paths[1:])
        return (model, *beside), (state, model.with_suffix(".csv"))

    def identities(self) -> list[str]:
        """What each link must share with a result that is there: all that it began with; hexadecimal digits."""
        from morph.batches import describe_data
        from morph.search_checkpoint import fingerprint

        begun = fingerprint(self.models[0].model.state_dict())
        facts = {**vars(options_from(self.args)), **teaching_options(self.args), "keep": self.args.keep}
        facts |= {"augment": self.args.augment, "data": repr(describe_data(self.images))}
        found = []
        for opened in self.models[1:]:
            text = json.dumps([begun, fingerprint(opened.model.state_dict()), facts], default=str)
            begun = hashlib.sha256(text.encode()).hexdigest()[:16]
            found.append(begun)
        return found

    def show(self) -> int:
        """Say what would be taught, pair by pair."""
        from morph.cli import console

        found = []
        for teacher, student in zip(self.models, self.models[1:], strict=False):
            described = [
                {"stage": stage.name, "epochs": stage.epochs, **stage.describe()}
                for stage in stages_of(self.args, teacher.model, student.model, self.sample)
            ]
            found.append({"teacher": teacher.source, "student": student.source, "stages": described})
        if self.args.json:
            console.document({"schema": 1, "command": self.args.command, "links": found, "written": []})
            return 0
        for link in found:
            _show_link(link)
        console.line("dry run: nothing trained, nothing written")
        return 0


def _show_link(link: dict[str, Any]) -> None:
    """Print the stages of a link."""
    from morph.cli import console

    console.line(f"{link['teacher']} teaches {link['student']}")
    for stage in link["stages"]:
        console.line()
        console.line(f"stage          {stage['stage']}, {stage['epochs']:,} rounds: {', '.join(stage['terms'])}")
        sizes = f"{stage['teacher_params']:,} teacher, {stage['student_params']:,} student"
        console.line(f"parameters     {sizes}, {stage['adapter_params']:,} adapters (not in the student's file)")
        for name, rows in stage["pairs"].items():
            header = ("teacher", "shape", "student", "shape", "between them")
            cells = [(r["teacher"], r["teacher_shape"], r["student"], r["student_shape"], r["bridge"]) for r in rows]
            console.table(f"pairs of {name}", header, cells, left=5)
    console.line()


def run_chain(chain: Chain) -> int:
    """Teach, link by link; errors as `morph.fit`."""
    links = len(chain.models) - 1
    identities = chain.identities()
    there = [_finished(chain, i + 1, identities[i]) for i in range(links - 1)]
    for number, finished in enumerate([*there, None], 1):
        if finished is None:
            _check_link(chain, number)
    chain.fabric.barrier()
    for number in range(1, links):
        finished = there[number - 1]
        if finished is None:
            _run_link(chain, number, identities[number - 1])
        else:
            chain.models[number] = finished
    return _run_link(chain, links, identities[-1])


def _check_link(chain: Chain, number: int) -> None:
    """Refuse early what could not be written later.

    Raises:
        OutputError: If there is something in the way.
    """
    from morph.atomic import check_writable

    paths, files = chain.link_paths(number)
    for path in paths:
        check_writable(path, force=chain.args.force)
    for state, log in [files, *([stage_files(files, HINTS)] if chain.args.hint_epochs else [])]:
        check_writable(log, force=chain.args.force or state.exists())


def _finished(chain: Chain, number: int, identity: str) -> OpenedModel | None:
    """The assistant that an earlier start of the same command has finished."""
    from morph.cli import console
    from morph.errors import MorphError
    from morph.files import open_model
    from morph.files.opening import read_record

    path = chain.link_paths(number)[0][0]
    try:
        record = read_record(path) if path.is_file() else None
    except MorphError:
        return None
    if record is None or record.get("link") != identity:
        return None
    if chain.args.speaks:
        console.note(f"{path} is there already")
    return open_model(path)


def _run_link(chain: Chain, number: int, identity: str) -> int:
    """Teach one network; an assistant is written without a word on stdout."""
    args, teacher, student = chain.args, chain.models[number - 1], chain.models[number]
    paths, files = chain.link_paths(number)
    last = number == len(chain.models) - 1
    before = measure(student.model, chain.validation, chain.fabric)
    if args.cache:
        chain.data = cached(args, chain.images, teacher.model, chain.fabric)
    taught = teach(chain, teacher.model, student.model, files, "student" if last else f"assistant{number}")
    choose_weights(args, student.model, taught.fitted)
    after = measure(student.model, chain.validation, chain.fabric)
    teachers = _teacher_scores(chain, teacher)
    if not args.speaks:
        chain.fabric.barrier()
        return 0
    details = {
        "teacher": chain.names[number - 1],
        "student": chain.names[number],
        "assistants": chain.names[1:number],
        "scores_teacher": teachers,
        "scores_before": scores_of(before),
        "scores_after": scores_of(after),
        **details_of(args, taught.fitted, files[1], paths[0]),
        "stages": taught.stages,
        "link": identity,
        "architecture": student.arch,
    }
    result = make_result(
        args,
        student.model,
        chain.sample,
        chain.images,
        chain.validation,
        details,
        teaching_options(args),
        chain.plans.get(number),
    )
    title = f"{chain.names[number - 1]} teaches {chain.names[number]}: {args.epochs} rounds on {chain.images.source}"
    code = write(args, result, taught.fitted, paths, title, tell=last)
    _clear(taught, last, paths)
    chain.fabric.barrier()
    return int(code)


def _clear(taught: Taught, last: bool, paths: tuple[Path, ...]) -> None:
    """Remove the states of what is finished."""
    from morph.cli import console

    for state in taught.states:
        state.unlink(missing_ok=True)
    if not last:
        console.note(f"written: {', '.join(str(path) for path in paths)}")


def _teacher_scores(chain: Chain, teacher: OpenedModel) -> dict[str, Any] | None:
    """Scores of the teacher, where its classes are those of the data."""
    from morph.errors import DataError

    try:
        scores = measure(teacher.model, chain.validation, chain.fabric)
    except DataError:
        if chain.args.kd or chain.args.logits:
            raise
        return None
    found: dict[str, Any] | None = scores_of(scores)
    return found
