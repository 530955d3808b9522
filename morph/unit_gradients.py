"""Score units by gradients: the Taylor expansion of the loss, and the Fisher information of gates at one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from morph.couplings import Coupling, Place, Positions, Reader
from morph.errors import DataError, ProbeError
from morph.inputs import pair_of, plain
from morph.passes.probes import Probe
from morph.twins import clone, twin
from morph.unit_slices import gather_units, parameter_places, unit_sums

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Tensor]


@torch.enable_grad()
def taylor_scores(
    model: nn.Module, couplings: Sequence[Coupling], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """Score each unit by ``(sum of w * dL/dw)**2`` over its parameter entries, ``L`` being the mean loss of the data.

    This is the squared derivative of the loss with respect to a gate on the unit's parameters, an estimate of the
    squared change of the loss if they were zero (Molchanov et al., "Importance Estimation for Neural Network Pruning",
    CVPR 2019, section 3: the first-order score of a set of parameters behind one gate). An entry that lies on the unit
    by two axes counts on each. The model runs in evaluation mode.

    Args:
        model: Not touched; a copy is run.
        couplings: What to score.
        batches: ``(inputs, targets)`` pairs, gone through once.
        loss: Gives one value per sample.

    Raises:
        ProbeError: If ``loss`` does not give one finite value per sample, or a coupling receives no gradient.
        DataError: If a batch is not such a pair.
    """
    net = _copy(model)
    places = {c.name: parameter_places(c, dict(net.named_parameters())) for c in couplings}
    parameters = _ask_gradients(net, [place for found in places.values() for place in found])
    samples = 0
    for inputs, targets in checked(batches):
        values = _losses(net, inputs, targets, loss)
        _go_back(values)
        samples += len(values)
    products = {name: p.detach() * p.grad / samples for name, p in parameters.items() if p.grad is not None}
    reached = {name: [p for p in found if p.tensor in products] for name, found in places.items()}
    _require_reached(samples, [name for name, found in reached.items() if not found])
    return {
        name: torch.stack([unit_sums(products[p.tensor], p) for p in found]).sum(0).square()
        for name, found in reached.items()
    }


@torch.enable_grad()
def fisher_scores(
    model: nn.Module, couplings: Sequence[Coupling], batches: Iterable[Batch], loss: Loss
) -> dict[str, Tensor]:
    """Score each unit by the Fisher information of a gate fixed at one, where the unit is read.

    For the inputs ``A`` of the readers of a unit, ``g[n] = sum of A * dL_n/dA`` over readers, their calls, space, and
    the unit's positions, and the score is ``1/2 mean_n g[n]**2``: an estimate of the rise of the loss if every reader
    saw zero in the unit's place (Theis et al. 2018; summed over coupled readers before squaring as by Liu et al.,
    "Group Fisher Pruning", ICML 2021, which leaves out the factor). It is in the unit of the loss. A depthwise or
    grouped convolution that only hands the unit on is no end of it and is passed over.

    A reader without a module of its own (the projections inside ``nn.MultiheadAttention``) is scored through its
    weight, since ``sum of W * dL_n/dW`` is the same number. A unit that no parameter sums over (queries and keys) has
    ``g[n] = sum of w * dL_n/dw`` over all of its parameter entries instead, which is another scale than that of units
    with readers. These two ways, and activations whose first axis is not the samples, run one sample at a time.

    The model runs in evaluation mode, with all weights frozen that this does not need.

    Args:
        model: Not touched; a copy is run.
        couplings: What to score.
        batches: ``(inputs, targets)`` pairs, gone through once; samples lie on the first axis of every tensor.
        loss: Gives one value per sample: a mean would shrink every score by ``N**2``.

    Raises:
        ProbeError: If ``loss`` does not give one finite value per sample, or a coupling receives no gradient.
        DataError: If a batch is not such a pair.
    """
    return _Fisher(_copy(model), couplings, loss).scores(batches)


@dataclass(frozen=True)
class _Reading:
    """How one coupling is scored: inputs of modules, as ``(module, axis, positions)``, and weights."""

    inputs: tuple[tuple[str, int, Positions], ...]
    weights: tuple[Place, ...]


class _Fisher:
    """A copy of a model with hooks on what reads the units."""

    def __init__(self, net: nn.Module, couplings: Sequence[Coupling], loss: Loss) -> None:
        self.net, self.loss = net, loss
        modules = dict(net.named_modules(remove_duplicate=False))
        names = dict(net.named_parameters())
        self.units = {c.name: c.units for c in couplings}
        self.readings = {c.name: find_reading(c, modules, names) for c in couplings}
        self.parameters = _ask_gradients(net, [p for r in self.readings.values() for p in r.weights])
        self.probes: dict[tuple[str, int], list[Probe]] = {}
        for path, axis in sorted({(p, a) for r in self.readings.values() for p, a, _ in r.inputs}):
            self._watch(path, modules[path], axis)
        self.by_sample = bool(self.parameters)
        self.tested = False
        self.reached: set[str] = set()

    def scores(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Score each unit; see `fisher_scores`."""
        totals: dict[str, Tensor] = {}
        samples = 0
        for inputs, targets in checked(batches):
            for terms in self._terms(inputs, targets):
                for name, g in terms.items():
                    total = g.square().sum(0) / 2
                    totals[name] = totals[name] + total if name in totals else total
                samples += len(next(iter(terms.values()), ()))
        _require_reached(samples, [name for name in self.readings if name not in self.reached])
        return {name: total / samples for name, total in totals.items()}

    def _watch(self, path: str, module: nn.Module, axis: int) -> None:
        """Put a probe before each call of a module."""
        probes = self.probes[path, axis] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            probe = Probe(axis)
            probes.append(probe)
            if args:
                return (probe(args[0]), *args[1:]), kwargs
            first = next(iter(kwargs))
            return args, {**kwargs, first: probe(kwargs[first])}

        module.register_forward_pre_hook(before, with_kwargs=True)

    def _terms(self, inputs: Any, targets: Any) -> Iterator[dict[str, Tensor]]:
        """``g`` of each coupling, ``[samples, units]``, on a whole batch or on one sample after another."""
        if not self.by_sample:
            values = self._forward(inputs, targets)
            if self._backward(values):
                yield {name: self._collect(name, r, len(values)) for name, r in self.readings.items()}
                return
            self.by_sample = True
        for sample in split_samples(inputs, targets):
            for parameter in self.parameters.values():
                parameter.grad = None
            _go_back(self._forward(*sample))
            yield {name: self._collect(name, r, 1) for name, r in self.readings.items()}

    def _forward(self, inputs: Any, targets: Any) -> Tensor:
        for probes in self.probes.values():
            probes.clear()
        return _losses(self.net, inputs, targets, self.loss)

    def _backward(self, values: Tensor) -> bool:
        """Go back through a whole batch; false if the first axis of something watched is not the samples."""
        if len(values) > 1 and not self.tested and values.requires_grad:
            self.tested = True
            values[0].backward(retain_graph=True)
            if any(bool(g[1:].any()) for g in self._gradients()):
                return False
        _go_back(values)
        return len(values) == 1 or all(len(g) == len(values) for g in self._gradients())

    def _gradients(self) -> list[Tensor]:
        return [p.gradient for probes in self.probes.values() for p in probes if p.gradient is not None]

    def _collect(self, name: str, reading: _Reading, samples: int) -> Tensor:
        """``g [samples, units]`` of one coupling after a backward pass."""
        found = []
        for path, axis, positions in reading.inputs:
            gradients = [p.gradient for p in self.probes[path, axis] if p.gradient is not None and len(p.gradient)]
            rows = [g.sum(0, keepdim=True) if samples == 1 else g for g in gradients]
            found += [gather_units(row, positions) for row in rows]
        for place in reading.weights:
            w = self.parameters[place.tensor]
            if w.grad is not None:
                found.append(unit_sums(w.detach() * w.grad, place)[None])
        if not found:
            return torch.zeros(samples, self.units[name], dtype=torch.float64)
        self.reached.add(name)
        return torch.stack(found).sum(0)


