"""Students by hand: well-known networks for 32x32 images, made narrower until they meet a budget.

Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020, section 4.1, compare with networks
of these families of about 90M multiply-adds or 0.8M parameters, and with DenseNets of fewer layers, fewer channels, or
both: ``zoo:densenet-bc-50-12``, ``zoo:densenet-bc-100-7`` and ``zoo:densenet-bc-75-9``.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from torchvision import models

from morph.cut import reinitialise
from morph.errors import TargetError
from morph.pruning import prune

Family = Literal["vgg", "googlenet", "resnet", "shufflenet", "mobilenet"]


def baseline(
    family: Family,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    num_classes: int = 10,
    seed: int = 0,
) -> nn.Module:
    """Build a network for images ``[N, 3, 32, 32]`` that is as wide as a budget allows, with fresh weights.

    It is torchvision's network (vgg16_bn, googlenet, resnet18, shufflenet_v2_x2_0, or mobilenet_v2 at width 1.4) with
    fewer strides at its beginning, since the images are small, in which every layer loses the same share of channels. A
    network whose code cannot carry the widths (ShuffleNet's) comes as its traced graph.

    Args:
        family: Which one.
        target_macs: Largest number of multiply-adds of one sample, or
        target_params: largest number of parameters.
        num_classes: Width of the classifier.
        seed: Of the weights.

    Raises:
        TargetError: If the family is not one of these, there is not exactly one target, or it is out of reach.
    """
    if family not in get_args(Family):
        raise TargetError(f"no family {family!r}; there are {', '.join(get_args(Family))}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = for_small_images(family, num_classes)
    cut = prune(
        whole,
        torch.zeros(2, 3, 32, 32),
        target_macs=target_macs,
        target_params=target_params,
        ranking="local",
        score="random",
        seed=seed,
        verify=False,  # the weights are drawn afresh
    )
    reinitialise(cut.model, seed)
    return cut.model


def for_small_images(family: Family, num_classes: int = 10) -> nn.Module:
    """The whole network of a family, without the strides at its beginning that are for large images."""
    net: Any
    if family == "vgg":
        net = models.vgg16_bn(num_classes=num_classes)
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    elif family == "googlenet":
        net = models.googlenet(num_classes=num_classes, aux_logits=False, init_weights=False)
        net.conv1.conv, net.maxpool1 = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    elif family == "resnet":
        net = models.resnet18(num_classes=num_classes)
        net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    elif family == "shufflenet":
        net = models.shufflenet_v2_x2_0(num_classes=num_classes)
        net.conv1[0].stride, net.maxpool = (1, 1), nn.Identity()
    else:
        net = models.mobilenet_v2(num_classes=num_classes, width_mult=1.4)
        net.features[0][0].stride = net.features[2].conv[1][0].stride = (1, 1)
    return cast(nn.Module, net)
