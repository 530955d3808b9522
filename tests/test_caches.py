"""Models that keep what they computed from one call to the next: no run may find the tensors of another."""

from __future__ import annotations

import functools

import pytest
import torch
from models import randomise
from torch import Tensor, nn

from morph import analyse, prune, widen
from morph.analysis.caches import forget_tensors

_POSITIONS: dict[tuple[int, torch.device], Tensor] = {}


@functools.lru_cache(maxsize=8)
def remembered(length: int, width: int, device: torch.device) -> Tensor:
    angles = torch.outer(torch.arange(length, device=device) + 0.5, torch.arange(1, width + 1, device=device))
    return torch.sin(angles)


@functools.lru_cache(maxsize=8)
def words(number: int) -> str:
    return f"number {number}"


def remembering(function):
    kept = functools.lru_cache(maxsize=None)(function)

    @functools.wraps(function)
    def call(*args):
        return kept(*args)

    return call


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 12), nn.Linear(12, 5)
        self.table = nn.Parameter(torch.randn(9, 12))
        self.register_buffer("rows", torch.tensor([1, 4, 2]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) * self.shift(x)))


class ByFunction(Base):
    def shift(self, x: Tensor) -> Tensor:
        words(x.shape[1])
        return self.table[self.rows] + remembered(x.shape[1], 4, x.device).mean() + 1


class ByMethod(Base):
    @remembering
    def positions(self, length: int, device: torch.device) -> Tensor:
        return torch.cos(torch.arange(length, device=device) + 0.5)[:, None]

    def shift(self, x: Tensor) -> Tensor:
        return self.table[self.rows] * self.positions(x.shape[1], x.device)


class ByAttribute(Base):
    """As LeViT keeps the biases of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.kept = {}
        return super().train(mode)

    def shift(self, x: Tensor) -> Tensor:
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = self.table[self.rows]
        return self.kept[str(x.device)]


class ByFile(Base):
    def shift(self, x: Tensor) -> Tensor:
        key = (x.shape[1], x.device)
        if key not in _POSITIONS:
            _POSITIONS[key] = torch.cos(torch.arange(x.shape[1], device=x.device) + 0.5)[:, None]
        return self.table[self.rows] * _POSITIONS[key]


@pytest.mark.parametrize("kind", [ByFunction, ByMethod, ByAttribute, ByFile])
@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_keeps_tensors_is_analysed_and_changed_as_any_other(kind, used):
    torch.manual_seed(0)
    _POSITIONS.clear()
    remembered.cache_clear()
    model, x = randomise(kind()).eval(), torch.randn(2, 3, 7)
    with torch.no_grad():
        before = model(x) if used else None
    couplings = [
        {name: [(p.tensor, p.axis) for p in c.places] for name, c in analyse(model, x).couplings.items()}
        for _ in range(3)
    ]
    assert couplings[0] == couplings[1] == couplings[2]
    assert [len(places) for places in couplings[0].values()] == [4]  # first.weight, first.bias, table, last.weight
    if kind is ByFile and not used:  # then its table is made in a run of ours, in whatever type that has
        return
    half, wide = prune(model, x, ratio=0.5), widen(model, x, ratio=1.5)
    assert half.model(x).shape == (2, 3, 5)
    assert half.model.table.shape == (9, 6)
    with torch.no_grad():
        assert torch.allclose(wide.model(x), model(x), atol=1e-6)
        assert used is False or torch.equal(model(x), before)


def test_only_tensors_are_forgotten():
    model, x = ByFunction().eval(), torch.randn(2, 3, 7)
    words.cache_clear()
    model(x)
    assert remembered.cache_info().currsize == words.cache_info().currsize == 1
    forget_tensors([ByFunction])
    assert (remembered.cache_info().currsize, words.cache_info().currsize) == (0, 1)
