"""Carry out a plan: cut a copy, count, verify. Every surgery, decided or replayed, goes through here."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from morph.analysis import analyse
from morph.analysis.edits import closes_gates, drops, times_of
from morph.analysis.recording import Inputs, arguments_of, named_tensors, tensors_of
from morph.copying import own_copy
from morph.counts import Counts, count
from morph.cut import apply_plan
from morph.errors import CheckFailedError
from morph.graphs import graph_of
from morph.plan import (
    Check,
    DropBranch,
    Perturb,
    Plan,
    PutLabelHead,
    PutVotingHead,
    Record,
    Reinitialise,
    Resize,
    Substitute,
    SwapHead,
    UseGraph,
)
from morph.removal import LIMIT as CUT_LIMIT
from morph.removal import compare, compare_cut, run_silenced
from morph.tracing import try_inputs
from morph.verify import require, same_function
from morph.zeroing import double_copy, run_doubled

NOISE = "noise was added to the copies, so the new model computes something a little else, as the last check tells"


@dataclass(frozen=True)
class Result:
    """A model that went through surgery.

    Attributes:
        model: A new module of the same class, or its traced graph if the record says so. Parameters keep their names,
            unless blocks were inserted or put in the place of others.
        record: What was decided, done and measured.
    """

    model: nn.Module
    record: Record


@dataclass(frozen=True)
class Operated:
    """What `operate` gives: the new model, its counts, and what was checked."""

    model: nn.Module
    counts: Counts
    checks: tuple[Check, ...]


def operate(model: nn.Module, plan: Plan, inputs: Inputs, *, verify: bool) -> Operated:
    """Apply ``plan`` to a copy of ``model``, count it, and compare the function of the edits that must preserve it.

    Raises:
        PlanMismatchError, EditError, CountError: As `morph.cut.apply_plan` and `morph.counts.count`.
        CheckFailedError: If an edit that must preserve the function did not.
    """
    preserving = plan.preserving()
    grown = apply_plan(model, preserving)
    checks: tuple[Check, ...] = ()
    if verify:
        resizes = [edit for edit in preserving.edits if isinstance(edit, Resize)]
        if closes_gates(preserving):
            checks = (_silenced(model, preserving, inputs),)
        elif drops(resizes):
            checks = (_zeroing(model, grown, resizes, inputs),)
        else:
            checks = same_function(model, grown, inputs)
    require(checks)
    if preserving != plan:
        grown = apply_plan(model, plan)
        if verify and any(isinstance(edit, Perturb) for edit in plan.edits):
            checks = (*checks, moved_by_noise(model, grown, inputs))
    require(checks)
    return Operated(grown, count(grown, inputs), checks)


def moved_by_noise(model: nn.Module, noisy: nn.Module, inputs: Inputs) -> Check:
    """How far noise on the copies has moved the outputs: told, not limited."""
    return compare("outputs, moved by the noise", run_doubled(model, inputs), noisy, inputs, None)


def _zeroing(model: nn.Module, cut: nn.Module, edits: list[Resize], inputs: Inputs) -> Check:
    """Compare a cut model with the model before whose readers see zero in place of what was cut."""
    try:
        analysis = analyse(model, inputs)
        return compare_cut(cut, edits, times_of(analysis.state, edits), model, inputs, analysis)
    except RuntimeError:  # code that does other things where there is no data
        analysis = analyse(model, inputs, with_data=True)
        return compare_cut(cut, edits, times_of(analysis.state, edits), model, inputs, analysis)


def _silenced(model: nn.Module, plan: Plan, inputs: Inputs) -> Check:
    """Compare a model without its closed gates with the model before whose weights are zero where they were cut."""
    twin = double_copy(model)
    cut = apply_plan(twin, plan)
    if any(isinstance(edit, UseGraph) for edit in plan.edits):  # which has tensors that the code makes
        model = graph_of(twin)
    resizes = [edit for edit in plan.edits if isinstance(edit, Resize)]
    tensors = dict(named_tensors(model))
    names = [f"{edit.module}.weight" for edit in plan.edits if isinstance(edit, DropBranch)]
    resizes += [Resize(name, 0, len(tensors[name]), ()) for name in names]
    return compare("parameters set to zero", run_silenced(resizes, model, inputs), cut, inputs, CUT_LIMIT)


def replay(model: nn.Module, plan: Plan, inputs: Inputs, *, verify: bool = True) -> Result:
    """Carry out a saved plan on a model that it fits.

    Args:
        model: Not touched.
        plan: As `morph.plan.load_plan` gives it.
        inputs: One batch to count and to verify with: a tensor, a tuple of arguments, or a mapping of named arguments;
            random numbers of the right shape will do.
        verify: Whether to compare the function before and after.

    Raises:
        TraceError: If the model does not accept ``inputs``.
        PlanMismatchError, EditError, CountError, CheckFailedError: As `operate`.
    """
    try_inputs(own_copy(model), *arguments_of(inputs))  # a run may write into it
    before = count(model, inputs)
    done = operate(model, plan, inputs, verify=verify)
    record = Record(
        command="apply",
        options={"verify": verify},
        plan=plan,
        before=sizes(before),
        after=sizes(done.counts),
        checks=done.checks,
        details={"verified": promise(done.checks, plan)},
        environment=environment(model, inputs),
    )
    return Result(done.model, record)


def sizes(counts: Counts) -> dict[str, int]:
    """What a record says of a model's size."""
    return {"params": counts.params, "macs": counts.macs}


