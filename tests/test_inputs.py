"""Inputs in every form: read, cut, moved, and refused where samples could not be told apart."""

from __future__ import annotations

import inspect
from collections import OrderedDict, UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from input_nets import Two, pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader

from morph.batches import cycle_batches, round_length, shuffle_batches, take_batches, whole
from morph.errors import DataError
from morph.inputs import (
    arguments_of,
    by_position,
    images_in,
    logits_in,
    moved,
    pair_of,
    picked,
    plain,
    run_on,
    samples_in,
    tensors_of,
)
from morph.training.rounds import checked, parts, round_in_order, seeded_round, share

CPU = torch.device("cpu")
(LEFT, RIGHT), Y = pairs(13)


class Own(dict):
    """A mapping of a class that nobody knows."""


FORMS = {
    "tensor": LEFT,
    "tuple": (LEFT, RIGHT),
    "dict": {"left": LEFT, "right": RIGHT},
    "ordered": OrderedDict(right=RIGHT, left=LEFT),
    "user": UserDict(left=LEFT, right=RIGHT),
    "own": Own(left=LEFT, right=RIGHT),
    "nested": {"left": LEFT, "more": (RIGHT, {"deep": UserDict(left=LEFT)}, [RIGHT[:, 0], None]), "flag": True, "n": 3},
}


@pytest.mark.parametrize("form", FORMS)
def test_some_samples_of_any_form_against_numpy(form):
    inputs = plain(FORMS[form])
    assert samples_in(inputs) == 13
    draw = np.random.default_rng(0)
    for pick in (slice(2, 9, 3), torch.from_numpy(draw.permutation(13)[:5])):
        found, before = tensors_of(picked(inputs, pick)), tensors_of(inputs)
        wanted = [t.numpy()[pick if isinstance(pick, slice) else pick.numpy()] for t in before]
        assert all(np.array_equal(a.numpy(), b) for a, b in zip(found, wanted, strict=True))
        assert not np.array_equal(found[0].numpy(), before[0].numpy()[: len(found[0])])
    if form == "nested":
        assert picked(inputs, slice(0, 1))["flag"] is True
        assert picked(inputs, slice(0, 1))["n"] == 3
    assert all(a is b for a, b in zip(tensors_of(inputs), tensors_of(moved(inputs, CPU)), strict=True))
    away = tensors_of(moved(inputs, torch.device("meta")))
    assert [t.shape for t in away] == [t.shape for t in tensors_of(inputs)]
    assert all(t.is_meta for t in away)


