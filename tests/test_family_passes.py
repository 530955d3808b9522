"""What the passes make of networks that were drawn from families: each works, or refuses with a reason."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from models import Snapshot, randomise

import morph
from morph.blocks import find_cells
from morph.errors import NothingToGrowError
from morph.family.generator import Task, draw_network
from morph.family.settings import FamilySettings
from morph.files.convert import convert
from morph.fresh_weights import reinitialise
from morph.scores import fisher
from morph.teaching.feature_losses import AttentionTransfer, Hint
from morph.teaching.losses import SoftLabels
from morph.teaching.terms import Features
from morph.zoo import build
from morph.zoo.random_graph import Merge, RandomGraphNet

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 10


@pytest.fixture(params=range(2))
def net(request):
    """A small network of a random family, in evaluation mode, with no tensor at its value of birth."""
    d = random.Random(request.param)
    rewired = (d.uniform(0.1, 1), d.uniform(0.2, 1), d.uniform(0.1, 1))
    family = FamilySettings(4, d.randint(2, 3), rewired[0], d.randint(1, 2), rewired[1], 4, 3, rewired[2])
    model = draw_network(family, Task((3, 16, 16), 10, 20_000), request.param).model
    torch.manual_seed(request.param)
    return randomise(model).eval()


@pytest.fixture(autouse=True)
def untouched(net):
    """No pass changes what comes in."""
    was = Snapshot(net)
    yield
    assert was.same()


def test_it_is_tapped_paired_and_taught(net):
    shapes = {name: value.shape[1:] for name, value in morph.tap(net, [f"cells.{i}" for i in range(4)])(X)[1].items()}
    assert len(shapes) == 4
    width = net.stem[0].out_channels
    assert [shape[0] for shape in shapes.values()] == [width << s for s in (0, 0, 1, 2)]
    pairs = morph.propose_pairs(build("wrn-10-1"), net, X)
    assert [pair.student_shape[-1] for pair in pairs] == [pair.teacher_shape[-1] for pair in pairs] == [16, 8, 4]
    student = copy.deepcopy(net).train()
    terms = [SoftLabels(4.0, 0.9), Features(AttentionTransfer()), Features(Hint())]
    step = morph.Distillation(student, build("wrn-10-1"), terms, example_inputs=X)(X, Y)
    step.loss.backward()
    assert len(step.parts) == 3
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())
    other = morph.Distillation(build("resnet-8"), net, terms[:2], example_inputs=X)(X, Y)
    assert bool(other.loss.isfinite())


def test_it_is_cut_to_a_size_and_by_fisher(net):
    params = morph.count(net, X[:1]).params
    small = morph.prune(net, X, target_params=round(0.6 * params))
    assert 0.4 * params < small.record.after["params"] <= 0.6 * params
    assert small.record.checks[0].relative <= 1e-9
    told = morph.prune(net, X, ratio=0.3, score="fisher", data=(X, Y))
    assert told.record.after["params"] < params
    assert type(told.model) is type(small.model) is RandomGraphNet
    traced = morph.trace(net, X)
    scores = fisher(traced, find_cells(traced), [(X, Y)])
    assert scores.samples == len(X)
    assert all(bool((found >= 0).all()) and float(found.sum()) > 0 for found in scores.channels.values())


def test_what_it_has_no_place_for_is_refused_with_the_reason(net):
    with pytest.raises(NothingToGrowError, match="no residual block of which a copy can be inserted exactly"):
        morph.deepen(net, X, blocks=1)
    with pytest.raises(NothingToGrowError, match="no grouped convolution"):
        morph.expand(net, (X, Y), target_params=1e6)


@pytest.mark.parametrize("inherit", [False, True])
def test_a_student_is_found_inside_it(net, inherit):
    data = torch.cat([X, X + 1, X - 1]), torch.arange(24) % 10
    target = round(0.7 * morph.count(net, X[:1]).macs)
    fast = {"epochs": 4, "batch_size": 8, "lr": 0.01, "count_every": 3}
    found = morph.search_student(net, data, target_macs=target, inherit=inherit, **fast)
    assert found.record.after["macs"] <= target
    merges = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, Merge)}
    state, before = found.model.state_dict(), net.state_dict()
    assert merges & state.keys()
    for name in merges & state.keys():
        assert torch.equal(state[name], torch.ones_like(state[name])) != inherit, name
        assert state[name].shape == before[name].shape
    again = morph.replay(net, found.record.plan, X[:2], verify=False).model
    if not inherit:
        assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items() if "running" not in key)


def test_a_graph_draws_afresh_only_with_what_it_was_traced_from(net):
    graph = copy.deepcopy(morph.trace(net, X).graph_module)
    weights = [p for name, p in graph.named_parameters() if "merges" in name]
    assert len(reinitialise(graph, 0)) == len(weights)
    assert reinitialise(graph, 0, net) == ()
    assert weights
    assert all(torch.equal(weight, torch.ones_like(weight)) for weight in weights)


@pytest.mark.parametrize("to", ["safetensors", "torch-export"])
def test_it_is_written_in_other_formats(net, to, tmp_path):
    done = convert(net, tmp_path / f"net.{to}", to, input_shape=(3, 16, 16))
    assert done.checked
    assert not done.max_difference


def test_it_is_drawn_and_opened_again(net, tmp_path):
    morph.draw(net, tmp_path / "net.dot", inputs=X)
    assert "cells.3" in (tmp_path / "net.dot").read_text()
    morph.save_model(net, tmp_path / "net.pt", input_shape=(3, 16, 16))
    opened = morph.open_model(tmp_path / "net.pt").model.eval()
    assert type(opened) is RandomGraphNet
    assert torch.equal(opened(X), net(X))
