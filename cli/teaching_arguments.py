"""The arguments by which a command says what a student learns from its teacher."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import positive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from morph.teaching.terms import Features, Term


def add_teaching(parser: argparse.ArgumentParser) -> None:
    """Add the losses, each with its numbers."""
    _add_outputs(parser)
    _add_channels(parser)
    _add_features(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    """Add the losses between outputs."""
    group = parser.add_argument_group("losses between outputs (--kd if no loss is named at all)")
    group.add_argument("--kd", action="store_true", help="soft labels: the teacher's outputs at a temperature")
    group.add_argument(
        "--temperature", type=float, default=4.0, metavar="T", help="of the soft labels (default %(default)s)"
    )
    group.add_argument(
        "--alpha", type=float, default=0.9, metavar="A", help="weight of the soft labels (default %(default)s)"
    )
    group.add_argument(
        "--t-squared",
        action="store_true",
        help="multiply the soft labels' term by T**2, which keeps its gradients from shrinking as T grows",
    )
    group.add_argument(
        "--divergence",
        choices=["kl", "cross-entropy"],
        default="kl",
        help="form of the soft labels' term; they differ by what has no gradient (default %(default)s)",
    )
    group.add_argument("--logits", action="store_true", help="squared differences of the logits")
    group.add_argument(
        "--logits-weight", type=float, default=1.0, metavar="W", help="of that term (default %(default)s)"
    )
    group.add_argument(
        "--label-weight",
        type=float,
        metavar="W",
        help="weight of the cross-entropy with the labels (default: 1 - alpha with --kd; 0 with --logits or "
        "--multi-channel; else 1)",
    )
    group.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep the teacher's logits, or the bits of its labels, of all images in this file, and learn from those; "
        "augmented images come with what the teacher said of the image as it is",
    )


def _add_channels(parser: argparse.ArgumentParser) -> None:
    """Add multi-channel labels."""
    group = parser.add_argument_group(
        "multi-channel labels",
        "The teacher has a head with several channels for each class (`morph train --label-channels`), and each of its "
        "sigmoids is a bit. A student without such a head gets one, a linear layer in the place of its classifier.",
    )
    group.add_argument("--multi-channel", action="store_true", help="binary cross-entropy with these bits")
    group.add_argument(
        "--multi-channel-weight", type=float, default=1.0, metavar="W", help="of that term (default %(default)s)"
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        metavar="P",
        help="where a sigmoid counts as a set bit (default %(default)s)",
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    """Add the losses between layers."""
    group = parser.add_argument_group(
        "losses between layers",
        "Pairs of layers are proposed by depth and resolution, for a hint the middle one; --dry-run shows them. TAP is "
        "the path of a module, one call of it (relu#2) or a node of the trace (add_3), as in morph.tap.",
    )
    group.add_argument("--at", action="store_true", help="attention transfer: maps of where a layer looks")
    group.add_argument("--beta", type=float, metavar="B", help="its weight (default 1000 for mean-square, 1 for norm)")
    group.add_argument(
        "--at-form",
        choices=["mean-square", "norm"],
        default="mean-square",
        help="as the method's authors compute it, or the norm of the difference (default %(default)s)",
    )
    group.add_argument("--hint", action="store_true", help="hints: the student's layer behind a regressor")
    group.add_argument("--hint-weight", type=float, default=1.0, metavar="W", help="of that term (default %(default)s)")
    group.add_argument(
        "--hint-reduction",
        choices=["mean", "sum"],
        default="mean",
        help="over the values of a map (default %(default)s)",
    )
    group.add_argument(
        "--hint-epochs",
        type=positive,
        metavar="N",
        help="learn the hints alone in N rounds before, and the rest without them (default: together)",
    )
    for name in ("at", "hint"):
        group.add_argument(
            f"--{name}-pair",
            type=tap_pair,
            action="append",
            metavar="TAP=TAP",
            help="a layer of the teacher and one of the student (repeatable)",
        )
    group.add_argument(
        "--at-pairs", type=positive, default=3, metavar="N", help="how many to propose (default %(default)s)"
    )


def tap_pair(text: str) -> tuple[str, str]:
    """Read ``layer1=groups.0``.

    Raises:
        argparse.ArgumentTypeError: If it is not two names.
    """
    teacher, equals, student = text.partition("=")
    if not (equals and teacher and student):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pair; give a layer of the teacher and one of the student, e.g. layer1=groups.0"
        )
    return teacher, student


def check_teaching(args: argparse.Namespace) -> None:
    """Settle which losses are meant, and refuse numbers of losses that are not.

    Raises:
        TeachingError: If an option belongs to a loss that was not asked for.
    """
    from morph.errors import TeachingError

    if not (args.kd or args.logits or args.at or args.hint or args.multi_channel):
        args.kd = True
    if args.multi_channel and (args.kd or args.logits):
        raise TeachingError(
            "--multi-channel gives the student a head whose outputs are votes, which neither --kd nor --logits can "
            "compare with logits; leave one of them out"
        )
    if args.cache and args.assistant:
        raise TeachingError("--cache is of one teacher, and --assistant makes several; teach in several commands")
    if args.cache and not (args.kd or args.logits or args.multi_channel):
        raise TeachingError("--cache keeps logits or bits, and neither is learned; leave it out")
    for loss, names in (
        ("at", ("beta", "at_pair")),
        ("hint", ("hint_epochs", "hint_pair")),
        ("kd", ("t_squared",)),
    ):
        for name in names:
            if getattr(args, name) and not getattr(args, loss):
                raise TeachingError(f"--{name.replace('_', '-')} is given without --{loss}; give both, or neither")
    if args.hint_epochs and not (args.kd or args.logits or args.at or args.multi_channel or _label_weight(args)):
        raise TeachingError("--hint-epochs is the stage before another; name what follows: --kd, --logits or --at")


def hint_terms(args: argparse.Namespace, teacher: nn.Module, student: nn.Module, sample: Tensor) -> list[Features]:
    """The term of the hints; by default between the middle one of the pairs that are proposed.

    Raises:
        TeachingError: If a number is out of its range, or there is nothing to pair.
    """
    from morph.teaching.feature_losses import Hint
    from morph.teaching.pairing import Pairs, propose_pairs
    from morph.teaching.terms import Features

    if not args.hint:
        return []
    pairs = args.hint_pair
    if pairs is None:
        found = propose_pairs(teacher, student, sample)
        pairs = Pairs((found[len(found) // 2],))
    return [Features(Hint(args.hint_reduction), pairs, args.hint_weight, "hint")]


def other_terms(args: argparse.Namespace, teacher: nn.Module, student: nn.Module) -> list[Term]:
    """All other terms; errors as `hint_terms`, or HeadError if there are no heads for multi-channel labels."""
    from morph.label_heads import score_path
    from morph.teaching.feature_losses import AttentionTransfer
    from morph.teaching.losses import LabelCrossEntropy, LogitRegression, SoftLabels
    from morph.teaching.terms import Channels, Features, Outputs

    terms: list[Term] = []
    weight = _label_weight(args)
    if args.kd:
        soft: dict[str, Any] = {"t_squared": args.t_squared, "divergence": args.divergence}
        terms.append(Outputs(SoftLabels(args.temperature, args.alpha, **soft, label_weight=weight)))
    elif weight:
        terms.append(Outputs(LabelCrossEntropy(), weight, "labels"))
    if args.logits:
        terms.append(Outputs(LogitRegression(), args.logits_weight, "logits"))
    if args.at:
        terms.append(
            Features(AttentionTransfer(args.at_form, args.beta), args.at_pair, 1.0, "attention", args.at_pairs)
        )
    if args.multi_channel:
        numbers = {"threshold": args.threshold, "weight": args.multi_channel_weight}
        terms.append(Channels(score_path(student), score_path(teacher), **numbers))
    return terms


def _label_weight(args: argparse.Namespace) -> float:
    """Weight of the labels, if not given: what is left of the soft labels; none beside logits or bits; else all."""
    if args.label_weight is not None:
        return float(args.label_weight)
    if args.kd:
        return 1.0 - float(args.alpha)
    return 0.0 if args.logits or args.multi_channel else 1.0


def teaching_options(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the losses, for records and for the identity of a run; plain values."""
    names = ["kd", "logits", "at", "hint", "multi_channel"]
    if args.kd:
        names += ["temperature", "alpha", "t_squared", "divergence"]
    if args.logits:
        names += ["logits_weight"]
    if args.at:
        names += ["beta", "at_form", "at_pair", "at_pairs"]
    if args.hint:
        names += ["hint_weight", "hint_reduction", "hint_epochs", "hint_pair"]
    if args.multi_channel:
        names += ["multi_channel_weight", "threshold"]
    found = {name: getattr(args, name) for name in names} | {"label_weight": _label_weight(args)}
    pairs = {name: [list(pair) for pair in found[name]] for name in ("at_pair", "hint_pair") if found.get(name)}
    return found | pairs
