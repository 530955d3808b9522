"""Give a classifier, a linear layer or a convolution, another number of classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from morph.errors import PlanMismatchError

Head = nn.Linear | _ConvNd


def why_not(module: nn.Module) -> str:
    """Why a module cannot be given other classes; '' if it can."""
    if not isinstance(module, nn.Linear | _ConvNd) or isinstance(module, _ConvTransposeNd):
        return f"{type(module).__name__} is neither a linear layer nor a convolution"
    if set(module._parameters) != {"weight", "bias"} or module._parameters["weight"] is None:
        return "it has other parameters than a weight and a bias (a parametrised weight, for one)"
    if getattr(module, "groups", 1) != 1:
        return f"its {module.groups} groups would have to divide the classes"
    return ""


def resize_head(
    model: nn.Module, path: str, shape: Sequence[int], classes: int, index: Sequence[int], seed: int
) -> None:
    """Give the layer at ``path`` other classes, in place; it stays the object that it is.

    Fresh weights and biases come from the layer's own ``reset_parameters``, drawn on the CPU, so that every device has
    the same. The global random state stays as it was.

    Args:
        model: What it is in.
        path: Where it is.
        shape: Shape of its weight before.
        classes: Number of classes afterwards.
        index: For each of the first classes, the old class whose weights it keeps.
        seed: Seed of the draw.

    Raises:
        PlanMismatchError: If there is no such layer, or one that cannot be given other classes.
    """
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    reason = "there is none" if module is None else why_not(module)
    if isinstance(module, nn.Linear | _ConvNd) and not reason and tuple(module.weight.shape) != tuple(shape):
        reason = f"its weight is {list(module.weight.shape)}"
    if not reason and not (len(index) <= classes and all(i < shape[0] for i in index)):
        reason = f"{len(index)} of its {shape[0]} classes cannot be kept among {classes}"
    if reason:
        raise PlanMismatchError(
            f"this plan was made for another model: {path} should be a classifier with a weight of {list(shape)}; "
            f"{reason}"
        )
    assert isinstance(module, nn.Linear | _ConvNd)
    old: dict[str, Tensor | None] = dict(module._parameters)
    kept = list(index)
    for name, tensor in old.items():
        if tensor is not None:
            setattr(module, name, nn.Parameter(torch.empty(classes, *tensor.shape[1:])))
    if isinstance(module, nn.Linear):
        module.out_features = classes
    else:
        module.out_channels = classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module.reset_parameters()
    for name, tensor in old.items():
        if tensor is not None:
            fresh = getattr(module, name).detach().to(tensor.device, tensor.dtype)
            fresh[: len(kept)] = tensor.detach()[kept]
            setattr(module, name, nn.Parameter(fresh, requires_grad=tensor.requires_grad))
