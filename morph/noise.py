"""Noise on copies: equal units get equal gradients, and a little noise lets them part."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from morph.analysis.recording import named_tensors
from morph.errors import PlanMismatchError
from morph.plan import Perturb, Resize


def noise_on_copies(
    model: nn.Module, resizes: Sequence[Resize], parameters: Collection[str], deviation: float, seed: int
) -> list[Perturb]:
    """The noise for a model that was widened: on the weights that make the copies, not on those that read them.

    The first of equal units stays as it is, and so do biases and the scales of norms (parameters of one axis).

    Args:
        model: The widened model.
        resizes: How its tensors were widened.
        parameters: Which tensors are parameters.
        deviation: Standard deviation over the root mean square of each parameter.
        seed: From which the seed of each draw comes.
    """
    tensors = dict(named_tensors(model))
    draw = random.Random(seed)
    edits = []
    for resize in resizes:
        tensor = tensors[resize.tensor]
        if resize.scale or resize.tensor not in parameters or tensor.dim() < 2 or not tensor.is_floating_point():
            continue
        first = {old: at for at, old in reversed(list(enumerate(resize.index)))}
        copies = tuple(at for at, old in enumerate(resize.index) if first[old] != at)
        if copies:
            size = len(resize.index)
            edits.append(Perturb(resize.tensor, resize.axis, size, copies, deviation, draw.randrange(2**31)))
    return edits


def add_noise(model: nn.Module, edits: Sequence[Perturb]) -> None:
    """Carry out edits, in place; parameters without data (meta device) stay as they are.

    Raises:
        PlanMismatchError: If a tensor is missing or of another size.
    """
    tensors = dict(named_tensors(model))
    for edit in edits:
        tensor = tensors.get(edit.tensor)
        size = tensor.shape[edit.axis] if tensor is not None and edit.axis < tensor.dim() else None
        if tensor is None or size != edit.size or max(edit.positions, default=0) >= edit.size:
            raise PlanMismatchError(
                f"this plan was made for another model: noise for {edit.tensor}[{edit.axis}] of {edit.size}, "
                f"the model has {size or 'no such axis'}"
            )
        if tensor.device.type != "meta":
            _add(tensor, edit)


def _add(tensor: Tensor, edit: Perturb) -> None:
    """Add noise, drawn on the CPU in float64, so that it is the same whatever the type and place of the tensor."""
    where = torch.tensor(edit.positions, dtype=torch.long, device=tensor.device)
    with torch.no_grad():
        copies = tensor.index_select(edit.axis, where)
        size = float(tensor.double().square().mean().sqrt())
        draw = torch.randn(copies.shape, generator=torch.Generator().manual_seed(edit.seed), dtype=torch.float64)
        noisy = (copies.double() + draw.to(tensor.device) * (edit.deviation * size)).to(tensor.dtype)
        tensor.index_copy_(edit.axis, where, noisy)
