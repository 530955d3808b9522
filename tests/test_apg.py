"""APG against a plain NumPy twin, its closing times, and its refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gate_nets import GatedNet, alphas, samples
from torch import nn
from torch.nn import functional as F

from morph.apg import APG
from morph.errors import GateError


class Twin:
    """Equation 4 as it is printed, one gate after the other."""

    def __init__(self, g, alpha, lr, lambda2, momentum, clamp):
        self.g, self.alpha = g.astype(np.float64), alpha
        self.v, self.sparse = np.zeros_like(self.g), self.g.copy()
        self.lr, self.lambda2, self.momentum, self.clamp = lr, lambda2, momentum, clamp

    def step(self, gradient):
        for i in range(len(self.g)):
            z = self.g[i] - self.lr * gradient[i]
            threshold = self.lr * self.lambda2 * self.alpha[i]
            s = np.sign(z) * max(abs(z) - threshold, 0.0)
            self.v[i] = s - self.g[i] + self.momentum * self.v[i]
            self.g[i] = s + self.momentum * self.v[i]
            self.sparse[i] = s
            if self.clamp:
                self.g[i], self.sparse[i] = max(self.g[i], 0.0), max(s, 0.0)


def follow(steps=300, momentum=0.9, wrong=None, clamp=False, lambda2=0.5):
    """The largest distance of gates, and of sparse iterates, between APG and its twin on random gradients."""
    draw = np.random.default_rng(0)
    gates = {
        "a": nn.Parameter(torch.ones(7, dtype=torch.float64)),
        "b": nn.Parameter(torch.from_numpy(draw.normal(size=3))),
    }
    alpha = {name: draw.uniform(0.01, 1.0, len(gate)) for name, gate in gates.items()}
    apg = APG(gates, 0.01, lambda2, {n: torch.from_numpy(a) for n, a in alpha.items()}, momentum, clamp)
    twins = {
        n: Twin(g.detach().numpy().copy(), alpha[n], 0.01, lambda2, momentum if wrong is None else wrong, clamp)
        for n, g in gates.items()
    }
    far, closed = 0.0, 0
    for _ in range(steps):
        for name, gate in gates.items():
            gradient = draw.normal(0.3, 1.0, len(gate))
            gate.grad = torch.from_numpy(gradient.copy())
            twins[name].step(gradient)
        apg.step()
        for name, gate in gates.items():
            far = max(far, np.abs(gate.detach().numpy() - twins[name].g).max())
            far = max(far, np.abs(apg.sparse(name).numpy() - twins[name].sparse).max())
            assert np.array_equal(apg.closed()[name].numpy(), twins[name].sparse == 0)
            closed += int(apg.closed()[name].sum())
    return far, closed


@pytest.mark.parametrize("clamp", [False, True])
def test_it_is_its_numpy_twin_step_by_step(clamp):
    far, closed = follow(clamp=clamp)
    assert far < 1e-9  # rounding, a thousand times over: momentum adds it up
    assert closed > 20


def test_the_twin_notices_another_momentum():
    with pytest.raises(AssertionError):
        assert follow(wrong=0.8)[0] < 1e-7


def closing_times(lr, lambda2, pull=0.0, most=20_000, dtype=torch.float64, clamp=True):
    """Steps until a gate of one is at zero or below, and until it counts as closed.

    ``pull`` is the curvature of a loss whose minimum is at one.
    """
    gate = nn.Parameter(torch.ones(1, dtype=dtype))
    apg = APG([gate], lr, lambda2, clamp=clamp)
    crossed = None
    for step in range(1, most + 1):
        gate.grad = pull * (gate.detach() - 1)
        apg.step()
        crossed = crossed or (step if float(gate.detach()) <= 0 else None)
        if bool(apg.closed()["0"]):
            return crossed, step
    return crossed, None


def test_closing_times_of_the_published_settings():
    """The paper's own: 25.6 epochs of 391 steps; those of Huang and Wang; what rounding in float32 changes."""
    assert closing_times(0.01, 1e-3) == (10_009, 10_010)
    assert closing_times(0.1, 0.01)[0] == 109
    assert closing_times(0.1, 0.01)[1] in (109, 110)
    crossed, closed = closing_times(0.01, 1e-3, dtype=torch.float32)
    assert abs(crossed - 10_009) <= 20
    assert closed - crossed <= 1


