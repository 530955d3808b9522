"""Numbers that the code computes from the size of a batch: the graph of a cut model takes other batches as well."""

from __future__ import annotations

import pytest
import torch
from analysis_support import gap, run, slow_zeroed, some_units
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from morph import analyse, widen
from morph.removal import Remover


class Modulated(nn.Module):
    """A convolution with weights of its own for each sample, done as one with a group for each sample."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.written = written
        self.stem, self.style, self.last = nn.Conv2d(3, 7, 3), nn.Linear(7, 7), nn.Conv2d(11, 6, 1)
        self.weight, self.head = nn.Parameter(torch.empty(11, 7, 3, 3)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        n, c, h, w = x.shape
        kernels = self.weight[None] * self.style(x.mean((2, 3)))[:, None, :, None, None]
        kernels = kernels.view(n * 11, 7 if self.written else c, 3, -1)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n)
        return self.head(self.last(torch.relu(y.view(n, 11, h, w))).mean((2, 3)))


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_another_batch_is_taken(written, seed):
    torch.manual_seed(seed)
    model = randomise(Modulated(written).double(), seed).eval()
    x, others = (torch.randn(n, 3, 8, 7, dtype=torch.float64) for n in (3, 5))
    analysis = analyse(model, x)
    done = Remover(model, x, analysis, "graph").remove(some_units(analysis, seed))
    assert not done.left
    wide = widen(model, x, ratio=1.5)
    assert wide.record.details["form"] == "graph"
    for inputs in (x, others):
        assert gap(run(slow_zeroed(model, analysis, done.choice), inputs), run(done.model, inputs)) < 1e-12
        assert gap(run(model, inputs), run(wide.model, inputs)) < 1e-12


class Ends(nn.Module):
    """Channels that are counted from the end, or up to a number that is computed from their number."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.third = nn.Conv2d(3, 6, 3), nn.Conv2d(7, 11, 1), nn.Conv2d(17, 12, 1)
        self.head = nn.Linear(23, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        a, b = x[:, : c * 3 - 1], x[:, -7:]
        return self.head(torch.cat([self.third(a), self.second(b)], -3).mean((2, 3)))


@pytest.mark.parametrize("seed", range(4))
def test_bounds_from_the_end_and_computed_ones_follow(seed):
    torch.manual_seed(seed)
    model, x = randomise(Ends().double(), seed).eval(), torch.randn(3, 3, 8, 6, dtype=torch.float64)
    analysis = analyse(model, x)
    done = Remover(model, x, analysis, "graph").remove(some_units(analysis, seed))
    assert not done.left
    assert gap(run(slow_zeroed(model, analysis, done.choice), x), run(done.model, x)) < 1e-12
    for ratio in (1.25, 2.0):
        for verify in (True, False):
            assert gap(run(model, x), run(widen(model, x, ratio=ratio, verify=verify).model, x)) < 1e-12


class Halves(nn.Module):
    """Places of a channel lie together, and are split between two layers, or split and joined again."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.joined, self.stem, self.whole = joined, nn.Linear(7, 5), nn.Linear(35, 6)
        self.first, self.second, self.head = nn.Linear(18, 6), nn.Linear(17, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)).transpose(1, 2)  # five channels of seven places
        a, b = x.flatten(1).split([18, 17], 1)
        if self.joined:
            return self.head(torch.relu(self.whole(torch.cat([torch.tanh(a), b], 1))))
        return self.head(torch.relu(self.first(a) + self.second(b)))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("form", ["auto", "graph", "class"])
@pytest.mark.parametrize("verify", [True, False])
def test_places_of_a_channel_that_are_split_are_not_copied_in_another_order(joined, form, verify):
    model = randomise(Halves(joined).double()).eval()
    x = torch.randn(3, 7, 7, dtype=torch.float64)
    for ratio in (1.25, 2.0):
        wide = widen(model, x, ratio=ratio, form=form, verify=verify)
        assert gap(run(model, x), run(wide.model, x)) < 1e-12
