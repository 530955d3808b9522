"""`widen` from one end to the other: the function stays, targets are reached, and the record says what was left."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from analysis_nets import NETS, draw, make
from analysis_support import gap, run
from models import Snapshot
from torch import Tensor, nn

import morph
from morph import widening
from morph.copies import Widener
from morph.errors import CheckFailedError, NothingToGrowError, PlanMismatchError, TargetError, TraceError
from morph.plan import Perturb, Resize
from morph.pruning import prune
from morph.widening import widen


def same_bits(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("ratio", [1.4, 2, 3.5])
@pytest.mark.parametrize("name", NETS)
def test_widening_keeps_the_function_and_can_be_replayed(name, ratio, tmp_path):
    model, inputs = make(name)
    if name == "windows" and ratio == 2:
        ratio = 1.9
    if name == "torchhead":  # only its stream can be copied, and a norm runs over that
        ratio = max(ratio, 2)
    snapshot = Snapshot(model)
    result = widen(model, inputs, ratio=ratio)
    assert snapshot.same()
    assert gap(run(model, inputs), run(result.model, inputs)) < 1e-12
    record = result.record
    assert record.checks[0].passed
    assert record.before["params"] == sum(p.numel() for p in model.parameters())
    assert record.after["params"] == sum(p.numel() for p in result.model.parameters()) > record.before["params"]
    record.save(tmp_path / "record.json")
    assert json.loads((tmp_path / "record.json").read_text())["weight_preserving"] is True
    again = morph.cut.apply_plan(copy.deepcopy(model), morph.load_plan(tmp_path / "record.json"))
    assert same_bits(again, result.model)


def test_a_widening_is_replayed_with_verification(tmp_path):
    model, inputs = make("chain")
    result = widen(model, inputs, ratio=1.5)
    result.record.save(tmp_path / "record.json")
    plan = morph.load_plan(tmp_path / "record.json")
    again = morph.replay(model, plan, inputs)
    assert same_bits(again.model, result.model)
    assert again.record.after == result.record.after
    assert all(c.passed for c in again.record.checks)
    with pytest.raises(PlanMismatchError, match="it looks applied already"):
        morph.replay(result.model, plan, inputs)


def test_widths_are_those_asked_for():
    model, inputs = make("residual")
    result = widen(model, inputs, ratio=1.5)
    assert (result.model.stem.out_channels, result.model.mid.out_channels) == (17, 11)
    assert (result.model.bn.num_features, result.model.head.in_features) == (17, 17)
    ignored = widen(model, inputs, ratio=1.5, ignore=["stem*"])
    assert (ignored.model.stem.out_channels, ignored.model.mid.out_channels) == (11, 11)
    assert [item["reason"] for item in ignored.record.details["left"]] == ["asked to be left"]


def test_scores_say_what_is_copied():
    model, inputs = make("mlp")
    result = widen(model, inputs, ratio=1.3, score=lambda _, coupling: torch.arange(coupling.units))
    assert result.record.details["copied"] == {"0.weight[0]": [8, 9, 10], "3.weight[0]": [5, 6]}
    first, second = (widen(model, inputs, ratio=1.5, seed=s).record.details["copied"] for s in (0, 1))
    assert first != second
    assert first == widen(model, inputs, ratio=1.5, seed=0).record.details["copied"]


def test_norms_ask_for_whole_ratios():
    model, inputs = make("convnext")
    low = widen(model, inputs, ratio=1.5)
    assert low.model.stem.out_channels == 11
    (left,) = [item for item in low.record.details["left"] if item["coupling"] == "scale[0]"]
    assert left["reason"].startswith("aten.native_layer_norm.default (at ")
    assert left["reason"].endswith("runs over them: exact from a ratio of 2 on")
    high = widen(model, inputs, ratio=2.7)
    assert (high.model.stem.out_channels, high.model.norm.normalized_shape) == (22, (22,))
    assert high.model.up.out_features == 2 * 13 + 2 * 5  # 35.1, by units that are there two and four times


def test_targets_are_reached_with_the_smallest_ratio():
    model, inputs = make("projection")
    result = widen(model, inputs, target_params=1000)
    ratio = result.record.options["ratio"]
    assert result.record.after["params"] >= 1000
    assert widen(model, inputs, ratio=ratio - 0.001).record.after["params"] < 1000
    by_macs = widen(model, inputs, target_macs=2 * result.record.before["macs"])
    assert by_macs.record.after["macs"] >= 2 * by_macs.record.before["macs"]


def test_a_wide_model_computes_the_same_after_pruning_its_readers_share_away():
    """Copies hold equal values, so dropping one of two halves what its readers see: that is what pruning is told."""
    model, inputs = make("mlp")
    wide = widen(model, inputs, ratio=2)
    assert (wide.model[0].out_features, wide.model[3].out_features) == (22, 14)
    pruned = prune(wide.model, inputs, ratio=0.5, score=_later_half, ranking="local")
    assert (pruned.model[0].out_features, pruned.model[3].out_features) == (11, 7)
    with torch.no_grad():
        for layer in (3, 5):
            pruned.model[layer].weight.mul_(2)
    assert gap(run(model, inputs), run(pruned.model, inputs)) < 1e-12


def _later_half(model: nn.Module, coupling: morph.Coupling) -> Tensor:
    """Scores under which of two equal units the second goes."""
    weight = model.get_parameter(coupling.places[0].tensor)
    seen: list[Tensor] = []
    scores = []
    for row in weight.detach():
        scores.append(0.0 if any(torch.equal(row, other) for other in seen) else 1.0)
        seen.append(row)
    return torch.tensor(scores)


def test_a_model_without_data_is_widened_and_said_to_be_unverified():
    with torch.device("meta"):
        model = NETS["chain"]()[0].double()
    _, inputs = make("chain")
    result = widen(model, inputs, ratio=1.5)
    assert result.record.details["verified"] == "not verified"
    assert result.record.checks == ()
    assert all(p.device.type == "meta" for p in result.model.parameters())
    assert widen(*make("chain"), ratio=1.5, verify=False).record.details["verified"] == "not verified"


def test_the_result_is_a_model_like_any_other():
    model, inputs = make("transformer")
    model.train()
    result = widen(model, inputs, ratio=2)
    assert result.model.training
    assert result.model.heads.heads == 6
    model = result.model.eval()
    outputs = run(model, inputs)
    assert gap(outputs, [torch.export.export(model, (inputs,)).module()(inputs)]) < 1e-12
    assert gap(outputs, [torch.compile(model, backend="eager")(inputs).detach()]) < 1e-12
    loss = model.train()(inputs).pow(2).mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_check_that_fails_gives_nothing(monkeypatch):
    model, inputs = make("chain")
    snapshot = Snapshot(model)
    plain = Widener.edits

    def wrong(self: Widener, times: object) -> object:
        edits = plain(self, times)
        return [e if not e.scale else type(e)(e.tensor, e.axis, e.size, e.index) for e in edits]

    monkeypatch.setattr(widening.Widener, "edits", wrong)
    with pytest.raises(CheckFailedError, match=r"the outputs moved by .* nothing is returned or written"):
        widen(model, inputs, ratio=1.5)
    assert snapshot.same()


def test_refusals():
    model, inputs = make("chain")
    snapshot = Snapshot(model)
    for options in ({}, {"ratio": 2, "target_params": 9999}, {"target_params": 9999, "target_macs": 9999}):
        with pytest.raises(TargetError, match="give one of ratio, target_params and target_macs"):
            widen(model, inputs, **options)
    with pytest.raises(TargetError, match=r"ratio must be above 1, got 0\.5"):
        widen(model, inputs, ratio=0.5)
    with pytest.raises(TargetError, match=r"the target of 100 params is not above the present 1,0\d\d"):
        widen(model, inputs, target_params=100)
    with pytest.raises(TargetError, match=r"the target of .* macs is out of reach: 64 times as wide has"):
        widen(model, inputs, target_macs=1e15)
    with pytest.raises(TraceError, match="Chain does not accept inputs"):
        widen(model, draw(2, 5, 7, 5), ratio=2)
    with pytest.raises(
        NothingToGrowError, match=r"no unit can be copied exactly: 2 couplings are left, e\.g\. asked to be left"
    ):
        widen(model, inputs, ratio=2, ignore=["*"])
    with pytest.raises(
        NothingToGrowError, match=r"no unit can be copied exactly: 0 couplings are left, e\.g\. the model"
    ):
        widen(nn.Linear(5, 3), torch.randn(2, 5), ratio=2)
    with pytest.raises(NothingToGrowError, match=r"nothing to copy at ratio 1\.001: 0 couplings need a whole ratio"):
        widen(model, inputs, ratio=1.001)
    assert snapshot.same()


def test_only_norms_and_a_small_ratio_leave_nothing_to_copy():
    class Normed(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))

    with pytest.raises(
        NothingToGrowError, match=r"nothing to copy at ratio 1\.5: 1 couplings need a whole ratio of 2 or more"
    ):
        widen(Normed(), torch.randn(4, 5), ratio=1.5)
    model = Normed().double()
    assert gap(run(model, draw(4, 5)), run(widen(model, draw(4, 5), ratio=2).model, draw(4, 5))) < 1e-12


def copies_of(result: morph.Result, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """For each tensor that got noise, its noisy positions now, and what they were copied from."""
    old, new = dict(model.named_parameters()), dict(result.model.named_parameters())
    plan = result.record.plan.edits
    found = {}
    for edit in plan:
        if isinstance(edit, Perturb):
            (resize,) = [e for e in plan if isinstance(e, Resize) and (e.tensor, e.axis) == (edit.tensor, edit.axis)]
            clean = morph.cut.apply_plan(model, morph.Plan(tuple(e for e in plan if not isinstance(e, Perturb))))
            at = torch.tensor(edit.positions)
            pair = [dict(m.named_parameters())[edit.tensor].index_select(edit.axis, at) for m in (result.model, clean)]
            assert len(resize.index) == new[edit.tensor].shape[edit.axis] > old[edit.tensor].shape[edit.axis]
            assert not resize.scale
            found[edit.tensor] = (pair[0], pair[1])
    return found


@pytest.mark.parametrize("name", ["chain", "transformer", "depthwise", "named", "weightnorm", "constants"])
def test_noise_parts_the_copies_and_is_measured_and_replayed(name, tmp_path):
    model, inputs = make(name)
    snapshot = Snapshot(model)
    result = widen(model, inputs, ratio=2, noise=0.02, seed=3)
    assert snapshot.same()
    record = result.record
    clean, moved = record.checks
    assert clean.relative < 1e-12
    assert (moved.name, moved.limit, moved.passed) == ("outputs, moved by the noise", None, True)
    assert moved.relative == pytest.approx(gap(run(model, inputs), run(result.model, inputs)), rel=1e-6)
    assert 1e-5 < moved.relative < 1
    assert (record.details["weight_preserving"], record.options["noise"]) == (False, 0.02)
    assert "then noise was added to the copies" in record.details["verified"]
    assert copies_of(result, model)
    for tensor, (noisy, plain) in copies_of(result, model).items():
        size = float(dict(result.model.named_parameters())[tensor].detach().square().mean().sqrt())
        assert bool((noisy != plain).all())
        assert float((noisy - plain).square().mean().sqrt()) == pytest.approx(0.02 * size, rel=0.5)
    record.save(tmp_path / "record.json")
    plan = morph.load_plan(tmp_path / "record.json")
    again = morph.replay(copy.deepcopy(model), plan, inputs)
    assert same_bits(again.model, result.model)
    assert again.record.checks[-1].relative == pytest.approx(moved.relative, rel=1e-6)
    assert "then noise was added to the copies" in again.record.details["verified"]
    assert same_bits(widen(model, inputs, ratio=2, noise=0.02, seed=3).model, result.model)
    assert not same_bits(widen(model, inputs, ratio=2, noise=0.02, seed=4).model, result.model)


def test_noise_lets_copies_get_different_gradients():
    model, inputs = make("mlp")

    def rows(noise: float) -> Tensor:
        wide = widen(model, inputs, ratio=2, noise=noise).model
        wide(inputs).pow(2).mean().backward()
        return wide[0].weight.grad

    assert len(rows(0.0).unique(dim=0)) < 22
    assert len(rows(1e-3).unique(dim=0)) == 22


def test_noise_without_verification_or_data_and_on_a_plan_for_another_model():
    model, inputs = make("chain")
    assert widen(model, inputs, ratio=1.5, noise=0.1, verify=False).record.checks == ()
    with torch.device("meta"):
        bare = NETS["chain"]()[0].double()
    plan = widen(bare, inputs, ratio=1.5, noise=0.1).record.plan
    assert any(isinstance(edit, Perturb) for edit in plan.edits)
    noise = morph.Plan(tuple(edit for edit in plan.edits if isinstance(edit, Perturb)))
    with pytest.raises(PlanMismatchError, match=r"noise for one\.weight\[0\] of \d+, the model has \d+"):
        morph.cut.apply_plan(model, noise)
    for wrong in (-0.1, float("nan"), float("inf")):
        with pytest.raises(TargetError, match="noise is a relative standard deviation, 0 or above"):
            widen(model, inputs, ratio=1.5, noise=wrong)


def test_noise_that_is_not_finite_fails():
    model, inputs = make("chain")
    with pytest.raises(CheckFailedError, match=r"moved by the noise moved by inf \(inf relative, not finite"):
        widen(model, inputs, ratio=1.5, noise=1e308)
