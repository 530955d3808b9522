"""The second phase, what networks cost, statistics and pictures."""

from __future__ import annotations

import copy
import errno
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from family_fakes import SETTINGS, FakeTrain, accuracy
from torch import nn

import morph
from morph.errors import PictureError, SearchError, SearchStateError, StorageError, TargetError
from morph.family.candidate import Candidate, TrialRow
from morph.family.generator import Task
from morph.family.measures import measure
from morph.family.pictures import (
    Point,
    correlations_picture,
    curves_picture,
    front_picture,
    importances_picture,
)
from morph.family.search import found_in, require_reachable, search_family
from morph.family.settings import RANGES, FamilySettings
from morph.family.statistics import not_dominated, overhead, rank_correlations, spread
from morph.family.students import best_student, candidates_of, train_students
from morph.family.study import FamilyStudy
from morph.family.wiring import draw_blueprint
from morph.family.wiring_picture import role_colours, wiring_figure, wiring_picture

pytest.importorskip("optuna")

BEST = Candidate(FamilySettings(3, 2, 0.5, 1, 0.5, 3, 2, 0.5), 7, 4.0, 0.9)
TASK = Task((3, 8, 8), 4, 9_000)


class Seeded(FakeTrain):
    """Accuracies that differ between networks of a family."""

    def __call__(self, model, candidate, epochs, checkpoint):
        outcome = super().__call__(model, candidate, epochs, checkpoint)
        return replace(outcome, accuracy=accuracy(candidate, epochs) + candidate.seed % 97 / 1000)


def test_students_are_drawn_trained_measured_and_saved(tmp_path):
    train = Seeded()
    rows = train_students(BEST, TASK, 3, 5, train, tmp_path)
    assert [wanted for _, wanted in train.calls] == [5, 5, 5]
    assert len({row.candidate.seed for row in rows} | {BEST.seed}) == 4
    assert all(replace(row.candidate, seed=7) == BEST for row in rows)
    for row in rows:
        opened = morph.open_model(tmp_path / f"{row.name}.pt")
        assert sum(p.numel() for p in opened.model.parameters()) == row.measures.params <= 9_000
        assert opened.input_shape == (3, 8, 8)
    assert best_student(rows).accuracy == max(row.accuracy for row in rows)
    assert not list(tmp_path.glob("*.training"))


