"""Apply a plan to a copy of a model. The only file that changes a model's tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from morph.analysis.caches import without_kept
from morph.errors import PlanMismatchError
from morph.fresh_weights import reinitialise
from morph.graphs import graph_of, set_constants
from morph.heads import free_attention
from morph.noise import add_noise
from morph.passes.cheap_blocks import install_block
from morph.passes.class_heads import resize_head
from morph.passes.insertion import insert_copies
from morph.passes.label_placing import place_label_head, place_voting_head
from morph.passes.regroup import regroup
from morph.plan import (
    Deepen,
    DropBranch,
    Edit,
    FreeAttention,
    Perturb,
    Plan,
    PutLabelHead,
    PutVotingHead,
    Regroup,
    Reinitialise,
    Reroute,
    Resize,
    SetAttribute,
    SetConfig,
    SetConstant,
    SplitAt,
    Substitute,
    SwapHead,
    UseGraph,
)
from morph.rerouting import drop_branches, reroute
from morph.resizing import resized, set_attributes, set_config


def apply_plan(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` with the edits of ``plan`` applied.

    It is of the same class, with the same parameter names, unless the plan goes on with the traced graph.

    Raises:
        PlanMismatchError: If the plan was made for another model; every mismatch is counted, the first are named.
        EditError: If an edit cannot be exact on these weights.
        TraceError: If the plan needs the traced graph and there is none.
    """
    if any(isinstance(edit, Regroup) for edit in plan.edits):
        _check_fit(model, [edit for edit in plan.edits if isinstance(edit, Regroup)])
    grown = model
    for edits in _batches(plan.edits):
        kind = _kind(edits[0])
        if kind is Resize:
            grown = resized(grown, edits)
        elif kind is UseGraph:
            grown = graph_of(grown)
        else:
            grown = copy.deepcopy(model) if grown is model else grown
            _apply(grown, kind, edits, model)
    return without_kept(copy.deepcopy(model) if grown is model else grown)


def _batches(edits: tuple[Edit, ...]) -> Iterator[list[Any]]:
    """Neighbouring edits of one kind; a second edit of the same axis, such as that of a later step, begins anew."""
    batch: list[Any] = []
    axes: set[tuple[str, int]] = set()
    present: type | None = None
    for edit in edits:
        kind = _kind(edit)
        axis = (edit.tensor, edit.axis) if isinstance(edit, Resize) else ("", len(axes))
        if batch and (kind is not present or axis in axes):
            yield batch
            batch, axes = [], set()
        present = kind
        batch.append(edit)
        axes.add(axis)
    if batch:
        yield batch


def _kind(edit: Edit) -> type:
    """What edits are carried out together: constants of a graph of whatever kind, since it is compiled afterwards."""
    return SetConstant if isinstance(edit, SplitAt) else type(edit)


def _apply(grown: nn.Module, kind: type, edits: list[Any], origin: nn.Module) -> None:
    """Apply edits of one kind, in place; ``origin`` is what came in."""
    if kind is SetAttribute:
        set_attributes(grown, edits)
    elif kind is SetConfig:
        set_config(grown, edits)
    elif kind is FreeAttention:
        free_attention(grown, edits)
    elif kind is SetConstant:
        set_constants(grown, edits)
    elif kind is Perturb:
        add_noise(grown, edits)
    elif kind is Reroute:
        reroute(grown, edits)
    elif kind is DropBranch:
        drop_branches(grown, edits)
    for edit in edits:
        if isinstance(edit, Regroup):
            conv = grown.get_submodule(edit.module)
            assert isinstance(conv, _ConvNd)
            regroup(conv, edit.to)
        elif isinstance(edit, Deepen):
            insert_copies(
                grown, edit.container, edit.blocks, edit.copies, edit.zeroed, length=edit.length, params=edit.params
            )
        elif isinstance(edit, Substitute):
            install_block(grown, edit.module, edit.choice, edit.shape, edit.seed)
        elif isinstance(edit, SwapHead):
            resize_head(grown, edit.module, edit.shape, edit.to, edit.index, edit.seed)
        elif isinstance(edit, PutVotingHead):
            place_voting_head(grown, edit.module, edit.shape, edit.channels, edit.seed)
        elif isinstance(edit, PutLabelHead):
            place_label_head(
                grown,
                edit.module,
                edit.head,
                edit.shape,
                removed=edit.removed,
                rewired=(edit.source, edit.node),
                sizes=edit.sizes,
                geometry=(edit.channels, edit.kernel, edit.stride),
                seed=edit.seed,
            )
        elif isinstance(edit, Reinitialise):
            reinitialise(grown, edit.seed, origin)


def _check_fit(model: nn.Module, edits: list[Regroup]) -> None:
    """Compare what the edits expect with what the model has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = [(edit, _present(modules.get(edit.module))) for edit in edits]
    wrong = [(edit, present) for edit, present in found if present != (edit.groups, edit.shape)]
    if not wrong:
        return
    shown = "; ".join(
        f"{edit.module}: plan has {_text((edit.groups, edit.shape))}, model has {_text(present)}"
        for edit, present in wrong[:3]
    )
    done = len(wrong) == len(edits) and all(present is not None and present[0] == edit.to for edit, present in wrong)
    raise PlanMismatchError(
        f"this plan was made for another model: {len(wrong)} of {len(edits)} edits do not fit ({shown})"
        + (
            "; the groups are those after the plan, so it looks applied already: start from the original model"
            if done
            else ""
        )
    )


def _present(module: nn.Module | None) -> tuple[int, tuple[int, ...]] | None:
    """Groups and weight shape of a convolution; None for anything else."""
    return (module.groups, tuple(module.weight.shape)) if isinstance(module, _ConvNd) else None


def _text(value: tuple[int, tuple[int, ...]] | None) -> str:
    return f"{value[0]} groups, weight {list(value[1])}" if value else "no such convolution"
