"""Wide residual networks with pre-activation for 32x32 images, without dropout.

Source: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, section 2 and table 1.
"""

from __future__ import annotations

from torch import Tensor, nn


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions and a shortcut: ``[N, C, H, W] -> [N, m, H/stride, W/stride]``.

    Where the shape changes, the shortcut is a 1x1 convolution of the activated input; elsewhere it is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        active = self.relu1(self.bn1(x))
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(active))))
        kept: Tensor = x if self.shortcut is None else self.shortcut(active)
        return kept + residual


class WideResNet(nn.Module):
    """WRN-depth-width for 32x32 images.

    Args:
        depth: 6n + 4 for n blocks in each of the three groups.
        width: Factor on the channels 16, 32, 64 of the groups, k in the paper.
        num_classes: Width of the classifier.

    Raises:
        ValueError: If ``depth`` is not 6n + 4 with n of 1 or more, or ``width`` is below 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WRN needs a depth of 6n + 4 (10, 16, 22, 28, ...), got {depth}")
        if width < 1:
            raise ValueError(f"WRN needs a width of 1 or more, got {width}")
        channels = 16
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.groups = nn.Sequential()
        for base, stride in ((16, 1), (32, 2), (64, 2)):
            group = nn.Sequential()
            for block in range((depth - 4) // 6):
                group.append(WideBlock(channels, base * width, stride if block == 0 else 1))
                channels = base * width
            self.groups.append(group)
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
        features = self.relu(self.bn(self.groups(self.stem(x))))
        logits: Tensor = self.classifier(self.pool(features).flatten(1))
        return logits
