"""The modified accelerated proximal gradient by which gates are learned and closed.

Source: Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020, equation 4; it follows Huang
and Wang, "Data-Driven Sparse Structure Selection for Deep Neural Networks", ECCV 2018. With gate ``g``, gradient ``d``
of the loss, and the soft threshold ``S(z) = sign(z) max(|z| - lr lambda2 alpha, 0)``::

    z <- g - lr d        v <- S(z) - g + momentum v        g <- S(z) + momentum v

The gate that the next forward pass sees is the look-ahead ``g``; it passes zero on its way and is hardly ever zero. The
sparse iterate is ``S(z)``: a gate is closed where that is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from morph.errors import GateError

Gates = Mapping[str, nn.Module] | Mapping[str, nn.Parameter] | Iterable[nn.Parameter]
Weights = Mapping[str, Tensor]
_Float = TypeVar("_Float")


class GateNumbers(TypedDict, total=False):
    """How gates are learned: the arguments of `APG` behind the gates."""

    lr: float
    lambda2: float
    weights: Weights | None
    momentum: float
    clamp: bool


class APG(Optimizer):
    """Learn gates with a weighted L1 penalty ``lambda2 * sum_j alpha_j |g_j|`` that closes them exactly.

    The penalty acts through the threshold; the loss that is differentiated is the loss alone. Weight decay is not for
    gates, and ``lr`` usually stays constant. With a gradient of zero, ``lr=0.01``, ``lambda2=1e-3`` and ``alpha=1``, a
    gate of one arrives at zero after 10,009 steps: the speed is ``lr lambda2 alpha / (1 - momentum)`` a step. A
    gate that got no gradient (None) is not moved, as in every optimizer.

    Args:
        gates: By name, modules whose parameter ``weight`` is the gates, or those parameters; or parameters alone, which
            are then named by their numbers. ``[k]`` each, float32 or float64.
        lr: Step size, eta in the paper.
        lambda2: Strength of the penalty. It and ``lr`` may be changed in ``param_groups`` at any time.
        weights: By the same names, alpha of each gate, ``[k]``, not negative; where there are none, one.
        momentum: mu in the paper, from 0 to below 1.
        clamp: Keep gates from falling below zero, as the code of Huang and Wang does; the paper of Gu and Tresp does
            not.

    Raises:
        GateError: If there are no gates, a type is too coarse for such small steps, a number is out of its range, or
            the weights do not fit the gates.
    """

    def __init__(
        self,
        gates: Gates,
        lr: float = 0.01,
        lambda2: float = 1e-3,
        weights: Weights | None = None,
        momentum: float = 0.9,
        clamp: bool = False,
    ) -> None:
        named = named_gates(gates)
        for name, value, most in (("lr", lr, math.inf), ("lambda2", lambda2, math.inf), ("momentum", momentum, 1.0)):
            if not 0 <= value < most:
                raise GateError(
                    f"APG: {name} of {value}; expected {'from 0 to below 1' if most == 1 else '0 or above'}"
                )
        super().__init__(list(named.items()), {"lr": lr, "lambda2": lambda2, "momentum": momentum, "clamp": clamp})
        alphas = _alphas(named, weights)
        for name, gate in named.items():
            start = gate.detach()
            self.state[gate] = {"alpha": alphas[name], "velocity": torch.zeros_like(start), "sparse": start.clone()}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], _Float]) -> _Float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], _Float] | None = None) -> _Float | None:
        """Move every gate that has a gradient; a closure is called first, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            gates = [gate for gate in group["params"] if gate.grad is not None]
            if gates:
                self._move(gates, group)
        return loss

    def _move(self, gates: list[Tensor], group: Mapping[str, Any]) -> None:
        """Equation 4 for all gates of a group at once."""
        alpha, velocity, sparse = ([self.state[gate][key] for gate in gates] for key in ("alpha", "velocity", "sparse"))
        lr, momentum = float(group["lr"]), group["momentum"]
        z = torch._foreach_add(gates, [gate.grad for gate in gates if gate.grad is not None], alpha=-lr)
        limit = torch._foreach_mul(alpha, lr * group["lambda2"])
        inside = torch._foreach_minimum(torch._foreach_maximum(z, torch._foreach_neg(limit)), limit)
        torch._foreach_sub_(z, inside)  # z less what lies within the threshold is S(z)
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, z)
        torch._foreach_sub_(velocity, gates)
        torch._foreach_copy_(sparse, z)
        torch._foreach_copy_(gates, torch._foreach_add(z, velocity, alpha=momentum))
        if group["clamp"]:
            torch._foreach_clamp_min_(gates, 0.0)
            torch._foreach_clamp_min_(sparse, 0.0)

    def sparse(self, gate: str | nn.Module | Tensor) -> Tensor:
        """The sparse iterate ``S(z)`` of one gate, ``[k]``, by its name, module or parameter; a copy.

        Raises:
            GateError: If it is not one of these gates.
        """
        named = self.named()
        parameter = named.get(gate) if isinstance(gate, str) else _parameter(gate)
        if not any(parameter is own for own in named.values()):
            raise GateError(f"APG: {gate if isinstance(gate, str) else 'this'} is not one of its {len(named)} gates")
        value: Tensor = self.state[parameter]["sparse"]  # type: ignore[index]  # it is one of the gates
        return value.clone()

    def closed(self) -> dict[str, Tensor]:
        """By name, which gates are closed: bool ``[k]``, true where the sparse iterate is zero."""
        return {name: self.state[gate]["sparse"] == 0 for name, gate in self.named().items()}

    def named(self) -> dict[str, Tensor]:
        """The gate parameters by name."""
        return {
            name: gate
            for group in self.param_groups
            for name, gate in zip(group["param_names"], group["params"], strict=True)
        }


