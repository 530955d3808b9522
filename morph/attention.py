"""`torch.nn.MultiheadAttention` whose heads may be of any number and size, whatever the width of what it reads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph.errors import EditError

_Projected = tuple[Tensor, Tensor, Tensor]


class FreeMultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2) with heads of any number and size.

    `torch.nn.MultiheadAttention` ties the width of its input to heads times head size. Here they are three numbers, so
    that whole heads, positions inside them and the stream can be cut independently. It has the same parameters by the
    same names, takes and gives the same, and runs the same operators: on the weights of a
    `torch.nn.MultiheadAttention` it gives the same bits as that one does without its fused kernel.

    Made by `of`, or by an edit `morph.plan.FreeAttention`. With ``h`` heads, ``d`` positions in each for queries and
    keys, and ``e`` for values, weights have the shapes ``in_proj_weight [h d + h d + h e, embed_dim]`` (or
    ``q_proj_weight [h d, embed_dim]``, ``k_proj_weight [h d, kdim]``, ``v_proj_weight [h e, vdim]``), ``in_proj_bias
    [h d + h d + h e]``, and ``out_proj.weight [out, h e]``.

    Nested tensors are refused, and the fused kernels of `torch.nn.TransformerEncoderLayer` pass it by.

    Attributes:
        embed_dim: Width of the queries that come in.
        num_heads: Number of heads, ``h``.
        head_dim: Positions of each head in queries and keys, ``d``.
        value_head_dim: Positions of each head in values, ``e``.
        scale_dim: Head size by whose root the softmax divides: the one that the weights were trained with.
        kdim: Width of the keys that come in.
        vdim: Width of the values that come in.
    """

    value_head_dim: int
    scale_dim: int

    def __init__(self, embed_dim: int, num_heads: int, **options: object) -> None:
        super().__init__(embed_dim, num_heads, **options)
        self._go_free()

    @classmethod
    def of(cls, module: nn.MultiheadAttention, head_dim: int | None = None) -> FreeMultiheadAttention:
        """Let ``module`` itself, with its parameters and hooks, go on as one of this class.

        Args:
            module: Torch's own, or one of this class.
            head_dim: Positions of each head that its weights were trained with; by default what it says itself.

        Raises:
            EditError: If it is of a class of its own, whose code would be lost.
        """
        if isinstance(module, cls):
            return module
        if type(module) is not nn.MultiheadAttention:
            raise EditError(
                f"{type(module).__name__} is not torch.nn.MultiheadAttention itself, and must stay as it is"
            )
        module.__class__ = cls
        assert isinstance(module, cls)
        module._go_free(head_dim)
        return module

    def _go_free(self, head_dim: int | None = None) -> None:
        self.value_head_dim = self.scale_dim = self.head_dim if head_dim is None else head_dim
        self._qkv_same_embed_dim = False  # torch's fused kernels ask for this, and fit only tied widths

    def _reset_parameters(self) -> None:
        """Draw the weights afresh as torch does, which asks whether widths are tied for which of them there are."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    def resize(self, num_heads: int, head_dim: int, value_head_dim: int) -> None:
        """Take new numbers of heads and of positions in each; widths are those that the weights have.

        Raises:
            EditError: If the weights do not have so many rows.
        """
        out = self.out_proj.weight.shape[1]
        rows = [w.shape[0] for w in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if w is not None]
        if self.in_proj_weight is not None:
            rows = [self.in_proj_weight.shape[0]]
        wide, narrow = num_heads * head_dim, num_heads * value_head_dim
        wanted = [2 * wide + narrow] if self.in_proj_weight is not None else [wide, wide, narrow]
        if rows != wanted or out != narrow or min(num_heads, head_dim, value_head_dim) < 1:
            raise EditError(
                f"{num_heads} heads of {head_dim} and {value_head_dim} positions need {wanted} rows of the projections "
                f"and {narrow} columns of out_proj.weight, got {rows} and {out}"
            )
        self.num_heads, self.head_dim, self.value_head_dim = num_heads, head_dim, value_head_dim
        first = self.in_proj_weight if self.in_proj_weight is not None else self.q_proj_weight
        assert first is not None
        self.embed_dim = self.kdim = self.vdim = first.shape[1]
        if self.k_proj_weight is not None and self.v_proj_weight is not None:
            self.kdim, self.vdim = self.k_proj_weight.shape[1], self.v_proj_weight.shape[1]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of `torch.nn.MultiheadAttention.forward`.

        Args:
            query: ``[L, N, embed_dim]``, ``[N, L, embed_dim]`` with ``batch_first``, or ``[L, embed_dim]``.
            key: The same with ``S`` and ``kdim``.
            value: The same with ``S`` and ``vdim``.
            key_padding_mask: ``[N, S]`` or ``[S]``; true, or minus infinity, where a key is left out.
            need_weights: Whether to give the weights as well.
            attn_mask: ``[L, S]`` or ``[N * num_heads, L, S]``, likewise.
            average_attn_weights: Whether the weights are averaged over heads.
            is_causal: Says that ``attn_mask`` is the causal mask.

        Returns:
            ``[L, N, out]`` in the form of ``query``, and ``[N, L, S]`` or ``[N, num_heads, L, S]`` if weights are
            needed.

        Raises:
            ValueError: If a tensor does not have such a shape.
        """
        self._check(query, key, value)
        batched = query.dim() == 3
        padding, mask = _additive(key_padding_mask, query), _additive(attn_mask, query)
        if is_causal and mask is None:
            raise ValueError("is_causal says that attn_mask is the causal mask, so attn_mask must be given too")
        causal = is_causal and padding is None and not need_weights
        query, key, value = self._sequence_first(query, key, value)
        if padding is not None and not batched:
            padding = padding.unsqueeze(0)
        length, batch, _ = query.shape
        q, k, v = self._project(query, key, value)
        if mask is not None:
            mask = None if causal else self._three_axes(mask, batch, length, key.shape[0])
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.repeat(1, batch, 1)])
            v = torch.cat([v, self.bias_v.repeat(1, batch, 1)])
            mask, padding = _longer(mask), _longer(padding)
        q, k, v = self._heads(q, self.head_dim), self._heads(k, self.head_dim), self._heads(v, self.value_head_dim)
        if self.add_zero_attn:
            k, v = _with_zero(k), _with_zero(v)
            mask, padding = _longer(mask), _longer(padding)
        mask = self._merged(mask, padding, batch, k.shape[1])
        mixed, weights = self._attend(q, k, v, mask, causal, need_weights, batch)
        out = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        out = out.view(length, batch, out.shape[1])
        if weights is not None:
            weights = weights.view(batch, self.num_heads, length, k.shape[1])
            weights = weights.mean(dim=1) if average_attn_weights else weights
        if not batched:
            return out.squeeze(1), None if weights is None else weights.squeeze(0)
        return out.transpose(1, 0) if self.batch_first else out, weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Refuse what has another form."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("nested tensors are not supported; give padded tensors and a key_padding_mask")
        wanted = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, tensor, width in wanted:
            if tensor.dim() not in (2, 3) or tensor.dim() != query.dim() or tensor.shape[-1] != width:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected 2 or 3 axes, the last of {width}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"key has shape {list(key.shape)}, value {list(value.shape)}: other than in the last axis")

    def _sequence_first(self, query: Tensor, key: Tensor, value: Tensor) -> _Projected:
        """As ``[L, N, width]``; what was one tensor stays one if it was a batch."""
        if query.dim() == 2:
            return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        if not self.batch_first:
            return query, key, value
        if key is not value:
            return query.transpose(1, 0), key.transpose(1, 0), value.transpose(1, 0)
        if query is key:
            query = key = query.transpose(1, 0)
        else:
            query, key = query.transpose(1, 0), key.transpose(1, 0)
        return query, key, key

    def _three_axes(self, mask: Tensor, batch: int, length: int, keys: int) -> Tensor:
        """A mask of attention as ``[1, L, S]`` or ``[N * num_heads, L, S]``."""
        wanted = (length, keys) if mask.dim() == 2 else (batch * self.num_heads, length, keys)
        if mask.shape != wanted:
            raise ValueError(f"attn_mask has shape {list(mask.shape)}, expected {list(wanted)}")
        return mask.unsqueeze(0) if mask.dim() == 2 else mask

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> _Projected:
        """Queries, keys and values ``[L, N, num_heads * positions]``, by one product for each different input."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        even = self.head_dim == self.value_head_dim
        wide, narrow = self.num_heads * self.head_dim, self.num_heads * self.value_head_dim
        if weight is not None and key is value and even:
            if query is key:
                joined = _parts(F.linear(query, weight, bias), 3, wide)
                return joined[0], joined[1], joined[2]
            first, rest = weight.split([wide, 2 * wide])
            biases = (None, None) if bias is None else bias.split([wide, 2 * wide])
            q, joined = F.linear(query, first, biases[0]), _parts(F.linear(key, rest, biases[1]), 2, wide)
            return q, joined[0], joined[1]
        weights: tuple[Tensor, ...] = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if weight is not None:
            weights = weight.chunk(3) if even else weight.split([wide, wide, narrow])
        parts: tuple[Tensor | None, ...] = (None, None, None)
        if bias is not None:
            parts = bias.chunk(3) if even else bias.split([wide, wide, narrow])
        q, k, v = map(F.linear, (query, key, value), weights, parts)
        return q, k, v

    def _heads(self, projected: Tensor, positions: int) -> Tensor:
        """``[L, N, num_heads * positions]`` as ``[N * num_heads, L, positions]``."""
        length, batch, _ = projected.shape
        return projected.view(length, batch * self.num_heads, positions).transpose(0, 1)

    def _merged(self, mask: Tensor | None, padding: Tensor | None, batch: int, keys: int) -> Tensor | None:
        """Both masks in one."""
        if padding is None:
            return mask
        if padding.shape != (batch, keys):
            raise ValueError(f"key_padding_mask has shape {list(padding.shape)}, expected {[batch, keys]}")
        spread = padding.view(batch, 1, 1, keys).expand(-1, self.num_heads, -1, -1)
        spread = spread.reshape(batch * self.num_heads, 1, keys)
        return spread if mask is None else mask + spread

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, need_weights: bool, batch: int
    ) -> tuple[Tensor, Tensor | None]:
        """What the heads mix, ``[L * N, num_heads * value_head_dim]``, and the weights if they are needed."""
        dropped = self.dropout if self.training else 0.0
        length, keys, heads = q.shape[1], k.shape[1], self.num_heads
        width = heads * self.value_head_dim
        if need_weights:
            scaled, turned = q * math.sqrt(1.0 / self.scale_dim), k.transpose(-2, -1)
            scores = torch.bmm(scaled, turned) if mask is None else torch.baddbmm(mask, scaled, turned)
            weights = F.softmax(scores, dim=-1)
            if dropped > 0:
                weights = F.dropout(weights, dropped)
            return torch.bmm(weights, v).transpose(0, 1).reshape(length * batch, width), weights
        if mask is not None:
            mask = mask.unsqueeze(0) if mask.shape[0] == 1 else mask.view(batch, heads, -1, keys)
        q = q.view(batch, heads, length, self.head_dim)
        k = k.view(batch, heads, keys, self.head_dim)
        v = v.view(batch, heads, keys, self.value_head_dim)
        scale = 1.0 / math.sqrt(self.scale_dim)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropped, causal, scale=scale)
        return mixed.permute(2, 0, 1, 3).reshape(batch * length, width), None


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers to add: minus infinity where a boolean one is true."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise ValueError(f"masks are of truth values or of floating-point numbers, got {mask.dtype}")
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))


def _longer(mask: Tensor | None) -> Tensor | None:
    """A mask that lets one more key through."""
    return None if mask is None else F.pad(mask, (0, 1))


def _with_zero(x: Tensor) -> Tensor:
    """Keys or values ``[N * num_heads, S, positions]`` with one of zeros behind them."""
    return torch.cat([x, torch.zeros((x.shape[0], 1, x.shape[2]), dtype=x.dtype, device=x.device)], dim=1)


def _parts(joined: Tensor, count: int, width: int) -> Tensor:
    """``[L, N, count * width]`` as ``[count, L, N, width]``, each part in one piece of memory."""
    apart = joined.unflatten(-1, (count, width))
    together: Tensor = apart.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    return together
