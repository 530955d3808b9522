"""Measure whether two models compute the same."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morph.errors import CheckFailedError
from morph.plan import Check

LIMIT = 1e-10
_SLICE = 16  # samples in memory at a time


def same_function(before: nn.Module, after: nn.Module, inputs: Tensor, *, limit: float = LIMIT) -> tuple[Check, Check]:
    """Compare outputs, and gradients with respect to the inputs, in float64 and evaluation mode.

    The gradient is that of a random weighting of the outputs, so that it speaks of all of them.

    Args:
        before: The model that came in; copies are compared, neither model is touched.
        after: The model that came out.
        inputs: One batch.
        limit: Largest difference allowed, relative to the largest value before.

    Returns:
        One check of the outputs and one of the input gradients; they may have failed.
    """
    outputs, gradients = _run(before, inputs)
    other_outputs, other_gradients = _run(after, inputs)
    return (
        _compare("outputs", outputs, other_outputs, limit, len(inputs)),
        _compare("input gradients", gradients, other_gradients, limit, len(inputs)),
    )


def require(checks: tuple[Check, ...]) -> None:
    """Refuse a result whose checks failed.

    Raises:
        CheckFailedError: If one did.
    """
    for check in checks:
        if not check.passed:
            raise CheckFailedError(
                f"check failed: the {check.name} moved by {check.max_abs_diff:.3g} ({check.relative:.3g} relative, "
                f"limit {check.limit:.0e}, "
                f"{check.dtype}, {check.samples} samples); nothing is returned or written"
            )


def _run(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and input gradients of a float64 copy, each flattened; a few samples at a time."""
    twin = copy.deepcopy(model).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    results = []
    for part in inputs.detach().split(_SLICE):
        x = part.double().requires_grad_()
        with torch.enable_grad():
            outputs = _flat(twin(x))
            weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
            (gradient,) = torch.autograd.grad((outputs * weights).sum(), x)
        results.append((outputs.detach(), gradient.flatten()))
    outputs_of_parts, gradients = zip(*results, strict=True)
    return torch.cat(outputs_of_parts), torch.cat(gradients)


def _flat(outputs: Any) -> Tensor:
    """Every floating-point tensor of an output, flattened and joined."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.cat([leaf.flatten().double() for leaf in leaves])


def _compare(name: str, before: Tensor, after: Tensor, limit: float, samples: int) -> Check:
    """The largest difference; a difference of shape, or a value that is not finite, is infinite."""
    if before.shape != after.shape:
        return Check(name, float("inf"), float("inf"), limit, samples, "float64")
    difference = float((before - after).abs().max())
    scale = float(before.abs().max())
    relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
    return Check(name, difference, relative, limit, samples, "float64")
