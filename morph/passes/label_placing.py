"""Put heads for multi-channel labels into a model or into its traced graph, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from morph.errors import PlanMismatchError
from morph.in_place import writes
from morph.label_heads import MultiChannelHead, VotingHead


def place_voting_head(model: nn.Module, path: str, shape: Sequence[int], channels: int, seed: int) -> None:
    """Put a `VotingHead` in the place of a linear layer, in place.

    Raises:
        PlanMismatchError: If there is no linear layer with a weight of ``shape``.
    """
    weight = _weight(model, path, shape)
    if weight.dim() != 2:
        raise PlanMismatchError(f"this plan was made for another model: {path} is no linear layer")
    head = _drawn(seed, lambda: VotingHead(weight.shape[1], weight.shape[0], channels))
    _replace(model, path, _like(head, weight, model))


def place_label_head(
    model: nn.Module,
    path: str,
    classifier: str,
    shape: Sequence[int],
    *,
    removed: Sequence[str],
    rewired: tuple[str, str],
    sizes: Sequence[int],
    geometry: tuple[int, int, int],
    seed: int,
) -> None:
    """Put a `MultiChannelHead` where the classifier was, in place.

    Args:
        model: The model, or its traced graph.
        path: Path of the module in whose place it goes, or its name in the graph.
        classifier: Path of the classifier, and
        shape: shape of its weight, by which a plan knows its model.
        removed: Modules that become `torch.nn.Identity`.
        rewired: In a graph the node that it reads, and the node whose readers read it; else two empty names.
        sizes: Channels, height and width of its map.
        geometry: Channels of each class, kernel, stride.
        seed: Seed of the draw.

    Raises:
        PlanMismatchError: If the model is another one.
    """
    weight = _weight(model, classifier, shape)
    in_channels, height, width = sizes
    channels, kernel, stride = geometry

    def make() -> nn.Module:
        size = (height, width)
        return MultiChannelHead(in_channels, weight.shape[0], size, channels, kernel, stride, flat=flat)

    known = dict(model.named_modules(remove_duplicate=False))
    flat = bool(rewired[0]) or isinstance(known.get(path), nn.Flatten)
    head = _like(_drawn(seed, make), weight, model)
    missing = [name for name in [*removed, *([] if rewired[0] else [path])] if name not in known]
    if missing:
        raise PlanMismatchError(f"this plan was made for another model: it has no module {missing[0]!r}")
    for name in removed:
        _replace(model, name, nn.Identity().train(known[name].training))
    if rewired[0]:
        _rewire(model, path, head, *rewired)
    else:
        _replace(model, path, head)


def _rewire(model: nn.Module, name: str, head: nn.Module, source: str, node: str) -> None:
    """Call the head on one node of a graph, in place of another node."""
    if not isinstance(model, fx.GraphModule):
        raise PlanMismatchError("a plan that changes the traced graph must first go on with that graph")
    nodes = {n.name: n for n in model.graph.nodes}
    missing = [n for n in (source, node) if n not in nodes]
    if missing:
        raise PlanMismatchError(f"this plan was made for another model: its graph has no node {missing[0]!r}")
    model.add_submodule(name, head)
    with model.graph.inserting_after(nodes[source]):
        called = model.graph.call_module(name, (nodes[source],))
    nodes[node].replace_all_uses_with(called)
    model.graph.eliminate_dead_code(writes)
    model.graph.lint()
    model.delete_all_unused_submodules()
    model.recompile()


def _weight(model: nn.Module, path: str, shape: Sequence[int]) -> Tensor:
    """The weight of the classifier."""
    module = dict(model.named_modules(remove_duplicate=False)).get(path)
    weight: Tensor | None = None if module is None else module._parameters.get("weight")
    if weight is None or tuple(weight.shape) != tuple(shape):
        present = "none" if weight is None else f"one of {list(weight.shape)}"
        raise PlanMismatchError(
            f"this plan was made for another model: {path} should have a weight of {list(shape)}, it has {present}"
        )
    return weight


def _drawn(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """Make a module from a seed on the CPU; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return make()


def _like(head: nn.Module, weight: Tensor, model: nn.Module) -> nn.Module:
    """Device, precision and mode of what was there."""
    return head.to(weight.device, weight.dtype).train(model.training)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another one, under all its names."""
    old = model.get_submodule(path)
    for name in [name for name, m in model.named_modules(remove_duplicate=False) if m is old]:
        model.set_submodule(name, module)
