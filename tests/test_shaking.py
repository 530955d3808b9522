"""Checks see through weights that are all zero."""

import dataclasses

import pytest
import torch
from torch import nn

import morph
from morph.errors import CheckFailedError
from morph.plan import Plan, Resize
from morph.removal import Remover, checks_of
from morph.shaking import SHAKEN, shaken

torch.manual_seed(0)


class Newborn(nn.Module):
    """A residual branch that ends in a norm of zeros, and a head of zeros, as networks are born."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 11, 3, padding=1)
        self.one, self.two = nn.Conv2d(11, 13, 3, padding=1), nn.Conv2d(13, 11, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(11), nn.Linear(11, 5)
        for zero in (self.norm.weight, self.head.weight, self.head.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = x + self.norm(self.two(torch.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


INPUTS = torch.randn(3, 3, 8, 8)


@pytest.mark.parametrize("work", [morph.prune, morph.widen])
def test_zero_weights_are_made_random_for_a_second_check(work):
    model = Newborn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checks = work(model, INPUTS, ratio={morph.prune: 0.5, morph.widen: 2}[work]).record.checks
    assert [SHAKEN in check.name for check in checks] == [False, True]
    assert "all outputs are zero" in checks[0].name
    assert "all outputs are zero" not in checks[1].name
    assert all(check.passed for check in checks)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_wrong_cut_behind_zeros_is_found():
    model = Newborn()
    analysis = morph.analyse(model, INPUTS)
    name = next(n for n, c in analysis.couplings.items() if n.startswith("one.weight"))
    done = Remover(model, INPUTS, analysis, "auto").remove({name: torch.arange(4).numpy()})
    wrong = Plan(
        tuple(
            dataclasses.replace(edit, index=tuple(range(9))) if edit.tensor == "two.weight" else edit
            for edit in done.plan.edits
        )
    )
    assert any(isinstance(edit, Resize) and edit.tensor == "two.weight" for edit in wrong.edits)
    bad = dataclasses.replace(done, plan=wrong, model=morph.cut.apply_plan(model, wrong))
    first, second = checks_of(bad, model, INPUTS, analysis)
    assert first.passed  # all it sees is zero
    assert not second.passed
    with pytest.raises(CheckFailedError, match="made random"):
        morph.verify.require((first, second))


def test_only_zero_weights_count():
    plain = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(plain[0].bias)
    assert shaken(plain) is None  # the norm's bias and the layer's are zero, and that hides nothing
    nn.init.zeros_(plain[1].weight)
    twin = shaken(plain)
    assert twin[1].weight.detach().all()
    assert twin[0].bias.detach().all()
    assert torch.equal(twin[0].weight, plain[0].weight)
    assert not plain[1].weight.detach().any()
