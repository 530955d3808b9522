"""Fourier transforms, complex numbers and bilinear layers: channels that they do not mix are as free as any."""

from __future__ import annotations

import pytest
import torch
from analysis_support import gap, run, slow_zeroed, some_units
from models import randomise
from torch import Tensor, nn

from morph import analyse, prune, replay, widen
from morph.removal import Remover


class Spectral(nn.Module):
    """Filters of its own for the frequencies of each channel, as in GFNet; and a transform over space by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 9, 1)
        self.filters, self.last = nn.Parameter(torch.empty(12, 8, 5, 2)), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        x = torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filters), s=x.shape[2:])
        x = self.middle(x)
        both = torch.view_as_real(torch.fft.fft(x, dim=2)).abs().sum(-1)
        return self.last((both + torch.fft.ifft2(torch.fft.fft2(x)).real).mean((2, 3)))


class Pairs(nn.Module):
    """A bilinear layer between two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 12), nn.Linear(6, 10)
        self.both, self.last = nn.Bilinear(12, 10, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(torch.relu(self.both(torch.sigmoid(self.one(x)), torch.sigmoid(self.two(y)))))


def spectral() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Spectral(), (torch.randn(2, 3, 8, 8, dtype=torch.float64),)


def pairs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Pairs(), (torch.randn(2, 4, 7, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64))


@pytest.mark.parametrize(("make", "units"), [(spectral, [9, 12]), (pairs, [9, 10, 12])])
@pytest.mark.parametrize("seed", range(3))
def test_cuts_and_copies_are_exact(make, units, seed):
    torch.manual_seed(seed)
    model, inputs = make()
    model = randomise(model.double(), seed=seed).eval()
    analysis = analyse(model, inputs)
    assert sorted(c.units for c in analysis.couplings.values()) == units
    assert not analysis.unknown
    cut = Remover(model, inputs, analysis).remove(some_units(analysis, seed))
    reference = run(slow_zeroed(model, analysis, cut.choice), inputs)
    assert not cut.left
    assert gap(reference, run(cut.model, inputs)) < 1e-12
    assert gap(run(model, inputs), reference) > 1e-6
    wide = widen(model, inputs, ratio=1.5, verify=False).model
    assert gap(run(model, inputs), run(wide, inputs)) < 1e-12
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in model.parameters())


def test_a_bilinear_layer_is_told_its_sizes_and_its_record_is_replayed():
    model, inputs = pairs()
    model = randomise(model.double()).eval()
    half = prune(model, inputs, ratio=0.5, ranking="local")
    layer = half.model.both
    assert (layer.in1_features, layer.in2_features, layer.out_features) == (6, 5, 5)
    assert replay(model, half.record.plan, inputs).record.after == half.record.after


def test_channels_that_a_transform_mixes_stay():
    class Mixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            return self[1](x + torch.fft.fft2(x).real)

    analysis = analyse(Mixed(nn.Linear(7, 12), nn.Linear(12, 5)), torch.randn(2, 3, 7))
    assert not analysis.couplings
    assert any("Fourier transform mixes" in frozen.reason for frozen in analysis.frozen)
