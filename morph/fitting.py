"""Fit a cut model into its own class: find the sizes that its code keeps in attributes."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.following import floats_in, follows, same_data, to_follow
from morph.analysis.group_counts import group_counts, new_groups
from morph.analysis.picking import takes_the_same
from morph.analysis.recorder import rerun
from morph.analysis.recording import Call, Inputs, Kept, Value, evaluating, named_modules, put_back
from morph.analysis.tags import operator_name, values_in
from morph.copying import copy_module
from morph.heads import SizeEdit, attention_edits, set_sizes
from morph.plan import FreeAttention, Resize, SetAttribute
from morph.resizing import resize_own, told

_TRIES = 60
_aten = torch.ops.aten
_LAYOUT = {
    _aten.clone,
    _aten.alias,
    _aten.detach,
    _aten.view,
    _aten._unsafe_view,
    _aten.expand,
    _aten.squeeze,
    _aten.unsqueeze,
    _aten._reshape_alias,
    _aten.transpose,
    _aten.permute,
}
_SPLITS = {_aten.split.Tensor, _aten.split_with_sizes.default}  # into parts whose shapes are compared
_COPIES = {_aten.clone, _aten.alias, _aten.detach}
_TOLD = {
    "num_channels",
    "normalized_shape",
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_features",
    "in1_features",
    "in2_features",
}


@dataclass(frozen=True)
class Misfit:
    """Where a cut model first does something else than it must.

    Attributes:
        call: Number of the operator call in the run of the model before.
        module: Path of the module.
        reason: What was got, and what was expected.
    """

    call: int
    module: str
    reason: str


@dataclass(frozen=True)
class Fit:
    """What makes a cut model fit.

    Attributes:
        attributes: The attributes to set, and the attention to free.
        misfit: Where it still does not fit; None if it does.
    """

    attributes: tuple[SizeEdit, ...]
    misfit: Misfit | None


class Fitter:
    """Runs cut copies of a model without data and compares every shape with what the analysis expects.

    Args:
        model: The model before; not touched.
        inputs: What it was analysed with.
        analysis: What was found.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, analysis: Analysis) -> None:
        self.inputs, self.analysis = inputs, analysis
        self.traced = analysis.traced
        self.base = analysis.recording.twin or evaluating(copy_module(model))
        self.kept = analysis.recording.kept or Kept(named_modules(self.base))
        self.lengths: tuple[Labels, dict[int, int]] | None = None

    def fit(self, edits: Sequence[Resize], times: Labels) -> Fit:
        """Find the attributes with which the class itself carries the new sizes."""
        chosen = [*new_groups(self.base, self.analysis, times), *attention_edits(self.base, edits, self.kept.modules)]
        misfit = self._try(edits, chosen, times)
        tried: set[tuple[type, str]] = set()
        while misfit is not None and len(tried) < _TRIES:
            for key, trial in self._candidates(misfit, chosen, times):
                if key in tried:
                    continue
                tried.add(key)
                found = self._try(edits, trial, times)
                if found is None or found.call > misfit.call:
                    chosen, misfit = trial, found
                    break
            else:
                break
        return Fit(tuple(chosen), misfit)

    def _try(self, edits: Sequence[Resize], attributes: Sequence[SizeEdit], times: Labels) -> Misfit | None:
        """Run the cut model with these attributes; say where it first differs from what is expected."""
        recorded = self.analysis.recording
        settled = recorded.settled
        if (bare := to_follow(recorded)) is not None:
            own = bare is recorded.twin
            with _cut(self.base if own else bare, edits, attributes, self.kept if own else None) as cut:
                shape, takes = partial(self.shape, times=times), partial(self._takes, times=times)
                if follows(cut, self.inputs, recorded, shape, takes):
                    return None
        with _cut(self.base, edits, attributes, self.kept) as cut:
            recording, path, error = rerun(cut, self.inputs, self.traced, recorded.whole)
        expected = recorded.calls[:settled]
        at = start = begun = 0
        for number, new in enumerate(recording.calls):
            if at == settled < recorded.evaluated and error is None:
                return None  # from here on shapes depend on values, which a cut changes
            at = _same_step(expected, at, new)
            if at == len(expected) and _layout_only(new):
                break
            if at < len(expected) and new.target != expected[at].target and _layout_only(new):
                continue
            if not _layout_only(new):
                misfit = self._laid_out(start, expected[start:at], recording.calls[begun:number], times)
                if misfit is not None:
                    return misfit
                reason = self._differs(expected[at] if at < len(expected) else None, new, times)
                if reason:
                    return Misfit(min(at, len(expected) - 1), new.module, reason)
                start, begun = at + 1, number + 1
            at += 1
        if error is not None:
            number = min(at, len(expected) - 1)
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return Misfit(number, path or expected[number].module, lines[0])
        if not all(map(_layout_only, expected[at:])):
            return Misfit(at, expected[at].module, "the code takes another way")
        return self._laid_out(start, expected[start:], recording.calls[begun:], times)

    def _laid_out(self, start: int, old: Sequence[Call], new: Sequence[Call], times: Labels) -> Misfit | None:
        """The first of some calls that only lay out whose shape is not the one expected, but for axes of one."""
        expected = [(start + i, c) for i, c in enumerate(old) if not _plain_copy(c)]
        wanted = [_long_axes(self.shape(v, times)) for _, c in expected for v in values_in(c.output)]
        calls = [c for c in new if not _plain_copy(c)]
        for number, call in enumerate(calls):
            for value in values_in(call.output):
                got = _long_axes(value.shape)
                if len(calls) != len(wanted) and got not in wanted:
                    reason = f"{operator_name(call.target)} gives shape {value.shape}, expected another"
                    return Misfit(start, call.module, reason)
                if len(calls) == len(wanted) and got != wanted[number]:
                    reason = f"{operator_name(call.target)} gives shape {value.shape}, expected {wanted[number]}"
                    return Misfit(expected[number][0], call.module, reason)
        return None

    def _differs(self, old: Call | None, new: Call, times: Labels) -> str:
        """Why a call is not the one expected; empty if it is."""
        if old is None:
            return f"{operator_name(new.target)} is called, nothing was expected"
        if old.target != new.target and not {old.target, new.target} <= _SPLITS:
            return f"{operator_name(new.target)} is called, {operator_name(old.target)} was expected"
        outputs = list(zip(values_in(old.output), values_in(new.output), strict=False))
        for before, after in outputs:
            wanted = self.shape(before, times)
            if after.shape != wanted:
                return f"{operator_name(new.target)} gives shape {after.shape}, expected {wanted}"
        for one, other in zip(old.reads, new.reads, strict=False):
            if one.data is not None and other.data is not None and not same_data(one.data, other.data):
                return f"{operator_name(new.target)} uses the constant {other.data.tolist()}, was {one.data.tolist()}"
        was, now = floats_in(old.args), floats_in(new.args)
        if was != now:
            return f"{operator_name(new.target)} uses the constants {now}, were {was}"
        if old.target == new.target and not self._takes(old, new.args, new.kwargs, times):
            now, was = ([a for a in c.args if not isinstance(a, Value)] for c in (new, old))
            return f"{operator_name(new.target)} takes positions or numbers {now}, was {was}"
        return ""

    def _takes(self, call: Call, args: Sequence[Any], kwargs: Mapping[str, Any], times: Labels) -> bool:
        """Whether an operator takes by number what it took before the cut."""
        return takes_the_same(call, args, kwargs, self.analysis.state, times)

    def shape(self, value: Value, times: Labels) -> tuple[int, ...]:
        """The shape that a tensor must have after the cut."""
        if self.lengths is None or self.lengths[0] is not times:
            self.lengths = (times, self.analysis.lengths(times))
        return self.analysis.shape(value, self.lengths[1])

    def _candidates(
        self, misfit: Misfit, chosen: list[SizeEdit], times: Labels
    ) -> Iterator[tuple[tuple[type, str], list[SizeEdit]]]:
        """Other attributes to set, with a name for each try.

        First without one that was set in the module of a misfit, since a number may be a width by chance; then with
        more near it that hold an old size, for every module of that class.
        """
        done = {(e.module, e.attribute) for e in chosen if isinstance(e, SetAttribute)}
        free = {e.module for e in chosen if isinstance(e, FreeAttention)}
        modules = dict(named_modules(self.base, remove_duplicate=False))
        for wrong in [e for e in chosen if isinstance(e, SetAttribute) and e.module == misfit.module]:
            rest = [e for e in chosen if not _alike(e, wrong)]
            yield (type(modules[wrong.module]), f"without {_numberless(wrong.module)}.{wrong.attribute}"), rest
        sizes = self._sizes(times)
        path = misfit.module
        while True:
            module = modules.get(path)
            names = _whole_attributes(module) if module is not None else []
            for some in [names, *([n] for n in names)]:
                more = []
                for other, same in modules.items():
                    for attribute in some if type(same) is type(module) else ():
                        if attribute in _TOLD and told(same):
                            continue
                        old: Any = getattr(same, attribute, None)
                        new = _new_size(old, sizes[other])
                        if new is not None and new != old and (other, attribute) not in done and other not in free:
                            more.append(SetAttribute(other, attribute, old, new))
                if any(e.module == path for e in more):
                    yield (type(module), " ".join(some)), [*chosen, *more]
            if not path:
                return
            path = path.rpartition(".")[0]

    def _sizes(self, times: Labels) -> dict[str, dict[int, int]]:
        """For each module path, what sizes become of the sizes of tensors in it; the most frequent wins."""
        votes: dict[str, dict[int, collections.Counter[int]]] = collections.defaultdict(
            lambda: collections.defaultdict(collections.Counter)
        )
        groups = {number: (a, b) for number, a, b in group_counts(self.analysis.state, times) if a != b}
        for number, call in enumerate(self.analysis.recording.calls):
            for value in [*call.reads, *values_in(call.output)]:
                pairs = [(a, b) for a, b in zip(value.shape, self.shape(value, times), strict=True) if a != b]
                pairs += [groups[number]] if number in groups else []
                path = call.module
                while pairs:
                    for a, b in pairs:
                        votes[path][a][b] += 1
                    if not path:
                        break
                    path = path.rpartition(".")[0]
        result: dict[str, dict[int, int]] = collections.defaultdict(dict)
        for path, table in votes.items():
            result[path] = {a: counter.most_common(1)[0][0] for a, counter in table.items()}
        return result


