"""The command `morph draw`: draw a model, block by block."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.model_arguments import add_model, input_shape_from, open_from
from morph.cli.output_arguments import add_output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from morph.blocks import Cell
    from morph.tracing import Trace

EPILOG = """\
Formats, by the suffix of --out: .svg, .png, .pdf (these need Graphviz), .dot (needs no program).

examples:
  morph draw zoo:darts-10 --out darts.svg
  morph draw torchvision:resnet50 --out resnet.png --at 'layer?.*.conv2'
  morph draw student.pt --record teacher.json --out growth.svg"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser)
    parser.add_argument(
        "--at",
        action="append",
        metavar="PATTERN",
        help="boxes are these modules or nodes (shell pattern; repeatable) instead of each repeated block",
    )
    parser.add_argument(
        "--record",
        type=Path,
        metavar="FILE",
        help="record of `morph expand`: colour its cells by score and say how they grew",
    )
    add_output(parser, "the picture (default: NAME.svg)")


def run(args: argparse.Namespace) -> int:
    """Draw."""
    from morph.atomic import check_writable
    from morph.cli import console
    from morph.drawing import picture_format, render

    path: Path = args.out or _default_name(args.model)
    picture_format(path)
    check_writable(path, force=args.force)
    rows = _rows(args.record) if args.record else []
    graph = _graph(args, rows)
    render(graph, path, value_name="Fisher score", force=args.force)
    if args.json:
        numbers = {"vertices": graph.number_of_nodes(), "edges": graph.number_of_edges()}
        console.document({"schema": 1, "out": str(path), **numbers})
    else:
        console.line(f"written: {path} ({graph.number_of_nodes()} boxes, {graph.number_of_edges()} edges)")
    return 0


def _default_name(model: str) -> Path:
    return Path(Path(model.rpartition(":")[2]).stem + ".svg")


def _graph(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Any:
    import torch

    from morph.drawing import block_graph
    from morph.tracing import trace

    opened = open_from(args)
    dtype = next((p.dtype for p in opened.model.parameters() if p.is_floating_point()), None)
    traced = trace(opened.model, torch.zeros(2, *input_shape_from(args, opened), dtype=dtype))
    values = {row["name"]: float(row["score"]) for row in rows if row["score"] is not None}
    notes = {row["name"]: _growth(row) for row in rows if row["groups_before"] != row["groups_after"]}
    return block_graph(traced, _cells(traced, args, rows), values=values, notes=notes)


def _cells(traced: Trace, args: argparse.Namespace, rows: list[dict[str, Any]]) -> Sequence[Cell] | None:
    """The cells of ``--at``, else those of the record, else None for each repeated block.

    Raises:
        PlanMismatchError: If the record names a cell that the drawn model does not have.
    """
    import glob

    from morph.blocks import find_cells
    from morph.errors import PlanMismatchError

    names = [row["name"] for row in rows]
    for name in names:
        if name not in traced.outputs and name not in traced.shapes:
            raise PlanMismatchError(f"{args.record}: its cell {name} is not in {args.model}; give the model it is of")
    if not args.at and not names:
        return None
    cells = find_cells(traced, args.at or [glob.escape(name) for name in names])
    missing = set(names) - {cell.name for cell in cells}
    if missing:
        raise PlanMismatchError(f"{args.record}: its cell {min(missing)} is not drawn with this --at; leave --at away")
    return cells


def _growth(row: dict[str, Any]) -> str:
    return f"groups {row['groups_before']} → {row['groups_after']}"


def _rows(path: Path) -> list[dict[str, Any]]:
    """Read the cells of a record.

    Raises:
        PlanMismatchError: If the file is missing, is not JSON, or has no cells in it.
    """
    import json

    from morph.errors import PlanMismatchError

    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanMismatchError(f"{path}: {error.strerror}; give a record written by morph expand") from error
    except ValueError as error:
        raise PlanMismatchError(f"{path}: not JSON ({error}); give a record written by morph expand") from error
    rows = value.get("cells") if isinstance(value, dict) else None
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise PlanMismatchError(f"{path}: has no cells with scores and groups; give a record written by morph expand")
    return rows


def _is_row(row: Any) -> bool:
    """Whether a cell of a record has the form that is drawn."""
    number, whole = (int, float, type(None)), (int, type(None))
    return (
        isinstance(row, dict)
        and isinstance(row.get("name"), str)
        and isinstance(row.get("score", ""), number)
        and isinstance(row.get("groups_before", ""), whole)
        and isinstance(row.get("groups_after", ""), whole)
    )
