"""Tensors that functions keep from one call to the next (`functools.lru_cache`): no run may find those of another."""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from morph.module_tree import named_modules

_Cached = type(functools.lru_cache(lambda: None))
_near: weakref.WeakKeyDictionary[type, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def forget_tensors(kinds: Iterable[type]) -> None:
    """Empty the caches with tensors in them of the functions and methods that the code of modules may call.

    Looked at are those of the classes of the modules, and of the files that these come from; torch's own have none.
    A cache without tensors stays as it is.

    Args:
        kinds: The classes of the modules.
    """
    for kind in set(kinds):
        found = _near.get(kind)
        if found is None:
            found = _near[kind] = tuple(_caches(_around(kind)))
        for cached in found:
            if cached.cache_info().currsize and _keeps_tensors(cached):
                cached.cache_clear()


def without_kept(model: nn.Module) -> nn.Module:
    """``model`` itself, whose modules have thrown away what they had computed of weights that are others now.

    Those that keep such tensors empty them when training begins (LeViT); their flags are as they were afterwards.
    """
    modules = [module for _, module in named_modules(model)]
    kinds: set[type[nn.Module]] = set(map(type, modules))
    if any(kind.train is not nn.Module.train for kind in kinds):
        flags = [(module, module.training) for module in modules]
        was = model.training
        model.train()
        model.train(was)
        for module, flag in flags:
            module.training = flag
    return model


def _around(kind: type) -> Iterator[Any]:
    """What stands in a class and its bases, and beside them in their files."""
    for base in kind.__mro__:
        if base.__module__.startswith(("torch.", "builtins")):
            continue
        yield from list(vars(base).values())
        yield from list(vars(sys.modules.get(base.__module__, base)).values())


def _caches(values: Iterable[Any]) -> Iterator[Any]:
    """The caches among functions, methods, and what decorators have closed over."""
    for value in values:
        inner = getattr(value, "__func__", value)
        if isinstance(inner, _Cached):
            yield inner
        elif isinstance(inner, types.FunctionType) and inner.__closure__:
            for cell in inner.__closure__:
                try:
                    content = cell.cell_contents
                except ValueError:  # empty yet
                    continue
                if isinstance(content, _Cached):
                    yield content


def _keeps_tensors(cached: Any) -> bool:
    """Whether a result in a cache is a tensor, or holds some in tuples, lists or dicts; no further than four steps."""
    found = gc.get_referents(cached)
    for _ in range(4):
        if any(isinstance(item, Tensor) for item in found):
            return True
        held = [item for item in found if isinstance(item, dict | tuple | list) or "lru" in type(item).__name__]
        found = gc.get_referents(*held) if held else []
    return False
