"""What fvcore is told about contractions: rules for operators it does not know, or does not count exactly.

A rule takes the inputs and outputs of one recorded operator and gives its multiply-adds.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import cast

import torch

Values = Sequence[torch._C.Value]
Rule = Callable[[Values, Values], int | Counter[str]]


def _shape(value: torch._C.Value) -> list[int]:
    sizes = value.type().sizes()  # type: ignore[attr-defined]  # a tensor's type; the stubs know only the base class
    if sizes is None:
        raise ValueError(f"the trace does not know the shape of {value.debugName()}")
    return list(sizes)


def _matrices(first: int) -> Rule:
    """Matrix product of the inputs ``first`` and ``first + 1``, batch axes broadcast: ``[..., k] @ [..., k, m]``."""

    def rule(inputs: Values, outputs: Values) -> int:
        return math.prod(_shape(outputs[0])) * _shape(inputs[first])[-1]

    return rule


def _contraction(inputs: Values, outputs: Values) -> int:
    """No batch: with free axes a and b and summed axes k, the operands have a k and b k elements, the result a b."""
    return math.isqrt(math.prod(_shape(inputs[0])) * math.prod(_shape(inputs[1])) * math.prod(_shape(outputs[0])))


def _summed_matrices(inputs: Values, outputs: Values) -> int:
    """``addbmm``: the products of a batch, added up: ``[b, n, k] @ [b, k, m] -> [n, m]``."""
    batch, _, inner = _shape(inputs[1])
    return batch * inner * math.prod(_shape(outputs[0]))


def _padded_convolution(inputs: Values, outputs: Values) -> Counter[str]:
    """Convolution with its padding given by name: ``x [N, C, ...], weight [m, C / groups, ...] -> [N, m, ...]``."""
    return Counter({"conv": math.prod(_shape(outputs[0])) * math.prod(_shape(inputs[1])[1:])})


def _attention(inputs: Values, outputs: Values) -> int:
    """Scores and weighted sum: ``query [..., L, E], key [..., S, E], value [..., S, V] -> [..., L, V]``.

    Masks save nothing.
    """
    width, keys = _shape(inputs[0])[-1], _shape(inputs[1])[-2]
    *rows, out = _shape(outputs[0])
    return math.prod(rows) * keys * (width + out)


def einsum_macs(equation: str, shapes: Sequence[Sequence[int]], path: Sequence[int] | None = None) -> int:
    """Count the multiply-adds of an einsum: for each pair that shares a summed letter, the product of all sizes.

    A letter that only one operand has, and the output has not, is summed beforehand. A pair without a summed letter
    is an elementwise product and counts nothing.

    Args:
        equation: As `torch.einsum` takes it, with or without ``->`` and ``...``.
        shapes: Shape of each operand.
        path: Positions of the pairs to contract, flat; the result goes to the end. Left to right if ``None``.
    """
    terms, _, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    operands: list[str] = []
    for term, shape in zip(terms.split(","), shapes, strict=True):
        rank = len(shape) - len(term.replace("...", ""))
        letters = term.replace("...", "".join(chr(0x3B1 + i) for i in reversed(range(rank))))
        for letter, size in zip(letters, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
        operands.append(letters)
    written = "".join(operands)
    if "->" in equation:
        kept = set(result.replace("...", "")) | {letter for letter in written if ord(letter) >= 0x3B1}
    else:
        kept = {letter for letter in written if ord(letter) >= 0x3B1 or written.count(letter) == 1}
    pairs = list(path) if path else [0, 1] * (len(operands) - 1)
    total = 0
    for i, j in zip(pairs[::2], pairs[1::2], strict=True):
        left, right = set(operands[i]), set(operands[j])
        operands = [operand for k, operand in enumerate(operands) if k not in (i, j)]
        needed = kept.union(*operands)
        summed = {letter for letter in (left & right) - needed if sizes[letter] > 1}
        wide = {letter for letter in left | right if letter in summed or letter in needed}
        total += math.prod(sizes[letter] for letter in wide) if summed else 0
        # without a path the running product is the first operand of the next pair
        operands.insert(len(operands) if path else 0, "".join(wide - summed))
    return total


def _einsum(inputs: Values, outputs: Values) -> int:
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    path = cast(list[int] | None, inputs[2].toIValue()) if len(inputs) > 2 else None
    return einsum_macs(cast(str, inputs[0].toIValue()), shapes, path)


RULES: dict[str, Rule] = {
    "aten::_convolution_mode": _padded_convolution,
    "aten::addbmm": _summed_matrices,
    "aten::addmv": _matrices(1),
    "aten::baddbmm": _matrices(1),
    "aten::dot": _contraction,
    "aten::einsum": _einsum,
    "aten::inner": _contraction,
    "aten::matmul": _matrices(0),
    "aten::mv": _contraction,
    "aten::scaled_dot_product_attention": _attention,
    "aten::tensordot": _contraction,
    "aten::vdot": _contraction,
}
"""By the name of the operator in a recorded graph."""

CONTRACTIONS = frozenset({"conv", "linear", "addmm", "mm", "bmm"} | {name.removeprefix("aten::") for name in RULES})
"""fvcore's names of the operators whose multiply-adds count; its other operators are elementwise work."""
