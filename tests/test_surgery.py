"""Plans, cuts and checks: they go to JSON and back, refuse what does not fit, and see what is wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from models import Net, Snapshot, images, randomise
from torch import nn

from morph.cut import apply_plan
from morph.errors import CheckFailedError, PlanMismatchError
from morph.plan import Plan, Regroup, Reinitialise, load_plan
from morph.surgery import replay
from morph.verify import require, same_function

PLAN = Plan((Regroup("blocks.0.mix", 6, 2, (30, 5, 3, 3)), Regroup("blocks.2.mix", 10, 1, (30, 3, 3, 3))))


@pytest.fixture
def net():
    return randomise(Net())


def test_a_plan_grows_a_copy(net):
    net.blocks[1].eval()
    net.stem.requires_grad_(False)
    shot = Snapshot(net)
    grown = apply_plan(net, PLAN)
    assert shot.same()
    assert type(grown) is Net
    assert [grown.blocks[i].mix.groups for i in range(3)] == [2, 6, 1]
    assert list(grown.state_dict()) == list(net.state_dict())
    assert [m.training for m in grown.modules()] == [m.training for m in net.modules()]
    assert not grown.stem.weight.requires_grad
    assert not {p.data_ptr() for p in grown.parameters()} & {p.data_ptr() for p in net.parameters()}
    require(same_function(net, grown, images()[0]))


def test_the_grown_model_is_exact_in_training_mode_too(net):
    x = images()[0].double()
    net.double().train()
    grown = apply_plan(net, PLAN)
    outputs = []
    for model in (net, grown):
        torch.manual_seed(3)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grown.blocks[2].norm.running_var, net.blocks[2].norm.running_var, rtol=1e-12, atol=0)


def test_an_empty_plan_changes_nothing(net):
    same = apply_plan(net, Plan(()))
    assert same is not net
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), net.state_dict().values(), strict=True))


def test_replay_gives_the_same_bits(net):
    first = replay(net, PLAN, images()[0])
    second = replay(
        copy.deepcopy(net), Plan.from_json(json.loads(json.dumps(first.record.to_json()["plan"]))), images()[0]
    )
    assert first.record.to_json()["max_abs_diff"] <= 1e-12
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    )
    assert first.record.before["params"] == sum(p.numel() for p in net.parameters())
    assert first.record.after["params"] == sum(p.numel() for p in first.model.parameters())


def test_a_plan_for_another_model_is_refused_and_all_mismatches_are_counted(net):
    plan = Plan(
        (
            Regroup("blocks.0.mix", 6, 2, (31, 5, 3, 3)),
            Regroup("stem", 3, 1, (30, 1, 3, 3)),
            Regroup("gone", 2, 1, (2, 1)),
            PLAN.edits[1],
        )
    )
    with pytest.raises(
        PlanMismatchError,
        match=r"3 of 4 edits do not fit \(blocks.0.mix: plan has 6 groups, weight \[31, 5, 3, 3\], "
        r"model has 6 groups, weight \[30, 5, 3, 3\]; stem: .*; gone: .* model has no such convolution\)",
    ):
        apply_plan(net, plan)


def test_a_plan_that_is_applied_already_says_so(net):
    with pytest.raises(PlanMismatchError, match="looks applied already: start from the original model"):
        apply_plan(apply_plan(net, PLAN), PLAN)


def test_fresh_weights_are_a_decision_that_replays(net):
    plan = Plan((*PLAN.edits, Reinitialise(5)))
    shot, before = Snapshot(net), torch.random.get_rng_state()
    first, second = replay(net, plan, images()[0]), replay(net, plan, images()[0])
    assert shot.same()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert "drawn afresh" in first.record.to_json()["verified"]
    pairs = list(zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.model.stem.weight, net.stem.weight)
    assert float(first.model.blocks[0].norm.running_mean.abs().max()) == 0


def test_the_check_rejects_a_wrong_result(net):
    x = images()[0]
    wrong = apply_plan(net, PLAN)
    with torch.no_grad():
        wrong.blocks[0].mix.weight[0, 0, 0, 0] += 1e-4
    checks = same_function(net, wrong, x)
    assert not any(check.passed for check in checks)
    with pytest.raises(
        CheckFailedError,
        match=r"check failed: the outputs moved by .* relative, limit 1e-10, float64, 5 samples\); nothing is "
        r"returned or written",
    ):
        require(checks)


def test_the_check_rejects_swapped_channels_and_other_shapes_and_nan(net):
    x = images()[0]
    swapped = copy.deepcopy(net)
    with torch.no_grad():
        swapped.blocks[1].norm.running_mean.copy_(swapped.blocks[1].norm.running_mean.roll(1))
    assert not same_function(net, swapped, x)[0].passed
    assert not same_function(net, randomise(Net(classes=8)), x)[0].passed
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    assert not same_function(net, broken, x)[0].passed
    assert not same_function(broken, broken, x)[0].passed


def test_the_check_sees_gradients_that_outputs_hide(net):
    class Detached(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x) + 0 * x.mean((1, 2, 3))[:, None] + (x - x.detach()).sum((1, 2, 3))[:, None]

    outputs, gradients = same_function(net, Detached(net), images()[0])
    assert outputs.passed
    assert not gradients.passed


def test_the_check_leaves_both_models_alone(net):
    grown = apply_plan(net, PLAN)
    shots = Snapshot(net), Snapshot(grown)
    same_function(net, grown, images(40)[0])
    assert all(shot.same() for shot in shots)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not a JSON document"),
        ("[]", "not a record: it has no plan"),
        ('{"plan": [], "schema": 99}', "a record of schema 99, this version reads 1"),
        ('{"plan": {}, "schema": 1}', "a plan is a list of edits, got dict"),
        (
            '{"plan": [{"edit": "explode"}], "schema": 1}',
            "edit 0 of the plan is not one that this version knows: regroup, reinitialise",
        ),
        ('{"plan": [{"edit": "regroup", "module": 3}], "schema": 1}', "edit 0 of the plan: module cannot be 3"),
        (
            '{"plan": [{"edit": "regroup", "module": "a", "groups": 4, "to": true, "shape": []}], "schema": 1}',
            "to cannot be True",
        ),
        (
            '{"plan": [{"edit": "regroup", "module": "a", "groups": 4, "to": 2, "shape": ["x"]}], "schema": 1}',
            "shape cannot be",
        ),
    ],
)
def test_records_that_are_not(tmp_path, text, reason):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(PlanMismatchError, match=reason):
        load_plan(path)


def test_a_missing_record(tmp_path):
    with pytest.raises(PlanMismatchError, match="No such file or directory; give a record written by morph"):
        load_plan(tmp_path / "none.json")
