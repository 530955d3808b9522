"""`morph apply`: replay a record on a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from morph.cli.model_arguments import add_model, input_shape_from, open_from
from morph.cli.output_arguments import add_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = "example:\n  morph apply teacher.json student.pt --out teacher.pt"
    parser.add_argument("record", type=Path, help="the record that a surgery wrote")
    add_model(parser, help="the model that the record was made for: a file or a name")
    add_output(parser, "the new model (default: NAME-applied.pt)")


def run(args: argparse.Namespace) -> int:
    """Run."""
    import torch

    from morph.atomic import check_writable
    from morph.cli import console
    from morph.files import save_model
    from morph.plan import load_plan
    from morph.surgery import replay

    out = args.out or Path(f"{Path(args.model.rpartition(':')[2]).stem}-applied.pt")
    check_writable(out, force=args.force)
    plan = load_plan(args.record)
    opened = open_from(args)
    shape = input_shape_from(args, opened)
    inputs = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    result = replay(opened.model, plan, inputs)
    record = result.record.to_json()
    save_model(result.model, out, input_shape=shape, record=record, force=args.force)
    if args.json:
        console.document(record | {"written": [str(out)]})
        return 0
    console.line(
        f"{len(plan.edits)} edits applied: {record['params_before']:,} -> {record['params_after']:,} parameters, "
        f"{record['macs_before']:,} -> {record['macs_after']:,} multiply-adds"
    )
    for check in record["checks"]:
        console.line(
            f"check: {check['name']}: max |difference| {check['max_abs_diff']:.2e}, relative {check['relative']:.1e} "
            f"(random inputs, float64)"
        )
    console.line(f"written: {out}")
    return 0
