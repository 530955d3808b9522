"""Transformers of Hugging Face grow as they are: wider, deeper, by gain; what cannot be says what to do instead."""

from __future__ import annotations

import copy

import pytest
import torch
from models import Snapshot, randomise
from torch import nn

import morph
from morph.errors import NothingToGrowError, SymbolicTraceError
from morph.mixing import grow_by_gain
from morph.passes.insertion import numbers_of
from morph.surgery import replay

transformers = pytest.importorskip("transformers")
from language_nets import bert, distilbert, gpt2, llama, sentences, vit  # noqa: E402  # needs transformers

X, Y = sentences(6)


def outputs(model: nn.Module, inputs=X) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(**inputs).logits


def far(one: nn.Module, other: nn.Module) -> float:
    a, b = outputs(one), outputs(other)
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("make", [bert, distilbert, gpt2, llama])
def test_copies_keep_the_function(make):
    model = randomise(make(), 3)
    shot = Snapshot(model)
    wide = morph.widen(model, transformers.BatchEncoding(dict(X)), ratio=1.5)
    assert type(wide.model) is type(model)
    assert wide.record.after["params"] > 1.2 * wide.record.before["params"]
    assert far(model, wide.model) < (1e-6 if make is llama else 1e-12)
    assert shot.same()


@pytest.mark.parametrize("make", [bert, distilbert])
def test_growth_by_gain_copies_units_where_there_is_no_graph(make):
    model = randomise(make(), 3)
    before = morph.count(model, X).params
    grown = grow_by_gain(model, (X, Y), target_params=1.25 * before)
    assert {step["move"] for step in grown.record.details["steps"]} == {"widen"}
    assert 1.25 * before <= grown.record.after["params"] < 1.35 * before
    assert far(model, grown.model) < 1e-12
    with pytest.raises(SymbolicTraceError, match="wrapped by a decorator"):  # these cells were asked for
        grow_by_gain(model, (X, Y), target_params=1.25 * before, at=["*layer*"])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_more_blocks_are_counted_everywhere(make):
    """By the configuration, which builds the model and its cache, and by the blocks, which know their place in it."""
    model = randomise(make(3), 3)
    shot, settings = Snapshot(model), copy.deepcopy(model.config.to_dict())
    deep = morph.deepen(model, X, blocks=2)
    assert deep.record.checks[0].passed
    assert far(model, deep.model) == 0
    assert shot.same()
    assert model.config.to_dict() == settings
    assert deep.model.config.num_hidden_layers == 5
    blocks = [next(m for p, m in b.named_modules() if hasattr(m, "layer_idx")) for b in chain(deep.model)]
    assert [b.layer_idx for b in blocks] == [0, 1, 2, 3, 4]
    rebuilt = type(model)(deep.model.config)
    rebuilt.load_state_dict(deep.model.state_dict())
    for buffer, drawn in zip(rebuilt.buffers(), deep.model.buffers(), strict=True):  # frequencies of rotation
        buffer.copy_(drawn)
    assert torch.equal(outputs(rebuilt), outputs(deep.model))
    for net in (model, deep.model):  # word by word, with the cache of keys and values
        net.config.use_cache = True
    torch.testing.assert_close(told(model), told(deep.model), rtol=1e-4, atol=1e-4)
    assert (told(model) - told(deep.model)).abs().max() == 0
    assert replay(model, deep.record.plan, X).model.config.num_hidden_layers == 5


def chain(model: nn.Module) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList))


def told(model: nn.Module) -> torch.Tensor:
    model.eval()
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(X["input_ids"][:, :4].clamp(min=3), pad_token_id=0, eos_token_id=None, **options)
    return torch.stack(found.logits)


def test_numbers_of_a_row():
    blocks = [nn.Sequential(nn.Linear(3, 4), nn.Dropout()) for _ in range(3)]
    assert numbers_of(blocks) == {}
    for place, block in enumerate(blocks):
        block[1].place, block[0].same, block.often = place + 7, 2, place * 2
    assert numbers_of(blocks) == {("1", "place"): 7}
    assert numbers_of(blocks[:1]) == {}


def test_images_by_name_make_a_deeper_vision_transformer():
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = randomise(vit(), 1)
    deep = morph.deepen(model, images, blocks=1)
    a, b = (outputs(net, {"pixel_values": images["pixel_values"].double()}) for net in (model, deep.model))
    assert torch.equal(a, b)
    assert deep.model.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: morph.expand(bert(), (X, Y), target_params=1e6), "no grouped convolution to merge; widening is anoth"),
        (lambda: morph.deepen(bert(), X, blocks=1), "has no plain residual path"),
        (lambda: morph.deepen(distilbert(), X, blocks=1), "has no plain residual path"),
    ],
)
def test_what_cannot_grow_so_says_why(call, message):
    with pytest.raises(NothingToGrowError, match=message):
        call()
