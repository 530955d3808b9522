"""A search from teacher to student, on nets of several kinds."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
import torch
from models import Snapshot, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2, ResNet, VisionTransformer
from torchvision.models.resnet import BasicBlock

import morph
from morph.augmentation import Augmented
from morph.errors import DataError, SearchStateError, TargetError
from morph.images import LabelledImages
from morph.sample import cifar10
from morph.search_losses import soft_cross_entropy
from morph.student_search import search_student
from morph.zoo import build

X = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 10
FAST = {"epochs": 5, "batch_size": 8, "lr": 0.01, "count_every": 3}


class Tiny(nn.Module):
    """A small dense net: what comes in is read by every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in (7, 12, 17))
        self.convs = nn.ModuleList(nn.Conv2d(c, 5, 3, padding=1, bias=False) for c in (7, 12))
        self.head = nn.Linear(17, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.convs[0](torch.relu(self.norms[0](x)))], 1)
        x = torch.cat([x, self.convs[1](torch.relu(self.norms[1](x)))], 1)
        return self.head(torch.relu(self.norms[2](x)).mean((2, 3)))


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Tiny())


NETS = {
    "dense": tiny,
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "mobilenet": lambda: MobileNetV2(num_classes=10, width_mult=0.1),
    "vit": lambda: VisionTransformer(16, 4, 2, 2, 12, 20, num_classes=10),
}


@pytest.mark.parametrize("name", NETS)
def test_a_student_of_the_size_asked_for_comes_out(name):
    torch.manual_seed(0)
    teacher = NETS[name]()
    was = Snapshot(teacher)
    before = morph.count(teacher, X[:1])
    target = round((0.9 if name == "vit" else 0.6) * before.macs)  # all gates of so small a transformer save a quarter
    found = search_student(teacher, (X, Y), target_macs=target, **FAST)
    assert was.same()
    after = morph.count(found.model, X[:1])
    assert found.record.after == {"params": after.params, "macs": after.macs}
    assert found.record.before == {"params": before.params, "macs": before.macs}
    assert 0.3 * before.macs < after.macs <= target
    record = json.loads(json.dumps(found.record.to_json()))
    assert record["gates_open"] < record["gates_total"]
    assert record["max_abs_diff"] <= 1e-9
    assert record["checks"][0]["passed"]
    assert sum(row["closed"] for row in record["drops"]) == record["gates_total"] - record["gates_open"]
    assert record["history"][-1]["step"] == record["steps"] <= 15
    assert not any("gate" in name for name in found.model.state_dict())
    loss = F.cross_entropy(found.model(X), Y)
    loss.backward()
    again = morph.replay(teacher, morph.Plan.from_json(record["plan"]), X[:2], verify=False)
    pairs = zip(found.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert ("(class_token, encoder.pos_embedding)" in record["weights"]) == (name == "vit")


@pytest.mark.parametrize("mode", ["kd-weighted", "kd", "np-weighted", "np"])
def test_modes(mode):
    found = search_student(tiny(), (X, Y), target_params=700, mode=mode, **FAST)
    assert found.record.after["params"] <= 700
    alphas = [site["alpha_min"] for site in found.record.details["sites"]]
    assert (min(alphas) < 1) == mode.endswith("-weighted")
    assert (found.record.details["history"][0]["kl"] is None) == mode.startswith("np")


@pytest.mark.parametrize("weighting", ["params", "memory", "latency"])
def test_weightings(weighting):
    found = search_student(tiny(), (X, Y), target_macs=250_000, weighting=weighting, **FAST)
    assert found.record.after["macs"] <= 250_000
    assert found.record.options["weighting"] == weighting


def test_a_loss_of_the_users():
    seen = []

    def loss(student, teacher, labels):
        seen.append(teacher.shape)
        return soft_cross_entropy(student, teacher)

    search_student(tiny(), (X, Y), target_params=700, loss=loss, **FAST)
    assert seen[0] == (8, 10)


def test_the_papers_count():
    teacher = tiny()
    counts = morph.count(teacher, X[:1])
    whole = counts.macs + counts.elementwise["batch_norm"]
    found = search_student(teacher, (X, Y), target_macs=0.5 * whole, count="paper", **FAST)
    after = morph.count(found.model, X[:1])
    paper = after.macs + after.elementwise["batch_norm"]
    assert found.record.details["macs_paper_before"] == whole
    assert found.record.details["macs_paper_after"] == paper <= 0.5 * whole
    assert paper > 0.3 * whole
    with pytest.raises(TargetError, match="by the paper's counting"):
        search_student(teacher, (X, Y), target_macs=whole, count="paper", **FAST)


def test_inherited_weights_compute_what_the_search_ended_with():
    fresh, kept = (search_student(tiny(), (X, Y), target_params=700, inherit=i, **FAST) for i in (False, True))
    assert [p.shape for p in fresh.model.parameters()] == [p.shape for p in kept.model.parameters()]
    assert not torch.equal(fresh.model(X), kept.model(X))
    with torch.no_grad():
        wanted = tiny().eval()(X)
        assert (kept.model.eval()(X) - wanted).abs().mean() < (fresh.model.eval()(X) - wanted).abs().mean()


def test_what_is_global_stays_as_it_was_and_the_seed_decides():
    teacher = tiny()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    one = search_student(teacher, (X, Y), target_params=700, **FAST)
    now = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(states[0], now[0])
    assert states[1:] == now[1:]
    torch.manual_seed(4)
    two = search_student(tiny(), (X, Y), target_params=700, **FAST)
    assert one.record.to_json() == two.record.to_json()
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    three = search_student(tiny(), (X, Y), target_params=700, seed=1, **FAST)
    assert three.record.details["history"] != one.record.details["history"]


def test_stopped_and_taken_up_it_gives_the_same_student(tmp_path):
    images = Augmented(LabelledImages(X, Y))
    whole = search_student(tiny(), images, target_params=700, **FAST)
    calls = itertools.count(1)
    path = tmp_path / "state.search"
    with pytest.raises(KeyboardInterrupt):
        search_student(tiny(), images, target_params=700, checkpoint=path, should_stop=lambda: next(calls) == 7, **FAST)
    with pytest.raises(SearchStateError, match="target is '700 params' there and '800 params' here"):
        search_student(tiny(), images, target_params=800, checkpoint=path, **FAST)
    with pytest.raises(SearchStateError, match="teacher is"):
        search_student(randomise(Tiny(), 5), images, target_params=700, checkpoint=path, **FAST)
    again = search_student(tiny(), images, target_params=700, checkpoint=path, **FAST)
    assert again.record.to_json() == whole.record.to_json()
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


def test_a_penalty_that_would_close_everything_keeps_a_network():
    found = search_student(tiny(), (X, Y), target_params=250, lambda2=100.0, **FAST)
    assert found.record.after["params"] <= 250
    assert found.model(X).shape == (24, 10)
    assert found.record.details["kept"] or found.record.details["layers_gone"]
    sites = {site["name"]: site["gates"] for site in found.record.details["sites"]}
    closed = sum(site["closed"] for site in found.record.details["sites"])
    assert closed == found.record.details["gates_total"] - found.record.details["gates_open"]
    assert found.record.details["thin"]
    assert all(
        t["gates"] == sites[t["site"]] and t["open"] < max(1, t["gates"] / 10) for t in found.record.details["thin"]
    )


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ({"target_macs": 10**9}, r"the teacher has [\d,]+ multiply-adds, within the target of 1,000,000,000"),
        ({"target_params": 3}, r"3 parameters are out of reach: with all \d+ gates closed the model still has \d+"),
        ({}, "give one target"),
        ({"target_params": 3, "target_macs": 3}, "give one target"),
        ({"target_params": 700, "mode": "x"}, "mode 'x'"),
    ],
)
def test_targets(target, text):
    with pytest.raises(TargetError, match=text):
        search_student(tiny(), (X, Y), **target)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((X, Y + 1), "tells 10 classes apart, the data has label 10"),
        ((X, Y - 1), "the data has label -1"),
        ((X, Y.float()), "labels of torch.float32"),
        (LabelledImages(X, Y % 3, classes=("a", "b", "c")), "10 classes apart, tensors has 3"),
        (Augmented(LabelledImages(X, Y % 3, classes=("a", "b", "c"))), "10 classes apart, tensors has 3"),
        ([], "gave no batch"),
        ((X[:0], Y[:0]), "gave no batch"),
    ],
)
def test_data_that_does_not_fit(data, text):
    with pytest.raises(DataError, match=text):
        search_student(tiny(), data, target_params=700)


