"""Which channels of a model hang together, exactly: `analyse` and what it gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from morph.analysis.admission import admit
from morph.analysis.atoms import Labels
from morph.analysis.grouping import group_units, list_frozen
from morph.analysis.propagation import Propagation, propagate
from morph.analysis.recorder import record
from morph.analysis.recording import How, Inputs, Recording, Value, tensors_in
from morph.analysis.rules import RULES
from morph.analysis.tags import operator_name
from morph.analysis.units import Axis, Units, distinct_axes, find_units
from morph.analysis.user_rules import USER_RULES
from morph.couplings import Choice, Coupling, Frozen, Positions
from morph.errors import AnalysisError
from morph.garbage import uncollected
from morph.plan import Plan, Resize

__all__ = ["Analysis", "Sizes", "analyse", "analysis_of", "count_sizes", "length_of"]


@dataclass(frozen=True)
class Sizes:
    """How large a model is, or would be.

    Attributes:
        params: Number of parameters.
        macs: Multiply-adds of the whole batch that was analysed (1 multiply-add = 1).
    """

    params: int
    macs: int


@dataclass(frozen=True, eq=False)
class Analysis:
    """What hangs together in a model, on the inputs that it was run with.

    Attributes:
        couplings: Everything that can be removed, copied or gated, by name.
        frozen: What must stay, and why, the largest first.
        unknown: Operators without a rule, with how often they pinned something.
        traced: Whether the run had shapes only, or data.
        state: The labels behind all this.
        units: The units behind the couplings.
        numbers: For each coupling, the numbers of its units in ``units``.
        parameters: Names of the parameters; all other tensors are buffers.
        axes: One of each different axis of all tensors that has something free.
    """

    couplings: Mapping[str, Coupling]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, int]
    traced: How
    state: Propagation
    units: Units
    numbers: Mapping[str, Positions]
    parameters: frozenset[str]
    axes: tuple[Axis, ...]
    _known: dict[int, list[Labels]] = field(default_factory=dict, repr=False)

    @property
    def recording(self) -> Recording:
        """The run behind the analysis."""
        return self.state.recording

    def free(self) -> float:
        """Share of all parameters that lie on at least one unit."""
        stays = np.ones(self.state.atoms.count, np.int64)
        stays[self.units.atom] = 0
        lengths = self.lengths(stays)
        free = total = 0
        for name, value in self.recording.sources.items():
            if name in self.parameters and 0 not in value.shape:
                size = math.prod(value.shape)
                kept = math.prod([length_of(roots, lengths) for roots in self.roots(value)])
                total, free = total + size, free + size - kept
        return free / total if total else 0.0

    def roots(self, value: Value) -> list[Labels]:
        """The final labels of each axis of a tensor."""
        found = self._known.get(value.number)
        if found is None:
            found = self._known[value.number] = [self.state.forms.of(labels) for labels in self.state.tag(value).axes]
        return found

    def runs(self, coupling: Coupling) -> bool:
        """Whether evaluation uses a parameter that a coupling lies on; some are only there for training."""
        recording = self.recording
        calls = recording.calls[: recording.evaluated]
        used = {v.number for call in calls for v in call.reads}
        wholes = tuple(f"{call.module}." for call in calls if isinstance(call.target, type))
        names = [place.tensor for place in coupling.places if place.tensor in self.parameters]
        return any(recording.sources[n].number in used or n.startswith(wholes) for n in names)

    def times(self, choice: Choice, factor: int = 0) -> Labels:
        """For each label how many of it there will be: ``factor`` for those of the chosen units, 1 for the rest.

        Raises:
            AnalysisError: If a coupling or unit does not exist.
        """
        if not choice:
            return np.ones(self.state.atoms.count, np.int64)
        chosen = np.zeros(self.units.count, bool)
        for name, numbers in choice.items():
            if name not in self.couplings:
                raise AnalysisError(f"no coupling {name!r}; the analysis has {len(self.couplings)}, see `couplings`")
            units = np.asarray(numbers, np.int64)
            wrong = units[(units < 0) | (units >= self.couplings[name].units)]
            if len(wrong):
                raise AnalysisError(f"{name} has {self.couplings[name].units} units, got number {int(wrong[0])}")
            chosen[self.numbers[name][units]] = True
        times = np.ones(self.state.atoms.count, np.int64)
        times[self.units.atom[chosen[self.units.unit]]] = factor
        return times[self.state.final]

    @functools.cached_property
    def _joined(self) -> tuple[Labels, Labels]:
        """The final labels of `axes`, one axis behind the other, and where each begins."""
        lengths = [len(axis.roots) for axis in self.axes]
        return np.concatenate([axis.roots for axis in self.axes]), np.cumsum([0, *lengths[:-1]])

    def lengths(self, times: Labels) -> dict[int, int]:
        """How many positions each of `axes` will have, by the identity of its final labels; see `length_of`."""
        if not self.axes:
            return {}
        roots, starts = self._joined
        counts = np.add.reduceat(times[roots], starts)
        return {id(axis.roots): count for axis, count in zip(self.axes, counts.tolist(), strict=True)}

    def emptied(self, choice: Choice) -> list[Axis]:
        """Axes of tensors that would lose their last position."""
        return self._emptied(self.lengths(self.times(choice)))

    def _emptied(self, lengths: Mapping[int, int]) -> list[Axis]:
        return [axis for axis in self.axes if not lengths[id(axis.roots)]]

    def sizes(self, choice: Choice | None = None) -> Sizes:
        """Parameters and multiply-adds after dropping ``choice``; as it is without one."""
        return count_sizes(self, self.times(choice) if choice else None)

    def cut(self, choice: Choice) -> Plan:
        """The edits that drop ``choice``.

        Raises:
            AnalysisError: If a coupling or unit does not exist, or if an axis would lose its last position.
        """
        return Plan(tuple(self.resizes(self.times(choice))))

    def resizes(self, times: Labels) -> list[Resize]:
        """The edits that keep of each tensor what is there ``times`` times, none or once; errors as for `cut`."""
        lengths = self.lengths(times)
        if empty := self._emptied(lengths):
            raise AnalysisError(
                f"{len(empty)} axes would lose their last position (the first has {len(empty[0].roots)}); drop less"
            )
        kept: dict[bytes, tuple[int, ...]] = {}  # axes that lose the same share their index
        index: dict[int, tuple[int, ...]] = {}
        for axis in self.axes:
            if lengths[id(axis.roots)] != len(axis.roots):
                stays = times[axis.roots] != 0
                places = tuple(np.flatnonzero(stays).tolist())
                index[id(axis.roots)] = kept.setdefault(stays.tobytes(), places)
        return [
            Resize(name, axis, len(roots), index[id(roots)])
            for name, value in self.recording.sources.items()
            for axis, roots in enumerate(self.roots(value))
            if id(roots) in index
        ]


@uncollected()
def analyse(model: nn.Module, inputs: Inputs, *, with_data: bool = False) -> Analysis:
    """Find what hangs together in ``model``.

    The model is run once in evaluation mode, with shapes only (nothing is computed, weights are not looked at), and
    every operator that it calls is followed; with data only where its control flow asks for values.

    Args:
        model: Any module; not touched. It may live on the meta device.
        inputs: A tensor, a tuple of positional arguments, or a mapping of named arguments. A batch of two or more
            tells the batch axis from an axis of one position.
        with_data: Run with data at once; for code that does other things on a device without data.

    Raises:
        TraceError: If the model does not accept the inputs; names the user's line. If it cannot be copied or followed
            (TorchScript, compiled, lazy, weights computed by hooks); names the module.
        AnalysisError: If a rule does not fit its operator.
    """
    modules = admit(model, inputs)
    whole = tuple(t for t in USER_RULES if isinstance(t, type))
    recording = record(model, inputs, whole, with_data=with_data, modules=modules)
    return analysis_of(recording, frozenset([name for name, _ in tensors_in(modules, ("_parameters",))]))


def analysis_of(recording: Recording, parameters: frozenset[str]) -> Analysis:
    """Find what hangs together in a recorded run.

    Raises:
        AnalysisError: If a rule does not fit its operator.
    """
    state = propagate(recording, {**RULES, **USER_RULES})
    everywhere = tuple(distinct_axes(state))
    free = {id(axis.roots) for axis in everywhere}
    axes = [
        Axis(value, a, state.forms.of(labels))
        for value in recording.sources.values()
        for a, labels in enumerate(state.tag(value).axes)
        if len(labels) > 1
    ]
    axes = [a for a in axes if id(a.roots) in free]
    units = find_units(state, axes, everywhere)
    couplings, numbers = group_units(state, units, axes, parameters)
    return Analysis(
        couplings=couplings,
        frozen=tuple(list_frozen(state)),
        unknown=dict(state.unknown),
        traced=recording.traced,
        state=state,
        units=units,
        numbers=numbers,
        parameters=parameters,
        axes=everywhere,
    )


def count_sizes(analysis: Analysis, times: Labels | None, gone: Container[str] = ()) -> Sizes:
    """Parameters and multiply-adds when each label is there ``times`` times and the tensors ``gone`` are not at all.

    Without ``times`` each label is there once.
    """
    state = analysis.state
    lengths = {} if times is None else analysis.lengths(times)

    def new(value: Value) -> list[int]:
        return [length_of(roots, lengths) for roots in analysis.roots(value)]

    params = sum(
        math.prod(new(value))
        for name, value in analysis.recording.sources.items()
        if name in analysis.parameters and name not in gone
    )
    macs = 0
    for entry in state.sums:
        call = analysis.recording.calls[entry.call]
        if len(entry.operands) < 2 or entry.call >= analysis.recording.evaluated or not isinstance(call.output, Value):
            continue
        if f"{call.module}.weight" in gone or call.target is torch.ops.aten._trilinear.default:  # no count has those
            continue
        weight, axis = entry.operands[1]
        if "convolution" in operator_name(call.target):
            transposed = bool(call.args[6])
            base = new(entry.operands[0][0] if transposed else call.output)
            macs += math.prod(base) * math.prod(new(weight)[1:])
        else:
            macs += math.prod(new(call.output)) * new(weight)[axis]
    return Sizes(params, macs)


def length_of(roots: Labels, lengths: Mapping[int, int]) -> int:
    """How many positions an axis with these final labels will have, by `Analysis.lengths`: those not there stay."""
    return lengths.get(id(roots), len(roots))
