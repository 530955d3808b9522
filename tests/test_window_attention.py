"""Torchvision's windows that have gone free: the same bits, cut in every way, saved, replayed, traced and trained."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from models import Snapshot
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

import morph
from morph import window_attention
from morph.cut import apply_plan
from morph.errors import CheckFailedError, EditError, PlanMismatchError
from morph.files import open_model, save_model
from morph.plan import FreeAttention, Plan
from morph.window_attention import FREE, FreeShiftedWindowAttention, FreeShiftedWindowAttentionV2

V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
FORMS = {"swin": {}, "swin-v2": V2}


def make(form: str, heads: tuple[int, int] = (4, 8)) -> SwinTransformer:
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depths": [2, 1], "num_heads": list(heads), "window_size": [4, 4], "num_classes": 5}
    model = SwinTransformer([4, 4], **options, **FORMS[form])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def images(side: int = 40) -> torch.Tensor:
    return torch.randn(2, 3, side, side)  # 40: windows are padded and shifted


@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "shift"), [((7, 9), [2, 1]), ((4, 4), [2, 2]), ((8, 8), [0, 0])])
def test_on_the_weights_of_torchvision_it_gives_the_same_bits(kind, bias, size, shift):
    module = kind(12, [4, 4], shift, 3, qkv_bias=bias, proj_bias=bias).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    free = FREE[kind].of(copy.deepcopy(module), 4)
    x = torch.randn(3, *size, 12)
    assert torch.equal(free(x), module(x))
    assert FREE[kind].of(free, 4) is free


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", ["whole", "inside", "both"])
def test_stream_and_heads_are_cut_in_the_class_of_the_user(form, heads):
    model, x = make(form), images()
    snapshot = Snapshot(model)
    result = morph.prune(model, x, ratio=0.4, heads=heads, ranking="local")
    assert snapshot.same()
    assert type(result.model) is SwinTransformer
    assert result.record.details["left"] == []
    assert result.record.checks[0].relative < 1e-12
    cut = result.model.features[1][0].attn
    assert type(cut) in FREE.values()
    assert cut.num_heads == (4 if heads == "inside" else 3)
    assert cut.head_dim == (6 if heads == "whole" else 4)
    assert cut.proj.weight.shape[0] < 24
    result.model.train()(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in cut.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_it_is_saved_replayed_copied_exported_and_traced(form, tmp_path):
    model, x = make(form), images()
    result = morph.prune(model, x, ratio=0.4, ranking="local")
    expected = result.model(x)
    plan = Plan.from_json(json.loads(json.dumps(result.record.plan.to_json())))
    assert torch.equal(apply_plan(model, plan)(x), expected)
    save_model(result.model, tmp_path / "cut.pt")
    assert torch.equal(open_model(tmp_path / "cut.pt").model.eval()(x), expected)
    assert torch.equal(copy.deepcopy(result.model)(x), expected)
    torch.testing.assert_close(torch.export.export(result.model, (x,)).module()(x), expected)
    graph = torch.fx.symbolic_trace(result.model)
    assert torch.equal(graph(x), expected)
    again = morph.prune(result.model, x, ratio=0.3, heads="inside", ranking="local")
    assert again.record.details["left"] == []
    assert again.model.features[1][0].attn.scale_dim == 6


def test_a_wrong_divisor_is_not_taken(monkeypatch):
    model, x = make("swin"), images()
    right = window_attention._scores
    monkeypatch.setattr(window_attention, "_scores", lambda q, k, size, scale: right(q, k, 2 * size, scale))
    left = morph.prune(model, x, ratio=0.4, ranking="local").record.details["left"]
    assert "uses the constants" in str(left)


def test_keys_in_place_of_queries_are_noticed(monkeypatch):
    model, x = make("swin"), images()
    right = window_attention._scores
    monkeypatch.setattr(window_attention, "_scores", lambda q, k, size, scale: right(k, q, size, scale))
    with pytest.raises(CheckFailedError):
        morph.prune(model, x, ratio=0.4, ranking="local")


def test_what_does_not_fit_is_refused_in_words():
    model = make("swin")
    attention = model.features[1][0].attn
    with pytest.raises(EditError, match=re.escape("5 heads of 6 and 6 positions need")):
        FreeShiftedWindowAttention.of(copy.deepcopy(attention), 6).resize(5, 6, 6)
    with pytest.raises(EditError, match="as many for values"):
        FreeShiftedWindowAttention.of(copy.deepcopy(attention), 6).resize(4, 6, 3)
    with pytest.raises(EditError, match="is not torchvision's own"):
        FreeShiftedWindowAttentionV2.of(nn.Linear(2, 2), 6)
    plan = Plan((FreeAttention("features.1.0.attn", 3, 6, 2, (6, 6)),))
    with pytest.raises(PlanMismatchError, match="has 4 heads of 6, the plan 3 heads of 6"):
        apply_plan(model, plan)


def test_a_class_of_the_user_stays_whole():
    class Own(ShiftedWindowAttention):
        pass

    model, x = make("swin"), images()
    for block in model.modules():
        if hasattr(block, "attn"):
            block.attn.__class__ = Own
    result = morph.prune(model, x, ratio=0.4, ranking="local")
    assert result.record.details["left"]
    assert type(result.model.features[1][0].attn) is Own


def test_the_first_stage_of_swin_is_cut_to_any_number_of_multiply_adds():
    model, x = make("swin", (3, 6)), images(32)
    whole = morph.count(model, x[:1]).macs
    result = morph.prune(model, x, target_macs=0.3 * whole, normalise="macs")
    assert result.record.details["left"] == []
    assert morph.count(result.model, x[:1]).macs <= 0.3 * whole
