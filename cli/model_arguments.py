"""The arguments by which every command takes a model and the shape of its input."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from morph.files import OpenedModel

MODEL_HELP = "file or name of the model: a model file, zoo:NAME, torchvision:NAME, timm:NAME or package.module:callable"


def add_model(
    parser: argparse.ArgumentParser, name: str = "model", help: str = MODEL_HELP, nargs: str | None = None
) -> None:
    """Add the positional argument of a model (with ``nargs``, of several), how it may be opened, and ``--input``."""
    parser.add_argument(name, metavar=name.upper(), help=help, nargs=nargs)
    add_opening(parser)


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Add how models may be opened, and ``--input``."""
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="name of the model that a state_dict belongs to, e.g. zoo:darts-10 or torchvision:resnet18",
    )
    parser.add_argument(
        "--trust",
        metavar="NAME",
        action="append",
        default=[],
        help="open a pickled model although it names this class, function or package (may be given more than once)",
    )
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="open the file even if that runs code from it; only for files that you trust",
    )
    parser.add_argument(
        "--input",
        metavar="CxHxW",
        type=parse_shape,
        help="shape of one sample without the batch axis, e.g. 3x32x32; needed where the model does not say it",
    )


def parse_shape(text: str) -> tuple[int, ...]:
    """Read ``3x32x32``.

    Raises:
        argparse.ArgumentTypeError: If ``text`` is not positive whole numbers joined by x.
    """
    sizes = text.lower().split("x")
    if not all(size.isascii() and size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give the sizes of one sample, e.g. 3x32x32")
    return tuple(int(size) for size in sizes)


def open_from(args: argparse.Namespace, name: str = "model") -> OpenedModel:
    """Open the model of `add_model`; errors as `morph.files.open_model`."""
    from morph.files import open_model

    return open_model(getattr(args, name), arch=args.arch, trust=tuple(args.trust), allow_code=args.allow_code)


def input_shape_from(args: argparse.Namespace, opened: OpenedModel) -> tuple[int, ...]:
    """Return the shape of one sample: that of ``--input``, else what the model says of itself.

    Raises:
        ModelFileError: If neither says it.
    """
    from morph.errors import ModelFileError

    shape: tuple[int, ...] | None = args.input or opened.input_shape
    if shape is None:
        raise ModelFileError(
            f"{opened.source}: does not say what its input is; give the shape of one sample, e.g. --input 3x224x224"
        )
    return shape


def random_inputs_from(args: argparse.Namespace, opened: OpenedModel, samples: int = 2) -> Tensor:
    """Random numbers of the model's input shape and type, by ``--seed``; errors as `input_shape_from`."""
    import torch

    shape = input_shape_from(args, opened)
    kinds = [p.dtype for p in opened.model.parameters() if p.is_floating_point()]
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randn(samples, *shape, generator=generator).to(kinds[0] if kinds else torch.float32)


def expected_from(args: argparse.Namespace, opened: OpenedModel) -> tuple[tuple[int, ...] | None, int | None]:
    """Shape of one sample and number of classes, as far as the model tells.

    Raises:
        TraceError: If the model does not accept samples of that shape.
    """
    import torch

    from morph.tracing import evaluation, try_inputs

    shape = args.input or opened.input_shape
    if shape is None:
        return None, None
    sample = torch.zeros(2, *shape)
    try_inputs(opened.model, (sample,))
    with evaluation(opened.model), torch.no_grad():
        logits = opened.model(sample)
    return shape, logits.shape[1] if isinstance(logits, torch.Tensor) and logits.dim() == 2 else None
