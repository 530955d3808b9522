"""Residual blocks are copied exactly or not at all; copies learn; plans replay; names can be followed."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from models import Snapshot, images, randomise
from torch import nn
from torchvision.models import VisionTransformer, get_model
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer

import morph
from morph.cut import apply_plan
from morph.deepening import deepen
from morph.errors import CheckFailedError, DataError, NothingToGrowError, PlanMismatchError, TargetError, TraceError
from morph.passes.insertion import chain_with_copies
from morph.plan import Deepen, Plan
from morph.renaming import names_after, renamed_modules
from morph.residuals import find_units
from morph.trials import random_twin, record_calls, silenced, zeros_that_silence
from morph.zoo import build


def small_swin() -> nn.Module:
    return SwinTransformer([4, 4], 12, [2, 4], [2, 4], [4, 4], num_classes=7, stochastic_depth_prob=0.2)


def small_convnext() -> nn.Module:
    stages = [CNBlockConfig(7, 14, 2), CNBlockConfig(14, 21, 3), CNBlockConfig(21, None, 1)]
    return ConvNeXt(stages, stochastic_depth_prob=0.2, num_classes=7)


def small_vit() -> nn.Module:
    return VisionTransformer(32, 8, num_layers=3, num_heads=3, hidden_dim=24, mlp_dim=37, num_classes=7, dropout=0.1)


NETWORKS = {
    "resnet18": (lambda: get_model("resnet18"), 64, "layer1.0.bn2.weight layer1.0.bn2.bias"),
    "resnet50": (lambda: ResNet(Bottleneck, [2, 2, 1, 2]), 32, "layer1.1.bn3.weight layer1.1.bn3.bias"),
    "resnext": (lambda: ResNet(Bottleneck, [2, 2, 2, 2], groups=8, width_per_group=4), 32, "layer1.1.bn3.weight"),
    "wide_resnet": (lambda: ResNet(Bottleneck, [2, 1, 1, 1], width_per_group=128), 32, "layer1.1.bn3.weight"),
    "convnext": (small_convnext, 64, "features.1.0.layer_scale"),
    "efficientnet_b0": (lambda: get_model("efficientnet_b0"), 32, "features.2.1.block.3.1.weight"),
    "mobilenet_v2": (lambda: get_model("mobilenet_v2"), 64, "features.3.conv.3.weight features.3.conv.3.bias"),
    "mobilenet_v3_small": (lambda: get_model("mobilenet_v3_small"), 64, "features.3.block.2.1.weight"),
    "regnet_y_400mf": (lambda: get_model("regnet_y_400mf"), 64, "trunk_output.block2.block2-1.f.c.1.weight"),
    "vit": (small_vit, 32, "encoder.layers.encoder_layer_0.self_attention.out_proj.weight"),
    "swin": (small_swin, 64, "features.1.0.attn.proj.weight features.1.1.mlp.3.bias"),
    "timm resnet": (lambda: timm.create_model("resnet18"), 64, "layer1.0.bn2.weight"),
    "timm vit": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, init_values=1e-5),
        32,
        "blocks.0.ls1.gamma blocks.0.ls2.gamma",
    ),
    "zoo wrn": (lambda: build("wrn-16-2"), 32, "groups.0.1.conv2.weight"),
}


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x.double())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_deeper_network_computes_the_same(name):
    make, size, zeroed = NETWORKS[name]
    net = randomise(make())
    shot, x = Snapshot(net), images(2, size=(size, size))[0]
    result = deepen(net, x, blocks=3, verify=False)
    assert shot.same()
    assert type(result.model) is type(net)
    assert torch.equal(outputs(result.model, x), outputs(net, x))
    record = result.record
    first = record.plan.edits[-1]
    assert set(zeroed.split()) <= {f"{first.container}.{tensor}" for tensor in first.zeroed}
    assert record.after["params"] == sum(p.numel() for p in result.model.parameters()) > record.before["params"]
    assert record.after["macs"] > record.before["macs"]
    again = outputs(result.model, x)
    with torch.no_grad():  # the copies do run: moving what is zero moves the outputs
        for edit in record.plan.edits:
            for path in new_blocks(edit):
                for parameter in result.model.get_submodule(path).parameters():
                    parameter.add_(0.1)
    assert not torch.equal(outputs(result.model, x), again)


def new_blocks(edit: Deepen) -> list[str]:
    """Paths of the copies right after the edit; those of edits before it in the plan stand behind them."""
    if not edit.blocks[0].isdigit():
        return [f"{edit.container}.{b}_copy{k + 1}" for k in range(edit.copies) for b in edit.blocks]
    start = int(edit.blocks[-1]) + 1
    return [f"{edit.container}.{start + i}" for i in range(edit.copies * len(edit.blocks))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet50", 64),
        ("resnext50_32x4d", 64),
        ("wide_resnet50_2", 64),
        ("convnext_tiny", 64),
        ("efficientnet_b0", 64),
        ("mobilenet_v2", 64),
        ("swin_t", 224),
        ("vit_b_16", 224),
    ],
)
def test_large_networks_grow_too(name, size):
    net = get_model(name)
    result = deepen(net, torch.randn(1, 3, size, size), blocks=2)
    assert max(check.relative for check in result.record.checks) < 1e-10
    assert result.record.after["params"] > result.record.before["params"]


@pytest.mark.parametrize("name", ["resnet18", "convnext", "vit", "swin", "mobilenet_v3_small"])
def test_copies_learn(name):
    """What is zero gets a gradient at the first backward pass, everything in the copy at the second."""
    make, size, _ = NETWORKS[name]
    x = images(4, size=(size, size))[0]
    result = deepen(randomise(make()), x, blocks=2, verify=False)
    net = result.model.train()
    for module in net.modules():
        if type(module).__name__ in ("Dropout", "StochasticDepth"):
            module.p = 0.0
    edits = result.record.plan.edits
    new = [(path, source, edit) for edit in edits for path, source in zip(new_blocks(edit), edit.blocks, strict=False)]
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for turn in range(2):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        for path, source, edit in new:
            ends = [t.removeprefix(f"{source}.") for t in edit.zeroed if t.startswith(f"{source}.")]
            for tensor, parameter in net.get_submodule(path).named_parameters():
                assert bool(parameter.grad.any()) or (turn == 0 and tensor not in ends), (turn, path, tensor)
        optimizer.step()


def test_statistics_and_flags_of_a_copy_are_those_of_its_source():
    net = randomise(build("wrn-16-1"))
    net.groups[1][1].requires_grad_(False)
    net.groups[1][1].bn1.eval()
    grown = deepen(net, torch.randn(2, 3, 32, 32), at=["groups.1.1"], blocks=1).model
    source, new = grown.groups[1][1], grown.groups[1][2]
    assert torch.equal(source.bn2.running_var, new.bn2.running_var)
    assert new.bn2 is not source.bn2
    assert torch.equal(source.conv1.weight, new.conv1.weight)
    assert not new.conv2.weight.any()
    assert not new.conv1.weight.requires_grad
    assert not new.bn1.training
    assert new.bn2.training


def test_training_mode_is_also_handed_on_without_dropout():
    net = randomise(get_model("resnet18"))
    x = images(3, size=(64, 64))[0].double()
    grown = deepen(net, x.float(), blocks=2).model
    before, after = copy.deepcopy(net).double().train()(x), grown.double().train()(x)
    assert torch.equal(before, after)


# What is refused, and why


class Residual(nn.Module):
    """A block with a chosen end, and a chosen way of adding."""

    def __init__(self, end=None, gate="plain", channels: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.gain = nn.Parameter(torch.ones(1))
        self.end, self.gate = end, gate

    def forward(self, x):
        branch = self.norm(self.conv(x))
        if self.gate == "squared":
            branch = branch * self.gain**2
        if self.gate == "nothing":
            branch = 0 * branch
        y = x + branch
        return (y, x) if self.gate == "tuple" else y if self.end is None else self.end(y)


class Taps(nn.Module):
    """Uses its blocks by number."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 1)
        self.blocks = nn.ModuleList(Residual() for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(5) for _ in range(3))
        self.style = style

    def forward(self, x):
        x, taps = self.stem(x), []
        if self.style == "zip":
            for block, norm in zip(self.blocks, self.norms, strict=False):
                x = norm(block(x))
        elif self.style == "strict":
            for block, norm in zip(self.blocks, self.norms, strict=True):
                x = norm(block(x))
        else:
            for i, block in enumerate(self.blocks):
                x = block(x)
                if self.style == "first" and i == 1:
                    taps.append(x)
        return torch.stack([x, *taps]).sum(0).mean((2, 3))


