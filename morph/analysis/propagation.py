"""Carry the labels of channel positions through a recorded run: one rule for each operator."""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from morph.analysis.atoms import Atoms, Forms, Labels
from morph.analysis.notation import bind, labels_of_output
from morph.analysis.recording import Call, Recording, Value
from morph.analysis.relations import Key, Relation, Reshaper
from morph.analysis.tags import Pin, Pinned, Statistic, Sum, Tag, operator_name, tags_in, values_in
from morph.errors import AnalysisError

FIXED = "goes position by position with a tensor that stays: an input, or a constant that is no buffer (register it)"
Rule = Callable[..., Any]


@dataclass(eq=False)
class Propagation:
    """The labels of every tensor of a recording, and what was noticed on the way. Rules work on this."""

    recording: Recording
    frozen_before: Mapping[tuple[int, Key], Labels] = field(default_factory=dict)
    atoms: Atoms = field(default_factory=Atoms)
    tags: dict[int, Tag] = field(default_factory=dict)
    sums: list[Sum] = field(default_factory=list)
    statistics: list[Statistic] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    unknown: collections.Counter[str] = field(default_factory=collections.Counter)
    fresh_labels: dict[tuple[int, Key], Labels] = field(default_factory=dict)
    groups: dict[int, Labels] = field(default_factory=dict)
    pinned: list[Pinned] = field(default_factory=list)
    parts: dict[int, dict[int, tuple[int, Labels]]] = field(default_factory=dict)  # see `takes_part`
    number: int = -1
    named: list[Labels] = field(default_factory=list)
    _zeros: dict[int, Labels] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = weakref.proxy(self)  # so that all this goes when nobody needs it, without a garbage collection
        self.reshaper = Reshaper(self.atoms, lambda n, key: own.fresh(n, key), lambda x, why: own.freeze(x, why))

    @property
    def relations(self) -> list[Relation]:
        """What reshapes said."""
        return self.reshaper.relations

    @functools.cached_property
    def forms(self) -> Forms:
        """The final labels of axes, once everything is propagated."""
        return Forms(self.atoms)

    @property
    def final(self) -> Labels:
        """The representative of every label, by its number."""
        return self.forms.final

    @property
    def call(self) -> Call:
        """The call at hand."""
        return self.recording.calls[self.number]

    # ---- labels

    def fresh(self, n: int, key: Key = ()) -> Labels:
        """``n`` new labels, zero where an earlier pass found them frozen."""
        if n == 1:
            return self.zeros(1)
        place = (self.number, key)
        labels = self.fresh_labels[place] = self.atoms.new(n)
        frozen = self.frozen_before.get(place)
        if frozen is None or len(frozen) != n:
            return labels
        self.atoms.union(labels[frozen], np.zeros(int(frozen.sum()), np.int64))
        return np.where(frozen, 0, labels)

    def zeros(self, n: int) -> Labels:
        """The labels of ``n`` positions that cannot go."""
        found = self._zeros.get(n)
        if found is None:
            found = self._zeros[n] = np.zeros(n, np.int64)
            found.flags.writeable = False
        return found

    def freeze(self, labels: Labels, reason: str) -> None:
        """Pin labels and remember why."""
        if self.is_free(labels):
            self.atoms.pin(labels, len(self.pins))
            self.pins.append(Pin(self.number, reason))

    def is_free(self, labels: Labels) -> bool:
        """Whether any of the labels can go, as far as is known."""
        if labels is self._zeros.get(len(labels)):
            return False
        return self.atoms.block(labels) >= 0 or bool(np.count_nonzero(labels))

    def takes_part(self, x: Value, labels: Labels, part: slice) -> None:
        """Note that a slice reads a part of an axis of a parameter."""
        if x.number in self.parts:
            _, seen = self.parts[x.number].setdefault(id(labels), (self.number, np.zeros(len(labels), bool)))
            seen[part] = True
            for output in values_in(self.call.output):  # of which another axis may be sliced
                self.parts[output.number] = self.parts[x.number]

    def freeze_all(self, tree: Any, reason: str) -> None:
        """Pin every label of every tensor in ``tree``."""
        for tag in tags_in(tree):
            for axis in tag.axes:
                self.freeze(axis, reason)

    def same(self, left: Labels, right: Labels) -> None:
        """Make two axes one; an axis of one position is broadcast and says nothing."""
        if left is right or len(left) == 1 or len(right) == 1:
            return
        if len(left) != len(right):
            raise AnalysisError(f"{self.name}: axes of {len(left)} and {len(right)} positions cannot be one")
        self.atoms.union(left, right)

    # ---- the vocabulary of rules

    @property
    def name(self) -> str:
        """The operator at hand, for messages."""
        return operator_name(self.call.target) if self.number >= 0 else "input"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) output of the call at hand."""
        output = self.call.output
        first = output if isinstance(output, Value) else next(v for v in output if isinstance(v, Value))
        return first.shape

    @property
    def shapes(self) -> list[tuple[int, ...] | None]:
        """Shape of each output of the call at hand."""
        output = self.call.output
        items = output if isinstance(output, list | tuple) else [output]
        return [v.shape if isinstance(v, Value) else None for v in items]

    def is_read(self, output: int) -> bool:
        """Whether anything uses an output of the call at hand."""
        recording, value = self.recording, self.call.output[output]
        ends = [*recording.outputs, *recording.outputs_in_training]
        return value in ends or any(value in call.reads for call in recording.calls[self.number + 1 :])

    def value(self, position: int) -> Value:
        """The value that came in as argument number ``position``."""
        found = self.call.args[position]
        assert isinstance(found, Value)
        return found

    def tag(self, value: Value) -> Tag:
        """The labels of a value; those of a constant from outside are frozen."""
        if value.number not in self.tags:
            self.tags[value.number] = self.frozen(value.shape)
        return self.tags[value.number]

    def parameter(self, name: str) -> Value:
        """The parameter or buffer of that name of the module at hand.

        Raises:
            AnalysisError: If there is none.
        """
        path = f"{self.call.module}.{name}".removeprefix(".")
        if path not in self.recording.sources:
            raise AnalysisError(f"the rule for {self.name} names {name!r}; {self.call.module} has no such tensor")
        return self.recording.sources[path]

    def frozen(self, shape: Sequence[int]) -> Tag:
        """A tensor none of whose positions can go."""
        return Tag(tuple([self.zeros(n) for n in shape]))

    def pointwise(self, *tags: Tag) -> Tag:
        """Position i of the output depends on position i of each input alone."""
        if len(tags) == 1:
            return tags[0]
        axes = []
        for back in range(max(len(t.axes) for t in tags), 0, -1):
            column = [t.axes[-back] for t in tags if len(t.axes) >= back and len(t.axes[-back]) != 1]
            for other in column[1:]:
                self.same(column[0], other)
                if other is not column[0] and any(one is self._zeros.get(len(other)) for one in (other, column[0])):
                    self.freeze(column[0] if other is self._zeros[len(other)] else other, FIXED)
            axes.append(column[0] if column else self.zeros(1))
        return Tag(tuple(axes))

    def reshape(self, tag: Tag, shape: Sequence[int], key: Key = ()) -> Tag:
        """The same elements in another shape."""
        self.reshaper.call = self.number
        return Tag(tuple(self.reshaper.reshape(tag.axes, shape, key)))

    def sum_over(self, *operands: tuple[Value, int]) -> None:
        """Remember that the call sums over these axes."""
        self.sums.append(Sum(self.number, operands))

    def statistic(self, value: Value, axes: Sequence[int], labels: Sequence[Labels] | None = None) -> None:
        """Remember that the call computes a statistic over these axes, or over these labels of them."""
        own = [self.tag(value).axes[a] for a in axes] if labels is None else labels
        self.statistics.append(Statistic(self.number, self.name, value, tuple(axes), tuple(own)))

    def signature(self, notation: str, *operands: Value | str | None) -> Tag:
        """Labels by notation, e.g. ``"... k, n k, n -> ... n"`` for a linear layer.

        A letter that comes twice is one axis; a letter that does not come out is summed over. ``...`` stands for any
        axes, kept; ``*`` at the end for axes that are pinned and come out frozen.

        Args:
            notation: One term for each operand, an arrow, and the term of the output.
            operands: Values; names of parameters of the module at hand; None for one that is absent.
        """
        left, right = notation.split("->")
        bound: dict[object, Labels] = {}
        places: dict[object, list[tuple[Value, int]]] = collections.defaultdict(list)
        for term, operand in zip(left.split(","), operands, strict=True):
            value = self.parameter(operand) if isinstance(operand, str) else operand
            if value is None:
                continue
            for letter, axis in bind(term.split(), len(value.shape)):
                labels = self.tag(value).axes[axis]
                if letter == "*":
                    self.freeze(labels, f"{self.name} mixes the positions of this axis")
                    continue
                places[letter].append((value, axis))
                if letter in bound and len(bound[letter]) > 1:
                    self.same(bound[letter], labels)
                elif letter not in bound or len(labels) > 1:
                    bound[letter] = labels
        out = labels_of_output(right.split(), bound, self.shape)
        kept = {letter for letter, _ in out}
        for letter in bound:
            if letter not in kept:
                self.sum_over(*places[letter])
        return Tag(tuple(labels for _, labels in out))


def propagate(recording: Recording, rules: Mapping[Any, Rule], passes: int = 3) -> Propagation:
    """Carry labels through ``recording`` until what is frozen does not change.

    A later pass knows what earlier ones found frozen, so that fewer reshapes have to be described by relations.
    """
    first = state = _once(recording, rules, {})
    for _ in range(passes - 1):
        if not _freezes_wholes(state):
            break
        frozen = {key: state.atoms.find(labels) == 0 for key, labels in state.fresh_labels.items()}
        done = state.frozen_before
        if frozen.keys() == done.keys() and all(np.array_equal(v, done[k]) for k, v in frozen.items()):
            break
        state = _once(recording, rules, frozen)
    state.pinned, state.unknown = _pinned(first), first.unknown
    return state


def _freezes_wholes(state: Propagation) -> bool:
    """Whether a reshape was described by a relation although some of its positions turned out to be frozen."""
    found = [labels for r in state.relations for labels in (r.whole, *r.factors)]
    return bool(found) and not state.atoms.find(np.concatenate(found)).all()


def _pinned(state: Propagation) -> list[Pinned]:
    """How many positions of parameters each pin has pinned; of several pins of a label the first counts."""
    counts = state.atoms.count_pinned(state.named, len(state.pins))
    return [Pinned(pin.call, pin.reason, count) for pin, count in zip(state.pins, counts, strict=True)]


def _once(recording: Recording, rules: Mapping[Any, Rule], frozen: Mapping[tuple[int, Key], Labels]) -> Propagation:
    state = Propagation(recording, frozen)
    used = {v.number for call in recording.calls for v in call.reads}
    wholes = tuple(f"{call.module}." for call in recording.calls if isinstance(call.target, type))
    for name, value in recording.sources.items():
        state.parts[value.number] = {}
        if not value.floating:  # an index, a mask, a counter, a complex weight
            state.tags[value.number] = state.frozen(value.shape)
            continue
        axes = [state.fresh(n, ("source", name, a)) for a, n in enumerate(value.shape)]
        state.tags[value.number] = Tag(tuple(axes))
        if name in recording.shared:
            state.freeze_all(state.tags[value.number], "shares its memory with another tensor")
        if value.number not in used and not name.startswith(
            wholes
        ):  # such as a head that only training uses: what it hangs together with is not seen
            state.freeze_all(state.tags[value.number], "not used in this run")
    state.named = list(state.fresh_labels.values())
    for value in recording.inputs:
        state.tags[value.number] = state.frozen(value.shape)
    found = {target: _rule(target, rules) for target in {call.target for call in recording.calls}}
    for number, call in enumerate(recording.calls):
        state.number = number
        _apply(state, call, found[call.target])
    for value in [*recording.outputs, *recording.outputs_in_training]:
        state.freeze_all(state.tag(value), "output of the model")
    for value in recording.sources.values():  # such as a table of positions that longer inputs read on
        for labels in state.tag(value).axes:
            if id(labels) in state.parts[value.number]:
                state.number, seen = state.parts[value.number][id(labels)]
                state.freeze(labels[~seen], "slices read other positions in this run")
    return state


def _apply(state: Propagation, call: Call, rule: Rule | None) -> None:
    """Give every output of ``call`` its tag."""
    inputs = [state.tag(v) for v in call.reads]
    outputs = values_in(call.output)
    if rule is not None:
        args = call.args[1:] if isinstance(call.target, type) else call.args  # a module comes before its arguments
        result: Any = rule(state, *args, **call.kwargs)
    elif inputs and isinstance(call.target, torch._ops.OpOverload) and torch.Tag.pointwise in call.target.tags:
        result = state.pointwise(*inputs)
    else:
        if any(state.is_free(axis) for tag in inputs for axis in tag.axes):
            state.unknown[operator_name(call.target)] += 1
            state.freeze_all(inputs, f"no rule for {operator_name(call.target)}")
        result = [state.frozen(v.shape) for v in outputs]
    found = tags_in([result])
    for value, tag in zip(outputs, found, strict=False):
        if tag.shape != value.shape:
            raise AnalysisError(
                f"the rule for {operator_name(call.target)} gives shape {tag.shape}, the operator {value.shape}"
            )
        known = state.tags.get(value.number)
        if known is not None:  # an operator in place
            for old, new in zip(known.axes, tag.axes, strict=True):
                state.same(old, new) if old is not new else None
            continue
        state.tags[value.number] = tag
    for value in outputs[len(found) :]:
        state.tags[value.number] = state.frozen(value.shape)


def _rule(target: Any, rules: Mapping[Any, Rule]) -> Rule | None:
    """The rule of an overload, of its packet, or of the operator that it does in place."""
    if target in rules:
        return rules[target]
    if not isinstance(target, torch._ops.OpOverload):
        return None
    packet = target.overloadpacket
    if packet in rules:
        return rules[packet]
    name = packet.__name__
    if name.endswith("_") and target.namespace == "aten":
        return rules.get(getattr(torch.ops.aten, name[:-1], None))
    return None
