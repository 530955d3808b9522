"""Norms over groups whose number the code writes out, keeps or computes: their shapes are the same with a wrong one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from analysis_support import gap, run, slow_zeroed
from gate_support import outputs, shut
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from morph import analyse, gate, widen
from morph.removal import Remover


class Norm(nn.GroupNorm):
    """A norm over four groups of its own writing."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, 16)
        self.kind, self.parts = kind, 4

    def forward(self, x: Tensor) -> Tensor:
        number = {"written out": 4, "kept": self.parts, "computed": x.shape[1] // 4}[self.kind]
        return F.group_norm(x, number, self.weight, self.bias)


class Net(nn.Module):
    """A norm over groups between two convolutions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), Norm(kind), nn.Conv2d(16, 7, 1)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3)))


def made(kind: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    return randomise(Net(kind).double(), seed).eval(), torch.randn(3, 3, 7, 5, dtype=torch.float64)


KINDS = ["written out", "kept", "computed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["class", "graph", "auto"])
@pytest.mark.parametrize("whole", [[2], []])
@pytest.mark.parametrize("inside", [[1], [0, 3], []])
def test_a_cut_keeps_what_is_in_a_group(kind, form, whole, inside):
    model, x = made(kind, len(whole) + 2 * len(inside))
    analysis = analyse(model, x)
    groups, positions = (name for name, c in analysis.couplings.items() if c.units == 4)
    if analysis.couplings[groups].blocks > 1:
        groups, positions = positions, groups
    done = Remover(model, x, analysis, form).remove({groups: whole, positions: inside})
    assert gap(run(slow_zeroed(model, analysis, done.choice), x), run(done.model, x)) < 1e-12
    if form == "auto" or (form, kind) == ("class", "kept"):
        assert not done.left
    # groups of the wrong number give the same shape, and other values
    norm = model.norm
    wrong = [F.group_norm(model.first(x), number, norm.weight, norm.bias) for number in (2, 4, 8)]
    assert all(not torch.allclose(a, b) for a, b in pairwise(wrong))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_groups_are_copied(kind):
    model, x = made(kind)
    wide = widen(model, x, ratio=2.0)
    assert gap(run(model, x), run(wide.model, x)) < 1e-12
    assert wide.model.first.weight.shape[0] == 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["producer", "auto"])
def test_gates_are_taken_out(kind, where):
    model, x = made(kind)
    gated = gate(model, x, where)
    shut(gated, 0.5, 1)
    assert gap(outputs(gated.model, x), outputs(gated.remove().model, x)) < 1e-12
