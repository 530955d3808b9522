"""Make a network deeper without changing what it computes: insert copies of residual blocks that add nothing yet.

The tensors that are zero in a copy get a gradient at the first backward pass, all others of the copy as soon as these
have moved. What is exact is the function in evaluation mode; in training mode a copy also hands on its input, but
dropout and stochastic depth in it draw random numbers of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import Tensor, nn

from morph.blocks import find_cells
from morph.copying import own_copy
from morph.counts import Counts, count
from morph.depth_policies import DepthMetric, DepthPolicy, DepthStep, decide_copies
from morph.errors import DataError, NothingToGrowError, TargetError
from morph.inputs import Inputs, arguments_of, picked
from morph.passes.regroup import Left
from morph.plan import Deepen, Plan, Record
from morph.policies import Fit
from morph.renaming import renamed_modules
from morph.residuals import CHANGES_SHAPE, Unit, find_units
from morph.scores import Loss, cross_entropy, fisher
from morph.surgery import Result, environment, operate, promise, require_size, sizes, target_facts
from morph.tracing import trace, try_inputs

LEARNING = (
    "in each copy the tensors named in zeroed get a gradient at the first backward pass, the others once these have "
    "moved; exact in evaluation mode: in training mode dropout and stochastic depth draw more random numbers"
)


def deepen(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    target_params: float | None = None,
    target_macs: float | None = None,
    blocks: int | None = None,
    fit: Fit = "first",
    policy: DepthPolicy = "uniform",
    data: tuple[Inputs, Tensor] | None = None,
    loss: Loss = cross_entropy,
    at: Sequence[str] | None = None,
    seed: int = 0,
    verify: bool = True,
) -> Result:
    """Insert copies of residual blocks until the model is as large as the target; its function stays as it is.

    A copy stands behind its source and has all that the source has (weights, normalisation statistics), but for the
    tensors that end its branch: these are zero, so that it hands on its input. Which they are is found by trying; see
    `morph.residuals`. Where settings alternate from block to block (shifted windows), pairs are copied together.

    Args:
        model: Not touched.
        example_inputs: One batch to try blocks with, to count and to verify: a tensor, a tuple of arguments, or a
            mapping of named ones; random numbers of the right shape will do.
        target_params: Number of parameters wanted; give this, ``target_macs`` or ``blocks``.
        target_macs: Multiply-adds of one sample wanted (1 multiply-add = 1).
        blocks: Number of blocks to insert.
        fit: Where to stop; see `morph.depth_policies.decide_copies`.
        policy: ``uniform`` gives one copy to each stage in turn, ``fisher`` deals copies in proportion to Fisher
            scores; see `morph.depth_policies.decide_copies`.
        data: ``(inputs, targets)`` for the Fisher probe, needed by that policy only.
        loss: Gives one value per sample from outputs and targets.
        at: Paths or shell patterns of the blocks that may be copied; None takes all.
        seed: Of the random numbers that blocks are tried with.
        verify: Whether to compare the function before and after, in float64, on ``example_inputs``.

    Returns:
        The deeper model and its record. Names of tensors behind an insertion may have moved: ``renamed`` in the record
        gives paths of modules, `morph.renaming.names_after` every tensor.

    Raises:
        TargetError: Not exactly one target, or one that cannot be met.
        NothingToGrowError: No block can be copied exactly; says why for each container.
        DataError: The policy needs data and there is none.
        TraceError, CountError, ProbeError: As their names say.
        CheckFailedError: The result does not compute what the model does, or is not of the size decided.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> deeper = morph.deepen(build("wrn-16-2"), torch.randn(2, 3, 32, 32), blocks=3)
        >>> deeper.record.before["params"], deeper.record.after["params"]
        (691674, 1079642)
    """
    metric, target = which_target(target_params, target_macs, blocks)
    for value, allowed in ((policy, get_args(DepthPolicy)), (fit, get_args(Fit))):
        if value not in allowed:
            raise TargetError(f"{value!r} is not one of {', '.join(allowed)}")
    if policy == "fisher" and data is None:
        raise DataError("the policy 'fisher' needs data: a pair of tensors (inputs, targets)")
    try_inputs(own_copy(model), *arguments_of(example_inputs))
    found, left = find_units(model, example_inputs, seed=seed)
    if not found:
        raise NothingToGrowError(_why_nothing(left))
    units = _chosen(found, at)
    before = count(model, picked(example_inputs, slice(0, 1)))
    scores = _scores(model, units, data, loss) if policy == "fisher" and data is not None else None
    start: dict[DepthMetric, int] = {"params": before.params, "macs": before.macs, "blocks": 0}
    stages = [unit.stage for unit in units]
    costs = [_cost(unit, before) for unit in units]
    steps = decide_copies(costs, stages, start, metric, target, fit=fit, scores=scores)
    plan = plan_of(units, steps)
    done = operate(model, plan, example_inputs, verify=verify)
    require_size(done.counts, steps[-1])
    record = Record(
        command="deepen",
        options={
            "policy": policy,
            f"target_{metric}": target,
            "fit": fit,
            "at": list(at) if at else None,
            "seed": seed,
            "verify": verify,
        },
        plan=plan,
        before=sizes(before),
        after=sizes(done.counts),
        checks=done.checks,
        details=_details(model, units, left, steps, scores, plan, metric, target)
        | {"verified": promise(done.checks, plan)},
        environment=environment(model, example_inputs),
    )
    return Result(done.model, record)


def which_target(params: float | None, macs: float | None, blocks: int | None) -> tuple[DepthMetric, int]:
    """The one target that was given.

    Raises:
        TargetError: If there is not exactly one.
    """
    options: list[tuple[DepthMetric, float | None]] = [("params", params), ("macs", macs), ("blocks", blocks)]
    given = [(metric, round(value)) for metric, value in options if value is not None]
    if len(given) != 1:
        raise TargetError("give one target: a number of parameters, of multiply-adds, or of blocks to insert")
    return given[0]


def plan_of(units: Sequence[Unit], steps: Sequence[DepthStep]) -> Plan:
    """One edit for each unit that ``steps`` copy, from the last to the first, so that no edit moves a later one."""
    copies = Counter(step.unit for step in steps)
    inserted: Counter[str] = Counter()
    edits = []
    for number in sorted(copies, reverse=True):
        unit, times = units[number], copies[number]
        length = unit.length + inserted[unit.container]
        edits.append(Deepen(unit.container, unit.blocks, times, unit.zeroed, length, unit.params))
        inserted[unit.container] += times * len(unit.blocks)
    return Plan(tuple(edits))


def _why_nothing(left: Sequence[Left]) -> str:
    """One line with a reason in each container, preferably not that a block changes the shape."""
    containers: dict[str, Left] = {}
    for item in sorted(left, key=lambda item: item.reason.startswith(CHANGES_SHAPE)):
        containers.setdefault(item.name.rpartition(".")[0], item)
    reasons = [f"{item.name}: {item.reason}" for item in containers.values()]
    more = f"; and {len(reasons) - 4} more containers" if len(reasons) > 4 else ""
    why = f" ({'; '.join(reasons[:4])}{more})" if reasons else " (it has no blocks in a Sequential or ModuleList)"
    return f"the model has no residual block of which a copy can be inserted exactly{why}"


def _chosen(units: Sequence[Unit], at: Sequence[str] | None) -> list[Unit]:
    """The units that one of the patterns names."""
    if at is None:
        return list(units)
    for pattern in at:
        if not any(fnmatchcase(path, pattern) for unit in units for path in unit.paths()):
            known = ", ".join(unit.paths()[-1] for unit in units[-3:])
            raise NothingToGrowError(f"--at {pattern}: names no block that can be copied; those are named like {known}")
    return [u for u in units if any(fnmatchcase(path, pattern) for path in u.paths() for pattern in at)]


def _scores(model: nn.Module, units: Sequence[Unit], data: tuple[Inputs, Tensor], loss: Loss) -> list[float]:
    """Fisher score of each unit: the mean over its blocks."""
    traced = trace(model, picked(data[0], slice(0, 2)))
    cells = find_cells(traced, [path for unit in units for path in unit.paths()])
    found = fisher(traced, cells, [data], loss).cells()
    return [sum(found[path] for path in unit.paths()) / len(unit.blocks) for unit in units]


def _cost(unit: Unit, counts: Counts) -> dict[DepthMetric, int]:
    """What one copy adds."""
    macs = sum(counts.by_module[path].macs for path in unit.paths())
    return {"params": unit.params, "macs": macs, "blocks": len(unit.blocks)}


def _details(
    model: nn.Module,
    units: Sequence[Unit],
    left: Sequence[Left],
    steps: Sequence[DepthStep],
    scores: Sequence[float] | None,
    plan: Plan,
    metric: DepthMetric,
    target: int,
) -> dict[str, Any]:
    """What the record says of this deepening."""
    copies = Counter(step.unit for step in steps)
    return {
        "weight_preserving": True,
        **target_facts(metric, target, getattr(steps[-1], metric)),
        "steps": [{**asdict(step), "unit": " + ".join(units[step.unit].paths())} for step in steps],
        "stages": _stages(units, copies),
        "units": [
            {
                "blocks": list(unit.paths()),
                "score": None if scores is None else scores[number],
                "copies": copies[number],
                "params_added": copies[number] * unit.params,
                "zeroed": list(unit.zeroed),
            }
            for number, unit in enumerate(units)
        ],
        "renamed": renamed_modules(model, plan),
        "training": LEARNING,
        "left": [asdict(item) for item in left],
    }


def _stages(units: Sequence[Unit], copies: Mapping[int, int]) -> list[dict[str, Any]]:
    """One row for each run of blocks of one shape: how many blocks it had, and has."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, unit in enumerate(units):
        first, last = unit.stage
        name = first if first == last else f"{first} to {last}"
        row = rows.setdefault(unit.stage, {"name": name, "blocks_before": 0, "blocks_after": 0, "params_added": 0})
        row["blocks_before"] += len(unit.blocks)
        row["blocks_after"] += len(unit.blocks) * (1 + copies[number])
        row["params_added"] += unit.params * copies[number]
    return list(rows.values())
