"""A gated teacher and what its gates would save: all that is known of a search before a step is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from morph.batches import choose_target
from morph.counts import Counts, count
from morph.gate_sites import Site
from morph.gating import Gated, gate
from morph.inputs import Inputs, picked
from morph.policies import Metric
from morph.search_budget import Flat, Meter, check_budget
from morph.search_options import SearchOptions
from morph.search_schedule import floor_of


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """A gated teacher, counted.

    Attributes:
        gated: The gated model.
        flat: The order of its gates.
        alpha: By site, the weights of its gates in the penalty.
        counts: Of the teacher, one sample.
        meter: Counts what would come out.
        metric: Which size has a target.
        target: Largest size allowed.
        inputs: Two samples.
    """

    gated: Gated
    flat: Flat
    alpha: Mapping[str, Tensor]
    counts: Counts
    meter: Meter
    metric: Metric
    target: int
    inputs: Inputs


def open_space(
    teacher: nn.Module,
    inputs: Inputs,
    options: SearchOptions,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
) -> SearchSpace:
    """Gate a teacher and count; nothing is trained.

    Args:
        teacher: Not touched.
        inputs: Two samples or more.
        options: All numbers.
        target_macs: Largest number of multiply-adds of one sample, counted as ``options.count`` says, or
        target_params: largest number of parameters.

    Raises:
        TargetError: If there is not exactly one target, it is met already, or out of reach.
        TraceError, EditError, CountError: As `morph.gating.gate` and `morph.counts.count`.
    """
    metric, target = choose_target(target_params, target_macs)
    gated = gate(teacher, inputs)
    flat = Flat({site.name: site.gates for site in gated.sites})
    paper = options.count == "paper" and metric == "macs"
    meter = Meter(gated, flat, metric, gated.norm_operations if paper else None)
    what = "parameters" if metric == "params" else "multiply-adds" + (" by the paper's counting" if paper else "")
    check_budget(meter, target, what)
    alpha = gated.weights(options.weighting if options.weighted else "none")
    return SearchSpace(gated, flat, alpha, count(teacher, picked(inputs, slice(0, 1))), meter, metric, target, inputs)


def space_facts(space: SearchSpace) -> dict[str, Any]:
    """What a record says of the gates and of the teacher, before a step is made."""
    return {
        "gates_total": space.gated.total,
        "ungated": dict(space.gated.left),
        "macs_paper_before": with_norms(space.counts),
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "gates": site.gates,
                "alpha_min": round(float(space.alpha[site.name].min()), 6),
                "alpha_max": round(float(space.alpha[site.name].max()), 6),
            }
            for site in space.gated.sites
        ],
    }


def thin(sites: Sequence[Site], closed: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The sites where fewer gates stay open than `morph.search_schedule.floor_of` asks for."""
    still = [(site, site.gates - int(closed[site.name].sum())) for site in sites]
    return [
        {"site": site.name, "open": left, "gates": site.gates} for site, left in still if left < floor_of(site.gates)
    ]


def with_norms(counts: Counts) -> int:
    """Multiply-adds by the paper's counting: two more for each element of a batch norm."""
    return counts.macs + counts.elementwise.get("batch_norm", 0)


def drops(sites: Sequence[Site], closed: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """For each layer and each source that it reads, how many gates there are and how many are closed (Fig. 5)."""
    rows: dict[tuple[str, str, str], list[int]] = {}
    for site in sites:
        for source, shut in zip(site.sources, closed[site.name].tolist(), strict=True):
            row = rows.setdefault((site.module if site.kind == "connection" else site.name, source, site.kind), [0, 0])
            row[0] += 1
            row[1] += int(shut)
    return [
        {"layer": layer, "source": source, "kind": kind, "gates": gates, "closed": shut}
        for (layer, source, kind), (gates, shut) in rows.items()
    ]
