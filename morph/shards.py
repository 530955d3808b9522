"""Find safetensors checkpoints, in one file or several, and read what their headers say; no tensor is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from morph.errors import ModelFileError

INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its type in the format's own word, its shape, where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """A file and what its header says; tensors in the order of the file."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def find_checkpoint(source: Path) -> Path:
    """The ``.safetensors`` file or the index that ``source`` is or, if it is a folder, holds.

    Raises:
        ModelFileError: If there is none, or more than one.
    """
    if not source.is_dir():
        return source
    found = sorted(source.glob(f"*{INDEX}")) or sorted(source.glob("*.safetensors"))
    if len(found) != 1:
        raise ModelFileError(
            f"{source}: holds {len(found)} safetensors checkpoints ({', '.join(p.name for p in found[:3]) or 'none'}); "
            f"give one file, or the {INDEX.lstrip('.')} of one in several files"
        )
    return found[0]


def read_header(path: Path) -> Source:
    """Let the library check the file, then read where its tensors lie."""
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or 'no such file, or it cannot be read'}") from error
    except (SafetensorError, ValueError) as error:
        raise ModelFileError(f"{path}: damaged, cut short, or not a safetensors file ({error})") from error
    metadata = header.pop("__metadata__", None) or {}
    start = 8 + length
    entries = {
        name: Entry(item["dtype"], tuple(item["shape"]), *(start + offset for offset in item["data_offsets"]))
        for name, item in header.items()
    }
    order = sorted(entries, key=lambda name: (entries[name].start, entries[name].end))
    return Source(path, {name: entries[name] for name in order}, metadata)


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint in several files."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: not a JSON document ({error})") from error
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names or not all(map(_is_file_name, names.values())):
        raise ModelFileError(f"{path}: not the index of a checkpoint: weight_map must map tensors to files beside it")
    return {**value, "weight_map": names}


def files_of(place: Path, index: Mapping[str, Any]) -> list[Path]:
    """The files of a checkpoint, in the order in which its index names them."""
    return [place.parent / name for name in dict.fromkeys(index["weight_map"].values())]


def check_index(place: Path, index: Mapping[str, Any], sources: Sequence[Source]) -> None:
    """Refuse files that do not hold what the index says."""
    held = {source.path.name: source.entries for source in sources}
    missing = [name for name, file in index["weight_map"].items() if name not in held[file]]
    if missing:
        raise ModelFileError(
            f"{place}: {len(missing)} tensors are not in the files that it names for them ({', '.join(missing[:3])})"
        )


def _is_file_name(value: object) -> bool:
    """Whether ``value`` names a safetensors file and no path."""
    return isinstance(value, str) and value.endswith(".safetensors") and Path(value).name == value
