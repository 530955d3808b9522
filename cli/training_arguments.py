"""The arguments by which a command trains: numbers of the run, what it is validated on, logs and checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from morph.cli.data_arguments import add_data, positive
from morph.cli.numbers import share, shares
from morph.cli.output_arguments import add_output
from morph.cli.running import add_device

if TYPE_CHECKING:
    from morph.training.options import FitOptions


def add_training(parser: argparse.ArgumentParser, what: str) -> None:
    """Add everything that `morph.cli.training_runs` reads; ``what`` is trained."""
    _add_run(parser)
    _add_optimizer(parser)
    add_data(parser, training=True)
    _add_validation(parser)
    _add_files(parser)
    add_device(parser, processes=True)
    add_output(
        parser,
        f"{what}; beside it go the record (.json), the history (.csv) and the curves (.svg)",
    )
    parser.add_argument("--dry-run", action="store_true", help="look at everything, train and write nothing")


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add how long, and with which learning rate."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--epochs", type=positive, default=200, metavar="N", help="rounds through the data (default %(default)s)"
    )
    group.add_argument("--lr", type=float, metavar="X", help="learning rate (default 0.1 for sgd, else 0.001)")
    group.add_argument(
        "--schedule",
        choices=["multistep", "step", "cosine", "constant"],
        default="multistep",
        help="of the learning rate: times --gamma at --milestones, or every --step-epochs rounds; half a cosine to "
        "zero; or none (default %(default)s)",
    )
    group.add_argument(
        "--milestones",
        type=shares,
        default=(0.3, 0.6, 0.8),
        metavar="A,B,...",
        help="shares of the run (default 0.3,0.6,0.8: epochs 60, 120 and 160 of 200; 0.5,0.85 are 150 and 255 of 300)",
    )
    group.add_argument("--gamma", type=float, metavar="X", help="default 0.2 for multistep, 0.5 for step")
    group.add_argument("--step-epochs", type=positive, default=20, metavar="N", help="for step (default %(default)s)")
    group.add_argument(
        "--warmup-epochs",
        type=float,
        default=0.0,
        metavar="N",
        help="rounds in which the learning rate grows to its value (default %(default)s)",
    )
    group.add_argument("--augment", action="store_true", help="shift and mirror the images at random")
    group.add_argument(
        "--seed", type=int, default=0, help="fresh weights, order of the images, augmentation (default 0)"
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of a step."""
    group = parser.add_argument_group("steps")
    group.add_argument("--optimizer", choices=["sgd", "adam", "adamw"], default="sgd", help="default %(default)s")
    group.add_argument("--momentum", type=float, default=0.9, metavar="X", help="of sgd (default %(default)s)")
    group.add_argument("--nesterov", action="store_true", help="Nesterov's momentum")
    group.add_argument("--weight-decay", type=float, default=5e-4, metavar="X", help="default %(default)s")
    group.add_argument("--clip", type=float, metavar="X", help="largest norm of all gradients together (default: any)")
    group.add_argument(
        "--accumulate",
        type=positive,
        default=1,
        metavar="N",
        help="compute each batch in N parts, one after another, to save memory (default %(default)s)",
    )
    group.add_argument(
        "--channels-last", action="store_true", help="keep channels innermost: faster convolutions on most processors"
    )


def _add_validation(parser: argparse.ArgumentParser) -> None:
    """Add what the model is validated on."""
    group = parser.add_argument_group("validation")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--validation",
        metavar="DATA",
        help="labelled images, as for --data (default: the test part of the folder; where there is none, --hold-out)",
    )
    where.add_argument(
        "--hold-out",
        type=share,
        metavar="SHARE",
        help="set this share of the training images aside, by seed; 0 for no validation (default 0.1 where no other "
        "images are there)",
    )
    group.add_argument(
        "--validate-every", type=positive, default=1, metavar="N", help="rounds between two (default %(default)s)"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    """Add what is written on the way, and which weights at the end."""
    group = parser.add_argument_group("files")
    group.add_argument(
        "--keep",
        choices=["last", "best", "both"],
        default="last",
        help="weights to write: of the last round, or of the round with the best top-1 in validation; both: the best "
        "go to NAME-best.pt as well (default %(default)s)",
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="state on the way (default: beside the result, .state)"
    )
    group.add_argument(
        "--checkpoint-every",
        type=positive,
        metavar="N",
        help="steps between two writings, beside those after each round",
    )
    group.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write events for TensorBoard as well")


def options_from(args: argparse.Namespace) -> FitOptions:
    """The options among the arguments; errors as `morph.training.options.FitOptions`."""
    from dataclasses import fields

    from morph.training.options import FitOptions

    return FitOptions(**{field.name: getattr(args, field.name) for field in fields(FitOptions)})
