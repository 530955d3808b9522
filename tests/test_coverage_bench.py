"""The coverage benchmark: its judge finds wrong cuts, its lists are whole, its tables count right."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import coverage
import coverage_models
import coverage_summary
import zeroing

KEEP = torch.tensor([0, 2, 3, 6, 9])


class Net(nn.Module):
    """Ten channels between two layers, with what is to be put between as ``middle``."""

    def __init__(self, middle: nn.Module, width: int = 10) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(7, width), middle, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.nn.functional.gelu(self.middle(self.first(x))))


class Centred(nn.Module):
    """A root mean square norm and a variance by hand, as models write them themselves."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) / x.var(-1, keepdim=True)


class Across(nn.Module):
    """Attention across channels: a softmax over them."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.T.unsqueeze(0)
        return (torch.softmax(y @ y.mT, -1) @ y)[0].T


class Standardised(nn.Module):
    """A matrix whose rows are standardised before use, by a batch norm in training mode."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = nn.functional.batch_norm(self.weight[None], None, None, self.gain, training=True)[0]
        return nn.functional.linear(x, weight)


MIDDLES = {
    "nothing": nn.Identity,
    "batch norm": lambda width=10: nn.BatchNorm1d(width),
    "layer norm": lambda width=10: nn.LayerNorm(width),
    "plain layer norm": lambda width=10: nn.LayerNorm(width, elementwise_affine=False),
    "group norm": lambda width=10: nn.GroupNorm(1, width),
    "own norm": Centred,
    "across": Across,
    "group for each": lambda width=10: nn.GroupNorm(width, width),
    "standardised": Standardised,
}


def net(middle: str) -> Net:
    torch.manual_seed(3)
    make = MIDDLES[middle]
    return coverage_models.randomise(Net(make() if middle in ("nothing", "across") else make(10)).eval())


def cut(model: Net, keep_out: Tensor, keep_in: Tensor) -> tuple[Net, dict[str, dict[int, Tensor]]]:
    """Slice by hand: rows of the first layer and the middle by ``keep_out``, columns of the last by ``keep_in``."""
    pruned = copy.deepcopy(model)
    kept: dict[str, dict[int, Tensor]] = {}
    for name, tensor in [*pruned.named_parameters(), *pruned.named_buffers()]:
        if tensor.dim() and not name.startswith("last"):
            both = name == "middle.weight" and tensor.dim() == 2
            tensor.data = tensor.data[keep_out][:, keep_out] if both else tensor.data[keep_out]
            kept[name] = {0: keep_out, 1: keep_out} if both else {0: keep_out}
    pruned.last.weight.data = pruned.last.weight.data[:, keep_in]
    kept["last.weight"] = {1: keep_in}
    if isinstance(pruned.middle, nn.LayerNorm):
        pruned.middle.normalized_shape = (len(keep_out),)
    if isinstance(pruned.middle, nn.GroupNorm):
        each = pruned.middle.num_groups == pruned.middle.num_channels
        pruned.middle.num_channels = len(keep_out)
        pruned.middle.num_groups = len(keep_out) if each else 1
    return pruned, kept


@pytest.mark.parametrize("middle", MIDDLES)
def test_judge_accepts_a_right_cut_and_no_other(middle: str) -> None:
    model, inputs = net(middle), (torch.randn(5, 7),)
    before = copy.deepcopy(model.state_dict())
    pruned, kept = cut(model, KEEP, KEEP)
    found = zeroing.judge(model, pruned, kept, inputs)
    assert found.status == "exact"
    assert found.relative < 1e-13
    assert found.effect > 1e-3
    shifted, kept = cut(model, KEEP, KEEP + torch.tensor([1, 0, 0, 0, 0]))
    assert zeroing.judge(model, shifted, kept, inputs).status == "differs"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_judge_says_what_is_amiss() -> None:
    model, inputs = net("batch norm"), (torch.randn(5, 7),)
    pruned, kept = cut(model, KEEP, KEEP[:4])
    assert zeroing.judge(model, pruned, kept, inputs).status == "does not run"
    assert "RuntimeError" in zeroing.judge(model, pruned, kept, inputs).note
    shorter = copy.deepcopy(model)
    shorter.last = nn.Linear(10, 2)
    assert zeroing.judge(model, shorter, {}, inputs).status == "shape changed"
    model.last.weight.data[:, 1] = 0  # nothing can be learnt from removing this channel
    pruned, kept = cut(model, torch.tensor([0, *range(2, 10)]), torch.tensor([0, *range(2, 10)]))
    assert zeroing.judge(model, pruned, kept, inputs).status == "blind"
    assert zeroing.judge(model, copy.deepcopy(model), {}, inputs).status == "exact"
    assert zeroing.judge(model, pruned, {"no.such": {0: KEEP}}, inputs).status == "not measured"
    assert zeroing.judge(model, model, {}, (torch.full((5, 7), float("nan")),)).status == "not measured"
    assert zeroing.judge(model, model, {}, (torch.zeros(0, 7),)).status == "not measured"


