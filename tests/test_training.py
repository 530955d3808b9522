"""The training loop against a plain one, stopped and taken up, and what it refuses."""

from __future__ import annotations

import csv
import itertools
import math

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import morph
from morph.augmentation import Augmented
from morph.batches import one_round
from morph.errors import DataError, DivergedError, SearchError, TrainingError, TrainingStateError
from morph.images import LabelledImages
from morph.teaching.objective import Labels, Step
from morph.training.loop import _ROUND
from morph.training.options import FitOptions

CPU = torch.device("cpu")


def net(seed=0, dropout=0.2):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(dropout), nn.Linear(20, 3))
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), *head)


def images(number=22, seed=1, size=6):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 3, size, size, generator=draw)
    return LabelledImages(x, (x.mean((1, 2, 3)) * 40).long() % 3)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, two):
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def cpu(**rest):
    return Fabric(accelerator="cpu", devices=1, **rest)


OPTIONS = {
    "sgd": {"lr": 0.05, "nesterov": True, "schedule": "step", "step_epochs": 1},
    "adam": {"lr": 0.01, "optimizer": "adam", "schedule": "cosine"},
    "adamw": {"optimizer": "adamw", "schedule": "constant", "clip": 0.3},
}


def plain(model, data, epochs, batch_size, seed, make, rate, clip=None):
    """The obvious loop."""
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    for epoch in range(epochs):
        for x, y in one_round(data, batch_size, seed + _ROUND * (epoch + 1), CPU):
            for group in optimizer.param_groups:
                group["lr"] = rate(epoch)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


@pytest.mark.parametrize("augmented", [False, True])
def test_it_is_the_plain_loop_to_the_bit(augmented):
    data = Augmented(images(), pad=1) if augmented else images()
    ours, theirs = net(), net()
    before = torch.get_rng_state()
    fitted = morph.fit(Labels(ours), data, fabric=cpu(), epochs=3, batch_size=5, seed=7, **OPTIONS["sgd"])
    assert torch.equal(torch.get_rng_state(), before)

    def make(p):
        return torch.optim.SGD(p, 0.05, 0.9, weight_decay=5e-4, nesterov=True)

    plain(theirs, data, 3, 5, 7, make, lambda epoch: 0.05 * 0.5**epoch)
    assert equal(state(ours), state(theirs))
    assert not equal(state(ours), state(net()))
    assert fitted.step == 15
    assert [row["step"] for row in fitted.history] == [5, 10, 15]


def test_clipping_and_another_optimizer():
    ours, theirs = net(), net()
    morph.fit(Labels(ours), images(), fabric=cpu(), epochs=2, batch_size=5, **OPTIONS["adamw"])

    def make(p):
        return torch.optim.AdamW(p, 1e-3, weight_decay=5e-4)

    plain(theirs, images(), 2, 5, 0, make, lambda epoch: 1e-3, clip=0.3)
    assert equal(state(ours), state(theirs))


@pytest.mark.parametrize("kind", sorted(OPTIONS))
@pytest.mark.parametrize("stop", [1, 7, 10, 14])
def test_stopped_and_taken_up_it_ends_with_the_same_weights(tmp_path, kind, stop):
    data, test = Augmented(images(), pad=1), images(9, seed=4)
    whole, two = net(), net()
    common = {"validation": test, "epochs": 3, "batch_size": 5, **OPTIONS[kind]}
    one = morph.fit(Labels(whole), data, fabric=cpu(), **common)
    file, calls = tmp_path / "run.state", itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        morph.fit(Labels(two), data, fabric=cpu(), checkpoint=file, should_stop=lambda: next(calls) == stop, **common)
    again = net()
    other = morph.fit(Labels(again), data, fabric=cpu(), checkpoint=file, **common)
    assert equal(state(whole), state(again))
    rows = [[{**row, "seconds": 0} for row in fitted.history] for fitted in (one, other)]
    assert rows[0] == rows[1]
    assert one.best_epoch == other.best_epoch
    assert equal(one.best, other.best)


def test_a_loader_of_the_user_is_taken_up_too(tmp_path):
    x = images()
    loader = DataLoader(TensorDataset(x.images, x.labels), batch_size=4, shuffle=True)
    whole, again, calls = net(), net(), itertools.count(1)
    morph.fit(Labels(whole), loader, fabric=cpu(), epochs=2, lr=0.1)
    common = {"fabric": cpu(), "checkpoint": tmp_path / "s", "epochs": 2, "lr": 0.1}
    with pytest.raises(KeyboardInterrupt):
        morph.fit(Labels(net()), loader, should_stop=lambda: next(calls) == 4, **common)
    morph.fit(Labels(again), loader, **common)
    assert equal(state(whole), state(again))


