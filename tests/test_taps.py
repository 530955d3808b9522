"""Taps: what they hand out, what they leave alone, and what they refuse."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import get_model

import morph
from morph.errors import TapError, TraceError
from morph.zoo import build


class Net(nn.Module):
    """In-place functions, a module used twice, one that is used in training only, a branch, and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.side = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.heads = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)])
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x = self.relu(self.norm(self.first(x)))
        y = self.twice(x)
        y = torch.tanh(self.twice(y) * self.scale)
        y = y + self.side(x)
        y = F.dropout(F.relu(y, inplace=True).mean((2, 3)), 0.3, self.training)
        out = self.heads[0](self.drop(y))
        return (out, self.heads[1](y)) if self.training else out


class ByHand(Net):
    """A twin that writes down what flows where."""

    def forward(self, x):
        seen = {"first": self.first(x)}
        seen["norm"] = self.norm(seen["first"])
        seen["relu"] = torch.relu(seen["norm"])
        seen["twice#1"] = self.twice(seen["relu"])
        seen["twice#2"] = self.twice(seen["twice#1"])
        seen["mul"] = seen["twice#2"] * self.scale
        seen["tanh"] = torch.tanh(seen["mul"])
        seen["side"] = self.side(seen["relu"])
        seen["add"] = seen["tanh"] + seen["side"]
        seen["relu_1"] = torch.relu(seen["add"])
        seen["mean"] = seen["relu_1"].mean((2, 3))
        seen["dropout"] = F.dropout(seen["mean"], 0.3, self.training)
        seen["drop"] = self.drop(seen["dropout"])
        seen["heads.0"] = self.heads[0](seen["drop"])
        return seen


def pair() -> tuple[Net, ByHand]:
    net = Net().double()
    twin = ByHand().double()
    twin.load_state_dict(net.state_dict())
    return net, twin


MODULES = ["first", "norm", "relu", "twice", "side", "heads.0"]
FUNCTIONS = ["mul", "tanh", "add", "mean"]


@pytest.mark.parametrize("names", [MODULES, MODULES + FUNCTIONS], ids=["modules", "with functions"])
@pytest.mark.parametrize("training", [False, True])
def test_taps_against_a_twin_by_hand(names, training):
    net, twin = pair()
    net.train(training), twin.train(training)
    taps = morph.tap(net, names)
    for seed in range(3):  # the first pass copies everything, the later ones what is written over
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        torch.manual_seed(seed)
        output, features = taps(x)
        torch.manual_seed(seed)
        expected = twin(x)
        assert set(features) == {n for n in expected if n.split("#")[0] in names}
        for name, value in features.items():
            assert torch.equal(value, expected[name]), name
        assert torch.equal(output[0] if training else output, expected["heads.0"])
    for (name, ours), theirs in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_wrong_twin_is_noticed():
    net, twin = pair()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    features = morph.tap(net.eval(), ["norm"]).features(x)
    assert not torch.equal(features["norm"], twin.eval()(x)["relu"])


@pytest.mark.parametrize("names", [MODULES[:-1], [*MODULES[:-1], "tanh", "add"]], ids=["modules", "with functions"])
def test_gradients_flow_and_go_to_the_users_own_parameters(names):
    net, twin = pair()
    net.eval(), twin.eval()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    taps = morph.tap(net, names)
    for _ in range(2):
        net.zero_grad(), twin.zero_grad()
        features, expected = taps.features(x), twin(x)
        sum(value.square().sum() for value in features.values()).backward()
        sum(expected[name].square().sum() for name in features).backward()
        for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
            if name.startswith("heads"):
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


