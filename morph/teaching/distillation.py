"""The objective of distillation: a student learns from a frozen teacher, by any sum of losses on outputs and features.

Sources: those of `morph.teaching.losses` and `morph.teaching.feature_losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from morph.errors import TeachingError
from morph.inputs import Inputs, arguments_of, run_on
from morph.teaching.frozen import WithTeacher, check_outputs
from morph.teaching.objective import (
    AUXILIARY_WEIGHT,
    Step,
    auxiliary_loss,
    check_weight,
    labels_of,
    logits_and_heads,
)
from morph.teaching.pairing import Pairs
from morph.teaching.taps import Taps, tap
from morph.teaching.terms import Channels as Channels
from morph.teaching.terms import Features as Features
from morph.teaching.terms import Outputs as Outputs
from morph.teaching.terms import Term as Term
from morph.teaching.terms import bridges_of, loss_of_pairs, named_terms, pairs_of, widened, with_taps


class Distillation(WithTeacher):
    """A student, a frozen teacher, and what the one shall learn from the other.

    Called with a batch it gives a `morph.teaching.objective.Step`. Each network runs once for a batch; the teacher, in
    evaluation mode and without gradients, no further than what is asked of it, and not at all where that is known
    already. The student is trained as it is, its own class and parameters; adapters between layers are parameters of
    this module. The teacher is a copy that moves along with this module, but is neither among its parameters nor in its
    state.

    Args:
        student: Trained in place. A student with auxiliary heads (see `morph.teaching.objective.Labels`) pays for them
            too, with the labels.
        teacher: Not touched.
        terms: What is summed; a loss alone stands for `Outputs` of it.
        example_inputs: One batch that both accept: a tensor, a tuple of arguments or a mapping of named ones; needed
            where features are taught. With them it is seen to at once that both have the same classes.
        auxiliary_weight: Of the auxiliary heads; 0.4 for DARTS.

    Attributes:
        student: The module to validate and save.
        teacher: The frozen copy.
        terms: By the names of their parts.
        adapters: What is learned beside the student.
        pairs: The pairs of each term on features, by its name; print them.

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
        example_inputs: Inputs | None = None,
        auxiliary_weight: float = AUXILIARY_WEIGHT,
    ) -> None:
        check_weight("the auxiliary heads", auxiliary_weight)
        super().__init__(teacher)
        self.terms = {name: with_taps(term, self.teacher, student) for name, term in named_terms(terms).items()}
        self.student, self.auxiliary_weight = student, auxiliary_weight
        self.losses = nn.ModuleDict({name: term.loss for name, term in self.terms.items()})
        compared = any(isinstance(term, Outputs) and term.needs_teacher for term in self.terms.values())
        if example_inputs is not None:
            check_outputs(self.teacher, student, example_inputs, compared=compared)
        self.needs_teacher_logits = compared
        self.pairs: dict[str, Pairs] = {}
        self.adapters = nn.ModuleDict()
        for name, term in self.terms.items():
            if isinstance(term, Features):
                self.pairs[name] = pairs_of(term, self.teacher, student, example_inputs)
                self.adapters[name] = bridges_of(self.pairs[name], student)
        pairs = [pair for found in self.pairs.values() for pair in found]
        channels = [term for term in self.terms.values() if isinstance(term, Channels)]
        self._ours = _taps(
            student, [pair.student for pair in pairs] + [term.student for term in channels if term.student]
        )
        theirs = [pair.teacher for pair in pairs]
        self._theirs = _taps(self.teacher, theirs)
        self._theirs_with_bits = _taps(self.teacher, theirs + [term.teacher for term in channels if term.teacher])

    def forward(self, x: Inputs, y: Tensor | Sequence[Any], teacher_logits: Tensor | None = None) -> Step:
        """The loss of one batch.

        Args:
            x: Inputs of both networks: a tensor, a tuple of arguments or a mapping of named ones.
            y: Labels ``[N]``, or a sequence of them and what is known of the teacher for this very input: its logits
                ``[N, C]``, of floating point, or the bits of its labels ``[N, classes * channels]``, of whole numbers
                or truth values.
            teacher_logits: The teacher's logits, if they are known and not in ``y``.

        Raises:
            TeachingError: If the outputs do not fit together.
        """
        labels, bits = labels_of(y), None
        for known in () if isinstance(y, Tensor) else y[1:]:
            if known.is_floating_point():
                teacher_logits = known
            else:
                bits = known
        wanted, theirs = self._teach(x, teacher_logits, bits is not None)
        output, ours = _run(self.student, self._ours, x)
        logits, heads = logits_and_heads(output)
        losses = {}
        for name, term in self.terms.items():
            if isinstance(term, Outputs):
                losses[name] = term.loss(widened(logits), wanted, labels)
            elif isinstance(term, Channels):
                assert term.student is not None
                goal = term.bits(theirs[term.teacher]) if bits is None and term.teacher else bits
                losses[name] = term.loss(widened(ours[term.student]).flatten(1), _known(goal), labels)
            else:
                losses[name] = loss_of_pairs(term, self.pairs[name], self.adapters[name], ours, theirs)
        loss = torch.stack([term.weight * losses[name] for name, term in self.terms.items()]).sum()
        if heads and self.auxiliary_weight:
            losses["auxiliary"] = auxiliary_loss(heads, labels)
            loss = loss + self.auxiliary_weight * losses["auxiliary"]
        return Step(loss, {name: value.detach() for name, value in losses.items()}, logits)

    def _teach(self, x: Inputs, logits: Tensor | None, bits: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's logits and features, as far as they are needed."""
        taps = self._theirs if bits else self._theirs_with_bits
        features: dict[str, Tensor] = {}
        with torch.no_grad():
            if self.needs_teacher_logits and logits is None:
                output, features = _run(self.teacher, taps, x)
                logits, _ = logits_and_heads(output)
            elif taps is not None:
                args, kwargs = arguments_of(x)
                features = taps.features(*args, **kwargs)
        return None if logits is None else widened(logits), features


def _taps(model: nn.Module, names: Sequence[str]) -> Taps | None:
    """Taps on the model, if there is anything to tap."""
    return tap(model, list(dict.fromkeys(names))) if names else None


def _run(model: nn.Module, taps: Taps | None, x: Inputs) -> tuple[Any, dict[str, Tensor]]:
    """A network's output and what is tapped."""
    if taps is None:
        return run_on(model, x), {}
    args, kwargs = arguments_of(x)
    return taps(*args, **kwargs)


def _known(bits: Tensor | None) -> Tensor:
    if bits is None:
        raise TeachingError(
            "there are no bits to learn: give y as (labels, bits), or name the teacher's tap in Channels(teacher=...)"
        )
    return bits
