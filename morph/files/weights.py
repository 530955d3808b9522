"""A state_dict for a named architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from morph.errors import ModelFileError

_NESTED = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 3


def find_state_dict(content: object) -> dict[str, Tensor] | None:
    """The state_dict in what a file holds: by itself or under a usual key, free of wrappers' prefixes; None if none."""
    if not isinstance(content, Mapping):
        return None
    candidates: list[Any] = [content, *(content[key] for key in _NESTED if key in content)]
    for candidate in candidates:
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in candidate.items())
        ):
            return _without_prefixes(dict(candidate))
    return None


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None)
    return tensors if prefix is None else _without_prefixes({key[len(prefix) :]: t for key, t in tensors.items()})


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], arch: str) -> None:
    """Copy ``tensors`` into ``model``; all keys and shapes must agree. It takes their precision if they share one.

    Raises:
        ModelFileError: If they do not agree; counts the differences and names the first of them.
    """
    own = model.state_dict()
    uncounted = {key for key in own if key.endswith("num_batches_tracked")}  # absent before torch 0.4.1
    missing = [key for key in own if key not in tensors and key not in uncounted]
    extra = [key for key in tensors if key not in own]
    other = [
        f"{key} is {list(tensors[key].shape)}, expected {list(own[key].shape)}"
        for key in own
        if key in tensors and own[key].shape != tensors[key].shape
    ]
    parts = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for found, what in ((missing, "missing"), (extra, "unknown"), (other, "of another shape"))
        if found
    ]
    if parts:
        raise ModelFileError(f"does not fit {arch}, which has {len(own)} tensors: {'; '.join(parts)}")
    floating = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())
    model.load_state_dict(dict(tensors), strict=False)
