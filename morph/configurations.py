"""Which block types fit where, how large a configuration is, and random configurations of a wanted size."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from morph.blocks import Cell, find_cells
from morph.errors import NothingToGrowError, TargetError
from morph.passes.cheap_blocks import STANDARD, Size, block_size, is_full, parse_choice, why_not
from morph.passes.regroup import Left
from morph.policies import Metric
from morph.tracing import Trace

_CHUNK, _DRAWS = 4096, 100_000
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ACTIVATIONS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


@dataclass(frozen=True)
class Site:
    """A block of the model that takes one choice.

    Attributes:
        cell: Where it is probed.
        convs: Paths of the convolutions that are replaced.
        choices: The choices that fit all of them.
        sizes: What its convolutions cost with each choice; with ``S`` too, if that is no choice.
        unavailable: The other choices, and why.
    """

    cell: Cell
    convs: tuple[str, ...]
    choices: tuple[str, ...]
    sizes: Mapping[str, Size]
    unavailable: Mapping[str, str]


@dataclass(frozen=True)
class Drawn:
    """Random configurations inside a window.

    Attributes:
        configurations: For each, the number of the choice of every site.
        sizes: What the whole model costs with each.
        drawn: How many were drawn.
        outside: How many of these were outside the window.
        repeated: How many were inside, but drawn before.
        reachable: Smallest and largest size that the choices allow.
    """

    configurations: tuple[tuple[int, ...], ...]
    sizes: tuple[Size, ...]
    drawn: int
    outside: int
    repeated: int
    reachable: tuple[int, int]


def find_sites(trace: Trace, choices: Sequence[str], at: Sequence[str] | None) -> tuple[list[Site], list[Left]]:
    """The blocks that can be replaced, and the convolutions that cannot.

    Raises:
        EditError: If a choice is not a block.
        ProbeError: As `morph.blocks.find_cells`.
        NothingToGrowError: If nothing can be replaced; says why.
    """
    for name in choices:
        parse_choice(name)
    calls: dict[str, list[fx.Node]] = {}
    for node, module in trace.calls():
        if isinstance(module, _ConvNd) and math.prod(module.kernel_size) > 1:
            calls.setdefault(str(node.target), []).append(node)
    owners = Counter(id(p) for module in trace.root.modules() for p in module._parameters.values())
    cells = find_cells(trace, at)
    inside = {path: cell.name for cell in cells for path in cell.modules}
    names = Counter(id(module) for _, module in trace.root.named_modules(remove_duplicate=False))
    modules = {path: trace.root.get_submodule(path) for path in calls}
    reasons = {path: _why_left(module, owners, names[id(module)]) for path, module in modules.items()}
    for node in trace.graph_module.graph.nodes:
        if node.op == "get_attr" and (path := str(node.target).rpartition(".")[0]) in reasons:
            reasons[path] = reasons[path] or "the model's own code reads its weights"
    left = [
        Left(path, reason or "outside every block; name it with --at")
        for path, reason in reasons.items()
        if reason or path not in inside
    ]
    sites = []
    for cell in cells:
        convs = [path for path in calls if inside.get(path) == cell.name and not reasons[path]]
        site = _site(trace, cell, convs, calls, choices)
        if set(site.choices) - {STANDARD}:
            sites.append(site)
        else:
            left += [Left(path, "; ".join(site.unavailable.values()) or "no choice but S") for path in convs]
    if not sites:
        shown = next((item for item in left if item.name in inside), left[0] if left else None)
        first = f" ({len(left)} left whole, such as {shown.name}: {shown.reason})" if shown else ""
        raise NothingToGrowError(
            f"no convolution with one group and a kernel larger than 1 can become {', '.join(choices) or 'nothing'}"
            f"{first}; give other blocks with --choices or other places with --at"
        )
    return sites, left


def _why_left(conv: nn.Module, owners: Counter[int], names: int) -> str:
    """Why a convolution is left whole; '' if it can be replaced."""
    if parametrize.is_parametrized(conv) or conv._parameters.get("weight") is None:
        return "its weight is parametrised; remove the parametrisation first"
    if isinstance(conv, _ConvNd) and conv.groups > 1:
        return f"it has {conv.groups} groups already"
    if not is_full(conv):
        return f"a {type(conv).__name__} is not a plain convolution"
    if names > 1:
        return f"it has {names} names"
    if owners[id(conv.weight)] > 1:
        return "its weight is shared with another module"
    if conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks:
        return "it has hooks, which would be lost; remove them first"
    return ""


def _site(
    trace: Trace, cell: Cell, convs: Sequence[str], calls: Mapping[str, Sequence[fx.Node]], choices: Sequence[str]
) -> Site:
    """What a block can become, and what that costs."""
    modules = [trace.root.get_submodule(path) for path in convs]
    unavailable: dict[str, str] = {}
    for choice in choices:
        for path, conv in zip(convs, modules, strict=True):
            assert isinstance(conv, _ConvNd)
            if reason := why_not(conv, choice):
                unavailable.setdefault(choice, f"{choice}: {reason} of {path}")
    fitting = tuple(choice for choice in choices if choice not in unavailable) if convs else ()
    sizes = {}
    for choice in dict.fromkeys((STANDARD, *fitting)):
        parts = [_size(trace, conv, choice, calls[path]) for path, conv in zip(convs, modules, strict=True)]
        sizes[choice] = Size(sum(part.params for part in parts), sum(part.macs for part in parts))
    nodes = tuple(_branch(trace, name, convs) for name in cell.nodes)
    return Site(dataclasses.replace(cell, nodes=nodes), tuple(convs), fitting, sizes, unavailable)


def _size(trace: Trace, conv: nn.Module, choice: str, calls: Sequence[fx.Node]) -> Size:
    """What ``choice`` costs in place of ``conv``, over all its calls."""
    assert isinstance(conv, _ConvNd)
    samples = len(trace.inputs[0])
    inputs = sum(math.prod(trace.shapes[node.all_input_nodes[0].name]) for node in calls)
    outputs = sum(math.prod(trace.shapes[node.name]) for node in calls)
    return block_size(conv, choice, inputs // conv.in_channels // samples, outputs // conv.out_channels // samples)


def _branch(trace: Trace, name: str, convs: Sequence[str]) -> str:
    """The node to probe: the end of a residual branch, or the block's output where that is no sum of two."""
    node = trace.node(name)
    while _is(trace, node, _ACTIVATIONS, nn.ReLU) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if not _is(trace, node, _SUMS) or len(node.all_input_nodes) != 2:
        return name
    ends = [operand for operand in node.all_input_nodes if _comes_from(operand, set(convs))]
    return ends[0].name if len(ends) == 1 else name


