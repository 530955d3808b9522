"""Tracing leaves the model as it was and says where things are."""

from __future__ import annotations

import pytest
import torch
from models import Net, Snapshot, images, randomise
from torch import nn

from morph.errors import TraceError
from morph.tracing import evaluation, trace, try_inputs


def test_the_graph_computes_what_the_model_does_and_knows_its_outputs():
    net = randomise(Net())
    net.blocks[0].eval()
    shot = Snapshot(net)
    x = images()[0]
    traced = trace(net, x)
    assert shot.same()
    torch.testing.assert_close(traced.graph_module(x), net.eval()(x), rtol=0, atol=0)
    assert traced.outputs["blocks.1"] == (traced.node(traced.outputs["blocks.1"][0]).name,)
    assert traced.shapes[traced.outputs["blocks.2"][0]] == (5, 30, 11, 13)
    assert [str(node.target) for node, _ in traced.calls()][:2] == ["stem", "blocks.0.mix"]


def test_nodes_know_the_users_line():
    traced = trace(Net(), images()[0])
    assert "models.py" in (traced.node("add").stack_trace or "")


def test_flags_come_back_even_after_an_error():
    net = Net()
    net.blocks[1].eval()
    flags = [m.training for m in net.modules()]
    with pytest.raises(ZeroDivisionError), evaluation(net):
        assert not any(m.training for m in net.modules())
        1 / 0  # noqa: B018
    assert [m.training for m in net.modules()] == flags


def test_subclasses_of_convolutions_stay_whole():
    class Padded(nn.Conv2d):
        def forward(self, x):
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    traced = trace(nn.Sequential(Padded(3, 4, 3)), images()[0])
    assert [type(m) for _, m in traced.calls()] == [Padded]


def test_inputs_that_do_not_fit_are_refused_with_shape_and_line():
    with pytest.raises(
        TraceError,
        match=r"Net does not accept inputs of shape \[2, 5\]: .* \(at .*models.py:\d+, in forward\); give inputs",
    ):
        try_inputs(Net(), (torch.zeros(2, 5),))


def test_what_cannot_be_traced_names_the_line():
    class Loop(nn.Module):
        def forward(self, x):
            while x.abs().max() > 1:
                x = x / 2
            return x

    with pytest.raises(TraceError, match=r"Loop cannot be traced: .*\(at .*test_trace.py:\d+, in forward\)"):
        trace(Loop(), torch.ones(2, 3))
