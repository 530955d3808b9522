"""Draw the weights of a model afresh."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx, nn

from morph.rerouting import SHIFT


def reinitialise(model: nn.Module, seed: int, origin: nn.Module | None = None) -> tuple[str, ...]:
    """Draw every weight of ``model`` afresh, in place, by each module's own ``reset_parameters``.

    A traced graph keeps the parameters of modules that were traced through, but not the modules: these are drawn by the
    module of the same path in ``origin``, the model that was traced.

    Where a module has no ``reset_parameters``, or it fails on what the module became, its parameters are drawn from the
    normal distribution that has their present mean and standard deviation, each tensor for itself; those of the
    parameter of the same name in ``origin``, if there is one. Its buffers stay.

    What stands in the place of a residual branch that was dropped becomes zero.

    The global random state stays as it was.

    Returns:
        The names of the parameters that were drawn from a normal distribution of their own mean and deviation.
    """
    sources = dict(origin.named_parameters(remove_duplicate=False)) if origin is not None else {}
    alike: list[str] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for path, module in model.named_modules():
            if (module._parameters or module._buffers) and not _reset(module, path, origin):
                alike.extend(f"{path}.{name}".lstrip(".") for name in _weights(module))
        for name in alike:
            parameter = model.get_parameter(name)
            _draw_alike(parameter, sources.get(name, parameter))
        for name, parameter in model.named_parameters(recurse=False):
            if name.startswith(SHIFT):
                parameter.zero_()
    return tuple(alike)


def said_of(alike: tuple[str, ...]) -> str:
    """In words, what `reinitialise` did with parameters that no module could draw; empty if there are none."""
    if not alike:
        return ""
    names = ", ".join(alike[:3]) + (" ..." if len(alike) > 3 else "")
    return (
        f"{len(alike)} parameters whose modules have no reset_parameters from a normal distribution of their mean and "
        f"deviation in the model before ({names})"
    )


def _weights(module: nn.Module) -> Iterator[str]:
    """Names of a module's own parameters but those that stand for a dropped branch."""
    return (name for name, p in module._parameters.items() if p is not None and not name.startswith(SHIFT))


def _reset(module: nn.Module, path: str, origin: nn.Module | None) -> bool:
    """Let a module draw what it owns; whether it did. PyTorch's attention calls its method ``_reset_parameters``."""
    own = module if origin is None else _own(module, path, dict(origin.named_modules(remove_duplicate=False)))
    method: Callable[[], object] | None = getattr(own, "reset_parameters", getattr(own, "_reset_parameters", None))
    if method is None:
        return False
    try:
        method()
    except Exception:
        return False  # it is the user's code, and was written for the sizes that the module had
    return True


def _own(module: nn.Module, path: str, origin: Mapping[str, nn.Module]) -> nn.Module:
    """The module itself, or around the parameters that a graph keeps of one that was traced through, that module."""
    if path not in origin or not (type(module) is nn.Module or isinstance(module, fx.GraphModule)):
        return module
    whole = copy.copy(origin[path])
    whole._parameters, whole._buffers = module._parameters, module._buffers
    whole._modules = {
        name: child and _own(child, f"{path}.{name}".lstrip("."), origin) for name, child in module._modules.items()
    }
    return whole


def _draw_alike(parameter: Tensor, source: Tensor) -> None:
    """Draw from the normal distribution with the mean and deviation of ``source``; on the CPU, in float64."""
    values = source.detach().cpu()
    values = (torch.view_as_real(values) if values.is_complex() else values).double()
    new = torch.view_as_real(parameter) if parameter.is_complex() else parameter
    drawn = torch.randn(new.shape, dtype=torch.float64) * values.std(correction=0) + values.mean()
    new.copy_(drawn)
