"""`morph prune`: cut the units that a model misses least."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import add_data, add_probe_batches, data_for_scores, positive
from morph.cli.model_arguments import add_model, open_from, random_inputs_from
from morph.cli.numbers import share, size
from morph.cli.output_arguments import add_output
from morph.cli.outputs import finish, paths_from, target_facts, with_facts
from morph.cli.summaries import show_checks, show_couplings, show_form, show_left, show_sizes

if TYPE_CHECKING:
    from morph.analysis import Sizes

EPILOG = """\
examples:
  morph prune zoo:wrn-16-2 --ratio 0.5
  morph prune model.pt --target-macs 300M --score taylor --data images/ --steps 5 --out small.pt
  morph prune torchvision:vit_b_16 --ratio 0.3 --local --heads inside --ignore 'conv_proj*' --dry-run
  morph prune zoo:darts-10-trained --target-params 500K --score fisher --ignore 'auxiliary*'

scores (the lowest go first):
  l1, l2          magnitude of all that a unit's weights produce and read
  bn              size of its BatchNorm weights
  taylor, fisher  what the loss would notice; need labelled images
  random          for comparison

Cuts are exact: what is compared is the model before, with zeros where its readers saw what was cut. The pruned model
computes something else than the model that came in; train it."""

MOST_FROZEN = 20  # that a record holds
GRADIENT_SCORES = ("taylor", "fisher")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--ratio", type=share, metavar="SHARE", help="share of the units to cut, e.g. 0.5")
    target.add_argument("--target-params", type=size, metavar="SIZE", help="at most so many parameters, e.g. 5M")
    target.add_argument(
        "--target-macs", type=size, metavar="SIZE", help="at most so many multiply-adds of one sample, e.g. 300M"
    )
    parser.add_argument(
        "--score", choices=["l1", "l2", "bn", *GRADIENT_SCORES, "random"], default="l2", help="default %(default)s"
    )
    ranking = parser.add_mutually_exclusive_group()
    ranking.add_argument(
        "--global",
        dest="ranking",
        action="store_const",
        const="global",
        default="global",
        help="one threshold over all couplings (the default)",
    )
    ranking.add_argument(
        "--local", dest="ranking", action="store_const", const="local", help="the same share of each coupling"
    )
    parser.add_argument(
        "--normalise",
        choices=["mean", "macs", "params", "none"],
        default="mean",
        help="what scores are divided by, to compare couplings: their mean, or what a unit costs (default %(default)s)",
    )
    parser.add_argument(
        "--minimum",
        type=positive,
        default=1,
        metavar="N",
        help="units that stay in each coupling (default %(default)s)",
    )
    parser.add_argument(
        "--multiple", type=positive, default=1, metavar="N", help="make widths multiples of this (default %(default)s)"
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="couplings or tensors to leave whole (shell pattern; repeatable), e.g. 'layer4.*'",
    )
    parser.add_argument(
        "--heads",
        choices=["whole", "inside", "both"],
        default="whole",
        help="cut whole heads (or groups), positions inside them, or both (default %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=positive,
        default=1,
        metavar="N",
        help="get there in so many steps, scoring afresh before each (default %(default)s)",
    )
    parser.add_argument(
        "--form",
        choices=["auto", "class", "graph"],
        default="auto",
        help="keep the model's class where its code can carry the new sizes, always, or never (default %(default)s)",
    )
    add_data(parser)
    add_probe_batches(parser, "taylor, fisher")
    parser.add_argument("--seed", type=int, default=0, help="random inputs, order of the images, random (default 0)")
    add_output(
        parser, "the pruned model; beside it go the record (.json) and the picture (.svg) (default: NAME-pruned.pt)"
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare with the zeroing reference")
    parser.add_argument("--dry-run", action="store_true", help="cut, check and report, write nothing")


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli import console
    from morph.pruning import prune

    paths = paths_from(args, "pruned", (".json", ".svg"))
    opened = open_from(args)
    inputs = random_inputs_from(args, opened)
    batches, description = data_for_scores(args, opened, args.score in GRADIENT_SCORES)
    with console.progress("prune", quiet=args.json) as advance:

        def on_step(number: int, sizes: Sizes) -> None:
            advance(number, args.steps, f"{sizes.params:,} parameters, {sizes.macs:,} multiply-adds")

        result = prune(
            opened.model,
            inputs,
            data=batches,
            steps=args.steps,
            form=args.form,
            verify=not args.no_verify,
            on_step=on_step,
            ratio=args.ratio,
            target_params=args.target_params,
            target_macs=args.target_macs,
            score=args.score,
            ranking=args.ranking,
            normalise=None if args.normalise == "none" else args.normalise,
            minimum=args.minimum,
            multiple=args.multiple,
            ignore=args.ignore,
            heads=args.heads,
            seed=args.seed,
        )
    result = with_facts(result, target_facts(result.record.to_json()), description)

    def draw(record: dict[str, Any], path: Path) -> None:
        _draw(record, path, opened.source)

    return int(finish(args, result, paths, _show, draw))


def _draw(record: dict[str, Any], path: Path, source: str) -> None:
    """Draw the units of each coupling before and after."""
    from morph.picture import UnitRow, units_picture

    rows = [UnitRow(row["name"], row["units_before"], row["units_after"]) for row in record["couplings"]]
    sizes = f"{record['params_before']:,} to {record['params_after']:,} parameters"
    units_picture(rows, path, title=f"{source}: {sizes}, {record['options']['score']}", force=True)


def _show(record: dict[str, Any]) -> None:
    """Print the couplings and the sums."""
    from morph.cli import console

    show_couplings("couplings", record["couplings"])
    before, after = (sum(row[f"units_{when}"] for row in record["couplings"]) for when in ("before", "after"))
    show_sizes(record)
    console.line(f"units          {before:,} -> {after:,} in {len(record['couplings'])} couplings")
    show_form(record)
    show_left(record["left"], "couplings that were chosen")
    if record["frozen"]:
        first, others = record["frozen"][0], len(record["frozen"]) - 1
        more = " or more" if others + 1 == MOST_FROZEN else ""
        place = f" (at {first['where']})" if first["where"] else ""
        rest = f"; {others}{more} other reasons" if others else ""
        console.line(f"never cut      {first['reason']}{place}{rest}")
    show_checks(record)
    console.line(f"verified       {record['verified']}")
