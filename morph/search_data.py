"""Whether a teacher and its data fit, before anything is trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from morph.augmentation import Augmented
from morph.batches import Batches, Data, one_round, whole
from morph.errors import DataError
from morph.images import LabelledImages
from morph.inputs import Inputs, arguments_of, logits_in, picked, run_on, samples_in
from morph.tracing import evaluation, try_inputs


def first_inputs(teacher: nn.Module, data: Data, batch_size: int, seed: int) -> Inputs:
    """Two samples or more on the device of the teacher, after a look at whether teacher and data fit.

    Raises:
        DataError: If there is no batch, the teacher does not give logits, or the classes are others.
        TraceError: If the teacher does not accept the inputs.
    """
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    first = next(one_round(data, max(2, batch_size), seed, device), None)
    if first is None or not samples_in(first[0]):
        raise DataError("the data gave no batch")
    inputs = picked(first[0], torch.tensor([0, min(1, samples_in(first[0]) - 1)], device=device))
    try_inputs(teacher, *arguments_of(inputs))
    with evaluation(teacher), torch.no_grad():
        output = run_on(teacher, inputs)
    logits = logits_in(output)
    if logits is None or logits.dim() != 2:
        got = f"a tensor of shape {tuple(logits.shape)}" if logits is not None else type(output).__name__
        raise DataError(f"the teacher gives {got}; expected logits [N, classes], alone, first, or under that name")
    check_classes(data, first[1], logits.shape[1])
    return inputs


def check_classes(data: Data, labels: Tensor, classes: int, model: str = "the teacher") -> None:
    """The labels must be the model's classes: all of them where they are known, else those of the first batch.

    Args:
        data: What was given.
        labels: Those of its first batch.
        classes: How many the model tells apart.
        model: Its name in errors.

    Raises:
        DataError: If they are not.
    """
    if isinstance(data, Augmented):
        data = data.images
    if isinstance(data, LabelledImages):
        labels = data.labels
        if data.classes is not None and len(data.classes) != classes:
            raise DataError(
                f"{model} tells {classes} classes apart, {data.source} has {len(data.classes)}; give data of "
                f"{model}'s classes"
            )
    elif not isinstance(data, Batches) and (pair := whole(data)) is not None:
        labels = pair[1] if isinstance(pair[1], Tensor) else pair[1][0]
    if labels.is_floating_point() or labels.dim() != 1:
        raise DataError(f"labels of {labels.dtype} and shape {tuple(labels.shape)}; expected whole numbers [N]")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"{model} tells {classes} classes apart, the data has label {wrong}; give data of {model}'s classes"
        )
