"""Real trainings inside a search: budgets are parts of one run, with a teacher and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_fakes import SMALL_RANGES
from torch import nn

from morph.errors import TeachingError
from morph.family.budgets import Budgets
from morph.family.candidate import Candidate
from morph.family.fitting import FitTrain
from morph.family.generator import Task, draw_network
from morph.family.rounds import run_rounds
from morph.family.settings import FamilySettings
from morph.family.study import FamilyStudy, SearchSettings
from morph.teaching.distillation import Distillation
from morph.teaching.objective import Labels
from morph.training.fitting import fit

pytest.importorskip("optuna")

FAMILY = FamilySettings(3, 2, 0.5, 1, 0.5, 3, 2, 0.5)
TASK = Task((3, 8, 8), 4, 7_000)


def data(number, seed):
    """Images whose class is the brightest quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (number,), generator=generator)
    images = torch.randn(number, 3, 8, 8, generator=generator)
    for quarter in range(4):
        rows, columns = 4 * (quarter // 2), 4 * (quarter % 2)
        images[labels == quarter, :, rows : rows + 4, columns : columns + 4] += 1
    return images, labels


def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, 4))


def trainer(with_teacher=True, epochs=4, **options):
    numbers = {"batch_size": 16, "lr": 0.05, **options}
    return FitTrain(teacher() if with_teacher else None, data(48, 0), data(32, 1), epochs, **numbers)


CANDIDATE = Candidate(FAMILY, 5, 3.0, 0.7)


def test_budgets_are_parts_of_one_run(tmp_path):
    torch.set_num_threads(1)
    whole = draw_network(FAMILY, TASK, 5).model
    straight = trainer()(whole, CANDIDATE, 4, tmp_path / "whole")
    for epochs in (1, 2, 2, 4):  # the second 2: killed before it was written down
        part = draw_network(FAMILY, TASK, 5).model
        outcome = trainer()(part, CANDIDATE, epochs, tmp_path / "parts")
        assert outcome.curve == straight.curve[:epochs]
        assert outcome.accuracy == straight.curve[epochs - 1]
    assert len(straight.curve) == 4
    states = whole.state_dict(), part.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_pause_keeps_the_learning_rates_of_the_whole_run(tmp_path):
    numbers = {"epochs": 4, "batch_size": 16, "schedule": "cosine", "checkpoint": tmp_path / "state"}
    rates = []
    for pause in (1, 3, None):
        torch.manual_seed(0)
        fitted = fit(Labels(teacher()), data(48, 0), pause_after=pause, **numbers)
        rates.append([row["lr"] for row in fitted.history])
    assert [len(found) for found in rates] == [1, 3, 4]
    assert rates[2][:3] == rates[1]
    assert rates[2][0] > 2 * rates[2][3]


def test_the_objective_is_that_of_the_paper():
    model = draw_network(FAMILY, TASK, 5).model.eval()
    x, y = data(9, 3)
    objective = trainer().objective(model, CANDIDATE)
    assert isinstance(objective, Distillation)
    student, wanted = model(x), teacher()(x)
    soft = torch.softmax(wanted / 3, 1)
    divergence = (soft * (soft.log() - torch.log_softmax(student / 3, 1))).sum(1).mean()
    labels = -torch.log_softmax(student, 1)[torch.arange(9), y].mean()
    torch.testing.assert_close(objective(x, y).loss, 0.3 * labels + 0.7 * divergence)
    plain = trainer(with_teacher=False).objective(model, replace(CANDIDATE, temperature=None, weight=None))
    assert isinstance(plain, Labels)
    torch.testing.assert_close(plain(x, y).loss, labels)


@pytest.mark.parametrize("with_teacher", [True, False])
def test_a_search_of_real_trainings(tmp_path, with_teacher):
    small = Task((3, 8, 8), 4, 7_000)
    settings = SearchSettings(small, Budgets((1, 2)), distil=with_teacher, ranges=SMALL_RANGES)
    study = FamilyStudy(str(tmp_path / "journal"), settings)
    run_rounds(study, 1, trainer(with_teacher, 2), tmp_path)
    rows = study.rows()
    assert len(rows) == 4
    assert all(row.state in ("complete", "stopped") for row in rows)
    for row in rows:
        assert row.curve[row.epochs - 1] == pytest.approx(row.accuracy, abs=1e-6)
        assert (row.candidate.temperature is not None) == with_teacher
        assert row.seconds > 0
        assert row.params <= 7_000


def test_a_learning_rate_that_diverges_fails_the_trial_alone(tmp_path):
    settings = SearchSettings(TASK, Budgets((1,)), ranges=SMALL_RANGES)
    study = FamilyStudy(str(tmp_path / "journal"), settings)
    run_rounds(study, 2, trainer(epochs=1, lr=1e38), tmp_path)
    rows = study.rows()
    assert [row.state for row in rows] == ["failed"] * 2
    assert all("not a finite number" in row.reason for row in rows)


def test_a_teacher_of_other_classes_ends_the_search(tmp_path):
    wrong = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    train = FitTrain(wrong, data(48, 0), data(32, 1), 2, batch_size=16)
    with pytest.raises(TeachingError):
        train(draw_network(FAMILY, TASK, 5).model, CANDIDATE, 1, tmp_path / "state")
