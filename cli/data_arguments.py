"""The arguments by which a command takes labelled images."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from morph.cli.model_arguments import expected_from

if TYPE_CHECKING:
    from morph.batches import Batch
    from morph.data import LabelledImages
    from morph.files import OpenedModel

DATA_HELP = (
    "labelled images: a folder with one folder of images per class (or with such folders in test/ or train/), a CIFAR "
    "folder as torchvision unpacks it, an .npz with images and labels, or package.module:callable that gives batches "
    "(default: the CIFAR-10 sample inside, for models with 3x32x32 inputs and 10 classes)"
)


def add_data(parser: argparse.ArgumentParser, *, training: bool = False) -> None:
    """Add where the images come from, how many are read, and how they are normalised.

    Args:
        parser: Takes them.
        training: Whether something is trained on them: by default all images of the training part are then read.
    """
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="DATA", help=DATA_HELP)
    group.add_argument(
        "--split",
        choices=["test", "train"],
        default="train" if training else "test",
        help="which part of a folder to read (default %(default)s)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        default=None if training else 1024,
        metavar="N",
        help=f"read at most N images, drawn by seed (default {'all' if training else 1024})",
    )
    group.add_argument(
        "--batch-size",
        type=positive,
        default=128 if training else 64,
        metavar="N",
        help="images in a batch (default %(default)s)",
    )
    for name, what in (("mean", "subtract from"), ("std", "divide, after that,")):
        group.add_argument(
            f"--{name}",
            type=numbers,
            metavar="R,G,B",
            help=f"what to {what} each channel of pixels in 0..1 (default: CIFAR-10's for 3x32x32, else ImageNet's; "
            "floating-point images are taken as they are)",
        )


def add_probe_batches(parser: argparse.ArgumentParser, what: str) -> None:
    """Add how many batches scores are computed on; ``what`` says which scores."""
    parser.add_argument(
        "--probe-batches", type=positive, metavar="N", help=f"batches to score with ({what}; default 1)"
    )


def positive(text: str) -> int:
    """Read a whole number of at least one.

    Raises:
        argparse.ArgumentTypeError: If it is not.
    """
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def numbers(text: str) -> tuple[float, ...]:
    """Read ``0.49,0.48,0.45``.

    Raises:
        argparse.ArgumentTypeError: If these are not finite numbers between commas.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not one number for each channel; write it like 0.49,0.48,0.45")
    return values


def data_from(
    args: argparse.Namespace,
    *,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    fewer: bool = True,
    note: bool = True,
) -> LabelledImages:
    """Read the images of `add_data`; a command that has ``--seed`` lets it decide which.

    Args:
        args: The arguments of `add_data`.
        input_shape: Of one image, ``[C, H, W]``; None if any will do.
        num_classes: Of the model; None if not known.
        fewer: Whether the data may have fewer classes than the model.
        note: Whether to say so where it has.

    Raises:
        DataError: As `morph.data.open_data`, if only one of ``--mean`` and ``--std`` was given, or the data has fewer
            classes where it may not.
    """
    from morph.data import open_data
    from morph.errors import DataError

    if (args.mean is None) != (args.std is None):
        given, missing = ("--mean", "--std") if args.std is None else ("--std", "--mean")
        raise DataError(f"{given} is given without {missing}; give both, or neither for the usual statistics")
    data = open_data(
        args.data,
        input_shape=input_shape,
        num_classes=num_classes,
        limit=args.limit,
        split=args.split,
        mean_std=None if args.mean is None else (args.mean, args.std),
        seed=getattr(args, "seed", 0),
    )
    if not fewer and num_classes is not None and data.classes is not None and len(data.classes) < num_classes:
        raise DataError(
            f"{data.source}: has {len(data.classes)} classes, the model has {num_classes}; give data of the model's "
            "classes"
        )
    if note:
        note_classes(data, num_classes)
    return data


def note_classes(data: LabelledImages, num_classes: int | None) -> None:
    """Say so where the data has fewer classes than the model."""
    from morph.cli import console

    if num_classes is not None and data.classes is not None and len(data.classes) < num_classes:
        console.note(
            f"note: {data.source} has {len(data.classes)} classes, the model {num_classes}; class folders are numbered "
            "from 0 in the order of their names"
        )


def data_for_scores(
    args: argparse.Namespace, opened: OpenedModel, needed: bool
) -> tuple[list[Batch] | None, dict[str, object]]:
    """The batches of `add_data` and `add_probe_batches` if the score looks at data, and what a record says of them.

    Raises:
        DataError: As `data_from`, or if there are options for data that nothing would look at.
    """
    import torch

    from morph.batches import take_batches
    from morph.errors import DataError

    if not needed:
        for name, flag in (("data", "--data"), ("probe_batches", "--probe-batches")):
            if getattr(args, name) is not None:
                raise DataError(f"{flag} means nothing to --score {args.score}, which looks at no data; leave it out")
        return None, {}
    shape, classes = expected_from(args, opened)
    images = data_from(args, input_shape=shape, num_classes=classes)
    batches = take_batches(images, args.probe_batches or 1, args.batch_size, args.seed, torch.device("cpu"))
    used = {"batch_size": args.batch_size, "probe_batches": len(batches)}
    return batches, {"data": {**images.describe(), **used}}
