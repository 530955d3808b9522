"""Resize parameters and buffers in a copy of a model, and let torch's own modules know their new sizes."""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from morph.analysis.recording import Kept, bare
from morph.copying import copy_module
from morph.errors import EditError, PlanMismatchError
from morph.module_tree import Modules, module_at, named_modules, tensors_in
from morph.plan import Resize, SetAttribute, SetConfig
from morph.tracing import evaluation


def resized(model: nn.Module, edits: Sequence[Resize]) -> nn.Module:
    """A copy of ``model`` whose tensors are resized; nothing else is copied twice.

    Args:
        model: Not touched.
        edits: At most one for each axis of each tensor.

    Raises:
        PlanMismatchError: If a tensor is missing or of another size; all are counted, the first named.
        EditError: If the model cannot be copied.
    """
    modules = named_modules(model)
    tensors = dict(tensors_in(modules))
    _check_fit(tensors, edits)
    fresh = _new_tensors(tensors, edits)
    memo: dict[int, Any] = dict(fresh)
    try:
        result = copy_module(model, memo)
    except Exception as error:
        raise EditError(f"{type(model).__name__} cannot be copied: {error}") from error
    for module in _holders(modules, fresh):
        if isinstance(copied := memo.get(id(module)), nn.Module):
            _tell(copied)
    return result


def resize_own(model: nn.Module, edits: Sequence[Resize], kept: Kept | None = None) -> None:
    """Resize the tensors of a copy of our own, in place.

    Args:
        model: The copy.
        edits: What was made for it: at most one for each axis of each tensor.
        kept: What it is now, if that is at hand.
    """
    kept = Kept(named_modules(model)) if kept is None else kept
    fresh = _new_tensors(kept.tensors, edits)
    for module in _holders(kept.modules, fresh):
        holders: list[dict[str, Any]] = [module._parameters, module._buffers]
        for holder in holders:
            for name, tensor in holder.items():
                if id(tensor) in fresh:
                    holder[name] = fresh[id(tensor)]
        _tell(module)


def _holders(modules: Modules, tensors: Mapping[int, Tensor]) -> list[nn.Module]:
    """The modules that hold one of some tensors, given by their identity."""
    known = tensors.keys()
    held = [(module, [*module._parameters.values(), *module._buffers.values()]) for _, module in modules]
    return [module for module, some in held if some and not known.isdisjoint(map(id, some))]


def _new_tensors(tensors: Mapping[str, Tensor], edits: Sequence[Resize]) -> dict[int, Tensor]:
    """The resized tensor for each tensor, by the identity of the old one."""
    indices: dict[int, Tensor] = {}
    by_tensor: dict[str, list[Resize]] = collections.defaultdict(list)
    for edit in edits:
        by_tensor[edit.tensor].append(edit)
    fresh: dict[int, Tensor] = {}
    for name, some in by_tensor.items():
        old = tensors[name]
        new = resize(old.detach(), some, indices)
        if type(old) is nn.Parameter:
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        elif isinstance(old, nn.Parameter):
            raise EditError(f"{name} is a {type(old).__name__}, not a plain parameter, and cannot be resized")
        fresh[id(old)] = new
    return fresh


def _positions(edit: Resize, known: dict[int, Tensor]) -> Tensor:
    """The old positions that stay, on the CPU; ``known`` are those of other edits, by the identity of their index."""
    found = known.get(id(edit.index))
    if found is None:
        found = known[id(edit.index)] = torch.from_numpy(np.array(edit.index, np.int64))
    return found


def resize(tensor: Tensor, edits: Sequence[Resize], indices: dict[int, Tensor] | None = None) -> Tensor:
    """Apply the edits of one tensor, axis by axis; the memory layout stays.

    Args:
        tensor: Not touched.
        edits: Not two of one axis.
        indices: Positions by the identity of the index that they were made from: most edits share theirs.
    """
    if tensor.is_meta:
        shape = list(tensor.shape)
        for edit in edits:
            shape[edit.axis] = len(edit.index)
        return bare(shape, tensor.dtype)
    indices = {} if indices is None else indices
    known = {e.axis: _positions(e, indices) for e in edits}
    if not tensor.is_cpu:
        known = {axis: index.to(tensor.device) for axis, index in known.items()}
    result = _selected(tensor, known)
    for edit in edits:
        if edit.scale:
            scale = torch.tensor(edit.scale, dtype=torch.float64, device=tensor.device)
            shaped = scale.reshape([-1 if a == edit.axis else 1 for a in range(tensor.dim())])
            result = (result.double() * shaped).to(tensor.dtype)
    if not tensor.is_contiguous() and tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return result.contiguous(memory_format=torch.channels_last)
    return result.contiguous()


