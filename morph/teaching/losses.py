"""Losses between the outputs of teacher and student: plain modules, for any trainer.

Each is called with ``(student_logits [N, C], teacher_logits [N, C], labels [N])`` and gives a scalar, the mean over the
samples. ``needs_teacher`` and ``needs_labels`` say which of them it looks at; the other may be None.

Sources: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015; Ba and Caruana, "Do Deep Nets
Really Need to be Deep?", 2014; Whettam 2020, Eq. 2.7; Gu and Tresp, ECAI 2020, Eq. 2 and 3; AutoKD 2021, Eq. 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph.errors import TeachingError
from morph.search_losses import kl_divergence, soft_cross_entropy
from morph.teaching.objective import check_weight

Divergence = Literal["kl", "cross-entropy"]


class OutputLoss(nn.Module):
    """Base of the losses on outputs; what each looks at."""

    needs_teacher = True
    needs_labels = False

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The mean loss; a scalar."""
        raise NotImplementedError


class LabelCrossEntropy(OutputLoss):
    """Cross-entropy with the labels, blind to the teacher.

    Args:
        label_smoothing: Share of each label that is spread over all classes, in [0, 1).

    Raises:
        TeachingError: If it is out of its range.
    """

    needs_teacher = False
    needs_labels = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise TeachingError(f"label smoothing of {label_smoothing}; give a share from 0 to below 1, e.g. 0.1")
        self.label_smoothing = label_smoothing

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The mean loss; a scalar."""
        return F.cross_entropy(student, _given(labels, "labels"), label_smoothing=self.label_smoothing)


class SoftLabels(OutputLoss):
    """Softened outputs of the teacher, and a share of the labels.

    ``alpha * [T**2] * D(softmax(t / T), softmax(s / T)) + label_weight * CE(y, softmax(s))``, in nats. The forms that
    are in use:

    * ``SoftLabels(T, alpha, t_squared=True, divergence="cross-entropy")``: Whettam 2020, Eq. 2.7, after Hinton.
    * ``SoftLabels(T, alpha)``: AutoKD, Eq. 2, with the divergence of Kullback and Leibler. With
      ``divergence="cross-entropy"`` the report on hint layers, section 2.3. The two differ by the entropy of the
      teacher's outputs, which has no gradient.
    * ``SoftLabels(T, alpha=1.0, label_weight=0.1)``: Gu and Tresp, who add a small share of the labels.

    Without ``T**2`` the gradients of the soft term shrink about as ``1 / T**2``.

    Args:
        temperature: T, above 0.
        alpha: Weight of the soft term, in [0, 1].
        t_squared: Whether the soft term is multiplied by ``T**2``.
        label_weight: Weight of the labels; ``1 - alpha`` by default.
        divergence: ``"kl"`` or ``"cross-entropy"``.

    Raises:
        TeachingError: If a number is out of its range.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> SoftLabels(temperature=2.0, alpha=1.0)(student, teacher, torch.tensor([0]))
        tensor(0.1109)
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.9,
        *,
        t_squared: bool = False,
        label_weight: float | None = None,
        divergence: Divergence = "kl",
    ) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise TeachingError(f"a temperature of {temperature}; give one above 0, e.g. 4")
        if not 0 <= alpha <= 1:
            raise TeachingError(f"an alpha of {alpha}; give the weight of the soft labels, from 0 to 1")
        if divergence not in get_args(Divergence):
            raise TeachingError(f"a divergence {divergence!r}; expected one of {', '.join(get_args(Divergence))}")
        self.temperature, self.alpha = float(temperature), float(alpha)
        self.t_squared, self.divergence = t_squared, divergence
        self.label_weight = 1 - self.alpha if label_weight is None else float(label_weight)
        check_weight("the labels", self.label_weight)
        self.needs_labels = self.label_weight > 0
        self.needs_teacher = self.alpha > 0

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The mean loss; a scalar."""
        loss = student.new_zeros(())
        if self.alpha:
            loss = loss + self.alpha * self._soft(student, _same_classes(student, teacher))
        if self.label_weight:
            loss = loss + self.label_weight * F.cross_entropy(student, _given(labels, "labels"))
        return loss

    def _soft(self, student: Tensor, teacher: Tensor) -> Tensor:
        t = self.temperature
        if self.divergence == "kl":
            soft = kl_divergence(student, teacher, t).mean()
        else:
            soft = soft_cross_entropy(student / t, teacher / t).mean()
        return soft * t**2 if self.t_squared else soft

    def extra_repr(self) -> str:
        """The numbers."""
        return (
            f"temperature={self.temperature:g}, alpha={self.alpha:g}, t_squared={self.t_squared}, "
            f"label_weight={self.label_weight:g}, divergence={self.divergence!r}"
        )


class LogitRegression(OutputLoss):
    """Squared differences of the logits, mean over samples and classes (Ba and Caruana 2014)."""

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The mean loss; a scalar."""
        return F.mse_loss(student, _same_classes(student, teacher))


class MultiChannelBCE(OutputLoss):
    """Binary cross-entropy of each channel of a multi-channel label, mean over samples and channels; in nats.

    Source: Li, "multi-channel label" (CMPUT 466 project): each class has several channels, each channel is a bit, set
    where the teacher's sigmoid is at the threshold or above.

    It is called with the student's logits of the channels, ``[N, classes * channels]`` before the sigmoid, and with the
    bits ``[N, classes * channels]`` in the place of the teacher's logits.
    """

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The mean loss; a scalar."""
        bits = _given(teacher, "bits")
        if student.shape != bits.shape:
            raise TeachingError(
                f"the student gives {tuple(student.shape)} logits of channels, the labels have {tuple(bits.shape)} "
                "bits; give the student a head of as many classes and channels"
            )
        return F.binary_cross_entropy_with_logits(student, bits.to(student.dtype))


class WeightedSum(OutputLoss):
    """A sum of losses on outputs.

    Args:
        terms: By name, a weight of 0 or above and a loss.

    Raises:
        TeachingError: If there are no terms, or a weight is negative or no number.

    Example:
        >>> both = WeightedSum({"logits": (0.5, LogitRegression()), "labels": (1.0, LabelCrossEntropy())})
    """

    def __init__(self, terms: Mapping[str, tuple[float, OutputLoss]]) -> None:
        super().__init__()
        if not terms:
            raise TeachingError("a sum of no losses; give one or more")
        for name, (weight, _) in terms.items():
            check_weight(name, weight)
        self.weights = {name: float(weight) for name, (weight, _) in terms.items()}
        self.losses = nn.ModuleDict({name: loss for name, (_, loss) in terms.items()})
        self.needs_teacher = any(loss.needs_teacher for _, loss in terms.values())
        self.needs_labels = any(loss.needs_labels for _, loss in terms.values())

    def forward(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None) -> Tensor:
        """The mean loss; a scalar."""
        values = [self.weights[name] * loss(student, teacher, labels) for name, loss in self.losses.items()]
        return torch.stack(values).sum()


def _given(tensor: Tensor | None, what: str) -> Tensor:
    if tensor is None:
        raise TeachingError(f"this loss needs {what}, and was given none")
    return tensor


def _same_classes(student: Tensor, teacher: Tensor | None) -> Tensor:
    """The teacher's logits, if they are those of as many samples and classes."""
    teacher = _given(teacher, "the teacher's logits")
    if student.shape != teacher.shape:
        raise TeachingError(
            f"the student gives logits of shape {tuple(student.shape)}, the teacher {tuple(teacher.shape)}; both must "
            "be [N, classes] of the same classes: give one of them another head"
        )
    return teacher
