"""Edits of a traced graph, as values: part of the edits of `morph.plan`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UseGraph:
    """Go on with the model's traced graph in place of its own class, because its code has fixed sizes in it.

    Attributes:
        front: How the graph is made: ``symbolic``.
    """

    front: str


@dataclass(frozen=True)
class SetConstant:
    """Give a node of the traced graph another constant.

    Attributes:
        node: Name of the node.
        slot: Where among its arguments, e.g. ``args.1.0`` or ``kwargs.groups``.
        number: The constant afterwards.
    """

    node: str
    slot: str
    number: float


@dataclass(frozen=True)
class SplitAt:
    """Let a node of the traced graph that splits an axis evenly split it into parts of these sizes.

    Attributes:
        node: Name of the node.
        axis: The axis.
        sizes: Length of each part.
    """

    node: str
    axis: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Reroute:
    """Let a node of the traced graph read parts of other nodes, joined along an axis, in place of what it read.

    Nodes that nobody reads afterwards leave the graph, and modules that only they called leave the module.

    Attributes:
        node: Name of the node that reads.
        source: Name of the node that it read before, by which a plan knows its model.
        axis: The axis along which the parts are taken and joined.
        pieces: Names of the nodes that it reads afterwards, in order.
        indices: For each of them the positions taken, counted after all tensors have their new sizes; empty where all
            are.
    """

    node: str
    source: str
    axis: int
    pieces: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DropBranch:
    """Let a sum in the traced graph go without one of its two operands, which is the same number for each channel.

    What only led to that operand leaves the graph, and modules that only it called leave the module.

    Attributes:
        node: Name of the node of the sum.
        source: Name of the operand that goes.
        module: Path of the layer whose weight is taken to be zero, so that the operand is what its bias gives.
        shape: Shape of what is added in its place, after all tensors have their new sizes: a new parameter.
        shift: Its values; empty if nothing is added.
    """

    node: str
    source: str
    module: str
    shape: tuple[int, ...]
    shift: tuple[float, ...]
