"""Find the residual blocks that can be copied exactly, by trying: which zeros make a copy hand on its input.

Nothing is concluded from names. The model's structure is filled with random numbers in float64 (weights, biases,
normalisation statistics), so that no zero or one that a fresh network happens to have can hide a term. Each block is
then tried on what it would really be given: the output of the block behind which its copy would stand. It must return
that to the bit. For a block that ends with a ReLU after the sum this shows that what comes in is never negative.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morph.inputs import Inputs, picked, plain
from morph.passes.insertion import insert_copies, is_chain, layers_of, numbers_of, renumber
from morph.passes.regroup import Left
from morph.trials import Call, random_twin, record_calls, silenced, zeros_that_silence

_BASE = frozenset(vars(nn.Module()))
CHANGES_SHAPE = "it turns"
_TAPS = "the model does not simply pass through its container: with one more block its outputs change"


@dataclass(frozen=True)
class Unit:
    """Neighbouring blocks that are copied together: one block, or as many as a pattern (shifted windows) has.

    Attributes:
        container: Path of the chain that they are in.
        blocks: Their names in it.
        zeroed: Parameters that are zero in a copy, named from the container on.
        stage: Where it belongs: paths of the first and last block of a run of blocks of the same shape.
        params: Elements of its parameters, each tensor once.
        length: Number of children of the container.
    """

    container: str
    blocks: tuple[str, ...]
    zeroed: tuple[str, ...]
    stage: tuple[str, str]
    params: int
    length: int

    def paths(self) -> tuple[str, ...]:
        """Full paths of the blocks."""
        return tuple(_join(self.container, name) for name in self.blocks)


@dataclass(frozen=True)
class _Found:
    """A block of which a copy can be neutral."""

    container: str
    name: str
    module: nn.Module
    zeroed: tuple[str, ...]


def find_units(model: nn.Module, inputs: Inputs, *, seed: int = 0) -> tuple[list[Unit], list[Left]]:
    """Find what can be copied without changing what the model computes in evaluation mode.

    Args:
        model: Not touched.
        inputs: One batch that shows the shapes; random numbers take the place of real ones.
        seed: Of all random numbers.

    Returns:
        The units in the order of the model, and the blocks that cannot be copied, with the reason.
    """
    search = _Search(model, inputs, seed)
    search.walk("", search.net)
    units = [unit for run in _runs(search.found) for unit in _units(search.net, run)]
    kept = [unit for unit in units if search.passes(unit)]
    return kept, search.left


class _Search:
    """The random twin of a model, what its blocks were called with, and what was learnt of them."""

    def __init__(self, model: nn.Module, inputs: Inputs, seed: int) -> None:
        self.net = random_twin(model, seed)
        draw = torch.Generator().manual_seed(seed)

        def drawn(x: Tensor) -> Tensor:
            real = x.is_floating_point()
            return torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.device) if real else x.detach()

        self.x = pytree.tree_map_only(Tensor, drawn, picked(plain(inputs), slice(0, 2)))
        blocks = {
            _join(path, name): child
            for path, module in self.net.named_modules()
            if is_chain(module)
            for name, child in module._modules.items()
            if child is not None and _is_block(child)
        }
        self.calls, self.chained, self.outputs = record_calls(self.net, blocks, self.x)
        self.kinds: dict[tuple[object, ...], tuple[str, ...]] = {}
        self.found: list[_Found] = []
        self.left: list[Left] = []
        self.seen: set[int] = set()

    def walk(self, path: str, module: nn.Module) -> bool:
        """Look at everything inside ``module``, inner blocks first; whether something was found."""
        start = len(self.found)
        for name, child in module._modules.items():
            if child is None or id(child) in self.seen:
                continue
            self.seen.add(id(child))
            where, refusals = _join(path, name), len(self.left)
            if self.walk(where, child) or not _is_block(child):
                continue
            if is_chain(module):
                del self.left[refusals:]
                self.judge(path, name, child)
            elif sum(type(other) is type(child) for other in module.children()) > 1:
                kind = type(module).__name__
                self.left.append(
                    Left(where, f"it is not in a Sequential or ModuleList: {kind} calls it in its own way")
                )
        return len(self.found) > start

    def judge(self, container: str, name: str, block: nn.Module) -> None:
        """Try one block and note it as found, or as left with the reason."""
        path = _join(container, name)
        calls = self.calls.get(path, [])
        reason = _unfit(calls)
        if reason is None:
            kind = (type(block), *((n, p.shape) for n, p in block.named_parameters()))
            zeroed, reason = zeros_that_silence(block, calls, known=self.kinds.get(kind))
            if reason is None:
                self.kinds[kind] = zeroed
                self.found.append(_Found(container, name, block, zeroed))
                return
        self.left.append(Left(path, reason))

    def passes(self, unit: Unit) -> bool:
        """Whether a copy behind ``unit`` is run and changes nothing; tried where the chain is not called as a whole."""
        chain = self.net.get_submodule(unit.container)
        if unit.container in self.chained and self._pass_together(unit):
            return True
        before = dict(chain._modules)
        numbers, layers = numbers_of([*before.values()]), layers_of(self.net, chain)
        new = insert_copies(
            self.net, unit.container, unit.blocks, 1, unit.zeroed, length=unit.length, params=unit.params
        )
        try:
            calls, _, outputs = record_calls(self.net, new, self.x)
            same = len(calls) == len(new) and _equal(outputs, self.outputs)
            reason = _TAPS
        except Exception as error:  # whatever the model's own code raises when it is given one more block
            same, reason = False, f"with one more block the model fails: {type(error).__name__}: {error}"
        finally:
            chain._modules.clear()
            chain._modules.update(before)
            renumber([*before.values()], numbers)
            if layers is not None:
                layers.num_hidden_layers = len(before)
        if not same:
            self.left += [Left(path, reason) for path in unit.paths()]
        return same

    def _pass_together(self, unit: Unit) -> bool:
        """Whether the copy of each block hands on the output of the last one, behind which they all stand."""
        *firsts, last = unit.paths()
        outputs = [call.output for call in self.calls[last]]
        for path, name in zip(firsts, unit.blocks, strict=False):
            calls = [replace(call, output=output) for call, output in zip(self.calls[path], outputs, strict=False)]
            zeroed = [tensor.removeprefix(f"{name}.") for tensor in unit.zeroed if tensor.startswith(f"{name}.")]
            if len(self.calls[path]) != len(outputs) or not silenced(self.net.get_submodule(path), zeroed, calls):
                return False
        return True


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_block(module: nn.Module) -> bool:
    """Whether it has a forward of its own, children, and a layer: a parameter that is a matrix or more."""
    inside = not is_chain(module) and next(module.children(), None) is not None
    return inside and any(p.dim() > 1 for p in module.parameters())


def _unfit(calls: Sequence[Call]) -> str | None:
    """Why a block cannot be one that hands on its input; None if it might."""
    if not calls:
        return "it is not called as a module of its own"
    for call in calls:
        first = call.args[0] if call.args else None
        if not isinstance(first, Tensor) or not isinstance(call.output, Tensor):
            return f"it maps {_kind(first)} to {_kind(call.output)}, not one tensor to one tensor"
        if first.shape != call.output.shape:
            return f"{CHANGES_SHAPE} {list(first.shape)} into {list(call.output.shape)}; a copy must keep the shape"
        if not bool(torch.isfinite(call.output).all()):
            return "its output is not finite on random weights, so nothing can be shown"
    return None


def _kind(value: object) -> str:
    return "a tensor" if isinstance(value, Tensor) else type(value).__name__


def _equal(one: Any, other: Any) -> bool:
    """Whether two outputs are the same to the bit."""
    left, right = pytree.tree_leaves(one), pytree.tree_leaves(other)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


def _runs(found: Sequence[_Found]) -> list[list[_Found]]:
    """Neighbours in the same container, of the same class and with parameters of the same shapes."""
    runs: list[list[_Found]] = []
    for block in found:
        if runs and _alike(runs[-1][-1], block):
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _alike(one: _Found, other: _Found) -> bool:
    def shapes(block: _Found) -> list[tuple[str, torch.Size]]:
        return [(name, p.shape) for name, p in block.module.named_parameters()]

    same = one.container == other.container and type(one.module) is type(other.module)
    return same and one.zeroed == other.zeroed and shapes(one) == shapes(other)


def _units(net: nn.Module, run: Sequence[_Found]) -> list[Unit]:
    """Cut a run into units: single blocks, or whole periods where settings alternate, as with shifted windows."""
    container = run[0].container
    names = list(net.get_submodule(container)._modules)
    numbers = numbers_of([*net.get_submodule(container)._modules.values()])
    settings = [_settings(block.module, numbers) for block in run]
    stage = (_join(container, run[0].name), _join(container, run[-1].name))
    period = _period(settings)
    units = []
    for start in range(0, len(run) - period + 1, period):
        blocks = run[start : start + period]
        first = names.index(blocks[0].name)
        if names[first : first + period] != [block.name for block in blocks]:
            continue
        held = {id(p): p.numel() for block in blocks for p in block.module.parameters()}
        units.append(
            Unit(
                container,
                tuple(block.name for block in blocks),
                tuple(f"{block.name}.{tensor}" for block in blocks for tensor in block.zeroed),
                stage,
                sum(held.values()),
                len(names),
            )
        )
    return units


def _period(settings: Sequence[str]) -> int:
    """After how many blocks the settings repeat; two that differ are a pair, and a row without a pattern has 1."""
    n = len(settings)
    for period in range(1, n):
        if all(settings[i] == settings[i + period] for i in range(n - period)):
            return period
    return 2 if n == 2 else 1


def _settings(block: nn.Module, numbers: Collection[tuple[str, str]]) -> str:
    """The whole numbers and names that a block's modules with parameters hold: strides, shifts, heads; not its place.

    Probabilities (floats) differ from block to block by design, and modules without parameters hold those.
    """
    return repr(
        [
            (path, name, value)
            for path, module in block.named_modules()
            if next(module.parameters(), None) is not None
            for name, value in vars(module).items()
            if name not in _BASE and (path, name) not in numbers and _plain(value)
        ]
    )


def _plain(value: object) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(item, int | str) for item in items)
