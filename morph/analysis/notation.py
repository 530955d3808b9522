"""The notation in which rules of users say how axes go together, such as ``n c ... -> n d ...``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from morph.analysis.atoms import Labels
from morph.errors import AnalysisError


def bind(tokens: list[str], rank: int) -> list[tuple[object, int]]:
    """Pair the tokens of a term with axes."""
    if "..." in tokens:
        at, tail = tokens.index("..."), len(tokens) - tokens.index("...") - 1
        middle = rank - at - tail
        return [
            *((tokens[i], i) for i in range(at)),
            *((("...", middle - i), at + i) for i in range(middle)),
            *((tokens[len(tokens) - tail + i], rank - tail + i) for i in range(tail)),
        ]
    if "*" in tokens:
        at = tokens.index("*")
        return [*((tokens[i], i) for i in range(at)), *(("*", i) for i in range(at, rank))]
    if len(tokens) != rank:
        raise AnalysisError(f"the notation {' '.join(tokens)!r} has {len(tokens)} axes, the tensor has {rank}")
    return [(token, i) for i, token in enumerate(tokens)]


def labels_of_output(
    tokens: list[str], bound: Mapping[object, Labels], shape: tuple[int, ...]
) -> list[tuple[object, Labels]]:
    """Letter and labels of each axis of the output."""
    out: list[tuple[object, Labels]] = []
    for token in tokens:
        if token == "...":
            dots = sorted((k for k in bound if isinstance(k, tuple)), key=lambda k: -int(k[1]))
            out += [(k, bound[k]) for k in dots]
        elif token == "*":
            out += [("*", np.zeros(n, np.int64)) for n in shape[len(out) :]]
        else:
            out.append((token, bound[token]))
    return out
