"""Torchvision's shifted-window attention whose heads may be of any number and size, whatever the width it reads."""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from morph.errors import EditError


def free_shifted_window_attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    position_bias: Tensor,
    logit_scale: Tensor | None,
    *,
    window_size: list[int],
    shift_size: list[int],
    num_heads: int,
    head_dim: int,
    scale_dim: int,
    attention_dropout: float,
    dropout: float,
    training: bool,
) -> Tensor:
    """What `FreeShiftedWindowAttention` computes, as one function, so that a trace has it as one node.

    Args:
        x: ``[N, H, W, width]``.
        qkv_weight: ``[3 h d, width]``.
        qkv_bias: ``[3 h d]``.
        proj_weight: ``[out, h d]``.
        proj_bias: ``[out]``.
        position_bias: ``[1, h, window, window]``, added to the scores.
        logit_scale: ``[h, 1, 1]``, of cosines; None for products.
        window_size: Rows and columns of a window.
        shift_size: By how many rows and columns windows are shifted.
        num_heads: ``h``.
        head_dim: ``d``.
        scale_dim: Products are divided by its root.
        attention_dropout: Of the weights.
        dropout: Of the output.
        training: Whether anything is dropped.

    Returns:
        ``[N, H, W, out]``.
    """
    batch, high, wide, width = x.shape
    (rows, columns), tokens = window_size, window_size[0] * window_size[1]
    below, right = (rows - high % rows) % rows, (columns - wide % columns) % columns
    x = F.pad(x, (0, 0, 0, right, 0, below))
    height, length = x.shape[1:3]
    shifts = [0 if w >= n else s for w, n, s in zip(window_size, (height, length), shift_size, strict=True)]
    if sum(shifts):
        x = torch.roll(x, shifts=(-shifts[0], -shifts[1]), dims=(1, 2))
    down, across = height // rows, length // columns
    x = x.view(batch, down, rows, across, columns, width).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch * down * across, tokens, width)
    qkv = F.linear(x, qkv_weight, qkv_bias if logit_scale is None else _without_keys(qkv_bias))
    qkv = qkv.reshape(x.shape[0], tokens, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]  # in the order of torchvision's own, with which a cut is compared
    scores = _scores(q, k, scale_dim, logit_scale) + position_bias
    if sum(shifts):
        mask = _mask(x, (height, length), window_size, shifts)
        scores = scores.view(batch, down * across, num_heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, num_heads, tokens, tokens)
    weights = F.dropout(F.softmax(scores, dim=-1), p=attention_dropout, training=training)
    x = weights.matmul(v).transpose(1, 2).reshape(x.shape[0], tokens, num_heads * head_dim)
    x = F.dropout(F.linear(x, proj_weight, proj_bias), p=dropout, training=training)
    x = x.view(batch, down, across, rows, columns, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, height, length, x.shape[-1])
    if sum(shifts):
        x = torch.roll(x, shifts=(shifts[0], shifts[1]), dims=(1, 2))
    return x[:, :high, :wide, :].contiguous()


torch.fx.wrap("free_shifted_window_attention")


def _without_keys(bias: Tensor | None) -> Tensor | None:
    """The bias of queries, keys and values, without that of keys."""
    if bias is None:
        return None
    bias, length = bias.clone(), bias.numel() // 3
    bias[length : 2 * length].zero_()
    return bias


def _scores(q: Tensor, k: Tensor, scale_dim: int, logit_scale: Tensor | None) -> Tensor:
    """How well keys fit queries, ``[windows, heads, tokens, tokens]``."""
    if logit_scale is None:
        factor: float = scale_dim**-0.5
        return (q * factor).matmul(k.transpose(-2, -1))
    cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scaled: Tensor = cosines * torch.clamp(logit_scale, max=math.log(100.0)).exp()
    return scaled


