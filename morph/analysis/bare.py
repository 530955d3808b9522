"""Run operators on tensors without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def run_bare(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator; without data, frequent ones whose output has a known form need no kernel."""
    first = args[0] if args else None
    if not isinstance(first, Tensor) or first.device.type != "meta":
        return func(*args, **kwargs)
    if func in _IN_PLACE:
        return first
    if func in _LIKE_INPUT:
        return torch.empty_like(first)
    if func in _NORMS:
        small = first.new_empty(0)
        return torch.empty_like(first), small, small
    if func in _BINARY and isinstance(args[1], Tensor):
        other = args[1]
        if first.shape == other.shape and first.dtype == other.dtype and other.device.type == "meta":
            return torch.empty_like(first)
    if func is _aten.addmm.default and _fit(*args[:3]):
        return first.new_empty(args[1].shape[0], args[2].shape[1])
    return func(*args, **kwargs)


def _fit(bias: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether ``bias + x @ y`` is a plain linear layer; the kernel says what is wrong with anything else."""
    return x.shape[1:] == y.shape[:1] and bias.shape == y.shape[1:] and bias.dtype == x.dtype == y.dtype


_aten = torch.ops.aten
_IN_PLACE = {
    _aten.relu_.default,
    _aten.silu_.default,
    _aten.hardtanh_.default,
    _aten.hardswish_.default,
    _aten.hardsigmoid_.default,
    _aten.sigmoid_.default,
    _aten.leaky_relu_.default,
    _aten.elu_.default,
}
_LIKE_INPUT = {
    _aten.relu.default,
    _aten.silu.default,
    _aten.gelu.default,
    _aten.sigmoid.default,
    _aten.hardtanh.default,
    _aten.hardswish.default,
    _aten.hardsigmoid.default,
    _aten._softmax.default,
    _aten._safe_softmax.default,
}
_BINARY = {_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor}
_NORMS = {_aten.native_batch_norm.default, _aten.native_layer_norm.default, _aten.native_group_norm.default}


def one_device(tree: Any) -> Any:
    """Where tensors without data meet others, take the data off the others."""
    kinds: set[bool] = set()
    each_tensor(tree, lambda t: kinds.add(t.device.type == "meta"))
    if len(kinds) < 2:
        return tree
    return each_tensor(tree, lambda t: t if t.device.type == "meta" or t.dim() == 0 else t.to("meta"))


def with_data(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Let whole numbers and truth values that are made without data have some: code looks at positions and masks."""
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "meta":
        return kwargs
    dtype = kwargs.get("dtype")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if dtype is None:
        numbers = [a for a in args if isinstance(a, int | float)]
        whole = func.overloadpacket is _aten.arange and all(isinstance(n, int) for n in numbers)
        dtype = tensors[0].dtype if tensors else torch.int64 if whole else torch.get_default_dtype()
    if dtype.is_floating_point or dtype.is_complex or any(t.device.type == "meta" for t in tensors):
        return kwargs
    return {**kwargs, "device": torch.device("cpu")}


def each_tensor(tree: Any, change: Callable[[Tensor], Any]) -> Any:
    """The arguments of an operator with ``change`` applied to every tensor; operators take no deeper structures."""
    if isinstance(tree, Tensor):
        return change(tree)
    if type(tree) in (tuple, list):
        return type(tree)([each_tensor(item, change) for item in tree])
    if type(tree) is dict:
        return {key: each_tensor(item, change) for key, item in tree.items()}
    return tree
