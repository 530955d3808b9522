"""`morph expand`: grow a student into its teacher."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from morph.cli.data_arguments import add_data, add_probe_batches, data_for_scores, data_from, positive
from morph.cli.model_arguments import add_model, expected_from, open_from, random_inputs_from
from morph.cli.numbers import noise, ratio, size
from morph.cli.output_arguments import add_output
from morph.cli.outputs import finish, paths_from, target_facts, with_facts
from morph.cli.teachers import draw_cells, draw_units, drawing, show_cells, show_deeper, show_grown, show_wider

if TYPE_CHECKING:
    from morph.depth_policies import DepthPolicy
    from morph.gains import GainStep
    from morph.policies import Step

EPILOG = """\
examples:
  morph expand zoo:darts-10-trained --fisher --target-params 1.4M
  morph expand student.pt --uniform --target-macs 120M --data images/ --out teacher.pt
  morph expand torchvision:resnext50_32x4d --fisher-per-param --target-params 40M --data images/ --dry-run --json
  morph expand torchvision:resnet18 --move deepen --target-params 15M --out deeper.pt
  morph expand zoo:wrn-16-2 --move deepen --blocks 3
  morph expand zoo:wrn-16-2 --move widen --ratio 1.25 --noise 0.01
  morph expand zoo:darts-10-trained --move auto --target-params 1M

moves:
  regroup  merge the groups of grouped convolutions (needs labelled images; the default)
  deepen   insert copies of residual blocks that add exactly zero (needs no images, but for --fisher); a DARTS or
           DenseNet of the zoo, which has none, becomes the deeper one of its family with fresh weights
  widen    copy channels, which their readers then share (needs no images, but for --score fisher)
  auto     regroup and widen, step by step, where the Fisher score of what grows is highest for what it adds (needs
           labelled images)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, help="the student: a file or a name")
    parser.add_argument("--move", choices=list(MOVES), default="regroup", help="how it grows (default regroup)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-params", type=size, metavar="SIZE", help="parameters wanted, e.g. 1.4M")
    target.add_argument("--target-macs", type=size, metavar="SIZE", help="multiply-adds of one sample wanted, e.g. 90M")
    target.add_argument("--blocks", type=positive, metavar="N", help="blocks to insert (deepen)")
    target.add_argument("--ratio", type=ratio, metavar="RATIO", help="width afterwards over width before (widen)")
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
        help="stop at the first size not below the target, at the nearest, or at the last below it "
        "(default first; regroup, deepen)",
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
    parser.add_argument(
        "--score", choices=["random", "fisher", "l2"], help="which channels are copied (default random; widen)"
    )
    parser.add_argument(
        "--ignore", action="append", metavar="PATTERN", help="couplings not to copy (repeatable; widen, auto)"
    )
    parser.add_argument(
        "--form",
        choices=["auto", "class", "graph"],
        help="keep the model's class where its code can carry the new sizes, always, or never (default auto; "
        "widen, auto)",
    )
    parser.add_argument(
        "--noise",
        type=noise,
        metavar="SHARE",
        help="noise on the weights that make the copies, over their size, e.g. 0.01, so that copies part in training; "
        "how far the outputs move is measured and told (default 0; widen)",
    )
    add_data(parser)
    add_probe_batches(parser, "widen, auto")
    parser.add_argument(
        "--seed", type=int, default=0, help="order of the images, random inputs and choices, --reinit (default 0)"
    )
    add_output(
        parser,
        "the teacher; beside it go the record (.json) and, except from deepen, the picture (.svg) (default: "
        "NAME-teacher.pt)",
    )
    parser.add_argument("--dry-run", action="store_true", help="decide and report, write nothing")


def run(args: argparse.Namespace) -> int:
    """Run."""
    allowed = {option for option, moves in READ_BY.items() if args.move in moves}
    refuse_unread(
        args,
        {option: f"--{option.replace('_', '-')}" for option in READ_BY if option not in allowed and option != "policy"},
    )
    if args.policy and (args.move not in READ_BY["policy"] or (args.move == "deepen" and args.policy not in DEEPENING)):
        raise wrong_option(args, f"--{args.policy}")
    return MOVES[args.move](args)


def _regroup(args: argparse.Namespace) -> int:
    """Merge the groups of grouped convolutions."""
    from morph.cli import console
    from morph.expansion import expand, require_groups

    paths = paths_from(args, "teacher", (".json", ".svg"))
    opened = open_from(args)
    require_groups(opened.model)
    shape, classes = expected_from(args, opened)
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
            fit=args.fit or "first",
            at=args.at,
            reuse_scores=args.reuse_scores,
            reinit=args.reinit,
            batch_size=args.batch_size,
            seed=args.seed,
            on_step=on_step,
        )
    return int(finish(args, result, paths, show_cells, drawing(draw_cells, opened)))


