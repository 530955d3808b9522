"""Batch norms counted through the analysis, against fvcore on the network that was really cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import randomise

import morph
from morph.cut import apply_plan
from morph.norm_counts import batch_norm_operations
from morph.zoo import build

X = torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("name", ["densenet-bc-16-5", "wrn-16-1"])
def test_it_counts_what_comes_out(name):
    model = randomise(build(name)).eval()
    analysis = morph.analyse(model, X)
    draw = np.random.default_rng(0)
    choice = {n: [int(i) for i in draw.permutation(c.units)[: c.units // 3]] for n, c in analysis.couplings.items()}
    for cut in ({}, choice):
        times = analysis.times(cut)
        small = apply_plan(model, analysis.cut(cut))
        assert batch_norm_operations(analysis, times) == 2 * morph.count(small, X[:1]).elementwise["batch_norm"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("100-12", 296.48), ("50-12", 90.98), ("100-7", 103.09), ("75-9", 96.38)],
)
def test_the_sizes_that_the_paper_names(name, millions):
    """Multiply-adds and two for each element of a batch norm: the paper's 296M, and its students of about 90M."""
    model = build(f"densenet-bc-{name}")
    counts = morph.count(model, X[:1])
    assert round((counts.macs + counts.elementwise["batch_norm"]) / 1e6, 2) == millions
    analysis = morph.analyse(model, X)
    assert batch_norm_operations(analysis, analysis.times({})) == 2 * counts.elementwise["batch_norm"]
