"""Merging and splitting groups: exact for every shape, reachable by the first gradient, refused otherwise."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, images, randomise
from reference import dense_weight
from torch import nn
from torch.nn.utils import parametrizations

from morph.errors import EditError
from morph.passes.regroup import grouped_convolutions, merge_groups, regroup, smallest_prime_factor
from morph.tracing import trace

KINDS = [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def run(conv: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return conv(x)


def test_smallest_prime_factor():
    assert [smallest_prime_factor(n) for n in (2, 3, 4, 9, 15, 35, 49, 97)] == [2, 3, 2, 3, 3, 5, 7, 97]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    to=st.integers(1, 5),
    factor=st.sampled_from([2, 3, 4, 5, 7]),
    per_group=st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 5])),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
)
def test_every_grouped_convolution_merges_exactly_and_splits_back(
    kind, to, factor, per_group, kernel, stride, dilation, bias, mode
):
    groups = to * factor
    mode = "zeros" if "Transpose" in kind.__name__ else mode
    conv = kind(
        groups * per_group[0],
        groups * per_group[1],
        kernel,
        stride=stride,
        dilation=dilation,
        padding=1,
        groups=groups,
        bias=bias,
        padding_mode=mode,
        dtype=torch.float64,
    )
    dims = int(kind.__name__[-2])
    x = torch.randn(2, conv.in_channels, *(7, 6, 5)[:dims], dtype=torch.float64)
    before, weight = run(conv, x), conv.weight.detach().clone()
    entries = weight.numel()

    regroup(conv, to)

    torch.testing.assert_close(run(conv, x), before, rtol=1e-12, atol=1e-12)
    assert conv.groups == to
    assert conv.weight.numel() == entries * factor
    if to == 1:
        assert torch.equal(conv.weight, dense_weight(weight, groups))
    regroup(conv, groups)
    assert torch.equal(conv.weight, weight)


@pytest.mark.parametrize("kind", KINDS)
def test_every_new_weight_gets_a_gradient_at_once(kind):
    conv = kind(12, 18, 3, padding=1, groups=6)
    regroup(conv, 2)
    dims = int(kind.__name__[-2])
    x = torch.randn(3, 12, *(5, 5, 5)[:dims])
    out = conv(x)
    (out * torch.randn_like(out)).sum().backward()
    assert int((conv.weight.grad == 0).sum()) == 0


def test_a_wrong_embedding_is_seen():
    """The comparison above can fail: put the blocks in the wrong places."""
    conv = nn.Conv2d(6, 6, 3, groups=6, dtype=torch.float64)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    before = run(conv, x)
    regroup(conv, 3)
    with torch.no_grad():
        conv.weight.copy_(conv.weight.flip(1))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(conv, x), before, rtol=1e-12, atol=1e-12)


def test_merge_is_the_dense_weight_group_by_group():
    weight = torch.randn(12, 2, 3, 3)
    merged = merge_groups(weight, 6, 2)
    assert torch.equal(dense_weight(merged, 2), dense_weight(weight, 6))


def test_flags_hooks_and_memory_format_stay():
    conv = nn.Conv2d(8, 8, 3, groups=8).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    hook = conv.register_forward_hook(lambda *_: None)
    regroup(conv, 2)
    assert not conv.weight.requires_grad
    assert hook.id in conv._forward_hooks
    assert not conv.training
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    plain = nn.Conv2d(8, 8, 3, groups=8)
    regroup(plain, 2)
    assert plain.weight.is_contiguous()


@pytest.mark.parametrize("to", [0, 4, 12, -1])
def test_impossible_groups_are_refused(to):
    with pytest.raises(EditError, match=rf"6 groups of a convolution from 6 to 6 channels cannot become {to}"):
        regroup(nn.Conv2d(6, 6, 3, groups=6), to)


def test_splitting_that_would_lose_weights_is_refused():
    conv = nn.Conv2d(6, 6, 3, groups=1)
    with pytest.raises(EditError, match=r"1 groups cannot become 3: 216 weights between the new groups are not zero"):
        regroup(conv, 3)


def test_what_cannot_be_merged_is_left_with_the_reason():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias, padding=1, groups=self.groups)

    class Same(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, self.bias, padding=1, groups=self.groups)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.free = nn.Conv2d(6, 6, 3, padding=1, groups=3)
            self.same = Same(6, 6, 3, groups=3)
            self.standardised = Standardised(6, 6, 3, groups=3)
            self.normed = parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1, groups=3))
            self.tied = nn.Conv2d(6, 6, 3, padding=1, groups=3)
            self.twin = nn.Conv2d(6, 6, 3, padding=1, groups=3)
            self.twin.weight = self.tied.weight
            self.unused = nn.Conv2d(6, 6, 3, padding=1, groups=3)
            self.kernel = nn.Parameter(torch.randn(6, 2, 3, 3))

        def forward(self, x):
            x = self.twin(self.tied(self.normed(self.standardised(self.same(self.free(x))))))
            return nn.functional.conv2d(self.free(x), self.kernel, groups=3)

    names, left = grouped_convolutions(trace(Mixed(), torch.randn(2, 6, 8, 8)))
    assert names == ["free", "same"]
    reasons = {item.name: item.reason for item in left}
    assert set(reasons) == {"standardised", "normed", "tied", "twin", "unused", "conv2d"}
    assert "does not compute the same with merged groups" in reasons["standardised"]
    assert "parametrised" in reasons["normed"]
    assert "shared" in reasons["tied"]
    assert "does not run" in reasons["unused"]
    assert "function call" in reasons["conv2d"]


def test_a_module_that_is_used_twice_is_merged_once():
    net = randomise(Net()).double()
    net.blocks[1] = net.blocks[0]
    x = images()[0].double()
    names, left = grouped_convolutions(trace(net, x))
    assert names == ["blocks.0.mix", "blocks.2.mix"]
    assert left == []
    grown = copy.deepcopy(net).eval()
    regroup(grown.blocks[0].mix, 3)
    torch.testing.assert_close(run(grown, x), run(net.eval(), x), rtol=1e-12, atol=1e-12)
