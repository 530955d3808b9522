"""A classifier gets other classes: the right layer is found, kept classes stay, and what cannot be is refused."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from models import Net, Snapshot, images, randomise
from torch import nn
from torch.nn.utils import parametrizations

import morph
from morph import zoo
from morph.errors import HeadError, PlanMismatchError, TraceError
from morph.head_search import find_heads
from morph.plan import SwapHead, load_plan

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NAMES = ["darts-4x4", "densenet-bc-10-5", "wrn-10-1", "resnet-8", "nin", "vgg-student", "mlp-1-8", "shallow-pool-4-6-8"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", [4, 23])
def test_kept_classes_put_out_what_they_did(name, classes):
    model = randomise(zoo.build(name, 11), seed=3).double().eval()
    snapshot = Snapshot(model)
    keep = [9, 0, 5]
    result = morph.swap_head(model, classes, X.double(), keep=keep, seed=5)
    assert snapshot.same()
    assert type(result.model) is type(model)
    old, new = model(X.double()), result.model(X.double())
    assert new.shape == (3, classes)
    assert torch.allclose(new[:, :3], old[:, keep], rtol=1e-12, atol=1e-12)
    assert new[:, 3:].std() > 0
    assert [check.name for check in result.record.checks] == ["outputs of kept classes"]
    state, before = result.model.state_dict(), model.state_dict()
    heads = result.record.details["heads"]
    for key, value in before.items():
        if not key.startswith(tuple(heads)):
            assert torch.equal(state[key], value), key


def test_auxiliary_heads_follow():
    model = randomise(zoo.build("darts-4x4", 11))
    result = morph.swap_head(model, 6, X, keep=[2])
    assert result.record.details["heads"] == ["classifier", "auxiliary.10"]
    logits, auxiliary = result.model.train()(X)
    assert logits.shape == auxiliary.shape == (3, 6)
    old, old_auxiliary = model.train()(X)
    assert torch.allclose(logits[:, 0], old[:, 2], rtol=1e-4, atol=1e-5)
    assert torch.allclose(auxiliary[:, 0], old_auxiliary[:, 2], rtol=1e-4, atol=1e-5)
    weights = [result.model.classifier.weight, result.model.auxiliary[10].weight]
    assert not torch.equal(weights[0][1, :20], weights[1][1, :20])


@pytest.mark.parametrize(
    ("name", "head"), [("resnet18", "fc"), ("squeezenet1_1", "classifier.1"), ("mobilenet_v2", "classifier.1")]
)
def test_torchvision(name, head):
    model = torchvision.models.get_model(name, weights=None, num_classes=9)
    result = morph.swap_head(model, 3, torch.randn(2, 3, 64, 64), keep=[8])
    assert result.record.details["heads"] == [head]
    assert result.record.checks[0].passed


def test_timm_keeps_its_own_count():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=9)
    result = morph.swap_head(model, 3, torch.randn(2, 3, 64, 64))
    assert result.model.num_classes == 3
    assert model.num_classes == 9
    assert result.record.details["verified"].startswith("not verified: no class was kept")


def test_a_record_replays_to_the_bit(tmp_path):
    model = randomise(Net(7))
    x, _ = images()
    result = morph.swap_head(model, 12, x, keep=[6, 6, 1], seed=8)
    result.record.save(tmp_path / "r.json")
    plan = load_plan(tmp_path / "r.json")
    assert plan == result.record.plan
    again = morph.replay(model, plan, x)
    for key, value in result.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key])
    assert "the classifier was changed" in again.record.details["verified"]
    other = morph.swap_head(model, 12, x, keep=[6, 6, 1], seed=9).model
    assert torch.equal(other.head.weight[:3], result.model.head.weight[:3])
    assert not torch.equal(other.head.weight[3:], result.model.head.weight[3:])
    with pytest.raises(PlanMismatchError, match=r"head should be a classifier with a weight of \[7, 30\]; its weight"):
        morph.replay(result.model, plan, x)
    assert json.loads((tmp_path / "r.json").read_text())["plan"][0]["edit"] == "swaphead"


def test_the_random_state_stays_and_the_head_is_the_same_object_for_hooks():
    model = Net(7)
    model.head.register_forward_hook(lambda module, args, out: out * 2)
    x, _ = images()
    state = torch.get_rng_state()
    result = morph.swap_head(model, 5, x, keep=[3])
    assert torch.equal(state, torch.get_rng_state())
    assert len(result.model.head._forward_hooks) == 1


def test_optimizers_follow():
    model = randomise(Net(7))
    x, y = images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    result = morph.swap_head(model, 5, x)
    moved = morph.transplant(optimizer, result.record, before=model, after=result.model)
    momentum = moved.state[result.model.stem.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.stem.weight]["momentum_buffer"])
    assert "momentum_buffer" not in moved.state.get(result.model.head.weight, {})


class Odd(nn.Module):
    """Two layers of seven outputs, of which the first is not the head; what follows is chosen by ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Linear(6, 7)
        self.head = nn.Linear(7, 7)
        if kind == "parametrised":
            self.head = parametrizations.weight_norm(self.head)
        if kind == "tied":
            self.head.weight = self.body.weight = nn.Parameter(torch.randn(7, 7))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        y = self.head(h)
        if self.kind == "softmax":
            return y.softmax(1)
        if self.kind == "fixed":
            return y.view(-1, 7)
        if self.kind == "mixed":
            return y + h
        if self.kind == "read":
            return y, y[:, :2].sin()
        return y


