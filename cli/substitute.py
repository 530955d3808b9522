"""`morph substitute`: cheap blocks for convolutions, chosen by Fisher potential."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import add_data, data_from, positive
from morph.cli.model_arguments import add_model, expected_from, open_from
from morph.cli.numbers import size
from morph.cli.output_arguments import add_output
from morph.cli.outputs import finish, paths_from
from morph.cli.summaries import show_left, show_sizes

if TYPE_CHECKING:
    from morph.substitution import Scored

EPILOG = """\
blocks:
  S   the convolution as it is
  G4  the convolution in 4 groups, then a 1x1 convolution that mixes them
  B2  1x1 down to 1/2 of the channels, the convolution there, 1x1 up again

The student computes something else than the model: new blocks are drawn afresh, and it is to be trained.

examples:
  morph substitute zoo:wrn-28-2 --target-params 800K --candidates 200
  morph substitute teacher.pt --target-macs 60M --choices G2,G4,B2 --data images/ --out student.pt"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, help="the teacher: a file or a name")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-params", type=size, metavar="SIZE", help="parameters wanted, e.g. 800K")
    target.add_argument("--target-macs", type=size, metavar="SIZE", help="multiply-adds of one sample wanted, e.g. 60M")
    parser.add_argument(
        "--choices",
        type=_names,
        metavar="BLOCKS",
        help="blocks to choose from, between commas (default S,G2,G4,G8,G16,B2,B4)",
    )
    parser.add_argument(
        "--candidates", type=positive, default=1000, metavar="N", help="configurations to rank (default 1000)"
    )
    parser.add_argument(
        "--window",
        type=float,
        default=0.025,
        metavar="SHARE",
        help="largest distance from the target, relative to it (default 0.025)",
    )
    parser.add_argument(
        "--at",
        action="append",
        metavar="PATTERN",
        help="let each of these modules (shell pattern; repeatable) take a block type, instead of each repeated block",
    )
    add_data(parser)
    parser.set_defaults(batch_size=128)
    parser.add_argument(
        "--seed", type=int, default=0, help="order of the images, configurations, new weights (default 0)"
    )
    add_output(parser, "the student; beside it goes the record (.json) (default: NAME-student.pt)")
    parser.add_argument("--dry-run", action="store_true", help="rank and report, write nothing")


def _names(text: str) -> tuple[str, ...]:
    """Read ``G2,G4,B2``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli import console
    from morph.substitution import CHOICES, substitute

    paths = paths_from(args, "student", (".json",))
    opened = open_from(args)
    shape, classes = expected_from(args, opened)
    data = data_from(args, input_shape=shape, num_classes=classes)
    with console.progress("substitute", quiet=args.json) as advance:

        def on_candidate(done: int, scored: Scored) -> None:
            advance(done, args.candidates, f"{scored.params:,} parameters, Fisher potential {scored.score:.3g}")

        result = substitute(
            opened.model,
            data,
            target_params=args.target_params,
            target_macs=args.target_macs,
            choices=CHOICES if args.choices is None else args.choices,
            candidates=args.candidates,
            window=args.window,
            at=args.at,
            batch_size=args.batch_size,
            seed=args.seed,
            on_candidate=on_candidate,
        )
    return int(finish(args, result, paths, _show))


def _show(record: dict[str, Any]) -> None:
    """Print the blocks and the sums."""
    from statistics import median

    from morph.cli import console

    rows = [
        (block["name"], block["choice"], f"{block['params_before']:,}", f"{block['params_after']:,}")
        for block in record["blocks"]
    ]
    console.table("blocks", ("block", "choice", "parameters", "after"), rows, left=2)
    show_sizes(record)
    ranked = f"{len(record['candidates'])} ranked"
    console.line(
        f"candidates     {ranked} of {record['drawn']:,} drawn: {record['outside_window']:,} of another size, "
        f"{record['repeated']:,} drawn before"
    )
    middle = median(candidate["score"] for candidate in record["candidates"])
    console.line(f"Fisher         {record['score']:.3g} (median of the candidates: {middle:.3g})")
    console.line(f"weights        {record['weights']}; not weight-preserving: train it")
    show_left(record["left"], "convolutions")
