"""Cuts: against a slow reference of their own, with one place left out, and all that is refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from analysis_nets import NETS, draw, make
from analysis_support import cut, gap, run, slow_zeroed, some_units
from models import Snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from morph.analysis import analyse
from morph.cut import apply_plan
from morph.errors import AnalysisError, EditError, PlanMismatchError, TraceError
from morph.graphs import graph_of, set_constants
from morph.plan import Plan, Resize, SetAttribute, SetConstant, SplitAt, UseGraph
from morph.removal import LIMIT, Remover, check_cut, compare, promise
from morph.resizing import resized, set_attributes
from morph.zeroing import run_doubled

GRAPH = {"constants", "gated", "shuffle", "packed"}


@pytest.mark.parametrize("name", NETS)
def test_cuts_against_zeros_on_every_place(name):
    """Each coupling alone, then all together; the second implementation knows nothing but the places."""
    model, inputs = make(name)
    snapshot = Snapshot(model)
    analysis = analyse(model, inputs)
    remover = Remover(model, inputs, analysis)
    before = run(model, inputs)
    forms = set()
    for names in [*([n] for n in analysis.couplings), list(analysis.couplings)]:
        wanted = some_units(analysis, 1, names)
        removed = remover.remove(wanted)
        assert not removed.left
        after = run(removed.model, inputs)
        assert gap(run(slow_zeroed(model, analysis, removed.choice), inputs), after) < 1e-12
        assert check_cut(removed, model, inputs, analysis).passed
        assert gap(before, after) > 1e-3 or not removed.choice
        forms.add(removed.form)
    assert forms == ({"class", "graph"} - ({"class"} if name == "constants" else set()) if name in GRAPH else {"class"})
    assert snapshot.same()


@pytest.mark.parametrize("name", ["chain", "transformer", "grouped", "dense", "flattened"])
def test_a_cut_with_one_place_left_out_fails(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    removed = cut(model, inputs)
    assert removed.form == "class"
    resizes = [e for e in removed.plan.edits if isinstance(e, Resize)]
    for left_out in resizes:
        rest = Plan(tuple(e for e in removed.plan.edits if e is not left_out))
        try:
            wrong = dataclasses.replace(removed, model=apply_plan(model, rest))
            passed = check_cut(wrong, model, inputs, analysis).passed
        except (RuntimeError, ValueError, IndexError):  # shapes do not fit
            passed = False
        assert not passed, left_out


@pytest.mark.parametrize("name", ["chain", "transformer", "shuffle"])
def test_a_cut_of_another_position_fails(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    removed = cut(model, inputs)
    for at, edit in enumerate(removed.plan.edits):
        if not isinstance(edit, Resize):
            continue
        missing = min({*range(edit.size)} - {*edit.index})
        index = tuple(sorted([*edit.index[1:], missing]))
        edits = [*removed.plan.edits[:at], dataclasses.replace(edit, index=index), *removed.plan.edits[at + 1 :]]
        wrong = dataclasses.replace(removed, model=apply_plan(model, Plan(tuple(edits))))
        assert not check_cut(wrong, model, inputs, analysis).passed, edit


@pytest.mark.parametrize("name", ["chain", "transformer", "constants", "shuffle", "odd"])
def test_weights_of_dropped_units_do_not_matter(name):
    """Noise on all that the dropped units hold gives the same cut to the bit, and the same reference."""
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    removed = cut(model, inputs)
    noisy = copy.deepcopy(model)
    with torch.no_grad():
        parameters = dict(noisy.named_parameters())
        for edit in removed.plan.edits:
            if isinstance(edit, Resize) and edit.tensor in parameters:
                gone = torch.tensor(sorted({*range(edit.size)} - {*edit.index}))
                tensor = parameters[edit.tensor]
                tensor.index_copy_(edit.axis, gone, torch.randn_like(tensor.index_select(edit.axis, gone)))
    assert gap(run(noisy, inputs), run(model, inputs)) > 1e-3
    other = apply_plan(noisy, removed.plan)
    for (key, a), (_, b) in zip(removed.model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert check_cut(dataclasses.replace(removed, model=other), noisy, inputs, analysis).passed


@pytest.mark.parametrize("name", NETS)
def test_an_empty_choice_changes_nothing(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    for choice in ({}, dict.fromkeys(analysis.couplings, np.zeros(0, np.int64))):
        removed = Remover(model, inputs, analysis).remove(choice)
        assert removed.plan == Plan(())
        assert (removed.form, removed.left, type(removed.model)) == ("class", (), type(model))
        assert removed.model is not model
        state, now = model.state_dict(), removed.model.state_dict()
        assert list(state) == list(now)
        assert all(torch.equal(state[k], now[k]) and state[k].data_ptr() != now[k].data_ptr() for k in state)


# ---- what becomes of the module


def test_the_module_is_of_its_class_and_knows_its_sizes():
    model, inputs = make("grouped")
    removed = cut(model, inputs, {"up.weight[0]": np.array([1]), "up.weight[0]#1": np.array([2])})
    new = removed.model
    assert type(new) is type(model)
    assert (new.up.out_channels, new.bn.num_features, new.mix.groups) == (8, 8, 2)
    assert (new.mix.in_channels, new.mix.out_channels, new.down.in_channels) == (8, 14, 14)
    assert "groups=2" in repr(new.mix)
    model, inputs = make("transformer")
    names = {"ln1.weight[0]": np.array([0, 5]), "heads.q.weight[0]": np.array([1])}
    new = cut(model, inputs, names).model
    assert (new.ln1.normalized_shape, new.table.embedding_dim, new.heads.heads) == ((10,), 10, 2)
    assert (new.heads.q.in_features, new.heads.q.out_features, new.heads.o.in_features) == (10, 8, 8)
    model, inputs = make("groupnorm")
    new = cut(model, inputs, {"one.weight[0]": np.array([0])}).model
    assert (new.norm.num_groups, new.norm.num_channels) == (2, 10)
    model, inputs = make("transposed")
    new = cut(model, inputs, {"two.bias[0]": np.array([1]), "one.weight[0]": np.array([3])}).model
    assert (new.two.in_channels, new.two.out_channels, new.three.groups) == (10, 10, 2)
    assert (new.three.in_channels, new.three.out_channels) == (10, 10)
    model, inputs = make("chain")
    assert cut(model, inputs, {"two.weight[0]": np.array([1, 2])}).model.act.num_parameters == 5


def test_attributes_of_the_user_follow():
    model, inputs = make("attributes")
    new = cut(model, inputs, {"value.weight[0]": np.array([1]), "value.weight[0]#1": np.array([0, 3])}).model
    assert (new.form, new.width) == ((2, 3), 6)
    assert (model.form, model.width) == ((3, 5), 15)


def test_flags_and_other_tensors_stay():
    model, inputs = make("odd")
    model.train()
    model.bn.eval()
    removed = cut(model, inputs)
    new = removed.model
    for (path, a), (_, b) in zip(model.named_modules(), new.named_modules(), strict=True):
        assert a.training == b.training, path
    for (key, a), (_, b) in zip(model.named_parameters(), new.named_parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, key
        assert a.dtype == b.dtype
    assert torch.equal(new.phase, model.phase)
    assert (new.scale, new.steps) == (model.scale, model.steps)
    assert len(new.unused) == 11
    assert len(new.mean) == len(new.bn.running_mean) == len(new.one.weight) < 11


def test_ties_and_memory_layout_stay():
    model, inputs = make("tied")
    new = cut(model, inputs).model
    assert new.head.weight is new.table.weight
    model, inputs = make("chain")
    model.to(memory_format=torch.channels_last)
    new = cut(model, inputs).model
    assert new.two.weight.is_contiguous(memory_format=torch.channels_last)
    assert not new.two.weight.is_contiguous()


def test_the_graph_keeps_flags_and_follows_other_batches():
    model, inputs = make("constants")
    model.train()
    removed = cut(model, inputs)
    assert removed.form == "graph"
    assert "invalid" in removed.why_graph or "expected" in removed.why_graph
    assert isinstance(removed.plan.edits[0], UseGraph)
    assert removed.model.training
    assert removed.model.one.training
    more = draw(7, 3, 7, 5, seed=9)
    analysis = analyse(model, inputs)
    assert gap(run(slow_zeroed(model, analysis, removed.choice), more), run(removed.model, more)) < 1e-12


def test_a_form_can_be_asked_for():
    model, inputs = make("mlp")
    choice = {"0.weight[0]": np.array([1, 5])}
    assert cut(model, inputs, choice, form="class").form == "class"
    graph = cut(model, inputs, choice, form="graph")
    assert (graph.form, graph.why_graph) == ("graph", "asked for")
    assert gap(run(cut(model, inputs, choice).model, inputs), run(graph.model, inputs)) == 0
    model, inputs = make("constants")
    kept = cut(model, inputs, form="class")
    assert (kept.form, kept.choice, len(kept.left)) == ("class", {}, 3)
    assert all(item.units > 0 and "in " in item.reason for item in kept.left)


def test_what_cannot_be_carried_is_left_and_the_rest_is_cut():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.sigmoid(self.one(x))
            if x.sum() > -1e9:  # no symbolic graph
                x = torch.sigmoid(self.two(x)).view(-1, 11)
            return self.three(x)

    model, inputs = Both().double(), draw(4, 5)
    analysis = analyse(model, inputs)
    removed = Remover(model, inputs, analysis).remove({n: np.array([1, 2]) for n in analysis.couplings})
    assert [item.coupling for item in removed.left] == ["two.weight[0]"]
    assert removed.left[0].units == 2
    assert "shape '[-1, 11]' is invalid" in removed.left[0].reason
    assert (len(removed.model.one.weight), len(removed.model.two.weight)) == (5, 11)
    assert gap(run(slow_zeroed(model, analysis, removed.choice), inputs), run(removed.model, inputs)) < 1e-12
    with pytest.raises(EditError, match=r"Both cannot carry a cut: Both cannot be traced: .*\(in the model\)"):
        cut(model, inputs, {"two.weight[0]": np.array([1])}, form="graph")


def test_a_scale_inside_heads_stays_as_it_was():
    model, inputs = make("packed")
    removed = cut(model, inputs, {"qkv.weight[0]#1": np.array([0, 4])})
    scales = [e for e in removed.plan.edits if isinstance(e, SetConstant) and e.slot == "kwargs.scale"]
    assert [e.number for e in scales] == [5**-0.5]
    assert "uses the constant" in removed.why_graph
    kept = cut(model, inputs, {"qkv.weight[0]#1": np.array([0, 4])}, form="class")
    assert "uses the constant" in kept.left[0].reason


# ---- checks


def test_compare_knows_form_and_finiteness():
    model, inputs = make("mlp")
    wanted = run_doubled(model, inputs)
    assert compare("x", wanted, model, inputs, LIMIT).relative == 0
    assert compare("x", [wanted[0][:, :2]], model, inputs, LIMIT).relative == float("inf")
    assert compare("x", [wanted[0], wanted[0]], model, inputs, LIMIT).relative == float("inf")
    assert not compare("x", [wanted[0] * (1 + 1e-8)], model, inputs, LIMIT).passed
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[5].bias[0] = float("nan")
    check = compare("x", wanted, broken, inputs, LIMIT)
    assert (check.max_abs_diff, check.passed) == (float("inf"), False)
    zeros = [torch.zeros_like(wanted[0])]
    assert compare("x", zeros, model, inputs, LIMIT).relative == float("inf")


def test_the_promise_names_statistics():
    model, inputs = make("convnext")
    analysis = analyse(model, inputs)
    removed = Remover(model, inputs, analysis).remove({"scale[0]": np.array([1])})
    assert "1 statistics run over the channels that stay, e.g. aten.native_layer_norm" in promise(removed, analysis)
    removed = Remover(model, inputs, analysis).remove({"up.weight[0]": np.array([1])})
    assert "statistics" not in promise(removed, analysis)


def test_a_norm_over_the_channels_that_stay_is_not_a_norm_with_zeros():
    model, inputs = make("convnext")
    analysis = analyse(model, inputs)
    removed = Remover(model, inputs, analysis).remove({"scale[0]": np.array([1, 4, 7])})
    zeroed = slow_zeroed(model, analysis, removed.choice)
    assert gap(run(zeroed, inputs), run(removed.model, inputs)) < 1e-12
    plain = copy.deepcopy(zeroed)
    norm = copy.deepcopy(model.norm)
    with torch.no_grad():
        norm.weight[[1, 4, 7]] = 0
        norm.bias[[1, 4, 7]] = 0
    plain.norm = norm
    assert gap(run(plain, inputs), run(removed.model, inputs)) > 1e-3


def test_low_precision_is_compared_in_float64():
    model, inputs = make("transformer")
    model.to(torch.bfloat16)
    analysis = analyse(model, inputs)
    removed = cut(model, inputs)
    assert all(p.dtype == torch.bfloat16 for p in removed.model.parameters())
    check = check_cut(removed, model, inputs, analysis)
    assert (check.passed, check.dtype) == (True, "float64")


# ---- refusals


def test_refusals_of_a_cut():
    model, inputs = make("chain")
    analysis = analyse(model, inputs)
    snapshot = Snapshot(model)
    remover = Remover(model, inputs, analysis)
    with pytest.raises(AnalysisError, match="axes would lose their last position"):
        remover.remove({"one.weight[0]": np.arange(11)})
    with pytest.raises(AnalysisError, match="no coupling 'x'"):
        remover.remove({"x": np.arange(1)})
    assert snapshot.same()


class Stubborn(nn.Module):
    """Does something else after it was analysed, so that not even the model itself can be carried."""

    other = False

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.two(F.silu(x) if Stubborn.other else F.relu(x))


def test_a_model_that_does_something_else_afterwards_cannot_be_carried(monkeypatch):
    model = Stubborn()
    analysis = analyse(model, torch.randn(2, 5))
    remover = Remover(model, torch.randn(2, 5), analysis, "class")
    monkeypatch.setattr(Stubborn, "other", True)
    with pytest.raises(EditError, match=r"Stubborn cannot carry a cut: aten\.silu\.default is called, aten\.relu"):
        remover.remove({})


def test_a_parameter_of_its_own_class_is_not_resized():
    class Special(nn.Parameter):
        pass

    model = nn.Linear(5, 7)
    model.weight = Special(model.weight.detach())
    with pytest.raises(EditError, match=r"weight is a Special, not a plain parameter, and cannot be resized"):
        resized(model, [Resize("weight", 0, 7, (0, 1))])


def test_plans_for_other_models_are_refused():
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    snapshot = Snapshot(model)
    good = [Resize("0.weight", 0, 7, (0, 1, 2)), Resize("0.bias", 0, 7, (0, 1, 2)), Resize("1.weight", 1, 7, (0, 1, 2))]
    with pytest.raises(
        PlanMismatchError,
        match=r"2 of 3 axes differ \(0\.weight\[0\]: plan has 8, model has 7; x\[0\]: plan has 7, model has no such",
    ):
        apply_plan(
            model, Plan((dataclasses.replace(good[0], size=8), dataclasses.replace(good[1], tensor="x"), good[2]))
        )
    with pytest.raises(PlanMismatchError, match="model has no such axis"):
        apply_plan(model, Plan((Resize("0.bias", 1, 7, (0,)),)))
    with pytest.raises(PlanMismatchError, match=r"0\.bias\[0\]: plan has 7, model has 7"):
        apply_plan(model, Plan((Resize("0.bias", 0, 7, (0, 7)),)))
    once = apply_plan(model, Plan(tuple(good)))
    with pytest.raises(PlanMismatchError, match="it looks applied already: start from the original model"):
        apply_plan(once, Plan(tuple(good)))
    with pytest.raises(PlanMismatchError, match=r"another model: 0\.in_features is 5, the plan has 6"):
        set_attributes(model, [SetAttribute("0", "in_features", 6, 5)])
    with pytest.raises(PlanMismatchError, match=r"another model: nine\.groups is None, the plan has 6"):
        set_attributes(model, [SetAttribute("nine", "groups", 6, 5)])
    assert snapshot.same()


def test_a_model_that_cannot_be_copied_is_refused():
    class Uncopyable(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            raise RuntimeError("holds a file")

    with pytest.raises(EditError, match="Uncopyable cannot be copied: holds a file"):
        resized(Uncopyable(5, 3), [])


def test_refusals_of_the_graph():
    model, inputs = make("mlp")
    with pytest.raises(PlanMismatchError, match="must first go on with that graph"):
        set_constants(model, [SetConstant("x", "args.0", 1)])
    with pytest.raises(PlanMismatchError, match="its graph has no node 'x'"):
        set_constants(graph_of(model), [SplitAt("x", 1, (1, 2))])

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"Branch cannot be traced: .*test_removal\.py:\d+"):
        graph_of(Branch())
    assert run(graph_of(model), inputs)[0].shape == (4, 5)
