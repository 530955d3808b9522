"""Channel gates: put them into a model, count what closing them saves, and take them out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from morph.analysis import Sizes, count_sizes
from morph.analysis.admission import admit
from morph.analysis.recording import Inputs, arguments_of, named_tensors, tensors_of
from morph.cut import apply_plan
from morph.errors import EditError, SymbolicTraceError, TargetError
from morph.gate_removal import bare_graph, class_plan, graph_plan, plan_removal
from morph.gate_sites import Layout, Site, Where, lay_out
from morph.gate_trials import without_fixed
from morph.gate_weights import Measure, saved
from morph.graphs import graph_of
from morph.inputs import plain
from morph.liveness import Closing, Liveness
from morph.model_config import with_config
from morph.norm_counts import batch_norm_operations
from morph.passes.gated_weights import gate_weights
from morph.passes.gates import HOME, Tap, gates_of, insert_gates, insert_weight_gates
from morph.plan import Plan, Record
from morph.pruning import batch_of
from morph.readers import Reader
from morph.removal import LIMIT, compare
from morph.surgery import Result, environment
from morph.verify import require
from morph.weight_sites import lay_out_weights
from morph.zeroing import double_copy, run_doubled

Masks = Mapping[str, Tensor]


class Gated:
    """A model with gates.

    Attributes:
        model: The traced graph with `morph.passes.gates.Gate` modules; or where there is no symbolic graph a copy of
            the model, of its own class, with gates on the weights of its layers (`morph.passes.gated_weights`). Train
            it as any module. Its other parameters have the names that they have in the model that came in.
        sites: Where the gates are, in the order of execution.
        left: Why layers have no gates in front of them, by path; and weights that are used otherwise than by a
            convolution or linear layer, by name.
    """

    def __init__(self, source: nn.Module, inputs: Inputs, layout: Layout, where: Where) -> None:
        self.model: nn.Module = copy.deepcopy(source) if layout.no_graph else graph_of(source)
        self.sites: tuple[Site, ...] = layout.sites
        self.left: Mapping[str, str] = layout.left
        self._source, self._inputs, self._layout, self._where = copy.deepcopy(source), plain(inputs), layout, where
        self._insert(layout.bordered.readers)
        self._liveness = Liveness(layout)
        self._batch = batch_of(inputs)

    def _insert(self, readers: Sequence[Reader]) -> None:
        """Put the gates of all sites in: in front of nodes, on weights that functions read, or on those of modules."""
        axes = {reader.weight: reader.into for reader in readers if reader.inner}
        graph = None if self._layout.no_graph else self.model
        nodes = graph.graph.nodes if isinstance(graph, fx.GraphModule) else ()
        fetched = {str(node.target) for node in nodes if node.op == "get_attr"}
        gates: dict[str, dict[str, tuple[int, Sequence[Tap]]]] = {"node": {}, "function": {}, "module": {}}
        for site in self.sites:
            weight = site.taps[0].reader
            kind = "node" if weight not in axes else "function" if weight in fetched else "module"
            gates[kind][site.name] = (site.gates, site.taps)
        gate_weights(self.model, gates["module"], axes)
        if isinstance(graph, fx.GraphModule):
            insert_weight_gates(graph, gates["function"], axes)
            insert_gates(graph, gates["node"], {r.node: len(r.shape) for r in readers if not r.inner})

    @property
    def total(self) -> int:
        """Number of gates."""
        return sum(site.gates for site in self.sites)

    def closed(self) -> dict[str, Tensor]:
        """For each site a mask ``[k]``: the gates that are exactly zero."""
        return {name: gate.weight.detach() == 0 for name, gate in self._gates().items()}

    def sizes(self, closed: Masks | None = None) -> Sizes:
        """Parameters, and multiply-adds of one sample, of the network that `remove` would give.

        Args:
            closed: For each site a mask ``[k]``; sites that are left out are open. None counts the network whole.

        Raises:
            TargetError: If a site does not exist, or a mask is not of its length.
        """
        return self._count(self._close(closed or {}))

    def norm_operations(self, closed: Masks) -> int:
        """Two for each element of a batch norm, for one sample, of the network that `remove` would give.

        Args:
            closed: As in `sizes`.

        Raises:
            TargetError: As `sizes`.
        """
        analysis, closing = self._layout.bordered.analysis, self._close(closed)
        gone = [path for branch in closing.dropped for path in branch.modules]
        return batch_norm_operations(analysis, closing.times, gone) // self._batch

    def weights(self, measure: Measure) -> dict[str, Tensor]:
        """How much closing each gate alone saves, over the largest such saving: alpha_j in (0, 1].

        A gate of a connection is charged what its own reader saves: columns of its weight, and a norm that only it
        looks through. The rows of whoever makes the channel go when its last reader closes it, and `sizes` counts
        that, but no single gate is charged with it. Source: Gu & Tresp, ECAI 2020, Eq. 3.

        Args:
            measure: ``macs``, ``params``; ``memory``: elements that layers read and give; ``latency``: measured for
                each layer at half and at full width and interpolated, so it follows the machine; ``none``: ones.

        Returns:
            For each site ``[k]`` float32.

        Raises:
            TargetError: If ``measure`` is none of these.
        """
        return saved(self._layout, measure, self._plain())

    def remove(self, closed: Masks | None = None) -> Result:
        """Take the gates out: closed channels go, what open gates multiply goes into the weights of the readers.

        A channel goes from whoever makes it when all its readers have closed it, and from the reader alone otherwise.
        A layer whose outputs nobody reads any more leaves whole. Where a reader would have nothing left, what it gives
        is its bias: if that goes unmixed into a sum, as at the end of a residual branch, the whole branch is dropped,
        and what bias and batch norm would still have added becomes a parameter. Any other such reader keeps one channel
        with weights of zero. The record says which.

        Args:
            closed: For each site a mask ``[k]`` of gates that count as zero; those that are zero if absent.

        Returns:
            A plain module: of the model's own class where every reader reads all that its source still has and the
            code can carry it, else its traced graph. The check compares it, in float64, with the gated model whose
            closed gates are zero.

        Raises:
            TargetError: If a site does not exist, or a mask is not of its length.
            EditError: If no form of the model can carry it.
            TraceError: If the gated model keeps what cannot be copied, such as results of a run with gradients.
            CheckFailedError: If the result differs from the gated model.
        """
        masks = dict(self.closed() if closed is None else closed)
        closing = self._close(masks)
        gates = {
            name: torch.where(masks[name].to(gate.weight.device), 0.0, gate.weight.detach())
            if name in masks
            else gate.weight.detach()
            for name, gate in self._gates().items()
        }
        plain = self._plain()
        removal = plan_removal(self._layout, closing, gates, plain)
        inputs = self._moved()
        own = class_plan(plain, inputs, removal)
        if isinstance(own, str) and self._layout.no_graph:
            raise EditError(f"the code of {type(plain).__name__} cannot carry the removal: {own}")
        plan = graph_plan(self._layout, closing, removal, bare_graph(plain)) if isinstance(own, str) else own
        model = apply_plan(plain, plan)
        wanted = run_doubled(self._with(gates), inputs)
        check = compare("gated model", wanted, apply_plan(double_copy(plain), plan), inputs, LIMIT)
        require((check,))
        model, settings, config = with_config(plain, model, inputs)
        rounding = compare("as returned", wanted, model, inputs, LIMIT)
        record = Record(
            command="remove-gates",
            options={"where": self._where},
            plan=Plan((*plan.edits, *settings)),
            before=asdict(self.sizes()),
            after=asdict(self.sizes(masks)),
            checks=(check,),
            details={
                **self._details(masks, closing),
                **config,
                "form": "graph" if isinstance(own, str) else "class",
                "why_graph": own if isinstance(own, str) else "",
                "training_only_params": sum(
                    p.numel() for name, p in plain.named_parameters() if name not in removal.tensors
                ),
                "rounding": rounding.max_abs_diff,
            },
            environment=environment(self.model, tensors_of(arguments_of(inputs))[0]),
        )
        return Result(model, record)

    def _details(self, masks: Masks, closing: Closing) -> dict[str, Any]:
        """What the record says."""
        shut = {name: int(mask.sum()) for name, mask in masks.items()}
        return {
            "weight_preserving": False,
            "verified": "outputs in evaluation mode, float64: equal to those of the gated model whose closed gates are "
            "zero; in the type of the weights, gates that are not one round once",
            "gates_total": self.total,
            "gates_open": self.total - sum(shut.values()),
            "sites": [
                {"name": s.name, "kind": s.kind, "gates": s.gates, "closed": shut.get(s.name, 0)} for s in self.sites
            ],
            "kept": [{"site": name, "gates": list(gates)} for name, gates in closing.kept.items()],
            "layers_gone": list(closing.dead),
            "branches_gone": [{"layer": b.reader.path, "shift": b.shifts} for b in closing.dropped],
            "ungated": dict(self.left),
            "no_graph": self._layout.no_graph,
        }

    def _gates(self) -> dict[str, Any]:
        return gates_of(self.model)

    def _close(self, closed: Masks) -> Closing:
        widths = {site.name: site.gates for site in self.sites}
        for name, mask in closed.items():
            if name not in widths:
                raise TargetError(f"no gates at {name!r}; there are gates at {', '.join(list(widths)[:3])} ...")
            if tuple(mask.shape) != (widths[name],):
                raise TargetError(f"{name} has {widths[name]} gates, got a mask of shape {list(mask.shape)}")
        return self._liveness.close(closed, {name: gate.weight.detach() for name, gate in self._gates().items()})

    def _count(self, closing: Closing) -> Sizes:
        """Parameters and multiply-adds of one sample of what stays."""
        sizes = count_sizes(self._layout.bordered.analysis, closing.times, closing.leaving)
        new = sum(int(closing.times[branch.reader.made].sum()) for branch in closing.dropped if branch.shifts)
        return Sizes(sizes.params + new, sizes.macs // self._batch)

    def _plain(self) -> nn.Module:
        """The model that came in, with the tensors that the gated one has now."""
        plain = copy.deepcopy(self._source)
        now = dict(named_tensors(self.model))
        with torch.no_grad():
            for name, tensor in named_tensors(plain):
                if name in now:
                    tensor.data = now[name].detach().clone()
        flags = {path: m.training for path, m in self.model.named_modules() if not path.startswith(HOME)}
        for path, module in plain.named_modules():
            module.training = flags.get(path, self.model.training)
        return plain

    def _with(self, values: Masks) -> nn.Module:
        """A float64 copy of the gated model with these gates."""
        try:
            twin = double_copy(self.model)
        except RuntimeError:
            admit(self.model, self._inputs)  # names what cannot be copied
            raise
        with torch.no_grad():
            for name, gate in gates_of(twin).items():
                gate.weight.copy_(values[name])
        return twin

    def _moved(self) -> Inputs:
        """The example inputs where the model is now."""
        device = next(self.model.parameters()).device
        return pytree.tree_map_only(Tensor, lambda t: t.to(device), self._inputs)  # type: ignore[no-any-return]


def gate(model: nn.Module, example_inputs: Inputs, where: Where = "auto") -> Gated:
    """Put a multiplicative gate, one at birth, in front of what layers read.

    A gate stands right before its reader, behind norm and activation, so that a gate of zero is exactly what a cut
    means: that reader sees zero. Outputs stay the same to the bit, and every gate has a gradient. Gates in front of
    weights that no node of the graph calls, inside attention or recurrent layers or in `F.linear`, multiply the weight;
    they are there for what nothing else reads: whole heads, hidden widths.

    Models that `torch.fx` cannot trace symbolically, such as those of Hugging Face, are run without data instead. Their
    gates are ``producer`` gates, which a cut of the model's own class can follow: whole heads, hidden widths. What a
    statistic runs over (a residual stream under LayerNorm) or the code cannot lose has none; `Gated.left` says why.

    Args:
        model: Any module whose control flow does not depend on the values of tensors; not touched.
        example_inputs: A tensor, a tuple of arguments, or a mapping of named arguments; a batch of two or more.
        where: ``producer``: one gate for each unit that can be cut, shared by all its readers. ``connection``: each
            reader has gates of its own, one for each position that it reads. ``auto``: ``producer`` where a channel
            has one reader, ``connection`` where tensors are concatenated or reused, as the paper does for DenseNet.

    Raises:
        TraceError: If the model cannot be traced or does not accept the inputs; names the line. If ``connection`` is
            asked for and there is no symbolic graph.
        EditError: If there is nothing to gate; says why.
        TargetError: If ``where`` is none of these.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> gated = morph.gate(build("densenet-bc-10-4"), torch.randn(2, 3, 32, 32))
        >>> gated.total, gated.sites[0].name
        (98, 'stages.0.0.conv1')
    """
    if where not in ("auto", "producer", "connection"):
        raise TargetError(f"where is auto, producer or connection, got {where!r}")
    return Gated(model, example_inputs, _lay_out(model, example_inputs, where), where)


def _lay_out(model: nn.Module, inputs: Inputs, where: Where) -> Layout:
    """The sites in the traced graph; where there is none, those that the model's own code can carry."""
    try:
        return without_fixed(lay_out(model, inputs, where), model)
    except SymbolicTraceError as error:
        if where == "connection":
            raise
        no_graph = error
    return lay_out_weights(model, inputs, no_graph)
