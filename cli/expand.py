"""`morph expand`: grow a student into its teacher."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import add_data, data_from, positive
from morph.cli.model_arguments import add_model, input_shape_from, open_from
from morph.cli.numbers import size
from morph.cli.output_arguments import add_output

if TYPE_CHECKING:
    from morph.depth_policies import DepthPolicy
    from morph.files import OpenedModel
    from morph.policies import Step
    from morph.surgery import Result

EPILOG = """\
examples:
  morph expand zoo:darts-10-trained --fisher --target-params 1.4M
  morph expand student.pt --uniform --target-macs 120M --data images/ --out teacher.pt
  morph expand torchvision:resnext50_32x4d --fisher-per-param --target-params 40M --data images/ --dry-run --json
  morph expand torchvision:resnet18 --move deepen --target-params 15M --out deeper.pt
  morph expand zoo:wrn-16-2 --move deepen --blocks 3

moves:
  regroup  merge the groups of grouped convolutions (needs labelled images; the default)
  deepen   insert copies of residual blocks that add exactly zero (needs no images, but for --fisher); a DARTS or
           DenseNet of the zoo, which has none, becomes the deeper one of its family with fresh weights"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, help="the student: a file or a name")
    parser.add_argument("--move", choices=list(MOVES), default="regroup", help="how it grows (default regroup)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-params", type=size, metavar="SIZE", help="parameters wanted, e.g. 1.4M")
    target.add_argument("--target-macs", type=size, metavar="SIZE", help="multiply-adds of one sample wanted, e.g. 90M")
    target.add_argument("--blocks", type=positive, metavar="N", help="blocks to insert (deepen)")
    policy = parser.add_mutually_exclusive_group()
    for name, text in (
        (
            "fisher",
            "highest Fisher score first, the next cell when that one is saturated (the default of regroup); deepen: "
            "copies in proportion to the scores",
        ),
        ("fisher-per-param", "highest Fisher score per parameter that the step adds (regroup)"),
        ("uniform", "one step for each cell in turn, from the first; deepen (its default): for each stage"),
        ("random", "cells drawn at random (--seed; regroup)"),
    ):
        policy.add_argument(f"--{name}", dest="policy", action="store_const", const=name, help=text)
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
        help="probe these modules or nodes (shell pattern; repeatable) instead of each repeated block; "
        "deepen: copy only these blocks",
    )
    parser.add_argument(
        "--reuse-scores", action="store_true", help="probe once, instead of a new batch before each step (regroup)"
    )
    parser.add_argument(
        "--reinit", action="store_true", help="draw all weights afresh at the end: the untrained teacher (regroup)"
    )
    add_data(parser)
    parser.add_argument("--seed", type=int, default=0, help="order of the images, --random, --reinit (default 0)")
    add_output(
        parser,
        "the teacher; beside it go the record (.json) and, from regroup, the picture (.svg) (default: NAME-teacher.pt)",
    )
    parser.add_argument("--dry-run", action="store_true", help="decide and report, write nothing")


def run(args: argparse.Namespace) -> int:
    """Run."""
    return MOVES[args.move](args)


def _regroup(args: argparse.Namespace) -> int:
    """Merge the groups of grouped convolutions."""
    from morph.cli import console
    from morph.expansion import expand

    _refuse_unread(args, {"blocks": "--blocks"})
    paths = _paths(args, (".json", ".svg"))
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
            policy=args.policy or "fisher",
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
    return _finish(args, result, paths, opened, _show)


def _deepen(args: argparse.Namespace) -> int:
    """Insert copies of residual blocks; where there can be none, take the deeper network of the family."""
    import torch

    from morph.cli import console
    from morph.deepening import deepen
    from morph.depth_scaling import can_scale_depth, scale_depth

    _refuse_unread(args, {"reuse_scores": "--reuse-scores", "reinit": "--reinit"})
    if args.policy in ("fisher-per-param", "random"):
        raise _wrong_option(args, f"--{args.policy}")
    if args.policy != "fisher":
        _refuse_unread(args, {"data": "--data"}, " without --fisher")
    paths = _paths(args, (".json",))
    opened = open_from(args)
    shape = input_shape_from(args, opened)
    inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(args.seed))
    goal = {"target_params": args.target_params, "target_macs": args.target_macs, "blocks": args.blocks}
    if can_scale_depth(opened.arch):
        if args.policy == "fisher" or args.at:
            raise _wrong_option(args, "--fisher" if args.policy == "fisher" else "--at", f" for {opened.arch}")
        note = "has no residual blocks to copy; its teacher is the deeper network of its family, with fresh weights"
        console.note(f"note: {opened.source} {note}")
        result = scale_depth(opened.model, opened.arch or "", inputs, fit=args.fit, seed=args.seed, **goal)
        return _finish(args, result, paths, opened, _show_deeper)
    data = None
    if args.policy == "fisher":
        _, classes = _expected(opened, args)
        images = data_from(args, input_shape=shape, num_classes=classes)
        data = next(images.batches(args.batch_size, args.seed))
    policy: DepthPolicy = "fisher" if args.policy == "fisher" else "uniform"
    result = deepen(opened.model, inputs, fit=args.fit, policy=policy, data=data, at=args.at, seed=args.seed, **goal)
    return _finish(args, result, paths, opened, _show_deeper)


MOVES: dict[str, Callable[[argparse.Namespace], int]] = {"regroup": _regroup, "deepen": _deepen}


