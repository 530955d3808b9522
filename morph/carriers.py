"""Carry resized tensors in a module: the model's own class where its code can, else its traced graph."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.group_counts import new_groups
from morph.analysis.recording import Inputs
from morph.cut import apply_plan
from morph.errors import TraceError
from morph.fitting import Fitter, Misfit
from morph.graph_fitting import GraphFitter
from morph.heads import attention_edits
from morph.plan import Edit, Plan, Resize, UseGraph
from morph.recurrent import recurrent_edits

Form = Literal["auto", "class", "graph"]


@dataclass(frozen=True)
class LeftWhole:
    """A coupling that was chosen but left as it was.

    Attributes:
        coupling: Its name.
        units: How many of its units had been chosen.
        reason: Why it was left.
    """

    coupling: str
    units: int
    reason: str


@dataclass(frozen=True)
class Carried:
    """A plan that a module can carry.

    Attributes:
        plan: Resized tensors, and the attributes or constants that go with them.
        form: ``class`` if the module stays of the model's own class, ``graph`` if it is its traced graph.
        why_graph: What the code has fixed, if it is the graph.
    """

    plan: Plan
    form: str
    why_graph: str


@dataclass(frozen=True)
class Altered:
    """A model whose units were cut or copied.

    Attributes:
        model: The new module.
        plan: The edits.
        left: What was asked for but left as it was, with the reason.
        form: ``class`` if the module is of the model's own class, ``graph`` if it is its traced graph.
        why_graph: What the code has fixed, if it is the graph.
    """

    model: nn.Module
    plan: Plan
    left: tuple[LeftWhole, ...]
    form: str
    why_graph: str


class Carrier:
    """Finds what besides the tensors must change for the new sizes.

    Args:
        model: Not touched.
        inputs: What it was analysed with.
        analysis: What hangs together in it.
        form: ``class`` for a module of the model's own class, ``graph`` for its traced graph, ``auto`` for the class
            where its code can carry the new sizes and else the graph.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, analysis: Analysis, form: Form) -> None:
        self.model, self.inputs, self.analysis, self.form = model, inputs, analysis, form
        self.fitter = Fitter(model, inputs, analysis)
        self.graph: GraphFitter | None = None
        self.no_graph = ""

    def carry(self, edits: Sequence[Resize], times: Labels) -> Carried | Misfit:
        """The whole plan; or where no form can carry it.

        Args:
            edits: The resized tensors.
            times: For each label how often it will be there.
        """
        misfit: Misfit | None = None
        if self.form != "graph":
            own = self.fitter.fit(edits, times)
            if own.misfit is None:
                return Carried(Plan((*edits, *own.attributes)), "class", "")
            misfit = own.misfit
        if self.form != "class":
            found = self._through_graph(edits, times)
            if isinstance(found, Plan):
                return Carried(found, "graph", f"{misfit.reason} (in {misfit.module})" if misfit else "asked for")
            misfit = misfit or found
        assert misfit is not None
        return misfit

    def apply(self, carried: Carried) -> nn.Module:
        """The new module."""
        return apply_plan(self.model, carried.plan)

    def _through_graph(self, edits: Sequence[Resize], times: Labels) -> Plan | Misfit:
        if self.graph is None and not self.no_graph:
            try:
                self.graph = GraphFitter(self.model, self.inputs)
            except TraceError as error:
                self.no_graph = str(error)
        if self.graph is None:
            return Misfit(0, "", self.no_graph)
        graph = self.graph.graph  # without the modules that it looks through
        inside = [*attention_edits(graph, edits), *recurrent_edits(graph, edits)]
        sizes = [*new_groups(graph, self.analysis, times), *inside]
        constants, misfit = self.graph.fit(edits, sizes)
        if misfit is not None:
            return misfit
        used = [e for e in edits if e.tensor in self.graph.state.recording.sources]
        everything: list[Edit] = [UseGraph("symbolic"), *used, *sizes, *constants]
        return Plan(tuple(everything))

    def siblings(self, name: str, chosen: Collection[str]) -> list[str]:
        """The chosen couplings of the same name but for numbers and of the same size: they fail together."""
        couplings = self.analysis.couplings
        pattern, units = re.sub(r"\d+", "#", name), couplings[name].units
        return [n for n in chosen if couplings[n].units == units and re.sub(r"\d+", "#", n) == pattern]
