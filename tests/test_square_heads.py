"""Attention with as many heads as positions in each: whole heads and the positions inside them lie alike everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from models import randomise
from torch import Tensor, nn

import morph

HEADS = 4
X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


class Packed(nn.Module):
    """Attention by hand, as timm writes it: queries, keys and values from one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, *_: Tensor) -> tuple[Tensor]:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return (self.proj(x.transpose(1, 2).reshape(b, n, -1)),)


class Model(nn.Module):
    """A residual attention block without a norm, and a residual block behind it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(6, 16), attention
        self.up, self.down, self.head = nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.attention(x, x, x)[0]
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x.mean(1))


@pytest.fixture(params=["torch", "packed"])
def model(request):
    torch.manual_seed(0)
    own = nn.MultiheadAttention(16, HEADS, batch_first=True) if request.param == "torch" else Packed()
    return randomise(Model(own)).eval()


def test_heads_and_the_positions_inside_them_are_two_couplings(model):
    couplings = morph.analyse(model, X).couplings
    inside = [c for name, c in couplings.items() if name.startswith(("attention.in_proj_weight[0]", "attention.qkv"))]
    assert [c.units for c in inside] == [HEADS, HEADS]
    assert [c.overlaps for c in inside] == [(inside[1].name,), (inside[0].name,)]
    for coupling, place in itertools.chain(*([(c, p) for p in c.places] for c in couplings.values())):
        positions = place.positions.ravel().tolist()
        assert len(positions) == len(set(positions)), coupling.name


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_it_is_pruned_exactly_and_gated(model, ratio):
    pruned = morph.prune(model, X, ratio=ratio)
    assert pruned.record.checks[0].relative <= 1e-9
    assert pruned.record.after["params"] < pruned.record.before["params"]
    gated = morph.gate(model, X)
    packed = isinstance(model.attention, Packed)
    assert gated.total == 16 + 20 + 16 + packed * (16 + HEADS)
    assert ("attention.in_proj_weight" in gated.left) != packed
    assert torch.equal(gated.model(X), model(X))