def find_reading(coupling: Coupling, modules: Mapping[str, nn.Module], parameters: Container[str]) -> _Reading:
    """Find where the units of a coupling are read: inputs of modules where that is certain, else weights."""
    places = parameter_places(coupling, parameters)
    inputs: list[tuple[str, int, Positions]] = []
    weights: dict[tuple[str, int], Place] = {}
    for reader in coupling.readers:
        module = modules[reader.module]
        own = [p for p in places if p.tensor.rpartition(".")[0] == reader.module]
        if _hands_on(module, own):
            continue
        if _sums_its_input(module, own):
            inputs.append((reader.module, reader.axis, reader.positions))
            continue
        found = _weights_of(reader, coupling, places)
        if not found:
            return _Reading((), tuple(places))
        weights.update({(p.tensor, p.axis): p for p in found})
    if not inputs and not weights:
        return _Reading((), tuple(places))
    return _Reading(tuple(inputs), tuple(weights.values()))


def _hands_on(module: nn.Module, own: Sequence[Place]) -> bool:
    """Whether a convolution in groups still has the unit in its output."""
    if not isinstance(module, _ConvNd) or module.groups == 1 or not own:
        return False
    return module.groups == module.in_channels if module.transposed else all(p.axis != 1 for p in own)


def _sums_its_input(module: nn.Module, own: Sequence[Place]) -> bool:
    """Whether a module is one weight that sums over the module's first input, as linear layers and convolutions are."""
    if isinstance(module, nn.Linear | _ConvNd):
        return True
    matrices = [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1]
    held = [p.tensor.rpartition(".")[2] for p in own]
    return not list(module.children()) and len(matrices) == 1 and matrices[0] in held


