"""Insert and remove identity probes that measure the gradient of a gate at one.

A probe after an activation ``A`` stands for a gate that multiplies channel ``c`` and has the value one. The derivative
of sample ``n``'s loss with respect to that gate is ``g[n, c] = sum over positions of A * dL/dA``, which is what a probe
keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn

from morph.errors import ProbeError

PREFIX = "morph_probe_"


class Probe(nn.Module):
    """Identity in the forward pass; in the backward pass it keeps ``sum over positions of A * dL/dA``.

    The tensor handed on is a clone, so an in-place operation behind the probe cannot spoil the activation that it
    keeps. Where nothing before the probe needs a gradient, the backward pass ends here.

    Args:
        channel_axis: Axis of the activation that holds channels.

    Attributes:
        gradient: ``[N, C]`` after a backward pass, None before.
    """

    def __init__(self, channel_axis: int = 1) -> None:
        super().__init__()
        self.channel_axis = channel_axis
        self.gradient: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, unchanged in value."""
        if not torch.is_grad_enabled():
            return x
        self.gradient = None
        probed = (x if x.requires_grad else x.detach().requires_grad_()).clone()
        kept, version = x.detach(), x._version

        def keep(gradient: Tensor) -> None:
            if kept._version != version:
                raise ProbeError(
                    "an activation was overwritten in place through another name before its gradient came; probe "
                    "elsewhere with --at"
                )
            product = (kept * gradient).movedim(self.channel_axis, 1)
            self.gradient = product.flatten(2).sum(2) if product.dim() > 2 else product

        probed.register_hook(keep)
        return probed

    def extra_repr(self) -> str:
        """Show the axis."""
        return f"channel_axis={self.channel_axis}"


def insert_probes(module: fx.GraphModule, nodes: Iterable[tuple[str, int]]) -> fx.GraphModule:
    """Return a copy of ``module``'s graph with a `Probe` after each named node; leaf modules are shared.

    Args:
        module: The graph to probe; not changed.
        nodes: ``(node name, channel axis)`` pairs.

    Raises:
        ProbeError: If there is no node of that name, or a probe is there already.
    """
    graph = copy.deepcopy(module.graph)
    by_name = {node.name: node for node in graph.nodes}
    root = nn.Module()
    root.__dict__.update({**module.__dict__, "_modules": dict(module._modules)})
    for name, axis in nodes:
        if name not in by_name:
            raise ProbeError(f"no node {name!r} in the graph; the last are {', '.join(list(by_name)[-4:])}")
        target = PREFIX + name
        if target in root._modules:
            raise ProbeError(f"node {name!r} is probed already")
        root.add_module(target, Probe(axis))
        node = by_name[name]
        with graph.inserting_after(node):
            probe = graph.call_module(target, (node,))
        node.replace_all_uses_with(probe, delete_user_cb=lambda user, probe=probe: user is not probe)
    graph.lint()
    return fx.GraphModule(root, graph, type(module).__name__)


def remove_probes(module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of ``module``'s graph without its probes: what `insert_probes` was given."""
    graph = copy.deepcopy(module.graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target).startswith(PREFIX):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.lint()
    return fx.GraphModule(module, graph, type(module).__name__)


def probes_of(module: fx.GraphModule) -> dict[str, Probe]:
    """The probes in ``module``, by the name of the node that each stands behind."""
    found = {name: child for name, child in module.named_children() if isinstance(child, Probe)}
    return {name.removeprefix(PREFIX): probe for name, probe in found.items()}
