"""The objective of distillation: a student learns from a frozen teacher, by any sum of losses on outputs and features.

Sources: those of `morph.teaching.losses` and `morph.teaching.feature_losses`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from morph.errors import TeachingError
from morph.teaching.adapters import Bridge
from morph.teaching.losses import OutputLoss
from morph.teaching.objective import (
    AUXILIARY_WEIGHT,
    Step,
    auxiliary_loss,
    check_weight,
    labels_of,
    logits_and_heads,
)
from morph.teaching.pairing import Pairs, check_pairs, propose_pairs
from morph.teaching.taps import tap
from morph.tracing import try_inputs


@dataclass(frozen=True)
class Outputs:
    """A term of a distillation: a loss between outputs.

    Attributes:
        loss: As those of `morph.teaching.losses`.
        weight: 0 or above.
        name: What the part is called; by default after the loss.
    """

    loss: nn.Module
    weight: float = 1.0
    name: str | None = None


@dataclass(frozen=True)
class Features:
    """A term of a distillation: a loss between feature maps, summed over pairs of layers.

    Attributes:
        loss: As those of `morph.teaching.feature_losses`: ``(student_map, teacher_map)`` to a scalar. Unless it says
            ``channels_must_agree = False``, the student's map gets the teacher's channels and size by an adapter.
        pairs: ``(tap of the teacher, tap of the student)``; None for those that `propose_pairs` finds.
        weight: 0 or above.
        name: What the part is called; by default after the loss.
        number: How many pairs are proposed at most.
    """

    loss: nn.Module
    pairs: Sequence[tuple[str, str]] | Pairs | None = None
    weight: float = 1.0
    name: str | None = None
    number: int = 3


Term = Outputs | Features


class Distillation(nn.Module):
    """A student, a frozen teacher, and what the one shall learn from the other.

    Called with a batch it gives a `morph.teaching.objective.Step`. Each network runs once for a batch; the teacher, in
    evaluation mode and without gradients, not at all where its outputs are given. The student is trained as it is, its
    own class and parameters; adapters between layers are parameters of this module. The teacher is a copy that moves
    along with this module, but is neither among its parameters nor in its state.

    Args:
        student: Trained in place. A student with auxiliary heads (`Labels`) pays for them too, with the labels.
        teacher: Not touched.
        terms: What is summed; a loss alone stands for `Outputs` of it.
        example_inputs: One batch, or a tuple of arguments, that both accept; needed where features are taught. With
            them it is seen to at once that both have the same classes.
        auxiliary_weight: Of the auxiliary heads; 0.4 for DARTS.

    Attributes:
        student: The module to validate and save.
        teacher: The frozen copy.
        adapters: What is learned beside the student; has nothing in it where no adapter is needed.
        pairs: The pairs of each term on features, by the name of the term; print them.

    Raises:
        TeachingError: If teacher and student do not fit together, or a number is out of its range.
        TapError: If there is no such tap.
        TraceError: If a network does not accept the inputs.

    Example:
        >>> from morph.zoo import build
        >>> from morph.teaching.losses import SoftLabels
        >>> from morph.teaching.feature_losses import AttentionTransfer
        >>> student, teacher, x = build("wrn-10-1"), build("wrn-16-2"), torch.randn(2, 3, 32, 32)
        >>> terms = [SoftLabels(4.0, 0.9), Features(AttentionTransfer())]
        >>> step = Distillation(student, teacher, terms, example_inputs=x)(x, torch.tensor([3, 7]))
        >>> sorted(step.parts), step.logits.shape
        (['attention_transfer', 'soft_labels'], torch.Size([2, 10]))
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        terms: Sequence[Term | nn.Module],
        *,
        example_inputs: Any = None,
        auxiliary_weight: float = AUXILIARY_WEIGHT,
    ) -> None:
        super().__init__()
        check_weight("the auxiliary heads", auxiliary_weight)
        self.student, self.auxiliary_weight = student, auxiliary_weight
        self._teacher = (frozen(teacher),)  # in a tuple: not a part of this module
        self.terms = _named(terms)
        self.losses = nn.ModuleDict({name: term.loss for name, term in self.terms.items()})
        self.pairs: dict[str, Pairs] = {}
        self.adapters = nn.ModuleDict()
        if example_inputs is not None:
            _check_outputs(self.teacher, student, self.terms, example_inputs)
        for name, term in self.terms.items():
            if isinstance(term, Features):
                self.pairs[name] = pairs_of(term, self.teacher, student, example_inputs)
                project = getattr(term.loss, "channels_must_agree", True)
                self.adapters[name] = nn.ModuleList(pair.bridge(project=project) for pair in self.pairs[name])
        self.adapters.to(_device_of(student))
        pairs = [pair for found in self.pairs.values() for pair in found]
        self._taps = [
            tap(model, list(dict.fromkeys(names))) if names else None
            for model, names in (
                (self.teacher, [pair.teacher for pair in pairs]),
                (student, [pair.student for pair in pairs]),
            )
        ]

    @property
    def teacher(self) -> nn.Module:
        """The frozen copy of the teacher."""
        return self._teacher[0]

    @property
    def needs_teacher_logits(self) -> bool:
        """Whether a term looks at the teacher's outputs."""
        return any(isinstance(t, Outputs) and getattr(t.loss, "needs_teacher", True) for t in self.terms.values())

    def forward(self, x: Any, y: Tensor | Sequence[Any], teacher_logits: Tensor | None = None) -> Step:
        """The loss of one batch.

        Args:
            x: Input of both networks.
            y: Labels ``[N]``, or a sequence that begins with them.
            teacher_logits: The teacher's outputs ``[N, C]`` for this very input, if they are known already.

        Raises:
            TeachingError: If the outputs do not fit together.
        """
        labels = labels_of(y)
        wanted, theirs = self._teach(x, teacher_logits)
        taps = self._taps[1]
        output, ours = taps(x) if taps is not None else (self.student(x), {})
        logits, heads = logits_and_heads(output)
        wide = _wide(logits)
        losses = {}
        for name, term in self.terms.items():
            if isinstance(term, Outputs):
                losses[name] = term.loss(wide, wanted, labels)
            else:
                losses[name] = self._of_pairs(name, term, ours, theirs)
        loss = torch.stack([term.weight * losses[name] for name, term in self.terms.items()]).sum()
        if heads and self.auxiliary_weight:
            losses["auxiliary"] = auxiliary_loss(heads, labels)
            loss = loss + self.auxiliary_weight * losses["auxiliary"]
        return Step(loss, {name: value.detach() for name, value in losses.items()}, logits)

    def _teach(self, x: Any, logits: Tensor | None) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's logits and features, as far as they are needed."""
        taps, output = self._taps[0], None
        features: dict[str, Tensor] = {}
        with torch.no_grad():
            if self.needs_teacher_logits and logits is None:
                output, features = taps(x) if taps is not None else (self.teacher(x), {})
                logits, _ = logits_and_heads(output)
            elif taps is not None:
                features = taps.features(x)
        return None if logits is None else _wide(logits), features

    def _of_pairs(self, name: str, term: Features, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Tensor:
        """A term on features: its sum over the pairs."""
        bridges = self.adapters[name]
        assert isinstance(bridges, nn.ModuleList)
        return sum_of_pairs(term.loss, self.pairs[name], bridges, ours, theirs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever moves this module moves the teacher too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.teacher._apply(fn, recurse)
        return self


def frozen(teacher: nn.Module) -> nn.Module:
    """A copy in evaluation mode, none of whose parameters is trained."""
    return copy.deepcopy(teacher).eval().requires_grad_(False)


def pairs_of(term: Features, teacher: nn.Module, student: nn.Module, example_inputs: Any) -> Pairs:
    """The pairs of a term: the user's, checked, or those that are proposed.

    Raises:
        TeachingError: If there are no example inputs, or the pairs cannot be.
        TapError, TraceError: As elsewhere.
    """
    if isinstance(term.pairs, Pairs):
        return term.pairs
    if example_inputs is None:
        raise TeachingError("features are taught, so give example_inputs: one batch, for the shapes of the layers")
    if term.pairs is None:
        return propose_pairs(teacher, student, example_inputs, term.number)
    return check_pairs(teacher, student, term.pairs, example_inputs)


def sum_of_pairs(
    loss: nn.Module, pairs: Pairs, bridges: nn.ModuleList, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Tensor:
    """A loss on features, summed over pairs of layers; half-precision features are widened first."""
    found = []
    for pair, bridge in zip(pairs, bridges, strict=True):
        assert isinstance(bridge, Bridge)
        student, teacher = bridge(ours[pair.student], theirs[pair.teacher])
        found.append(loss(_wide(student), _wide(teacher)))
    return torch.stack(found).sum()


def _wide(values: Tensor) -> Tensor:
    """Half-precision values in float32: squares of activations overflow float16."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _named(terms: Sequence[Term | nn.Module]) -> dict[str, Term]:
    """Terms by the names of their parts."""
    found: dict[str, Term] = {}
    for given in terms:
        term = Outputs(given) if isinstance(given, nn.Module) else given
        base = term.name or _snake(type(term.loss).__name__)
        check_weight(base, term.weight)
        if isinstance(term, Outputs) and hasattr(term.loss, "channels_must_agree"):
            raise TeachingError(f"{type(term.loss).__name__} is a loss on features; wrap it in Features(loss, pairs)")
        if isinstance(term, Features) and isinstance(term.loss, OutputLoss):
            raise TeachingError(f"{type(term.loss).__name__} is a loss on outputs; wrap it in Outputs(loss)")
        name, number = base, 2
        while name in found:
            name, number = f"{base}_{number}", number + 1
        found[name] = term
    if not found:
        raise TeachingError("a distillation of no terms; give one or more losses, or train with Labels(student)")
    return found


def _snake(name: str) -> str:
    """``SoftLabels`` to ``soft_labels``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _check_outputs(teacher: nn.Module, student: nn.Module, terms: dict[str, Term], example_inputs: Any) -> None:
    """See that both accept the inputs, and that those losses that compare outputs are given the same classes."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    twin = copy.deepcopy(student).eval()
    shapes = []
    for whose, model in (("teacher", teacher), ("student", twin)):
        try_inputs(model, inputs)
        with torch.no_grad():
            logits, _ = logits_and_heads(model(*inputs))
        if logits.dim() != 2:
            raise TeachingError(
                f"the {whose} gives outputs of shape {tuple(logits.shape)}; expected logits [N, classes]"
            )
        shapes.append(logits.shape)
    compares = any(isinstance(t, Outputs) and getattr(t.loss, "needs_teacher", True) for t in terms.values())
    if compares and shapes[0] != shapes[1]:
        raise TeachingError(
            f"the teacher has {shapes[0][1]} classes, the student {shapes[1][1]}; both must have the same: give one of "
            "them another head (morph.swap_head)"
        )


def _device_of(module: nn.Module) -> torch.device:
    found = next(module.parameters(), None)
    return found.device if found is not None else torch.device("cpu")