def _is(trace: Trace, node: fx.Node, targets: Sequence[object], module: type[nn.Module] | None = None) -> bool:
    """Whether ``node`` calls one of ``targets``, or a ``module``."""
    if node.op == "call_module":
        return module is not None and isinstance(trace.graph_module.get_submodule(str(node.target)), module)
    return node.op in ("call_function", "call_method") and node.target in targets


def _comes_from(node: fx.Node, convs: set[str]) -> bool:
    """Whether any of ``convs`` runs before ``node`` and leads to it."""
    seen, waiting = {node}, [node]
    while waiting:
        at = waiting.pop()
        if at.op == "call_module" and at.target in convs:
            return True
        waiting += (new := [before for before in at.all_input_nodes if before not in seen])
        seen.update(new)
    return False


def draw_configurations(
    sites: Sequence[Site],
    before: Mapping[str, int],
    metric: Metric,
    target: int,
    *,
    window: float,
    candidates: int,
    seed: int,
) -> Drawn:
    """Draw different configurations whose size is inside the window.

    The choices of a site are drawn with probabilities ``exp(-t size)``, with the one ``t`` that makes the mean size the
    target. Since the probability of a configuration then depends on its size alone, those of the same size are equally
    likely, as if all had been drawn evenly and the wrong sizes thrown away, but few have the wrong size.

    Args:
        sites: The blocks and what they can become.
        before: ``params`` and ``macs`` of the whole model as it is.
        metric: Which of them has the target.
        target: The size wanted.
        window: Largest distance from it, relative to it.
        candidates: How many; fewer are given if 100,000 draws (100 for each candidate, if that is more) find no more.
        seed: Of the draws.

    Raises:
        TargetError: If the target is out of reach (says what is in reach), nothing of that size was drawn (says the
            nearest size that was), or a number makes no sense.
    """
    if not 0 < window < 1:
        raise TargetError(f"a window of {window} around the target; give a share between 0 and 1, such as 0.025")
    if candidates < 1:
        raise TargetError(f"{candidates} candidates; give one or more")
    tables = [np.array([getattr(site.sizes[name], metric) for name in site.choices]) for site in sites]
    rest = before[metric] - sum(getattr(site.sizes[STANDARD], metric) for site in sites)
    smallest, largest = rest + int(sum(t.min() for t in tables)), rest + int(sum(t.max() for t in tables))
    low, high = target * (1 - window), target * (1 + window)
    if largest < low or smallest > high:
        raise TargetError(
            f"{target:,} {metric} are out of reach: these blocks give {smallest:,} to {largest:,} (the model has "
            f"{before[metric]:,}); give a target in between, or other blocks with --choices"
        )
    found: dict[tuple[int, ...], None] = {}
    drawn = outside = repeated = nearest = 0
    for row, part in itertools.islice(_rows(tables, target - rest, seed), max(_DRAWS, 100 * candidates)):
        size = rest + part
        drawn += 1
        nearest = min(nearest, size, key=lambda value: abs(value - target))
        if not low <= size <= high:
            outside += 1
        elif row in found:
            repeated += 1
        else:
            found[row] = None
            if len(found) == candidates:
                break
    if not found:
        raise TargetError(
            f"no configuration of {len(sites)} blocks was within {window:.1%} of {target:,} {metric} ({drawn:,} "
            f"drawn); the nearest has {nearest:,}: take that as the target, or a wider --window"
        )
    whole = tuple(_total(sites, before, row) for row in found)
    return Drawn(tuple(found), whole, drawn, outside, repeated, (smallest, largest))


