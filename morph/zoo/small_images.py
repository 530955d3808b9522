"""Classifiers of torchvision adapted to 32x32 images: without the strides at their beginning that are for large ones.

The convolution at the entrance becomes one of 3x3 with stride 1, or keeps its size and loses its stride; the pooling
behind it goes away. MobileNetV2 and VGG have no such pooling: the first loses one more stride, of its second block.
Weights are fresh. VGG ends in one linear layer behind a global average pooling, as is usual for images of this size.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

NAMES = (
    "vgg16_bn",
    "googlenet",
    "resnet18",
    "resnet34",
    "resnet50",
    "densenet121",
    "shufflenet_v2_x2_0",
    "mobilenet_v2",
)
"""The networks that are known, by torchvision's names."""


def torchvision_32(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Build a network of torchvision for images ``[N, 3, 32, 32]``, with fresh weights.

    Args:
        name: One of `NAMES`.
        num_classes: Width of the classifier.
        options: Further arguments of torchvision's constructor, such as ``width_mult``.

    Raises:
        ValueError: If the name is not one of these.
    """
    from torchvision import models  # here, because it is slow to import

    if name not in NAMES:
        raise ValueError(f"no network {name!r} is adapted to 32x32 images; there are {', '.join(NAMES)}")
    net: Any
    if name == "googlenet":
        net = models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=False, **options)
    else:
        net = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if name == "vgg16_bn":
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    elif name == "googlenet":
        net.conv1.conv, net.maxpool1 = _entrance(64), nn.Identity()
    elif name.startswith("resnet"):
        net.conv1, net.maxpool = _entrance(64), nn.Identity()
    elif name == "densenet121":
        net.features.conv0, net.features.pool0 = _entrance(64), nn.Identity()
    elif name == "shufflenet_v2_x2_0":
        net.conv1[0].stride, net.maxpool = (1, 1), nn.Identity()
    else:
        net.features[0][0].stride = net.features[2].conv[1][0].stride = (1, 1)
    return cast(nn.Module, net)


def _entrance(channels: int) -> nn.Conv2d:
    return nn.Conv2d(3, channels, 3, padding=1, bias=False)
