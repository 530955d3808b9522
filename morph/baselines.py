"""Students by hand: well-known networks for 32x32 images, made narrower until they meet a budget.

Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020, section 4.1, compare with networks
of these families of about 90M multiply-adds or 0.8M parameters, and with DenseNets of fewer layers, fewer channels, or
both: ``zoo:densenet-bc-50-12``, ``zoo:densenet-bc-100-7`` and ``zoo:densenet-bc-75-9``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import nn

from morph.errors import TargetError
from morph.fresh_weights import reinitialise
from morph.pruning import prune
from morph.zoo.small_images import torchvision_32

Family = Literal["vgg", "googlenet", "resnet", "shufflenet", "mobilenet"]

_NETWORKS: dict[Family, tuple[str, dict[str, Any]]] = {
    "vgg": ("vgg16_bn", {}),
    "googlenet": ("googlenet", {}),
    "resnet": ("resnet18", {}),
    "shufflenet": ("shufflenet_v2_x2_0", {}),
    "mobilenet": ("mobilenet_v2", {"width_mult": 1.4}),
}


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
    name, options = _NETWORKS[family]
    return torchvision_32(name, num_classes, **options)
