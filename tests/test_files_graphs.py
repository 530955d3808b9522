from __future__ import annotations

import math
import warnings

import pytest
import torch
import torchvision
from files_support import assert_same_model, outputs, randomised, round_trip, same
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models.feature_extraction import create_feature_extractor

from morph.errors import ModelFileError
from morph.files import graphs, open_model, save_model
from morph.files.network import GraphNetwork


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.gain = nn.Parameter(torch.randn(channels, 1, 1))
        self.note = object()

    def forward(self, x):
        return x + self.gain * F.relu(self.bn(self.conv(x)))


class UserNet(nn.Module):
    """Two modes, shared blocks, a moving buffer, a constant, an unused part, a torchvision part kept whole."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 1), Block(5))
        self.block = Block(5)
        self.again = self.block
        self.vision = torchvision.ops.Conv2dNormActivation(5, 7, 3)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(7, 11)
        self.auxiliary = nn.Linear(5, 11)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("hidden", torch.randn(11), persistent=False)

    def forward(self, x):
        y = self.again(self.block(self.stem(x)))
        if self.training:
            self.seen.add_(1)
        logits = self.head(self.dropout(self.vision(y).mean((2, 3)))) * torch.tensor([2.0]) + self.hidden
        assert logits.shape[1] is not None
        return (logits, self.auxiliary(y.flatten(2).mean(-1))) if self.training else logits


def user_net():
    """Make a `UserNet`; it can be named by callable."""
    return randomised(UserNet())


def test_a_users_class_comes_back_as_a_graph_of_both_modes(tmp_path):
    model = user_net()
    x = torch.randn(3, 3, 6, 6)
    other = round_trip(model, tmp_path, input_shape=(3, 6, 6))
    assert isinstance(other, GraphNetwork)
    assert set(other.graphs) == {"train", "eval"}
    assert_same_model(model, other, classes=False)
    assert type(other.vision) is type(model.vision)
    for training in (False, True, False):
        assert same(outputs(model, x, training), outputs(other, x, training))
    for net in (model, other):
        torch.manual_seed(1)
        net.train()
        sum(out.sum() for out in net(x)).backward()
    assert all(same(t, other.state_dict()[name]) for name, t in model.state_dict().items())  # the buffers moved alike
    assert other.seen == model.seen != user_net().seen
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    save_model(other.eval(), tmp_path / "again.morph")
    again = open_model(tmp_path / "again.morph").model
    assert_same_model(other, again)
    assert same(outputs(other, x, True), outputs(again, x, True))
    assert same(fx.symbolic_trace(again)(x), again(x))


def test_one_graph_is_kept_if_both_modes_agree(tmp_path):
    other = round_trip(nn.Sequential(Block(3), nn.ReLU()), tmp_path)
    assert type(other) is nn.Sequential
    assert set(other[0].graphs) == {"always"}


class TwoInputs(nn.Module):
    def forward(self, x, y=2.0):
        return x.unsqueeze(1)[:, 0, ..., None].to(torch.float64) * y


def test_several_inputs_with_defaults(tmp_path):
    other = round_trip(TwoInputs(), tmp_path)
    x = torch.randn(2, 3)
    assert torch.equal(other(x), TwoInputs()(x))
    assert torch.equal(other(x, 3.0), TwoInputs()(x, 3.0))


def test_graph_modules_are_kept_as_they_stand(tmp_path):
    model = fx.symbolic_trace(user_net().eval())
    other = round_trip(model, tmp_path)
    x = torch.randn(3, 3, 6, 6)
    assert same(outputs(model, x, False), outputs(other, x, False))
    assert list(model.state_dict()) == list(other.state_dict())


def test_torchvisions_feature_extractor_keeps_both_graphs(tmp_path):
    features = create_feature_extractor
    model = randomised(features(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Dropout(0.5)), {"0": "a", "1": "b"}))
    other = round_trip(model, tmp_path)
    x = torch.randn(2, 3, 4, 4)
    for training in (False, True):
        got, want = outputs(other, x, training), outputs(model, x, training)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn(1)


class Silent(nn.Module):
    def forward(self, x):
        return x if isinstance(x, Tensor) else -x


class KeepsEval(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x):
        return self.bn(x)


class Foreign(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class OddArgument(nn.Module):
    def forward(self, x):
        return x * 1j


UNSAVABLE = {
    "cannot be traced": Branches,
    "change from call to call": Random,
    "its own train\\(\\) keeps parts": KeepsEval,
    "calls .*bessel_j0, which is not among": Foreign,
    "has an argument of type": OddArgument,
}


@pytest.mark.parametrize("text", UNSAVABLE)
def test_what_cannot_be_traced_is_refused_with_the_way_out(text, tmp_path):
    with pytest.raises(ModelFileError, match=f"{text}.*--arch package.module:callable") as caught:
        save_model(UNSAVABLE[text](), tmp_path / "a.morph")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_computes_something_else_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match="Silent: its trace computes something else in training mode"):
        save_model(Silent(), tmp_path / "a.morph", input_shape=(3,))
    with pytest.raises(ModelFileError, match=r"does not run on random samples of shape \[3, 3\]"):
        save_model(KeepsNothing(), tmp_path / "a.morph", input_shape=(3, 3))
    assert list(tmp_path.iterdir()) == []


class KeepsNothing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x):
        return self.layer(x)


def _hooked():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_forward_hook(lambda *_: None)
    return model


def _tensor_hooked():
    model = nn.Linear(2, 2)
    model.weight.register_hook(lambda g: g)
    return model


def _parametrized():
    model = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    return model


def _with(value):
    model = nn.Sequential(nn.ReLU())
    model[0].extra = value
    return model


def _sparse():
    model = nn.Module()
    model.register_buffer("table", torch.eye(3).to_sparse())
    return model


def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.ReLU())


def _exported():
    return torch.export.export(nn.Linear(2, 2), (torch.randn(2, 2),)).module()


class OptimizedModule(nn.Module):
    """In place of what torch.compile returns, whose import takes seconds."""

    def __init__(self):
        super().__init__()
        self._orig_mod = nn.ReLU()


LOST = {
    "cannot save 0: it has hooks \\(_forward_hooks\\), which would be lost": _hooked,
    "cannot save weight: the tensor has hooks": _tensor_hooked,
    "cannot save 0: it is parametrized; use .*remove_parametrizations": _parametrized,
    "cannot save the model: LazyLinear has no parameters yet; run the model once": lambda: nn.LazyLinear(3),
    "cannot save the model: it is a TorchScript module": _scripted,
    "it is wrapped in DataParallel; save its .module": lambda: nn.DataParallel(nn.ReLU()),
    "it is a compiled wrapper; save its ._orig_mod": OptimizedModule,
    "cannot save 0.extra: a value of type object is not plain data": lambda: _with(object()),
    "cannot save 0.extra: a value of type function": lambda: _with(lambda x: x),
    "cannot save 0.extra: a value of type ReLU": lambda: _with((nn.ReLU(),)),
    "cannot save table: it is a Tensor of layout torch.sparse_coo": _sparse,
    "an exported program's module cannot be kept": _exported,
    "cannot save weight: it is on the meta device": lambda: nn.Linear(2, 3, device="meta"),
    "a part called 'a b'": lambda: nn.ModuleDict({"a b": nn.ReLU()}),
}


@pytest.mark.parametrize("text", LOST)
def test_what_would_be_lost_is_refused(text, tmp_path):
    with pytest.raises(ModelFileError, match=text):
        save_model(LOST[text](), tmp_path / "a.morph")
    assert list(tmp_path.iterdir()) == []


def test_every_name_a_file_may_use_exists():
    from morph.files import names

    assert all(callable(find()) for find in names.FUNCTIONS.values())
    assert all(hasattr(Tensor, name) for name in names.METHODS | names.ATTRIBUTES)


def test_graph_constants_are_told_apart_by_their_bits():
    root, constants = nn.Module(), {}
    a = graphs._constant(torch.tensor([0.0, math.nan]), root, constants)
    assert graphs._constant(torch.tensor([0.0, math.nan]), root, constants) == a
    assert graphs._constant(torch.tensor([-0.0, math.nan]), root, constants) != a
    root.constant_2 = 1
    assert graphs._constant(torch.tensor([0.0]), root, constants) == "constant_3"


class Named(nn.Module):
    """Two inputs with names, one of which has a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, image: Tensor, text: Tensor, scale: float = 2.0) -> Tensor:
        return torch.logsumexp(self.one(image) * scale + self.two(text), 1)


def test_a_network_from_a_file_takes_its_inputs_by_name(tmp_path):
    model, image, text = Named(), torch.randn(2, 3), torch.randn(2, 5)
    save_model(model, tmp_path / "model.pt")
    network = open_model(tmp_path / "model.pt").model
    wanted = model(image, text)
    for output in (network(image, text), network(image=image, text=text), network(image, text=text)):
        assert torch.equal(output, wanted)
    assert torch.equal(network(text=text, image=image, scale=3.0), model(image, text, 3.0))
    with pytest.raises(TypeError, match="the inputs of this network are image, text, scale; sound cannot be given so"):
        network(image=image, text=text, sound=image)
    with pytest.raises(TypeError, match="text cannot be given so"):
        network(text=text)


def test_a_method_that_no_file_may_name_is_refused_when_it_is_saved(tmp_path):
    class Inverting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).frac()

    with pytest.raises(ModelFileError, match=r"calls the method 'frac', which is not among .*save its state_dict"):
        save_model(Inverting(3, 4), tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())
