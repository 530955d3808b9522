"""By which a cache knows its teacher and its data."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from morph.errors import DataError
from morph.images import LabelledImages, check_lengths


def teacher_digest(teacher: nn.Module) -> str:
    """Thirty-two hexadecimal digits of the SHA-256 of all names, types, shapes and values of the state_dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def data_digest(data: LabelledImages | tuple[Tensor, Tensor]) -> str:
    """The fingerprint of images and labels in their order."""
    return labelled(data).fingerprint()


def labelled(data: LabelledImages | tuple[Tensor, Tensor]) -> LabelledImages:
    """Images and labels by their index.

    Raises:
        DataError: If the data does not give the same image for the same index each time.
    """
    if isinstance(data, LabelledImages):
        return data
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(t, Tensor) for t in data):
        check_lengths("tensors", *data)
        return LabelledImages(data[0].float(), data[1].long())
    raise DataError(
        f"a cache needs images that have an index and stay what they are, got {type(data).__name__}; give "
        "LabelledImages without augmentation, or a pair of tensors (images, labels)"
    )
