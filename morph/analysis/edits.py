"""What edits of tensors mean for labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from morph.analysis.atoms import Labels
from morph.analysis.propagation import Propagation
from morph.plan import DropBranch, Plan, Reroute, Resize


def times_of(state: Propagation, edits: Sequence[Resize]) -> Labels:
    """How often each label is there after some edits.

    Factors of reshapes follow from their wholes, and wholes that no tensor of the model has from their factors.

    Args:
        state: A finished propagation.
        edits: In order; several of one axis are carried out one after the other. Tensors that the run does not have
            are passed over.
    """
    atoms = state.atoms
    times = np.ones(atoms.count, np.int64)
    known = np.zeros(atoms.count, bool)
    for (tensor, axis), index in composed(edits).items():
        value = state.recording.sources.get(tensor)
        if value is not None:
            labels = state.tag(value).axes[axis]
            times[atoms.find(labels)] = np.bincount(index, minlength=len(labels))
    for value in state.recording.sources.values():
        for labels in state.tag(value).axes:
            known[atoms.find(labels)] = True
    for relation in state.relations:
        whole = times[atoms.find(relation.whole)]
        if (whole == 1).all():
            continue
        for factor in map(atoms.find, relation.factors):
            for label in np.unique(factor[factor != 0]).tolist():
                rows = whole[factor == label]
                if (rows == 0).all():
                    times[label] = 0
                elif (rows > 1).all():
                    times[label] = rows.min()
    for relation in state.relations:  # a whole that no tensor of the model has, such as heads times positions in them
        wholes = atoms.find(relation.whole)
        made = np.prod([np.where(f == 0, 1, times[f]) for f in map(atoms.find, relation.factors)], axis=0)
        own = (wholes != 0) & ~known[wholes]
        times[wholes[own]] = made[own]
    return times[atoms.roots()]


def composed(edits: Sequence[Resize]) -> dict[tuple[str, int], Labels]:
    """For each tensor and axis, the old position of each new one after all edits."""
    found: dict[tuple[str, int], Labels] = {}
    for edit in edits:
        index = np.array(edit.index, np.int64)
        before = found.get((edit.tensor, edit.axis))
        found[edit.tensor, edit.axis] = index if before is None else before[index]
    return found


def drops(edits: Sequence[Resize]) -> bool:
    """Whether some position is gone after all edits."""
    sizes: dict[tuple[str, int], int] = {}
    for edit in edits:
        sizes.setdefault((edit.tensor, edit.axis), edit.size)
    return any(len(np.unique(index)) < sizes[key] for key, index in composed(edits).items())


def closes_gates(plan: Plan) -> bool:
    """Whether a plan takes gates out: readers read parts of what they read, or their weights are scaled in place."""
    return any(
        isinstance(edit, Reroute | DropBranch)
        or (isinstance(edit, Resize) and bool(edit.scale) and len(set(edit.index)) == len(edit.index))
        for edit in plan.edits
    )
