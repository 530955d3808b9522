"""Closed gates are taken out exactly, plans replay, files open, and wrong removals are refused."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from gate_support import made, outputs, shut
from models import Snapshot
from torch import nn

import morph
from morph.cut import apply_plan
from morph.errors import CheckFailedError, PlanMismatchError
from morph.gating import Gated
from morph.passes.gates import gates_of
from morph.plan import Plan, Record, Reroute, Resize, UseGraph, load_plan
from morph.rerouting import INDEX, reroute
from morph.surgery import replay

SMALL = ["densenet", "wrn", "darts", "resnet", "mobilenet", "vit"]
OTHER = ["densenet", "resnet", "grouped", "dense", "shuffle"]
NETS = ["chain", "residual", "dense", "depthwise", "grouped", "transposed", "shuffle", "squeeze", "transformer"]


def gap(left, right) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("name", "where"),
    [*((name, "auto") for name in (*SMALL, *NETS)), *((n, w) for n in OTHER for w in ("producer", "connection"))],
)
def test_random_closings_are_exact_and_counted(name, where):
    model, x = made(name)
    shot = Snapshot(model)
    gated = morph.gate(model, x, where=where)
    for seed, share in enumerate((0.3, 0.9) if where == "auto" else (0.6,)):
        closed = shut(gated, share, seed)
        before = copy.deepcopy(gated.model.state_dict())
        result = gated.remove()
        assert gap(outputs(gated.model.eval(), x), outputs(result.model.eval(), x)) < 1e-12
        count = morph.count(copy.deepcopy(result.model).float(), x.float() if x.is_floating_point() else x)
        sizes = gated.sizes(closed)
        assert result.record.after == {"params": count.params, "macs": count.macs}
        assert (sizes.params, sizes.macs) == (count.params, count.macs)
        assert not gates_of(result.model)
        own = type(result.model) is type(model)
        assert result.record.details["form"] == ("class" if own else "graph")
        assert own == (result.record.details["why_graph"] == "")
        assert all(0 not in p.shape for p in result.model.parameters())
        assert all(torch.equal(before[k], v) for k, v in gated.model.state_dict().items())
        replayed = replay(gated_source(gated, model), result.record.plan, x)
        assert gap(outputs(result.model, x), outputs(replayed.model, x)) == 0
    assert shot.same()


def gated_source(gated: Gated, model: nn.Module) -> nn.Module:
    """The model with the weights that the gated one has."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(gated.model.state_dict(), strict=False)
    return twin


@pytest.mark.parametrize("name", ["densenet", "resnet"])
def test_training_mode_is_exact_too(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.5, 1)
    after = gated.remove().model
    assert gap(outputs(gated.model.train(), x), outputs(after.train(), x)) < 1e-12


def test_masks_count_in_place_of_zeros():
    model, x = made("densenet")
    gated = morph.gate(model, x)
    site = gated.sites[0]
    mask = torch.arange(site.gates) < 2
    with torch.no_grad():
        gates_of(gated.model)[site.name].weight.copy_(torch.linspace(0.5, 1.5, site.gates))
    result = gated.remove({site.name: mask})
    with torch.no_grad():
        gates_of(gated.model)[site.name].weight[mask] = 0
    assert gap(outputs(gated.model, x), outputs(result.model, x)) < 1e-12
    assert result.record.details["gates_open"] == gated.total - 2


def test_a_channel_goes_from_its_producer_when_all_readers_closed_it():
    model, x = made("resnet")
    gated = morph.gate(model, x)
    readers = [s for s in gated.sites if "conv1" in s.sources]
    assert [s.name for s in readers] == ["layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"]
    closed = {s.name: torch.arange(s.gates) == 3 for s in readers[:2]}
    some = gated.remove(closed)
    assert [tuple(some.model.get_submodule(s.name).weight.shape)[1] for s in readers] == [7, 7, 8]
    assert some.model.conv1.weight.shape[0] == 8
    closed[readers[2].name] = torch.arange(8) == 3
    every = gated.remove(closed)
    assert every.model.conv1.weight.shape[0] == every.model.get_submodule("layer1.0.conv2").weight.shape[0] == 7
    assert not any(isinstance(e, Reroute) for e in every.record.plan.edits)


def test_a_private_norm_shrinks_and_a_closed_operand_leaves_the_concatenation():
    model, x = made("densenet")
    gated = morph.gate(model, x)
    site = next(s for s in gated.sites if s.name == "stages.0.1.conv1")
    closed = {site.name: torch.tensor([source != "stem" for source in site.sources])}
    model_ = gated.remove(closed).model
    layer = model_.get_submodule("stages.0.1")
    assert layer.bn1.num_features == layer.conv1.in_channels == 6
    norm = next(n for n in model_.graph.nodes if n.target == "stages.0.1.bn1")
    assert norm.args[0].target == "stem"
    assert not [n for n, _ in model_.named_buffers() if n.startswith(INDEX)]


def test_a_layer_that_nobody_reads_leaves_whole():
    model, x = made("densenet")
    gated = morph.gate(model, x)
    closed = {}
    for site in gated.sites:
        mask = torch.tensor([source == "stages.0.0.conv2" for source in site.sources])
        if mask.any():
            closed[site.name] = mask
    assert len(closed) == 2
    result = gated.remove(closed)
    assert result.record.details["layers_gone"] == ["stages.0.0.conv1", "stages.0.0.conv2"]
    assert not [n for n in result.model.state_dict() if n.startswith("stages.0.0.")]
    replay(model, Plan.from_json(json.loads(json.dumps(result.record.to_json()["plan"]))), x)


