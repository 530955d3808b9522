"""Gates beside any optimizer: scalers, clipping, accumulation, schedulers and resumption leave them right."""

from __future__ import annotations

import copy

import pytest
import torch
from gate_nets import GatedNet, alphas, samples
from torch import nn
from torch.nn import functional as F

from morph.apg import APG
from morph.attaching import attach_gates
from morph.errors import GateError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "fused-sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
}
X, Y = samples()


def train(net, optimizer, steps, x=X, y=Y):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def by_hand(make, steps, **options):
    """The same without attaching: two optimizers side by side."""
    net = GatedNet()
    base, apg = make(net.weights()), APG(net.gates(), weights=alphas(net), **options)
    for _ in range(steps):
        net.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        base.step()
        apg.step()
    return net, apg


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("with_gates", [False, True], ids=["weights", "all"])
def test_every_optimizer_gives_what_two_side_by_side_give(name, with_gates):
    net = GatedNet()
    optimizer = OPTIMIZERS[name](list(net.parameters()) if with_gates else net.weights())
    apg = attach_gates(optimizer, net.gates(), lr=0.02, lambda2=0.2, weights=alphas(net))
    train(net, optimizer, 60)
    wanted, reference = by_hand(OPTIMIZERS[name], 60, lr=0.02, lambda2=0.2)
    assert same(net, wanted)
    for gate in net.gates():
        assert torch.equal(apg.sparse(gate), reference.sparse(gate))
    assert sum(int(c.sum()) for c in apg.closed().values()) > 0


def test_named_groups_stay_named():
    net = GatedNet()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    attach_gates(optimizer, net.gates())
    assert [g["param_names"] for g in optimizer.param_groups][1] == ["gate", "middle"]
    assert optimizer.param_groups[0]["param_names"] == ["first.weight", "first.bias", "last.weight", "last.bias"]


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=60),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10, eta_min=0.05),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 5),
    ],
)
def test_no_scheduler_revives_the_learning_rate_of_the_gates(scheduler):
    """With a scheduler that would, the gates move as if there was none."""
    net = GatedNet()
    for p in net.weights():
        p.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    attach_gates(optimizer, net.gates(), lr=0.02, lambda2=0.2, weights=alphas(net))
    follows = scheduler(optimizer)
    for _ in range(50):
        train(net, optimizer, 1)
        follows.step()
    still = GatedNet()
    for p in still.weights():
        p.requires_grad_(False)
    apg = APG(still.gates(), 0.02, 0.2, alphas(still))
    train(still, apg, 50)
    assert same(net, still)


def test_a_skipped_step_rests_the_gates_and_the_scale_is_undone():
    """As torch.amp does it: through a GradScaler, for plain and for fused optimizers."""
    for name in ("nesterov", "fused", "fused-sgd"):
        net = GatedNet()
        optimizer = OPTIMIZERS[name](net.weights())
        apg = attach_gates(optimizer, net.gates(), lr=0.02, lambda2=0.2, weights=alphas(net))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
        for step in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(X), Y)
            scaler.scale(loss).backward()
            if step % 10 == 3:  # an overflow: six of the sixty steps are skipped
                before = copy.deepcopy(net.state_dict()), copy.deepcopy(apg.state_dict()["state"])
                net.first.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            if step % 10 == 3:
                assert all(torch.equal(before[0][k], v) for k, v in net.state_dict().items())
                now = apg.state_dict()["state"]
                assert all(torch.equal(v, now[i][k]) for i, s in before[1].items() for k, v in s.items())
        wanted, _ = by_hand(OPTIMIZERS[name], 54, lr=0.02, lambda2=0.2)
        for a, b in zip(net.parameters(), wanted.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_clipping_and_accumulation_reach_the_gates():
    net, other = GatedNet(), GatedNet()
    optimizer = torch.optim.SGD(net.weights(), lr=0.1)
    attach_gates(optimizer, net.gates(), lr=0.1, lambda2=0.01)
    base, apg = torch.optim.SGD(other.weights(), lr=0.1), APG(other.gates(), 0.1, 0.01)
    for _ in range(20):
        optimizer.zero_grad()
        for part in range(2):
            (F.cross_entropy(net(X[part::2]), Y[part::2]) / 2).backward()
        every = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(every) == 6
        norm = nn.utils.clip_grad_norm_(every, 0.05)
        optimizer.step()
        other.zero_grad()
        F.cross_entropy(other(X), Y).backward()
        for p in other.parameters():
            p.grad *= min(1.0, 0.05 / (float(norm) + 1e-6))
        base.step()
        apg.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("name", ["nesterov", "adamw", "fused"])
def test_the_state_of_the_base_optimizer_carries_the_gates(name, tmp_path):
    def made(net):
        optimizer = OPTIMIZERS[name](net.weights())
        return optimizer, attach_gates(optimizer, net.gates(), lr=0.02, lambda2=0.2, weights=alphas(net))

    whole = GatedNet()
    optimizer, apg = made(whole)
    train(whole, optimizer, 25)
    torch.save({"net": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(whole, optimizer, 25)

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = GatedNet(5)
    again, apg2 = made(resumed)
    resumed.load_state_dict(saved["net"])
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, 25)
    assert same(whole, resumed)
    assert all(torch.equal(apg.sparse(gate), apg2.sparse(gate)) for gate in whole.gates())


def test_a_state_without_gates_is_refused():
    net = GatedNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state = optimizer.state_dict()
    attach_gates(optimizer, net.gates())
    with pytest.raises(GateError, match="saved without gates"):
        optimizer.load_state_dict(state)


def test_an_optimizer_without_groups_is_refused():
    net = GatedNet()
    with pytest.raises(GateError, match="LBFGS"):
        attach_gates(torch.optim.LBFGS(net.weights()), net.gates())
