"""Networks wired by hierarchical random graphs: a graph of cells, each a graph of modules, each a graph of units.

Source: Ru, Esperanca, Carlucci, "Neural Architecture Generator Optimization", NeurIPS 2020, section 3.1; merges as in
Xie et al., "Exploring Randomly Wired Neural Networks for Image Recognition", ICCV 2019, section 3.2. How the graphs are
drawn stands in `morph.family.wiring`; here they are plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

STAGES = 3
_LARGEST_MAP = 40  # pixels on a side that the first stage works on at most
_WIDEST_HEAD = 1280

Sources = tuple[tuple[int, ...], ...]
"""For each node of a graph the values that it reads: 0 is the input of the graph, j the output of node j - 1."""


@dataclass(frozen=True)
class Blueprint:
    """The wiring of a whole network; plain numbers.

    Attributes:
        top: The graph of cells.
        cells: For each cell its graph of modules, and for each of these its graph of units.
    """

    top: Sources
    cells: tuple[tuple[Sources, tuple[Sources, ...]], ...]

    @property
    def units(self) -> int:
        """Number of units (ReLU, convolution, batch norm) in all cells."""
        return sum(len(bottom) for _, bottoms in self.cells for bottom in bottoms)


def outputs_of(sources: Sources) -> list[int]:
    """The values that no node reads: together they are the output of the graph."""
    read = {value for node in sources for value in node}
    return [value for value in range(1, len(sources) + 1) if value not in read]


def stage_of(node: int, nodes: int) -> int:
    """The stage (0, 1, 2) of a node of the top graph: each takes a third of the nodes, in their order."""
    return STAGES * node // nodes


class Unit(nn.Sequential):
    """ReLU, 3x3 convolution, batch norm: ``[N, C, H, W] -> [N, C, H, W]``; no bias, which the norm would take away."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))


class Merge(nn.Module):
    """Sum of tensors of one shape, each times the sigmoid of a learned number that is one at birth.

    Args:
        inputs: How many tensors.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every number to one."""
        nn.init.ones_(self.weight)

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        """See the class; one tensor for each weight."""
        shares = torch.sigmoid(self.weight)
        total = values[0] * shares[0]
        for number, value in enumerate(values[1:], start=1):
            total = total + value * shares[number]
        return total


class WiredGraph(nn.Module):
    """Modules in a graph, all on tensors of one shape: ``[N, C, H, W] -> [N, C, H, W]``.

    Nodes that read several values merge them; several outputs are averaged.

    Args:
        sources: The wiring.
        nodes: What each node does.
    """

    def __init__(self, sources: Sources, nodes: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sources = sources
        self.outputs = tuple(outputs_of(sources))
        self.nodes = nn.ModuleList(nodes)
        self.merges = merges(sources)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        values = [x]
        for number, node in enumerate(self.nodes):
            read = [values[source] for source in self.sources[number]]
            values.append(node(self.merges[str(number)](read) if len(read) > 1 else read[0]))
        return average([values[output] for output in self.outputs])


def merges(sources: Sources) -> nn.ModuleDict:
    """A merge for each node that reads more than one value, by its number."""
    return nn.ModuleDict({str(i): Merge(len(read)) for i, read in enumerate(sources) if len(read) > 1})


def average(values: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total / len(values) if len(values) > 1 else total


def halvings(side: int) -> int:
    """How often the stem halves images so that the first stage sees 40 pixels or fewer on a side."""
    number = 0
    while -(-side // 2**number) > _LARGEST_MAP:
        number += 1
    return number


class RandomGraphNet(nn.Module):
    """A network of cells in three stages of 1, 2 and 4 times ``width`` channels, at full, half and quarter resolution.

    A value that comes from an earlier stage is pooled and projected by a 1x1 convolution on its way. Small images meet
    two 3x3 convolutions first; larger ones (above 40 pixels) are halved by a convolution and then by separable ones.
    The head projects to 16 times the width, at most 1280 channels.

    Args:
        blueprint: The wiring.
        width: Channels of the first stage.
        side: Pixels on a side of the images, which decides the stem; other sizes run too.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.

    Raises:
        ValueError: If a number is below 1, or the images are below 4 pixels.
    """

    def __init__(
        self, blueprint: Blueprint, width: int, *, side: int = 32, num_classes: int = 10, in_channels: int = 3
    ) -> None:
        super().__init__()
        if min(width, num_classes, in_channels) < 1 or side < 4:
            raise ValueError(
                f"needs a width, classes and channels of 1 or more and images of 4 pixels or more, got width {width}, "
                f"{num_classes} classes, {in_channels} channels, {side} pixels"
            )
        self.sources = blueprint.top
        self.outputs = tuple(outputs_of(blueprint.top))
        nodes = len(blueprint.top)
        stages = [0, *(stage_of(node, nodes) for node in range(nodes))]  # of each value; the stem is in the first
        self.stem = _stem(in_channels, width, halvings(side))
        self.adapters = nn.ModuleDict()
        for node, read in enumerate(blueprint.top):
            self._add_adapters(read, stages, node, stages[node + 1], width)
        self._add_adapters(self.outputs, stages, nodes, STAGES - 1, width)
        self.merges = merges(blueprint.top)
        self.cells = nn.ModuleList()
        for value, (middle, bottoms) in enumerate(blueprint.cells, start=1):
            channels = width << stages[value]
            modules = [WiredGraph(bottom, [Unit(channels) for _ in bottom]) for bottom in bottoms]
            self.cells.append(WiredGraph(middle, modules))
        wide = min(_WIDEST_HEAD, 16 * width)
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width << (STAGES - 1), wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.2),
        )
        self.classifier = nn.Linear(wide, num_classes)

    def _add_adapters(self, read: Sequence[int], stages: Sequence[int], node: int, stage: int, width: int) -> None:
        """Bring values of earlier stages to the shape of the stage of ``node``."""
        for value in read:
            if stages[value] != stage:
                self.adapters[f"{value}_to_{node}"] = nn.Sequential(
                    nn.AvgPool2d(2 ** (stage - stages[value])),
                    nn.Conv2d(width << stages[value], width << stage, 1, bias=False),
                )

    def _adapted(self, values: Sequence[Tensor], read: Sequence[int], node: int) -> list[Tensor]:
        """The values that a node reads, in the shape of its stage."""
        names = [f"{value}_to_{node}" for value in read]
        pairs = zip(names, read, strict=True)
        return [self.adapters[name](values[v]) if name in self.adapters else values[v] for name, v in pairs]

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, in_channels, side, side]`` to logits ``[N, num_classes]``."""
        values = [self.stem(x)]
        for number, cell in enumerate(self.cells):
            read = self._adapted(values, self.sources[number], number)
            values.append(cell(self.merges[str(number)](read) if len(read) > 1 else read[0]))
        last = average(self._adapted(values, self.outputs, len(self.cells)))
        logits: Tensor = self.classifier(self.head(last))
        return logits


def _stem(in_channels: int, width: int, halved: int) -> nn.Sequential:
    """What turns images into the first value: ``[N, in_channels, H, W] -> [N, width, H / 2**halved, ...]``."""
    first = nn.Conv2d(in_channels, width, 3, stride=2 if halved else 1, padding=1, bias=False)
    stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU())
    if halved < 2:
        stem.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
        return stem.append(nn.BatchNorm2d(width))
    for number in range(1, halved):
        if number > 1:
            stem.append(nn.ReLU())
        stem.append(nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False))
        stem.append(nn.Conv2d(width, width, 1, bias=False)).append(nn.BatchNorm2d(width))
    return stem
