"""`morph.expand` as a whole: the thesis's figures, exactness on networks of all kinds, data in all forms, refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from models import Net, Snapshot, images, randomise
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import get_model

import morph
from morph.cut import apply_plan
from morph.errors import CheckFailedError, DataError, NothingToGrowError, TargetError, TraceError
from morph.plan import Plan
from morph.tracing import trace
from morph.zoo.darts import DARTS_V1, DARTS_V2, DartsNet


@pytest.fixture(scope="module")
def student():
    return randomise(DartsNet(DARTS_V2, layers=10, channels=16))


def small(n: int = 4, classes: int = 10, size: int = 32):
    return images(n, classes, size=(size, size))


def test_uniform_expansion_of_darts_ends_at_the_figure_of_the_thesis(student):
    record = morph.expand(student, small(), policy="uniform", target_params=1.4e6).record
    assert (record.before["params"], record.after["params"]) == (774_260, 1_428_452)
    assert record.details["distance"] == 28_452
    steps = record.details["steps"]
    assert [s["cell"] for s in steps[-8:]] == [
        *(f"cells.{i}" for i in (4, 5, 7, 8, 9)),
        "cells.4",
        "cells.5",
        "cells.7",
    ]
    assert steps[-2]["params"] == 1_327_076
    assert record.details["probe_passes"] == 0
    assert max(check.relative for check in record.checks) < 1e-10


def test_full_density_adds_what_the_lattice_says(student):
    record = morph.expand(student, small(), policy="uniform", target_params=2_239_460).record
    added = {row["name"]: row["params_added"] for row in record.details["cells"]}
    assert [added[f"cells.{i}"] for i in (0, 1, 2, 4, 5, 7)] == [23_760] * 3 + [98_208] * 2 + [399_168]
    assert added["cells.3"] == added["cells.6"] == 0


def test_fisher_saturates_the_best_cell_first_and_stays_on_the_lattice(student):
    shot = Snapshot(student)
    result = morph.expand(student, small(8), policy="fisher", target_params=1.0e6, reuse_scores=True, batch_size=8)
    assert shot.same()
    steps, cells = result.record.details["steps"], result.record.details["cells"]
    score = {row["name"]: row["score"] for row in cells if row["groups_before"]}
    ranked = sorted(score, key=lambda name: -score[name])
    visited = list(dict.fromkeys(s["cell"] for s in steps))
    assert visited == ranked[: len(visited)]
    assert all(row["groups_after"] == 1 for row in cells if row["name"] in visited[:-1])
    assert (result.record.after["params"] - 774_260) % 1_584 == 0
    assert result.record.details["probe_passes"] == 1


def test_scores_of_the_grown_model_are_those_of_the_student(student):
    """The claim that lets a probe run on the student, checked on the grown model itself."""
    from morph.blocks import find_cells
    from morph.scores import fisher

    x, y = small(3)
    x, net = x.double(), randomise(DartsNet(DARTS_V2, layers=4, channels=4)).double()
    grown = morph.expand(net, (x, y), policy="random", target_params=440_000).model
    scores = []
    for model in (net, grown):
        traced = trace(model, x)
        scores.append(fisher(traced, find_cells(traced), [(x, y)]).channels)
    for name in scores[0]:
        torch.testing.assert_close(scores[1][name], scores[0][name], rtol=1e-9, atol=0)


def test_every_new_weight_of_the_teacher_gets_a_gradient_at_once():
    net = randomise(DartsNet(DARTS_V2, layers=4, channels=4))
    x, y = small(8)
    result = morph.expand(net, (x, y), policy="uniform", target_params=440_000)
    old = dict(net.named_parameters())
    result.model.train()
    logits, auxiliary = result.model(x)
    (nn.functional.cross_entropy(logits, y) + nn.functional.cross_entropy(auxiliary, y)).backward()
    grown = [p for name, p in result.model.named_parameters() if p.shape != old[name].shape]
    assert len(grown) == len(result.record.plan.edits)
    assert all(int((p.grad == 0).sum()) == 0 for p in grown)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("resnext50_32x4d", 27e6),
        ("mobilenet_v2", 4e6),
        ("shufflenet_v2_x0_5", 1.6e6),
        ("regnet_y_400mf", 5e6),
        ("efficientnet_b0", 6e6),
        ("mnasnet0_5", 2.6e6),
    ],
)
@pytest.mark.parametrize("policy", ["fisher", "uniform"])
def test_torchvision_models_grow_exactly(name, target, policy):
    net = randomise(get_model(name, weights=None))
    shot = Snapshot(net)
    x, y = small(2, 1000, 64)
    result = morph.expand(net, (x, y), policy=policy, target_params=target, reuse_scores=True)
    assert shot.same()
    assert type(result.model) is type(net)
    assert result.record.after["params"] == sum(p.numel() for p in result.model.parameters()) >= target
    assert max(check.relative for check in result.record.checks) < 1e-10
    net.eval(), result.model.eval()
    torch.testing.assert_close(result.model(x), net(x), rtol=1e-3, atol=1e-3 * float(net(x).abs().max()))


def test_macs_can_be_the_target_and_are_counted_on_the_real_model():
    net = randomise(Net())
    before = morph.count(net, images(1)[0]).macs
    result = morph.expand(net, images(), policy="uniform", target_macs=before * 1.2, fit="closest")
    assert morph.count(result.model, images(1)[0]).macs == result.record.after["macs"]
    assert abs(result.record.details["distance_relative"]) < 0.2


def test_the_record_goes_to_json_and_replays_to_the_same_bits(tmp_path):
    net = randomise(Net())
    result = morph.expand(net, images(), policy="fisher", target_params=10_000, batch_size=2, seed=3)
    path = tmp_path / "record.json"
    result.record.save(path)
    document = json.loads(path.read_text())
    for key in (
        "params_before",
        "params_after",
        "macs_before",
        "macs_after",
        "max_abs_diff",
        "target",
        "steps",
        "cells",
        "left",
    ):
        assert key in document
    assert document["environment"]["data"] == {"source": "tuple"}
    assert "a new batch before each step" in document["scores"]
    replayed = morph.replay(net, morph.load_plan(path), images()[0]).model
    grown = apply_plan(net, Plan.from_json(document["plan"]))
    for a, b, c in zip(
        result.model.state_dict().values(), replayed.state_dict().values(), grown.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_same_seed_gives_the_same_record_and_another_batch_is_taken_each_step():
    net, data = randomise(Net()), images(20)
    runs = [morph.expand(net, data, target_params=10_000, batch_size=2, seed=s).record.to_json() for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0]["probe_passes"] == len(runs[0]["steps"]) > 1
    assert len({s["score"] for s in runs[0]["steps"] if s["cell"] == runs[0]["steps"][0]["cell"]}) > 1


@pytest.mark.parametrize("form", ["pair", "loader", "list"])
def test_data_in_every_form(form):
    x, y = images(6)
    data = {"pair": (x, y), "loader": DataLoader(TensorDataset(x, y), batch_size=3), "list": [(x, y)]}[form]
    assert morph.expand(randomise(Net()), data, target_params=10_000).record.details["probe_passes"] > 0


def test_reinit_gives_the_untrained_teacher():
    net = randomise(Net())
    result = morph.expand(net, images(), policy="uniform", target_params=10_000, reinit=True, seed=1)
    assert result.record.to_json()["max_abs_diff"] < 1e-10
    assert not torch.equal(result.model.stem.weight, net.stem.weight)
    assert result.model.blocks[0].mix.groups < 6


def test_verification_can_be_switched_off_and_the_record_says_so():
    record = morph.expand(
        randomise(Net()), images(), policy="uniform", target_params=10_000, verify=False
    ).record.to_json()
    assert record["checks"] == []
    assert record["max_abs_diff"] is None
    assert record["verified"] == "not verified: switched off"


def test_other_nodes_can_be_probed_and_what_lies_outside_is_left_whole():
    net = randomise(Net())
    record = morph.expand(net, images(), at=["blocks.1", "blocks.2.mix"], policy="uniform", target_params=9_000).record
    assert [row["name"] for row in record.details["cells"]] == ["blocks.1", "blocks.2.mix"]
    assert record.details["left"] == [
        {"name": "blocks.0.mix", "reason": "outside every probed cell; probe it with --at"}
    ]


def test_a_result_that_is_wrong_is_not_returned(monkeypatch):
    """Break the cut by hand: the check must see it."""
    import morph.passes.regroup as home

    def wrong(weight, groups, to):
        return right(weight, groups, to).flip(1)

    right = home.merge_groups
    monkeypatch.setattr(home, "merge_groups", wrong)
    with pytest.raises(CheckFailedError, match="the outputs moved by"):
        morph.expand(randomise(Net()), images(), policy="uniform", target_params=10_000)


def test_a_size_that_was_not_decided_is_not_returned(monkeypatch):
    import morph.policies as home

    real = home.Ledger.next_step
    monkeypatch.setattr(
        home.Ledger, "next_step", lambda self, cell, score: dataclasses.replace(real(self, cell, score), params=10_001)
    )
    with pytest.raises(CheckFailedError, match=r"10,001 and .* were decided; nothing is returned or written"):
        morph.expand(randomise(Net()), images(), policy="uniform", target_params=10_000)


def test_refusals():
    net, data = randomise(Net()), images()
    with pytest.raises(TargetError, match="give one target"):
        morph.expand(net, data)
    with pytest.raises(TargetError, match="give one target"):
        morph.expand(net, data, target_params=1e6, target_macs=1e6)
    with pytest.raises(TargetError, match="'best' is not one of fisher, fisher-per-param, uniform, random"):
        morph.expand(net, data, policy="best", target_params=1e6)
    with pytest.raises(TargetError, match="is not above the"):
        morph.expand(net, data, target_params=100)
    with pytest.raises(
        TargetError, match=r"no regrouping reaches 1,000,000,000 parameters: .* widening is another move"
    ):
        morph.expand(net, data, target_params=1e9)
    with pytest.raises(
        NothingToGrowError, match="Sequential has no grouped convolution to merge; widening is another move"
    ):
        morph.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), data, target_params=1e6)
    with pytest.raises(DataError, match="5 inputs and 4 targets"):
        morph.expand(net, (data[0], data[1][:4]), target_params=1e4)
    with pytest.raises(DataError, match="the data gave no batch"):
        morph.expand(net, [], target_params=1e4)
    with pytest.raises(DataError, match=r"a batch must be a pair of tensors \(inputs, targets\), got Tensor"):
        morph.expand(net, [data[0]], target_params=1e4)


def test_a_model_that_cannot_be_traced_names_the_users_line():
    class Branching(Net):
        def forward(self, x):
            if x.sum() > 0:
                x = x + 1
            return super().forward(x)

    with pytest.raises(
        TraceError,
        match=r"Branching cannot be traced: .*test_expand.py:\d+, in forward\); control flow must not depend",
    ):
        morph.expand(Branching(), images(), target_params=1e4)


def test_images_of_the_wrong_shape_name_the_shape_and_the_line():
    with pytest.raises(
        TraceError, match=r"Net does not accept inputs of shape \[2, 4, 11, 13\]: .*models.py:\d+, in forward\)"
    ):
        morph.expand(Net(), (torch.randn(4, 4, 11, 13), torch.zeros(4, dtype=torch.int64)), target_params=1e4)


def test_first_order_darts_grows_too():
    net = DartsNet(DARTS_V1, layers=10, channels=16)
    assert sum(p.numel() for p in net.parameters()) == 755_812
    assert morph.expand(net, small(2), policy="uniform", target_params=1e6).record.after["params"] >= 1e6
