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
from morph.inputs import Inputs, arguments_of
from morph.teaching.feature_losses import Hint
from morph.teaching.frozen import WithTeacher
from morph.teaching.objective import Step
from morph.teaching.pairing import Pairs, propose_pairs
from morph.teaching.taps import tap
from morph.teaching.terms import Features, Term, bridges_of, loss_of_pairs, named_terms, pairs_of


class Hints(WithTeacher):
    """A student that learns features of a frozen teacher and nothing else.

    Both networks run up to the last of the layers; the step has no logits. ``parameters()`` are those that have a part
    in it: the guided part of the student, and the adapters.

    Args:
        student: Trained in place, up to the guided layer.
        teacher: Not touched.
        terms: Losses on features; None for a `morph.teaching.feature_losses.Hint` of the middle one of the pairs that
            `propose_pairs` finds.
        example_inputs: One batch that both accept: a tensor, a tuple of arguments or a mapping of named ones.

    Attributes:
        student: The whole student, to validate and save.
        teacher: The frozen copy.
        terms: By the names of their parts.
        adapters: The regressors.
        pairs: The pairs of each term, by its name; print them.
        guided: Names of the parameters of the student that learn.

    Raises:
        TeachingError: If the pairs cannot be, a term is not on features, or nothing of the student would learn.
        TapError, TraceError: As elsewhere.

    Example:
        >>> from morph.zoo import build
        >>> student, teacher, x = build("wrn-10-1"), build("wrn-16-2"), torch.randn(2, 3, 32, 32)
        >>> hints = Hints(student, teacher, [Features(Hint(), [("groups.1", "groups.1")])], example_inputs=x)
        >>> print(hints.pairs["hint"])
        teacher             student             bridge
        groups.1  64x16x16  groups.1  32x16x16  1x1 convolution 32 -> 64
        >>> hints(x, torch.tensor([3, 7])).logits is None
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Features] | None = None,
        *,
        example_inputs: Inputs,
    ) -> None:
        super().__init__(teacher)
        self.student = student
        if terms is None:
            proposed = propose_pairs(teacher, student, example_inputs)
            terms = [Features(Hint(), Pairs((proposed[len(proposed) // 2],)))]
        self.terms = _features(named_terms(terms))
        self.losses = nn.ModuleDict({name: term.loss for name, term in self.terms.items()})
        self.pairs = {n: pairs_of(term, self.teacher, student, example_inputs) for n, term in self.terms.items()}
        self.adapters = nn.ModuleDict({name: bridges_of(pairs, student) for name, pairs in self.pairs.items()})
        all_pairs = [pair for found in self.pairs.values() for pair in found]
        names = list(dict.fromkeys(pair.student for pair in all_pairs))
        self._ours = tap(student, names)
        self._theirs = tap(self.teacher, list(dict.fromkeys(pair.teacher for pair in all_pairs)))
        self.guided = frozenset(_guided(student, names, example_inputs))
        # DistributedDataParallel waits for the gradients of all parameters but of those that are named here.
        self._ddp_params_and_buffers_to_ignore = [
            f"student.{name}" for name, _ in student.named_parameters() if name not in self.guided
        ]

    def forward(self, x: Inputs, y: Tensor | Sequence[Any] | None = None) -> Step:
        """The loss of one batch.

        Args:
            x: Inputs of both networks, likewise.
            y: Not looked at.
        """
        args, kwargs = arguments_of(x)
        with torch.no_grad():
            theirs = self._theirs.features(*args, **kwargs)
        ours = self._ours.features(*args, **kwargs)
        losses = {
            name: loss_of_pairs(term, self.pairs[name], self.adapters[name], ours, theirs)
            for name, term in self.terms.items()
        }
        loss = torch.stack([term.weight * losses[name] for name, term in self.terms.items()]).sum()
        return Step(loss, {name: value.detach() for name, value in losses.items()}, None)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those that learn; ``state_dict()`` has all."""
        start = f"{prefix}." if prefix else ""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            short = name.removeprefix(start)
            if not short.startswith("student.") or short.removeprefix("student.") in self.guided:
                yield name, parameter


def _features(terms: dict[str, Term]) -> dict[str, Features]:
    """Terms that are all on features."""
    found = {name: term for name, term in terms.items() if isinstance(term, Features)}
    if len(found) < len(terms):
        other = next(name for name in terms if name not in found)
        raise TeachingError(f"{other} is no loss on features; a stage of hints has only these, so teach it afterwards")
    return found


def _guided(student: nn.Module, names: Sequence[str], example_inputs: Inputs) -> list[str]:
    """The parameters that get a gradient from taps; found with a copy."""
    args, kwargs = arguments_of(example_inputs)
    twin = copy.deepcopy(student).eval()
    trained = [name for name, p in twin.named_parameters() if p.requires_grad]
    with torch.enable_grad():
        features = tap(twin, names).features(*args, **kwargs)
        total = torch.stack([value.sum() for value in features.values()]).sum()
        if not trained or not total.requires_grad:
            raise TeachingError(f"nothing of the student learns before {', '.join(names)}: its parameters are frozen")
        total.backward()
    return [name for name, p in twin.named_parameters() if p.grad is not None]
