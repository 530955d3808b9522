"""Losses between a teacher and a student, one value per sample.

Source: Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020, equations 1 to 3 and 5; the
distillation loss is that of Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from morph.errors import TargetError

UserLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(student logits [N, C], teacher logits [N, C], labels [N])`` to one value for each sample, ``[N]``."""


def kl_divergence(student: Tensor, teacher: Tensor, tau: float = 4.0) -> Tensor:
    """``KL(softmax(teacher / tau) || softmax(student / tau))``, ``[N]``, in nats; equation 2 without a factor tau**2.

    Args:
        student: Logits ``[N, C]``.
        teacher: Logits ``[N, C]``; the distribution that the student shall have.
        tau: Temperature.
    """
    logs, target = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
    return F.kl_div(logs, target, reduction="none", log_target=True).sum(1)


def soft_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy between the outputs of teacher and student as they are, ``[N]``: of the form of a `UserLoss`."""
    return -(F.softmax(teacher, dim=1) * F.log_softmax(student, dim=1)).sum(1)


@dataclass(frozen=True)
class DistillationLoss:
    """``|KL - kl0|`` between softened outputs, times tau**2 if asked for, plus a share of the labels' cross-entropy.

    Attributes:
        tau: Temperature, above zero; 4 in the paper.
        kl0: Where the divergence is driven to, 0 or above: zero is equation 3, anything else equation 5.
        tau_squared: Whether to multiply by tau**2, which keeps the size of gradients when tau changes. The paper has no
            such factor; Hinton's has.
        label_share: Weight lambda of the cross-entropy with the labels: zero for a search, 0.1 for the paper's
            training of students.

    Raises:
        TargetError: If a number is out of its range.
    """

    tau: float = 4.0
    kl0: float = 0.0
    tau_squared: bool = False
    label_share: float = 0.0
    needs_teacher = True

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise TargetError(f"a temperature of {self.tau}; give one above 0, e.g. 4")
        if not self.kl0 >= 0 or not self.label_share >= 0:
            raise TargetError(f"kl0 of {self.kl0} and a label share of {self.label_share}; give 0 or above")

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """One value per sample, ``[N]``."""
        loss = kl_divergence(student, teacher, self.tau)
        if self.kl0:
            loss = (loss - self.kl0).abs()
        if self.tau_squared:
            loss = loss * self.tau**2
        return (
            loss + self.label_share * F.cross_entropy(student, labels, reduction="none") if self.label_share else loss
        )


@dataclass(frozen=True)
class LabelLoss:
    """Cross-entropy with the labels: what network pruning minimises, blind to the teacher."""

    needs_teacher = False

    def __call__(self, student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """One value per sample, ``[N]``."""
        return F.cross_entropy(student, labels, reduction="none")
