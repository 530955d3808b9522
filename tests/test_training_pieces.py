"""Learning rates against torch's, shares of batches, logs, evaluation, and the picture."""

from __future__ import annotations

import math

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR

import morph
from morph.errors import DataError, PictureError, TrainingError
from morph.teaching.objective import Labels
from morph.training.logs import tensorboard_logger
from morph.training.options import FitOptions
from morph.training.rounds import checked, parts, round_in_order, share
from morph.training_picture import training_figure, training_picture


def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        ({"epochs": 200}, lambda o: MultiStepLR(o, [60, 120, 160], 0.2)),
        ({"epochs": 300, "milestones": (0.5, 0.85), "gamma": 0.1}, lambda o: MultiStepLR(o, [150, 255], 0.1)),
        ({"epochs": 70, "schedule": "step"}, lambda o: StepLR(o, 20, 0.5)),
        ({"epochs": 11, "schedule": "constant"}, lambda o: StepLR(o, 1000)),
    ],
)
def test_learning_rates_of_rounds_are_those_of_torch(options, make):
    numbers, theirs, length = FitOptions(**options), optimizer(), 391
    schedule = make(theirs)
    for epoch in range(numbers.epochs):
        rate = theirs.param_groups[0]["lr"]
        for step in (0, length // 2, length - 1):
            assert numbers.learning_rate(epoch * length + step, length) == pytest.approx(rate, rel=1e-12)
        theirs.step()
        schedule.step()


def test_the_cosine_is_that_of_torch_step_by_step():
    numbers, theirs = FitOptions(epochs=7, schedule="cosine"), optimizer()
    schedule = CosineAnnealingLR(theirs, 7 * 13)
    for step in range(7 * 13):
        assert numbers.learning_rate(step, 13) == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        theirs.step()
        schedule.step()


def test_a_warm_up_grows_to_the_rate():
    numbers = FitOptions(epochs=4, schedule="constant", lr=0.3, warmup_epochs=1.5)
    rates = [numbers.learning_rate(step, 10) for step in range(40)]
    assert rates[:15] == pytest.approx([0.3 * (step + 1) / 15 for step in range(15)])
    assert rates[15:] == [0.3] * 25


def test_shares_and_parts_are_all_of_a_batch_and_weigh_it():
    x = torch.arange(11.0)
    for world in (1, 2, 3, 8, 15):
        total, seen = 0.0, []
        for rank in range(world):
            (mine, labels), weight = share((x, (x.long(), x)), rank, world)
            assert torch.equal(mine, labels[1])
            total += float(mine.mean()) * weight / world
            seen += mine.tolist() if weight else []
        assert sorted(seen) == x.tolist()
        assert total == pytest.approx(5.0)
    for number in (1, 2, 4, 11, 50):
        pieces = list(parts((x, x.long()), number))
        assert torch.cat([piece[0] for piece, _ in pieces]).tolist() == x.tolist()
        assert sum(float(piece[0].mean()) * weight for piece, weight in pieces) == pytest.approx(5.0)
        assert len(pieces) == min(number, 11)


def test_what_is_no_batch():
    assert checked([torch.zeros(3, 2), [torch.zeros(3), torch.zeros(3)]])[1][0].shape == (3,)
    for wrong in (torch.zeros(2), (torch.zeros(2),), (torch.zeros(2), 3), (torch.zeros(2), ()), None):
        with pytest.raises(DataError, match="a batch must be a pair"):
            checked(wrong)
    with pytest.raises(DataError, match="3 inputs and 2 targets"):
        checked((torch.zeros(3), torch.zeros(2)))


def test_an_evaluation_sees_each_sample_once_and_moves_no_random_state():
    class Drawing:
        """Data whose order comes from the global state."""

        def __len__(self):
            return 10

        def batches(self, batch_size, seed):
            while True:
                for pick in torch.randperm(10).split(batch_size):
                    yield pick[:, None].float(), pick

    before = torch.get_rng_state()
    seen = torch.cat([y for _, y in round_in_order(Drawing(), 4)])
    assert sorted(seen.tolist()) == list(range(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_outputs_are_no_hits_for_nothing():
    """A model that always says the same is right for one class of ten, and for five of ten."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    scores = morph.evaluate(model, (torch.randn(50, 4), torch.arange(50) % 10), batch_size=7)
    assert (scores.top1, scores.top5) == (0.1, 0.5)
    assert scores.loss == pytest.approx(math.log(10))
    assert sorted(scores.class_top1) == [0.0] * 9 + [1.0]


def test_a_model_is_as_it_was_after_an_evaluation():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    morph.evaluate(model, (torch.randn(8, 4), torch.arange(8) % 3))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True]
    with pytest.raises(TrainingError, match="8 of 8 samples are not finite"):
        morph.evaluate(model, (torch.full((8, 4), torch.nan), torch.arange(8) % 3))


def test_tensorboard_gets_what_the_history_says(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[tensorboard_logger(tmp_path / "events")])
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    fitted = morph.fit(
        Labels(nn.Linear(4, 3)), (x, y), validation=(x, y), fabric=fabric, epochs=3, batch_size=5, log_prefix="a/"
    )
    fabric.logger.finalize("success")
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("a/val_top1")]
    assert found == [(row["step"], pytest.approx(row["val_top1"])) for row in fitted.history]


def test_without_tensorboard_there_is_a_way_out(monkeypatch, tmp_path):
    from lightning_fabric.loggers import tensorboard

    monkeypatch.setattr(tensorboard, "_TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr(tensorboard, "_TENSORBOARDX_AVAILABLE", False)
    with pytest.raises(TrainingError, match="pip install tensorboard"):
        tensorboard_logger(tmp_path)


def test_the_picture_shows_both_curves_and_the_teacher(tmp_path):
    rows = [{"epoch": i, "loss": 1 / i, "top1": i / 9, "val_loss": 2 / i, "val_top1": i / 10} for i in range(1, 6)]
    del rows[1]["val_top1"]
    losses, hits = training_figure(rows, title="t", teacher=0.9).axes
    assert [len(line.get_xdata()) for line in hits.lines] == [5, 4, 2]
    assert list(losses.lines[1].get_ydata()) == [2 / i for i in range(1, 6)]
    training_picture(rows, tmp_path / "one.svg", title="t")
    training_picture(rows, tmp_path / "two.svg", title="t")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    with pytest.raises(PictureError, match="no rounds"):
        training_picture([], tmp_path / "none.svg", title="t")
