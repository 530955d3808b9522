"""Heads for multi-channel labels: geometries, votes, where they go, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from models import Net, Snapshot, randomise
from torch import nn

import morph
from morph import zoo
from morph.errors import HeadError, PlanMismatchError
from morph.label_heads import MultiChannelHead, VotingHead, channel_logits, head_of, padding_for
from morph.plan import load_plan

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def slow_channels(head: MultiChannelHead, x: torch.Tensor) -> np.ndarray:
    """``[N, classes, rows, columns]`` logits of the channels, window by window, in NumPy."""
    left, right, top, bottom = head.pad.padding
    y = np.pad(x.numpy(), ((0, 0), (0, 0), (top, bottom), (left, right)))
    weight, bias = head.score.weight.detach().numpy(), head.score.bias.detach().numpy()
    side, step = weight.shape[2], head.score.stride[0]
    rows, columns = ((y.shape[a] - side) // step + 1 for a in (2, 3))
    out = np.zeros((len(y), len(weight), rows, columns))
    for i in range(rows):
        for j in range(columns):
            window = y[:, :, i * step : i * step + side, j * step : j * step + side]
            out[:, :, i, j] = np.einsum("nkab,mkab->nm", window, weight) + bias
    return out


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "stride", "grid", "padding"),
    [
        ((8, 8), 16, 6, 2, (4, 4), (2, 2, 2, 2)),
        ((16, 16), 36, 6, 2, (6, 6), (0, 0, 0, 0)),
        ((12, 12), 36, 6, 2, (6, 6), (2, 2, 2, 2)),
        ((7, 9), 20, 3, 2, (4, 5), (1, 1, 1, 1)),
        ((8, 6), 12, 5, 2, (4, 3), (1, 2, 1, 2)),
        ((4, 4), 1, 4, 1, (1, 1), (0, 0, 0, 0)),
    ],
)
def test_geometries(size, channels, kernel, stride, grid, padding):
    head = randomise(MultiChannelHead(5, 10, size, channels, kernel, stride)).double()
    assert padding_for(size, channels, kernel, stride) == padding
    x = torch.randn(2, 5, *size, dtype=torch.float64)
    expected = slow_channels(head, x)
    assert expected.shape == (2, 10, *grid)
    output, logits = channel_logits(head, x)
    assert logits.shape == (2, 10 * channels)
    assert np.allclose(logits.detach().numpy(), expected.reshape(2, -1), rtol=1e-12, atol=1e-12)
    votes = (1 / (1 + np.exp(-expected))).sum((2, 3))
    assert np.allclose(output.detach().numpy(), votes, rtol=1e-12)
    with torch.no_grad():
        head.score.weight[3, 2, 0, 0] += 0.1
    assert not np.allclose(channel_logits(head, x)[1].detach().numpy(), expected.reshape(2, -1), rtol=1e-12)


def test_the_sizes_of_the_report():
    head = MultiChannelHead(192, 10, (8, 8), 16)
    assert sum(p.numel() for p in head.parameters()) == 69_130
    assert channel_logits(head, torch.zeros(1, 192, 8, 8))[1].shape == (1, 160)
    assert channel_logits(MultiChannelHead(192, 10, (16, 16), 36), torch.zeros(1, 192, 16, 16))[1].shape == (1, 360)


def test_logits_are_votes_between_none_and_all():
    head = MultiChannelHead(2, 3, (8, 8))
    nn.init.constant_(head.score.weight, 0)
    for bias, votes in ((100.0, 16.0), (-100.0, 0.0), (0.0, 8.0)):
        nn.init.constant_(head.score.bias, bias)
        assert torch.equal(head(torch.zeros(1, 2, 8, 8)), torch.full((1, 3), votes))


def test_the_students_head_counts_votes_of_one_class_after_the_other():
    head = randomise(VotingHead(6, 3, 4)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    output, logits = channel_logits(head, x)
    scores = x.numpy() @ head.score.weight.detach().numpy().T + head.score.bias.detach().numpy()
    assert np.allclose(logits.detach().numpy(), scores)
    assert np.allclose(output.detach().numpy(), (1 / (1 + np.exp(-scores))).reshape(5, 3, 4).sum(2))
    assert not np.allclose(output.detach().numpy(), (1 / (1 + np.exp(-scores))).reshape(5, 4, 3).sum(1))


def test_gradients_flow_and_no_hook_stays():
    model = morph.put_voting_head(zoo.build("resnet-8"), X, channels=5).model
    snapshot = Snapshot(model.train())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    output, logits = channel_logits(model, X)
    nn.functional.binary_cross_entropy_with_logits(logits, torch.rand(3, 50).round()).backward()
    assert model.stem[0].weight.grad.abs().sum() > 0
    assert output.shape == (3, 10)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert list(snapshot.state) == list(model.state_dict())


OWN_CLASS = ["nin", "darts-4x4", "densenet-bc-10-5", "wrn-10-1", "resnet-8", "vgg-student"]


@pytest.mark.parametrize("name", OWN_CLASS)
def test_it_goes_where_the_classifier_was(name):
    model = randomise(zoo.build(name, 7), seed=4).eval()
    snapshot = Snapshot(model)
    result = morph.put_label_head(model, X, seed=3)
    assert snapshot.same()
    assert type(result.model) is type(model)
    assert result.record.details["form"] == "the model's own class"
    assert result.record.checks[0].passed
    assert result.model(X).shape == (3, 7)
    state = result.model.state_dict()
    kept = [key for key in model.state_dict() if key in state]
    assert kept
    assert all(torch.equal(state[key], model.state_dict()[key]) for key in kept)
    assert sum("classifier" not in key for key in model.state_dict()) == sum("score" not in key for key in state)
    trained = result.model.train()(X)
    assert (trained[0] if isinstance(trained, tuple) else trained).shape == (3, 7)


@pytest.mark.parametrize("name", ["densenet121", "mobilenet_v2", "squeezenet1_1"])
def test_torchvision_takes_it_too(name, tmp_path):
    model = randomise(torchvision.models.get_model(name, weights=None, num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64)
    result = morph.put_label_head(model, x, channels=4 if name == "squeezenet1_1" else 1, kernel=2, stride=2)
    own = name == "squeezenet1_1"
    assert (result.record.details["form"] == "the model's own class") is own
    morph.save_model(result.model, tmp_path / "m.pt", input_shape=(3, 64, 64))
    again = morph.open_model(tmp_path / "m.pt").model.eval()
    assert torch.equal(again(x), result.model(x))
    assert type(head_of(again)) is MultiChannelHead


class Functional(nn.Module):
    """Pooling and dropout without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv(x))).view(x.size(0), -1)
        return self.fc(nn.functional.dropout(x, 0.5, self.training))


