"""`morph expand`: grow a student into its teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import add_data, data_from
from morph.cli.model_arguments import add_model, open_from
from morph.cli.numbers import size
from morph.cli.output_arguments import add_output

if TYPE_CHECKING:
    from morph.files import OpenedModel
    from morph.policies import Step
    from morph.surgery import Result

EPILOG = """\
examples:
  morph expand zoo:darts-10-trained --fisher --target-params 1.4M
  morph expand student.pt --uniform --target-macs 120M --data images/ --out teacher.pt
  morph expand torchvision:resnext50_32x4d --fisher-per-param --target-params 40M --data images/ --dry-run --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, help="the student: a file or a name")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-params", type=size, metavar="SIZE", help="parameters wanted, e.g. 1.4M")
    target.add_argument("--target-macs", type=size, metavar="SIZE", help="multiply-adds of one sample wanted, e.g. 90M")
    policy = parser.add_mutually_exclusive_group()
    for name, text in (
        ("fisher", "highest Fisher score first, the next cell when that one is saturated (the default)"),
        ("fisher-per-param", "highest Fisher score per parameter that the step adds"),
        ("uniform", "one step for each cell in turn, from the first"),
        ("random", "cells drawn at random (--seed)"),
    ):
        policy.add_argument(f"--{name}", dest="policy", action="store_const", const=name, help=text)
    parser.set_defaults(policy="fisher")
    parser.add_argument(
        "--fit",
        choices=["first", "closest", "under"],
        default="first",
        help="stop at the first size not below the target, at the nearest, or at the last below it",
    )
    parser.add_argument(
        "--at",
        action="append",
        metavar="PATTERN",
        help="probe these modules or nodes (shell pattern; repeatable) instead of each repeated block",
    )
    parser.add_argument(
        "--reuse-scores", action="store_true", help="probe once, instead of a new batch before each step"
    )
    parser.add_argument(
        "--reinit", action="store_true", help="draw all weights afresh at the end: the untrained teacher"
    )
    add_data(parser)
    parser.add_argument("--seed", type=int, default=0, help="order of the images, --random, --reinit (default 0)")
    add_output(parser, "the teacher; beside it go the record (.json) and the picture (.svg) (default: NAME-teacher.pt)")
    parser.add_argument("--dry-run", action="store_true", help="decide and report, write nothing")


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli import console
    from morph.expansion import expand

    paths = _paths(args)
    opened = open_from(args)
    shape, classes = _expected(opened, args)
    data = data_from(args, input_shape=shape, num_classes=classes)
    with console.progress("expand", quiet=args.json) as advance:

        def on_step(step: Step) -> None:
            now, target = (step.params, args.target_params) if args.target_params else (step.macs, args.target_macs)
            advance(min(now, target), target, f"{step.cell}: {now:,}")

        result = expand(
            opened.model,
            data,
            policy=args.policy,
            target_params=args.target_params,
            target_macs=args.target_macs,
            fit=args.fit,
            at=args.at,
            reuse_scores=args.reuse_scores,
            reinit=args.reinit,
            batch_size=args.batch_size,
            seed=args.seed,
            on_step=on_step,
        )
    if not args.dry_run:
        _write(result, paths, opened, force=args.force)
    if args.json:
        console.document(result.record.to_json() | {"written": [] if args.dry_run else [str(path) for path in paths]})
        return 0
    _show(result.record.to_json())
    console.line("dry run: nothing written" if args.dry_run else "written: " + ", ".join(str(path) for path in paths))
    return 0


def _paths(args: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Teacher, record and picture; refused now if they could not be written later."""
    from morph.atomic import check_writable
    from morph.errors import OutputError

    name = Path(args.model.rpartition(":")[2]).stem if ":" in args.model else Path(args.model).stem
    teacher = args.out or Path(f"{name}-teacher.pt")
    paths = (teacher, teacher.with_suffix(".json"), teacher.with_suffix(".svg"))
    if len(set(paths)) < 3:
        raise OutputError(
            f"{teacher}: give a name that ends in .pt, since .json and .svg are taken by the record and the picture"
        )
    if not args.dry_run:
        for path in paths:
            check_writable(path, force=args.force)
    return paths


def _expected(opened: OpenedModel, args: argparse.Namespace) -> tuple[tuple[int, ...] | None, int | None]:
    """Shape of one sample and number of classes, as far as the model tells."""
    import torch

    from morph.tracing import evaluation, try_inputs

    shape = args.input or opened.input_shape
    if shape is None:
        return None, None
    sample = torch.zeros(2, *shape)
    try_inputs(opened.model, (sample,))
    with evaluation(opened.model), torch.no_grad():
        logits = opened.model(sample)
    return shape, logits.shape[1] if isinstance(logits, torch.Tensor) and logits.dim() == 2 else None


def _write(result: Result, paths: tuple[Path, Path, Path], opened: OpenedModel, *, force: bool) -> None:
    """Write teacher, record and picture: all of them or none."""
    from morph.atomic import atomic_path
    from morph.files import save_model
    from morph.picture import CellRow, expansion_picture

    record = result.record.to_json()
    shape = tuple(record["environment"]["input_shape"])
    rows = [
        CellRow(c["name"], c["score"], c["groups_before"], c["groups_after"], c["params_added"])
        for c in record["cells"]
    ]
    sizes = f"{record['params_before']:,} to {record['params_after']:,} parameters"
    title = f"{opened.source}: {sizes}, {record['options']['policy']}"
    teacher, sheet, picture = paths
    with (
        atomic_path(teacher, force=force) as one,
        atomic_path(sheet, force=force) as two,
        atomic_path(picture, force=force) as three,
    ):
        save_model(result.model, one, input_shape=shape, record=record, force=True)
        result.record.save(two, force=True)
        expansion_picture(rows, three, title=title, force=True)


def _show(record: dict[str, Any]) -> None:
    """Print the cells and the sums."""
    from morph.cli import console

    rows = []
    for cell in record["cells"]:
        before, after = cell["groups_before"], cell["groups_after"]
        groups = "-" if before is None else str(before) if before == after else f"{before} -> {after}"
        score = "-" if cell["score"] is None else f"{cell['score']:.3g}"
        rows.append((cell["name"], score, groups, f"+{cell['params_added']:,}" if cell["params_added"] else "-"))
    console.table("cells", ("cell", "Fisher score", "groups", "parameters"), rows)
    console.line()
    console.line(f"parameters     {record['params_before']:,} -> {record['params_after']:,}")
    console.line(
        f"multiply-adds  {record['macs_before']:,} -> {record['macs_after']:,}  (one sample; 1 multiply-add = 1)"
    )
    off = f"{record['distance']:+,} ({record['distance_relative']:+.2%})"
    console.line(f"target         {record['target']:,} {record['target_metric']}: off by {off}")
    console.line(f"steps          {len(record['steps'])}, {record['probe_passes']} probe passes")
    for check in record["checks"]:
        difference = f"max |difference| {check['max_abs_diff']:.2e}, relative {check['relative']:.1e}"
        limit = f"limit {check['limit']:.0e}, {check['dtype']}, {check['samples']} samples"
        console.line(f"check          {check['name']}: {difference} ({limit})")
    if record["options"]["reinit"]:
        console.line("weights        drawn afresh after the check")
    if record["left"]:
        first = record["left"][0]
        console.line(
            f"left whole     {len(record['left'])} grouped convolutions, e.g. {first['name']}: {first['reason']}"
        )
