"""How many models can be pruned and widened exactly without a word about them, and at what price; beside Torch-Pruning.

    python benchmarks/coverage.py                    # all models, both sides, one after the other; hours
    python benchmarks/coverage.py --only resnet      # the models whose name matches a pattern
    python benchmarks/coverage.py --peer             # one side only
    python benchmarks/coverage.py --summary --save   # nothing new: tables from what is there, and the results file

Each model and side is a process of its own, with a limit on time and memory, and adds one line of JSON to ``--lines``;
what stands there is not run again. Both sides cut half of the channels of the same model with the same randomised
weights, and `zeroing.judge` compares each result with zeroing what was removed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import coverage_models
import torch
import zeroing
from coverage_summary import print_summary
from machine import save
from torch import Tensor, nn

LINES = Path(__file__).with_name("coverage.jsonl")
MARK = "coverage-result "
Line = dict[str, Any]


def engine() -> Any:
    """The package under test."""
    import morph

    return morph


def ours(model: nn.Module, inputs: Any) -> Iterator[Line]:
    """Analyse, prune to half, widen by a quarter; what is known after each is given at once."""
    yield analysing(model, inputs)
    yield pruning(model, inputs)
    yield widening(model, inputs)


def analysing(model: nn.Module, inputs: Any) -> Line:
    """How it was traced, what was found, and how much of the model is free to change."""
    line: Line = {}

    def analyse() -> None:
        analysis = engine().analyse(model, inputs)
        line["traced"] = str(analysis.traced)
        line["couplings"], line["unknown"] = len(analysis.couplings), len(analysis.unknown)
        line["free"] = analysis.free()

    with cost(line, "analyse", model):
        line["analyse"] = attempt(analyse)
    return line


def pruning(model: nn.Module, inputs: Any) -> Line:
    """Prune without its own check for the time, judge here, and then see what its own check says."""
    line: Line = {}
    half: Any = None

    def prune() -> None:
        nonlocal half
        half = engine().prune(model, inputs, ratio=0.5, score="l2", ranking="local", verify=False)

    with cost(line, "prune", model):
        line["prune"] = attempt(prune)
    if half is not None:
        line |= judged("prune", zeroing.judge(model, half.model, kept_by(half.record.plan), inputs))
        line["prune_params"] = size(half.model)
        if line["prune"] in ("exact", "blind") and line["prune_params"] >= size(model):
            line["prune"] = "not smaller"
        line["own_check"] = attempt(lambda: engine().prune(model, inputs, ratio=0.5, score="l2", ranking="local"))
    return line


def widening(model: nn.Module, inputs: Any) -> Line:
    """Widen without its own check, and compare outputs here."""
    line: Line = {}
    wide: Any = None

    def widen() -> None:
        nonlocal wide
        wide = engine().widen(model, inputs, ratio=1.25, verify=False)

    with cost(line, "widen", model):
        line["widen"] = attempt(widen)
    if wide is not None:
        line |= judged("widen", zeroing.judge(model, wide.model, {}, inputs))
        line["widen_params"] = size(wide.model)
        if line["widen"] == "exact" and line["widen_params"] <= size(model):
            line["widen"] = "not larger"
    return line


def peer(model: nn.Module, inputs: Any, kind: str) -> Iterator[Line]:
    """Torch-Pruning by the recipe of its examples, and plainly where that is something else."""
    import peer as torch_pruning_side

    recipe = bool(torch_pruning_side.find_recipe(model, kind))
    yield {"recipe": recipe}
    line = peer_pruning(model, inputs, kind, recipe=True)
    yield {f"peer{field}": value for field, value in line.items()}
    if recipe:
        line = peer_pruning(model, inputs, kind, recipe=False)
    yield {f"plain{field}": value for field, value in line.items()}


def peer_pruning(model: nn.Module, inputs: Any, kind: str, *, recipe: bool) -> Line:
    """One run of Torch-Pruning on a copy; what came of it is the field without a name."""
    import peer as torch_pruning_side

    pruned = copy.deepcopy(model)
    found = torch_pruning_side.find_recipe(pruned, kind) if recipe else torch_pruning_side.Recipe()
    line: Line = {}
    run: Any = None

    def prune() -> None:
        nonlocal run
        run = torch_pruning_side.prune(pruned, inputs, kind, found)

    with cost(line, "", model):
        line[""] = attempt(prune)
    if run is not None:
        line |= judged("", zeroing.judge(model, pruned, run.kept, inputs, torch_pruning_side.answer))
        line |= {"_build_seconds": run.build_seconds, "_step_seconds": run.step_seconds}
        line |= {"_seconds": run.build_seconds + run.step_seconds, "_params": size(pruned)}
        if line[""] in ("exact", "blind") and line["_params"] >= size(model):
            line[""] = "not smaller"
    return line


def attempt(work: Callable[[], Any]) -> str:
    """Run it: ``done``, ``refused: reason`` for an error that was meant, ``crashed: error`` for any other."""
    from morph.errors import CheckFailedError, MorphError

    try:
        work()
    except CheckFailedError as error:
        return f"caught: {zeroing.brief(error)}"
    except MorphError as error:
        return f"refused: {zeroing.brief(error)}"
    except Exception as error:
        return f"crashed: {zeroing.brief(error)}"
    return "done"


def judged(way: str, verdict: zeroing.Verdict) -> Line:
    """A verdict as fields of a line."""
    line = {way: verdict.status, f"{way}_relative": verdict.relative, f"{way}_effect": verdict.effect}
    return line | {f"{way}_note": verdict.note}


@contextmanager
def cost(line: Line, what: str, model: nn.Module) -> Iterator[None]:
    """Note seconds, seconds of processor, and the memory that the block took on top, as a multiple of the model."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start, busy, before = time.perf_counter(), time.process_time(), memory("VmRSS")
    yield
    line[f"{what}_seconds"], line[f"{what}_cpu"] = time.perf_counter() - start, time.process_time() - busy
    line[f"{what}_memory"] = max(0, memory("VmHWM") - before) / held(model)


