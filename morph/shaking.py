"""Weights that are all zero hide what is behind them from a check: a copy of the model in which they are random."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from morph.plan import Check

SHAKEN = ", zero weights made random"


def shaken(model: nn.Module, seed: int = 0) -> nn.Module | None:
    """A copy of ``model`` whose parameters that are zero throughout are random; None if only biases are.

    Heads of vision transformers, last norms of residual branches and low-rank adapters are often zero at birth, and
    then outputs say little or nothing of what a surgery did in front of them.

    Args:
        model: Not touched.
        seed: Of the random values.
    """
    zero = {name for name, p in model.named_parameters() if p.is_floating_point() and not p.detach().any()}
    if all(name.rsplit(".", 1)[-1].endswith("bias") for name in zero):
        return None
    twin = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in zero:
                values = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values)
    return twin


def named_shaken(check: Check) -> Check:
    """The same check under a name that says on which weights it was made."""
    head, colon, rest = check.name.partition(":")
    return dataclasses.replace(check, name=head + SHAKEN + colon + rest)
