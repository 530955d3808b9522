"""Files are written whole or not at all."""

from __future__ import annotations

import errno

import pytest

from morph.atomic import atomic_path, check_writable, write_text
from morph.errors import OutputError


def test_it_writes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "x"
    assert path.stat().st_mode & 0o600 == 0o600


def test_a_file_that_exists_is_kept_without_force(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OutputError, match="exists already; give another name, or --force to replace it"):
        write_text(path, "new")
    assert path.read_text() == "old"
    write_text(path, "new", force=True)
    assert path.read_text() == "new"


def test_an_error_in_the_middle_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="half"), atomic_path(path, force=True) as temporary:
        temporary.write_text("ha")
        raise ValueError("half")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_full_disk_is_one_line_and_costs_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with (
        pytest.raises(OutputError, match=r"a.txt: not written: No space left on device"),
        atomic_path(path, force=True) as temporary,
    ):
        temporary.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="is a folder; give the name of a file"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match=r"the folder .*none does not exist"):
        check_writable(tmp_path / "none" / "a.txt")
