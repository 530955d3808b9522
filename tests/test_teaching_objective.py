"""The simplest objective, and what every objective gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from morph.errors import TeachingError
from morph.teaching.objective import Labels, logits_and_heads
from morph.zoo import build


def cross_entropy(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    """A twin in NumPy."""
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    target = np.full_like(log_p, smoothing / logits.shape[1])
    target[np.arange(len(labels)), labels] += 1 - smoothing
    return float(-(target * log_p).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_against_numpy(smoothing):
    torch.manual_seed(0)
    student = nn.Linear(5, 7).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(7, (6,))
    step = Labels(student, label_smoothing=smoothing)(x, y)
    expected = cross_entropy(student(x).detach().numpy(), y.numpy(), smoothing)
    assert step.loss.item() == pytest.approx(expected, rel=1e-12)
    assert step.parts["labels"].item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(step.logits, student(x))
    assert step.loss.item() != pytest.approx(cross_entropy(-step.logits.detach().numpy(), y.numpy(), smoothing))


def test_auxiliary_heads_count_in_training_only():
    student = build("darts-10")
    objective = Labels(student).train()
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 4])
    state = copy.deepcopy(student.state_dict())
    step = objective(x, y)
    step.loss.backward()
    student.load_state_dict(state)
    logits, head = student(x)
    expected = F.cross_entropy(logits, y) + 0.4 * F.cross_entropy(head, y)
    torch.testing.assert_close(step.loss, expected)
    assert all(p.grad is not None for p in student.auxiliary.parameters())
    assert set(objective.eval()(x, y).parts) == {"labels"}
    assert [name.removeprefix("student.") for name in objective.state_dict()] == list(student.state_dict())


def test_bad_numbers_and_outputs_are_refused():
    with pytest.raises(TeachingError, match=r"label smoothing of 1\.0"):
        Labels(nn.Identity(), label_smoothing=1.0)
    with pytest.raises(TeachingError, match="weight of nan"):
        Labels(nn.Identity(), auxiliary_weight=float("nan"))
    with pytest.raises(TeachingError, match="gives dict"):
        logits_and_heads({"scores": torch.zeros(1, 2)})
    assert logits_and_heads({"logits": torch.ones(1, 2)})[0].sum() == 2
