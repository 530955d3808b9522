"""Losses against numbers worked out by hand and against twins in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from morph.errors import TeachingError
from morph.teaching.feature_losses import AttentionTransfer, Hint, attention_map
from morph.teaching.losses import LabelCrossEntropy, LogitRegression, MultiChannelBCE, SoftLabels, WeightedSum

Array = np.ndarray


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def batch(seed: int, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(5, classes, dtype=torch.float64, generator=generator) for _ in range(2))
    return student, teacher, torch.randint(classes, (5,), generator=generator)


def soft_labels(s: Array, t: Array, y: Array, temperature: float, alpha: float, squared: bool, share: float, kl: bool):
    """Sample by sample."""
    total = 0.0
    for si, ti, yi in zip(s, t, y, strict=True):
        p, q = softmax(ti / temperature), softmax(si / temperature)
        soft = -sum(a * math.log(b) for a, b in zip(p, q, strict=True))
        if kl:
            soft += sum(a * math.log(a) for a in p)
        total += alpha * soft * (temperature**2 if squared else 1) - share * math.log(softmax(si)[yi])
    return total / len(s)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("divergence", ["kl", "cross-entropy"])
@pytest.mark.parametrize("label_weight", [None, 0.1, 0.0])
def test_soft_labels_in_every_form(seed, squared, divergence, label_weight):
    student, teacher, labels = batch(seed)
    rng = np.random.default_rng(seed)
    temperature, alpha = rng.uniform(0.5, 20), rng.uniform(0, 1)
    loss = SoftLabels(temperature, alpha, t_squared=squared, label_weight=label_weight, divergence=divergence)
    share = 1 - alpha if label_weight is None else label_weight
    arrays = student.numpy(), teacher.numpy(), labels.numpy()
    expected = soft_labels(*arrays, temperature, alpha, squared, share, divergence == "kl")
    assert loss(student, teacher, labels).item() == pytest.approx(expected, rel=1e-12)
    wrong = soft_labels(*arrays, temperature, alpha, not squared, share, divergence == "kl")
    assert loss(student, teacher, labels).item() != pytest.approx(wrong, rel=1e-3)


def test_soft_labels_by_hand():
    """T 2 and logits (2 ln 3, 0) soften to (3/4, 1/4); the student knows nothing."""
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    labels = torch.tensor([1])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert SoftLabels(2, 1.0)(student, teacher, labels).item() == pytest.approx(kl)
    thesis = SoftLabels(2, 0.25, t_squared=True, divergence="cross-entropy")
    assert thesis(student, teacher, labels).item() == pytest.approx(0.75 * math.log(2) + 0.25 * 4 * math.log(2))
    paper = SoftLabels(2, 1.0, label_weight=0.1)
    assert paper(student, teacher, labels).item() == pytest.approx(kl + 0.1 * math.log(2))


def test_both_divergences_have_the_same_gradient():
    student, teacher, labels = batch(9)
    grads = []
    for divergence in ("kl", "cross-entropy"):
        leaf = student.clone().requires_grad_()
        SoftLabels(3, 0.7, divergence=divergence)(leaf, teacher, labels).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0


def test_logits_labels_and_sums():
    student, teacher, labels = batch(1)
    s, t, y = student.numpy(), teacher.numpy(), labels.numpy()
    squares = ((s - t) ** 2).sum() / s.size
    entropy = -np.log(softmax(s)[np.arange(5), y]).mean()
    assert LogitRegression()(student, teacher, None).item() == pytest.approx(squares, rel=1e-12)
    assert LabelCrossEntropy()(student, None, labels).item() == pytest.approx(entropy, rel=1e-12)
    both = WeightedSum({"logits": (0.3, LogitRegression()), "labels": (2.0, LabelCrossEntropy())})
    assert both(student, teacher, labels).item() == pytest.approx(0.3 * squares + 2 * entropy, rel=1e-12)
    assert both.needs_teacher
    assert both.needs_labels
    assert not WeightedSum({"labels": (1.0, LabelCrossEntropy())}).needs_teacher


@pytest.mark.parametrize("kind", [torch.uint8, torch.bool, torch.float64])
def test_multi_channel(kind):
    student, teacher, _ = batch(2, classes=30)
    bits = (torch.sigmoid(teacher) >= 0.5).to(kind)
    p, b = 1 / (1 + np.exp(-student.numpy())), bits.numpy().astype(float)
    expected = -(b * np.log(p) + (1 - b) * np.log(1 - p)).mean()
    assert MultiChannelBCE()(student, bits, None).item() == pytest.approx(expected, rel=1e-10)
    assert MultiChannelBCE()(torch.zeros(1, 4), torch.ones(1, 4), None).item() == pytest.approx(math.log(2))


def attention(a: Array) -> Array:
    """One sample ``[C, H, W]``."""
    f = np.zeros(a.shape[1:])
    for channel in a:
        f += channel**2 / len(a)
    return f / math.sqrt((f**2).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", ["norm", "mean-square"])
def test_attention_transfer(seed, form):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(4, 5, 3, 6)), rng.normal(size=(4, 2, 3, 6))
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        squares = (attention(t) - attention(s)) ** 2
        total += math.sqrt(squares.sum()) / 4 if form == "norm" else 1000 * squares.mean() / 4
    found = AttentionTransfer(form)(torch.from_numpy(student), torch.from_numpy(teacher))
    assert found.item() == pytest.approx(total, rel=1e-12)
    halved = AttentionTransfer(form, beta=AttentionTransfer(form).beta / 2)
    assert halved(torch.from_numpy(student), torch.from_numpy(teacher)).item() == pytest.approx(total / 2, rel=1e-12)


def test_attention_by_hand_and_at_its_edges():
    one, other = torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]]]), torch.tensor([[[[0.0, 5.0]]]])
    assert torch.equal(attention_map(one), torch.tensor([[[1.0, 0.0]]]))
    assert AttentionTransfer("norm")(one, other).item() == pytest.approx(math.sqrt(2))
    assert AttentionTransfer("mean-square", beta=10)(one, other).item() == pytest.approx(10.0)
    same = torch.randn(2, 3, 4, 4, requires_grad=True)
    AttentionTransfer("norm")(same, same.detach()).backward()
    assert torch.equal(same.grad, torch.zeros_like(same))
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    AttentionTransfer()(dead, same.detach()).backward()
    assert torch.isfinite(dead.grad).all()


@pytest.mark.parametrize("seed", range(3))
def test_hints(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, 4, 3, 5, 2))
    both = torch.from_numpy(student), torch.from_numpy(teacher)
    by_sample = [0.5 * ((t - s) ** 2).sum() for s, t in zip(student, teacher, strict=True)]
    assert Hint("sum")(*both).item() == pytest.approx(np.mean(by_sample), rel=1e-12)
    assert Hint()(*both).item() == pytest.approx(np.mean(by_sample) / 30, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SoftLabels(0), "temperature of 0"),
        (lambda: SoftLabels(float("nan")), "temperature of nan"),
        (lambda: SoftLabels(4, 1.5), "alpha of 1.5"),
        (lambda: SoftLabels(4, label_weight=-1), "weight of -1.0 for the labels"),
        (lambda: SoftLabels(divergence="js"), "'js'; expected one of kl, cross-entropy"),
        (lambda: LabelCrossEntropy(-0.1), "label smoothing of -0.1"),
        (lambda: WeightedSum({}), "no losses"),
        (lambda: WeightedSum({"a": (math.inf, LogitRegression())}), "weight of inf for a"),
        (lambda: AttentionTransfer("l1"), "'l1' of attention transfer"),
        (lambda: AttentionTransfer(beta=-1), "weight of -1.0 for attention"),
        (lambda: Hint("max"), "reduction 'max'"),
        (lambda: SoftLabels()(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()), "of the same classes"),
        (lambda: LogitRegression()(torch.zeros(2, 3), None, None), "needs the teacher's logits"),
        (lambda: LabelCrossEntropy()(torch.zeros(2, 3), None, None), "needs labels"),
        (lambda: MultiChannelBCE()(torch.zeros(2, 6), torch.zeros(2, 8), None), "8"),
        (lambda: AttentionTransfer()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8)), "4x4 .student. and 8x8"),
        (lambda: AttentionTransfer()(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)), "tap gives"),
        (lambda: Hint()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)), "put an adapter"),
    ],
)
def test_what_cannot_be(make, text):
    with pytest.raises(TeachingError, match=text):
        make()