def test_parts_of_a_batch_give_the_step_of_the_whole():
    """In float64, without batch norm and dropout, parts of unequal sizes give the gradients of the batch."""
    results = []
    for parts in (1, 3, 50):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3)).double()
        x = images()
        data = x.images.double(), x.labels
        morph.fit(Labels(model), data, fabric=cpu(), epochs=2, batch_size=7, lr=0.1, accumulate=parts)
        results.append(model[1].weight.detach().clone())
    assert (results[0] - results[1]).abs().max() < 1e-14
    assert (results[0] - results[2]).abs().max() < 1e-14


def test_the_history_is_what_a_twin_counts():
    data, test = images(), images(13, seed=9)
    model = net(dropout=0.0)
    fitted = morph.fit(Labels(model), data, validation=test, fabric=cpu(), epochs=2, batch_size=22, lr=0.1)
    before = net(dropout=0.0).train()
    order = next(one_round(data, 22, _ROUND, CPU))
    logits = before(order[0]).detach().numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert fitted.history[0]["loss"] == pytest.approx(-logs[np.arange(22), order[1].numpy()].mean(), rel=1e-5)
    assert fitted.history[0]["top1"] == pytest.approx((logits.argmax(1) == order[1].numpy()).mean())
    assert fitted.history[0]["part_labels"] == fitted.history[0]["loss"]
    scores = morph.evaluate(model, test)
    last = fitted.last
    assert (last["val_top1"], last["val_top5"]) == (scores.top1, scores.top5)
    assert last["val_loss"] == pytest.approx(scores.loss)
    assert fitted.best_epoch in (1, 2)
    top = max(row["val_top1"] for row in fitted.history)
    assert fitted.history[fitted.best_epoch - 1]["val_top1"] == top


def test_validation_is_now_and_then_and_at_the_end():
    fitted = morph.fit(
        Labels(net()), images(), validation=images(5), fabric=cpu(), epochs=5, batch_size=22, validate_every=2
    )
    assert ["val_top1" in row for row in fitted.history] == [False, True, False, True, True]


def test_flags_hooks_and_other_parameters_stay():
    model = net()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    bias, hooks = model[0].bias.clone(), dict(model[0]._forward_hooks)
    morph.fit(Labels(model), images(), fabric=cpu(), epochs=1, batch_size=5, lr=0.1, channels_last=True)
    assert [m.training for m in model] == [True, False, True, True, True, True, True]
    assert torch.equal(bias, model[0].bias)
    assert dict(model[0]._forward_hooks) == hooks
    assert seen
    assert model[0].weight.is_contiguous()
    handle.remove()


def test_mixed_precision_and_channels_last():
    model = net()
    options = {"epochs": 2, "batch_size": 8, "lr": 0.1, "channels_last": True}
    fitted = morph.fit(Labels(model), images(), validation=images(6), fabric=cpu(precision="bf16-mixed"), **options)
    assert model[0].weight.dtype == torch.float32
    assert math.isfinite(fitted.last["val_loss"])