def test_teachers_that_do_not_fit():
    with pytest.raises(DataError, match="expected logits"):
        search_student(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)), (X, Y), target_params=100)


def test_augmentation_moves_and_mirrors_and_the_seed_decides():
    images = cifar10()
    few = LabelledImages(images.images[:40], images.labels[:40])
    plain, labels = next(few.batches(40, 5))
    (one, y), (two, _), (other, _) = (next(Augmented(few).batches(40, seed)) for seed in (5, 5, 6))
    assert torch.equal(y, labels)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    wide = F.pad(plain, (4,) * 4)
    places = set()
    for before, after in zip(wide, one, strict=True):
        fits = [
            (top, left, mirrored)
            for top, left, mirrored in itertools.product(range(9), range(9), (False, True))
            if torch.equal((after.flip(-1) if mirrored else after), before[:, top : top + 32, left : left + 32])
        ]
        assert fits
        places.add(fits[0])
    assert len(places) > 20
    assert {mirrored for _, _, mirrored in places} == {True, False}


def test_a_frozen_teacher_stays_frozen_and_its_student_can_be_trained():
    teacher = tiny().eval().requires_grad_(False)
    was = Snapshot(teacher)
    found = search_student(teacher, (X, Y), target_params=700, **FAST)
    assert was.same()
    assert all(p.requires_grad for p in found.model.parameters())
    assert not any(m.training for m in found.model.modules())
    thawed = search_student(tiny(), (X, Y), target_params=700, **FAST)
    assert found.record.details["history"] == thawed.record.details["history"]


def test_a_zoo_teacher():
    found = search_student(build("densenet-bc-10-4"), cifar10_of(16), target_macs=400_000, **FAST)
    assert found.record.after["macs"] <= 400_000


def cifar10_of(n: int) -> LabelledImages:
    images = cifar10()
    return LabelledImages(images.images[:n], images.labels[:n], images.classes)
