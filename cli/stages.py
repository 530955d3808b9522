"""The stages in which one network teaches another: hints alone first, if asked for, then everything else."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.teaching_arguments import hint_terms, other_terms, teaching_options
from morph.cli.training_runs import augmented, train

if TYPE_CHECKING:
    from torch import Tensor, nn

    from morph.cli.links import Chain
    from morph.teaching.distillation import Distillation
    from morph.teaching.hints import Hints
    from morph.teaching.pairing import Pairs
    from morph.teaching.terms import Term
    from morph.training.progress import Fitted


HINTS = "hints"


@dataclass(frozen=True)
class Stage:
    """One run of a link.

    Attributes:
        name: Of the stage.
        epochs: Rounds.
        objective: What is minimised.
    """

    name: str
    epochs: int
    objective: Distillation | Hints

    def describe(self) -> dict[str, Any]:
        """Terms, pairs with the bridges between them, and sizes; plain values."""
        objective = self.objective
        terms: Mapping[str, Term] = objective.terms
        return {
            "terms": {name: term.weight for name, term in terms.items()},
            "pairs": {name: _told(found, terms[name]) for name, found in objective.pairs.items()},
            "teacher_params": _size(objective.teacher),
            "student_params": _size(objective.student),
            "adapter_params": _size(objective.adapters),
        }


def _told(pairs: Pairs, term: Any) -> list[dict[str, str]]:
    """Pairs as plain values."""
    return [
        {
            "teacher": pair.teacher,
            "teacher_shape": _dims(pair.teacher_shape),
            "student": pair.student,
            "student_shape": _dims(pair.student_shape),
            "bridge": str(pair.bridge(project=term.projects)),
        }
        for pair in pairs
    ]


@dataclass(frozen=True)
class Taught:
    """What came of the stages.

    Attributes:
        fitted: Of the last one.
        stages: What a record says of each.
        states: Files that hold their states.
    """

    fitted: Fitted
    stages: list[dict[str, Any]]
    states: list[Path]


def stages_of(args: argparse.Namespace, teacher: nn.Module, student: nn.Module, sample: Tensor) -> list[Stage]:
    """The stages, with objectives of the student as it is now.

    Raises:
        TeachingError: If teacher and student do not fit together, or a number is out of its range.
        TapError, TraceError: As elsewhere.
    """
    from morph.search_checkpoint import seed_everything
    from morph.teaching.distillation import Distillation
    from morph.teaching.hints import Hints

    stages = []
    terms = other_terms(args, teacher, student)
    if args.hint_epochs:
        seed_everything(args.seed)  # of the adapters
        hints = Hints(student, teacher, hint_terms(args, teacher, student, sample), example_inputs=sample)
        stages.append(Stage(HINTS, args.hint_epochs, hints))
    else:
        terms += hint_terms(args, teacher, student, sample)
    seed_everything(args.seed)
    last = Distillation(student, teacher, terms, example_inputs=sample)
    return [*stages, Stage("rest" if stages else "all", args.epochs, last)]


def teach(chain: Chain, teacher: nn.Module, student: nn.Module, files: tuple[Path, Path], title: str) -> Taught:
    """Train the student, stage by stage; errors as `morph.fit`."""
    args = chain.args
    stages = stages_of(args, teacher, student, chain.sample)
    rows, states, fitted = [], [], None
    for stage in stages:
        last = stage is stages[-1]
        state, log = files if last else stage_files(files, stage.name)
        chain.state = state
        states.append(state)
        fitted = train(
            args,
            stage.objective,
            chain.data if last else augmented(args, chain.images),
            chain.validation if last else None,
            chain.fabric,
            (state, log),
            title=title if last else f"{title}, {stage.name}",
            identity=teaching_options(args) | {"stage": stage.name, "terms": repr(stage.objective)},
            options={"epochs": stage.epochs},
            prefixed=len(stages) > 1 or len(chain.models) > 2,
        )
        rows.append({"stage": stage.name, "epochs": stage.epochs, **stage.describe(), "log": str(log)})
        if not last:
            rows[-1]["history"] = fitted.history
    assert fitted is not None
    return Taught(fitted, rows, states)


def stage_files(files: tuple[Path, Path], name: str) -> tuple[Path, Path]:
    """State and history of a stage before the last."""
    state, log = (path.with_name(f"{path.stem}-{name}{path.suffix}") for path in files)
    return state, log


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape[1:]))