class Pairs:
    """Data whose targets are a tuple."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size, seed):
        for x, y in self.images.batches(batch_size, seed):
            yield x, (y, torch.nn.functional.one_hot(y, 3).float())


class Bits(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, x, y):
        logits = self.student(x)
        loss = F.binary_cross_entropy_with_logits(logits, y[1])
        return Step(loss, {"bits": loss.detach()}, logits)


def test_targets_may_be_a_tuple():
    fitted = morph.fit(
        Bits(net()), Pairs(images()), validation=Pairs(images(7)), fabric=cpu(), epochs=2, batch_size=5, accumulate=2
    )
    assert set(fitted.last) >= {"part_bits", "val_top1"}


def test_the_log_is_whole_after_each_round(tmp_path):
    file, seen = tmp_path / "log.csv", []

    def tell(now):
        if now.row:
            seen.append(file.read_text())

    fitted = morph.fit(
        Labels(net()),
        images(),
        fabric=cpu(),
        epochs=2,
        batch_size=5,
        log=file,
        on_progress=tell,
    )
    rows = list(csv.DictReader(file.open()))
    assert [len(list(csv.DictReader(text.splitlines()))) for text in seen] == [1, 2]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in fitted.history]


def test_no_number_stops_and_keeps_the_last_good_state(tmp_path):
    file = tmp_path / "run.state"
    calls = itertools.count(1)

    class Bad(Labels):
        def forward(self, x, y):
            step = super().forward(x, y)
            return step if next(calls) < 8 else step._replace(loss=step.loss * float("nan"))

    common = {"fabric": cpu(), "checkpoint": file, "epochs": 4, "batch_size": 5, "lr": 0.1}
    with pytest.raises(TrainingError, match=r"not a finite number after step 10 .* the last good state is in"):
        morph.fit(Bad(net()), images(), **common)
    saved = torch.load(file, weights_only=True)
    assert saved["done"]["step"] == 5
    assert all(torch.isfinite(value).all() for value in saved["objective"].values() if value.is_floating_point())


def test_outputs_that_are_no_numbers_end_the_run(tmp_path):
    x, y = next(iter(images().batches(5, 0)))
    bad = torch.full_like(x, torch.nan), y
    common = {"fabric": cpu(), "checkpoint": tmp_path / "run.state", "epochs": 2, "batch_size": 5}
    with pytest.raises(DivergedError, match=r"validation after step 5: the outputs .* are not finite") as caught:
        morph.fit(Labels(net()), images(), validation=bad, **common)
    assert caught.value.exit_code == 1
    assert isinstance(caught.value, TrainingError)
    assert isinstance(caught.value, SearchError)


def test_another_run_is_refused(tmp_path):
    file = tmp_path / "run.state"
    common = {"fabric": cpu(), "checkpoint": file, "epochs": 2, "batch_size": 5}
    morph.fit(Labels(net()), images(), **common)
    for model, data, rest, what in (
        (net(1), images(), {}, "weights is"),
        (net(), images(seed=2), {}, "data is"),
        (net(), images(), {"seed": 3}, "seed is 0 there and 3 here"),
        (net(), images(), {"identity": {"loss": "kd"}}, "loss is None there and 'kd' here"),
    ):
        with pytest.raises(TrainingStateError, match=what):
            morph.fit(Labels(model), data, **common, **rest)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingStateError, match="not a checkpoint of a training run"):
        morph.fit(Labels(net()), images(), **common)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    import morph.search_checkpoint

    file = tmp_path / "run.state"
    common = {"fabric": cpu(), "checkpoint": file, "epochs": 2, "batch_size": 5, "lr": 0.1}
    calls = itertools.count(1)
    with pytest.raises(KeyboardInterrupt):
        morph.fit(Labels(net()), images(), should_stop=lambda: next(calls) == 3, **common)
    before = file.read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(morph.search_checkpoint.torch, "save", full)
        with pytest.raises(morph.errors.OutputError, match="No space left"):
            morph.fit(Labels(net()), images(), **common)
    assert file.read_bytes() == before
    whole, again = net(), net()
    morph.fit(Labels(again), images(), **common)
    morph.fit(Labels(whole), images(), fabric=cpu(), epochs=2, batch_size=5, lr=0.1)
    assert equal(state(whole), state(again))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "epochs of 0"),
        ({"lr": -1.0}, "lr of -1.0"),
        ({"lr": float("nan")}, "lr of nan"),
        ({"optimizer": "lion"}, "expected one of sgd, adam, adamw"),
        ({"schedule": "poly"}, "expected one of multistep"),
        ({"momentum": 1.0}, "momentum of 1.0"),
        ({"milestones": (0.5, 1.5)}, "shares of the run"),
        ({"nesterov": True, "optimizer": "adam"}, "Nesterov"),
    ],
)
def test_numbers_out_of_range(options, text):
    with pytest.raises(TrainingError, match=text):
        FitOptions(**options)


def test_what_does_not_fit():
    with pytest.raises(DataError, match="the student tells 3 classes apart, the data has label 4"):
        x = images()
        morph.fit(Labels(net()), (x.images, x.labels + 2), fabric=cpu(), epochs=1)
    with pytest.raises(morph.errors.TraceError, match="does not accept inputs"):
        morph.fit(Labels(net()), (torch.randn(4, 1, 6, 6), torch.zeros(4).long()), fabric=cpu(), epochs=1)
    with pytest.raises(TrainingError, match="has no student"):
        morph.fit(net(), images(), fabric=cpu(), epochs=1)
    with pytest.raises(TrainingError, match="nothing to train"):
        morph.fit(Labels(net().requires_grad_(False)), images(), fabric=cpu(), epochs=1)
    with pytest.raises(DataError, match="no batch"):
        morph.fit(Labels(net()), [], fabric=cpu(), epochs=1)
    with pytest.raises(DataError, match="a batch must be a pair"):
        morph.fit(Labels(net()), [torch.zeros(3)], fabric=cpu(), epochs=1)


def test_data_that_ends_early(tmp_path):
    class Short:
        def __len__(self):
            return 12

        def batches(self, batch_size, seed):
            yield from itertools.islice(images(12).batches(batch_size, seed), 2)

    with pytest.raises(DataError, match=r"round 1 gave 2 of 4 batches; the last good state"):
        morph.fit(Labels(net()), Short(), fabric=cpu(), epochs=1, batch_size=3, checkpoint=tmp_path / "s")
