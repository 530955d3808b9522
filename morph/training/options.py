"""All numbers of a training run, as one value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from morph.errors import TrainingError
from morph.training.schedules import Schedule, learning_rate

Algorithm = Literal["sgd", "adam", "adamw"]

_INFINITY = float("inf")


@dataclass(frozen=True)
class FitOptions:
    """The numbers of a training run; defaults are those of wide residual networks on CIFAR, as the thesis uses them.

    Attributes:
        epochs: Rounds through the data.
        batch_size: Samples of a step, of all processes together, where the data is not in batches already.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        lr: Learning rate at first; by default 0.1 for SGD and 0.001 for the others.
        momentum: Of SGD.
        nesterov: Nesterov's form of it.
        weight_decay: Of all parameters.
        schedule: ``multistep``, ``step``, ``cosine`` or ``constant``; see `morph.training.schedules.learning_rate`.
        milestones: Shares of the run at which ``multistep`` multiplies by ``gamma``.
        gamma: By default 0.2 for ``multistep`` and 0.5 for ``step``.
        step_epochs: Rounds after which ``step`` multiplies by ``gamma``.
        warmup_epochs: Rounds in which the learning rate grows linearly to its value.
        clip: Largest norm of all gradients together; None for any.
        accumulate: Parts that a batch is computed in, one after another, to save memory. Their gradients are added
            before the step, which is then that of the whole batch; batch norms see the parts.
        channels_last: Keep images with their channels innermost, which is faster for convolutions on most processors.
        validate_every: Rounds between two validations; the last round is always followed by one.
        seed: Of the order of the data, of augmentation, and of what the model draws.

    Raises:
        TrainingError: If a number is out of its range.
    """

    epochs: int = 200
    batch_size: int = 128
    optimizer: Algorithm = "sgd"
    lr: float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: Schedule = "multistep"
    milestones: tuple[float, ...] = (0.3, 0.6, 0.8)
    gamma: float | None = None
    step_epochs: int = 20
    warmup_epochs: float = 0.0
    clip: float | None = None
    accumulate: int = 1
    channels_last: bool = False
    validate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("optimizer", Algorithm), ("schedule", Schedule)):
            if getattr(self, name) not in get_args(allowed):
                raise TrainingError(f"{name} {getattr(self, name)!r}; expected one of {', '.join(get_args(allowed))}")
        for name in ("epochs", "batch_size", "step_epochs", "accumulate", "validate_every"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} of {getattr(self, name)}; give at least 1")
        for name in ("lr", "gamma", "clip"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < _INFINITY:
                raise TrainingError(f"{name} of {getattr(self, name)}; give a number above 0")
        for name, limit in (("momentum", 1), ("weight_decay", _INFINITY), ("warmup_epochs", _INFINITY)):
            if not 0 <= getattr(self, name) < limit:
                raise TrainingError(f"{name} of {getattr(self, name)}; give a number from 0 to below {limit}")
        if not all(0 < share < 1 for share in self.milestones):
            raise TrainingError(f"milestones of {self.milestones}; give shares of the run, between 0 and 1")
        if self.nesterov and not (self.momentum and self.optimizer == "sgd"):
            raise TrainingError("Nesterov's form is one of SGD with momentum; give both, or leave it out")

    def learning_rate(self, step: int, length: int) -> float:
        """The learning rate of a step, from 0 on, where a round has ``length`` steps."""
        base = self.lr if self.lr is not None else 0.1 if self.optimizer == "sgd" else 1e-3
        return learning_rate(
            self.schedule,
            base,
            step,
            epochs=self.epochs,
            length=length,
            milestones=self.milestones,
            gamma=self.gamma if self.gamma is not None else 0.5 if self.schedule == "step" else 0.2,
            step_epochs=self.step_epochs,
            warmup_epochs=self.warmup_epochs,
        )

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters.

        Raises:
            TrainingError: If none of them can be trained.
        """
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            raise TrainingError("there is nothing to train: no parameter of the objective asks for a gradient")
        rate = self.learning_rate(0, 1)
        if self.optimizer == "sgd":
            return torch.optim.SGD(trained, rate, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(trained, rate, weight_decay=self.weight_decay)
