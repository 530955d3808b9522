"""Positions that are taken by number: a cut must not let a slice take others, whatever shapes say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph import analyse, prune, widen
from morph.analysis.picking import same_index, same_slice


def draw(model):
    """The model in float64 with random weights and biases."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1)
    return model.double()


@pytest.mark.parametrize("seed", range(20))
def test_a_slice_is_the_same_if_it_takes_the_positions_that_stay(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(3, 14))
    times = np.concatenate([[1], random.integers(0, 3, size)])
    labels = random.permutation(size) + 1
    start, stop = sorted(random.integers(0, size + 1, 2).tolist())
    step = int(random.integers(1, 3))
    there = [p for p in range(size) for _ in range(times[labels[p]])]
    wanted = [p for p in range(size)[start:stop:step] for _ in range(times[labels[p]])]
    for a in range(len(there) + 1):
        for b in range(a, len(there) + 1):
            expected = there[a:b:step] == wanted
            got = same_slice(labels, times, slice(start, stop, step), slice(a, b, step))
            assert got == expected


def test_brackets_are_compared_axis_by_axis():
    axes = [np.zeros(4, np.int64), np.arange(1, 6), np.zeros(3, np.int64)]
    times = np.array([1, 0, 1, 1, 1, 1])
    before = (slice(None), slice(1, 3), None, slice(0, 2))
    assert same_index(axes, times, before, (slice(None), slice(0, 2), None, slice(0, 2)))
    assert not same_index(axes, times, before, before)
    assert not same_index(axes, times, before, (slice(None), slice(0, 2), None, slice(1, 3)))
    assert same_index(axes, times, (..., slice(1, 3), 0), (..., slice(0, 2), 0))
    assert not same_index(axes, times, (..., slice(1, 3), 0), (..., slice(1, 3), 0))


class Relative(nn.Module):
    """Heads, and a table whose size happens to be the width; the middle of the table is read."""

    def __init__(self, tables: int = 20) -> None:
        super().__init__()
        self.heads, self.width, self.positions = 4, 20, tables
        self.q, self.k, self.out = nn.Linear(7, 20), nn.Linear(7, 20), nn.Linear(20, 5)
        self.table = nn.Parameter(torch.empty(2 * tables, 5))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.split(self.q(x)), self.split(self.k(x))
        n = x.shape[1]
        bias = self.table[self.positions - n : self.positions + n].sum(0)
        scores = torch.relu(q + bias) @ k.transpose(-1, -2)
        return self.out((scores @ k).transpose(1, 2).reshape(*x.shape[:-1], self.width))


@pytest.mark.parametrize("verify", [True, False])
def test_a_number_that_happens_to_be_a_width_is_left_alone(verify):
    model, x = draw(Relative()), torch.randn(2, 3, 7, dtype=torch.float64)
    heads = next(c.name for c in analyse(model, x).couplings.values() if c.units == 4)
    half = prune(model, x, ratios={heads: 0.5}, ratio=0.0001, ranking="local", verify=verify)
    assert (half.model.heads, half.model.width, half.model.positions) == (2, 10, 20)
    assert half.model(x).shape == (2, 3, 5)
    again = prune(model, x, ratios={heads: 0.5}, ratio=0.0001, ranking="local")
    assert torch.equal(again.model(x), half.model(x))


class Made(nn.Module):
    """A layer that keeps how many channels it makes, as GPT-2's do."""

    def __init__(self, read: int, made: int) -> None:
        super().__init__()
        self.made = made
        self.weight, self.bias = nn.Parameter(torch.empty(read, made)), nn.Parameter(torch.empty(made))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.made)


