"""A network with several inputs, by position and by name, teaches, is searched, expanded and evaluated."""

from __future__ import annotations

import copy
from collections import UserDict

import pytest
import torch
from input_nets import Two, pairs
from lightning_fabric import Fabric
from models import Snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader

import morph
from morph.batches import one_round
from morph.blocks import find_cells
from morph.errors import DataError, TeachingError, TraceError
from morph.labels import extract_logits
from morph.scores import FisherProbe
from morph.search_losses import kl_divergence
from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import Hint
from morph.teaching.hints import Hints
from morph.teaching.losses import SoftLabels
from morph.teaching.objective import Labels
from morph.teaching.terms import Features
from morph.tracing import trace
from morph.training.loop import _ROUND

CPU = torch.device("cpu")
(LEFT, RIGHT), Y = pairs(29)
X = LEFT.double(), RIGHT.double()
NAMED = {"right": X[1], "left": X[0]}
NUMBERS = {"epochs": 3, "batch_size": 8, "lr": 0.05, "schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}


def cpu() -> Fabric:
    return Fabric(accelerator="cpu", devices=1)


def lesson(student: nn.Module, teacher: nn.Module, inputs=X) -> Distillation:
    torch.manual_seed(5)  # of the adapter
    terms = [SoftLabels(2.0, 0.6), Features(Hint(), [("body", "body.2")], 0.5)]
    return Distillation(student, teacher, terms, example_inputs=inputs)


def networks() -> tuple[Two, Two]:
    return Two(4, seed=1).double(), Two(9, seed=2).double()


def by_hand(student: Two, teacher: Two, adapter: nn.Module) -> None:
    """The obvious loop."""
    optimizer = torch.optim.SGD([*student.parameters(), *adapter.parameters()], 0.05)
    for epoch in range(3):
        for pick, y in one_round((torch.arange(29), Y), 8, _ROUND * (epoch + 1), CPU):
            left, right = X[0][pick], X[1][pick]
            ours = student.body[:3](torch.cat([torch.relu(student.left(left)), torch.tanh(student.right(right))], 1))
            logits = student.head(student.body[3](ours))
            with torch.no_grad():
                theirs = teacher.body(torch.cat([torch.relu(teacher.left(left)), torch.tanh(teacher.right(right))], 1))
                wanted = teacher.head(theirs)
            soft = 0.6 * kl_divergence(logits, wanted, 2.0).mean()
            loss = soft + 0.4 * nn.functional.cross_entropy(logits, y) + 0.25 * (theirs - adapter(ours)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("form", ["tuple", "named", "user", "one mapping", "loader"])
def test_teaching_is_the_loop_by_hand_in_every_form(form):
    (student, teacher), (twin, _) = networks(), networks()
    data = {
        "tuple": (X, Y),
        "named": (NAMED, Y),
        "user": (UserDict(NAMED), Y),
        "one mapping": {**NAMED, "labels": Y},
        "loader": (X, Y),
    }[form]
    if form == "loader":  # in the order of the rounds, as a DataLoader hands them on
        rounds = [one_round((X, Y), 8, _ROUND * (epoch + 1), CPU) for epoch in range(3)]
        data = DataLoader([batch for batches in rounds for batch in batches], batch_size=None, shuffle=False)
    before = Snapshot(teacher)
    objective = lesson(student, teacher, NAMED if form == "named" else X)
    adapter = copy.deepcopy(objective.adapters["hint"][0].adapter)
    flags = [m.training for m in objective.modules()]
    numbers = NUMBERS | ({"epochs": 1} if form == "loader" else {})
    fitted = morph.fit(objective, data, validation=(NAMED, Y), fabric=cpu(), **numbers)
    by_hand(twin, teacher, adapter)
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=name)
    assert before.same()
    assert flags == [m.training for m in objective.modules()]
    scores = morph.evaluate(student, (X, Y), batch_size=7)
    assert scores.images == 29
    assert scores.top1 == fitted.history[-1]["val_top1"]
    assert scores.top1 == float((student(*X).argmax(1) == Y).double().mean())
    with pytest.raises(AssertionError):  # another weight of the hint would be noticed
        torch.testing.assert_close(student.head.weight, networks()[0].head.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inputs", [X, NAMED])
def test_parts_of_a_batch_give_its_step(inputs):
    found = []
    for accumulate in (1, 3):
        student, teacher = networks()
        morph.fit(lesson(student, teacher), (inputs, Y), accumulate=accumulate, fabric=cpu(), **NUMBERS)
        found.append(student)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_a_run_is_taken_up_to_the_same_bits(tmp_path):
    whole, stopped = (lesson(*networks()) for _ in range(2))
    morph.fit(whole, (NAMED, Y), fabric=cpu(), **NUMBERS)
    state = tmp_path / "run.state"
    morph.fit(stopped, (NAMED, Y), fabric=cpu(), checkpoint=state, pause_after=1, **NUMBERS)
    again = lesson(*networks())
    morph.fit(again, (NAMED, Y), fabric=cpu(), checkpoint=state, **NUMBERS)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_hints_alone_and_labels_alone():
    student, teacher = networks()
    hints = Hints(student, teacher, [Features(Hint(), [("body", "body")])], example_inputs=NAMED)
    assert all(torch.equal(hints(X, Y).loss, hints(x, Y).loss) for x in (NAMED, UserDict(NAMED)))
    assert "head.weight" not in hints.guided
    labels = Labels(student)
    assert torch.equal(labels(X, Y).loss, labels(UserDict(NAMED), Y).loss)


@pytest.mark.parametrize("names", [["body", "left"], ["relu", "tanh", "cat"]])
def test_taps_on_modules_and_functions_by_name(names):
    model, factor = Two(6).double(), torch.rand(29, 1, dtype=torch.float64)
    before = Snapshot(model)
    wanted = morph.tap(model, names, (*X,))
    taps = morph.tap(model, names, UserDict(NAMED, factor=factor))
    assert taps.shapes == wanted.shapes
    output, features = taps(factor=factor, **NAMED)
    assert torch.equal(output, model(*X, factor=factor))
    plain = wanted(*X)
    assert all(torch.equal(features[name], plain.features[name]) for name in names if name != "body")
    assert not torch.equal(output, plain.output)
    assert before.same()


def test_a_student_is_found_alike_in_every_form():
    teacher = Two(9, seed=2)
    x = LEFT, RIGHT
    factor = torch.ones(29, 1)
    forms = [(x, Y), (UserDict(left=LEFT, right=RIGHT), Y), {"right": RIGHT, "labels": Y, "left": LEFT}]
    forms.append(({"right": RIGHT, "factor": factor, "left": LEFT}, Y))
    before, found = Snapshot(teacher), []
    for data in forms:
        numbers = {"target_params": 150, "epochs": 3, "batch_size": 8, "lr": 0.05, "inherit": True}
        result = morph.search_student(teacher, data, fabric=cpu(), **numbers)
        assert result.record.after["params"] <= 150
        assert all(check.passed for check in result.record.checks)
        found.append(result.model)
    assert before.same()
    wanted = found[0](*x)
    assert all(torch.equal(model(left=LEFT, right=RIGHT), wanted) for model in found[:3])
    torch.testing.assert_close(found[3](left=LEFT, right=RIGHT, factor=factor), wanted)


class Optional(nn.Module):
    """A branch on an argument that may be left out, which a symbolic trace cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, left: Tensor, right: Tensor | None = None, factor: Tensor | None = None) -> Tensor:
        hidden = torch.relu(self.first(left))
        if factor is not None:
            hidden = hidden * factor
        return self.last(hidden)


def test_an_argument_left_out_is_not_taken_for_another():
    """With the second left out the third is the third; a branch that a trace gets wrong is left to the class."""
    model, factor = Optional(), torch.rand(29, 1)
    gated = morph.gate(model, {"left": LEFT, "factor": factor})
    torch.testing.assert_close(gated.model(left=LEFT, factor=factor), model(LEFT, None, factor))
    assert all(check.passed for check in gated.remove().record.checks)
    gated = morph.gate(model, LEFT)
    assert isinstance(gated.model, Optional)
    torch.testing.assert_close(gated.model(LEFT), model(LEFT))
    assert all(check.passed for check in gated.remove().record.checks)
    with pytest.raises(TraceError, match="does something else where right, factor is None"):
        morph.gate(model, LEFT, "connection")


class Groups(nn.Module):
    """A grouped convolution of what two images share, twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=4), nn.ReLU()) for _ in range(3)))
        self.head = nn.Linear(8, 3)

    def forward(self, one: Tensor, *, other: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(one - other)).mean((2, 3)))


