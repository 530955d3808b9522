"""The models that are known by name: a table of fixed names, and families whose names carry numbers."""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from importlib.resources.abc import Traversable

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from morph.errors import ModelFileError
from morph.zoo.darts import DARTS_V1, DARTS_V2, DartsNet, Genotype
from morph.zoo.densenet import DenseNet
from morph.zoo.nin import Nin
from morph.zoo.resnet import ResNet
from morph.zoo.shallow import ShallowNet
from morph.zoo.small_images import NAMES, torchvision_32
from morph.zoo.vgg import Mlp, Vgg
from morph.zoo.wide_resnet import WideResNet

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Entry:
    """A model that has a name.

    Attributes:
        constructor: Makes the untrained model from ``num_classes=``.
        input_shape: Shape of one sample, without the batch axis.
        note: One line on what it is.
        weights: File inside `morph.sample` with the trained weights, for ten classes; None for an untrained model.
    """

    constructor: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    note: str
    weights: str | None = None


@dataclass(frozen=True)
class Family:
    """Models whose names carry numbers.

    Attributes:
        form: How the names look, for people.
        pattern: How the names look, for `re.fullmatch`; each group is a number.
        constructor: Makes the model from these numbers and ``num_classes=``; its ValueError names the broken rule.
        input_shape: Shape of one sample, without the batch axis.
        note: One line on what they are and which numbers are valid.
    """

    form: str
    pattern: str
    constructor: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    note: str


def _darts(genotype: Genotype, layers: int, channels: int = 16, *, num_classes: int) -> nn.Module:
    """Build a DARTS network after checking its numbers."""
    if layers < 3:
        raise ValueError(f"DARTS needs 3 cells or more (those at one and two thirds reduce), got {layers}")
    if channels < 2:
        raise ValueError(f"DARTS needs 2 channels or more, got {channels}")
    return DartsNet(genotype, layers, channels, num_classes)


_SECOND, _FIRST = partial(DartsNet, DARTS_V2), partial(DartsNet, DARTS_V1)

MODELS: dict[str, Entry] = {
    "darts-10": Entry(partial(_SECOND, 10), SHAPE, "DARTS (second order), 10 cells, 16 channels, auxiliary head"),
    "darts-25": Entry(partial(_SECOND, 25), SHAPE, "DARTS (second order), 25 cells, 16 channels, auxiliary head"),
    "darts-v1-10": Entry(partial(_FIRST, 10), SHAPE, "DARTS (first order), 10 cells, 16 channels, auxiliary head"),
    "darts-v1-25": Entry(partial(_FIRST, 25), SHAPE, "DARTS (first order), 25 cells, 16 channels, auxiliary head"),
    "darts-10-trained": Entry(
        partial(_SECOND, 10), SHAPE, "darts-10 with weights trained on CIFAR-10", weights="darts-10-trained.safetensors"
    ),
    "densenet-bc-40-36": Entry(partial(DenseNet, 40, 36), SHAPE, "DenseNet-BC, depth 40, growth 36"),
    "densenet-bc-100-12": Entry(partial(DenseNet, 100, 12), SHAPE, "DenseNet-BC, depth 100, growth 12"),
    "wrn-16-2": Entry(partial(WideResNet, 16, 2), SHAPE, "wide residual network, depth 16, width 2"),
    "wrn-28-2": Entry(partial(WideResNet, 28, 2), SHAPE, "wide residual network, depth 28, width 2"),
    "wrn-40-2": Entry(partial(WideResNet, 40, 2), SHAPE, "wide residual network, depth 40, width 2"),
    **{f"resnet-{n}": Entry(partial(ResNet, n), SHAPE, f"residual network, depth {n}") for n in (20, 32, 44, 56, 110)},
    "vgg-teacher": Entry(Vgg, SHAPE, "11 convolutions, 4 max-poolings, 3 dense layers"),
    "vgg-teacher-bn": Entry(partial(Vgg, norm=True), SHAPE, "vgg-teacher with batch norm"),
    "vgg-student": Entry(partial(Vgg, ((72,), (192,)), ()), SHAPE, "2 convolutions with max-pooling, 1 dense layer"),
    "vgg-student-small": Entry(partial(Vgg, ((50,),), ()), SHAPE, "1 convolution with max-pooling, 1 dense layer"),
    "mlp-3-512": Entry(partial(Mlp, 3, 512), SHAPE, "dense layers alone: 3 hidden ones of 512 units"),
    "nin": Entry(Nin, SHAPE, "network in network"),
    "shallow": Entry(ShallowNet, SHAPE, "1 convolution, linear bottleneck, 1 wide layer"),
    "shallow-pool": Entry(partial(ShallowNet, pool=2), SHAPE, "shallow with 2x2 max-pooling"),
    "shallow-small": Entry(partial(ShallowNet, 32, 64, 1024, pool=2), SHAPE, "shallow-pool with widths 32, 64, 1024"),
    **{
        f"torchvision-{name.replace('_', '-')}-32": Entry(
            partial(torchvision_32, name), SHAPE, f"torchvision's {name}, adapted to 32x32 images"
        )
        for name in NAMES
    },
}