@pytest.mark.parametrize("names", [["twice", "norm"], ["twice", "tanh"]], ids=["modules", "with functions"])
def test_the_model_is_left_as_it_is(names):
    net, _ = pair()
    net.norm.eval()
    calls = []
    net.first.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(net.state_dict())
    facts = {p: (m.training, len(m._forward_hooks), set(vars(m))) for p, m in net.named_modules()}
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    states = torch.get_rng_state()
    taps = morph.tap(net, names, x)
    assert torch.equal(states, torch.get_rng_state())
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    net.eval()
    taps(x), taps.features(x)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    net.train(), net.norm.eval()
    assert {p: (m.training, len(m._forward_hooks), set(vars(m))) for p, m in net.named_modules()} == facts
    assert len(calls) >= 3


def counted(net: nn.Module) -> dict[str, int]:
    """Count the calls of its leaf modules from now on."""
    counts: dict[str, int] = {}
    for path, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, path=path: counts.update({path: counts.get(path, 0) + 1}))
    return counts


def test_no_more_is_computed_than_needed():
    net, _ = pair()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    modules, functions = morph.tap(net.eval(), "twice"), morph.tap(net, "mul")
    for taps in (modules, functions):
        taps.features(x)
    counts = counted(net)
    modules.features(x)
    assert counts == {"first": 1, "norm": 1, "relu": 1, "twice": 2}
    counts.clear()
    functions.features(x)
    assert counts == {"first": 1, "norm": 1, "relu": 1, "twice": 2}
    counts.clear()
    modules(x)
    assert counts == {"first": 1, "norm": 1, "relu": 1, "twice": 2, "side": 1, "drop": 1, "heads.0": 1}


def test_a_pass_that_ends_early_moves_nothing_behind_its_end():
    net, _ = pair()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    for names in ("first", ["first", "mul"]):
        torch.manual_seed(0)
        morph.tap(net, names).features(x)
    draw = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(draw, torch.rand(1))  # neither dropout drew
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}  # by "mul"
    assert net.norm.num_batches_tracked == 1


def test_functions_keep_the_branch_that_writes_in_place():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu = nn.Linear(3, 3), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.a(x)
            self.relu(y)  # its result is not used
            y.mul_(2)
            return (y + 1) * 2

    net, x = Writes(), torch.randn(4, 3)
    assert torch.equal(morph.tap(net, "add").features(x)["add"], 2 * F.relu(net.a(x)) + 1)
    assert torch.equal(morph.tap(net, ["a", "add"])(x).features["a"], net.a(x))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("resnet18", ["layer?", "add_3"]),
        ("mobilenet_v2", ["features.3", "features.1?"]),
        ("densenet121", ["features.denseblock?", "cat_4"]),
        ("swin_t", ["features.1", "features.3.1.mlp", "add_2"]),
        ("efficientnet_b0", ["features.2", "mul_3"]),
    ],
)
def test_models_of_torchvision(name, names):
    torch.manual_seed(0)
    model = get_model(name, weights=None).eval()
    x = torch.randn(2, 3, 64, 64)
    taps = morph.tap(model, names)
    tapped = taps.features(x)
    modules = {path: m for path, m in model.named_modules() if path in tapped}
    assert modules
    seen, handles = {}, []
    for path, module in modules.items():
        handles.append(module.register_forward_hook(lambda m, a, out, path=path: seen.update({path: out.clone()})))
    expected = model(x)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        output, features = taps(x)
        alone = taps.features(x)
    assert torch.equal(output, expected)
    assert seen.keys() <= features.keys()
    assert all(torch.equal(features[path], seen[path]) for path in seen)
    assert all(torch.equal(alone[path], features[path]) for path in features)


def test_a_model_that_cannot_be_traced_is_tapped_by_modules():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.b(x)

    net = Branches()
    taps = morph.tap(net, ["b"])
    for sign in (1, -1):
        x = sign * torch.ones(2, 3)
        assert torch.equal(taps(x).features["b"], net(x))
    with pytest.raises(TapError, match=r"no module or node 'add'.*cannot be traced"):
        morph.tap(net, "add")
    with pytest.raises(TapError, match="the module a is not called in training mode"):
        morph.tap(net, "a")(-torch.ones(2, 3))


