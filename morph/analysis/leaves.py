"""What torch's own layers call, written down without calling it: a run without data needs their shapes only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from morph.analysis.recording import bare

_aten = torch.ops.aten
Forward = Callable[[Tensor], Tensor]
Write = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]  # target, arguments, named
# arguments without tensors, and output: a tensor, or several with None for those that nobody asks for


def quick_forward(module: nn.Module, own: Forward, write: Write) -> Forward | None:
    """A forward that gives an output without data and tells ``write`` what the layer's own forward would call.

    It leaves to the layer's own forward whatever is not plain: other memory layouts, shapes that do not fit, training.

    Args:
        module: A layer without data.
        own: Its own forward.
        write: Told the operator, its arguments, and the output.

    Returns:
        None if the layer is not one of torch's own, or somebody has hooked into it.
    """
    maker = _MAKERS.get(type(module))
    if maker is None or is_touched(module) or ("weight" not in module._parameters and type(module) in _WEIGHTED):
        return None
    return maker(module, own, write)


def is_touched(module: nn.Module) -> bool:
    """Whether somebody has hooked into a module, or has given it a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _new(shape: Sequence[int], like: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return bare(shape, like.dtype)


def _alike(x: Tensor) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return bare(x.shape, x.dtype) if x.is_contiguous() else torch.empty_like(x)


def _bare(x: Any) -> bool:
    """Whether ``x`` is a tensor without data."""
    return isinstance(x, Tensor) and x.is_meta


def _plain(x: Any) -> bool:
    """Whether it is one in torch's usual layout."""
    return _bare(x) and x.is_contiguous()


def _convolution(module: Any, own: Forward, write: Write) -> Forward | None:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return None
    parameters = module._parameters

    def forward(x: Tensor) -> Tensor:
        weight, bias, groups = parameters["weight"], parameters["bias"], module.groups
        form, kernel = x.shape, weight.shape
        plain = _plain(x) and weight.is_contiguous() and x.dtype == weight.dtype and len(form) == len(kernel)
        if not plain or form[1] != kernel[1] * groups or kernel[0] % groups:
            return own(x)
        stride, padding, dilation = list(module.stride), list(module.padding), list(module.dilation)
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(form[2:], kernel[2:], stride, padding, dilation, strict=True)
        ]
        if min(size) < 1:
            return own(x)
        output = _new((form[0], kernel[0], *size), x)
        none = [0] * len(stride)
        write(_aten.convolution.default, (x, weight, bias, stride, padding, dilation, False, none, groups), {}, output)
        return output

    return forward


def _batch_norm(module: Any, own: Forward, write: Write) -> Forward:
    parameters, buffers = module._parameters, module._buffers
    rank = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}.get(type(module), 3)

    def forward(x: Tensor) -> Tensor:
        mean = buffers["running_mean"]
        if module.training or mean is None or not _plain(x) or x.dim() != rank or x.shape[1] != len(mean):
            return own(x)
        output = _alike(x)
        weight, bias, var = parameters["weight"], parameters["bias"], buffers["running_var"]
        write(
            _aten.native_batch_norm.default,
            (x, weight, bias, mean, var, False, module.momentum or 0.0, module.eps),
            {},
            (output, None, None),
        )
        return output

    return forward


def _linear(module: Any, own: Forward, write: Write) -> Forward:
    parameters = module._parameters

    def forward(x: Tensor) -> Tensor:
        weight = parameters["weight"]
        if not _bare(x) or not x.dim() or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
            return own(x)
        output = _new((*x.shape[:-1], weight.shape[0]), x)
        write(_aten.linear.default, (x, weight, parameters["bias"]), {}, output)
        return output

    return forward


def _layer_norm(module: Any, own: Forward, write: Write) -> Forward:
    parameters = module._parameters

    def forward(x: Tensor) -> Tensor:
        shape = list(module.normalized_shape)
        if not _bare(x) or list(x.shape[-len(shape) :]) != shape:
            return own(x)
        output = _new(x.shape, x)
        arguments = (x, shape, parameters["weight"], parameters["bias"], module.eps)
        write(_aten.native_layer_norm.default, arguments, {}, (output, None, None))
        return output

    return forward


def _global_pool(module: Any, own: Forward, write: Write) -> Forward | None:
    if module.output_size not in (1, (1, 1)):
        return None

    def forward(x: Tensor) -> Tensor:
        if not _plain(x) or x.dim() != 4 or not x.is_floating_point():
            return own(x)
        output = _new((*x.shape[:2], 1, 1), x)
        write(_aten.mean.dim, (x, [-1, -2], True), {}, output)
        return output

    return forward


def _max_pool(module: Any, own: Forward, write: Write) -> Forward | None:
    if module.return_indices:
        return None

    def forward(x: Tensor) -> Tensor:
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        kernel, stride, padding, dilation = ([n, n] if isinstance(n, int) else list(n) for n in sizes)
        if not _plain(x) or x.dim() != 4 or any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
            return own(x)
        size = []
        for n, k, s, p, d in zip(x.shape[2:], kernel, stride, padding, dilation, strict=True):
            rest = n + 2 * p - d * (k - 1) - 1
            count = (-(-rest // s) if module.ceil_mode else rest // s) + 1
            size.append(count - (module.ceil_mode and (count - 1) * s >= n + p))  # no window begins behind the end
        if min(size) < 1:
            return own(x)
        output, indices = _new((*x.shape[:2], *size), x), _new((*x.shape[:2], *size), x)
        arguments = (x, kernel, stride, padding, dilation, module.ceil_mode)
        write(_aten.max_pool2d_with_indices.default, arguments, {}, (output, indices))
        return output

    return forward


def _pointwise(target: Any, in_place: Any = None, *rest: Any) -> Callable[[Any, Forward, Write], Forward]:
    """A maker for layers that call one element-wise operator."""

    def maker(module: Any, own: Forward, write: Write) -> Forward:
        def forward(x: Tensor) -> Tensor:
            if not _bare(x) or not x.is_floating_point():
                return own(x)
            inside = in_place is not None and module.inplace
            output = x if inside else _alike(x)
            write(in_place if inside else target, (x, *rest), {}, output)
            return output

        return forward

    return maker


def _gelu(module: Any, own: Forward, write: Write) -> Forward:
    def forward(x: Tensor) -> Tensor:
        if not _bare(x):
            return own(x)
        output = _alike(x)
        named = {} if module.approximate == "none" else {"approximate": module.approximate}
        write(_aten.gelu.default, (x,), named, output)
        return output

    return forward


_WEIGHTED = {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Linear, nn.LayerNorm}
_MAKERS: dict[type, Callable[[Any, Forward, Write], Forward | None]] = {
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.ReLU: _pointwise(_aten.relu.default, _aten.relu_.default),
    nn.ReLU6: _pointwise(_aten.hardtanh.default, _aten.hardtanh_.default, 0.0, 6.0),
    nn.SiLU: _pointwise(_aten.silu.default, _aten.silu_.default),
    nn.Hardswish: _pointwise(_aten.hardswish.default, _aten.hardswish_.default),
    nn.Hardsigmoid: _pointwise(_aten.hardsigmoid.default, _aten.hardsigmoid_.default),
    nn.Sigmoid: _pointwise(_aten.sigmoid.default),
    nn.Tanh: _pointwise(_aten.tanh.default),
    nn.GELU: _gelu,
    nn.AdaptiveAvgPool2d: _global_pool,
    nn.MaxPool2d: _max_pool,
}
