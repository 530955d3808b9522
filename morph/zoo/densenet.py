"""DenseNet-BC for 32x32 images: three dense blocks with bottlenecks, and transitions that compress.

Source: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017, section 3;
initialisation as in its section 4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = 3
BOTTLENECK = 4


class DenseLayer(nn.Module):
    """Bottleneck 1x1 and 3x3 convolution, appended to the input: ``[N, C, H, W] -> [N, C + growth, H, W]``."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        middle = BOTTLENECK * growth
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(middle, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        new = self.conv1(self.relu1(self.bn1(x)))
        return torch.cat([x, self.conv2(self.relu2(self.bn2(new)))], dim=1)


def dense_block(in_channels: int, growth: int, layers: int) -> nn.Sequential:
    """Chain dense layers: ``[N, C, H, W] -> [N, C + layers * growth, H, W]``."""
    return nn.Sequential(*(DenseLayer(in_channels + i * growth, growth) for i in range(layers)))


def transition(in_channels: int, out_channels: int) -> nn.Sequential:
    """Compress the channels and halve the resolution: ``[N, C, H, W] -> [N, m, H/2, W/2]``."""
    return nn.Sequential(
        nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.AvgPool2d(2)
    )


class DenseNet(nn.Module):
    """DenseNet-BC for 32x32 images.

    Args:
        depth: Number of layers in all; each block has ``(depth - 4) // 3 // 2`` dense layers of two convolutions.
        growth: Channels that each dense layer adds, k in the paper.
        num_classes: Width of the classifier.
        compression: Fraction of the channels that a transition keeps, theta in the paper.

    Raises:
        ValueError: If ``depth`` leaves a block empty, ``growth`` is below 1, or ``compression`` is not in (0, 1].
    """

    def __init__(self, depth: int, growth: int, num_classes: int = 10, compression: float = 0.5) -> None:
        super().__init__()
        layers = (depth - 4) // BLOCKS // 2
        if layers < 1:
            raise ValueError(f"DenseNet-BC needs a depth of 10 or more (blocks have (depth-4)//6 layers), got {depth}")
        if growth < 1:
            raise ValueError(f"DenseNet-BC needs a growth of 1 or more channels for each layer, got {growth}")
        if not 0 < compression <= 1:
            raise ValueError(f"DenseNet-BC needs a compression above 0 and at most 1, got {compression}")
        channels = 2 * growth
        stages: list[nn.Module] = []
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for block in range(BLOCKS):
            stages.append(dense_block(channels, growth, layers))
            channels += layers * growth
            if block < BLOCKS - 1:
                stages.append(transition(channels, int(channels * compression)))
                channels = int(channels * compression)
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``."""
        features = self.relu(self.bn(self.stages(self.stem(x))))
        logits: Tensor = self.classifier(self.pool(features).flatten(1))
        return logits
