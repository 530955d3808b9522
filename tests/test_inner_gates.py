"""Gates on weights that no node of a traced graph calls: inside attention, and those that functions multiply with."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torchvision
from gate_support import outputs, shut
from models import Snapshot, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import morph
from morph.errors import TraceError
from morph.passes.gates import gates_of


class Encoder(nn.Module):
    """Attention between batch norms, whose stream can be cut, with queries from elsewhere in the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.after = nn.Linear(7, 15), nn.BatchNorm1d(15), nn.BatchNorm1d(15)
        self.one = nn.MultiheadAttention(15, 5, batch_first=True)
        self.two = nn.MultiheadAttention(15, 3, kdim=11, vdim=11, batch_first=True)
        self.memory, self.wide, self.narrow = nn.Linear(7, 11), nn.Linear(15, 13), nn.Linear(13, 15)
        self.head = nn.Linear(15, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.stem(x).transpose(1, 2)).transpose(1, 2)
        y = y + self.one(y, y, y, need_weights=False)[0]
        m = torch.tanh(self.memory(x))
        y = self.after(y.transpose(1, 2)).transpose(1, 2)
        y = y + self.two(y, m, m, need_weights=False)[0]
        return self.head(y + self.narrow(F.gelu(self.wide(y))))


class Functions(nn.Module):
    """Weights of the model itself, of a list, of a table, and of layers that the code reads past."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
        self.kernel = nn.Parameter(torch.zeros(9, 10, 3, 3))
        self.turned = nn.Parameter(torch.zeros(9, 7, 2, 2))
        self.rows = nn.ParameterList([torch.zeros(8, 7), torch.zeros(8, 6), torch.zeros(4, 6)])
        self.tables = nn.ParameterDict({"a": torch.zeros(5, 4)})
        self.layer = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.tanh(F.conv2d(x, self.kernel, padding=1))
        x = torch.tanh(F.conv_transpose2d(x, self.turned)).mean((2, 3))
        x = torch.tanh(F.linear(x, self.rows[0])) @ self.rows[1]
        x = torch.tanh(x).matmul(self.rows[2].t())
        x = torch.sigmoid(F.linear(torch.tanh(x), self.tables["a"]))
        return self.head(torch.tanh(F.linear(x, self.layer.weight, self.layer.bias)))


class Mixed(nn.Module):
    """Channels that a layer and a function both read, and some that either reads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Linear(5, 12), nn.Linear(12, 7)
        self.right, self.part = nn.Parameter(torch.zeros(7, 12)), nn.Parameter(torch.zeros(7, 4))
        self.tail, self.last = nn.Linear(5, 11), nn.Linear(7, 4)
        self.alone = nn.Parameter(torch.zeros(7, 11))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.stem(x))
        z = self.left(y) + F.linear(y, self.right) + F.linear(y[..., :4], self.part)
        return self.last(torch.tanh(z) + F.linear(torch.tanh(self.tail(x)), self.alone))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...], int]] = {
    "encoder": (Encoder, (3, 4, 7), 2),
    "functions": (Functions, (3, 3, 8, 7), 7),
    "mixed": (Mixed, (3, 5), 1),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    kind, shape, _ = NETS[name]
    model = randomise(kind(), 3).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    return model, torch.randn(shape, dtype=torch.float64)


def multiplied(model: nn.Module, gated: Any, x: Tensor, gates: dict[str, Tensor]) -> Any:
    """The second implementation: the model itself with columns of its weights multiplied."""
    weights: dict[str, Tensor] = {}
    for site in gated.sites:
        for path, tap in zip(site.readers, site.taps, strict=True):
            names = dict(model.named_parameters())
            name = tap.reader if tap.reader in names else f"{path}.weight"
            weight = weights.get(name, names[name])
            own = gates[site.name]
            factor = torch.stack([own[i] if i >= 0 else own.new_ones(()) for i in tap.index])
            axis = 0 if name in ("turned", "rows.1") else 1
            weights[name] = weight * factor.reshape([-1 if a == axis else 1 for a in range(weight.dim())])
    return torch.func.functional_call(model, weights, x)


@pytest.mark.parametrize("where", ["auto", "producer", "connection"])
@pytest.mark.parametrize("name", NETS)
def test_outputs_and_gradients_are_those_of_multiplied_weights(name, where):
    model, x = made(name)
    shot = Snapshot(model)
    gated = morph.gate(model, x, where=where)
    inner = {t.reader for s in gated.sites for t in s.taps} & {n for n, _ in model.named_parameters()}
    assert len(inner) == NETS[name][2]
    for training in (False, True):
        assert torch.equal(copy.deepcopy(model).train(training)(x), copy.deepcopy(gated.model).train(training)(x))
    shut(gated, 0.3, 1)
    gates = {n: g.weight.detach().clone().requires_grad_() for n, g in gates_of(gated.model).items()}
    wanted, got = multiplied(model, gated, x, gates), gated.model(x)
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)
    way = torch.randn_like(wanted)
    (wanted * way).sum().backward()
    (got * way).sum().backward()
    for site, gate in gates_of(gated.model).items():
        torch.testing.assert_close(gate.weight.grad, gates[site].grad, rtol=1e-9, atol=1e-11, msg=site)
        assert gate.weight.grad.count_nonzero() == len(gate.weight), site
    model.zero_grad()
    assert shot.same()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("where", ["auto", "producer"])
