"""The choice of what to drop, on couplings and costs written by hand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from morph.couplings import Coupling, Place
from morph.errors import TargetError
from morph.selection import choose_families, choose_units, matches, schedule


@dataclass(frozen=True)
class Cost:
    params: int
    macs: int


def coupling(name, units, k=1, overlaps=(), blocks=1):
    positions = np.arange(units * k).reshape(units, k)
    places = (Place(f"{name}.weight", 0, positions), Place(f"{name}.bias", 0, positions))
    return Coupling(f"{name}.weight[0]", units, places, (), (), tuple(overlaps), blocks)


def chain(widths, k=None):
    """Couplings of a chain of layers, and the sizes of that chain after a choice, counted anew each time."""
    couplings = [coupling(f"l{i}", w, (k or [1] * len(widths))[i]) for i, w in enumerate(widths)]
    calls = []

    def cost(choice):
        calls.append(choice)
        kept = [c.units - len(choice.get(c.name, ())) for c in couplings]
        assert all(n > 0 for n in kept)
        ends = [3, *(n * c.places[0].positions.shape[1] for n, c in zip(kept, couplings, strict=True)), 5]
        params = sum(a * b + b for a, b in itertools.pairwise(ends))
        return Cost(params, sum(100 // (i + 1) * a * b for i, (a, b) in enumerate(itertools.pairwise(ends))))

    cost.calls = calls
    return couplings, cost


def random_scores(couplings, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        c.name: torch.rand(c.units, generator=generator, dtype=torch.float64) * (i + 1) for i, c in enumerate(couplings)
    }


def dropped(choice):
    return {name: units.tolist() for name, units in choice.items()}


def total(choice):
    return sum(len(units) for units in choice.values())


def free(choice):
    raise AssertionError("a ratio needs no sizes")


SCORES = {
    "a.weight[0]": torch.tensor([3.0, 1.0, 2.0, 9.0]),
    "b.weight[0]": torch.tensor([30.0, 10.0, 20.0, 30.0, 10.0, 20.0]),
}
TWO = [coupling("a", 4), coupling("b", 6)]


def test_local_takes_the_lowest_of_each():
    choice = choose_units(TWO, SCORES, free, ratio=0.5, ranking="local")
    assert dropped(choice) == {"a.weight[0]": [1, 2], "b.weight[0]": [1, 2, 4]}
    assert all(units.dtype == np.int64 for units in choice.values())


def test_global_sets_one_threshold():
    assert dropped(choose_units(TWO, SCORES, free, ratio=0.5, normalise=None)) == {
        "a.weight[0]": [0, 1, 2],  # the last stays, whatever it scores
        "b.weight[0]": [1, 4],
    }
    assert dropped(choose_units(TWO, SCORES, free, ratio=0.5)) == {
        "a.weight[0]": [0, 1, 2],  # 0.80, 0.27, 0.53 of the mean 3.75
        "b.weight[0]": [1, 4],  # 0.5 of the mean 20
    }
    assert dropped(choose_units(TWO, SCORES, free, ratio=0.3)) == {"a.weight[0]": [1], "b.weight[0]": [1, 4]}


def test_normalising_by_cost_counts_what_a_unit_saves():
    def cost(choice):
        gone = {name: len(units) for name, units in choice.items()}
        a, b = gone.get("a.weight[0]", 0), gone.get("b.weight[0]", 0)
        return Cost(1000 - a - 100 * b, 1000 - 100 * a - b)

    by_params = choose_units(TWO, SCORES, cost, ratio=0.2, normalise="params")
    by_macs = choose_units(TWO, SCORES, cost, ratio=0.2, normalise="macs")
    assert dropped(by_params) == {"b.weight[0]": [1, 4]}
    assert dropped(by_macs) == {"a.weight[0]": [1, 2]}

    nothing = choose_units(
        TWO, SCORES, lambda choice: Cost(9, 9 - len(choice.get("b.weight[0]", ()))), ratio=0.2, normalise="macs"
    )
    assert dropped(nothing) == {"b.weight[0]": [1, 4]}  # units of the other save nothing: they go last


def test_ties_go_to_the_first():
    scores = {c.name: torch.ones(c.units) for c in TWO}
    assert dropped(choose_units(TWO, scores, free, ratio=0.5)) == {"a.weight[0]": [0, 1, 2], "b.weight[0]": [0, 1]}
    assert dropped(choose_units(TWO, scores, free, ratio=0.5, ranking="local")) == {
        "a.weight[0]": [0, 1],
        "b.weight[0]": [0, 1, 2],
    }


def test_shares_are_not_lost_to_rounding():
    many = [coupling("a", 100)]
    scores = random_scores(many)
    for percent in range(100):
        for ranking in ("local", "global"):
            assert total(choose_units(many, scores, free, ratio=percent / 100, ranking=ranking)) == percent


def test_minimum_and_multiple():
    couplings = [coupling("a", 30), coupling("b", 3, 4), coupling("c", 7)]
    scores = random_scores(couplings)

    def kept(**options):
        choice = choose_units(couplings, scores, free, ratio=0.6, ranking="local", **options)
        return [c.units - len(choice.get(c.name, ())) for c in couplings]

    assert kept() == [12, 2, 3]
    assert kept(minimum=20) == [20, 3, 7]
    assert kept(multiple=8) == [16, 2, 7]  # 2 units of 4 positions are 8; 7 is no wider than 8
    assert kept(multiple=8, minimum=17) == [24, 3, 7]
    assert kept(multiple=5) == [15, 3, 5]
    assert kept(multiple=64) == [30, 3, 7]


def test_ignored_couplings_stay_whole():
    couplings, _ = chain([7, 11, 13])
    scores = random_scores(couplings)
    for pattern in ("l1.weight[0]", "l1.*", "*1.bias", "l[1]*"):
        choice = choose_units(couplings, scores, free, ratio=0.5, ranking="local", ignore=[pattern])
        assert sorted(choice) == ["l0.weight[0]", "l2.weight[0]"], pattern
    assert not matches(couplings[1], ["l2*", "l1"])
    assert choose_units(couplings, {}, free, ratio=0.5, ignore=["*"]) == {}


def test_ratios_of_their_own():
    couplings, cost = chain([10, 20, 30])
    scores = random_scores(couplings)
    some = {"l0*": 0.5, "l0.bias": 0.1, "l1.bias": 0.0}
    alone = choose_units(couplings, scores, free, ratios=some)
    assert {n: len(u) for n, u in alone.items()} == {"l0.weight[0]": 5}

    more = choose_units(couplings, scores, free, ratio=0.2, ratios=some)
    assert {n: len(u) for n, u in more.items()} == {"l0.weight[0]": 5, "l2.weight[0]": 6}
    target = cost({}).params / 2
    met = choose_units(couplings, scores, cost, target_params=target, ratios=some)
    assert cost(met).params <= target
    assert len(met["l0.weight[0]"]) == 5
    assert "l1.weight[0]" not in met


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("metric", ["params", "macs"])
def test_a_target_is_met_with_as_little_as_does(ranking, metric):
    couplings, cost = chain([17, 29, 23])
    scores = random_scores(couplings)
    start = getattr(cost({}), metric)
    for share in (0.9, 0.5, 0.1):
        cost.calls.clear()
        target = {f"target_{metric}": start * share}
        choice = choose_units(couplings, scores, cost, ranking=ranking, **target)
        assert len(cost.calls) < 12
        assert getattr(cost(choice), metric) <= start * share
        back = [
            replace_last(choice, name, scores)
            for name in choice  # the unit that went last, back in its place
        ]
        assert max(getattr(cost(other), metric) for other in back) > start * share


def replace_last(choice, name, scores):
    """A choice without the best unit of one coupling."""
    best = max(choice[name].tolist(), key=lambda unit: float(scores[name][unit]))
    return {**choice, name: choice[name][choice[name] != best]}


def test_a_target_that_is_met_already_drops_nothing():
    couplings, cost = chain([7, 11])
    assert choose_units(couplings, random_scores(couplings), cost, target_params=cost({}).params) == {}


def test_a_target_out_of_reach_says_what_is_in_reach():
    couplings, cost = chain([7, 11, 13])
    scores = random_scores(couplings)
    with pytest.raises(TargetError, match=r"target_params 10 is out of reach: at least (\d+) params stay") as caught:
        choose_units(couplings, scores, cost, target_params=10, minimum=2)
    reachable = int(str(caught.value).partition("at least ")[2].split()[0])
    assert reachable == 3 * 2 + 2 + 2 * 2 + 2 + 2 * 2 + 2 + 2 * 5 + 5

    choice = choose_units(couplings, scores, cost, target_params=reachable, minimum=2)
    assert cost(choice).params == reachable
    with pytest.raises(TargetError, match="target_macs 10 is out of reach: at least"):
        choose_units(couplings, scores, cost, target_macs=10)


def heads(name, units, size):
    """Whole heads and the positions inside them."""
    whole = coupling(name, units, size, [f"{name}.inside"])
    return whole, replace(coupling(name, size, units, [whole.name], units), name=f"{name}.inside")


def test_of_heads_and_the_positions_inside_them_one_kind_is_cut():
    whole, inside = heads("qkv", 4, 16)
    plain = coupling("fc", 8)
    couplings = [inside, plain, whole]
    scores = random_scores(couplings)

    def cut(kind):
        return sorted(choose_units(couplings, scores, free, ratio=0.5, ranking="local", heads=kind))

    assert cut("whole") == ["fc.weight[0]", "qkv.weight[0]"]
    assert cut("inside") == ["fc.weight[0]", "qkv.inside"]
    assert cut("both") == ["fc.weight[0]", "qkv.inside", "qkv.weight[0]"]


def test_without_the_wanted_kind_the_couplings_of_more_units_are_taken():
    whole, inside = heads("qkv", 4, 16)
    values = replace(inside, name="v", units=3, overlaps=(whole.name,))
    both = replace(whole, overlaps=(inside.name, "v"))
    few, many = coupling("a", 3, overlaps=["b.weight[0]"]), coupling("b", 9, overlaps=["a.weight[0]"])

    assert choose_families([both, inside, values], "whole") == [both]
    assert choose_families([both, inside, values], "inside") == [inside, values]
    assert choose_families([inside], "whole") == [inside]
    assert choose_families([few, many], "whole") == [many]
    assert choose_families([few, many], "inside") == [many]


def test_schedules_end_at_the_target():
    assert schedule(1, 100, 25) == [25]
    assert schedule(2, 100, 25) == [pytest.approx(50), 25]
    assert schedule(3, 100, 25, spacing="linear") == [pytest.approx(75), pytest.approx(50), 25]
    assert schedule(4, 1000, 7)[-1] == 7


def test_refusals():
    def choose(**options):
        return choose_units(TWO, SCORES, free, **options)

    with pytest.raises(TargetError, match="give one of ratio, target_params and target_macs, got none"):
        choose()
    with pytest.raises(TargetError, match="got ratio and target_macs"):
        choose(ratio=0.5, target_macs=3)
    for options in ({"ratio": 1.0}, {"ratio": -0.1}, {"ratios": {"*": 1.5}}, {"ratio": float("nan")}):
        with pytest.raises(TargetError, match="share of units to drop, from 0 to below 1, got"):
            choose(**options)
    with pytest.raises(TargetError, match="minimum must be at least 1, got 0"):
        choose(ratio=0.5, minimum=0)
    with pytest.raises(TargetError, match="multiple must be at least 1, got -8"):
        choose(ratio=0.5, multiple=-8)
    with pytest.raises(TargetError, match="'best' is not one of global, local"):
        choose(ratio=0.5, ranking="best")
    with pytest.raises(TargetError, match="'some' is not one of whole, inside, both"):
        choose(ratio=0.5, heads="some")
    with pytest.raises(TargetError, match="'time' is not one of None, mean, macs, params"):
        choose(ratio=0.5, normalise="time")
    with pytest.raises(TargetError, match=r"there is no score for a.weight\[0\]; score all"):
        choose_units(TWO, {}, free, ratio=0.5)
    with pytest.raises(TargetError, match=r"scores of b.weight\[0\] must be 6 finite numbers, got shape \[6\], 5 fin"):
        choose_units(TWO, {**SCORES, "b.weight[0]": torch.tensor([1, 2, 3, 4, 5, float("nan")])}, free, ratio=0.5)
    with pytest.raises(TargetError, match=r"must be 6 finite numbers, got shape \[2\]"):
        choose_units(TWO, {**SCORES, "b.weight[0]": torch.ones(2)}, free, ratio=0.5)
    with pytest.raises(TargetError, match="steps, start and target above zero, got 0, 5 and 3"):
        schedule(0, 5, 3)
    with pytest.raises(TargetError, match="'cubic' is not one of geometric, linear"):
        schedule(2, 5, 3, spacing="cubic")


cases = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(1, 40), min_size=1, max_size=5),
        "k": st.lists(st.sampled_from([1, 2, 4, 6]), min_size=5, max_size=5),
        "seed": st.integers(0, 99),
        "equal": st.booleans(),
        "ranking": st.sampled_from(["local", "global"]),
        "normalise": st.sampled_from([None, "mean", "macs", "params"]),
        "minimum": st.integers(1, 6),
        "multiple": st.sampled_from([1, 2, 3, 8]),
        "ignore": st.lists(st.sampled_from(["l0*", "l1.bias", "l2.weight[[]0]"]), max_size=2),
    }
)


def prepare(case):
    couplings, cost = chain(case["widths"], case["k"])
    scores = random_scores(couplings, case["seed"])
    if case["equal"]:
        scores = {name: values.round() for name, values in scores.items()}
    options = {name: case[name] for name in ("ranking", "normalise", "minimum", "multiple", "ignore")}
    return couplings, cost, scores, options


def check_limits(choice, couplings, scores, options):
    for c in couplings:
        units = choice.get(c.name, np.zeros(0, np.int64)).tolist()
        left = sorted(set(range(c.units)) - set(units))
        assert units == sorted(set(units))
        assert len(left) >= min(c.units, options["minimum"]) >= 1
        if units:
            assert not matches(c, options["ignore"])
            assert len(left) * c.places[0].positions.shape[1] % options["multiple"] == 0
            assert scores[c.name][units].max() <= scores[c.name][left].min()


@settings(max_examples=150, deadline=None)
@given(cases, st.floats(0, 0.99), st.floats(0, 0.99))
def test_ratios_keep_the_limits_are_nested_and_repeat(case, one, other):
    couplings, cost, scores, options = prepare(case)
    small, large = (choose_units(couplings, scores, cost, ratio=r, **options) for r in sorted((one, other)))
    again = choose_units(couplings, scores, cost, ratio=max(one, other), **options)

    for choice in (small, large):
        check_limits(choice, couplings, scores, options)
    assert total(large) <= max(one, other) * sum(c.units for c in couplings) + 1e-6
    assert all(set(units.tolist()) <= set(large.get(name, np.zeros(0)).tolist()) for name, units in small.items())
    assert dropped(large) == dropped(again)


@settings(max_examples=150, deadline=None)
@given(cases, st.floats(0.01, 0.99), st.sampled_from(["params", "macs"]))
def test_targets_in_reach_are_met(case, share, metric):
    couplings, cost, scores, options = prepare(case)
    most = choose_units(couplings, scores, cost, ratio=0.999, **{**options, "ranking": "local"})
    least, start = getattr(cost(most), metric), getattr(cost({}), metric)
    assume(least < start)
    target = least + share * (start - least)
    choice = choose_units(couplings, scores, cost, **{f"target_{metric}": target}, **options)

    check_limits(choice, couplings, scores, options)
    assert getattr(cost(choice), metric) <= target
    with pytest.raises(TargetError, match="is out of reach: at least"):
        choose_units(couplings, scores, cost, **{f"target_{metric}": least - 1}, **options)


def test_a_target_between_two_equal_shares_is_met_to_the_unit():
    """Couplings of one size would otherwise all lose their next unit together."""
    found = [coupling(f"c{i}", 8) for i in range(5)]
    scores = {c.name: torch.arange(8.0) for c in found}

    def cost(choice):
        return Cost(1000 - sum(len(units) for units in choice.values()), 0)

    for gone in (0, 1, 7, 10, 18, 35):
        choice = choose_units(found, scores, cost, target_params=1000 - gone, ranking="local")
        counts = [len(choice.get(c.name, ())) for c in found]
        assert sum(counts) == gone
        assert max(counts) - min(counts) <= 1
