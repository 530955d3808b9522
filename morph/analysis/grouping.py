"""Group units into couplings, and say why the rest must stay."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from morph.analysis.atoms import Labels, parts_of
from morph.analysis.closures import distinct_columns
from morph.analysis.contractions import KERNEL
from morph.analysis.propagation import Propagation
from morph.analysis.tags import operator_name
from morph.analysis.units import Axis, Units
from morph.couplings import Coupling, Frozen, Place, Positions, Reader

_Tables = list[tuple[int, Positions]]  # kinds of units on an axis, and where each unit of a kind lies


def group_units(
    state: Propagation, units: Units, axes: list[Axis], parameters: frozenset[str]
) -> tuple[dict[str, Coupling], dict[str, Positions]]:
    """Group units that take the same number of positions on the same axes of the same tensors."""
    if not axes:
        return {}, {}
    forms: dict[int, int] = {}  # axes with the same labels are one form
    of_axis = [forms.setdefault(id(axis.roots), len(forms)) for axis in axes]
    roots = list({id(axis.roots): axis.roots for axis in axes}.values())
    unit, position, of_pair = _on_all(units, roots)
    marks = np.zeros(units.count, np.int64)
    random = np.random.default_rng(0).integers(1, 2**62, len(axes))
    total = np.zeros(len(forms), np.int64)
    with np.errstate(over="ignore"):
        np.add.at(total, of_axis, random)
        np.add.at(marks, unit, total[of_pair])
    _, first, kind = np.unique(marks, return_index=True, return_inverse=True)
    if (split := _apart(kind, units)) is not kind:
        _, first, kind = np.unique(split, return_index=True, return_inverse=True)
    order = np.argsort(first)
    couplings: dict[str, Coupling] = {}
    numbers: dict[str, Positions] = {}
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    kind = rank[kind]
    by_kind = np.argsort(kind, kind="stable")
    own = parts_of(by_kind, np.searchsorted(kind[by_kind], np.arange(1, len(order))))
    ends = np.searchsorted(of_pair, np.arange(1, len(roots)))
    tables = [_tables(*held, kind, own) for held in zip(parts_of(unit, ends), parts_of(position, ends), strict=True)]
    members: list[list[Place]] = [[] for _ in order]
    for axis, form in zip(axes, of_axis, strict=True):
        for k, table in tables[form]:
            members[k].append(Place(axis.value.source, axis.axis, table))
    readers = _readers(state, units, kind, own, dict(zip(forms, tables, strict=True)))
    statistics = _statistics(state, units, kind)
    for k in range(len(order)):
        places = sorted(members[k], key=lambda p: (p.axis != 0, p.tensor not in parameters))
        if not places:
            continue
        name = f"{places[0].tensor}[{places[0].axis}]"
        name = name if name not in couplings else f"{name}#{sum(n.startswith(name) for n in couplings)}"
        couplings[name] = Coupling(
            name=name,
            units=len(own[k]),
            places=tuple(places),
            readers=tuple(readers.get(k, ())),
            statistics=tuple(statistics.get(k, ())),
            overlaps=(),
            blocks=1,
        )
        numbers[name] = own[k]
    return _with_overlaps(couplings, numbers, units), numbers


def _on_all(units: Units, axes: list[Labels]) -> tuple[Labels, Labels, Labels]:
    """Every pair of a unit and a position of some axes with these final labels: units, positions, and numbers of axes.

    They are sorted by axis and position.
    """
    lengths = [len(roots) for roots in axes]
    unit, place = units.on(np.concatenate(axes))
    axis = np.repeat(np.arange(len(axes)), lengths)[place]
    return unit, place - np.cumsum([0, *lengths])[axis], axis


def _apart(kind: Labels, units: Units) -> Labels:
    """Kinds of units, ``[units]``, such that no two of a kind share a label.

    Whole heads and the positions inside them lie alike on all axes where there are as many heads as positions in one.
    """
    alike = [kinds[:, 1:][kinds[:, 1:] == kinds[:, :-1]] for kinds in (np.sort(kind[row]) for row in units.shared)]
    repeated = np.unique(np.concatenate([np.zeros(0, np.int64), *alike])).tolist()
    if not repeated:
        return kind
    order = np.argsort(units.unit, kind="stable")
    held = parts_of(units.atom[order], np.searchsorted(units.unit[order], np.arange(1, units.count)))
    split, new = kind.copy(), int(kind.max()) + 1
    for k in repeated:
        taken: list[set[int]] = []
        for unit in np.flatnonzero(kind == k).tolist():
            own = set(held[unit].tolist())
            place = next((i for i, others in enumerate(taken) if others.isdisjoint(own)), len(taken))
            if place == len(taken):
                taken.append(set())
            taken[place] |= own
            split[unit] = new + place - 1 if place else k
        new += len(taken) - 1
    return split


def _tables(unit: Labels, position: Labels, kind: Labels, own: list[Positions]) -> _Tables:
    """For each kind of units on an axis, the positions of each unit, a row for each, in the order of their numbers.

    A kind of which only some lie there, or some more often than others, has none.
    """
    if not len(unit):
        return []
    kinds = kind[unit]
    alike = (kinds == kinds[0]).all()
    found = []
    for k in kinds[:1].tolist() if alike else np.unique(kinds).tolist():
        here = slice(None) if alike else kinds == k
        table = _table(unit[here], position[here], len(own[k]))
        if table is not None:
            found.append((k, table))
    return found


def _table(unit: Labels, position: Labels, count: int) -> Positions | None:
    if len(unit) == count and (unit[1:] > unit[:-1]).all():
        return position.reshape(count, 1)
    order = np.lexsort((position, unit))
    if len(unit) % count or (np.diff(unit[order].reshape(count, -1), axis=1) != 0).any():
        return None
    return position[order].reshape(count, -1)


def _readers(
    state: Propagation, units: Units, kind: Labels, own: list[Positions], known: dict[int, _Tables]
) -> dict[int, list[Reader]]:
    """The modules that sum over the units of each coupling, from the sums whose second operand is a parameter.

    Args:
        state: A finished propagation.
        units: The units.
        kind: ``[units]`` their kinds.
        own: The units of each kind.
        known: The tables of axes by the identity of their final labels; those that are missing are added.
    """
    found: dict[int, list[Reader]] = collections.defaultdict(list)
    seen: set[tuple[int, str, int]] = set()
    for entry in state.sums:
        if len(entry.operands) < 2:
            continue
        call = state.recording.calls[entry.call]
        value, axis = entry.operands[0]
        roots = state.forms.of(state.tag(value).axes[axis])
        key = id(roots)
        if key not in known:
            known[key] = _tables(*units.on(roots), kind, own)
        axis_here = axis if "convolution" in operator_name(call.target) else -1
        for k, table in known[key]:
            if (k, call.module, axis) not in seen:
                seen.add((k, call.module, axis))
                found[k].append(Reader(call.module, axis_here, table))
    return found


def _statistics(state: Propagation, units: Units, kind: Labels) -> dict[int, list[str]]:
    """The statistics that run over the units of each coupling."""
    found: dict[int, dict[str, None]] = collections.defaultdict(dict)
    for entry in state.statistics:
        call = state.recording.calls[entry.call]
        text = f"{entry.kind} at {call.where}" if call.where else entry.kind
        for labels in entry.labels:
            unit, _ = units.on(state.forms.of(labels))
            for k in np.unique(kind[unit]).tolist():
                found[k][text] = None
    return {k: list(texts) for k, texts in found.items()}


def _with_overlaps(
    couplings: dict[str, Coupling], numbers: Mapping[str, Positions], units: Units
) -> dict[str, Coupling]:
    """Fill in which couplings share labels, and in how many blocks each unit of the inner one has a position."""
    names = list(couplings)
    owner = np.full(units.count, -1, np.int64)
    for k, name in enumerate(names):
        owner[numbers[name]] = k
    shared: dict[str, dict[str, None]] = {name: {} for name in couplings}
    blocks = dict.fromkeys(couplings, 1)
    for held in units.shared:
        for row in distinct_columns(np.sort(owner[held]).T).T.tolist():
            for one, other in itertools.combinations(sorted({names[k] for k in row if k >= 0}), 2):
                if other not in shared[one]:
                    shared[one][other] = shared[other][one] = None
                    _note_blocks(couplings[one], couplings[other], blocks)
    return {
        name: dataclasses.replace(c, overlaps=tuple(shared[name]), blocks=blocks[name]) if shared[name] else c
        for name, c in couplings.items()
    }


def _note_blocks(one: Coupling, other: Coupling, blocks: dict[str, int]) -> None:
    """Of two couplings that share positions, the one with the shorter runs lies inside the blocks of the other."""
    theirs = {(p.tensor, p.axis): p.positions[0] for p in other.places}
    pair = next(((p.positions[0], theirs[p.tensor, p.axis]) for p in one.places if (p.tensor, p.axis) in theirs), None)
    if pair is None:
        return
    lengths = [len(row) / (1 + int((np.diff(row) != 1).sum())) for row in pair]
    if lengths[0] != lengths[1]:
        inner, outer = (one, other) if lengths[0] < lengths[1] else (other, one)
        blocks[inner.name] = max(blocks[inner.name], outer.units)


def list_frozen(state: Propagation) -> list[Frozen]:
    """Why parameters are pinned: each reason with how many of their positions it pinned first."""
    found: dict[tuple[str, str, str], int] = collections.defaultdict(int)
    calls = state.recording.calls
    for pin in state.pinned:
        if pin.reason == KERNEL:
            continue
        call = calls[pin.call] if 0 <= pin.call < len(calls) else None
        found[pin.reason, call.where if call else "", call.module if call else ""] += pin.positions
    rows = [Frozen(*key, positions) for key, positions in found.items() if positions]
    return sorted(rows, key=lambda f: -f.positions)
