"""What training keeps beside the weights, carried through a plan: optimizer state, schedulers, averaged copies.

Where a position is copied ``n`` times and each copy has the factor ``s`` (its weight is ``s`` times the old one), the
chain rule says that the old gradient is the sum over the copies of ``s`` times the gradient of each. The copies of a
unit do the same work, so each has the gradient ``g / (n s)``: ``g / n`` where a unit is made (``s = 1``), ``g`` where
it is read (``s = 1 / n``). State that is linear in the gradient, such as momentum, is multiplied by ``1 / (n s)``,
state that is quadratic in it by the square of that.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from morph.cut import apply_plan
from morph.errors import EditError
from morph.lineages import Origin, origins
from morph.passes.regroup import merge_groups
from morph.plan import Plan, Record, Regroup, Resize
from morph.tensor_edits import edit_tensor

# How state grows with the gradient, by the names that torch's optimizers give it: the power of the gradient in it.
_POWERS = {
    "momentum_buffer": 1,
    "exp_avg": 1,
    "grad_avg": 1,
    "exp_inf": 1,
    "prev": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "square_avg": 2,
    "sum": 2,
    "variance": 2,
    "row_var": 2,
    "col_var": 2,
}
_Scheduler = TypeVar("_Scheduler", bound=LRScheduler)


def transplant(optimizer: Optimizer, record: Record | Plan, *, before: nn.Module, after: nn.Module) -> Optimizer:
    """Make the optimizer of an edited model, with the state that the old one had gathered.

    The new optimizer is of the same class. Its groups hold the parameters that came from those of the old groups, in
    the order of the new model, with all options (``lr``, ``initial_lr``, ``betas``, ``fused``, ...). Copies of a block
    and a block in the place of a convolution join the group of what they were made from.

    State of a parameter's shape is kept, dropped and copied as the parameter is. It is scaled as the gradient is (see
    the text of this module) where its name is one of torch's: momentum and first moments, second moments; the moving
    average of the weights (`torch.optim.ASGD`) is scaled as the weights are. State under any other name, and state that
    does not grow with the gradient, is gathered and not scaled. Steps and other single numbers are copied. Parameters
    that are new start without state, and so do all after a fresh draw; where groups of a convolution are merged, the
    state of its new entries is zero. Means over an axis (`torch.optim.Adafactor`) are scaled by the mean factor, which
    is exact where all positions of that axis are copied equally often.

    The scaling is exact where the copies of a unit share its work equally: where factors are not equal, or one is
    zero, it is an approximation. After units were removed the state is that of the positions that are left.

    Hooks on the old optimizer are not carried, and neither are gradients. Neither the old optimizer nor a model is
    touched.

    Args:
        optimizer: What trained ``before``.
        record: What was done, or its plan.
        before: The model that came in.
        after: The model that came out.

    Raises:
        EditError: If the optimizer holds parameters that are not in ``before``, keeps state that belongs to no single
            parameter (`torch.optim.LBFGS`) or has no known shape, or cannot be built again from its options.
        PlanMismatchError: If the record does not lead from ``before`` to ``after``.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, LBFGS) or any(not isinstance(key, Tensor) for key in optimizer.state):
        raise EditError(
            f"{kind} keeps state that belongs to no single parameter, so it cannot be carried; build a new one over "
            f"the new model"
        )
    parameters = dict(before.named_parameters(remove_duplicate=False))
    _check_members(optimizer, before)
    found = origins(before, after, record if isinstance(record, Plan) else record.plan)
    group_of = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in optimizer.param_groups]
    for name, parameter in after.named_parameters():
        place = group_of.get(id(parameters[found[name].source]))
        if place is not None:
            members[place].append((name, parameter))
    new = _rebuild(optimizer, members)
    for group in members:
        for name, parameter in group:
            origin = found[name]
            old = parameters[origin.source]
            if not origin.fresh and old in optimizer.state:
                new.state[parameter] = _carried(optimizer, name, old, origin)
    return new


def move_scheduler(scheduler: _Scheduler, optimizer: Optimizer) -> _Scheduler:
    """A copy of a learning-rate scheduler that goes on where it was, on another optimizer.

    Args:
        scheduler: Any scheduler of torch, also one made of others; not touched.
        optimizer: What `transplant` made of the scheduler's optimizer.

    Raises:
        EditError: If the optimizer has another number of groups.
    """
    old = scheduler.optimizer
    if len(old.param_groups) != len(optimizer.param_groups):
        raise EditError(
            f"{type(scheduler).__name__} drives an optimizer of {len(old.param_groups)} groups, the new one has "
            f"{len(optimizer.param_groups)}; give what transplant made of the first"
        )
    if hasattr(old.step, "_wrapped_by_lr_sched"):
        _Still(optimizer)
    if getattr(old, "_opt_called", False):
        optimizer._opt_called = True  # type: ignore[attr-defined]
    return _moved(scheduler, optimizer)


def carry_model(model: nn.Module, record: Record | Plan) -> nn.Module:
    """Apply to a copy of a model, such as a moving average of its weights, what was done to the model itself.

    Args:
        model: A module of the same structure, or a `torch.optim.swa_utils.AveragedModel` of one (how many models it
            has averaged is kept); not touched.
        record: What was done, or its plan.

    Raises:
        PlanMismatchError, EditError: As `morph.cut.apply_plan`.
    """
    plan = record if isinstance(record, Plan) else record.plan
    if not isinstance(model, AveragedModel):
        return apply_plan(model, plan)
    return copy.deepcopy(model, {id(model.module): apply_plan(model.module, plan)})


