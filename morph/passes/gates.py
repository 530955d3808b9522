"""Multiplicative gates in front of the readers of a traced graph.

A gate ``g`` in front of a reader (a convolution or linear layer) multiplies one of the channels that it reads. Since
the reader is linear, ``sum_c W[o, c] (g[c] x[c]) = sum_c (W[o, c] g[c]) x[c]``: wherever that is possible the gate is
put into the call of the reader (`morph.passes.gated_readers`), which gives the same outputs and the same gradients and
costs next to no memory. Source: Gu & Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020,
section 3.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from morph.passes.gated_readers import Form, gated_input, gated_reader, spread

HOME = "morph_gates"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Tap:
    """Where a gate acts.

    Attributes:
        reader: Name of the node that calls the convolution or linear layer; of the weight, where no node calls one.
        index: For each position that it reads, the number of the gate; -1 where there is none.
    """

    reader: str
    index: tuple[int, ...]


class Gate(nn.Module):
    """Multiplies positions of an axis by numbers that are learned, ones at birth.

    A gated graph reads the numbers and calls functions with them; hooks on this module do not run there.

    Args:
        name: Name of its site.
        gates: How many there are, k.
        maps: For each tap its axis, and for each position there the number of the gate (-1: none).

    Attributes:
        weight: ``[k]``; zero is closed.
    """

    def __init__(self, name: str, gates: int, maps: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(gates))
        self.axes = tuple(axis for axis, _ in maps)
        for number, (_, index) in enumerate(maps):
            plain = index == tuple(range(gates))
            spare = torch.tensor([gates if i < 0 else i for i in index], dtype=torch.long)
            self.register_buffer(f"index_{number}", None if plain else spare, persistent=False)

    def forward(self, x: Tensor, tap: int = 0) -> Tensor:
        """Return ``x`` with each position of the axis of ``tap`` times its gate."""
        index = getattr(self, f"index_{tap}")
        return gated_input(x, self.weight if index is None else spread(self.weight, index), self.axes[tap])

    def extra_repr(self) -> str:
        """Show what it gates."""
        return f"{self.name}, gates={len(self.weight)}"


def gates_of(module: nn.Module) -> dict[str, Gate]:
    """Every gate in ``module`` by the name of its site."""
    return {child.name: child for child in module.modules() if isinstance(child, Gate)}


def input_axis(module: nn.Module, rank: int) -> int:
    """The axis of its input, of ``rank`` axes, that a convolution or linear layer sums over."""
    return 1 if isinstance(module, _ConvNd) else rank - 1


def weight_axis(module: nn.Module) -> int:
    """The axis of its weight that holds what it reads."""
    return 0 if isinstance(module, _ConvTransposeNd) else 1


def insert_gates(
    module: fx.GraphModule, gates: Mapping[str, tuple[int, Sequence[Tap]]], ranks: Mapping[str, int]
) -> None:
    """Put gates of ones into a graph, in place; outputs stay the same to the bit.

    Args:
        module: The graph; each reader is called by one node.
        gates: For each site its number of gates, and its taps.
        ranks: For each reader's node, how many axes its input has.
    """
    if not ranks:
        return
    nodes = {node.name: node for node in module.graph.nodes}
    readers = {name: module.get_submodule(str(nodes[name].target)) for name in ranks}
    folded = dict.fromkeys(ranks, True)
    for _, taps in gates.values():
        for tap in taps:
            folded[tap.reader] &= folds(readers[tap.reader], tap.index)
    home = _home(module)
    chains: dict[str, list[tuple[str, int]]] = {}
    for name, (count, taps) in gates.items():
        maps = [_map(readers[t.reader], t, ranks[t.reader], folded[t.reader]) for t in taps]
        weight = readers[taps[0].reader].weight
        assert isinstance(weight, Tensor)
        key = _key(name, home)
        home.add_module(key, Gate(name, count, maps).to(weight.device, weight.dtype))
        for number, tap in enumerate(taps):
            chains.setdefault(tap.reader, []).append((f"{HOME}.{key}", number))
    for reader, chain in chains.items():
        with module.graph.inserting_before(nodes[reader]):
            read = [_read(module, *link) for link in chain]
            (_gate_call if folded[reader] else _gate_input)(module.graph, nodes[reader], readers[reader], read)
    module.graph.lint()
    module.recompile()


def insert_weight_gates(
    module: fx.GraphModule, gates: Mapping[str, tuple[int, Sequence[Tap]]], axes: Mapping[str, int]
) -> None:
    """Put gates of ones on weights that functions of a graph multiply with, in place; outputs stay the same to the bit.

    Args:
        module: The graph; each weight is used once.
        gates: For each site its number of gates, and its taps; a tap names the weight that reads.
        axes: For each weight the axis that holds what it reads.
    """
    fetches: dict[str, list[fx.Node]] = collections.defaultdict(list)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            fetches[str(node.target)].append(node)
    home = _home(module)
    for name, (count, taps) in gates.items():
        weight = module.get_parameter(taps[0].reader)
        key, gate = _key(name, home), Gate(name, count, [(axes[t.reader], t.index) for t in taps])
        home.add_module(key, gate.to(weight.device, weight.dtype))
        for number, tap in enumerate(taps):
            for fetched in fetches[tap.reader]:
                users = list(fetched.users)
                with module.graph.inserting_before(fetched.next):
                    read, axis = _read(module, f"{HOME}.{key}", number)
                    product = module.graph.call_function(gated_input, (fetched, read, axis))
                for user in users:
                    user.replace_input_with(fetched, product)
    module.graph.lint()
    module.recompile()


def _home(module: nn.Module) -> nn.Module:
    """Where the gates of a graph are."""
    if HOME not in module._modules:
        module.add_module(HOME, nn.Module())
    return module.get_submodule(HOME)


def _key(name: str, home: nn.Module) -> str:
    """A name for a module that is not taken yet."""
    key = "at_" + re.sub(r"\W+", "_", name)
    while key in home._modules:
        key += "_"
    return key


def folds(module: nn.Module, index: Sequence[int]) -> bool:
    """Whether gates on what ``module`` reads can stand in its call, as on the columns of its weight."""
    if type(module) is nn.Linear:
        return True
    if type(module) not in _CONVOLUTIONS or getattr(module, "padding_mode", "") != "zeros":
        return False
    groups = int(module.groups)  # type: ignore[arg-type]
    own = len(index) // groups
    same = all(tuple(index[g * own : (g + 1) * own]) == tuple(index[:own]) for g in range(groups))
    return groups == 1 or (same and not isinstance(module, _ConvTransposeNd))


def _map(module: nn.Module, tap: Tap, rank: int, folded: bool) -> tuple[int, tuple[int, ...]]:
    """The axis of what a tap multiplies, and the number of the gate for each position there."""
    if not folded:
        return input_axis(module, rank), tap.index
    return weight_axis(module), tap.index[: len(tap.index) // int(getattr(module, "groups", 1))]


def _read(module: fx.GraphModule, target: str, tap: int) -> tuple[fx.Node, int]:
    """A node that gives the gate of each position, and the axis of these positions."""
    gate = module.get_submodule(target)
    assert isinstance(gate, Gate)
    node = module.graph.get_attr(f"{target}.weight")
    if getattr(gate, f"index_{tap}") is not None:
        node = module.graph.call_function(spread, (node, module.graph.get_attr(f"{target}.index_{tap}")))
    return node, gate.axes[tap]


def _gate_input(graph: fx.Graph, node: fx.Node, reader: nn.Module, chain: Sequence[tuple[fx.Node, int]]) -> None:
    """Multiply what a reader reads."""
    source = node.args[0] if node.args else node.kwargs["input"]
    for own, axis in chain:
        source = graph.call_function(gated_input, (source, own, axis))
    node.args, node.kwargs = (source, *node.args[1:]), {k: v for k, v in node.kwargs.items() if k != "input"}


def _gate_call(graph: fx.Graph, node: fx.Node, reader: nn.Module, chain: Sequence[tuple[fx.Node, int]]) -> None:
    """Put the gates of a reader into its call."""
    source = node.args[0] if node.args else node.kwargs["input"]
    weight = graph.get_attr(f"{node.target}.weight")
    bias = None if reader.bias is None else graph.get_attr(f"{node.target}.bias")
    gates = chain[0][0]
    for own, _ in chain[1:]:
        gates = graph.call_function(torch.mul, (gates, own))
    new = graph.call_function(gated_reader, (source, weight, bias, gates, form_of(reader)))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def form_of(reader: nn.Module) -> Form:
    """What `gated_reader` must know of a reader."""
    if not isinstance(reader, _ConvNd):
        return ()
    transposed = isinstance(reader, _ConvTransposeNd)
    return (transposed, reader.stride, reader.padding, reader.dilation, reader.output_padding, reader.groups)
