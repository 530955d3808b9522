"""Labelled images, from the sample inside, an image folder, CIFAR's own files, an .npz, or the user's loader.

Each place is described by a `Source`, which knows all labels and reads an image when it is needed; `load` reads some
of them. Nothing that a file holds is run.
"""

from __future__ import annotations

import hashlib
import importlib
import operator
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from morph.errors import DataError, MorphError
from morph.files.names import working_folder_importable

Split = Literal["test", "train"]
Shape = tuple[int, ...] | None
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# Mean and standard deviation of each channel, of pixels from 0 to 1.
CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_CALLABLE = re.compile(r"[A-Za-z_]\w+(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)  # not a drive letter
_SPLITS = {"test": ("test", "val", "valid", "validation", "train"), "train": ("train", "val", "test")}
_FORMS = "an image folder, a CIFAR folder, an .npz with images and labels, or package.module:callable"


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
        _check_lengths(self.source, self.images, self.labels)

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
    if split not in _SPLITS:
        raise DataError(f"split {split!r} is not one of {', '.join(_SPLITS)}")
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} images; give at least 1, or none to read all")
    found = _find(source, input_shape, num_classes, limit, split, seed)
    return load(found, input_shape=input_shape, num_classes=num_classes, limit=limit, mean_std=mean_std, seed=seed)


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
    images = [source.read(i) for i in chosen]
    expected = images[0].shape if input_shape is None else torch.Size(input_shape)
    for i, image in zip(chosen, images, strict=True):
        if image.shape != expected:
            takes = "the first is" if input_shape is None else "the model takes"
            way_out = (
                "give the shape of the model's input with --input"
                if input_shape is None
                else "give images of that shape"
            )
            got = f"{source.where(i)} is {_by(image.shape)}, {takes} {_by(expected)}"
            raise DataError(f"{source.name}: {got}; {way_out}")
    pixels, statistics = _normalise(torch.stack(images), mean_std, source.name)
    whole = torch.isfinite(pixels).flatten(1).all(1)
    if not whole.all():
        where = source.where(chosen[int(whole.int().argmin())])
        raise DataError(f"{source.name}: {where} holds a value that is not finite (NaN or infinity)")
    mean, std = statistics or (None, None)
    return LabelledImages(pixels, source.labels[chosen], source.classes, source.name, mean, std)


def choose(n: int, limit: int | None, seed: int) -> list[int]:
    """Draw ``limit`` of ``n`` indices, in ascending order; all of them if there are no more."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return [int(i) for i in order[:limit].sort().values]


def _check_lengths(name: str, images: Tensor, labels: Tensor) -> None:
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
                f"{name}: there are no usual statistics for images of {_by(images.shape[1:])}; give --mean and --std"
            )
        mean_std = mean_std or (CIFAR10 if images.shape[1:] == (3, 32, 32) else IMAGENET)
        images = images.float() / 255
    if mean_std is None:
        return images.float(), None
    mean, std = (torch.tensor(values, dtype=torch.float32) for values in mean_std)
    if images.ndim != 4 or mean.shape != std.shape or len(mean) != images.shape[1] or not (std > 0).all():
        raise DataError(
            f"{name}: mean {mean.tolist()} and std {std.tolist()} do not fit images of "
            f"{_by(images.shape[1:])}; expected one number for each channel, and every std above 0"
        )
    return (images.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1), mean_std


def _by(shape: Sequence[int]) -> str:
    """Write a shape as ``3x32x32``."""
    return "x".join(map(str, shape))


def _find(
    source: str | Path | None, shape: Shape, num_classes: int | None, limit: int | None, split: Split, seed: int
) -> Source:
    """Describe what ``source`` names."""
    if source is None:
        return _sample(shape, num_classes)
    path = Path(source)
    if path.is_dir():
        return _cifar(path, shape, num_classes, split) or _image_folder(path, shape, split)
    if path.is_file():
        return _npz(path, shape)
    if isinstance(source, str) and _CALLABLE.fullmatch(source):
        return _called(source, shape, limit, seed)
    raise DataError(f"{source}: there is no such file or folder; the data may be {_FORMS}")


def _sample(shape: Shape, num_classes: int | None) -> Source:
    """The images inside the package, for models that take such images."""
    if shape != (3, 32, 32) or num_classes != 10:
        takes = f"inputs of {_by(shape)}" if shape else "inputs of unknown shape (--input says it)"
        tells = f"{num_classes} classes" if num_classes else "an unknown number of classes"
        raise DataError(
            "no data given, and the CIFAR-10 sample inside (3x32x32, 10 classes) does not fit a model that takes "
            f"{takes} and tells {tells} apart; give --data: {_FORMS}"
        )
    from morph import sample

    return sample.source()


def _image_folder(root: Path, shape: Shape, split: Split) -> Source:
    """A folder in the layout of torchvision's ImageFolder, or its test, val or train part."""
    from torchvision.datasets import ImageFolder

    parts = [root / name for name in _SPLITS[split] if any(child.is_dir() for child in (root / name).glob("*"))]
    folder = parts[0] if parts else root
    try:
        listed = ImageFolder(str(folder), allow_empty=True)
    except OSError as error:
        raise DataError(f"{folder}: has no folders of classes with images in them; the data may be {_FORMS}") from error
    if not listed.samples:
        raise DataError(f"{folder}: its {len(listed.classes)} folders hold no images")
    return Source(
        str(folder),
        torch.tensor([label for _, label in listed.samples]),
        lambda i: decode(listed.samples[i][0], shape, listed.samples[i][0]),
        tuple(listed.classes),
        lambda i: listed.samples[i][0],
    )


