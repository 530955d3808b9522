"""Batches from any form of data, and the one target."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from models import images

from morph.batches import (
    Batches,
    choose_target,
    cycle_batches,
    describe_data,
    shuffle_batches,
    stream_batches,
    take_batches,
)
from morph.errors import DataError, TargetError
from morph.images import LabelledImages

X, Y = images(7)
CPU = torch.device("cpu")


def test_a_pair_is_shuffled_and_every_round_gives_each_sample_once():
    marked = torch.arange(7.0)
    found = list(islice(shuffle_batches(marked, Y, 3, seed=1), 6))
    assert [len(x) for x, _ in found] == [3, 3, 1, 3, 3, 1]
    rounds = [torch.cat([x for x, _ in found[i : i + 3]]) for i in (0, 3)]
    assert all(sorted(r.tolist()) == marked.tolist() for r in rounds)
    assert rounds[0].tolist() != rounds[1].tolist()
    assert all(torch.equal(y, Y[x.long()]) for x, y in found)


def test_the_seed_decides_the_order():
    one, two, other = (take_batches((X, Y), 2, 4, seed, CPU) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for p, q in zip(one, two, strict=True) for a, b in zip(p, q, strict=True))
    assert not torch.equal(one[0][0], other[0][0])


def test_an_iterable_is_gone_through_again_and_again_as_it_is():
    batches = [(X[:3], Y[:3]), (X[3:], Y[3:])]
    found = take_batches(batches, 5, 99, 0, CPU)
    assert [torch.equal(x, batches[i % 2][0]) for i, (x, _) in enumerate(found)] == [True] * 5


def test_an_object_with_batches_decides_for_itself():
    data = LabelledImages(X, Y, classes=tuple("abcdefg"), source="here")
    assert isinstance(data, Batches)
    assert not isinstance([(X, Y)], Batches)
    found = next(stream_batches(data, 5, 2, CPU))
    assert torch.equal(found[0], next(data.batches(5, 2))[0])
    assert describe_data(data)["source"] == "here"
    assert describe_data([(X, Y)]) == {"source": "list"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"the data gave no batch \(an iterator can be used only once: give a list or a DataLoader\)"),
        ((X, Y[:3]), "7 inputs and 3 targets; there must be as many, and at least one"),
        ((X[:0], Y[:0]), "0 inputs and 0 targets"),
        ([X], r"a batch must be a pair of tensors \(inputs, targets\), got Tensor"),
        ([(X, 3)], r"a batch must be a pair of tensors \(inputs, targets\), got tuple"),
    ],
)
def test_data_that_are_none(data, message):
    with pytest.raises(DataError, match=message):
        next(stream_batches(data, 2, 0, CPU))


def test_an_iterator_runs_dry_at_the_second_round_and_says_so():
    stream = cycle_batches(iter([(X, Y)]), 1, 0)
    assert torch.equal(next(stream)[0], X)
    with pytest.raises(DataError, match="an iterator can be used only once"):
        next(stream)


def test_a_batch_of_nothing():
    with pytest.raises(DataError, match="a batch of 0 samples; give a batch size of at least 1"):
        next(shuffle_batches(X, Y, 0, 0))


def test_one_target():
    assert choose_target(1.4e6, None) == ("params", 1_400_000)
    assert choose_target(None, 90e6) == ("macs", 90_000_000)
    for both in ((None, None), (1.0, 2.0)):
        with pytest.raises(TargetError, match="give one target: a number of parameters or a number of multiply-adds"):
            choose_target(*both)
