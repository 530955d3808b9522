"""Shallow networks with a linear bottleneck for 32x32 images.

Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, sections 2.2 and 3; the widths 128, 1200 and
8192 are those of the report on multi-channel labels ("CMPUT 466 Mini Project", 2017, section 4). The report does not
tell of pooling: without it the bottleneck alone has 157M weights, behind 2x2 max-pooling 39M.
"""

from __future__ import annotations

from torch import Tensor, nn

from morph.zoo.vgg import he_start


class ShallowNet(nn.Module):
    """One convolution, a linear bottleneck without bias, one wide layer of ReLUs, and a classifier.

    Args:
        channels: Channels of the 3x3 convolution.
        bottleneck: Units of the linear bottleneck: it factorises the weights of the wide layer.
        hidden: Units of the wide layer.
        num_classes: Width of the classifier.
        pool: Side of the max-pooling behind the convolution; 1 for none.
        size: Height and width of the images.

    Raises:
        ValueError: If a width is below 1, or ``pool`` does not divide ``size``.
    """

    def __init__(
        self,
        channels: int = 128,
        bottleneck: int = 1200,
        hidden: int = 8192,
        num_classes: int = 10,
        *,
        pool: int = 1,
        size: int = 32,
    ) -> None:
        super().__init__()
        if min(channels, bottleneck, hidden) < 1:
            raise ValueError(f"the shallow net needs widths of 1 or more, got {channels}, {bottleneck} and {hidden}")
        if pool < 1 or size % pool:
            raise ValueError(f"the shallow net's pooling must divide images of {size} pixels, got {pool}")
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(pool) if pool > 1 else nn.Identity()
        self.flatten = nn.Flatten()
        self.bottleneck = nn.Linear(channels * (size // pool) ** 2, bottleneck, bias=False)
        self.hidden = nn.Linear(bottleneck, hidden)
        self.hidden_relu = nn.ReLU()
        self.classifier = nn.Linear(hidden, num_classes)
        he_start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, size, size]`` to logits ``[N, num_classes]``."""
        features = self.bottleneck(self.flatten(self.pool(self.relu(self.conv(x)))))
        logits: Tensor = self.classifier(self.hidden_relu(self.hidden(features)))
        return logits
