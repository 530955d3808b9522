"""Edit the tensors of safetensors files by a plan, one after another: the model is not built, the file not loaded.

The format: eight bytes with the length of the header, the header (JSON: for each tensor its type, shape and place, and
text about the file), and the tensors without gaps. All sizes after the edits are known from the header and the plan,
so the new header is written first and then each tensor, some rows at a time.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from morph.atomic import atomic_path, write_text
from morph.errors import CheckFailedError, EditError, OutputError, PlanMismatchError
from morph.plan import (
    DRAWING,
    Deepen,
    DropBranch,
    FreeAttention,
    Plan,
    Regroup,
    Reroute,
    Resize,
    SetAttribute,
    SetConfig,
    SetConstant,
    SplitAt,
    UseGraph,
    load_plan,
)
from morph.shards import INDEX, Entry, Source, check_index, files_of, find_checkpoint, read_header, read_index
from morph.tensor_edits import Fitting, Shape, TensorEdit, edit_tensor, shape_after, tensor_of

NOTE = "morph"  # the key of the note that an edited file carries
_CHUNK = 1 << 22  # bytes in memory at a time, where a tensor can be taken apart


@dataclass(frozen=True)
class EditedCheckpoint:
    """What was written.

    Attributes:
        files: The files, the index of a checkpoint in several files last.
        tensors: How many tensors they hold.
        edited: How many of them were edited.
        elements_before: Elements of all tensors before.
        elements_after: The same after.
        model_changes: Edits of the plan that concern the code or options of the model and no tensor, in words; the
            model has to be built that way to take the new tensors.
    """

    files: tuple[Path, ...]
    tensors: int
    edited: int
    elements_before: int
    elements_after: int
    model_changes: tuple[str, ...]


def edit_checkpoint(plan: Plan | Path, source: Path, out: Path, *, force: bool = False) -> EditedCheckpoint:
    """Write a copy of a checkpoint whose tensors are edited by a plan. Types, order and metadata stay.

    Tensors that the plan does not name are copied byte by byte. The metadata get a note of the plan under ``morph``.
    Memory in use is that of one tensor at most, mostly less. Other files that lie beside the checkpoint, such as a
    configuration with the sizes of the model, are not copied, since they no longer fit.

    Tied weights stand in a file once; where the plan names one by another name, the name must be in the file's
    metadata, where `safetensors.torch.save_model` puts it.

    Args:
        plan: A plan, or the file of a record.
        source: A ``.safetensors`` file; or the index of a checkpoint in several files, or its folder.
        out: A file; for a checkpoint in several files, a folder that does not exist.
        force: Whether an existing file may be replaced; a folder never is.

    Returns:
        What was written.

    Raises:
        ModelFileError: If the checkpoint is missing or damaged.
        PlanMismatchError: If the plan cannot be read, was made for another model, or was applied already.
        EditError: If an edit needs the model or cannot be exact on these tensors.
        OutputError: If the result cannot be written.
        CheckFailedError: If the file written is not whole.
    """
    edits = load_plan(plan) if isinstance(plan, Path) else plan
    place = find_checkpoint(source)
    index = read_index(place) if place.name.endswith(INDEX) else None
    sources = [read_header(path) for path in (files_of(place, index) if index is not None else [place])]
    if index is not None:
        check_index(place, index, sources)
    by_tensor = _assign(edits, sources)
    note = _note(edits, sources)
    if index is None:
        _write_file(sources[0], by_tensor, note, out, force=force)
        files = [out]
    else:
        files = _write_folder(place, index, sources, by_tensor, note, out)
    entries = {name: entry for part in sources for name, entry in part.entries.items()}
    return EditedCheckpoint(
        files=tuple(files),
        tensors=len(entries),
        edited=len(by_tensor),
        elements_before=sum(prod(entry.shape) for entry in entries.values()),
        elements_after=sum(prod(_final(entry.shape, by_tensor.get(name, ()))) for name, entry in entries.items()),
        model_changes=_model_changes(edits),
    )


def _assign(plan: Plan, sources: Sequence[Source]) -> dict[str, list[TensorEdit]]:
    """The edits of each tensor, by its name in the files; refuses what does not fit."""
    needing = {type(e).__name__.lower() for e in plan.edits if isinstance(e, Deepen | DropBranch | DRAWING)}
    if needing:
        raise EditError(
            f"edits of the kind {', '.join(sorted(needing))} make new weights and need the model: open the file as one "
            f"(--arch NAME)"
        )
    entries = {name: entry for source in sources for name, entry in source.entries.items()}
    aliases = {name: kept for source in sources for name, kept in source.metadata.items() if kept in entries}
    edits = [edit for edit in plan.edits if isinstance(edit, Resize | Regroup)]
    named = {tensor_of(edit) for edit in edits}
    fitting = Fitting()
    shapes: dict[str, Shape | None] = {name: entry.shape for name, entry in entries.items()}
    result: dict[str, list[TensorEdit]] = {}
    for edit in edits:
        name = tensor_of(edit)
        kept = aliases.get(name, name) if name not in entries else name
        if kept != name and kept in named:
            continue  # the plan has the same edit under the name that the file has
        shapes[kept] = fitting.step(kept, shapes.get(kept), edit)
        result.setdefault(kept, []).append(edit)
    fitting.require("checkpoint")
    for name, some in result.items():
        _check_type(name, entries[name], some)
    return result


def _check_type(name: str, entry: Entry, edits: Sequence[TensorEdit]) -> None:
    """Refuse what the type of a tensor does not allow."""
    if entry.end - entry.start < prod(entry.shape):
        raise EditError(f"{name}: is of type {entry.dtype}, several numbers in a byte, and cannot be edited")
    if not entry.dtype.startswith(("F", "BF")) and any(isinstance(edit, Resize) and edit.scale for edit in edits):
        raise EditError(f"{name}: is of type {entry.dtype}, and a factor on it would not be exact")


def _note(plan: Plan, sources: Sequence[Source]) -> str:
    """What the new files say of their making: plans by the hash of their JSON, oldest first."""
    digest = hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest()
    before = sources[0].metadata.get(NOTE, "")
    if digest in before:
        raise PlanMismatchError(f"{sources[0].path}: says that this plan was applied to it already")
    return f"{before}{'; ' if before else ''}{len(plan.edits)} edits of the plan with sha256 {digest}"


def _write_folder(
    place: Path,
    index: Mapping[str, Any],
    sources: Sequence[Source],
    by_tensor: Mapping[str, Sequence[TensorEdit]],
    note: str,
    out: Path,
) -> list[Path]:
    """Write a checkpoint in several files into a folder that takes its name when all is there."""
    if out.exists():
        raise OutputError(f"{out}: exists already; a checkpoint in several files needs the name of a new folder")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: the folder {out.parent} does not exist")
    names = [source.path.name for source in sources]
    size = 0
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as parent:
            folder = Path(parent) / out.name
            folder.mkdir()
            for source in sources:
                size += _write_file(source, by_tensor, note, folder / source.path.name, force=False)
            facts = {**(index.get("metadata") or {}), "total_size": size}
            facts.pop("total_parameters", None)
            write_text(folder / place.name, json.dumps({**index, "metadata": facts}, indent=2) + "\n")
            folder.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: not written: {error.strerror or error}") from error
    return [out / name for name in [*names, place.name]]


def _write_file(
    source: Source, by_tensor: Mapping[str, Sequence[TensorEdit]], note: str, out: Path, *, force: bool
) -> int:
    """Write one file; returns the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {**source.metadata, NOTE: note}}
    at = 0
    for name, entry in source.entries.items():
        shape, old = _final(entry.shape, by_tensor.get(name, ())), prod(entry.shape)
        size = (entry.end - entry.start) * prod(shape) // old if old else 0
        header[name] = {"dtype": entry.dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(out, force=force) as temporary:
        with source.path.open("rb") as reader, temporary.open("wb") as writer:
            writer.write(len(text).to_bytes(8, "little") + text)
            for name, entry in source.entries.items():
                if name in by_tensor:
                    _write_edited(source.path, name, by_tensor[name], writer)
                else:
                    _copy(reader, entry, writer)
        _check(temporary, out)
    return at


def _check(temporary: Path, out: Path) -> None:
    """Let the library check the file that was written: no gaps, nothing missing."""
    try:
        with safe_open(temporary, "pt"):
            pass
    except SafetensorError as error:
        raise CheckFailedError(f"{out}: the new file is not whole ({error}); it was not kept") from error


def _copy(reader: BinaryIO, entry: Entry, writer: BinaryIO) -> None:
    reader.seek(entry.start)
    for start in range(entry.start, entry.end, _CHUNK):
        writer.write(reader.read(min(_CHUNK, entry.end - start)))


def _write_edited(path: Path, name: str, edits: Sequence[TensorEdit], writer: BinaryIO) -> None:
    """Write one edited tensor. The file is opened for this tensor alone, so that no more of it stays in memory."""
    with safe_open(path, "pt") as file:
        for part in _parts(file.get_tensor(name), edits):
            flat = part.contiguous().reshape(-1)
            writer.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


def _parts(tensor: Tensor, edits: Sequence[TensorEdit]) -> Iterator[Tensor]:
    """The edited tensor, some rows at a time where the rows can be made one by one."""
    resizes = [edit for edit in edits if isinstance(edit, Resize)]
    if len({edit.axis for edit in resizes}) < len(edits):
        for edit in edits:
            tensor = edit_tensor(tensor, edit)
        yield tensor
        return
    rows = next((edit for edit in resizes if edit.axis == 0), Resize("", 0, len(tensor), tuple(range(len(tensor)))))
    others = [edit for edit in resizes if edit.axis != 0]
    width = max(1, prod(tensor.shape[1:]), prod(_final(tuple(tensor.shape), others)[1:])) * 8
    step = max(1, _CHUNK // width)
    for start in range(0, len(rows.index), step):
        some = replace(rows, index=rows.index[start : start + step], scale=rows.scale[start : start + step])
        part = edit_tensor(tensor, some)
        for edit in others:
            part = edit_tensor(part, edit)
        yield part


def _final(shape: Shape, edits: Sequence[TensorEdit]) -> Shape:
    """Shape after edits that fit."""
    for edit in edits:
        after = shape_after(shape, edit)
        assert after is not None
        shape = after
    return shape


def _model_changes(plan: Plan) -> tuple[str, ...]:
    """The edits that concern no tensor, in words."""
    sizes = [f"{e.module}.{e.attribute}: {e.value} -> {e.new}" for e in plan.edits if isinstance(e, SetAttribute)]
    sizes += [f"config.{e.setting}: {e.value} -> {e.new}" for e in plan.edits if isinstance(e, SetConfig)]
    sizes += [
        f"{e.module}: {e.num_heads} heads of {e.head_dim} -> {e.to} of {e.sizes}, as one of free sizes"
        for e in plan.edits
        if isinstance(e, FreeAttention)
    ]
    constants = sum(isinstance(e, SetConstant | SplitAt) for e in plan.edits)
    if any(isinstance(e, UseGraph) for e in plan.edits):
        text = f"the traced graph in place of the class, {constants} constants in it changed"
        parts = sum(isinstance(e, Reroute) for e in plan.edits)
        sizes.append(text + (f", {parts} of its nodes reading parts of others" if parts else ""))
    return tuple(sizes)