def test_a_reader_with_nothing_left_keeps_the_largest_and_the_record_says_so():
    model, x = made("chain")
    gated = morph.gate(model, x)
    gate = gates_of(gated.model)["two"]
    with torch.no_grad():
        gate.weight[4] = -3
    result = gated.remove({"two": torch.ones(11, dtype=torch.bool)})
    assert result.record.details["kept"] == [{"site": "two", "gates": [4]}]
    assert result.model.two.weight.shape[1] == 1
    assert not result.model.two.weight.any()


def test_every_gate_closed_still_gives_a_network():
    for name in ("densenet", "mobilenet", "darts"):
        model, x = made(name)
        gated = morph.gate(model, x)
        result = gated.remove({s.name: torch.ones(s.gates, dtype=torch.bool) for s in gated.sites})
        assert result.record.checks[0].passed
        assert result.record.details["kept"]


@pytest.mark.parametrize("name", ["densenet", "resnet", "vit"])
def test_a_plan_survives_its_file_and_the_student_its_own(name, tmp_path):
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.4, 7)
    result = gated.remove()
    result.record.save(tmp_path / "record.json")
    plan = load_plan(tmp_path / "record.json")
    assert plan == result.record.plan
    source = gated_source(gated, model)
    assert gap(outputs(apply_plan(source, plan), x), outputs(result.model, x)) == 0
    morph.save_model(result.model, tmp_path / "student.pt", input_shape=tuple(x.shape[1:]))
    opened = morph.open_model(tmp_path / "student.pt").model
    assert gap(outputs(opened, x), outputs(result.model, x)) == 0
    assert list(opened.state_dict()) == list(result.model.state_dict())


@pytest.mark.parametrize("name", ["densenet", "resnet"])
def test_a_wrong_removal_is_refused(name, monkeypatch):
    """Another position, a scale left out, another part: each must be seen, at removal and at replay."""
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.4, 8)
    plan = gated.remove().record.plan
    source = gated_source(gated, model)
    for wrong in list(wrong_plans(plan))[1:]:  # other scales are another plan
        with pytest.raises((CheckFailedError, PlanMismatchError, RuntimeError)):
            replay(source, wrong, x)
    spoiled = next(wrong_plans(plan))
    monkeypatch.setattr("morph.gating.graph_plan", lambda *_: spoiled)
    with pytest.raises(CheckFailedError, match="the gated model moved by"):
        gated.remove()


def wrong_plans(plan: Plan):
    edits = plan.edits
    scaled = next(i for i, e in enumerate(edits) if isinstance(e, Resize) and e.scale and len(e.index) < e.size)
    yield swap(edits, scaled, scale=(*edits[scaled].scale[1:], edits[scaled].scale[0]))
    missing = min({*range(edits[scaled].size)} - {*edits[scaled].index})
    yield swap(edits, scaled, index=tuple(sorted([*edits[scaled].index[1:], missing])))
    part = next(i for i, e in enumerate(edits) if isinstance(e, Reroute) and any(len(x) > 1 for x in e.indices))
    yield swap(edits, part, indices=tuple(x[::-1] for x in edits[part].indices))
    yield swap(edits, part, pieces=(edits[part].node, *edits[part].pieces[1:]))


def swap(edits, at, **changes) -> Plan:
    return Plan((*edits[:at], dataclasses.replace(edits[at], **changes), *edits[at + 1 :]))


def test_reroutes_that_do_not_fit_are_refused():
    model, _ = made("dense")
    edit = Reroute("one", "x", 1, ("x",), ((0, 1),))
    with pytest.raises(PlanMismatchError, match="must first go on with that graph"):
        reroute(model, [edit])
    for wrong, text in (
        (dataclasses.replace(edit, node="gone"), "has no node 'gone'"),
        (dataclasses.replace(edit, pieces=("gone",)), "has no node 'gone'"),
        (dataclasses.replace(edit, node="three"), "does not read 'x'"),
        (dataclasses.replace(edit, indices=()), "a part has no positions"),
    ):
        with pytest.raises(PlanMismatchError, match=text):
            apply_plan(model, Plan((UseGraph("symbolic"), wrong)))
    for bad in ({"pieces": []}, {"indices": [1]}, {"indices": [[-1]]}, {"source": 3}):
        value = {"edit": "reroute", **json.loads(json.dumps(dataclasses.asdict(edit))), **bad}
        with pytest.raises(PlanMismatchError, match=f"{next(iter(bad))} cannot be"):
            Plan.from_json([value])


def test_the_record_says_what_became_of_the_gates():
    model, x = made("wrn")
    gated = morph.gate(model, x)
    closed = shut(gated, 0.5, 9, spread=0)
    record: Record = gated.remove().record
    value = record.to_json()
    assert value["command"] == "remove-gates"
    assert (value["gates_total"], value["gates_open"]) == (
        gated.total,
        gated.total - sum(int(c.sum()) for c in closed.values()),
    )
    assert value["macs_before"] == gated.sizes().macs
    assert value["macs_after"] < value["macs_before"]
    assert value["max_abs_diff"] < 1e-9
    assert [s["name"] for s in value["sites"]] == [s.name for s in gated.sites]


def test_the_own_class_comes_back_where_every_reader_reads_all_that_is_there():
    for name, where in (("wrn", "producer"), ("chain", "auto"), ("grouped", "auto"), ("resnet", "producer")):
        model, x = made(name)
        gated = morph.gate(model, x, where=where)
        shut(gated, 0.4, 3)
        result = gated.remove()
        assert type(result.model) is type(model), result.record.details["why_graph"]
        assert result.record.details["training_only_params"] == 0
    model, x = made("darts")
    result = morph.gate(model, x, where="producer").remove()
    assert result.record.details["why_graph"] == "parts of it are used in training alone"
    assert result.record.details["training_only_params"] > 0
