"""Gates in networks as people write them by hand: what is taken out is what was closed, or there is no gate."""

from __future__ import annotations

import pytest
import torch
from gate_support import outputs, shut
from models import randomise
from torch import Tensor, nn

from morph import gate
from morph.errors import EditError


class Shuffled(nn.Module):
    """Grouped convolutions around a shuffle of channels by which units lie unevenly in their groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 24, 1, groups=3)
        self.down, self.head = nn.Conv2d(24, 12, 1, groups=3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = torch.relu(self.up(x))
        n, _, h, w = y.shape
        y = y.view(n, 3, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return self.head(torch.relu(x + self.down(y)).mean((2, 3)))


class Scaled(nn.Module):
    """Its weights are scaled in its own code, so that no layer is a reader."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(12, 3)), nn.Parameter(torch.randn(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x.mean((2, 3)) @ (self.first * 0.1).T) @ (self.second * 0.1).T


@pytest.mark.parametrize("where", ["producer", "auto", "connection"])
@pytest.mark.parametrize("kind", [Shuffled, Scaled])
def test_gates_are_taken_out_or_not_there(kind, where):
    model, x = randomise(kind().double()).eval(), torch.randn(3, 3, 5, 4, dtype=torch.float64)
    if kind is Scaled or where == "producer":
        with pytest.raises(EditError, match="no channel that can be gated: "):
            gate(model, x, where)
        return
    gated = gate(model, x, where)
    for seed in range(3):
        shut(gated, 0.4, seed)
        for wanted, got in zip(outputs(gated.model, x), outputs(gated.remove().model, x), strict=True):
            assert torch.allclose(wanted, got, atol=1e-12)
