"""The whole of `morph expand zoo:darts-10-trained --target-params 1.4M`, once for each policy.

    python benchmarks/expand_darts.py          # writes results/expand_darts_*.json

Measured: seconds, probe passes, peak memory, and where it ends. Each policy runs as the command line in a process of
its own; seconds are also given as multiples of one plain step (forward and backward, batch 64) of the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from machine import in_turn, save
from torch.nn import functional as F

from morph.zoo import build

POLICIES = {
    "fisher": ["--fisher"],
    "fisher, scores reused": ["--fisher", "--reuse-scores"],
    "fisher-per-param": ["--fisher-per-param"],
    "uniform": ["--uniform"],
    "random": ["--random"],
}


def plain_step() -> float:
    """Seconds of a plain step of the student."""
    model, x, y = build("darts-10").eval(), torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,))
    return in_turn({"plain": lambda: F.cross_entropy(model(x), y).backward()}, 5)["plain"]["seconds"]


def run(flags: list[str]) -> dict[str, Any]:
    """One expansion by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "expand",
            "zoo:darts-10-trained",
            *flags,
            "--target-params",
            "1.4M",
            "--json",
            "--out",
            f"{folder}/t.pt",
        ]
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-m", "morph.cli.main", *command], stdout=subprocess.PIPE) as child:
            out = child.stdout.read() if child.stdout else b""
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if child.returncode:
            raise SystemExit(f"morph {' '.join(command)} ended with {child.returncode}")
    record = json.loads(out)
    kept = (
        "params_before",
        "params_after",
        "macs_before",
        "macs_after",
        "probe_passes",
        "distance_relative",
        "max_abs_diff",
    )
    groups = {c["name"]: c["groups_after"] for c in record["cells"]}
    return {
        "seconds": seconds,
        "peak_memory_mb": usage.ru_maxrss / 1e3,
        **{key: record[key] for key in kept},
        "steps": len(record["steps"]),
        "groups_after": groups,
    }


def main() -> None:
    """Measure, print and save. The plain step comes last, so that it does not swell the peak memory of children."""
    results = {name: run(flags) for name, flags in POLICIES.items()}
    step = plain_step()
    for name, result in results.items():
        result["plain_steps"] = result["seconds"] / step
        print(name, json.dumps(result), flush=True)
    print(save("expand_darts", {"plain_step_seconds": step, "policies": results}))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    main()
