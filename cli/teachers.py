"""How the growth of a teacher is shown and drawn, move by move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.outputs import Draw
from morph.cli.summaries import show_checks, show_couplings, show_form, show_left, show_sizes

if TYPE_CHECKING:
    from morph.files import OpenedModel


def drawing(draw: Callable[[dict[str, Any], Path, str], None], opened: OpenedModel) -> Draw:
    """``draw`` with the name of the model."""
    return lambda record, path: draw(record, path, opened.source)


def draw_cells(record: dict[str, Any], path: Path, source: str) -> None:
    """Draw the picture of a regrouping."""
    from morph.picture import CellRow, expansion_picture

    rows = [
        CellRow(c["name"], c["score"], c["groups_before"], c["groups_after"], c["params_added"])
        for c in record["cells"]
    ]
    sizes = f"{record['params_before']:,} to {record['params_after']:,} parameters"
    expansion_picture(rows, path, title=f"{source}: {sizes}, {record['options']['policy']}", force=True)


def draw_units(record: dict[str, Any], path: Path, source: str) -> None:
    """Draw copied units; of a mixed growth, merged groups and the couplings that grew."""
    from morph.picture import UnitRow, units_picture

    merged = [row for row in record.get("cells", []) if row["groups_before"] != row["groups_after"]]
    rows = [UnitRow(f"{row['name']} groups", row["groups_before"], row["groups_after"], inverse=True) for row in merged]
    rows += [
        UnitRow(row["name"], row["units_before"], row["units_after"])
        for row in record["couplings"]
        if "cells" not in record or row["units_before"] != row["units_after"]
    ]
    sizes = f"{record['params_before']:,} to {record['params_after']:,} parameters"
    units_picture(rows, path, title=f"{source}: {sizes}", force=True)


def show_cells(record: dict[str, Any]) -> None:
    """Print the cells and the sums."""
    from morph.cli import console

    rows = []
    for cell in record["cells"]:
        before, after = cell["groups_before"], cell["groups_after"]
        groups = "-" if before is None else str(before) if before == after else f"{before} -> {after}"
        score = "-" if cell["score"] is None else f"{cell['score']:.3g}"
        rows.append((cell["name"], score, groups, f"+{cell['params_added']:,}" if cell["params_added"] else "-"))
    console.table("cells", ("cell", "Fisher score", "groups", "parameters"), rows)
    show_sizes(record)
    console.line(f"steps          {len(record['steps'])}, {record['probe_passes']} probe passes")
    show_checks(record)
    if record["options"]["reinit"]:
        console.line("weights        drawn afresh after the check")
    show_left(record["left"], "grouped convolutions")


def show_deeper(record: dict[str, Any]) -> None:
    """Print the stages and the sums."""
    from morph.cli import console

    if not record["weight_preserving"]:
        console.line(f"{record['student']} -> {record['architecture']}, {record['blocks_added']} blocks deeper")
        show_sizes(record)
        console.line(f"weights        fresh (seed {record['seed']}): not weight-preserving, no function was checked")
        return
    rows = []
    for stage in record["stages"]:
        before, after, added = stage["blocks_before"], stage["blocks_after"], stage["params_added"]
        blocks = str(before) if before == after else f"{before} -> {after}"
        rows.append((stage["name"], blocks, f"+{added:,}" if added else "-"))
    console.table("blocks that can be copied", ("stage", "blocks", "parameters"), rows)
    show_sizes(record)
    show_checks(record)
    zeroed = next(unit["zeroed"] for unit in record["units"] if unit["copies"])
    console.line(f"zero at first  in each copy the tensors that end its branch, e.g. {', '.join(zeroed)}")
    if record["left"]:
        first = record["left"][0]
        console.line(f"not copied     {len(record['left'])} blocks, e.g. {first['name']}: {first['reason']}")


def show_wider(record: dict[str, Any]) -> None:
    """Print the couplings and the sums."""
    from morph.cli import console

    show_couplings("couplings", record["couplings"])
    show_sizes(record)
    show_form(record)
    show_checks(record)
    if record["options"]["noise"]:
        console.line("noise          on the weights that make the copies: the function is kept but for that")
    show_left(record["left"], "couplings")


def show_grown(record: dict[str, Any]) -> None:
    """Print what grew by either move."""
    from morph.cli import console

    rows = []
    for name in dict.fromkeys((step["move"], step["name"]) for step in record["steps"]):
        steps = [step for step in record["steps"] if (step["move"], step["name"]) == name]
        added = sum(step["added"] for step in steps)
        first, last = (f"{step['gain'] / max(step['added'], 1):.2g}" for step in (steps[0], steps[-1]))
        rows.append((*name, str(len(steps)), f"+{added:,}", first, last))
    metric = record["target_metric"]
    header = ("move", "cell or coupling", "steps", metric, f"gain per {metric[:-1]}, first", "last")
    console.table("growth", header, rows, left=2)
    changed = [row for row in record["couplings"] if row["units_before"] != row["units_after"]]
    if changed:
        console.line()
        show_couplings(f"wider couplings ({len(changed)} of {len(record['couplings'])})", changed)
    show_sizes(record)
    console.line("gain           Fisher score of what grows, in the unit of the loss; not a promise of training")
    show_form(record)
    show_checks(record)
    show_left(record["left"], "convolutions and couplings")
