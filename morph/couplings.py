"""What an analysis says: which positions of which tensors hang together, and what must stay whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
Choice = dict[str, Positions]  # coupling name -> numbers of the units meant


@dataclass(frozen=True, eq=False)
class Place:
    """Where the units of a coupling lie on one axis of one parameter or buffer.

    Attributes:
        tensor: Its name in ``named_parameters`` or ``named_buffers``.
        axis: The axis, counted from 0.
        positions: ``[units, k]``: row ``u`` holds the ``k`` positions that unit ``u`` takes on that axis.
    """

    tensor: str
    axis: int
    positions: Positions


@dataclass(frozen=True, eq=False)
class Reader:
    """A module that sums over the units of a coupling: removing a unit means that it reads zero in their place.

    Attributes:
        module: Path of the module.
        axis: The axis of its first input on which the units lie, counted from 0.
        positions: ``[units, k]``, as for `Place`.
    """

    module: str
    axis: int
    positions: Positions


@dataclass(frozen=True, eq=False)
class Coupling:
    """Units of the same shape, on the same axes: channels of a layer or residual stream, positions in a group, heads.

    A unit is the smallest thing that can be removed, copied or gated exactly. All units of a coupling take the same
    number of positions on the same axes.

    Attributes:
        name: The first place, as ``tensor[axis]``; unique in an analysis.
        units: How many units there are.
        places: Every axis of every parameter and buffer that they lie on.
        readers: The modules that sum over them.
        statistics: Normalisations and other statistics that run over them, as ``operator at file:line``; removing a
            unit changes these for the units that stay. Empty for most channels.
        overlaps: Names of the couplings that share positions with this one (heads, and the positions inside a head).
        blocks: In how many equal blocks (groups, heads) each unit has a position: 1 for a plain channel.
    """

    name: str
    units: int
    places: tuple[Place, ...]
    readers: tuple[Reader, ...]
    statistics: tuple[str, ...]
    overlaps: tuple[str, ...]
    blocks: int


@dataclass(frozen=True)
class Frozen:
    """Why some positions must stay.

    Attributes:
        reason: The operator that pins them, and how.
        where: The user's line, as ``file:line, in function``; empty if there is none.
        module: Path of the module in which that happens.
        positions: How many positions of parameters it pins first.
    """

    reason: str
    where: str
    module: str
    positions: int
