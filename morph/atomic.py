"""Files are written whole or not at all."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from morph.errors import OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system: what a killed process left behind stays
    fcntl = None  # type: ignore[assignment]


def check_writable(path: Path, *, force: bool = False) -> None:
    """Refuse early what could not be written later.

    Raises:
        OutputError: If ``path`` exists and ``force`` is false, is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if path.exists() and not force:
        raise OutputError(f"{path}: exists already; give another name, or --force to replace it")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"{path}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: the folder {folder} is not writable")


@contextmanager
def atomic_path(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary file beside ``path`` that takes its name when the block ends well, and vanishes otherwise.

    The temporary file keeps the suffix of ``path``, so writers that look at suffixes work on it. One that a killed
    process left behind vanishes when the same ``path`` is written again.

    Args:
        path: Where the result shall stand.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: As `check_writable`, or if the disk is full or fails while the block writes.
    """
    check_writable(path, force=force)
    mask = os.umask(0)
    os.umask(mask)
    prefix = f".{path.stem}.morph-"
    _remove_orphans(path.parent, prefix, path.suffix)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
    locked = _lock(handle)
    if not locked:
        os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: not written: {error.strerror or error}") from error
    except OutputError as error:  # of a writer that is itself careful about its file, here the temporary one
        raise OutputError(str(error).replace(str(temporary), str(path))) from error
    finally:
        temporary.unlink(missing_ok=True)
        if locked:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file until it is closed or its process ends, however that ends; false where this cannot be done."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_orphans(folder: Path, prefix: str, suffix: str) -> None:
    """Remove temporary files whose process was killed: those that nobody holds a lock on."""
    for orphan in folder.glob(f"{glob.escape(prefix)}*{glob.escape(suffix)}"):
        try:
            handle = os.open(orphan, os.O_RDWR)
        except OSError:  # gone by now, or not ours
            continue
        if _lock(handle):
            orphan.unlink(missing_ok=True)
        os.close(handle)


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Write ``text`` in UTF-8, whole or not at all; errors as `atomic_path`."""
    with atomic_path(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
