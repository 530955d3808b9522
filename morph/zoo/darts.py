"""DARTS networks for 32x32 images, built from a genotype that is data.

A cell has two input nodes (the outputs of the two cells before it) and ``len(genotype.normal) / 2`` computed nodes;
each computed node adds two operations, and the cell's output is the concatenation of some nodes. Cells at one and two
thirds of the depth halve the resolution and double the channels.

Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, section 2.1 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

Edge = tuple[str, int]


@dataclass(frozen=True)
class Genotype:
    """The wiring of a normal and of a reduction cell.

    Attributes:
        normal: Two ``(operation, input node)`` edges for each computed node of a normal cell; nodes 0 and 1 are the
            inputs.
        normal_concat: Nodes whose outputs are concatenated.
        reduce: As ``normal``, for the reduction cell; edges from nodes 0 and 1 have stride 2.
        reduce_concat: As ``normal_concat``.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]


DARTS_V1 = Genotype(
    normal=(
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 2),
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=(
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("avg_pool_3x3", 0),
    ),
    reduce_concat=(2, 3, 4, 5),
)

DARTS_V2 = Genotype(
    normal=(
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=(
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
    ),
    reduce_concat=(2, 3, 4, 5),
)


class FactorizedReduce(nn.Module):
    """Halve the resolution by two strided 1x1 convolutions, one of them shifted by a pixel.

    ``[N, C, H, W] -> [N, out_channels, H/2, W/2]``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_even = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.conv_odd = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.relu(x)
        reduced: Tensor = self.bn(torch.cat([self.conv_even(x), self.conv_odd(x[:, :, 1:, 1:])], dim=1))
        return reduced


def relu_conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
    """Pre-activated 1x1 convolution, as at the entrance of a cell."""
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))


def _separable(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    """ReLU, depthwise convolution, pointwise convolution, batch norm."""
    padding = dilation * (kernel - 1) // 2
    depthwise = nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)]


def operation(name: str, channels: int, stride: int) -> nn.Module:
    """Build one operation of the DARTS search space.

    Raises:
        ValueError: If ``name`` is not an operation of the search space.
    """
    kinds = {"sep_conv_3x3": 3, "sep_conv_5x5": 5, "sep_conv_7x7": 7}
    if name in kinds:
        kernel = kinds[name]
        return nn.Sequential(*_separable(channels, kernel, stride, 1), *_separable(channels, kernel, 1, 1))
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        return nn.Sequential(*_separable(channels, int(name[-1]), stride, 2))
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, padding=1)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels)
    raise ValueError(
        f"unknown DARTS operation {name!r}; known: {', '.join([*kinds, 'dil_conv_3x3', 'dil_conv_5x5'])}, "
        "max_pool_3x3, avg_pool_3x3, skip_connect"
    )


class Cell(nn.Module):
    """One DARTS cell: ``([N, C0, H, W], [N, C1, H, W]) -> [N, channels * len(concat), H', W']``."""

    def __init__(
        self,
        edges: tuple[Edge, ...],
        concat: tuple[int, ...],
        in_channels: tuple[int, int],
        channels: int,
        *,
        reduction: bool,
        reduction_before: bool,
    ) -> None:
        super().__init__()
        older, newer = in_channels
        self.preprocess0 = FactorizedReduce(older, channels) if reduction_before else relu_conv_bn(older, channels)
        self.preprocess1 = relu_conv_bn(newer, channels)
        self.inputs = tuple(source for _, source in edges)
        self.concat = concat
        self.ops = nn.ModuleList(
            operation(name, channels, 2 if reduction and source < 2 else 1) for name, source in edges
        )

    def forward(self, older: Tensor, newer: Tensor) -> Tensor:
        """See the class."""
        nodes = [self.preprocess0(older), self.preprocess1(newer)]
        for left in range(0, len(self.inputs), 2):
            a, b = self.inputs[left], self.inputs[left + 1]
            nodes.append(self.ops[left](nodes[a]) + self.ops[left + 1](nodes[b]))
        return torch.cat([nodes[i] for i in self.concat], dim=1)


def auxiliary_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """Classifier on the 8x8 map after the second reduction, used in training only: ``[N, C, 8, 8] -> [N, classes]``."""
    return nn.Sequential(
        nn.ReLU(),
        nn.AvgPool2d(5, stride=3, count_include_pad=False),
        nn.Conv2d(in_channels, 128, 1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.Conv2d(128, 768, 2, bias=False),
        nn.BatchNorm2d(768),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(768, num_classes),
    )


class DartsNet(nn.Module):
    """A stack of DARTS cells for 32x32 images.

    In training mode, and if there is an auxiliary head, the output is ``(logits, auxiliary_logits)``; in evaluation
    mode it is ``logits`` alone and the auxiliary head does not run. Its parameters belong to the model in both modes.

    Args:
        genotype: The wiring.
        layers: Number of cells.
        channels: Channels of the first cell, C in the paper.
        num_classes: Width of the classifier.
        auxiliary: Whether there is an auxiliary head.
    """

    def __init__(
        self,
        genotype: Genotype = DARTS_V2,
        layers: int = 10,
        channels: int = 16,
        num_classes: int = 10,
        *,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels))
        self.cells = nn.ModuleList()
        self.auxiliary_after = 2 * layers // 3 if auxiliary else -1
        self.auxiliary: nn.Module | None = None
        reductions = (layers // 3, 2 * layers // 3)
        widths = (3 * channels, 3 * channels)
        for i in range(layers):
            reduction = i in reductions
            channels *= 2 if reduction else 1
            edges, concat = (
                (genotype.reduce, genotype.reduce_concat) if reduction else (genotype.normal, genotype.normal_concat)
            )
            self.cells.append(
                Cell(edges, concat, widths, channels, reduction=reduction, reduction_before=i - 1 in reductions)
            )
            widths = (widths[1], channels * len(concat))
            if i == self.auxiliary_after:
                self.auxiliary = auxiliary_head(widths[1], num_classes)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[1], num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map images ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``; see the class for training mode."""
        older = newer = self.stem(x)
        auxiliary_logits = None
        for i, cell in enumerate(self.cells):
            older, newer = newer, cell(older, newer)
            if self.training and i == self.auxiliary_after and self.auxiliary is not None:
                auxiliary_logits = self.auxiliary(newer)
        logits = self.classifier(self.pool(newer).flatten(1))
        return logits if auxiliary_logits is None else (logits, auxiliary_logits)
