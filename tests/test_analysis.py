"""Which channels hang together: known answers, sizes counted twice, and what must stay."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from analysis_nets import NETS, draw, image, make
from analysis_support import cut, gone_positions, some_units
from models import Snapshot, randomise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from morph.analysis import analyse
from morph.analysis.atoms import Atoms, Forms
from morph.analysis.propagation import Propagation, propagate
from morph.analysis.recorder import record
from morph.analysis.rules import RULES
from morph.analysis.tags import Tag
from morph.errors import AnalysisError

# For each network the couplings: number of units, and how many positions each takes on one telling tensor and axis.
EXPECTED = {
    "chain": {("one.weight", 0): [(11, 1)], ("two.weight", 0): [(7, 1)], ("act.weight", 0): [(7, 1)]},
    "residual": {("stem.weight", 0): [(11, 1)], ("bn.running_var", 0): [(11, 1)], ("mid.weight", 0): [(7, 1)]},
    "projection": {("stem.weight", 0): [(11, 1)], ("short.weight", 0): [(13, 1)], ("mid.weight", 0): [(7, 1)]},
    "dense": {("bn.weight", 0): [(7, 1), (11, 1)], ("head.weight", 1): [(5, 1), (7, 1), (11, 1)]},
    "depthwise": {("depth.weight", 0): [(11, 1)], ("depth.weight", 1): [], ("down.weight", 0): [(7, 1)]},
    "grouped": {("mix.weight", 0): [(3, 7), (7, 3)], ("mix.weight", 1): [(5, 1)], ("up.weight", 0): [(3, 5), (5, 3)]},
    "transposed": {("three.weight", 0): [(3, 5), (5, 3)], ("three.weight", 1): [(5, 1)], ("one.weight", 0): [(11, 1)]},
    "shuffle": {("mix.weight", 0): [(3, 4), (4, 3)], ("mix.weight", 1): [(4, 1)], ("out.weight", 1): [(3, 4), (4, 3)]},
    "gated": {("one.weight", 0): [(11, 2)], ("two.weight", 0): [(5, 1), (7, 1)]},
    "squeeze": {("two.weight", 0): [(11, 1)], ("one.weight", 0): [(5, 1)], ("up.weight", 0): [(11, 1)]},
    "pixels": {("up.weight", 0): [(7, 4)], ("out.weight", 1): [(5, 4)]},
    "flattened": {("two.weight", 1): [(7, 15)], ("two.weight", 0): [(11, 1)]},
    "mlp": {("0.weight", 0): [(11, 1)], ("3.weight", 0): [(7, 1)]},
    "transformer": {
        ("table.weight", 1): [(12, 1)],
        ("heads.q.weight", 0): [(3, 4), (4, 3)],
        ("heads.v.weight", 0): [(3, 4), (4, 3)],
        ("heads.o.weight", 1): [(3, 4), (4, 3)],
        ("up.weight", 0): [(17, 1)],
    },
    "grouphead": {
        ("attention.k.weight", 0): [(2, 5), (5, 2)],
        ("attention.q.weight", 0): [(2, 10), (2, 10), (5, 4)],
        ("inner.weight", 0): [(20, 1)],
    },
    "packed": {("qkv.weight", 0): [(3, 15), (5, 9)], ("qkv.weight", 1): [], ("head.weight", 1): []},
    "torchhead": {("mix.in_proj_weight", 0): [(3, 15), (5, 9)], ("mix.in_proj_weight", 1): [(15, 1)]},
    "windows": {("norm.weight", 0): [(11, 1)], ("two.weight", 0): [(13, 1)]},
    "groupnorm": {("norm.weight", 0): [(3, 5), (5, 3)]},
    "convnext": {("scale", 0): [(11, 1)], ("down.weight", 0): [(11, 1)], ("up.weight", 0): [(13, 1)]},
    "twice": {("loop.weight", 0): [(11, 1)], ("loop.weight", 1): [(11, 1)]},
    "tied": {("table.weight", 1): [(11, 1)], ("table.weight", 0): [], ("mid.weight", 0): [(7, 1)]},
    "weightnorm": {
        ("one.parametrizations.weight.original0", 0): [(11, 1)],
        ("two.parametrizations.weight.original1", 1): [(11, 1)],
        ("two.parametrizations.weight.original1", 0): [(7, 1)],
    },
    "pair": {("left.weight", 0): [(13, 1)], ("right.weight", 0): [(13, 1)], ("left.weight", 1): []},
    "named": {("head.weight", 1): [(13, 1), (17, 1)]},
    "constants": {("one.weight", 0): [(5, 1), (8, 1)], ("three.weight", 1): [(8, 15)], ("two.weight", 0): [(7, 1)]},
    "attributes": {("value.weight", 0): [(3, 5), (5, 3)], ("out.weight", 0): [(12, 1)]},
    "odd": {
        ("mean", 0): [(11, 1)],
        ("bn.weight", 0): [(11, 1)],
        ("unused", 0): [],
        ("levels", 0): [],
        ("phase", 0): [],
    },
}


@pytest.mark.parametrize("name", NETS)
def test_couplings_are_those_worked_out_by_hand(name):
    model, inputs = make(name)
    snapshot = Snapshot(model)
    analysis = analyse(model, inputs)
    for (tensor, axis), wanted in EXPECTED[name].items():
        got = [
            (c.units, p.positions.shape[1])
            for c in analysis.couplings.values()
            for p in c.places
            if (p.tensor, p.axis) == (tensor, axis)
        ]
        assert sorted(got) == wanted, (tensor, axis)
    assert analysis.traced == "shapes"
    assert snapshot.same()


@pytest.mark.parametrize("name", NETS)
def test_places_are_within_their_tensors_and_units_differ(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for coupling in analysis.couplings.values():
        assert coupling.name.startswith(f"{coupling.places[0].tensor}[{coupling.places[0].axis}]")
        assert any(p.tensor in analysis.parameters for p in coupling.places)
        for place in coupling.places:
            assert len(place.positions) == coupling.units
            taken = place.positions.ravel().tolist()
            assert len(set(taken)) == len(taken), "two units of one coupling share a position"
            assert set(taken) <= set(range(tensors[place.tensor].shape[place.axis]))
        for other in coupling.overlaps:
            assert coupling.name in analysis.couplings[other].overlaps


def test_an_analysis_is_the_same_each_time():
    first, second = (analyse(*make("transformer")) for _ in range(2))
    assert list(first.couplings) == list(second.couplings)
    for a, b in zip(first.couplings.values(), second.couplings.values(), strict=True):
        assert (a.units, a.blocks, a.overlaps, a.statistics) == (b.units, b.blocks, b.overlaps, b.statistics)
        for p, q in zip(a.places, b.places, strict=True):
            assert (p.tensor, p.axis) == (q.tensor, q.axis)
            assert np.array_equal(p.positions, q.positions)


def test_blocks_statistics_and_readers():
    couplings = analyse(*make("transformer")).couplings
    stream = next(c for c in couplings.values() if any(p.tensor == "table.weight" for p in c.places))
    assert len(stream.statistics) == 2
    assert all(re.search(r"layer_norm.*analysis_nets\.py:\d+, in forward", s) for s in stream.statistics)
    assert {r.module for r in stream.readers} == {"heads.q", "heads.k", "heads.v", "up", "out"}
    inside = [c for c in couplings.values() if c.blocks > 1]
    assert [(c.units, c.blocks) for c in inside] == [(4, 3), (4, 3)]
    grouped = analyse(*make("grouped")).couplings
    reader = next(r for r in grouped["up.weight[0]"].readers if r.module == "mix")
    assert (reader.axis, reader.positions.tolist()) == (1, [[i, i + 5, i + 10] for i in range(5)])


# ---- sizes


def _flops(model: nn.Module, inputs: object) -> int:
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NETS)
def test_sizes_are_those_of_the_model_and_of_the_cut_model(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    removed = cut(model, inputs, seed=3)
    assert removed.choice
    for sizes, module in ((analysis.sizes(), model), (analysis.sizes(removed.choice), removed.model)):
        assert sizes.params == sum(p.numel() for p in module.parameters())
        assert 2 * sizes.macs == _flops(module.eval(), inputs)
    assert analysis.sizes(removed.choice).params < analysis.sizes().params


def test_the_free_share_counts_what_lies_on_a_unit():
    analysis = analyse(*make("mlp"))
    total = 13 * 11 + 3 * 11 + 11 * 7 + 7 + 7 * 5 + 5
    assert analysis.free() == pytest.approx((total - 5) / total)
    assert analyse(nn.Linear(3, 2).double(), draw(2, 3)).free() == 0


# ---- what a choice takes


@pytest.mark.parametrize("name", ["grouped", "transformer", "gated", "flattened", "constants"])
def test_a_cut_takes_the_places_of_the_chosen_units(name):
    model, inputs = make(name)
    analysis = analyse(model, inputs)
    choice = some_units(analysis, 4)
    edits = analysis.cut(choice).edits
    gone = gone_positions(analysis, choice)
    assert {(e.tensor, e.axis) for e in edits} == set(gone)
    for edit in edits:
        assert sorted({*range(edit.size)} - {*edit.index}) == gone[edit.tensor, edit.axis].tolist()
        assert list(edit.index) == sorted(edit.index)
        assert edit.scale == ()


def test_refusals_of_a_choice():
    analysis = analyse(*make("mlp"))
    with pytest.raises(AnalysisError, match=r"no coupling 'fc\.weight\[0\]'; the analysis has 2, see `couplings`"):
        analysis.cut({"fc.weight[0]": np.array([0])})
    with pytest.raises(AnalysisError, match=r"0\.weight\[0\] has 11 units, got number 11"):
        analysis.times({"0.weight[0]": np.array([3, 11])})
    with pytest.raises(AnalysisError, match=r"has 11 units, got number -1"):
        analysis.times({"0.weight[0]": np.array([-1, 2])})
    with pytest.raises(AnalysisError, match=r"axes would lose their last position \(the first has 7\); drop less"):
        analysis.cut({"3.weight[0]": np.arange(7)})
    assert analysis.emptied({"3.weight[0]": np.arange(6)}) == []


# ---- what must stay


def _reasons(model: nn.Module, inputs: object) -> dict[str, str]:
    return {f.reason: f.where for f in analyse(model, inputs).frozen}


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.morph_tests.twist(torch.relu(self.one(x)))
        return self.three(torch.relu(self.two(x)))


@torch.library.custom_op("morph_tests::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.flip(-1) * 2


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_unknown_operator_pins_what_it_touches_and_is_named():
    analysis = analyse(Unknown(), torch.randn(3, 5))
    assert analysis.unknown == {"morph_tests.twist.default": 1}
    assert [c.name for c in analysis.couplings.values()] == ["two.weight[0]"]
    pinned = next(f for f in analysis.frozen if "twist" in f.reason)
    assert pinned.reason == "no rule for morph_tests.twist.default"
    assert re.search(r"test_analysis\.py:\d+, in forward$", pinned.where)
    assert pinned.positions >= 7
    assert (pinned.module, analysis.traced) == ("", "shapes")


def test_a_pointwise_operator_of_torch_needs_no_rule():
    class Sine(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](torch.special.i0e(torch.sinc(self[0](x))))

    analysis = analyse(Sine(nn.Linear(5, 7), nn.Linear(7, 3)), torch.randn(2, 5))
    assert (analysis.unknown, [c.units for c in analysis.couplings.values()]) == ({}, [7])


def test_inputs_and_outputs_stay_with_a_reason():
    model, inputs = make("pair")
    assert list(_reasons(model, {"x": inputs[0], "y": inputs[1]}))[:1] == ["aten.argmax.default over this axis"]
    plain = analyse(*make("mlp")).frozen
    assert [(f.reason, f.where) for f in plain if f.reason == "output of the model"] == [("output of the model", "")]
    embedding = _reasons(*make("tied"))
    assert "analysis_nets.py" in embedding["rows are taken by number"]


class Training(nn.Module):
    """A head that only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.extra = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 11)
        self.last, self.never = nn.Linear(11, 3), nn.Parameter(torch.zeros(13))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = torch.relu(self.one(x))
        return (self.two(x), self.last(torch.relu(self.extra(x)))) if self.training else self.two(x)


