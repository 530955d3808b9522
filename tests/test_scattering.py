"""Rows that are written or summed by number: channels beside them can be cut and copied."""

from __future__ import annotations

import pytest
import torch
from analysis_support import gap, run, slow_zeroed, some_units
from models import randomise
from torch import Tensor, nn

from morph import analyse, prune, widen
from morph.removal import Remover


class Nodes(nn.Module):
    """Sums messages of edges at nodes, as networks on graphs do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.width = how, 13
        self.first, self.last = nn.Linear(7, 13), nn.Linear(13, 5)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        rows = torch.tanh(self.first(x))
        empty = torch.zeros(4, self.width, dtype=x.dtype)
        wide = at[:, None].expand(-1, self.width)
        made = {
            "index_add": lambda: empty.index_add(0, at, rows, alpha=0.5),
            "index_add_": lambda: empty.index_add_(0, at, rows),
            "index_copy": lambda: empty.index_copy(0, at[:4], rows[:4]),
            "scatter": lambda: empty.scatter(0, wide[:4], rows[:4]),
            "scatter value": lambda: rows.scatter(0, wide, 0.3),
            "scatter_add": lambda: empty.scatter_add(-2, wide, rows),
            "scatter_reduce": lambda: rows.scatter_reduce(0, wide, rows, "amax", include_self=False),
        }[self.how]()
        return self.last(made)


class Bags(nn.Module):
    """Sums or averages rows of tables."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(11, 13, mode=mode) for _ in range(2))
        self.last = nn.Linear(26, 5)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.cat([self.tables[0](first), self.tables[1](second)], 1)))


def cases(name):
    torch.manual_seed(0)
    if name in ("sum", "mean", "max"):
        return Bags(name).double().eval(), (torch.randint(11, (3, 4)), torch.randint(11, (3, 2)))
    return Nodes(name).double().eval(), (torch.randn(6, 7, dtype=torch.float64), torch.tensor([0, 3, 1, 2, 3, 0]))


NAMES = ["index_add", "index_add_", "index_copy", "scatter", "scatter value", "scatter_add", "scatter_reduce"]


@pytest.mark.parametrize("name", [*NAMES, "sum", "mean", "max"])
def test_channels_are_cut_and_copied_exactly(name):
    model, inputs = cases(name)
    analysis = analyse(model, inputs)
    assert not analysis.unknown
    assert [c.units for c in analysis.couplings.values()] == ([13, 13] if isinstance(model, Bags) else [13])
    removed = Remover(model, inputs, analysis).remove(some_units(analysis, 5))
    assert not removed.left
    before, after = run(model, inputs), run(removed.model, inputs)
    assert gap(run(slow_zeroed(model, analysis, removed.choice), inputs), after) < 1e-12
    assert gap(before, after) > 1e-3
    assert gap(before, run(widen(model, inputs, ratio=1.5).model, inputs)) < 1e-12
    half = prune(model, inputs, ratio=0.5, ranking="local")
    assert half.record.checks[0].relative < 1e-12
    assert half.record.after["params"] < 0.6 * half.record.before["params"]


def test_sizes_written_into_the_code_are_rewritten_in_the_graph():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(7, 13), nn.Linear(13, 5)

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return self.last(torch.zeros(4, 13, dtype=x.dtype).index_add(0, at, torch.relu(self.first(x))))

    _, inputs = cases("index_add")
    half = prune(Fixed().double(), inputs, ratio=0.5, ranking="local")
    assert half.record.details["form"] == "graph"
    assert half.record.after["params"] < 0.6 * half.record.before["params"]
    assert half.record.checks[0].relative < 1e-12


class Masked(nn.Module):
    """Rows or places that are written by a mask or by numbers, and a gated linear unit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.token = kind, nn.Linear(7, 26), nn.Parameter(torch.empty(13))
        self.middle, self.last, self.unit = nn.Linear(13, 13), nn.Linear(13, 5), nn.GLU()
        self.register_buffer("at", torch.tensor([0, 2]))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.unit(self.first(x))
        if self.kind == "numbers":
            x[self.at] = self.middle(x[self.at])
        elif self.kind == "rows":
            x[mask] = self.token
        elif self.kind == "compared rows":
            x[mask.sum(-1) > 2] += 1
        elif self.kind == "places":
            y = self.middle(x)
            y[y > 0.3] = 0.0
            x = x + y
        return self.last(torch.relu(x))


@pytest.mark.parametrize("kind", ["numbers", "rows", "compared rows", "places"])
@pytest.mark.parametrize("form", ["class", "graph"])
def test_what_masks_and_numbers_write_is_cut_and_copied_exactly(kind, form):
    torch.manual_seed(2)
    model = randomise(Masked(kind).double()).eval()
    inputs = (torch.randn(3, 4, 7, dtype=torch.float64), torch.rand(3, 4) > 0.5)
    analysis = analyse(model, inputs)
    assert not analysis.unknown
    if kind == "compared rows" and form == "graph":  # how many they are depends on values
        return
    for seed in range(3):
        removed = Remover(model, inputs, analysis, form).remove(some_units(analysis, seed))
        assert removed.choice
        assert not removed.left
        assert gap(run(slow_zeroed(model, analysis, removed.choice), inputs), run(removed.model, inputs)) < 1e-12
    wide = widen(model, inputs, ratio=1.5, form=form)
    assert gap(run(model, inputs), run(wide.model, inputs)) < 1e-12
