"""Open a model from a name or a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from morph.errors import ModelFileError, UnsafeFileError
from morph.files import arch as archs
from morph.files import archive, own, pickles, rebuild, weights


@dataclass(frozen=True)
class OpenedModel:
    """A model and where it came from.

    Attributes:
        model: The model, on the CPU.
        source: What the user gave.
        kind: ``zoo``, ``torchvision``, ``timm``, ``callable``, ``morph file``, ``pickled module``, ``state_dict`` or
            ``exported program``.
        arch: The name it was built from, where known.
        input_shape: Shape of one sample without the batch axis, e.g. ``(3, 32, 32)``, where known.
    """

    model: nn.Module
    source: str
    kind: str
    arch: str | None
    input_shape: tuple[int, ...] | None


def open_model(
    source: str | Path,
    *,
    arch: str | None = None,
    trust: Sequence[str] = (),
    allow_code: bool = False,
) -> OpenedModel:
    """Open a model. Nothing that a file holds is run unless the user says so.

    Args:
        source: ``zoo:NAME``, ``torchvision:NAME``, ``timm:NAME`` or ``package.module:callable`` (fresh weights; the
            last runs the user's own code), or a file: our own, a pickled module, a state_dict, an exported program.
        arch: For a state_dict, the name of the architecture.
        trust: Dotted names of classes, or of packages, in a pickled module that the user accepts beside those of
            torch.nn, torchvision, timm and the zoo. They are imported.
        allow_code: Whether a file that would run code is opened nevertheless.

    Raises:
        ModelFileError: If there is no such model or file, or the file is damaged or not a model; says which.
        UnsafeFileError: If it would run code; names what it wants and the flag that accepts it.
    """
    text = str(source)
    if isinstance(source, str) and not Path(text).exists() and archs.is_name(text):
        if arch is not None:
            raise ModelFileError(f"{text}: is a name already; --arch is for files that hold a state_dict")
        model, kind, shape = archs.build(text)
        return OpenedModel(model, text, kind, text, shape)
    with own.naming(text):
        return _open_file(Path(text), text, arch, trust, allow_code)


def read_record(path: str | Path) -> dict[str, Any] | None:
    """Read the record that `save_model` kept in one of our own files.

    Raises:
        ModelFileError: If it is not one of our own files.
    """
    with own.naming(path):
        content: Any = archive.read_archive(Path(path), ()) if archive.kind_of(Path(path)) == "archive" else None
        if not own.is_own(content):
            raise ModelFileError("is not a file written by morph, so it has no record")
        own.check_content(content)
        return None if content["record"] is None else own.read_json(content["record"], "record")


def _open_file(path: Path, text: str, arch: str | None, trust: Sequence[str], allow_code: bool) -> OpenedModel:
    kind = archive.kind_of(path)
    if kind == "torchscript":
        raise ModelFileError(
            "is a TorchScript archive, which holds code instead of modules; save the model that it "
            "was made from, or its state_dict"
        )
    if kind == "export":
        return _open_exported(path, text, allow_code)
    try:
        return _open_content(_read(path, kind, trust), text, arch, trust)
    except UnsafeFileError:
        if not allow_code or kind == "safetensors":
            raise
    return _open_content(archive.read_with_code(path), text, arch, trust)


def _read(path: Path, kind: str, trust: Sequence[str]) -> Any:
    if kind == "archive":
        return archive.read_archive(path, trust)
    return archive.read_legacy(path) if kind == "legacy" else archive.read_safetensors(path)


def _open_content(content: Any, text: str, arch: str | None, trust: Sequence[str]) -> OpenedModel:
    tensors = weights.find_state_dict(content)
    if tensors is not None and not own.is_own(content):
        return _open_weights(tensors, text, arch)
    if arch is not None:
        raise ModelFileError("does not hold a state_dict, for which --arch is meant; leave --arch out")
    if own.is_own(content):
        own.check_content(content)
        shape, known_arch = own.meta(content)
        return OpenedModel(own.build(content, trust), text, "morph file", known_arch, shape)
    if pickles.is_module(content):
        content = rebuild.rebuild(*pickles.describe_pickle(content), trust)
        if any(t.is_meta for t in content.state_dict().values()):
            raise ModelFileError("holds a model on the meta device, without values")
    if isinstance(content, nn.Module):
        return OpenedModel(content, text, "pickled module", None, None)
    inside = (
        f"a dictionary with the keys {', '.join(map(str, list(content)[:5]))}"
        if isinstance(content, dict)
        else (f"a {content.dotted if isinstance(content, pickles.StandIn) else type(content).__name__}")
    )
    raise ModelFileError(f"holds {inside}, not a model or a state_dict")


def _open_weights(tensors: dict[str, torch.Tensor], text: str, arch: str | None) -> OpenedModel:
    if arch is None:
        raise ModelFileError(
            f"holds a state_dict of {len(tensors)} tensors; say what it belongs to with --arch "
            "zoo:NAME, torchvision:NAME, timm:NAME or package.module:callable"
        )
    if not archs.is_name(arch):
        raise ModelFileError(
            f"--arch {arch} is not a name; write zoo:NAME, torchvision:NAME, timm:NAME or package.module:callable"
        )
    model, _, shape = archs.build(arch)
    weights.load_weights(model, tensors, arch)
    return OpenedModel(model, text, "state_dict", arch, shape)


def _open_exported(path: Path, text: str, allow_code: bool) -> OpenedModel:
    if not allow_code:
        raise UnsafeFileError(
            "is an exported program, whose loader can run code that the file holds; nothing was run; "
            "use --allow-code if you trust it"
        )
    try:
        program = torch.export.load(path)
        model: nn.Module = program.module()
    except Exception as error:  # whatever the loader raises
        raise ModelFileError(f"cannot be opened as an exported program: {type(error).__name__}: {error}") from error
    examples: Sequence[object] = program.example_inputs[0] if program.example_inputs else ()
    shapes = [tuple(x.shape[1:]) for x in examples if isinstance(x, torch.Tensor)]
    return OpenedModel(model, text, "exported program", None, shapes[0] if len(shapes) == 1 else None)
