"""Images that come with what a teacher said of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from morph.augmentation import Augmented
from morph.images import LabelledImages
from morph.inputs import Inputs
from morph.labels.caches import LabelCache, LogitCache, require_data
from morph.labels.samples import Indexed


@dataclass(frozen=True, eq=False)
class WithTargets:
    """Batches ``(x, (labels, targets))``: images, their labels, and the bits or logits of a cache.

    The order is that of the images alone with the same seed. Augmented images come with what the teacher said of the
    image as it is.

    Attributes:
        images: Images and labels, augmented or not; or `morph.labels.samples.LabelledSamples`.
        cache: Of just these images.

    Raises:
        CacheError: If the cache is of other data.
    """

    images: Indexed | Augmented
    cache: LabelCache | LogitCache

    def __post_init__(self) -> None:
        require_data(self.cache.header, self._plain().fingerprint(), self.cache.path)

    def _plain(self) -> Indexed:
        return self.images.images if isinstance(self.images, Augmented) else self.images

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Inputs, tuple[Tensor, Tensor]]]:
        """Yield ``(images, (labels [n], targets [n, columns]))`` for ever, in an order that the seed decides.

        Raises:
            DataError: If ``batch_size`` is below one.
        """
        plain = self._plain()
        same: Indexed | Augmented = dataclasses.replace(plain, labels=torch.arange(len(plain)))
        if isinstance(self.images, Augmented) and isinstance(same, LabelledImages):
            same = dataclasses.replace(self.images, images=same)
        for x, index in same.batches(batch_size, seed):
            yield x, (plain.labels[index], self.cache[index])

    def describe(self) -> dict[str, object]:
        """What a record says of the data; plain values."""
        header = self.cache.header
        facts = {"kind": header.kind, "classes": header.classes, "channels": header.channels, "dtype": header.dtype}
        return {
            **self.images.describe(),
            "targets": {**facts, "threshold": header.threshold, "teacher": header.teacher},
        }
