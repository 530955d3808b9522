"""By which a cache knows its teacher and its data."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from morph.labels.samples import Known, labelled


def teacher_digest(teacher: nn.Module) -> str:
    """Thirty-two hexadecimal digits of the SHA-256 of all names, types, shapes and values of the state_dict."""
    digest = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def data_digest(data: Known) -> str:
    """The fingerprint of samples and labels in their order."""
    return labelled(data).fingerprint()
