"""Slow and obvious second implementations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gate_scores(model: nn.Module, modules: list[str], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Fisher scores by gates: multiply each channel by one, sample by sample, and differentiate by that gate."""
    model.eval()
    totals: dict[str, Tensor] = {}
    for x, y in zip(inputs, targets, strict=True):
        gates: dict[str, Tensor] = {}

        def gated(name: str, gates: dict[str, Tensor] = gates):
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                if name not in gates:
                    gates[name] = torch.ones(output.shape[1], dtype=output.dtype, requires_grad=True)
                return output * gates[name].view(1, -1, *[1] * (output.dim() - 2))

            return hook

        handles = [model.get_submodule(name).register_forward_hook(gated(name)) for name in modules]
        loss = F.cross_entropy(model(x[None]), y[None])
        gradients = torch.autograd.grad(loss, [gates[name] for name in modules])
        for name, gradient in zip(modules, gradients, strict=True):
            totals[name] = totals.get(name, 0) + gradient**2
        for handle in handles:
            handle.remove()
    return {name: total / (2 * len(inputs)) for name, total in totals.items()}


def dense_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight of an ordinary convolution that equals a grouped one, entry by entry."""
    rows = len(weight) // groups
    columns = weight.shape[1]
    dense = weight.new_zeros(len(weight), columns * groups, *weight.shape[2:])
    for o in range(len(weight)):
        for i in range(columns):
            dense[o, (o // rows) * columns + i] = weight[o, i]
    return dense
