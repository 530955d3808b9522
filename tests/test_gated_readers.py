"""Gated layers: outputs and gradients of a plain multiplication, in the memory of the layer without gates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from gate_support import made, shut
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import morph
from morph.passes import gated_readers
from morph.passes.gated_readers import gated_input, gated_reader, spread
from morph.passes.gates import Tap, gates_of, insert_gates

D = torch.float64

# Name: x, weight, bias, (transposed, stride, padding, dilation, output_padding, groups), the same layer of torch.
LAYERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool, tuple, Callable[..., Tensor]]] = {
    "linear, large weight": ((3, 7), (11, 7), True, (), F.linear),
    "linear, large activation": ((5, 4, 3, 7), (2, 7), False, (), F.linear),
    "linear, one vector": ((7,), (3, 7), True, (), F.linear),
    "conv1d": (
        (2, 3, 23),
        (4, 3, 5),
        True,
        (False, (2,), (1,), (3,), (0,), 1),
        lambda x, w, b: F.conv1d(x, w, b, 2, 1, 3),
    ),
    "conv2d, large weight": (
        (2, 6, 4, 5),
        (9, 6, 3, 3),
        True,
        (False, (1, 2), (1, 2), (1, 1), (0, 0), 1),
        lambda x, w, b: F.conv2d(x, w, b, (1, 2), (1, 2)),
    ),
    "conv2d, large activation": (
        (3, 4, 13, 11),
        (2, 4, 3, 3),
        False,
        (False, (2, 2), (0, 1), (2, 1), (0, 0), 1),
        lambda x, w, b: F.conv2d(x, w, b, 2, (0, 1), (2, 1)),
    ),
    "conv2d, groups, large weight": (
        (1, 6, 3, 3),
        (8, 3, 3, 3),
        True,
        (False, (1, 1), (1, 1), (1, 1), (0, 0), 2),
        lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 2),
    ),
    "conv2d, same": (
        (2, 3, 6, 7),
        (4, 3, 5, 3),
        True,
        (False, (1, 1), "same", (1, 1), (0, 0), 1),
        lambda x, w, b: F.conv2d(x, w, b, 1, "same"),
    ),
    "conv2d, no batch": (
        (3, 6, 7),
        (4, 3, 3, 3),
        True,
        (False, (1, 1), (1, 1), (1, 1), (0, 0), 1),
        lambda x, w, b: F.conv2d(x, w, b, 1, 1),
    ),
    "conv3d": (
        (2, 3, 5, 4, 6),
        (4, 3, 3, 1, 3),
        True,
        (False, (1, 1, 2), (1, 0, 1), (1, 1, 1), (0, 0, 0), 1),
        lambda x, w, b: F.conv3d(x, w, b, (1, 1, 2), (1, 0, 1)),
    ),
    "transposed, large weight": (
        (2, 5, 3, 2),
        (5, 4, 3, 3),
        True,
        (True, (2, 2), (1, 0), (1, 2), (1, 1), 1),
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, (1, 0), 1, 1, (1, 2)),
    ),
    "transposed, large activation": (
        (3, 4, 29),
        (4, 2, 3),
        False,
        (True, (3,), (1,), (1,), (2,), 1),
        lambda x, w, b: F.conv_transpose1d(x, w, b, 3, 1, 2),
    ),
}


def drawn(name: str, seed: int = 0) -> tuple[list[Tensor | None], tuple, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Tensors for a layer: activation, weight, bias, gates, of which one is closed and one negative."""
    x, weight, has_bias, form, layer = LAYERS[name]
    transposed = bool(form) and form[0]
    draw = torch.Generator().manual_seed(seed)
    columns, rows = weight[int(not transposed)], weight[int(transposed)]
    gates = 0.5 + torch.rand(columns, dtype=D, generator=draw)
    gates[0], gates[-1] = 0.0, -0.7
    bias = torch.randn(rows, dtype=D, generator=draw) if has_bias else None
    tensors = [torch.randn(x, dtype=D, generator=draw), torch.randn(weight, dtype=D, generator=draw), bias, gates]
    return [None if t is None else t.requires_grad_() for t in tensors], form, layer


