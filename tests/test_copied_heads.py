"""Whole heads of packed attention are copied exactly, in any number, and the copies can be taken out again."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

import morph
from morph.attention import FreeMultiheadAttention
from morph.copies import Widener, check_growth
from morph.plan import Resize
from morph.removal import Remover

HEADS, SIZE, WIDTH = 3, 5, 15


class Attending(nn.Module):
    """Attention between two linear layers, on one or two sequences, with what its weights look at."""

    def __init__(self, *, crossed=False, weights=False, bias=True, first=False):
        super().__init__()
        self.inp, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 7)
        widths = {"kdim": 11, "vdim": 9} if crossed else {}
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=first, bias=bias, **widths)
        self.keys, self.values = nn.Linear(5, 11), nn.Linear(5, 9)
        self.crossed, self.weights = crossed, weights
        for p in self.parameters():
            nn.init.normal_(p)

    def forward(self, x, y):
        x = self.inp(x)
        key, value = (self.keys(y), self.values(y)) if self.crossed else (x, x)
        mixed, weights = self.attn(x, key, value, need_weights=self.weights)
        out = self.out(x + mixed)
        return (out, weights) if self.weights else out


CASES = [
    {},
    {"first": True},
    {"bias": False},
    {"crossed": True},
    {"crossed": True, "first": True, "bias": False},
]
INPUTS = (torch.randn(2, 5, 5), torch.randn(2, 5, 5))


def heads_of(analysis):
    return next(name for name, c in analysis.couplings.items() if c.units == HEADS and c.blocks == 1)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("copies", [{1: 2}, {0: 2, 2: 4}, {0: 2, 1: 2, 2: 2}], ids=str)
def test_heads_are_copied_and_taken_out_again(options, copies):
    torch.manual_seed(1)
    model = Attending(**options)
    analysis = morph.analyse(model, INPUTS)
    name = heads_of(analysis)
    widened = Widener(model, INPUTS, analysis).widen({name: copies})
    assert widened.left == ()
    assert widened.form == "class"
    number = HEADS + sum(copies.values()) - len(copies)
    assert isinstance(widened.model.attn, FreeMultiheadAttention)
    assert (widened.model.attn.num_heads, widened.model.attn.head_dim) == (number, SIZE)
    (check,) = check_growth(widened, model, INPUTS)
    assert check.passed
    assert check.relative < 1e-12
    wrong = next(e for e in widened.plan.edits if isinstance(e, Resize) and e.tensor == "attn.out_proj.weight")
    unscaled = morph.cut.apply_plan(
        model, morph.plan.Plan(tuple(_plain(e) if e is wrong else e for e in widened.plan.edits))
    )
    assert not torch.allclose(_first(unscaled(*INPUTS)), _first(model(*INPUTS)), rtol=1e-3)

    again = morph.analyse(widened.model, INPUTS)
    joined = next(n for n, c in again.couplings.items() if c.units == number and c.blocks == 1)
    kept = _first_of_each(HEADS, copies)
    gone = np.setdiff1d(np.arange(number), kept)
    back = Remover(widened.model, INPUTS, again).remove({joined: gone}).model
    rows = back.attn.q_proj_weight if options.get("crossed") else back.attn.in_proj_weight
    before = model.attn.q_proj_weight if options.get("crossed") else model.attn.in_proj_weight
    assert torch.equal(rows, before)
    assert back.attn.num_heads == HEADS


def _plain(edit):
    return Resize(edit.tensor, edit.axis, edit.size, edit.index, ())


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _first_of_each(heads, copies):
    """Where the first of each head's copies lies."""
    starts, place = [], 0
    for head in range(heads):
        starts.append(place)
        place += copies.get(head, 1)
    return np.array(starts)


def test_weights_averaged_over_heads_are_a_reason_to_leave_heads_that_differ_in_number():
    """A mean over heads moves when some are there twice, and only then."""
    model = Attending(weights=True)
    analysis = morph.analyse(model, INPUTS)
    name = heads_of(analysis)
    widener = Widener(model, INPUTS, analysis)
    assert "only whole multiples" in widener.widen({name: {0: 2}}).left[0].reason
    every = widener.widen({name: dict.fromkeys(range(HEADS), 2)})
    assert all(check.passed for check in check_growth(every, model, INPUTS))


def test_a_vision_transformer_grows_its_heads_and_learns():
    torch.manual_seed(2)
    model = VisionTransformer(16, 8, 2, 3, 12, 24, num_classes=5)  # its head is zero, as at birth
    inputs = torch.randn(2, 3, 16, 16)
    result = morph.widen(model, inputs, ratio=2)
    assert [check.passed for check in result.record.checks] == [True, True]
    wide = result.model.encoder.layers[0].self_attention
    assert (wide.num_heads, wide.embed_dim) == (6, 24)
    optimizer = torch.optim.SGD(result.model.parameters(), 0.1)
    for _ in range(2):  # the first step moves the head alone
        optimizer.zero_grad()
        nn.functional.cross_entropy(result.model(inputs), torch.tensor([1, 2])).backward()
        optimizer.step()
    assert wide.in_proj_weight.grad.abs().sum() > 0
