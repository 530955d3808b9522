"""The arguments of `morph search`."""

from __future__ import annotations

import argparse
from pathlib import Path

from morph.cli.data_arguments import add_data, positive
from morph.cli.model_arguments import MODEL_HELP, add_opening
from morph.cli.numbers import share, size
from morph.cli.running import add_device

NUMBERS = ("batch_size", "lr", "momentum", "weight_decay", "schedule", "step_epochs", "gamma", "channels_last")
"""What a training run of the search takes from the arguments."""
SEARCHED = (
    "top_nodes", "top_neighbours", "top_rewiring", "middle_nodes", "middle_probability", "bottom_nodes",
    "bottom_neighbours", "bottom_rewiring", "temperature", "weight",
)  # fmt: skip
"""What is searched; here by name, as `--help` reads nothing else."""


def add_search(parser: argparse.ArgumentParser) -> None:
    """Add everything."""
    parser.add_argument("--teacher", metavar="MODEL", help=f"{MODEL_HELP}; needed unless --no-kd is given")
    add_opening(parser)
    parser.add_argument("--no-kd", action="store_true", help="learn from the labels alone (NAGO): eight numbers")
    _add_plan(parser)
    _add_numbers(parser)
    add_data(parser, training=True)
    _add_validation(parser)
    _add_students(parser)
    _add_workers(parser)
    add_device(parser)
    _add_output(parser)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    """Add how much is tried."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--budget-epochs",
        type=budgets,
        default=(30, 60, 120),
        metavar="A,B,...",
        help="rounds through the data after which configurations are compared, each the same factor above the one "
        "before (default 30,60,120)",
    )
    group.add_argument(
        "--rounds",
        type=positive,
        default=30,
        metavar="N",
        help="rounds of brackets; three budgets of factor two make 10 configurations a round (default %(default)s)",
    )
    group.add_argument(
        "--max-params",
        type=size,
        default=4_000_000,
        metavar="SIZE",
        help="each network is as wide as this many parameters allow, e.g. 4M (default 4M)",
    )
    group.add_argument(
        "--range",
        type=part_of_range,
        action="append",
        default=[],
        metavar="NAME=LOW,HIGH",
        help="search a number in a part of its range alone, or NAME=VALUE to fix it, e.g. --range top_nodes=3,5; "
        "once for each of " + ", ".join(SEARCHED),
    )
    group.add_argument(
        "--seed", type=int, default=0, help="proposals, networks, order of the images, augmentation (default 0)"
    )


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of the trainings."""
    group = parser.add_argument_group("trainings (SGD; defaults are those of NAGO's code)")
    group.add_argument("--lr", type=float, default=0.1, metavar="X", help="learning rate (default %(default)s)")
    group.add_argument("--momentum", type=float, default=0.9, metavar="X", help="default %(default)s")
    group.add_argument("--weight-decay", type=float, default=1e-4, metavar="X", help="default %(default)s")
    group.add_argument(
        "--schedule",
        choices=["step", "multistep", "cosine", "constant"],
        default="step",
        help="of the learning rate in the search, over the largest budget (default %(default)s); that of the students "
        "is half a cosine",
    )
    group.add_argument("--step-epochs", type=positive, default=20, metavar="N", help="for step (default %(default)s)")
    group.add_argument("--gamma", type=float, default=0.5, metavar="X", help="for step and multistep (default 0.5)")
    group.add_argument(
        "--channels-last", action="store_true", help="keep channels innermost: faster for wide networks on processors"
    )
    group.add_argument("--augment", action="store_true", help="shift and mirror the images at random")
    group.add_argument(
        "--cache",
        action="store_true",
        help="ask the teacher once for each image and keep its logits in the folder; augmented images come with what "
        "it said of the image as it is",
    )


def _add_validation(parser: argparse.ArgumentParser) -> None:
    """Add what accuracies are measured on."""
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--hold-out",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="share of the training images that the search is judged on, by seed (default %(default)s)",
    )
    group.add_argument(
        "--test",
        metavar="DATA",
        help="what the students at the end are judged on, as for --data (default: the test part of the folder; where "
        "there is none, a tenth of the images, kept out of the search)",
    )


def _add_students(parser: argparse.ArgumentParser) -> None:
    """Add the second phase."""
    group = parser.add_argument_group("students of the best family")
    group.add_argument(
        "--students",
        type=whole,
        default=8,
        metavar="K",
        help="networks of the best family that are trained for long; 0 for none (default %(default)s)",
    )
    group.add_argument(
        "--student-epochs", type=positive, default=600, metavar="N", help="rounds for each (default %(default)s)"
    )


def _add_workers(parser: argparse.ArgumentParser) -> None:
    """Add how many search, and where they meet."""
    group = parser.add_argument_group("many workers (asynchronous: no waiting for brackets; not the same each time)")
    group.add_argument("--workers", type=positive, metavar="N", help="processes on this machine that search together")
    group.add_argument(
        "--storage",
        metavar="PLACE",
        help="where workers meet: a file, postgresql://HOST/NAME or another URL of a database, or grpc://HOST:PORT of "
        "Optuna's server (default: a journal in the folder)",
    )
    group.add_argument(
        "--study", default="morph-search", metavar="NAME", help="of the study there (default %(default)s)"
    )
    group.add_argument(
        "--join",
        action="store_true",
        help="be one more worker of a search that another process began with the same options, and no more",
    )
    for name, default, what in (
        ("beat", 30.0, "seconds between two signs of life of a worker"),
        ("patience", 180.0, "seconds without one after which its trial is taken up"),
    ):
        group.add_argument(
            f"--{name}", type=seconds, default=default, metavar="S", help=f"{what} (default {default:g})"
        )


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Add where the results go."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the search: its study, states of trainings, best.json, the students, search.json and pictures",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="DIR",
        help="folder of another search, such as one with --no-kd, to draw beside this one",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check what is given, and print what a round costs; trains and writes nothing",
    )


def budgets(text: str) -> tuple[int, ...]:
    """Read ``30,60,120``.

    Raises:
        argparse.ArgumentTypeError: If these are not whole numbers of at least one.
    """
    return tuple(positive(part.strip()) for part in text.split(","))


def part_of_range(text: str) -> tuple[str, tuple[float, float]]:
    """Read ``top_nodes=3,5`` or ``temperature=4``.

    Raises:
        argparse.ArgumentTypeError: If it is not a name and one or two numbers.
    """
    name, _, ends = text.partition("=")
    try:
        values = [float(end) for end in ends.split(",")]
    except ValueError:
        values = []
    if not name or len(values) not in (1, 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range; write it like top_nodes=3,5 or top_nodes=4")
    return name, (values[0], values[-1])


def whole(text: str) -> int:
    """Read a whole number of at least zero; errors as `morph.cli.data_arguments.positive`."""
    return 0 if text == "0" else positive(text)


def seconds(text: str) -> float:
    """Read a number above zero.

    Raises:
        argparse.ArgumentTypeError: If it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
