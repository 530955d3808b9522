"""A small network with two inputs and a named one, and random data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 3


class Two(nn.Module):
    """Two inputs that are joined, and a factor that is given by name alone."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.left, self.right = nn.Linear(5, width), nn.Linear(7, width)
        self.body = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, left: Tensor, right: Tensor, *, factor: Tensor | float = 1.0) -> Tensor:
        both = torch.cat([torch.relu(self.left(left)), torch.tanh(self.right(right))], 1)
        return self.head(self.body(both * factor))


def pairs(number: int = 13, seed: int = 0) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two inputs, and labels that both decide."""
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(number, 5, generator=draw), torch.randn(number, 7, generator=draw)
    return (left, right), ((left.sum(1) + right.sum(1)) > 0).long() + (left[:, 0] > 1).long()
