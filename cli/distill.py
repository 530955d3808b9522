"""`morph distill`: teach a student by a teacher, directly or through assistants."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from morph.cli.model_arguments import add_opening, expected_from, open_from
from morph.cli.outputs import paths_from
from morph.cli.running import PROCESSES, draw_afresh, fabric_from, interrupted
from morph.cli.teaching_arguments import add_teaching, check_teaching
from morph.cli.training_arguments import add_training, options_from
from morph.cli.training_data import training_data

if TYPE_CHECKING:
    from morph.files import OpenedModel
    from morph.images import LabelledImages
    from morph.plan import Plan

EPILOG = f"""\
examples:
  morph distill --teacher zoo:darts-10-trained --student zoo:wrn-10-1 --epochs 1      on the sample inside, to try it
  morph distill --teacher t.pt --student zoo:wrn-16-2 --data cifar/ --augment --kd --at --out s.pt
  morph distill --teacher t.pt --student s.pt --data cifar/ --hint --hint-epochs 20 --kd --temperature 10
  morph distill --teacher t.pt --assistant zoo:wrn-16-1 --student zoo:wrn-10-1 --data cifar/
  morph distill --teacher t.pt --student zoo:wrn-16-2 --at --dry-run                  shows the pairs of layers

With assistants the teacher teaches the first, that one the next, and the last one the student, each in --epochs rounds
with the same losses; assistants are kept beside the student as NAME-assistant1.pt and so on.

Stopped or killed, the same command goes on from its state, and ends with the same weights.

{PROCESSES}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="file or name of the teacher; not touched")
    parser.add_argument("--student", metavar="MODEL", required=True, help="file or name of the student")
    parser.add_argument(
        "--assistant",
        metavar="MODEL",
        action="append",
        default=[],
        help="file or name of a network between them (repeatable, in the order of teaching)",
    )
    parser.add_argument("--fresh", action="store_true", help="draw the student's weights afresh, by seed")
    add_opening(parser)
    parser.add_argument(
        "--teacher-arch", metavar="NAME", help="as --arch, for a teacher's state_dict; --arch is the student's"
    )
    add_teaching(parser)
    add_training(parser, "the student (default: NAME-distilled.pt)")


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli.links import Chain, run_chain
    from morph.cli.training_runs import check_files, loggers_from

    check_teaching(args)
    options_from(args)
    args.model = args.student  # the name from which those of the outputs are made
    paths = paths_from(args, "distilled", (".json", ".svg"))
    files = check_files(args, paths[0])
    fabric = fabric_from(args, loggers_from(args))
    models = open_models(args)
    shape = check_shapes(args, models)
    expected = expected_from(argparse.Namespace(**{**vars(args), "input": shape}), models[-1])
    images, validation = training_data(args, input_shape=expected[0], num_classes=expected[1])
    plans = put_voting_heads(args, models, images) if args.multi_channel else {}
    chain = Chain(args, models, images, validation, fabric, paths, files, plans)
    if args.dry_run:
        return int(chain.show()) if args.speaks else 0
    try:
        return int(run_chain(chain))
    except KeyboardInterrupt:
        return int(interrupted(args, chain.state))


def open_models(args: argparse.Namespace) -> list[OpenedModel]:
    """Teacher, assistants and student; the weights of each that has a name alone are drawn by the same seed.

    Raises:
        ModelFileError, UnsafeFileError: If one of them cannot be opened.
    """
    from morph.search_checkpoint import seed_everything

    models = []
    arches = [args.teacher_arch, *(None for _ in args.assistant), args.arch]
    for source, arch in zip([args.teacher, *args.assistant, args.student], arches, strict=True):
        seed_everything(args.seed)
        models.append(open_from(argparse.Namespace(**{**vars(args), "model": source, "arch": arch})))
    if args.fresh:
        draw_afresh(args, models[-1].model)
    return models


def put_voting_heads(args: argparse.Namespace, models: list[OpenedModel], images: LabelledImages) -> dict[int, Plan]:
    """Give those that are taught a head for as many channels as the teacher's, where they have none; and say how.

    Raises:
        HeadError: If the teacher has none, or one cannot be put there.
    """
    from morph.errors import HeadError
    from morph.label_heads import head_of
    from morph.label_surgery import put_voting_head

    try:
        channels = head_of(models[0].model).channels
    except HeadError as error:
        raise HeadError(
            f"{models[0].source} has no head for multi-channel labels; give it one and train it: morph train "
            f"{models[0].source} --label-channels 16"
        ) from error
    plans: dict[int, Plan] = {}
    for i, opened in enumerate(models[1:], 1):
        try:
            found = head_of(opened.model).channels
        except HeadError:
            result = put_voting_head(opened.model, images.images[:2], channels=channels, seed=args.seed)
            models[i] = dataclasses.replace(opened, model=result.model, arch=None)
            plans[i] = result.record.plan
            continue
        if found != channels:
            raise HeadError(f"{opened.source} has {found} channels for each class, the teacher {channels}")
    return plans


def check_shapes(args: argparse.Namespace, models: list[OpenedModel]) -> tuple[int, ...] | None:
    """The shape of a sample that all of them take, as far as it is known.

    Raises:
        TeachingError: If they say different shapes.
    """
    from morph.errors import TeachingError

    known = [opened for opened in models if opened.input_shape is not None]
    if args.input is not None or not known:
        return args.input  # type: ignore[no-any-return]
    for opened in known:
        if opened.input_shape != known[-1].input_shape:
            one, other = ("x".join(map(str, each.input_shape or ())) for each in (opened, known[-1]))
            raise TeachingError(
                f"{opened.source} takes images of {one}, {known[-1].source} of {other}; both see the same images: give "
                "the shape that both accept with --input, or another model"
            )
    shape: Any = known[-1].input_shape
    return tuple(shape)
