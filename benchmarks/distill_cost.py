"""What a step of distillation costs beside the bare sum of what it must do: the teacher's forward and a student's step.

    python benchmarks/distill_cost.py            # writes results/distill_cost_*.json

The bare sum is the frozen teacher's forward pass and then the student's forward and backward pass with the labels and a
step of SGD, without any tool. Beside it: each method as `morph.Distillation`, the same with the teacher's logits known,
and the first of two stages of hints. Time is a ratio within one run, memory the peak of a process of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from machine import compare_costs
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import AttentionTransfer, Hint
from morph.teaching.hints import Hints
from morph.teaching.losses import LabelCrossEntropy, LogitRegression, SoftLabels
from morph.teaching.terms import Channels, Features
from morph.zoo import build

CHANNELS = 16

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], int, int]] = {
    "wrn-28-2 teaches wrn-16-2": (lambda: build("wrn-28-2"), lambda: build("wrn-16-2"), 32, 32),
    "wrn-16-2 teaches darts-10": (lambda: build("wrn-16-2"), lambda: build("darts-10"), 16, 32),
    "resnet34 teaches mobilenet_v2": (
        lambda: get_model("resnet34", weights=None),
        lambda: get_model("mobilenet_v2", weights=None),
        8,
        160,
    ),
}


class Voting(nn.Module):
    """A network whose outputs are the channels of multi-channel labels, and their votes."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network, self.score = network, nn.Linear(classes, classes * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` to votes ``[N, classes]``."""
        output = self.network(x)
        logits = output[0] if isinstance(output, tuple) else output
        return torch.sigmoid(self.score(logits)).unflatten(1, (-1, CHANNELS)).sum(2)


def step_of(objective: nn.Module, *batch: Tensor) -> Callable[[], None]:
    """One step of training."""
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(*batch).loss.backward()
        optimizer.step()

    return step


def bare_step(student: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """The teacher's forward and the student's step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.no_grad():
            teacher(x)
        optimizer.zero_grad(set_to_none=True)
        output = student(x)
        logits, heads = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
        loss = F.cross_entropy(logits, y)
        for head in heads:
            loss = loss + 0.4 * F.cross_entropy(head, y)
        loss.backward()
        optimizer.step()

    return step


def works(name: str) -> dict[str, Callable[[], object]]:
    """The pieces of work to compare; each has a student of its own."""
    torch.manual_seed(0)
    make_teacher, make_student, batch, size = CASES[name]
    x, teacher, first = torch.randn(batch, 3, size, size), make_teacher().train(), make_student().train()
    with torch.no_grad():
        known = copy.deepcopy(teacher).eval()(x)
    y = torch.randint(known.shape[1], (batch,))
    methods = {
        "soft labels": [SoftLabels(4.0, 0.9, t_squared=True)],
        "logits": [LogitRegression()],
        "attention transfer": [LabelCrossEntropy(), Features(AttentionTransfer())],
        "hint and soft labels": [SoftLabels(4.0, 0.9), Features(Hint(), number=1)],
    }
    found: dict[str, Callable[[], object]] = {
        "bare sum": bare_step(copy.deepcopy(first), copy.deepcopy(teacher).eval().requires_grad_(False), x, y)
    }
    for method, terms in methods.items():
        objective = Distillation(copy.deepcopy(first), teacher, terms, example_inputs=x[:2])
        found[method] = step_of(objective, x, y)
    voting = [Voting(copy.deepcopy(model), known.shape[1]).train() for model in (first, teacher)]
    found["bare sum with label heads"] = bare_step(copy.deepcopy(voting[0]), copy.deepcopy(voting[1]).eval(), x, y)
    objective = Distillation(voting[0], voting[1], [Channels("score", "score")])
    found["multi-channel labels"] = step_of(objective, x, y)
    objective = Distillation(copy.deepcopy(first), teacher, [SoftLabels()])
    found["soft labels, the teacher's logits known"] = step_of(objective, x, y, known)
    found["first stage of hints"] = step_of(Hints(copy.deepcopy(first), teacher, example_inputs=x[:2]), x, y)
    return found


if __name__ == "__main__":
    compare_costs(__file__, "distill_cost", CASES, works)