_N = r"(\d{1,4})"
_DARTS_RULE = "3 cells or more; 16 channels unless given"

FAMILIES: tuple[Family, ...] = (
    Family("darts-CELLS[xCHANNELS]", rf"darts-{_N}(?:x{_N})?", partial(_darts, DARTS_V2), SHAPE, _DARTS_RULE),
    Family("darts-v1-CELLS[xCHANNELS]", rf"darts-v1-{_N}(?:x{_N})?", partial(_darts, DARTS_V1), SHAPE, _DARTS_RULE),
    Family("densenet-bc-DEPTH-GROWTH", rf"densenet-bc-{_N}-{_N}", DenseNet, SHAPE, "depth 10 or more"),
    Family("resnet-DEPTH", rf"resnet-{_N}", ResNet, SHAPE, "depth 6n + 2, 8 or more"),
    Family("mlp-LAYERS-WIDTH", rf"mlp-{_N}-{_N}", Mlp, SHAPE, "hidden layers, and units of each"),
    Family(
        "shallow-pool-CHANNELS-BOTTLENECK-HIDDEN",
        rf"shallow-pool-{_N}-{_N}-(\d{{1,5}})",
        partial(ShallowNet, pool=2),
        SHAPE,
        "widths of the convolution, the linear bottleneck and the wide layer",
    ),
    Family("wrn-DEPTH-WIDTH", rf"wrn-{_N}-{_N}", WideResNet, SHAPE, "depth 6n + 4, 10 or more"),
)


def names() -> list[str]:
    """Return the fixed names, in the order of the table."""
    return list(MODELS)


def find(name: str) -> Entry:
    """Look a name up, in the table first and then in the families.

    Raises:
        ModelFileError: If nothing has this name.
    """
    if name in MODELS:
        return MODELS[name]
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name, re.ASCII):
            numbers = [int(group) for group in match.groups() if group]
            return Entry(partial(family.constructor, *numbers), family.input_shape, family.note)
    near = difflib.get_close_matches(name, MODELS, n=3)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise ModelFileError(f"zoo:{name}: no model has this name; {guess}`morph zoo` lists them")


def input_shape(name: str) -> tuple[int, int, int]:
    """Return the shape ``(C, H, W)`` of one sample of a model, without the batch axis; errors as `find`."""
    return find(name).input_shape


def architecture(name: str, num_classes: int = 10) -> nn.Module:
    """Build a model with fresh weights, also where `build` would load trained ones.

    Raises:
        ModelFileError: If nothing has this name, its numbers break its family's rule, or ``num_classes`` is below 1.
    """
    entry = find(name)
    if num_classes < 1:
        raise ModelFileError(f"zoo:{name}: needs 1 class or more, got num_classes={num_classes}")
    try:
        return entry.constructor(num_classes=num_classes)
    except ValueError as error:
        raise ModelFileError(f"zoo:{name}: {error}") from error


def build(name: str, num_classes: int = 10) -> nn.Module:
    """Build a model by its name, in training mode, with its trained weights if it has any.

    Raises:
        ModelFileError: As `architecture`, or if trained weights are missing, damaged, or for another number of classes.
    """
    weights = find(name).weights
    if weights is None:
        return architecture(name, num_classes)
    if num_classes != 10:
        untrained = name.removesuffix("-trained")
        raise ModelFileError(f"zoo:{name}: trained for 10 classes, got num_classes={num_classes}; take zoo:{untrained}")
    with torch.device("meta"):  # draws no random numbers
        model = architecture(name)
    _load_weights(model.to_empty(device="cpu"), name, _sample(weights))
    return model


def _sample(name: str) -> Traversable:
    """Locate a file that ships inside the package."""
    return files("morph.sample") / name


def _load_weights(model: nn.Module, name: str, file: Traversable) -> None:
    """Fill every tensor of ``model`` from a safetensors file."""
    try:
        model.load_state_dict(load(file.read_bytes()))
    except FileNotFoundError as error:
        raise ModelFileError(f"zoo:{name}: the weights {file.name} are not installed; reinstall torch-morph") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ModelFileError(f"zoo:{name}: damaged weights in {file.name}; reinstall torch-morph ({reason})") from error
