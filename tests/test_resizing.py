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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
def test_positions_of_large_tensors_of_every_type(dtype, axes):
    generator = torch.Generator().manual_seed(len(axes))
    tensor = torch.randn(500, 300, 3, generator=generator).mul(9).to(dtype)
    expected, edits = tensor, []
    for axis in axes:
        index = torch.randperm(tensor.shape[axis], generator=generator)[: tensor.shape[axis] * 2 // 3]
        edits.append(Resize("x", axis, tensor.shape[axis], tuple(index.tolist())))
        expected = expected[(slice(None),) * axis + (index,)]
    got = resize(tensor, edits)
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    for memory in (got.untyped_storage(), tensor.untyped_storage()):  # torch's own, as it was
        assert memory.resizable()
