"""Labelled images in memory, and what reads them: a `Source` knows all labels and reads an image when it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from morph.errors import DataError

Split = Literal["test", "train"]
Shape = tuple[int, ...] | None
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation of each channel, of pixels from 0 to 1.
CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images and their labels, in memory.

    Attributes:
        images: ``[N, C, H, W]``, float32, normalised.
        labels: ``[N]``, int64.
        classes: Names of the classes, where known.
        source: Where they come from.
        mean: What was subtracted from each channel of pixels in 0..1; None if they came normalised.
        std: What each channel was divided by after that; None likewise.

    Raises:
        DataError: If there are no images, not as many labels, or either is of another type.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...] | None = None
    source: str = "tensors"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != torch.float32 or self.labels.dtype != torch.int64:
            types = f"images of {self.images.dtype} and labels of {self.labels.dtype}"
            raise DataError(f"{self.source}: {types}; expected torch.float32 and torch.int64")
        check_lengths(self.source, self.images, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)`` for ever, in a new random order each time round; the last of a round may be small.

        Raises:
            DataError: If ``batch_size`` is below one.
        """
        if batch_size < 1:
            raise DataError(f"a batch of {batch_size} images; give a batch size of at least 1")
        generator = torch.Generator().manual_seed(seed)
        while True:
            for pick in torch.randperm(len(self), generator=generator).split(batch_size):
                yield self.images[pick], self.labels[pick]

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of shape, images and labels."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        for tensor in (self.images, self.labels):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """What a record says of the data; plain values."""
        normalisation = {"mean": list(self.mean), "std": list(self.std)} if self.mean and self.std else None
        return {
            "source": self.source,
            "images": len(self),
            "shape": list(self.images.shape[1:]),
            "classes": len(self.classes) if self.classes else None,
            "normalisation": normalisation,
            "fingerprint": self.fingerprint(),
        }


@dataclass(frozen=True)
class Source:
    """Images that are read one at a time.

    Attributes:
        name: What it is, for records and errors.
        labels: ``[N]``, int64, of all of them.
        read: Gives image ``i``: uint8 in 0..255, or floating point and normalised.
        classes: Names of the classes, where known.
        where: Names image ``i`` in errors.
    """

    name: str
    labels: Tensor
    read: Callable[[int], Tensor]
    classes: tuple[str, ...] | None = None
    where: Callable[[int], str] = "image {}".format


def load(
    source: Source,
    *,
    input_shape: Shape,
    num_classes: int | None,
    limit: int | None,
    mean_std: Statistics | None,
    seed: int,
) -> LabelledImages:
    """Read the images of ``source`` that are needed, check and normalise them; arguments and errors as `open_data`."""
    if not len(source.labels):
        raise DataError(f"{source.name}: holds no images")
    _check_labels(source, num_classes)
    chosen = choose(len(source.labels), limit, seed)
    images = _read_all(source, chosen)
    expected = images[0].shape if input_shape is None else torch.Size(input_shape)
    for i, image in zip(chosen, images, strict=True):
        if image.shape != expected:
            takes = "the first is" if input_shape is None else "the model takes"
            way_out = (
                "give the shape of the model's input with --input"
                if input_shape is None
                else "give images of that shape"
            )
            got = f"{source.where(i)} is {by(image.shape)}, {takes} {by(expected)}"
            raise DataError(f"{source.name}: {got}; {way_out}")
    pixels, statistics = _normalise(torch.stack(images), mean_std, source.name)
    whole = torch.isfinite(pixels).flatten(1).all(1)
    if not whole.all():
        where = source.where(chosen[int(whole.int().argmin())])
        raise DataError(f"{source.name}: {where} holds a value that is not finite (NaN or infinity)")
    mean, std = statistics or (None, None)
    return LabelledImages(pixels, source.labels[chosen], source.classes, source.name, mean, std)


def _read_all(source: Source, chosen: Sequence[int]) -> list[Tensor]:
    """Read images; where some cannot be read, all of those are counted and the first ones named."""
    images: list[Tensor] = []
    broken: list[DataError] = []
    for i in chosen:
        try:
            images.append(source.read(i))
        except DataError as error:
            broken.append(error)
    if len(broken) > 1:
        named = "; ".join(map(str, broken[:3])) + ("; ..." if len(broken) > 3 else "")
        raise DataError(
            f"{source.name}: {len(broken):,} of {len(chosen):,} images cannot be read; mend or remove them: {named}"
        ) from broken[0]
    if broken:
        raise broken[0]
    return images


def choose(n: int, limit: int | None, seed: int) -> list[int]:
    """Draw ``limit`` of ``n`` indices, in ascending order; all of them if there are no more."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return [int(i) for i in order[:limit].sort().values]


