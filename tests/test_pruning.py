"""`prune` from one end to the other: what it gives, what it records, what is done with the result, what it refuses."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from analysis_nets import NETS, draw, make
from analysis_support import gap, run, slow_zeroed
from models import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer

import morph
from morph import pruning
from morph.analysis import analyse
from morph.errors import CheckFailedError, EditError, PlanMismatchError, TargetError, TraceError
from morph.files import open_model, save_model
from morph.plan import Plan, UseGraph
from morph.pruning import prune, repaired


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NETS)
def test_pruning_is_checked_recorded_and_can_be_replayed(name, tmp_path):
    model, inputs = make(name)
    snapshot = Snapshot(model)
    result = prune(model, inputs, ratio=0.4, heads="both")
    assert snapshot.same()
    record = result.record
    assert [c.name for c in record.checks] == ["zeroing reference"]
    assert record.checks[0].passed
    assert record.before["params"] == sum(p.numel() for p in model.parameters())
    assert record.after["params"] == sum(p.numel() for p in result.model.parameters()) < record.before["params"]
    rows = record.details["couplings"]
    assert sum(row["units_before"] - row["units_after"] for row in rows) > 0
    assert all(row["units_after"] >= 1 for row in rows)
    record.save(tmp_path / "record.json")
    document = json.loads((tmp_path / "record.json").read_text())
    assert (document["command"], document["form"]) == ("prune", record.details["form"])
    again = morph.cut.apply_plan(copy.deepcopy(model), morph.load_plan(tmp_path / "record.json"))
    assert same_bits(again, result.model)
    assert gap(run(again, inputs), run(result.model, inputs)) == 0


def test_a_saved_record_is_replayed_on_a_fresh_copy(tmp_path):
    model, inputs = make("chain")
    result = prune(model, inputs, ratio=0.5)
    result.record.save(tmp_path / "record.json")
    plan = morph.load_plan(tmp_path / "record.json")
    again = morph.replay(copy.deepcopy(model), plan, inputs, verify=False)
    assert same_bits(again.model, result.model)
    assert again.record.after == result.record.after
    with pytest.raises(PlanMismatchError, match="it looks applied already"):
        morph.replay(result.model, plan, inputs, verify=False)


def test_a_cut_is_replayed_with_verification():
    model, inputs = make("chain")
    result = prune(model, inputs, ratio=0.5)
    assert same_bits(morph.replay(model, result.record.plan, inputs).model, result.model)


def test_the_record_says_what_was_left_and_why():
    class Own(nn.MultiheadAttention):
        """Of a class that is not torch's, so that it must stay what it is."""

    model, inputs = make("torchhead")
    model.mix.__class__ = Own
    result = prune(model, inputs, ratio=0.4)
    assert same_bits(model, result.model)
    assert result.record.plan == Plan(())
    left = result.record.details["left"]
    assert left
    assert all("(in mix)" in item["reason"] for item in left)
    frozen = prune(*make("chain"), ratio=0.4).record.details["frozen"]
    assert "output of the model" in {item["reason"] for item in frozen}


def test_the_record_counts_unknown_operators_and_names_the_line():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.sigmoid(self.two(torch.ops.morph_tests.turn(torch.sigmoid(self.one(x))))))

    model = Net().double()
    result = prune(model, draw(4, 5), ratio=0.5)
    assert result.record.details["unknown_operators"] == {"morph_tests.turn.default": 1}
    reason = next(item for item in result.record.details["frozen"] if "turn" in item["reason"])
    assert re.search(r"test_pruning\.py:\d+, in forward", reason["where"])
    assert result.model.one.out_features == 7
    assert result.model.two.out_features < 11


@torch.library.custom_op("morph_tests::turn", mutates_args=())
def turn(x: Tensor) -> Tensor:
    return x.flip(-1) * 2


@turn.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_several_steps_add_up(tmp_path):
    for name in ("transformer", "constants"):
        model, inputs = make(name)
        seen: list[tuple[int, int]] = []
        result = prune(
            model, inputs, ratio=0.5, steps=3, on_step=lambda n, sizes, to=seen: to.append((n, sizes.params))
        )
        assert [n for n, _ in seen] == [1, 2, 3]
        sizes = [p for _, p in seen]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] == result.record.after["params"] == sum(p.numel() for p in result.model.parameters())
        assert len(result.record.checks) == 3
        assert all(c.passed for c in result.record.checks)
        result.record.save(tmp_path / f"{name}.json")
        again = morph.cut.apply_plan(model, morph.load_plan(tmp_path / f"{name}.json"))
        assert same_bits(again, result.model)
        assert gap(run(again, inputs), run(result.model, inputs)) == 0


