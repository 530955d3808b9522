"""How good a classifier is: loss, top-1 and top-5 on labelled data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from morph.errors import DataError, TrainingError
from morph.inputs import Inputs, arguments_of, moved, picked, run_on, samples_in
from morph.search_data import check_classes
from morph.teaching.objective import labels_of, logits_and_heads
from morph.tracing import evaluation, try_inputs
from morph.training.rounds import Batch, fine_type, round_in_order


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        images: Samples seen.
        top1: Share whose class has the largest output.
        top5: Share whose class is among the five largest outputs; all of them where there are five classes or fewer.
        loss: Mean cross-entropy, in nats.
        class_images: Samples of each class, ``[C]``.
        class_top1: ``top1`` of each class, ``[C]``; None for a class without samples.
    """

    images: int
    top1: float
    top5: float
    loss: float
    class_images: tuple[int, ...]
    class_top1: tuple[float | None, ...]


def evaluate(model: nn.Module, data: Any, *, batch_size: int = 256, fabric: Fabric | None = None) -> Scores:
    """Run a classifier over labelled data, in evaluation mode, without augmentation.

    Args:
        model: Gives logits ``[N, C]``, alone, first in a tuple, or as ``logits`` of an output; on the device of
            ``fabric`` meanwhile, and not touched otherwise.
        data: As for `morph.fit`.
        batch_size: Samples that are computed at once; it does not change what comes out.
        fabric: Device, precision and, launched, the processes among which the batches are shared; by default the
            device on which the model is.

    Raises:
        DataError: If data and model do not fit.
        TraceError: If the model does not accept the inputs.
        TrainingError: If an output is not finite.

    Example:
        >>> import morph, torch
        >>> from morph.zoo import build
        >>> scores = morph.evaluate(build("wrn-10-1"), (torch.randn(8, 3, 32, 32), torch.arange(8)))
        >>> scores.images, len(scores.class_top1)
        (8, 10)
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    runner = fabric or Fabric(accelerator=home.type, devices=1)
    try:
        check_fit(model, data, batch_size)
        return score(model.to(runner.device), data, batch_size, runner)
    finally:
        model.to(home)


def check_fit(model: nn.Module, data: Any, batch_size: int, name: str = "the model") -> Inputs:
    """See that data and a classifier fit; gives up to two samples, on the device of the model.

    Raises:
        DataError: If there is no batch, the model does not give logits, or the labels are not its classes.
        TraceError: If it does not accept the inputs.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    first = next(round_in_order(data, batch_size), None)
    if first is None or not samples_in(first[0]):
        raise DataError("the data gave no batch")
    x, labels = moved(picked(first[0], slice(0, 2)), device), labels_of(first[1])
    try_inputs(model, *arguments_of(x))
    with evaluation(model), torch.no_grad():
        logits, _ = logits_and_heads(run_on(model, x))
    if logits.dim() != 2:
        raise DataError(f"{name} gives a tensor of shape {tuple(logits.shape)}; expected logits [N, classes]")
    check_classes(data, labels, logits.shape[1], name)
    return x


@torch.no_grad()
def score(model: nn.Module, data: Any, batch_size: int, fabric: Fabric, channels_last: bool = False) -> Scores:
    """As `evaluate`, of a model that is on the device already and fits the data."""
    sums: Tensor | None = None
    with evaluation(model):
        for batch in _shared(round_in_order(data, batch_size), fabric):
            x, y = moved(batch, fabric.device, channels_last)
            with fabric.autocast():
                logits, _ = logits_and_heads(run_on(model, x))
            found = _sums(logits.float(), labels_of(y))
            sums = found if sums is None else sums + found
    if fabric.world_size > 1:
        sums = _of_all(sums, fabric)
    if sums is None:
        raise DataError("the data gave no batch")
    return _scores(sums.cpu())


def _shared(batches: Iterator[Batch], fabric: Fabric) -> Iterator[Batch]:
    """Of several processes each takes some of the batches."""
    return islice(batches, fabric.global_rank, None, fabric.world_size)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch, ``[3 + 2C]``: loss, non-finite outputs, hits among five, then samples and hits by class."""
    classes = logits.shape[1]
    order = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    broken = (~torch.isfinite(logits).all(1)).sum()
    seen = torch.bincount(labels, minlength=classes)
    hits = torch.bincount(labels[order[:, 0]], minlength=classes)
    fine = fine_type(logits.device)
    return torch.cat([part.reshape(-1).to(fine) for part in (loss, broken, order.sum(), seen, hits)])


def _of_all(sums: Tensor | None, fabric: Fabric) -> Tensor:
    """The sum over the processes, some of which may have had no batch."""
    length = torch.tensor(0 if sums is None else len(sums), device=fabric.device)
    longest = int(_reduced(length, fabric, "max"))
    empty = torch.zeros(longest, dtype=fine_type(fabric.device), device=fabric.device)
    return _reduced(empty if sums is None else sums, fabric)


def _reduced(value: Tensor, fabric: Fabric, how: str = "sum") -> Tensor:
    found = fabric.all_reduce(value, reduce_op=how)
    assert isinstance(found, Tensor)
    return found


def _scores(sums: Tensor) -> Scores:
    """The shares from the sums."""
    loss, broken, five, *rest = sums.tolist()
    seen, hits = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    images = sum(seen)
    if broken:
        raise TrainingError(
            f"the outputs for {int(broken):,} of {int(images):,} samples are not finite numbers (NaN or infinity)"
        )
    shares = tuple(hit / n if n else None for hit, n in zip(hits, seen, strict=True))
    return Scores(int(images), sum(hits) / images, five / images, loss / images, tuple(int(n) for n in seen), shares)
