"""Let gates live with any optimizer, and so with any trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from morph.apg import APG, GateNumbers, Gates, named_gates
from morph.errors import GateError

KEY = "apg"
"""Under which the state of the gates stands in the base optimizer's state_dict."""


def attach_gates(optimizer: Optimizer, gates: Gates, **numbers: Unpack[GateNumbers]) -> APG:
    """Let each step of ``optimizer`` be followed by a step of `APG` on the gates.

    The gates become a group of ``optimizer`` whose learning rate and weight decay are zero and stay zero whatever a
    scheduler does. So gradient scalers, clipping, accumulation and distributed training treat them as they treat the
    weights: where a step is skipped, the gates rest too. The optimizer's state_dict holds the state of `APG` under the
    key ``"apg"``, and loading it brings that back. Attach before making a scheduler.

    Args:
        optimizer: Of the weights, possibly wrapped by Accelerate, Fabric or Lightning. If it has the gates already,
            they move to a group of their own.
        gates: As in `APG`.
        **numbers: ``lr`` of the gates, which no scheduler touches, ``lambda2``, ``weights``, ``momentum`` and ``clamp``
            as in `APG`.

    Returns:
        The optimizer of the gates, for its ``closed()``, ``sparse()`` and ``param_groups``; its ``step`` is called for
        you.

    Raises:
        GateError: As `APG`, or if ``optimizer`` cannot have several groups with learning rates.
    """
    base = _unwrapped(optimizer)
    if isinstance(base, LBFGS) or "lr" not in base.defaults:
        raise GateError(f"gates cannot be attached to {type(base).__name__}: it has no learning rate for each group")
    named = named_gates(gates)
    apg = APG(named, **numbers)
    _take_out(base, list(named.values()))
    group: dict[str, Any] = {"params": list(named.items()) if _is_named(base) else list(named.values())}
    base.add_param_group({**group, "lr": 0.0, "weight_decay": 0.0})
    own = base.param_groups[-1]["params"]
    base.register_step_pre_hook(lambda *_: _rest(base, own[0]))
    base.register_step_post_hook(lambda *_: _follow(base, apg))
    base.register_state_dict_post_hook(lambda _, state: {**state, KEY: apg.state_dict()})
    base.register_load_state_dict_pre_hook(lambda _, state: _load(apg, state))
    return apg


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer inside the wrappers of trainers."""
    inner = getattr(optimizer, "optimizer", None)
    return _unwrapped(inner) if isinstance(inner, Optimizer) else optimizer


def _is_named(optimizer: Optimizer) -> bool:
    """Whether the groups know the names of their parameters; then a new group has to."""
    return any("param_names" in group for group in optimizer.param_groups)


def _take_out(optimizer: Optimizer, gates: list[Tensor]) -> None:
    """Take gates out of the groups that have them."""
    numbers = {id(gate) for gate in gates}
    for group in optimizer.param_groups:
        stays = [i for i, p in enumerate(group["params"]) if id(p) not in numbers]
        for key in {"params", "param_names"} & set(group):
            group[key][:] = [group[key][i] for i in stays]
    for gate in gates:
        optimizer.state.pop(gate, None)


def _rest(optimizer: Optimizer, gate: Tensor) -> None:
    """Put the learning rate and weight decay of the gates' group back to zero."""
    for group in optimizer.param_groups:  # loading a state makes new groups, so it is looked up
        if any(p is gate for p in group["params"]):
            for key in ("lr", "weight_decay"):
                if isinstance(group.get(key), Tensor):
                    group[key].zero_()
                else:
                    group[key] = 0.0


def _follow(optimizer: Optimizer, apg: APG) -> None:
    """A step of the gates after one of the weights.

    A fused optimizer is called by a `torch.amp.GradScaler` even where the step must be skipped, which it decides by
    itself. It leaves the gradients behind without the scale, as the scaler does for the others.
    """
    skipped = getattr(optimizer, "found_inf", None)
    if skipped is None or not bool(skipped):
        apg.step()


def _load(apg: APG, state: Mapping[str, Any]) -> None:
    """Give the gates their part of a state.

    Raises:
        GateError: If it has none.
    """
    if KEY not in state:
        raise GateError("this optimizer state was saved without gates; load it before attaching them")
    apg.load_state_dict(state[KEY])