def test_a_graph_that_fixes_what_changes_is_refused():
    class Draws(nn.Module):
        def forward(self, x):
            return x * torch.rand(3) + 1

    taps = morph.tap(Draws(), "add")
    state = torch.get_rng_state()
    with pytest.raises(TapError, match="does not compute what its forward computes"):
        taps(torch.ones(2, 3))
    assert torch.equal(state, torch.get_rng_state())


def test_hooks_around_functions_are_refused_and_hooks_of_layers_fire():
    model = get_model("resnet18", weights=None).eval()
    calls = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    taps = morph.tap(model, "add")
    taps(torch.zeros(1, 3, 32, 32))
    assert calls
    model.layer1[0].register_forward_hook(lambda *_: None)
    with pytest.raises(TapError, match=r"layer1\.0 has hooks"):
        morph.tap(model, "add")(torch.zeros(1, 3, 32, 32))
    assert morph.tap(model, "layer1.0")(torch.zeros(1, 3, 32, 32)).features


def test_a_module_that_is_replaced_is_followed():
    net, _ = pair()
    net.eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for taps in (morph.tap(net, "side"), morph.tap(net, "add")):
        taps(x)
        net.side = nn.Conv2d(4, 4, 1).double()
        output, _ = taps(x)
        assert torch.equal(output, net(x))


def test_modes_name_their_nodes_apart():
    """In training there are more functions; taps stay on those of evaluation, or are refused."""

    class Modes(nn.Module):
        def forward(self, x):
            y = x * 2
            if self.training:
                y = y + 1
            return (y + 3).relu()

    net, x = Modes(), torch.randn(3, 2)
    taps = morph.tap(net.eval(), ["add", "relu"])
    assert torch.equal(taps(x).features["add"], x * 2 + 3)
    with pytest.raises(TapError, match="cannot be told among the 2 of its kind in training mode"):
        morph.tap(net.train(), ["add"])(x)
    assert torch.equal(morph.tap(net, "relu")(x).features["relu"], (x * 2 + 1 + 3).relu())


def test_shapes_and_text():
    taps = morph.tap(build("darts-10"), ["cells.2", "cells.9"], torch.zeros(1, 3, 32, 32))
    assert taps.shapes == {"cells.2": (1, 64, 32, 32), "cells.9": (1, 256, 8, 8)}
    assert str(taps) == "cells.2  1x64x32x32\ncells.9  1x256x8x8"
    assert str(morph.tap(build("darts-10"), "cells.2")) == "cells.2"


def test_inference_mode():
    net, twin = pair()
    net.eval(), twin.eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.inference_mode():
        for names in (["norm"], ["add"]):
            taps = morph.tap(net, names)
            for _ in range(2):
                assert torch.equal(taps(x).features[names[0]], twin(x)[names[0]])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("layer5", "no module or node 'layer5' in ResNet; nearest: layer"),
        ("ad", "nearest: add"),
        ("layer9*", "no module or node 'layer9*'"),
        ([], "no names of taps"),
        ("layer1#2", "is called 1 times in evaluation mode, there is no call 2"),
    ],
)
def test_names_that_do_not_exist(names, text):
    model = get_model("resnet18", weights=None)
    with pytest.raises(TapError) as error:
        morph.tap(model, names, torch.zeros(1, 3, 32, 32))
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_lists_and_other_inputs_are_refused():
    with pytest.raises(TapError, match="heads is a ModuleList, which is never called"):
        morph.tap(Net(), "heads")
    with pytest.raises(TraceError, match="does not accept inputs"):
        morph.tap(Net(), "first", torch.zeros(1, 5, 6, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert morph.tap(Net().double(), "heads.*").features(torch.zeros(2, 3, 6, 6).double()).keys() == {
            "heads.0",
            "heads.1",
        }
