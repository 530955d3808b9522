"""Students by hand meet their budget, and nearly use it up."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import morph
from morph.baselines import baseline, for_small_images
from morph.errors import TargetError

X = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("family", ["vgg", "googlenet", "resnet", "shufflenet", "mobilenet"])
def test_a_family_within_a_budget(family):
    state = torch.get_rng_state()
    target = {"target_macs": 90e6} if family != "resnet" else {"target_params": 0.8e6}
    model = baseline(family, num_classes=7, **target)
    assert torch.equal(torch.get_rng_state(), state)
    counts = morph.count(model, X[:1])
    size, most = (counts.macs, 90e6) if family != "resnet" else (counts.params, 0.8e6)
    assert 0.93 * most < size <= most
    logits = model(X)
    assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([1, 6])).backward()
    assert family == "shufflenet" or type(model) is type(for_small_images(family))


def test_refusals():
    with pytest.raises(TargetError, match="no family 'lenet'"):
        baseline("lenet", target_macs=1e6)
    with pytest.raises(TargetError, match="target"):
        baseline("mobilenet")