def test_a_cut_may_part_what_was_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(7, 10, bias=False), nn.Linear(7, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(nn.functional.linear(torch.relu(self.embed(x)), self.mix))

    torch.manual_seed(0)
    model = Tied()
    model.register_parameter("mix", nn.Parameter(torch.randn(7, 10)))
    pruned = copy.deepcopy(model)
    pruned.head.weight = nn.Parameter(pruned.head.weight.detach().clone())
    pruned.embed.weight = nn.Parameter(pruned.embed.weight.detach()[KEEP])
    pruned.mix = nn.Parameter(pruned.mix.detach()[:, KEEP])
    kept = {"embed.weight": {0: KEEP}, "mix": {1: KEEP}}
    assert zeroing.judge(model, pruned, kept, (torch.randn(5, 7),)).status == "exact"
    assert model.head.weight is model.embed.weight


def test_only_what_is_picked_is_compared() -> None:
    model, inputs = net("nothing"), (torch.randn(5, 7),)
    other = copy.deepcopy(model)
    other.last.weight.data[2] += 1
    assert zeroing.judge(model, other, {}, inputs).status == "differs"
    assert zeroing.judge(model, other, {}, inputs, lambda output: output[:, :2]).status == "exact"


def test_difference_is_infinite_for_what_is_not_finite() -> None:
    one, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert zeroing.difference([one], [one]) == 0
    assert zeroing.difference([one], [bad]) == float("inf")
    assert zeroing.difference([one], [one[:2]]) == float("inf")
    assert zeroing.difference([2 * one], [one]) == 0.5


def test_nothing_constant_is_left_to_hide_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LayerNorm([8, 5, 5]), nn.Linear(5, 4))
    nn.init.zeros_(model[3].bias)
    nn.init.normal_(model[3].weight, std=0.001)
    coverage_models.randomise(model)
    tensors = [x for x in [*model.parameters(), *model.buffers()] if x.dim()]
    assert all(float(x.detach().std()) > 0.01 for x in tensors)


def test_lists_are_whole_and_names_unique() -> None:
    pytest.importorskip("timm")
    from torchvision.models import list_models

    entries = coverage_models.all_entries()
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names)
    assert {f"torchvision/{name}" for name in list_models() if not name.startswith("quantized")} <= set(names)
    assert sum(entry.kind == "huggingface" for entry in entries) == 20
    families = json.loads(coverage_models.TIMM_CHOICE.read_text())["families"]
    assert all(families.values())
    assert {entry.kind for entry in entries} == set(coverage_models.KINDS)
    model, inputs = next(entry for entry in entries if entry.name == "torchvision/squeezenet1_1").build()
    assert not model.training
    assert model(*inputs).shape == (2, 1000)


def test_timm_choice_takes_small_models_of_each_module_and_then_other_stems() -> None:
    sizes = [
        ("a", "net_large", 9, 224),
        ("a", "net_small", 5, 224),
        ("a", "test_net", 1, 160),
        ("a", "other_net", 7, 224),
        ("b", "big_1", 3, 512),
        ("b", "big_2", 8, 224),
    ]
    assert coverage_models.choose_timm(sizes, 2) == {"a": ["net_small"], "b": ["big_2"]}
    assert coverage_models.choose_timm(sizes, 3) == {"a": ["net_small", "other_net"], "b": ["big_2"]}