def test_students_go_on_where_they_were_killed(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train_students(BEST, TASK, 3, 5, Seeded(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_students(BEST, TASK, 3, 5, Seeded(stop_after=2), tmp_path / "parts")
    train = Seeded()
    parts = train_students(BEST, TASK, 3, 5, train, tmp_path / "parts")
    assert len(train.calls) == 1
    assert [(row.name, row.candidate, row.accuracy) for row in parts] == [
        (row.name, row.candidate, row.accuracy) for row in whole
    ]
    assert train_students(BEST, TASK, 2, 5, FakeTrain(stop_after=0), tmp_path / "parts") == parts[:2]


def test_a_student_that_fails_says_why(tmp_path):
    rows = train_students(BEST, TASK, 2, 5, FakeTrain(broken={1: RuntimeError("no memory")}), tmp_path)
    assert [row.accuracy is None for row in rows] == [True, False]
    assert rows[0].reason == "RuntimeError: no memory"
    assert best_student(rows) is rows[1]


def test_students_of_another_family_are_refused(tmp_path):
    train_students(BEST, TASK, 1, 5, FakeTrain(), tmp_path)
    with pytest.raises(SearchStateError, match="made with another epochs"):
        train_students(BEST, TASK, 1, 6, FakeTrain(), tmp_path)
    with pytest.raises(SearchStateError, match="made with another best"):
        train_students(replace(BEST, weight=0.1), TASK, 1, 5, FakeTrain(), tmp_path)
    (tmp_path / "students.json").write_text("{")
    with pytest.raises(SearchStateError, match="not the students of a search"):
        train_students(BEST, TASK, 1, 5, FakeTrain(), tmp_path)


def test_candidates_are_the_same_each_time():
    assert candidates_of(BEST, 3) == candidates_of(BEST, 5)[:3]
    assert candidates_of(BEST, 3) != candidates_of(replace(BEST, seed=8), 3)


def test_memory_is_what_one_sample_more_keeps():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    net = Net()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    found = measure(net, (6,))
    assert found.memory == 4 * (
        6 + 10
    )  # the input for the first weight, the sigmoid's output for itself and the second
    assert (found.params, found.macs) == (6 * 10 + 10 + 10 * 4 + 4, 60 + 40)
    assert 0 < found.latency < 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net.training


def test_memory_of_batch_norms_is_not_moved():
    net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    before = copy.deepcopy(net.state_dict())
    found = measure(net, (3, 8, 8))
    # input of the convolution, its output for the norm, the output of the ReLU
    assert found.memory == 4 * 64 * (3 + 5 + 5)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def row(number, curve, state="complete", **more):
    budgets = {b: curve[b - 1] for b in (1, 2, 4) if b <= len(curve)}
    return TrialRow(number, BEST, state, 0, budgets, tuple(curve), **more)


def spearman(a, b):
    """Pearson's correlation of ranks without ties."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def test_rank_correlations():
    draws = random.Random(0)
    curves = [[draws.random() for _ in range(draws.choice((2, 4)))] for _ in range(12)]
    rows = [row(i, curve) for i, curve in enumerate(curves)] + [row(99, [0.0, 1.0, 0.0, 1.0], "failed")]
    found = {(c.first, c.second): c for c in rank_correlations(rows, (1, 2, 4))}
    long = [curve for curve in curves if len(curve) == 4]
    assert found[1, 2].rho == pytest.approx(spearman([c[0] for c in curves], [c[1] for c in curves]))
    assert found[1, 4].rho == pytest.approx(spearman([c[0] for c in long], [c[3] for c in long]))
    assert found[1, 4].trials == found[2, 4].trials == len(long) < found[1, 2].trials == 12
    few = rank_correlations(rows[:2], (1, 2))
    assert math.isnan(few[0].rho)
    assert math.isnan(rank_correlations([row(i, [0.1, 0.2]) for i in range(5)], (1, 2))[0].rho)


def test_not_dominated_against_a_slow_count():
    draws = random.Random(1)
    values = [(draws.randint(0, 6) / 6, float(draws.randint(0, 6))) for _ in range(40)] + [(math.nan, 0.0)]
    slow = []
    for a in values:
        beaten = math.isnan(a[0])
        for b in values:
            no_worse = b[0] >= a[0] and b[1] <= a[1]
            beaten |= no_worse and (b[0] > a[0] or b[1] < a[1])
        slow.append(not beaten)
    assert not_dominated(values) == slow
    assert 0 < sum(slow) < len(slow)


def test_spread_and_overhead():
    found = spread([0.5, 0.6, 0.9])
    assert (found.mean, found.best) == (pytest.approx(2 / 3), 0.9)
    assert found.sd == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1))
    assert spread([0.5]).sd == 0
    assert spread([]) is None
    assert overhead([row(0, [1], seconds=8.0, overhead=1.0), row(1, [1], seconds=2.0)]) == pytest.approx(0.1)
    assert math.isnan(overhead([]))


def test_the_smallest_network_is_the_smallest():
    draws = random.Random(2)
    settings = replace(SETTINGS, task=Task((3, 32, 32), 10, 1))
    with pytest.raises(TargetError, match=r"the smallest of all families has ([\d,]+) for images of 3x32x32") as caught:
        require_reachable(settings)
    least = int(str(caught.value).split("has ")[1].split(" ")[0].replace(",", ""))
    require_reachable(replace(settings, task=replace(settings.task, max_params=least)))
    low = {name: ends[0] for name, ends in RANGES.items()}
    for seed in range(5):
        other = FamilySettings(**{**low, "middle_probability": draws.uniform(0.2, 1), "bottom_rewiring": 0.9})
        assert settings.task.params(draw_blueprint(other, seed), 1) >= least


def test_a_search_from_python(tmp_path, monkeypatch):
    from family_fakes import draw_nothing

    monkeypatch.setattr("morph.family.running.draw_network", draw_nothing)
    changes = []
    found = search_family(SETTINGS, FakeTrain(), tmp_path / "new" / "folder", on_change=changes.append)
    assert len(found.rows) == 10
    assert found.best.accuracy == max(row.accuracies.get(4, 0) for row in found.rows)
    assert [(c.first, c.second, c.trials) for c in found.correlations] == [(1, 2, 8), (1, 4, 5), (2, 4, 5)]
    assert json.loads(json.dumps(found.to_json()))["best"]["number"] == found.best.number
    assert len(changes) > 14
    empty = FamilyStudy(str(tmp_path / "journal"), SETTINGS)
    with pytest.raises(SearchError, match="no trial was trained yet"):
        found_in(empty)


def test_two_searches_in_one_folder_are_refused(tmp_path):
    def inner(model, candidate, epochs, checkpoint):
        search_family(SETTINGS, FakeTrain(), tmp_path)

    with pytest.raises(SearchStateError, match="another process searches here"):
        search_family(SETTINGS, inner, tmp_path)


def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path, monkeypatch):
    from family_fakes import draw_nothing

    monkeypatch.setattr("morph.family.running.draw_network", draw_nothing)
    full = {4: OSError(errno.ENOSPC, "No space left on device")}
    with pytest.raises(StorageError, match=r"could not be read or written: .*No space left on device.*goes on from it"):
        search_family(SETTINGS, FakeTrain(broken=full), tmp_path)
    train = FakeTrain()
    assert len(search_family(SETTINGS, train, tmp_path).rows) == 10
    assert len(train.calls) == 14 - 3


def test_pictures(tmp_path):
    rows = [row(i, [0.1 * i, 0.2, 0.3, 0.4][: 2 + i % 2 * 2]) for i in range(6)]
    found = rank_correlations(rows, (1, 2, 4))
    networks = {
        f"net {n}": draw_blueprint(FamilySettings(n, 4, 0.5, m, 0.5, 3, 2, 0.5), n) for n, m in ((3, 1), (10, 10))
    }
    points = {"parameters": [Point("0", 0.9, 10.0), Point("teacher", 0.95, 100.0, teacher=True)]}
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        curves_picture(rows, folder / "a.svg", title="t")
        correlations_picture({"with a teacher": found, "labels alone": found}, folder / "b.svg", title="t")
        importances_picture({"top_nodes": 0.7, "weight": 0.3}, folder / "c.svg", title="t")
        wiring_picture(networks, folder / "d.svg", title="t")
        front_picture(points, folder / "e.svg", title="t")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    text = (tmp_path / "first" / "b.svg").read_text()
    assert "with a teacher" in text
    assert f"n = {found[0].trials}" in text
    assert "top nodes" in (tmp_path / "first" / "c.svg").read_text()
    figure = wiring_figure(networks, title="t")
    arrows = [p for axes in figure.axes for p in axes.patches if type(p).__name__ == "FancyArrowPatch"]
    graphs = [g for b in networks.values() for g in (b.top, *(middle for middle, _ in b.cells))]
    assert len(arrows) == sum(value > 0 for graph in graphs for read in graph for value in read)
    with pytest.raises(PictureError, match="no trained networks"):
        curves_picture([], tmp_path / "x.svg", title="t")


def test_roles():
    chain_and_lone = ((0,), (1,), (0,))
    first, last, both = role_colours(chain_and_lone)
    assert len({first, last, both}) == 3
    assert role_colours(((0,), (1,), (2,)))[1] not in {first, last, both}
