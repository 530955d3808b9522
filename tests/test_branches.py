"""Residual branches whose last layer reads nothing are dropped whole, exactly; others keep one channel."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from gate_support import made, outputs, shut
from models import Snapshot, randomise
from safetensors.torch import save_file
from torch import Tensor, nn

import morph
from morph.checkpoints import edit_checkpoint
from morph.cut import apply_plan
from morph.errors import CheckFailedError, EditError, PlanMismatchError
from morph.fresh_weights import reinitialise
from morph.passes.gates import gates_of
from morph.plan import DropBranch, Plan, UseGraph, load_plan
from morph.rerouting import SHIFT
from morph.surgery import replay

ENDS = {
    "wrn": ("groups.1.0.conv2", False),
    "resnet": ("layer2.1.conv2", True),
    "mobilenet": ("features.4.conv.2", True),
    "vit": ("encoder.layers.encoder_layer_1.mlp.3", True),
}


def gap(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("where", ["auto", "producer"])
@pytest.mark.parametrize("name", ENDS)
def test_a_closed_branch_is_dropped_exactly_and_counted(name, where, tmp_path):
    """Beside others that are closed at random, so that the stream that it adds to is cut too."""
    model, x = made(name)
    shot = Snapshot(model)
    end, shifts = ENDS[name]
    gated = morph.gate(model, x, where=where)
    closed = shut(gated, 0.3, 5)
    before = len([s for s in gated.sites if end in s.readers])
    assert before == 1
    for site in gated.sites:
        if end in site.readers:
            with torch.no_grad():
                gates_of(gated.model)[site.name].weight.zero_()
            closed[site.name] = torch.ones(site.gates, dtype=torch.bool)
    result = gated.remove()
    assert {"layer": end, "shift": shifts} in result.record.details["branches_gone"]
    assert end in result.record.details["layers_gone"]
    assert not [n for n in result.model.state_dict() if n.startswith(f"{end}.")]
    assert gap(outputs(gated.model.eval(), x), outputs(result.model.eval(), x)) < 1e-12
    count = morph.count(copy.deepcopy(result.model).float(), x.float())
    sizes = gated.sizes(closed)
    assert (sizes.params, sizes.macs) == (count.params, count.macs)
    assert gated.norm_operations(closed) == count.elementwise.get("batch_norm", 0)
    assert any(n.startswith(SHIFT) for n, _ in result.model.named_parameters()) == shifts
    assert shot.same()

    result.record.save(tmp_path / "record.json")
    plan = load_plan(tmp_path / "record.json")
    assert plan == result.record.plan
    source = copy.deepcopy(model)
    source.load_state_dict(gated.model.state_dict(), strict=False)
    assert gap(outputs(replay(source, plan, x).model, x), outputs(result.model, x)) == 0
    morph.save_model(result.model, tmp_path / "student.pt", input_shape=tuple(x.shape[1:]))
    assert gap(outputs(morph.open_model(tmp_path / "student.pt").model, x), outputs(result.model, x)) == 0


@pytest.mark.parametrize("change", ["dropped", "other", "moved"])
def test_another_shift_is_refused(change, monkeypatch):
    model, x = made("resnet")
    gated = morph.gate(model, x)
    masks = {s.name: torch.ones(s.gates, dtype=torch.bool) for s in gated.sites if s.name == "layer2.1.conv2"}
    edits = gated.remove(masks).record.plan.edits
    (at,) = [i for i, edit in enumerate(edits) if isinstance(edit, DropBranch)]
    edit = edits[at]
    assert len(edit.shift) == 16
    shift = {"dropped": (), "other": (*edit.shift[:-1], edit.shift[-1] + 1e-4), "moved": edit.shift[::-1]}[change]
    wrong = Plan((*edits[:at], dataclasses.replace(edit, shift=shift), *edits[at + 1 :]))
    monkeypatch.setattr("morph.gating.graph_plan", lambda *_: wrong)
    with pytest.raises(CheckFailedError, match="the gated model moved by"):
        gated.remove(masks)


class Ends(nn.Module):
    """Branches that end in other ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.inner = nn.Conv2d(7, 5, 3, padding=1)
        self.last = nn.Conv2d(5, 7, 3, padding=1)
        self.end: nn.Module = nn.Identity()
        if kind == "pixels":
            self.end = nn.Conv2d(7, 7, 3, padding=1, groups=7)
        elif kind == "pool":
            self.end = nn.AvgPool2d(3, 1, 1)
        elif kind == "batch":
            self.end = nn.BatchNorm2d(7, track_running_stats=False)
        elif kind == "fine":
            self.end = nn.Sequential(nn.BatchNorm2d(7), nn.SiLU(), nn.Dropout(0.1))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.end(self.last(torch.relu(self.inner(x))))
        if self.kind == "product":
            x = x * y
        elif self.kind == "weighted":
            x = torch.add(x, y, alpha=2)
        elif self.kind == "twice":
            x = x + y + y.mean()
        elif self.kind == "broadcast":
            x = x + y.mean((2, 3), keepdim=True)
        elif self.kind == "written":
            z = x
            x = x.add_(y)
            return self.head(x.mean((2, 3)) + z.mean((2, 3)))
        elif self.kind == "fine":
            x += y
        else:
            x = x + y
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "kind", ["fine", "plain", "pixels", "pool", "batch", "product", "weighted", "twice", "broadcast", "written"]
)
def test_other_ends_keep_one_channel(kind):
    model = randomise(Ends(kind), 2).double().eval()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    gated = morph.gate(model, x)
    masks = {"last": torch.ones(5, dtype=torch.bool)}
    result = gated.remove(masks)
    dropped = [b["layer"] for b in result.record.details["branches_gone"]]
    assert dropped == (["last"] if kind in ("fine", "plain") else [])
    assert bool(result.record.details["kept"]) == (not dropped)
    with torch.no_grad():
        gates_of(gated.model)["last"].weight.zero_()
    assert gap(outputs(gated.model.eval(), x), outputs(result.model.eval(), x)) < 1e-12


