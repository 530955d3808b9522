"""A list of jobs that any number of processes work at, each result a file; what was done is not done again."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

Job = dict[str, Any]


class Bench(Protocol):
    """What does the jobs."""

    work: Path

    def run(self, job: Job) -> Job:
        """Do one job."""


def main(
    doc: str | None,
    name: str,
    make: Callable[[Path, Path], Bench],
    jobs: Iterable[Job],
    summary: Callable[[Any], None],
    show: Iterable[str],
) -> None:
    """Read the command line; work, or sum up.

    Args:
        doc: Its first line says what the script asks.
        name: Of the folder for what is kept between runs.
        make: Opens data and folder.
        jobs: The most wanted first.
        summary: Writes the results that there are.
        show: What of a result is printed.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    parser.add_argument("--work", type=Path, default=Path(".work") / name, help="what is kept between runs")
    parser.add_argument("--summary", action="store_true", help="write the results that there are")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = make(args.data, args.work)
    if args.summary:
        summary(bench)
    else:
        work_at(jobs, bench.run, args.work / "jobs", show)


def spread(errors: Sequence[float]) -> Job:
    """Mean, standard deviation and number of some errors."""
    deviation = statistics.stdev(errors) if len(errors) > 1 else None
    return {"error_mean": statistics.mean(errors), "error_sd": deviation, "seeds": len(errors)}


def work_at(jobs: Iterable[Job], run: Callable[[Job], Job], folder: Path, show: Iterable[str] = ()) -> None:
    """Do the jobs that nobody has taken.

    Args:
        jobs: Plain values, the most wanted first.
        run: Does one, and gives what is known of it afterwards.
        folder: Holds the results, and which jobs are taken.
        show: What of a result is printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        place = folder / f"{zlib.crc32(json.dumps(job, sort_keys=True).encode()):016x}"
        try:
            os.close(os.open(place.with_suffix(".taken"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        try:
            result = {**job, **run(job)}
        except BaseException:
            place.with_suffix(".taken").unlink()
            raise
        place.with_suffix(".json").write_text(json.dumps(result))
        print({key: result[key] for key in (*job, *show)}, flush=True)


def results_in(folder: Path) -> list[Job]:
    """All results that there are."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