def test_what_only_training_uses_stays_fit_for_training():
    model = Training()
    analysis = analyse(model, torch.randn(3, 5))
    assert not any(p.tensor == "never" for c in analysis.couplings.values() for p in c.places)
    assert _reasons(model, torch.randn(3, 5))["not used in this run"] == ""
    removed = cut(model, torch.randn(3, 5))
    assert len(removed.model.one.weight) < 7
    assert model.training
    outputs = removed.model.train()(torch.randn(3, 5))
    assert [t.shape for t in outputs] == [(3, 3), (3, 3)]


def test_a_statistic_or_order_over_an_axis():
    class Ordered(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.one, self.two, self.how = nn.Linear(5, 7), nn.Linear(7, 3), how

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            x = {
                "flip": lambda: x.flip(1),
                "cumsum": lambda: x.cumsum(1),
                "sort": lambda: x.sort(1)[0],
                "max": lambda: x - x.max(1, keepdim=True)[0],
                "where": lambda: x - x.max(1, keepdim=True)[1],
                "select": lambda: x + x[:, 2:3],
                "prod": lambda: x * x.prod(1, keepdim=True),
                "index": lambda: x[:, torch.tensor([1, 0, 2, 3, 4, 6, 5])],
                "roll": lambda: x.roll(1, 1),
                "triangle": lambda: x.tril(),
                "diagonal": lambda: x + x.diagonal()[:3].sum(),
                "softmax": lambda: x.softmax(1),
                "mean": lambda: x - x.mean(1, keepdim=True),
                "norm": lambda: x / x.norm(dim=1, keepdim=True),
            }[self.how]()
            return self.two(x)

    inputs = torch.randn(7, 5)
    reasons = {
        "flip": "change places by their number",
        "roll": "change places by their number",
        "cumsum": "an order over this axis",
        "sort": "an order over this axis",
        "where": "an extreme and its index",
        "prod": "aten.prod.dim_int over this axis",
        "index": "taken by an index tensor",
        "triangle": "a triangle by position",
        "diagonal": "a diagonal by position",
    }
    for how, reason in reasons.items():
        analysis = analyse(Ordered(how), inputs)
        assert not analysis.couplings, how
        assert any(reason in f.reason and "test_analysis.py" in f.where for f in analysis.frozen), how
    selected = analyse(Ordered("select"), inputs)
    (coupling,) = selected.couplings.values()  # the position itself stays, the others can go
    assert coupling.places[0].positions.ravel().tolist() == [0, 1, 3, 4, 5, 6]
    assert any(f.reason == "a single position is taken by its number" for f in selected.frozen)
    for how, statistic in (("softmax", "softmax"), ("mean", "mean"), ("max", "max.dim")):
        (coupling,) = analyse(Ordered(how), inputs).couplings.values()
        assert statistic in coupling.statistics[0]
    (coupling,) = analyse(Ordered("norm"), inputs).couplings.values()  # zeros do not change a sum of squares
    assert (coupling.units, coupling.statistics) == (7, ())


def test_a_batch_of_one_is_not_taken_for_a_channel():
    model, _ = make("chain")
    small = analyse(model, image()[:1])
    assert {n: c.units for n, c in small.couplings.items()} == {
        n: c.units for n, c in analyse(model, image()).couplings.items()
    }


# ---- models of other kinds


def test_a_model_without_data_is_analysed_and_cut():
    with torch.device("meta"):
        model = NETS["transformer"]()[0]
    _, inputs = make("transformer")
    for given in (inputs, inputs.to("meta")):
        analysis = analyse(model, given)
        assert [c.units for c in analysis.couplings.values()] == [
            c.units for c in analyse(*make("transformer")).couplings.values()
        ]
    assert analysis.cut(some_units(analysis, 0)).edits


def test_half_precision_and_channels_last_are_analysed():
    model, inputs = make("grouped")
    model.half().to(memory_format=torch.channels_last)
    analysis = analyse(model, inputs.half())
    assert sorted(c.units for c in analysis.couplings.values()) == [3, 5, 7, 11]


def test_a_training_model_keeps_its_flags_and_its_running_statistics():
    model, inputs = make("chain")
    model.train()
    model.bn.eval()
    model.one.weight.requires_grad_(False)
    snapshot = Snapshot(model)
    assert analyse(model, inputs).couplings
    assert snapshot.same()


# ---- the parts


def test_atoms_against_a_slow_union_find():
    generator = np.random.default_rng(0)
    for _ in range(20):
        atoms, sets, reasons = Atoms(), [{0}], [set()]
        for _ in range(5):
            n = int(generator.integers(1, 400))
            labels = atoms.new(n)
            assert labels.tolist() == list(range(len(sets), len(sets) + n))
            sets += [{int(i)} for i in labels]
            reasons += [set() for _ in labels]
        for turn in range(30):
            a, b = generator.integers(1, len(sets), (2, 20))
            atoms.union(a, b)
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                joined = sets[i] | sets[j]
                for k in joined:
                    sets[k] = joined
            if turn % 7 == 0:
                pinned = generator.integers(1, len(sets), 3)
                atoms.pin(pinned, turn)
                for i in pinned.tolist():
                    reasons[i].add(turn)
            if turn % 5 == 0:  # asking in between changes nothing
                atoms.find(a)
        lowest = [min(set.union(*(reasons[k] for k in s)), default=-1) for s in sets]
        expected = [0 if low >= 0 else min(s) for low, s in zip(lowest, sets, strict=True)]
        assert atoms.roots().tolist() == expected
        assert 0 in expected[1:]
        assert atoms.pinned_by(np.arange(len(sets))).tolist() == lowest
    atoms.union(atoms.new(3), np.zeros(3, np.int64))
    assert atoms.find(atoms.count - 1) == 0
    assert atoms.pinned_by(np.array([atoms.count - 1])).tolist() == [-1]


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_known_of_whole_vectors_is_known_at_any_time(mixed):
    generator = np.random.default_rng(0)
    for _ in range(30):
        atoms, blocks, above = Atoms(), [], [0]

        def root(i, above=above):
            return i if above[i] == i else root(above[i])

        for turn in range(40):
            blocks.append(atoms.new(4))
            above += blocks[-1].tolist()
            a, b, c = (blocks[int(k)] for k in generator.integers(0, len(blocks), 3))
            what = int(generator.integers(0, 12))
            if what == 0:
                atoms.pin(a, turn)
            b = np.zeros(4, np.int64) if what < 2 else b
            if mixed and turn == 25:
                a, b = a[:2], b[2:]
            if what > 0:
                atoms.union(*((a, b) if what % 2 else (b, a)))
            for i, j in zip(a.tolist(), b.tolist(), strict=True):
                low, high = sorted((root(i), root(j)))
                above[high] = low
            for labels in (a, b, c):
                assert atoms.find(labels).tolist() == [root(i) for i in labels.tolist()]
        assert atoms.roots().tolist() == [root(i) for i in range(len(above))]
        assert 0 < sum(root(i) == 0 for i in range(len(above))) < len(above)


def test_atoms_of_whole_vectors_against_a_slow_union_find():
    generator = np.random.default_rng(0)
    for _ in range(20):
        atoms, blocks, above, pins = Atoms(), [], [0], {}

        def root(i, above=above):
            return i if above[i] == i else root(above[i])

        for turn in range(40):
            blocks.append(atoms.new(5))
            above += blocks[-1].tolist()
            a, b = (blocks[int(k)] for k in generator.integers(0, len(blocks), 2))
            if turn % 3 == 0:  # some positions only, or in another order
                a, b = a[1:4], b[[4, 1, 2]]
            if generator.random() < 0.4:
                atoms.union(a, b)
                for i, j in zip(a.tolist(), b.tolist(), strict=True):
                    low, high = sorted((root(i), root(j)))
                    above[high] = low
            if turn % 11 == 0:
                atoms.pin(b[:2], turn)
                pins |= {i: min(turn, pins.get(i, turn)) for i in b[:2].tolist()}
            if turn % 5 == 0:
                atoms.find(a)
        lowest = dict[int, int]()
        for i, reason in pins.items():
            lowest[root(i)] = min(reason, lowest.get(root(i), reason))
        assert atoms.roots().tolist() == [0 if root(i) in lowest else root(i) for i in range(len(above))]
        assert atoms.pinned_by(np.arange(len(above))).tolist() == [lowest.get(root(i), -1) for i in range(len(above))]
        reasons = [lowest.get(root(i), -1) for block in blocks[3:] for i in block.tolist()]
        assert atoms.count_pinned(blocks[3:], 40) == [reasons.count(pin) for pin in range(40)]
        forms = Forms(atoms)
        for labels in [*blocks, *[block[::-1] for block in blocks]]:
            assert np.array_equal(forms.of(labels), atoms.find(labels))
        distinct = {tuple(atoms.find(block).tolist()) for block in blocks}
        assert len({id(forms.of(block)) for block in blocks}) == len(distinct) < len(blocks)


def test_errors_of_rules():
    model, inputs = nn.Linear(5, 3), torch.randn(2, 5)
    recording = record(model, inputs)
    state = Propagation(recording)
    with pytest.raises(AnalysisError, match=r"input: axes of 5 and 3 positions cannot be one"):
        state.same(state.fresh(5), state.fresh(3))
    value = recording.inputs[0]
    with pytest.raises(AnalysisError, match=r"the notation 'a b c' has 3 axes, the tensor has 2"):
        state.signature("a b c -> a", value)
    wrong = {**RULES, torch.ops.aten.linear: lambda op, *_, **__: op.frozen((2, 7))}
    with pytest.raises(
        AnalysisError, match=r"the rule for aten\.linear\.default gives shape \(2, 7\), the operator \(2, 3\)"
    ):
        propagate(recording, wrong)


def test_a_notation_carries_labels_and_sums():
    model, inputs = nn.Linear(5, 3), torch.randn(2, 4, 5)
    state = propagate(record(model, inputs), RULES)
    state.number = 0
    weight = state.recording.sources["weight"]
    state.tags[weight.number] = Tag((state.fresh(3), state.fresh(5)))
    value = state.recording.inputs[0]
    made = state.signature("... k, n k -> ... n", value, weight)
    assert made.shape == (2, 4, 3)
    assert np.array_equal(made.axes[2], state.tag(weight).axes[0])
    assert [(v is value, a) for v, a in state.sums[-1].operands] == [(True, 2), (False, 1)]
    rest = state.signature("a * -> a *", weight)
    assert not any(labels.any() for labels in rest.axes[1:])


def test_a_model_with_random_weights_is_not_needed():
    left, right = make("dense"), NETS["dense"]()
    randomise(left[0], 7)
    a, b = analyse(*left), analyse(right[0].double(), right[1])
    assert {n: c.units for n, c in a.couplings.items()} == {n: c.units for n, c in b.couplings.items()}
