"""What cannot be analysed is refused at the door, by name and with the way out."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from morph.analysis.recording import Inputs, Modules, arguments_of, named_modules, tensors_of
from morph.errors import TraceError

_PLAIN = {bool, int, float, str, type(None), OrderedDict, set}  # hold no tensors, or only hooks
_CONTAINERS = {dict, list, tuple}


def admit(model: Any, inputs: Inputs) -> Modules:
    """Refuse what is no plain module with all its weights, and inputs without a sample.

    Returns:
        The `named_modules` of the model.

    Raises:
        TraceError: Says what was got, where, and what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model is a torch.nn.Module, got {type(model).__name__}")
    modules = named_modules(model)
    for path, module in modules:
        if reason := _obstacle(module):
            raise TraceError(f"{path or 'the model'} ({type(module).__name__}) {reason}")
    first = next(iter(tensors_of(arguments_of(inputs))), None)
    if first is not None and first.dim() and not len(first):
        raise TraceError(f"an input of shape {list(first.shape)} has no sample; give a batch of two or more")
    return modules


def _obstacle(module: nn.Module) -> str:
    """Why a module cannot be copied and followed; empty if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, whose code cannot be followed; give the module that it was made from"
    if "_orig_mod" in module._modules:
        return "is a compiled module; give the module that was compiled (`_orig_mod`), and compile the result"
    for table in (module._parameters, module._buffers):
        for name, parameter in table.items():
            if parameter is not None and is_lazy(parameter):
                return f"has no shape for {name} yet; run the model once on the inputs, so that lazy modules get theirs"
    special = [(name, value) for name, value in vars(module).items() if type(value) not in _PLAIN]
    for name, value in special:
        kind = type(value)
        if (kind in _CONTAINERS and not value) or value is module._modules:
            continue
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
            return (
                f"keeps {name}, computed from other parameters, as an attribute, and cannot be copied: take off what "
                f"computes it (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), or use "
                f"torch.nn.utils.parametrizations"
            )
        for item in value.values() if kind is dict else value if kind in _CONTAINERS else ():
            if isinstance(item, Tensor) and item.grad_fn is not None:
                return (
                    f"keeps results of a run with gradients in {name} and cannot be copied: empty it; some models do "
                    f"so when they are told to train()"
                )
    return ""
