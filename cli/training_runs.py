"""How a command trains: progress, Ctrl-C, and the files at the end."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.outputs import finish
from morph.cli.running import asked_to_stop
from morph.cli.training_arguments import options_from

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger
    from torch import Tensor, nn

    from morph.images import LabelledImages
    from morph.surgery import Result
    from morph.training.evaluation import Scores
    from morph.training.progress import FitProgress, Fitted


def loggers_from(args: argparse.Namespace) -> list[Logger]:
    """What ``--tensorboard`` asks for.

    Raises:
        TrainingError: If TensorBoard is not installed.
    """
    from morph.training.logs import tensorboard_logger

    return [tensorboard_logger(args.tensorboard)] if args.tensorboard else []


def check_files(args: argparse.Namespace, model: Path) -> tuple[Path, Path]:
    """Where the state and the history go.

    Raises:
        OutputError: Now, if one of them, or the best weights, could not be written later.
    """
    from morph.atomic import check_writable
    from morph.errors import OutputError

    state, log = args.checkpoint or model.with_suffix(".state"), model.with_suffix(".csv")
    if len({model, state, log}) < 3:
        raise OutputError(f"{model}: give names that differ for the model, its state ({state}) and its log ({log})")
    if not args.dry_run:
        check_writable(state, force=True)
        check_writable(log, force=args.force or state.exists())
        if args.keep == "both":
            check_writable(best_path(model), force=args.force)
    return state, log


def best_path(model: Path) -> Path:
    """Where ``--keep both`` puts the best weights."""
    return model.with_name(f"{model.stem}-best{model.suffix}")


def train(
    args: argparse.Namespace,
    objective: nn.Module,
    data: Any,
    validation: Any,
    fabric: Fabric,
    files: tuple[Path, Path],
    *,
    title: str = "training",
    identity: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train, showing how far it is; errors as `morph.fit`.

    Args:
        args: Numbers of the run.
        objective: What is trained.
        data: Batches.
        validation: Likewise; None for none.
        fabric: Where it runs.
        files: State and history.
        title: In front of the progress bar.
        identity: What else a state must share with this run.
        options: Numbers that are others than those of ``args``.
    """
    from morph.cli import console
    from morph.training.fitting import fit

    state, log = files
    if state.exists() and args.speaks:
        console.note(f"going on from {state}")
    with console.progress(title, quiet=args.json or not args.speaks) as advance, asked_to_stop() as stop:
        validated: list[float] = []

        def tell(now: FitProgress) -> None:
            if now.row and "val_top1" in now.row:
                validated.append(now.row["val_top1"])
            good = f", validation {validated[-1]:.2%}" if validated else ""
            advance(now.step, now.steps, f"round {now.epoch}/{now.epochs}, loss {now.loss:.4f}, lr {now.lr:.2g}{good}")

        return fit(
            objective,
            data,
            validation=validation,
            fabric=fabric,
            checkpoint=state,
            checkpoint_every=args.checkpoint_every,
            log=log,
            identity=identity,
            on_progress=tell,
            should_stop=stop,
            **{**vars(options_from(args)), **(options or {})},
        )


def augmented(args: argparse.Namespace, images: LabelledImages) -> Any:
    """The images, changed at random if ``--augment`` says so."""
    from morph.augmentation import Augmented

    return Augmented(images) if args.augment else images


def scores_of(scores: Scores | None) -> dict[str, Any] | None:
    """What a record says of an evaluation."""
    return None if scores is None else {key: getattr(scores, key) for key in ("top1", "top5", "loss", "images")}


def make_result(
    args: argparse.Namespace,
    model: nn.Module,
    sample: Tensor,
    images: LabelledImages,
    validation: LabelledImages | None,
    details: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Result:
    """The trained model with its record; its structure is what it was."""
    from morph.batches import describe_data
    from morph.counts import count
    from morph.plan import Plan, Record
    from morph.surgery import Result, environment, sizes

    facts = {"data": describe_data(augmented(args, images))}
    if validation is not None:
        facts["validation"] = describe_data(validation)
    size = sizes(count(model, sample[:1]))
    numbers = {**vars(options_from(args)), **options}
    surroundings = {**environment(model, sample), **facts}
    return Result(
        model, Record(args.command, numbers, Plan(()), size, size, (), {"trained": True, **details}, surroundings)
    )


def write(args: argparse.Namespace, result: Result, fitted: Fitted, paths: tuple[Path, ...], title: str) -> int:
    """Write model, record and curves, with the weights that ``--keep`` asks for, and tell of them."""
    from morph.files import save_model
    from morph.training_picture import training_picture

    if args.keep == "best" and fitted.best is not None:
        result.model.load_state_dict(fitted.best)

    def draw(record: dict[str, Any], path: Path) -> None:
        teacher = record.get("scores_teacher")
        training_picture(record["history"], path, title=title, teacher=teacher["top1"] if teacher else None, force=True)

    if args.keep == "both" and fitted.best is not None:
        best = copy.deepcopy(result.model)
        best.load_state_dict(fitted.best)
        shape = tuple(result.record.environment["input_shape"])
        save_model(best, best_path(paths[0]), input_shape=shape, record=result.record.to_json(), force=True)
    return int(finish(args, result, paths, show, draw))


def show(record: dict[str, Any]) -> None:
    """Print how good the model was and is."""
    from morph.cli import console

    console.line(f"parameters     {record['params_after']:,}")
    console.line(f"multiply-adds  {record['macs_after']:,}  (one sample; 1 multiply-add = 1)")
    last = record["history"][-1]
    console.line(f"rounds         {last['epoch']:,}, {last['step']:,} steps, {record['seconds']:,.0f} s")
    console.line(f"training       loss {last['loss']:.4f}, top-1 {last['top1']:.2%}, last round")
    before, after, teacher = (record.get(f"scores_{name}") for name in ("before", "after", "teacher"))
    if before is None or after is None:
        console.line("validation     none")
        return
    if teacher:
        console.line(f"teacher        top-1 {teacher['top1']:.2%}, top-5 {teacher['top5']:.2%}")
    tops = (f"{name} {before[key]:.2%} -> {after[key]:.2%}" for name, key in (("top-1", "top1"), ("top-5", "top5")))
    console.line(f"validation     {', '.join(tops)}, {after['images']:,} images")
    which = f"of round {record['best_epoch']}, the best" if record["keep"] == "best" else "of the last round"
    console.line(f"weights        {which}; the best in validation was round {record['best_epoch']}")
