"""The arguments by which a command says what a student learns from its teacher."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from morph.cli.data_arguments import positive

if TYPE_CHECKING:
    from morph.teaching.distillation import Term


def add_teaching(parser: argparse.ArgumentParser) -> None:
    """Add the losses, each with its numbers."""
    _add_outputs(parser)
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
        help="weight of the cross-entropy with the labels (default: 1 - alpha with --kd; 0 with --logits; else 1)",
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    """Add the losses between layers."""
    group = parser.add_argument_group(
        "losses between layers",
        "Pairs of layers are proposed by depth and resolution; --dry-run shows them. TAP is the path of a module, one "
        "call of it (relu#2) or a node of the trace (add_3), as in morph.tap.",
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
    for name, number in (("at", 3), ("hint", 1)):
        group.add_argument(
            f"--{name}-pair",
            type=tap_pair,
            action="append",
            metavar="TAP=TAP",
            help="a layer of the teacher and one of the student (repeatable)",
        )
        group.add_argument(
            f"--{name}-pairs",
            type=positive,
            default=number,
            metavar="N",
            help="how many to propose (default %(default)s)",
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

    if not (args.kd or args.logits or args.at or args.hint):
        args.kd = True
    for loss, names in (
        ("at", ("beta", "at_pair")),
        ("hint", ("hint_epochs", "hint_pair")),
        ("kd", ("t_squared",)),
    ):
        for name in names:
            if getattr(args, name) and not getattr(args, loss):
                raise TeachingError(f"--{name.replace('_', '-')} is given without --{loss}; give both, or neither")
    if args.hint_epochs and not (args.kd or args.logits or args.at or _label_weight(args)):
        raise TeachingError("--hint-epochs is the stage before another; name what follows: --kd, --logits or --at")


def hint_terms(args: argparse.Namespace) -> list[Term]:
    """The term of the hints.

    Raises:
        TeachingError: If a number is out of its range.
    """
    from morph.teaching.distillation import Features
    from morph.teaching.feature_losses import Hint

    if not args.hint:
        return []
    return [Features(Hint(args.hint_reduction), args.hint_pair, args.hint_weight, "hint", args.hint_pairs)]


def other_terms(args: argparse.Namespace) -> list[Term]:
    """All other terms; errors as `hint_terms`."""
    from morph.teaching.distillation import Features, Outputs
    from morph.teaching.feature_losses import AttentionTransfer
    from morph.teaching.losses import LabelCrossEntropy, LogitRegression, SoftLabels

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
    return terms


def _label_weight(args: argparse.Namespace) -> float:
    """Weight of the labels, if not given: what is left of the soft labels; none beside logits; else all."""
    if args.label_weight is not None:
        return float(args.label_weight)
    if args.kd:
        return 1.0 - float(args.alpha)
    return 0.0 if args.logits else 1.0


def teaching_options(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers of the losses, for records and for the identity of a run; plain values."""
    names = ["kd", "logits", "at", "hint"]
    if args.kd:
        names += ["temperature", "alpha", "t_squared", "divergence"]
    if args.logits:
        names += ["logits_weight"]
    if args.at:
        names += ["beta", "at_form", "at_pair", "at_pairs"]
    if args.hint:
        names += ["hint_weight", "hint_reduction", "hint_epochs", "hint_pair", "hint_pairs"]
    found = {name: getattr(args, name) for name in names} | {"label_weight": _label_weight(args)}
    pairs = {name: [list(pair) for pair in found[name]] for name in ("at_pair", "hint_pair") if found.get(name)}
    return found | pairs