def test_votes_are_not_dropped_out():
    model = randomise(Functional())
    x = torch.randn(2, 3, 8, 8)
    result = morph.put_label_head(model, x)
    assert result.record.details["form"] == "traced graph"
    assert torch.equal(result.model.train()(x), result.model.train()(x))


def test_surgery_and_optimizers_go_on_behind_it(tmp_path):
    model = randomise(zoo.build("nin"))
    result = morph.put_label_head(model, X)
    for other in (morph.prune(result.model, X, ratio=0.3, score="random"), morph.widen(result.model, X, ratio=1.2)):
        assert other.record.checks[0].passed
        assert head_of(other.model).channels == 16
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(X).sum().backward()
    optimizer.step()
    moved = morph.transplant(optimizer, result.record, before=model, after=result.model)
    first = result.model.features[0].weight
    assert torch.equal(
        moved.state[first]["momentum_buffer"], optimizer.state[model.features[0].weight]["momentum_buffer"]
    )
    result.record.save(tmp_path / "r.json")
    again = morph.replay(zoo_like(model), load_plan(tmp_path / "r.json"), X).model
    assert torch.equal(head_of(again).score.weight, head_of(result.model).score.weight)
    with pytest.raises(PlanMismatchError, match="classifier should have a weight of"):
        morph.replay(result.model, load_plan(tmp_path / "r.json"), X)


def zoo_like(model: nn.Module) -> nn.Module:
    fresh = zoo.build("nin")
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_the_voting_head_takes_the_place_of_a_linear_layer(tmp_path):
    model = randomise(zoo.build("shallow-pool-4-6-8", 7)).eval()
    snapshot = Snapshot(model)
    result = morph.put_voting_head(model, X, channels=16, seed=5)
    assert snapshot.same()
    assert type(result.model) is type(model)
    assert result.record.details["outputs"] == 112
    assert result.model(X).shape == (3, 7)
    morph.save_model(result.model, tmp_path / "s.pt")
    assert torch.equal(morph.open_model(tmp_path / "s.pt").model.eval()(X), result.model(X))
    result.record.save(tmp_path / "r.json")
    assert torch.equal(morph.replay(model, load_plan(tmp_path / "r.json"), X).model.eval()(X), result.model(X))
    assert morph.prune(result.model, X, ratio=0.3, score="random").record.checks[0].passed


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (
            lambda: zoo.build("nin"),
            {"channels": 36},
            "on a map of 8x8 do not give 36 channels, but 16 padded to 4x4 or 4",
        ),
        (lambda: zoo.build("nin"), {"channels": 0}, "give numbers above 0"),
        (lambda: zoo.build("nin"), {"seed": -1}, "a seed of -1"),
        (lambda: zoo.build("mlp-1-8"), {}, "between the last feature map and the classifier classifier lies hidden.1"),
        (lambda: zoo.build("vgg-teacher-bn"), {}, "lies hidden.3, which would be lost"),
    ],
)
def test_what_has_no_map_or_not_so_many_channels(make, options, text):
    with pytest.raises(HeadError, match=text) as caught:
        morph.put_label_head(make(), X, **options)
    assert "\n" not in str(caught.value)


def test_refusals_of_the_students_head():
    with pytest.raises(HeadError, match="the classifier classifier is a convolution; a voting head takes the place"):
        morph.put_voting_head(zoo.build("nin"), X)
    with pytest.raises(HeadError, match="0 channels; give 1 or more"):
        morph.put_voting_head(zoo.build("resnet-8"), X, channels=0)
    with pytest.raises(HeadError, match="is not that of its classifier 0 alone"):
        morph.put_voting_head(nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)), torch.randn(3, 6))
    with pytest.raises(HeadError, match="0 heads for multi-channel labels, expected one; give it one with"):
        channel_logits(Net(), X)
    with pytest.raises(HeadError, match="0 classes of 4 channels"):
        VotingHead(3, 0, 4)
