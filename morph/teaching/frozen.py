"""A module that has a teacher without owning it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from morph.errors import TeachingError
from morph.inputs import Inputs, arguments_of, run_on
from morph.teaching.objective import logits_and_heads
from morph.tracing import try_inputs


class WithTeacher(nn.Module):
    """Base of the objectives that have a teacher.

    The teacher is a copy in evaluation mode whose parameters are not trained. It moves along with this module, but is
    neither among its modules and parameters nor in its state.

    Args:
        teacher: Not touched.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self._teacher = (copy.deepcopy(teacher).eval().requires_grad_(False),)  # in a tuple, so it is no submodule

    @property
    def teacher(self) -> nn.Module:
        """The frozen copy of the teacher."""
        return self._teacher[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever moves this module moves the teacher too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher._apply(fn, recurse)
        return self


def check_outputs(teacher: nn.Module, student: nn.Module, example_inputs: Inputs, *, compared: bool) -> None:
    """See that both accept the inputs and give logits, and, if outputs are compared, those of the same classes.

    Raises:
        TeachingError: If they do not.
        TraceError: If one does not accept the inputs.
    """
    shapes = []
    for whose, model in (("teacher", teacher), ("student", student)):
        twin = copy.deepcopy(model).eval()
        try_inputs(twin, *arguments_of(example_inputs))
        with torch.no_grad():
            logits, _ = logits_and_heads(run_on(twin, example_inputs))
        if logits.dim() != 2:
            raise TeachingError(f"the {whose} gives outputs of {tuple(logits.shape)}; expected logits [N, classes]")
        shapes.append(logits.shape)
    if compared and shapes[0] != shapes[1]:
        raise TeachingError(
            f"the teacher has {shapes[0][1]} classes, the student {shapes[1][1]}; both must have the same: give one of "
            "them another head (morph.swap_head)"
        )
