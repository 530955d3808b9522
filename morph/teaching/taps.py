"""Tap a model: hand out what flows through it at named places, beside its output or alone."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from morph.errors import TapError, TraceError
from morph.inputs import Inputs, arguments_of
from morph.teaching.capture import Tapped, Wanted, split
from morph.teaching.graph_taps import GraphTaps, Names, Place, graph_names
from morph.teaching.module_taps import ModuleTaps
from morph.tracing import try_inputs

_NEAREST = 3


class Taps:
    """Taps on a model, which is used as it is: its own parameters, hooks, branches and training flags.

    They are called as the model is, by position and by name: ``taps(x, mask=m)`` gives a
    `morph.teaching.capture.Tapped`, the model's output and the features by name. ``taps.features(x, mask=m)`` gives
    the features alone and computes no more than they need. A module that is called several times has a tap for each
    call: ``relu#1``, ``relu#2``. Where a tapped tensor is written over later, as by ``nn.ReLU(inplace=True)``, a copy
    from before is handed out.

    Attributes:
        model: The model.
        shapes: Shape of each tap in evaluation mode for the example inputs; empty if there were none.
    """

    def __init__(self, model: nn.Module, runner: ModuleTaps | GraphTaps) -> None:
        self.model = model
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._runner = runner

    def __call__(self, *args: Any, **kwargs: Any) -> Tapped:
        """One forward pass in the mode that the model is in.

        Raises:
            TapError: If a tap is not reached in this mode, or gives no tensor.
        """
        return self._runner.run(args, kwargs, to_the_end=True)

    def features(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The features alone; errors as for a call."""
        return self._runner.run(args, kwargs, to_the_end=False).features

    def __str__(self) -> str:
        shapes = self.shapes or dict.fromkeys(self._names(), ())
        width = max(map(len, shapes), default=0)
        return "\n".join(f"{name:{width}}  {'x'.join(map(str, shape))}".rstrip() for name, shape in shapes.items())

    def _names(self) -> list[str]:
        wanted = self._runner.wanted
        return [tap.name if isinstance(tap, Place) else tap[0] for tap in wanted]


def tap(model: nn.Module, names: str | Sequence[str], example_inputs: Inputs | None = None) -> Taps:
    """Tap outputs of modules, functions and methods.

    A name is the path of a module (``layer1.0``), one call of it (``relu#2``), a node of `morph.trace` (``add_3``, a
    function or a method), or a shell pattern (``layer?``) of module paths, or of nodes if it fits no module. Modules
    are tapped while the model's own forward runs. As soon as a function or method is among the names, the model's graph
    runs in its place, on the same modules and parameters; it is compared with the forward before it is used.

    Args:
        model: Not touched: parameters, buffers, hooks, training flags and keys of the state stay what they are.
        names: One or more.
        example_inputs: A tensor, a tuple of arguments, or a mapping of named ones; with them the shapes are known, and
            a tap that is not reached is refused at once.

    Raises:
        TapError: If there is no such module or node (the nearest are named), or a tap is not reached.
        TraceError: If the model does not accept the inputs.

    Example:
        >>> import morph
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
        >>> taps = morph.tap(model, ["0", "1"], torch.zeros(5, 4))
        >>> taps.shapes
        {'0': (5, 3), '1': (5, 3)}
        >>> output, features = taps(torch.randn(8, 4))
        >>> output.shape, bool((features["1"] == features["0"].relu()).all())
        (torch.Size([8, 2]), True)
    """
    asked = [names] if isinstance(names, str) else list(names)
    if not asked:
        raise TapError("no names of taps; give one or more, e.g. 'layer1'")
    found = _Found(model)
    for name in asked:
        found.add(name)
    runner: ModuleTaps | GraphTaps
    if found.places:
        runner = GraphTaps(model, found.wanted)
    else:
        paths: list[Wanted] = [item for item in found.wanted if not isinstance(item, Place)]
        runner = ModuleTaps(model, paths, frozenset(found.optional))
    taps = Taps(model, runner)
    if example_inputs is not None:
        taps.shapes = {name: tuple(t.shape) for name, t in _rehearse(model, runner, example_inputs).items()}
    return taps


class _Found:
    """What names stand for. The model is traced only if a name is no module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if p and _is_called(m)}
        self.containers = {p for p, m in model.named_modules(remove_duplicate=False) if p and not _is_called(m)}
        self.wanted: list[Wanted | Place] = []
        self.optional: set[str] = set()
        self.places = False
        self._names: Names | None = None
        self._untraced: TraceError | None = None

    def add(self, name: str) -> None:
        """Find what ``name`` stands for.

        Raises:
            TapError: If it stands for nothing.
        """
        path, call = split(name)
        if path in self.modules:
            self.wanted.append((path, call))
            return
        if any(sign in name for sign in "*?["):
            fitting = [p for p in self.modules if fnmatchcase(p, name)]
            nodes = [] if fitting else [place for n, place in self.names.places.items() if fnmatchcase(n, name)]
            self.wanted += [(p, None) for p in fitting] or nodes
            self.optional.update(fitting)
            self.places |= bool(nodes)
            if fitting or nodes:
                return
        elif name in self.names.places:
            self.wanted.append(self.names.places[name])
            self.places = True
            return
        raise TapError(self._unknown(name))

    @property
    def names(self) -> Names:
        """The functions and methods; none if the model cannot be traced."""
        if self._names is None:
            try:
                self._names = graph_names(self.model)
            except TraceError as error:
                self._names, self._untraced = Names({}, {}), error
        return self._names

    def _unknown(self, name: str) -> str:
        if name in self.containers:
            return f"{name} is a {type(self.model.get_submodule(name)).__name__}, which is never called; tap one in it"
        known = [*self.modules, *self.names.places]
        near = difflib.get_close_matches(name, known, _NEAREST, 0.4) or known[-_NEAREST:]
        text = f"no module or node {name!r} in {type(self.model).__name__}; nearest: {', '.join(near)}"
        return text + (f"; functions cannot be tapped here: {self._untraced}" if self._untraced else "")


def _is_called(module: nn.Module) -> bool:
    """Whether a module has a forward; lists of modules have none."""
    return type(module).forward is not nn.Module.forward


def _rehearse(model: nn.Module, runner: ModuleTaps | GraphTaps, inputs: Inputs) -> dict[str, Tensor]:
    """Run a copy once in evaluation mode, so that nothing of the model moves."""
    twin = copy.deepcopy(model).eval()
    args, kwargs = arguments_of(inputs)
    try_inputs(twin, args, kwargs)
    with torch.no_grad(), _in_place_of(runner, twin):
        return runner.run(args, kwargs, to_the_end=True).features


@contextmanager
def _in_place_of(runner: ModuleTaps | GraphTaps, twin: nn.Module) -> Iterator[None]:
    """Let ``runner`` run ``twin`` meanwhile."""
    model = runner.model
    runner.model = twin
    try:
        yield
    finally:
        runner.model = model