def test_the_last_layer_is_taken_and_not_one_of_the_same_size():
    x = torch.randn(3, 6)
    assert [head.path for head in find_heads(randomise(Odd("plain")), x)] == ["head", "head"]
    result = morph.swap_head(Odd("softmax"), 3, x, keep=[1])
    assert result.record.checks == ()
    assert result.record.details["verified"].startswith("not verified: outputs are normalised over the classes")


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("parametrised", "head: it has other parameters than a weight and a bias"),
        ("mixed", "head: the output is not its classes"),
        ("read", "head: output 1 reads it too"),
        ("fixed", "Odd does not run with 3 classes|its code has the number in it"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(kind, text):
    model = randomise(Odd(kind))
    snapshot = Snapshot(model)
    with pytest.raises(HeadError, match=text) as caught:
        morph.swap_head(model, 3, torch.randn(4, 6))
    assert "\n" not in str(caught.value)
    assert snapshot.same()


def test_tied_weights_are_refused():
    with pytest.raises(HeadError, match="its weights are used elsewhere too"):
        morph.swap_head(Odd("tied"), 3, torch.randn(4, 7))


def test_no_classifier_at_all():
    with pytest.raises(HeadError, match=r"no linear layer or convolution has 5 outputs"):
        morph.swap_head(nn.Flatten(), 3, torch.randn(2, 5))
    with pytest.raises(HeadError, match=r"puts out \[2\]; a classifier puts out logits"):
        morph.swap_head(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), 3, torch.randn(2, 5))


def test_bad_numbers():
    x, _ = images()
    for arguments, text in [
        ({"num_classes": 0}, "0 classes; give 1 or more"),
        ({"num_classes": 3, "keep": [7]}, "class 7 cannot be kept: the model has the classes 0 to 6"),
        ({"num_classes": 3, "keep": [-1]}, "class -1 cannot be kept"),
        ({"num_classes": 1, "keep": [1, 2]}, "2 classes to keep and 1 classes in all"),
        ({"num_classes": 3, "seed": -1}, "a seed of -1"),
    ]:
        with pytest.raises(HeadError, match=text):
            morph.swap_head(Net(7), inputs=x, **arguments)
    with pytest.raises(TraceError, match="does not accept inputs"):
        morph.swap_head(Net(7), 3, torch.randn(2, 5, 8, 8))
    with pytest.raises(HeadError, match=r"training mode on these inputs: .* give a batch of two samples or more"):
        morph.swap_head(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), 2, torch.randn(1, 6))


def test_a_damaged_plan_is_refused():
    edit = SwapHead("head", (7, 30), 2, (5, 1, 3), 0)
    with pytest.raises(PlanMismatchError, match="3 of its 7 classes cannot be kept among 2"):
        morph.replay(Net(7), morph.Plan((edit,)), images()[0])
