"""What does a cut cost beside Torch-Pruning's build and step, and beside one plain training step?

    python benchmarks/prune_speed.py                      # every model of torchvision; goes on where it was stopped
    python benchmarks/prune_speed.py --only resnet        # those whose names contain it
    python benchmarks/prune_speed.py --summary            # writes results/prune_speed_*.json

The models are those that both prune exactly, as the newest results of `coverage.py` say. Each has a process of its
own, in which the two take turns after a round that warms up: analysis, decision and cut of half of the channels by
magnitude on our side, without the check at the end, as Torch-Pruning has none; building its graph of dependencies and
its step on the other, in a copy that was made before. The plain step is forward and backward of one sample. Times are
of the processor, one thread, the median of the rounds; ratios are within a round.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import coverage_models
import torch
from coverage_summary import outcome_peer
from machine import RESULTS, save
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LINES = Path(__file__).parents[1] / ".work" / "prune_speed.jsonl"
ROUNDS, LONG = 3, 20.0  # seconds of a round from which on one is enough
Line = dict[str, Any]


def chosen() -> dict[str, bool]:
    """Names of the models of torchvision that both prune exactly, and whether Torch-Pruning does so by its recipe."""
    newest = max(RESULTS.glob("coverage_*.json"), key=lambda path: path.stem[-10:])
    models = json.loads(newest.read_text())["models"]
    ours = {line["name"] for line in models if line["side"] == "ours" and line.get("prune") == "exact"}
    peers = {line["name"]: line for line in models if line["side"] == "peer" and outcome_peer(line) == "exact"}
    both = sorted(name for name in ours & peers.keys() if name.startswith("torchvision/"))
    return {name: peers[name]["peer"] == "exact" for name in both}


def child(name: str, *, recipe: bool) -> None:
    """Measure one model and print its line."""
    import peer

    import morph

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    entry = next(entry for entry in coverage_models.all_entries() if entry.name == name)
    torch.manual_seed(1)
    model, inputs = entry.build()

    def ours() -> Callable[[], object]:
        return lambda: morph.prune(model, inputs, ratio=0.5, score="l2", ranking="local", verify=False)

    def theirs() -> Callable[[], object]:
        other = copy.deepcopy(model).requires_grad_(True)
        found = peer.find_recipe(other, entry.kind) if recipe else peer.Recipe()
        return lambda: peer.build(other, inputs, entry.kind, found).step()

    def plain() -> Callable[[], object]:
        other = copy.deepcopy(model).requires_grad_(True)
        return lambda: step(other, peer.first_sample(inputs))

    works = {"ours": ours, "peer": theirs, "plain": plain}
    rounds: list[dict[str, float]] = []
    while not rounds or (len(rounds) <= ROUNDS and sum(rounds[0].values()) < LONG):
        rounds.append({what: seconds(make()) for what, make in works.items()})
    warm = rounds[1:] or rounds
    medians = {f"{what}_s": statistics.median(times[what] for times in warm) for what in works}
    ratios = [times["ours"] / times["peer"] for times in warm]
    facts = {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    params = sum(p.numel() for p in model.parameters())
    print(json.dumps({"name": name, "params": params, "recipe": recipe, "rounds": len(warm), **medians, **facts}))


def seconds(work: Callable[[], object]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    work()
    return time.process_time() - start


def step(model: nn.Module, inputs: Any) -> None:
    """Forward and backward in the mode that the model is in."""
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    losses = [x.float().sum() for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    sum(losses, torch.zeros(())).backward()


def measure(name: str, *, recipe: bool) -> Line | None:
    """The line of a model from a process of its own; None, with what it said, if there is none."""
    command = [sys.executable, __file__, "--child", name, *(["--recipe"] if recipe else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        print(f"{name}: {(run.stderr.strip().splitlines() or ['no word'])[-1]}", file=sys.stderr, flush=True)
        return None
    found: Line = json.loads(run.stdout.splitlines()[-1])
    return found


def read(path: Path) -> list[Line]:
    """The lines so far, by the name of the model."""
    texts = path.read_text().splitlines() if path.exists() else []
    lines = {line["name"]: line for line in map(json.loads, texts)}
    return [lines[name] for name in sorted(lines)]


def summary(lines: list[Line]) -> Line:
    """Median and worst of all models, and by their number of parameters."""
    ratios = {line["name"]: line["ratio"] for line in lines}
    worst = max(ratios, key=lambda name: ratios[name])
    plain = statistics.median(line["ours_s"] / line["plain_s"] for line in lines)
    groups = {"below 10 M": (0, 1e7), "10 to 50 M": (1e7, 5e7), "above 50 M": (5e7, 1e12)}
    parts = {
        title: [line["ratio"] for line in lines if low <= line["params"] < high]
        for title, (low, high) in groups.items()
    }
    return {
        "models": len(lines),
        "ratio_median": statistics.median(ratios.values()),
        "ratio_max": ratios[worst],
        "slowest_beside_peer": worst,
        "longest_s": max(line["ours_s"] for line in lines),
        "ours_over_plain_step_median": plain,
        "by_parameters": {t: {"models": len(r), "ratio_median": statistics.median(r)} for t, r in parts.items() if r},
    }


def main() -> None:
    """Measure what is missing, or sum up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression that the name must contain")
    parser.add_argument("--lines", type=Path, default=LINES, metavar="FILE", help="where lines are read and added")
    parser.add_argument("--summary", action="store_true", help="measure nothing, write the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, recipe=args.recipe)
        return
    args.lines.parent.mkdir(parents=True, exist_ok=True)
    done = {line["name"] for line in read(args.lines)}
    for name, recipe in () if args.summary else chosen().items():
        if name not in done and re.search(args.only, name) and (line := measure(name, recipe=recipe)):
            with args.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{name}: {line['ours_s']:.3f} s, {line['ratio']:.2f} of Torch-Pruning's", flush=True)
    if lines := read(args.lines):
        found = summary(lines)
        if args.summary:
            print(save("prune_speed", {**found, "lines": lines}))
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
