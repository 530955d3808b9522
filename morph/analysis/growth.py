"""Copies of units: what may be copied exactly, in which order copies lie, and who divides by their number."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch

from morph.analysis.atoms import Labels
from morph.analysis.propagation import Propagation
from morph.analysis.recording import Call, Value
from morph.analysis.relations import Relation, aligned
from morph.analysis.tags import operator_name, values_in
from morph.errors import EditError

aten = torch.ops.aten
_SAME_FORM = {aten.detach, aten.alias, aten.clone, aten._to_copy, aten.lift_fresh, aten.expand, aten.contiguous}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.unsqueeze, aten.squeeze}
_JOINTS = {aten.cat.default: 1, aten.split.Tensor: 2, aten.split_with_sizes.default: 2}  # where the axis stands
_MEANS = (
    "layer_norm",
    "rms_norm",
    "group_norm",
    "batch_norm",
    "aten.mean",
    "aten.amax",
    "aten.amin",
    "aten.max.dim",
    "aten.min.dim",
)


class Growth:
    """What can be copied in an analysed model.

    Args:
        state: A finished propagation.
    """

    def __init__(self, state: Propagation) -> None:
        self.state = state
        self.makers: dict[int, Call] = {}
        for call in state.recording.calls:
            for value in values_in(call.output):
                self.makers.setdefault(value.number, call)
        related = [labels for r in state.relations for labels in (r.whole, *r.factors)]
        self.split: set[int] = {int(i) for labels in related for i in np.unique(state.atoms.find(labels))}

    def obstacles(self) -> dict[int, str]:
        """Labels that cannot be copied exactly, with the reason."""
        found: dict[int, str] = {}
        for entry in self.state.sums:
            reason = self._sum_obstacle(entry.operands)
            if reason:
                self._mark(found, entry.operands[0], reason + self._place(entry.call))
        found.update(dict.fromkeys(self._in_two_orders(), "two reshapes order them in different ways"))
        found.update(
            dict.fromkeys(self._across_borders(), "tensors are joined or split between positions of one of them")
        )
        for source, axis in self._used_otherwise(set(self.readings())):
            reason = "the parameter that reads them is used in another way too"
            self._mark(found, (self.state.recording.sources[source], axis), reason)
        return found

    def _in_two_orders(self) -> set[int]:
        """Wholes of two reshapes with different factors: no order of copies suits both."""
        factors: dict[int, frozenset[int]] = {}
        bad: set[int] = set()
        for relation in self.state.relations:
            rows = np.stack([self.state.atoms.find(f) for f in relation.factors])
            for whole, *some in np.vstack([self.state.atoms.find(relation.whole), rows]).T.tolist():
                own = frozenset(f for f in some if f)
                if whole and factors.setdefault(whole, own) != own:
                    bad.add(whole)
        return bad

    def _across_borders(self) -> set[int]:
        """Labels on both sides of where tensors are joined or split: copies lie behind all positions of one label."""
        bad: set[int] = set()
        for call in self.state.recording.calls:
            if call.target not in _JOINTS:
                continue
            parts = values_in(call.args[0] if call.target is aten.cat.default else call.output)
            axis = call.args[_JOINTS[call.target]] if len(call.args) > _JOINTS[call.target] else 0
            axes = [self.state.atoms.find(self.state.tag(v).axes[axis]) for v in parts if len(v.shape) > 1]
            bad.update(int(a[-1]) for a, b in itertools.pairwise(axes) if len(a) and len(b) and a[-1] == b[0])
        return bad - {0}

    def uniform(self) -> dict[int, str]:
        """Labels that can be copied only all together and equally often, with the reason."""
        found: dict[int, str] = {}
        for entry in self.state.statistics:
            mean = any(kind in entry.kind for kind in _MEANS)
            for labels in entry.labels:
                text = entry.kind + self._place(entry.call)
                for label in np.unique(self.state.atoms.find(labels)).tolist():
                    found[label] = text if mean else f"!{text}"
        return found

    def readings(self) -> dict[tuple[str, int], Labels | None]:
        """The axes of parameters on which sums read: their entries are divided by the number of copies.

        Returns:
            For each of them None; or for each position the group in which it is read, whose own copies read by
            themselves and do not count.
        """
        found: dict[tuple[str, int], Labels | None] = {}
        for entry in self.state.sums:
            for value, axis in entry.operands[1:]:
                origin = self.origin(value, axis)
                if origin is not None:
                    found[origin] = self._group_read(entry.call, value, axis)
        return found

    def _group_read(self, call: int, value: Value, axis: int) -> Labels | None:
        """The group of each position where one axis has the positions of all groups (a transposed convolution)."""
        groups = self.state.groups.get(call)
        if groups is None or axis != 0:
            return None
        return self.state.atoms.find(np.repeat(groups, value.shape[axis] // len(groups)))

    def _sum_obstacle(self, operands: tuple[tuple[Value, int], ...]) -> str:
        if len(operands) < 2:
            return "a plain sum runs over them"
        if all(self.origin(value, axis) is None for value, axis in operands[1:]):
            return "they are summed over between two activations"
        return ""

    def origin(self, value: Value, axis: int) -> tuple[str, int] | None:
        """The parameter, and its axis, that an axis of a tensor is, if it only was moved; else None."""
        while not value.source:
            call = self.makers.get(value.number)
            if call is None or not isinstance(call.target, torch._ops.OpOverload) or not call.args:
                return None
            before, packet = call.args[0], call.target.overloadpacket
            if not isinstance(before, Value):
                return None
            moved = _axis_before(packet, call, before, value, axis)
            if moved is None:
                return None
            value, axis = before, moved
        return value.source, axis

    def _used_otherwise(self, read: set[tuple[str, int]]) -> Iterator[tuple[str, int]]:
        """Reading axes of parameters that some call uses without summing over them, or while it sums over another."""
        summed: dict[tuple[int, int], list[int]] = {}
        for entry in self.state.sums:
            for value, axis in entry.operands:
                summed.setdefault((entry.call, value.number), []).append(axis)
        derived: dict[int, str] = {v.number: name for name, v in self.state.recording.sources.items()}
        axes: dict[str, list[int]] = {}
        for name, axis in read:
            axes.setdefault(name, []).append(axis)
        for number, call in enumerate(self.state.recording.calls):
            for value in call.reads:
                name = derived.get(value.number, "")
                if name not in axes:
                    continue
                if (number, value.number) in summed:
                    reads = {self.origin(value, axis) for axis in summed[number, value.number]}
                    yield from ((name, axis) for axis in axes[name] if (name, axis) not in reads)
                    continue
                packet = call.target.overloadpacket if isinstance(call.target, torch._ops.OpOverload) else None
                if packet in _SAME_FORM | _RESHAPES | {aten.t, aten.transpose, aten.permute}:
                    derived.update({v.number: name for v in values_in(call.output)})
                else:
                    yield from ((name, axis) for axis in axes[name])

    def _mark(self, found: dict[int, str], operand: tuple[Value, int], reason: str) -> None:
        value, axis = operand
        for label in np.unique(self.state.atoms.find(self.state.tag(value).axes[axis])).tolist():
            found.setdefault(label, reason)

    def _place(self, call: int) -> str:
        where = self.state.recording.calls[call].where
        return f" (at {where})" if where else f" ({operator_name(self.state.recording.calls[call].target)})"


def _axis_before(packet: object, call: Call, before: Value, after: Value, axis: int) -> int | None:
    """The axis of the input that an axis of the output of a movement is."""
    rank = len(before.shape)
    if packet is aten.t:
        return axis if rank < 2 else 1 - axis
    if packet is aten.transpose:
        one, two = (a % rank for a in call.args[1:3])
        return int({one: two, two: one}.get(axis, axis))
    if packet is aten.permute:
        return int(call.args[1][axis] % rank)
    if packet in _SAME_FORM:
        moved = axis - (len(after.shape) - rank)
        return moved if moved >= 0 and before.shape[moved] == after.shape[axis] else None
    if packet in _RESHAPES:
        pairs = {o[0]: i[0] for i, o in aligned(before.shape, after.shape) if len(i) == len(o) == 1}
        return pairs.get(axis)
    return None


def copied(state: Propagation, times: Labels) -> Labels:
    """Let wholes of reshapes be there as often as the product of their factors.

    Args:
        state: A finished propagation.
        times: For each label how often it shall be there, at least once; that of wholes is not looked at.

    Raises:
        EditError: If two reshapes want different numbers.
    """
    atoms = state.atoms
    roots = atoms.roots()
    result = times[roots]
    for _ in range(8):
        before = result.copy()
        for relation in state.relations:
            product = np.prod([np.where(f == 0, 1, result[f]) for f in map(atoms.find, relation.factors)], axis=0)
            whole = atoms.find(relation.whole)
            wanted = np.where(whole == 0, 1, product)
            result[whole] = np.where(whole == 0, result[whole], wanted)
        result = result[roots]
        if np.array_equal(before, result):
            break
    for relation in state.relations:
        product = np.prod([np.where(f == 0, 1, result[f]) for f in map(atoms.find, relation.factors)], axis=0)
        whole = atoms.find(relation.whole)
        if not np.array_equal(np.where(whole == 0, 1, result[whole]), np.where(whole == 0, 1, product)):
            raise EditError("copies cannot be laid out: two reshapes of the same axis want different numbers of them")
    return result


class Layout:
    """The order of copies along axes.

    Args:
        state: A finished propagation.
        times: For each label how often it will be there, as `copied` gives it.
    """

    def __init__(self, state: Propagation, times: Labels) -> None:
        self.state, self.times = state, times
        self.rows: dict[int, tuple[int, int]] = {}
        self.relations = state.relations
        for number, relation in enumerate(state.relations):
            wholes = state.atoms.find(relation.whole)
            if (times[wholes] == 1).all():
                continue
            for row, label in enumerate(wholes.tolist()):  # also those without copies: the order is read off all
                if label:
                    self.rows.setdefault(label, (number, row))
        self.cache: dict[bytes, Labels] = {}

    def index(self, labels: Labels) -> Labels:
        """For each position of an axis afterwards the position that it comes from.

        Raises:
            EditError: If the copies of a reshaped axis cannot be laid out.
        """
        roots = self.state.atoms.find(labels)
        if (self.times[roots] == 1).all():
            return np.arange(len(roots))
        key = roots.tobytes()
        if key not in self.cache:
            self.cache[key] = np.concatenate([self._segment(roots, s, e, r) for s, e, r in self._segments(roots)])
        return self.cache[key]

    def _segments(self, roots: Labels) -> Iterator[tuple[int, int, int]]:
        """Runs of one label, and stretches of wholes of one relation (its number; -1 for a run)."""
        keys = [self.rows.get(label, (-1, -1))[0] for label in roots.tolist()]
        start = 0
        for i in range(1, len(roots) + 1):
            whole = keys[start] >= 0
            goes_on = i < len(roots) and (
                keys[i] == keys[start] and not self._repeats(roots, start, i) if whole else roots[i] == roots[start]
            )
            if not goes_on:
                yield start, i, keys[start]
                start = i

    def _repeats(self, roots: Labels, start: int, i: int) -> bool:
        """Whether position i begins the same stretch of wholes again."""
        return bool(roots[i] == roots[start] and roots[i] != roots[i - 1])

    def _segment(self, roots: Labels, start: int, end: int, relation: int) -> Labels:
        if relation < 0:
            return np.tile(np.arange(start, end), int(self.times[roots[start]]))
        rows = np.array([self.rows[label][1] for label in roots[start:end].tolist()])
        coordinates, labels = self._coordinates(self.relations[relation], rows)
        for order in itertools.permutations(range(len(coordinates))):
            key = np.stack([coordinates[k] for k in order])
            step = np.diff(key, axis=1)
            first = (step != 0).argmax(0)
            if (step[first, np.arange(step.shape[1])] > 0).all():
                return start + self._spread(coordinates, labels, order)
        raise EditError("copies cannot be laid out: a reshaped axis is in an order that is not one of its factors")

    def _coordinates(self, relation: Relation, rows: Labels) -> tuple[list[Labels], list[Labels]]:
        """For each factor, the coordinate and the label of each position.

        A factor that is itself the whole of another reshape (heads and positions inside one of the three packed
        projections of attention) gives those of its own factors.
        """
        labels = [self.state.atoms.find(f)[rows] for f in relation.factors]
        ranks = list(np.unravel_index(rows, relation.grid)) if relation.grid else [_ranks(column) for column in labels]
        coordinates: list[Labels] = []
        found: list[Labels] = []
        for rank, column in zip(ranks, labels, strict=True):
            inner = self._inner(relation, column)
            parts, names = inner if inner is not None else ([rank], [column])
            coordinates += parts
            found += names
        return coordinates, found

    def _inner(self, relation: Relation, column: Labels) -> tuple[list[Labels], list[Labels]] | None:
        """Coordinates and labels of a factor by the one reshape that all its positions are wholes of; else None."""
        places = [self.rows.get(label, (-1, -1)) for label in column.tolist()]
        number = places[0][0]
        if any(p[0] != number for p in places) or number < 0 or self.relations[number] is relation:
            return None
        return self._coordinates(self.relations[number], np.array([p[1] for p in places]))

    def _spread(self, coordinates: list[Labels], labels: list[Labels], order: tuple[int, ...]) -> Labels:
        """Positions of a stretch with their copies: for each factor, from outer to inner, its copies side by side."""
        count = len(coordinates[0])
        copies = [np.where(labels[k] == 0, 1, self.times[labels[k]]) for k in order]
        total = np.prod(copies, axis=0)
        position = np.repeat(np.arange(count), total)
        within = np.arange(len(position)) - np.repeat(np.cumsum(total) - total, total)
        keys: list[Labels] = []
        for k, times in reversed(list(zip(order, copies, strict=True))):
            keys += [within % times[position], coordinates[k][position]]
            within = within // times[position]
        return position[np.lexsort(keys)]


def _ranks(labels: Labels) -> Labels:
    """The number of each label, by first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    ranks: Labels = np.argsort(np.argsort(first))[inverse]
    return ranks
