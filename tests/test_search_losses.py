"""Losses against NumPy, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from morph.errors import TargetError
from morph.search_losses import DistillationLoss, LabelLoss, kl_divergence, soft_cross_entropy

DRAW = np.random.default_rng(0)
STUDENT, TEACHER = DRAW.normal(0, 3, (11, 7)), DRAW.normal(0, 3, (11, 7))
LABELS = DRAW.integers(0, 7, 11)
S, T, Y = torch.from_numpy(STUDENT), torch.from_numpy(TEACHER), torch.from_numpy(LABELS)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def kl(tau, student=STUDENT, teacher=TEACHER):
    """Sample by sample, class by class."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        p, q = softmax(t / tau), softmax(s / tau)
        values.append(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))
    return np.array(values)


@pytest.mark.parametrize("tau", [1.0, 4.0, 7.5])
def test_kl(tau):
    assert np.allclose(kl_divergence(S, T, tau).numpy(), kl(tau), atol=1e-12)
    assert not np.allclose(kl_divergence(T, S, tau).numpy(), kl(tau), atol=1e-3)
    assert torch.allclose(kl_divergence(S + 5, S, tau), torch.zeros(11, dtype=torch.float64), atol=1e-12)
    assert (kl_divergence(S, T, tau) >= 0).all()


def test_it_survives_logits_far_apart():
    far = torch.tensor([[1000.0, -1000.0]])
    assert torch.isfinite(kl_divergence(far, -far, 4.0)).all()


def test_distillation_and_its_switches():
    ce = np.array([-np.log(softmax(s)[y]) for s, y in zip(STUDENT, LABELS, strict=True)])
    assert np.allclose(DistillationLoss()(S, T, Y).numpy(), kl(4.0))
    assert np.allclose(DistillationLoss(tau=2, tau_squared=True)(S, T, Y).numpy(), 4 * kl(2.0))
    assert np.allclose(DistillationLoss(kl0=0.4)(S, T, Y).numpy(), np.abs(kl(4.0) - 0.4))
    assert np.allclose(DistillationLoss(label_share=0.1)(S, T, Y).numpy(), kl(4.0) + 0.1 * ce)
    assert np.allclose(LabelLoss()(S, None, Y).numpy(), ce)
    assert (kl(4.0) < 0.4).any()  # so that the absolute value has something to do
    assert (kl(4.0) > 0.4).any()


def test_the_absolute_value_is_taken_sample_by_sample():
    loss = DistillationLoss(kl0=float(kl(4.0).mean()))(S, T, Y)
    assert float(loss.mean()) > 1e-3


def test_cross_entropy_to_the_teacher_has_the_gradient_of_the_divergence_at_one():
    one, other = S.clone().requires_grad_(True), S.clone().requires_grad_(True)
    soft_cross_entropy(one, T).sum().backward()
    kl_divergence(other, T, 1.0).sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-12)
    assert torch.allclose(soft_cross_entropy(S, F.one_hot(Y, 7) * 1e4), LabelLoss()(S, None, Y), atol=1e-9)


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": float("nan")}, {"kl0": -1.0}, {"label_share": -0.1}])
def test_refusals(wrong):
    with pytest.raises(TargetError, match="give"):
        DistillationLoss(**wrong)
