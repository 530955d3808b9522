"""What every surgery tells on stdout: sizes, distance from the target, checks, couplings, and what was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def show_sizes(record: Mapping[str, Any]) -> None:
    """Print the sizes and, if there was a target, the distance from it."""
    from morph.cli import console

    console.line()
    for name, what, note in (
        ("params", "parameters", ""),
        ("macs", "multiply-adds", "  (one sample; 1 multiply-add = 1)"),
    ):
        before, after = record[f"{name}_before"], record[f"{name}_after"]
        console.line(f"{what:<14} {before:,} -> {after:,}{note}")
    if "target" in record:
        off = f"{record['distance']:+,} ({record['distance_relative']:+.2%})"
        console.line(f"target         {record['target']:,} {record['target_metric']}: off by {off}")


def show_checks(record: Mapping[str, Any]) -> None:
    """Print what was verified."""
    from morph.cli import console

    for check in record["checks"]:
        difference = f"max |difference| {check['max_abs_diff']:.2e}, relative {check['relative']:.1e}"
        limit = "no limit" if check["limit"] is None else f"limit {check['limit']:.0e}"
        console.line(
            f"check          {check['name']}: {difference} ({limit}, {check['dtype']}, {check['samples']} samples)"
        )


def show_couplings(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the units of each coupling."""
    from morph.cli import console

    cells = []
    for row in rows:
        before, after = row["units_before"], row["units_after"]
        cells.append((row["name"], str(before) if before == after else f"{before} -> {after}"))
    console.table(title, ("coupling", "units"), cells)


def show_form(record: Mapping[str, Any]) -> None:
    """Print whether the model is of its own class, and what no rule covers."""
    from morph.cli import console

    why = f"a traced graph: {record['why_graph']}" if record["form"] == "graph" else "the model's own class"
    console.line(f"form           {why}")
    config = record.get("config")  # of a model of transformers
    if config:
        console.line(f"config         {config if isinstance(config, str) else _changes(config)}")
    if record["unknown_operators"]:
        named = ", ".join(f"{name} ({times})" for name, times in record["unknown_operators"].items())
        console.line(f"no rule for    {named}: what they touch stays whole")


def _changes(config: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in config.items())


def show_left(items: Sequence[Mapping[str, Any]], what: str) -> None:
    """Print how many were left whole, and why the first few were, one of each reason."""
    from morph.cli import console

    reasons: dict[str, str] = {}
    for item in items:
        reasons.setdefault(item["reason"], item.get("coupling") or item.get("name") or "")
    for number, (reason, name) in enumerate(list(reasons.items())[:3]):
        head = f"left whole     {len(items)} {what}," if number == 0 else " " * 14
        console.line(f"{head} e.g. {name}: {reason}")
