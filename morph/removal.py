"""Remove chosen units from a model: cut the tensors, fit the module, compare with the zeroing reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.edits import composed
from morph.analysis.recording import Inputs, named_tensors
from morph.analysis.tags import values_in
from morph.carriers import Altered, Carried, Carrier, Form, LeftWhole
from morph.couplings import Choice
from morph.cut import apply_plan
from morph.errors import CheckFailedError, EditError
from morph.fitting import Misfit
from morph.garbage import uncollected
from morph.plan import Check, Resize
from morph.shaking import named_shaken, shaken
from morph.zeroing import double_copy, run_doubled, run_zeroed

LIMIT = 1e-9


@dataclass(frozen=True)
class Removed(Altered):
    """A cut model.

    Attributes:
        choice: What was dropped in the end.
        times: For each label of the analysis, 0 if it is gone.
    """

    choice: Choice
    times: Labels


class Remover:
    """Cuts units out of one model.

    Args:
        model: Not touched.
        inputs: What it was analysed with.
        analysis: What hangs together in it.
        form: As for `morph.carriers.Carrier`.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, analysis: Analysis, form: Form = "auto") -> None:
        self.model, self.analysis = model, analysis
        self.carrier = Carrier(model, inputs, analysis, form)

    @uncollected()
    def remove(self, choice: Choice) -> Removed:
        """Cut ``choice`` as far as it can be carried; what cannot is left whole and said so.

        Raises:
            AnalysisError: If a coupling or unit does not exist, or an axis would lose its last position.
            EditError: If not even an empty choice can be carried.
        """
        left: list[LeftWhole] = []
        choice = {name: np.asarray(units, np.int64) for name, units in choice.items() if len(units)}
        recording = self.analysis.recording
        if recording.settled < recording.evaluated:  # then only plain zeros can be compared with
            for name in [n for n in choice if self.analysis.couplings[n].statistics]:
                reason = "a statistic runs over them, and shapes in this model depend on values"
                left.append(LeftWhole(name, len(choice.pop(name)), reason))
        while True:
            times = self.analysis.times(choice)
            edits = self.analysis.resizes(times)
            found = self.carrier.carry(edits, times)
            if isinstance(found, Carried):
                model = self.carrier.apply(found)
                return Removed(model, found.plan, tuple(left), found.form, found.why_graph, choice, times)
            names = self._blamed(found, choice, times)
            if not names:
                raise EditError(
                    f"{type(self.model).__name__} cannot carry a cut: {found.reason} (in {found.module or 'the model'})"
                )
            for name in names:
                left.append(LeftWhole(name, len(choice[name]), f"{found.reason} (in {found.module or 'the model'})"))
                del choice[name]

    def _blamed(self, misfit: Misfit, choice: Choice, times: Labels) -> list[str]:
        """The couplings to leave whole because of a misfit: the smallest one that helps, else all that are there."""
        names = (
            list(self._present(misfit.call, choice, times)) or self._in_module(misfit.module, choice) or list(choice)
        )
        names.sort(key=lambda name: self._weight(name))
        for name in names[:-1]:
            some = self.carrier.siblings(name, choice)
            rest = {k: v for k, v in choice.items() if k not in some}
            kept = self.analysis.times(rest)
            again = self.carrier.fitter.fit(self.analysis.resizes(kept), kept)
            if again.misfit is None or again.misfit.call > misfit.call:
                return some
        return names

    def _present(self, call: int, choice: Choice, times: Labels) -> Iterator[str]:
        """The chosen couplings that are cut on a tensor of a call."""
        analysis = self.analysis
        recorded = analysis.recording.calls[call]
        found: set[int] = set()
        for value in values_in((recorded.args, recorded.kwargs, recorded.output)):
            for roots in analysis.roots(value):
                if (times[roots] == 0).any():
                    found.update(analysis.units.on(np.where(times[roots] == 0, roots, 0))[0].tolist())
        for name in choice:
            if not found.isdisjoint(analysis.numbers[name].tolist()):
                yield name

    def _in_module(self, path: str, choice: Choice) -> list[str]:
        """The chosen couplings that lie on a tensor of a module."""
        couplings = self.analysis.couplings
        return [name for name in choice if any(p.tensor.startswith(f"{path}.") for p in couplings[name].places)]

    def _weight(self, name: str) -> int:
        """How much hangs on a coupling: the positions of all its places."""
        return sum(place.positions.size for place in self.analysis.couplings[name].places)


def check_cut(removed: Removed, model: nn.Module, inputs: Inputs, analysis: Analysis, limit: float = LIMIT) -> Check:
    """Compare a cut model with the model before; see `compare_cut`."""
    edits = [edit for edit in removed.plan.edits if isinstance(edit, Resize)]
    return compare_cut(removed.model, edits, removed.times, model, inputs, analysis, limit)


