"""What a surgery looks at and aims for: batches of data from any of the forms that users have, and one target size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from morph.errors import DataError, TargetError
from morph.policies import Metric

Batch = tuple[Tensor, Tensor]


@runtime_checkable
class Batches(Protocol):
    """Data that gives batches for ever, in an order that the seed decides."""

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``(inputs, targets)``."""


Data = Batches | Batch | Iterable[Batch]


def take_batches(data: Data, number: int, batch_size: int, seed: int, device: torch.device) -> list[Batch]:
    """The first ``number`` batches of `stream_batches`; errors as there."""
    return list(islice(stream_batches(data, batch_size, seed, device), number))


def stream_batches(data: Data, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Give batches for ever.

    Args:
        data: An object with ``batches(batch_size, seed)`` such as `morph.data.LabelledImages`, a pair of tensors
            ``(inputs [N, ...], targets [N, ...])``, which is shuffled, or an iterable of such pairs (a DataLoader),
            which is gone through again and again as it is.
        batch_size: Samples in a batch, where ``data`` is not in batches already.
        seed: Of the order, likewise.
        device: Where the batches go.

    Raises:
        DataError: If there is no batch, or one is not a pair of tensors.
    """
    for batch in cycle_batches(data, batch_size, seed):
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(x, Tensor) for x in batch)):
            raise DataError(f"a batch must be a pair of tensors (inputs, targets), got {type(batch).__name__}")
        yield batch[0].to(device), batch[1].to(device)


def cycle_batches(data: Data, batch_size: int, seed: int) -> Iterator[Batch]:
    """Go through any of the forms of data for ever; the batches are not looked at.

    Raises:
        DataError: If there is no batch.
    """
    if isinstance(data, Batches):
        yield from data.batches(batch_size, seed)
        return
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor) and isinstance(data[1], Tensor):
        yield from shuffle_batches(data[0], data[1], batch_size, seed)
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch  # type: ignore[misc]  # a pair of tensors was dealt with above; stream_batches checks the rest
        if empty:
            raise DataError("the data gave no batch (an iterator can be used only once: give a list or a DataLoader)")


def round_length(data: Data, batch_size: int) -> int:
    """How many batches are in one round through ``data``.

    Raises:
        DataError: If that is not known before, or there is none.
    """
    pair = isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)
    samples = len(data[0]) if pair else len(data) if isinstance(data, Sized) else None  # type: ignore[index]
    if samples is None:
        raise DataError(f"{type(data).__name__} does not say how long it is; give tensors, a list or a DataLoader")
    if not samples:
        raise DataError("the data gave no batch")
    return -(-samples // batch_size) if pair or isinstance(data, Batches) else samples


def one_round(data: Data, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Give the batches of one round through ``data``, in an order that ``seed`` alone decides.

    A DataLoader draws its order from torch's global random state, which is seeded here before it begins.

    Raises:
        DataError: As `stream_batches`.
    """
    torch.manual_seed(seed)
    yield from islice(stream_batches(data, batch_size, seed, device), round_length(data, batch_size))


def shuffle_batches(inputs: Tensor, targets: Tensor, batch_size: int, seed: int) -> Iterator[Batch]:
    """Cut a pair of tensors into batches for ever, in a new random order each time round.

    Raises:
        DataError: If there are no samples, not as many targets, or ``batch_size`` is below one.
    """
    if len(inputs) != len(targets) or not len(inputs):
        raise DataError(f"{len(inputs)} inputs and {len(targets)} targets; there must be as many, and at least one")
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} samples; give a batch size of at least 1")
    generator = torch.Generator().manual_seed(seed)
    while True:
        for pick in torch.randperm(len(inputs), generator=generator).to(inputs.device).split(batch_size):
            yield inputs[pick], targets[pick]


def describe_data(data: Data) -> Mapping[str, object]:
    """What a record says of the data; plain values."""
    describe = getattr(data, "describe", None) if isinstance(data, Batches) else None
    return {"source": type(data).__name__} if describe is None else describe()


def choose_target(params: float | None, macs: float | None) -> tuple[Metric, int]:
    """Which size is meant, rounded.

    Raises:
        TargetError: If there is not exactly one.
    """
    if params is not None and macs is None:
        return "params", round(params)
    if macs is not None and params is None:
        return "macs", round(macs)
    raise TargetError("give one target: a number of parameters or a number of multiply-adds")
