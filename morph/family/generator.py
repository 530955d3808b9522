"""Build a network of a family, as wide as a limit on its parameters allows."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from morph.counts import count_params
from morph.errors import DataError, TargetError
from morph.family.settings import FamilySettings
from morph.family.wiring import draw_blueprint
from morph.zoo.random_graph import Blueprint, RandomGraphNet


@dataclass(frozen=True)
class Task:
    """What networks are for.

    Attributes:
        input_shape: Shape of an image, ``(C, H, W)``.
        num_classes: Number of classes.
        max_params: The most parameters that a network may have.

    Raises:
        DataError: If there is no image or no class.
    """

    input_shape: tuple[int, int, int]
    num_classes: int
    max_params: int

    def __post_init__(self) -> None:
        if len(self.input_shape) != 3 or min(self.input_shape) < 1 or min(self.input_shape[1:]) < 4:
            raise DataError(f"images must be of shape (C, H, W) with 4 pixels or more, got {self.input_shape}")
        if self.num_classes < 1:
            raise DataError(f"there must be a class, got {self.num_classes}")

    def network(self, blueprint: Blueprint, width: int) -> RandomGraphNet:
        """The network of this width, with fresh weights."""
        channels, height, across = self.input_shape
        side = min(height, across)
        return RandomGraphNet(blueprint, width, side=side, num_classes=self.num_classes, in_channels=channels)

    def params(self, blueprint: Blueprint, width: int) -> int:
        """The number of parameters of the network of this width, counted on one that holds no values."""
        with torch.device("meta"):
            return count_params(self.network(blueprint, width))


@dataclass(frozen=True, eq=False)
class Drawn:
    """A network and what it was made from.

    Attributes:
        model: The network, with fresh weights.
        blueprint: Its wiring.
        width: Channels of its first stage.
        params: Number of its parameters.
    """

    model: RandomGraphNet
    blueprint: Blueprint
    width: int
    params: int


def draw_network(settings: FamilySettings, task: Task, seed: int = 0) -> Drawn:
    """Draw a network of a family, with fresh weights, in training mode.

    Wiring and weights depend on ``settings``, ``task`` and ``seed`` alone; torch's global random state stays as it was.
    The public code takes the width from the convolutions alone and misses its limit; here the whole network is counted.

    Args:
        settings: The family.
        task: What the network is for; its width is the largest within ``max_params``.
        seed: Which network of the family.

    Raises:
        TargetError: If even one channel is too wide; says how many parameters that network has.
        FamilyError: As `morph.family.wiring.draw_blueprint`.

    Example:
        >>> from morph.family.settings import FamilySettings
        >>> drawn = draw_network(FamilySettings(3, 2, 0.5, 3, 0.5, 3, 2, 0.5), Task((3, 32, 32), 10, 100_000))
        >>> drawn.params <= 100_000
        True
    """
    blueprint = draw_blueprint(settings, seed)
    width, params = fit_width(blueprint, task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.network(blueprint, width)
    return Drawn(model, blueprint, width, params)


@functools.lru_cache(maxsize=256)
def fit_width(blueprint: Blueprint, task: Task) -> tuple[int, int]:
    """The largest width within the limit of ``task``, and the number of parameters that it gives; remembered.

    Raises:
        TargetError: As `draw_network`.
    """
    width, params = 1, task.params(blueprint, 1)
    if params > task.max_params:
        raise TargetError(
            f"a network of {blueprint.units} units with one channel has {params:,} parameters, the limit is "
            f"{task.max_params:,}; raise the limit"
        )
    while True:
        # parameters grow at most as the square of the width, so what this gives is never too wide
        wider = max(width + 1, math.floor(width * math.sqrt(task.max_params / params)))
        found = task.params(blueprint, wider)
        if found > task.max_params:
            return width, params
        width, params = wider, found