def test_targets_are_reached():
    model, inputs = make("projection")
    before = analyse(model, inputs).sizes()
    by_params = prune(model, inputs, target_params=before.params * 0.6).record
    assert by_params.after["params"] <= before.params * 0.6
    by_macs = prune(model, inputs, target_macs=before.macs / 3 * 0.6, steps=2).record
    assert by_macs.after["macs"] <= before.macs / 3 * 0.6
    assert by_macs.before["macs"] * 3 == before.macs


def test_a_check_that_fails_gives_nothing(monkeypatch):
    model, inputs = make("chain")
    snapshot = Snapshot(model)
    broken = Remembering(pruning.Remover)
    monkeypatch.setattr(pruning, "Remover", broken)
    with pytest.raises(CheckFailedError, match=r"the zeroing reference moved by .* nothing is returned or written"):
        prune(model, inputs, ratio=0.5)
    assert prune(model, inputs, ratio=0.5, verify=False).record.details["verified"] == "not verified: switched off"
    assert snapshot.same()


class Remembering:
    """Stands in for a class whose cut models have one weight wrong."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def __call__(self, *args: Any) -> Any:
        remover = self.kind(*args)
        plain = remover.remove

        def remove(choice: Any) -> Any:
            removed = plain(choice)
            with torch.no_grad():
                removed.model.head.weight[0, 0] += 1e-3
            return removed

        remover.remove = remove
        return remover


def test_no_axis_loses_its_last_position():
    model, inputs = make("dense")
    analysis = analyse(model, inputs)
    everything = {n: np.arange(c.units) for n, c in analysis.couplings.items()}
    scores = {n: torch.arange(c.units, dtype=torch.float64) for n, c in analysis.couplings.items()}
    kept = repaired(analysis, everything, scores)
    assert not analysis.emptied(kept)
    for name, units in kept.items():  # the best of each axis stays
        gone = set(range(analysis.couplings[name].units)) - set(units.tolist())
        assert gone <= {analysis.couplings[name].units - 1}
    result = prune(model, inputs, ratio=0.99)
    assert all(p.numel() for p in result.model.parameters())
    assert result.record.checks[0].passed


# ---- inputs and models of other kinds


def test_several_inputs_named_inputs_and_several_outputs():
    for name in ("pair", "named"):
        model, inputs = make(name)
        result = prune(model, inputs, ratio=0.5)
        removed = analyse(model, inputs)
        assert result.record.checks[0].samples == 3
        assert removed.recording.inputs
        assert gap(run(model, inputs), run(result.model, inputs)) > 1e-3
    assert type(result.model(**inputs)) is dict


def test_a_model_without_data_is_cut_and_said_to_be_unverified():
    with torch.device("meta"):
        model = NETS["transformer"]()[0]
    real, inputs = make("transformer")
    result = prune(model, inputs, ratio=0.5, score="random")
    assert result.record.details["verified"] == "not verified: the model has no data (meta device)"
    assert result.record.checks == ()
    assert all(p.device.type == "meta" for p in result.model.parameters())
    filled = morph.cut.apply_plan(real, result.record.plan)
    assert [p.shape for p in filled.parameters()] == [p.shape for p in result.model.parameters()]


def test_a_model_that_looks_at_values_is_pruned_from_a_run_with_data():
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.one(x))
            return self.three(torch.sigmoid(self.two(y))) if bool((x.abs().sum() > 0).item()) else y

    result = prune(Looks().double(), draw(4, 5), ratio=0.5)
    assert (result.record.details["traced"], result.record.details["form"]) == ("data", "class")
    assert result.record.checks[0].passed
    assert result.record.after["params"] < result.record.before["params"]


# ---- what is done with the result


@pytest.mark.parametrize("name", ["chain", "transformer", "grouped", "constants", "tied"])
def test_the_result_is_a_model_like_any_other(name):
    model, inputs = make(name)
    model = prune(model, inputs, ratio=0.4, heads="both").model
    outputs = run(model, inputs)
    twin = copy.deepcopy(model)
    assert gap(outputs, run(twin, inputs)) == 0
    exported = torch.export.export(model.eval(), (inputs,))
    assert gap(outputs, [exported.module()(inputs)]) < 1e-12
    compiled = torch.compile(model, backend="eager")
    assert gap(outputs, [compiled(inputs).detach()]) < 1e-12
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = model(inputs).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet", "dense", "constants"])
def test_the_result_is_saved_and_opened(name, tmp_path):
    model, inputs = (resnet18(num_classes=7).double(), draw(2, 3, 32, 32)) if name == "resnet" else make(name)
    result = prune(model, inputs, ratio=0.3)
    save_model(result.model, tmp_path / "model.morph")
    opened = open_model(tmp_path / "model.morph").model
    assert (type(opened) is type(model)) == (name == "resnet")  # a user's class comes back as its graph
    assert gap(run(result.model, inputs), run(opened, inputs)) == 0


def test_pruned_models_are_pruned_again():
    model, inputs = make("constants")
    once = prune(model, inputs, ratio=0.3)
    assert isinstance(once.record.plan.edits[0], UseGraph)
    twice = prune(once.model, inputs, ratio=0.3)
    assert twice.record.checks[0].passed
    assert twice.record.after["params"] < once.record.after["params"] == twice.record.before["params"]


def test_the_function_is_that_of_zeros(tmp_path):
    """The choice read off the record's plan, the second implementation, and another batch than the one analysed."""
    model, inputs = make("squeeze")
    result = prune(model, inputs, ratio=0.5)
    analysis = analyse(model, inputs)
    choice = {}
    for name, coupling in analysis.couplings.items():
        place = coupling.places[0]
        edit = next((e for e in result.record.plan.edits if (e.tensor, e.axis) == (place.tensor, place.axis)), None)
        kept = set(range(edit.size)) & set(edit.index) if edit else set(place.positions.ravel().tolist())
        choice[name] = np.array([u for u in range(coupling.units) if place.positions[u, 0] not in kept], np.int64)
    more = draw(6, 3, 9, 8, seed=11)
    assert gap(run(slow_zeroed(model, analysis, choice), more), run(result.model, more)) < 1e-12