def _mask(x: Tensor, size: tuple[int, int], window: list[int], shifts: list[int]) -> Tensor:
    """Minus a hundred between tokens that were not neighbours before the shift, ``[windows, tokens, tokens]``."""
    rows, columns = window
    regions = x.new_zeros(size)
    number = 0
    for h in ((0, -rows), (-rows, -shifts[0]), (-shifts[0], None)):
        for w in ((0, -columns), (-columns, -shifts[1]), (-shifts[1], None)):
            regions[h[0] : h[1], w[0] : w[1]] = number
            number += 1
    regions = regions.view(size[0] // rows, rows, size[1] // columns, columns).permute(0, 2, 1, 3)
    regions = regions.reshape(-1, rows * columns)
    apart = regions.unsqueeze(1) - regions.unsqueeze(2)
    return apart.masked_fill(apart != 0, -100.0).masked_fill(apart == 0, 0.0)


class _FreeWindows(nn.Module):
    """What both versions share: heads, head size and width are three numbers.

    With ``h`` heads and ``d`` positions in each, weights have the shapes ``qkv.weight [3 h d, width]``, ``qkv.bias
    [3 h d]`` and ``proj.weight [out, h d]``.

    Attributes:
        num_heads: Number of heads, ``h``.
        head_dim: Positions of each head, ``d``.
        scale_dim: Head size by whose root the softmax divides: the one that the weights were trained with.
    """

    num_heads: int
    head_dim: int
    scale_dim: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear

    @classmethod
    def of(cls, module: nn.Module, head_dim: int) -> Self:
        """Let ``module`` itself, with its parameters and hooks, go on as one of this class.

        Args:
            module: Torchvision's own, or one of this class.
            head_dim: Positions of each head that its weights were trained with.

        Raises:
            EditError: If it is of a class of its own, whose code would be lost.
        """
        if isinstance(module, cls):
            return module
        if type(module) not in cls.__mro__:
            raise EditError(f"{type(module).__name__} is not torchvision's own attention, and must stay as it is")
        module.__class__ = cls
        assert isinstance(module, cls)
        module.head_dim = module.scale_dim = head_dim
        return module

    def resize(self, num_heads: int, head_dim: int, value_head_dim: int) -> None:
        """Take new numbers of heads and of positions in each; widths are those that the weights have.

        Raises:
            EditError: If the weights do not have so many rows, or values are of another size than queries.
        """
        rows, mixed = self.qkv.weight.shape[0], self.proj.weight.shape[1]
        inside = num_heads * head_dim
        if head_dim != value_head_dim or rows != 3 * inside or mixed != inside or inside < 1:
            raise EditError(
                f"{num_heads} heads of {head_dim} and {value_head_dim} positions need as many for values as for "
                f"queries, {3 * inside} rows of qkv.weight and {inside} columns of proj.weight, got {rows} and {mixed}"
            )
        self.num_heads, self.head_dim = num_heads, head_dim

    def get_relative_position_bias(self) -> Tensor:
        """What is added to the scores of each head, ``[1, heads, window, window]``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Attend within shifted windows (Liu et al., "Swin Transformer", ICCV 2021, section 3.2).

        Args:
            x: ``[N, H, W, width]``.

        Returns:
            ``[N, H, W, out]``.
        """
        return free_shifted_window_attention(
            x,
            self.qkv.weight,
            self.qkv.bias,
            self.proj.weight,
            self.proj.bias,
            self.get_relative_position_bias(),
            getattr(self, "logit_scale", None),
            window_size=self.window_size,
            shift_size=self.shift_size,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            scale_dim=self.scale_dim,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            training=self.training,
        )


class FreeShiftedWindowAttention(_FreeWindows, ShiftedWindowAttention):  # type: ignore[misc]
    """`torchvision.models.swin_transformer.ShiftedWindowAttention` with heads of any number and size.

    Torchvision's ties the width of its input to heads times head size. Here they are three numbers, so that whole
    heads, positions inside them and the stream can be cut independently. It has the same parameters by the same names,
    and on the weights of torchvision's own it gives the same bits. Made by `of`, or by an edit
    `morph.plan.FreeAttention`.
    """

    def get_relative_position_bias(self) -> Tensor:
        """As torchvision's own."""
        found: Tensor = ShiftedWindowAttention.get_relative_position_bias(self)
        return found


class FreeShiftedWindowAttentionV2(_FreeWindows, ShiftedWindowAttentionV2):  # type: ignore[misc]
    """The same for the second version (Liu et al., "Swin Transformer V2", CVPR 2022), whose scores are cosines."""

    def get_relative_position_bias(self) -> Tensor:
        """As torchvision's own."""
        found: Tensor = ShiftedWindowAttentionV2.get_relative_position_bias(self)
        return found


FREE: dict[type, type[_FreeWindows]] = {
    ShiftedWindowAttention: FreeShiftedWindowAttention,
    ShiftedWindowAttentionV2: FreeShiftedWindowAttentionV2,
}
