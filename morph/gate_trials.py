"""Which gates inside modules, or on weights that functions read, a traced graph can lose: found by trying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from morph.analysis.recording import skeleton
from morph.errors import EditError
from morph.gate_removal import bare_graph, graph_plan, plan_removal
from morph.gate_sites import Layout, Site, require_sites
from morph.liveness import Liveness


def without_fixed(layout: Layout, model: nn.Module) -> Layout:
    """A layout without the sites whose channels the graph cannot lose, such as heads of a function of torchvision's.

    Only sites whose readers no node calls are tried: what the others lose is not hidden in a single node.

    Args:
        layout: Of a traced graph.
        model: Not touched.

    Raises:
        EditError: If nothing is left to gate.
    """
    inner = {reader.weight for reader in layout.bordered.readers if reader.inner}
    sites = [site for site in layout.sites if site.taps[0].reader in inner]
    if not sites or not _why_not(layout, model, sites):
        return layout
    reasons = {site.name: _why_not(layout, model, [site]) for site in sites}
    fixed = [site for site in sites if reasons[site.name]]
    pinned = layout.bordered.pinned.copy()
    for site in fixed:
        pinned[site.units] = True
    kept = tuple(site for site in layout.sites if site not in fixed)
    left = {**layout.left, **{tap.reader: reasons[site.name] for site in fixed for tap in site.taps}}
    require_sites(model, kept, left)
    return replace(layout, sites=kept, bordered=replace(layout.bordered, pinned=pinned), left=left)


def _why_not(layout: Layout, model: nn.Module, sites: Sequence[Site]) -> str:
    """Why the graph cannot lose some gates of each of these sites, other numbers at neighbouring ones; or nothing."""
    ones = {site.name: torch.ones(site.gates) for site in layout.sites}
    shut = {site.name: max(1, site.gates * (1 + number % 3) // 4) for number, site in enumerate(sites)}
    closed = {site.name: torch.arange(site.gates) < shut[site.name] for site in sites}
    closing = Liveness(layout).close(closed, ones)
    bare = skeleton(model)
    removal = plan_removal(layout, closing, ones, bare)
    try:
        graph_plan(layout, closing, removal, bare_graph(bare))
    except EditError as error:
        return str(error)
    return ""
