"""Rounds through the data: in an order that the seed decides, for training, and in order, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from morph.augmentation import Augmented
from morph.batches import Batches, cycle_batches, round_length, whole
from morph.errors import DataError
from morph.images import LabelledImages
from morph.inputs import Inputs, pair_of, picked, require_samples, samples_in
from morph.search_checkpoint import random_states, set_random_states

Targets = Tensor | tuple[Tensor, ...]
"""Labels ``[N]``, or a tuple whose first item they are, with more for each sample, as the bits of several channels."""

Batch = tuple[Inputs, Targets]
"""Inputs and targets; every tensor in them has the samples on its first axis."""


def fine_type(device: torch.device) -> torch.dtype:
    """The finest type for sums on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def seeded_round(data: Any, batch_size: int, seed: int) -> Iterator[Batch]:
    """One round through the data, on the device where it lies; ``seed`` alone decides its order.

    A DataLoader draws its order from torch's global random state, which is seeded here before it begins.

    Args:
        data: As for `morph.batches.stream_batches`; targets may be a tuple.
        batch_size: Likewise.
        seed: Likewise.

    Raises:
        DataError: As `morph.batches.stream_batches`.
    """
    torch.manual_seed(seed)
    yield from map(checked, islice(cycle_batches(data, batch_size, seed), round_length(data, batch_size)))


def round_in_order(data: Any, batch_size: int) -> Iterator[Batch]:
    """Every sample once, as it is, without augmentation; no random state moves. Errors as `seeded_round`."""
    if isinstance(data, Augmented):
        data = data.images
    if isinstance(data, LabelledImages):
        data = (data.images, data.labels)
    if not isinstance(data, Batches) and (pair := whole(data)) is not None:
        pair, length = checked(pair), round_length(data, batch_size)
        for i in range(length):
            yield picked(pair, slice(i * batch_size, (i + 1) * batch_size))
        return
    states = random_states()
    try:
        yield from seeded_round(data, batch_size, 0)
    finally:
        set_random_states(states)


def checked(batch: Any) -> Batch:
    """The batch, if it is one; see `morph.inputs.pair_of`.

    Raises:
        DataError: If it is not a pair of inputs and targets with as many labels as inputs.
    """
    x, y = pair_of(batch)
    tensors = y if isinstance(y, tuple) else (y,)
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        kinds = ", ".join(type(t).__name__ for t in tensors) or "nothing"
        raise DataError(f"a batch must be a pair whose targets are a tensor or a tuple of tensors, got {kinds}")
    require_samples(x, tensors)
    return x, y


def share(batch: Batch, rank: int, world: int) -> tuple[Batch, float]:
    """What one of several processes computes of a batch, and what its mean must be multiplied by.

    The processes' gradients are averaged, so a share of ``n`` of ``N`` samples counts ``n * world / N``. Where there
    are fewer samples than processes, one that has none takes the first, and counts nothing.
    """
    number = samples_in(batch[0])
    mine = range(rank, number, world)
    if world == 1:
        return batch, 1.0
    if not mine:
        return picked(batch, slice(0, 1)), 0.0
    return picked(batch, slice(rank, None, world)), len(mine) * world / number


def parts(batch: Batch, number: int) -> Iterator[tuple[Batch, float]]:
    """Cut a batch in at most ``number`` parts of nearly the same size, each with its share of the samples."""
    total = samples_in(batch[0])
    number = min(number, total)
    if number <= 1:
        yield batch, 1.0
        return
    edges = [total * i // number for i in range(number + 1)]
    for i in range(number):
        yield picked(batch, slice(edges[i], edges[i + 1])), (edges[i + 1] - edges[i]) / total
