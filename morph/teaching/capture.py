"""Keep tensors on their way through a network, as they were at that moment."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from morph.errors import TapError


class Tapped(NamedTuple):
    """What a forward pass with taps gives.

    Attributes:
        output: What the model returns.
        features: The tapped tensors by name; gradients flow through them.
    """

    output: Any
    features: dict[str, Tensor]


class Enough(BaseException):
    """Leaves a forward pass when all that was asked for is there. No `Exception`, so that no model catches it."""


class Kept(NamedTuple):
    """One tensor: what is handed out, the network's own, and the version of that when it was kept."""

    value: Tensor
    own: Tensor
    version: int


class Memory:
    """Which tapped tensors the network writes over later, as ``nn.ReLU(inplace=True)`` does; those are copied.

    At first everything is copied. A tensor that was not written over is from then on handed out as it is; should it be
    written over after all, this is noticed, and refused once.
    """

    def __init__(self) -> None:
        self.written: dict[Hashable, bool] = {}

    def keep(self, key: Hashable, value: Tensor) -> Kept:
        """Take a tensor down."""
        if value.is_inference():  # has no version, so nobody could tell
            copy = value.clone()
            return Kept(copy, copy, -1)
        copied = self.written.get(key, True)
        return Kept(value.clone() if copied else value, value, value._version)

    def check(self, key: Hashable, name: str, kept: Kept) -> Tensor:
        """The tensor as it was when it was taken down.

        Raises:
            TapError: If it was written over and there is no copy; calls it ``name``.
        """
        if kept.version < 0:
            return kept.value
        changed = kept.own._version != kept.version
        copied, known = kept.value is not kept.own, self.written.get(key, False)
        self.written[key] = changed or known
        if changed and not copied:
            raise TapError(
                f"the tapped tensor {name} was written over in place, which it was not before; call again: it will be "
                "copied from now on"
            )
        return kept.value


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list or mapping (as outputs of Hugging Face models are); or None."""
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((tensor for tensor in map(first_tensor, items) if tensor is not None), None)


def tensor_of(name: str, value: Any) -> Tensor:
    """The first tensor in what a tapped module or node gives.

    Raises:
        TapError: If there is none.
    """
    found = first_tensor(value)
    if found is None:
        raise TapError(f"the tap {name} gives no tensor but {type(value).__name__}; choose one that does")
    return found


def numbered(path: str, count: int) -> list[str]:
    """Names of the taps of a module that is called ``count`` times: its path, or ``path#1``, ``path#2`` and so on."""
    return [path] if count == 1 else [f"{path}#{i}" for i in range(1, count + 1)]


Wanted = tuple[str, int | None]
"""A module path or node name, and which of its calls, from 1; None for all."""


def split(name: str) -> Wanted:
    """``layer1#2`` to ``("layer1", 2)``, and ``layer1`` to ``("layer1", None)``."""
    path, _, number = name.rpartition("#")
    return (path, int(number)) if path and number.isdigit() else (name, None)