_AT_ONCE = 2**18  # values that stay in the cache of a processor between one axis and the next


def _selected(tensor: Tensor, indices: Mapping[int, Tensor]) -> Tensor:
    """Positions of several axes, some rows of the first axis at a time: no second copy is made on the way."""
    if len(indices) == 1 or tensor.numel() < _AT_ONCE:
        for axis, index in indices.items():
            tensor = tensor.index_select(axis, index)
        return tensor
    rows = indices.get(0)
    *others, (last, final) = [(axis, index) for axis, index in indices.items() if axis]
    shape = [len(indices[axis]) if axis in indices else n for axis, n in enumerate(tensor.shape)]
    result = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    step = max(1, _AT_ONCE * len(tensor) // max(1, tensor.numel()))
    for start in range(0, shape[0], step):
        stop = start + step
        part = tensor[start:stop] if rows is None else tensor.index_select(0, rows[start:stop])
        for axis, index in others:
            part = part.index_select(axis, index)
        torch.index_select(part, last, final, out=result[start:stop])
    return result


def set_attributes(model: nn.Module, edits: Sequence[SetAttribute]) -> None:
    """Give modules their new sizes, in place.

    Raises:
        PlanMismatchError: If a module or its attribute is not what the plan was made for.
    """
    for edit in edits:
        module = module_at(model, edit.module)
        present = getattr(module, edit.attribute, None)
        if module is None or present != edit.value:
            raise PlanMismatchError(
                f"this plan was made for another model: {edit.module}.{edit.attribute} is {present!r}, "
                f"the plan has {edit.value!r}"
            )
        setattr(module, edit.attribute, edit.new)
        _tell(module)


def set_config(model: nn.Module, edits: Sequence[SetConfig]) -> None:
    """Give a model's configuration its new sizes, in place.

    Raises:
        PlanMismatchError: If the configuration is not what the plan was made for.
    """
    for edit in edits:
        *path, name = edit.setting.split(".")
        owner = functools.reduce(lambda at, step: getattr(at, step, None), path, getattr(model, "config", None))
        present = getattr(owner, name, None)
        if present != edit.value:
            raise PlanMismatchError(
                f"this plan was made for another model: config.{edit.setting} is {present!r}, the plan has {edit.value}"
            )
        setattr(owner, name, edit.new)


def _check_fit(tensors: Mapping[str, Tensor], edits: Sequence[Resize]) -> None:
    """Compare what the edits expect with what the model has."""
    wrong = []
    done = 0
    highest: dict[int, int] = {}  # most edits share their index
    for edit in edits:
        if id(edit.index) not in highest:
            highest[id(edit.index)] = max(edit.index, default=-1)
        tensor = tensors.get(edit.tensor)
        size = tensor.shape[edit.axis] if tensor is not None and edit.axis < tensor.dim() else None
        if size != edit.size or (size is not None and highest[id(edit.index)] >= size):
            wrong.append(f"{edit.tensor}[{edit.axis}]: plan has {edit.size}, model has {size or 'no such axis'}")
            done += size == len(edit.index)
    if wrong:
        raise PlanMismatchError(
            f"this plan was made for another model: {len(wrong)} of {len(edits)} axes differ ({'; '.join(wrong[:3])})"
            + (
                "; the sizes are those after the plan, so it looks applied already: start from the original model"
                if done == len(wrong)
                else ""
            )
        )


def told(module: nn.Module) -> bool:
    """Whether a module is told its new sizes when its tensors are resized: one of torch's own with tensors."""
    own = isinstance(module, _ConvNd | _NormBase | nn.Linear | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)
    own = own or isinstance(module, nn.Embedding | nn.Bilinear)
    return own and any(t is not None for t in [*module._parameters.values(), *module._buffers.values()])


def _tell(module: nn.Module) -> None:
    """Let a module of torch know the shape of its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        with evaluation(module):  # reading a spectral norm's weight in training mode is a step of its iteration
            weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        if isinstance(module, _NormBase) and module.running_mean is not None:
            module.num_features = len(module.running_mean)
        return
    shape = weight.shape
    if isinstance(module, _ConvNd):
        if isinstance(module, _ConvTransposeNd):
            sizes = {"in_channels": shape[0], "out_channels": shape[1] * module.groups}
        else:
            sizes = {"out_channels": shape[0], "in_channels": shape[1] * module.groups}
        vars(module).update(sizes)  # they are plain numbers; a module looks at whatever else is set
    elif isinstance(module, _NormBase):
        vars(module)["num_features"] = shape[0]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = shape[0], shape[1]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = shape[0], shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = shape
