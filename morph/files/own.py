"""Our own model file: a `torch.save` archive of JSON text and tensors, opened with ``weights_only=True`` alone.

It holds a dictionary: ``format`` "morph", ``version`` 1, ``description`` (text), ``tensors`` by key, ``meta`` (text),
and ``record`` (text or None).
"""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from morph.atomic import atomic_path
from morph.errors import ModelFileError
from morph.files import rebuild
from morph.files.describe import describe
from morph.files.spec import from_text

FORMAT = "morph"
VERSION = 1
_FIELDS = {"format": str, "version": int, "description": str, "tensors": dict, "meta": str, "record": str | None}


def save_model(
    model: nn.Module,
    path: str | Path,
    *,
    input_shape: tuple[int, ...] | None = None,
    arch: str | None = None,
    record: Mapping[str, object] | None = None,
    force: bool = False,
) -> None:
    """Write ``model`` to our own file, from which `open_model` gives it back bit for bit without running any code.

    Modules of torch, torchvision, timm and the zoo keep their class. A user's own class is traced in training and in
    evaluation mode and comes back as a graph network with the same state_dict; its attributes and methods do not.
    Gradients and hooks are not kept: hooks are refused, gradients are dropped.

    Args:
        model: The model; it is not changed.
        path: Where to write.
        input_shape: Shape of one sample without the batch axis, e.g. ``(3, 32, 32)``. With it, a model that had to be
            traced is compared with its trace on random inputs in both modes before anything is written.
        arch: A name that the model was made from, e.g. ``zoo:darts-10``; for the reader's information only.
        record: Anything that JSON can hold, kept beside the model; see `read_record`.
        force: Whether an existing file may be replaced.

    Raises:
        ModelFileError: If the model holds what cannot be kept; names the module and the way out.
        OutputError: If the file cannot be written.
    """
    description, tensors = describe(model)
    rebuild.check(description)
    empty = next((key for key, tensor in tensors.items() if tensor.is_meta), None)
    if empty is not None:
        raise ModelFileError(f"cannot save {empty}: it is on the meta device and has no values")
    meta = {"input_shape": None if input_shape is None else list(input_shape), "arch": arch, "versions": _versions()}
    try:
        record_text = None if record is None else json.dumps(dict(record))
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"{path}: the record is not plain data ({error})") from error
    if input_shape is not None and any(spec.graphs for spec in description.modules):
        _check_traced(model, rebuild.rebuild(description, {key: t.clone() for key, t in tensors.items()}), input_shape)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "description": description.to_text(),
        "tensors": _compact(tensors),
        "meta": json.dumps(meta),
        "record": record_text,
    }
    with atomic_path(Path(path), force=force) as temporary:
        written = io.BytesIO()  # torch's own writer hides a full disk behind an obscure error
        torch.save(content, written)
        temporary.write_bytes(written.getbuffer())


def _check_traced(model: nn.Module, traced: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Compare copies of both in training and in evaluation mode.

    Raises:
        ModelFileError: If the model does not run on such inputs, or the outputs are not the same bits.
    """
    original = copy.deepcopy(model)
    like = next((t for t in model.parameters() if t.is_floating_point()), torch.empty(0))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        x = torch.randn(2, *input_shape, dtype=like.dtype).to(like.device)
        for training in (True, False):
            outputs = []
            for network in (original, traced.to(like.device)):
                torch.manual_seed(0)
                try:
                    outputs.append(tree_leaves(network.train(training)(x)))
                except Exception as error:
                    raise ModelFileError(
                        f"cannot save {type(model).__name__}: it does not run on random samples of "
                        f"shape {list(input_shape)} ({error})"
                    ) from error
            if len(outputs[0]) != len(outputs[1]) or not all(map(_equal, *outputs)):
                raise ModelFileError(
                    f"cannot save {type(model).__name__}: its trace computes something else in "
                    f"{'training' if training else 'evaluation'} mode; save its state_dict instead"
                )


def _equal(a: object, b: object) -> bool:
    return torch.allclose(a, b, 0, 0, equal_nan=True) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch-morph", "torch", "torchvision", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that are small parts of a storage nobody else in the file uses, so that the rest is not written."""
    users: dict[int, int] = {}
    for tensor in tensors.values():
        users[tensor.untyped_storage()._cdata] = users.get(tensor.untyped_storage()._cdata, 0) + 1
    return {
        key: t.clone() if users[t.untyped_storage()._cdata] == 1 and t.untyped_storage().nbytes() > t.nbytes else t
        for key, t in tensors.items()
    }


def is_own(content: object) -> bool:
    """Whether what an archive holds is one of our own files."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check_content(content: Mapping[str, Any]) -> None:
    """Check the version and the type of each field.

    Raises:
        ModelFileError: If one is not as written by `save_model`.
    """
    if type(content.get("version")) is not int or content["version"] > VERSION:
        raise ModelFileError(
            f"is of version {content.get('version')!r} of this format; version {VERSION} is the "
            "newest known here; update morph"
        )
    for name, kind in _FIELDS.items():
        if name not in content or not isinstance(content[name], kind):
            raise ModelFileError(f"is damaged: the field {name!r} is missing or of the wrong type")


def build(content: Mapping[str, Any], trust: Collection[str]) -> nn.Module:
    """Build the model of checked content; errors as `morph.files.rebuild.rebuild`."""
    return rebuild.rebuild(from_text(content["description"]), content["tensors"], trust)


def meta(content: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, str | None]:
    """Read the input shape and the name of the architecture.

    Raises:
        ModelFileError: If they are not what `save_model` writes.
    """
    found = read_json(content["meta"], "meta")
    shape, arch = found.get("input_shape"), found.get("arch")
    if shape is not None and not (
        isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) and math.prod(shape) < 2**40
    ):
        raise ModelFileError(f"is damaged: {shape!r} is not the shape of a sample")
    if arch is not None and not isinstance(arch, str):
        raise ModelFileError("is damaged: the name of the architecture is not text")
    return None if shape is None else tuple(shape), arch


def read_json(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ModelFileError: If it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"is damaged: its {what} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelFileError(f"is damaged: its {what} is not a JSON object")
    return found


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Put the name of the file before the text of every `ModelFileError` from the block."""
    try:
        yield
    except ModelFileError as error:
        raise type(error)(f"{source}: {error}") from error