def _refuse_unread(args: argparse.Namespace, options: dict[str, str], when: str = "") -> None:
    """Refuse options that the chosen move would not read."""
    for name, flag in options.items():
        if getattr(args, name):
            raise _wrong_option(args, flag, when)


def _wrong_option(args: argparse.Namespace, flag: str, when: str = "") -> Exception:
    from morph.errors import TargetError

    return TargetError(f"{flag} means nothing to --move {args.move}{when}; leave it out, or see `morph expand --help`")


def _finish(
    args: argparse.Namespace,
    result: Result,
    paths: tuple[Path, ...],
    opened: OpenedModel,
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Write, and report."""
    from morph.cli import console

    if not args.dry_run:
        _write(result, paths, opened, force=args.force)
    record = result.record.to_json()
    if args.json:
        console.document(record | {"written": [] if args.dry_run else [str(path) for path in paths]})
        return 0
    show(record)
    console.line("dry run: nothing written" if args.dry_run else "written: " + ", ".join(str(path) for path in paths))
    return 0


def _paths(args: argparse.Namespace, beside: tuple[str, ...]) -> tuple[Path, ...]:
    """Teacher, and what goes beside it: record and picture; refused now if they could not be written later."""
    from morph.atomic import check_writable
    from morph.errors import OutputError

    name = Path(args.model.rpartition(":")[2]).stem if ":" in args.model else Path(args.model).stem
    teacher = args.out or Path(f"{name}-teacher.pt")
    paths = (teacher, *(teacher.with_suffix(suffix) for suffix in beside))
    if len(set(paths)) < len(paths):
        taken = ".json and .svg are taken by the record and the picture"
        taken = taken if ".svg" in beside else ".json is taken by the record"
        raise OutputError(f"{teacher}: give a name that ends in .pt, since {taken}")
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


def _write(result: Result, paths: tuple[Path, ...], opened: OpenedModel, *, force: bool) -> None:
    """Write teacher, record and (where there is a path for it) picture: all of them or none."""
    from morph.atomic import atomic_path
    from morph.files import save_model

    record = result.record.to_json()
    shape = tuple(record["environment"]["input_shape"])
    with ExitStack() as files:
        teacher, sheet, *picture = [files.enter_context(atomic_path(path, force=force)) for path in paths]
        save_model(result.model, teacher, input_shape=shape, arch=record.get("architecture"), record=record, force=True)
        result.record.save(sheet, force=True)
        for path in picture:
            _draw(record, path, opened.source)


def _draw(record: dict[str, Any], path: Path, source: str) -> None:
    """Draw the picture of a regrouping."""
    from morph.picture import CellRow, expansion_picture

    rows = [
        CellRow(c["name"], c["score"], c["groups_before"], c["groups_after"], c["params_added"])
        for c in record["cells"]
    ]
    sizes = f"{record['params_before']:,} to {record['params_after']:,} parameters"
    expansion_picture(rows, path, title=f"{source}: {sizes}, {record['options']['policy']}", force=True)


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
    _show_sizes(record)
    console.line(f"steps          {len(record['steps'])}, {record['probe_passes']} probe passes")
    _show_checks(record)
    if record["options"]["reinit"]:
        console.line("weights        drawn afresh after the check")
    if record["left"]:
        first = record["left"][0]
        console.line(
            f"left whole     {len(record['left'])} grouped convolutions, e.g. {first['name']}: {first['reason']}"
        )


def _show_deeper(record: dict[str, Any]) -> None:
    """Print the stages and the sums."""
    from morph.cli import console

    if not record["weight_preserving"]:
        console.line(f"{record['student']} -> {record['architecture']}, {record['blocks_added']} blocks deeper")
        _show_sizes(record)
        console.line(f"weights        fresh (seed {record['seed']}): not weight-preserving, no function was checked")
        return
    rows = []
    for stage in record["stages"]:
        before, after, added = stage["blocks_before"], stage["blocks_after"], stage["params_added"]
        blocks = str(before) if before == after else f"{before} -> {after}"
        rows.append((stage["name"], blocks, f"+{added:,}" if added else "-"))
    console.table("blocks that can be copied", ("stage", "blocks", "parameters"), rows)
    _show_sizes(record)
    _show_checks(record)
    zeroed = next(unit["zeroed"] for unit in record["units"] if unit["copies"])
    console.line(f"zero at first  in each copy the tensors that end its branch, e.g. {', '.join(zeroed)}")
    if record["left"]:
        first = record["left"][0]
        console.line(f"not copied     {len(record['left'])} blocks, e.g. {first['name']}: {first['reason']}")


def _show_sizes(record: dict[str, Any]) -> None:
    """Print the sizes and the distance from the target."""
    from morph.cli import console

    console.line()
    console.line(f"parameters     {record['params_before']:,} -> {record['params_after']:,}")
    console.line(
        f"multiply-adds  {record['macs_before']:,} -> {record['macs_after']:,}  (one sample; 1 multiply-add = 1)"
    )
    off = f"{record['distance']:+,} ({record['distance_relative']:+.2%})"
    console.line(f"target         {record['target']:,} {record['target_metric']}: off by {off}")


def _show_checks(record: dict[str, Any]) -> None:
    """Print what was verified."""
    from morph.cli import console

    for check in record["checks"]:
        difference = f"max |difference| {check['max_abs_diff']:.2e}, relative {check['relative']:.1e}"
        limit = f"limit {check['limit']:.0e}, {check['dtype']}, {check['samples']} samples"
        console.line(f"check          {check['name']}: {difference} ({limit})")
