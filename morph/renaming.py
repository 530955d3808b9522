"""Say where modules and tensors are after insertions, so that a state can follow them."""

from __future__ import annotations

from dataclasses import asdict

from torch import nn

from morph.passes.insertion import insert_copies
from morph.plan import Deepen, Plan
from morph.twins import meta, twin


def names_after(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Say where each tensor of a model is after the insertions of a plan.

    Args:
        model: The model before; not touched.
        plan: Edits of other kinds do not rename and are passed over.

    Returns:
        For each name in the state_dict before, the name of the same tensor afterwards. Tensors of the copies are not
        in it.

    Raises:
        PlanMismatchError: If the plan does not fit the model.
    """
    names: dict[str, str] = {}
    for before, after, module in _moves(model, plan):
        for tensor in [*module._parameters, *module._buffers]:
            names[_join(before, tensor)] = _join(after, tensor)
    return {name: names.get(name, name) for name in model.state_dict()}


def renamed_modules(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Paths of modules that have another name in their container now, and their paths afterwards; as `names_after`.

    A tensor's new name has the new path in place of the longest of these that it begins with.
    """
    return {
        before: after
        for before, after, _ in _moves(model, plan)
        if before.rpartition(".")[2] != after.rpartition(".")[2]
    }


def _moves(model: nn.Module, plan: Plan) -> list[tuple[str, str, nn.Module]]:
    """Path before, path after, and the module, for all that were there before."""
    ghost = twin(model, meta)  # a structure without values
    before = {id(module): path for path, module in ghost.named_modules()}
    for edit in plan.edits:
        if isinstance(edit, Deepen):
            insert_copies(ghost, **asdict(edit))
    return [(before[id(m)], path, m) for path, m in ghost.named_modules() if id(m) in before]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
