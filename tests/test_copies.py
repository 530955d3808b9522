"""Copies of units: the function stays, the reader's share is right, and copies can be taken away again."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from analysis_nets import NETS, draw, make
from analysis_support import gap, run
from models import Snapshot
from torch import Tensor, nn

from morph.analysis import Analysis, analyse
from morph.analysis.growth import Growth, Layout, copied
from morph.copies import Widener, check_growth
from morph.cut import apply_plan
from morph.errors import AnalysisError, EditError
from morph.plan import Plan, Resize

# Couplings of which no copies are exact, with what the reason says.
REFUSED = {
    "transformer": {"heads.q.weight[0]#1": "summed over between two activations"},
    "grouphead": {
        "attention.q.weight[0]": "summed over between two activations",
        "attention.q.weight[0]#1": "two reshapes order them in different ways",
        "attention.q.weight[0]#2": "two reshapes order them in different ways",
    },
    "packed": {"qkv.weight[0]#1": "summed over between two activations"},
    "torchhead": {"mix.in_proj_weight[0]#1": "summed over between two activations"},
    "windows": {"one.weight[0]": "summed over between two activations"},
    "tied": {"back.weight[0]": "the parameter that reads them is used in another way too"},
    "weightnorm": {"one.bias[0]": "summed over between two activations"},
}
GRAPH = {"gated", "constants", "shuffle"}


def some_copies(widener: Widener, analysis: Analysis, names: list[str], seed: int) -> dict[str, dict[int, int]]:
    """Half of the units two or three times; all of them twice where a norm runs over them."""
    generator = np.random.default_rng(seed)
    copies = {}
    for name in names:
        units = analysis.couplings[name].units
        some = generator.choice(units, max(1, units // 2), replace=False).tolist()
        copies[name] = {u: int(generator.integers(2, 4)) for u in some}
        if widener.only_together(name):
            copies[name] = dict.fromkeys(range(units), 2)
    return copies


@pytest.mark.parametrize("name", NETS)
def test_copies_keep_the_function(name):
    model, inputs = make(name)
    snapshot = Snapshot(model)
    analysis = analyse(model, inputs)
    widener = Widener(model, inputs, analysis)
    before = run(model, inputs)
    refused = REFUSED.get(name, {})
    for seed, names in enumerate([*([n] for n in analysis.couplings), list(analysis.couplings)]):
        widened = widener.widen(some_copies(widener, analysis, names, seed))
        assert gap(before, run(widened.model, inputs)) < 1e-12
        assert all(check.passed for check in check_growth(widened, model, inputs))
        assert {item.coupling for item in widened.left} == refused.keys() & set(names)
        assert all(refused[item.coupling] in item.reason for item in widened.left)
        assert set(widened.copies) == set(names) - refused.keys()
        grew = sum(p.numel() for p in widened.model.parameters()) - sum(p.numel() for p in model.parameters())
        assert grew > 0 or not widened.copies
        assert widened.form == "class" or name in GRAPH
    assert snapshot.same()


@pytest.mark.parametrize("name", ["chain", "transposed", "transformer", "shuffle", "flattened", "constants"])
def test_a_wrong_share_fails_the_check(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    widener = Widener(model, inputs, analysis)
    widened = widener.widen(some_copies(widener, analysis, list(analysis.couplings), 0))
    wrong_ones = 0
    for at, edit in enumerate(widened.plan.edits):
        if isinstance(edit, Resize) and edit.scale:
            scale = tuple(1.1 * s if s != 1 else s for s in edit.scale)
            if scale == edit.scale:
                continue
            wrong_ones += 1
            edits = list(widened.plan.edits)
            edits[at] = dataclasses.replace(edit, scale=scale)
            wrong = dataclasses.replace(widened, model=apply_plan(model, Plan(tuple(edits))))
            assert not all(check.passed for check in check_growth(wrong, model, inputs)), edit.tensor
    assert wrong_ones


@pytest.mark.parametrize(
    "name", ["chain", "dense", "grouped", "transformer", "shuffle", "flattened", "constants", "odd"]
)
def test_copies_taken_away_again_leave_the_first_model(name):
    """The analysis of the wide model finds the copies; without them, and with the shares undone, nothing is new."""
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    widener = Widener(model, inputs, analysis, "graph" if name == "constants" else "auto")
    copies = {
        n: dict.fromkeys(some, 2) for n, some in some_copies(widener, analysis, list(analysis.couplings), 1).items()
    }
    # where copies of copies meet (a head, and a position in it), only one of the two
    copies = {n: some for n, some in copies.items() if analysis.couplings[n].blocks == 1}
    widened = widener.widen(copies)
    assert widened.copies
    wide = copy.deepcopy(widened.model)
    tensors = {**dict(wide.named_parameters()), **dict(wide.named_buffers())}
    extra: dict[tuple[str, int], set[int]] = {}
    with torch.no_grad():
        for edit in widened.plan.edits:
            if isinstance(edit, Resize):
                first = [edit.index.index(i) for i in range(edit.size)]
                extra[edit.tensor, edit.axis] = set(range(len(edit.index))) - set(first)
                if edit.scale:
                    shape = [-1 if a == edit.axis else 1 for a in range(tensors[edit.tensor].dim())]
                    tensors[edit.tensor].div_(torch.tensor(edit.scale, dtype=torch.float64).reshape(shape))
    again = analyse(wide, inputs)
    choice = {}
    for coupling in again.couplings.values():
        taken = [
            u
            for u in range(coupling.units)
            if all(set(p.positions[u].tolist()) <= extra.get((p.tensor, p.axis), set()) for p in coupling.places)
        ]
        choice[coupling.name] = np.array(taken, np.int64)
    state = apply_plan(wide, again.cut(choice)).state_dict()
    assert sum(len(units) for units in choice.values())
    for key, tensor in model.state_dict().items():
        assert state[key].shape == tensor.shape, key
        torch.testing.assert_close(state[key], tensor, rtol=1e-15, atol=0)


# ---- order of copies


def test_whole_blocks_of_a_norm_over_groups_line_up():
    """Copies of all channels of each group keep the groups' statistics."""
    model, inputs = make("groupnorm")
    analysis = analyse(model, inputs)
    widener = Widener(model, inputs, analysis)
    inside = next(n for n, c in analysis.couplings.items() if c.blocks == 3)
    widened = widener.widen({inside: dict.fromkeys(range(5), 3)})
    index = next(e.index for e in widened.plan.edits if isinstance(e, Resize) and e.tensor == "norm.weight")
    assert [sorted(index[15 * g : 15 * (g + 1)]) for g in range(3)] == [
        sorted(list(range(5 * g, 5 * g + 5)) * 3) for g in range(3)
    ]
    assert gap(run(model, inputs), run(widened.model, inputs)) < 1e-12


