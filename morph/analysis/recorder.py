"""Run a model and write down every operator that it calls."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from morph.analysis.recorder_mode import Recorder
from morph.analysis.recording import (
    How,
    Inputs,
    Modules,
    Recording,
    evaluating,
    first_line,
    named_modules,
    named_tensors,
    sharing,
    skeleton,
    tensors_in,
    tensors_of,
    without_data,
)
from morph.copying import copy_module, uncopied
from morph.errors import MorphError, TraceError
from morph.inputs import in_order, plain
from morph.interpreter import Interpreter
from morph.tracing import place_of


def record(
    model: nn.Module,
    inputs: Inputs,
    whole: tuple[type[nn.Module], ...] = (),
    *,
    with_data: bool = False,
    modules: Modules | None = None,
) -> Recording:
    """Run a copy of ``model`` once in evaluation mode and list the operators that it calls.

    The run has shapes only; where the model's control flow asks for values, it is run again with data.

    Args:
        model: Any module; not touched.
        inputs: A tensor, a tuple of arguments, or a mapping of named arguments.
        whole: Module classes that are recorded as one call.
        with_data: Run with data at once.
        modules: Its `named_modules`, if they are at hand.

    Raises:
        TraceError: If the model does not accept the inputs; names the user's line.
    """
    if with_data:
        return _record_data(model, inputs, whole)
    tensors = tensors_in(named_modules(model) if modules is None else modules)
    no_data = any(t.is_meta and isinstance(t, nn.Parameter) for _, t in tensors)
    bare: nn.Module | None = None
    try:
        meta = pytree.tree_map_only(Tensor, without_data, plain(inputs))
        bare = skeleton(model, tensors)
        recorder = Recorder(bare, "shapes", whole)
        recorder.needs_data = not no_data
        recording = recorder.run(meta)
        recording.shared += sharing(tensors)
        recorder.train_too(meta)
        recording.twin, recording.kept = bare, recorder.kept
    except Exception as shapes_only:
        if no_data:
            raise _refused(model, inputs, shapes_only) from shapes_only
    else:
        return recording
    recording = _record_data(model, inputs, whole)
    if all(t.device.type == "cpu" for t in [*tensors_of(inputs), *(t for _, t in tensors)]):
        recording.skeleton = bare
    return recording


def _record_data(model: nn.Module, inputs: Inputs, whole: tuple[type[nn.Module], ...]) -> Recording:
    """Run a copy of the model with its data."""
    try:
        twin = evaluating(copy_module(model))
    except Exception as error:
        raise uncopied(model, error) from error
    try:
        own = pytree.tree_map_only(Tensor, Tensor.detach, plain(inputs))
        recorder = Recorder(twin, "data", whole)
        recording = recorder.run(own)
        recording.shared += sharing(named_tensors(model))
        if not recorder.train_too(own):
            recording.twin, recording.kept = twin, recorder.kept
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

    recorder = Recorder(module, "shapes", whole)
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
    recorder = Recorder(model, traced, whole)
    recorder.puts_back = False
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