def twin(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, gates: Tensor) -> Tensor:
    """The second implementation: multiply what the layer reads, position by position, then call the layer of torch."""
    form, layer = LAYERS[name][3:]
    axis = x.dim() - 1 if not form else x.dim() - 1 - len(form[1])
    repeated = torch.cat([gates] * (x.shape[axis] // len(gates)))
    parts = [part * g for part, g in zip(x.unbind(axis), repeated, strict=True)]
    return layer(torch.stack(parts, axis), weight, bias)


def gradients(output: Tensor, tensors: list[Tensor | None], seed: int = 5) -> list[Tensor]:
    """Gradients of a random sum, and of a random sum of these."""
    draw = torch.Generator().manual_seed(seed)
    leaves = [t for t in tensors if t is not None]
    loss = (output * torch.randn(output.shape, dtype=D, generator=draw)).sum() + output.pow(3).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    mixed = sum((g * torch.randn(g.shape, dtype=D, generator=draw)).sum() for g in first)
    return [*first, *torch.autograd.grad(mixed, leaves)]


def agree(name: str) -> None:
    """Output, gradients and second gradients of a gated layer against those of its twin."""
    tensors, form, _ = drawn(name)
    output, wanted = gated_reader(*tensors, form), twin(name, *tensors)
    torch.testing.assert_close(output, wanted, rtol=1e-10, atol=1e-10)
    for got, other in zip(gradients(output, tensors), gradients(wanted, tensors), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_a_plain_multiplication(name):
    agree(name)


@pytest.mark.parametrize("name", LAYERS)
def test_finite_differences_agree_in_both_modes(name):
    tensors, form, _ = drawn(name, 1)
    leaves = [t for t in tensors if t is not None]

    def layer(*given: Tensor) -> Tensor:
        x, weight, *rest = given
        return gated_reader(x, weight, rest[0] if len(rest) > 1 else None, rest[-1], form)

    assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("name", ["conv2d, large weight", "conv2d, large activation", "linear, large weight"])
@pytest.mark.parametrize("piece", ["layer", "gates", "order"])
def test_a_wrong_gradient_is_found(name, piece, monkeypatch):
    backward, summed = gated_readers._backward, gated_readers._sum_to
    if piece == "layer":
        monkeypatch.setattr(
            gated_readers, "_backward", lambda *args: [None if g is None else g * 1.000001 for g in backward(*args)]
        )
    elif piece == "gates":
        monkeypatch.setattr(gated_readers, "_sum_to", lambda *args: summed(*args) + 1e-6)
    else:
        monkeypatch.setattr(gated_readers, "_sum_to", lambda *args: summed(*args).roll(1))
    with pytest.raises(AssertionError, match="not close"):
        agree(name)


@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 1), (1, 3), (0, 3), (0, 1, 2)])
@pytest.mark.parametrize("name", ["conv2d, large weight", "conv2d, large activation", "linear, large weight"])
def test_what_needs_no_gradient_gets_none_and_the_rest_the_right_one(name, frozen):
    tensors, form, _ = drawn(name)
    for number in frozen:
        if tensors[number] is not None:
            tensors[number].requires_grad_(False)
    moving = [t for t in tensors if t is not None and t.requires_grad]
    if not moving:
        return
    for got, other in zip(
        torch.autograd.grad(gated_reader(*tensors, form).pow(3).sum(), moving),
        torch.autograd.grad(twin(name, *tensors).pow(3).sum(), moving),
        strict=True,
    ):
        torch.testing.assert_close(got, other, rtol=1e-10, atol=1e-10)


def test_gates_that_are_spread_and_gates_on_inputs():
    gates, index = torch.tensor([2.0, 0.0, 5.0]), torch.tensor([2, 3, 0, 0, 1])
    assert spread(gates, index).tolist() == [5, 1, 2, 2, 0]
    x = torch.arange(30.0, dtype=torch.float16).reshape(2, 3, 5)
    assert torch.equal(gated_input(x, spread(gates, index), 2), x * torch.tensor([5, 1, 2, 2, 0], dtype=torch.float16))
    assert torch.equal(gated_input(x, gates, 1), x * gates.half()[:, None])


# ---- whole models

MODELS = ["densenet", "wrn", "resnet", "mobilenet", "vit"]


def trained(name: str, seed: int = 2) -> tuple[nn.Module, morph.gating.Gated, Tensor]:
    """A model in training mode without dropout, and with gates, a third of which are closed."""
    model, x = made(name)
    gated = morph.gate(model, x)
    shut(gated, 0.3, seed)
    for module in [*model.train().modules(), *gated.model.train().modules()]:
        module.training &= not isinstance(module, nn.Dropout)
    return model, gated, x


