"""What a surgery writes: the model, its record and, where there is one, a picture; all of them or none."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from morph.surgery import Result

Draw = Callable[[dict[str, Any], Path], None]


def paths_from(args: argparse.Namespace, label: str, beside: tuple[str, ...]) -> tuple[Path, ...]:
    """Where the model goes (``NAME-label.pt`` by default), and what stands beside it, by suffix.

    Raises:
        OutputError: Now, if one of them could not be written later.
    """
    from morph.atomic import check_writable
    from morph.errors import OutputError

    name = Path(args.model.rpartition(":")[2]).stem if ":" in args.model else Path(args.model).stem
    model = args.out or Path(f"{name}-{label}.pt")
    paths = (model, *(model.with_suffix(suffix) for suffix in beside))
    if len(set(paths)) < len(paths):
        taken = ".json and .svg are taken by the record and the picture"
        taken = taken if ".svg" in beside else ".json is taken by the record"
        raise OutputError(f"{model}: give a name that ends in .pt, since {taken}")
    if not args.dry_run:
        for path in paths:
            check_writable(path, force=args.force)
    return paths


def with_facts(
    result: Result, details: Mapping[str, Any] | None = None, environment: Mapping[str, Any] | None = None
) -> Result:
    """The result with more in its record."""
    record = result.record
    record = dataclasses.replace(
        record,
        details={**record.details, **(details or {})},
        environment={**record.environment, **(environment or {})},
    )
    return dataclasses.replace(result, record=record)


def target_facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """How far a record's sizes are from the target among its options; nothing if there was none."""
    from morph import surgery

    for metric in ("params", "macs"):
        target = record["options"].get(f"target_{metric}")
        if target is not None:
            return surgery.target_facts(metric, target, record[f"{metric}_after"])
    return {}


def finish(
    args: argparse.Namespace,
    result: Result,
    paths: tuple[Path, ...],
    show: Callable[[dict[str, Any]], None],
    draw: Draw | None = None,
) -> int:
    """Write unless ``--dry-run``, then report."""
    from morph.cli import console

    if not args.dry_run:
        write_files(result, paths, draw, force=args.force)
    record = result.record.to_json()
    if args.json:
        console.document(record | {"written": [] if args.dry_run else [str(path) for path in paths]})
        return 0
    show(record)
    console.line("dry run: nothing written" if args.dry_run else "written: " + ", ".join(str(path) for path in paths))
    return 0


def write_files(result: Result, paths: tuple[Path, ...], draw: Draw | None, *, force: bool) -> None:
    """Write model, record and (where there is a path for it) picture: all of them or none."""
    from morph.atomic import atomic_path
    from morph.files import save_model

    record = result.record.to_json()
    shape = tuple(record["environment"]["input_shape"])
    with ExitStack() as files:
        model, sheet, *pictures = [files.enter_context(atomic_path(path, force=force)) for path in paths]
        save_model(result.model, model, input_shape=shape, arch=record.get("architecture"), record=record, force=True)
        result.record.save(sheet, force=True)
        for path in pictures:
            assert draw is not None
            draw(record, path)