def _deepen(args: argparse.Namespace) -> int:
    """Insert copies of residual blocks; where there can be none, take the deeper network of the family."""
    from morph.cli import console
    from morph.deepening import deepen
    from morph.depth_scaling import can_scale_depth, scale_depth

    if args.policy != "fisher":
        refuse_unread(args, {"data": "--data"}, " without --fisher")
    paths = paths_from(args, "teacher", (".json",))
    opened = open_from(args)
    inputs = random_inputs_from(args, opened)
    goal = {"target_params": args.target_params, "target_macs": args.target_macs, "blocks": args.blocks}
    if can_scale_depth(opened.arch):
        if args.policy == "fisher" or args.at:
            raise wrong_option(args, "--fisher" if args.policy == "fisher" else "--at", f" for {opened.arch}")
        note = "has no residual blocks to copy; its teacher is the deeper network of its family, with fresh weights"
        console.note(f"note: {opened.source} {note}")
        result = scale_depth(opened.model, opened.arch or "", inputs, fit=args.fit or "first", seed=args.seed, **goal)
        return int(finish(args, result, paths, show_deeper))
    data = None
    if args.policy == "fisher":
        shape, classes = expected_from(args, opened)
        images = data_from(args, input_shape=shape, num_classes=classes)
        data = next(images.batches(args.batch_size, args.seed))
    policy: DepthPolicy = "fisher" if args.policy == "fisher" else "uniform"
    result = deepen(
        opened.model, inputs, fit=args.fit or "first", policy=policy, data=data, at=args.at, seed=args.seed, **goal
    )
    return int(finish(args, result, paths, show_deeper))


def _widen(args: argparse.Namespace) -> int:
    """Copy units."""
    from morph.analysis import analyse
    from morph.gains import unit_rows
    from morph.widening import widen

    args.score = args.score or "random"
    paths = paths_from(args, "teacher", (".json", ".svg"))
    opened = open_from(args)
    inputs = random_inputs_from(args, opened)
    batches, description = data_for_scores(args, opened, args.score == "fisher")
    result = widen(
        opened.model,
        inputs,
        ratio=args.ratio,
        target_params=args.target_params,
        target_macs=args.target_macs,
        score=args.score,
        data=batches,
        ignore=args.ignore or (),
        form=args.form or "auto",
        noise=args.noise or 0.0,
        seed=args.seed,
    )
    couplings = unit_rows(
        analyse(opened.model, inputs).couplings.values(), result.record.plan, result.record.details["copied"]
    )
    details = {**target_facts(result.record.to_json()), "couplings": couplings}
    return int(finish(args, with_facts(result, details, description), paths, show_wider, drawing(draw_units, opened)))


def _auto(args: argparse.Namespace) -> int:
    """Merge groups and copy units, whichever gains more."""
    from morph.cli import console
    from morph.mixing import grow_by_gain

    paths = paths_from(args, "teacher", (".json", ".svg"))
    opened = open_from(args)
    shape, classes = expected_from(args, opened)
    data = data_from(args, input_shape=shape, num_classes=classes)
    target = args.target_params or args.target_macs
    with console.progress("expand", quiet=args.json) as advance:

        def on_step(step: GainStep) -> None:
            now = step.params if args.target_params else step.macs
            advance(min(now, target), target, f"{step.move} {step.name}: {now:,}")

        result = grow_by_gain(
            opened.model,
            data,
            target_params=args.target_params,
            target_macs=args.target_macs,
            at=args.at,
            ignore=args.ignore or (),
            form=args.form or "auto",
            batch_size=args.batch_size,
            probe_batches=args.probe_batches or 1,
            seed=args.seed,
            on_step=on_step,
        )
    return int(finish(args, result, paths, show_grown, drawing(draw_units, opened)))


MOVES: dict[str, Callable[[argparse.Namespace], int]] = {
    "regroup": _regroup,
    "deepen": _deepen,
    "widen": _widen,
    "auto": _auto,
}
DEEPENING = ("uniform", "fisher")  # the policies that deepen knows
READ_BY = {  # which moves read an option
    "blocks": ("deepen",),
    "ratio": ("widen",),
    "policy": ("regroup", "deepen"),
    "fit": ("regroup", "deepen"),
    "at": ("regroup", "deepen", "auto"),
    "reuse_scores": ("regroup",),
    "reinit": ("regroup",),
    "score": ("widen",),
    "ignore": ("widen", "auto"),
    "form": ("widen", "auto"),
    "noise": ("widen",),
    "probe_batches": ("widen", "auto"),
}


def refuse_unread(args: argparse.Namespace, options: dict[str, str], when: str = "") -> None:
    """Refuse options that the chosen move would not read."""
    for name, flag in options.items():
        if getattr(args, name):
            raise wrong_option(args, flag, when)


def wrong_option(args: argparse.Namespace, flag: str, when: str = "") -> Exception:
    """What is raised for an option that nothing would read."""
    from morph.errors import TargetError

    return TargetError(f"{flag} means nothing to --move {args.move}{when}; leave it out, or see `morph expand --help`")