def multiplied(model: nn.Module, gated: morph.gating.Gated, x: Tensor) -> dict[str, Tensor]:
    """The second implementation: gradients of the model's own modules, whose inputs hooks multiply.

    Attention does not call the layer at its end; its weight is multiplied outside.
    """
    gates = {name: gate.weight.detach().clone().requires_grad_() for name, gate in gates_of(gated.model).items()}
    handles = []
    weights = {}
    for site in gated.sites:
        for path, tap in zip(site.readers, site.taps, strict=True):
            if tap.reader == f"{path}.weight":
                weights[tap.reader] = model.get_parameter(tap.reader) * gates[site.name][list(tap.index)]
                continue

            def multiply(module: nn.Module, args: tuple[Tensor, ...], name: str = site.name, tap: Tap = tap) -> Tensor:
                own = gates[name]
                factor = torch.stack([own[i] if i >= 0 else own.new_ones(()) for i in tap.index])
                axis = -1 if isinstance(module, nn.Linear) else 1
                return args[0] * factor.reshape([-1 if a == axis % args[0].dim() else 1 for a in range(args[0].dim())])

            handles.append(model.get_submodule(path).register_forward_pre_hook(multiply))
    torch.func.functional_call(model, weights, x).pow(2).sum().backward()
    for handle in handles:
        handle.remove()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"gates of {name}": gate.grad for name, gate in gates.items()}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_whole_models_are_those_of_plain_multiplications(name):
    """Closed gates among them."""
    model, gated, x = trained(name)
    wanted = multiplied(model, gated, x)
    gated.model(x).pow(2).sum().backward()
    got = {n: p.grad for n, p in gated.model.named_parameters() if not n.startswith("morph_gates") and n in wanted}
    got |= {f"gates of {name}": gate.weight.grad for name, gate in gates_of(gated.model).items()}
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        scale = max(float(wanted[key].abs().max()), 1e-3)
        torch.testing.assert_close(value, wanted[key], rtol=0, atol=1e-10 * scale, msg=key)
    closed = [gate.weight.grad[gate.weight == 0] for gate in gates_of(gated.model).values()]
    assert sum(g.count_nonzero() for g in closed) > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_gates_of_one_change_no_bit_while_gradients_are_recorded(name, training):
    model, x = made(name)
    gated = morph.gate(model, x)
    torch.manual_seed(0)
    one = model.train(training)(x)
    torch.manual_seed(0)
    other = gated.model.train(training)(x)
    assert torch.equal(one, other)
    assert other.requires_grad


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of a forward pass holds beside the parameters, counted by storage."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum().backward()
    return sum(size for place, size in sizes.items() if place not in own)


@pytest.mark.parametrize("name", ["densenet", "wrn", "resnet", "mobilenet"])
def test_the_backward_pass_keeps_nothing_more(name, monkeypatch):
    model, gated, x = trained(name)
    plain, here = kept(model, x), kept(gated.model, x)
    spread_out = sum(8 * 2 * (len(tap.index) + 1) for site in gated.sites for tap in site.taps)
    assert here <= plain + spread_out
    monkeypatch.setattr(gated_readers, "_kept_anyway", lambda x, form: True)
    weights = sum(8 * gated.model.get_parameter(f"{path}.weight").numel() for s in gated.sites for path in s.readers)
    assert kept(gated.model, x) >= plain + weights  # so the count sees what a plain multiplication keeps


