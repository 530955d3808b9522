"""Tap the outputs of modules while the model's own forward runs: hooks that are there only meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from morph.errors import TapError
from morph.search_checkpoint import random_states, set_random_states
from morph.teaching.capture import Enough, Kept, Memory, Tapped, Wanted, numbered, tensor_of

Flags = tuple[bool, ...]


class ModuleTaps:
    """Taps on modules, by path.

    Args:
        model: Its own forward runs, with its own hooks, branches and training flags.
        wanted: Module paths, each with the number of the call or None for all calls.
        optional: Paths that need not be called.
    """

    def __init__(self, model: nn.Module, wanted: Sequence[Wanted], optional: frozenset[str]) -> None:
        self.model, self.wanted, self.optional = model, list(dict.fromkeys(wanted)), optional
        self.paths = list(dict.fromkeys(path for path, _ in self.wanted))
        self.memory = Memory()
        self.counts: dict[Flags, dict[str, int]] = {}  # how often each is called, by the training flags of all modules

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, to_the_end: bool) -> Tapped:
        """One forward pass.

        Args:
            args: Positional arguments of the model.
            kwargs: Named ones.
            to_the_end: Whether the output is needed. If not, the pass ends after the last tapped call. How often each
                module is called is found out by running a copy, once for each set of training flags.
        """
        flags = tuple(module.training for module in self.model.modules())
        if not to_the_end and flags not in self.counts:
            self._rehearse(flags, args, kwargs)
        counts = None if to_the_end else self.counts[flags]
        watch = _Watch(self.memory, flags, counts)
        handles = []
        output = None
        try:
            for path in self.paths:
                module = self.model.get_submodule(path)
                handles.append(module.register_forward_hook(partial(watch.keep, path)))
            if watch.missing:
                output = self.model(*args, **kwargs)
        except Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if counts is None:
            self.counts[flags] = {path: len(watch.kept[path]) for path in watch.kept}
        return Tapped(output, self._features(watch, self.counts[flags] if counts is None else counts))

    def _rehearse(self, flags: Flags, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count calls with a copy, so that a pass which ends early moves nothing behind its end."""
        twin = ModuleTaps(copy.deepcopy(self.model), self.wanted, self.optional)
        states = random_states()
        try:
            with torch.no_grad():
                twin.run(args, kwargs, to_the_end=True)
        finally:
            set_random_states(states)
        self.counts[flags] = twin.counts[flags]

    def _features(self, watch: _Watch, counts: dict[str, int]) -> dict[str, Tensor]:
        found = {}
        for path, call in self.wanted:
            names = numbered(path, counts.get(path, 0))
            if not counts.get(path) and path in self.optional:
                continue
            if not names or (call is not None and call > len(names)):
                raise TapError(_not_called(self.model, path, call, len(names)))
            for i, name in enumerate(names):
                if call in (None, i + 1):
                    key = name if call is None else f"{path}#{call}"
                    found[key] = self.memory.check((watch.flags, path, i), key, watch.kept[path][i])
        return found


class _Watch:
    """The hooks of one pass, and what they kept."""

    def __init__(self, memory: Memory, flags: Flags, counts: dict[str, int] | None) -> None:
        self.memory, self.flags = memory, flags
        self.kept: dict[str, list[Kept]] = {}
        self.missing = sum(counts.values()) if counts is not None else -1

    def keep(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        """A forward hook."""
        kept = self.kept.setdefault(path, [])
        kept.append(self.memory.keep((self.flags, path, len(kept)), tensor_of(path, output)))
        self.missing -= 1
        if self.missing == 0:
            raise Enough


def _not_called(model: nn.Module, path: str, call: int | None, count: int) -> str:
    mode = "training" if model.training else "evaluation"
    if count and call is not None:
        return f"the module {path} is called {count} times in {mode} mode, there is no call {call}"
    return f"the module {path} is not called in {mode} mode by {type(model).__name__}; choose one that is"
