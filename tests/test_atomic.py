"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import subprocess
import sys

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


WRITER = """
import sys
from pathlib import Path
from morph.atomic import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "a[1].txt"
    (tmp_path / ".a[1].txt").write_text("the user's own")
    (tmp_path / ".b.morph-12345678.txt").write_text("of another file")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdin=-1, stdout=-1) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        (half,) = set(tmp_path.glob(".a*")) - {tmp_path / ".a[1].txt"}
        write_text(path, "whole")
        assert half.read_text() == "half"  # its process lives
        writer.kill()
    assert half.exists()
    write_text(path, "again", force=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        ".a[1].txt": "the user's own",
        ".b.morph-12345678.txt": "of another file",
        "a[1].txt": "again",
    }


def test_places_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match="is a folder; give the name of a file"):
        check_writable(tmp_path)
    with pytest.raises(OutputError, match=r"the folder .*none does not exist"):
        check_writable(tmp_path / "none" / "a.txt")
