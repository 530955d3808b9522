"""What an edit of a plan does to one tensor, known by name and shape alone: no model is needed."""

from __future__ import annotations

from torch import Tensor

from morph.errors import PlanMismatchError
from morph.passes.regroup import merge_groups, split_groups
from morph.plan import Regroup, Resize
from morph.resizing import resize

TensorEdit = Resize | Regroup
Shape = tuple[int, ...]
_SHOWN = 3


def tensor_of(edit: TensorEdit) -> str:
    """Name of the tensor that ``edit`` changes."""
    return edit.tensor if isinstance(edit, Resize) else f"{edit.module}.weight" if edit.module else "weight"


def shape_after(shape: Shape, edit: TensorEdit) -> Shape | None:
    """Shape of a tensor of ``shape`` after ``edit``; None if the edit was made for another tensor."""
    if isinstance(edit, Regroup):
        fits = shape == edit.shape and len(shape) > 1 and edit.groups > 0 and edit.to > 0
        whole = fits and shape[1] * edit.groups % edit.to == 0 and shape[0] % edit.groups == shape[0] % edit.to == 0
        divides = whole and (edit.groups % edit.to == 0 or edit.to % edit.groups == 0)
        return (shape[0], shape[1] * edit.groups // edit.to, *shape[2:]) if divides else None
    fits = edit.axis < len(shape) and shape[edit.axis] == edit.size and max(edit.index, default=0) < edit.size
    if not fits or len(edit.scale) not in (0, len(edit.index)):
        return None
    return (*shape[: edit.axis], len(edit.index), *shape[edit.axis + 1 :])


def edit_tensor(tensor: Tensor, edit: TensorEdit) -> Tensor:
    """Apply ``edit`` to a tensor that it fits; see `shape_after`.

    Raises:
        EditError: If groups are to be split and weights between the new groups are not zero.
    """
    if isinstance(edit, Resize):
        return resize(tensor, [edit])
    return (merge_groups if edit.to <= edit.groups else split_groups)(tensor, edit.groups, edit.to)


def _why_not(name: str, shape: Shape | None, edit: TensorEdit) -> str:
    """Why ``edit`` does not fit the tensor ``name`` of ``shape`` (None if there is none); '' if it does."""
    if shape is not None and shape_after(shape, edit) is not None:
        return ""
    wanted = f"size {edit.size} on axis {edit.axis}" if isinstance(edit, Resize) else f"shape {list(edit.shape)}"
    return f"{name}: plan has {wanted}, found {'no such tensor' if shape is None else f'shape {list(shape)}'}"


def _looks_done(shape: Shape | None, edit: TensorEdit) -> bool:
    """Whether a tensor of ``shape`` has the size that ``edit`` would give it."""
    if shape is None:
        return False
    if isinstance(edit, Regroup):
        return shape == shape_after(edit.shape, edit)
    return edit.axis < len(shape) and shape[edit.axis] == len(edit.index)


class Fitting:
    """Follows the shapes of tensors through a plan and collects what does not fit."""

    def __init__(self) -> None:
        self._wrong: list[str] = []
        self._seen = 0
        self._done = 0

    def step(self, name: str, shape: Shape | None, edit: TensorEdit) -> Shape | None:
        """Shape of the tensor ``name`` after ``edit``; unchanged where the edit does not fit."""
        self._seen += 1
        reason = _why_not(name, shape, edit)
        if not reason:
            assert shape is not None
            return shape_after(shape, edit)
        self._wrong.append(reason)
        self._done += _looks_done(shape, edit)
        return shape

    def require(self, what: str) -> None:
        """Refuse a plan that did not fit ``what``, a model or a checkpoint.

        Raises:
            PlanMismatchError: If an edit did not fit; all are counted, the first named.
        """
        if not self._wrong:
            return
        done = f"; the sizes are those after the plan, so it looks applied already: start from the original {what}"
        raise PlanMismatchError(
            f"this plan was made for another {what}: {len(self._wrong)} of {self._seen} edits do not fit "
            f"({'; '.join(self._wrong[:_SHOWN])})" + (done if self._done == len(self._wrong) else "")
        )
