"""`morph report`: count parameters and multiply-adds."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from morph.cli.model_arguments import add_model, input_shape_from, open_from
from morph.cli.output_arguments import add_output

if TYPE_CHECKING:
    from morph.counts import Counts
    from morph.files import OpenedModel
    from morph.report import Report

FORMATS = ("table", "markdown", "csv", "json")
SUFFIXES = {".md": "markdown", ".csv": "csv", ".json": "json"}

EPILOG = """\
examples:
  morph report torchvision:resnet50
  morph report student.pt teacher.pt --depth 3
  morph report zoo:darts-10 --depth 0 --out counts.csv"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser)
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second model, set beside the first by module path")
    parser.add_argument(
        "--depth", type=_depth, default=2, metavar="N", help="levels of the module tree to show, 0 for all (default 2)"
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="default: a table, or in a file what its suffix says (else markdown)"
    )
    add_output(parser, "write the report to this file instead")


def run(args: argparse.Namespace) -> int:
    """Count, then print or write."""
    from morph.atomic import check_writable, write_text
    from morph.cli import console
    from morph.report import Report

    form = _format(args)
    if args.out:
        check_writable(args.out, force=args.force)
    opened = open_from(args)
    shape = input_shape_from(args, opened)
    one = _count(opened, shape)
    other, names = None, (opened.source, "")
    if args.other:
        beside = open_from(args, "other")
        other = _count(beside, args.input or beside.input_shape or shape)
        names = (opened.source, beside.source)
    report = Report(one, other, names, args.depth)
    if args.out:
        write_text(args.out, _text(report, form), force=args.force)
        console.note(f"written: {args.out}")
    elif form == "table":
        console.table(_title(report), report.header, report.cells, left=1 if other else 2)
        for note in report.notes():
            console.line(note)
    else:
        console.line(_text(report, form).rstrip("\n"))
    return 0


def _format(args: argparse.Namespace) -> str:
    """Settle what ``--json``, ``--format`` and the suffix of ``--out`` ask for."""
    from morph.errors import OutputError

    form = "json" if args.json else args.format
    if args.out is None:
        return form or "table"
    if form == "table":
        raise OutputError(f"{args.out}: a table is for the terminal; write --format markdown, csv or json")
    return form or SUFFIXES.get(args.out.suffix.lower(), "markdown")


def _text(report: Report, form: str) -> str:
    return {"markdown": report.to_markdown, "csv": report.to_csv, "json": report.to_json}[form]()


def _title(report: Report) -> str:
    return " and ".join(name for name in report.names if name)


def _count(opened: OpenedModel, shape: tuple[int, ...]) -> Counts:
    import torch

    from morph.counts import count

    kinds = [p.dtype for p in opened.model.parameters() if p.is_floating_point()]
    return count(opened.model, torch.zeros(1, *shape, dtype=kinds[0] if kinds else None))


def _depth(text: str) -> int:
    """Read the number of levels.

    Raises:
        argparse.ArgumentTypeError: If it is not a whole number from 0 on.
    """
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no depth; give 0 for all levels, or a number of levels")
    return int(text)
