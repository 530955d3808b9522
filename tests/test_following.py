"""A cut skeleton that is followed call by call: what fits is let through, any difference is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from analysis_nets import NETS, make
from torch import Tensor, nn

import morph.fitting
from morph.analysis import analyse
from morph.analysis.following import follows
from morph.analysis.recorder import record
from morph.analysis.recording import put_back
from morph.errors import EditError
from morph.fitting import Fitter
from morph.pruning import prune
from morph.resizing import resize_own


class Steps(nn.Module):
    """Does more than layers: another way by width, constants by width, or an error that it swallows."""

    def __init__(self, kind: str = "plain", scale: float = 2.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 1)
        self.kind, self.scale = kind, scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.kind == "branch" and x.shape[1] != 12:
            x = torch.tanh(x)
        if self.kind == "constant":
            x = x * (1 / x.shape[1])
        if self.kind == "tensor":
            x = x * torch.tensor([x.shape[1]] * 1).sum()
        if self.kind == "swallow":
            try:
                x = torch.tanh(x) if x.shape[1] != 12 else torch.relu(x)
            except Exception:
                x = torch.relu(x)
        return self.second(torch.relu(x) * self.scale).mean((2, 3))


def cut_of(model, inputs, seed=0):
    """An analysis and the edits of a random choice of half of the units of each coupling that may go."""
    analysis = analyse(model, inputs)
    random = np.random.default_rng(seed)
    choice = {c.name: random.permutation(c.units)[: c.units // 2] for c in analysis.couplings.values() if c.units > 1}
    while analysis.emptied(choice):
        choice.popitem()
    return analysis, list(analysis.cut(choice).edits), analysis.times(choice)


def followed(model, inputs):
    """Whether the cut skeleton does what was recorded."""
    analysis, edits, times = cut_of(model, inputs)
    fitter = Fitter(model, inputs, analysis)
    recording = analysis.recording
    with put_back(recording.kept):
        resize_own(recording.twin, edits)
        result = follows(recording.twin, inputs, recording, lambda v: fitter.shape(v, times))
    assert all("forward" not in vars(m) for m in recording.twin.modules())
    assert follows(recording.twin, inputs, recording, lambda v: v.shape)  # it is as it was
    return result, bool(edits)


@pytest.mark.parametrize("kind", ["plain", "branch", "constant", "swallow"])
def test_only_the_same_calls_with_the_same_constants_are_let_through(kind):
    result, cut = followed(Steps(kind), torch.randn(2, 3, 8, 8))
    assert cut
    assert result is (kind == "plain")


def test_another_shape_or_another_model_is_not_let_through():
    inputs = torch.randn(2, 3, 8, 8)
    recording = record(Steps(), inputs)
    skeleton = recording.twin
    assert follows(skeleton, inputs, recording, lambda v: v.shape)
    assert not follows(skeleton, inputs, recording, lambda v: (*v.shape[:-1], v.shape[-1] + 1))
    skeleton.scale = 3.0
    assert not follows(skeleton, inputs, recording, lambda v: v.shape)
    skeleton.scale = 2.0
    del recording.calls[-1]
    recording.evaluated -= 1
    assert not follows(skeleton, inputs, recording, lambda v: v.shape)  # one call more than expected


def test_a_constant_tensor_is_compared():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(3, 4), [1, 2]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.tensor(self.shift).sum()

    inputs = torch.randn(2, 3)
    recording = record(Shifted(), inputs)
    assert follows(recording.twin, inputs, recording, lambda v: v.shape)
    recording.twin.shift = [1, 3]
    assert not follows(recording.twin, inputs, recording, lambda v: v.shape)


@pytest.mark.parametrize("name", NETS)
def test_the_short_way_decides_what_the_long_way_decides(name, monkeypatch):
    model, inputs = make(name)

    def outcome():
        try:
            return prune(model, inputs, ratio=0.5, verify=False)
        except EditError as error:
            return str(error)

    short = outcome()
    monkeypatch.setattr(morph.fitting, "follows", lambda *_: False)
    long = outcome()
    if isinstance(short, str) or isinstance(long, str):
        assert short == long
        return
    assert short.record.plan == long.record.plan
    assert short.record.details == long.record.details
    assert all(
        torch.equal(a, b)
        for a, b in zip(short.model.state_dict().values(), long.model.state_dict().values(), strict=True)
    )