def _weights_of(reader: Reader, coupling: Coupling, places: Sequence[Place]) -> list[Place]:
    """The weights ``[out, in]`` in a reader's module that take the unit at the positions of what is read."""
    others = {r.module for r in coupling.readers if r.module != reader.module}
    prefix = f"{reader.module}." if reader.module else ""
    return [
        place
        for place in places
        if place.axis == 1
        and place.tensor.startswith(prefix)
        and place.tensor.rpartition(".")[0] not in others
        and np.array_equal(place.positions, reader.positions)
    ]


def checked(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Give the batches, each checked to be a pair; a pair with a tensor in it, or a mapping, is one batch."""
    if isinstance(batches, Mapping) or (isinstance(batches, tuple) and any(isinstance(x, Tensor) for x in batches)):
        batches = (batches,)  # type: ignore[assignment]  # one batch
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping):
            yield pair_of(batch)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            yield plain(batch[0]), batch[1]
        else:
            raise DataError(f"batch {number} of the data is not a pair (inputs, targets) but {type(batch).__name__}")


def count_samples(inputs: Any) -> int:
    """Length of the first tensor of some inputs."""
    return next((len(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def split_samples(inputs: Any, targets: Any) -> Iterator[Batch]:
    """One batch for each sample: tensors as long as the first one are cut along their first axis, the rest stays."""
    samples = count_samples(inputs)

    def part(number: int, leaf: Any) -> Any:
        cuts = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == samples
        return leaf[number : number + 1] if cuts else leaf

    for number in range(samples):
        yield pytree.tree_map(lambda leaf, n=number: part(n, leaf), (inputs, targets))


def _losses(net: nn.Module, inputs: Any, targets: Any, loss: Loss) -> Tensor:
    """Run the copy; one loss per sample."""
    if isinstance(inputs, Mapping):
        outputs = net(**inputs)
    else:
        outputs = net(*inputs) if isinstance(inputs, tuple | list) else net(inputs)
    values = loss(outputs, targets)
    samples = count_samples(inputs)
    if not isinstance(values, Tensor) or values.shape != (samples,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ProbeError(f"the loss must give one value per sample, shape [{samples}], got {got}; use reduction='none'")
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise ProbeError(f"the loss of sample {bad} of a batch is {values[bad].item()}; inputs or weights not finite")
    return values


def _go_back(values: Tensor) -> None:
    """The gradients of all losses together; none where a sample passes by everything watched."""
    if values.requires_grad:
        values.sum().backward()


def _copy(model: nn.Module) -> nn.Module:
    try:
        return twin(model, clone)
    except Exception as error:
        raise ProbeError(f"{type(model).__name__} cannot be copied to be scored: {error}") from error


def _ask_gradients(net: nn.Module, places: Sequence[Place]) -> dict[str, nn.Parameter]:
    """Let the parameters of some places ask for gradients; gives them by name."""
    names = {place.tensor for place in places}
    found = {name: p for name, p in net.named_parameters() if name in names and p.is_floating_point()}
    for parameter in found.values():
        parameter.requires_grad_()
    return found


def _require_reached(samples: int, missing: Sequence[str]) -> None:
    """Refuse couplings that no gradient reached."""
    if not samples:
        raise ProbeError("there is no batch to score with; give data")
    if missing:
        raise ProbeError(
            f"{len(missing)} couplings receive no gradient from the loss on this data: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; they are unused or behind a detach: leave them out"
        )
