"""A second, slow and obvious implementation of what a cut must compute, and what tests of cuts share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morph.analysis import Analysis, analyse
from morph.couplings import Choice
from morph.removal import Removed, Remover


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Floating-point outputs in evaluation mode and float64; a copy runs."""
    twin = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            outputs = twin(**inputs)
        else:
            outputs = twin(*inputs) if isinstance(inputs, tuple) else twin(inputs)
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    return [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.is_floating_point()]


def gap(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Largest difference over the largest value; infinite if a shape differs."""
    if [t.shape for t in left] != [t.shape for t in right] or not left:
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(left, right, strict=True))


class KeptLayerNorm(nn.Module):
    """A LayerNorm on the last axis whose statistics run over the kept positions; zero elsewhere."""

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, kept

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., self.kept]
        mean, var = kept.mean(-1, keepdim=True), kept.var(-1, keepdim=True, unbiased=False)
        y = (x - mean) / torch.sqrt(var + self.norm.eps) * self.norm.weight
        y = y if self.norm.bias is None else y + self.norm.bias
        mask = torch.zeros(x.shape[-1], dtype=x.dtype)
        mask[self.kept] = 1
        return y * mask


class KeptGroupNorm(nn.Module):
    """A GroupNorm each of whose groups has statistics over its kept channels; zero elsewhere."""

    def __init__(self, norm: nn.GroupNorm, kept: Tensor) -> None:
        super().__init__()
        self.norm, self.kept = norm, set(kept.tolist())

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        size = self.norm.num_channels // self.norm.num_groups
        for group in range(self.norm.num_groups):
            own = [c for c in range(group * size, (group + 1) * size) if c in self.kept]
            if own:
                y[:, own] = F.group_norm(x[:, own], 1, self.norm.weight[own], self.norm.bias[own], self.norm.eps)
        return y


def gone_positions(analysis: Analysis, choice: Choice) -> dict[tuple[str, int], Tensor]:
    """What a choice takes, by tensor and axis, read off the places of its couplings."""
    gone: dict[tuple[str, int], list[int]] = {}
    for name, units in choice.items():
        for place in analysis.couplings[name].places:
            gone.setdefault((place.tensor, place.axis), []).extend(place.positions[list(units)].ravel().tolist())
    return {key: torch.tensor(sorted(set(positions))) for key, positions in gone.items()}


def slow_zeroed(model: nn.Module, analysis: Analysis, choice: Choice) -> nn.Module:
    """A copy of the same size with zeros on every place of every chosen unit; norms run over what stays."""
    twin = copy.deepcopy(model).double().eval()
    gone = gone_positions(analysis, choice)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for (tensor, axis), positions in gone.items():
            direction = tensor.endswith("original1") and axis == 0  # weight_norm divides by its length
            if tensor in parameters and not direction:
                parameters[tensor].index_fill_(axis, positions, 0)
    for path, module in list(twin.named_modules()):
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            whole = torch.arange(len(module.weight))
            kept = whole[~torch.isin(whole, gone.get((f"{path}.weight", 0), torch.tensor([-1])))]
            kind = KeptLayerNorm if isinstance(module, nn.LayerNorm) else KeptGroupNorm
            twin.set_submodule(path, kind(module, kept))
    return twin


def some_units(analysis: Analysis, seed: int, names: Sequence[str] = ()) -> Choice:
    """Random units, a third of each coupling (of ``names`` or all), such that no axis is emptied."""
    generator = np.random.default_rng(seed)
    choice: Choice = {}
    for name in names or analysis.couplings:
        units = analysis.couplings[name].units
        more = {**choice, name: np.sort(generator.choice(units, max(1, units // 3), replace=False))}
        if not analysis.emptied(more):
            choice = more
    return choice


def cut(model: nn.Module, inputs: Any, choice: Choice | None = None, seed: int = 0, **options: Any) -> Removed:
    """Analyse, and remove a choice or random units."""
    analysis = analyse(model, inputs)
    return Remover(model, inputs, analysis, **options).remove(choice or some_units(analysis, seed))
