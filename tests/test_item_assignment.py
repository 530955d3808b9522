"""Parts of tensors are written over (``x[i] = y``), or tensors by statements, before and after they are read."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from analysis_support import gap, run, slow_zeroed, some_units
from gate_support import outputs, shut
from models import randomise
from torch import Tensor, nn
from torch.nn import functional as F

import morph
from morph.removal import Remover
from morph.tracing import trace_graph


class Writing(nn.Module):
    """A network that writes into a part of a tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.first = nn.Conv2d(3, 13, 3, padding=1), nn.Conv2d(13, 13, 1)
        self.second, self.third = nn.Conv2d(13, 11, 1), nn.Conv2d(26, 11, 1)
        self.part, self.head, self.act = nn.Conv2d(13, 6, 1), nn.Linear(11, 5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        y = torch.sigmoid(self.first(x))
        out = self.second(y)
        if self.kind == "channels":
            y[:, :5] = x[:, :5]
        elif self.kind == "the last channels":
            y[:, -4:] = x[:, -4:]
            y[:, 2:-4] += 1
        elif self.kind == "a number":
            y[:, 4:9] = 0.25
        elif self.kind == "what a layer gives":
            y[:, :6] = self.part(x)
        elif self.kind == "places":
            y[..., 0] = 0
            y[:, :, -1] = x[:, :, 0] * 2
        elif self.kind == "a shift in time":
            fold = x.shape[1] // 4
            y = torch.zeros_like(x)
            y[:, :fold, :-1] = x[:, :fold, 1:]
            y[:, fold:] = x[:, fold:]
        elif self.kind == "through another name":
            other = y.transpose(1, 2)
            y[:, 3:7] *= x[:, 3:7]
            y = other.transpose(1, 2)
        elif self.kind == "a mask":
            y[y > 0.6] = 0
        else:  # statements
            F.relu_(x)
            y.add_(x)
            z = torch.cat([x, y], 1)
            self.act(z)
            y.mul_(0.5)
            out = out + self.third(z) + self.second(x)
        return self.head((out + self.second(y)).mean((2, 3)))


KINDS = [
    "channels",
    "the last channels",
    "a number",
    "what a layer gives",
    "places",
    "a shift in time",
    "through another name",
    "a mask",
    "statements",
]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomise(Writing(request.param).double(), 2).eval()


IMAGES = torch.randn(3, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_graph_is_the_same_function_also_from_files(model: Writing, tmp_path) -> None:
    graph = trace_graph(copy.deepcopy(model))
    assert torch.equal(graph(IMAGES), model(IMAGES))
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGES), model(IMAGES))
    morph.save_model(model, tmp_path / "model.pt")
    assert torch.equal(morph.open_model(tmp_path / "model.pt").model(IMAGES), model(IMAGES))


@pytest.mark.parametrize("form", ["class", "graph", "auto"])
@pytest.mark.parametrize("seed", range(3))
def test_cuts_are_exact(model: Writing, form: str, seed: int) -> None:
    analysis = morph.analyse(model, IMAGES)
    done = Remover(model, IMAGES, analysis, form).remove(some_units(analysis, seed))
    assert gap(run(slow_zeroed(model, analysis, done.choice), IMAGES), run(done.model, IMAGES)) < 1e-12
    if form == "auto" and model.kind != "a shift in time":
        assert not done.left


@pytest.mark.parametrize("form", ["graph", "auto"])
def test_growth_is_exact(model: Writing, form: str) -> None:
    for ratio in (1.25, 2.0):
        wide = morph.widen(model, IMAGES, ratio=ratio, form=form, verify=False)
        assert gap(run(model, IMAGES), run(wide.model, IMAGES)) < 1e-12


@pytest.mark.parametrize("where", ["auto", "producer", "connection"])
@pytest.mark.parametrize("seed", range(2))
def test_gates_are_taken_out_where_their_readers_are(model: Writing, where, seed) -> None:
    gated = morph.gate(model, IMAGES, where)
    assert gap(outputs(model, IMAGES), outputs(gated.model, IMAGES)) == 0
    shut(gated, 0.4, seed)
    assert gap(outputs(gated.model, IMAGES), outputs(gated.remove().model, IMAGES)) < 1e-12