def test_only_images_get_their_channels_innermost():
    x = {"pixels": torch.randn(2, 3, 4, 5), "ids": torch.arange(8).reshape(2, 4)}
    there = moved(x, CPU, channels_last=True)
    assert there["pixels"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(there["pixels"], x["pixels"])
    assert there["ids"] is x["ids"]


def test_a_model_is_called_alike_in_every_form():
    model = Two(6)
    factor = torch.rand(13, 1)
    wanted = model(LEFT, RIGHT, factor=factor)
    named = {"factor": factor, "right": RIGHT, "left": LEFT}
    for inputs in (named, UserDict(named), Own(named), OrderedDict(named)):
        assert torch.equal(run_on(model, inputs), wanted)
        assert all(a is b for a, b in zip(by_position(model, inputs), (LEFT, RIGHT, factor), strict=True))
    assert torch.equal(run_on(model, (LEFT, RIGHT)), model(LEFT, RIGHT))
    assert by_position(model, {"left": LEFT, "right": RIGHT})[2] == 1.0
    assert by_position(model, (LEFT, RIGHT)) == (LEFT, RIGHT)
    assert arguments_of([LEFT, RIGHT]) == (([LEFT, RIGHT],), {})  # a list outside a batch is one argument
    assert len(inspect.signature(model.forward).parameters) == 3
    with pytest.raises(TypeError, match="missing a required argument: 'right'"):
        by_position(model, {"left": LEFT})


def test_images_and_logits_are_found():
    image = torch.zeros(2, 3, 4, 4)
    assert images_in({"mask": torch.ones(2, 1, 4, 4, dtype=torch.bool), "pixels": image}) is image
    assert images_in({"ids": torch.zeros(2, 4, dtype=torch.long)}) is None
    logits = torch.zeros(2, 5)
    outputs = (logits, (logits, None), [logits], {"loss": None, "logits": logits}, UserDict(logits=logits))
    assert all(logits_in(output) is logits for output in (*outputs, SimpleNamespace(logits=logits)))
    assert all(logits_in(output) is None for output in (None, (), {"last": logits}, {"logits": 3}, [3], object()))


def test_pairs_in_every_form():
    for batch in (
        ((LEFT, RIGHT), Y),
        [[LEFT, RIGHT], Y],
        {"left": LEFT, "labels": Y, "right": RIGHT},
        UserDict(left=LEFT, right=RIGHT, labels=Y),
        (UserDict(left=LEFT, right=RIGHT), Y),
        (Own(left=LEFT, right=RIGHT), Y),
    ):
        x, y = pair_of(batch)
        assert type(x) in (tuple, dict)
        assert y is Y
        assert {id(t) for t in tensors_of(x)} == {id(LEFT), id(RIGHT)}
    both = checked([LEFT, [Y, RIGHT]])[1]
    assert type(both) is tuple
    assert both[1] is RIGHT


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"left": LEFT, "right": RIGHT}, r"a mapping of left, right without .labels.; give .mapping, labels."),
        ((LEFT, RIGHT, Y), r"got tuple of 3; several inputs are a tuple or a mapping in the place of the first"),
        ((LEFT, 3), r"a batch must be a pair of tensors \(inputs, targets\), got tuple"),
        (("text", Y), r"a batch must be a pair of tensors"),
        (({"left": LEFT, "right": RIGHT[:1]}, Y), r"13 targets whose input \['right'\] is of shape \[1, 7\]"),
        (((LEFT, RIGHT[:12]), Y), r"13 targets whose input \[1\] is of shape \[12, 7\]; every tensor has the samples"),
        (({"left": LEFT, "words": ["a"] * 13}, Y), r"input \['words'\]\[0\] of a batch is str, which cannot be cut"),
        (({"left": LEFT, "cache": object()}, Y), r"\['cache'\] of a batch is object, which cannot be cut"),
        (({"left": LEFT, "array": np.zeros(13)}, Y), r"\['array'\] of a batch is ndarray"),
        (({"flag": True}, Y), "0 inputs and 13 targets"),
        (((LEFT, RIGHT), (Y, Y[:3])), "13 inputs and 13, 3 targets"),
        (((LEFT, RIGHT), Y[0]), "13 inputs and 0 targets"),
        ((LEFT, Y[:4]), "13 inputs and 4 targets; there must be as many"),
        ((LEFT, ()), "whose targets are a tensor or a tuple of tensors, got nothing"),
        ((LEFT, (Y, "a")), "got Tensor, str"),
    ],
)
def test_what_cannot_be_cut_into_samples(batch, message):
    with pytest.raises(DataError, match=message):
        checked(batch)


@pytest.mark.parametrize("form", ["tuple", "dict", "user", "own", "nested"])
def test_data_in_memory_is_shuffled_as_one_tensor_is(form):
    one = list(zip(range(6), shuffle_batches(torch.arange(13), Y, 5, seed=3), strict=False))
    many = list(zip(range(6), cycle_batches((FORMS[form], Y), 5, 3), strict=False))
    for (_, (pick, y)), (_, (x, z)) in zip(one, many, strict=True):
        assert torch.equal(y, z)
        wanted = tensors_of(picked(plain(FORMS[form]), pick))
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(x), wanted, strict=True))
    assert round_length((FORMS[form], Y), 5) == 3
    assert [len(y) for _, y in round_in_order((FORMS[form], Y), 5)] == [5, 5, 3]
    assert torch.equal(torch.cat([tensors_of(x)[0] for x, _ in round_in_order((FORMS[form], Y), 5)]), LEFT)