def fake_morph(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """An engine that cuts the net of this file by hand, rightly or not."""
    shift = torch.tensor([1, 0, 0, 0, 0]) if wrong else 0

    def prune(model: Net, inputs: object, **_: object) -> types.SimpleNamespace:
        pruned, kept = cut(model, KEEP, KEEP + shift)
        edits = [
            types.SimpleNamespace(tensor=name, axis=axis, size=10, index=tuple(keep.tolist()))
            for name, axes in kept.items()
            for axis, keep in axes.items()
        ]
        plan = types.SimpleNamespace(edits=[types.SimpleNamespace(module="first", attribute="out_features"), *edits])
        return types.SimpleNamespace(model=pruned, record=types.SimpleNamespace(plan=plan))

    def widen(model: Net, inputs: object, **_: object) -> types.SimpleNamespace:
        wide = Net(nn.Identity(), width=13).eval()
        return types.SimpleNamespace(model=wide)

    found = types.SimpleNamespace(traced="meta", couplings={"first.weight[0]": None}, unknown={}, free=lambda: 0.5)
    import morph

    monkeypatch.setattr(morph, "analyse", lambda model, inputs: found, raising=False)
    monkeypatch.setattr(morph, "prune", prune, raising=False)
    monkeypatch.setattr(morph, "widen", widen, raising=False)


@pytest.mark.parametrize("wrong", [False, True])
def test_our_side_is_judged_from_outside(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    fake_morph(monkeypatch, wrong)
    line: dict[str, object] = {}
    for part in coverage.ours(net("batch norm"), (torch.randn(5, 7),)):
        line |= part
    assert line["prune"] == ("differs" if wrong else "exact")
    assert line["widen"] == "differs"  # the fake's wide net has nothing to do with the model
    assert (line["traced"], line["couplings"], line["free"]) == ("meta", 1, 0.5)
    assert coverage_summary.outcome_ours(line) == "wrong"
    assert coverage_summary.outcome_ours(line | {"prune": "exact", "widen": "exact"}) == "exact"
    against = line | {"prune": "differs", "widen": "exact"}
    assert coverage_summary.outcome_ours(against | {"own_check": "done"}) == "disputed"
    assert coverage_summary.outcome_ours(against | {"own_check": "caught: x"}) == "wrong"


def test_refusals_and_crashes_are_told_apart() -> None:
    from morph.errors import CheckFailedError, EditError

    def refuse() -> None:
        raise EditError("not this one\nand more")

    assert coverage.attempt(refuse) == "refused: EditError: not this one"
    assert coverage.attempt(lambda: 1 // 0).startswith("crashed: ZeroDivisionError")  # type: ignore[arg-type]

    def fail() -> None:
        raise CheckFailedError("moved")

    assert coverage.attempt(fail).startswith("caught")


def test_torch_pruning_is_followed_as_it_cuts() -> None:
    peer = pytest.importorskip("peer", reason="torch-pruning is not installed", exc_type=ImportError)
    model = coverage_models.randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)).eval()
    )
    model.num_classes = 5
    inputs = (torch.randn(2, 3, 3, 3),)
    line: dict[str, object] = {}
    for part in coverage.peer(model, inputs, "classification"):
        line |= part
    assert line["peer"] == line["plain"] == "exact"
    assert line["recipe"] is False
    pruned = copy.deepcopy(model)
    kept = peer.prune(pruned, inputs, "classification", peer.Recipe()).kept
    rows = kept["0.weight"][0]
    assert torch.equal(model[0].weight[rows], pruned[0].weight)
    assert torch.equal(model[4].weight[:, kept["4.weight"][1]], pruned[4].weight)


def test_tables_count_every_model_once(capsys: pytest.CaptureFixture[str]) -> None:
    def line(name: str, side: str, **more: object) -> dict[str, object]:
        return {"name": f"torchvision/{name}", "side": side, "kind": "classification", "params": 6_000_000, **more}

    half = {"prune": "exact", "widen": "exact", "free": 0.9, "prune_memory": 1.5}
    coverage_summary.print_summary(
        [
            line("a", "ours", **half, prune_cpu=1.0),
            line("b", "ours", prune="refused: x", widen="exact"),
            line("c", "ours", ended="time"),
            line("a", "peer", peer="exact", plain="exact", peer_cpu=4.0),
            line("b", "peer", peer="differs", plain="does not run", peer_cpu=4.0),
            line("c", "peer", ended="time"),
        ]
    )
    out = capsys.readouterr().out
    assert "| classification | 3 | 1 | 1 | 0 | 0 | 1 | 1 | 2 | 90% | 1.00 | 1.0 |" in out
    assert "| classification | 3 | 1 | 0 | 1 | 1 | 1 | 4.00 | 4.0 |" in out
    assert coverage_summary.outcome_peer({"peer": "differs", "plain": "exact"}) == "exact"
    assert "0.25 in the median" in out
    assert "at most 1.50 times the model" in out


def test_a_child_that_ends_badly_leaves_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = coverage_models.Entry("torchvision/no_such", "classification", lambda: (nn.Identity(), ()))
    args = types.SimpleNamespace(most_params=1e9, memory=8, limit=60)
    line = coverage.measure(entry, "ours", args)
    assert line["ended"].startswith("crashed: StopIteration")
    args.limit = 0.05
    assert coverage.measure(entry, "ours", args)["ended"] == "time: over 0 s"
