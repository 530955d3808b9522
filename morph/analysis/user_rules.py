"""Rules of the user's own operators and modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from morph.analysis.propagation import Rule
from morph.analysis.rules import RULES
from morph.errors import AnalysisError

USER_RULES: dict[Any, Rule] = {}


def rule(target: Any) -> Callable[[Rule], Rule]:
    """Register how channels go through an operator or a module that `morph` does not know.

    The function gets the state of the analysis, on which it calls ``signature``, ``pointwise``, ``freeze`` and the
    like, and the arguments of the call; it gives the labels of the output. In a notation, a letter that comes twice
    is one axis, a letter that does not come out is summed over, ``...`` stands for any axes, and ``*`` pins the rest.
    The parameters of a module are named by strings. `check_rule` shows whether a rule is true.

    Args:
        target: A module class (taken as a whole from then on), or an operator such as ``torch.ops.mylib.myop``.

    Raises:
        AnalysisError: If the target has a rule already, or can have none; names both places.

    Example:
        >>> import morph
        >>> from torch import nn
        >>> class Scale(nn.Module):
        ...     pass  # y = x * gamma
        >>> @morph.rule(Scale)
        ... def scale(op, x):
        ...     return op.signature("n c h w, c -> n c h w", x, "gamma")
    """
    module = isinstance(target, type) and issubclass(target, nn.Module)
    if not module and not isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        raise AnalysisError(f"a rule is for a module class or an operator of torch.ops, got {target!r}")

    def register(function: Rule) -> Rule:
        known = USER_RULES.get(target) or RULES.get(target)
        if known is not None:
            raise AnalysisError(
                f"{target} has a rule already, at {_place(known)}; a second one is at {_place(function)}"
            )
        USER_RULES[target] = function
        return function

    return register


def forget_rule(target: Any) -> None:
    """Take a user's rule out again."""
    USER_RULES.pop(target, None)


def _place(function: Rule) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"