def test_cells_are_scored_and_grown_with_named_inputs():
    model = Groups()
    one, other = torch.randn(2, 6, 3, 5, 5)
    y = torch.arange(6) % 3
    named = UserDict(other=other, one=one)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, both: Tensor) -> Tensor:
            return self.net(both[:, 0], other=both[:, 1])

    twin = Joined()
    both = torch.stack([one, other], 1)
    scores = []
    for net, inputs in ((model, named), (twin, both)):
        traced = trace(net, inputs)
        scores.append(FisherProbe(traced, find_cells(traced, None)).scores([(inputs, y)]).cells())
    assert list(scores[0].values()) == pytest.approx(list(scores[1].values()))
    assert list(scores[0]) == ["stem", "blocks.0.0", "blocks.1.0", "blocks.2.0"]
    result = morph.expand(model, (named, y), policy="fisher", target_params=1300)
    assert all(check.passed for check in result.record.checks)
    wanted = morph.expand(twin, (both, y), policy="fisher", target_params=1300)
    assert result.record.after == wanted.record.after
    assert torch.allclose(result.model(**named), model(**named), atol=1e-6)


def test_what_is_refused():
    student, teacher = networks()
    with pytest.raises(TeachingError, match="the teacher has no maps or tokens to pair; name pairs yourself"):
        morph.propose_pairs(teacher, student, NAMED)
    with pytest.raises(TraceError, match="unexpected keyword argument 'wrong'; give inputs of the shapes, types and n"):
        lesson(student, teacher, {**NAMED, "wrong": X[0]})
    with pytest.raises(DataError, match=r"a cache needs samples that have an index .* got list"):
        extract_logits(teacher, [(X, Y)], "never.logits")
    with pytest.raises(DataError, match=r"8 targets whose input \['factor'\] is of shape \[1, 1\]"):
        morph.evaluate(student, [({"left": X[0][:8], "right": X[1][:8], "factor": X[0][:1, :1]}, Y[:8])])
