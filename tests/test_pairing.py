"""Pairs of layers and the bridges between them, on networks of others too."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, get_model

import morph
from morph.errors import TapError, TeachingError
from morph.teaching.adapters import Bridge, bridge, layout_of
from morph.teaching.pairing import check_pairs, propose_pairs, stage_taps
from morph.zoo import build

X32, X64 = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 64, 64)


def made(name: str) -> nn.Module:
    """A network of torchvision; of ViT a small one."""
    if name != "vit":
        return get_model(name, weights=None)
    return VisionTransformer(image_size=64, patch_size=16, num_layers=12, num_heads=2, hidden_dim=32, mlp_dim=64)


def names(model: nn.Module, x: torch.Tensor, number: int = 3) -> dict[str, tuple[int, ...]]:
    return {stage.name: stage.shape[1:] for stage in stage_taps(model, x, number)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("darts-10", {"cells.2": (64, 32, 32), "cells.5": (128, 16, 16), "cells.9": (256, 8, 8)}),
        ("wrn-16-2", {"groups.0": (32, 32, 32), "groups.1": (64, 16, 16), "relu": (128, 8, 8)}),
        ("densenet-bc-40-12", {"stages.0": (96, 32, 32), "stages.2": (120, 16, 16), "relu": (132, 8, 8)}),
    ],
)
def test_three_taps_before_each_down_sampling(name, expected):
    """Two down-samplings, so three taps: those of the thesis."""
    assert names(build(name), X32) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
        ("mobilenet_v2", ["features.1", "features.3", "features.6", "features.13", "features.18"]),
        ("swin_t", ["features.1", "features.3", "features.5", "permute"]),
        ("googlenet", ["conv1", "conv3", "inception3b", "inception4e", "inception5b"]),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_networks_of_torchvision(name, expected):
    model = get_model(name, weights=None)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    assert list(names(model, X64)) == expected
    assert flags == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_evenly_spread_blocks_where_nothing_shrinks():
    model = made("vit")
    layers = "encoder.layers.encoder_layer_{}"
    assert list(names(model, X64)) == [layers.format(i) for i in (3, 7, 11)]
    assert list(names(model, X64, 4)) == [layers.format(i) for i in (2, 5, 8, 11)]
    assert list(names(model, X64, 2)) == [layers.format(i) for i in (5, 11)]
    assert len(names(model, X64, 50)) == 12


def test_proposals():
    pairs = propose_pairs(build("wrn-16-2"), build("darts-10"), X32)
    assert [(p.teacher, p.student) for p in pairs] == [
        ("groups.0", "cells.2"),
        ("groups.1", "cells.5"),
        ("relu", "cells.9"),
    ]
    assert len(propose_pairs(build("wrn-16-2"), build("darts-10"), X32, 2)) == 2
    with pytest.raises(TeachingError, match="0 pairs"):
        propose_pairs(build("wrn-16-2"), build("darts-10"), X32, 0)
    with pytest.raises(TeachingError, match="the teacher has no maps or tokens"):
        propose_pairs(nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), build("darts-10"), X32)


def test_different_resolutions_are_paired_from_the_end():
    """The first network pools first, so its maps are half as large."""
    teacher = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 1, 1))
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, 1, 1), nn.MaxPool2d(2))
    pairs = propose_pairs(teacher, student, X32, 3)
    assert [(p.teacher, p.student) for p in pairs] == [("1", "2"), ("3", "3")]
    assert [p.teacher_shape[2] for p in pairs] == [p.student_shape[2] for p in pairs] == [16, 8]
    wide = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(3), nn.Conv2d(4, 8, 3, 1, 1), nn.MaxPool2d(3))
    pairs = propose_pairs(teacher, wide, X32, 2)
    assert [(p.teacher, p.student) for p in pairs] == [("1", "2"), ("3", "3")]
    assert "size to 8x8" in str(pairs)


@pytest.mark.parametrize("student", ["vit", "swin_t", "resnet18"])
@pytest.mark.parametrize("teacher", ["vit", "mobilenet_v2"])
def test_any_teacher_teaches_any_student(teacher, student):
    """Tokens, maps with channels last and maps: forward and backward through every bridge."""
    x = torch.zeros(2, 3, 64, 64)
    t, s = made(teacher), made(student)
    pairs = propose_pairs(t, s, x, 2)
    assert len(pairs) == 2
    for pair in pairs:
        for project in (True, False):
            joined = pair.bridge(project=project)
            ours = torch.randn(pair.student_shape, requires_grad=True)
            theirs = torch.randn(pair.teacher_shape)
            if not project and None in (layout.size for layout in pair.layouts):
                continue
            left, right = joined(ours, theirs)
            assert left.shape[2:] == right.shape[2:]
            assert left.shape == right.shape or not project
            left.square().sum().backward()
            assert ours.grad.abs().sum() > 0


def test_own_pairs_are_checked():
    teacher, student = build("wrn-16-2"), build("darts-10")
    pairs = check_pairs(teacher, student, [("groups.2", "cells.9"), ("groups.0", "cells.0"), ("groups.0", "stem")], X32)
    assert [p.student_shape for p in pairs] == [(1, 256, 8, 8), (1, 64, 32, 32), (1, 48, 32, 32)]
    with pytest.raises(TapError, match=r"no module or node 'cell\.9' in DartsNet; nearest: cells\.9"):
        check_pairs(teacher, student, [("groups.2", "cell.9")], X32)
    with pytest.raises(TeachingError, match=r"the student's tap relu stands for several; choose one of relu#1"):
        check_pairs(teacher, Twice(), [("groups.2", "relu")], X32)
    with pytest.raises(TeachingError, match=r"the pair classifier \(teacher\), cells\.9 \(student\): no bridge"):
        check_pairs(teacher, student, [("classifier", "cells.9")], X32)
    assert check_pairs(teacher, Twice(), [("groups.2", "relu#2")], X32)[0].student_shape == (1, 4, 32, 32)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 1), nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(self.relu(x)))


def test_an_untraceable_model_is_paired():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.pool, self.b = nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 1, 1)

        def forward(self, x):
            return self.b(self.pool(self.a(x) if x.mean() < 9 else self.a(-x)))

    assert list(names(Branches(), X32)) == ["a", "b"]


@pytest.mark.parametrize(
    ("shape", "aspect", "kind", "channels", "size"),
    [
        ((1, 64, 8, 8), 1.0, "map", 64, (8, 8)),
        ((1, 8, 8, 64), 1.0, "map, channels last", 64, (8, 8)),
        ((1, 8, 8, 8), 1.0, "map", 8, (8, 8)),
        ((1, 12, 6, 3), 2.0, "map", 12, (6, 3)),
        ((1, 6, 3, 12), 2.0, "map, channels last", 12, (6, 3)),
        ((1, 197, 768), 1.0, "tokens", 768, (14, 14)),
        ((1, 198, 768), 1.0, "tokens", 768, (14, 14)),
        ((1, 196, 768), 1.0, "tokens", 768, (14, 14)),
        ((1, 128, 768), 1.0, "tokens", 768, None),
        ((1, 10), 1.0, "vector", 10, None),
    ],
)
def test_layouts(shape, aspect, kind, channels, size):
    layout = layout_of(shape, aspect)
    assert (layout.kind, layout.channels, layout.size) == (kind, channels, size)


def test_bridges_against_the_steps_by_hand():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, 8), torch.randn(2, 4, 4, 4)
    joined = bridge(student.shape, teacher.shape)
    conv = joined.adapter
    left, right = joined(student, teacher)
    pooled = student.reshape(2, 6, 4, 2, 4, 2).mean((3, 5))
    expected = torch.einsum("ncij,oc->noij", pooled, conv.weight[:, :, 0, 0]) + conv.bias[:, None, None]
    torch.testing.assert_close(left, expected)
    assert right is teacher

    grown = bridge(teacher.shape, student.shape)
    left, _ = grown(teacher, student)
    torch.testing.assert_close(left, F.interpolate(grown.adapter(teacher), (8, 8), mode="bilinear"))

    same = bridge((1, 6, 8, 8), (1, 6, 8, 8))
    assert not list(same.parameters())
    assert same(student, student)[0] is student
    assert str(same) == "nothing to do"

    plain = bridge(student.shape, teacher.shape, project=False)
    assert not list(plain.parameters())
    left, right = plain(student, teacher)
    torch.testing.assert_close(left, pooled)
    assert right is teacher
    left, right = bridge(teacher.shape, student.shape, project=False)(teacher, student)
    assert left is teacher
    torch.testing.assert_close(right, pooled)


def test_bridges_of_tokens():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 17, 6), torch.randn(2, 17, 9)
    joined = bridge(ours.shape, theirs.shape)
    left, right = joined(ours, theirs)
    torch.testing.assert_close(left, ours @ joined.adapter.weight.T + joined.adapter.bias)
    assert right is theirs
    maps = torch.randn(2, 9, 8, 8)
    joined = bridge(ours.shape, maps.shape)
    left, _ = joined(ours, maps)
    grid = torch.stack([ours[:, 1 + i] for i in range(16)], 2).reshape(2, 6, 4, 4)
    torch.testing.assert_close(left, F.interpolate(joined.adapter(grid), (8, 8), mode="bilinear"))
    assert str(joined) == "tokens to map, size to 8x8, 1x1 convolution 6 -> 9"
    last = torch.randn(2, 4, 4, 9)
    left, right = bridge(ours.shape, last.shape)(ours, last)
    assert left.shape == right.shape == (2, 9, 4, 4)
    torch.testing.assert_close(right, last.permute(0, 3, 1, 2))
    vectors = bridge((2, 5), (2, 7))
    assert vectors(torch.randn(2, 5), torch.randn(2, 7))[0].shape == (2, 7)


@pytest.mark.parametrize(
    ("student", "teacher", "project", "text"),
    [
        ((1, 5), (1, 3, 4, 4), True, "no bridge from a vector of 5 (student) to a map of 3 channels (teacher)"),
        ((1, 128, 9), (1, 3, 4, 4), True, "from 128 tokens of 9"),
        ((1, 128, 9), (1, 64, 9), True, "to 64 tokens of 9"),
        ((1, 5), (1, 5), False, "for attention maps"),
        ((1, 2, 3, 4, 5), (1, 5), True, "a tap of shape (1, 2, 3, 4, 5)"),
    ],
)
def test_what_cannot_be_bridged(student, teacher, project, text):
    with pytest.raises(TeachingError) as error:
        bridge(student, teacher, project=project)
    assert text in str(error.value)


def test_the_public_name():
    assert morph.propose_pairs is propose_pairs
    assert isinstance(bridge((1, 2, 4, 4), (1, 3, 2, 2)), Bridge)
    assert math.isclose(layout_of((1, 3, 4, 2), 2.0).size[0], 4)
