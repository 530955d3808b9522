"""What becomes of attention when its tensors are resized: its own class where that fits, or one with free sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from morph.analysis.recording import Modules, named_modules, tensors_in
from morph.attention import FreeMultiheadAttention
from morph.errors import PlanMismatchError
from morph.plan import FreeAttention, Resize, SetAttribute
from morph.resizing import set_attributes

SizeEdit = SetAttribute | FreeAttention
_Index = NDArray[np.int64]
_Kept = Callable[[Tensor, int], _Index]  # a tensor and an axis: for each position afterwards, where it comes from


def attention_edits(model: nn.Module, edits: Sequence[Resize], modules: Modules | None = None) -> list[SizeEdit]:
    """What attention needs for new sizes, found from the sizes alone.

    A module stays what it is where heads times head size is still its width and the head size has not changed; any
    other goes free. Passed over is what no class can carry: heads that differ in size, or weights that are computed
    anew for each call (parametrized ones).

    Args:
        model: The model before; not touched.
        edits: The resized tensors.
        modules: Its `named_modules`, if they are at hand.
    """
    found: list[SizeEdit] = []
    known = _classes()
    everything = named_modules(model) if modules is None else modules
    layers: list[tuple[str, Any]] = [(p, m) for p, m in everything if type(m) in known]
    if not layers:
        return found
    names = {id(tensor): name for name, tensor in tensors_in(everything)}
    index = {(edit.tensor, edit.axis): edit.index for edit in edits}
    resized = {edit.tensor for edit in edits}

    def kept(tensor: Tensor, axis: int) -> _Index:
        return np.array(index.get((names[id(tensor)], axis), range(tensor.shape[axis])), np.int64)

    for path, module in layers:
        weights = _weights(module)
        if not all(id(w) in names for w in weights):
            continue
        if any(names[id(tensor)] in resized for tensor in module.parameters()):
            found += _edits_of(path, module, kept)
    return found


def set_sizes(model: nn.Module, edits: Sequence[SizeEdit]) -> None:
    """Give modules their new sizes, in place.

    Raises:
        PlanMismatchError: If a module is not what the plan was made for.
        EditError: If its tensors do not have these sizes.
    """
    set_attributes(model, [edit for edit in edits if isinstance(edit, SetAttribute)])
    free_attention(model, [edit for edit in edits if isinstance(edit, FreeAttention)])


def free_attention(model: nn.Module, edits: Sequence[FreeAttention]) -> None:
    """Let attention go free, in place; errors as for `set_sizes`.

    A `torch.nn.TransformerEncoder` around it gives up nested tensors, which only torch's fused kernel can take.
    """
    modules = dict(named_modules(model, remove_duplicate=False)) if edits else {}
    known = _classes()
    for edit in edits:
        module: Any = modules.get(edit.module)
        free: Any = known.get(type(module))
        # that of windows is read off their weights, which are cut by now
        present = (module.num_heads, getattr(module, "head_dim", edit.head_dim)) if free else None
        if present != (edit.num_heads, edit.head_dim) or len(edit.sizes) != 2:
            has = f"{present[0]} heads of {present[1]}" if present else "no attention that can go free"
            raise PlanMismatchError(
                f"this plan was made for another model: {edit.module} has {has}, the plan {edit.num_heads} heads of "
                f"{edit.head_dim} that become {edit.to} of {list(edit.sizes)}"
            )
        free.of(module, edit.head_dim).resize(edit.to, *edit.sizes)
    for outer in modules.values() if edits else ():
        if isinstance(outer, nn.TransformerEncoder) and _holds_free(outer):
            outer.use_nested_tensor = False


def _holds_free(module: nn.Module) -> bool:
    return any(isinstance(inner, FreeMultiheadAttention) for inner in module.modules())


def _classes() -> dict[type, Any]:
    """What of each class of attention becomes; none that inherits from them is known."""
    found: dict[type, Any] = {nn.MultiheadAttention: FreeMultiheadAttention}
    if "torchvision.models.swin_transformer" in sys.modules:  # else no model has its layers
        from morph.window_attention import FREE

        found |= FREE
    return found | {free: free for free in found.values()}


def _head_dim(module: Any) -> int:
    """Positions of each head in queries and keys."""
    if hasattr(module, "head_dim"):
        return int(module.head_dim)
    return int(module.qkv.weight.shape[0]) // 3 // int(module.num_heads)


def _edits_of(path: str, module: Any, kept: _Kept) -> list[SizeEdit]:
    """The edits of one module whose tensors are resized."""
    heads, size = module.num_heads, _head_dim(module)
    value_size = module.value_head_dim if isinstance(module, FreeMultiheadAttention) else size
    q, k, v = _rows(module, kept)
    forms = [_grid(q, size), _grid(k, size), _grid(v, value_size)]
    counts = {form[0] for form in forms}
    (to, new_size), (_, new_value_size) = forms[0], forms[2]
    *projections, out = _weights(module)
    mixed = len(kept(out, 1))
    if len(counts) > 1 or 0 in counts or forms[0] != forms[1] or mixed != to * new_value_size:
        return []
    windows = not isinstance(module, nn.MultiheadAttention)
    if windows and new_size != new_value_size:
        return []
    widths = [len(kept(weight, 1)) for weight in projections] * (3 // len(projections))
    tied = widths[0] == to * size == len(kept(out, 0))
    if hasattr(module, "scale_dim") or not tied or (new_size, new_value_size) != (size, size):
        return [FreeAttention(path, heads, size, to, (new_size, new_value_size))]
    new = {"embed_dim": widths[0], "num_heads": to, "kdim": widths[1], "vdim": widths[2]}
    new = {"num_heads": to} if windows else new
    old: dict[str, int] = {name: getattr(module, name) for name in new}
    return [SetAttribute(path, name, old[name], new[name]) for name in new if old[name] != new[name]]


def _weights(module: Any) -> list[Tensor]:
    """The weights of the projections, one for all or three, and that of the output."""
    if not isinstance(module, nn.MultiheadAttention):
        return [module.qkv.weight, module.proj.weight]
    projections = (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    return [weight for weight in (*projections, module.out_proj.weight) if weight is not None]


def _rows(module: Any, kept: _Kept) -> tuple[_Index, _Index, _Index]:
    """For queries, keys and values, where each position afterwards comes from among their own."""
    *projections, _ = _weights(module)
    if len(projections) > 1:
        q, k, v = (kept(weight, 0) for weight in projections)
        return q, k, v
    index, wide = kept(projections[0], 0), module.num_heads * _head_dim(module)
    return index[index < wide], index[(index >= wide) & (index < 2 * wide)] - wide, index[index >= 2 * wide] - 2 * wide


def _grid(index: _Index, size: int) -> tuple[int, int]:
    """How many heads positions make, and of how many each; zero heads if they are not all alike.

    A head begins where the old head changes, or where positions begin anew (a head that was copied).
    """
    head, position = index // size, index % size
    anew = np.diff(position) < 0 if size > 1 else np.ones(len(index) - 1, bool)
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(head) != 0) | anew]))
    lengths = set(np.diff([*starts, len(index)]).tolist())
    return (len(starts), lengths.pop()) if len(lengths) == 1 and len(index) else (0, 0)
