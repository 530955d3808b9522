"""Where a study is kept: a journal file, a database, or a server that many machines reach. Optuna does the work."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from morph.errors import StorageError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.storages.journal._file import BaseJournalFileLock

_PACKAGES = ("optuna", "sqlalchemy", "grpc")  # whose errors say that a storage is gone
_SERVER_WAIT = 20  # seconds
_WITH_TIMEOUT = ("psycopg", "psycopg2", "pymysql", "mysqldb")  # drivers that take this number
_GRPC_PORT = 13000  # Optuna's own


def require_packages() -> None:
    """See that Optuna and SciPy are there.

    Raises:
        StorageError: If one is not; says how to get it.
    """
    for name in ("optuna", "scipy"):
        try:
            found = importlib.util.find_spec(name) is not None
        except ValueError:  # what Python says of a module that was set to None
            found = False
        if not found:
            raise StorageError(f"a search over families needs {name}, not installed; pip install torch-morph[search]")


@contextmanager
def quiet() -> Iterator[None]:
    """Let Optuna say nothing of what it does, and of what it calls experimental; its settings are put back."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def lost_is_said() -> Iterator[None]:
    """Turn what a storage that is gone, or a full disk, raises inside the block into one clear error.

    Raises:
        StorageError: Then.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _PACKAGES and not isinstance(error, OSError):
            raise
        raise StorageError(
            f"the storage of the study, or a file of the search, could not be read or written: {_first_line(error)}; "
            "what was written is kept, and the same command goes on from it"
        ) from error


def open_storage(where: str) -> BaseStorage:
    """Open the place of a study, made where it is a file or database that is not there.

    Args:
        where: Path of a journal file; or the URL of a database as SQLAlchemy has it, such as ``postgresql://HOST/NAME``
            or ``sqlite:///FILE``; or ``grpc://HOST:PORT`` for Optuna's own server.

    Raises:
        StorageError: If it cannot be reached or read, or a package for it is missing.
    """
    require_packages()
    with quiet(), reached(where):
        if "://" not in where:
            return _journal(Path(where))
        return _server(where) if where.startswith("grpc://") else _database(where)


def look_into(where: str) -> BaseStorage | None:
    """Open a storage as `open_storage` does, but make nothing where there is none yet: None then. Errors as there."""
    require_packages()
    with quiet(), reached(where):
        if where.startswith("grpc://"):
            return _server(where)
        if "://" in where:
            return _database(where) if _has_tables(where) else None
        path = Path(where)
        _require_place(path)
        return _journal(path, mend=False) if path.exists() else None


@contextmanager
def reached(where: str) -> Iterator[None]:
    """Say clearly what is wrong where a storage cannot be opened or read.

    Raises:
        StorageError: Then.
    """
    try:
        yield
    except StorageError:
        raise
    except ImportError as error:
        inner = error.__cause__ or error.__context__  # Optuna's own words do not say which package
        name = error.name or (inner.name if isinstance(inner, ImportError) else None) or "a package"
        raise StorageError(f"{_shown(where)}: needs {name}, not installed; pip install it") from error
    except Exception as error:  # whatever the database raises
        raise StorageError(f"{_shown(where)}: not reachable: {_first_line(error)}") from error


def _shown(where: str) -> str:
    """The place without a password."""
    scheme, slashes, rest = where.partition("://")
    secret, at, host = rest.rpartition("@")
    return f"{scheme}{slashes}{secret.partition(':')[0]}{at}{host}"


def _first_line(error: BaseException) -> str:
    details = getattr(error, "details", None)  # of gRPC, whose errors begin with a line that says nothing
    text = str(details() if callable(details) else error).strip()
    return (text or type(error).__name__).splitlines()[0]


class _Lock:
    """A lock on the journal itself. That of a process that dies is gone, where Optuna's own stays for half a minute."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.handle = -1

    def acquire(self) -> bool:
        """Wait for it."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(handle, fcntl.LOCK_EX)
        self.handle = handle
        return True

    def release(self) -> None:
        """Let it go."""
        os.close(self.handle)


def _journal(path: Path, *, mend: bool = True) -> BaseStorage:
    """A file that operations are added to; ``mend`` takes half an operation at its end away."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    _require_place(path)
    lock = _Lock(path)
    if mend:
        lock.acquire()
        try:
            _drop_half_a_line(path)
        finally:
            lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), cast("BaseJournalFileLock", lock)))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: not the journal of a study: {_first_line(error)}") from error


def _require_place(path: Path) -> None:
    """See that a journal is, or could be, there."""
    if not path.parent.is_dir():
        raise StorageError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; give the name of a file")


def _drop_half_a_line(path: Path) -> None:
    """Take away what a writer that was killed, or had no space, left of its last operation; nobody has read it."""
    with path.open("rb+") as file:
        if not file.seek(0, os.SEEK_END):
            return
        file.seek(-1, os.SEEK_END)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        content = file.read()
        if not content.startswith(b"{"):
            raise StorageError(f"{path}: not the journal of a study")
        file.truncate(content.rfind(b"\n") + 1)


def _database(url: str) -> BaseStorage:
    from optuna.storages import RDBStorage

    return RDBStorage(url, engine_kwargs=_engine_options(url))


def _engine_options(url: str) -> dict[str, Any]:
    """A connection that broke while a network was trained is opened anew, and none is waited for without end."""
    from sqlalchemy import make_url

    options: dict[str, Any] = {"pool_pre_ping": True}
    parts = make_url(url)
    if parts.get_driver_name() in _WITH_TIMEOUT and "connect_timeout" not in parts.query:
        options["connect_args"] = {"connect_timeout": _SERVER_WAIT}
    return options


def _has_tables(url: str) -> bool:
    """Whether a database holds anything of Optuna's; it must be there, but for a file that could be made."""
    from sqlalchemy import create_engine, inspect, make_url

    parts = make_url(url)
    if parts.get_backend_name() == "sqlite" and parts.database and not Path(parts.database).exists():
        folder = Path(parts.database).absolute().parent
        if not folder.is_dir():
            raise StorageError(f"{url}: the folder {folder} does not exist")
        return False
    engine = create_engine(url, **_engine_options(url))
    try:
        return inspect(engine).has_table("studies")
    finally:
        engine.dispose()


def _server(where: str) -> BaseStorage:
    from optuna.storages import GrpcStorageProxy

    host, _, port = where.removeprefix("grpc://").partition(":")
    if port and not port.isdigit():
        raise StorageError(f"{where}: give grpc://HOST:PORT")
    proxy = GrpcStorageProxy(host=host, port=int(port or _GRPC_PORT))
    proxy.wait_server_ready(timeout=_SERVER_WAIT)
    return proxy
