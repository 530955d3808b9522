"""CIFAR-10 test images that ship with the package, so that everything can be tried without a download.

Some hundreds of the 32x32 colour images of each of the ten classes, all from the test set of CIFAR-10 (Krizhevsky,
"Learning Multiple Layers of Features from Tiny Images", 2009), in the order of a JPEG copy of it. The copy is slightly
lossy: pixels differ a little from those of the original files. `benchmarks/make_sample.py` wrote the file, which keeps
the bytes of every JPEG, its label and its name in the copy.
"""

from __future__ import annotations

import io
from importlib import resources

import numpy as np
import torch

from morph.errors import DataError
from morph.images import LabelledImages, Source, decode, load


def cifar10() -> LabelledImages:
    """All images of the sample: ``[N, 3, 32, 32]``, normalised with the statistics of CIFAR-10.

    Raises:
        DataError: If the file is missing or damaged.

    Example:
        >>> from morph.sample import cifar10
        >>> data = cifar10()
        >>> data.images.shape[1:], data.classes[:3]
        (torch.Size([3, 32, 32]), ('airplane', 'automobile', 'bird'))
    """
    return load(source(), input_shape=(3, 32, 32), num_classes=10, limit=None, mean_std=None, seed=0)


def source() -> Source:
    """Describe the sample for `morph.images.load`, which decodes the images that it needs.

    Raises:
        DataError: If the file is missing or damaged.
    """
    try:
        with (resources.files(__name__) / "cifar10.npz").open("rb") as file, np.load(file, allow_pickle=False) as held:
            jpeg, offsets = held["jpeg"], held["offsets"]
            labels, classes, files = held["labels"].astype(np.int64), held["classes"], held["files"]
    except Exception as error:  # a damaged archive raises almost anything
        reason = f"({type(error).__name__}); install the package again, or give --data"
        raise DataError(f"the sample inside the package cannot be read {reason}") from error

    def read(i: int) -> torch.Tensor:
        return decode(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()), None, f"sample {files[i]}")

    name = "CIFAR-10 sample inside the package"
    return Source(name, torch.from_numpy(labels), read, tuple(map(str, classes)), lambda i: str(files[i]))