def _check_members(optimizer: Optimizer, before: nn.Module) -> None:
    """Refuse an optimizer of another model."""
    known = {id(parameter) for parameter in before.parameters()}
    total = sum(len(group["params"]) for group in optimizer.param_groups)
    foreign = [
        (group["param_names"][k] + ", " if "param_names" in group else "") + f"group {i}, {list(parameter.shape)}"
        for i, group in enumerate(optimizer.param_groups)
        for k, parameter in enumerate(group["params"])
        if id(parameter) not in known
    ]
    if foreign:
        raise EditError(
            f"{len(foreign)} of the {total} parameters of {type(optimizer).__name__} are not in the model before the "
            f"surgery ({'; '.join(foreign[:3])}); give the model that it was built over"
        )


def _rebuild(optimizer: Optimizer, members: list[list[tuple[str, nn.Parameter]]]) -> Optimizer:
    """An optimizer of the same class and options over other parameters, without state."""
    groups: list[dict[str, Any]] = []
    for group, some in zip(optimizer.param_groups, members, strict=True):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        chosen: list[Any] = some if "param_names" in group else [parameter for _, parameter in some]
        groups.append({"params": chosen, **copy.deepcopy(options)})
    wanted = inspect.signature(type(optimizer).__init__).parameters
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in wanted.values())
    defaults = {key: value for key, value in optimizer.defaults.items() if open_ended or key in wanted}
    try:
        return type(optimizer)(groups, **copy.deepcopy(defaults))
    except Exception as error:
        raise EditError(
            f"{type(optimizer).__name__} cannot be built again from its options ({error}); build a new one over the "
            f"new model"
        ) from error


def _carried(optimizer: Optimizer, name: str, old: nn.Parameter, origin: Origin) -> dict[str, Any]:
    """The state of one parameter after its edits."""
    state: Mapping[str, Any] = optimizer.state[old]
    return {
        key: _carried_value(value, old, origin, _power(optimizer, key), f"{key} of {name}")
        if isinstance(value, Tensor) and key != "step"
        else copy.deepcopy(value)
        for key, value in state.items()
    }


def _power(optimizer: Optimizer, key: str) -> int | None:
    """The power of the gradient in a state; None for state that is like a weight."""
    if isinstance(optimizer, ASGD) and key == "ax":
        return None
    if isinstance(optimizer, RMSprop) and key == "momentum_buffer":
        return 0  # of gradients over their own size
    return _POWERS.get(key, 0)


def _carried_value(value: Tensor, old: nn.Parameter, origin: Origin, power: int | None, what: str) -> Tensor:
    """Apply the edits of a parameter to one tensor of its state."""
    value = value.detach().clone()
    shape = old.shape
    for edit in origin.edits:
        if value.shape != shape and value.numel() == 1:
            return value
        reduced = value.dim() == len(shape) and all(k in (1, n) for k, n in zip(value.shape, shape, strict=True))
        if isinstance(edit, Resize) and reduced:
            scaled = edit if power is None else dataclasses.replace(edit, scale=_factors(edit, power))
            if value.shape[edit.axis] == shape[edit.axis]:
                value = edit_tensor(value, scaled)
            elif scaled.scale:
                value = value * (sum(scaled.scale) / len(scaled.scale))
            shape = torch.Size([*shape[: edit.axis], len(edit.index), *shape[edit.axis + 1 :]])
        elif isinstance(edit, Regroup) and value.shape == shape:
            value = _regrouped(value, edit)
            shape = value.shape
        else:
            raise EditError(
                f"the state {what} has the shape {list(value.shape)} and the parameter {list(shape)}, so it cannot be "
                f"carried; build a new optimizer over the new model"
            )
    return value


def _regrouped(value: Tensor, edit: Regroup) -> Tensor:
    """State of a convolution with other groups; where groups are split, what lies between the new ones is dropped."""
    if edit.to > edit.groups:
        kept = (len(value), value.shape[1] * edit.groups // edit.to, *value.shape[2:])
        value = value * merge_groups(value.new_ones(kept), edit.to, edit.groups)
    return edit_tensor(value, edit)


def _factors(edit: Resize, power: int) -> tuple[float, ...]:
    """What each position of a state is multiplied with; empty if by one.

    A position whose weight is zero has a gradient that its source says nothing about: its state starts from zero.
    """
    scales = edit.scale or (1.0,) * len(edit.index)
    copies = collections.Counter(i for i, scale in zip(edit.index, scales, strict=True) if scale)
    factors = tuple(
        (1 / (copies[i] * scale)) ** power if scale else 0.0 for i, scale in zip(edit.index, scales, strict=True)
    )
    return () if all(factor == 1 for factor in factors) else factors


class _Still(LRScheduler):
    """Changes nothing; building it lets torch count the steps of an optimizer, as it does for every scheduler."""

    def step(self, epoch: int | None = None) -> None:
        """Leave the learning rates as they are."""


def _moved(scheduler: _Scheduler, optimizer: Optimizer) -> _Scheduler:
    """A copy, with copies of the schedulers and lists inside it, on ``optimizer``."""

    def inside(value: Any) -> Any:
        if isinstance(value, LRScheduler):
            return _moved(value, optimizer)
        if isinstance(value, list):
            return [inside(item) for item in value]
        return copy.copy(value) if isinstance(value, dict) else value

    moved = object.__new__(type(scheduler))
    moved.__dict__.update({key: inside(value) for key, value in vars(scheduler).items()})
    moved.optimizer = optimizer
    return moved