def chain(*blocks) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(*blocks)))


X = torch.randn(2, 3, 6, 7)


def reasons(net) -> str:
    units, left = find_units(net, X)
    assert units == []
    return "; ".join(item.reason for item in left)


def test_what_follows_the_sum_decides():
    for end in (None, nn.ReLU(), nn.ReLU6(), nn.ReLU(inplace=True)):
        units, _ = find_units(chain(Residual(end)), X)
        assert [unit.zeroed for unit in units] == [("0.norm.weight", "0.norm.bias")]
    for end in (nn.GELU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.BatchNorm2d(5)):
        assert "no plain residual path" in reasons(chain(Residual(end)))


def test_blocks_that_cannot_be_copied_say_why():
    assert "would get no gradient" in reasons(chain(Residual(gate="squared")))
    assert "whatever its parameters are" in reasons(chain(Residual(gate="nothing")))
    assert "it maps a tensor to tuple" in reasons(chain(Residual(gate="tuple")))
    assert "it turns [2, 64, 8, 8] into" in reasons_of(get_model("densenet121"), 32)
    assert "no plain residual path" in reasons_of(build("darts-8x2"), 32).partition("[")[0]
    assert "it turns [2, 72, 32, 32] into [2, 108, 32, 32]" in reasons_of(build("densenet-bc-16-36"), 32)


