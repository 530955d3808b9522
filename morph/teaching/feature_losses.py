"""Losses between feature maps of teacher and student: plain modules, for any trainer.

Each is called with ``(student_map [N, C, H, W], teacher_map)`` and gives a scalar, a mean over the samples.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph.errors import TeachingError
from morph.teaching.objective import check_weight

Form = Literal["mean-square", "norm"]
Reduction = Literal["mean", "sum"]

_BETA: dict[Form, float] = {"mean-square": 1e3, "norm": 1.0}


class AttentionTransfer(nn.Module):
    """Distance between attention maps: the squares of activations, mean over channels, of unit length for each sample.

    With ``q = f(A) / |f(A)|_2``, where ``f(A)[h, w] = mean_c A[c, h, w]**2``:

    * ``"norm"``: ``beta * mean_n |q_t - q_s|_2``: Whettam 2020, Eq. 2.9 as printed, of one layer; it names no beta.
    * ``"mean-square"``: ``beta * mean_n,h,w (q_t - q_s)**2``: what the authors of the method compute (Zagoruyko and
      Komodakis, "Paying More Attention to Attention", 2017), with a beta of 1000.

    The number of channels may differ, height and width may not.

    Args:
        form: One of the two.
        beta: Weight, 0 or above; by default 1000 for ``"mean-square"`` and 1 for ``"norm"``.

    Raises:
        TeachingError: If there is no such form, or beta is negative or no number.

    Example:
        >>> left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> AttentionTransfer("norm")(left, right)
        tensor(1.4142)
    """

    channels_must_agree = False

    def __init__(self, form: Form = "mean-square", beta: float | None = None) -> None:
        super().__init__()
        if form not in get_args(Form):
            raise TeachingError(f"a form {form!r} of attention transfer; expected one of {', '.join(get_args(Form))}")
        self.form: Form = form
        self.beta = _BETA[form] if beta is None else float(beta)
        check_weight("attention transfer (beta)", self.beta)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean loss; a scalar."""
        for of, features in (("student", student), ("teacher", teacher)):
            if features.dim() != 4:
                raise TeachingError(
                    f"attention transfer between maps [N, C, H, W]; the {of}'s tap gives {tuple(features.shape)}"
                )
        if student.shape[2:] != teacher.shape[2:]:
            raise TeachingError(
                f"attention maps of {_size(student)} (student) and {_size(teacher)} (teacher); give taps of the same "
                "height and width, or put an adapter between them (morph.teaching.adapters.bridge)"
            )
        difference = attention_map(teacher).flatten(1) - attention_map(student).flatten(1)
        if self.form == "norm":
            distances: Tensor = torch.linalg.vector_norm(difference, dim=1)
            return self.beta * distances.mean()
        return self.beta * difference.square().mean()

    def extra_repr(self) -> str:
        """The numbers."""
        return f"form={self.form!r}, beta={self.beta:g}"


class Hint(nn.Module):
    """Half the squared difference between the teacher's hint and the student's guided layer behind a regressor.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015; Whettam 2020, Eq. 2.8:
    ``1/2 * |u_h(x) - r(v_g(x))|**2``. The regressor is not in here; see `morph.teaching.adapters`.

    Args:
        reduction: ``"sum"``: summed over all values of a sample, as printed, and the mean over samples taken.
            ``"mean"``: the mean over values as well, so that the weight need not change with the size of the map.

    Raises:
        TeachingError: If there is no such reduction.

    Example:
        >>> Hint("sum")(torch.zeros(2, 3, 1, 1), torch.ones(2, 3, 1, 1))
        tensor(1.5000)
    """

    channels_must_agree = True

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in get_args(Reduction):
            raise TeachingError(f"a reduction {reduction!r}; expected one of {', '.join(get_args(Reduction))}")
        self.reduction = reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The mean loss; a scalar."""
        if student.shape != teacher.shape:
            raise TeachingError(
                f"the guided layer gives {tuple(student.shape)}, the hint {tuple(teacher.shape)}; put an adapter "
                "between them (morph.teaching.adapters.bridge)"
            )
        squares = (teacher - student).square()
        return squares.mean() / 2 if self.reduction == "mean" else squares.flatten(1).sum(1).mean() / 2

    def extra_repr(self) -> str:
        """The options."""
        return f"reduction={self.reduction!r}"


def attention_map(features: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N, H, W]``: mean of squares over channels, divided by its L2 norm for each sample.

    Where all activations of a sample are zero, so is its map.
    """
    return F.normalize(features.square().mean(1).flatten(1), dim=1).view(len(features), *features.shape[2:])


def _size(features: Tensor) -> str:
    return "x".join(str(side) for side in features.shape[2:])
