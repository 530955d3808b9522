"""Run operators on tensors without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def run_bare(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator; without data, frequent ones whose output has a known form need no kernel."""
    known = _FORMS.get(func)
    first = args[0] if args else None
    if known is not None and isinstance(first, Tensor) and first.is_meta:
        output = known(*args, **kwargs)
        if output is not None:
            return output
    elif func is _aten.cat.default and (output := _joined(*args, **kwargs)) is not None:
        return output
    return func(*args, **kwargs)


def run_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `run_bare`; norms give their statistics too, in the shapes that they have where there are data."""
    return func(*args, **kwargs) if func in _WITH_STATISTICS else run_bare(func, args, kwargs)


def _itself(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _alike(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return _empty(x.shape, x) if x.is_contiguous() else torch.empty_like(x)


def _normed(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _alike(x), _empty((0,), x), _empty((0,), x)


def _layer_normed(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As `_normed`, if the shape is that of the last axes; the kernel says what is wrong with another."""
    last = tuple(shape)
    given = [x.shape[-len(last) :], *(t.shape for t in (weight, bias) if t is not None)]
    return _normed(x) if all(tuple(other) == last for other in given) else None


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _paired(x: Tensor, y: Any, **_: Any) -> Tensor | None:
    """Of the form of the one that the other is broadcast to, if there is such and the types are the same."""
    if not isinstance(y, Tensor):
        return _alike(x) if x.is_floating_point() and isinstance(y, int | float) else None
    if not y.is_meta or x.dtype != y.dtype:
        return None
    if x.shape == y.shape or _spreads(y.shape, x.shape):
        return _alike(x)
    return _alike(y) if _spreads(x.shape, y.shape) else None


def _paired_in_place(x: Tensor, y: Any, **_: Any) -> Tensor | None:
    """Itself, if the other is broadcast to it."""
    fits = isinstance(y, Tensor) and y.is_meta and x.dtype == y.dtype and x.is_contiguous()
    return x if fits and (x.shape == y.shape or _spreads(y.shape, x.shape)) else None


def _rolled(x: Tensor, shifts: Sequence[int], axes: Sequence[int] = ()) -> Tensor | None:
    fits = len(shifts) == len(axes) and all(-x.dim() <= a < x.dim() for a in axes)
    return _empty(x.shape, x) if fits and x.is_contiguous() else None


def _masked(x: Tensor, mask: Tensor, _: Any) -> Tensor | None:
    fits = mask.is_meta and mask.dtype == torch.bool and _spreads(mask.shape, x.shape)
    return _empty(x.shape, x) if fits and x.is_contiguous() else None


def _compared(x: Tensor, _: Any) -> Tensor | None:
    return torch.empty(x.shape, dtype=torch.bool, device="meta") if x.is_contiguous() else None


def _spreads(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether one shape is broadcast to the other."""
    start = len(large) - len(small)
    return start >= 0 and all(n == m or n == 1 for n, m in zip(small, large[start:], strict=True))


def _reduced(x: Tensor, axes: Sequence[int] | None = None, keep: bool = False, **named: Any) -> Tensor | None:
    """Without some axes, or with ones in their place."""
    if named or not axes or not x.is_floating_point():
        return None
    over = {a % x.dim() for a in axes}
    shape = [1 if a in over else n for a, n in enumerate(x.shape) if keep or a not in over]
    return _empty(shape, x)


def _joined(xs: Sequence[Any], axis: int = 0) -> Tensor | None:
    """Tensors of the usual layout side by side, if all fit."""
    first = xs[0]
    rank = first.dim()
    at = axis % rank if rank else 0
    rest = [n for a, n in enumerate(first.shape) if a != at]
    for x in xs:
        form = x.shape
        if not (x.is_meta and len(form) == rank and x.is_contiguous() and x.dtype == first.dtype):
            return None
        if [n for a, n in enumerate(form) if a != at] != rest:
            return None
    return _empty([*first.shape[:at], sum(x.shape[at] for x in xs), *first.shape[at + 1 :]], first)


def _product(x: Tensor, y: Tensor) -> Tensor | None:
    """A matrix product, or one for each of a batch."""
    fits = y.is_meta and x.dtype == y.dtype and x.shape[-1] == y.shape[-2] and x.shape[:-2] == y.shape[:-2]
    return _empty((*x.shape[:-1], y.shape[-1]), x) if fits else None


def _layer(bias: Tensor, x: Tensor, y: Tensor, **named: Any) -> Tensor | None:
    """``bias + x @ y``, if it is a plain linear layer; the kernel says what is wrong with anything else."""
    fits = x.shape[1:] == y.shape[:1] and bias.shape == y.shape[1:] and bias.dtype == x.dtype == y.dtype
    return _empty((x.shape[0], y.shape[1]), x) if fits and not named else None


_aten = torch.ops.aten
_FORMS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(
        (
            _aten.relu_.default,
            _aten.silu_.default,
            _aten.hardtanh_.default,
            _aten.hardswish_.default,
            _aten.hardsigmoid_.default,
            _aten.sigmoid_.default,
            _aten.leaky_relu_.default,
            _aten.elu_.default,
        ),
        _itself,
    ),
    **dict.fromkeys(
        (
            _aten.relu.default,
            _aten.silu.default,
            _aten.gelu.default,
            _aten.sigmoid.default,
            _aten.hardtanh.default,
            _aten.hardswish.default,
            _aten.hardsigmoid.default,
            _aten._softmax.default,
            _aten._safe_softmax.default,
        ),
        _alike,
    ),
    **dict.fromkeys((_aten.native_batch_norm.default, _aten.native_group_norm.default), _normed),
    _aten.native_layer_norm.default: _layer_normed,
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul.Scalar), _paired),
    **dict.fromkeys((_aten.add_.Tensor, _aten.sub_.Tensor, _aten.mul_.Tensor), _paired_in_place),
    **dict.fromkeys((_aten.eq.Scalar, _aten.ne.Scalar), _compared),
    _aten.roll.default: _rolled,
    _aten.masked_fill.Scalar: _masked,
    **dict.fromkeys((_aten.mean.dim, _aten.sum.dim_IntList), _reduced),
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.addmm.default: _layer,
}

_WITH_STATISTICS = {_aten.native_group_norm.default, _aten.native_layer_norm.default}


class Bare(TorchDispatchMode):
    """Runs every operator without data, also where code makes tensors that have some."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = one_device((args, kwargs or {}))
        return run_bare(func, args, with_data(func, args, kwargs))


def one_device(tree: Any) -> Any:
    """Where tensors without data meet others, take the data off the others."""
    tensors = collect_tensors(tree, [])
    if not tensors:
        return tree
    bare = tensors[0].is_meta
    for tensor in tensors:
        if tensor.is_meta is not bare:
            return each_tensor(tree, lambda t: t if t.is_meta or t.dim() == 0 else t.to("meta"))
    return tree


def collect_tensors(tree: Any, found: list[Tensor]) -> list[Tensor]:
    """``found`` and every tensor in the arguments or outputs of an operator, in order."""
    for item in tree.values() if type(tree) is dict else tree:
        if isinstance(item, Tensor):
            found.append(item)
        elif type(item) in (tuple, list, dict):
            collect_tensors(item, found)
    return found


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