def test_depthwise_transposed_convolutions_read_their_own_copies():
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 7, 1), nn.ConvTranspose2d(7, 7, 2, groups=7)
            self.three = nn.Conv2d(7, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(torch.sigmoid(self.two(torch.sigmoid(self.one(x)))))

    model, inputs = Up().double(), draw(2, 3, 5, 5)
    analysis = analyse(model, inputs)
    (name,) = analysis.couplings
    widened = Widener(model, inputs, analysis).widen({name: {0: 2, 3: 3}})
    assert widened.model.two.groups == 10
    assert gap(run(model, inputs), run(widened.model, inputs)) < 1e-12


class TwoOrders(nn.Module):
    """Twelve channels as 3 x 4 for one reader, as 4 x 3 for another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.one(x))
        left = x.view(-1, 3, 4).transpose(1, 2).reshape(-1, 12)
        right = x.view(-1, 4, 3).transpose(1, 2).reshape(-1, 12)
        return self.two(left) + self.three(right)


def test_contradicting_numbers_of_copies_are_refused():
    model, inputs = TwoOrders().double(), draw(4, 5)
    analysis = analyse(model, inputs)
    state = analysis.state
    times = np.ones(state.atoms.count, np.int64)
    times[state.atoms.find(state.relations[0].factors[0])] = 2
    with pytest.raises(EditError, match="two reshapes of the same axis want different numbers of them"):
        copied(state, times)
    widener = Widener(model, inputs, analysis)
    for name in analysis.couplings:
        assert widener.obstacle(name) == "two reshapes order them in different ways"


def test_an_order_that_is_not_one_of_factors_is_refused():
    model, inputs = make("transformer")
    state = analyse(model, inputs).state
    relation = next(r for r in state.relations if r.grid)
    times = np.ones(state.atoms.count, np.int64)
    times[state.atoms.find(relation.whole)] = 2
    layout = Layout(state, times)
    assert layout.index(np.zeros(3, np.int64)).tolist() == [0, 1, 2]
    with pytest.raises(EditError, match="a reshaped axis is in an order that is not one of its factors"):
        layout.index(relation.whole[[0, 5, 1, 3, 2]])


# ---- obstacles


def test_reasons_of_obstacles():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)
            self.soft, self.three = nn.Linear(5, 11), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.one(x))
            z = self.soft(x).softmax(-1)
            return self.two(y) * y.sum(-1, keepdim=True) + self.three(z)

    model, inputs = Sums().double(), draw(4, 5)
    analysis = analyse(model, inputs)
    widener = Widener(model, inputs, analysis)
    assert widener.obstacle("one.weight[0]").startswith("a plain sum runs over them (at ")
    assert "test_copies.py" in widener.obstacle("one.weight[0]")
    assert widener.only_together("soft.weight[0]").startswith("!aten._softmax")
    widened = widener.widen({"one.weight[0]": {0: 2}, "soft.weight[0]": dict.fromkeys(range(11), 2)})
    assert {item.coupling: item.units for item in widened.left} == {"one.weight[0]": 1, "soft.weight[0]": 11}
    assert any("_softmax" in item.reason and item.reason.endswith("runs over them") for item in widened.left)
    assert widened.plan == Plan(())


def test_only_whole_multiples_under_a_norm():
    model, inputs = make("convnext")
    analysis = analyse(model, inputs)
    widener = Widener(model, inputs, analysis)
    for some in ({0: 2}, dict.fromkeys(range(10), 2), {**dict.fromkeys(range(10), 2), 10: 3}):
        widened = widener.widen({"scale[0]": some})
        assert "only whole multiples of all of them are exact" in widened.left[0].reason
        assert not widened.copies
    # the control: a copy of one channel under the norm is indeed not exact
    model, inputs = make("transformer")
    widener = Widener(model, inputs, analyse(model, inputs))
    wrong = apply_plan(model, Plan(tuple(widener.edits(widener.times({"ln1.weight[0]": {0: 2}})))))
    assert gap(run(model, inputs), run(wrong, inputs)) > 1e-6


def test_refusals_of_copies():
    model, inputs = make("mlp")
    analysis = analyse(model, inputs)
    snapshot = Snapshot(model)
    widener = Widener(model, inputs, analysis)
    with pytest.raises(AnalysisError, match="no coupling 'x'; the analysis has 2"):
        widener.widen({"x": {0: 2}})
    with pytest.raises(AnalysisError, match=r"0\.weight\[0\] has 11 units, got number 11"):
        widener.widen({"0.weight[0]": {11: 2}})
    assert widener.widen({}).plan == Plan(())
    assert snapshot.same()


def test_a_parameter_is_followed_through_movements():
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 7), nn.Parameter(torch.zeros(3, 1, 7))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.two.squeeze(1).t().contiguous().view(7, 3).transpose(0, 1).permute(1, 0)
            return torch.sigmoid(self.one(x)) @ weight

    model, inputs = Moved().double(), draw(4, 5)
    nn.init.normal_(model.two)
    analysis = analyse(model, inputs)
    growth = Growth(analysis.state)
    assert ("two", 2) in growth.readings()
    widened = Widener(model, inputs, analysis).widen({"one.weight[0]": {1: 3, 4: 2}})
    assert gap(run(model, inputs), run(widened.model, inputs)) < 1e-12
