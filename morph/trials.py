"""Try a block: what it is called with, and which of its parameters have to be zero so that it hands on its input."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from morph.inputs import Inputs, plain, run_on
from morph.passes.insertion import is_chain
from morph.twins import twin

_NORMAL, _UNIFORM = 0.3, (0.5, 1.5)


@dataclass(frozen=True)
class Call:
    """One call of a module: copies of its arguments, and of what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def random_twin(model: nn.Module, seed: int) -> nn.Module:
    """Copy a model in float64 and evaluation mode, without hooks, and draw its parameters and statistics.

    Weights of layers are drawn such that signals keep their size, scales and variances from 0.5 to 1.5, the rest
    around zero. Buffers other than running statistics (masks, indices) stay as they are.
    """
    net = twin(model, lambda t: t.detach().double() if t.is_floating_point() else t.detach().clone())
    draw = torch.Generator().manual_seed(seed)
    low, high = _UNIFORM
    statistics = [(n, b) for n, b in net.named_buffers() if n.endswith(("running_mean", "running_var"))]
    for name, tensor in [*net.named_parameters(), *statistics]:
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
            values = low + (high - low) * torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
        elif tensor.dim() > 1 and tensor[0].numel() > 1:
            values /= tensor[0].numel() ** 0.5
        else:
            values *= _NORMAL
        tensor.copy_(values)
    return net


def record_calls(
    net: nn.Module, modules: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[dict[str, list[Call]], set[str], Any]:
    """Run ``net`` and note what happens.

    Args:
        net: The model to run; its hooks are put back.
        modules: By path, those of its modules to watch.
        inputs: What to run it on.

    Returns:
        The calls of each watched module that was called; the paths of the chains that were called as a whole; and the
        outputs.
    """
    found: dict[str, list[Call]] = {}
    chained: set[str] = set()
    pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pending.append((_copied(args), _copied(kwargs)))

    def watch(path: str, module: nn.Module) -> list[Any]:
        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            args, kwargs = pending.pop()
            found.setdefault(path, []).append(Call(args, kwargs, _copied(output)))

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]

    handles = [handle for path, module in modules.items() for handle in watch(path, module)]
    for path, module in net.named_modules():
        if is_chain(module):
            handles.append(module.register_forward_pre_hook(lambda _m, _a, path=path: chained.add(path)))
    try:
        with torch.no_grad():
            outputs = run_on(net, _copied(plain(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    return found, chained, outputs


def zeros_that_silence(
    block: nn.Module, calls: Sequence[Call], known: Sequence[str] | None = None
) -> tuple[tuple[str, ...], str | None]:
    """Find parameters that make a copy of a block hand on its input when they are zero.

    First all of them are zero; then each, in the order in which they are read, gets its value back if the block stays
    neutral. So those remain that end a branch: they get a gradient at once, and all before them as soon as these have
    moved. None can be left out.

    Args:
        block: In float64 and evaluation mode; not touched.
        calls: How it was called. Its copy is tried on the outputs, which it would get.
        known: What was found for a block of the same kind; tried first.

    Returns:
        The names, and None; or nothing, and the reason why there are none.
    """
    trial = copy.deepcopy(block)
    parameters = {name: p for name, p in trial.named_parameters() if p.is_floating_point()}
    values = {name: p.detach().clone() for name, p in parameters.items()}
    if known is not None and silenced(block, known, calls):
        return tuple(known), None
    order = _reading_order(trial, parameters, calls[0])
    _set_zero(parameters, order)
    if not all(_neutral(trial, call) for call in calls):
        return (), "with zeros for parameters it does not hand on its input: it has no plain residual path"
    zeroed = []
    for name in order:
        _restore(parameters, values, [name])
        if not all(_neutral(trial, call) for call in calls):
            _set_zero(parameters, [name])
            zeroed.append(name)
    if not zeroed:
        return (), "it hands on its input whatever its parameters are, so a copy would learn nothing"
    deaf = _without_gradient(trial, [parameters[name] for name in zeroed], calls[0])
    if deaf is not None:
        return (), f"{zeroed[deaf]} would have to be zero and would get no gradient, so a copy would learn nothing"
    return tuple(zeroed), None


def silenced(block: nn.Module, zeroed: Sequence[str], calls: Sequence[Call]) -> bool:
    """Whether a copy of ``block`` with zeros in place of these parameters hands on the output of each call."""
    trial = copy.deepcopy(block)
    _set_zero(dict(trial.named_parameters()), zeroed)
    return all(_neutral(trial, call) for call in calls)


def _copied(value: Any) -> Any:
    """The same with every tensor cloned, so that nobody can write into it."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


def _on_its_output(block: nn.Module, call: Call) -> tuple[Tensor, Any]:
    """What a copy behind the block is given, and what it makes of that."""
    args, kwargs = _copied(call.args[1:]), _copied(call.kwargs)
    return call.output, block(call.output.clone(), *args, **kwargs)


def _neutral(block: nn.Module, call: Call) -> bool:
    """Whether the block gives back what a copy behind it would be given, to the bit."""
    with torch.no_grad():
        x, y = _on_its_output(block, call)
    return isinstance(y, Tensor) and torch.equal(x, y)


def _set_zero(parameters: Mapping[str, nn.Parameter], names: Sequence[str]) -> None:
    with torch.no_grad():
        for name in names:
            parameters[name].zero_()


def _restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    with torch.no_grad():
        for name in names:
            parameters[name].copy_(values[name])


class _Order(TorchDispatchMode):
    """Notes in which order parameters are read first."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(p): name for name, p in parameters.items()}
        self.seen: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.names:
                self.seen.setdefault(self.names[id(leaf)])
        return func(*args, **(kwargs or {}))


def _reading_order(block: nn.Module, parameters: Mapping[str, nn.Parameter], call: Call) -> list[str]:
    """Names of the parameters that are read, in the order of their first reading."""
    with torch.no_grad(), _Order(parameters) as order:
        _on_its_output(block, call)
    return list(order.seen)


def _without_gradient(block: nn.Module, parameters: Sequence[nn.Parameter], call: Call) -> int | None:
    """Which of ``parameters`` gets no gradient from a random weighting of the output; None if each does."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        _, y = _on_its_output(block, call)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=y.dtype).to(y.device)
        found = torch.autograd.grad((y * weights).sum(), list(parameters), allow_unused=True)
    dead = [i for i, gradient in enumerate(found) if gradient is None or not bool(gradient.any())]
    return dead[0] if dead else None
