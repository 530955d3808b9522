"""Gates on the weights of models that have no symbolic graph: bit-identical at birth, exact when taken out."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from gate_support import hooked, outputs, shut
from models import Snapshot, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import morph
from morph import gating
from morph.errors import CheckFailedError, EditError, TraceError
from morph.gating import Gated
from morph.passes.gated_weights import GatedModule
from morph.passes.gates import gates_of
from morph.plan import Resize
from morph.surgery import replay


def require_samples(x: Tensor) -> None:
    """A look at shapes, which symbolic tracing does not survive."""
    if len(x) < 1:
        raise ValueError("no samples")


class Odd(nn.Module):
    """Readers of many kinds: two of one tensor, depthwise, grouped, called twice, tied, read outside their module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
        self.deep = nn.Conv2d(10, 10, 3, groups=10, padding=1)
        self.left, self.right = nn.Conv2d(10, 9, 1), nn.ConvTranspose2d(10, 9, 1)
        self.square = nn.Linear(9, 9)
        self.wide, self.outside = nn.Linear(9, 13), nn.Linear(13, 11)
        self.one, self.other = nn.Linear(11, 12), nn.Linear(12, 11)
        self.tied = nn.Linear(11, 12)
        self.tied.weight = self.one.weight
        self.matrix = nn.Parameter(torch.zeros(12, 8))
        self.grouped = nn.Conv1d(8, 6, 1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        require_samples(x)
        x = self.deep(torch.relu(self.norm(self.stem(x))))
        x = torch.tanh(self.left(x) + self.right(x)).mean((2, 3))
        x = torch.sigmoid(self.square(torch.sigmoid(self.square(x))))
        x = F.linear(torch.tanh(self.wide(x)), self.outside.weight, self.outside.bias)
        x = torch.tanh(self.tied(self.other(torch.tanh(self.one(x)))))
        return self.head(torch.tanh(self.grouped((x @ self.matrix)[:, :, None]))[:, :, 0])


def odd() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return randomise(Odd(), 5), torch.randn(3, 3, 8, 7)


def language(name: str) -> tuple[nn.Module, Any]:
    pytest.importorskip("transformers")
    import language_nets

    inputs = language_nets.sentences(3, 9)[0]
    if name == "vit":
        inputs = {"pixel_values": torch.randn(3, 3, 32, 32, dtype=torch.float64)}
    return randomise(getattr(language_nets, name)(), 5), inputs


LANGUAGE = ["bert", "distilbert", "gpt2", "llama", "vit"]
NETS = ["odd", *LANGUAGE]


def made(name: str) -> tuple[nn.Module, Any]:
    """A float64 model with random weights, in evaluation mode, and inputs."""
    model, x = odd() if name == "odd" else language(name)
    return model.double().eval(), x.double() if isinstance(x, Tensor) else x


def factors(gated: Gated, model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """For each reader what its inputs are multiplied by, and the axis."""
    found: dict[str, tuple[Tensor, int]] = {}
    gates = gates_of(gated.model)
    for site in gated.sites:
        for path, tap in zip(site.readers, site.taps, strict=True):
            own = torch.cat([gates[site.name].weight.detach(), torch.ones(1, dtype=torch.float64)])
            factor = own[[i if i >= 0 else site.gates for i in tap.index]]
            axis = 1 if isinstance(model.get_submodule(path), nn.modules.conv._ConvNd) else -1
            found[path] = (found[path][0] * factor if path in found else factor, axis)
    return found


def gap(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", NETS)
def test_at_birth_outputs_are_the_same_bits(name):
    model, x = made(name)
    shot = Snapshot(model)
    gated = morph.gate(model, x)
    assert "cannot be traced" in gated.remove().record.details["no_graph"]
    names = set(model.state_dict())
    extra = set(gated.model.state_dict()) - names
    assert names < set(gated.model.state_dict())
    assert all("morph_gates" in key for key in extra)
    assert isinstance(gated.model, type(model))
    for training in (True, False):
        one, other = copy.deepcopy(model).train(training), copy.deepcopy(gated.model).train(training)
        torch.manual_seed(1)
        wanted = outputs(one, x)
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(wanted, outputs(other, x), strict=True))
    assert shot.same()


@pytest.mark.parametrize("name", NETS)
def test_a_gate_multiplies_what_its_readers_read(name):
    """The second implementation multiplies inputs by hooks, and has the same gradients."""
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.3, 1)
    values = factors(gated, model)
    if name == "odd":  # read outside its module, and no module at all: by hand
        with torch.no_grad():
            model.outside.weight.mul_(values.pop("outside")[0])
            model.matrix.mul_(values.pop("")[0][:, None])
            assert set(values) == {"left", "right", "square", "wide", "other", "head"}
    assert gap(hooked(model, values, x), outputs(gated.model, x)) < 1e-12


@pytest.mark.parametrize("name", LANGUAGE)
def test_gradients_are_those_of_gates_on_activations(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.2, 3)
    leaves = {path: (f.clone().requires_grad_(), axis) for path, (f, axis) in factors(gated, model).items()}
    for path, (factor, _) in leaves.items():
        module = model.get_submodule(path)
        module.register_forward_pre_hook(lambda m, args, factor=factor: (args[0] * factor, *args[1:]))
    for net in (model, gated.model):
        tensors = [t for t in net(**x).values() if isinstance(t, Tensor)]
        sum(t.square().sum() for t in tensors).backward()
    for site in gated.sites:
        (path,), (tap,) = site.readers, site.taps
        index = torch.tensor(tap.index)
        summed = torch.zeros(site.gates + 1, dtype=torch.float64)
        summed.index_add_(0, torch.where(index < 0, site.gates, index), leaves[path][0].grad)
        grad = gates_of(gated.model)[site.name].weight.grad
        torch.testing.assert_close(grad, summed[:-1], rtol=1e-7 if name == "llama" else 1e-10, atol=1e-9)
        assert grad.count_nonzero()
    grads = dict(gated.model.named_parameters())
    for key, parameter in model.named_parameters():
        if key.removesuffix(".weight") not in leaves:  # these look at the product
            torch.testing.assert_close(grads[key].grad, parameter.grad, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_closed_gates_are_taken_out_exactly_and_counted(name, share):
    model, x = made(name)
    shot = Snapshot(model)
    gated = morph.gate(model, x)
    closed = shut(gated, share, 7)
    before = copy.deepcopy(gated.model.state_dict())
    result = gated.remove()
    assert type(result.model) is type(model)
    assert result.record.details["form"] == "class"
    assert not gates_of(result.model)
    assert not any(isinstance(m, GatedModule) for m in result.model.modules())
    assert gap(hooked_or_gated(gated, model, x, name), outputs(result.model, x)) < (1e-6 if name == "llama" else 1e-12)
    assert result.record.checks[0].passed
    count = morph.count(result.model, x)
    assert result.record.after == {"params": count.params, "macs": count.macs}
    assert result.record.after["macs"] < result.record.before["macs"]
    assert gated.sizes(closed).params == count.params
    assert all(0 not in p.shape for p in result.model.parameters())
    assert all(torch.equal(before[k], v) for k, v in gated.model.state_dict().items())
    source = copy.deepcopy(model)
    source.load_state_dict(gated.model.state_dict(), strict=False)
    assert gap(outputs(result.model, x), outputs(replay(source, result.record.plan, x).model, x)) == 0
    assert shot.same()


def hooked_or_gated(gated: Gated, model: nn.Module, x: Any, name: str) -> list[Tensor]:
    """What the model gives whose readers see zero: by hooks, where its readers are modules that are called."""
    return outputs(gated.model, x) if name == "odd" else hooked(model, factors(gated, model), x)


def test_what_is_gated_and_what_is_left():
    model, x = made("odd")
    gated = morph.gate(model, x)
    sites = {site.readers: site for site in gated.sites}
    gates = {("left", "right"): 10, ("square", "wide"): 9, ("outside",): 13, ("other", ""): 12, ("head",): 3}
    assert {readers: site.gates for readers, site in sites.items()} == gates
    assert {s.kind for s in gated.sites} == {"producer"}
    assert gated.left["one"] == "its weight is used for something else as well"
    assert gated.left["grouped"].startswith("its groups read channels of their own")
    assert (
        gated.left["stem"] == "all that it reads is fixed by an operator without a rule, or by the shape of the input"
    )


def test_heads_and_hidden_widths_of_bert_are_gated_and_its_residual_stream_is_not():
    model, x = made("bert")
    gated = morph.gate(model, x)
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    assert {s.readers[0]: s.gates for s in gated.sites} == {
        **{f"{layer}.output.dense": 48 for layer in layers},
        **{f"{layer}.attention.output.dense": 2 for layer in layers},
        "classifier": 24,
    }
    for part in ("attention.self.query", "attention.self.value", "intermediate.dense"):
        reason = gated.left[f"{layers[1]}.{part}"]
        assert reason.startswith("a statistic runs over what it reads: aten.native_layer_norm")


def test_a_layer_keeps_its_last_channel():
    model, x = made("bert")
    gated = morph.gate(model, x)
    closed = {site.name: torch.ones(site.gates, dtype=torch.bool) for site in gated.sites}
    record = gated.remove(closed).record
    assert {row["site"]: len(row["gates"]) for row in record.details["kept"]} == dict.fromkeys(closed, 1)
    assert not record.details["branches_gone"]
    assert not record.details["layers_gone"]


def test_weights_are_what_a_recount_says():
    model, x = made("bert")
    gated = morph.gate(model, x)
    for measure in ("macs", "params"):
        saved = {}
        whole = getattr(morph.count(model, x), measure)
        for site in gated.sites:
            one = {site.name: torch.arange(site.gates) == site.gates - 1}
            saved[site.name] = whole - getattr(morph.count(gated.remove(one).model, x), measure)
        weights = gated.weights(measure)
        for site in gated.sites:
            expected = saved[site.name] / max(saved.values())
            torch.testing.assert_close(weights[site.name], torch.full((site.gates,), expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["odd", "gpt2"])
def test_latency_and_memory_can_be_measured(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    for measure in ("latency", "memory"):
        weights = gated.weights(measure)
        assert all(((w > 0) & (w <= 1)).all() for w in weights.values())
        assert max(float(w.max()) for w in weights.values()) == 1


@pytest.mark.parametrize("name", ["odd", "bert", "gpt2"])
def test_gated_models_are_copied_pickled_and_moved(name):
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.4, 2)
    wanted = outputs(gated.model, x)
    file = io.BytesIO()
    torch.save(gated.model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(gated.model),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(gated.model)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(wanted, outputs(twin, x), strict=True))
        own, other = gates_of(twin), gates_of(gated.model)
        assert own.keys() == other.keys()
        with torch.no_grad():
            for gate in own.values():  # a copy has gates of its own, and they act
                assert all(gate is not g for g in other.values())
                gate.weight.zero_()
        assert gap(wanted, outputs(twin, x)) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(wanted, outputs(gated.model, x), strict=True))
    fresh = morph.gate(model, x).model
    fresh.load_state_dict(gated.model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(wanted, outputs(fresh, x), strict=True))
    assert all(g.weight.dtype == torch.float32 for g in gates_of(copy.deepcopy(gated.model).float()).values())


def test_a_wrong_removal_is_caught(monkeypatch):
    model, x = made("bert")
    gated = morph.gate(model, x)
    shut(gated, 0.4, 2)
    right = gating.class_plan

    def wrong(*args: Any) -> Any:
        plan = right(*args)
        edits = list(plan.edits)
        at = next(i for i, e in enumerate(edits) if isinstance(e, Resize) and e.scale)
        edits[at] = Resize(edits[at].tensor, edits[at].axis, edits[at].size, edits[at].index)
        return type(plan)(tuple(edits))

    monkeypatch.setattr(gating, "class_plan", wrong)
    with pytest.raises(CheckFailedError):
        gated.remove()


class Looking(nn.Module):
    """Takes another way for other values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) if x.sum() > 0 else self.one(-x))


class Still(nn.Module):
    """Nothing in it can go."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        require_samples(x)
        return self.one(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: morph.gate(Looking(), torch.randn(2, 3)), TraceError, "nor does it run without data, so that other"),
        (lambda: morph.gate(Still(), torch.randn(2, 3)), EditError, "has no channel that can be gated: all that it"),
        (lambda: morph.gate(Odd(), torch.randn(2, 4, 8, 8)), TraceError, "does not accept inputs of shape"),
        (lambda: morph.gate(Odd(), torch.randn(2, 3, 8, 8), where="connection"), TraceError, "cannot be traced"),
    ],
)
def test_what_is_refused_says_so(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Recurrent(nn.Module):
    """Has no graph, and keeps what its last run computed of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(5, 6), nn.GRU(6, 7, 2, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        require_samples(x)
        return self.last(self.rnn(torch.tanh(self.first(x)))[0][:, -1])


def test_a_gated_recurrent_layer_is_copied_and_cut_after_a_step():
    torch.manual_seed(0)
    model, x = Recurrent().double(), torch.randn(3, 4, 5, dtype=torch.float64)
    gated = morph.gate(model, x)
    gated.model(x).square().sum().backward()
    assert torch.equal(copy.deepcopy(gated.model)(x), gated.model(x))
    masks = {site.name: torch.arange(site.gates) % 3 == 0 for site in gated.sites}
    student = gated.remove(masks).model
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
