"""Run a cut model without data and see that it calls what the model before called, with the sizes expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from morph.analysis.answering import OnProcessor, alike, as_before, as_on_processor
from morph.analysis.bare import collect_tensors, one_device, run_bare, run_whole, with_data
from morph.analysis.recording import (
    Call,
    Inputs,
    Recording,
    Sink,
    Value,
    arguments_of,
    plain_attention,
    values_in,
    without_data,
)
from morph.inputs import plain

Shapes = Callable[[Value], tuple[int, ...]]  # the shape that a tensor must have after the cut
Takes = Callable[[Call, Sequence[Any], Mapping[str, Any]], bool]  # whether an operator takes what it took


def to_follow(recording: Recording) -> nn.Module | None:
    """The copy without data whose cut `follows` takes: where shapes depend on values, if the recorded run had them."""
    if recording.whole:
        return None
    if recording.traced == "data":
        return recording.skeleton
    return recording.twin if recording.settled == recording.evaluated else None


def follows(
    model: nn.Module, inputs: Inputs, recording: Recording, shape: Shapes, takes: Takes = lambda *_: True
) -> bool:
    """Whether a model without data calls one by one what was recorded, each with the shapes and constants expected.

    Nothing is written down, which makes this faster than to record the run and to compare. It says no at the first
    difference of any kind, also where a longer look would show that the model does the same.

    Args:
        model: That of `to_follow` with other sizes, whose owner puts back what the run leaves in its modules.
        inputs: What the recording was made with.
        recording: A run. If it had data, code that asks for values is told those that it had, and so led the way that
            it went: that the model would go it on its own is not shown.
        shape: The shape expected of each tensor.
        takes: See `morph.analysis.picking.takes_the_same`.
    """
    told = recording.traced == "data"
    follower = (_Told if told else _Follower)(recording.calls[: recording.evaluated], shape, takes)
    guide = OnProcessor() if told else nullcontext()
    args, kwargs = arguments_of(pytree.tree_map_only(Tensor, without_data, plain(inputs)))
    try:
        with _quick(recording, follower), torch.no_grad(), plain_attention(), follower, guide:
            model(*args, **kwargs)
    except Exception:
        return False
    return not follower.differs and follower.at == len(follower.calls)


@contextmanager
def _quick(recording: Recording, follower: _Follower) -> Iterator[None]:
    """Let layers of torch's own tell the follower what they would call."""
    for attributes, forward in recording.quick:
        attributes["forward"] = forward
    recording.sink.take = follower.take
    try:
        yield
    finally:
        recording.sink.take = Sink.nowhere
        for attributes, _ in recording.quick:
            attributes.pop("forward", None)


class _DiffersError(Exception):
    """The model does something else."""


class _Follower(TorchDispatchMode):
    """Compares every operator with the next one expected."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as for the recorder

    runs = staticmethod(run_bare)

    def __init__(self, calls: Sequence[Call], shape: Shapes, takes: Takes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls, self.shape, self.takes = calls, shape, takes
        self.at = 0
        self.differs = False  # the model may swallow the error

    def take(self, path: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A layer would have called this."""
        call = self._next(target)
        for before, now in zip(call.args, args, strict=False):
            if type(before) is float and before != now:
                self._stop()
        value = call.output
        if type(value) is Value:
            if output.shape != self.shape(value):
                self._stop()
        elif output[0].shape != self.shape(value[0]):  # the others are those that nobody asks for
            self._stop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        call, kwargs = self._next(func), kwargs or {}
        constants = [value.data for value in call.reads]
        if any(data is not None for data in constants):
            self._compare_constants(constants, (args, kwargs))
        output = self._run(call, func, args, kwargs)
        values = values_in(call.output)
        tensors = collect_tensors((output,), [])
        if len(values) != len(tensors):
            self._stop()
        for value, tensor in zip(values, tensors, strict=True):
            if tensor.shape != self.shape(value):
                self._stop()
        return output

    def _run(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that is called with the numbers expected."""
        if floats_in(call.args) != floats_in(args) or not self.takes(call, args, kwargs):
            self._stop()
        args, kwargs = one_device((args, kwargs))
        return self.runs(func, args, with_data(func, args, kwargs))

    def _compare_constants(self, constants: list[Tensor | None], arguments: Any) -> None:
        """Constants must be what they were."""
        tensors = collect_tensors(arguments, [])
        if len(tensors) != len(constants):
            self._stop()
        for before, now in zip(constants, tensors, strict=True):
            if before is not None and (now.is_meta or not same_data(before, now)):
                self._stop()

    def _next(self, target: Any) -> Call:
        """The call that is expected now."""
        at = self.at
        if at == len(self.calls) or self.calls[at].target is not target:
            self._stop()
        self.at = at + 1
        return self.calls[at]

    def _stop(self) -> None:
        self.differs = True
        raise _DiffersError


class _Told(_Follower):
    """Compares a run that is told values with the one that had them."""

    runs = staticmethod(run_whole)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, args, kwargs = as_on_processor(func, args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _run(self, call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With the data that are there; where some are missing, as before if nothing else has changed."""
        if not (alike(call.args, args) and alike(call.kwargs, kwargs)):
            return super()._run(call, func, args, kwargs)
        if any(tensor.is_meta for tensor in collect_tensors(args, [])):
            return as_before(call, func, args, kwargs)
        return func(*args, **with_data(func, args, kwargs))


def same_data(one: Tensor, other: Tensor) -> bool:
    """Whether two small constants are equal; larger ones are data that moves, and their shapes are compared."""
    return one.numel() > 16 or one.shape != other.shape or bool((one == other).all())


def floats_in(tree: Any) -> list[float]:
    """Every floating-point constant among arguments."""
    found: list[float] = []
    for item in tree:
        if type(item) is float:
            found.append(item)
        elif type(item) in (list, tuple):
            found += floats_in(item)
    return found