def reasons_of(net, size: int) -> str:
    with pytest.raises(NothingToGrowError, match="no residual block of which a copy can be inserted exactly") as caught:
        deepen(net, torch.randn(2, 3, size, size), blocks=1)
    assert "\n" not in str(caught.value)
    return str(caught.value) + str(find_units(net, torch.randn(2, 3, size, size))[1])


def test_models_without_any_chain_say_so():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 5, 1), Residual(), Residual()

        def forward(self, x):
            return self.b(self.a(self.stem(x)))

    assert "not in a Sequential or ModuleList: Named calls it in its own way" in reasons(Named())
    with pytest.raises(NothingToGrowError, match="it has no blocks in a Sequential or ModuleList"):
        deepen(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), X, blocks=1)


def test_containers_that_are_used_by_number_are_tried():
    assert len(find_units(randomise(Taps("plain")), X)[0]) == 3
    assert "with one more block its outputs change" in reasons(randomise(Taps("zip")))
    assert "with one more block the model fails: ValueError" in reasons(randomise(Taps("strict")))
    units, left = find_units(randomise(Taps("first")), X)  # a copy behind the tap does not move it
    assert [unit.blocks for unit in units] == [("1",), ("2",)]
    assert [item.name for item in left] == ["blocks.0"]


def test_blocks_that_are_not_called_or_not_finite():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self.stem = nn.Sequential(Residual()), nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.stem(x)

    assert "not called as a module of its own" in reasons(Unused())

    class Endless(Residual):
        def forward(self, x):
            return super().forward(x) / 0

    assert "not finite on random weights" in reasons(chain(Endless()))


def test_fresh_zeros_and_ones_do_not_hide_a_term():
    """A new BatchNorm has a bias of zero and a LayerScale is almost nothing; both must be seen all the same."""
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(Residual()))
    assert find_units(net, torch.zeros(2, 3, 6, 7))[0][0].zeroed == ("0.norm.weight", "0.norm.bias")


def test_the_trial_rejects_too_few_zeros():
    net = random_twin(chain(Residual(nn.ReLU())), 0)
    calls, chained, _ = record_calls(net, {"1.0": net[1][0]}, X.double())
    assert chained == {"", "1"}
    assert silenced(net[1][0], ["norm.weight", "norm.bias"], calls["1.0"])
    for few in (["norm.weight"], ["norm.bias"], ["conv.weight", "conv.bias"], []):
        assert not silenced(net[1][0], few, calls["1.0"])
    assert zeros_that_silence(net[1][0], calls["1.0"], known=["conv.weight"]) == (("norm.weight", "norm.bias"), None)


def test_a_wrong_plan_fails_the_check():
    net = randomise(build("wrn-16-1"))
    x = torch.randn(2, 3, 32, 32)
    (edit,) = deepen(net, x, blocks=1, at=["groups.1.1"]).record.plan.edits
    with pytest.raises(CheckFailedError, match="the outputs moved by"):
        morph.replay(net, Plan((Deepen(edit.container, edit.blocks, 1, ("1.bn2.weight",), 2, edit.params),)), x)


def test_inner_blocks_come_before_the_stage_around_them():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Residual(), Residual())

        def forward(self, x):
            return self.blocks(x)

    units, _ = find_units(chain(Stage(), Stage()), X)
    assert [unit.paths() for unit in units] == [(f"1.{i}.blocks.{j}",) for i in (0, 1) for j in (0, 1)]


def test_shifted_windows_are_copied_in_pairs():
    units, _ = find_units(small_swin(), torch.randn(2, 3, 64, 64))
    assert [unit.blocks for unit in units] == [("0", "1"), ("0", "1"), ("2", "3")]
    grown = deepen(small_swin(), torch.randn(2, 3, 64, 64), blocks=2, at=["features.3.0"]).model
    assert [block.attn.shift_size[0] for block in grown.features[3]] == [0, 2, 0, 2, 0, 2]


