"""The sizes of recurrent layers, which are numbers beside their weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from morph.analysis.recording import named_modules
from morph.plan import Resize, SetAttribute

_GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3, nn.RNN: 1, nn.RNNCell: 1}


def recurrent_edits(model: nn.Module, edits: Sequence[Resize]) -> list[SetAttribute]:
    """What torch's own recurrent layers need for new sizes, read off the sizes of their first layer's weights.

    Args:
        model: The model before; not touched.
        edits: The resized tensors.
    """
    lengths = {(edit.tensor, edit.axis): len(edit.index) for edit in edits}
    found: list[SetAttribute] = []
    for path, module in named_modules(model, remove_duplicate=False) if lengths else ():
        if type(module) not in _GATES:
            continue
        new = _sizes(path, module, lengths)
        old: dict[str, int] = {name: getattr(module, name) for name in new}
        found += [SetAttribute(path, name, old[name], new[name]) for name in new if new[name] != old[name]]
    return found


def _sizes(path: str, module: nn.Module, lengths: dict[tuple[str, int], int]) -> dict[str, int]:
    """The sizes of a layer whose tensors have these lengths where they change."""
    layer = "_l0" if isinstance(module, nn.RNNBase) else ""

    def length(name: str, axis: int) -> int:
        tensor = module._parameters[name]
        assert isinstance(tensor, Tensor)
        return lengths.get((f"{path}.{name}" if path else name, axis), tensor.shape[axis])

    sizes = {"input_size": length(f"weight_ih{layer}", 1)}
    sizes["hidden_size"] = length(f"weight_ih{layer}", 0) // _GATES[type(module)]
    if getattr(module, "proj_size", 0):
        sizes["proj_size"] = length(f"weight_hr{layer}", 0)
    return sizes