def decode(file: str | IO[bytes], shape: Shape, name: str) -> Tensor:
    """Decode one image and bring it to ``shape`` = ``(C, H, W)``: uint8, grey if C is one, else RGB.

    Raises:
        DataError: If it cannot be decoded; says which.
    """
    try:
        with Image.open(file) as image:
            return _fit(image.convert("L" if shape and shape[0] == 1 else "RGB"), shape)
    except Exception as error:  # whatever a decoder raises
        raise DataError(f"{name}: cannot be read as an image: {error}") from error


def _fit(image: Image.Image, shape: Shape) -> Tensor:
    """Scale until the image covers ``shape``, crop at the centre; unchanged where the size is right."""
    if shape is not None and len(shape) == 3 and image.size != (shape[2], shape[1]):
        image = ImageOps.fit(image, (shape[2], shape[1]), method=Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image))
    return pixels.movedim(-1, 0) if pixels.ndim == 3 else pixels[None]


_CIFAR = {  # folder, file of names, key of the names, key of the labels, files of each split
    10: (
        "cifar-10-batches-py",
        "batches.meta",
        "label_names",
        "labels",
        {"test": ["test_batch"], "train": [f"data_batch_{i}" for i in range(1, 6)]},
    ),
    100: ("cifar-100-python", "meta", "fine_label_names", "fine_labels", {"test": ["test"], "train": ["train"]}),
}


def _cifar(root: Path, shape: Shape, num_classes: int | None, split: Split) -> Source | None:
    """CIFAR-10 or CIFAR-100 in or below ``root``; of both, the one that fits the model. None if there is neither."""
    found = [(at, row) for row in _CIFAR.values() for at in (root, root / row[0]) if (at / row[1]).is_file()]
    if not found:
        return None
    folder, (_, meta, names_key, labels_key, files) = found[-1 if num_classes == 100 else 0]
    names = _unpickle(folder / meta).get(names_key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{folder / meta}: holds no list of {names_key}, as CIFAR's files do")
    batches = [_cifar_batch(folder / file, labels_key) for file in files[split]]
    pixels, labels = torch.cat([data for data, _ in batches]), torch.cat([labels for _, labels in batches])

    def read(i: int) -> Tensor:
        return _fit(Image.fromarray(pixels[i].movedim(0, -1).contiguous().numpy()), shape)

    return Source(f"{folder} ({split})", labels, read, tuple(names))


def _cifar_batch(path: Path, key: str) -> tuple[Tensor, Tensor]:
    """Pixels ``[N, 3, 32, 32]``, uint8, and labels ``[N]`` of one file."""
    content = _unpickle(path)
    try:
        _, shape, dtype, fortran, raw = content["data"].state
        if isinstance(raw, _StandIn):  # how Python 3 writes bytes for Python 2
            raw, _ = raw.arguments
        data = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, np.uint8)
        pixels = torch.from_numpy(data.reshape(shape, order="F" if fortran else "C").copy())
        labels = torch.tensor([operator.index(label) for label in content[key]], dtype=torch.int64)
        fits = dtype.arguments[0] in ("u1", "|u1") and pixels.shape == (len(labels), 3072)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path}: holds no data and {key} that can be read, as CIFAR's files do") from error
    if not fits:
        raise DataError(
            f"{path}: data of shape {tuple(pixels.shape)} and {len(labels)} {key}; expected uint8 of "
            "(N, 3072) and N, as in CIFAR's files"
        )
    return pixels.view(-1, 3, 32, 32), labels


class _StandIn:
    """In place of whatever a pickle names; keeps what it is given and does nothing."""

    arguments: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads plain values, and numpy arrays as stand-ins; calls nothing that the file names."""

    def find_class(self, module: str, name: str) -> type[_StandIn]:
        if f"{module}.{name}" not in _KNOWN:
            raise DataError(f"wants {module}.{name}, which CIFAR's files do not hold; refused, nothing of it was run")
        return _StandIn


_KNOWN = (
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "_codecs.encode",
)


def _unpickle(path: Path) -> dict[str, Any]:
    """Read one of CIFAR's files."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        reason = getattr(error, "strerror", None) or f"damaged ({type(error).__name__})"
        raise DataError(f"{path}: cannot be read as one of CIFAR's files: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, expected a dictionary, as in CIFAR's files")
    return content


def _npz(path: Path, shape: Shape) -> Source:
    """Arrays of images and labels."""
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ("x", "y") if "x" in file else ("images", "labels")
            held = ", ".join(file) or "nothing"
            arrays = [file[key] for key in keys if key in file]
    except Exception as error:  # a damaged archive raises almost anything
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}): no .npz, damaged, or holding Python objects; "
            f"the data may be {_FORMS}"
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
    _check_lengths(name, images, labels)
    last_first = images.movedim(-1, 1) if images.ndim == 4 else images
    for view in (images, last_first, images[:, None]):
        if view.shape[1:] == shape or (shape is None and view.ndim == 4 and view.shape[1] in (1, 3)):
            return Source(name, labels.to(torch.int64), view.__getitem__)
    if shape is not None:
        got = f"images of {_by(images.shape[1:])}, the model takes {_by(shape)}"
        raise DataError(f"{name}: {got}; bring them to that shape (an image folder is scaled on the way)")
    return Source(name, labels.to(torch.int64), images.__getitem__)


def _called(source: str, shape: Shape, limit: int | None, seed: int) -> Source:
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
        _check_lengths(source, *batch)
        images.append(batch[0].detach().cpu())
        labels.append(batch[1].detach().cpu())
        if limit is not None and sum(map(len, labels)) >= limit:
            break
    if not images:
        raise DataError(f"{source}: gave no batches")
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]
