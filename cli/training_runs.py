"""How a command trains: progress, Ctrl-C, and the files at the end."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.running import asked_to_stop
from morph.cli.training_arguments import options_from

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger
    from torch import nn

    from morph.images import LabelledImages
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
    prefixed: bool = False,
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
        prefixed: Whether the loggers get the title in front of each name.
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
            log_prefix=f"{title}/" if prefixed else "",
            identity=identity,
            on_progress=tell,
            should_stop=stop,
            **{**vars(options_from(args)), **(options or {})},
        )


def augmented(args: argparse.Namespace, images: LabelledImages) -> Any:
    """The images, changed at random if ``--augment`` says so."""
    from morph.augmentation import Augmented

    return Augmented(images) if args.augment else images
