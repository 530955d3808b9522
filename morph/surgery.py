"""Carry out a plan: cut a copy, count, verify. Every surgery, decided or replayed, goes through here."""

from __future__ import annotations

import copy
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from morph.analysis import analyse
from morph.analysis.edits import closes_gates, drops, times_of
from morph.counts import Counts, count
from morph.cut import apply_plan
from morph.plan import Check, Plan, Record, Reinitialise, Resize, Substitute
from morph.removal import LIMIT as CUT_LIMIT
from morph.removal import compare, run_silenced
from morph.tracing import try_inputs
from morph.verify import require, same_function
from morph.zeroing import run_zeroed


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


def operate(model: nn.Module, plan: Plan, inputs: Tensor, *, verify: bool) -> Operated:
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
    return Operated(grown, count(grown, inputs[:1]), checks)


def _zeroing(model: nn.Module, cut: nn.Module, edits: list[Resize], inputs: Tensor) -> Check:
    """Compare a cut model with the model before whose readers see zero in place of what was cut."""
    state = analyse(model, inputs).state
    wanted = run_zeroed(state, model, inputs, times_of(state, edits))
    return compare("zeroing reference", wanted, cut, inputs, CUT_LIMIT)


def _silenced(model: nn.Module, plan: Plan, inputs: Tensor) -> Check:
    """Compare a model without its closed gates with the model before whose weights are zero where they were cut."""
    cut = apply_plan(copy.deepcopy(model).double(), plan)
    return compare("parameters set to zero", run_silenced(plan, model, inputs), cut, inputs, CUT_LIMIT)


def replay(model: nn.Module, plan: Plan, inputs: Tensor, *, verify: bool = True) -> Result:
    """Carry out a saved plan on a model that it fits.

    Args:
        model: Not touched.
        plan: As `morph.plan.load_plan` gives it.
        inputs: One batch to count and to verify with; random numbers of the right shape will do.
        verify: Whether to compare the function before and after.

    Raises:
        TraceError: If the model does not accept ``inputs``.
        PlanMismatchError, EditError, CountError, CheckFailedError: As `operate`.
    """
    try_inputs(model, (inputs,))
    before = count(model, inputs[:1])
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
        return text + "; then all weights were drawn afresh, so the new model computes something else"
    if any(isinstance(edit, Substitute) for edit in plan.edits):
        return text + "; then blocks were put in with fresh weights, so the new model computes something else"
    return text


def environment(model: nn.Module, inputs: Tensor) -> Mapping[str, Any]:
    """Versions, device and model, for a record."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(inputs.device),
        "model": type(model).__name__,
        "training_flag": model.training,
        "input_shape": list(inputs.shape[1:]),
    }
