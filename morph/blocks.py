"""Find the repeated blocks or cells of a model, and the nodes to probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.errors import NothingToGrowError, ProbeError
from morph.tracing import Trace

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (_ConvNd, nn.Linear)


def find_blocks(model: nn.Module) -> list[str]:
    """Paths of the repeated blocks: outermost modules of a class that occurs at least twice, with two layers or more.

    A layer is a convolution or a linear map. Plain containers (``Sequential`` and the like) are looked into, not taken.
    """
    counts = Counter(type(module) for module in model.modules())
    blocks: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        layers = sum(isinstance(m, _LAYERS) for m in module.modules())
        if path and not isinstance(module, _CONTAINERS) and counts[type(module)] > 1 and layers > 1:
            blocks.append(path)
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return blocks


@dataclass(frozen=True)
class Cell:
    """A part of the model with one score.

    Attributes:
        name: Module path, or node name if a node that is not a module's output was chosen.
        nodes: The nodes that hold its output: one for each call.
        channel_axis: Axis of that output that holds channels.
        modules: Paths of the leaf modules that belong to it.
    """

    name: str
    nodes: tuple[str, ...]
    channel_axis: int
    modules: tuple[str, ...]


def find_cells(trace: Trace, at: Sequence[str] | None = None) -> list[Cell]:
    """The cells to probe, in the order of execution.

    Args:
        trace: The traced model.
        at: Names or shell patterns (``layer?.*``) of modules or nodes. None takes `find_blocks`, or, in a model without
            repeated blocks, each convolution.

    Raises:
        ProbeError: If a pattern fits nothing, or what it fits gives no tensor.
        NothingToGrowError: If ``at`` is None and the model has neither blocks nor convolutions.
    """
    if at is None:
        blocks = [path for path in find_blocks(trace.root) if _gives_tensors(trace, path)]
        names = blocks or [str(node.target) for node, module in trace.calls() if isinstance(module, _ConvNd)]
        if not names:
            raise NothingToGrowError(
                "the model has neither repeated blocks nor convolutions to probe; name nodes with --at"
            )
    else:
        names = [name for pattern in at for name in _matches(trace, pattern)]
    order = {node.name: i for i, node in enumerate(trace.graph_module.graph.nodes)}
    chosen = {name: trace.outputs.get(name, (name,)) for name in names}
    ranked = sorted(chosen, key=lambda name: order[chosen[name][0]])
    owners = _owners(trace, chosen, order)
    return [
        Cell(
            name=name,
            nodes=chosen[name],
            channel_axis=_channel_axis(trace, chosen[name][0], order),
            modules=tuple(module for module, cell in owners.items() if cell == name),
        )
        for name in ranked
    ]


def _matches(trace: Trace, pattern: str) -> list[str]:
    """Module paths that fit ``pattern``; if there are none, node names."""
    paths = [path for path in trace.outputs if path and fnmatchcase(path, pattern)]
    nodes = [name for name in trace.shapes if fnmatchcase(name, pattern)]
    found = paths or nodes
    if not found:
        raise ProbeError(
            f"--at {pattern}: no module or node of that name; modules are named like {_some(list(trace.outputs))}, "
            f"nodes like {_some(list(trace.shapes))}"
        )
    for name in found:
        if name not in trace.shapes and not _gives_tensors(trace, name):
            raise ProbeError(f"--at {pattern}: {name} does not give a tensor; choose a module or node that does")
    return found


def _gives_tensors(trace: Trace, path: str) -> bool:
    """Whether the module at ``path`` is called, and each call gives a tensor."""
    return all(node in trace.shapes for node in trace.outputs.get(path, ("",)))


def _some(names: list[str]) -> str:
    return ", ".join([name for name in names if name][-3:])


def _owners(trace: Trace, chosen: dict[str, tuple[str, ...]], order: dict[str, int]) -> dict[str, str]:
    """The cell of each leaf module: the innermost chosen module around it, else the next probed node downstream."""
    loose = sorted((order[nodes[0]], name) for name, nodes in chosen.items() if name not in trace.outputs)
    owners: dict[str, str] = {}
    for node, _ in trace.calls():
        path = str(node.target)
        around = [name for name in chosen if path == name or path.startswith(name + ".")]
        after = [name for position, name in loose if position >= order[node.name]]
        if around:
            owners[path] = max(around, key=len)
        elif after:
            owners[path] = after[0]
    return owners


def _channel_axis(trace: Trace, name: str, order: dict[str, int]) -> int:
    """The axis of a node's tensor that has the width of the last layer before it: 1 for images, the last for tokens."""
    shape = trace.shapes[name]
    layers = [m for node, m in trace.calls() if isinstance(m, _LAYERS) and order[node.name] <= order[name]]
    last = layers[-1] if layers else None
    return len(shape) - 1 if isinstance(last, nn.Linear) and shape[-1] == last.out_features else 1
