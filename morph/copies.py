"""Widen a model without changing what it computes: Net2WiderNet (Chen et al. 2016, section 3) on units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.growth import Growth, Layout, copied
from morph.analysis.recording import Inputs
from morph.carriers import Altered, Carried, Carrier, Form, LeftWhole
from morph.couplings import Choice
from morph.cut import apply_plan
from morph.errors import EditError
from morph.fitting import Misfit
from morph.plan import Check, Resize
from morph.removal import LIMIT, compare
from morph.shaking import named_shaken, shaken
from morph.verify import precision
from morph.zeroing import run_doubled


@dataclass(frozen=True)
class Widened(Altered):
    """A wider model.

    Attributes:
        copies: For each coupling, the units that were copied.
    """

    copies: Choice


class Widener:
    """Copies units of one model.

    Args:
        model: Not touched.
        inputs: What it was analysed with.
        analysis: What hangs together in it.
        form: As for `morph.carriers.Carrier`.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, analysis: Analysis, form: Form = "auto") -> None:
        self.model, self.analysis = model, analysis
        self.carrier = Carrier(model, inputs, analysis, form)
        self.growth = Growth(analysis.state)
        self.obstacles = self.growth.obstacles()
        self.uniform = self.growth.uniform()
        self.readings = self.growth.readings()

    def obstacle(self, name: str) -> str:
        """Why no unit of a coupling can be copied exactly; empty if they can."""
        return next((self.obstacles[a] for a in self._labels(name) if a in self.obstacles), "")

    def only_together(self, name: str) -> str:
        """Which statistic runs over a coupling, so that only all of it can be copied, equally often; empty if none.

        A text that begins with ``!`` means that no copies are exact.
        """
        found = [self.uniform[a] for a in self._labels(name) if a in self.uniform]
        return next((t for t in found if t.startswith("!")), found[0] if found else "")

    def reshaped(self, name: str) -> bool:
        """Whether a reshape splits or merges an axis with units of a coupling."""
        return any(label in self.growth.split for label in self._labels(name))

    def _labels(self, name: str) -> list[int]:
        units = self.analysis.units
        mine = np.zeros(units.count, bool)
        mine[self.analysis.numbers[name]] = True
        found: list[int] = np.unique(units.atom[mine[units.unit]]).tolist()
        return found

    def widen(self, copies: Mapping[str, Mapping[int, int]]) -> Widened:
        """Let units be there several times.

        Args:
            copies: For each coupling, how often each of some units shall be there afterwards (2: one copy).

        Raises:
            AnalysisError: If a coupling or unit does not exist.
            EditError: If nothing of it can be carried.
        """
        wanted = {name: dict(some) for name, some in copies.items() if some}
        left: list[LeftWhole] = []
        for name in list(wanted):
            reason = self._refusal(name, wanted[name])
            if reason:
                left.append(LeftWhole(name, len(wanted.pop(name)), reason))
        while True:
            found = self._attempt(wanted)
            if isinstance(found, Carried):
                done = {n: np.array(sorted(some), np.int64) for n, some in wanted.items()}
                model = self.carrier.apply(found)
                return Widened(model, found.plan, tuple(left), found.form, found.why_graph, done)
            culprit = self._at_fault(found, wanted)
            reason = f"{found.reason} (in {found.module or 'the model'})"
            if culprit is None:
                raise EditError(f"{type(self.model).__name__} cannot carry copies: {reason}")
            some = self.carrier.siblings(culprit, list(wanted))
            left += [LeftWhole(one, len(wanted.pop(one)), reason) for one in some]

    def _refusal(self, name: str, units: Mapping[int, int]) -> str:
        """Why these copies of a coupling are not exact."""
        self.analysis.times({name: np.array(list(units), np.int64)})
        reason = self.obstacle(name)
        if reason:
            return reason
        norm = self.only_together(name)
        if norm.startswith("!"):
            return f"{norm[1:]} runs over them"
        everything = len(units) == self.analysis.couplings[name].units and len(set(units.values())) == 1
        return "" if not norm or everything else f"{norm} runs over them: only whole multiples of all of them are exact"

    def times(self, wanted: Mapping[str, Mapping[int, int]]) -> Labels:
        """How often each label will be there.

        Raises:
            EditError: If reshapes contradict each other.
        """
        state, units = self.analysis.state, self.analysis.units
        factor = np.ones(units.count, np.int64)
        for name, some in wanted.items():
            factor[self.analysis.numbers[name][np.array(list(some), np.int64)]] = list(some.values())
        times = np.ones(state.atoms.count, np.int64)
        grown = factor[units.unit] > 1
        np.multiply.at(times, units.atom[grown], factor[units.unit[grown]])
        return copied(state, times[state.atoms.roots()])

    def edits(self, times: Labels) -> list[Resize]:
        """The edits of every parameter and buffer.

        Raises:
            EditError: If copies cannot be laid out.
        """
        layout = Layout(self.analysis.state, times)
        found = []
        for name, value in self.analysis.recording.sources.items():
            for axis, labels in enumerate(self.analysis.state.tag(value).axes):
                if len(labels) < 2 or (times[labels] == 1).all():
                    continue
                index = layout.index(labels)
                scale: tuple[float, ...] = ()
                if (name, axis) in self.readings:
                    read = np.bincount(index, minlength=len(labels))
                    group = self.readings[name, axis]
                    read = read if group is None else read // times[group]
                    scale = tuple((1.0 / read[index]).tolist())
                found.append(Resize(name, axis, len(labels), tuple(index.tolist()), scale))
        return found

    def _attempt(self, wanted: Mapping[str, Mapping[int, int]]) -> Carried | Misfit:
        try:
            times = self.times(wanted)
            edits = self.edits(times)
        except EditError as error:
            return Misfit(-1, "", str(error))
        return self.carrier.carry(edits, times)

    def _at_fault(self, misfit: Misfit, wanted: Mapping[str, Mapping[int, int]]) -> str | None:
        """The coupling to leave because of a misfit: one of that module, with overlaps first; None if none is left."""
        couplings = self.analysis.couplings
        near = [n for n in wanted if any(p.tensor.startswith(f"{misfit.module}.") for p in couplings[n].places)]
        ranked = sorted(near or wanted, key=lambda n: (not couplings[n].overlaps, couplings[n].units))
        return ranked[0] if ranked else None


def check_growth(widened: Widened, model: nn.Module, inputs: Inputs) -> tuple[Check, ...]:
    """Compare a wider model with the model before, in float64 and evaluation mode.

    Where weights are all zero, both are compared on random ones in their place too.
    """
    limit = max(LIMIT, precision(model))
    checks = [compare("outputs", run_doubled(model, inputs), widened.model, inputs, limit)]
    twin = shaken(model)
    if twin is not None:
        wider = apply_plan(twin, widened.plan)
        checks.append(named_shaken(compare("outputs", run_doubled(twin, inputs), wider, inputs, limit)))
    return tuple(checks)
