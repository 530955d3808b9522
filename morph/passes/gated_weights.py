"""Gates on the weights of a model's own modules, for models that have no traced graph.

A layer with weight ``W`` that reads ``x`` gives ``sum_c W[o, c] (g[c] x[c]) = sum_c (W[o, c] g[c]) x[c]``: gates in
front of it are gates on its weight, whatever its code does. The module stays where it is, of a class of its own class
that differs in what ``module.weight`` is: the parameter times its gates. This is how torch's own parametrisations work
(`torch.nn.utils.parametrize`), but parameters keep their names. In the forward of a plain convolution or linear layer
`morph.passes.gated_readers` spares the memory of the product.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from morph.passes.gated_readers import gated_input, gated_reader, spread
from morph.passes.gates import Gate, Tap, folds, form_of

GATES = "morph_gates"


class GatedModule:
    """What the class of a gated module adds to its own class; see `gated_class`."""

    morph_taps: dict[str, list[tuple[Gate, int]]]
    morph_folded: bool

    def gates_on(self, name: str) -> tuple[Tensor, int]:
        """The gates ``[n]`` of the weight called ``name``, and the axis of it that they multiply."""
        rows = []
        for gate, tap in self.morph_taps[name]:
            index = getattr(gate, f"index_{tap}")
            rows.append(gate.weight if index is None else spread(gate.weight, index))
        gate, tap = self.morph_taps[name][0]
        return functools.reduce(torch.mul, rows), gate.axes[tap]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with gates on its weight."""
        if not self.morph_folded:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        own: dict[str, Tensor | None] = self._parameters  # type: ignore[attr-defined]
        x = args[0] if args else kwargs["input"]
        weight = own["weight"]
        assert weight is not None
        return gated_reader(x, weight, own["bias"], self.gates_on("weight")[0], form_of(self))  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        plain, names = type(self).morph_origin  # type: ignore[attr-defined]
        state = dict(vars(self))
        if isinstance(self, nn.RNNBase):  # it keeps the products that its last run had, and makes them anew in each
            state["_flat_weights"] = [self._parameters.get(name) for name in self._flat_weights_names]
        return _empty, (plain, names), state


@functools.cache
def gated_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The class of modules of class ``plain`` with gates on the parameters called ``names``."""

    def gated(name: str) -> Any:
        def weight(self: Any) -> Tensor:
            return gated_input(self._parameters[name], *self.gates_on(name))

        return property(weight)

    members = {name: gated(name) for name in names}
    return type(f"Gated{plain.__name__}", (GatedModule, plain), {**members, "morph_origin": (plain, names)})


def _empty(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A gated module without its state, for copies and pickles."""
    kind = gated_class(plain, names)  # type: ignore[arg-type]
    return kind.__new__(kind)


def gate_weights(model: nn.Module, gates: Mapping[str, tuple[int, Sequence[Tap]]], axes: Mapping[str, int]) -> None:
    """Put gates of ones into a model, in place; outputs stay the same to the bit.

    Args:
        model: Its gated modules get other classes; everything else stays.
        gates: For each site its number of gates, and its taps; a tap names the weight that reads.
        axes: For each weight the axis that holds what it reads.
    """
    taps: dict[str, dict[str, list[tuple[Gate, int]]]] = {}
    for number, (name, (count, some)) in enumerate(gates.items()):
        gate = Gate(name, count, [(axes[tap.reader], tap.index) for tap in some])
        weight = model.get_parameter(some[0].reader)
        home = model.get_submodule(some[0].reader.rpartition(".")[0])
        home.add_module(f"{GATES}_{number}", gate.to(weight.device, weight.dtype))
        for place, tap in enumerate(some):
            path, _, own = tap.reader.rpartition(".")
            taps.setdefault(path, {}).setdefault(own, []).append((gate, place))
    for path, found in taps.items():
        module = model.get_submodule(path)
        vars(module).update(morph_taps=found, morph_folded=folds(module, ()))
        module.__class__ = gated_class(type(module), tuple(found))  # type: ignore[arg-type]
