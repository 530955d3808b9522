"""The usual augmentation of small images: shifted by up to four pixels, and mirrored half of the time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from morph.images import LabelledImages


@dataclass(frozen=True, eq=False)
class Augmented:
    """Images that come a little different each time: padded with zeros, cropped at random, mirrored at random.

    Attributes:
        images: What they are made of.
        pad: Pixels on each side.
    """

    images: LabelledImages
    pad: int = 4

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """As `morph.images.LabelledImages.batches`; the seed decides the augmentation too."""
        draw = torch.Generator().manual_seed(seed + 1)
        for x, y in self.images.batches(batch_size, seed):
            yield self._changed(x, draw), y

    def _changed(self, x: Tensor, draw: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        padded = F.pad(x, (self.pad,) * 4)
        top, left = (torch.randint(0, 2 * self.pad + 1, (n, 1), generator=draw) for _ in range(2))
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        mirrored = torch.rand(n, 1, generator=draw) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()

    def describe(self) -> dict[str, object]:
        """What a record says of the data; plain values."""
        return {**self.images.describe(), "augmentation": f"shift by up to {self.pad} pixels, mirror"}