def test_of_the_two_operands_of_a_sum_one_stays():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(6, 7)
            self.head = nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.head(torch.relu(self.one(x) + self.two(x)))

    model = randomise(Both(), 1).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    gated = morph.gate(model, x, where="connection")
    result = gated.remove({name: torch.ones(6, dtype=torch.bool) for name in ("one", "two")})
    assert [b["layer"] for b in result.record.details["branches_gone"]] == ["one"]
    assert [k["site"] for k in result.record.details["kept"]] == ["two"]


def test_weights_drawn_afresh_leave_no_shift():
    model, x = made("resnet")
    gated = morph.gate(model, x)
    student = gated.remove({"layer2.1.conv2": torch.ones(16, dtype=torch.bool)}).model
    shifts = dict(student.named_parameters(recurse=False))
    assert [bool(p.any()) for p in shifts.values()] == [True]
    assert reinitialise(student, 3) == ()
    assert [bool(p.any()) for p in shifts.values()] == [False]


def test_the_state_of_an_optimizer_follows_and_the_new_parameter_has_none():
    model, x = made("resnet")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(x).sum().backward()
    optimizer.step()
    ends = ("layer2.0.conv2", "layer2.1.conv2")
    result = morph.gate(model, x).remove({name: torch.ones(16, dtype=torch.bool) for name in ends})
    moved = morph.transplant(optimizer, result.record, before=model, after=result.model)
    named = dict(result.model.named_parameters())
    assert sorted(name for name, p in named.items() if p not in moved.state) == [f"{SHIFT}0", f"{SHIFT}1"]
    old, new = model.get_parameter("layer1.0.conv1.weight"), named["layer1.0.conv1.weight"]
    assert torch.equal(moved.state[new]["momentum_buffer"], optimizer.state[old]["momentum_buffer"])
    result.model(x).sum().backward()
    moved.step()


def test_a_checkpoint_alone_cannot_get_the_new_parameter(tmp_path):
    model, x = made("resnet")
    plan = morph.gate(model, x).remove({"layer2.1.conv2": torch.ones(16, dtype=torch.bool)}).record.plan
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(EditError, match="dropbranch make new weights and need the model"):
        edit_checkpoint(plan, tmp_path / "model.safetensors", tmp_path / "new.safetensors")
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"node": "gone"}, "has no node 'gone'"),
        ({"source": "gone"}, "has no node 'gone'"),
        ({"module": "layer1.0.conv1"}, "is not what 'layer1.0.conv1' leads to"),
        ({"module": "gone"}, "is not what 'gone' leads to"),
        ({"node": "layer2_1_bn2"}, "does not add"),
        ({"shape": (5, 1, 1)}, r"16 numbers do not fill the shape \[5, 1, 1\]"),
    ],
)
def test_drops_that_do_not_fit_are_refused(changes, text):
    model, x = made("resnet")
    plan = morph.gate(model, x).remove({"layer2.1.conv2": torch.ones(16, dtype=torch.bool)}).record.plan
    (edit,) = [edit for edit in plan.edits if isinstance(edit, DropBranch)]
    wrong = dataclasses.replace(edit, **changes)
    with pytest.raises(PlanMismatchError, match=text):
        apply_plan(model, Plan((UseGraph("symbolic"), wrong)))
    with pytest.raises(PlanMismatchError, match="must first go on with that graph"):
        apply_plan(model, Plan((edit,)))
    with pytest.raises(PlanMismatchError, match="shift cannot be"):
        Plan.from_json([{**json.loads(json.dumps({"edit": "dropbranch", **vars(edit)})), "shift": "x"}])
