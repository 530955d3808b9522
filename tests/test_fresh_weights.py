"""Weights drawn afresh: by the modules themselves, and by mean and deviation where these cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Net, Snapshot, randomise
from torch import Tensor, nn

import morph
from morph.attention import FreeMultiheadAttention
from morph.cut import apply_plan
from morph.fresh_weights import reinitialise, said_of
from morph.plan import Plan, Reinitialise


class Scaled(Net):
    """With parameters that no module can draw: a table, a constant, complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(400, 30) * 0.02 + 0.5)
        self.same = nn.Parameter(torch.full((5,), 0.7))
        self.waves = nn.Parameter(torch.randn(3000, dtype=torch.complex64) * 3 + (2 + 2j))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table.mean() + self.same.sum() + self.waves.abs().mean())


class Inner(nn.Module):
    """Draws its own parameter and those of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(6))
        self.layer = nn.Linear(6, 6)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gain, 3.0)
        self.layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.gain)


class Outer(nn.Module):
    """A module of that kind inside one."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.rand(6))
        self.inner = Inner()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.shift, 2.0)
        self.inner.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.shift)


def test_what_no_module_can_draw_keeps_its_mean_and_deviation():
    torch.manual_seed(1)
    net, random = Scaled(), torch.get_rng_state()
    was = copy.deepcopy(net)
    alike = reinitialise(net, 3)
    assert alike == ("table", "same", "waves")
    assert torch.equal(torch.get_rng_state(), random)
    for name, mean, deviation in (("table", 0.5, 0.02), ("waves", 2.0, 3.0 / 2**0.5)):
        new, old = net.get_parameter(name).detach(), was.get_parameter(name).detach()
        assert float((new == old).float().mean()) < 0.01
        values = torch.view_as_real(new) if new.is_complex() else new
        assert float(values.mean()) == pytest.approx(mean, abs=0.1 * deviation)
        assert float(values.std()) == pytest.approx(deviation, rel=0.1)
    assert torch.allclose(net.same, was.same)
    assert not torch.equal(net.stem.weight, was.stem.weight)
    again = copy.deepcopy(was)
    reinitialise(again, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    reinitialise(again, 4)
    assert not torch.equal(net.table, again.table)
    assert "3 parameters" in said_of(alike)
    assert "(table, same, waves)" in said_of(alike)
    assert not said_of(reinitialise(Net(), 0))


def test_the_mean_and_deviation_are_those_of_the_model_before():
    before = Scaled()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.table.mul_(9).add_(40)  # as a search would have moved it
    reinitialise(after, 0, before)
    assert float(after.table.detach().mean()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(after.table, apply_plan(before, Plan((Reinitialise(0),))).table)


def test_a_graph_is_drawn_by_what_it_was_traced_from_which_stays_as_it_was():
    model, x = Outer(), torch.randn(2, 6)
    graph = copy.deepcopy(morph.trace(model, x).graph_module)
    was = Snapshot(model)
    assert reinitialise(graph, 0, model) == ()
    assert was.same()
    own = copy.deepcopy(model)
    reinitialise(own, 0)
    state = graph.state_dict()
    assert set(state) == set(own.state_dict())
    assert all(torch.equal(state[name], value) for name, value in own.state_dict().items())
    assert (float(state["shift"].mean()), float(state["inner.gain"].mean())) == (2, 3)
    assert reinitialise(graph, 0) == ("shift", "inner.gain")


def test_a_reset_that_fails_is_no_way_to_draw():
    class Rigid(Inner):
        def reset_parameters(self) -> None:
            self.gain.copy_(torch.ones(7))

    net = Rigid()
    assert reinitialise(net, 0) == ("gain",)


def test_attention_of_torch_draws_itself():
    attention = randomise(nn.MultiheadAttention(6, 2))
    assert reinitialise(attention, 0) == ()
    assert not attention.in_proj_bias.any()
    assert float(attention.in_proj_weight.detach().abs().max()) <= (6 / (6 + 18)) ** 0.5


@pytest.mark.parametrize("kdim", [None, 5])
def test_attention_that_has_gone_free_draws_itself_as_torch_does(kdim):
    attention = randomise(FreeMultiheadAttention(6, 2, kdim=kdim, vdim=kdim, add_bias_kv=True))
    attention.out_proj.bias.data.fill_(1)
    torch.manual_seed(5)
    whole = nn.MultiheadAttention(6, 2, kdim=kdim, vdim=kdim, add_bias_kv=True)
    torch.manual_seed(5)
    whole._reset_parameters()
    torch.manual_seed(5)
    attention._reset_parameters()
    names = ["in_proj_weight"] if kdim is None else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    for name in [*names, "in_proj_bias", "bias_k", "bias_v", "out_proj.bias"]:
        assert torch.equal(attention.get_parameter(name), whole.get_parameter(name)), name
    assert reinitialise(attention, 0) == ()