def named_gates(gates: Gates) -> dict[str, nn.Parameter]:
    """The parameters of gates by name, in any of the forms that `APG` takes.

    Raises:
        GateError: If there are none, one is no gate, or its type is too coarse.
    """
    pairs = gates.items() if isinstance(gates, Mapping) else ((str(i), gate) for i, gate in enumerate(gates))
    named = {name: _parameter(gate) for name, gate in pairs}
    if not named:
        raise GateError("there are no gates; gate the model first")
    for name, gate in named.items():
        if not isinstance(gate, nn.Parameter):
            got = type(gate).__name__
            raise GateError(f"gate {name} is {got}; expected a parameter, or a module whose weight is one")
        if gate.dtype not in (torch.float32, torch.float64):
            raise GateError(f"gate {name} is {gate.dtype}, too coarse for steps of 1e-5; keep gates in torch.float32")
    return named


def _parameter(gate: Any) -> Any:
    return getattr(gate, "weight", None) if isinstance(gate, nn.Module) else gate


def _alphas(named: Mapping[str, nn.Parameter], weights: Weights | None) -> dict[str, Tensor]:
    """Weights in the type and place of each gate."""
    if weights is None:
        return {name: torch.ones_like(gate, requires_grad=False) for name, gate in named.items()}
    missing = sorted(set(named) ^ set(weights))
    if missing:
        raise GateError(f"weights and gates do not have the same names: {missing[0]} is among one of them only")
    found = {name: torch.as_tensor(weights[name]).to(gate, copy=True) for name, gate in named.items()}
    for name, alpha in found.items():
        if alpha.shape != named[name].shape or not bool((torch.isfinite(alpha) & (alpha >= 0)).all()):
            got = f"shape {tuple(alpha.shape)}, from {float(alpha.min()):g} to {float(alpha.max()):g}"
            raise GateError(f"weights of gate {name}: {got}; expected {len(named[name])} numbers of 0 or above")
    return found
