"""What a surgery looks at and aims for: batches of data from any of the forms that users have, and one target size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from morph.errors import DataError, TargetError
from morph.inputs import Inputs, moved, pair_of, picked, require_samples, samples_in, tensors_of
from morph.policies import Metric

Batch = tuple[Inputs, Tensor]
"""Inputs and targets ``[N, ...]``."""


@runtime_checkable
class Batches(Protocol):
    """Data that gives batches for ever, in an order that the seed decides."""

    def batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        """Yield ``(inputs, targets)``."""


Data = Batches | Batch | Mapping[str, Tensor] | Iterable[Batch | Mapping[str, Tensor]]
"""What gives batches; `stream_batches` says how."""


def take_batches(data: Data, number: int, batch_size: int, seed: int, device: torch.device) -> list[Batch]:
    """The first ``number`` batches of `stream_batches`; errors as there."""
    return list(islice(stream_batches(data, batch_size, seed, device), number))


def stream_batches(data: Data, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Give batches for ever.

    Inputs are a tensor, a tuple of arguments or a mapping of named ones; every tensor in them, however deep, has the
    samples on its first axis. A mapping with ``labels`` in it, as collators of Hugging Face give, is the pair of the
    others and these.

    Args:
        data: An object with ``batches(batch_size, seed)`` such as `morph.data.LabelledImages`, a pair of inputs and
            targets ``[N, ...]`` in memory (or such a mapping), which is shuffled, or an iterable of such pairs (a
            DataLoader), which is gone through again and again as it is.
        batch_size: Samples in a batch, where ``data`` is not in batches already.
        seed: Of the order, likewise.
        device: Where the batches go.

    Raises:
        DataError: If there is no batch, or one is no pair of inputs and a tensor.
    """
    for batch in cycle_batches(data, batch_size, seed):
        x, y = pair_of(batch)
        if not isinstance(y, Tensor):
            raise DataError(f"a batch must be a pair of inputs and a tensor of targets, got {type(y).__name__} of them")
        require_samples(x, (y,))
        yield moved(x, device), y.to(device)


def cycle_batches(data: Data, batch_size: int, seed: int) -> Iterator[Any]:
    """Go through any of the forms of data for ever; the batches are not looked at.

    Raises:
        DataError: If there is no batch.
    """
    if isinstance(data, Batches):
        yield from data.batches(batch_size, seed)
        return
    if (pair := whole(data)) is not None:
        yield from shuffle_batches(*pair, batch_size, seed)
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise DataError("the data gave no batch (an iterator can be used only once: give a list or a DataLoader)")


def whole(data: Any) -> tuple[Inputs, Any] | None:
    """Inputs and targets, where data is one pair of them in memory; None where it is in batches.

    Raises:
        DataError: As `morph.inputs.pair_of`.
    """
    pair = isinstance(data, tuple) and len(data) == 2 and any(isinstance(part, Tensor) for part in data)
    return pair_of(data) if pair or isinstance(data, Mapping) else None


def round_length(data: Any, batch_size: int) -> int:
    """How many batches are in one round through ``data``.

    Raises:
        DataError: If that is not known before, or there is none.
    """
    pair = None if isinstance(data, Batches) else whole(data)
    samples = samples_in(pair[0]) if pair is not None else len(data) if isinstance(data, Sized) else None
    if samples is None:
        raise DataError(f"{type(data).__name__} does not say how long it is; give tensors, a list or a DataLoader")
    if not samples:
        raise DataError("the data gave no batch")
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} samples; give a batch size of at least 1")
    return -(-samples // batch_size) if pair is not None or isinstance(data, Batches) else samples


def one_round(data: Data, batch_size: int, seed: int, device: torch.device) -> Iterator[Batch]:
    """Give the batches of one round through ``data``, in an order that ``seed`` alone decides.

    A DataLoader draws its order from torch's global random state, which is seeded here before it begins.

    Raises:
        DataError: As `stream_batches`.
    """
    torch.manual_seed(seed)
    yield from islice(stream_batches(data, batch_size, seed, device), round_length(data, batch_size))


def shuffle_batches(
    inputs: Inputs, targets: Tensor | tuple[Tensor, ...], batch_size: int, seed: int
) -> Iterator[tuple[Inputs, Any]]:
    """Cut a pair of inputs and targets into batches for ever, in a new random order each time round.

    Raises:
        DataError: If there are no samples, not as many targets, or ``batch_size`` is below one.
    """
    lengths = [len(t) if t.dim() else 0 for t in tensors_of(targets)]
    number = samples_in(inputs)
    if set(lengths) != {number} or not number:
        found = ", ".join(map(str, lengths))
        raise DataError(f"{number} inputs and {found} targets; there must be as many, and at least one")
    require_samples(inputs, tensors_of(targets))
    if batch_size < 1:
        raise DataError(f"a batch of {batch_size} samples; give a batch size of at least 1")
    generator = torch.Generator().manual_seed(seed)
    device = tensors_of(inputs)[0].device
    while True:
        for pick in torch.randperm(number, generator=generator).to(device).split(batch_size):
            yield picked(inputs, pick), picked(targets, pick)


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
