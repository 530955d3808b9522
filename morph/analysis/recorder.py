"""Run a model and write down every operator that it calls."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from morph.analysis.bare import each_tensor, one_device, run_bare, with_data
from morph.analysis.frames import user_frame
from morph.analysis.leaves import quick_forward
from morph.analysis.recording import (
    Call,
    How,
    Inputs,
    Recording,
    Value,
    arguments_of,
    first_line,
    named_modules,
    named_tensors,
    plain_attention,
    put_back,
    sharing,
    skeleton,
    tensors_of,
    without_data,
)
from morph.errors import MorphError, TraceError
from morph.inputs import in_order, plain
from morph.interpreter import Interpreter
from morph.tracing import place_of


def record(
    model: nn.Module, inputs: Inputs, whole: tuple[type[nn.Module], ...] = (), *, with_data: bool = False
) -> Recording:
    """Run a copy of ``model`` once in evaluation mode and list the operators that it calls.

    The run has shapes only; where the model's control flow asks for values, it is run again with data.

    Args:
        model: Any module; not touched.
        inputs: A tensor, a tuple of arguments, or a mapping of named arguments.
        whole: Module classes that are recorded as one call.
        with_data: Run with data at once.

    Raises:
        TraceError: If the model does not accept the inputs; names the user's line.
    """
    if with_data:
        return _record_data(model, inputs, whole)
    no_data = any(t.device.type == "meta" for t in model.parameters())
    try:
        meta = pytree.tree_map_only(Tensor, without_data, plain(inputs))
        bare = skeleton(model)
        recorder = _Recorder(bare, "shapes", whole)
        recorder.needs_data = not no_data
        recording = recorder.run(meta)
        recording.shared += sharing(model)
        recorder.train_too(meta)
        recording.skeleton = bare
    except Exception as shapes_only:
        if no_data:
            raise _refused(model, inputs, shapes_only) from shapes_only
    else:
        return recording
    return _record_data(model, inputs, whole)


def _record_data(model: nn.Module, inputs: Inputs, whole: tuple[type[nn.Module], ...]) -> Recording:
    """Run a copy of the model with its data."""
    try:
        own = pytree.tree_map_only(Tensor, Tensor.detach, plain(inputs))
        recorder = _Recorder(copy.deepcopy(model).eval(), "data", whole)
        recording = recorder.run(own)
        recording.shared += sharing(model)
        recorder.train_too(own)
    except Exception as error:
        raise _refused(model, inputs, error) from error
    return recording


def record_nodes(
    module: fx.GraphModule, inputs: Inputs, whole: tuple[type[nn.Module], ...] = ()
) -> tuple[Recording, dict[str, Any]]:
    """Record a traced graph without data; modules of the classes ``whole`` as one call.

    Returns:
        The recording, and what each node gave: values in place of tensors, numbers as they are.

    Raises:
        TraceError: If it does not run.
    """
    given: dict[str, Any] = {}

    class Watch(Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            given[n.name] = pytree.tree_map_only(Tensor, lambda t: getattr(t, "_morph_value", None), result)
            return result

    class Runner(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return Watch(module).run(*in_order(inspect.signature(module.forward), args, kwargs))

    recorder = _Recorder(module, "shapes", whole)
    recorder.runner = Runner()
    try:
        return recorder.run(inputs), given
    except MorphError:
        raise
    except Exception as error:
        raise TraceError(
            f"the graph of {type(module).__name__} does not run on these inputs: {first_line(error)}; a branch on an "
            "argument that is left out is taken as if it were given: give that argument"
        ) from error


def rerun(
    model: nn.Module, inputs: Inputs, traced: How, whole: tuple[type[nn.Module], ...] = ()
) -> tuple[Recording, str, Exception | None]:
    """Record a model that is our own, as far as it runs.

    Args:
        model: A copy that may be written to, and whose owner puts back what the run leaves in its modules; without
            data if ``traced`` is ``"shapes"``.
        inputs: As for `record`.
        traced: Whether to run with shapes only.
        whole: Module classes that are recorded as one call.

    Returns:
        The recording, the path of the module in which it ended, and the error that ended it, if one did.
    """
    form = without_data if traced == "shapes" else Tensor.detach
    recorder = _Recorder(model, traced, whole)
    recorder.afterwards = nullcontext
    try:
        recorder.run(pytree.tree_map_only(Tensor, form, plain(inputs)))
    except Exception as error:
        return recorder.recording, recorder.stack[-1], error
    return recorder.recording, "", None


def _refused(model: nn.Module, inputs: Inputs, error: Exception) -> TraceError:
    if isinstance(error, TraceError):
        return error
    shapes = ", ".join(str(list(t.shape)) for t in tensors_of(inputs))
    where = place_of(error)
    return TraceError(
        f"{type(model).__name__} does not accept inputs of shape {shapes}: {first_line(error)}"
        + (f" (at {where})" if where else "")
        + "; give inputs of the shape it was made for"
    )


class _DataLostError(Exception):
    """The model makes a constant on the device of its input, where there is no data."""


class _Recorder(TorchDispatchMode):
    """Writes down every operator; a tensor carries its value as an attribute, so that nothing is kept alive."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # there is nothing to compile here, and keeping the compiler away takes longer than an operator

    def __init__(self, model: nn.Module, traced: How, whole: tuple[type[nn.Module], ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.whole = model, whole
        self.recording = Recording(traced=traced, whole=whole)
        self.stack: list[str] = [""]
        self.silent = 0
        self.storages: dict[int, Value] = {}
        self.runner: nn.Module = model
        self.needs_data = False
        self.afterwards: Any = put_back

    def run(self, inputs: Inputs) -> Recording:
        """Record one call of the model."""
        self._name_tensors()
        recording = self.recording
        args, kwargs = arguments_of(inputs)
        for tensor in tensors_of((args, kwargs)):
            recording.inputs.append(self._set(tensor, recording.new(tensor, input=True)))
        recording.outputs = self._call(args, kwargs)
        recording.evaluated = len(recording.calls)
        return recording

    def train_too(self, inputs: Inputs) -> None:
        """Record a second run, in training mode, if evaluation leaves parameters unused (such as auxiliary heads)."""
        recording = self.recording
        used = {id(v) for call in recording.calls for v in call.reads}
        if all(id(v) in used or not v.floating for v in recording.sources.values()):
            return
        self.model.train()
        try:
            recording.outputs_in_training = self._call(*arguments_of(inputs))
        except Exception:  # it wants targets, or more samples: what only training uses stays whole
            del recording.calls[recording.evaluated :]
            self.stack, self.silent = [""], 0
        finally:
            self.model.eval()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Value]:
        """Call the model and give the values that come out."""
        hooks: list[Any] = []
        try:
            with self.afterwards(self.model), torch.no_grad(), plain_attention():
                for path, module in named_modules(self.model):
                    if not self._shorten(path, module):
                        hooks += self._follow(path, module)
                with self:
                    output = self.runner(*args, **kwargs)
        finally:
            for handle in hooks:
                handle.remove()
        return [self._value(t) for t in _outputs(output)]

    def _shorten(self, path: str, module: nn.Module) -> bool:
        """Let a layer of torch's own say what it calls without calling it; `put_back` undoes that."""
        kind = type(module)
        if kind in self.whole or self.recording.traced == "data":
            return False
        if kind is nn.Sequential:  # calls nothing itself
            return True

        def write(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.silent:
                self._write(target, args, kwargs, output, path)

        own = module.forward

        def unknown(x: Tensor) -> Any:
            self.stack.append(path)
            output = own(x)
            self.stack.pop()
            return output

        forward = quick_forward(module, unknown, write)
        if forward is not None:
            vars(module)["forward"] = forward
        return forward is not None

    def _name_tensors(self) -> None:
        for name, tensor in named_tensors(self.model):
            value = self._set(tensor, self.recording.new(tensor, source=name))
            self.recording.sources[name] = value
            if tensor.numel() and tensor.layout == torch.strided:
                self.storages.setdefault(tensor.untyped_storage()._cdata, value)

    def _follow(self, path: str, module: nn.Module) -> Iterator[Any]:
        """Keep the path of the running module; take modules that have a rule of their own as one call."""
        if type(module) in self.whole:
            yield from self._take_whole(path, module)
            return

        def enter(_: nn.Module, __: Any) -> None:
            self.stack.append(path)

        def leave(_: nn.Module, __: Any, ___: Any) -> None:
            self.stack.pop()

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def _take_whole(self, path: str, module: nn.Module) -> Iterator[Any]:
        """Write a module down as one call, and nothing of what it calls."""

        def enter(_: nn.Module, __: Any) -> None:
            self.stack.append(path)
            self.silent += 1

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            self.silent -= 1
            if not self.silent:
                self._write(type(module), (module, *args), {}, output, path)

        yield module.register_forward_pre_hook(enter)
        yield module.register_forward_hook(leave)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, written = kwargs or {}, not self.silent
        before = each_tensor((args, kwargs), self._value) if written else ((), {})
        if self.recording.traced == "shapes":
            args, kwargs = one_device((args, kwargs))
            kwargs = with_data(func, args, kwargs)
        output = run_bare(func, args, kwargs)
        if written:
            self._write(func, before[0], before[1], output, self.stack[-1], ready=True)
        return output

    def _write(
        self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str, ready: bool = False
    ) -> None:
        if not ready:
            args, kwargs = each_tensor((args, kwargs), self._value)
        result = each_tensor(output, self._result)
        self.recording.calls.append(Call(target, args, kwargs, result, path, user_frame(_Recorder._call.__code__)))

    def _result(self, leaf: Tensor) -> Value:
        """The value of an output: the one it has, if an operator in place gave back its argument unchanged in form."""
        known: Value | None = getattr(leaf, "_morph_value", None)
        if known is not None and known.shape == tuple(leaf.shape):
            return known
        return self._set(leaf, self.recording.new(leaf))

    def _value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one never seen before is a constant, or another view of a parameter."""
        known: Value | None = getattr(tensor, "_morph_value", None)
        if known is not None and known.shape == tuple(tensor.shape):
            return known
        owner = self.storages.get(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None
        if owner is not None and owner.shape == tuple(tensor.shape):
            return self._set(tensor, owner)
        if owner is not None:
            self.recording.shared += (owner.source,)
        data = None if tensor.device.type == "meta" else tensor.detach()
        if data is None and self.needs_data:
            raise _DataLostError
        return self._set(tensor, self.recording.new(tensor, data=data))

    def _set(self, tensor: Tensor, value: Value) -> Value:
        tensor._morph_value = value  # type: ignore[attr-defined]
        return value


def _outputs(output: Any) -> list[Tensor]:
    """Every tensor of an output, also of classes that keep them as attributes."""
    found = tensors_of(output)
    return found or (tensors_of(list(vars(output).values())) if hasattr(output, "__dict__") else [])
