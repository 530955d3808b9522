"""What every result file says of its conditions, and where it goes."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def conditions() -> dict[str, object]:
    """Processor, threads and versions; no names of hosts."""
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine()
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def save(question: str, results: Mapping[str, object]) -> Path:
    """Write ``results/<question>_<cores>core-cpu_<date>.json`` (or ``gpu``) with the conditions."""
    facts = conditions()
    hardware = "gpu" if facts["accelerator"] else f"{facts['cores']}core-cpu"
    path = RESULTS / f"{question}_{hardware}_{facts['date']}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps({"question": question, "conditions": facts, **results}, indent=1) + "\n")
    return path


def in_turn(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time each piece of work ``rounds`` times, in turn, after one warm-up; ratios are to the first of each round."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for name in work:
        work[name]()
    for _ in range(rounds):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    base = next(iter(times.values()))
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(v / b for v, b in zip(values, base, strict=True)),
            "ratio_min": min(v / b for v, b in zip(values, base, strict=True)),
            "ratio_max": max(v / b for v, b in zip(values, base, strict=True)),
        }
        for name, values in times.items()
    }
