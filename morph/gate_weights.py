"""What closing each gate alone saves: the weights alpha_j of the L1 norm (Gu & Tresp, ECAI 2020, Eq. 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from morph.analysis import Analysis, count_sizes
from morph.analysis.atoms import Labels
from morph.analysis.recording import Value
from morph.errors import TargetError
from morph.gate_latency import slopes
from morph.gate_sites import Layout

Measure = Literal["macs", "params", "memory", "latency", "none"]
_LEAST = 1e-3  # of the largest saving: what a gate counts whose saving the clock does not see


def saved(layout: Layout, measure: Measure, model: nn.Module) -> dict[str, Tensor]:
    """The saving of each gate over the largest one; see `morph.gating.Gated.weights`.

    Raises:
        TargetError: If ``measure`` is none of these.
    """
    if measure not in get_args(Measure):
        raise TargetError(f"weights are by {', '.join(get_args(Measure))}, got {measure!r}")
    if measure == "none":
        return {site.name: torch.ones(site.gates) for site in layout.sites}
    analysis = layout.bordered.analysis
    cost = _latency(layout, model) if measure == "latency" else _counted(analysis, measure)
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
    most = max(max(values) for values in found.values()) or 1.0
    least = _LEAST if measure == "latency" else 0.0
    return {name: torch.tensor(v, dtype=torch.float64).div(most).clamp(min=least).float() for name, v in found.items()}


def _counted(analysis: Analysis, measure: str) -> Callable[[Labels], float]:
    """A count as a function of what is left of each label."""

    def cost(times: Labels) -> float:
        if measure == "memory":
            return float(count_memory(analysis, times))
        return float(getattr(count_sizes(analysis, times), measure))

    return cost


def count_memory(analysis: Analysis, times: Labels) -> int:
    """Elements that convolutions, linear layers and matrix products read and give, of the whole batch analysed."""

    def elements(value: Value) -> int:
        return math.prod(int(times[a].sum()) if len(a) > 1 else len(a) for a in analysis.state.tag(value).axes)

    total = 0
    for entry in analysis.state.sums:
        call = analysis.recording.calls[entry.call]
        if len(entry.operands) > 1 and isinstance(call.output, Value):
            total += elements(entry.operands[0][0]) + elements(call.output)
    return total


def _latency(layout: Layout, model: nn.Module) -> Callable[[Labels], float]:
    """Seconds, by the measured slope of each layer."""
    readers = layout.bordered.readers
    slope = slopes(readers, model)

    def cost(times: Labels) -> float:
        return sum(
            slope[r.weight].read * float(times[r.roots].sum()) + slope[r.weight].made * float(times[r.made].sum())
            for r in readers
        )

    return cost
