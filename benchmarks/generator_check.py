"""Are all networks of the generator what they should be? Random settings are built, trained for a step and pruned.

    python benchmarks/generator_check.py --settings 200 --max-params 300000

Each network must stay within the limit (and the next width must not), be trained for a step with finite values, and be
analysed exactly: no operator without a rule, and a pruning by half that equals the network with zeros in the place of
what was cut, in float64. What fails is named in the result; the exit code is then 1. Killed, it begins anew.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import asdict
from typing import Any

import machine
import torch
from torch import nn
from torch.nn import functional as F

import morph
from morph.errors import MorphError
from morph.family.generator import Drawn, Task, draw_network
from morph.family.settings import RANGES, FamilySettings


def draw_settings(draws: random.Random) -> FamilySettings:
    """Anything within the ranges that a search covers."""
    values: dict[str, Any] = {
        name: draws.randint(low, high) if isinstance(low, int) and isinstance(high, int) else draws.uniform(low, high)
        for name, (low, high) in RANGES.items()
    }
    return FamilySettings(**values)


def check(settings: FamilySettings, task: Task, seed: int) -> dict[str, Any]:
    """One network; what is wrong with it stands under ``fault``."""
    row: dict[str, Any] = {"settings": asdict(settings), "seed": seed, "fault": None}
    begun = time.perf_counter()
    try:
        drawn = draw_network(settings, task, seed)
        row |= {"units": drawn.blueprint.units, "width": drawn.width, "params": drawn.params}
        row["draw_seconds"] = time.perf_counter() - begun
        row["fault"] = _within(drawn, task) or _step(drawn, task)
        begun = time.perf_counter()
        row["fault"] = row["fault"] or _pruned(drawn, task, row)
        row["prune_seconds"] = time.perf_counter() - begun
    except (MorphError, RuntimeError) as error:
        row["fault"] = f"{type(error).__name__}: {error}"
    return row


def _within(drawn: Drawn, task: Task) -> str | None:
    """Whether the real network has the width that it should have."""
    found = sum(p.numel() for p in drawn.model.parameters())
    if found != drawn.params or found > task.max_params:
        return f"{found} parameters, {drawn.params} were counted"
    wider = task.params(drawn.blueprint, drawn.width + 1)
    return None if wider > task.max_params else f"a wider network has {wider} parameters"


def _step(drawn: Drawn, task: Task) -> str | None:
    """A step of SGD on random images."""
    model = drawn.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4)
    images, labels = torch.randn(4, *task.input_shape), torch.arange(4) % task.num_classes
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(images), labels).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    optimizer.step()
    if without:
        return f"no gradient for {without[0]}"
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        return "a weight is not finite after a step"
    same = sum(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return None if not same else f"{same} tensors did not move"


def _settle(drawn: Drawn, task: Task) -> None:
    """Give batch norms the statistics of two batches: with those of birth, deep networks overflow."""
    norms = [module for module in drawn.model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for _ in range(2):
            drawn.model.train()(torch.randn(8, *task.input_shape))


def _pruned(drawn: Drawn, task: Task, row: dict[str, Any]) -> str | None:
    """Prune by half; `morph.prune` refuses by itself what is not exact."""
    images = torch.randn(2, *task.input_shape)
    _settle(drawn, task)
    analysis = morph.analyse(drawn.model.eval(), images)
    row |= {"couplings": len(analysis.couplings), "free": analysis.free()}
    if analysis.unknown:
        return f"no rule for {sorted(analysis.unknown)}"
    result = morph.prune(drawn.model, images, ratio=0.5)
    row |= {"params_pruned": result.record.after["params"], "relative": result.record.checks[0].relative}
    row["form"] = type(result.model).__name__
    return None


def main() -> int:
    """Check as many as asked for and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=int, default=200)
    parser.add_argument("--max-params", type=int, default=300_000)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draws, task = random.Random(args.seed), Task((3, args.side, args.side), 10, args.max_params)
    rows = []
    begun = time.perf_counter()
    for seed in range(args.settings):
        torch.manual_seed(seed)
        rows.append(check(draw_settings(draws), task, seed))
        now = rows[-1]
        print(f"{seed + 1}/{args.settings}: {now.get('units')} units, {now['fault'] or 'good'}", file=sys.stderr)
    faults = [row for row in rows if row["fault"]]
    good = [row for row in rows if not row["fault"]]
    summary = {
        "settings": len(rows),
        "good": len(good),
        "seconds": time.perf_counter() - begun,
        "max_params": args.max_params,
        "share_of_limit": [
            min(r["params"] for r in good) / args.max_params,
            max(r["params"] for r in good) / args.max_params,
        ],
        "units": [min(r["units"] for r in good), max(r["units"] for r in good)],
        "largest_relative": max(r["relative"] for r in good),
        "least_free": min(r["free"] for r in good),
    }
    print(machine.save("generator_check", {"summary": summary, "faults": faults, "rows": rows}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
