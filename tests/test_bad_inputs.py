"""Odd models and odd inputs: an exact result or one clear refusal, and the model that came in is as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from analysis_nets import draw
from analysis_support import gap
from models import Snapshot, randomise
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as masks

import morph
from morph.errors import CheckFailedError, MorphError, NothingToGrowError, ProbeError, TargetError, TraceError
from morph.zeroing import run_doubled

IMAGES, ROWS = draw(3, 3, 9, 7), draw(5, 5)


def same(x: Any) -> Any:
    return x


@dataclasses.dataclass
class Answer:
    logits: Tensor
    features: Tensor


class Net(nn.Module):
    """A convolution in the middle to wrap, and an output to put into another form."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module] = same, form: Callable[..., Any] = lambda y, h: y):
        super().__init__()
        self.one, self.bn, self.two = nn.Conv2d(3, 13, 3), nn.BatchNorm2d(13), nn.Conv2d(13, 11, 3, padding=1)
        self.three, self.head, self.form = nn.Conv2d(11, 7, 1), nn.Linear(7, 5), form
        randomise(self)
        self.two = wrap(self.two)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.two(torch.relu(self.bn(self.one(x)))))
        x = torch.relu(self.three(x)).mean((2, 3))
        return self.form(self.head(x), x)


class Rows(nn.Module):
    """Two linear layers; what else happens is the business of those that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Any:
        return self.two(torch.tanh(self.one(x)))


class Counting(Rows):
    """Writes into buffers while it runs, once through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("means", torch.zeros(11, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.one(x)
        self.means[:, 0].mul_(0.9)
        return self.two(torch.tanh(h + self.means[:, 0]))


class Silent(Rows):
    def forward(self, x: Tensor) -> None:
        super().forward(x)


class Waves(Rows):
    """A complex output."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.polar(torch.exp(0.1 * y), y)


class Several(Rows):
    """A list of tensors among its arguments, and a list that comes out."""

    def forward(self, xs: list[Tensor], scale: float = 1.0) -> list[Tensor]:
        return [super(Several, self).forward(x) * scale for x in xs]


class Again(nn.Module):
    """One module used twice, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.one, self.mid = nn.Embedding(13, 11), nn.Linear(11, 17), nn.Linear(17, 17)
        self.two, self.out = nn.Linear(17, 11), nn.Linear(11, 13, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mid(torch.tanh(self.mid(torch.tanh(self.one(self.table(x)))))))
        return self.out(self.two(x))


def frozen() -> nn.Module:
    model = Net().train()
    model.bn.requires_grad_(False).eval()
    model.one.weight.requires_grad_(False)
    return model


def hooked() -> nn.Module:
    model = Net()
    model.one.register_forward_hook(lambda module, args, output: output * 2)
    model.two.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.head.register_full_backward_hook(lambda module, grads, outputs: None)
    return model


def weight_norm(module: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(module)


WORKING: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "weight norm": (lambda: Net(weight_norm), IMAGES),
    "spectral norm": (lambda: Net(parametrizations.spectral_norm), IMAGES),
    "frozen batch norm in a model in training": (frozen, IMAGES),
    "hooks that change values": (hooked, IMAGES),
    "dict out": (lambda: Net(form=lambda y, h: {"y": y, "h": h}), IMAGES),
    "tuple out": (lambda: Net(form=lambda y, h: (y, [h, None])), IMAGES),
    "dataclass out": (lambda: Net(form=Answer), IMAGES),
    "scalar out": (lambda: Net(form=lambda y, h: y.sum()), IMAGES),
    "complex out": (Waves, ROWS),
    "list in, list out": (Several, ([ROWS, ROWS + 1], 0.5)),
    "twice and tied": (Again, torch.randint(0, 13, (3, 7), generator=torch.Generator().manual_seed(0))),
    "batch of one": (Net, IMAGES[:1]),
    "writes while it runs": (Counting, ROWS),
    "data parallel": (lambda: nn.DataParallel(Rows()), ROWS),
    "traced graph": (lambda: torch.fx.symbolic_trace(Net()), IMAGES),
    "recurrent": (lambda: Recurrent(), draw(3, 7, 5)),
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.LSTM(5, 11, batch_first=True), nn.Linear(11, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(self.body(x)[0][:, -1])))


def settings(model: nn.Module) -> list[tuple[object, ...]]:
    """Modes, hooks and frozen parameters."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = [
        (name, module.training, *(len(getattr(module, hook)) for hook in hooks))
        for name, module in model.named_modules()
    ]
    return [*modules, *((n, p.requires_grad) for n, p in model.named_parameters())]


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("surgery", ["prune", "widen"])
def test_an_odd_model_is_handled_exactly(name, surgery):
    make, inputs = WORKING[name]
    model = make().double()
    snapshot, kept = Snapshot(model), settings(model)
    result = morph.prune(model, inputs, ratio=0.5) if surgery == "prune" else morph.widen(model, inputs, ratio=1.5)
    assert snapshot.same()
    assert settings(model) == kept
    assert settings(result.model) == kept
    (check,) = result.record.checks
    assert check.relative < 1e-12
    assert result.record.before["params"] != result.record.after["params"]
    wanted, got = run_doubled(model, inputs), run_doubled(result.model, inputs)
    assert [t.shape[:1] for t in wanted] == [t.shape[:1] for t in got]
    if surgery == "widen" and name not in ("dict out", "tuple out", "dataclass out"):
        assert gap(wanted, got) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_types_stay_and_are_exact(dtype):
    model = Net().to(dtype)
    snapshot = Snapshot(model)
    for result in (morph.prune(model, IMAGES.to(dtype), ratio=0.5), morph.widen(model, IMAGES.to(dtype), ratio=1.5)):
        assert snapshot.same()
        assert {p.dtype for p in result.model.parameters()} == {dtype}
        assert result.record.checks[0].relative < (1e-12 if dtype is torch.bfloat16 else 1e-7)


def test_as_narrow_as_can_be():
    model = Net().double()
    narrow = morph.prune(model, IMAGES, ratio=0.999).model
    assert (narrow.one.out_channels, narrow.two.out_channels, narrow.three.out_channels) == (1, 1, 1)
    kept = morph.prune(model, IMAGES, ratio=0.999, minimum=3).model
    assert (kept.one.out_channels, kept.two.out_channels, kept.three.out_channels) == (3, 3, 3)
    whole = morph.prune(model, IMAGES, ratio=0.999, minimum=99)
    assert whole.record.plan.edits == ()


class Other(nn.Module):
    """Whole-number, complex and quantised tensors along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 11), nn.Linear(11, 7)
        self.whole = nn.Parameter(torch.arange(11), requires_grad=False)
        self.phase = nn.Parameter(torch.polar(torch.ones(7), torch.arange(7.0)).to(torch.complex128))
        self.register_buffer("mask", torch.arange(11) % 2 == 0)
        self.register_buffer("packed", torch.randint(-9, 9, (5, 7), dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(torch.tanh(self.one(x)) * self.whole * self.mask)
        return F.linear((y * self.phase).real, self.packed.to(y.dtype))


@pytest.mark.parametrize("surgery", [morph.prune, morph.widen])
def test_other_kinds_of_tensors_are_left_or_follow_exactly(surgery):
    model = Other().double()
    snapshot = Snapshot(model)
    with contextlib.suppress(NothingToGrowError):
        result = surgery(model, ROWS, ratio=0.5 if surgery is morph.prune else 1.5)
        assert result.record.checks[0].relative < 1e-12
        assert {n: b.dtype for n, b in result.model.named_buffers()} == {n: b.dtype for n, b in model.named_buffers()}
    assert snapshot.same()


def masked() -> nn.Module:
    model = Net()
    masks.l1_unstructured(model.two, "weight", 0.3)
    return model


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Net(nn.utils.weight_norm)


def script() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Rows())


def endless() -> nn.Module:
    model = Rows()
    with torch.no_grad():
        model.two.weight[2, 3] = float("inf")
    return model


def subclassed() -> nn.Module:
    class Special(nn.Parameter):
        pass

    model = Rows()
    model.one.weight = Special(model.one.weight.data)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], Any, type[MorphError], str]] = {
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(7), nn.ReLU(), nn.LazyLinear(3)),
        ROWS.float(),
        TraceError,
        r"0 \(LazyLinear\) has no shape for weight yet; run the model once on the inputs",
    ),
    "old weight norm": (old_weight_norm, IMAGES.float(), TraceError, r"two \(Conv2d\) keeps weight, computed from"),
    "masks": (masked, IMAGES.float(), TraceError, r"two \(Conv2d\) keeps weight, .*torch\.nn\.utils\.prune\.remove"),
    "script": (script, ROWS.float(), TraceError, "is TorchScript, whose code cannot be followed; give the module that"),
    "compiled": (
        lambda: torch.compile(Rows(), backend="eager"),
        ROWS.float(),
        TraceError,
        r"\(OptimizedModule\) is a compiled module; give the module that was compiled",
    ),
    "no module": (lambda: torch.relu, ROWS, TraceError, r"a model is a torch\.nn\.Module, got builtin_function"),
    "no sample": (Rows, ROWS[:0].float(), TraceError, r"an input of shape \[0, 5\] has no sample; give a batch of two"),
    "text": (Rows, "x", TraceError, "Rows does not accept inputs"),
    "numbers of another kind": (Rows, ROWS.long(), TraceError, "Rows does not accept inputs of shape"),
    "half model, single inputs": (lambda: Net().half(), IMAGES.float(), TraceError, "Net does not accept inputs"),
    "too many": (Rows, (ROWS.float(), ROWS.float()), TraceError, "Rows does not accept inputs"),
    "no output": (Silent, ROWS.float(), CheckFailedError, "puts out no floating-point tensor, so nothing can be"),
    "not finite": (endless, ROWS.float(), MorphError, "not finite|moved by"),
    "a parameter of another class": (subclassed, ROWS.float(), MorphError, "one.weight is a Special, not a plain"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("surgery", ["prune", "widen"])
def test_what_cannot_be_done_is_one_clear_refusal(name, surgery):
    make, inputs, error, match = REFUSED[name]
    model = make()
    snapshot = Snapshot(model) if name not in ("lazy", "script", "no module") else None
    with pytest.raises(error, match=match) as caught:
        morph.prune(model, inputs, ratio=0.5) if surgery == "prune" else morph.widen(model, inputs, ratio=1.5)
    assert "\n" not in str(caught.value)
    assert snapshot is None or snapshot.same()


def test_without_data_a_score_of_weights_is_refused_and_any_other_will_do():
    model = Net().to("meta")
    for inputs in (IMAGES.float(), IMAGES.float().to("meta")):
        with pytest.raises(ProbeError, match=r"the score 'l2' looks at weights, and the model has none \(meta device"):
            morph.prune(model, inputs, ratio=0.5)
        with pytest.raises(ProbeError, match="the score 'l1' looks at weights"):
            morph.widen(model, inputs, ratio=1.5, score="l1")
        for score in ("random", lambda _, coupling: torch.arange(coupling.units)):
            result = morph.prune(model, inputs, ratio=0.5, score=score)
            assert all(p.is_meta for p in result.model.parameters())
            assert result.record.details["verified"].startswith("not verified: the model has no data")
            assert result.record.after["params"] < result.record.before["params"]


def test_a_model_without_outputs_can_be_cut_where_nothing_is_compared():
    result = morph.prune(Silent(), ROWS.float(), ratio=0.5, verify=False)
    assert result.model.one.out_features < Silent().one.out_features
    with pytest.raises(TargetError):
        morph.prune(Silent(), ROWS.float(), ratio=2.0, verify=False)
