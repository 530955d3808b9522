"""What a training loop minimises: a module that is called with a batch and answers with a `Step`.

An objective has ``student``, the network that is validated and saved; ``parameters()``, which are trained; and
``state_dict()``, which a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from morph.errors import TeachingError
from morph.inputs import Inputs, logits_in, run_on

AUXILIARY_WEIGHT = 0.4  # Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019, section 3.2


class Step(NamedTuple):
    """What an objective gives for one batch.

    Attributes:
        loss: What is minimised; a scalar.
        parts: The terms of the loss by name, each a scalar without a gradient and before its weight.
        logits: The student's outputs ``[N, C]``, for the training accuracy; None where the student is not run to its
            end (`morph.teaching.hints.Hints`).
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor | None


class Labels(nn.Module):
    """Cross-entropy of the student with the labels: training without a teacher.

    A student that gives several outputs in training mode (logits, then those of auxiliary heads, as
    `morph.zoo.darts.DartsNet` does) pays for the heads too: ``CE(logits) + weight * sum_i CE(head_i)``.

    Args:
        student: Gives logits ``[N, C]``, alone, first in a tuple, or as ``logits`` of an output; trained in place.
        label_smoothing: Share of each label that is spread over all classes, in [0, 1).
        auxiliary_weight: Of the auxiliary heads; 0.4 for DARTS.

    Raises:
        TeachingError: If a number is out of its range.

    Example:
        >>> import torch
        >>> objective = Labels(nn.Linear(4, 3))
        >>> step = objective(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> sorted(step.parts), step.logits.shape
        (['labels'], torch.Size([5, 3]))
    """

    def __init__(
        self, student: nn.Module, *, label_smoothing: float = 0.0, auxiliary_weight: float = AUXILIARY_WEIGHT
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise TeachingError(f"label smoothing of {label_smoothing}; give a share from 0 to below 1, e.g. 0.1")
        check_weight("the auxiliary heads", auxiliary_weight)
        self.student = student
        self.label_smoothing, self.auxiliary_weight = label_smoothing, auxiliary_weight

    def forward(self, x: Inputs, y: Tensor | Sequence[Any]) -> Step:
        """The loss of one batch.

        Args:
            x: Inputs of the student: a tensor, a tuple of arguments or a mapping of named ones.
            y: Labels ``[N]``, or a sequence that begins with them.
        """
        y = labels_of(y)
        logits, heads = logits_and_heads(run_on(self.student, x))
        labels = F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        parts, loss = {"labels": labels.detach()}, labels
        if heads and self.auxiliary_weight:
            auxiliary = auxiliary_loss(heads, y, self.label_smoothing)
            parts["auxiliary"] = auxiliary.detach()
            loss = loss + self.auxiliary_weight * auxiliary
        return Step(loss, parts, logits)


def labels_of(y: Tensor | Sequence[Any]) -> Tensor:
    """The labels ``[N]`` among what the data gives for a batch: a tensor, or a sequence that begins with them."""
    labels: Tensor = y if isinstance(y, Tensor) else y[0]
    return labels


def logits_and_heads(output: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Split a network's output in its logits and those of the auxiliary heads, which are there in training only.

    Args:
        output: A tensor, a tuple or list of tensors, logits first, or a mapping or object with ``logits``.

    Raises:
        TeachingError: If there are no logits in it.
    """
    found = logits_in(output)
    if found is not None:
        rest = output[1:] if isinstance(output, tuple | list) else ()
        return found, tuple(item for item in rest if isinstance(item, Tensor))
    raise TeachingError(
        f"the network gives {type(output).__name__}; give one that returns logits [N, C], a tuple with the logits "
        "first, or an output with 'logits'"
    )


def auxiliary_loss(heads: tuple[Tensor, ...], labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropies of the auxiliary heads ``[N, C]`` with the labels ``[N]``; a scalar."""
    losses = [F.cross_entropy(head, labels, label_smoothing=label_smoothing) for head in heads]
    return sum(losses[1:], losses[0])


def check_weight(of: str, weight: float) -> None:
    """See that a weight is a number of 0 or above.

    Raises:
        TeachingError: If it is not.
    """
    if not 0 <= weight < float("inf"):
        raise TeachingError(f"a weight of {weight} for {of}; give a number of 0 or above")
