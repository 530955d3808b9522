"""Hooks that change what a layer reads or gives, and buffers that code computes with, in both forms and with gates."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from analysis_support import gap, run, slow_zeroed, some_units
from gate_support import outputs, shut
from models import randomise
from torch import Tensor, nn

import morph
from morph.errors import MorphError
from morph.removal import Remover
from morph.tracing import trace_graph


class Net(nn.Module):
    """Three convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 13, 3), nn.Conv2d(13, 11, 1), nn.Conv2d(11, 9, 1)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


class Frozen(Net):
    """Norms whose statistics are buffers, with which the code computes a scale and a shift; and a table of them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(11))
        self.register_buffer("spread", torch.ones(11))
        self.register_buffer("table", torch.randn(1, 11, 23, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        x = x * (self.scale * (self.spread.abs() + 0.1).rsqrt()).reshape(1, -1, 1, 1)
        x = x + self.table[:, :, : x.shape[2]]
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


def hooked(model: nn.Module) -> nn.Module:
    model.second.register_forward_hook(lambda module, inputs, output: output * torch.sigmoid(output))
    model.third.register_forward_pre_hook(lambda module, inputs: (inputs[0] - 0.5,))
    return model


IMAGES = torch.randn(3, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["hooks", "buffers"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    net = randomise((Net if request.param == "hooks" else Frozen)().double(), 1).eval()
    return hooked(net) if request.param == "hooks" else net


@pytest.mark.parametrize("form", ["class", "graph"])
@pytest.mark.parametrize("seed", range(2))
def test_cuts_and_growth_are_exact(model, form, seed):
    analysis = morph.analyse(model, IMAGES)
    done = Remover(model, IMAGES, analysis, form).remove(some_units(analysis, seed))
    assert not done.left
    assert len(done.choice) == 3
    assert gap(run(slow_zeroed(model, analysis, done.choice), IMAGES), run(done.model, IMAGES)) < 1e-12
    wide = morph.widen(model, IMAGES, ratio=1.5, form=form, verify=False)
    assert gap(run(model, IMAGES), run(wide.model, IMAGES)) < 1e-12


@pytest.mark.parametrize("where", ["auto", "producer", "connection"])
def test_gates_change_nothing_at_birth_and_are_taken_out(model, where):
    gated = morph.gate(model, IMAGES, where)
    assert gap(outputs(model, IMAGES), outputs(gated.model, IMAGES)) == 0
    shut(gated, 0.5, 1)
    done = gated.remove()
    assert gap(outputs(gated.model, IMAGES), outputs(done.model, IMAGES)) < 1e-12
    assert morph.replay(gated._plain(), done.record.plan, IMAGES).record.checks[0].relative < 1e-12
    if isinstance(model, Frozen):
        return
    assert "hooks" in " ".join(gated.left.values())


def test_buffers_stay_buffers_in_graphs_and_in_pickled_graphs():
    model = randomise(Frozen().double()).eval()
    file = io.BytesIO()
    torch.save(trace_graph(copy.deepcopy(model)), file)
    file.seek(0)
    graphs = [trace_graph(copy.deepcopy(model)), torch.load(file, weights_only=False)]
    for net in (model, *graphs):
        net.spread.mul_(3)
    assert all(torch.equal(graph(IMAGES), model(IMAGES)) for graph in graphs)


@pytest.mark.parametrize("before", [True, False])
def test_hooks_of_the_model_itself_stay_with_its_class(before):
    model = randomise(Net().double()).eval()
    if before:
        model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    else:
        model.register_forward_hook(lambda module, inputs, output: output**2)
    with pytest.raises(MorphError, match="it has hooks of its own"):
        morph.widen(model, IMAGES, ratio=1.5, form="graph", verify=False)
    gated = morph.gate(model, IMAGES)
    assert gap(outputs(model, IMAGES), outputs(gated.model, IMAGES)) < 1e-12
    shut(gated, 0.5, 1)
    assert gap(outputs(gated.model, IMAGES), outputs(gated.remove().model, IMAGES)) < 1e-12


def test_hooks_by_which_torch_computes_weights_are_counted_with():
    model = randomise(Net().double()).eval()
    nn.utils.spectral_norm(model.second)
    done = morph.prune(model, IMAGES, ratio=0.4, ranking="local")
    again = morph.replay(model, done.record.plan, IMAGES)
    assert again.record.after["params"] == done.record.after["params"]
    assert torch.equal(again.model(IMAGES), done.model(IMAGES))


class Own(nn.Conv2d):
    """A convolution with a forward of its own, which standardises its weights; a tracer does not look into it."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias)


def test_a_graph_that_calls_layers_of_the_users_class_is_saved(tmp_path):
    model = Net()
    model.second = Own(13, 11, 1)
    model = randomise(model.double()).eval()
    graph = morph.prune(model, IMAGES, ratio=0.3, form="graph").model
    morph.save_model(graph, tmp_path / "graph.pt")
    assert torch.equal(morph.open_model(tmp_path / "graph.pt").model(IMAGES), graph(IMAGES))


class Locked(Net):
    """Has what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_refused_in_one_line(tmp_path):
    model, x = Locked(), IMAGES.float()
    for refused in (
        lambda: morph.analyse(model, x),
        lambda: morph.trace(model, x),
        lambda: morph.gate(model, x),
        lambda: morph.count(model, x),
        lambda: morph.replay(model, morph.Plan(()), x),
        lambda: morph.deepen(model, x, target_params=1e5),
        lambda: morph.swap_head(model, num_classes=7, inputs=x),
        lambda: morph.save_model(model, tmp_path / "model.pt"),
    ):
        with pytest.raises(MorphError, match=r"copied.*lock"):
            refused()
