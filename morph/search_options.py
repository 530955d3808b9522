"""All numbers of a search for a student, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from morph.errors import TargetError
from morph.search_budget import Counting
from morph.search_losses import DistillationLoss, LabelLoss, UserLoss

Mode = Literal["kd-weighted", "kd", "np-weighted", "np"]
Weighting = Literal["macs", "params", "memory", "latency"]


GATE_MOMENTUM = 0.9

_GATE_STEP, _STEPS = 0.01, 300 * 391  # of the paper: 300 epochs of 50,000 images in batches of 128
_LONGEST_GATE_STEP = 0.5


class SearchLoss(Protocol):
    """A loss that says whether it looks at the teacher."""

    needs_teacher: bool

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """One value per sample, ``[N]``."""


@dataclass(frozen=True)
class _OfUser:
    """A user's loss, which always gets the teacher's logits."""

    loss: UserLoss
    needs_teacher = True

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return self.loss(student, teacher, labels)


@dataclass(frozen=True)
class SearchOptions:
    """The numbers of a search; defaults are those of the paper (Gu and Tresp, 2020, section 4.1) but for ``gate_lr``.

    Attributes:
        mode: Which loss, divergence from the teacher (``kd``) or cross-entropy with the labels (``np``), and whether
            the penalty of a gate is weighted by what closing it saves.
        weighting: What is saved: multiply-adds, parameters, activation memory or measured latency.
        tau: Temperature of the divergence.
        kl0: Where the divergence is driven to; see `morph.search_losses.DistillationLoss`.
        lambda2: Strength of the penalty, at least. It rises where the network is larger than it should be by then, to
            meet the budget by four fifths of ``epochs``, and falls again where it is smaller. The last tenth of the
            gates in front of a layer bears no more than this, unless the budget asks for it.
        gate_lr: Step size of the gates, constant; None for what `gate_step` gives.
        clamp: Keep gates from falling below zero.
        lr: Learning rate of the weights at first; a tenth from the middle on, a hundredth from 85 % on.
        momentum: Of the weights.
        weight_decay: Of the weights.
        batch_size: Samples of a step, where the data is not in batches already.
        epochs: Rounds through the data after which the budget is met at the latest.
        count: How multiply-adds of the target are counted: ``contractions`` alone, or as the paper did, with two for
            each element of a batch norm.
        count_every: Steps between two counts of what would come out.
        inherit: Whether the student keeps the weights of the search, or starts afresh as in the paper.
        seed: Of the order of the data, and of fresh weights.

    Raises:
        TargetError: If a number is out of its range.
    """

    mode: Mode = "kd-weighted"
    weighting: Weighting = "macs"
    tau: float = 4.0
    kl0: float = 0.0
    lambda2: float = 1e-3
    gate_lr: float | None = None
    clamp: bool = False
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    batch_size: int = 128
    epochs: int = 300
    count: Counting = "contractions"
    count_every: int = 10
    inherit: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("mode", Mode), ("weighting", Weighting), ("count", Counting)):
            if getattr(self, name) not in get_args(allowed):
                raise TargetError(f"{name} {getattr(self, name)!r}; expected one of {', '.join(get_args(allowed))}")
        for name in ("batch_size", "epochs", "count_every"):
            if getattr(self, name) < 1:
                raise TargetError(f"{name} of {getattr(self, name)}; give at least 1")
        for name in ("gate_lr", "lr"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise TargetError(f"{name} of {getattr(self, name)}; give a number above 0")
        for name in ("lambda2", "momentum", "weight_decay"):
            if not 0 <= getattr(self, name) < (1 if name == "momentum" else float("inf")):
                wanted = "at least 0 and below 1" if name == "momentum" else "0 or above, finite"
                raise TargetError(f"{name} of {getattr(self, name)}; give a number of {wanted}")
        self.make_loss()

    @property
    def weighted(self) -> bool:
        """Whether gates are weighted by what closing them saves."""
        return self.mode.endswith("-weighted")

    def gate_step(self, steps: int) -> float:
        """The step size of the gates in a search of so many steps.

        Where none is given, it is the paper's 0.01 in a search as long as the paper's or longer, in a shorter one in
        proportion more, and at most 0.5. So the loss pulls gates as far as there beside a penalty that closes them in
        the time there is: that grows as time gets short, and would decide alone.

        Args:
            steps: Of the whole search.
        """
        if self.gate_lr is not None:
            return self.gate_lr
        return min(_LONGEST_GATE_STEP, _GATE_STEP * max(1.0, _STEPS / steps))

    def make_loss(self, own: UserLoss | None = None) -> SearchLoss:
        """The loss of the mode, or the user's own."""
        if own is not None:
            return _OfUser(own)
        return DistillationLoss(self.tau, self.kl0) if self.mode.startswith("kd") else LabelLoss()
