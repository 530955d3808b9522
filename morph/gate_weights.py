"""What closing each gate alone saves: the weights alpha_j of the L1 norm (Gu & Tresp, ECAI 2020, Eq. 3)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from morph.analysis import count_sizes
from morph.analysis.atoms import Labels
from morph.analysis.recording import Inputs
from morph.gate_sites import Layout

Measure = Literal["macs", "params", "memory", "latency", "none"]


def saved(layout: Layout, measure: Measure, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The saving of each gate over the largest one; see `morph.gating.Gated.weights`."""
    if measure == "none":
        return {site.name: torch.ones(site.gates) for site in layout.sites}
    analysis = layout.bordered.analysis

    def cost(times: Labels) -> float:
        return float(getattr(count_sizes(analysis, times), measure))

    final = analysis.state.atoms.roots()
    whole = cost(np.ones(len(final), np.int64))
    owner = {number: name for name, numbers in analysis.numbers.items() for number in numbers.tolist()}
    known: dict[str, float] = {}
    found: dict[str, list[float]] = {}
    for site in layout.sites:
        for unit in site.units.tolist():
            if owner[unit] not in known:  # units of a coupling lie on the same axes, so all save the same
                times = np.ones(len(final), np.int64)
                times[analysis.units.atom[analysis.units.unit == unit]] = 0
                known[owner[unit]] = whole - cost(times[final])
            found.setdefault(site.name, []).append(known[owner[unit]])
    most = max(max(values) for values in found.values())
    return {name: torch.tensor(values, dtype=torch.float64).div(most).float() for name, values in found.items()}
