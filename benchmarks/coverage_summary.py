"""The tables of `coverage.py`, in Markdown, from its lines."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

Line = dict[str, Any]
NAMED = [f"torchvision/{name}" for name in ("densenet121", "densenet201", "efficientnet_v2_s", "efficientnet_v2_l")]
OUTCOMES = ("exact", "refused", "disputed", "wrong", "crashed")
PEER_OUTCOMES = ("exact", "unproven", "wrong", "crashed")
OURS = ["ours", "models", *OUTCOMES, "pruned", "widened", "free", "seconds", "slowest"]
PEER = ["Torch-Pruning", "models", *PEER_OUTCOMES, "plain exact", "seconds", "slowest"]


def outcome_ours(line: Line) -> str:
    """``exact``, ``refused``, ``disputed``, ``wrong``, or ``crashed`` (which counts every other end).

    Disputed: the judge says that the cut differs, and our own check, whose reference knows over which positions each
    statistic runs, that it does not.
    """
    if "ended" in line:
        return "crashed"
    ends = [line.get("prune", ""), line.get("widen", "")]
    if ends[0] == "differs" and ends[1] == "exact" and line.get("own_check") == "done":
        return "disputed"
    if any(end in ("differs", "shape changed", "does not run") or end.startswith("caught") for end in ends):
        return "wrong"
    if any(end.startswith("refused") for end in ends):
        return "refused"
    return "exact" if ends == ["exact", "exact"] else "crashed"


def outcome_peer(line: Line) -> str:
    """``exact``, ``unproven`` (runs, but nothing could be compared), ``wrong`` (runs, differs), or ``crashed``.

    The better of the recipe of its examples and the plain use.
    """
    names = {"exact": "exact", "blind": "unproven", "not measured": "unproven", "differs": "wrong"}
    found = [names.get(line.get(way, ""), "crashed") for way in ("peer", "plain")]
    return min(found, key=PEER_OUTCOMES.index)


def seconds_peer(line: Line) -> float:
    """Seconds of the processor for the use that is exact; the recipe's if both are. One thread, on a shared machine."""
    return float(line["peer_cpu" if line["peer"] == "exact" else "plain_cpu"])


def print_summary(lines: list[Line]) -> None:
    """Print both tables and the figures on speed and memory."""
    ours = {line["name"]: line for line in lines if line["side"] == "ours"}
    peer = {line["name"]: line for line in lines if line["side"] == "peer"}
    for header, row, side in ((OURS, _row_ours, ours), (PEER, _row_peer, peer)):
        kinds = list(dict.fromkeys(line["kind"] for line in side.values()))
        if kinds:
            _table(header, [row(kind, [line for line in side.values() if line["kind"] == kind]) for kind in kinds])
    _print_ratios(ours, peer)


def _row_ours(kind: str, lines: list[Line]) -> list[str]:
    """One row of the first table."""
    outcomes = [outcome_ours(line) for line in lines]
    done = [sum(line.get(step) == "exact" for line in lines) for step in ("prune", "widen")]
    free = [line["free"] for line in lines if "free" in line]
    seconds = [line["prune_cpu"] for line in lines if line.get("prune") == "exact"]
    counts = [outcomes.count(outcome) for outcome in OUTCOMES]
    cells = [len(lines), *counts, *done]
    return [kind, *map(str, cells), f"{statistics.median(free):.0%}" if free else "-", *_span(seconds)]


def _row_peer(kind: str, lines: list[Line]) -> list[str]:
    """One row of the second table."""
    outcomes = [outcome_peer(line) for line in lines]
    counts = [outcomes.count(outcome) for outcome in PEER_OUTCOMES]
    plain = sum(line.get("plain") == "exact" for line in lines)
    seconds = [seconds_peer(line) for line in lines if outcome_peer(line) == "exact"]
    return [kind, *map(str, [len(lines), *counts, plain]), *_span(seconds)]


def _span(seconds: list[float]) -> list[str]:
    """Median and largest."""
    return [f"{statistics.median(seconds):.2f}", f"{max(seconds):.1f}"] if seconds else ["-", "-"]


def _print_ratios(ours: dict[str, Line], peer: dict[str, Line]) -> None:
    """Time and memory of both sides over the models that both can do."""
    both = [
        name
        for name in ours.keys() & peer.keys()
        if ours[name].get("prune") == "exact" and outcome_peer(peer[name]) == "exact"
    ]
    for title, chosen in (("torchvision", _of("torchvision/", both)), ("all", _of("", both))):
        ratios = {name: ours[name]["prune_cpu"] / seconds_peer(peer[name]) for name in chosen}
        if ratios:
            worst = max(ratios, key=lambda name: ratios[name])
            print(
                f"{title}: {len(ratios)} models that both prune exactly; our processor time over Torch-Pruning's is "
                f"{statistics.median(ratios.values()):.2f} in the median, {ratios[worst]:.2f} at most ({worst})"
            )
    for name in NAMED:
        if name in ours and "prune_cpu" in ours[name]:
            other = peer.get(name, {}).get("peer_cpu")
            said = f"; Torch-Pruning {other:.2f} s" if other else ""
            print(f"{name}: {ours[name]['params'] / 1e6:.1f} M parameters, {ours[name]['prune_cpu']:.2f} s{said}")
    memory: Callable[[Line], float] = lambda line: max(line.get("prune_memory", 0.0), line.get("analyse_memory", 0.0))  # noqa: E731
    large = [line for line in ours.values() if line.get("params", 0) > 5e6]
    if large:
        most = max(large, key=memory)
        print(f"memory: at most {memory(most):.2f} times the model on top of it ({most['name']}; models over 5 M)")


def _of(prefix: str, names: list[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(prefix))


def _table(header: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()
