"""Cheap blocks: their formulas, which of them is chosen, and what the choice promises."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from models import Snapshot, images, randomise
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torchvision.models import resnet18, resnet50

from morph.blocks import Cell
from morph.cli import substitute as command
from morph.configurations import Site, _chances, draw_configurations, find_sites
from morph.counts import count
from morph.cut import apply_plan
from morph.errors import (
    DataError,
    EditError,
    NothingToGrowError,
    OutputError,
    PlanMismatchError,
    ProbeError,
    TargetError,
)
from morph.files import open_model, save_model
from morph.passes.cheap_blocks import Size, block_size, make_block, parse_choice, why_not
from morph.plan import Plan, Substitute, load_plan
from morph.substitution import substitute
from morph.surgery import replay
from morph.tracing import trace
from morph.zoo import build


class Unit(nn.Module):
    """A pre-activated residual block."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(i), nn.BatchNorm2d(o)
        self.conv1 = nn.Conv2d(i, o, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(o, o, (1, 3), padding="same", bias=False)
        self.shortcut = nn.Conv2d(i, o, 1, stride) if i != o else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Net(nn.Module):
    """Units of 12, 20 and 20 channels, so that not every block fits everywhere."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.units = nn.Sequential(Unit(12, 12), Unit(12, 20, stride=2), Unit(20, 20))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(20, classes)

    def forward(self, x):
        return self.head(self.drop(self.units(self.stem(x)).mean((2, 3))))


CHOICES = ("S", "G2", "G4", "G3", "B2", "B4")


@pytest.fixture
def net():
    return randomise(Net())


def reachable(net, x):
    sites, _ = find_sites(trace(net, x), CHOICES, None)
    spare = sum(site.sizes["S"].params - min(site.sizes[c].params for c in site.choices) for site in sites)
    total = sum(p.numel() for p in net.parameters())
    return total - spare, total


# The blocks.


def test_names_of_blocks_are_read_or_refused():
    assert [parse_choice(name) for name in ("S", "G4", "B16")] == [("S", 1), ("G", 4), ("B", 16)]
    for name in ("", "G", "G1", "g2", "B0", "X3", "G2 ", "G-2", "S2", "G²"):
        with pytest.raises(EditError, match=r"is not a block; write S \(as it is\), G and a number of groups, or B"):
            parse_choice(name)


CONVS = [
    (nn.Conv2d(12, 20, 3, 2, 1), (11, 13)),
    (nn.Conv2d(20, 12, (3, 5), (1, 2), (2, 0), dilation=(2, 1), bias=False), (11, 13)),
    (nn.Conv2d(12, 12, 3, padding="same", padding_mode="reflect"), (7, 5)),
    (nn.Conv1d(12, 20, 5, 2), (17,)),
    (nn.Conv3d(12, 8, 3, padding=1, bias=False), (4, 5, 3)),
]


@pytest.mark.parametrize(("conv", "size"), CONVS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("choice", ["G2", "G4", "B2", "B4"])
def test_blocks_are_as_large_as_the_formulas_say_and_as_counted(conv, size, choice):
    x = torch.randn(3, conv.in_channels, *size)
    block = make_block(conv, choice, seed=3)
    out = conv(x)
    assert block(x).shape == out.shape
    counted = count(block, x)
    predicted = block_size(conv, choice, math.prod(size), math.prod(out.shape[2:]))
    assert (counted.params, counted.macs) == (predicted.params, predicted.macs)
    i, o, k, bias = conv.in_channels, conv.out_channels, math.prod(conv.kernel_size), conv.bias is not None
    number = int(choice[1])
    m = o // number
    grouped = i * i * k // number + 2 * i + i * o
    narrow = i * m + m * m * k + m * o + 4 * m
    assert counted.params == (grouped if choice[0] == "G" else narrow) + bias * o
    whole = block_size(conv, "S", math.prod(size), math.prod(out.shape[2:]))
    assert (whole.params, whole.macs) == (count(conv, x).params, count(conv, x).macs)


def test_blocks_compute_what_they_are_said_to():
    conv = nn.Conv2d(12, 20, 3, 2, padding=2, dilation=2).double().eval()
    x = torch.randn(3, 12, 9, 8, dtype=torch.float64)

    def normed(norm, y):
        return F.relu(
            (y - norm.running_mean[:, None, None])
            / (norm.running_var[:, None, None] + norm.eps).sqrt()
            * norm.weight[:, None, None]
            + norm.bias[:, None, None]
        )

    g = randomise(make_block(conv, "G4", 0))
    parts = [F.conv2d(x[:, j : j + 3], g.grouped.weight[j : j + 3], None, 2, 2, 2) for j in range(0, 12, 3)]
    mixed = torch.einsum("nihw,oi->nohw", normed(g.norm, torch.cat(parts, 1)), g.point.weight[:, :, 0, 0])
    torch.testing.assert_close(g(x), mixed + g.point.bias[:, None, None], rtol=1e-12, atol=1e-12)

    b = randomise(make_block(conv, "B5", 0), 1)
    down = normed(b.norm1, torch.einsum("nihw,oi->nohw", x, b.down.weight[:, :, 0, 0]))
    middle = normed(b.norm2, F.conv2d(down, b.narrow.weight, None, 2, 2, 2))
    up = torch.einsum("nihw,oi->nohw", middle, b.up.weight[:, :, 0, 0]) + b.up.bias[:, None, None]
    torch.testing.assert_close(b(x), up, rtol=1e-12, atol=1e-12)


def test_blocks_are_drawn_by_seed_alone_and_are_like_their_convolution():
    conv = nn.Conv2d(64, 96, 3, bias=False).double().eval()
    before = torch.random.get_rng_state()
    first, second, other = (make_block(conv, "B2", seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.up.weight, other.up.weight)
    assert {p.dtype for p in first.parameters()} == {torch.float64}
    assert not any(m.training for m in first.modules())
    assert float(first.narrow.weight.detach().var()) == pytest.approx(2 / (48 * 9), rel=0.05)
    assert float(first.up.weight.detach().var()) == pytest.approx(2 / 96, rel=0.05)


def test_blocks_that_do_not_fit_say_why():
    conv = nn.Conv2d(10, 14, 3)
    assert why_not(conv, "G5") == why_not(conv, "B7") == why_not(conv, "S") == ""
    assert why_not(conv, "G4") == "4 does not divide 10 input channels"
    with pytest.raises(EditError, match="B5: 5 does not divide 14 output channels"):
        make_block(conv, "B5", 0)
    with pytest.raises(EditError, match="S is the convolution as it is"):
        make_block(conv, "S", 0)


# What can become what.


def test_sites_know_what_fits_and_what_is_left(net):
    sites, left = find_sites(trace(net, images()[0]), CHOICES, None)
    assert [(site.cell.name, site.convs) for site in sites] == [
        (f"units.{i}", (f"units.{i}.conv1", f"units.{i}.conv2")) for i in range(3)
    ]
    assert sites[0].choices == CHOICES
    assert sites[1].unavailable == {"G3": "G3: 3 does not divide 20 input channels of units.1.conv2"}
    assert sites[2].unavailable == {"G3": "G3: 3 does not divide 20 input channels of units.2.conv1"}
    assert [(item.name, item.reason) for item in left] == [("stem", "outside every block; name it with --at")]


def test_at_lets_each_convolution_choose(net):
    sites, left = find_sites(trace(net, images()[0]), ("G2",), ["units.*.conv?", "stem"])
    assert [site.convs for site in sites] == [(f"units.{i}.conv{j}",) for i in range(3) for j in (1, 2)]
    assert [(item.name, item.reason) for item in left] == [("stem", "G2: 2 does not divide 3 input channels of stem")]


def test_convolutions_that_must_stay_say_why(net):
    class Odd(nn.Conv2d):
        pass

    net.units[0].conv1 = nn.Conv2d(12, 12, 3, padding=1, groups=3)
    net.units[0].conv2.register_forward_hook(lambda *_: None)
    net.units[1].conv1 = Odd(12, 20, 3, 2, padding=1)
    parametrizations.weight_norm(net.units[1].conv2)
    net.units[2].conv1.weight = nn.Parameter(torch.zeros(20, 20, 3, 3))
    net.units[2].add_module("twin", nn.Conv2d(20, 20, 3))
    net.units[2].twin.weight = net.units[2].conv1.weight
    net.again = net.units[2].conv2
    with pytest.raises(NothingToGrowError) as caught:
        find_sites(trace(net, images()[0]), CHOICES, None)
    assert "can become S, G2, G4, G3, B2, B4 (7 left whole, such as units.0.conv1: it has 3 groups already" in str(
        caught.value
    )
    net.units.append(Unit(20, 20))
    _, left = find_sites(trace(net, images()[0]), CHOICES, None)
    assert {item.name: item.reason for item in left} == {
        "stem": "outside every block; name it with --at",
        "units.0.conv1": "it has 3 groups already",
        "units.0.conv2": "it has hooks, which would be lost; remove them first",
        "units.1.conv1": "a Odd is not a plain convolution",
        "units.1.conv2": "its weight is parametrised; remove the parametrisation first",
        "units.2.conv1": "its weight is shared with another module",
        "units.2.conv2": "it has 2 names",
    }


def test_a_convolution_whose_weights_are_read_elsewhere_stays():
    class Reads(Unit):
        def forward(self, x):
            return super().forward(x) * self.conv2.weight.mean()

    net = nn.Sequential(nn.Conv2d(3, 12, 1), Reads(12, 12), Reads(12, 12))
    sites, left = find_sites(trace(net, images()[0]), ("G2",), None)
    assert [site.convs for site in sites] == [("1.conv1",), ("2.conv1",)]
    assert {item.reason for item in left} == {"the model's own code reads its weights"}


@pytest.mark.parametrize(
    ("model", "size", "nodes"),
    [
        (lambda: build("wrn-10-1"), 32, ["groups_0_0_conv2", "groups_1_0_conv2", "groups_2_0_conv2"]),
        (resnet18, 32, [f"layer{i}_{j}_bn2" for i in range(1, 5) for j in range(2)]),
        (resnet50, 32, [f"layer{i}_{j}_bn3" for i, n in ((1, 3), (2, 4), (3, 6), (4, 3)) for j in range(n)]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), 8, ["_2"]),
    ],
)
def test_blocks_are_probed_at_the_end_of_their_branch(model, size, nodes):
    sites, _ = find_sites(trace(model(), torch.randn(2, 3, size, size)), ("G2",), None)
    assert [site.cell.nodes for site in sites] == [(node,) for node in nodes]


# Which configurations are drawn.


def made(*tables: dict[str, int]) -> list[Site]:
    """Sites whose choices have these numbers of parameters."""
    return [
        Site(
            Cell(str(i), (), 1, ()), (), tuple(c for c in t if c != "S"), {c: Size(n, 2 * n) for c, n in t.items()}, {}
        )
        for i, t in enumerate(tables)
    ]


TABLE = {"S": 100, "G2": 60, "G4": 40, "B2": 20, "B4": 10}
DRAW = {"window": 0.1, "candidates": 10, "seed": 0}


def test_configurations_are_inside_the_window_different_and_of_the_size_said():
    sites = made(*[TABLE] * 5)
    drawn = draw_configurations(sites, {"params": 600, "macs": 1200}, "params", 300, **DRAW)
    assert len(set(drawn.configurations)) == len(drawn.configurations) == 10
    assert drawn.drawn == 10 + drawn.outside + drawn.repeated
    assert drawn.reachable == (150, 400)
    values = [60, 40, 20, 10]
    for row, size in zip(drawn.configurations, drawn.sizes, strict=True):
        assert size.params == 100 + sum(values[i] for i in row)
        assert size.macs == 2 * size.params
        assert 270 <= size.params <= 330
    again = draw_configurations(sites, {"params": 600, "macs": 1200}, "params", 300, **DRAW)
    assert again == drawn
    assert draw_configurations(sites, {"params": 600, "macs": 1200}, "params", 300, **DRAW | {"seed": 1}) != drawn
    twice = draw_configurations(sites, {"params": 600, "macs": 1200}, "macs", 600, **DRAW)
    assert twice == dataclasses.replace(drawn, reachable=(300, 800))


def test_configurations_of_one_size_are_equally_likely():
    sites = made(TABLE, TABLE, {"S": 50, "G2": 30, "B2": 20})
    before = {"params": 250, "macs": 500}
    seen = Counter()
    for seed in range(600):
        (row,) = draw_configurations(sites, before, "params", 100, window=0.001, candidates=1, seed=seed).configurations
        seen[row] += 1
    values = [[60, 40, 20, 10]] * 2 + [[30, 20]]
    exact = [
        row
        for row in itertools.product(range(4), range(4), range(2))
        if sum(v[i] for v, i in zip(values, row, strict=True)) == 100
    ]
    assert set(seen) == set(exact)
    assert len(exact) == 5
    expected = 600 / len(exact)
    assert sum((seen[row] - expected) ** 2 / expected for row in exact) < 18.5  # 0.1 % of a chi-square with 4 degrees


@pytest.mark.parametrize("wanted", [31, 60, 90, 119])
def test_the_mean_size_is_the_target(wanted):
    tables = [np.array([60, 40, 20, 10]), np.array([60, 20])]
    chances = _chances(tables, wanted)
    assert sum(float(p @ t) for p, t in zip(chances, tables, strict=True)) == pytest.approx(wanted, abs=1e-6)
    assert [float(p.sum()) for p in chances] == pytest.approx([1, 1])


def test_few_configurations_are_all_found_and_no_more_is_claimed():
    sites = made({"S": 9, "G2": 5, "B2": 4}, {"S": 9, "G2": 5, "B2": 4})
    drawn = draw_configurations(sites, {"params": 18, "macs": 36}, "params", 9, window=0.5, candidates=50, seed=0)
    assert sorted(drawn.configurations) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert drawn.drawn == 100_000


@pytest.mark.parametrize(
    ("changes", "target", "message"),
    [
        ({}, 500, r"500 params are out of reach: these blocks give 150 to 400 \(the model has 600\); give a target in"),
        ({}, 100, "100 params are out of reach"),
        (
            {"window": 0.001},
            255,
            r"no configuration of 5 blocks was within 0.1% of 255 params \(100,000 drawn\); the nearest has 2[56]0: "
            "take that as the target, or a wider --window",
        ),
        ({"window": 0}, 300, "a window of 0 around the target; give a share between 0 and 1"),
        ({"window": 2.5}, 300, "a window of 2.5"),
        ({"window": float("nan")}, 300, "a window of nan"),
        ({"candidates": 0}, 300, "0 candidates; give one or more"),
    ],
)
def test_targets_that_cannot_be_met(changes, target, message):
    with pytest.raises(TargetError, match=message):
        draw_configurations(made(*[TABLE] * 5), {"params": 600, "macs": 1200}, "params", target, **DRAW | changes)


# The whole.


def potential(model, places, x, y):
    """Fisher potential by gates of ones that are multiplied in, and autodiff."""
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train()
    gates = {}

    def gate(name):
        def hook(module, inputs, output):
            gates[name] = torch.ones(*output.shape[:2], 1, 1, dtype=output.dtype, requires_grad=True)
            return output * gates[name]

        return hook

    for name in places:
        model.get_submodule(name).register_forward_hook(gate(name))
    F.cross_entropy(model(x), y, reduction="sum").backward()
    return sum(float(gate.grad.square().sum() / 2 / len(x)) for gate in gates.values())


def test_the_best_of_the_configurations_is_built_and_its_score_is_that_of_gates(net):
    net.double()
    net.units[1].eval()
    shot = Snapshot(net)
    x, y = images(9)
    x = x.double()
    low, high = reachable(net, x)
    target = (low + high) // 2
    result = substitute(net, (x, y), target_params=target, choices=CHOICES, candidates=12, seed=4, window=0.1)
    assert shot.same()
    record = result.record.to_json()
    assert abs(record["params_after"] - target) <= 0.1 * target
    assert record["params_after"] == sum(p.numel() for p in result.model.parameters())
    assert record["macs_after"] == count(result.model, x).macs
    assert record["score"] == max(c["score"] for c in record["candidates"])
    assert record["distance"] == record["params_after"] - target
    assert not record["weight_preserving"]
    assert "computes something else" in record["verified"]
    places = [f"units.{i}.conv2" for i in range(3)]
    for candidate in record["candidates"]:
        names = zip(("units.0", "units.1", "units.2"), candidate["choices"], strict=True)
        wanted = [(f"{unit}.conv{j}", name) for unit, name in names for j in (1, 2)]
        plan = Plan(
            tuple(
                Substitute(path, name, tuple(net.get_parameter(f"{path}.weight").shape), 4 + i)
                for i, (path, name) in enumerate(wanted)
                if name != "S"
            )
        )
        built = apply_plan(net, plan)
        assert sum(p.numel() for p in built.parameters()) == candidate["params"]
        assert candidate["score"] == pytest.approx(potential(built, places, x, y), rel=1e-9)
    assert potential(result.model, places, x, y) == pytest.approx(record["score"], rel=1e-9)
    chosen = {block["name"]: block["choice"] for block in record["blocks"]}
    assert len({c["choices"] for c in result.record.details["candidates"]}) == 12
    assert set(chosen.values()) != {"S"}


def test_a_probe_in_the_wrong_place_gives_another_score(net):
    x, y = images(9)
    result = substitute(net, (x, y), target_params=6_500, choices=CHOICES, candidates=3, window=0.3)
    wrong = potential(result.model, ["units.0", "units.1", "units.2"], x, y)
    assert abs(wrong - result.record.details["score"]) > 0.01 * wrong


def test_what_is_not_replaced_is_kept_and_the_seed_decides_the_rest(net):
    def run(seed):
        return substitute(net, images(9), target_params=6_500, choices=CHOICES, candidates=5, window=0.3, seed=seed)

    first, second, other = run(0), run(0), run(1)
    assert first.record.to_json() == second.record.to_json()
    assert state(first.model) == state(second.model) != state(other.model)
    replaced = {edit.module for edit in first.record.plan.edits}
    kept = [n for n in net.state_dict() if not any(n.startswith(f"{path}.") for path in replaced)]
    assert replaced
    assert len(kept) < len(net.state_dict())
    assert all(torch.equal(first.model.state_dict()[n], net.state_dict()[n]) for n in kept)
    assert not {p.data_ptr() for p in first.model.parameters()} & {p.data_ptr() for p in net.parameters()}


def state(model):
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def test_every_weight_of_the_student_learns(net):
    x, y = images(9)
    student = substitute(net, (x, y), target_params=6_500, choices=("G2", "B2"), candidates=3, window=0.3).model
    student.train()
    F.cross_entropy(student(x), y).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in student.parameters())
    new = [p for n, p in student.named_parameters() if n.endswith(("point.weight", "up.weight", "grouped.weight"))]
    assert new
    assert all(bool((p.grad != 0).all()) for p in new)


@pytest.mark.parametrize(
    ("model", "shape", "classes", "target"),
    [
        (lambda: build("wrn-28-2"), (3, 32, 32), 10, {"target_params": 800e3}),
        (resnet18, (3, 64, 64), 1000, {"target_macs": 70e6}),
    ],
)
def test_students_of_known_networks_are_saved_and_opened(tmp_path, model, shape, classes, target):
    teacher = randomise(model())
    x, y = images(4, classes, size=shape[1:])
    result = substitute(teacher, (x, y), candidates=2, **target)
    save_model(result.model, tmp_path / "a.pt", input_shape=shape, record=result.record.to_json())
    opened = open_model(tmp_path / "a.pt").model
    assert type(opened) is type(teacher)
    assert state(opened) == state(result.model)
    assert torch.equal(opened.eval()(x), result.model.eval()(x))
    assert list(trace(opened, x).outputs) == list(trace(result.model, x).outputs)
    ((metric, value),) = target.items()
    assert result.record.after[metric.removeprefix("target_")] == pytest.approx(value, rel=0.025)


def test_the_teacher_of_the_paper_has_its_size_and_the_budgets_of_the_paper_are_in_reach():
    teacher = build("wrn-40-2")
    sites, _ = find_sites(trace(teacher, torch.randn(2, 3, 32, 32)), ("S", "G2", "G4", "G8", "G16", "B2", "B4"), None)
    assert sum(p.numel() for p in teacher.parameters()) == 2_243_546
    assert len(sites) == 18
    assert all(len(site.convs) == 2 for site in sites)
    for budget in (400_000, 800_000, 1_600_000):
        drawn = draw_configurations(
            sites, {"params": 2_243_546, "macs": 0}, "params", budget, window=0.025, candidates=1000, seed=0
        )
        assert len(drawn.configurations) == 1000
        assert all(abs(size.params - budget) <= 0.025 * budget for size in drawn.sizes)


def test_a_record_replays_to_the_same_bits_and_fits_no_other_model(net, tmp_path):
    result = substitute(net, images(9), target_params=6_500, choices=("G2", "B2"), candidates=3, window=0.3)
    result.record.save(tmp_path / "r.json")
    plan = load_plan(tmp_path / "r.json")
    assert plan == result.record.plan
    assert plan.preserving() == Plan(())
    assert state(replay(net, plan, images()[0]).model) == state(result.model)
    with pytest.raises(
        PlanMismatchError,
        match=r"units.0.conv1 should be a convolution with a weight of \[12, 12, 3, 3\] and one group, there is "
        "Sequential; it looks applied already: start from the original model",
    ):
        apply_plan(result.model, plan)
    with pytest.raises(PlanMismatchError, match=r"should be a convolution .*, there is nothing"):
        apply_plan(nn.Sequential(nn.Linear(2, 2)), plan)
    net.units[0].conv1 = nn.Conv2d(12, 12, 5, padding=2)
    with pytest.raises(PlanMismatchError, match=r"there is one with a weight of \[12, 12, 5, 5\]"):
        apply_plan(net, plan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_params": None}, TargetError, "give one target"),
        ({"target_macs": 5}, TargetError, "give one target"),
        ({"choices": ("G2", "Q")}, EditError, "'Q' is not a block"),
        ({"choices": ("S",)}, NothingToGrowError, "can become S .*left whole.*give other blocks with --choices"),
        ({"choices": ()}, NothingToGrowError, "can become nothing"),
        (
            {"choices": ("G7",)},
            NothingToGrowError,
            r"7 left whole, such as units.0.conv1: G7: 7 does not divide 12 input channels of units.0.conv1",
        ),
        ({"seed": -1}, EditError, "a seed of -1; give 0 or more"),
        ({"target_params": 1e6}, TargetError, "out of reach: these blocks give 2,703 to 10,875"),
        ({"at": ["nothing*"]}, ProbeError, "no module or node of that name"),
        ({"batch_size": 1}, DataError, "one sample is too few"),
    ],
)
def test_what_cannot_be_done_is_refused(net, options, error, message):
    with pytest.raises(error, match=message):
        substitute(net, images(9), **{"target_params": 6_500, "window": 0.3, "candidates": 2} | options)


def test_labels_that_the_model_does_not_have_are_refused(net):
    x, y = images(9)
    with pytest.raises(ProbeError, match="labels run from 0 to 9, the model has 7 classes"):
        substitute(net, (x, torch.arange(9) % 10 + torch.arange(9) // 8), target_params=6_500, window=0.3)
    with pytest.raises(DataError, match="8 inputs and 9 targets"):
        substitute(net, (x[:8], y), target_params=6_500)


def test_scores_that_rank_nothing_are_refused(net):
    options = {"target_params": 6_500, "window": 0.3, "candidates": 2}

    def endless(outputs, targets):
        outputs.register_hook(lambda gradient: gradient * float("inf"))
        return outputs.sum(1)

    with pytest.raises(ProbeError, match="potential of 2 of 2 configurations is not finite"):
        substitute(net, images(9), loss=endless, **options)
    x, y = images(9, 1000, size=(64, 64))
    with pytest.raises(ProbeError, match="of every configuration is 0, since the residual branches end in weights"):
        substitute(resnet18(zero_init_residual=True), (x, y), target_params=9e6, candidates=2)


# The command.


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command in a folder with a model and images; gives the exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    save_model(randomise(build("wrn-10-1")), tmp_path / "teacher.pt", input_shape=(3, 32, 32))
    draw = np.random.default_rng(0)
    np.savez("data.npz", images=draw.integers(0, 256, (8, 32, 32, 3), np.uint8), labels=draw.integers(0, 10, 8))

    def run(*arguments):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        common = ["teacher.pt", "--data", "data.npz", "--candidates", "3"]
        code = command.run(parser.parse_args([*common, *arguments]))
        return code, capsys.readouterr().out

    return run


def test_the_command_writes_a_student_and_its_record(call, tmp_path):
    code, out = call("--target-params", "45K", "--choices", "S, G2,B2", "--window", "0.1")
    assert code == 0
    assert "not weight-preserving: train it" in out
    assert "written: teacher-student.pt, teacher-student.json" in out
    assert "left whole     1 convolutions, e.g. stem: outside every block" in out
    student = open_model(tmp_path / "teacher-student.pt").model
    record = json.loads((tmp_path / "teacher-student.json").read_text())
    assert sum(p.numel() for p in student.parameters()) == record["params_after"]
    assert record["options"]["choices"] == ["S", "G2", "B2"]
    with pytest.raises(OutputError, match="exists already"):
        call("--target-params", "45K")


def test_the_command_prints_one_document_and_writes_nothing_in_a_dry_run(call, tmp_path):
    before = sorted(tmp_path.iterdir())
    code, out = call("--target-macs", "8M", "--window", "0.2", "--json", "--dry-run", "--seed", "3")
    record = json.loads(out)
    assert (code, record["command"], record["weight_preserving"], record["written"]) == (0, "substitute", False, [])
    assert len(record["candidates"]) == 3
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_refuses_what_it_could_not_write(call):
    with pytest.raises(OutputError, match=r"give a name that ends in .pt, since .json is taken by the record"):
        call("--target-params", "45K", "--out", "student.json")
    with pytest.raises(TargetError, match=r"1 params are out of reach"):
        call("--target-params", "1")