def test_without_clamp_a_gate_swings_through_zero_before_it_rests():
    for lr, lambda2, crosses in ((0.01, 1e-3, 10_009), (0.1, 0.01, 109)):
        crossed, closed = closing_times(lr, lambda2, clamp=False)
        assert crossed == crosses
        assert 0 <= closed - crossed <= 25


def test_a_pull_of_the_loss_delays_the_closing():
    assert closing_times(0.01, 1e-3, 5e-4)[0] > 13_000
    assert closing_times(0.1, 0.01, 0.011, most=3000) == (None, None)


def test_the_penalty_is_the_lasso():
    """The fixed point of quadratic losses is their known soft threshold."""
    wanted = torch.tensor([0.9, 0.2, -0.4, 0.05], dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    gate = nn.Parameter(torch.ones(4, dtype=torch.float64))
    apg = APG({"g": gate}, 0.05, 0.3, {"g": alpha})
    for _ in range(3000):
        gate.grad = gate.detach() - wanted
        apg.step()
    solution = wanted.sign() * (wanted.abs() - 0.3 * alpha).clamp(min=0)
    assert torch.allclose(apg.sparse(gate), solution, atol=1e-9)
    assert apg.closed()["g"].tolist() == [False, False, False, True]


def test_without_clamp_a_gate_overshoots_and_with_it_never_falls_below_zero():
    lows = {}
    for clamp in (False, True):
        gate = nn.Parameter(torch.ones(1, dtype=torch.float64))
        apg = APG([gate], 0.1, 0.01, clamp=clamp)
        lows[clamp] = 1.0
        for _ in range(130):
            gate.grad = torch.zeros(1, dtype=torch.float64)
            apg.step()
            lows[clamp] = min(lows[clamp], float(gate.detach()))
    assert lows[False] < 0
    assert lows[True] == 0


def test_state_goes_round_and_training_goes_on_as_if_nothing_had_happened():
    x, y = samples()

    def train(net, apg, steps):
        for _ in range(steps):
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()
            apg.step()

    net = GatedNet()
    apg = APG(net.gates(), 0.05, 0.1, alphas(net))
    train(net, apg, 20)
    other = GatedNet(1)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    again = APG(other.gates(), 0.3, 0.7)
    again.load_state_dict(copy.deepcopy(apg.state_dict()))
    train(net, apg, 30)
    train(other, again, 30)
    for name in net.gates():
        assert torch.equal(net.gates()[name].weight, other.gates()[name].weight)
        assert torch.equal(apg.sparse(name), again.sparse(name))
    assert sum(int(c.sum()) for c in apg.closed().values()) > 0


def test_lambda2_can_change_on_the_way():
    gate = nn.Parameter(torch.ones(2))
    apg = APG([gate], 0.1, 0.0)
    gate.grad = torch.zeros(2)
    apg.step()
    assert torch.equal(gate, torch.ones(2))
    apg.param_groups[0]["lambda2"] = 0.5
    apg.step()
    assert (gate < 1).all()


def test_a_gate_without_gradient_rests_and_a_closure_is_called():
    moved, rests = (nn.Parameter(torch.ones(2)) for _ in range(2))
    apg = APG([moved, rests], 0.1, 0.1)

    def closure():
        loss = moved.sum()
        loss.backward()
        return loss

    assert float(apg.step(closure)) == 2
    assert (moved < 1).all()
    assert torch.equal(rests, torch.ones(2))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda g: APG({}), "no gates"),
        (lambda g: APG([g], lr=-1.0), "lr of -1"),
        (lambda g: APG([g], lambda2=float("nan")), "lambda2 of nan"),
        (lambda g: APG([g], momentum=1.0), "momentum of 1.0; expected from 0 to below 1"),
        (lambda g: APG({"a": nn.Identity()}), "gate a is NoneType"),
        (lambda g: APG([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]), "too coarse"),
        (lambda g: APG({"a": g}, weights={"b": torch.ones(3)}), "a is among one of them only"),
        (lambda g: APG({"a": g}, weights={"a": torch.ones(2)}), "expected 3 numbers"),
        (lambda g: APG({"a": g}, weights={"a": -torch.ones(3)}), "from -1 to -1"),
        (lambda g: APG({"a": g}).sparse("b"), "b is not one of its 1 gates"),
        (lambda g: APG({"a": g}).sparse(nn.Linear(1, 1)), "this is not one"),
    ],
)
def test_refusals(make, text):
    with pytest.raises(GateError, match=text):
        make(nn.Parameter(torch.ones(3)))
