"""Does a teacher help the search for a family? With and without one, over the same number of trials.

    python benchmarks/family_search.py --data cifar/ --teacher teacher.pt --budget-epochs 3,6,12 --rounds 4

Two searches by `morph search`, one with a teacher and one with the labels alone, with the same seed, budgets, images
and limit; the same command goes on where it was killed. Options that are not listed go to both searches as they are,
e.g. ``--range top_nodes=3,4`` or ``--batch-size 32``; the teacher is asked once for each image. What is written: best
and mean accuracy of the search by budget, the spread within the best family (students trained the same way), the rank
correlation between budgets, and the time of the search itself beside that of the trainings. The paper's figures for
CIFAR-100, 30 and 120 epochs: 0.49 without a teacher, 0.82 with one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import machine

SIDES = ("with a teacher", "labels alone")


def search(args: argparse.Namespace, side: str, folder: Path) -> dict[str, Any]:
    """One search; gives its record."""
    teacher = ["--teacher", args.teacher, "--cache"] if side == SIDES[0] else ["--no-kd"]
    size = ["--input", args.input] if side == SIDES[1] else []
    more = ["--compare", str(args.out / "teacher")] if side == SIDES[1] else []
    command = [
        sys.executable, "-m", "morph.cli.main", "search", *teacher, *size, *more, "--out", str(folder),
        "--budget-epochs", args.budget_epochs, "--rounds", str(args.rounds), "--max-params", args.max_params,
        "--students", str(args.students), "--student-epochs", str(args.student_epochs), "--seed", str(args.seed),
        *(["--data", args.data] if args.data else []), *(["--limit", str(args.limit)] if args.limit else []),
        *args.more,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    record: dict[str, Any] = json.loads((folder / "search.json").read_text())
    return record


def facts(record: dict[str, Any]) -> dict[str, Any]:
    """What is compared."""
    trials = [row for row in record["trials"] if row["state"] != "failed"]
    by_budget = {}
    for budget in sorted({int(b) for row in trials for b in row["accuracies"]}):
        found = [row["accuracies"][str(budget)] for row in trials if str(budget) in row["accuracies"]]
        by_budget[str(budget)] = {"trials": len(found), "best": max(found), "mean": statistics.fmean(found)}
    return {
        "trials": len(record["trials"]),
        "failed": len(record["trials"]) - len(trials),
        "by_budget": by_budget,
        "best": record["best"]["accuracies"],
        "best_candidate": record["best"]["candidate"],
        "correlations": record["correlations"],
        "importances": record["importances"],
        "students": [row["accuracy"] for row in record["students"]],
        "spread": record["spread"],
        "overhead": record["overhead"],
        "training_seconds": sum(row["seconds"] for row in record["trials"]),
    }


def _plain(value: Any) -> Any:
    """An option as it stands in the result: of a file its name alone."""
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value.rsplit("/", 1)[-1] if isinstance(value, str) else value


def main() -> int:
    """Search twice and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="labelled images, as for morph search (default: the sample inside)")
    parser.add_argument("--teacher", default="zoo:darts-10-trained")
    parser.add_argument("--input", default="3x32x32")
    parser.add_argument("--budget-epochs", default="1,2,4")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-params", default="300K")
    parser.add_argument("--students", type=int, default=4)
    parser.add_argument("--student-epochs", type=int, default=4)
    parser.add_argument("--limit", type=int, help="read at most so many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("family-search"), help="folder of both searches")
    args, args.more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found = {
        side: facts(search(args, side, args.out / folder))
        for side, folder in zip(SIDES, ("teacher", "labels"), strict=True)
    }
    for side, values in found.items():
        print(f"{side}:")
        print("  best " + ", ".join(f"{row['best']:.2%} at {budget}" for budget, row in values["by_budget"].items()))
        print("  ranks " + ", ".join(f"{c['first']}-{c['second']}: {c['rho']}" for c in values["correlations"]))
        print(f"  spread {values['spread']}, overhead {values['overhead']:.2%}")
    options = {key: _plain(value) for key, value in vars(args).items() if key != "out"}
    print(machine.save("family_search", {"options": options, "searches": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
