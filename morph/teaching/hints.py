"""The first of two stages: only the part of the student up to the guided layer learns, from the teacher's hint.

Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, section 2.3. The second stage is a
`morph.teaching.distillation.Distillation` of the same student with soft labels; learning both together is one with
`Features` beside them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from morph.errors import TeachingError
from morph.teaching.feature_losses import Hint
from morph.teaching.frozen import WithTeacher
from morph.teaching.objective import Step
from morph.teaching.taps import tap
from morph.teaching.terms import Features, bridges_of, loss_of_pairs, named_terms, pairs_of


class Hints(WithTeacher):
    """A student that learns features of a frozen teacher and nothing else.

    Both networks run up to the last of the layers; the step has no logits. ``parameters()`` are those that have a part
    in it: the guided part of the student, and the adapters.

    Args:
        student: Trained in place, up to the guided layer.
        teacher: Not touched.
        pairs: ``(tap of the teacher, tap of the student)``; by default the middle one of those that `propose_pairs`
            finds.
        example_inputs: One batch, or a tuple of arguments, that both accept.
        loss: Of a pair; by default `morph.teaching.feature_losses.Hint`.

    Attributes:
        student: The whole student, to validate and save.
        adapters: The regressors.
        pairs: Print them.
        guided: Names of the parameters of the student that learn.

    Raises:
        TeachingError: If the pairs cannot be, or nothing of the student would learn.
        TapError, TraceError: As elsewhere.

    Example:
        >>> from morph.zoo import build
        >>> student, teacher, x = build("wrn-10-1"), build("wrn-16-2"), torch.randn(2, 3, 32, 32)
        >>> hints = Hints(student, teacher, [("groups.1", "groups.1")], example_inputs=x)
        >>> print(hints.pairs)
        teacher             student             bridge
        groups.1  64x16x16  groups.1  32x16x16  1x1 convolution 32 -> 64
        >>> hints(x, torch.tensor([3, 7])).logits is None
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[tuple[str, str]] | None = None,
        *,
        example_inputs: Any,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(teacher)
        self.student = student
        self.term = Features(loss if loss is not None else Hint(), pairs)
        (self.name,) = named_terms([self.term])
        found = pairs_of(self.term, self.teacher, student, example_inputs)
        self.pairs = type(found)((found[len(found) // 2],)) if pairs is None else found
        self.loss = self.term.loss
        self.adapters = bridges_of(self.term, self.pairs, student)
        self._ours = tap(student, [pair.student for pair in self.pairs])
        self._theirs = tap(self.teacher, [pair.teacher for pair in self.pairs])
        self.guided = frozenset(_guided(student, [pair.student for pair in self.pairs], example_inputs))
        unguided = [f"student.{name}" for name, _ in student.named_parameters() if name not in self.guided]
        # DistributedDataParallel waits for the gradients of all parameters but of those that are named here.
        self._ddp_params_and_buffers_to_ignore = unguided

    def forward(self, x: Any, y: Tensor | Sequence[Any] | None = None) -> Step:
        """The loss of one batch.

        Args:
            x: Input of both networks.
            y: Not looked at.
        """
        with torch.no_grad():
            theirs = self._theirs.features(x)
        loss = loss_of_pairs(self.term, self.pairs, self.adapters, self._ours.features(x), theirs)
        return Step(loss, {self.name: loss.detach()}, None)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that learn; ``state_dict()`` has all."""
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            short = name.removeprefix(start)
            if not short.startswith("student.") or short.removeprefix("student.") in self.guided:
                yield name, parameter


def _guided(student: nn.Module, names: Sequence[str], example_inputs: Any) -> list[str]:
    """The parameters that get a gradient from taps; found with a copy."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    twin = copy.deepcopy(student).eval()
    trained = [name for name, p in twin.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        features = tap(twin, names).features(*inputs)
        total = torch.stack([value.sum() for value in features.values()]).sum()
        if not trained or not total.requires_grad:
            raise TeachingError(f"nothing of the student learns before {', '.join(names)}: its parameters are frozen")
        total.backward()
    return [name for name, p in twin.named_parameters() if p.grad is not None]
