"""The only file that prints. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text


def error(message: str) -> None:
    """One line on stderr that begins with ``morph:``."""
    sys.stderr.write("morph: " + " ".join(message.split()) + "\n")


def note(message: str) -> None:
    """One line on stderr that is not an error."""
    sys.stderr.write(message + "\n")


def line(message: str = "") -> None:
    """One line of result on stdout."""
    sys.stdout.write(message + "\n")


def document(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print a table: boxed on a terminal, plain aligned columns in a pipe; ``left`` columns are flush left."""
    if sys.stdout.isatty():
        drawn = Table(title=Text(title), title_justify="left")
        for i, name in enumerate(header):
            drawn.add_column(Text(name), justify="left" if i < left else "right", no_wrap=i >= left)
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    line(title)
    for row in [header, *rows]:
        cells = [
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        line("  ".join(cells).rstrip())


class Board(Protocol):
    """A table that is drawn again and again in the same place."""

    def __call__(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: str) -> None:
        """Draw it with these rows."""


@contextmanager
def board(*, quiet: bool = False) -> Iterator[Board]:
    """Show a table on stderr while the block runs, if stderr is a terminal; otherwise nothing."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda title, header, rows, footer: None
        return
    with Live(console=console, transient=True, auto_refresh=False) as live:

        def draw(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: str) -> None:
            drawn = Table(title=Text(title), caption=Text(footer), title_justify="left", caption_justify="left")
            for name in header:
                drawn.add_column(Text(name), no_wrap=True)
            for row in rows:
                drawn.add_row(*(Text(cell) for cell in row))
            live.update(drawn, refresh=True)

        yield draw


class Advance(Protocol):
    """Tells a progress display how far the work is."""

    def __call__(self, done: int, total: int, text: str) -> None:
        """``done`` of ``total`` steps are finished; ``text`` says what the present one is."""


@contextmanager
def progress(title: str, *, quiet: bool = False) -> Iterator[Advance]:
    """Show a progress bar on stderr while the block runs, if stderr is a terminal; otherwise nothing."""
    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as display:
        task = display.add_task(title, total=None, text="")

        def advance(done: int, total: int, text: str) -> None:
            display.update(task, completed=done, total=total, text=text)

        yield advance
