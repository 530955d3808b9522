"""Branches that add to what goes past them, and what they add when their last layer reads nothing any more."""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from morph.analysis.recording import Value
from morph.readers import Graphed, Reader

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_METHODS = ("add", "add_")
_STILL = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Identity, _DropoutNd)
"""Modules that give zero for zero, each element by itself."""


@dataclass(frozen=True, eq=False)
class Branch:
    """A layer whose output, on its way into a sum, goes through nothing that mixes channels or pixels.

    If every channel that the layer reads is zero, it gives its bias, at every pixel the same, and so the branch adds
    one number for each channel.

    Attributes:
        reader: The layer.
        chain: Names of the nodes from the layer to the sum, the layer first.
        modules: Paths of the modules that these call.
        addition: Name of the node of the sum.
        shifts: Whether it adds something all the same: a bias or a batch norm is on the way.
    """

    reader: Reader
    chain: tuple[str, ...]
    modules: tuple[str, ...]
    addition: str
    shifts: bool


def find_branch(graph: Graphed, reader: Reader) -> Branch | None:
    """The branch that ends with a reader; None if what it gives is not handed on unmixed into a sum."""
    node = next(n for n in graph.graph.graph.nodes if n.name == reader.node)
    shifts = graph.graph.get_submodule(reader.path)._parameters.get("bias") is not None
    chain = [node]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op != "call_module":
            break
        module = graph.graph.get_submodule(str(user.target))
        if not isinstance(module, _STILL) and not (isinstance(module, _BatchNorm) and module.track_running_stats):
            return None
        shifts = shifts or isinstance(module, _BatchNorm)
        chain.append(user)
        node = user
    addition = next(iter(node.users)) if len(node.users) == 1 else None
    if addition is None or not _adds(graph, addition, node, reader):
        return None
    calls = [n.target for n in graph.graph.graph.nodes if n.op == "call_module"]
    if any(
        calls.count(n.target) > 1 and any(True for _ in graph.graph.get_submodule(n.target).buffers()) for n in chain
    ):
        return None
    names, modules = (tuple(n.name for n in chain), tuple(str(n.target) for n in chain))
    return Branch(reader, names, modules, addition.name, shifts)


def _adds(graph: Graphed, node: fx.Node, branch: fx.Node, reader: Reader) -> bool:
    """Whether a node is the sum of a branch and of something else of the same shape, and nothing else is."""
    plus = node.target in (_ADDITIONS if node.op == "call_function" else _METHODS if node.op == "call_method" else ())
    if not plus or node.kwargs or len(node.args) != 2 or branch not in node.args:
        return False
    other = node.args[0] if node.args[1] is branch else node.args[1]
    if not isinstance(other, fx.Node) or other is branch:
        return False
    sizes = [graph.values.get(n.name) for n in (node, branch, other)]
    if not all(isinstance(v, Value) and v.shape == sizes[0].shape for v in sizes):  # type: ignore[union-attr]
        return False
    writes = node.target in (operator.iadd, "add_")
    if writes and node.args[0] is other and len(other.users) > 1:  # who else reads it would miss what is written
        return False
    return np.array_equal(graph.roots(node.name)[reader.axis], reader.made)


def constant_of(branch: Branch, model: nn.Module) -> Tensor:
    """What a branch adds to each channel where its layer reads zeros, ``[C]`` float64, in evaluation mode."""
    bias = model.get_submodule(branch.reader.path)._parameters.get("bias")
    width = len(branch.reader.made)
    flat = torch.zeros(width, dtype=torch.float64) if bias is None else bias.detach().cpu().double()
    axis, rank = branch.reader.axis, len(branch.reader.shape)
    value = flat.reshape([-1 if a == axis else 1 for a in range(rank)])
    with torch.no_grad():
        for path in branch.modules[1:]:
            value = copy.deepcopy(model.get_submodule(path)).cpu().double().eval()(value)
    return value.flatten()