class Square(nn.Module):
    """A block whose last layer reads as many channels as it makes: one number, of which one meaning is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.last, self.out = nn.Linear(7, 12), Made(12, 12), Made(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.out(x + self.last(torch.tanh(self.inner(x))))


def test_a_number_with_two_meanings_follows_the_right_one():
    model, x = draw(Square()), torch.randn(2, 3, 7, dtype=torch.float64)
    hidden = next(c.name for c in analyse(model, x).couplings.values() if "inner" in c.name)
    half = prune(model, x, ratios={hidden: 0.5}, ratio=1e-4, ranking="local")
    assert half.record.details["form"] == "class"
    assert (half.model.inner.made, half.model.last.made) == (6, 12)
    assert half.record.checks[0].relative < 1e-13
    assert not half.record.details["left"]


def test_positions_that_slices_pass_over_stay():
    model, x = draw(Relative(11)), torch.randn(2, 3, 7, dtype=torch.float64)
    analysis = analyse(model, x)
    rows = {p.tensor: p.axis for c in analysis.couplings.values() for p in c.places}
    assert rows.get("table") != 0
    assert any("slices read other positions" in pin.reason for pin in analysis.state.pinned)
    longer = torch.randn(2, 10, 7, dtype=torch.float64)
    assert widen(model, x, ratio=2).model(longer).shape == (2, 10, 5)


class Parts(nn.Module):
    """Sizes of parts are written into the code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.rest = nn.Linear(5, 12), nn.Linear(4, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.middle(y[:, 4:8]) + self.rest(torch.cat([y[..., :4], y[:, 8:]], 1))


def test_where_a_part_begins_follows_in_the_graph():
    model, x = draw(Parts()), torch.randn(6, 5, dtype=torch.float64)
    names = {c.units: c.name for c in analyse(model, x).couplings.values()}
    for seed in range(4):
        half = prune(
            model, x, ratios={names[8]: 0.5, names[4]: 1e-4}, ratio=1e-4, score="random", seed=seed, ranking="local",
            verify=False,
        )  # fmt: skip
        index = next(e.index for e in half.record.plan.edits if getattr(e, "tensor", "") == "first.weight")
        weights = model.first.weight.detach().clone(), model.first.bias.detach().clone()
        for tensor in weights:
            tensor[[i for i in range(12) if i not in index]] = 0
        y = torch.relu(x @ weights[0].T + weights[1])
        wanted = model.middle(y[:, 4:8]) + model.rest(torch.cat([y[:, :4], y[:, 8:]], 1))
        assert len(index) == 8
        torch.testing.assert_close(half.model(x), wanted, rtol=1e-12, atol=1e-12)


class OwnNorm(nn.Module):
    """A norm whose size is kept in an attribute, with or without a weight."""

    def __init__(self, width: int, kind: str, affine: bool) -> None:
        super().__init__()
        self.normalized_shape, self.kind = (width,), kind
        self.scale = nn.Parameter(torch.empty(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return F.rms_norm(x, self.normalized_shape, self.scale, 1e-6)
        return F.layer_norm(x, self.normalized_shape, self.scale, None, 1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_the_size_of_a_norm_of_ones_own_follows(kind, affine):
    layers = nn.Linear(5, 12), OwnNorm(12, kind, affine), nn.ReLU(), nn.Linear(12, 7)
    model = draw(nn.Sequential(*layers, nn.LayerNorm(7, elementwise_affine=False), nn.Linear(7, 3)))
    x = torch.randn(4, 5, dtype=torch.float64)
    half = prune(model, x, ratio=0.5, ranking="local")
    assert not half.record.details["left"]
    assert half.record.details["form"] == "class"
    assert half.model[1].normalized_shape == (6,)
    assert half.model[4].normalized_shape == (4,)
    blind = prune(model, x, ratio=0.5, ranking="local", verify=False)
    assert torch.equal(blind.model(x), half.model(x))


class Rough(nn.Module):
    """A scale in float32 and a Fourier transform in complex64, whatever the model is in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) / torch.sqrt(torch.tensor(3, dtype=torch.float32) * 1.7).to(x.dtype)
        return self.last(torch.fft.fft(self.second(y).to(torch.complex64)).real.to(x.dtype))


def test_the_reference_is_as_precise_as_the_model():
    half = prune(draw(Rough()), torch.randn(4, 5, dtype=torch.float64), ratio=0.5, ranking="local")
    assert half.record.checks[0].relative < 1e-13
    assert half.record.after["params"] < half.record.before["params"]
