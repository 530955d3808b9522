"""Measure whether two models compute the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morph.analysis.recording import Inputs, arguments_of, tensors_of
from morph.errors import CheckFailedError
from morph.plan import Check
from morph.zeroing import double_copy, doubled, in_float64, outputs_of

LIMIT = 1e-10
_SLICE = 16  # samples in memory at a time


def same_function(before: nn.Module, after: nn.Module, inputs: Inputs, *, limit: float = LIMIT) -> tuple[Check, ...]:
    """Compare outputs, and gradients with respect to the inputs, in float64 and evaluation mode.

    The gradient is that of a random weighting of the outputs, so that it speaks of all of them. Inputs without a
    gradient, such as token numbers, have no second check, nor has a model that cannot be differentiated.

    Args:
        before: The model that came in; copies are compared, neither model is touched.
        after: The model that came out.
        inputs: One batch: a tensor, a tuple of arguments, or a mapping of named arguments.
        limit: Largest difference allowed, relative to the largest value before; 1e-6 at least in float16.

    Returns:
        One check of the outputs and one of the input gradients; they may have failed.
    """
    limit = max(limit, precision(before))
    outputs, gradients = _run(before, inputs)
    other_outputs, other_gradients = _run(after, inputs)
    samples = next((len(t) for t in tensors_of(arguments_of(inputs)) if t.dim()), 1)
    checks = [_compare("outputs", outputs, other_outputs, limit, samples)]
    if gradients.numel() or other_gradients.numel():
        checks.append(_compare("input gradients", gradients, other_gradients, limit, samples))
    return tuple(checks)


def precision(model: nn.Module) -> float:
    """How closely the weights of a model can be divided by two, over the largest output.

    Halves are exact in every type but for numbers near the smallest, which float16 has at 6e-8.
    """
    return 1e-6 if any(p.dtype == torch.float16 for p in model.parameters()) else 0.0


def require(checks: tuple[Check, ...]) -> None:
    """Refuse a result whose checks failed.

    Raises:
        CheckFailedError: If one did.
    """
    for check in checks:
        if not check.passed:
            raise CheckFailedError(
                f"check failed: the {check.name} moved by {check.max_abs_diff:.3g} ({check.relative:.3g} relative, "
                f"{'not finite' if check.limit is None else f'limit {check.limit:.0e}'}, "
                f"{check.dtype}, {check.samples} samples); nothing is returned or written"
            )


def _run(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Outputs and input gradients of a float64 copy, each flattened; of one tensor a few samples at a time."""
    twin = double_copy(model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    results = []
    for part in inputs.split(_SLICE) if isinstance(inputs, Tensor) else (inputs,):
        args, kwargs = pytree.tree_map_only(Tensor, _leaf, doubled(arguments_of(part)))
        leaves = [t for t in tensors_of((args, kwargs)) if t.requires_grad]
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))  # the model may write into them
        with torch.enable_grad(), in_float64():
            outputs = _flat(outputs_of(twin(*args, **kwargs)))
        weights = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        results.append((outputs.detach(), _gradients((outputs * weights).sum(), leaves)))
    outputs_of_parts, gradients = zip(*results, strict=True)
    return torch.cat(outputs_of_parts), torch.cat(gradients)


def _leaf(tensor: Tensor) -> Tensor:
    """The same values, with a gradient to come where there can be one."""
    return tensor.detach().clone().requires_grad_(tensor.is_floating_point())


def _gradients(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """Gradients of ``value``, flattened and joined; empty where it depends on no input, as on token numbers.

    Empty too where the code allows none: it writes over what a gradient needs, or takes checkpoints in the old way.
    """
    none = torch.zeros(0, dtype=torch.float64, device=value.device)
    if not leaves or not value.requires_grad:
        return none
    try:
        return _flat(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
    except RuntimeError:
        return none


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors flattened and joined."""
    return torch.cat([t.flatten().double() for t in tensors] or [torch.zeros(0, dtype=torch.float64)])


def _compare(name: str, before: Tensor, after: Tensor, limit: float, samples: int) -> Check:
    """The largest difference; a difference of shape, or a value that is not finite, is infinite."""
    if before.shape != after.shape:
        return Check(name, float("inf"), float("inf"), limit, samples, "float64")
    if not before.numel():
        return Check(f"{name}: there are none, so this shows nothing", 0.0, 0.0, limit, samples, "float64")
    difference = float((before - after).abs().max())
    scale = float(before.abs().max())
    relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
    return Check(name, difference, relative, limit, samples, "float64")
