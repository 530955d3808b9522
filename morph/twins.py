"""Copies of a model to run in its place, so that the model itself is left as it is, and one sample to run them on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from morph.errors import CountError

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


def _of_torch(hook: object) -> bool:
    """Whether a hook is one of `torch.nn.utils`, which computes a weight from others before each run."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def twin(model: nn.Module, make: Maker) -> nn.Module:
    """Copy a model in evaluation mode, without its hooks, and with each of its tensors replaced by ``make`` of it.

    The hooks stay by which `torch.nn.utils` computes weights from others (spectral norm, masks of pruning).
    Tensors and modules that are shared stay shared. Tensors inside lists or other attributes are copied as they are.
    What a copy cannot hold raises as `copy.deepcopy` does.
    """
    memo: dict[int, object] = {}
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name).items() if name == "_forward_pre_hooks" else ()
            memo[id(getattr(module, name))] = OrderedDict((key, hook) for key, hook in hooks if _of_torch(hook))
        for value in [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]:
            if isinstance(value, Tensor) and id(value) not in memo:
                made = make(value)
                memo[id(value)] = nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made
    return copy.deepcopy(model, memo).eval()


@dataclass(frozen=True)
class Sample:
    """The arguments of one call.

    Attributes:
        args: Positional ones.
        named: Named ones.
    """

    args: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among them."""
        return [x for x in tree_leaves((self.args, self.named)) if isinstance(x, Tensor)]

    def each(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same with every tensor changed."""
        args, named = tree_map_only(Tensor, change, (self.args, self.named))
        return Sample(args, named)


def one_sample(inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Sample:
    """Cut inputs whose first axis is as long as that of the first tensor to length 1.

    Raises:
        CountError: If there is no tensor or no sample.
    """
    if not isinstance(inputs, Tensor | tuple | Mapping):
        got = type(inputs).__name__
        raise CountError(f"counting needs a tensor, a tuple of arguments or a mapping of named ones, got {got}")
    named = dict(inputs) if isinstance(inputs, Mapping) else {}
    given = Sample(inputs if isinstance(inputs, tuple) else () if named else (inputs,), named)
    first = next(iter(given.tensors), None)
    if first is None or first.dim() == 0 or first.shape[0] == 0:
        got = "no tensor" if first is None else f"shape {tuple(first.shape)}"
        raise CountError(f"counting needs at least one sample, got {got}; the first axis of an input is the batch")
    batch = first.shape[0]
    return given.each(lambda x: x[:1] if x.dim() and x.shape[0] == batch else x)
