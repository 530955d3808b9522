"""Helpers for the tests of `morph.files`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from morph.files import open_model, save_model


def randomised(model, seed=0):
    """Give every floating tensor of ``model`` other values, positive where they are variances."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def outputs(model, x, training):
    """Outputs with the same random numbers each time, from a copy, so that no statistics move."""
    torch.manual_seed(5)
    with torch.no_grad():
        return copy.deepcopy(model).train(training)(x)


def same(a, b):
    """Whether two outputs have the same type and the same bits."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))


def assert_same_model(model, other, *, classes=True):
    """Same tensors, names, ties, flags and classes."""
    assert list(model.state_dict()) == list(other.state_dict())
    assert all(same(t, other.state_dict()[name]) for name, t in model.state_dict().items())
    for kind in ("named_parameters", "named_buffers", "named_modules"):
        a, b = (list(getattr(m, kind)(remove_duplicate=False)) for m in (model, other))
        if kind != "named_buffers" or classes:
            assert [name for name, _ in a] == [name for name, _ in b]
        ties = [[[id(v) for _, v in items].index(id(v)) for _, v in items] for items in (a, b)]
        if kind != "named_buffers" or classes:
            assert ties[0] == ties[1]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]
    assert [m.training for m in model.modules()] == [m.training for m in other.modules()]
    if classes:
        assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]


def round_trip(model, folder, **options):
    """Save, check that the model did not change, and open again."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
    path = folder / "model.morph"
    save_model(model, path, **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert state == [{k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()]
    opened = open_model(path)
    assert opened.kind == "morph file"
    return opened.model
