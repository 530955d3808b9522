"""A traced graph is pickled and read again as what it was, whatever functions it calls."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from analysis_nets import make
from torch import nn
from torchvision.models import SwinTransformer

import morph
from morph.passes.gates import gates_of


def again(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    read: nn.Module = torch.load(file, weights_only=False)
    return read


@pytest.mark.parametrize("name", ["residual", "dense", "grouped", "depthwise", "shuffle"])
def test_pruned_and_gated_graphs_are_read_again(name):
    model, inputs = make(name)
    pruned = morph.prune(model, inputs, ratio=0.4, form="graph").model
    gated = morph.gate(model, inputs).model
    with torch.no_grad():
        for gate in gates_of(gated).values():
            gate.weight.uniform_(0.5, 1.5)
    for graph in (pruned, gated):
        for read in (again(graph), copy.deepcopy(graph), again(again(graph))):
            assert torch.equal(read(inputs), graph(inputs))
            assert list(read.state_dict()) == list(graph.state_dict())
    assert list(gates_of(again(gated))) == list(gates_of(gated))


def test_functions_of_others_stay_whole():
    torch.manual_seed(0)
    model = SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    gated = morph.gate(model, x).model
    read = again(gated)
    assert torch.equal(read(x), gated(x))
    assert len(read.graph.nodes) == len(gated.graph.nodes)
