"""Copy a module, with other tensors in the place of its own where that is asked for."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from morph.errors import TraceError

_ATOMS = {bool, int, float, str, bytes, complex, type(None), type}
_EMPTY = {dict, OrderedDict, set}  # what may be empty, and is made anew then
_TENSORS = ("_parameters", "_buffers")


def own_copy(model: nn.Module) -> nn.Module:
    """What ``copy.deepcopy`` gives.

    Raises:
        TraceError: If the model cannot be copied; says what cannot.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise uncopied(model, error) from error


def uncopied(model: nn.Module, error: Exception) -> TraceError:
    """What to say of a model that cannot be copied."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TraceError(
        f"{type(model).__name__} cannot be copied: {lines[0].rstrip('.')}; take what cannot be copied out of its "
        f"attributes, or give its class a __deepcopy__"
    )


def copy_module(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """What ``copy.deepcopy`` gives, faster: modules that copy like every object are copied without asking them.

    Args:
        model: Not touched.
        memo: As for ``copy.deepcopy``: by the identity of an object, what stands for it in the copy.

    Raises:
        Exception: Whatever copying one of its attributes raises.
    """
    memo = {} if memo is None else memo
    known: nn.Module | None = memo.get(id(model))
    if known is not None:
        return known
    if not _is_ordinary(type(model)):
        made: nn.Module = copy.deepcopy(model, memo)
        return made
    kind = type(model)
    made = kind.__new__(kind)
    memo[id(model)] = made
    attributes = vars(made)
    for name, value in vars(model).items():
        form = type(value)
        if form in _ATOMS:
            attributes[name] = value
        elif form in _EMPTY and not value:
            attributes[name] = form()
        elif name != "_compiled_call_impl":  # torch leaves it out as well
            attributes[name] = _copied(name, value, memo)
    return made


def _copied(name: str, value: Any, memo: dict[int, Any]) -> Any:
    """A copy of an attribute."""
    kind = type(value)
    if kind is dict or kind is OrderedDict:
        if name == "_modules":
            return kind([(key, None if m is None else copy_module(m, memo)) for key, m in value.items()])
        if name in _TENSORS:
            return kind([(key, _of_memo(tensor, memo)) for key, tensor in value.items()])
    elif kind is tuple and all(type(item) in _ATOMS for item in value):
        return value
    return copy.deepcopy(value, memo)


def _of_memo(value: Any, memo: dict[int, Any]) -> Any:
    """What stands for a tensor in the copy."""
    if value is None:
        return None
    known = memo.get(id(value))
    if known is not None:
        return known
    if type(value) is not Tensor or value.requires_grad or value.dim() or vars(value) or value.is_meta:
        return copy.deepcopy(value, memo)
    store, stores = value.untyped_storage(), memo.setdefault("torch", {})  # type: ignore[call-overload]
    if store._cdata in stores or store.nbytes() != value.element_size():  # shares its memory
        return copy.deepcopy(value, memo)
    made = memo[id(value)] = value.clone()
    stores[store._cdata] = made.untyped_storage()  # as torch's own copies remember it
    return made


_ORDINARY: dict[type, bool] = {}
_SAYS_HOW = ("__deepcopy__", "__copy__", "__getstate__", "__reduce__", "__reduce_ex__", "__getnewargs__")


def _is_ordinary(kind: type) -> bool:
    """Whether copies of a class are made attribute by attribute: nobody but torch has said how to copy or pickle it."""
    found = _ORDINARY.get(kind)
    if found is None:
        above = kind.__mro__[:-1]
        own = any(
            name in vars(c) or vars(c).get("__slots__") for c in above if c is not nn.Module for name in _SAYS_HOW
        )
        state = next((c for c in above if "__setstate__" in vars(c)), nn.Module)
        found = not own and issubclass(kind, nn.Module) and state.__module__.startswith("torch.nn.modules.")
        _ORDINARY[kind] = found
    return found
