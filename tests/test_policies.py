"""Decisions without any model: order, saturation, targets."""

from __future__ import annotations

import pytest

from morph.errors import TargetError
from morph.policies import Grouped, Ledger, decide


def conv(name: str, groups: int, params: int = 100, macs: int = 1000) -> Grouped:
    return Grouped(name, groups, (groups, 1, 1, 1), params, macs)


def ledger() -> Ledger:
    cells = {"a": [conv("a.0", 4), conv("a.1", 9, 10, 70)], "b": [], "c": [conv("c.0", 8, 50, 300)]}
    return Ledger(cells, params=1000, macs=20000)


def scores(**values: float):
    return lambda: {"a": 0.0, "b": 9.0, "c": 0.0, **values}


def test_fisher_takes_the_highest_cell_until_it_is_saturated_then_the_next():
    book = ledger()
    steps = decide(book, "fisher", "params", book.reach()["params"], probe=scores(a=2.0, c=1.0))
    assert [s.cell for s in steps] == ["a", "a", "c", "c", "c"]
    assert [dict(s.groups) for s in steps] == [
        {"a.0": 2, "a.1": 3},
        {"a.0": 1, "a.1": 1},
        {"c.0": 4},
        {"c.0": 2},
        {"c.0": 1},
    ]
    assert [s.params for s in steps] == [1120, 1380, 1430, 1530, 1730]
    assert [s.macs for s in steps] == [21140, 23560, 23860, 24460, 25660]


def test_the_score_is_asked_for_before_each_step_and_may_change_the_order():
    answers = iter([{"a": 1.0, "c": 2.0}, {"a": 2.0, "c": 1.0}, {"a": 1.0, "c": 2.0}])
    steps = decide(ledger(), "fisher", "params", 1250, probe=lambda: next(answers))
    assert [(s.cell, s.score) for s in steps] == [("c", 2.0), ("a", 2.0), ("c", 2.0)]


def test_fisher_per_param_divides_by_what_the_step_adds():
    steps = decide(ledger(), "fisher-per-param", "params", 1040, probe=scores(a=2.0, c=1.0))
    assert [s.cell for s in steps] == ["c"]
    assert steps[0].params == 1050


def test_uniform_goes_round_and_passes_over_what_is_saturated():
    steps = decide(ledger(), "uniform", "params", 1730, probe=scores())
    assert [s.cell for s in steps] == ["a", "c", "a", "c", "c"]


def test_random_depends_on_the_seed_alone():
    runs = [
        [s.cell for s in decide(ledger(), "random", "params", 1730, seed=seed, probe=scores())]
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert runs[0] == runs[1]
    assert len({tuple(run) for run in runs}) > 1


def test_macs_can_be_the_target():
    steps = decide(ledger(), "uniform", "macs", 21500, probe=scores())
    assert [s.macs for s in steps] == [21140, 21440, 23860]


@pytest.mark.parametrize(
    ("fit", "target", "sizes"),
    [
        ("first", 1150, [1120, 1170]),
        ("closest", 1150, [1120, 1170]),
        ("closest", 1140, [1120]),
        ("under", 1150, [1120]),
        ("under", 1170, [1120, 1170]),
        ("closest", 1050, None),
        ("under", 1050, None),
    ],
)
def test_where_it_stops(fit, target, sizes):
    if sizes is None:
        with pytest.raises(
            TargetError, match=rf"--fit {fit}: the first step leads from 1,000 to 1,120, past the target of 1,050"
        ):
            decide(ledger(), "uniform", "params", target, fit=fit, probe=scores())
    else:
        assert [s.params for s in decide(ledger(), "uniform", "params", target, fit=fit, probe=scores())] == sizes


def test_targets_that_cannot_be_met():
    with pytest.raises(TargetError, match="the target of 1,000 parameters is not above the 1,000 that the model has"):
        decide(ledger(), "uniform", "params", 1000, probe=scores())
    with pytest.raises(
        TargetError,
        match="no regrouping reaches 1,731 parameters: with every grouped convolution dense the model has 1,730; "
        "widening",
    ):
        decide(ledger(), "uniform", "params", 1731, probe=scores())
    with pytest.raises(
        TargetError,
        match="no regrouping reaches 99,999 multiply-adds: with every grouped convolution dense the model has 25,660",
    ):
        decide(ledger(), "uniform", "macs", 99999, probe=scores())


def test_edits_go_from_the_first_groups_to_the_last():
    book = ledger()
    steps = decide(book, "uniform", "params", 1400, probe=scores())
    assert {(e.module, e.groups, e.to) for e in book.edits(steps)} == {("a.0", 4, 1), ("a.1", 9, 1), ("c.0", 8, 4)}
