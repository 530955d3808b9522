"""What every result file says of its conditions, and where it goes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import date
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

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


def high_water() -> float:
    """Peak memory of this process in MB. What `resource` tells would include that of the parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def tensor_peak(work: Callable[[], object]) -> float:
    """Peak in MB of what PyTorch's allocator hands out during ``work``, above what it held at its begin; no noise."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        work()
    with tempfile.TemporaryDirectory() as folder:
        run.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"]))
    totals = [int(e["args"]["Total Allocated"]) for e in memory]
    return (max(totals) - totals[0] + int(memory[0]["args"]["Bytes"])) / 1e6


def peaks(script: str, name: str, works: Iterable[str]) -> dict[str, float]:
    """Peak memory in MB of processes that do each work three times, above one that only prepares it: medians of 3."""
    measured = {}
    for what in ("nothing", *works):
        command = [sys.executable, script, "--one", name, "--work", what]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
        measured[what] = statistics.median(float(run.stdout) for run in runs)
    base = measured.pop("nothing")
    return {what: round(value - base, 1) for what, value in measured.items()}


def compare_costs(
    script: str,
    question: str,
    cases: Collection[str],
    works: Callable[[str], Mapping[str, Callable[[], object]]],
    facts: Callable[[str], Mapping[str, object]] = lambda name: {},
) -> None:
    """Time and peak memory of pieces of work for each case: measure, print and save; or do one and print its peak.

    Args:
        script: The file that calls this; it is run again for memory.
        question: Name of the results file.
        cases: Names of the cases.
        works: The pieces of work of a case; ratios are to the first.
        facts: More to tell of a case.
    """
    parser = argparse.ArgumentParser(description=f"Measure {question}; see the first lines of the file.")
    parser.add_argument("--one", choices=list(cases), help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    if args.one:
        work = works(args.one)
        for _ in range(3 * (args.work != "nothing")):
            work[args.work]()
        print(high_water())
        return
    times = {}
    for name in cases:  # all times first: memory needs no quiet machine
        times[name] = in_turn(works(name), args.rounds)
        print(name, json.dumps({work: round(time["ratio"], 3) for work, time in times[name].items()}), flush=True)
    results = {}
    for name, timed in times.items():
        results[name] = {"time": timed, "peak_memory_mb": peaks(script, name, timed), **facts(name)}
        print(name, json.dumps(results[name]), flush=True)
    print(save(question, {"models": results, "rounds": args.rounds}))
