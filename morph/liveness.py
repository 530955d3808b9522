"""Which channels nobody reads any more, once some gates are closed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from morph.analysis.atoms import Labels
from morph.branches import Branch, find_branch
from morph.gate_sites import Layout
from morph.readers import Graphed, Mask, Reader


@dataclass(frozen=True, eq=False)
class Closing:
    """What goes when gates are closed.

    Attributes:
        times: For each label 0 if it is gone, 1 if not.
        kept: For each site the closed gates whose channel stays all the same, because a reader would have none left.
        dead: Paths of the readers that nobody needs any more.
        dropped: Branches that are dropped whole, since their last reader reads nothing any more.
        leaving: Names of the parameters and buffers that only they and what leads to them alone use.
    """

    times: Labels
    kept: Mapping[str, tuple[int, ...]]
    dead: tuple[str, ...]
    dropped: tuple[Branch, ...]
    leaving: frozenset[str]


class Liveness:
    """Follows closed gates through the graph with borders: a channel goes when all its readers have closed it.

    Args:
        layout: The sites.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.graph = layout.bordered
        self.units = self.graph.analysis.units
        self.final = self.graph.analysis.state.atoms.roots()
        readers = self.graph.readers
        self.used_unit, self.used_by = _pairs([r.units for r in readers])
        self.made, self.maker = _pairs([r.made for r in readers])
        through = [self._through(name) for name in layout.borders]
        self.border_unit = np.concatenate([t[0] for t in through] or [np.zeros(0, np.int64)])
        self.border_out = np.concatenate([t[1] for t in through] or [np.zeros(0, np.int64)])
        used = np.zeros(self.units.count, bool)
        used[self.used_unit] = used[self.border_unit] = True
        self.loose = used & ~self.graph.pinned
        graph = self.graph if isinstance(self.graph, Graphed) else None
        self.branches = [find_branch(graph, r) if graph and not r.inner else None for r in readers]

    def _through(self, border: str) -> tuple[Labels, Labels]:
        """The units in front of a border, and the label behind it at the same position."""
        graph = self.graph
        assert isinstance(graph, Graphed)
        node = next(n for n in graph.graph.graph.nodes if n.name == border)
        axis = graph.graph.get_submodule(str(node.target)).axis
        assert isinstance(axis, int)
        before = graph.roots(node.all_input_nodes[0].name)[axis]
        unit, position = self.units.on(before)
        return unit, graph.roots(border)[axis][position]

    def close(self, closed: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Closing:
        """Close gates.

        Args:
            closed: For each site a mask ``[k]``; sites that are left out are open.
            values: For each site its gates ``[k]``; where one closed gate must stay, the largest does.
        """
        masks = {name: np.asarray(mask.detach().cpu().numpy(), bool).copy() for name, mask in closed.items()}
        kept: dict[str, list[int]] = {}
        dropped: dict[int, Branch] = {}
        while True:
            times, dead = self._spread(masks, dropped)
            hungry = [
                number
                for number, reader in enumerate(self.graph.readers)
                if not dead[number] and not times[reader.roots].any()
            ]
            if not hungry:
                break
            number, branch = self._droppable(hungry, dropped)
            if branch is not None:
                dropped[number] = branch
                continue
            name, gate = self._best(self.graph.readers[hungry[0]], masks, values)
            masks[name][gate] = False
            kept.setdefault(name, []).append(gate)
        gone = tuple(r.path for number, r in enumerate(self.graph.readers) if dead[number])
        branches = tuple(dropped[number] for number in sorted(dropped))
        leaving = self._leaving(times, {name for b in branches for name in b.chain}) if gone else frozenset()
        stays = {name: tuple(sorted(gates)) for name, gates in kept.items()}
        return Closing(times[self.final], stays, gone, branches, leaving)

    def _droppable(self, hungry: list[int], dropped: Mapping[int, Branch]) -> tuple[int, Branch | None]:
        """The first of the readers with nothing left that ends a branch, unless that was the last operand of a sum."""
        taken = {branch.addition for branch in dropped.values()}
        for number in hungry:
            branch = self.branches[number]
            if branch is not None and branch.addition not in taken:
                return number, branch
        return hungry[0], None

    def _leaving(self, times: Labels, dropped: set[str]) -> frozenset[str]:
        """Tensors that only nodes use that are empty or dropped, or that only such nodes read."""
        graph = self.graph
        assert isinstance(graph, Graphed)  # elsewhere each layer keeps a channel
        gone: set[str] = set()
        used: dict[bool, set[str]] = {True: set(), False: set()}
        for node in reversed(graph.graph.graph.nodes):
            empty = any(len(roots) and not times[roots].any() for roots in graph.roots(node.name))
            leaves = (
                empty or node.name in dropped or (bool(node.users) and all(user.name in gone for user in node.users))
            )
            if leaves:
                gone.add(node.name)
            if node.op in ("call_module", "get_attr"):
                used[leaves].add(str(node.target))
        left = used[True] - used[False]
        names = graph.analysis.recording.sources
        return frozenset(name for name in names if name in left or name.rpartition(".")[0] in left)

    def _spread(self, masks: Mapping[str, Mask], dropped: Collection[int]) -> tuple[Labels, Mask]:
        """What is gone, by final label, and which readers make nothing that anybody reads."""
        gone = np.zeros(self.units.count, bool)
        for site in self.layout.sites:
            if site.name in masks:
                gone[site.units[masks[site.name]]] = True
        count = len(self.graph.readers)
        while True:
            times = np.ones(self.graph.analysis.state.atoms.count, np.int64)
            times[self.units.atom[gone[self.units.unit]]] = 0
            dead = np.bincount(self.maker, weights=times[self.made], minlength=count) == 0
            dead[list(dropped)] = True
            alive = np.zeros(self.units.count, bool)
            alive[self.used_unit[~dead[self.used_by]]] = True
            alive[self.border_unit[times[self.border_out] != 0]] = True
            more = gone | (self.loose & ~alive)
            if (more == gone).all():
                return times, dead
            gone = more

    def _best(self, reader: Reader, masks: Mapping[str, Mask], values: Mapping[str, Tensor]) -> tuple[str, int]:
        """Of the closed gates in front of a reader, the one that stays: the largest, or the first of equals."""
        best, found = -1.0, ("", -1)
        for site in self.layout.sites:
            for gate in sorted({i for tap in site.taps if tap.reader == reader.node for i in tap.index if i >= 0}):
                size = float(values[site.name][gate].abs()) if site.name in masks and masks[site.name][gate] else -1.0
                if size > best:
                    best, found = size, (site.name, gate)
        assert found[0], reader.path
        return found


def _pairs(arrays: list[Labels]) -> tuple[Labels, Labels]:
    """The arrays one after another, and for each number which array it is from."""
    if not arrays:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(arrays), np.repeat(np.arange(len(arrays)), [len(a) for a in arrays])
