"""Where each parameter of an edited model comes from: followed by name through the edits of a plan."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from morph.errors import PlanMismatchError
from morph.passes.insertion import chain_with_copies
from morph.plan import (
    Deepen,
    DropBranch,
    Edit,
    Plan,
    PutLabelHead,
    PutVotingHead,
    Regroup,
    Reinitialise,
    Resize,
    Substitute,
    SwapHead,
)
from morph.rerouting import SHIFT
from morph.tensor_edits import Fitting, Shape, TensorEdit, tensor_of

_ANY = "*"  # stands for the names inside what takes the place of a layer
Tree = dict[str, "Tree"]  # names of the children of a module, and of theirs


@dataclass
class Origin:
    """What a parameter of the new model was.

    Attributes:
        source: Its name in the old model; of a new parameter, that of the one that it was copied from or replaces.
        shape: Its shape now.
        edits: What happened to it, in order.
        fresh: Whether its values are new, so that it has no history.
    """

    source: str
    shape: Shape
    edits: list[TensorEdit] = field(default_factory=list)
    fresh: bool = False


def origins(before: nn.Module, after: nn.Module, plan: Plan) -> dict[str, Origin]:
    """The origin of each parameter of ``after``, by its first name there, in the order of the model.

    A tensor with several names has one origin.

    Args:
        before: The model that the plan was applied to.
        after: What came out.
        plan: The edits.

    Raises:
        PlanMismatchError: If the plan does not lead from one model to the other; counted, the first named.
    """
    lineage = _Lineage(before)
    for edit in plan.edits:
        lineage.follow(edit)
    lineage.fitting.require("model")
    found = {name: lineage.origin(name) for name, _ in after.named_parameters()}
    wrong = [
        f"{name}: {'nothing in the plan makes it' if origin is None else f'plan gives {list(origin.shape)}'}, "
        f"the new model has {list(parameter.shape)}"
        for name, parameter in after.named_parameters()
        if (origin := found[name]) is None or (not origin.fresh and origin.shape != tuple(parameter.shape))
    ]
    if wrong:
        raise PlanMismatchError(
            f"the plan does not lead from the old model to the new one: {len(wrong)} of {len(found)} parameters differ "
            f"({'; '.join(wrong[:3])})"
        )
    return {name: origin for name, origin in found.items() if origin is not None}


class _Lineage:
    """The names of a model's parameters while a plan goes on."""

    def __init__(self, before: nn.Module) -> None:
        self.fitting = Fitting()
        self._tree = _tree(before)
        self._buffers = {name for name, _ in before.named_buffers(remove_duplicate=False)}
        shared: dict[int, Origin] = {}
        self._origins = {
            name: shared.setdefault(id(p), Origin(name, tuple(p.shape)))
            for name, p in before.named_parameters(remove_duplicate=False)
        }

    def origin(self, name: str) -> Origin | None:
        """What the parameter ``name`` comes from; None if nothing explains it."""
        parts = name.split(".")
        inside = (".".join([*parts[:i], _ANY]) for i in range(len(parts) - 1, 0, -1))
        return next((self._origins[key] for key in [name, *inside] if key in self._origins), None)

    def follow(self, edit: Edit) -> None:
        """Take one edit into account; those that change no parameter are passed over."""
        if isinstance(edit, Resize | Regroup):
            self._edit(edit)
        elif isinstance(edit, Reinitialise):
            self._origins = {
                name: Origin(origin.source, origin.shape, fresh=True) for name, origin in self._origins.items()
            }
        elif isinstance(edit, Deepen):
            self._deepen(edit)
        elif isinstance(edit, PutLabelHead):
            self._replace(edit.head, edit.module)
        elif isinstance(edit, Substitute | SwapHead | PutVotingHead):
            self._replace(edit.module, edit.module)
        elif isinstance(edit, DropBranch) and edit.shift:
            number = sum(name.startswith(SHIFT) for name in self._origins)
            self._origins[f"{SHIFT}{number}"] = Origin(f"{edit.module}.weight", edit.shape, fresh=True)

    def _replace(self, layer: str, place: str) -> None:
        """Fresh parameters at ``place`` stand for those of a layer."""
        weight = self._origins.pop(f"{layer}.weight", None)
        self._origins.pop(f"{layer}.bias", None)
        if weight is not None:
            self._origins[f"{place}.{_ANY}"] = Origin(weight.source, (), fresh=True)

    def _edit(self, edit: TensorEdit) -> None:
        name = tensor_of(edit)
        origin = self._origins.get(name)
        if origin is None:
            if name not in self._buffers:
                self.fitting.step(name, None, edit)
            return
        shape = self.fitting.step(name, origin.shape, edit)
        assert shape is not None
        origin.shape = shape
        origin.edits.append(edit)

    def _deepen(self, edit: Deepen) -> None:
        """Rename the children of a chain; the copies have no history."""
        chain = self._tree
        for name in edit.container.split(".") if edit.container else []:
            chain = chain.get(name, {})
        if not set(edit.blocks) <= set(chain) or not edit.blocks:
            raise PlanMismatchError(
                f"this plan was made for another model: {edit.container or 'the model'} has no children "
                f"{', '.join(edit.blocks) or '(none named)'}"
            )
        order = chain_with_copies(list(chain), edit.blocks, edit.copies)
        moved: dict[str, Origin] = {}
        for new, old, is_copy in _moves(self._origins, edit.container, order):
            origin = self._origins[old]
            moved[new] = Origin(origin.source, origin.shape, fresh=True) if is_copy else origin
        self._origins = moved
        self._buffers = {new for new, _, _ in _moves(self._buffers, edit.container, order)}
        children = {name: copy.deepcopy(chain[source]) for name, source, _ in order}
        chain.clear()
        chain.update(children)


def _moves(names: Iterable[str], container: str, order: list[tuple[str, str, bool]]) -> Iterator[tuple[str, str, bool]]:
    """``(name after, name before, whether it is in a copy)`` for tensors of a model in which a chain got copies."""
    prefix = f"{container}." if container else ""
    for old in names:
        child, dot, rest = old.removeprefix(prefix).partition(".")
        if not old.startswith(prefix) or not dot:
            yield old, old, False
            continue
        for name, source, is_copy in order:
            if source == child:
                yield f"{prefix}{name}.{rest}", old, is_copy


def _tree(module: nn.Module) -> Tree:
    return {name: {} if child is None else _tree(child) for name, child in module._modules.items()}
