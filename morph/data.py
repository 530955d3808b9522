"""Open labelled images: the sample inside, an image folder, CIFAR's own files, an .npz, or the user's loader.

Nothing that a file holds is run.
"""

from __future__ import annotations

import re
from pathlib import Path

from morph import sample
from morph.cifar import cifar
from morph.errors import DataError
from morph.images import CIFAR10, IMAGENET, LabelledImages, Shape, Source, Split, Statistics, by, choose, load
from morph.sources import FORMS, SPLITS, called, image_folder, npz

__all__ = ["CIFAR10", "IMAGENET", "LabelledImages", "Source", "choose", "load", "open_data"]

_CALLABLE = re.compile(r"[A-Za-z_]\w+(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)  # not a drive letter


def open_data(
    source: str | Path | None,
    *,
    input_shape: Shape = None,
    num_classes: int | None = None,
    limit: int | None = 1024,
    split: Split = "test",
    mean_std: Statistics | None = None,
    seed: int = 0,
) -> LabelledImages:
    """Read labelled images; only those that are needed.

    Args:
        source: One of: a folder with one folder of images per class, or with such folders for ``train``, ``test`` or
            ``val`` in it (images of another size are scaled until they cover ``input_shape`` and cropped at the
            centre); CIFAR-10 or CIFAR-100 as torchvision unpacks it (scaled likewise); an ``.npz`` with ``images`` or
            ``x`` (``[N, C, H, W]``, ``[N, H, W, C]`` or ``[N, H, W]``) and ``labels`` or ``y`` (``[N]``);
            ``package.module:callable``, which is imported and called, and gives an iterable of batches
            ``(images, labels)``, a map-style torch Dataset, or one pair of tensors; None for the CIFAR-10 images that
            ship inside, if they fit the model.
        input_shape: Shape of one sample, ``(C, H, W)``; None takes the images as they are.
        num_classes: Number of classes of the model; None leaves it open.
        limit: Read at most so many, chosen at random; None reads all. Of an iterable: the first.
        split: Which part of a folder; where it has none of that name, the nearest, which ``source`` of the result says.
        mean_std: Statistics per channel to normalise with. By default those of CIFAR-10 for ``3x32x32``, of ImageNet
            for other colour images; floating-point images are taken as they are.
        seed: Of the choice.

    Raises:
        DataError: If there is nothing there, it cannot be read, or it does not fit the model; says which and where.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images; give at least 1, or none to read all")
    found = _find(source, input_shape, num_classes, limit, split, seed)
    return load(found, input_shape=input_shape, num_classes=num_classes, limit=limit, mean_std=mean_std, seed=seed)


def _find(
    source: str | Path | None, shape: Shape, num_classes: int | None, limit: int | None, split: Split, seed: int
) -> Source:
    """Describe what ``source`` names."""
    if source is None:
        return _sample(shape, num_classes)
    path = Path(source)
    if path.is_dir():
        return cifar(path, shape, num_classes, split) or image_folder(path, shape, split)
    if path.is_file():
        return npz(path, shape)
    if isinstance(source, str) and _CALLABLE.fullmatch(source):
        return called(source, shape, limit, seed)
    raise DataError(f"{source}: there is no such file or folder; the data may be {FORMS}")


def _sample(shape: Shape, num_classes: int | None) -> Source:
    """The images inside the package, for models that take such images."""
    if shape != (3, 32, 32) or num_classes != 10:
        takes = f"inputs of {by(shape)}" if shape else "inputs of unknown shape (--input says it)"
        tells = f"{num_classes} classes" if num_classes else "an unknown number of classes"
        raise DataError(
            "no data given, and the CIFAR-10 sample inside (3x32x32, 10 classes) does not fit a model that takes "
            f"{takes} and tells {tells} apart; give --data: {FORMS}"
        )
    return sample.source()
