from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import morph.counts
from morph.count_rules import einsum_macs
from morph.counts import FIRST, SECOND, count, count_params
from morph.errors import CountError
from morph.zoo.darts import DartsNet
from morph.zoo.densenet import DenseNet


def slow_count(model: nn.Module, x: Tensor) -> int:
    """Third count: hooks on convolutions and linear layers, as one would do by hand."""
    found: list[int] = []

    def hook(module: nn.Module, _: object, out: Tensor) -> None:
        found.append(out.numel() * module.weight.numel() // module.weight.shape[0])

    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(x[:1])
    return sum(found)


class Op(nn.Module):
    """One function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def small() -> nn.Sequential:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(inplace=True),
        nn.Conv2d(7, 14, 5, groups=7, stride=2),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(14, 11),
    )
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    return model


def test_resnet50_to_the_digit():
    counts = count(torchvision.models.resnet50(weights=None), torch.empty(2, 3, 224, 224))
    assert counts.params == counts.trainable == 25_557_032
    assert counts.macs == counts.second == counts.by_module[""].macs == 4_089_184_256
    assert dict(counts.elementwise) == {"batch_norm": 22_227_968, "adaptive_avg_pool2d": 100_352}
    assert counts.difference is None
    assert counts.counter == FIRST
    assert counts.input_shapes == ((3, 224, 224),)
    assert counts.by_module["fc"] == morph.counts.ModuleCount(2_049_000, 2_048_000, "Linear")
    assert counts.unsupported == {"aten::max_pool2d": 1, "aten::add_": 16}
    assert counts.uncalled == ()


def test_darts_against_a_third_count_with_its_idle_head():
    model = DartsNet()
    x = torch.randn(3, 3, 32, 32)
    counts = count(model, x)
    assert counts.params == count_params(model) == 774_260
    assert counts.macs == counts.second == slow_count(model, x) == 55_433_728
    assert counts.macs + sum(counts.elementwise.values()) == 57_768_448
    assert "auxiliary" in counts.uncalled
    assert "auxiliary.10" in counts.uncalled
    assert not [path for path in counts.uncalled if not path.startswith("auxiliary")]
    cells = [counts.by_module[f"cells.{i}"] for i in range(10)]
    assert counts.by_module["cells"].macs == sum(cell.macs for cell in cells)
    assert counts.by_module["auxiliary"] == morph.counts.ModuleCount(435_466, 0, "Sequential")
    assert list(counts.by_module) == [path for path, _ in model.named_modules()]


def test_densenet_bc_100_12_to_the_digit():
    model, x = DenseNet(100, 12), torch.zeros(1, 3, 32, 32)
    counts = count(model, x)
    assert counts.params == 769_162
    assert counts.macs == counts.second == slow_count(model, x) == 287_929_692


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet"])
def test_torchvision_against_a_third_count(name):
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **kwargs)
    x = torch.zeros(1, 3, 96, 96)
    counts = count(model, x)
    assert counts.macs == counts.second == slow_count(model, x)
    assert counts.difference is None


def small_swin(version: int) -> nn.Module:
    swin = torchvision.models.swin_transformer
    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    return swin.SwinTransformer([4, 4], 12, [2, 2], [2, 3], [4, 4], **parts)


TRANSFORMERS = {
    "vit": lambda: torchvision.models.VisionTransformer(64, 8, 2, 3, 24, 37),
    "swin": lambda: small_swin(1),
    "swin v2": lambda: small_swin(2),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_is_counted_by_both(name):
    model, x = TRANSFORMERS[name](), torch.zeros(3, 3, 64, 64)
    counts = count(model, x)
    assert counts.macs == counts.second > slow_count(model, x)
    assert counts.difference is None
    assert counts.uncalled == ()


def test_the_third_count_would_notice():
    model, x = small(), torch.randn(1, 3, 13, 13)
    assert count(model, x).macs == slow_count(model, x)
    model[3].stride = (1, 1)
    wrong = copy.deepcopy(model)
    wrong[3].stride = (2, 2)
    assert count(model, x).macs != slow_count(wrong, x)


def test_one_sample_whatever_the_batch():
    class Table(nn.Module):
        """Has work that does not grow with the batch, as Swin V2's position table."""

        def __init__(self):
            super().__init__()
            self.mix, self.fc = nn.Linear(5, 3), nn.Linear(7, 3)
            self.register_buffer("table", torch.randn(11, 5))

        def forward(self, x):
            return self.fc(x) + self.mix(self.table).sum(0)

    for batch in (1, 2, 5):
        counts = count(Table(), torch.randn(batch, 7))
        assert counts.macs == counts.second == 7 * 3 + 11 * 5 * 3
        assert counts.buffers == 55


OPERATORS = {
    "matmul broadcasts its left side": (lambda a, b: torch.randn(5, 3) @ b, [(1, 2), (1, 7, 3, 2)], 7 * 5 * 3 * 2),
    "matmul batched": (torch.matmul, [(1, 7, 5, 3), (1, 1, 3, 2)], 7 * 5 * 3 * 2),
    "bmm": (torch.bmm, [(1, 5, 3), (1, 3, 7)], 5 * 3 * 7),
    "baddbmm": (torch.baddbmm, [(1, 5, 7), (1, 5, 3), (1, 3, 7)], 5 * 3 * 7),
    "addmm": (lambda a: torch.addmm(torch.zeros(7), a[0], torch.zeros(3, 7)), [(1, 5, 3)], 5 * 3 * 7),
    "tensordot": (lambda a: torch.tensordot(a[0], torch.zeros(3, 2, 11), dims=2), [(1, 5, 3, 2)], 5 * 6 * 11),
    "inner": (lambda a: torch.inner(a[0], torch.zeros(7, 3)), [(1, 5, 3)], 5 * 3 * 7),
    "convolution, padding by name": (
        lambda x: F.conv2d(x, torch.zeros(6, 1, 3, 3), padding="same", groups=3), [(1, 3, 5, 7)], 6 * 9 * 35,
    ),
    "convolution in 1 dimension": (lambda x: F.conv1d(x, torch.zeros(7, 3, 5)), [(1, 3, 11)], 7 * 3 * 5 * 7),
    "convolution in 3 dimensions": (lambda x: F.conv3d(x, torch.zeros(7, 3, 2, 2, 2)), [(1, 3, 3, 3, 3)], 7 * 3 * 64),
    "transposed convolution": (lambda x: F.conv_transpose2d(x, torch.zeros(3, 7, 2, 2)), [(1, 3, 5, 5)], 84 * 25),
    "attention": (F.scaled_dot_product_attention, [(1, 2, 5, 3), (1, 2, 11, 3), (1, 2, 11, 7)], 2 * 5 * 11 * (3 + 7)),
    "attention, grouped heads": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        [(1, 6, 5, 3), (1, 2, 11, 3), (1, 2, 11, 3)], 6 * 5 * 11 * 6,
    ),
    "einsum": (lambda a, b: torch.einsum("b h i d, b h j d -> b h i j", a, b), [(1, 2, 5, 3), (1, 2, 7, 3)], 210),
    "einsum with an ellipsis": (lambda a, b: torch.einsum("...i,...ji", a, b), [(1, 2, 5), (1, 2, 7, 5)], 2 * 5 * 7),
    "einsum that only multiplies": (lambda a, b: torch.einsum("bchw,bc->bchw", a, b), [(1, 3, 5, 5), (1, 3)], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_by_hand(name):
    function, shapes, expected = OPERATORS[name]
    counts = count(Op(function), tuple(torch.randn(shape) for shape in shapes))
    assert counts.macs == counts.second == expected
    assert counts.difference is None
    assert counts.counter == FIRST


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("equation", ["ab,bc,cd,de->ae", "abc,acd,bd->", "ij,jk,kl->il", "ab,ac,ad->bcd", "ab,cb"])
def test_einsum_is_counted_as_torch_runs_it(equation, ordered, monkeypatch):
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", ordered)
    sizes = dict(zip("abcdeijkl", [2, 3, 5, 7, 11, 2, 3, 5, 7], strict=True))
    operands = [torch.randn([sizes[letter] for letter in term]) for term in equation.partition("->")[0].split(",")]
    counts = count(Op(lambda _: torch.einsum(equation, *operands)), torch.zeros(1))
    assert counts.counter == FIRST
    assert counts.macs == counts.second > 0


def test_einsum_formula_rejects_what_it_should():
    assert einsum_macs("ij,jk->ik", [(2, 3), (3, 5)]) == 30
    assert einsum_macs("ij,jk->ik", [(2, 3), (3, 7)]) != 30
    with pytest.raises(ValueError, match="zip"):
        einsum_macs("ij,jk->ik", [(2, 3)])


class Mixer(nn.Module):
    """Its product with a vector is one that torch's counter does not see."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x):
        return (x.reshape(-1, 5) @ self.weight).reshape(1, -1)


def test_what_torch_does_not_count_is_named():
    counts = count(nn.Sequential(nn.Linear(15, 15), Mixer(), nn.Linear(3, 7)), torch.randn(1, 15))
    assert counts.macs == 225 + 15 + 21
    assert counts.second == 225 + 21
    assert counts.difference == f"in 1 (Mixer) {FIRST} counts matmul 15, {SECOND} nothing"


def test_what_fvcore_does_not_count_is_named():
    counts = count(nn.LSTM(3, 5, batch_first=True), torch.randn(2, 7, 3))
    assert counts.macs == 0
    assert counts.second == 7 * 4 * 5 * (3 + 5)
    assert counts.difference is not None
    assert counts.difference.startswith(f"in the model (LSTM) {FIRST} counts nothing, {SECOND} ")
    assert counts.difference.endswith(f"({FIRST} has no rule for aten::lstm)")
    assert counts.unsupported == {"aten::lstm": 1}


class Untraceable(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = nn.ModuleList([inner])

    def forward(self, x):
        if torch.jit.is_tracing():
            raise RuntimeError("no tracing here\nsecond line")
        return self.inner[0](x)


def test_the_second_counter_stands_in_where_fvcore_cannot_trace():
    inner, x = DartsNet(layers=6, channels=4), torch.randn(2, 3, 32, 32)
    traced, counts = count(inner, x), count(Untraceable(inner), x)
    assert counts.counter == SECOND
    assert counts.difference == f"{FIRST} cannot trace this model (no tracing here); counted by {SECOND} alone"
    assert counts.macs == counts.second == traced.macs
    for path, module in traced.by_module.items():
        assert counts.by_module[f"inner.0.{path}" if path else "inner.0"] == module
    assert counts.by_module["inner"].macs == counts.macs
    assert counts.uncalled == tuple(f"inner.0.{path}" for path in traced.uncalled)
    assert not torch.jit.is_tracing()


def test_values_decide_where_the_meta_device_cannot():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(5, 3), nn.Linear(5, 7)

        def forward(self, x):
            return self.large(x) if x.sum().item() > 0 else self.small(x)

    assert count(Gate(), torch.ones(1, 5)).macs == 35
    counts = count(Gate(), -torch.ones(1, 5))
    assert counts.macs == counts.second == 15
    assert counts.uncalled == ("large",)


def test_a_model_without_values_can_be_counted():
    with torch.device("meta"):
        model = torchvision.models.resnet18(weights=None)
    counts = count(model, torch.empty(1, 3, 64, 64, device="meta"))
    assert counts.difference is None
    assert counts.macs == count(torchvision.models.resnet18(weights=None), torch.empty(1, 3, 64, 64)).macs


def test_shared_modules_and_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(7, 7, bias=False)
            self.later = nn.Sequential(nn.ReLU(), self.first)
            self.last = nn.Linear(7, 7, bias=False)
            self.last.weight = self.first.weight
            self.frozen = nn.Linear(7, 3)
            self.frozen.bias.requires_grad_(False)

        def forward(self, x):
            return self.frozen(self.last(self.later(self.first(x))))

    model = Tied()
    counts = count(model, torch.randn(2, 7))
    assert counts.params == 49 + 21 + 3
    assert counts.trainable == 49 + 21
    assert counts.macs == counts.second == 3 * 49 + 21
    assert counts.difference is None
    assert counts.by_module["first"].macs == 2 * 49
    assert counts.by_module["last"].macs == 49
    assert "later.1" not in counts.by_module


def snapshot(model: nn.Module) -> tuple[object, ...]:
    return (
        {key: value.clone() for key, value in model.state_dict().items()},
        [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        [(id(p), p.requires_grad, p._version) for p in model.parameters()],
        [(id(b), b._version) for b in model.buffers()],
    )


@pytest.mark.parametrize("wrap", [lambda m: m, Untraceable])
def test_the_model_and_the_surroundings_are_left_as_they_are(wrap, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    inner = small()
    model, ran = wrap(inner).train(), []
    inner[1].eval()
    inner[0].weight.requires_grad_(False)
    inner[0].register_forward_hook(lambda *_: ran.append("hook"))
    inner[7].register_forward_pre_hook(lambda *_: ran.append("pre"))
    x = torch.randn(3, 3, 13, 13)
    given, before, random, filters = x.clone(), snapshot(model), torch.get_rng_state(), list(warnings.filters)
    torch.backends.mha.set_fastpath_enabled(True)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(model, x)
    after = snapshot(model)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert before[1:] == after[1:]
    assert torch.equal(x, given)
    assert torch.equal(random, torch.get_rng_state())
    assert filters == list(warnings.filters)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()
    assert ran == []
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_that_draws_or_writes_while_it_runs_stays_as_it_is():
    class Busy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            with torch.no_grad():
                self.fc.weight.clamp_(-0.1, 0.1)
            return self.fc(x + torch.rand(5)) * float(self.calls)

    model = Busy()
    x, weight = torch.randn(1, 5), model.fc.weight.clone()
    random = torch.get_rng_state()
    assert count(model, x).macs == 15
    assert model.calls == 0
    assert torch.equal(model.fc.weight, weight)
    assert torch.equal(random, torch.get_rng_state())


def test_attention_heads_are_not_called_idle():
    counts = count(nn.TransformerEncoderLayer(6, 2, 10, batch_first=True).eval(), torch.randn(2, 5, 6))
    assert counts.macs == counts.second == 5 * (6 * 18 + 36 + 60 + 60) + 2 * 25 * (3 + 3)
    assert not [path for path in counts.uncalled if "out_proj" in path]


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_weights_that_are_computed(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(norm(nn.Conv2d(3, 7, 3)), nn.ReLU())
    model(torch.randn(1, 3, 5, 5))
    counts = count(model, torch.randn(1, 3, 5, 5))
    assert counts.macs == counts.second == 7 * 27 * 9
    assert counts.difference is None


def test_outputs_may_be_a_dictionary_and_inputs_several():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(7, 3)

        def forward(self, x, y):
            return {"sum": self.a(x) + self.b(y), "both": [self.a(x), None]}

    counts = count(Named(), (torch.randn(4, 5), torch.randn(4, 7)))
    assert counts.macs == counts.second == 5 * 3 * 2 + 7 * 3
    assert counts.counter == FIRST
    assert counts.input_shapes == ((5,), (7,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_floating_type(dtype):
    assert count(small().to(dtype), torch.randn(1, 3, 13, 13, dtype=dtype)).difference is None


def test_errors_say_what_was_wrong_in_one_line():
    with pytest.raises(CountError, match=r"run on an input of shape \(1, 4, 13, 13\): .*channels.*give the") as caught:
        count(small(), torch.randn(2, 4, 13, 13))
    assert "\n" not in str(caught.value)
    with pytest.raises(CountError, match=r"a tuple of arguments or a mapping of named ones, got list"):
        count(small(), [torch.randn(2, 3, 13, 13)])  # type: ignore[arg-type]
    with pytest.raises(CountError, match=r"at least one sample, got no tensor"):
        count(small(), (5,))
    with pytest.raises(CountError, match=r"at least one sample, got shape \(0, 3, 13, 13\); the first axis"):
        count(small(), torch.randn(0, 3, 13, 13))
    with pytest.raises(CountError, match=r"at least one sample, got no tensor"):
        count(small(), ())
    with pytest.raises(CountError, match=r"the model cannot be copied, which counting needs: "):
        count(nn.Sequential(nn.LazyLinear(3)), torch.randn(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(nn.Linear(5, 3), torch.randn(1, 5))
    with pytest.raises(CountError, match=r"TorchScript model cannot be counted; count the model that it was"):
        count(traced, torch.randn(1, 5))


class Masked(nn.Module):
    """Named inputs, one of them not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x, mask=None, scale=1.0):
        x = self.one(x) * scale
        return self.two(x if mask is None else x * mask)


def test_named_inputs_are_counted_by_the_second_counter():
    plain = count(Masked(), torch.randn(4, 5))
    named = count(Masked(), {"x": torch.randn(4, 5), "mask": torch.ones(4, 1), "scale": 2.0})
    assert (named.macs, named.params) == (plain.macs, plain.params) == (5 * 7 + 7 * 3, 5 * 7 + 7 + 7 * 3 + 3)
    assert count(Masked(), (torch.randn(4, 5), None, 3.0)).macs == plain.macs
    assert named.difference == "fvcore cannot trace this model (it takes tensors by position alone); counted by " + (
        "torch.utils.flop_counter alone"
    )
    assert named.input_shapes == ((5,), (1,))