def memory(field: str) -> int:
    """Bytes of this process: resident now (``VmRSS``), or at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def held(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])


def size(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def kept_by(plan: Any) -> dict[str, dict[int, Tensor]]:
    """What the resizing edits of a plan leave of each axis, in positions of the original."""
    kept: dict[str, dict[int, Tensor]] = {}
    for edit in plan.edits:
        if hasattr(edit, "index"):
            axes = kept.setdefault(edit.tensor, {})
            axes[edit.axis] = axes.get(edit.axis, torch.arange(edit.size))[torch.tensor(edit.index, dtype=torch.long)]
    return kept


# One model and side, in a process of its own


def child(name: str, side: str, most_params: float, memory_gb: float) -> None:
    """Build the model, measure, print a marked line after each step; the last one is the fullest."""
    import resource
    import warnings

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 2**30), int(memory_gb * 2**30)))
    entry = next(entry for entry in coverage_models.all_entries() if entry.name == name)
    torch.manual_seed(1)
    model, inputs = entry.build()
    line: Line = {"name": name, "side": side, "kind": entry.kind, "params": size(model)}
    if line["params"] > most_params:
        line["skipped"] = True
        print(MARK + json.dumps(line))
        return
    warm_up(side)
    for part in ours(model, inputs) if side == "ours" else peer(model, inputs, entry.kind):
        line |= part | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}
        print(MARK + json.dumps(line), flush=True)


def warm_up(side: str) -> None:
    """A tiny model first, so that imports and first calls are not counted for either side."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5)).eval()
    inputs = (torch.randn(2, 3, 3, 3),)
    list(ours(model, inputs) if side == "ours" else peer(model, inputs, "classification"))


def measure(entry: coverage_models.Entry, side: str, args: argparse.Namespace) -> Line:
    """Run `child` under a time limit and give its line, or one that says how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TQDM_DISABLE": "1"}
    if side == "peer":
        environment["TIMM_FUSED_ATTN"] = "0"  # as its examples set it
    command = [sys.executable, __file__, "--child", entry.name, side]
    command += ["--most-params", str(args.most_params), "--memory", str(args.memory)]
    ended = ""
    with subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            out, _ = process.communicate(timeout=args.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, _ = process.communicate()
            ended = f"time: over {args.limit:.0f} s"
    texts = out.strip().splitlines() or [""]
    marked = [text for text in texts if text.startswith(MARK)]
    line = json.loads(marked[-1].removeprefix(MARK)) if marked else {}
    if not ended and process.returncode:
        full = "memory" in texts[-1].lower() or process.returncode == -signal.SIGKILL
        ended = f"{'memory' if full else 'crashed'}: {texts[-1][:300]} (exit {process.returncode})"
    return {"name": entry.name, "side": side, "kind": entry.kind, **line} | ({"ended": ended} if ended else {})


# The sweep


def read(path: Path) -> dict[tuple[str, str], Line]:
    """The lines by model and side; of several, the last."""
    texts = path.read_text().splitlines() if path.exists() else []
    lines = [json.loads(text) for text in texts]
    return {(line["name"], line["side"]): line for line in lines}


def sweep(args: argparse.Namespace) -> None:
    """Measure what is missing."""
    sides = [side for side in ("ours", "peer") if getattr(args, side) or not (args.ours or args.peer)]
    done = read(args.lines)
    entries = [entry for entry in coverage_models.all_entries() if re.search(args.only, entry.name)]

    def one(entry: coverage_models.Entry) -> None:
        for side in sides:
            if (entry.name, side) in done:
                continue
            line = measure(entry, side, args)
            if not line.get("skipped"):
                with args.lines.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            ends = [line.get("prune" if side == "ours" else "peer"), line.get("ended")]
            said = "; ".join(end for end in ends if end) or "skipped"
            print(f"{entry.name} {side}: {said}", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, entries))


def main() -> None:
    """Sweep, save, summarise."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="regular expression that the name must contain")
    parser.add_argument("--ours", action="store_true", help="only our side")
    parser.add_argument("--peer", action="store_true", help="only Torch-Pruning's side")
    parser.add_argument("--summary", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; times are only fair with one")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of one model and side")
    parser.add_argument("--memory", type=float, default=16, metavar="GB", help="of one model and side")
    parser.add_argument("--most-params", type=float, default=1e12, metavar="N", help="leave larger models for later")
    parser.add_argument("--lines", type=Path, default=LINES, metavar="FILE", help="where lines are read and added")
    parser.add_argument("--save", action="store_true", help="write the lines and the conditions to results/")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1], args.most_params, args.memory)
        return
    if not args.summary:
        sweep(args)
    if args.save:
        save("coverage", {"models": list(read(args.lines).values())})
    print_summary(list(read(args.lines).values()))


if __name__ == "__main__":
    main()
