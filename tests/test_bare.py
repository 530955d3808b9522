"""Operators on tensors without data: a form that is known by heart is that of the kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from morph.analysis.bare import run_bare

aten = torch.ops.aten


def bare(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (aten.roll.default, (bare(2, 4, 4, 3), [1, -1], [1, 2])),
    (aten.roll.default, (bare(2, 4, 4, 3).transpose(1, 3), [1], [-1])),
    (aten.roll.default, (bare(2, 3), [4])),
    (aten.masked_fill.Scalar, (bare(2, 5, 5), bare(5, 5, dtype=torch.bool), -1.0)),
    (aten.masked_fill.Scalar, (bare(5, 1), bare(5, 5, dtype=torch.bool), -1.0)),
    (aten.masked_fill.Scalar, (bare(4, 5).t(), bare(5, 4, dtype=torch.bool), -1.0)),
    (aten.eq.Scalar, (bare(2, 5), 0)),
    (aten.ne.Scalar, (bare(2, 5).t(), 0)),
    (aten.add_.Tensor, (bare(2, 5), bare(5))),
    (aten.mul_.Tensor, (bare(2, 5), bare(2, 1))),
    (aten.sub_.Tensor, (bare(2, 5).t(), bare(5, 2))),
    (aten.add_.Tensor, (bare(2, 5, dtype=torch.float64), bare(2, 5))),
]


@pytest.mark.parametrize(("func", "args"), CALLS, ids=lambda item: str(item) if callable(item) else "")
def test_the_form_is_that_of_the_kernel(func: Any, args: tuple[Any, ...]) -> None:
    """Shape, layout and type; an operator in place gives its argument."""
    got, wanted = run_bare(func, args, {}), func(*args)
    assert (got.shape, got.stride(), got.dtype, got.device) == (
        wanted.shape,
        wanted.stride(),
        wanted.dtype,
        wanted.device,
    )
    assert (got is args[0]) == (wanted is args[0])


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.roll.default, (bare(2, 4), [1, 2], [1])),
        (aten.roll.default, (bare(2, 4), [1], [2])),
        (aten.add_.Tensor, (bare(5), bare(2, 5))),
        (aten.masked_fill.Scalar, (bare(2, 5), bare(3, 5, dtype=torch.bool), 0.0)),
    ],
    ids=lambda item: str(item) if callable(item) else "",
)
def test_what_the_kernel_refuses_is_refused(func: Any, args: tuple[Any, ...]) -> None:
    """Shapes that do not fit are left to the kernel, which says so."""
    for run in (lambda: func(*args), lambda: run_bare(func, args, {})):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            run()
