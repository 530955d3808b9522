"""Copies of a model to run in its place, so that the model itself is left as it is."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

Maker = Callable[[Tensor], Tensor]
"""Makes the tensor of the copy that stands for one of the model."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def meta(tensor: Tensor) -> Tensor:
    """Shape without values: no memory, and nothing is computed."""
    return torch.empty_like(tensor, device="meta")


def zeros(tensor: Tensor) -> Tensor:
    """Zeros on the CPU that share one element: no memory.

    For models that have run on the meta device, which shows that no value decides what is computed.
    """
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def clone(tensor: Tensor) -> Tensor:
    """The same values on the same device."""
    return tensor.detach().clone()


def twin(model: nn.Module, make: Maker) -> nn.Module:
    """Copy a model in evaluation mode, without its hooks, and with each of its tensors replaced by ``make`` of it.

    Tensors and modules that are shared stay shared. Tensors inside lists or other attributes are copied as they are.
    What a copy cannot hold raises as `copy.deepcopy` does.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for name in _HOOKS:
            memo[id(getattr(module, name))] = OrderedDict()
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, Tensor) and id(value) not in memo:
                made = make(value)
                memo[id(value)] = nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made
    return copy.deepcopy(model, memo).eval()
