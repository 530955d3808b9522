"""Read files without running anything that they hold: what kind they are, and their content as plain data."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import serialization

from morph.errors import ModelFileError, UnsafeFileError
from morph.files import names
from morph.files.pickles import stand_in


def kind_of(path: Path) -> str:
    """What the bytes look like: ``archive`` (torch.save), ``legacy``, ``torchscript``, ``export`` or ``safetensors``.

    Raises:
        ModelFileError: If it is missing, unreadable, empty, truncated or none of these; says which.
    """
    if path.is_dir():
        raise ModelFileError("is a folder; give the name of a model file")
    if not path.exists():
        raise ModelFileError(
            "there is no such file; to name a model instead, write zoo:NAME, torchvision:NAME, "
            "timm:NAME or package.module:callable"
        )
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise ModelFileError(f"cannot be read: {error.strerror}") from error
    if not start:
        raise ModelFileError("is empty")
    if start[:2] == b"PK":
        return _kind_of_zip(path)
    if path.suffix == ".safetensors":
        return "safetensors"
    if start[:1] == b"\x80":
        return "legacy"
    raise ModelFileError(
        "is neither a torch archive, a pickle, a safetensors file nor an exported program"
        + ("; it looks like text" if _is_text(start) else "")
    )


def _is_text(start: bytes) -> bool:
    return all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start)


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as file:
            inside = [name.partition("/")[2] for name in file.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelFileError(f"is truncated or damaged ({error})") from error
    if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
        return "torchscript"
    if "archive_format" in inside or any(name.startswith("models/") for name in inside):
        return "export"
    if "data.pkl" in inside:
        return "archive"
    raise ModelFileError("is a zip archive, but not one of torch.save or torch.export.save")


def read_archive(path: Path, trust: Collection[str]) -> Any:
    """Read an archive of torch.save as plain data and tensors; instances of classes become inert stand-ins.

    Raises:
        UnsafeFileError: If it names a class or function that is neither known nor trusted; names it.
        ModelFileError: If it is damaged.
    """
    with _only({}):
        try:
            wanted = sorted(serialization.get_unsafe_globals_in_checkpoint(str(path)))
        except Exception as error:  # whatever a damaged pickle makes the reader raise
            raise ModelFileError(f"is damaged, or holds what no safe reader accepts ({_first_line(error)})") from error
    for name in wanted:
        _check_global(name, trust)
    with _only({name: stand_in(name) for name in wanted}):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or hostile pickle makes the reader raise
            raise ModelFileError(f"is damaged, or holds what no safe reader accepts ({_first_line(error)})") from error


@contextmanager
def _only(stand_ins: Mapping[str, type]) -> Iterator[None]:
    """Let the unpickler find these in place of what they name, and forget meanwhile what else was declared safe."""
    before = serialization.get_safe_globals()
    serialization.clear_safe_globals()
    serialization.add_safe_globals([(made, name) for name, made in stand_ins.items()])
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(before)


def _check_global(name: str, trust: Collection[str]) -> None:
    public = names.function_alias(name)
    if name == "functools.partial" or names.is_trusted(name, trust):
        return
    try:
        names.check_name(public, trust, value=False)
    except UnsafeFileError:
        names.check_name(public, trust, value=True)


def read_legacy(path: Path) -> Any:
    """Read the format before torch 1.6, if there is nothing but tensors and plain data; errors as `read_archive`."""
    try:
        with _only({}):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle makes the reader raise
        name = str(error).partition("GLOBAL ")[2].partition(" ")[0]
        if name:
            raise UnsafeFileError(
                f"is a pickle in the old, non-zip format that wants {name}; nothing was run; "
                "from this format only a state_dict opens safely; use --allow-code to run whatever "
                "the file holds"
            ) from error
        raise ModelFileError(
            f"is a pickle in the old, non-zip format, and damaged or not of torch.save ({_first_line(error)})"
        ) from error


def read_with_code(path: Path) -> Any:
    """Unpickle without restraint, because the user said so.

    Raises:
        ModelFileError: If that fails.
    """
    try:
        with names.working_folder_importable():
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ModelFileError(f"cannot be unpickled: {type(error).__name__}: {_first_line(error)}") from error


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file.

    Raises:
        ModelFileError: If it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"is not a whole safetensors file ({_first_line(error)})") from error
    return tensors


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
