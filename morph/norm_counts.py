"""What batch norms cost in a count that sees them: two for each element, as fvcore and thop count them."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from morph.analysis import Analysis
from morph.analysis.atoms import Labels
from morph.analysis.recording import Value
from morph.analysis.tags import operator_name


def batch_norm_operations(analysis: Analysis, times: Labels, gone: Container[str] = ()) -> int:
    """Two for each element that goes through a batch norm, for the whole batch that was analysed.

    Args:
        analysis: Of the model.
        times: For each label how many of it there will be.
        gone: Paths of modules that leave whole.
    """
    total = 0
    for call in analysis.recording.calls[: analysis.recording.evaluated]:
        if "batch_norm" in operator_name(call.target) and call.module not in gone:
            output = call.output if isinstance(call.output, Value) else call.output[0]
            axes = analysis.state.tag(output).axes
            kept = [int(times[labels].sum()) if len(labels) > 1 else len(labels) for labels in axes]
            total += 2 * int(np.prod(kept, dtype=np.int64))
    return total
