"""What a command trains on, and what it validates on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import data_from, note_classes

if TYPE_CHECKING:
    from morph.images import LabelledImages

_HOLD_OUT = 0.1


def training_data(
    args: argparse.Namespace, *, input_shape: tuple[int, ...] | None, num_classes: int | None
) -> tuple[LabelledImages, LabelledImages | None]:
    """Read the images to train on and those to validate on; None where there shall be no validation.

    Raises:
        DataError: As `morph.cli.data_arguments.data_from`, or if the images are all of one class.
    """
    expected: dict[str, Any] = {"input_shape": input_shape, "num_classes": num_classes, "note": False}
    images = data_from(args, **expected)
    _check_classes(images)
    if args.speaks:
        note_classes(images, num_classes)
    held = args.hold_out
    if args.validation is not None:
        other = argparse.Namespace(**{**vars(args), "data": args.validation, "split": "test", "limit": None})
        test = data_from(other, **expected)
    elif held is None and args.data is not None and Path(args.data).is_dir():
        test = data_from(argparse.Namespace(**{**vars(args), "split": "test", "limit": None}), **expected)
        test = test if test.source != images.source else None
    else:
        test = None
    if test is None and held != 0:
        images, test = set_aside(images, _HOLD_OUT if held is None else held, args.seed)
    return images, test


def set_aside(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Split the images by seed.

    Raises:
        DataError: If a part would be empty.
    """
    import torch

    from morph.data import choose
    from morph.errors import DataError

    number = round(share * len(images))
    if not 0 < number < len(images):
        raise DataError(
            f"{images.source}: {len(images)} images are too few to set {share:g} of them aside for validation; give "
            "--validation, another --hold-out, or --hold-out 0"
        )
    aside = torch.zeros(len(images), dtype=torch.bool)
    aside[choose(len(images), number, seed)] = True

    def part(pick: Any, what: str) -> LabelledImages:
        return dataclasses.replace(
            images, images=images.images[pick], labels=images.labels[pick], source=f"{images.source} ({what})"
        )

    return part(~aside, f"all but {number}"), part(aside, f"{number} set aside")


def _check_classes(images: LabelledImages) -> None:
    """Refuse images that are all of one class."""
    from morph.errors import DataError

    found = images.labels.unique().tolist()
    if len(found) < 2:
        name = repr(images.classes[found[0]]) if images.classes else str(found[0])
        raise DataError(
            f"{images.source}: all {len(images)} images are of one class, {name}; training tells classes apart: give "
            "images of two or more"
        )