def test_hugging_face_models_grow():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37, image_size=32, patch_size=8
    )
    net = randomise(transformers.ViTForImageClassification(config))
    result = deepen(net, torch.randn(2, 3, 32, 32), blocks=3)
    assert max(check.relative for check in result.record.checks) < 1e-10
    assert result.record.details["stages"][0]["blocks_after"] == 5


# Policies and targets


@pytest.fixture(scope="module")
def wrn():
    return randomise(build("wrn-22-1"))


IMAGES = torch.randn(2, 3, 32, 32)


def test_uniform_goes_round_the_stages(wrn):
    result = deepen(wrn, IMAGES, blocks=7)
    order = [step["unit"].removeprefix("groups.") for step in result.record.details["steps"]]
    assert order == ["0.0", "1.1", "2.1", "0.1", "1.2", "2.2", "0.2"]  # at width 1 group 0 keeps its shape throughout
    assert [row["blocks_after"] for row in result.record.details["stages"]] == [6, 4, 4]
    assert [unit["copies"] for unit in result.record.details["units"]] == [1] * 7
    assert result.record.details["distance"] == 0
    assert result.record.to_json()["weight_preserving"] is True


def test_fisher_deals_in_proportion(wrn):
    data = images(8, 10, size=(32, 32))
    record = deepen(wrn, IMAGES, blocks=40, policy="fisher", data=data, verify=False).record
    units = record.details["units"]
    total = sum(unit["score"] for unit in units)
    assert sum(unit["copies"] for unit in units) == 40
    for unit in units:  # highest averages: nobody is far from the share of all blocks, old and new
        assert abs(1 + unit["copies"] - unit["score"] / total * 47) < 4 or unit["copies"] == 0
    best = max(units, key=lambda unit: unit["score"])
    assert best["copies"] == max(unit["copies"] for unit in units)
    with pytest.raises(DataError, match="the policy 'fisher' needs data"):
        deepen(wrn, IMAGES, blocks=1, policy="fisher")


def test_fits(wrn):
    size = sum(p.numel() for p in wrn.parameters())
    first = 2 * (16 * 16 * 9) + 2 * 32  # of the first stage
    for fit, target, params in (
        ("first", size + 1, size + first),
        ("under", size + first + 1, size + first),
        ("closest", size + first + 10, size + first),
        ("closest", size + first - 10, size + first),
    ):
        assert deepen(wrn, IMAGES, target_params=target, fit=fit, verify=False).record.after["params"] == params
    record = deepen(wrn, IMAGES, target_macs=60e6, verify=False).record
    assert record.after["macs"] >= 60e6 > record.details["steps"][-2]["macs"]


def test_targets_that_cannot_be(wrn):
    for options, text in (
        ({"target_params": 5}, "the target of 5 parameters is not above the 272,282"),
        ({"target_params": 1e15}, "would take more than 1,000 copies of blocks; with so many the model has"),
        ({"target_params": 272_500, "fit": "under"}, "--fit under: the first copy leads from .* the nearest that"),
        ({}, "give one target"),
        ({"blocks": 1, "target_params": 1e6}, "give one target"),
        ({"blocks": 0}, "the target of 0 new blocks is not above the 0"),
        ({"blocks": 1, "policy": "best"}, "'best' is not one of uniform, fisher"),
        ({"blocks": 1, "fit": "best"}, "'best' is not one of first, closest, under"),
    ):
        with pytest.raises(TargetError, match=text):
            deepen(wrn, IMAGES, **options)
    with pytest.raises(NothingToGrowError, match=r"--at groups.9: names no block that can be copied; those are named"):
        deepen(wrn, IMAGES, blocks=1, at=["groups.9"])
    with pytest.raises(TraceError, match="does not accept inputs"):
        deepen(wrn, torch.randn(2, 5, 32, 32), blocks=1)


def test_a_size_that_was_not_decided_is_refused(wrn, monkeypatch):
    monkeypatch.setattr("morph.deepening._cost", lambda *_: {"params": 7, "macs": 7, "blocks": 1})
    with pytest.raises(CheckFailedError, match=r"the new model has .* were decided"):
        deepen(wrn, IMAGES, blocks=1, verify=False)


# Plans and names


def test_replay_gives_the_same_bits(wrn, tmp_path):
    shot = Snapshot(wrn)
    result = deepen(wrn, IMAGES, blocks=5)
    result.record.save(tmp_path / "record.json")
    again = morph.replay(wrn, morph.load_plan(tmp_path / "record.json"), IMAGES)
    assert shot.same()
    one, two = result.model.state_dict(), again.model.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(PlanMismatchError, match=r"groups.2 has 4 children, the plan expects 3; that is the length .*"):
        morph.replay(result.model, result.record.plan, IMAGES)