def checks_of(removed: Removed, model: nn.Module, inputs: Inputs, analysis: Analysis) -> list[Check]:
    """Compare a cut model with the model before; where weights are all zero, on random ones in their place too."""
    checks = [check_cut(removed, model, inputs, analysis)]
    twin = shaken(model)
    if twin is not None:
        cut = dataclasses.replace(removed, model=apply_plan(twin, removed.plan))
        checks.append(named_shaken(check_cut(cut, twin, inputs, analysis)))
    return checks


def compare_cut(
    cut: nn.Module,
    edits: Sequence[Resize],
    times: Labels,
    model: nn.Module,
    inputs: Inputs,
    analysis: Analysis,
    limit: float = LIMIT,
) -> Check:
    """Compare a cut model with the model before whose readers see zero, in float64 and evaluation mode.

    Args:
        cut: The cut model.
        edits: How its tensors were cut.
        times: For each label of the analysis 0 if it is gone.
        model: The model before; not touched.
        inputs: What it was analysed with.
        analysis: What hangs together in it.
        limit: Largest difference allowed, relative to the largest output.
    """
    recording = analysis.recording
    if recording.settled < recording.evaluated:
        return compare("parameters set to zero", run_silenced(edits, model, inputs), cut, inputs, limit)
    return compare("zeroing reference", run_zeroed(analysis.state, model, inputs, times), cut, inputs, limit)


def run_silenced(edits: Sequence[Resize], model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run the model before in float64 with every parameter zero where it was cut, and scaled where an edit says so.

    For units over which no statistic runs this is the zeroing reference, whatever the code does with values.
    """
    twin = double_copy(model)
    tensors = dict(named_tensors(twin))
    with torch.no_grad():
        for (name, axis), factors in _factors(edits).items():
            tensor = tensors[name]
            shaped = factors.to(tensor.device).reshape([-1 if a == axis else 1 for a in range(tensor.dim())])
            fill = 1.0 if name.endswith("running_var") else 0.0
            tensor.copy_(torch.where(shaped == 0, fill, tensor * shaped))
    return run_doubled(twin, inputs)


def _factors(edits: Sequence[Resize]) -> dict[tuple[str, int], Tensor]:
    """For each axis that is cut, the factor of each old position after all edits: zero where it is gone."""
    scales: dict[tuple[str, int], Labels] = {}
    sizes = {(e.tensor, e.axis): e.size for e in reversed(edits)}
    for edit in edits:
        key, index = (edit.tensor, edit.axis), list(edit.index)
        scales[key] = scales.get(key, np.ones(edit.size))[index] * np.array(edit.scale or 1.0)
    found = {}
    for key, kept in composed(edits).items():
        factors = torch.zeros(sizes[key], dtype=torch.float64)
        factors[torch.from_numpy(kept)] = torch.from_numpy(np.asarray(scales[key], np.float64))
        found[key] = factors
    return found


def compare(name: str, wanted: Sequence[Tensor], model: nn.Module, inputs: Inputs, limit: float | None) -> Check:
    """Compare the outputs of ``model`` in float64 with ``wanted``; another form, or a value not finite, is infinite.

    Raises:
        CheckFailedError: If there is no output to compare.
    """
    if not wanted:
        raise CheckFailedError(
            "check failed: the model puts out no floating-point tensor, so nothing can be compared; let it put one "
            "out, or switch verification off"
        )
    samples = next((len(t) for t in wanted if t.dim()), 1)
    got = run_doubled(model, inputs)
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return Check(name, float("inf"), float("inf"), limit, samples, "float64")
    difference = relative = largest = 0.0
    for before, after in zip(wanted, got, strict=True):
        if not before.numel():
            continue
        moved, size = float((before - after).abs().max()), float(before.abs().max())
        if not (moved < float("inf")):
            return Check(name, float("inf"), float("inf"), limit, samples, "float64")
        difference, largest = max(difference, moved), max(largest, size)
        relative = max(relative, moved / size if size else (0.0 if moved == 0 else float("inf")))
    if not largest:
        name += ": all outputs are zero, so this shows nothing"
    return Check(name, difference, relative, limit, samples, "float64")


def promise(removed: Removed, analysis: Analysis) -> str:
    """What a check of a cut says, in words."""
    text = (
        "outputs in evaluation mode, float64: equal to those of the model before with zeros where its readers saw "
        "what was cut"
    )
    norms = sorted({s for name in removed.choice for s in analysis.couplings[name].statistics})
    if norms:
        text += f"; {len(norms)} statistics run over the channels that stay, e.g. {norms[0]}"
    return text
