"""The objective of distillation against loops written out, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import morph
from morph.errors import HeadError, TapError, TeachingError, TraceError
from morph.label_heads import score_path
from morph.search_losses import kl_divergence
from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import AttentionTransfer, Hint, attention_map
from morph.teaching.hints import Hints
from morph.teaching.losses import LabelCrossEntropy, LogitRegression, SoftLabels
from morph.teaching.terms import Channels, Features, Outputs
from morph.zoo import build


class Small(nn.Module):
    """Two stages and a classifier."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.b = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU())
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.pool(self.a(x))).mean((2, 3)))


def setting(seed: int = 0) -> tuple[Small, Small, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    student, teacher = Small(3).double(), Small(6).double()
    return student, teacher, torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.randint(5, (7,))


def calls_of(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_sum_of_everything_against_a_loop_by_hand():
    student, teacher, x, y = setting()
    twin = copy.deepcopy(student).train()
    before = copy.deepcopy(teacher.state_dict())
    terms = [
        Outputs(SoftLabels(3.0, 0.7, t_squared=True), 0.5),
        Features(AttentionTransfer("norm", 2.0), [("a", "a"), ("b", "b")], 3.0),
        Features(Hint("sum"), [("b.1", "b.1")], 0.01, "hint"),
        Outputs(LogitRegression(), 0.2, "logits"),
    ]
    objective = Distillation(student, teacher.train(), terms, example_inputs=x).train()
    regressor = copy.deepcopy(objective.adapters["hint"][0].adapter)
    assert list(regressor.state_dict()) == ["weight", "bias"]
    step = objective(x, y)

    frozen = copy.deepcopy(teacher).eval()
    with torch.no_grad():
        ta = frozen.a(x)
        t1 = frozen.b[1](frozen.b[0](frozen.pool(ta)))
        tb = frozen.b[2](t1)
        t = frozen.head(tb.mean((2, 3)))
    sa = twin.a(x)
    s1 = twin.b[1](twin.b[0](twin.pool(sa)))
    sb = twin.b[2](s1)
    s = twin.head(sb.mean((2, 3)))
    soft = 0.7 * 9 * kl_divergence(s, t, 3.0).mean() + 0.3 * F.cross_entropy(s, y)
    attention = sum(
        2 * (attention_map(u) - attention_map(v)).flatten(1).norm(dim=1).mean() for u, v in ((ta, sa), (tb, sb))
    )
    hint = 0.5 * (t1 - regressor(s1)).square().sum((1, 2, 3)).mean()
    logits = (s - t).square().mean()
    expected = {"soft_labels": soft, "attention_transfer": attention, "hint": hint, "logits": logits}
    total = 0.5 * soft + 3 * attention + 0.01 * hint + 0.2 * logits
    torch.testing.assert_close(step.parts, {name: value.detach() for name, value in expected.items()})
    torch.testing.assert_close(step.loss, total)
    assert torch.equal(step.logits, s)
    step.loss.backward(), total.backward()
    for (name, ours), theirs in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    torch.testing.assert_close(objective.adapters["hint"][0].adapter.weight.grad, regressor.weight.grad)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    with pytest.raises(AssertionError):  # a wrong weight would be noticed
        torch.testing.assert_close(step.loss, total - 0.1 * logits)


def test_each_network_runs_once_and_the_teacher_no_further_than_needed():
    student, teacher, x, y = setting()
    objective = Distillation(
        student, teacher, [LabelCrossEntropy(), Features(AttentionTransfer(), [("a", "a")])], example_inputs=x
    )
    objective(x, y)  # a copy of the teacher found out how often each module is called
    ours, first, head = calls_of(student), calls_of(objective.teacher.a), calls_of(objective.teacher.head)
    objective(x, y)
    assert (len(ours), len(first), len(head)) == (1, 1, 0)
    both = Distillation(student, teacher, [SoftLabels(), Features(Hint(), [("a", "a")])], example_inputs=x)
    first, head = calls_of(both.teacher.a), calls_of(both.teacher.head)
    both(x, y), both(x, y)
    assert (len(first), len(head)) == (2, 2)


def test_known_logits_spare_the_teacher():
    student, teacher, x, y = setting()
    student.eval()
    objective = Distillation(student, teacher, [SoftLabels()])
    logits = objective.teacher(x)
    expected = objective(x, y).loss
    calls = calls_of(objective.teacher)
    assert torch.equal(objective(x, y, logits).loss, expected)
    assert torch.equal(objective(x, (y, logits)).loss, expected)
    assert objective(x, y, logits + torch.randn_like(logits)).loss != expected
    assert not calls


def test_the_teacher_is_no_part_but_moves_along():
    student, teacher, x, y = setting()
    plain = copy.deepcopy(student)
    objective = Distillation(student, teacher, [SoftLabels()], example_inputs=x)
    assert list(objective.state_dict()) == [f"student.{name}" for name in plain.state_dict()]
    assert len(list(objective.parameters())) == len(list(student.parameters()))
    assert student is objective.student
    assert list(student.state_dict()) == list(plain.state_dict())
    assert not student._forward_hooks
    objective.float().train()
    assert {p.dtype for p in objective.teacher.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.parameters()} == {torch.float64}
    assert not objective.teacher.training
    assert objective.requires_grad_(True) is objective
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    assert torch.isfinite(objective(x.float(), y).loss)
    other = copy.deepcopy(objective)
    other(x.float(), y).loss.backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in other.student.parameters())


def test_the_saved_student_has_no_trace_of_the_teaching(tmp_path):
    student, x, y = build("wrn-10-1"), torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    objective = Distillation(student, build("wrn-16-2"), [Features(Hint()), LabelCrossEntropy()], example_inputs=x)
    assert sum(p.numel() for p in objective.parameters()) > sum(p.numel() for p in student.parameters())
    objective(x, y).loss.backward()
    morph.save_model(student, tmp_path / "student.pt")
    found = morph.open_model(tmp_path / "student.pt").model
    assert type(found) is type(student)
    assert list(found.state_dict()) == list(build("wrn-10-1").state_dict())


def test_several_sizes_of_images():
    student, teacher, x, y = setting()
    objective = Distillation(student, teacher, [Features(Hint()), Features(AttentionTransfer())], example_inputs=x)
    for size in (4, 8, 12):
        assert torch.isfinite(objective(torch.randn(7, 3, size, size, dtype=torch.float64), y).loss)


def test_pairs_say_what_their_bridges_do():
    x = torch.zeros(1, 3, 32, 32)
    terms = [Features(Hint()), Features(AttentionTransfer())]
    objective = Distillation(build("wrn-10-1"), build("wrn-16-2"), terms, example_inputs=x)
    assert "1x1 convolution 16 -> 32" in str(objective.pairs["hint"])
    assert "convolution" not in str(objective.pairs["attention_transfer"])
    assert not list(objective.adapters["attention_transfer"].parameters())
    again = Distillation(
        build("wrn-10-1"),
        build("wrn-16-2"),
        [Features(AttentionTransfer(), objective.pairs["hint"])],
    )
    assert str(again.pairs["attention_transfer"]) == str(objective.pairs["attention_transfer"])


def test_auxiliary_heads_learn_from_the_labels():
    student, teacher = build("darts-10"), build("wrn-10-1")
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 3])
    objective = Distillation(student, teacher, [SoftLabels(), Features(AttentionTransfer())], example_inputs=x).train()
    step = objective(x, y)
    assert set(step.parts) == {"soft_labels", "attention_transfer", "auxiliary"}
    expected = step.parts["soft_labels"] + step.parts["attention_transfer"] + 0.4 * step.parts["auxiliary"]
    torch.testing.assert_close(step.loss.detach(), expected)
    step.loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_lower_precision():
    student, teacher, x, y = (item.float() if not isinstance(item, tuple) else item for item in setting())
    terms = [SoftLabels(), Features(AttentionTransfer()), Features(Hint(), [("b", "b")])]
    objective = Distillation(student, teacher, terms, example_inputs=x)
    with torch.autocast("cpu", torch.bfloat16):
        step = objective(x, y.long())
    assert step.loss.dtype == torch.float32
    step.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


