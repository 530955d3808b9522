"""`morph search`: search for the family of students that learns best from a teacher, and train some of it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from morph.cli.search_arguments import add_search

if TYPE_CHECKING:
    from morph.cli.search_setup import Job
    from morph.family.search import FamilySearch
    from morph.family.students import StudentRow
    from morph.family.study import FamilyStudy
    from morph.training.progress import FitProgress

EPILOG = """\
examples:
  morph search --teacher teacher.pt --data cifar/ --augment --out search/
  morph search --teacher teacher.pt --data images/ --budget-epochs 5,10,20 --rounds 3 --max-params 300K --out search/
  morph search --no-kd --data cifar/ --augment --compare search/ --out plain/
  morph search --budget-epochs 30,60,120 --dry-run --json                  what a round costs

A family is a random graph generator: a Watts-Strogatz graph of cells, each an Erdos-Renyi graph of modules, each a
Watts-Strogatz graph of units (ReLU, 3x3 convolution, batch norm). Its eight numbers are searched together with the
temperature and the weight of distillation; each configuration is judged by one network, as wide as the limit allows.

Stopped or killed, the same command goes on where it was. Without --workers it ends with the same study each time.

many machines: the same command on each, with a storage that all reach, and --join on all but one:
  morph search ... --storage postgresql://host/search --workers 4 --out search/
  morph search ... --storage postgresql://host/search --workers 4 --out search/ --join
Where machines share the folder too, a trial that is taken up goes on from its last state; where each has its own, it
begins anew. Their clocks need not agree."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = EPILOG
    add_search(parser)


def run(args: argparse.Namespace) -> int:
    """Run."""
    from morph.cli import console
    from morph.cli.running import asked_to_stop
    from morph.cli.search_results import read_other, show, write
    from morph.cli.search_setup import set_up
    from morph.cli.search_workers import Workers
    from morph.family.budgets import Budgets

    budgets = Budgets(args.budget_epochs)
    other = read_other(args.compare)
    job = set_up(args, budgets)
    if args.dry_run:
        return _dry_run(args, budgets)
    with asked_to_stop() as stop, Workers(args) as workers:
        try:
            found = _search(args, job, stop)
            workers.wait()
            if args.join:
                console.note(f"the search is done: {len(found.rows)} configurations")
                return 0
            students = _students(args, job, found, stop)
        except KeyboardInterrupt:
            console.error(f"interrupted; the same command goes on from {args.out}")
            return 130
    record = write(args, job, found, students, other)
    if args.json:
        console.document(record)
        return 0
    show(record)
    return 0


def _dry_run(args: argparse.Namespace, budgets: Any) -> int:
    """Say what a round costs, and all rounds."""
    from morph.cli import console

    one, total = budgets.plan(), budgets.plan().times(args.rounds)
    if args.json:
        document = {"schema": 1, "command": args.command, **asdict(one), "rounds": args.rounds}
        console.document(document | {"total": asdict(total), "written": []})
        return 0
    rows = [
        (str(i), " -> ".join(f"{rung.configurations} x {rung.epochs}" for rung in rungs))
        for i, rungs in enumerate(budgets.brackets())
    ]
    console.table("a round", ("bracket", "configurations x epochs"), rows, left=2)
    console.line()
    for name, plan in (("a round", one), (f"{args.rounds} rounds", total)):
        console.line(
            f"{name:<12}  {plan.configurations:,} configurations, {plan.trainings:,} trainings, "
            f"{plan.epochs_resumed:,} epochs ({plan.epochs:,} if none was resumed)"
        )
    console.line("dry run: nothing trained, nothing written")
    return 0


def _search(args: argparse.Namespace, job: Job, stop: Callable[[], bool]) -> FamilySearch:
    """The first phase, with the live table."""
    from morph.cli import console
    from morph.cli.search_table import Table
    from morph.family.search import search_family
    from morph.family.takeover import Patience

    with console.board(quiet=args.json) as board:
        table = Table(board, job.settings.budgets, args.rounds, max(1, args.workers or 1))

        def change(study: FamilyStudy) -> None:
            table.rows = study.rows()
            table.draw(time.monotonic())

        def progress(now: FitProgress) -> None:
            table.training = f"round {now.epoch}, loss {now.loss:.4f}, lr {now.lr:.2g}"
            table.draw(time.monotonic(), often=True)

        return search_family(
            job.settings,
            job.trainer(progress, stop),
            args.out,
            rounds=args.rounds,
            storage=args.storage,
            name=args.study,
            patience=Patience(args.beat, args.patience),
            on_change=change,
            should_stop=stop,
        )


def _students(args: argparse.Namespace, job: Job, found: FamilySearch, stop: Callable[[], bool]) -> list[StudentRow]:
    """The second phase."""
    from morph.cli import console
    from morph.family.students import train_students

    if not args.students:
        return []
    with console.progress("students", quiet=args.json) as advance:
        done = 0

        def progress(now: FitProgress) -> None:
            total = args.students * now.steps
            advance(done * now.steps + now.step, total, f"student {done + 1}/{args.students}, loss {now.loss:.4f}")

        def change(rows: list[StudentRow]) -> None:
            nonlocal done
            done = len(rows)

        return train_students(
            found.best.candidate,
            job.settings.task,
            args.students,
            args.student_epochs,
            job.student_trainer(progress, stop),
            args.out,
            change,
        )
