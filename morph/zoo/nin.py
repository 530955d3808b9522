"""Network in network for 32x32 images.

Source: Lin, Chen, Yan, "Network in Network", ICLR 2014, section 4.1, in the widths that the authors published for
CIFAR-10. Without the ReLU behind the last convolution, so that logits may be negative: a linear layer makes them, as in
the report on multi-channel labels.
"""

from __future__ import annotations

from torch import Tensor, nn

from morph.zoo.vgg import he_start


def mlp_convolution(in_channels: int, widths: tuple[int, int, int], kernel: int) -> list[nn.Module]:
    """One convolution and two 1x1 convolutions, each with a ReLU: ``[N, C, H, W] -> [N, widths[2], H, W]``."""
    layers: list[nn.Module] = []
    for width, size in zip(widths, (kernel, 1, 1), strict=True):
        layers += [nn.Conv2d(in_channels, width, size, padding=size // 2), nn.ReLU()]
        in_channels = width
    return layers


class Nin(nn.Module):
    """Network in network: 966,986 parameters for ten classes.

    Before the classifier, a 1x1 convolution, there is a feature map of 192 channels and 8x8 positions.

    Args:
        num_classes: Width of the classifier.
        dropout: Probability with which activations are dropped behind the two poolings.
    """

    def __init__(self, num_classes: int = 10, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *mlp_convolution(3, (192, 160, 96), 5),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.Dropout(dropout),
            *mlp_convolution(96, (192, 192, 192), 5),
            nn.AvgPool2d(3, 2, ceil_mode=True),
            nn.Dropout(dropout),
            *mlp_convolution(192, (192, 192, 192), 3)[:-2],
        )
        self.classifier = nn.Conv2d(192, num_classes, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, 32, 32]`` to logits ``[N, num_classes]``."""
        logits: Tensor = self.flatten(self.pool(self.classifier(self.features(x))))
        return logits
