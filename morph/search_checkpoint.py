"""The state of a search or of a training run in a file, from which it goes on as if nothing had happened."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from morph.atomic import atomic_path
from morph.errors import MorphError, SearchStateError

SCHEMA = 3


@dataclass(frozen=True)
class Kind:
    """What a state is the state of.

    Attributes:
        name: For errors.
        schema: Number of its layout.
        error: What is raised where it cannot be read.
    """

    name: str
    schema: int
    error: type[MorphError]


SEARCH = Kind("search", SCHEMA, SearchStateError)


def random_states() -> dict[str, Any]:
    """The global random states of torch, NumPy and Python; plain values and tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  # users' loaders draw there
    version, numbers, pending = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [torch.from_numpy(np.array(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(numbers), pending],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, numbers, pending = states["python"]
    random.setstate((version, tuple(numbers), pending))


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of names and values, of a state_dict for example."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any], kind: Kind = SEARCH) -> None:
    """Write a state, whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        state: Tensors and plain values.
        identity: What has to be the same where it is loaded.
        kind: What it is the state of.

    Raises:
        OutputError: If it cannot be written.
    """
    with atomic_path(path, force=True) as temporary:
        written = io.BytesIO()  # torch's own writer hides a full disk behind an obscure error
        torch.save({"schema": kind.schema, "identity": dict(identity), **state}, written)
        temporary.write_bytes(written.getbuffer())


def load(path: Path, identity: Mapping[str, Any], kind: Kind = SEARCH) -> dict[str, Any]:
    """Read a state; no code of the file is run.

    Raises:
        MorphError: That of ``kind``, if it cannot be read, or belongs to another run; says in what that differs.
    """
    foreign = f"{path}: not a checkpoint of a {kind.name}"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever the reader raises
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise kind.error(f"{foreign}: {text[0]}; remove it to begin anew") from error
    if not isinstance(state, dict) or state.get("schema") != kind.schema:
        raise kind.error(f"{foreign} that this version reads; remove it to begin anew")
    found = state["identity"]
    for key in sorted({*found, *identity}):
        if found.get(key) != identity.get(key):
            raise kind.error(
                f"{path}: belongs to another {kind.name}: {key} is {found.get(key)!r} there and "
                f"{identity.get(key)!r} here; give the same options, another checkpoint, or remove it"
            )
    return state
