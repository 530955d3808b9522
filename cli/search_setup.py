"""What `morph search` reads before it begins: the teacher, the images, and the settings that follow from them."""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from morph.cli.model_arguments import expected_from, open_from
from morph.cli.running import fabric_from
from morph.cli.search_arguments import NUMBERS
from morph.cli.training_data import set_aside, training_data

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import nn

    from morph.family.budgets import Budgets
    from morph.family.fitting import FitTrain
    from morph.family.study import SearchSettings
    from morph.images import LabelledImages
    from morph.labels import WithTargets
    from morph.training.progress import FitProgress

SAMPLE = ((3, 32, 32), 10)
"""Shape and number of classes of the images inside, which are meant where neither data nor a teacher is named."""
Tell = Callable[["FitProgress"], None]


@dataclass(frozen=True, eq=False)
class Job:
    """A search that can begin.

    Attributes:
        settings: Of the study.
        teacher: None where the labels alone teach.
        teacher_name: As the user gave it.
        images: For the students at the end.
        test: What those are judged on.
        part: The images of the search.
        validation: What that is judged on.
        fabric: Where trainings run.
        args: The arguments, which say how images are changed and what is kept.
        numbers: Of the trainings.
        student_epochs: Rounds of the students.
    """

    settings: SearchSettings
    teacher: nn.Module | None
    teacher_name: str | None
    images: LabelledImages
    test: LabelledImages
    part: LabelledImages
    validation: LabelledImages
    fabric: Fabric
    args: argparse.Namespace
    numbers: dict[str, Any]
    student_epochs: int

    def trainer(self, tell: Tell, stop: Callable[[], bool]) -> FitTrain:
        """Trains in the search."""
        return self._trainer(self.part, self.validation, self.settings.budgets.last, {}, tell, stop)

    def student_trainer(self, tell: Tell, stop: Callable[[], bool]) -> FitTrain:
        """Trains the students at the end, with a learning rate of half a cosine."""
        return self._trainer(self.images, self.test, self.student_epochs, {"schedule": "cosine"}, tell, stop)

    def _trainer(
        self,
        images: LabelledImages,
        validation: LabelledImages,
        epochs: int,
        numbers: dict[str, Any],
        tell: Tell,
        stop: Callable[[], bool],
    ) -> FitTrain:
        from morph.cli.training_runs import augmented
        from morph.family.fitting import FitTrain

        data = self._cached(images) if self.args.cache else augmented(self.args, images)
        options = {**self.numbers, **numbers}
        return FitTrain(
            self.teacher, data, validation, epochs, fabric=self.fabric, on_progress=tell, should_stop=stop, **options
        )

    def _cached(self, images: LabelledImages) -> WithTargets:
        """The images with the teacher's logits, which the first process computes and all others read."""
        from morph.cli.caching import cached

        assert self.teacher is not None
        self.args.out.mkdir(parents=True, exist_ok=True)
        path = self.args.out / ("search.logits" if images is self.part else "students.logits")
        with (self.args.out / "logits.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            args = argparse.Namespace(**{**vars(self.args), "cache": path, "multi_channel": False})
            found: WithTargets = cached(args, images, self.teacher, self.fabric)
        return found


def set_up(args: argparse.Namespace, budgets: Budgets) -> Job:
    """Read and check everything that is given; nothing is written.

    Raises:
        OutputError: If no folder is named, but for a dry run.
        TeachingError: If there is no teacher, likewise, or one too many.
        TargetError: As `morph.family.search.require_reachable`.
        SearchStateError: As `morph.family.study.require_fitting`.
        DataError, ModelFileError, TraceError, TrainingError, StorageError: As elsewhere.
    """
    from morph.family.storage import require_packages
    from morph.training.options import FitOptions

    require_packages()
    _require_consistent(args)
    numbers = {name: getattr(args, name) for name in NUMBERS}
    FitOptions(epochs=budgets.last, seed=0, **numbers)  # refuses now what no training would take
    fabric = fabric_from(args)
    opened = open_from(args, "teacher") if args.teacher else None
    shape, classes = expected_from(args, opened) if opened else (args.input, None)
    if opened is None and args.data is None:
        shape, classes = SAMPLE
    reading = argparse.Namespace(**{**vars(args), "validation": args.test, "hold_out": None})
    images, test = training_data(reading, input_shape=shape, num_classes=classes)
    assert test is not None
    part, validation = set_aside(images, args.hold_out, args.seed + 1)
    teacher = opened.model if opened else None
    settings = _settings(args, budgets, teacher, classes or _classes(images), part, validation)
    _require_possible(args, settings)
    return Job(
        settings, teacher, args.teacher, images, test, part, validation, fabric, args, numbers,
        args.student_epochs,
    )  # fmt: skip


def _require_possible(args: argparse.Namespace, settings: SearchSettings) -> None:
    """See that a network can meet the limit, and that a study can be begun or gone on with.

    Without a teacher and without ``--no-kd``, as a dry run may be, a study that is there is not looked at: it was made
    with one or the other.

    Raises:
        MorphError: As `morph.family.search.require_reachable` and `morph.family.study.require_fitting`.
    """
    from morph.family.search import JOURNAL, require_reachable
    from morph.family.study import require_fitting

    require_reachable(settings)
    journal = args.out / JOURNAL if args.out else None
    where = args.storage or (str(journal) if journal and journal.exists() else None)
    if where and (args.teacher or args.no_kd):
        require_fitting(where, settings, name=args.study)


def _require_consistent(args: argparse.Namespace) -> None:
    """Refuse what is missing or contradicts itself; a dry run may leave out what a plan does not need."""
    from morph.errors import OutputError, TeachingError
    from morph.family.takeover import Patience

    Patience(args.beat, args.patience)  # refuses what no worker could keep to
    if args.out is None and not args.dry_run:
        raise OutputError("give the folder of the search with --out DIR")
    above = args.out and next(place for place in (args.out, *args.out.absolute().parents) if place.exists())
    if above and not above.is_dir():
        raise OutputError(f"{above}: is a file; give the name of a folder")
    if args.no_kd and args.teacher:
        raise TeachingError("--no-kd is given beside --teacher; leave one of them out")
    if not args.no_kd and not args.teacher and not args.dry_run:
        raise TeachingError("give a teacher with --teacher MODEL, or --no-kd to learn from the labels alone")
    if args.cache and args.no_kd:
        raise TeachingError(
            "--cache keeps what the teacher says, and with --no-kd there is none; leave one of them out"
        )


def _settings(
    args: argparse.Namespace,
    budgets: Budgets,
    teacher: nn.Module | None,
    classes: int,
    part: LabelledImages,
    validation: LabelledImages,
) -> SearchSettings:
    """What all trials share."""
    from morph.family.generator import Task
    from morph.family.study import SearchSettings
    from morph.search_checkpoint import fingerprint

    training = {
        "teacher": None if teacher is None else fingerprint(teacher.state_dict()),
        "data": part.describe(),
        "validation": validation.describe(),
        "augment": args.augment,
        "cache": args.cache,
        "precision": args.precision,
        **{name: getattr(args, name) for name in NUMBERS},
    }
    shape = tuple(int(n) for n in part.images.shape[1:])
    return SearchSettings(
        Task((shape[0], shape[1], shape[2]), classes, args.max_params),
        budgets,
        distil=not args.no_kd,
        seed=args.seed,
        asynchronous=bool(args.workers or args.join or args.storage),
        training=json.loads(json.dumps(training)),
        ranges=_ranges(args),
    )


def _ranges(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """What ``--range`` says.

    Raises:
        FamilyError: If a name is given twice.
    """
    from morph.errors import FamilyError

    names = [name for name, _ in args.range]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FamilyError(f"--range is given more than once for {twice[0]}; give both ends at once, as LOW,HIGH")
    return dict(args.range)


def _classes(images: LabelledImages) -> int:
    """How many classes images have, where no teacher says it."""
    return len(images.classes) if images.classes else int(images.labels.max()) + 1
