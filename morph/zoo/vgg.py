"""Networks of plain convolutions, max-pooling and dense layers for 32x32 images, and one of dense layers alone.

Source: "A knowledge distillation approach to increase the accuracy of lightweight convolutional neural networks", LSE
2020, sections 3 to 3.3. The report gives the numbers of layers and the rough sizes, and no widths. They are chosen here
so that the sizes are met for ten classes: teacher 12,058,058 parameters (about 12M), student 249,514 (about 0.25M),
small student 129,410 (130k). Every dense layer is counted, the classifier too; so a student's size grows with the
number of classes. The report names no batch norm; ``norm=True`` adds it behind each convolution, as VGG is used today.
"""

from __future__ import annotations

from torch import Tensor, nn

TEACHER = ((64, 64), (128, 128, 128), (256, 256, 256), (512, 512, 512))
"""Widths of the teacher's convolutions: 11 in 4 stages, each of which ends in max-pooling."""


class Vgg(nn.Module):
    """Stages of 3x3 convolutions that end in 2x2 max-pooling, then dense layers.

    Args:
        stages: Widths of the convolutions of each stage.
        dense: Widths of the dense layers before the classifier.
        num_classes: Width of the classifier, the last dense layer.
        norm: Whether batch norm follows each convolution.
        size: Height and width of the images.

    Raises:
        ValueError: If ``size`` cannot be halved once for each stage.
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...] = TEACHER,
        dense: tuple[int, ...] = (1280, 1280),
        num_classes: int = 10,
        *,
        norm: bool = False,
        size: int = 32,
    ) -> None:
        super().__init__()
        if size % 2 ** len(stages):
            raise ValueError(f"VGG halves its images {len(stages)} times, which images of {size} pixels do not allow")
        channels = 3
        self.features = nn.Sequential()
        for widths in stages:
            for width in widths:
                self.features.append(nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
                if norm:
                    self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU())
                channels = width
            self.features.append(nn.MaxPool2d(2))
        self.flatten = nn.Flatten()
        self.hidden, features = dense_layers(channels * (size // 2 ** len(stages)) ** 2, dense)
        self.classifier = nn.Linear(features, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, size, size]`` to logits ``[N, num_classes]``."""
        logits: Tensor = self.classifier(self.hidden(self.flatten(self.features(x))))
        return logits


class Mlp(nn.Module):
    """Dense layers alone, each with a ReLU: section 3.3 of the report.

    Args:
        layers: Number of hidden layers.
        width: Width of each of them.
        num_classes: Width of the classifier.
        size: Height and width of the images.

    Raises:
        ValueError: If there is no hidden layer, or it has no unit.
    """

    def __init__(self, layers: int, width: int, num_classes: int = 10, *, size: int = 32) -> None:
        super().__init__()
        if layers < 1 or width < 1:
            raise ValueError(f"MLP needs 1 hidden layer or more of 1 unit or more, got {layers} of {width}")
        self.flatten = nn.Flatten()
        self.hidden, features = dense_layers(3 * size * size, (width,) * layers)
        self.classifier = nn.Linear(features, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, size, size]`` to logits ``[N, num_classes]``."""
        logits: Tensor = self.classifier(self.hidden(self.flatten(x)))
        return logits


def dense_layers(features: int, widths: tuple[int, ...]) -> tuple[nn.Sequential, int]:
    """Linear layers with ReLUs, and how many features they end in."""
    layers = nn.Sequential()
    for width in widths:
        layers.append(nn.Linear(features, width))
        layers.append(nn.ReLU())
        features = width
    return layers, features


def he_start(model: nn.Module) -> None:
    """Draw the weights of layers before ReLUs as He et al. (ICCV 2015, Eq. 10) do, from fan-in; all biases are zero.

    The classifier has no ReLU behind it, so its variance is half of that.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if name == "classifier" else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
