"""Units doubled in small steps, ordered by what each gains for what it adds."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from torch import nn

from morph.analysis import Sizes, analyse, count_sizes
from morph.batches import Batch
from morph.carriers import Form, LeftWhole
from morph.copies import Widened, Widener, check_growth
from morph.couplings import Coupling
from morph.errors import EditError, TargetError
from morph.inputs import picked, samples_in
from morph.plan import Check, Plan, Resize
from morph.policies import Metric
from morph.scores import Loss
from morph.unit_scores import score_units

WIDEST = 8  # how often a unit may be there


@dataclass(frozen=True)
class GainStep:
    """One step of growth.

    Attributes:
        move: What is done.
        name: The cell whose groups are merged, or the coupling of which units are copied.
        gain: The Fisher score of what grows, in the unit of the loss.
        added: What the step adds of the target's metric, by which ``gain`` was divided to choose it.
        params: Parameters of the whole model after the step.
        macs: Multiply-adds of one sample after the step.
    """

    move: Literal["regroup", "widen"]
    name: str
    gain: float
    added: int
    params: int
    macs: int

    @property
    def rate(self) -> float:
        """Gain for each parameter, or multiply-add, that it adds."""
        return self.gain / max(self.added, 1)


@dataclass(frozen=True)
class Offer:
    """Units that could be copied next: a step, and which units."""

    step: GainStep
    units: tuple[int, ...]

    @property
    def rate(self) -> float:
        """That of the step."""
        return self.step.rate


class Copier:
    """Chooses and carries out copies on one model.

    Args:
        model: Not touched.
        batches: What to score with; the model is analysed on two samples of the first.
        start: Size of the model.
        metric: What the target counts.
        share: Share of the units that a step copies.
        ignore: Patterns of couplings to leave.
        form: As for `morph.prune`.
        loss: Gives one value per sample.

    Attributes:
        left: The couplings that are not copied, and why.
        steps: What was taken.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        start: Sizes,
        metric: Metric,
        share: float,
        ignore: Sequence[str],
        form: Form,
        loss: Loss,
    ) -> None:
        self.model, self.start, self.metric, self.share = model, start, metric, share
        self._settings: dict[str, Any] = {"ignore": ignore, "form": form, "loss": loss, "batches": batches}
        self.inputs = picked(batches[0][0], slice(0, 2))
        self.analysis = analyse(model, self.inputs)
        self.unchanged = self.analysis.sizes()
        self.widener = Widener(model, self.inputs, self.analysis, form)
        self.left: list[LeftWhole] = []
        reasons = {name: self._why_not(name, ignore) for name in self.analysis.couplings}
        self.free = [name for name, reason in reasons.items() if not reason]
        self.left = [LeftWhole(name, 0, reason) for name, reason in reasons.items() if reason]
        free = [self.analysis.couplings[name] for name in self.free]
        scores = score_units(model, free, "fisher", data=batches, loss=loss) if free else {}
        self.scores = {name: np.asarray(values.numpy()) for name, values in scores.items()}
        self._reset()

    def on(self, model: nn.Module, start: Sizes) -> Copier:
        """The same for another model of another size."""
        return Copier(model, start=start, metric=self.metric, share=self.share, **self._settings)

    def _reset(self) -> None:
        """Take everything back."""
        self.copies: dict[str, dict[int, int]] = {}
        self.steps: list[GainStep] = []
        self.sizes = self.start
        self.bounds = dict.fromkeys(self.free, float("inf"))
        self.fresh: dict[str, Offer] = {}

    def _why_not(self, name: str, ignore: Sequence[str]) -> str:
        """Why no unit of a coupling is copied; empty if some may be."""
        coupling = self.analysis.couplings[name]
        recording = self.analysis.recording
        used = {call.module for call in recording.calls[: recording.evaluated]}
        norm = self.widener.only_together(name)
        if any(fnmatchcase(name, pattern) for pattern in ignore):
            return "asked to be left"
        if not any(place.tensor.rpartition(".")[0] in used for place in coupling.places):
            return "does not run in evaluation mode"
        if coupling.blocks > 1:
            return "positions inside groups or heads; whole ones are copied"
        return self.widener.obstacle(name) or (f"{norm.lstrip('!')} runs over them: not in small steps" if norm else "")

    def best(self) -> Offer | None:
        """The copies that gain most for what they add; None if nothing can be copied any further.

        What a step adds never falls and what it gains never rises by other steps, so an old rate bounds the new one.
        """
        while self.bounds:
            name = max(self.bounds, key=lambda name: self.bounds[name])
            if name in self.fresh:
                return self.fresh[name]
            try:
                offer = self._offer(name)
            except EditError as error:
                self.left.append(LeftWhole(name, 0, str(error)))
                self.free.remove(name)
                offer = None
            if offer is None:
                del self.bounds[name]
            else:
                self.fresh[name], self.bounds[name] = offer, offer.rate
        return None

    def _offer(self, name: str) -> Offer | None:
        """The next step of a coupling; None if it is as wide as it may be."""
        times = np.ones(self.analysis.couplings[name].units)
        for unit, copies in self.copies.get(name, {}).items():
            times[unit] = copies
        room = np.flatnonzero(times < WIDEST)
        if not len(room):
            return None
        order = room[np.argsort(-(self.scores[name] / times**2)[room], kind="stable")]
        return self._priced(name, tuple(order[: max(1, round(len(times) * self.share))].tolist()))

    def _priced(self, name: str, units: tuple[int, ...]) -> Offer:
        times = self.copies.get(name, {})
        gain = sum(float(self.scores[name][unit]) / times.get(unit, 1) for unit in units)
        after = self._size(self._with(name, units))
        added = getattr(after, self.metric) - getattr(self.sizes, self.metric)
        return Offer(GainStep("widen", name, gain, added, after.params, after.macs), units)

    def _with(self, name: str, units: Sequence[int]) -> dict[str, dict[int, int]]:
        """The copies with some units doubled: halves and quarters of weights are exact in floating point."""
        mine = dict(self.copies.get(name, {}))
        for unit in units:
            mine[unit] = mine.get(unit, 1) * 2
        return {**self.copies, name: mine}

    def _size(self, copies: Mapping[str, Mapping[int, int]]) -> Sizes:
        """Size of the model with some copies."""
        before = self.unchanged
        after = count_sizes(self.analysis, self.widener.times(copies))
        macs = (after.macs - before.macs) // samples_in(self.inputs)
        return Sizes(self.start.params + after.params - before.params, self.start.macs + macs)

    def take(self, offer: Offer) -> None:
        """Carry an offer into the books."""
        self.copies = self._with(offer.step.name, offer.units)
        self.sizes = Sizes(offer.step.params, offer.step.macs)
        self.steps.append(offer.step)
        self.fresh = {}

    def reach(self, target: int) -> Widened:
        """Copy until the target is met; what turns out not to be carried, or not to line up, is left, and chosen anew.

        Raises:
            TargetError: If the target is out of reach.
        """
        while True:
            self._choose(target)
            widened = self.widener.widen(self.copies)
            failed = list(widened.left)
            shared = [n for n in self.copies if self.analysis.couplings[n].overlaps]
            if (
                shared
                and not failed
                and not all(check.passed for check in check_growth(widened, self.model, self.inputs))
            ):
                failed = [LeftWhole(n, 0, "copies do not line up after its reshapes (measured)") for n in shared]
            if not failed:
                return widened
            self.left += failed
            self.free = [n for n in self.free if n not in {item.coupling for item in failed}]

    def _choose(self, target: int) -> None:
        """Take the best offers until the target is met; of the last only as many units as are needed."""
        self._reset()
        while getattr(self.sizes, self.metric) < target:
            offer = self.best()
            if offer is None:
                reach = f"{getattr(self.sizes, self.metric):,}"
                raise TargetError(
                    f"the target of {target:,} {self.metric} is out of reach: with every group that is worth it merged "
                    f"and {len(self.free)} couplings {WIDEST} times as wide the model has {reach}"
                )
            if getattr(offer.step, self.metric) >= target:
                offer = self._trimmed(offer, target)
            self.take(offer)

    def _trimmed(self, offer: Offer, target: int) -> Offer:
        """The first units of an offer that suffice."""
        low, high, found = 0, len(offer.units), offer
        while high - low > 1:
            middle = (low + high) // 2
            some = self._priced(offer.step.name, offer.units[:middle])
            if getattr(some.step, self.metric) >= target:
                high, found = middle, some
            else:
                low = middle
        return found


def unit_rows(couplings: Iterable[Coupling], plan: Plan, copied: Container[str]) -> list[dict[str, Any]]:
    """How many units each coupling has before and after a plan that copies units of some of them.

    Args:
        couplings: Of the model that the plan's resizes are for.
        plan: What is carried out.
        copied: Names of the couplings of which units are copied. Positions of others may be copied with these, as those
            inside a head are with the head; they have as many units as before.
    """
    resized = {(edit.tensor, edit.axis): edit for edit in plan.edits if isinstance(edit, Resize)}
    rows = []
    for coupling in couplings:
        after = coupling.units
        places = [(p, resized[p.tensor, p.axis]) for p in coupling.places if (p.tensor, p.axis) in resized]
        if coupling.name in copied and places:
            place, edit = places[0]
            after = int(np.isin(edit.index, place.positions[:, 0]).sum())
        rows.append({"name": coupling.name, "units_before": coupling.units, "units_after": after})
    return rows


def _same(checks: tuple[Check, ...]) -> bool:
    return all(check.passed for check in checks)
