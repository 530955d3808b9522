"""How many groups a call has after a cut: a norm over groups has the same shape with another number of them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.propagation import Propagation
from morph.analysis.recording import Value
from morph.analysis.tags import values_in
from morph.module_tree import module_at
from morph.plan import SetAttribute


def group_counts(state: Propagation, times: Labels) -> Iterator[tuple[int, int, int]]:
    """For each call with groups its number, and how many groups it had and has.

    Args:
        state: What the analysis found.
        times: For each label how often it is there now.
    """
    for number, labels in state.groups.items():
        yield number, len(labels), int(times[labels].sum()) if len(labels) > 1 else 1


def groups_after(state: Propagation, output: Value, times: Labels) -> int | None:
    """How many groups the call that gave ``output`` has now; None if it has none, or something wrote into it."""
    for number, _, now in group_counts(state, times):
        if values_in(state.recording.calls[number].output)[0] is output:
            return now
    return None


def new_groups(base: nn.Module, analysis: Analysis, times: Labels) -> list[SetAttribute]:
    """The new numbers of groups of torch's own convolutions and group norms in ``base``."""
    found: dict[str, SetAttribute] = {}
    for number, old, new in group_counts(analysis.state, times):
        path = analysis.recording.calls[number].module
        module = module_at(base, path)
        attribute = "groups" if isinstance(module, _ConvNd) else "num_groups"
        if new != old and isinstance(module, _ConvNd | nn.GroupNorm):
            found[path] = SetAttribute(path, attribute, old, new)
    return list(found.values())
