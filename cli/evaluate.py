"""`morph evaluate`: measure how good models are on labelled images."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import add_data, data_from
from morph.cli.model_arguments import add_model, expected_from, open_from
from morph.cli.running import PROCESSES, add_device, fabric_from

if TYPE_CHECKING:
    from morph.images import LabelledImages

EPILOG = f"""\
examples:
  morph evaluate student.pt teacher.pt --data cifar/ --limit 10000
  morph evaluate zoo:darts-10-trained --per-class

Images are taken as they are, in evaluation mode. top-5 is the share of images whose class is among the five largest
outputs; loss is the mean cross-entropy in nats.

{PROCESSES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, nargs="+")
    add_data(parser)
    parser.add_argument("--seed", type=int, default=0, help="which images --limit takes (default 0)")
    parser.add_argument("--per-class", action="store_true", help="tell top-1 of each class as well")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    add_device(parser, processes=True)


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli import console
    from morph.training.evaluation import evaluate

    fabric = fabric_from(args)
    rows: list[dict[str, Any]] = []
    images: dict[Any, LabelledImages] = {}
    with console.progress("evaluation", quiet=args.json or not args.speaks) as advance:
        for i, name in enumerate(args.model):
            advance(i, len(args.model), name)
            opened = open_from(argparse.Namespace(**{**vars(args), "model": name}))
            wanted = expected_from(args, opened)
            if wanted not in images:
                images[wanted] = data_from(args, input_shape=wanted[0], num_classes=wanted[1])
            scores = evaluate(opened.model, images[wanted], batch_size=args.batch_size, fabric=fabric)
            rows.append({"model": name, **vars(scores), "data": images[wanted].describe()})
    if not args.speaks:
        return 0
    if args.json:
        classes = next(iter(images.values())).classes
        document = {"schema": 1, "command": args.command, "models": [_document(row, args.per_class) for row in rows]}
        console.document(document | {"classes": list(classes) if classes else None})
        return 0
    console.table(
        f"{rows[0]['images']:,} images of {rows[0]['data']['source']}",
        ("model", "top-1", "top-5", "loss"),
        [(r["model"], f"{r['top1']:.2%}", f"{r['top5']:.2%}", f"{r['loss']:.4f}") for r in rows],
    )
    if args.per_class:
        _show_classes(rows, next(iter(images.values())))
    return 0


def _document(row: dict[str, Any], per_class: bool) -> dict[str, Any]:
    return row if per_class else {key: value for key, value in row.items() if not key.startswith("class_")}


def _show_classes(rows: list[dict[str, Any]], images: LabelledImages) -> None:
    """Print top-1 of each class, a column for each model."""
    from morph.cli import console

    cells = []
    for i, number in enumerate(rows[0]["class_images"]):
        name = images.classes[i] if images.classes and i < len(images.classes) else str(i)
        hits = [row["class_top1"][i] if i < len(row["class_top1"]) else None for row in rows]
        cells.append((name, f"{number:,}", *("-" if hit is None else f"{hit:.2%}" for hit in hits)))
    console.line()
    console.table("top-1 of each class", ("class", "images", *(row["model"] for row in rows)), cells)
