"""Selecting positions of tensors."""

from __future__ import annotations

import pytest
import torch

from morph.plan import Resize
from morph.resizing import resize

SHAPES = [(7,), (5, 6), (40, 2500), (300, 400, 1, 1), (64, 120, 3, 3), (3, 50, 1000), (6, 4, 5, 3, 2), (0, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_positions_of_all_axes_one_after_the_other(shape, layout):
    if layout is torch.channels_last and len(shape) != 4:
        pytest.skip("only four axes have that layout")
    generator = torch.Generator().manual_seed(len(shape))
    tensor = torch.randn(shape, generator=generator).contiguous(memory_format=layout)
    for axes in ([0], [len(shape) - 1], list(range(len(shape))), list(range(len(shape)))[::-1]):
        edits, expected = [], tensor
        for axis in dict.fromkeys(axes):
            n = shape[axis]
            index = torch.randint(0, n, (n // 2 + 1,), generator=generator) if n else torch.zeros(0, dtype=torch.long)
            edits.append(Resize("x", axis, n, tuple(index.tolist())))
            expected = expected[(slice(None),) * axis + (index,)]
        got = resize(tensor, edits)
        assert torch.equal(got, expected)
        assert got.is_contiguous(memory_format=layout)
        assert not got.numel() or got.data_ptr() != tensor.data_ptr()
