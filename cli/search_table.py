"""The live table of `morph search`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from morph.cli.console import Board

if TYPE_CHECKING:
    from morph.family.budgets import Budgets
    from morph.family.candidate import Candidate, TrialRow

_SHOWN = 14  # rows
_APART = 0.5  # seconds between two drawings that tell little

HEADER = ("trial", "bracket", "top", "middle", "bottom", "T", "weight", "parameters")


class Table:
    """Draws the trials, the best first, and how long it will take.

    Args:
        board: Where.
        budgets: Of the search.
        rounds: In all.
        workers: How many train at the same time.
    """

    def __init__(self, board: Board, budgets: Budgets, rounds: int, workers: int) -> None:
        self.board, self.budgets, self.workers = board, budgets, workers
        self.plan = budgets.plan().times(rounds)
        self.rows: list[TrialRow] = []
        self.training = ""
        self.drawn = -math.inf

    def draw(self, now: float, *, often: bool = False) -> None:
        """Draw, unless that was done a moment ago and this is called often."""
        if often and now - self.drawn < _APART:
            return
        self.drawn = now
        header = (*HEADER, *(f"epoch {epochs}" for epochs in self.budgets.epochs), "")
        self.board(self.title(), header, [self.cells(row) for row in self._shown()], self.training)

    def _shown(self) -> list[TrialRow]:
        """Those that run, and the best of the others."""
        running = [row for row in self.rows if row.state == "running"]
        others = [row for row in self.rows if row.state != "running"]
        others.sort(key=lambda row: (row.state == "failed", -row.epochs, -row.accuracy if row.accuracies else 0.0))
        return [*running[:_SHOWN], *others[: max(0, _SHOWN - len(running))]]

    def title(self) -> str:
        """How far it is."""
        ended = sum(row.state != "running" for row in self.rows)
        left = self.seconds_left()
        return f"{ended} of {self.plan.configurations} configurations ended" + (
            f", about {duration(left)} left" if left is not None else ""
        )

    def seconds_left(self) -> float | None:
        """By the time that epochs took so far; None where none was trained."""
        done = sum(len(row.curve) for row in self.rows)
        if not done:
            return None
        each = sum(row.seconds for row in self.rows) / done
        saved = sum(self.budgets.last - len(row.curve) for row in self.rows if row.state == "failed")
        return each * max(0, self.plan.epochs_resumed - done - min(saved, self.plan.epochs_resumed)) / self.workers

    def cells(self, row: TrialRow) -> tuple[str, ...]:
        """A row; what runs by its record and was not drawn yet waits for its turn."""
        reached = (f"{row.accuracies[b]:.2%}" if b in row.accuracies else "" for b in self.budgets.epochs)
        params = "" if row.params is None else f"{row.params:,}"
        state = "waits" if row.state == "running" and row.params is None else row.state
        words = row.reason[:40] if row.state == "failed" and row.reason else state
        return (str(row.number), str(row.bracket), *numbers(row.candidate), params, *reached, words)


def numbers(candidate: Candidate) -> tuple[str, ...]:
    """The ten numbers in five cells."""
    family = candidate.family
    return (
        f"{family.top_nodes}/{family.top_neighbours}/{family.top_rewiring:.2f}",
        f"{family.middle_nodes}/{family.middle_probability:.2f}",
        f"{family.bottom_nodes}/{family.bottom_neighbours}/{family.bottom_rewiring:.2f}",
        "-" if candidate.temperature is None else f"{candidate.temperature:.1f}",
        "-" if candidate.weight is None else f"{candidate.weight:.2f}",
    )


def duration(seconds: float) -> str:
    """A time in words."""
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if days else f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
