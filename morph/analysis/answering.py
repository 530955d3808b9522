"""Lead code that asks for values the way that an earlier run with data went, without having any."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from morph.analysis.recording import Call, Value

_aten = torch.ops.aten
_META = torch.device("meta")


def alike(before: Any, now: Any) -> bool:
    """Whether arguments are what they were: tensors in shape and type, anything else in value.

    Args:
        before: As a run with data recorded them.
        now: As they are.
    """
    kind = type(before)
    if kind is Value:
        return isinstance(now, Tensor) and now.shape == before.shape and before.form[:1] == (now.dtype,)
    if kind is list or kind is tuple:
        return len(before) == len(now) and all(map(alike, before, now))
    if kind is dict:
        return before.keys() == now.keys() and all(alike(value, now[name]) for name, value in before.items())
    return bool(before == now)


def as_before(call: Call, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What an operator gives, without data, whose arguments are alike: tensors of the same forms, and the same numbers.

    Where values decide on a form or a number, this is what those of the earlier run made of it.
    """
    if _makes_all(func):
        return _forms(call.output)
    return args[0] if _is_in_place(func) else func(*args, **kwargs)


def _forms(tree: Any) -> Any:
    """Tensors without data in the place of values; numbers stay."""
    if type(tree) is Value:
        dtype, strides = tree.form
        return torch.empty_strided(tree.shape, strides, dtype=dtype, device=_META)
    return type(tree)([_forms(item) for item in tree]) if type(tree) in (list, tuple) else tree


@functools.cache
def _makes_all(func: Any) -> bool:
    """Whether an operator changes no argument, and gives none back."""
    return not func._schema.is_mutable and all(r.alias_info is None for r in func._schema.returns)


@functools.cache
def _is_in_place(func: Any) -> bool:
    """Whether an operator changes its first argument and gives it back."""
    return str(func._schema.name).endswith("_") and len(func._schema.returns) == 1


def as_on_processor(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """What torch calls for tensors of the processor in the place of an operator that it calls for others."""
    if func is _aten.scalar_tensor.default:  # the number in ``x[i] = 1``
        return _aten.lift_fresh.default, (torch.tensor(args[0], dtype=kwargs.get("dtype")),), {}
    return func, args, kwargs


class OnProcessor(TorchFunctionMode):
    """Lets code take tensors without data for tensors of the processor, so that it goes the way that it goes there.

    What it fills with one number, or with nothing, has no data either: it may write into it what is missing.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _TOLD:
            return _TOLD[func]
        kwargs = kwargs or {}
        if func in _FILLED and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": _META})
        if func is Tensor.cpu:
            return args[0]
        if func is Tensor.to:
            here = args[0].device
            args = tuple([here if isinstance(a, torch.device | str) else a for a in args])
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": here}
        return func(*args, **kwargs)


_FILLED = {torch.empty, torch.zeros, torch.ones, torch.full}
_TOLD: dict[Any, Any] = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}
