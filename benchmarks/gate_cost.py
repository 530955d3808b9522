"""What a training step with gates costs beside the plain distillation step on the same batch.

    python benchmarks/gate_cost.py            # writes results/gate_cost_*.json

Both run the frozen teacher, the student's forward and backward pass and a step of SGD; with gates there are the gates
besides, and their step of APG. Time is a ratio within one run. Memory is the peak of what PyTorch allocates in a step,
above the weights and momenta that are there before, and the peak of a process of its own, which is less exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from machine import compare_costs, tensor_peak
from torch import Tensor, nn
from torchvision.models import get_model

import morph
from morph.passes.gates import gates_of
from morph.search_losses import kl_divergence
from morph.zoo import build

CASES = {
    "densenet-bc-40-12": (lambda: build("densenet-bc-40-12"), 32, 32),
    "wrn-16-2": (lambda: build("wrn-16-2"), 32, 32),
    "resnet18": (lambda: get_model("resnet18", weights=None), 8, 160),
    "mobilenet_v2": (lambda: get_model("mobilenet_v2", weights=None), 8, 160),
}


def step_of(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], None]:
    """One step of distillation."""

    def step() -> None:
        with torch.no_grad():
            wanted = teacher(x)
        optimizer.zero_grad(set_to_none=True)
        kl_divergence(student(x), wanted).mean().backward()
        optimizer.step()

    return step


def works(name: str) -> dict[str, Callable[[], object]]:
    """The pieces of work to compare."""
    torch.manual_seed(0)
    make, batch, size = CASES[name]
    model, x = make().train(), torch.randn(batch, 3, size, size)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    plain = copy.deepcopy(model)
    gated = morph.gate(model, x[:2])
    gates = gates_of(gated.model)
    theirs = {id(p) for gate in gates.values() for p in gate.parameters()}
    weights = [p for p in gated.model.parameters() if id(p) not in theirs]
    with_gates = torch.optim.SGD(weights, lr=1e-3, momentum=0.9)
    morph.attach_gates(with_gates, gates, weights=gated.weights("macs"))
    without = torch.optim.SGD(plain.parameters(), lr=1e-3, momentum=0.9)
    return {
        "plain step": step_of(plain, teacher, without, x),
        "gated step": step_of(gated.model, teacher, with_gates, x),
    }


def memory(name: str) -> dict[str, object]:
    """Peak of the tensors of each piece of work."""
    return {"peak_tensors_mb": {work: round(tensor_peak(run), 2) for work, run in works(name).items()}}


if __name__ == "__main__":
    compare_costs(__file__, "gate_cost", CASES, works, memory)
