"""Change the number of groups of a convolution without changing what it computes.

With ``g`` groups, output channel ``o`` reads only the inputs of its own group. Merging every ``p`` neighbouring groups
into one embeds the old weight as the blocks of a block-diagonal matrix; the new entries are zero, so the output is the
same, and each gets a gradient at the first step since its input and its output's gradient are not zero. This is the
growth move of Whettam 2020, Algorithm 1 (a network morphism: Wei et al. 2016). Splitting a group is the inverse, and
possible only where all entries outside the blocks are zero.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from morph.errors import EditError
from morph.tracing import Trace

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def smallest_prime_factor(n: int) -> int:
    """The smallest prime that divides ``n >= 2``."""
    return next((p for p in range(2, int(n**0.5) + 1) if n % p == 0), n)


def merge_groups(weight: Tensor, groups: int, to: int) -> Tensor:
    """Embed the weight of a convolution with ``groups`` groups in one with ``to`` groups; ``to`` divides ``groups``.

    Args:
        weight: ``[out, in / groups, *kernel]``, or ``[in, out / groups, *kernel]`` of a transposed convolution.
        groups: Groups now.
        to: Groups wanted.

    Returns:
        The same with the second axis ``groups / to`` times as long; new entries are zero.
    """
    merged = groups // to
    rows, columns, kernel = len(weight) // groups, weight.shape[1], weight.shape[2:]
    blocks = weight.reshape(to, merged, rows, columns, *kernel)
    grown = weight.new_zeros(to, merged, rows, merged, columns, *kernel)
    for i in range(merged):
        grown[:, i, :, i] = blocks[:, i]
    return grown.reshape(len(weight), merged * columns, *kernel)


def split_groups(weight: Tensor, groups: int, to: int) -> Tensor:
    """The inverse of `merge_groups`: ``groups`` divides ``to``.

    Raises:
        EditError: If an entry that would be lost is not zero.
    """
    parts = to // groups
    rows, columns, kernel = len(weight) // to, weight.shape[1] // parts, weight.shape[2:]
    blocks = weight.reshape(groups, parts, rows, parts, columns, *kernel)
    kept = torch.stack([blocks[:, i, :, i] for i in range(parts)], dim=1)
    lost = int(weight.count_nonzero()) - int(kept.count_nonzero())
    if lost:
        raise EditError(f"{groups} groups cannot become {to}: {lost} weights between the new groups are not zero")
    return kept.reshape(len(weight), columns, *kernel)


def regroup(conv: _ConvNd, to: int) -> None:
    """Give ``conv`` another number of groups, in place, without changing what it computes.

    Flags, hooks, device and memory format stay; the weight is a new parameter.

    Raises:
        EditError: If neither number divides the other, ``to`` does not divide the channels, or weights that are not
            zero would be lost.
    """
    groups = conv.groups
    if to < 1 or (groups % to and to % groups) or conv.in_channels % to or conv.out_channels % to:
        raise EditError(
            f"{groups} groups of a convolution from {conv.in_channels} to {conv.out_channels} channels cannot become "
            f"{to}"
        )
    if to == groups:
        return
    with torch.no_grad():
        weight = (merge_groups if to < groups else split_groups)(conv.weight, groups, to)
    if conv.weight.dim() == 4 and conv.weight.stride(1) == 1 and conv.weight[0, 0].numel() > 1:
        weight = weight.contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.groups = to


@dataclass(frozen=True)
class Left:
    """A grouped convolution that is left whole, and why."""

    name: str
    reason: str


def grouped_convolutions(trace: Trace) -> tuple[list[str], list[Left]]:
    """Find the convolutions whose groups can be merged exactly, and those that are left whole.

    Returns:
        Paths of those that can grow, in the order of execution, and the others with the reason.
    """
    owners = Counter(id(p) for module in trace.root.modules() for p in module._parameters.values())
    reasons: dict[str, str] = {}
    for node, module in trace.calls():
        if isinstance(module, _ConvNd) and module.groups > 1 and str(node.target) not in reasons:
            shape = trace.shapes[node.all_input_nodes[0].name]
            reasons[str(node.target)] = _why_not(module, owners[id(module._parameters.get("weight"))], shape)
    left = [Left(name, reason) for name, reason in reasons.items() if reason]
    left += [
        Left(node.name, "a function call, not a module: its weight and its groups are in the model's own code")
        for node in trace.graph_module.graph.nodes
        if _groups_of_call(node) > 1
    ]
    reached = {id(module) for _, module in trace.calls()}
    left += [
        Left(name, "does not run in evaluation mode on these inputs")
        for name, module in trace.root.named_modules()
        if isinstance(module, _ConvNd) and module.groups > 1 and id(module) not in reached
    ]
    return [name for name, reason in reasons.items() if not reason], left


def _groups_of_call(node: fx.Node) -> int:
    """The groups of a functional convolution; 1 for any other node, and where they are not a plain number."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or not name.startswith("conv"):
        return 1
    position = 7 if "transpose" in name else 6
    value = node.kwargs.get("groups", node.args[position] if len(node.args) > position else 1)
    return value if isinstance(value, int) else 1


def _why_not(conv: _ConvNd, owners: int, shape: tuple[int, ...]) -> str:
    """Why the groups of ``conv`` cannot be merged exactly; '' if they can."""
    if parametrize.is_parametrized(conv) or "weight" not in conv._parameters:
        return "its weight is parametrised (weight norm, spectral norm, ...); remove the parametrisation first"
    if owners > 1:
        return "its weight is shared with another module"
    if type(conv) in _PLAIN or _stays_exact(conv, shape):
        return ""
    return f"a {type(conv).__name__} does not compute the same with merged groups (it may standardise its weight)"


def _stays_exact(conv: _ConvNd, shape: tuple[int, ...]) -> bool:
    """Try a subclass of the plain convolutions, on random numbers in float64: does its own forward stay the same?"""
    generator = torch.Generator().manual_seed(0)
    before = copy.deepcopy(conv).cpu().double().eval()
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        after = copy.deepcopy(before)
        regroup(after, after.groups // smallest_prime_factor(after.groups))
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        a, b = before(x), after(x)
    return bool((a - b).abs().max() <= 1e-10 * a.abs().max())