@contextmanager
def _cut(
    model: nn.Module, edits: Sequence[Resize], attributes: Sequence[SizeEdit], kept: Kept | None
) -> Iterator[nn.Module]:
    """A copy of our own with other sizes; afterwards it is what it was, whatever a run has changed in its modules."""
    kept = kept or Kept(named_modules(model))
    with put_back(kept):
        resize_own(model, edits, kept)
        set_sizes(model, attributes)
        yield model


def _layout_only(call: Call) -> bool:
    """Whether a call gives back its input in another layout: such calls come and go with sizes of one."""
    return isinstance(call.target, torch._ops.OpOverload) and call.target.overloadpacket in _LAYOUT


def _plain_copy(call: Call) -> bool:
    """Whether a call gives back its input in the same shape; how often that happens depends on memory."""
    return isinstance(call.target, torch._ops.OpOverload) and call.target.overloadpacket in _COPIES


def _long_axes(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its axes of one."""
    return tuple(n for n in shape if n != 1)


def _same_step(expected: Sequence[Call], at: int, new: Call) -> int:
    """The next expected call that ``new`` can be: past calls that only lay out, if it is none itself."""
    while at < len(expected) and expected[at].target != new.target and _layout_only(expected[at]):
        if _layout_only(new) and expected[at].target != _aten.clone.default:
            break
        at += 1
    return at


def _alike(edit: SizeEdit, other: SetAttribute) -> bool:
    """Whether both set an attribute of one name in modules whose paths differ in numbers alone."""
    if not isinstance(edit, SetAttribute) or edit.attribute != other.attribute:
        return False
    return _numberless(edit.module) == _numberless(other.module)


def _numberless(path: str) -> str:
    """A path with its numbers left out."""
    return re.sub(r"\d+", "#", path)


def _whole_attributes(module: nn.Module) -> list[str]:
    """Attributes that hold a whole number or several, but for those that follow the tensors of torch's own layers."""
    found = []
    known = _TOLD if told(module) else set()
    for name, value in vars(module).items():
        if name.startswith("_") or name in known:
            continue
        items = value if isinstance(value, tuple) else (value,)
        if items and all(isinstance(i, int) and not isinstance(i, bool) and i > 1 for i in items):
            found.append(name)
    return found


def _new_size(value: int | tuple[int, ...] | None, sizes: Mapping[int, int]) -> int | tuple[int, ...] | None:
    """What becomes of a size, or of a tuple of sizes."""
    if isinstance(value, tuple):
        return tuple(sizes.get(v, v) for v in value)
    return sizes.get(value) if isinstance(value, int) else None
