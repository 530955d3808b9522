"""What a Fisher probe costs beside a plain forward and backward pass on the same batch.

    python benchmarks/probe_cost.py            # writes results/probe_cost_*.json

Time is a ratio within one run. Memory is the peak of a process of its own that does one thing only; the probed
activations are counted for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from machine import compare_costs
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import get_model

from morph.blocks import Cell, find_cells
from morph.scores import FisherProbe
from morph.tracing import Trace, trace
from morph.zoo import build

CASES = {
    "darts-10": (lambda: build("darts-10"), 32, 32, 10),
    "wrn-28-2": (lambda: build("wrn-28-2"), 32, 32, 10),
    "resnet50": (lambda: get_model("resnet50", weights=None), 8, 160, 1000),
    "resnext50_32x4d": (lambda: get_model("resnext50_32x4d", weights=None), 8, 160, 1000),
}


def prepare(name: str) -> tuple[nn.Module, Trace, list[Cell], Tensor, Tensor]:
    """The model, its trace and cells, and a batch."""
    torch.manual_seed(0)
    make, batch, size, classes = CASES[name]
    model, x, y = make(), torch.randn(batch, 3, size, size), torch.randint(0, classes, (batch,))
    traced = trace(model, x[:2])
    return model.eval(), traced, find_cells(traced), x, y


def works(name: str) -> dict[str, Callable[[], object]]:
    """The pieces of work to compare."""
    model, traced, cells, x, y = prepare(name)

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()

    probe = FisherProbe(traced, cells)
    return {"plain step": plain, "fisher probe": lambda: probe.scores([(x, y)])}


def probed_megabytes(name: str) -> float:
    """Size of the activations behind which probes stand."""
    _, traced, cells, x, _ = prepare(name)
    sizes = [torch.Size(traced.shapes[node][1:]).numel() * len(x) * 4 for cell in cells for node in cell.nodes]
    return sum(sizes) / 1e6


if __name__ == "__main__":
    compare_costs(
        __file__, "probe_cost", CASES, works, lambda name: {"probed_activations_mb": round(probed_megabytes(name), 1)}
    )
