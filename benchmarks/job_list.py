"""A list of jobs that any number of processes work at, each result a file; what was done is not done again."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Job = dict[str, Any]


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