def test_plans_for_other_models_are_refused(wrn):
    (edit,) = deepen(wrn, IMAGES, at=["groups.1.1"], blocks=1, verify=False).record.plan.edits
    shot = Snapshot(wrn)
    for change, text in (
        ({"container": "groups.7"}, "groups.7 should be a Sequential or ModuleList, there is nothing"),
        ({"container": "groups.1.1"}, "groups.1.1 should be a Sequential or ModuleList, there is WideBlock"),
        ({"length": 9}, "groups.1 has 3 children, the plan expects 9$"),
        ({"blocks": ("2", "1")}, "groups.1 has no neighbouring children 2, 1"),
        ({"blocks": ("8",)}, "groups.1 has no neighbouring children 8"),
        ({"blocks": ()}, r"has no neighbouring children \(none named\)"),
        ({"params": 9}, "1 have 18,560 parameters, the plan expects 9"),
        ({"zeroed": ("1.nothing",)}, "has no parameter 1.nothing"),
    ):
        values = {name: getattr(edit, name) for name in edit.__dataclass_fields__} | change
        with pytest.raises(PlanMismatchError, match=text):
            apply_plan(wrn, Plan((Deepen(**values),)))
    assert shot.same()
    value = Plan((edit,)).to_json()
    assert Plan.from_json([{**value[0], "blocks": ["1"], "zeroed": ["1.conv2.weight"]}]) == Plan((edit,))
    with pytest.raises(PlanMismatchError, match="zeroed cannot be 'x'"):
        Plan.from_json([{**value[0], "blocks": ["1"], "zeroed": "x"}])


@pytest.mark.parametrize("name", ["resnet18", "vit", "mobilenet_v2", "swin"])
def test_every_tensor_can_be_followed(name):
    make, size, _ = NETWORKS[name]
    net = randomise(make())
    result = deepen(net, torch.randn(2, 3, size, size), blocks=6, verify=False)
    before, after = net.state_dict(), result.model.state_dict()
    names = names_after(net, result.record.plan)
    assert list(names) == list(before)
    assert len(set(names.values())) == len(names)
    assert all(torch.equal(before[old], after[new]) for old, new in names.items())
    renamed = renamed_modules(net, result.record.plan)
    assert renamed == result.record.details["renamed"]
    for old, new in names.items():  # the rule for readers of the record
        prefix = max((p for p in renamed if old.startswith(f"{p}.")), key=len, default=None)
        assert new == (old if prefix is None else renamed[prefix] + old[len(prefix) :])


def test_chains_inside_chains_are_followed():
    net = chain(Residual(), nn.Sequential(Residual(), Residual()), Residual())
    plan = deepen(net, X, blocks=8).record.plan
    before, after = net.state_dict(), morph.replay(net, plan, X).model.state_dict()
    names = names_after(net, plan)
    assert all(torch.equal(before[old], after[new]) for old, new in names.items())
    assert names["1.1.1.conv.weight"] == "1.4.3.conv.weight"
    with pytest.raises(PlanMismatchError, match="made for another model"):
        names_after(chain(Residual()), plan)


def test_names_of_copies():
    assert [name for name, _, _ in chain_with_copies(["0", "1", "2"], ["1"], 2)] == ["0", "1", "2", "3", "4"]
    assert chain_with_copies(["a", "b_copy1", "b"], ["b"], 2)[2:] == [
        ("b", "b", False),
        ("b_copy2", "b", True),
        ("b_copy3", "b", True),
    ]
    assert [name for name, _, _ in chain_with_copies(["2", "3"], ["2"], 1)] == ["2", "2_copy1", "3"]


def test_gradients_and_tied_weights():
    """A copy has no gradients of its own yet, and what its blocks share among themselves it shares too."""
    net = randomise(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sequential(Residual(), Residual())))
    net(X).sum().backward()
    grown = deepen(net, X, blocks=2).model
    assert net[1][0].conv.weight.grad is not None
    assert grown[1][1].conv.weight.grad is None
    block = BasicBlock(5, 5)
    block.conv2.weight = block.conv1.weight
    tied = randomise(nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Sequential(block)))
    result = deepen(tied, X, blocks=1)
    new = result.model[2][1]
    assert new.conv1.weight is new.conv2.weight
    assert result.record.after["params"] - result.record.before["params"] == 5 * 5 * 9 + 4 * 5
