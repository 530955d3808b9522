"""A record is replayed with every form of inputs, verified, to the same bits; a wrong result is seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from analysis_nets import NETS, draw, make
from models import Snapshot
from torch import Tensor, nn

import morph
from morph.cut import apply_plan
from morph.errors import CheckFailedError, TraceError
from morph.plan import Plan, Resize
from morph.verify import require, same_function


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NETS)
def test_cuts_are_replayed_on_any_inputs(name):
    model, inputs = make(name)
    result = morph.prune(model, inputs, ratio=0.4, steps=2)
    snapshot = Snapshot(model)
    again = morph.replay(model, result.record.plan, inputs)
    assert snapshot.same()
    assert same_bits(again.model, result.model)
    assert again.record.after["params"] == result.record.after["params"]
    assert again.record.environment["input_shape"] == result.record.environment["input_shape"]
    if result.record.plan.edits:
        (check,) = again.record.checks
        assert check.passed
        assert check.name == "zeroing reference"


@pytest.mark.parametrize("name", ["pair", "named", "transformer", "chain", "tied"])
def test_growth_is_replayed_on_any_inputs(name):
    model, inputs = make(name)
    result = morph.widen(model, inputs, ratio=2)
    again = morph.replay(model, result.record.plan, inputs)
    assert same_bits(again.model, result.model)
    assert all(check.passed for check in again.record.checks)
    floats = [t for t in torch.utils._pytree.tree_leaves(inputs) if t.is_floating_point()]
    names = ["outputs", "input gradients"] if floats else ["outputs"]
    assert [check.name for check in again.record.checks] == names


@dataclasses.dataclass
class Answer:
    logits: Tensor
    notes: str = ""


class Told(nn.Module):
    """Token numbers by name, an option that is no tensor, float32 asked for inside, and a dataclass that comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.two = nn.Embedding(13, 11), nn.Linear(11, 17), nn.Linear(17, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, scale: float = 1.0) -> Answer:
        x = self.embed(ids).to(torch.float32).to(self.one.weight.dtype)
        x = x if mask is None else x * mask[..., None]
        return Answer(self.two(torch.tanh(self.one(x)) * scale))


def told() -> tuple[nn.Module, dict[str, Any]]:
    ids = torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(0))
    return Told().double(), {"ids": ids, "mask": draw(3, 7).sign(), "scale": 0.5}


@pytest.mark.parametrize("surgery", [morph.prune, morph.widen])
def test_a_dataclass_out_of_named_inputs(surgery):
    model, inputs = told()
    result = surgery(model, inputs, ratio=0.5 if surgery is morph.prune else 1.5)
    again = morph.replay(model, result.record.plan, inputs)
    assert same_bits(again.model, result.model)
    assert again.record.after == result.record.after
    assert again.record.checks[0].relative < 1e-12


@pytest.mark.parametrize("name", ["pair", "named"])
def test_a_wrong_replay_is_refused(name):
    model, inputs = make(name)
    plan = morph.widen(model, inputs, ratio=1.5).record.plan
    wrong = Plan(tuple(dataclasses.replace(e, scale=()) if isinstance(e, Resize) else e for e in plan.edits))
    with pytest.raises(CheckFailedError, match="the outputs moved by"):
        morph.replay(model, wrong, inputs)
    checks = same_function(model, apply_plan(model, wrong), inputs)
    assert not checks[0].passed
    with pytest.raises(CheckFailedError):
        require(checks)


def test_inputs_that_do_not_fit_are_refused():
    model, inputs = told()
    with pytest.raises(TraceError, match=r"Told does not accept inputs of shape \[3, 7\], \[3, 7\]: .*no_such"):
        morph.replay(model, Plan(()), {"no_such": inputs["ids"], "ids": inputs["ids"]})
