"""Writes down every operator that a model calls while it runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from morph.analysis.bare import each_tensor, one_device, run_bare, with_data
from morph.analysis.frames import user_frame
from morph.analysis.leaves import is_touched, quick_forward
from morph.analysis.recording import (
    Call,
    How,
    Inputs,
    Kept,
    Recording,
    Sink,
    Value,
    arguments_of,
    named_modules,
    plain_attention,
    put_back,
    tensors_in,
    tensors_of,
)

_OURS = -1  # the number of our hooks; torch counts its own from 0


class DataLostError(Exception):
    """The model makes a constant on the device of its input, where there is no data."""


class Recorder(TorchDispatchMode):
    """Writes down every operator; a tensor carries its value as an attribute, so that nothing is kept alive."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to compile here, and keeping the compiler away takes longer than an operator

    def __init__(self, model: nn.Module, traced: How, whole: tuple[type[nn.Module], ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.whole = model, whole
        self.modules = named_modules(model)
        self.tensors = tensors_in(self.modules)
        self.recording = Recording(traced=traced, whole=whole)
        self.stack: list[str] = [""]
        self.silent = 0
        self.followed: list[dict[str, Any]] = []  # attributes of modules whose forward tells that it runs
        self.storages: dict[int, Value] = {}
        self.runner: nn.Module = model
        self.needs_data = False
        self.kept: Kept | None = None  # what the modules are before and after the run in evaluation mode
        self.puts_back = True

    def run(self, inputs: Inputs) -> Recording:
        """Record one call of the model."""
        self._name_tensors()
        recording = self.recording
        args, kwargs = arguments_of(inputs)
        for tensor in tensors_of((args, kwargs)):
            recording.inputs.append(self._set(tensor, recording.new(tensor, outside=True)))
        recording.outputs = self._call(args, kwargs)
        recording.evaluated = len(recording.calls)
        return recording

    def train_too(self, inputs: Inputs) -> bool:
        """Record a second run, in training mode, if evaluation leaves parameters unused (such as auxiliary heads).

        Returns:
            Whether there was one, so that the data of buffers may have changed.
        """
        recording = self.recording
        used = {id(v) for call in recording.calls for v in call.reads}
        if all(id(v) in used or not v.floating for v in recording.sources.values()):
            return False
        self.model.train()
        try:
            recording.outputs_in_training = self._call(*arguments_of(inputs))
        except Exception:  # it wants targets, or more samples: what only training uses stays whole
            del recording.calls[recording.evaluated :]
            self.stack, self.silent = [""], 0
        finally:
            self.model.eval()
        return True

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Value]:
        """Call the model and give the values that come out."""
        self.recording.quick, self.followed = [], []
        try:
            with self._afterwards(), torch.no_grad(), plain_attention():
                for path, module in self.modules:
                    if not self._shorten(path, module):
                        self._follow(path, module)
                self.recording.sink.take = self._take
                try:
                    with self:
                        output = self.runner(*args, **kwargs)
                finally:  # quicker than to put them back one by one
                    for attributes in [*self.followed, *(attributes for attributes, _ in self.recording.quick)]:
                        attributes.pop("forward", None)
        finally:
            self.recording.sink.take = Sink.nowhere
        return [self._value(t) for t in _outputs(output)]

    def _afterwards(self) -> AbstractContextManager[Any]:
        """Puts back what the modules are now, unless whoever runs the model does so."""
        if not self.puts_back:
            return nullcontext()
        kept = Kept(self.modules, self.tensors)
        self.kept = self.kept or kept
        return put_back(kept)

    def _shorten(self, path: str, module: nn.Module) -> bool:
        """Let a layer of torch's own say what it calls without calling it; `put_back` undoes that."""
        kind = type(module)
        if kind in self.whole or self.recording.traced == "data":
            return False
        if kind.forward is nn.Sequential.forward and not is_touched(module):  # calls nothing itself
            return True
        stack, sink = self.stack, self.recording.sink

        def write(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            sink.take(path, target, args, kwargs, output)

        own = module.forward

        def unknown(x: Tensor) -> Any:
            stack.append(path)
            output = own(x)
            stack.pop()
            return output

        forward = quick_forward(module, unknown, write)
        if forward is None:
            return False
        attributes = vars(module)
        attributes["forward"] = forward
        self.recording.quick.append((attributes, forward))
        return True

    def _name_tensors(self) -> None:
        for name, tensor in self.tensors:
            value = self._set(tensor, self.recording.new(tensor, source=name))
            self.recording.sources[name] = value
            if tensor.layout == torch.strided and tensor.numel():
                self.storages.setdefault(tensor.untyped_storage()._cdata, value)

    def _follow(self, path: str, module: nn.Module) -> None:
        """Keep the path of the running module; take modules that have a rule of their own as one call."""
        if type(module) in self.whole:
            self._take_whole(path, module)
            return
        stack = self.stack
        if not is_touched(module):  # what hooks of others call belongs to the module as well
            own = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                stack.append(path)
                output = own(*args, **kwargs)
                stack.pop()
                return output

            forward.__wrapped__ = own  # type: ignore[attr-defined]  # by which its signature is found
            vars(module)["forward"] = forward
            self.followed.append(vars(module))
            return

        def enter(_: nn.Module, __: Any) -> None:
            self.stack.append(path)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self.stack.pop()

        _hook(module, enter, leave)

    def _take_whole(self, path: str, module: nn.Module) -> None:
        """Write a module down as one call, and nothing of what it calls."""

        def enter(_: nn.Module, __: Any) -> None:
            self.stack.append(path)
            self.silent += 1

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            self.silent -= 1
            if not self.silent:
                self._write(type(module), *self._known((module, *args), {}), output, path)

        _hook(module, enter, leave)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, written = kwargs or {}, not self.silent
        if written:
            before = self._known(args, kwargs)
        if self.recording.traced == "shapes":
            args, kwargs = one_device((args, kwargs))
            kwargs = with_data(func, args, kwargs)
        output = run_bare(func, args, kwargs)
        if written:
            self._write(func, *before, output, self.stack[-1])
        return output

    def _known(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[Value]]:
        """Arguments with values in place of tensors, and the list of these."""
        reads: list[Value] = []

        def known(tensor: Tensor) -> Value:
            value = self._value(tensor)
            reads.append(value)
            return value

        return each_tensor(args, known), each_tensor(kwargs, known) if kwargs else kwargs, reads

    def _write(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reads: list[Value],
        output: Any,
        path: str,
    ) -> None:
        result = each_tensor(output, self._result)
        frame = user_frame(Recorder._call.__code__)
        self.recording.calls.append(Call(target, args, kwargs, result, path, frame, reads))

    def _take(self, path: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Write down what a layer would have called; its tensors are arguments of their own, none of them named."""
        if self.silent:
            return
        reads, given = [], []
        for item in args:
            if isinstance(item, Tensor):
                value = self._value(item)
                reads.append(value)
                given.append(value)
            else:
                given.append(item)
        recording = self.recording
        if isinstance(output, Tensor):
            result: Any = self._result(output)
        else:
            result = tuple([recording.nothing() if x is None else self._result(x) for x in output])
        frame = user_frame(Recorder._call.__code__)
        recording.calls.append(Call(target, tuple(given), kwargs, result, path, frame, reads))

    def _result(self, leaf: Tensor) -> Value:
        """The value of an output: the one it has, if an operator in place gave back its argument unchanged in form."""
        known: Value | None = getattr(leaf, "_morph_value", None)
        if known is not None and known.shape == leaf.shape:
            return known
        return self._set(leaf, self.recording.new(leaf))

    def _value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one never seen before is a constant, or another view of a parameter."""
        known: Value | None = getattr(tensor, "_morph_value", None)
        if known is not None and known.shape == tensor.shape and self.recording.has(known):
            return known
        owner = self.storages.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        if owner is not None and owner.shape == tensor.shape:
            return self._set(tensor, owner)
        if owner is not None:
            self.recording.shared += (owner.source,)
        data = None if tensor.device.type == "meta" else tensor.detach()
        if data is None and self.needs_data:
            raise DataLostError
        return self._set(tensor, self.recording.new(tensor, data=data))

    def _set(self, tensor: Tensor, value: Value) -> Value:
        tensor._morph_value = value  # type: ignore[attr-defined]
        return value


def _hook(module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
    """Hook into a module without a handle, which takes longer: `put_back` takes off what a run has hooked in."""
    module._forward_pre_hooks[_OURS] = enter
    module._forward_hooks[_OURS] = leave


def _outputs(output: Any) -> list[Tensor]:
    """Every tensor of an output, also of classes that keep them as attributes."""
    found = tensors_of(output)
    return found or (tensors_of(list(vars(output).values())) if hasattr(output, "__dict__") else [])
