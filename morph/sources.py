"""Where labelled images come from: image folders, .npz files, the user's own loader."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from morph.errors import DataError, MorphError
from morph.files.names import working_folder_importable
from morph.images import Shape, Source, Split, by, check_lengths, choose, decode

SPLITS = {"test": ("test", "val", "valid", "validation", "train"), "train": ("train", "val", "test")}
FORMS = "an image folder, a CIFAR folder, an .npz with images and labels, or package.module:callable"


def image_folder(root: Path, shape: Shape, split: Split) -> Source:
    """A folder in the layout of torchvision's ImageFolder, or its test, val or train part."""
    from torchvision.datasets import ImageFolder

    parts = [root / name for name in SPLITS[split] if any(child.is_dir() for child in (root / name).glob("*"))]
    folder = parts[0] if parts else root
    try:
        listed = ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        raise DataError(f"{folder}: has no folders of classes with images in them; the data may be {FORMS}") from error
    if not listed.samples:
        raise DataError(f"{folder}: its {len(listed.classes)} folders hold no images")
    return Source(
        str(folder),
        torch.tensor([label for _, label in listed.samples]),
        lambda i: decode(listed.samples[i][0], shape, listed.samples[i][0]),
        tuple(listed.classes),
        lambda i: listed.samples[i][0],
    )


def npz(path: Path, shape: Shape) -> Source:
    """Arrays of images and labels."""
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ("x", "y") if "x" in file else ("images", "labels")
            held = ", ".join(file) or "nothing"
            arrays = [file[key] for key in keys if key in file]
    except Exception as error:  # a damaged archive raises almost anything
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}): no .npz, damaged, or holding Python objects; "
            f"the data may be {FORMS}"
        ) from error
    if len(arrays) != 2:
        raise DataError(f"{path}: holds {held}; expected images and labels, or x and y")
    images, labels = arrays
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise DataError(
            f"{path}: {keys[0]} are of {images.dtype}; expected uint8 in 0..255, or floats that are normalised"
        )
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: {keys[1]} are of {labels.dtype}, expected whole numbers")
    images = images if images.dtype == np.uint8 else images.astype(np.float32)
    return _tensors(str(path), torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), shape)


def _tensors(name: str, images: Tensor, labels: Tensor, shape: Shape) -> Source:
    """Images with the channels first, last or left out: as ``shape`` says, or else as it looks."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"{name}: labels are of {labels.dtype}, expected whole numbers")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    check_lengths(name, images, labels)
    last_first = images.movedim(-1, 1) if images.ndim == 4 else images
    for view in (images, last_first, images[:, None]):
        if view.shape[1:] == shape or (shape is None and view.ndim == 4 and view.shape[1] in (1, 3)):
            return Source(name, labels.to(torch.int64), view.__getitem__)
    if shape is not None:
        got = f"images of {by(images.shape[1:])}, the model takes {by(shape)}"
        raise DataError(f"{name}: {got}; bring them to that shape (an image folder is scaled on the way)")
    return Source(name, labels.to(torch.int64), images.__getitem__)


def called(source: str, shape: Shape, limit: int | None, seed: int) -> Source:
    """Import and call what the user named, and read up to ``limit`` images from what it gives."""
    home, _, attribute = source.partition(":")
    try:
        with working_folder_importable():
            made: Any = getattr(importlib.import_module(home), attribute)()
            if isinstance(made, Dataset) and not isinstance(made, IterableDataset):
                chosen = choose(len(made), limit, seed)  # type: ignore[arg-type]  # all but iterable ones have a length
                made = [default_collate([made[i] for i in chosen])] if chosen else []
            if _is_pair(made):
                made = [made]
            images, labels = _gather(source, made, limit)
    except MorphError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise DataError(f"{source}: {type(error).__name__}: {error}") from error
    return _tensors(source, images, labels, shape)


def _is_pair(value: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)


def _gather(source: str, batches: object, limit: int | None) -> tuple[Tensor, Tensor]:
    """Join batches until there are ``limit`` images."""
    if not isinstance(batches, Iterable):
        what = f"gave a {type(batches).__name__}"
        raise DataError(f"{source}: {what}, expected batches (images, labels), a Dataset or a pair of tensors")
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        if not _is_pair(batch):
            raise DataError(f"{source}: a batch must be a pair of tensors (images, labels), got {type(batch).__name__}")
        check_lengths(source, *batch)
        images.append(batch[0].detach().cpu())
        labels.append(batch[1].detach().cpu())
        if limit is not None and sum(map(len, labels)) >= limit:
            break
    if not images:
        raise DataError(f"{source}: gave no batches")
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]
