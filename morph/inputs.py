"""What a model is called with, a tensor, a tuple of arguments or a mapping of named ones, and batches of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morph.errors import DataError

T = TypeVar("T")
Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with; `arguments_of` says how."""

LABELS = "labels"
"""The name of the targets in a batch that is one mapping, as collators of Hugging Face make it."""

_PLAIN = (bool, int, float, str, torch.dtype)  # options of a call, which all samples share


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call on ``inputs``."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple) else (inputs,)), {}


def run_on(model: nn.Module, inputs: Inputs) -> Any:
    """What ``model`` gives for ``inputs``."""
    args, kwargs = arguments_of(inputs)
    return model(*args, **kwargs)


def by_position(model: nn.Module, inputs: Inputs) -> tuple[Any, ...]:
    """The arguments of a call on ``inputs`` by position; see `in_order`."""
    return in_order(inspect.signature(model.forward), *arguments_of(inputs))


def in_order(forward: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments in the order of a forward, as its graph takes them, with the defaults of those that are left out.

    Raises:
        TypeError: If the forward does not take them.
    """
    if not kwargs:
        return args
    bound = forward.bind(*args, **kwargs)
    bound.apply_defaults()
    return (*bound.args, *bound.kwargs.values())


def tensors_of(tree: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and registered output classes."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def logits_in(output: Any) -> Tensor | None:
    """The first output of a classifier: a tensor, the first of a tuple or list, or ``logits`` of anything else."""
    if isinstance(output, tuple | list):
        output = output[0] if output else None
    elif not isinstance(output, Tensor):
        output = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return output if isinstance(output, Tensor) else None


def images_in(inputs: Inputs) -> Tensor | None:
    """The first tensor ``[N, C, H, W]`` of real numbers; None where there are no images."""
    found = (t for t in tensors_of(arguments_of(inputs)) if t.dim() == 4 and t.is_floating_point())
    return next(found, None)


def samples_in(inputs: Inputs) -> int:
    """How many samples a batch has: the length of its first tensor; 0 where there is none."""
    return next((len(t) for t in tensors_of(arguments_of(inputs)) if t.dim()), 0)


def plain(tree: T) -> T:
    """The same with dicts in place of other mappings, such as the batches of Hugging Face's tokenizers."""
    return cast(T, pytree.tree_map(lambda leaf: plain(dict(leaf)) if isinstance(leaf, Mapping) else leaf, tree))


def picked(tree: T, pick: slice | Tensor) -> T:
    """Some samples: every tensor in ``tree`` is cut along its first axis, anything else stays."""
    return cast(T, pytree.tree_map_only(Tensor, lambda t: t[pick] if t.dim() else t, tree))


def moved(tree: T, device: torch.device, channels_last: bool = False) -> T:
    """Every tensor in ``tree`` on a device; those with four axes with channels innermost, if asked for."""
    waits = device.type == "cpu"  # what comes from an accelerator is read at once

    def move(t: Tensor) -> Tensor:
        layout = torch.channels_last if channels_last and t.dim() == 4 else torch.preserve_format
        return t.to(device, non_blocking=not waits, memory_format=layout)

    return cast(T, pytree.tree_map_only(Tensor, move, tree))


def pair_of(batch: Any) -> tuple[Inputs, Any]:
    """Inputs and targets of a batch; see `require_samples` for what is seen to beside.

    A list of inputs, as a DataLoader makes of a tuple, is that tuple. A mapping with ``labels`` in it is the pair of
    the others and these.

    Raises:
        DataError: If it is neither such a mapping nor a pair.
    """
    if isinstance(batch, Mapping):
        if LABELS not in batch:
            raise DataError(
                f"a batch is a mapping of {', '.join(map(str, batch))} without {LABELS!r}; give (mapping, labels), or "
                f"put the labels in it under that name"
            )
        x, y = {name: value for name, value in batch.items() if name != LABELS}, batch[LABELS]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
    else:
        raise DataError(_no_pair(batch))
    x = plain(tuple(x) if isinstance(x, list) else x)
    if not isinstance(x, Tensor | tuple | Mapping) or not isinstance(y, Tensor | tuple | list):
        raise DataError(_no_pair(batch))
    return x, tuple(y) if isinstance(y, list) else y


def require_samples(inputs: Inputs, targets: Sequence[Tensor]) -> None:
    """See that each sample of a batch can be told from the others.

    Raises:
        DataError: If the tensors of inputs and targets do not all have the samples on their first axis, or something
            is in the inputs that cannot be cut.
    """
    sizes = [len(t) if t.dim() else 0 for t in targets]
    lengths = {len(t) for t in tensors_of(inputs) if t.dim()}
    if len(lengths) < 2 and lengths != set(sizes):
        found = ", ".join(map(str, sizes))
        raise DataError(f"a batch of {samples_in(inputs)} inputs and {found} targets; there must be as many")
    for path, leaf in pytree.tree_leaves_with_path(inputs):
        where = pytree.keystr(path)
        if isinstance(leaf, Tensor):
            if leaf.dim() and len(leaf) != sizes[0]:
                raise DataError(
                    f"a batch of {sizes[0]} targets whose input {where} is of shape {list(leaf.shape)}; every tensor "
                    "has the samples on its first axis: expand what all samples share"
                )
        elif leaf is not None and (len(path) > 1 or not isinstance(leaf, _PLAIN)):
            raise DataError(
                f"the input {where} of a batch is {type(leaf).__name__}, which cannot be cut into samples; give "
                "tensors, alone or in tuples, lists and mappings"
            )


def _no_pair(batch: Any) -> str:
    items = f" of {len(batch)}" if isinstance(batch, tuple | list) and len(batch) != 2 else ""
    return (
        f"a batch must be a pair of tensors (inputs, targets), got {type(batch).__name__}{items}; several inputs are a "
        f"tuple or a mapping in the place of the first, and a mapping alone has its targets under {LABELS!r}"
    )
