"""Insert copies of blocks into a container that chains its children, each copy with some tensors zero.

A residual block computes ``x + f(x)``. A copy of it whose branch ends in zeros computes ``x + 0``: the network becomes
deeper and computes what it did (a network morphism: Chen et al., "Net2Net", ICLR 2016; Wei et al. 2016; the zero
initialisation of residual branches: Goyal et al. 2017, section 5.1). Which tensors have to be zero is not decided
here; see `morph.residuals`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from morph.errors import PlanMismatchError


def is_chain(module: nn.Module) -> bool:
    """Whether ``module`` is a plain list of children: a ``Sequential`` with its own forward, or a ``ModuleList``."""
    forward = type(module).forward
    return forward is nn.Sequential.forward or (isinstance(module, nn.ModuleList) and forward is nn.Module.forward)


def chain_with_copies(names: Sequence[str], blocks: Sequence[str], copies: int) -> list[tuple[str, str, bool]]:
    """Names of the children of a chain after an insertion.

    Where the children are numbered from 0, they are numbered afresh; elsewhere a copy is called after its source.

    Args:
        names: Names of the children before.
        blocks: Those that are copied, neighbours; the copies go behind the last of them.
        copies: How many copies of all of them.

    Returns:
        ``(name, name before of the child or of its source, whether it is a copy)`` for each child afterwards.
    """
    place = names.index(blocks[-1]) + 1
    new = [(source, True) for _ in range(copies) for source in blocks]
    order = [*((name, False) for name in names[:place]), *new, *((name, False) for name in names[place:])]
    if list(names) == [str(i) for i in range(len(names))]:
        return [(str(i), source, is_copy) for i, (source, is_copy) in enumerate(order)]
    taken, after = set(names), []
    for source, is_copy in order:
        name = source
        if is_copy:
            name = next(n for i in range(1, len(taken) + 2) if (n := f"{source}_copy{i}") not in taken)
            taken.add(name)
        after.append((name, source, is_copy))
    return after


def numbers_of(blocks: Sequence[nn.Module | None]) -> dict[tuple[str, str], int]:
    """Attributes by which blocks know their place in a row, such as the number of a layer in a cache.

    Returns:
        By the path of a module in a block and the name of the attribute, its value in the first of the blocks; in each
        following block it is one more.
    """
    if len(blocks) < 2:
        return {}
    rows = [
        {
            (path, name): value
            for path, module in (block.named_modules() if block is not None else ())
            for name, value in vars(module).items()
            if type(value) is int
        }
        for block in blocks
    ]
    return {key: first for key, first in rows[0].items() if all(r.get(key) == first + i for i, r in enumerate(rows))}


def renumber(blocks: Sequence[nn.Module | None], numbers: Mapping[tuple[str, str], int]) -> None:
    """Let blocks know their place again, in place; see `numbers_of`."""
    for place, block in enumerate(blocks):
        for (path, name), first in numbers.items():
            if block is not None:
                setattr(block.get_submodule(path), name, first + place)


def layers_of(model: nn.Module, chain: nn.Module) -> Any:
    """The configuration of a transformers model whose number of layers is the length of ``chain``; None if none is."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_hidden_layers") or getattr(config, "layer_types", None) is not None:
        return None
    alike = [m for m in model.modules() if is_chain(m) and len(m._modules) == len(chain._modules)]
    return config if config.num_hidden_layers == len(chain._modules) and len(alike) == 1 else None


def insert_copies(
    model: nn.Module,
    container: str,
    blocks: Sequence[str],
    copies: int,
    zeroed: Sequence[str],
    length: int,
    params: int,
) -> dict[str, nn.Module]:
    """Insert copies of some children of a chain behind the last of them, in place.

    A copy has all that its source has (weights, normalisation statistics, flags), but for the tensors that are zero.
    Where the children hold their place in the row as a number, they get new numbers, and a configuration of
    transformers that counts them counts them afresh.

    Args:
        model: The model to change.
        container: Path of the chain.
        blocks: Names of neighbouring children, in their order.
        copies: How many copies of all of them.
        zeroed: Parameters that are zero in the copies, named from the container on: ``1.bn2.weight``.
        length: Number of children of the container before.
        params: Elements of the parameters of ``blocks``, each tensor once.

    Returns:
        The new children by path.

    Raises:
        PlanMismatchError: If the model has no such chain, children or parameters; nothing is changed then.
    """
    chain = _chain(model, container, length, length + copies * len(blocks))
    _check_blocks(chain, container, blocks, zeroed, params)
    children, inserted = {}, {}
    numbers, layers = numbers_of([*chain._modules.values()]), layers_of(model, chain)
    sets = iter([copy.deepcopy([chain._modules[name] for name in blocks]) for _ in range(copies)])
    ready: list[nn.Module | None] = []
    for name, source, is_copy in chain_with_copies(list(chain._modules), blocks, copies):
        if not is_copy:
            children[name] = chain._modules[source]
            continue
        ready = ready or next(sets)
        block = ready.pop(0)
        assert block is not None
        _empty(block, [tensor.removeprefix(f"{source}.") for tensor in zeroed if tensor.startswith(f"{source}.")])
        children[name] = inserted[f"{container}.{name}" if container else name] = block
    chain._modules.clear()
    chain._modules.update(children)
    renumber([*children.values()], numbers)
    if layers is not None:
        layers.num_hidden_layers = len(children)
    return inserted


def _empty(block: nn.Module, zeroed: Sequence[str]) -> None:
    """Make some parameters of a copy zero."""
    with torch.no_grad():
        for name in zeroed:
            block.get_parameter(name).zero_()


def _chain(model: nn.Module, container: str, length: int, after: int) -> nn.Module:
    """The chain at ``container``, or a refusal."""
    try:
        chain = model.get_submodule(container)
    except AttributeError:
        chain = None
    if chain is None or not is_chain(chain):
        found = "nothing" if chain is None else type(chain).__name__
        raise PlanMismatchError(
            f"this plan was made for another model: {container or 'the model'} should be a Sequential or ModuleList, "
            f"there is {found}"
        )
    if len(chain._modules) != length:
        done = "; that is the length after the plan, so it looks applied already: start from the original model"
        raise PlanMismatchError(
            f"this plan was made for another model: {container or 'the model'} has {len(chain._modules)} children, "
            f"the plan expects {length}" + (done if len(chain._modules) == after else "")
        )
    return chain


def _check_blocks(chain: nn.Module, container: str, blocks: Sequence[str], zeroed: Sequence[str], params: int) -> None:
    """Refuse blocks that are not those of the plan."""
    names = list(chain._modules)
    start = names.index(blocks[0]) if blocks and blocks[0] in names else len(names)
    modules = [chain._modules[name] for name in names[start : start + len(blocks)]]
    wrong = f"this plan was made for another model: {container or 'the model'}"
    if not blocks or names[start : start + len(blocks)] != list(blocks) or None in modules:
        raise PlanMismatchError(f"{wrong} has no neighbouring children {', '.join(blocks) or '(none named)'}")
    found = {id(p): p for module in modules if module is not None for p in module.parameters()}
    if (present := sum(p.numel() for p in found.values())) != params:
        raise PlanMismatchError(
            f"{wrong}: {', '.join(blocks)} have {present:,} parameters, the plan expects {params:,}"
        )
    here = {f"{n}.{tensor}" for n in blocks for tensor, _ in chain.get_submodule(n).named_parameters()}
    if missing := [name for name in zeroed if name not in here]:
        raise PlanMismatchError(f"{wrong} has no parameter {missing[0]}")
