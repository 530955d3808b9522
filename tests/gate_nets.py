"""Small nets with gates of their own, for what needs no pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from morph.analysis import Sizes


class TinyGate(nn.Module):
    """Multiplies channels by its weight."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(k))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class GatedNet(nn.Module):
    """Two linear layers with gates between, and on the input."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.gate = TinyGate(5)
        self.first = nn.Linear(5, 11)
        self.middle = TinyGate(11)
        self.last = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.relu(self.first(self.gate(x)))))

    def gates(self) -> dict[str, TinyGate]:
        return {"gate": self.gate, "middle": self.middle}

    def weights(self) -> list[nn.Parameter]:
        return [*self.first.parameters(), *self.last.parameters()]


def samples(n: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=draw), torch.randint(0, 3, (n,), generator=draw)


def alphas(net: GatedNet, seed: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: 0.1 + 0.9 * torch.rand(len(gate.weight), generator=draw) for name, gate in net.gates().items()}


class PlainNet(nn.Module):
    """The teacher of a `GatedNet`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        net = GatedNet(seed)
        self.first, self.last = net.first, net.last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class CountedNet:
    """The sizes of a `GatedNet`, counted by hand."""

    def sizes(self, closed):
        a, b = (int((~closed[name]).sum()) for name in ("gate", "middle"))
        return Sizes(params=a * b + b + 3 * b + 3, macs=a * b + 3 * b)
