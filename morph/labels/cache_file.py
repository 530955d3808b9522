"""The file of a cache: rows of bytes behind a header, each with its checksum; read without running any code.

The first eight bytes say what it is, the next eight how long the header is (little-endian), the next 32 are the SHA-256
of the header, which is JSON; all other bytes are the rows. The header of a finished file has the SHA-256 of the rows.
A file that is being made ends in ``.part``, has the header without that, and is only appended to.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from morph.atomic import atomic_path
from morph.errors import CacheError, OutputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

Rows = NDArray[np.uint8]
MAGIC = b"MORPHCA1"
_LONGEST = 1 << 16  # bytes of a header
_CHUNK = 1 << 22
_TEXTS = ("kind", "dtype", "teacher", "data", "rows")
_KINDS = {("labels", True), ("logits", False)}  # and whether their rows are bits


@dataclass(frozen=True)
class Header:
    """What a cache holds, and of what.

    Attributes:
        kind: ``labels`` or ``logits``.
        samples: Number of rows.
        row_bytes: Bytes of each.
        classes: Number of classes.
        channels: Channels of each class; 1 for logits.
        dtype: ``bits``, ``float16`` or ``float32``.
        threshold: Where a vote counts, for labels; 0 for logits.
        batch_size: Samples that the teacher saw at once.
        teacher: Digest of the teacher's weights.
        data: Fingerprint of the images and labels.
        rows: SHA-256 of the rows; empty while they are being made.
    """

    kind: str
    samples: int
    row_bytes: int
    classes: int
    channels: int
    dtype: str
    threshold: float
    batch_size: int
    teacher: str
    data: str
    rows: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _TEXTS:
                good = isinstance(value, str)
            elif field.name == "threshold":
                good = type(value) in (int, float) and 0 <= value <= 1
            else:
                good = type(value) is int and 0 <= value < 2**48
            if not good:
                raise CacheError(f"{field.name} cannot be {value!r}")
        bits = -(-self.classes * self.channels // 8)
        width = {"bits": bits, "float16": 2 * self.classes, "float32": 4 * self.classes}.get(self.dtype)
        if width != self.row_bytes or not width or (self.kind, self.dtype == "bits") not in _KINDS:
            raise CacheError(f"rows of {self.row_bytes} bytes do not hold {self.kind} of {self.dtype}")

    def to_bytes(self) -> bytes:
        """The beginning of the file."""
        text = json.dumps(dataclasses.asdict(self)).encode()
        return MAGIC + len(text).to_bytes(8, "little") + hashlib.sha256(text).digest() + text


def read_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header; afterwards the file is where the rows begin.

    Raises:
        CacheError: If it is none.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise CacheError(f"{path}: not a cache of labels or logits; give a file that morph wrote")
    length = int.from_bytes(file.read(8), "little")
    digest, text = file.read(32), file.read(min(length, _LONGEST))
    if length > _LONGEST or hashlib.sha256(text).digest() != digest:
        raise CacheError(f"{path}: its header is damaged; make it again under another name")
    try:
        return Header(**json.loads(text))
    except (ValueError, TypeError, CacheError) as error:
        raise CacheError(f"{path}: its header is not one that this version knows ({error})") from error


def read(path: Path) -> tuple[Header, Rows]:
    """Read a finished cache and check it: ``[samples, row_bytes]``.

    Raises:
        CacheError: If it is missing, unreadable, truncated or damaged; the file stays as it is.
    """
    try:
        with path.open("rb") as file:
            header = read_header(file, path)
            content = file.read()
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}; give a cache of labels or logits") from error
    expected = header.samples * header.row_bytes
    if len(content) != expected:
        raise CacheError(
            f"{path}: {'truncated' if len(content) < expected else 'damaged'}: it has {len(content):,} bytes of rows, "
            f"its header says {expected:,}; make it again under another name"
        )
    if hashlib.sha256(content).hexdigest() != header.rows:
        raise CacheError(f"{path}: its rows are damaged (their checksum differs); make it again under another name")
    return header, np.frombuffer(content, np.uint8).reshape(header.samples, header.row_bytes)


def part_of(path: Path) -> Path:
    """Where the rows are collected before the file is whole."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def appending(path: Path, header: Header) -> Iterator[tuple[BinaryIO, int]]:
    """Open the unfinished file of a cache, a new one or that of a run which was killed.

    Yields:
        The file, at its end, and how many rows it has: a whole number of batches, the rest is cut off.

    Raises:
        CacheError: If there is one of another teacher, data or setting; it stays as it is.
        OutputError: If it cannot be written; what it has stays.
    """
    part = part_of(path)
    try:
        with part.open("r+b" if part.exists() else "w+b") as file:
            _lock(file, part)
            begin = header.to_bytes()
            if part.stat().st_size < len(begin) and begin.startswith(file.read()):  # new, or killed while it began
                file.seek(0)
                file.write(begin)
            file.seek(0)
            present = read_header(file, part)
            require_same(present, header, part, "remove it to begin anew")
            rows = (part.stat().st_size - len(begin)) // header.row_bytes
            done = header.samples if rows >= header.samples else rows // header.batch_size * header.batch_size
            file.truncate(len(begin) + done * header.row_bytes)
            file.seek(0, 2)
            yield file, done
    except OSError as error:
        raise OutputError(f"{part}: not written: {error.strerror or error}; what is in it stays") from error


def _lock(file: BinaryIO, part: Path) -> None:
    """Keep other processes from appending to the same file, where the system can; the lock ends with the process.

    Raises:
        CacheError: If another process does.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CacheError(f"{part}: another process is writing it; wait for that, or give another name") from error


def finish(path: Path, header: Header, *, force: bool) -> None:
    """Write the finished file, whole or not at all, and remove the unfinished one.

    Raises:
        OutputError: If it cannot be written.
    """
    part = part_of(path)
    digest = hashlib.sha256()
    with part.open("rb") as rows:
        read_header(rows, part)
        start = rows.tell()
        while chunk := rows.read(_CHUNK):
            digest.update(chunk)
        rows.seek(start)
        with atomic_path(path, force=force) as temporary, temporary.open("wb") as file:
            file.write(dataclasses.replace(header, rows=digest.hexdigest()).to_bytes())
            while chunk := rows.read(_CHUNK):
                file.write(chunk)
    part.unlink()


def require_same(present: Header, wanted: Header, path: Path, way_out: str) -> None:
    """Refuse a cache of something else.

    Raises:
        CacheError: If it is; names what differs.
    """
    differing = [
        (name, a, b)
        for name, a in dataclasses.asdict(present).items()
        if (b := getattr(wanted, name)) != a and name not in ("rows", "batch_size")
    ]
    if present.batch_size != wanted.batch_size and not present.rows:
        differing.append(("batch_size", present.batch_size, wanted.batch_size))
    if differing:
        name, a, b = differing[0]
        raise CacheError(f"{path}: is of {_other(name)}: {name} is {a}, expected {b}; {way_out}")


def _other(name: str) -> str:
    return {"teacher": "another teacher", "data": "other data"}.get(name, "another setting")
