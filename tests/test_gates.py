"""Gates: where they stand, that they change nothing at birth, what they do, and what closing them saves."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from gate_support import MODELS, hooked, made, outputs, shut
from models import Snapshot, randomise
from torch import nn

import morph
from morph.errors import EditError, TargetError, TraceError
from morph.passes.gates import Gate, Tap, gates_of, insert_gates
from morph.zoo import build

SMALL = ["densenet", "wrn", "darts", "resnet", "mobilenet", "vit"]
NETS = ["chain", "residual", "dense", "depthwise", "grouped", "transposed", "shuffle", "squeeze", "transformer"]


@pytest.mark.parametrize("where", ["auto", "producer", "connection"])
@pytest.mark.parametrize("name", SMALL)
def test_at_birth_outputs_are_the_same_bits_and_every_gate_has_a_gradient(name, where):
    model, x = made(name)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU | nn.ReLU6):  # a channel that is zero everywhere gives its gate no gradient
            model.set_submodule(path, nn.SiLU())
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)).eval()
    shot = Snapshot(model)
    gated = morph.gate(model, x, where=where)
    plain = {n: p for n, p in model.named_parameters() if n in dict(gated.model.named_parameters())}
    assert all(torch.equal(p, plain[n]) for n, p in gated.model.named_parameters() if n in plain)
    flags = {n: m.training for n, m in model.named_modules()}
    assert all(m.training == flags[n] for n, m in gated.model.named_modules() if n in flags)
    for training in (True, False):
        one, other = copy.deepcopy(model).train(training), copy.deepcopy(gated.model).train(training)
        if name in ("darts", "mobilenet", "vit") and training:  # an auxiliary head, dropout
            continue
        assert all(torch.equal(a, b) for a, b in zip(outputs(one, x), outputs(other, x), strict=True))
        assert all(torch.equal(one.state_dict()[k], v) for k, v in other.state_dict().items() if k in one.state_dict())
    assert shot.same()
    torch.manual_seed(0)
    for module in gated.model.train().modules():
        module.training &= not isinstance(module, nn.Dropout)
    y = gated.model(x)
    (y * torch.randn_like(y)).sum().backward()
    for name_, gate in gates_of(gated.model).items():
        assert (gate.weight == 1).all()
        assert gate.weight.grad.count_nonzero() == len(gate.weight), name_


@pytest.mark.parametrize("name", [*SMALL, *NETS])
def test_a_gate_multiplies_what_its_reader_reads(name):
    """The second implementation multiplies inputs by hooks on the model's own modules, or columns of weights."""
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.3, 1)
    model = copy.deepcopy(model)
    values: dict[str, tuple[torch.Tensor, int]] = {}
    gates = gates_of(gated.model)
    for site in gated.sites:
        for path, tap in zip(site.readers, site.taps, strict=True):
            own = torch.cat([gates[site.name].weight.detach().double(), torch.ones(1, dtype=torch.float64)])
            factor = own[[i if i >= 0 else site.gates for i in tap.index]]
            if tap.reader == f"{path}.weight":  # inside attention, which does not call it
                model.get_submodule(path).weight.data.mul_(factor)
                continue
            axis = -1 if isinstance(model.get_submodule(path), nn.Linear) else 1
            before = values.get(path, (torch.ones_like(factor), axis))[0]
            values[path] = (before * factor, axis)
    for a, b in zip(hooked(model, values, x), outputs(gated.model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_gates_on_weights_have_the_gradient_of_gates_on_activations():
    model, x = made("densenet")
    gated = morph.gate(model, x)
    site = gated.sites[0]
    gated.model(x).square().sum().backward()
    factor = torch.ones(site.gates, dtype=torch.float64, requires_grad=True)
    reader = model.get_submodule(site.readers[0])
    handle = reader.register_forward_pre_hook(lambda m, args: (args[0] * factor.reshape(1, -1, 1, 1),))
    model(x).square().sum().backward()
    handle.remove()
    torch.testing.assert_close(gates_of(gated.model)[site.name].weight.grad, factor.grad, rtol=1e-10, atol=1e-12)


class Padded(nn.Module):
    """Reflecting padding, and a convolution of its own class: their gates stand on the input."""

    class Own(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect")
        self.three = self.Own(7, 4, 1)

    def forward(self, x):
        return self.three(torch.relu(self.two(torch.relu(self.one(x)))))


def test_readers_with_code_of_their_own_are_gated_at_their_input():
    torch.manual_seed(0)
    model, x = Padded().double(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    gated = morph.gate(model, x)
    assert [s.name for s in gated.sites] == ["two", "three"]
    assert torch.equal(model(x), gated.model(x))
    shut(gated, 0.4, 2)
    assert gated.remove().record.checks[0].passed


# ---- where they stand


def test_densenet_has_the_gates_of_the_paper():
    """8,832 in front of the bottlenecks, 2,304 behind them, 858 in front of transitions and classifier."""
    model = build("densenet-bc-100-12")
    gated = morph.gate(model, torch.randn(2, 3, 32, 32))
    kinds = Counter()
    for site in gated.sites:
        part = "inputs" if site.name.endswith("conv1") else "bottlenecks" if site.name.endswith("conv2") else "others"
        kinds[part, site.kind] += site.gates
    assert kinds == {("inputs", "connection"): 8832, ("bottlenecks", "producer"): 2304, ("others", "connection"): 858}
    assert gated.total == 11_994
    fifth = next(s for s in gated.sites if s.name == "stages.2.4.conv1")
    assert Counter(fifth.sources) == {"stages.1.2": 108, **{f"stages.2.{i}.conv2": 12 for i in range(4)}}
    assert (gated.sizes().params, gated.sizes().macs) == (769_162, 287_929_692)
    alpha, layers = gated.weights("macs"), 16
    spread = []
    for block, stage in enumerate((0, 2, 4)):
        inputs = torch.cat([alpha[f"stages.{stage}.{i}.conv1"] for i in range(layers)])
        assert inputs.unique().tolist() == pytest.approx([[0.15385, 0.03846, 0.00962][block]], abs=5e-6)
        inside = torch.cat([alpha[f"stages.{stage}.{i}.conv2"] for i in range(layers)])
        spread.append((round(float(inside.min()), 3), round(float(inside.max()), 3)))
    assert spread == [(0.423, 1.0), (0.173, 0.317), (0.052, 0.088)]
    last = gated.sizes({"stages.0.15.conv2": torch.arange(48) == 5})
    assert gated.sizes().macs - last.macs == 319_488


def test_where_decides_who_shares_a_gate():
    model, x = made("resnet")
    producer, connection = morph.gate(model, x, where="producer"), morph.gate(model, x, where="connection")
    stem = next(s for s in producer.sites if s.module == "conv1")
    assert stem.readers == ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0")
    assert (stem.gates, stem.kind, stem.couplings) == (8, "producer", ("conv1.weight[0]",))
    assert {s.kind for s in connection.sites} == {"connection"}
    assert all(s.readers == (s.name,) for s in connection.sites)
    auto = {s.name: s.kind for s in morph.gate(model, x).sites}
    assert (auto["layer1.0.conv2"], auto["layer1.0.conv1"], auto["fc"]) == ("producer", "connection", "producer")


def test_over_a_norm_only_connections_behind_it_are_gated():
    model, x = made("vit")
    assert {s.kind for s in morph.gate(model, x).sites if s.name.endswith("mlp.0")} == {"connection"}
    names = {s.module for s in morph.gate(model, x, where="producer").sites}
    assert names == {
        f"encoder.layers.encoder_layer_{i}.{part}" for i in range(2) for part in ("mlp.0", "self_attention")
    }


def test_what_cannot_be_gated_is_refused_with_the_reason():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="cannot be traced"):
        morph.gate(Branch(), torch.randn(2, 3))
    with pytest.raises(EditError, match="no channel that can be gated: it reads the input of the model"):
        morph.gate(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    shared = nn.Linear(5, 5)
    with pytest.raises(EditError, match="its weight is used more than once"):
        morph.gate(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 5))
    with pytest.raises(TargetError, match="where is auto, producer or connection"):
        morph.gate(nn.Linear(3, 4), torch.randn(2, 3), where="all")
    model, x = made("chain")
    gated = morph.gate(model, x)
    with pytest.raises(TargetError, match="no gates at 'x'"):
        gated.sizes({"x": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(TargetError, match="two has 11 gates, got a mask of shape"):
        gated.remove({"two": torch.zeros(3, dtype=torch.bool)})


def test_weights_that_cannot_be_gated_are_left_whole_and_named():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(12), nn.Linear(9, 7)
            self.kernel, self.matrix = (nn.Parameter(torch.randn(shape)) for shape in ((12, 8, 3, 3), (9, 12)))
            self.turn = nn.GRU(9, 9, batch_first=True)
            self.register_buffer("table", torch.randn(9, 9))

        def forward(self, x):
            x = torch.relu(self.norm(nn.functional.conv2d(torch.relu(self.stem(x)), self.kernel)))
            x = x.mean((2, 3)) @ self.matrix.t()
            return self.head(self.turn((x @ self.table)[:, None])[0].mean(1))

    gated = morph.gate(randomise(Functional()), torch.randn(2, 3, 9, 9))
    assert [site.name for site in gated.sites] == ["kernel", "matrix", "turn.weight_ih_l0", "head"]
    assert gated.left == {
        "stem": "it reads the input of the model",
        "table": "it is used by aten.mm.default, not by a convolution or linear layer",
        "turn.weight_hh_l0": "it is used inside GRU, not by a convolution or linear layer",
    }


def test_a_gate_by_itself():
    gate = Gate("here", 3, [(1, (0, 1, 2)), (0, (2, -1, 0, 0))])
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([2.0, 0.0, 5.0]))
    assert torch.equal(gate(torch.ones(2, 3)), torch.tensor([[2.0, 0.0, 5.0]] * 2))
    assert torch.equal(gate(torch.ones(4, 2), 1), torch.tensor([[5.0] * 2, [1.0] * 2, [2.0] * 2, [2.0] * 2]))
    assert gate(torch.ones(2, 3, dtype=torch.float16)).dtype == torch.float16
    assert list(gate.state_dict()) == ["weight"]
    assert "here, gates=3" in repr(gate)


@pytest.mark.parametrize("name", ["wrn", "chain"])
def test_a_gated_model_is_copied_saved_and_trained(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.2, 5)
    twin = copy.deepcopy(gated.model)
    assert all(torch.equal(a, b) for a, b in zip(outputs(twin, x), outputs(gated.model, x), strict=True))
    assert list(gates_of(twin)) == list(gates_of(gated.model)) == [s.name for s in gated.sites]
    fresh = morph.gate(model, x)
    fresh.model.load_state_dict(gated.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh.model, x), outputs(gated.model, x), strict=True))
    optimizer = torch.optim.SGD(gated.model.train().parameters(), lr=1e-3)
    outputs_ = gated.model(x)
    outputs_.square().mean().backward()
    optimizer.step()
    assert gated.remove().record.checks[0].passed


def test_two_names_that_look_alike_get_two_gates():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    insert_gates(graph, {"a.b": (4, [Tap("_1", (0, 1, 2, 3))]), "a_b": (4, [Tap("_1", (3, 2, 1, 0))])}, {"_1": 2})
    assert set(gates_of(graph)) == {"a.b", "a_b"}


# ---- what closing saves


def memory(model: nn.Module, x: torch.Tensor) -> int:
    """Elements that layers read and give, by hooks."""
    total = 0

    def add(module, args, output):
        nonlocal total
        total += args[0].numel() + output.numel()

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    handles = [m.register_forward_hook(add) for m in layers]
    outputs(model, x)
    for handle in handles:
        handle.remove()
    return total // len(x)


def measured(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    count = morph.count(copy.deepcopy(model).float(), x.float())
    return {"macs": count.macs, "params": count.params, "memory": memory(model, x)}


@pytest.mark.parametrize("name", ["depthwise", "grouped", "squeeze", "residual", "densenet"])
def test_weights_are_what_a_slow_recount_says(name):
    """Gates closed alone, taken out, and the module that comes out counted; of like ones in DenseNet the first."""
    model, x = made(name)
    gated = morph.gate(model, x)
    whole, sizes = measured(model, x), gated.sizes()
    assert (whole["params"], whole["macs"]) == (sizes.params, sizes.macs)
    recount: dict[tuple[str, int], dict[str, int]] = {}
    readers = Counter(source for s in gated.sites for source in set(s.sources))
    for site in gated.sites:
        seen: set[str] = set()
        for number, source in enumerate(site.sources):
            if name == "densenet" and source in seen:
                continue
            seen.add(source)
            closed = {site.name: torch.arange(site.gates) == number}
            now = measured(gated.remove(closed).model, x)
            after = gated.sizes(closed)
            assert (now["params"], now["macs"]) == (after.params, after.macs)
            if site.kind == "producer" or readers[source] > 1:  # the last reader also takes the rows of its producer
                recount[site.name, number] = {key: whole[key] - now[key] for key in now}
    for measure in ("macs", "params", "memory"):
        alpha = gated.weights(measure)
        most = max(saving[measure] / float(alpha[s][n]) for (s, n), saving in recount.items())
        for (site_name, number), saving in recount.items():
            assert saving[measure] / most == pytest.approx(float(alpha[site_name][number]), rel=1e-6), measure
        assert max(float(a.max()) for a in alpha.values()) == 1
        assert min(float(a.min()) for a in alpha.values()) > 0


@pytest.mark.parametrize("name", ["depthwise", "grouped", "transposed", "densenet"])
def test_weights_by_latency_and_by_nothing(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    for measure in ("latency", "none"):
        alpha = gated.weights(measure)
        assert [tuple(a.shape) for a in alpha.values()] == [(s.gates,) for s in gated.sites]
        assert list(alpha) == [s.name for s in gated.sites]
        assert all(((a > 0) & (a <= 1)).all() for a in alpha.values())
    assert all((a == 1).all() for a in alpha.values())
    with pytest.raises(TargetError, match="weights are by macs, params, memory, latency, none, got 'flops'"):
        gated.weights("flops")


def test_every_model_is_built():
    assert set(SMALL) == set(MODELS)
