"""Grow a student into its teacher: probe, decide, cut, verify, record (Whettam 2020, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.batches import Batch, Data, choose_target, describe_data, stream_batches
from morph.blocks import Cell, find_cells
from morph.counts import Counts, count
from morph.errors import NothingToGrowError, TargetError
from morph.inputs import picked
from morph.passes.regroup import Left, grouped_convolutions
from morph.plan import Plan, Record, Reinitialise
from morph.policies import Fit, Grouped, Ledger, Metric, Policy, Step, decide
from morph.scores import FisherProbe, Loss, cross_entropy
from morph.surgery import Result, environment, operate, promise, require_size, sizes, target_facts
from morph.tracing import Trace, trace

WIDEN = "widening is another move (--move widen, or morph.widen)"


def expand(
    model: nn.Module,
    data: Data,
    *,
    policy: Policy = "fisher",
    target_params: float | None = None,
    target_macs: float | None = None,
    fit: Fit = "first",
    at: Sequence[str] | None = None,
    reuse_scores: bool = False,
    reinit: bool = False,
    loss: Loss = cross_entropy,
    batch_size: int = 64,
    seed: int = 0,
    verify: bool = True,
    on_step: Callable[[Step], None] = lambda step: None,
) -> Result:
    """Grow a model by merging the groups of its grouped convolutions until it is as large as the target.

    Every step halves the groups (odd numbers: divides by the smallest prime factor) of all grouped convolutions of one
    cell, without changing what the model computes. Since neither activations nor their gradients move, the scores of a
    batch are those that the grown model would give, and the probe runs on the model that came in.

    Args:
        model: The student; not touched.
        data: What to probe with: an object with ``batches(batch_size, seed)`` such as `morph.data.LabelledImages`, a
            pair ``(inputs, targets [N, ...])``, or an iterable of such pairs (a DataLoader), which is gone through
            again and again. Inputs are a tensor, a tuple of arguments or a mapping of named ones, with the samples on
            the first axis of every tensor.
        policy: Which cell grows next; see `morph.policies.decide`.
        target_params: Number of parameters wanted; give this or ``target_macs``.
        target_macs: Multiply-adds of one sample wanted (1 multiply-add = 1).
        fit: Where to stop; see `morph.policies.decide`.
        at: Names or patterns of the modules or nodes to probe; None takes each repeated block.
        reuse_scores: Probe once and keep the scores, instead of a new batch before each step.
        reinit: Draw all weights afresh at the end: the untrained teacher.
        loss: Gives one value per sample from outputs and targets.
        batch_size: Samples in a probe batch.
        seed: Of the order of the data, the random policy, and ``reinit``.
        verify: Whether to compare the function before and after, in float64, on a probe batch.
        on_step: Told of each step, for progress displays.

    Raises:
        TargetError: Not exactly one target, or one that cannot be met.
        NothingToGrowError: No grouped convolution in any cell can be merged.
        TraceError, ProbeError, CountError, DataError: As their names say.
        CheckFailedError: The result does not compute what the model does, or is not of the size decided.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> student = build("darts-10")
        >>> images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
        >>> teacher = morph.expand(student, (images, labels), policy="uniform", target_params=1.4e6)
        >>> teacher.record.after["params"]
        1428452
    """
    metric, target = choose_target(target_params, target_macs)
    for value, allowed in ((policy, get_args(Policy)), (fit, get_args(Fit))):
        if value not in allowed:
            raise TargetError(f"{value!r} is not one of {', '.join(allowed)}")
    require_groups(model)
    stream = stream_batches(data, batch_size, seed, next(model.parameters()).device)
    batch = next(stream)
    traced = trace(model, picked(batch[0], slice(0, 2)))
    cells = find_cells(traced, at)
    before = count(model, picked(batch[0], slice(0, 1)))
    convs, left = find_growable(traced, cells, before)
    _check_growable(convs, left)
    ledger = Ledger(convs, before.params, before.macs)
    prober = _Prober(FisherProbe(traced, cells, loss), batch, stream, reuse=reuse_scores)
    steps = decide(ledger, policy, metric, target, fit=fit, seed=seed, probe=prober, on_step=on_step)
    plan = Plan((*ledger.edits(steps), *([Reinitialise(seed)] if reinit else [])))
    done = operate(model, plan, batch[0], verify=verify)
    require_size(done.counts, steps[-1])
    record = Record(
        command="expand",
        options={
            "policy": policy,
            f"target_{metric}": target,
            "fit": fit,
            "at": list(at) if at else None,
            "reuse_scores": reuse_scores,
            "reinit": reinit,
            "batch_size": batch_size,
            "seed": seed,
            "verify": verify,
        },
        plan=plan,
        before=sizes(before),
        after=sizes(done.counts),
        checks=done.checks,
        details=_details(steps, cells, convs, left, prober, metric, target) | {"verified": promise(done.checks, plan)},
        environment={**environment(model, batch[0]), "data": describe_data(data)},
    )
    return Result(done.model, record)


class _Prober:
    """Gives fresh scores before each step, or the first ones again; keeps the mean of all that it saw."""

    def __init__(self, probe: FisherProbe, first: Batch, stream: Iterator[Batch], *, reuse: bool) -> None:
        self.probe, self.reuse = probe, reuse
        self.batch: Batch | None = first
        self.stream = stream
        self.passes = 0
        self.totals: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    def __call__(self) -> Mapping[str, float]:
        if self.latest and self.reuse:
            return self.latest
        batch = self.batch or next(self.stream)
        self.batch = None
        self.latest = self.probe.scores([batch]).cells()
        self.passes += 1
        self.totals = {name: self.totals.get(name, 0.0) + value for name, value in self.latest.items()}
        return self.latest

    def mean(self, cell: str) -> float | None:
        """The mean score of ``cell`` over all passes; None if there was none."""
        return self.totals[cell] / self.passes if self.passes else None


def find_growable(traced: Trace, cells: Sequence[Cell], counts: Counts) -> tuple[dict[str, list[Grouped]], list[Left]]:
    """The convolutions of each cell whose groups can be merged exactly, and those that are left whole, with why."""
    names, left = grouped_convolutions(traced)
    owner = {module: cell.name for cell in cells for module in cell.modules}
    left += [Left(name, "outside every probed cell; probe it with --at") for name in names if name not in owner]
    convs: dict[str, list[Grouped]] = {cell.name: [] for cell in cells}
    for name in names:
        if name in owner:
            conv = traced.graph_module.get_submodule(name)
            assert isinstance(conv, _ConvNd)
            macs = counts.by_module[name].macs
            convs[owner[name]].append(Grouped(name, conv.groups, tuple(conv.weight.shape), conv.weight.numel(), macs))
    return convs, left


def require_groups(model: nn.Module) -> None:
    """Refuse a model without a single grouped convolution, before any data is looked for.

    Raises:
        NothingToGrowError: If there is none.
    """
    if not any(isinstance(module, _ConvNd) and module.groups > 1 for module in model.modules()):
        raise NothingToGrowError(f"{type(model).__name__} has no grouped convolution to merge; {WIDEN}")


def _check_growable(convs: Mapping[str, Sequence[Grouped]], left: Sequence[Left]) -> None:
    """Refuse a model in which nothing can be merged."""
    if not any(convs.values()):
        why = f" ({len(left)} left whole, the first: {left[0].name}: {left[0].reason})" if left else ""
        raise NothingToGrowError(f"the model has no grouped convolution that can be merged in its cells{why}; {WIDEN}")


def _details(
    steps: Sequence[Step],
    cells: Sequence[Cell],
    convs: Mapping[str, Sequence[Grouped]],
    left: Sequence[Left],
    prober: _Prober,
    metric: Metric,
    target: int,
) -> dict[str, Any]:
    """What the record says of this expansion."""
    final = {module: groups for step in steps for module, groups in step.groups.items()}
    return {
        **target_facts(metric, target, getattr(steps[-1], metric)),
        "probe_passes": prober.passes,
        "scores": _how_scored(prober),
        "steps": [asdict(step) for step in steps],
        "cells": [cell_row(cell.name, convs[cell.name], final, prober.mean(cell.name)) for cell in cells],
        "left": [asdict(item) for item in left],
    }


def _how_scored(prober: _Prober) -> str:
    """One sentence on where the scores come from."""
    if not prober.passes:
        return "none: the policy does not ask for any"
    invariant = (
        "merging groups changes neither activations nor their gradients, "
        "so the scores of the grown model are those of the model that came in"
    )
    if prober.reuse:
        return f"one probe batch, its scores reused for every step: {invariant}"
    return f"a new batch before each step ({prober.passes} probe passes): {invariant}; only the batch moves them"


def cell_row(name: str, convs: Sequence[Grouped], final: Mapping[str, int], score: float | None) -> dict[str, Any]:
    """One cell of a record: mixed groups are given by their largest."""
    after = {conv.module: final.get(conv.module, conv.groups) for conv in convs}
    return {
        "name": name,
        "score": score,
        "groups_before": max((conv.groups for conv in convs), default=None),
        "groups_after": max(after.values(), default=None),
        "params_added": sum(conv.params * (conv.groups // after[conv.module] - 1) for conv in convs),
        "convolutions": len(convs),
    }