class Sized(Protocol):
    """Whatever says how large a model is."""

    @property
    def params(self) -> int:
        """Number of parameters."""

    @property
    def macs(self) -> int:
        """Multiply-adds of one sample."""


def require_size(counts: Sized, decided: Sized) -> None:
    """Refuse a model that, counted afresh, is not of the size that was decided.

    Raises:
        CheckFailedError: If it is not.
    """
    if (counts.params, counts.macs) != (decided.params, decided.macs):
        raise CheckFailedError(
            f"check failed: the new model has {counts.params:,} parameters and {counts.macs:,} multiply-adds, "
            f"{decided.params:,} and {decided.macs:,} were decided; nothing is returned or written"
        )


def target_facts(metric: str, target: float, size: int) -> dict[str, Any]:
    """What a record says of a target and of the size that came out."""
    return {
        "target": target,
        "target_metric": metric,
        "distance": size - target,
        "distance_relative": (size - target) / target,
    }


def promise(checks: tuple[Check, ...], plan: Plan) -> str:
    """What was checked, in words."""
    if not checks:
        return "not verified: switched off"
    text = "outputs and input gradients in evaluation mode, float64, before and after"
    if closes_gates(plan) or drops([edit for edit in plan.edits if isinstance(edit, Resize)]):
        text = (
            "outputs in evaluation mode, float64: equal to those of the model before with zeros where its readers saw "
            "what was cut"
        )
    if any(isinstance(edit, Reinitialise) for edit in plan.edits):
        return (
            f"{text}; then all weights were drawn afresh, by their modules' reset_parameters or, where there is none, "
            "from a normal distribution of their mean and deviation before, so the new model computes something else"
        )
    if any(isinstance(edit, Perturb) for edit in plan.edits):
        return f"{text}; then {NOISE}"
    if any(isinstance(edit, SwapHead | PutLabelHead | PutVotingHead) for edit in plan.edits):
        return text + "; then the classifier was changed, so the new model computes something else"
    if any(isinstance(edit, Substitute) for edit in plan.edits):
        return text + "; then blocks were put in with fresh weights, so the new model computes something else"
    return text


def environment(model: nn.Module, inputs: Inputs) -> Mapping[str, Any]:
    """Versions, device, model, and the shape of one sample of the first input, for a record."""
    first = next(iter(tensors_of(arguments_of(inputs))), torch.zeros(1))
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(first.device),
        "model": type(model).__name__,
        "training_flag": model.training,
        "input_shape": list(first.shape[1:]),
    }
