"""What a distillation sums: losses on outputs, on feature maps, and on the channels of multi-channel labels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from morph.errors import TeachingError
from morph.inputs import Inputs
from morph.label_heads import LabelHead, score_path
from morph.teaching.adapters import Bridge
from morph.teaching.losses import MultiChannelBCE, OutputLoss
from morph.teaching.objective import check_weight
from morph.teaching.pairing import Pairs, check_pairs, propose_pairs


@dataclass(frozen=True)
class Outputs:
    """A loss between outputs.

    Attributes:
        loss: As those of `morph.teaching.losses`.
        weight: 0 or above.
        name: What the part is called; by default after the loss.
    """

    loss: nn.Module
    weight: float = 1.0
    name: str | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher's outputs."""
        return bool(getattr(self.loss, "needs_teacher", True))


@dataclass(frozen=True)
class Features:
    """A loss between feature maps, summed over pairs of layers.

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

    @property
    def projects(self) -> bool:
        """Whether the student's channels must become those of the teacher."""
        return bool(getattr(self.loss, "channels_must_agree", True))


@dataclass(frozen=True)
class Channels:
    """A loss between the channels of multi-channel labels.

    The bits are those that come with the labels; if there are none, the teacher's: set where the sigmoid of the logit
    of its channel is at the threshold or above.

    Attributes:
        student: Tap of the student that gives the logits of the channels, before the sigmoid:
            ``[N, classes * channels]``, or more axes that are flattened. None for that of its label head
            (`morph.label_heads`).
        teacher: Likewise of the teacher; None for that of its label head, or, if it has none, for none: bits then come
            with the labels.
        threshold: Above 0 and below 1.
        loss: As `morph.teaching.losses.MultiChannelBCE`.
        weight: 0 or above.
        name: What the part is called.
    """

    student: str | None = None
    teacher: str | None = None
    threshold: float = 0.5
    loss: nn.Module = field(default_factory=MultiChannelBCE)
    weight: float = 1.0
    name: str | None = "multi_channel"

    def bits(self, logits: Tensor) -> Tensor:
        """The bits ``[N, classes * channels]`` of the teacher's logits of channels."""
        return torch.sigmoid(logits.flatten(1)) >= self.threshold


Term = Outputs | Features | Channels


def named_terms(terms: Sequence[Term | nn.Module]) -> dict[str, Term]:
    """Terms by the names of their parts; a loss alone stands for `Outputs` of it.

    Raises:
        TeachingError: If there is none, a weight is out of its range, or a loss stands in the wrong kind of term.
    """
    found: dict[str, Term] = {}
    for given in terms:
        term = Outputs(given) if isinstance(given, nn.Module) else given
        kind = type(term.loss).__name__
        base = term.name or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
        check_weight(base, term.weight)
        if isinstance(term, Outputs) and hasattr(term.loss, "channels_must_agree"):
            raise TeachingError(f"{kind} is a loss on features; wrap it in Features(loss, pairs)")
        if isinstance(term, Features) and isinstance(term.loss, OutputLoss):
            raise TeachingError(f"{kind} is a loss on outputs; wrap it in Outputs(loss)")
        if isinstance(term, Channels) and not 0 < term.threshold < 1:
            raise TeachingError(f"a threshold of {term.threshold}; give one above 0 and below 1, e.g. 0.5")
        name, number = base, 2
        while name in found:
            name, number = f"{base}_{number}", number + 1
        found[name] = term
    if not found:
        raise TeachingError("a distillation of no terms; give one or more losses, or train with Labels(student)")
    return found


def with_taps(term: Term, teacher: nn.Module, student: nn.Module) -> Term:
    """A term on channels with the taps of the label heads, where none are named; any other as it is.

    Raises:
        HeadError: If the student has no label head; says how it gets one.
    """
    if not isinstance(term, Channels):
        return term
    found = term.student or score_path(student)
    heads = sum(isinstance(module, LabelHead) for module in teacher.modules())
    theirs = term.teacher or (score_path(teacher) if heads == 1 else None)
    return dataclasses.replace(term, student=found, teacher=theirs)


def pairs_of(term: Features, teacher: nn.Module, student: nn.Module, example_inputs: Inputs | None) -> Pairs:
    """The pairs of a term: the user's, checked, or those that are proposed.

    Raises:
        TeachingError: If there are no example inputs, or the pairs cannot be.
        TapError, TraceError: As elsewhere.
    """
    if isinstance(term.pairs, Pairs):
        pairs = term.pairs
    elif example_inputs is None:
        raise TeachingError("features are taught, so give example_inputs: one batch, for the shapes of the layers")
    elif term.pairs is None:
        pairs = propose_pairs(teacher, student, example_inputs, term.number)
    else:
        pairs = check_pairs(teacher, student, term.pairs, example_inputs)
    return Pairs(dataclasses.replace(pair, project=term.projects) for pair in pairs)


def bridges_of(pairs: Pairs, student: nn.Module) -> nn.ModuleList:
    """New bridges, on the student's device and in its precision."""
    bridges = nn.ModuleList(pair.bridge() for pair in pairs)
    first = next(student.parameters(), None)
    return bridges if first is None else bridges.to(first.device, first.dtype)


def loss_of_pairs(
    term: Features, pairs: Pairs, bridges: nn.Module, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> Tensor:
    """A term on features, summed over its pairs; a scalar.

    Args:
        term: Its loss is taken.
        pairs: In the order of the bridges.
        bridges: A list of `Bridge`.
        ours: The student's features by tap.
        theirs: The teacher's.
    """
    assert isinstance(bridges, nn.ModuleList)
    found = []
    for pair, bridge in zip(pairs, bridges, strict=True):
        assert isinstance(bridge, Bridge)
        student, teacher = bridge(ours[pair.student], theirs[pair.teacher])
        found.append(term.loss(widened(student), widened(teacher)))
    return torch.stack(found).sum()


def widened(values: Tensor) -> Tensor:
    """Half-precision values in float32: squares of activations overflow float16."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
