"""What a teacher said of each image, read from disk and looked up by the image's index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from morph.errors import CacheError
from morph.labels.cache_file import Header, Rows, read
from morph.labels.digests import data_digest, teacher_digest
from morph.labels.samples import Known

Index = int | slice | Sequence[int] | Tensor


class Cache:
    """Rows on disk, one for each image; see `LabelCache` and `LogitCache`.

    Attributes:
        path: Where it is.
        header: What it holds, and of what.
    """

    kind: ClassVar[str]

    def __init__(self, path: Path, header: Header, rows: Rows) -> None:
        self.path, self.header, self._rows = path, header, rows

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        teacher: nn.Module | None = None,
        data: Known | None = None,
    ) -> Self:
        """Open a cache and check it.

        Args:
            path: The file.
            teacher: The teacher that it should be of; not checked if None.
            data: The data that it should be of; not checked if None.

        Raises:
            CacheError: It is missing, damaged, of another kind, of another teacher or of other data. The file stays as
                it is.
        """
        path = Path(path)
        header, rows = read(path)
        if header.kind != cls.kind:
            raise CacheError(f"{path}: holds {header.kind}, expected {cls.kind}")
        if teacher is not None and (digest := teacher_digest(teacher)) != header.teacher:
            raise CacheError(
                f"{path}: is of another teacher: its digest is {header.teacher}, that of this one {digest}; give that "
                "teacher, or make a cache of this one under another name"
            )
        if data is not None:
            require_data(header, data_digest(data), path)
        return cls(path, header, rows)

    def __len__(self) -> int:
        """Number of images."""
        return self.header.samples

    def _at(self, index: Index) -> Rows:
        """Rows of the cache; a single index gives one row."""
        try:
            found: Rows = self._rows[index.cpu().numpy() if isinstance(index, Tensor) else index]
        except IndexError as error:
            raise CacheError(f"{self.path}: has {len(self):,} images: {error}") from error
        return found


def require_data(header: Header, digest: str, path: Path) -> None:
    """Refuse a cache of other data.

    Raises:
        CacheError: If it is.
    """
    if digest != header.data:
        raise CacheError(
            f"{path}: is of other data: their fingerprint is {header.data}, that of these {digest}; give those images "
            "in that order, or make a cache of these under another name"
        )


class LabelCache(Cache):
    """Multi-channel labels: for each image one bit for each class and channel.

    ``cache[index]`` gives ``[n, classes * channels]``, uint8, ordered as `morph.label_heads.channel_logits` orders
    them; a single index gives one row.
    """

    kind = "labels"

    def __getitem__(self, index: Index) -> Tensor:
        """See the class."""
        columns = self.header.classes * self.header.channels
        return torch.from_numpy(np.unpackbits(self._at(index), axis=-1, count=columns))

    def votes(self, index: Index) -> Tensor:
        """How many bits of each class are set: ``[n, classes]``, int64."""
        bits: Tensor = self[index].unflatten(-1, (self.header.classes, self.header.channels))
        return bits.sum(-1)


class LogitCache(Cache):
    """Logits of a teacher: ``cache[index]`` gives ``[n, classes]``, float32; a single index gives one row."""

    kind = "logits"

    def __getitem__(self, index: Index) -> Tensor:
        """See the class."""
        numbers = np.ascontiguousarray(self._at(index)).view(np.dtype(self.header.dtype).newbyteorder("<"))
        return torch.from_numpy(numbers.astype(np.float32))
