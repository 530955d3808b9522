"""Rounds through the data: in an order that the seed decides, for training, and in order, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from morph.augmentation import Augmented
from morph.batches import cycle_batches, round_length
from morph.errors import DataError
from morph.images import LabelledImages
from morph.search_checkpoint import random_states, set_random_states

Targets = Tensor | tuple[Tensor, ...]
"""Labels ``[N]``, or a tuple whose first item they are, with more for each sample, as the bits of several channels."""

Batch = tuple[Tensor, Targets]
"""Inputs ``[N, ...]`` and targets."""


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
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        round_length(data, batch_size)
        yield from map(checked, zip(data[0].split(batch_size), data[1].split(batch_size), strict=True))
        return
    states = random_states()
    try:
        yield from seeded_round(data, batch_size, 0)
    finally:
        set_random_states(states)


def checked(batch: Any) -> Batch:
    """The batch, if it is one.

    Raises:
        DataError: If it is not a pair of inputs and targets with as many labels as inputs.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Tensor):
        targets = tuple(batch[1]) if isinstance(batch[1], tuple | list) else batch[1]
        tensors = targets if isinstance(targets, tuple) else (targets,)
        if tensors and all(isinstance(t, Tensor) for t in tensors):
            if any(len(t) != len(batch[0]) for t in tensors):
                sizes = ", ".join(str(len(t)) for t in tensors)
                raise DataError(f"a batch of {len(batch[0])} inputs and {sizes} targets; there must be as many")
            return batch[0], targets
    raise DataError(
        f"a batch must be a pair (inputs, targets) of tensors, or with a tuple of tensors as targets, "
        f"got {type(batch).__name__}"
    )


def moved(batch: Batch, device: torch.device, channels_last: bool = False) -> Batch:
    """The batch on a device."""
    x, y = batch
    images = channels_last and x.dim() == 4
    x = x.to(device, non_blocking=True, memory_format=torch.channels_last if images else torch.preserve_format)
    if isinstance(y, Tensor):
        return x, y.to(device, non_blocking=True)
    return x, tuple(t.to(device, non_blocking=True) for t in y)


def picked(batch: Batch, pick: slice) -> Batch:
    """Some samples of a batch."""
    x, y = batch
    return x[pick], y[pick] if isinstance(y, Tensor) else tuple(t[pick] for t in y)


def share(batch: Batch, rank: int, world: int) -> tuple[Batch, float]:
    """What one of several processes computes of a batch, and what its mean must be multiplied by.

    The processes' gradients are averaged, so a share of ``n`` of ``N`` samples counts ``n * world / N``. Where there
    are fewer samples than processes, one that has none takes the first, and counts nothing.
    """
    number = len(batch[0])
    mine = range(rank, number, world)
    if world == 1:
        return batch, 1.0
    if not mine:
        return picked(batch, slice(0, 1)), 0.0
    return picked(batch, slice(rank, None, world)), len(mine) * world / number


def parts(batch: Batch, number: int) -> Iterator[tuple[Batch, float]]:
    """Cut a batch in at most ``number`` parts of nearly the same size, each with its share of the samples."""
    total = len(batch[0])
    number = min(number, total)
    if number <= 1:
        yield batch, 1.0
        return
    edges = [total * i // number for i in range(number + 1)]
    for i in range(number):
        yield picked(batch, slice(edges[i], edges[i + 1])), (edges[i + 1] - edges[i]) / total
