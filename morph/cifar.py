"""CIFAR-10 and CIFAR-100 as torchvision unpacks them. They are pickles: read into inert stand-ins, running nothing."""

from __future__ import annotations

import operator
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from morph.errors import DataError
from morph.images import Shape, Source, Split, fit

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


def cifar(root: Path, shape: Shape, num_classes: int | None, split: Split) -> Source | None:
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
        return fit(Image.fromarray(pixels[i].movedim(0, -1).contiguous().numpy()), shape)

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
