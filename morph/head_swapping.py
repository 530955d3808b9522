"""Give a classifier other classes: `swap_head`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from morph.analysis.recording import Inputs, arguments_of
from morph.copying import own_copy
from morph.counts import count
from morph.cut import apply_plan
from morph.errors import HeadError
from morph.head_search import FoundHead, find_heads
from morph.plan import Check, Plan, Record, SetAttribute, SwapHead
from morph.surgery import Result, environment, sizes
from morph.tracing import try_inputs
from morph.verify import require
from morph.zeroing import doubled, in_float64, outputs_of

LIMIT = 1e-10
_NAMES = ("num_classes", "num_labels")


def swap_head(model: nn.Module, num_classes: int, inputs: Inputs, *, keep: Sequence[int] = (), seed: int = 0) -> Result:
    """Give a classifier another number of classes, and its auxiliary heads with it.

    The heads are found by trying (`morph.head_search`): linear layers or convolutions, in any model, also in one that
    cannot be traced. They stay the objects that they are, with other weights; hooks, names and classes stay. Everything
    before the heads keeps its weights. ``num_classes`` and ``num_labels``, where a model keeps them as attributes
    around a head, follow.

    Args:
        model: Not touched.
        num_classes: Classes afterwards.
        inputs: One batch of two samples or more: a tensor, a tuple of arguments, or a mapping of named arguments;
            random numbers of the right shape will do.
        keep: Old classes whose weights the first new classes keep, in this order; the others are drawn afresh, as the
            layer's own ``reset_parameters`` does.
        seed: Of the fresh weights.

    Returns:
        The new model and its record. Where a class depends on its own weights alone, the outputs of kept classes were
        compared with those before, in float64.

    Raises:
        HeadError: No head was found, or the numbers do not fit; says why.
        TraceError: The model does not accept ``inputs``.
        CheckFailedError: A kept class puts out something else.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> result = morph.swap_head(build("resnet-8"), 4, torch.randn(2, 3, 32, 32), keep=[7, 2])
        >>> result.model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """
    try_inputs(own_copy(model), *arguments_of(inputs))
    if seed < 0:
        raise HeadError(f"a seed of {seed}; give 0 or more")
    heads = find_heads(model, inputs)
    _check_classes(num_classes, tuple(keep), heads[0].shape[0])
    plan = Plan(_edits(model, heads, num_classes, tuple(keep), seed))
    swapped = apply_plan(model, plan)
    checks = _compare(model, swapped, inputs, heads, num_classes, tuple(keep))
    require(checks)
    record = Record(
        command="swap_head",
        options={"num_classes": num_classes, "keep": list(keep), "seed": seed},
        plan=plan,
        before=sizes(count(model, inputs)),
        after=sizes(count(swapped, inputs)),
        checks=checks,
        details={
            "heads": list(dict.fromkeys(head.path for head in heads)),
            "classes_before": heads[0].shape[0],
            "classes_after": num_classes,
            "verified": "outputs of kept classes, float64, before and after" if checks else _why_unchecked(keep),
        },
        environment={**environment(model, inputs), "seed": seed},
    )
    return Result(swapped, record)


def _why_unchecked(keep: Sequence[int]) -> str:
    if keep:
        return "not verified: outputs are normalised over the classes, so those of kept classes move"
    return "not verified: no class was kept, so the new model computes something else"


def _check_classes(num_classes: int, keep: tuple[int, ...], present: int) -> None:
    """Refuse numbers that do not fit."""
    if num_classes < 1:
        raise HeadError(f"{num_classes} classes; give 1 or more")
    wrong = [i for i in keep if not 0 <= i < present]
    if wrong:
        raise HeadError(f"class {wrong[0]} cannot be kept: the model has the classes 0 to {present - 1}")
    if len(keep) > num_classes:
        raise HeadError(f"{len(keep)} classes to keep and {num_classes} classes in all; keep fewer")


def _edits(
    model: nn.Module, heads: Sequence[FoundHead], classes: int, keep: tuple[int, ...], seed: int
) -> tuple[SwapHead | SetAttribute, ...]:
    """One edit for each head, each with a seed of its own, and one for each attribute that tells the classes."""
    shapes = {head.path: head.shape for head in heads}
    edits: list[SwapHead | SetAttribute] = [
        SwapHead(path, shape, classes, keep, seed + i) for i, (path, shape) in enumerate(shapes.items())
    ]
    for path, module in model.named_modules():
        around = any(head == path or head.startswith(f"{path}." if path else "") for head in shapes)
        for name in _NAMES:
            value = vars(module).get(name)
            if around and type(value) is int and value == heads[0].shape[0] != classes:
                edits.append(SetAttribute(path, name, value, classes))
    return tuple(edits)


def _compare(
    model: nn.Module,
    swapped: nn.Module,
    inputs: Inputs,
    heads: Sequence[FoundHead],
    classes: int,
    keep: tuple[int, ...],
) -> tuple[Check, ...]:
    """See that the outputs have the new classes, and compare those of kept classes.

    Raises:
        HeadError: If the code has the number of classes in it.
    """
    difference, scale, compared, samples = 0.0, 0.0, False, 0
    for training in sorted({head.training for head in heads}):
        before = _outputs(model, inputs, training=training)
        try:
            after = _outputs(swapped, inputs, training=training)
        except Exception as error:
            raise HeadError(f"{type(model).__name__} does not run with {classes} classes: {error}") from error
        for head in heads:
            if head.training != training:
                continue
            old, new = (outputs[head.output].movedim(head.axis, 0) for outputs in (before, after))
            if (len(new), *old.shape[1:]) != tuple(new.shape) or len(new) != classes:
                raise HeadError(
                    f"{type(model).__name__} puts out {list(after[head.output].shape)} after its head {head.path} was "
                    f"given {classes} classes: its code has the number in it"
                )
            if keep and head.apart:
                compared, samples = True, before[head.output].shape[0]
                difference = max(difference, float((new[: len(keep)] - old[list(keep)]).abs().max()))
                scale = max(scale, float(old.abs().max()))
    if not compared:
        return ()
    relative = difference / scale if scale else (0.0 if difference == 0 else float("inf"))
    return (Check("outputs of kept classes", difference, relative, LIMIT, samples, "float64"),)


def _outputs(model: nn.Module, inputs: Inputs, *, training: bool) -> list[Tensor]:
    """Outputs of a copy in float64, in one mode, from a fixed seed."""
    args, kwargs = doubled(arguments_of(inputs))
    twin = copy.deepcopy(model).double().train(training)
    with torch.no_grad(), in_float64():
        return outputs_of(twin(*args, **kwargs))
