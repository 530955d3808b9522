"""Grow a model by two exact moves at once, merging groups and copying units, where each added parameter gains most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.analysis import Sizes
from morph.batches import Batch, Data, choose_target, describe_data, take_batches
from morph.blocks import find_cells
from morph.carriers import Form
from morph.copies import Widened
from morph.counts import Counts, count
from morph.cut import apply_plan
from morph.errors import NothingToGrowError, ProbeError, SymbolicTraceError, TargetError
from morph.expansion import cell_row, find_growable
from morph.gains import Copier, GainStep, unit_rows
from morph.inputs import picked
from morph.passes.regroup import Left
from morph.plan import Plan, Record
from morph.policies import Grouped, Ledger, Metric, Step
from morph.scores import FisherProbe, Loss, cross_entropy
from morph.surgery import Result, environment, operate, promise, sizes, target_facts
from morph.tracing import trace

COMPARED = 8  # samples, in float64
GAIN = (
    "Fisher scores, in the unit of the loss: 1/2 mean over samples of g**2, g the gradient of a gate at one, summed "
    "over the channels at the end of a cell whose groups are merged, or over the units that are copied (a unit that is "
    "there m times is doubled, and each of its m new copies counts 1/m**2). They say what the loss would lose without "
    "these channels, not what training will win"
)


def grow_by_gain(
    model: nn.Module,
    data: Data,
    *,
    target_params: float | None = None,
    target_macs: float | None = None,
    share: float = 1 / 8,
    at: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    form: Form = "auto",
    loss: Loss = cross_entropy,
    batch_size: int = 64,
    probe_batches: int = 1,
    seed: int = 0,
    verify: bool = True,
    on_step: Callable[[GainStep], None] = lambda step: None,
) -> Result:
    """Grow a model to a target by merging groups and by copying units, whichever gains more for what it adds.

    A step either merges the groups of all grouped convolutions of one cell (as `morph.expand`), or copies a share of
    the units of one coupling (as `morph.widen`), those of the highest Fisher score. Always taken is the step of the
    highest gain for each parameter (with ``target_macs``: multiply-add) that it adds; what it adds is counted, not
    estimated. Both moves leave the function as it is, so one probe tells the scores of the grown model too.

    Merging groups changes which units hang together. So where copies come next and groups were merged since the model
    was last analysed, it is analysed again, and copies are taken anew from there, in the same order: in the end no
    merge is left that fits and gains more for what it adds than a copy that was taken. What a merge adds is counted at
    the widths that the model came with, and the plan carries out merges before copies. The last step copies no more
    units than are needed. Only where copies do not make up the rest, more groups are merged, past the target if need
    be.

    Args:
        model: Not touched.
        data: What to probe with, as for `morph.expand`.
        target_params: Number of parameters wanted; give this or ``target_macs``.
        target_macs: Multiply-adds of one sample wanted (1 multiply-add = 1).
        share: Share of the units of a coupling that a step copies, in (0, 1].
        at: Names or patterns of the cells to probe; None takes each repeated block, and none where the model has no
            symbolic graph: then units are copied alone.
        ignore: Patterns of couplings to leave as they are.
        form: As for `morph.prune`.
        loss: Gives one value per sample from outputs and targets.
        batch_size: Samples in a batch.
        probe_batches: Batches to probe with.
        seed: Of the order of the data.
        verify: Whether to compare the function before and after, in float64.
        on_step: Told of each step that is carried out.

    Raises:
        TargetError: Not exactly one target, or one not above the present size or out of reach; a share out of range.
        NothingToGrowError: There is neither a group to merge nor a unit to copy exactly.
        ProbeError: A score is not finite, or all of them are zero.
        TraceError, CountError, DataError, EditError: As their names say.
        CheckFailedError: The result does not compute what the model does.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> batch = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
        >>> teacher = grow_by_gain(build("wrn-16-1"), batch, target_params=200e3)
        >>> teacher.record.after["params"] >= 200e3
        True
    """
    metric, target = choose_target(target_params, target_macs)
    if not 0 < share <= 1 or probe_batches < 1:
        raise TargetError(f"share must be in (0, 1] and probe_batches at least 1, got {share} and {probe_batches}")
    batches = take_batches(data, probe_batches, batch_size, seed, next(model.parameters()).device)
    inputs = batches[0][0]
    before = count(model, picked(inputs, slice(0, 1)))
    if target <= getattr(before, metric):
        present = f"the {getattr(before, metric):,} that the model has"
        raise TargetError(f"the target of {target:,} {metric} is not above {present}; growing only adds")
    convs, left, scores = _merges(model, batches, before, at, loss)
    copier = Copier(model, batches, Sizes(before.params, before.macs), metric, share, ignore, form, loss)
    _check_gains([scores[cell] for cell in convs if convs[cell]], copier)
    ledger = Ledger(convs, before.params, before.macs)
    growth = _chosen(ledger, scores, copier, metric, target)
    plan = Plan((*ledger.edits(growth.merges), *(growth.widened.plan.edits if growth.widened else ())))
    steps = [*_told(growth.merges, before, metric), *(growth.copier.steps if growth.widened else ())]
    for step in steps:
        on_step(step)
    done = operate(model, plan, picked(inputs, slice(0, COMPARED)), verify=verify)
    final = {module: groups for step in growth.merges for module, groups in step.groups.items()}
    skipped = [(item.name, item.reason) for item in left]
    skipped += [(item.coupling, item.reason) for item in growth.copier.left]
    asked = {f"target_{metric}": target, "share": share, "at": list(at) if at else None, "ignore": list(ignore)}
    probed = {"batch_size": batch_size, "probe_batches": probe_batches, "seed": seed}
    record = Record(
        command="grow",
        options={**asked, "form": form, **probed, "verify": verify},
        plan=plan,
        before=sizes(before),
        after=sizes(done.counts),
        checks=done.checks,
        details={
            "weight_preserving": True,
            "verified": promise(done.checks, plan),
            **target_facts(metric, target, getattr(done.counts, metric)),
            "scores": f"{GAIN}; divided by the {metric} that a step adds",
            "steps": [asdict(step) for step in steps],
            "cells": [cell_row(cell, some, final, scores[cell]) for cell, some in convs.items()],
            **_copied(growth, plan),
            "left": [{"name": name, "reason": reason} for name, reason in skipped],
        },
        environment={**environment(model, inputs), "data": describe_data(data)},
    )
    return Result(done.model, record)


def _merges(
    model: nn.Module, batches: Sequence[Batch], before: Counts, at: Sequence[str] | None, loss: Loss
) -> tuple[dict[str, list[Grouped]], list[Left], Mapping[str, float]]:
    """What can be merged in each cell, what cannot, and the score of each cell; no cells where there is no graph."""
    try:
        traced = trace(model, picked(batches[0][0], slice(0, 2)))
    except SymbolicTraceError:
        if at is not None:
            raise
        grouped = [name for name, m in model.named_modules() if isinstance(m, _ConvNd) and m.groups > 1]
        return {}, [Left(name, "it takes a symbolic graph to merge groups by cells") for name in grouped], {}
    cells = find_cells(traced, at)
    convs, left = find_growable(traced, cells, before)
    return convs, left, FisherProbe(traced, cells, loss).scores(batches).cells()


@dataclass(frozen=True)
class _Growth:
    """What was chosen: merges, and copies on the model that they lead to."""

    merges: list[Step]
    copier: Copier
    widened: Widened | None


def _chosen(ledger: Ledger, scores: Mapping[str, float], copier: Copier, metric: Metric, target: int) -> _Growth:
    """Choose merges and copies until the target is met.

    Raises:
        TargetError: If it is out of reach.
    """
    model = copier.model
    merges, copier = choose_jointly(ledger, scores, copier, metric, target)
    while getattr(ledger, metric) < target:
        try:
            return _Growth(merges, copier, copier.reach(target))
        except TargetError:  # copies alone do not make up the rest
            if not (offers := _offers(ledger, scores)):
                raise
            merges.append(max(offers, key=lambda step: _rate(step, ledger, metric)))
            ledger.take(merges[-1])
        copier = _merged(copier, model, ledger, merges)
    return _Growth(merges, copier, None)


def _merged(copier: Copier, model: nn.Module, ledger: Ledger, merges: Sequence[Step]) -> Copier:
    """Copies on the model that merges lead to: nothing is copied yet."""
    return copier.on(apply_plan(model, Plan(ledger.edits(merges))), Sizes(ledger.params, ledger.macs))


def _copied(growth: _Growth, plan: Plan) -> dict[str, Any]:
    """What the record says of the copies."""
    widened, analysis = growth.widened, growth.copier.analysis
    return {
        "couplings": unit_rows(analysis.couplings.values(), plan, growth.copier.copies) if widened else [],
        "form": widened.form if widened else "class",
        "why_graph": widened.why_graph if widened else "",
        "unknown_operators": dict(analysis.unknown),
    }


def choose_jointly(
    ledger: Ledger, scores: Mapping[str, float], copier: Copier, metric: Metric, target: int
) -> tuple[list[Step], Copier]:
    """Take merges and copies in one order, the highest gain for what it adds first, until the target is met.

    Merges that would lead past the target are passed over, as copies can meet it more closely. Where copies come next
    and groups were merged since the model was last analysed, it is analysed again, and copies are taken anew from
    there: those that come before the last merge come again, on units as they are now.

    Args:
        ledger: The groups of the model that came in; advanced by what is chosen.
        scores: Of each cell.
        copier: The copies on the model that came in.
        metric: What the target counts.
        target: Size wanted.

    Returns:
        The merges, and the copies on the model that they lead to.
    """
    model, merges, analysed = copier.model, list[Step](), 0
    start = getattr(ledger, metric)
    while (size := getattr(ledger, metric) - start + getattr(copier.sizes, metric)) < target:
        room = getattr(ledger, metric) + target - size
        fitting = [step for step in _offers(ledger, scores) if getattr(step, metric) <= room]
        merge = max(fitting, key=lambda step: _rate(step, ledger, metric), default=None)
        copies = copier.best()
        if merge is not None and (copies is None or _rate(merge, ledger, metric) >= copies.rate):
            ledger.take(merge)
            merges.append(merge)
        elif analysed < len(merges):
            copier, analysed = _merged(copier, model, ledger, merges), len(merges)
            start = getattr(ledger, metric)
        elif copies is not None:
            copier.take(copies)
        else:
            break
    return merges, copier if analysed == len(merges) else _merged(copier, model, ledger, merges)


def _offers(ledger: Ledger, scores: Mapping[str, float]) -> list[Step]:
    """The merges that could be next."""
    return [ledger.next_step(cell, scores[cell]) for cell in ledger.cells if ledger.can_grow(cell)]


def _rate(step: Step, ledger: Ledger, metric: Metric) -> float:
    """Gain of a merge for what it adds."""
    return (step.score or 0.0) / max(int(getattr(step, metric)) - int(getattr(ledger, metric)), 1)


def _check_gains(cells: Sequence[float], copier: Copier) -> None:
    """Refuse a model in which nothing can grow, and scores that rank nothing."""
    if not cells and not copier.free:
        first = copier.left[0].reason if copier.left else "it has no couplings"
        raise NothingToGrowError(
            f"the model has neither groups that can be merged nor units that can be copied exactly ({first})"
        )
    values = [*cells, *(float(scores.sum()) for scores in copier.scores.values())]
    if not all(map(math.isfinite, values)):
        raise ProbeError("a Fisher score is not finite; the weights or the images are too large")
    if not any(values):
        raise ProbeError("every Fisher score is 0, so nothing ranks what to grow; train the model first")


def _told(merges: Sequence[Step], before: Counts, metric: Metric) -> list[GainStep]:
    """The merges as steps of growth."""
    steps = []
    size = getattr(before, metric)
    for merge in merges:
        added, size = getattr(merge, metric) - size, getattr(merge, metric)
        steps.append(GainStep("regroup", merge.cell, merge.score or 0.0, added, merge.params, merge.macs))
    return steps