def _rows(tables: Sequence[NDArray[np.int64]], wanted: int, seed: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Random choices for ever, each with the sum of its sizes."""
    chances = _chances(tables, wanted)
    generator = np.random.default_rng(seed)
    while True:
        rows = np.stack([generator.choice(len(p), _CHUNK, p=p) for p in chances], axis=1)
        sums = np.sum([table[rows[:, i]] for i, table in enumerate(tables)], axis=0)
        yield from zip(map(tuple, rows.tolist()), sums.tolist(), strict=True)


def _chances(tables: Sequence[NDArray[np.int64]], wanted: int) -> list[NDArray[np.float64]]:
    """Probabilities ``exp(-t size)``, normalised, of the choices of each site; the mean sum of sizes is ``wanted``."""
    scale = max(int(table.max() - table.min()) for table in tables) or 1
    shares = [(table - table.min()) / scale for table in tables]

    def chances(t: float) -> list[NDArray[np.float64]]:
        powers = [-t * share for share in shares]
        weights = [np.exp(power - power.max()) for power in powers]
        return [weight / weight.sum() for weight in weights]

    low, high = -500.0, 500.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(float(p @ table) for p, table in zip(chances(middle), tables, strict=True))
        low, high = (middle, high) if mean > wanted else (low, middle)
    return chances((low + high) / 2)


def _total(sites: Sequence[Site], before: Mapping[str, int], row: Sequence[int]) -> Size:
    """What the whole model costs with a configuration."""
    params, macs = before["params"], before["macs"]
    for site, i in zip(sites, row, strict=True):
        old, new = site.sizes[STANDARD], site.sizes[site.choices[i]]
        params, macs = params + new.params - old.params, macs + new.macs - old.macs
    return Size(params, macs)
