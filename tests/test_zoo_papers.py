"""The zoo models of the papers: sizes, layers, tracing, and exact surgery on each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import Snapshot, randomise
from torch import fx, nn

import morph
from morph import zoo
from morph.errors import ModelFileError
from morph.zoo.resnet import ResNet
from morph.zoo.shallow import ShallowNet
from morph.zoo.vgg import Mlp, Vgg

SMALL = ["resnet-8", "vgg-student", "vgg-student-small", "mlp-2-37", "nin", "shallow-pool-6-22-41"]
LARGE = ["vgg-teacher-bn", "torchvision-resnet18-32", "torchvision-densenet121-32", "torchvision-shufflenet-v2-x2-0-32"]


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def batch(n: int = 3, seed: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_every_model_is_cut_and_widened_exactly(name):
    model = randomise(zoo.architecture(name, 7), seed=2)
    snapshot = Snapshot(model)
    cut = morph.prune(model, batch(), ratio=0.4, score="random", seed=3)
    wide = morph.widen(model, batch(), ratio=1.3)
    for result in (cut, wide):
        assert result.record.checks
        assert all(check.passed for check in result.record.checks)
        assert result.model(batch()).shape == (3, 7)
    assert params(cut.model) < 0.75 * params(model) < params(model) < 0.9 * params(wide.model)
    assert snapshot.same()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_traces_compute_the_same(name, training):
    model = randomise(zoo.architecture(name, 7)).train(training)
    outputs = []
    for net in (model, fx.symbolic_trace(model)):
        torch.manual_seed(0)  # for dropout
        outputs.append(net(batch()))
    assert torch.equal(*outputs)
    assert outputs[0].std() > 0


def kinds(model: nn.Module) -> tuple[int, int, int]:
    """How many convolutions, max-poolings and dense layers."""
    modules = list(model.modules())
    return tuple(sum(isinstance(m, kind) for m in modules) for kind in (nn.Conv2d, nn.MaxPool2d, nn.Linear))


def test_the_layers_that_the_hint_report_counts():
    with torch.device("meta"):
        assert kinds(zoo.build("vgg-teacher")) == kinds(zoo.build("vgg-teacher-bn")) == (11, 4, 3)
        assert kinds(zoo.build("vgg-student")) == (2, 2, 1)
        assert kinds(zoo.build("vgg-student-small")) == (1, 1, 1)
        assert kinds(zoo.build("mlp-3-512")) == (0, 0, 4)
        # a hint needs maps of one height and width: behind the second pooling of both they are 8x8
        student, teacher = zoo.build("vgg-student").features, zoo.build("vgg-teacher").features
        poolings = [i for i, m in enumerate(teacher) if isinstance(m, nn.MaxPool2d)]
        assert student(torch.zeros(1, 3, 32, 32)).shape[2:] == (8, 8)
        assert teacher[: poolings[1] + 1](torch.zeros(1, 3, 32, 32)).shape[2:] == (8, 8)


def test_the_widths_of_the_shallow_nets():
    with torch.device("meta"):
        large, pooled = zoo.build("shallow"), zoo.build("shallow-pool", num_classes=160)
    assert [tuple(p.shape) for p in large.parameters()] == [
        (128, 3, 3, 3),
        (128,),
        (1200, 128 * 32 * 32),
        (8192, 1200),
        (8192,),
        (10, 8192),
        (10,),
    ]
    assert params(pooled) == 50_474_656  # with the 160 outputs of the label report


def test_option_b_costs_what_the_docstring_says():
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert params(ResNet(20)) - projections == 269_722  # the network with option A
    assert projections == 2_752


def test_nin_equals_its_second_implementation():
    """Everything as loops over windows, in NumPy."""
    model = randomise(zoo.build("nin", num_classes=7)).double().eval()
    x = batch(1).double()
    y = x[0].numpy()
    for module in [*model.features, model.classifier]:
        if isinstance(module, nn.Conv2d):
            y = convolve(y, module.weight.detach().numpy(), module.bias.detach().numpy())
        elif isinstance(module, nn.ReLU):
            y = np.maximum(y, 0)
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):
            reduce = np.max if isinstance(module, nn.MaxPool2d) else np.mean
            rows = range(0, y.shape[1] - 1, 2)  # windows may hang over the edge, and count what is inside
            y = np.array([[[reduce(c[i : i + 3, j : j + 3]) for j in rows] for i in rows] for c in y])
    expected = y.mean((1, 2))
    assert np.allclose(model(x)[0].detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        model.features[2].weight[5, 3] += 0.01
    assert not np.allclose(model(x)[0].detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert model.features(x).shape == (1, 192, 8, 8)


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A convolution of stride 1 that keeps height and width."""
    side = weight.shape[2]
    pad = side // 2
    height, width = x.shape[1:]
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    out = np.zeros((len(weight), height, width)) + bias[:, None, None]
    for i in range(side):
        for j in range(side):
            window = padded[:, i : i + height, j : j + width]
            out += np.einsum("mk,khw->mhw", weight[:, :, i, j], window)
    return out


def test_fresh_weights_keep_the_scale_of_activations():
    torch.manual_seed(0)
    for name in ("vgg-teacher", "vgg-student", "mlp-3-512", "shallow-small", "nin"):
        spread = zoo.build(name).eval()(batch(16)).std().item()
        assert 0.1 < spread < 10, (name, spread)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet-21", r"zoo:resnet-21: ResNet needs a depth of 6n \+ 2 \(8, 14, 20, .*\), got 21"),
        ("resnet-2", r"zoo:resnet-2: ResNet needs a depth of 6n \+ 2"),
        ("mlp-0-5", "zoo:mlp-0-5: MLP needs 1 hidden layer or more of 1 unit or more, got 0 of 5"),
        ("shallow-pool-0-3-4", "zoo:shallow-pool-0-3-4: the shallow net needs widths of 1 or more, got 0, 3 and 4"),
        ("torchvision-resnet19-32", "no model has this name; did you mean torchvision-resnet18-32"),
        ("vgg-teachers", "no model has this name; did you mean vgg-teacher"),
    ],
)
def test_bad_names(name, text):
    with pytest.raises(ModelFileError, match=text) as caught:
        zoo.build(name)
    assert "\n" not in str(caught.value)


def test_bad_numbers_of_the_classes():
    with pytest.raises(ValueError, match="VGG halves its images 4 times, which images of 24 pixels do not allow"):
        Vgg(size=24)
    with pytest.raises(ValueError, match="pooling must divide images of 32 pixels, got 3"):
        ShallowNet(pool=3)
    with pytest.raises(ValueError, match="1 unit or more, got 1 of 0"):
        Mlp(1, 0)
    with pytest.raises(ValueError, match="no network 'lenet' is adapted to 32x32 images; there are vgg16_bn"):
        zoo.torchvision_32("lenet")