def check_lengths(name: str, images: Tensor, labels: Tensor) -> None:
    """As many labels as images, and some."""
    if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
        got = f"images of shape {tuple(images.shape)} and labels of shape {tuple(labels.shape)}"
        raise DataError(f"{name}: {got}; expected (N, C, H, W) and (N,), one label for each image")
    if not len(labels):
        raise DataError(f"{name}: holds no images")


def _check_labels(source: Source, num_classes: int | None) -> None:
    """Every label must be one of the model's classes."""
    if num_classes is not None and source.classes is not None and len(source.classes) > num_classes:
        raise DataError(
            f"{source.name}: has {len(source.classes)} classes, the model has {num_classes}; "
            "give data of the model's classes"
        )
    wrong = source.labels < 0 if num_classes is None else (source.labels < 0) | (source.labels >= num_classes)
    if wrong.any():
        i = int(wrong.int().argmax())
        allowed = "0 or above" if num_classes is None else f"0 to {num_classes - 1}, the classes of the model"
        raise DataError(f"{source.name}: {source.where(i)} has label {int(source.labels[i])}, expected {allowed}")


def _normalise(images: Tensor, mean_std: Statistics | None, name: str) -> tuple[Tensor, Statistics | None]:
    """Give float32 images, and the statistics that they were normalised with."""
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(
            f"{name}: images are of {images.dtype}; expected uint8 in 0..255, or floats that are normalised"
        )
    if images.dtype == torch.uint8:
        if mean_std is None and images.shape[1] != 3:
            raise DataError(
                f"{name}: there are no usual statistics for images of {by(images.shape[1:])}; give --mean and --std"
            )
        mean_std = mean_std or (CIFAR10 if images.shape[1:] == (3, 32, 32) else IMAGENET)
        images = images.float() / 255
    if mean_std is None:
        return images.float(), None
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in mean_std)
    if images.ndim != 4 or mean.shape != std.shape or len(mean) != images.shape[1] or not (std > 0).all():
        raise DataError(
            f"{name}: mean {mean.tolist()} and std {std.tolist()} do not fit images of "
            f"{by(images.shape[1:])}; expected one number for each channel, and every std above 0"
        )
    return (images.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), mean_std


def by(shape: Sequence[int]) -> str:
    """Write a shape as ``3x32x32``."""
    return "x".join(map(str, shape))


def decode(file: str | IO[bytes], shape: Shape, name: str) -> Tensor:
    """Decode one image and bring it to ``shape`` = ``(C, H, W)``: uint8, grey if C is one, else RGB.

    Raises:
        DataError: If it cannot be decoded; says which.
    """
    try:
        with Image.open(file) as image:
            return fit(image.convert("L" if shape and shape[0] == 1 else "RGB"), shape)
    except Exception as error:  # whatever a decoder raises
        raise DataError(f"{name}: cannot be read as an image: {error}") from error


def fit(image: Image.Image, shape: Shape) -> Tensor:
    """Scale until the image covers ``shape``, crop at the centre; unchanged where the size is right."""
    if shape is not None and len(shape) == 3 and image.size != (shape[2], shape[1]):
        image = ImageOps.fit(image, (shape[2], shape[1]), method=Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))
    return pixels.movedim(-1, 0) if pixels.ndim == 3 else pixels[None]
