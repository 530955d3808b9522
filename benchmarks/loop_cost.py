"""What a round of training with `morph.fit` costs beside the plainest loop over the same batches.

    python benchmarks/loop_cost.py            # writes results/loop_cost_*.json

Both train the same network on the same images with SGD for one round of 16 batches; the plain loop shuffles, steps,
and does nothing else. With `morph.fit` there are its checks, accuracy and loss of each batch, and, in the last column,
the state that is written at the end. Time is a ratio within one run, memory the peak of a process of its own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from machine import compare_costs
from torch import nn
from torch.nn import functional as F

import morph
from morph.augmentation import Augmented
from morph.images import LabelledImages
from morph.teaching.objective import Labels
from morph.zoo import build

CASES = {"wrn-10-1": 64, "wrn-16-2": 32}
BATCHES = 16


def plain_round(model: nn.Module, data: Augmented, batch: int) -> Callable[[], None]:
    """One round of the plainest loop."""

    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4)
        batches = data.batches(batch, 0)
        model.train()
        for _ in range(BATCHES):
            x, y = next(batches)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return run


def fitted_round(model: nn.Module, data: Augmented, batch: int, *, keeps: bool = False) -> Callable[[], None]:
    """One round of `morph.fit`."""
    fabric = Fabric(accelerator="cpu", devices=1)

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            state = Path(folder) / "state" if keeps else None
            numbers = {"epochs": 1, "batch_size": batch, "lr": 1e-3, "schedule": "constant"}
            morph.fit(Labels(model), data, fabric=fabric, checkpoint=state, **numbers)

    return run


def works(name: str) -> dict[str, Callable[[], object]]:
    """The pieces of work to compare."""
    torch.manual_seed(0)
    batch = CASES[name]
    images = LabelledImages(torch.randn(BATCHES * batch, 3, 32, 32), torch.randint(0, 10, (BATCHES * batch,)))
    model, data = build(name), Augmented(images)
    return {
        "plain loop": plain_round(copy.deepcopy(model), data, batch),
        "morph.fit": fitted_round(copy.deepcopy(model), data, batch),
        "morph.fit with its state": fitted_round(copy.deepcopy(model), data, batch, keeps=True),
    }


if __name__ == "__main__":
    compare_costs(__file__, "loop_cost", CASES, works)