# ---- refusals


@pytest.mark.parametrize("metric", ["params", "macs"])
def test_a_target_that_the_model_meets_already_is_refused_with_its_size(metric):
    model, inputs = make("chain")
    before = prune(model, inputs, ratio=0).record.before[metric]
    for target in (before, before + 1, 1e12, float("nan"), float("inf")):
        for steps in (1, 3):
            with pytest.raises(TargetError, match=rf"the target of .* {metric} is not below the present {before:,}; "):
                prune(model, inputs, **{f"target_{metric}": target}, steps=steps)
    assert prune(model, inputs, **{f"target_{metric}": before - 1}).record.after[metric] < before


def test_a_share_of_nothing_changes_nothing():
    model, inputs = make("chain")
    result = prune(model, inputs, ratio=0)
    assert result.record.plan.edits == ()
    assert result.model is not model
    assert same_bits(result.model, model)


def test_refusals():
    model, inputs = make("chain")
    snapshot = Snapshot(model)
    with pytest.raises(TypeError, match=r"prune\(\) got unexpected arguments: amount, kind"):
        prune(model, inputs, kind=1, amount=2)
    with pytest.raises(TargetError, match="steps must be at least 1, got 0"):
        prune(model, inputs, ratio=0.5, steps=0)
    with pytest.raises(TargetError):
        prune(model, inputs)
    with pytest.raises(TargetError):
        prune(model, inputs, ratio=0.5, target_params=100)
    with pytest.raises(TargetError):
        prune(model, inputs, target_params=1)
    with pytest.raises(TargetError):
        prune(model, inputs, ratio=1.5)
    with pytest.raises(TraceError, match="Chain does not accept inputs"):
        prune(model, draw(2, 5, 7, 5), ratio=0.5)
    with pytest.raises(EditError, match="cannot be traced"):
        prune(Unroll().double(), draw(4, 5), ratio=0.5, form="graph")
    assert snapshot.same()


class Unroll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x))) if x.sum() > -1e9 else x


def test_what_must_stay_whole_is_made_up_for_elsewhere():
    class Own(ShiftedWindowAttention):
        """Not torchvision's own any more, so that it stays what it is: it cannot lose single channels."""

    torch.manual_seed(0)
    model = SwinTransformer(
        [4, 4], embed_dim=12, depths=[1, 1], num_heads=[3, 3], window_size=[4, 4], num_classes=5
    ).eval()
    for module in model.modules():
        if type(module) is ShiftedWindowAttention:
            module.__class__ = Own
    x = torch.randn(2, 3, 32, 32)
    whole = morph.count(model, x[:1]).macs
    result = morph.prune(model, x, target_macs=0.7 * whole, normalise="macs")
    assert result.record.details["left"]
    assert morph.count(result.model, x[:1]).macs == result.record.after["macs"] <= 0.7 * whole
    with pytest.raises(TargetError, match="macs"):
        morph.prune(model, x, target_macs=0.05 * whole, normalise="macs")


def test_whole_groups_are_cut_where_data_was_recorded():
    """A run with data has the means of each group as a second output, which a run of shapes leaves out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32), nn.ReLU(), nn.Conv2d(32, 4, 3)).eval()
    x = torch.randn(2, 3, 9, 9)
    analysis = analyse(model, x, with_data=True)
    groups = next(c for c in analysis.couplings.values() if c.units == 8)
    removed = pruning.Remover(model, x, analysis).remove({groups.name: np.array([1, 4, 6])})
    assert removed.left == ()
    assert removed.model[1].num_groups == 5
    assert [check.relative < 1e-12 for check in pruning.checks_of(removed, model, x, analysis)] == [True]
