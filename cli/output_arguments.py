"""The arguments by which a command says where its results go."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--out``, ``--force`` and ``--json``."""
    parser.add_argument("--out", type=Path, metavar="FILE", help=what)
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
