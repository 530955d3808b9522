"""Where gates go in a model that cannot be traced symbolically: on the weights that read what can be cut as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import nn

from morph.analysis.recording import Inputs, skeleton
from morph.couplings import Choice
from morph.errors import TraceError
from morph.gate_sites import Layout, Site, by_coupling, chosen_units, require_sites, why_not
from morph.readers import Reader, Survey
from morph.removal import Remover
from morph.weight_readers import survey


def lay_out_weights(model: nn.Module, inputs: Inputs, no_graph: TraceError) -> Layout:
    """Decide where gates go, one for each unit that can be cut, shared by all its readers.

    Nothing here can let one reader take fewer channels than another, drop a layer or a branch: that takes a graph.

    Args:
        model: Not touched.
        inputs: Example inputs.
        no_graph: Why there is no traced graph.

    Raises:
        TraceError: If the model does not accept the inputs, or looks at the values of tensors on its way.
        EditError: If there is no channel that can be gated.
    """
    found = survey(model, inputs)
    if found.analysis.recording.traced != "shapes":
        raise TraceError(
            f"{no_graph}; nor does it run without data, so that other values may take a way that was not looked at"
        ) from no_graph
    left = dict(found.unread)
    sites = tuple(_carried(model, inputs, found, tuple(by_coupling(found, chosen_units(found))), left))
    gated = {path for site in sites for path in site.readers}
    for reader in found.readers:
        if reader.path not in gated and not reader.through:
            left.setdefault(reader.path, _why(found, reader))
    require_sites(model, sites, left)
    return Layout(sites, found, {}, left, str(no_graph))


def _carried(
    model: nn.Module, inputs: Inputs, found: Survey, sites: Sequence[Site], left: dict[str, str]
) -> Iterator[Site]:
    """The sites whose units the code of the model can lose, by trying; other numbers of them at neighbouring sites."""
    analysis, choice = found.analysis, Choice()
    for number, site in enumerate(sites):
        some = site.units[: max(1, site.gates * (1 + number % 3) // 4)]
        choice[site.name] = np.flatnonzero(np.isin(analysis.numbers[site.name], some))
    alone = {name for name in choice if analysis.emptied({name: choice[name]})}
    reasons = dict.fromkeys(alone, "a layer would have nothing left")
    rest = {name: units for name, units in choice.items() if name not in alone}
    removed = Remover(skeleton(model), inputs, analysis, "class").remove(rest)
    reasons |= {whole.coupling: whole.reason for whole in removed.left}
    for site in sites:
        if site.name not in reasons:
            yield site
        for path in site.readers if site.name in reasons else ():
            left[path] = reasons[site.name]


def _why(found: Survey, reader: Reader) -> str:
    """Why what a reader reads has no gates."""
    units = set(reader.units.tolist())
    for name, numbers in found.analysis.numbers.items():
        statistics = found.analysis.couplings[name].statistics
        if statistics and not units.isdisjoint(numbers.tolist()):
            return f"a statistic runs over what it reads: {statistics[0]}"
    return why_not(reader)
