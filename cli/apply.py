"""`morph apply`: replay a record on a model, or on the tensors of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from morph.cli.model_arguments import add_model, input_shape_from, open_from
from morph.cli.output_arguments import add_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = """\
examples:
  morph apply teacher.json student.pt --out teacher.pt
  morph apply record.json model.safetensors --out new.safetensors     edit the tensors alone, one after another
  morph apply record.json folder/ --out new-folder                    the same for a checkpoint in several files

A .safetensors file without --arch is edited tensor by tensor: no model is built, so nothing is computed to compare."""
    parser.add_argument("record", type=Path, help="the record that a surgery wrote")
    add_model(parser, help="the model that the record was made for: a file or a name, or a safetensors checkpoint")
    add_output(parser, "the new model (default: NAME-applied.pt, or .safetensors, or a folder NAME-applied)")


def run(args: argparse.Namespace) -> int:
    """Run."""
    return _edit_tensors(args) if args.arch is None and _is_checkpoint(args.model) else _replay(args)


def _is_checkpoint(text: str) -> bool:
    """Whether the model is given as tensors alone."""
    return text.endswith((".safetensors", ".safetensors.index.json")) or Path(text).is_dir()


def _edit_tensors(args: argparse.Namespace) -> int:
    """Edit a checkpoint."""
    from morph.checkpoints import edit_checkpoint
    from morph.cli import console
    from morph.shards import find_checkpoint

    source = Path(args.model)
    place = find_checkpoint(source)
    stem, dot, suffix = place.name.partition(".safetensors")
    name = source.name if source.is_dir() else stem
    out = args.out or Path(f"{name}-applied{dot if suffix == '' else ''}")
    done = edit_checkpoint(args.record, place, out, force=args.force)
    if args.json:
        console.document(
            {
                "tensors": done.tensors,
                "edited": done.edited,
                "elements_before": done.elements_before,
                "elements_after": done.elements_after,
                "model_changes": list(done.model_changes),
                "verified": "not verified: no model was built",
                "written": [str(path) for path in done.files],
            }
        )
        return 0
    console.line(
        f"{done.edited} of {done.tensors} tensors edited: {done.elements_before:,} -> {done.elements_after:,} elements"
    )
    for change in done.model_changes:
        console.line(f"the model has to be built with {change}")
    for path in done.files:
        console.line(f"written: {path}")
    console.note("not verified: no model was built; with --arch NAME it is, and outputs are compared")
    return 0


def _replay(args: argparse.Namespace) -> int:
    """Replay on a model."""
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
