"""`morph train`: train a model on labelled images, without a teacher."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import positive
from morph.cli.model_arguments import add_model, expected_from, open_from
from morph.cli.outputs import paths_from
from morph.cli.running import PROCESSES, draw_afresh, fabric_from, interrupted
from morph.cli.training_arguments import add_training, options_from
from morph.cli.training_data import training_data

if TYPE_CHECKING:
    from morph.files import OpenedModel
    from morph.inputs import Inputs
    from morph.plan import Plan

EPILOG = f"""\
examples:
  morph train zoo:wrn-16-2 --data cifar/ --augment --nesterov --out wrn.pt
  morph train student.pt --data images/ --schedule cosine --epochs 30 --keep best --out trained.pt
  morph train zoo:wrn-10-1 --epochs 1                                   on the sample inside, to try it

Stopped or killed, the same command goes on from its state, and ends with the same weights.

{PROCESSES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser)
    parser.add_argument("--fresh", action="store_true", help="begin with weights drawn afresh, by seed")
    parser.add_argument(
        "--label-smoothing",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of each label that is spread over all classes (default %(default)s)",
    )
    group = parser.add_argument_group(
        "multi-channel labels",
        "A head in the place of the classifier: one filter for each class over the last feature map, whose positions "
        "are the class's channels; sigmoids vote, and their sum is the output. For `morph distill --multi-channel`.",
    )
    group.add_argument("--label-channels", type=positive, metavar="N", help="channels of each class, e.g. 16 or 36")
    group.add_argument("--label-kernel", type=positive, default=6, metavar="N", help="side (default %(default)s)")
    group.add_argument("--label-stride", type=positive, default=2, metavar="N", help="stride (default %(default)s)")
    add_training(parser, "the trained model (default: NAME-trained.pt)")


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli.training_results import choose_weights, details_of, make_result, measure, scores_of, write
    from morph.cli.training_runs import augmented, check_files, loggers_from, train
    from morph.search_checkpoint import seed_everything
    from morph.teaching.objective import Labels
    from morph.training.evaluation import check_fit

    options_from(args)
    paths = paths_from(args, "trained", (".json", ".svg"))
    files = check_files(args, paths[0])
    fabric = fabric_from(args, loggers_from(args))
    seed_everything(args.seed)
    opened = open_model(args)
    shape, classes = expected_from(args, opened)
    images, validation = training_data(args, input_shape=shape, num_classes=classes)
    sample = check_fit(opened.model, images, args.batch_size)
    opened, plan = put_label_head(args, opened, sample)
    objective = Labels(opened.model, label_smoothing=args.label_smoothing)
    before = measure(opened.model, validation, fabric)
    if args.dry_run:
        return _dry_run(args, opened, sample, images, validation)
    smoothing = {"label_smoothing": args.label_smoothing}
    try:
        fitted = train(args, objective, augmented(args, images), validation, fabric, files, identity=smoothing)
    except KeyboardInterrupt:
        return int(interrupted(args, files[0]))
    choose_weights(args, opened.model, fitted)
    scores = {"scores_before": scores_of(before), "scores_after": scores_of(measure(opened.model, validation, fabric))}
    if not args.speaks:
        return 0
    details = {**scores, **details_of(args, fitted, files[1], paths[0]), "architecture": opened.arch}
    result = make_result(args, opened.model, sample, images, validation, details, smoothing, plan)
    code = write(args, result, fitted, paths, f"{opened.source}: {args.epochs} rounds on {images.source}")
    files[0].unlink(missing_ok=True)
    return int(code)


def open_model(args: argparse.Namespace) -> OpenedModel:
    """The model, with fresh weights if asked for."""
    opened: OpenedModel = open_from(args)
    if args.fresh:
        draw_afresh(args, opened.model)
    return opened


def put_label_head(args: argparse.Namespace, opened: OpenedModel, sample: Inputs) -> tuple[OpenedModel, Plan | None]:
    """The model with a head for multi-channel labels if asked for, and how it got it.

    Raises:
        HeadError: If it cannot have one of these numbers.
    """
    from morph.label_surgery import put_label_head

    if args.label_channels is None:
        return opened, None
    numbers = {"channels": args.label_channels, "kernel": args.label_kernel, "stride": args.label_stride}
    result = put_label_head(opened.model, sample, **numbers, seed=args.seed)
    return dataclasses.replace(opened, model=result.model, arch=None), result.record.plan


def _dry_run(args: argparse.Namespace, opened: OpenedModel, sample: Any, images: Any, validation: Any) -> int:
    """Say what would be trained, and on what."""
    from morph.batches import round_length
    from morph.cli import console
    from morph.counts import count

    if not args.speaks:
        return 0
    counts = count(opened.model, sample[:1])
    steps = round_length(images, args.batch_size) * args.epochs
    facts = {"params": counts.params, "macs": counts.macs, "images": len(images), "steps": steps}
    facts |= {"validation_images": 0 if validation is None else len(validation)}
    if args.json:
        console.document({"schema": 1, "command": args.command, **facts, "written": []})
        return 0
    console.line(f"parameters     {counts.params:,}")
    console.line(f"multiply-adds  {counts.macs:,}  (one sample; 1 multiply-add = 1)")
    console.line(f"images         {len(images):,} to train on, {facts['validation_images']:,} to validate on")
    console.line(f"steps          {steps:,} in {args.epochs:,} rounds")
    console.line("dry run: nothing trained, nothing written")
    return 0