# ---- what else works on tensors


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A gated model, its input, and the gradients of the sum of its squared outputs."""
    model, x = made("resnet")
    gated = morph.gate(model, x)
    shut(gated, 0.2, 7)
    module = gated.model
    module(x).square().sum().backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    return module, x, found


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], limit: float = 1e-10) -> bool:
    return all(float((found[n].detach() - w).norm()) <= limit * (1 + float(w.norm())) for n, w in wanted.items())


def test_functional_transforms(net):
    module, x, wanted = net
    values, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, (values, buffers), (x,)).square().sum()

    assert close(grad(loss)(values, x), wanted)
    each = vmap(grad(lambda v, one: loss(v, one[None])), (None, 0))(values, x)
    assert close({name: g.sum(0) for name, g in each.items()}, wanted)
    way = {name: torch.randn_like(p) for name, p in values.items()}
    slope = jvp(lambda v: loss(v, x), (values,), (way,))[1]
    assert float(slope) == pytest.approx(float(sum((wanted[n] * way[n]).sum() for n in wanted)), rel=1e-9)


def test_activation_checkpoints_copies_and_tracers(net):
    module, x, wanted = net
    for other in (module, copy.deepcopy(module), torch.fx.symbolic_trace(module)):
        other.zero_grad()
        checkpoint(other, x, use_reentrant=False).square().sum().backward()
        assert close({name: p.grad for name, p in other.named_parameters()}, wanted)
    module.zero_grad()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    assert close({name: p.grad for name, p in module.named_parameters()}, wanted)
    module.zero_grad()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.jit.trace(module, x, check_trace=False)(x), module(x), rtol=1e-10, atol=1e-10)


def test_mixed_precision_is_that_of_a_plain_multiplication(net):
    module, x, _ = net
    half = copy.deepcopy(module).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = half(x.float())
    output.float().square().sum().backward()
    wanted = {name: p.grad.clone() for name, p in half.named_parameters()}
    half.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_readers, "_kept_anyway", lambda x, form: True)
        twin_output = half(x.float())
    twin_output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, twin_output)
    assert all(torch.equal(p.grad, wanted[name]) for name, p in half.named_parameters())


@pytest.mark.parametrize("name", ["conv2d, large weight", "conv2d, large activation"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_what_was_written_over_is_refused(name, number):
    tensors, form, _ = drawn(name)
    output = gated_reader(*[None if t is None else t * 1 for t in tensors], form)
    output.sum().backward()
    given = [None if t is None else t * 1 for t in tensors]
    output = gated_reader(*given, form)
    given[number].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Odd(nn.Conv2d):
    """A layer with code of its own."""

    def forward(self, x):
        return super().forward(x) * 2


def test_a_file_with_a_gated_model_opens_without_its_classes(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect"), nn.Conv2d(7, 4, 1)]
    model, x = nn.Sequential(*layers).double(), torch.randn(2, 3, 9, 8, dtype=D)
    gated = morph.gate(model, x)
    shut(gated, 0.4, 2)
    morph.save_model(gated.model, tmp_path / "gated.pt")
    opened = morph.open_model(tmp_path / "gated.pt").model
    assert torch.equal(opened(x), gated.model(x))
    assert opened.state_dict().keys() == gated.model.state_dict().keys()


def test_gates_in_front_of_a_layer_with_code_of_its_own_and_of_a_plain_one_are_one_parameter():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("own", (x,)), graph.call_module("plain", (x,))))
    torch.manual_seed(0)
    root = nn.ModuleDict({"own": Odd(3, 4, 1), "plain": nn.Conv2d(3, 2, 1)}).double()
    module = torch.fx.GraphModule(root, graph)
    insert_gates(module, {"x": (2, [Tap("own", (1, -1, 0)), Tap("plain", (1, -1, 0))])}, {"own": 4, "plain": 4})
    gate = gates_of(module)["x"]
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([0.0, -2.0]))
    x = torch.randn(2, 3, 5, 5, dtype=D)
    scaled = x * torch.tensor([-2.0, 1.0, 0.0], dtype=D).reshape(1, 3, 1, 1)
    for got, wanted in zip(module(x), (root["own"](scaled), root["plain"](scaled)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    sum(y.sum() for y in module(x)).backward()
    assert gate.weight.grad.count_nonzero() == 2


class Overwritten(nn.Module):
    """Writes into what its layers give, of any rank, as activations in place do."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 11), nn.Linear(11, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(torch.tanh(x)).relu_()
        z = self.two(y)
        z *= 2
        return z


@pytest.mark.parametrize("shape", [(3, 7), (3, 4, 7), (2, 3, 4, 7)])
def test_what_a_gated_layer_gives_may_be_written_into(shape):
    torch.manual_seed(0)
    model, x = Overwritten().double(), torch.randn(*shape, dtype=torch.float64)
    gated = morph.gate(model, x)
    loss = [m(x).square().sum() for m in (model, gated.model)]
    assert torch.equal(*loss)
    for one in loss:
        one.backward()
    assert torch.allclose(model.one.weight.grad, gated.model.one.weight.grad)


def _laid_out(x: Tensor, kind: int) -> Tensor:
    """The same numbers of axes with strides of another kind."""
    one, other = torch.randperm(x.dim())[:2].tolist()
    return (
        x.transpose(one, other),
        torch.cat([x, x], one).narrow(one, 0, x.shape[one]),
        x.transpose(0, -1).contiguous().transpose(0, -1),
        x.repeat_interleave(2, -1)[..., ::2],
        x[:1].expand(x.shape),
    )[kind]


@pytest.mark.parametrize("seed", range(100))
def test_gates_of_one_change_no_bit_however_the_input_is_laid_out(seed):
    """How torch sums rows that are not contiguous depends on whether the weight learns."""
    torch.manual_seed(seed)
    dtype = (torch.float32, torch.float64)[seed % 2]
    shape = [*torch.randint(1, 6, (int(torch.randint(1, 5, ())),)).tolist(), int(torch.randint(1, 40, ()))]
    x = _laid_out(torch.randn(shape, dtype=dtype), seed % 5).requires_grad_(bool(seed % 3))
    learns, gates = bool(seed % 4), torch.ones(x.shape[-1], dtype=dtype, requires_grad=True)
    weight = torch.randn(int(torch.randint(1, 30, ())), x.shape[-1], dtype=dtype, requires_grad=learns)
    bias = torch.randn(len(weight), dtype=dtype, requires_grad=True) if seed % 7 else None
    assert torch.equal(gated_reader(x, weight, bias, gates, ()), F.linear(x, weight, bias))
    with torch.no_grad():
        quiet = gated_reader(x, weight, bias, gates, ())
        assert torch.equal(quiet, F.linear(x, weight, bias))
        assert not quiet.requires_grad