@pytest.mark.parametrize("name", NETS)
def test_closed_gates_go_exactly_and_are_counted(name, where, seed):
    model, x = made(name)
    gated = morph.gate(model, x, where=where)
    closed = shut(gated, (0.2, 0.5, 0.8, 1.0)[seed], seed)
    result = gated.remove()
    again = {n: g.weight.detach().clone() for n, g in gates_of(gated.model).items()}
    for kept in result.record.details["kept"]:
        for gate in kept["gates"]:
            assert float(again[kept["site"]][gate]) == 0  # stays as a channel of zeros
    wanted = multiplied(model, gated, x, again)
    torch.testing.assert_close(result.model(x), wanted, rtol=1e-9, atol=1e-10)
    assert sum(p.numel() for p in result.model.parameters()) == gated.sizes(closed).params
    assert gated.sizes(closed).params < sum(p.numel() for p in model.parameters())
    if where == "producer" and seed < 3:
        assert type(result.model) is type(model)


def test_a_graph_that_loses_heads_and_connections():
    """Heads of one attention leave while a layer reads a part of the stream, so that the graph must carry both."""
    model, x = made("encoder")
    gated = morph.gate(model, x)
    masks = {site.name: torch.zeros(site.gates, dtype=torch.bool) for site in gated.sites}
    masks["one.out_proj.weight"][[1, 3]] = True
    masks["wide"][::3] = True
    result = gated.remove(masks)
    assert isinstance(result.model, torch.fx.GraphModule)
    assert result.model.one.num_heads == 3
    gates = {n: torch.where(masks[n], 0.0, 1.0).double() for n in masks}
    torch.testing.assert_close(result.model(x), multiplied(model, gated, x, gates), rtol=1e-10, atol=1e-11)


def test_channels_that_a_layer_and_a_function_read_have_gates_of_the_layer_alone():
    model, x = made("mixed")
    gated = morph.gate(model, x)
    assert [s.name for s in gated.sites] == ["left", "alone", "last"]
    assert gated.left["right"] == "it is used by aten.mm.default, not by a convolution or linear layer"


