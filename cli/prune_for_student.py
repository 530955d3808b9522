"""`morph prune-for-student`: search a teacher for the student that learns best from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import add_data, data_from, positive
from morph.cli.model_arguments import add_model, expected_from, open_from, random_inputs_from
from morph.cli.numbers import size
from morph.cli.output_arguments import add_output
from morph.cli.outputs import finish, paths_from, target_facts, with_facts
from morph.cli.running import add_device, asked_to_stop, fabric_from, interrupted
from morph.cli.summaries import show_checks, show_left, show_sizes

if TYPE_CHECKING:
    from morph.files import OpenedModel
    from morph.search_options import SearchOptions
    from morph.search_progress import Progress

EPILOG = """\
examples:
  morph prune-for-student teacher.pt --target-flops 90M --data cifar/ --augment --out student.pt
  morph prune-for-student zoo:densenet-bc-100-12 --target-flops 90M --dry-run
  morph prune-for-student teacher.pt --target-params 200K --data images/ --mode kd --epochs 20 --inherit

modes (loss of the search; weighted: gates are penalised by what closing them saves):
  kd-weighted, kd   divergence from the teacher's softened outputs
  np-weighted, np   cross-entropy with the labels, as in plain network pruning

Stopped or killed, the same command goes on from its last checkpoint and ends with the same student. The student has
fresh weights unless --inherit is given; train it with the teacher."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_model(parser, "teacher")
    _add_target(parser)
    parser.add_argument(
        "--mode",
        choices=["kd-weighted", "kd", "np-weighted", "np"],
        default="kd-weighted",
        help="default %(default)s",
    )
    parser.add_argument(
        "--weighting",
        choices=["macs", "params", "memory", "latency"],
        default="macs",
        help="what closing a gate saves, for the weighted modes (default %(default)s)",
    )
    parser.add_argument(
        "--inherit", action="store_true", help="keep the weights of the search (default: fresh ones, as in the paper)"
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        default=300,
        metavar="N",
        help="rounds through the data in which the target is met at the latest; the penalty rises where it must "
        "(default %(default)s)",
    )
    _add_numbers(parser)
    add_data(parser, training=True)
    parser.add_argument("--augment", action="store_true", help="shift and mirror the images at random")
    parser.add_argument("--seed", type=int, default=0, help="order of the images, fresh weights (default 0)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="state of the search (default: beside the student, .search)"
    )
    parser.add_argument(
        "--checkpoint-every", type=positive, metavar="N", help="steps between two writings (default: a round)"
    )
    add_output(parser, "the student; beside it go the record (.json) and the picture (.svg) (default: NAME-student.pt)")
    parser.add_argument("--dry-run", action="store_true", help="count gates and sizes, train and write nothing")
    add_device(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    """Add how large the student may be, and how that is counted."""
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--target-flops",
        "--target-macs",
        dest="target_macs",
        type=size,
        metavar="SIZE",
        help="at most so many multiply-adds of one sample (a multiply-add counts one), e.g. 90M",
    )
    target.add_argument("--target-params", type=size, metavar="SIZE", help="at most so many parameters, e.g. 200K")
    parser.add_argument(
        "--count",
        choices=["contractions", "paper"],
        default="contractions",
        help="what the multiply-adds of the target include: convolutions and linear layers, or two for each element of "
        "a batch norm as well, as the paper counts (default %(default)s)",
    )


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    """Add the numbers of the loss and of both optimizers."""
    group = parser.add_argument_group("numbers of the search (defaults are the paper's, but for --gate-lr)")
    for flag, default, what in (
        ("--lambda2", 1e-3, "strength of the penalty on gates, at least"),
        ("--tau", 4.0, "temperature of the softened outputs"),
        ("--kl0", 0.0, "divergence that is aimed at"),
        ("--lr", 0.1, "learning rate of the weights; a tenth from the middle on, a hundredth from 85 %% on"),
        ("--momentum", 0.9, "momentum of the weights"),
        ("--weight-decay", 1e-4, "weight decay of the weights"),
    ):
        group.add_argument(flag, type=float, default=default, metavar="X", help=f"{what} (default %(default)s)")
    group.add_argument(
        "--gate-lr",
        type=float,
        metavar="X",
        help="step size of the gates (default: the paper's 0.01, in a shorter search in proportion more, at most 0.5)",
    )
    group.add_argument("--clamp", action="store_true", help="keep gates from falling below zero")
    group.add_argument(
        "--count-every", type=positive, default=10, metavar="N", help="steps between two counts (default %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.atomic import check_writable
    from morph.cli import console
    from morph.student_search import search_student

    args.model = args.teacher  # the name from which those of the outputs are made
    paths = paths_from(args, "student", (".json", ".svg"))
    options = _options(args)
    opened = open_from(args, "teacher")
    if args.dry_run:
        return _dry_run(args, opened, options)
    kept: Path = args.checkpoint or paths[0].with_suffix(".search")
    check_writable(kept, force=True)
    shape, classes = expected_from(args, opened)
    images: Any = data_from(args, input_shape=shape, num_classes=classes, fewer=False)
    if args.augment:
        from morph.augmentation import Augmented

        images = Augmented(images)
    taken_up = [kept] if kept.exists() else []
    with console.progress("search", quiet=args.json) as advance, asked_to_stop() as stop:

        def tell(now: Progress) -> None:
            while taken_up:
                console.note(f"going on from {taken_up.pop()}")
            kl = "" if now.kl is None else f", KL {now.kl:.4f}"
            sizes = f"{now.gates_open:,}/{now.gates_total:,} gates, {now.macs:,} multiply-adds"
            advance(now.step, now.steps, f"loss {now.loss:.4f}{kl}, {sizes}")

        try:
            result = search_student(
                opened.model,
                images,
                target_macs=args.target_macs,
                target_params=args.target_params,
                fabric=fabric_from(args),
                checkpoint=kept,
                checkpoint_every=args.checkpoint_every,
                on_progress=tell,
                should_stop=stop,
                **vars(options),
            )
        except KeyboardInterrupt:
            return int(interrupted(args, kept))
    try:
        code = finish(args, with_facts(result, _target(result.record.to_json(), options)), paths, _show, _draw(opened))
    except KeyboardInterrupt:
        return int(interrupted(args, kept))
    kept.unlink(missing_ok=True)
    return int(code)


def _options(args: argparse.Namespace) -> SearchOptions:
    """The options among the arguments; errors as `morph.search_options.SearchOptions`."""
    from dataclasses import fields

    from morph.search_options import SearchOptions

    return SearchOptions(**{field.name: getattr(args, field.name) for field in fields(SearchOptions)})


def _target(record: dict[str, Any], options: SearchOptions) -> dict[str, Any]:
    """How far the student is from the target, in the target's own counting."""
    if options.count == "paper" and record["options"].get("target_macs"):
        record = {**record, "macs_after": record["macs_paper_after"]}
    facts: dict[str, Any] = target_facts(record)
    return facts


def _dry_run(args: argparse.Namespace, opened: OpenedModel, options: SearchOptions) -> int:
    """Count."""
    from morph.cli import console
    from morph.search_space import open_space, space_facts

    targets = {"target_macs": args.target_macs, "target_params": args.target_params}
    space = open_space(opened.model, random_inputs_from(args, opened), options, **targets)
    facts = space_facts(space)
    before = {"macs_before": space.counts.macs, "params_before": space.counts.params}
    after = {"macs_after": None, "params_after": None, "max_abs_diff": None}
    if args.json:
        gates = {"gates_open": facts["gates_total"]}
        document = {"schema": 1, "command": args.command, **before, **after, **gates, **facts, "written": []}
        console.document(document | {"options": targets | vars(options)})
        return 0
    rows = [
        (s["name"], s["kind"], f"{s['gates']:,}", f"{s['alpha_min']:.4f}", f"{s['alpha_max']:.4f}")
        for s in facts["sites"]
    ]
    console.table("gates", ("in front of", "kind", "gates", "weight, least", "most"), rows, left=2)
    console.line()
    console.line(f"parameters     {space.counts.params:,}")
    console.line(
        f"multiply-adds  {space.counts.macs:,}  (one sample; by the paper's count {facts['macs_paper_before']:,})"
    )
    console.line(f"gates          {facts['gates_total']:,}")
    _show_ungated(facts)
    console.line("dry run: nothing trained, nothing written")
    return 0


def _draw(opened: OpenedModel) -> Callable[[dict[str, Any], Path], None]:
    """Draw what was dropped and how the search went."""

    def draw(record: dict[str, Any], path: Path) -> None:
        from morph.search_picture import search_picture

        sizes = f"{record['macs_before']:,} to {record['macs_after']:,} multiply-adds"
        title = f"{opened.source}: {sizes}, {record['options']['mode']}"
        search_picture(record["drops"], record["history"], path, title=title, force=True)

    return draw


def _show(record: dict[str, Any]) -> None:
    """Print what came out."""
    from morph.cli import console

    show_sizes(record)
    console.line(f"gates open     {record['gates_open']:,} of {record['gates_total']:,}")
    paper = f"{record['macs_paper_before']:,} -> {record['macs_paper_after']:,}"
    console.line(f"paper's count  {paper}  (two more for each element of a batch norm)")
    first, last = record["lambda2"][0][1], record["lambda2"][-1][1]
    raised = f"raised from {first:g} to {last:.3g} to be in time" if last > first else f"{first:g}"
    console.line(f"search         {record['steps']:,} steps, penalty {raised}")
    if record["forced"]:
        console.line(f"at the end     {record['forced']:,} gates were closed that had not arrived at zero")
    if record["thin"]:
        one = record["thin"][0]
        console.line(
            f"thin           {len(record['thin'])} layers keep less than a tenth of their gates, e.g. {one['site']} "
            f"({one['open']:,} of {one['gates']:,})"
        )
    if record["branches_gone"]:
        one = record["branches_gone"][0]["layer"]
        console.line(f"dropped        {len(record['branches_gone'])} residual branches whole, e.g. that of {one}")
    if record["kept"]:
        one = record["kept"][0]["site"]
        console.line(f"kept           one channel at {len(record['kept'])} places that would have vanished, e.g. {one}")
    _show_ungated(record)
    show_checks(record)
    console.line(f"weights        {record['weights']}")


def _show_ungated(facts: dict[str, Any]) -> None:
    """Print in front of what there are no gates, and why."""
    show_left([{"name": name, "reason": reason} for name, reason in facts["ungated"].items()], "inputs of layers")
