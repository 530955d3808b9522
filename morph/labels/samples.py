"""Samples that have an index: images, or inputs of any form, with their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from morph.batches import shuffle_batches
from morph.errors import DataError
from morph.images import LabelledImages, check_lengths
from morph.inputs import Inputs, pair_of, require_samples


@dataclass(frozen=True, eq=False)
class LabelledSamples:
    """Inputs of any form and their labels, in memory; for images see `morph.images.LabelledImages`.

    Attributes:
        inputs: A tensor, a tuple of arguments, or a dict of named ones, with the samples on the first axis of every
            tensor.
        labels: ``[N]``, int64.

    Raises:
        DataError: If there are no samples, not as many labels, or they cannot be told apart.
    """

    inputs: Inputs
    labels: Tensor

    def __post_init__(self) -> None:
        require_samples(self.inputs, (self.labels,))
        if not len(self.labels):
            raise DataError("the data has no samples")

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Inputs, Tensor]]:
        """Yield inputs and labels for ever, in a new random order each time round; see `shuffle_batches`."""
        yield from shuffle_batches(self.inputs, self.labels, batch_size, seed)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the SHA-256 of names, types, shapes and values of inputs and labels."""
        digest = hashlib.sha256()
        for path, leaf in pytree.tree_leaves_with_path((self.inputs, self.labels)):
            digest.update(pytree.keystr(path).encode())
            if not isinstance(leaf, Tensor):
                digest.update(repr(leaf).encode())
                continue
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)};".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """What a record says of the data; plain values."""
        return {"source": "tensors", "samples": len(self), "fingerprint": self.fingerprint()}


Indexed = LabelledImages | LabelledSamples
Known = Indexed | tuple[Inputs, Tensor] | Mapping[str, Tensor]
"""What has the same sample at the same index each time."""


def labelled(data: Known) -> Indexed:
    """Samples and labels by their index.

    Raises:
        DataError: If the data does not give the same sample for the same index each time.
    """
    if isinstance(data, LabelledImages | LabelledSamples):
        return data
    if isinstance(data, Mapping) or (isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)):
        inputs, labels = pair_of(data)
        if isinstance(inputs, Tensor) and (inputs.dim() == 4 or inputs.is_floating_point()):
            check_lengths("tensors", inputs, labels)
            return LabelledImages(inputs.float(), labels.long())
        return LabelledSamples(inputs, labels.long())
    raise DataError(
        f"a cache needs samples that have an index and stay what they are, got {type(data).__name__}; give "
        "LabelledImages without augmentation, or a pair of inputs and labels in memory"
    )


def inputs_of(data: Indexed) -> Inputs:
    """The inputs of all samples."""
    return data.images if isinstance(data, LabelledImages) else data.inputs
