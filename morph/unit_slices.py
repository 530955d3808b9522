"""Cut what belongs to each unit out of values that have the shape of a parameter."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor

from morph.couplings import Coupling, Place, Positions


def parameter_places(coupling: Coupling, parameters: Container[str]) -> list[Place]:
    """The places of a coupling that are parameters, not buffers."""
    return [place for place in coupling.places if place.tensor in parameters]


def unit_sums(values: Tensor, place: Place) -> Tensor:
    """Add up the entries of each unit.

    Args:
        values: One value for each entry of the tensor of ``place``.
        place: Where the units lie on it.

    Returns:
        float64 ``[units]``, on the CPU.
    """
    others = [axis for axis in range(values.dim()) if axis != place.axis]
    line = values.sum(others, dtype=torch.float64) if others else values.double()
    return gather_units(line, place.positions)


def gather_units(values: Tensor, positions: Positions) -> Tensor:
    """Add up the positions of each unit on the last axis: ``[..., width]`` and ``[units, k]`` give ``[..., units]``."""
    index = torch.from_numpy(positions.reshape(-1)).to(values.device)
    picked = values.double().index_select(-1, index)
    return picked.reshape(*picked.shape[:-1], *positions.shape).sum(-1).cpu()