class Voting(nn.Module):
    """Channels of classes, and votes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.score = nn.Linear(12, 5 * 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.score(x.flatten(1))).unflatten(1, (5, 4)).sum(2)


def test_channels_from_the_teacher_and_from_a_cache():
    student, teacher, x = Voting(0), Voting(1), torch.randn(6, 3, 2, 2)
    y = torch.randint(5, (6,))
    objective = Distillation(student, teacher, [Channels("score", "score", 0.6)], example_inputs=x)
    bits = (torch.sigmoid(teacher.score(x.flatten(1))) >= 0.6).float()
    assert 0 < bits.mean() < 1
    expected = F.binary_cross_entropy_with_logits(student.score(x.flatten(1)), bits)
    step = objective(x, y)
    assert list(step.parts) == ["multi_channel"]
    torch.testing.assert_close(step.loss, expected)
    calls = calls_of(objective.teacher)
    torch.testing.assert_close(objective(x, (y, bits.to(torch.uint8))).loss, expected)
    assert not calls
    without = Distillation(student, teacher, [Channels("score")])
    torch.testing.assert_close(without(x, (y, bits.bool())).loss, expected)
    with pytest.raises(TeachingError, match="no bits to learn"):
        without(x, y)
    with pytest.raises(TeachingError, match="a head of as many classes"):
        without(x, (y, bits[:, :8].bool()))


def test_channels_find_the_label_heads():
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 3, 9])
    teacher = morph.put_label_head(build("wrn-10-1"), x).model
    student = morph.put_voting_head(build("vgg-student"), x).model
    objective = Distillation(student, teacher, [Channels()], example_inputs=x)
    with torch.no_grad():
        expected = Distillation(student, teacher, [Channels(score_path(student), score_path(teacher))])(x, y)
        assert torch.equal(objective(x, y).loss, expected.loss)
    bits = torch.randint(2, (3, 160), dtype=torch.uint8)
    assert Distillation(student, build("wrn-10-1"), [Channels()])(x, (y, bits)).loss > 0
    with pytest.raises(HeadError, match="put_voting_head"):
        Distillation(build("wrn-10-1"), teacher, [Channels()])


def test_hints_teach_the_guided_part_alone():
    student, teacher, x, y = setting()
    hints = Hints(student, teacher, [Features(Hint(), [("a", "a")])], example_inputs=x).train()
    assert hints.guided == {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"}
    names = [name for name, _ in hints.named_parameters()]
    assert names == [f"student.{n}" for n, _ in student.named_parameters() if n in hints.guided] + [
        "adapters.hint.0.adapter.weight",
        "adapters.hint.0.adapter.bias",
    ]
    assert len(list(hints.parameters())) == 6
    assert "student.head.weight" in hints.state_dict()
    before = copy.deepcopy(student.state_dict())
    optimizer = torch.optim.SGD(hints.parameters(), 0.1, weight_decay=0.1)
    losses = []
    for _ in range(20):
        step = hints(x, y)
        optimizer.zero_grad()
        step.loss.backward()
        optimizer.step()
        losses.append(step.loss.item())
    assert step.logits is None
    assert losses[-1] < losses[0]
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("b", "head")) for name in moved)
    assert {"a.0.weight", "a.1.bias"} <= moved


def test_hints_with_several_processes_wait_for_no_other_parameters(tmp_path):
    student, teacher, x, y = setting()
    hints = Hints(student, teacher, [Features(Hint(), [("a", "a")])], example_inputs=x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(hints)
        for _ in range(3):
            wrapped(x, y).loss.backward()
    finally:
        dist.destroy_process_group()
    assert student.a[0].weight.grad is not None
    assert student.head.weight.grad is None


def test_hints_in_the_training_loop():
    student, teacher, x, y = setting()
    hints = Hints(student.float(), teacher.float(), [Features(Hint(), [("a", "a")], 2.0)], example_inputs=x.float())
    head = student.head.weight.detach().clone()
    fitted = morph.fit(hints, (x.float(), y), epochs=3, lr=0.1, batch_size=7)
    assert [set(row) & {"top1", "part_hint", "loss"} for row in fitted.history] == [{"part_hint", "loss"}] * 3
    assert all(row["loss"] == pytest.approx(2 * row["part_hint"]) for row in fitted.history)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    assert torch.equal(student.head.weight, head)


def test_hints_take_the_middle_pair():
    hints = Hints(build("wrn-10-1"), build("wrn-16-2"), example_inputs=torch.zeros(1, 3, 32, 32))
    assert [(pair.teacher, pair.student) for pair in hints.pairs["hint"]] == [("groups.1", "groups.1")]


@pytest.mark.parametrize(
    ("terms", "error", "text"),
    [
        ([], TeachingError, "no terms"),
        ([Outputs(SoftLabels(), -1)], TeachingError, "weight of -1 for soft_labels"),
        ([AttentionTransfer()], TeachingError, "wrap it in Features"),
        ([Features(SoftLabels())], TeachingError, "wrap it in Outputs"),
        ([Channels("head", threshold=1.0)], TeachingError, "threshold of 1.0"),
        ([Features(Hint(), [])], TeachingError, "no pairs"),
        ([Features(Hint(), [("c", "a")])], TapError, "no module or node 'c' in Small; nearest"),
        ([Features(Hint(), [("a", "head")])], TeachingError, "no bridge from a vector of 5 (student) to a map of 6"),
        ([Features(AttentionTransfer(), [("head", "head")])], TeachingError, "for attention maps"),
        ([Features(Hint(), [("a*", "a")])], TeachingError, "stands for several"),
    ],
)
def test_what_cannot_be_taught(terms, error, text):
    student, teacher, x, _ = setting()
    with pytest.raises(error) as found:
        Distillation(student, teacher, terms, example_inputs=x)
    assert text in str(found.value)
    assert "\n" not in str(found.value)


def test_teacher_and_student_that_do_not_fit():
    student, teacher, x, y = setting()
    other = Small(3, classes=7).double()
    with pytest.raises(TeachingError, match="the teacher has 5 classes, the student 7"):
        Distillation(other, teacher, [SoftLabels()], example_inputs=x)
    Distillation(other, teacher, [LabelCrossEntropy(), Features(AttentionTransfer())], example_inputs=x)
    with pytest.raises(TeachingError, match="of the same classes"):
        Distillation(other, teacher, [SoftLabels()])(x, y)
    with pytest.raises(TeachingError, match="give example_inputs"):
        Distillation(student, teacher, [Features(Hint())])
    with pytest.raises(TraceError, match="does not accept inputs of shape"):
        Distillation(student, nn.Linear(4, 5).double(), [SoftLabels()], example_inputs=x)
    with pytest.raises(TeachingError, match=r"the teacher gives outputs of \(7, 3, 8, 5\)"):
        Distillation(student, nn.Linear(8, 5).double(), [SoftLabels()], example_inputs=x)
    with pytest.raises(TeachingError, match="parameters are frozen"):
        Hints(student.requires_grad_(False), teacher, [Features(Hint(), [("a", "a")])], example_inputs=x)
    with pytest.raises(TeachingError, match="soft_labels is no loss on features"):
        Hints(student, teacher, [Outputs(SoftLabels())], example_inputs=x)
