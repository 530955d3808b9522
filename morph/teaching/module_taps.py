"""Tap the outputs of modules while the model's own forward runs: hooks that are there only meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from morph.errors import TapError
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
            to_the_end: Whether the output is needed. If not, the pass ends after the last tapped call; the first pass
                goes to the end, for it finds out how often each module is called.
        """
        flags = tuple(module.training for module in self.model.modules())
        counts = None if to_the_end else self.counts.get(flags)
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
