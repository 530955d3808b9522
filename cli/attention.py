"""`morph attention`: draw where networks look, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from morph.cli.data_arguments import add_data, data_from
from morph.cli.model_arguments import add_model, expected_from, open_from
from morph.cli.output_arguments import add_output

if TYPE_CHECKING:
    from torch import nn

    from morph.images import LabelledImages

EPILOG = """\
examples:
  morph attention teacher.pt student.pt taught.pt --data cifar/ --images 3 --out maps.svg
  morph attention zoo:darts-10-trained --tap cells.2 --tap cells.5

A map is the mean over channels of the squared values of a layer (attention transfer, Zagoruyko and Komodakis 2017).
Without --tap each model is tapped at the last layer before each down-sampling, three at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, nargs="+")
    add_data(parser)
    parser.add_argument("--images", type=int, default=2, metavar="N", help="how many images (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="which images are drawn (default 0)")
    parser.add_argument("--tap", action="append", metavar="TAP", help="a layer, as in morph.tap (repeatable)")
    add_output(parser, "the picture: .svg, .png or .pdf (default: attention.svg)")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    from morph.atomic import check_writable
    from morph.cli import console
    from morph.errors import DataError, PictureError

    path: Path = args.out or Path("attention.svg")
    check_writable(path, force=args.force)
    if args.images < 1:
        raise PictureError(f"--images {args.images}; give 1 or more")
    networks: dict[str, nn.Module] = {}
    wanted = None
    for name in args.model:
        opened = open_from(argparse.Namespace(**{**vars(args), "model": name}))
        expected = expected_from(args, opened)
        wanted = wanted or expected
        if expected[0] != wanted[0]:
            raise DataError(f"{name} takes inputs of {expected[0]}, {args.model[0]} of {wanted[0]}; draw them apart")
        networks[name] = opened.model
    assert wanted is not None
    images = data_from(args, input_shape=wanted[0], num_classes=wanted[1])
    _draw(args, networks, images, path)
    if args.json:
        console.document({"schema": 1, "out": str(path), "images": min(args.images, len(images))})
    else:
        console.line(f"written: {path}")
    return 0


def _draw(args: argparse.Namespace, networks: dict[str, nn.Module], images: LabelledImages, path: Path) -> None:
    """Draw some of the images, chosen by seed."""
    import torch

    from morph.teaching_picture import attention_picture

    pick = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.images]
    labels = images.labels[pick].tolist()
    captions = [images.classes[label] if images.classes else str(label) for label in labels]
    attention_picture(
        {name: (model, args.tap) if args.tap else model for name, model in networks.items()},
        images.images[pick],
        path,
        title="Where the networks look",
        captions=captions,
        mean=images.mean,
        std=images.std,
        force=args.force,
    )
