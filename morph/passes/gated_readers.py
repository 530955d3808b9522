"""Convolutions and linear layers with gates on what they read, in the memory of those without.

With gates ``g`` a layer computes ``y = W * (g x) = (W g) * x``. Written with a multiplication, autograd keeps the
product for the backward pass: a second copy of the weight or of the activation. Here the layer keeps ``x``, ``W`` and
``g``, which are there anyway, and multiplies again on the way back, whichever of weight and activation has fewer
elements. With ``u`` for the product and ``t`` for what the gates multiply, ``dL/dt = g dL/du``, and ``dL/dg`` is the
sum of ``t dL/du`` over all axes but that of the gates.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Form: TypeAlias = tuple[Any, ...]
"""Empty for a linear layer; ``(transposed, stride, padding, dilation, output_padding, groups)`` of a convolution."""

_CONVOLUTIONS: dict[tuple[bool, int], Any] = {
    (False, 1): F.conv1d,
    (False, 2): F.conv2d,
    (False, 3): F.conv3d,
    (True, 1): F.conv_transpose1d,
    (True, 2): F.conv_transpose2d,
    (True, 3): F.conv_transpose3d,
}


def spread(gates: Tensor, index: Tensor) -> Tensor:
    """The gate of each position: ``gates`` ``[k]`` at the numbers ``index``; the number ``k`` stands for a one."""
    return torch.cat([gates, gates.new_ones(1)]).index_select(0, index)


def gated_input(x: Tensor, gates: Tensor, axis: int) -> Tensor:
    """``x`` with each position of an axis times its gate, for readers with code of their own."""
    return x * gates.to(x.dtype).reshape([-1 if a == axis else 1 for a in range(x.dim())])


def gated_reader(x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor, form: Form) -> Tensor:
    """What a layer gives when the channels that it reads are multiplied by gates.

    Gradients of any order and in both modes, ``torch.func``, hooks on saved tensors (activation checkpoints) and
    checks of tensors that were written over work as with a multiplication. Under autocast, which makes a copy of each
    weight anyway, and where a compiler decides what is kept, it is one.

    Args:
        x: What it reads, ``[N, I, *spatial]``, or ``[..., I]`` for a linear layer.
        weight: ``[O, I / groups, *kernel]``, ``[I, O, *kernel]`` of a transposed convolution, ``[O, I]``.
        bias: ``[O]`` or None.
        gates: One for each position of the axis of the weight that holds what the layer reads; with groups, each group
            has the same.
        form: Its numbers.
    """
    if _kept_anyway(x, form):
        gates = gates.to(weight.dtype)
        if form or torch.is_grad_enabled() or not isinstance(x, Tensor) or x.is_contiguous():
            return _plain(x, weight * _column(gates, form), bias, form)
        return _scattered(x, weight, bias, gates)
    return _GatedReader.apply(x, weight, bias, gates.to(weight.dtype), form)  # type: ignore[no-any-return]


def _kept_anyway(x: Tensor, form: Form) -> bool:
    """Whether a plain multiplication costs nothing more, or must stand: no backward pass, autocast, a tracer."""
    if not isinstance(x, Tensor) or not torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return True
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return True
    odd = bool(form) and (isinstance(form[2], str) or x.dim() != len(form[1]) + 2)  # "same"; a sample without a batch
    return odd or x.is_complex()


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """The layer itself."""
    if not form:
        return F.linear(x, weight, bias)
    transposed, stride, padding, dilation, output_padding, groups = form
    layer = _CONVOLUTIONS[transposed, len(stride)]
    more = (output_padding, groups, dilation) if transposed else (dilation, groups)
    return layer(x, weight, bias, stride, padding, *more)  # type: ignore[no-any-return]


def _scattered(x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor) -> Tensor:
    """A linear layer on rows that do not lie one behind the other: whether the weight learns decides how torch sums."""
    with torch.set_grad_enabled(weight.requires_grad):
        return _plain(x, weight * gates, bias, ()).detach()


def _column(gates: Tensor, form: Form) -> Tensor:
    """Gates in the shape that multiplies the weight."""
    return gates.reshape(-1, *(1,) * (len(form[1]) + form[0])) if form else gates


def _row(gates: Tensor, form: Form) -> Tensor:
    """Gates in the shape that multiplies the activation."""
    return gates.reshape(-1, *(1,) * len(form[1])) if form else gates


def _on_activation(x: Tensor, weight: Tensor, form: Form) -> bool:
    """Whether the activation is the smaller factor, and can be gated."""
    return x.numel() < weight.numel() and x.dim() > 1 and (not form or form[5] == 1)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, form: Form, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of activation, weight and bias, each where it is wanted."""
    if form:
        transposed, stride, padding, dilation, output_padding, groups = form
        sizes = [grad.shape[1]] if wanted[2] else None
        rest = (stride, padding, dilation, transposed, output_padding, groups, wanted)
        return list(torch.ops.aten.convolution_backward(grad, x, weight, sizes, *rest))
    rows = grad.reshape(-1, grad.shape[-1])
    return [
        grad @ weight if wanted[0] else None,
        rows.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    ]


def _sum_to(product: Tensor, axis: int) -> Tensor:
    """The sum over all axes but one."""
    return product.sum([a for a in range(product.dim()) if a != axis % product.dim()])


class _GatedReader(torch.autograd.Function):
    """The layer with its own backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor, form: Form) -> Tensor:
        if form or x.is_contiguous():
            small = _on_activation(x, weight, form)
            pair = (x * _row(gates, form), weight) if small else (x, weight * _column(gates, form))
            output = _plain(*pair, bias, form)
        else:
            output = _scattered(x, weight, bias, gates)
        # a linear layer gives a view of its rows, into which autograd would let nobody write
        return output if form else torch.ops.aten._unsafe_view.default(output, output.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, gates, ctx.form = inputs
        ctx.save_for_backward(x, weight, gates)
        ctx.save_for_forward(x, weight, gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, gates), form = ctx.saved_tensors, ctx.form
        wants_x, wants_weight, wants_bias, wants_gates, _ = ctx.needs_input_grad
        if _on_activation(x, weight, form):
            factor, shaped, axis = x, _row(gates, form), 1 if form else -1
            wanted = (wants_x or wants_gates, wants_weight, wants_bias)
            product, other, bias = _backward(grad, x * shaped, weight, form, wanted)
        else:
            factor, shaped, axis = weight, _column(gates, form), 0 if form and form[0] else 1
            wanted = (wants_x, wants_weight or wants_gates, wants_bias)
            other, product, bias = _backward(grad, x, weight * shaped, form, wanted)
        own = None if product is None else product * shaped
        gate = None if product is None or not wants_gates else _sum_to(product * factor, axis)
        first, second = (own, other) if factor is x else (other, own)
        return first, second, bias, gate, None

    @staticmethod
    def jvp(
        ctx: Any, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, gates: Tensor | None, _: Any
    ) -> Any:
        """Tangent of the output; an argument that does not move has no tangent."""
        (at_x, at_weight, at_gates), form = ctx.saved_tensors, ctx.form
        column = _column(at_gates, form)
        moved = torch.zeros_like(at_weight) if weight is None else weight * column
        if gates is not None:
            moved = moved + at_weight * _column(gates, form)
        result = _plain(at_x, moved, bias, form)
        return result if x is None else result + _plain(x, at_weight * column, None, form)