@pytest.mark.parametrize("name", NETS)
def test_gated_graphs_learn_copy_and_load(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    net = gated.model
    base = torch.optim.SGD([p for n, p in net.named_parameters() if "morph_gates" not in n], 1e-4)
    apg = morph.attach_gates(base, gates_of(net), lr=1e-4, lambda2=0.2)
    for _ in range(3):
        base.zero_grad()
        net(x).square().mean().backward()
        base.step()
    assert all((gate.weight != 1).all() for gate in gates_of(net).values())
    assert apg.closed().keys() == gates_of(net).keys()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert torch.equal(outputs(twin, x)[0], outputs(net, x)[0])
        for gate in gates_of(twin).values():
            gate.weight.data.zero_()
        assert not torch.equal(outputs(twin, x)[0], outputs(net, x)[0])
    assert sum(p.numel() for p in gated.remove().model.parameters()) <= sum(p.numel() for p in model.parameters())


class Recurrent(nn.Module):
    """Recurrent layers in both directions, whose two weights read the same channels."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 9)
        self.turn = kind(9, 7, batch_first=True, num_layers=2, **options)
        self.middle, self.head = nn.Linear(7 * (1 + self.turn.bidirectional), 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.middle(self.turn(torch.tanh(self.stem(x)))[0])))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_recurrent_layers_read_is_gated_and_leaves_their_graph(kind, both):
    torch.manual_seed(0)
    model, x = Recurrent(kind, bidirectional=both).double().eval(), torch.randn(3, 4, 5, dtype=torch.float64)
    gated = morph.gate(model, x, where="connection")
    inner = [s for s in gated.sites if s.readers == ("turn",) * (1 + both)]
    assert [s.name for s in inner] == ["stem.weight[0]" if both else "turn.weight_ih_l0"]
    assert torch.equal(gated.model(x), model(x))
    masks = {s.name: torch.arange(s.gates) % 3 == 1 for s in gated.sites}
    result = gated.remove(masks)
    assert result.record.details["form"] == "graph"
    assert result.model.turn.input_size == 6
    own = copy.deepcopy(model)
    with torch.no_grad():
        for name in ("turn.weight_ih_l0", "turn.weight_ih_l0_reverse")[: 1 + both]:
            own.get_parameter(name)[:, 1::3] = 0
        own.middle.weight[:, 1::3] = 0
        own.head.weight[:, 1::3] = 0
    torch.testing.assert_close(result.model(x), own(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["class", "graph"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 4}], ids=str)
def test_recurrent_layers_are_cut_in_both_forms(form, options):
    torch.manual_seed(0)
    model, x = Recurrent(nn.LSTM, **options).double(), torch.randn(3, 4, 5, dtype=torch.float64)
    if "proj_size" in options:
        model.middle = nn.Linear(4, 6).double()
    cut = morph.prune(model, x, ratio=0.5, form=form)
    assert cut.record.details["form"] == form
    turn = cut.model.turn
    assert (turn.input_size, turn.hidden_size) == (5, 4 if "proj_size" in options else 3)
    assert turn.proj_size == (1 if "proj_size" in options else 0)
    assert cut.record.checks[0].max_abs_diff < 1e-12


def test_heads_inside_one_call_of_a_function_are_left_whole_and_named():
    """The graph of torchvision's Swin has the number of heads inside a function of many steps."""
    torch.manual_seed(0)
    swin = torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 3], [4, 4], num_classes=5).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gated = morph.gate(swin, x)
    assert "cannot carry the removal" in gated.left["features.1.0.attn.proj.weight"]
    assert not any("attn" in site.name for site in gated.sites)
    result = gated.remove({s.name: torch.arange(s.gates) % 4 == 1 for s in gated.sites})
    assert result.record.checks[0].max_abs_diff < 1e-12


def test_layers_of_a_transformer_of_torch_are_gated_inside():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 17, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Linear(5, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 3)
    )
    model, x = model.double(), torch.randn(3, 4, 5, dtype=torch.float64)
    gated = morph.gate(model, x)
    assert [s.gates for s in gated.sites if s.name.endswith("out_proj.weight")] == [3, 3]
    assert [s.gates for s in gated.sites if s.name.endswith("linear2.weight")] == [17, 17]
    for training in (True, False):
        assert torch.equal(gated.model.train(training)(x), copy.deepcopy(model).train(training)(x))
    gated.model(x).sum().backward()
    assert all(gate.weight.grad.count_nonzero() == len(gate.weight) for gate in gates_of(gated.model).values())
    result = gated.remove({s.name: torch.arange(s.gates) % 3 == 1 for s in gated.sites})
    assert result.record.checks[0].max_abs_diff < 1e-12


class Kept(nn.Module):
    """Keeps a product with a gradient, and cannot be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.cache = nn.Linear(3, 5), nn.Linear(5, 2), {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] < 1:
            raise ValueError
        self.cache["last"] = self.one.weight * 2
        return self.two(torch.relu(self.one(x)))


def test_what_a_gated_model_keeps_of_a_run_with_gradients_is_named():
    gated = morph.gate(Kept(), torch.randn(2, 3))
    gated.model(torch.randn(2, 3))
    with pytest.raises(TraceError, match="keeps results of a run with gradients in cache and cannot be copied"):
        gated.remove()
