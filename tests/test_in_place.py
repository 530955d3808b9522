"""Assignments in place in traced code: the graph computes what the class computes, whoever else sees the tensor."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import morph
from morph.in_place import IN_PLACE
from morph.tracing import trace_graph


class Assigning(nn.Module):
    """A network that writes into a tensor which has another name, or is a part of another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Conv2d(3, 13, 3, padding=1), nn.Conv2d(13, 13, 3, padding=1)
        self.head, self.rest = nn.Linear(13, 5), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        z = x
        if self.kind == "other name":
            x += self.second(x)
            y = z
        elif self.kind == "both names":
            x -= self.second(x)
            y = x * z
        elif self.kind == "a part":
            part = x[:, 2:7]
            part *= 2
            y = self.second(z)
        elif self.kind == "a part of a part":
            part = x.transpose(1, 2)[:, :, 3:11]
            part /= 3
            part += 1
            y = self.second(z)
        elif self.kind == "through a layer":
            part = self.rest(x)
            part **= 2
            y = self.second(z)
        else:  # nobody else reads it
            y = self.second(x)
            y += z
        out: Tensor = self.head(y.mean((2, 3)))
        return out


KINDS = ["other name", "both names", "a part", "a part of a part", "through a layer", "alone"]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    return Assigning(request.param).double().eval()


IMAGES = torch.randn(3, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_graph_is_the_same_function(model: Assigning) -> None:
    graph = trace_graph(copy.deepcopy(model))
    assert torch.equal(graph(IMAGES), model(IMAGES))
    written = [node for node in graph.graph.nodes if node.target in IN_PLACE]
    assert bool(written) is (model.kind != "alone")


def test_so_is_one_that_was_pickled(model: Assigning) -> None:
    file = io.BytesIO()
    torch.save(trace_graph(copy.deepcopy(model)), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(IMAGES), model(IMAGES))


def test_so_is_one_from_a_file(model: Assigning, tmp_path) -> None:
    if model.kind == "through a layer":  # no file may name this operator
        with pytest.raises(morph.errors.ModelFileError, match="ipow"):
            morph.save_model(model, tmp_path / "model.pt")
        return
    morph.save_model(model, tmp_path / "model.pt")
    assert torch.equal(morph.open_model(tmp_path / "model.pt").model(IMAGES), model(IMAGES))


@pytest.mark.parametrize("form", ["auto", "graph"])
def test_cuts_and_growth_are_exact(model: Assigning, form: str) -> None:
    before = morph.count(model, IMAGES).params
    cut = morph.prune(model, IMAGES, ratio=0.4, form=form)
    wide = morph.widen(model, IMAGES, ratio=1.3, form=form)
    assert cut.record.after["params"] < before < wide.record.after["params"]
    assert max(c.relative for c in (*cut.record.checks, *wide.record.checks)) < 1e-12
