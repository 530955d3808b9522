"""Find the classifiers of a model by trying: whoever permutes them permutes the classes of an output, and nothing else.

A model is run in evaluation mode and in training mode, where auxiliary heads run too. The layers with as many outputs
as there are classes are tried from the last one called to the first: with random weights, and with the same weights in
another order. So no name, class or place is believed, and code that cannot be traced is no obstacle.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from morph.analysis.recording import Inputs, arguments_of
from morph.errors import HeadError
from morph.passes.class_heads import why_not
from morph.tracing import place_of
from morph.zeroing import doubled, in_float64, outputs_of

_LIMIT = 1e-9


@dataclass(frozen=True)
class FoundHead:
    """A layer that makes the classes of one output.

    Attributes:
        path: Where it is.
        shape: Shape of its weight.
        output: Which of the model's floating-point outputs.
        axis: Its axis that holds the classes.
        training: Whether that is an output of training mode; else of evaluation mode.
        apart: Whether a class depends on its own weights alone; not so behind a softmax.
    """

    path: str
    shape: tuple[int, ...]
    output: int
    axis: int
    training: bool
    apart: bool


def find_heads(model: nn.Module, inputs: Inputs) -> list[FoundHead]:
    """The classifier of the first output, and those of all outputs that have as many classes.

    Args:
        model: Not touched.
        inputs: As for the model.

    Raises:
        HeadError: If an output with as many classes as the first has no head that can be swapped; says what was tried.
    """
    found: list[FoundHead] = []
    classes = 0
    for training in (False, True):
        trial = _Trial(model, inputs, training=training)
        for output, tensor in enumerate(trial.outputs):
            axis = _class_axis(tensor)
            if axis is None or (classes and tensor.shape[axis] != classes):
                continue
            classes = classes or tensor.shape[axis]
            found.append(trial.head_of(output, axis))
        if not classes:
            raise HeadError(
                f"{type(model).__name__} puts out {_shapes(trial.outputs)}; a classifier puts out logits "
                "[N, classes], [N, classes, ...] or [N, tokens, classes]"
            )
    return found


def _class_axis(tensor: Tensor) -> int | None:
    """The axis of an output that would hold classes: the last one of tokens, else that behind the batch."""
    return None if tensor.dim() < 2 else 2 if tensor.dim() == 3 else 1


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in outputs) or "no floating-point tensor"


class _Trial:
    """A float64 copy of a model in one mode, and the layers that it calls."""

    def __init__(self, model: nn.Module, inputs: Inputs, *, training: bool) -> None:
        self.twin = copy.deepcopy(model).double().train(training)
        self.inputs, self.training = doubled(arguments_of(inputs)), training
        self._state = {name: t.clone() for name, t in self.twin.state_dict().items()}
        self.called: list[str] = []
        self._before: list[Tensor] = []  # with random weights in the layer that was tried last
        layers = [(p, m) for p, m in self.twin.named_modules() if isinstance(m, nn.Linear | _ConvNd)]
        handles = [m.register_forward_pre_hook(lambda *_, path=p: self.called.append(path)) for p, m in layers]
        self.outputs = self._run()
        for handle in handles:
            handle.remove()

    def _run(self) -> list[Tensor]:
        """The outputs with the weights as they are; statistics of batch norm begin as they were."""
        weights = {name: p.clone() for name, p in self.twin.named_parameters()}
        self.twin.load_state_dict(self._state | weights)
        args, kwargs = self.inputs
        mode = "training" if self.training else "evaluation"
        try:
            with torch.no_grad(), in_float64():
                return outputs_of(self.twin(*args, **kwargs))
        except Exception as error:
            where = place_of(error)
            raise HeadError(
                f"{type(self.twin).__name__} does not run in {mode} mode on these inputs: {error}"
                + (f" (at {where})" if where else "")
                + "; give a batch of two samples or more"
            ) from error

    def head_of(self, output: int, axis: int) -> FoundHead:
        """The head that makes the classes of an output.

        Raises:
            HeadError: If none of the layers does.
        """
        classes = self.outputs[output].shape[axis]
        reasons: list[str] = []
        for path in dict.fromkeys(reversed(self.called)):
            module = self.twin.get_submodule(path)
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.shape[0] != classes:
                continue
            reason = why_not(module) or self._why_not(module, output, axis)
            if not reason:
                apart = not self._moves_others(module, output, axis)
                return FoundHead(path, tuple(weight.shape), output, axis, self.training, apart)
            reasons.append(f"{path}: {reason}")
        tried = "; ".join(reasons[:3]) or f"no linear layer or convolution has {classes} outputs"
        raise HeadError(
            f"{type(self.twin).__name__} has no classifier that can be swapped for its output "
            f"{list(self.outputs[output].shape)} in {'training' if self.training else 'evaluation'} mode: {tried}"
        )

    def _why_not(self, module: nn.Module, output: int, axis: int) -> str:
        """Why a layer is not the head of an output; '' if it is."""
        self._before = before = self._with(module, _random)
        after = self._with(module, lambda t: _random(t).roll(1, 0))
        wanted = before[output].roll(1, axis)
        if _same(before[output], wanted):
            return "with random weights it gives all classes the same"
        if not _same(after[output], wanted):
            return "the output is not its classes, or its weights are used elsewhere too"
        for other, (a, b) in enumerate(zip(before, after, strict=True)):
            if other != output and not _same(a, b) and not (a.dim() > axis and _same(a.roll(1, axis), b)):
                return f"output {other} reads it too"
        return ""

    def _moves_others(self, module: nn.Module, output: int, axis: int) -> bool:
        """Whether the weights of one class move the output of another; asked right behind `_why_not`."""

        def changed(tensor: Tensor) -> Tensor:
            return torch.cat([tensor[:1] * 0.5, tensor[1:]])

        before = self._before[output]
        after = self._with(module, lambda t: changed(_random(t)))[output]
        rest = slice(1, None)
        return not _same(before.movedim(axis, 0)[rest], after.movedim(axis, 0)[rest])

    def _with(self, module: nn.Module, make: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The outputs with other weights in one layer; afterwards it has its own again."""
        own = [(p, p.detach().clone()) for p in module._parameters.values() if p is not None]
        with torch.no_grad():
            for parameter, value in own:
                parameter.copy_(make(value))
            try:
                return self._run()
            finally:
                for parameter, value in own:
                    parameter.copy_(value)


def _random(like: Tensor) -> Tensor:
    """Normal numbers that depend on the shape alone, of the size of a layer's weights."""
    generator = torch.Generator().manual_seed(like.dim())
    numbers = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
    return numbers / math.sqrt(max(1, like[0].numel()))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    if a.shape != b.shape:
        return False
    scale = float(a.abs().max()) if a.numel() else 0.0
    return not a.numel() or float((a - b).abs().max()) <= _LIMIT * (scale or 1.0)