def test_a_mapping_with_labels_in_memory_and_in_batches():
    named = {"left": LEFT, "right": RIGHT, "labels": Y}
    pair = take_batches(({"left": LEFT, "right": RIGHT}, Y), 3, 5, 1, CPU)
    for data in (named, UserDict(named)):
        found = take_batches(data, 3, 5, 1, CPU)
        assert all(torch.equal(a[0]["right"], b[0]["right"]) for a, b in zip(found, pair, strict=True))
        assert all(torch.equal(a[1], b[1]) for a, b in zip(found, pair, strict=True))
    two = [picked(named, slice(0, 6)), UserDict(picked(named, slice(6, 13)))]
    assert round_length(two, 99) == 2
    for found in (take_batches(two, 2, 99, 0, CPU), list(round_in_order(two, 99)), list(seeded_round(two, 99, 0))):
        assert torch.equal(torch.cat([y for _, y in found]), Y)
        assert [sorted(x) for x, _ in found] == [["left", "right"]] * 2
    with pytest.raises(DataError, match="without 'labels'"):
        next(cycle_batches({"left": LEFT}, 5, 0))


def test_two_batches_are_not_taken_for_one_pair():
    batches = ((LEFT[:4], Y[:4]), (LEFT[4:], Y[4:]))
    assert whole(batches) is None
    assert [len(y) for _, y in take_batches(batches, 2, 3, 0, CPU)] == [4, 9]
    assert whole((LEFT, (Y, RIGHT))) is not None
    assert [len(y[1]) for _, y in seeded_round((LEFT, (Y, RIGHT)), 6, 0)] == [6, 6, 1]


def test_a_loader_turns_a_tuple_into_a_list_and_this_back():
    samples = [((left, right), y) for left, right, y in zip(LEFT, RIGHT, Y, strict=True)]
    found = next(take for take in DataLoader(samples, batch_size=13))
    assert type(found[0]) is list
    x, y = checked(found)
    assert torch.equal(Two(4)(*x), Two(4)(LEFT, RIGHT))
    assert torch.equal(y, Y)


@pytest.mark.parametrize("form", ["tensor", "tuple", "nested"])
def test_parts_and_shares_are_the_whole(form):
    batch = checked((FORMS[form], (Y, RIGHT)))
    pieces = list(parts(batch, 4))
    assert sum(portion for _, portion in pieces) == pytest.approx(1)
    rejoined = [torch.cat(column) for column in zip(*(tensors_of(piece) for piece, _ in pieces), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(rejoined, tensors_of(batch), strict=True))
    shares = [share(batch, rank, 3) for rank in range(3)]
    assert [samples_in(mine[0]) for mine, _ in shares] == [5, 4, 4]
    assert sum(weight for _, weight in shares) == pytest.approx(3)
    for rank, (mine, _) in enumerate(shares):
        assert torch.equal(tensors_of(mine)[0], tensors_of(batch)[0][rank::3])
    one = picked(batch, slice(0, 1))
    assert share(one, 2, 3)[1] == 0
    assert samples_in(share(one, 2, 3)[0][0]) == 1


def test_a_batch_size_below_one():
    for made in (lambda: round_length((LEFT, Y), 0), lambda: next(shuffle_batches((LEFT, RIGHT), Y, 0, 0))):
        with pytest.raises(DataError, match="a batch of 0 samples; give a batch size of at least 1"):
            made()
    with pytest.raises(DataError, match="0 inputs and 0 targets"):
        next(shuffle_batches((LEFT[:0], RIGHT[:0]), Y[:0], 3, 0))


def test_a_model_with_one_input_is_called_as_before():
    layer = nn.Linear(5, 2)
    assert torch.equal(run_on(layer, LEFT), layer(LEFT))
    assert isinstance(plain(LEFT), Tensor)
