"""What a trained model comes with: scores before and after, the record, the curves, and what is told of them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morph.cli.outputs import Draw, finish, write_files
from morph.cli.training_arguments import options_from
from morph.cli.training_runs import augmented, best_path

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch import Tensor, nn

    from morph.images import LabelledImages
    from morph.plan import Plan
    from morph.surgery import Result
    from morph.training.evaluation import Scores
    from morph.training.progress import Fitted


def measure(model: nn.Module, validation: LabelledImages | None, fabric: Fabric) -> Scores | None:
    """Scores of a model in validation, where there is one."""
    from morph.training.evaluation import evaluate

    return None if validation is None else evaluate(model, validation, fabric=fabric)


def scores_of(scores: Scores | None) -> dict[str, Any] | None:
    """What a record says of an evaluation."""
    return None if scores is None else {key: getattr(scores, key) for key in ("top1", "top5", "loss", "images")}


def choose_weights(args: argparse.Namespace, model: nn.Module, fitted: Fitted) -> None:
    """Give the model the weights that ``--keep`` asks for."""
    if args.keep == "best" and fitted.best is not None:
        model.load_state_dict(fitted.best)


def details_of(args: argparse.Namespace, fitted: Fitted, log: Path, model: Path) -> dict[str, Any]:
    """What a record says of a run; plain values."""
    return {
        "best_epoch": fitted.best_epoch,
        "keep": args.keep,
        "begin": getattr(args, "begin", "weights as they came"),
        "seconds": sum(row["seconds"] for row in fitted.history),
        "history": fitted.history,
        "log": str(log),
        "best": str(best_path(model)) if args.keep == "both" and fitted.best is not None else None,
    }


def make_result(
    args: argparse.Namespace,
    model: nn.Module,
    sample: Tensor,
    images: LabelledImages,
    validation: LabelledImages | None,
    details: Mapping[str, Any],
    options: Mapping[str, Any],
    plan: Plan | None = None,
) -> Result:
    """The trained model with its record; ``plan`` says how its structure changed before, if it did."""
    from morph.batches import describe_data
    from morph.counts import count
    from morph.plan import Plan, Record
    from morph.surgery import Result, environment, sizes

    facts = {"data": describe_data(augmented(args, images))}
    if validation is not None:
        facts["validation"] = describe_data(validation)
    size = sizes(count(model, sample[:1]))
    numbers = {**vars(options_from(args)), **options}
    surroundings = {**environment(model, sample), **facts}
    plan = Plan(()) if plan is None else plan
    facts_of = {"trained": True, **details}
    return Result(model, Record(args.command, numbers, plan, size, size, (), facts_of, surroundings))


def write(
    args: argparse.Namespace, result: Result, fitted: Fitted, paths: tuple[Path, ...], title: str, *, tell: bool = True
) -> int:
    """Write model, record and curves, and the best weights if asked for; with ``tell`` print what came out."""
    from morph.files import save_model

    if args.keep == "both" and fitted.best is not None:
        best = copy.deepcopy(result.model)
        best.load_state_dict(fitted.best)
        shape = tuple(result.record.environment["input_shape"])
        save_model(best, best_path(paths[0]), input_shape=shape, record=result.record.to_json(), force=True)
    if tell:
        return int(finish(args, result, paths, show, _curves(title)))
    write_files(result, paths, _curves(title), force=args.force)
    return 0


def _curves(title: str) -> Draw:
    """Draw the curves of a record."""
    from morph.training_picture import training_picture

    def draw(record: dict[str, Any], path: Path) -> None:
        teacher = record.get("scores_teacher")
        training_picture(record["history"], path, title=title, teacher=teacher["top1"] if teacher else None, force=True)

    return draw


def show(record: dict[str, Any]) -> None:
    """Print how good the model was and is."""
    from morph.cli import console

    console.line(f"parameters     {record['params_after']:,}")
    console.line(f"multiply-adds  {record['macs_after']:,}  (one sample; 1 multiply-add = 1)")
    last = record["history"][-1]
    console.line(f"rounds         {last['epoch']:,}, {last['step']:,} steps, {record['seconds']:,.0f} s")
    console.line(f"training       loss {last['loss']:.4f}, top-1 {last['top1']:.2%}, last round")
    before, after, teacher = (record.get(f"scores_{name}") for name in ("before", "after", "teacher"))
    if before is None or after is None:
        console.line("validation     none")
        return
    if teacher:
        console.line(f"teacher        top-1 {teacher['top1']:.2%}, top-5 {teacher['top5']:.2%}")
    tops = (f"{name} {before[key]:.2%} -> {after[key]:.2%}" for name, key in (("top-1", "top1"), ("top-5", "top5")))
    console.line(f"validation     {', '.join(tops)}, {after['images']:,} images")
    which = f"of round {record['best_epoch']}, the best" if record["keep"] == "best" else "of the last round"
    console.line(f"weights        {which}; the best in validation was round {record['best_epoch']}")
