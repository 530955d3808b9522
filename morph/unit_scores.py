"""Score the units of couplings: how much a model would miss each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from morph.analysis.recording import named_tensors
from morph.couplings import Coupling
from morph.errors import ProbeError
from morph.scores import cross_entropy
from morph.unit_gradients import Batch, Loss, fisher_scores, taylor_scores
from morph.unit_slices import parameter_places, unit_sums

ScoreName = Literal["l1", "l2", "bn", "taylor", "fisher", "random"]
GRADIENT = ("taylor", "fisher")  # scores that only what evaluation runs can have
Score = ScoreName | Callable[[nn.Module, Coupling], Tensor]


def score_units(
    model: nn.Module,
    couplings: Iterable[Coupling] | Mapping[str, Coupling],
    score: Score,
    *,
    inputs: Any = None,
    data: Iterable[Batch] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Score every unit of some couplings; the lowest are those to drop first.

    The scores:

    * ``l1``, ``l2``: the magnitude of everything that the unit's parameters produce, scale and read: for each place
      the sum of ``|w|**p`` over the unit's slice (for ``l2`` the squared norm, no root), the mean over places, divided
      by the mean over the coupling's units. Buffers and, where there is anything else, biases do not count. These are
      the defaults of Torch-Pruning's ``GroupMagnitudeImportance`` (Fang et al., "DepGraph", CVPR 2023).
    * ``bn``: ``|gamma|`` of the BatchNorm weights that the unit lies on, their mean if there are several (Liu et al.,
      "Network Slimming", ICCV 2017). Not scaled between couplings.
    * ``taylor``, ``fisher``: see `morph.unit_gradients.taylor_scores` and `morph.unit_gradients.fisher_scores`.
    * ``random``: uniform in [0, 1).
    * A callable: ``f(model, coupling)`` gives one number per unit.

    By weights or gradients, the units of a coupling that lies on buffers alone score one.

    Args:
        model: Not touched, unless a callable does.
        couplings: What to score, as `morph.analysis.analyse` gives them.
        score: One of the names above, or a callable.
        inputs: For ``taylor`` and ``fisher`` without ``data``: one batch without targets; ``loss`` is then called with
            None as targets. A tensor, a tuple of arguments, or a mapping of named arguments.
        data: For ``taylor`` and ``fisher``: batches ``(inputs, targets)``, gone through once, or one pair of tensors.
        loss: For ``taylor`` and ``fisher``: gives one value per sample from outputs and targets; cross-entropy of
            logits ``[N, classes]`` if absent.
        seed: Of ``random``.

    Returns:
        For each coupling, by name: float64 ``[units]``, finite, on the CPU.

    Raises:
        ProbeError: If a coupling cannot be scored that way, or a score is not finite; names it. If the model is on the
            meta device and the score is neither random nor the user's own.
        DataError: If a batch is not a pair.
    """
    found = list(couplings.values() if isinstance(couplings, Mapping) else couplings)
    if callable(score):
        scores = {c.name: _called(score, model, c) for c in found}
    elif score in ("l1", "l2"):
        scores = _magnitudes(_parameters_of(model, score), found, 1 if score == "l1" else 2)
    elif score == "bn":
        scores = _batch_norm_scales(model, _parameters_of(model, score), found)
    elif score == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {c.name: torch.rand(c.units, generator=generator, dtype=torch.float64) for c in found}
    elif score in ("taylor", "fisher"):
        scores = _by_gradient(
            model,
            _parameters_of(model, score),
            found,
            score,
            _batches(score, inputs, data, loss),
            loss or cross_entropy,
        )
    else:
        raise ProbeError(f"score {score!r} is not one of {', '.join(get_args(ScoreName))}, nor a callable")
    if scores and not torch.cat(list(scores.values())).isfinite().all():
        for name, values in scores.items():
            _check_finite(name, values)
    return scores


def _parameters_of(model: nn.Module, score: str) -> dict[str, Tensor]:
    """The parameters of a model by name, if they have data to look at."""
    parameters = dict(named_tensors(model, ("_parameters",)))
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ProbeError(
            f"the score {score!r} looks at weights, and the model has none (meta device); take score='random' or a "
            f"function of your own"
        )
    return parameters


def _magnitudes(parameters: Mapping[str, Tensor], couplings: Sequence[Coupling], p: int) -> dict[str, Tensor]:
    """Mean over places of the sum of ``|w|**p``, over its mean."""
    places_of = {}
    for coupling in couplings:
        places = parameter_places(coupling, parameters)
        places_of[coupling.name] = [place for place in places if not _is_bias(place.tensor)] or places
    axes: dict[str, set[int]] = {}
    for places in places_of.values():
        for place in places:
            axes.setdefault(place.tensor, set()).add(place.axis)
    powers = _all_powers({name: parameters[name].detach() for name in axes}, axes, p)
    scores = {}
    for coupling in couplings:
        places = places_of[coupling.name]
        total = np.zeros(coupling.units)
        for place in places:
            found = powers[place.tensor][place.axis][place.positions]
            total += found[:, 0] if found.shape[1] == 1 else found.sum(1)
        total = total / len(places) if places else np.ones(coupling.units)
        mean = total.mean()
        with np.errstate(invalid="ignore"):  # what is not finite is refused by name
            scores[coupling.name] = torch.from_numpy(total / mean if mean > 0 else total)
    return scores


def _by_gradient(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    couplings: Sequence[Coupling],
    score: str,
    batches: Iterable[Batch],
    loss: Loss,
) -> dict[str, Tensor]:
    """Taylor or Fisher scores; ones where there is no parameter."""
    judged = [c for c in couplings if parameter_places(c, parameters)]
    found = (taylor_scores if score == "taylor" else fisher_scores)(model, judged, batches, loss) if judged else {}
    return {c.name: found.get(c.name, torch.ones(c.units, dtype=torch.float64)) for c in couplings}


_AT_ONCE = 2**18  # values that stay in the cache of a processor between being squared and being added up


def _all_powers(
    weights: Mapping[str, Tensor], axes: Mapping[str, set[int]], p: int
) -> dict[str, dict[int, NDArray[np.float64]]]:
    """By name and axis the sum of ``|w|**p`` at each position; vectors, of which there are many, together."""
    powers = {name: _powers(weight, axes[name], p) for name, weight in weights.items() if weight.dim() > 1}
    vectors = {name: weight.cpu().flatten() for name, weight in weights.items() if weight.dim() < 2}
    if vectors:
        together = _raised(torch.cat(list(vectors.values())).double(), p).numpy()
        ends = np.cumsum([len(vector) for vector in vectors.values()])[:-1]
        powers |= {name: {0: part} for name, part in zip(vectors, np.split(together, ends), strict=True)}
    return powers


def _powers(weight: Tensor, axes: set[int], p: int) -> dict[int, NDArray[np.float64]]:
    """For some axes the sum of ``|w|**p`` at each position, in one passage over the weight."""
    weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    rows, inner = weight.flatten(1), axes - {0}
    first: list[Tensor] = []
    rest: Tensor | None = None
    at_once = max(1, _AT_ONCE // max(1, rows.shape[1]))
    for part in rows.split(at_once) if len(rows) > at_once else [rows]:
        raised = _raised(part, p)
        if 0 in axes:
            first.append(raised.sum(1))
        if inner:
            more = raised.sum(0)
            rest = more.double() if rest is None else rest.add_(more)
    sums = {0: (first[0] if len(first) == 1 else torch.cat(first)).double()} if first else {}
    if rest is not None:
        each = rest.reshape(weight.shape[1:])
        plain = {a: len(rest) == weight.shape[a] for a in inner}  # nothing to add up, as in a convolution of one pixel
        sums |= {a: rest if plain[a] else each.transpose(0, a - 1).flatten(1).sum(1) for a in inner}
    return {axis: values.cpu().numpy() for axis, values in sums.items()}


def _raised(values: Tensor, p: int) -> Tensor:
    return values.abs() if p == 1 else values.square()


def _is_bias(name: str) -> bool:
    """Whether a parameter is a bias by its name, as ``fc.bias`` and ``in_proj_bias`` are."""
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias") or last.startswith("bias_")


def _batch_norm_scales(
    model: nn.Module, parameters: Mapping[str, Tensor], couplings: Sequence[Coupling]
) -> dict[str, Tensor]:
    """Mean of ``|gamma|`` over the BatchNorm weights that each unit lies on."""
    scales = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    places = {c.name: [p for p in parameter_places(c, parameters) if p.tensor in scales] for c in couplings}
    without = [name for name, found in places.items() if not found]
    if without:
        raise ProbeError(
            f"score 'bn' needs units that lie on BatchNorm weights; {len(without)} of {len(places)} couplings do not: "
            f"{', '.join(without[:3])}{', ...' if len(without) > 3 else ''}; leave them out or take another score"
        )
    return {
        name: torch.stack(
            [unit_sums(parameters[p.tensor].detach().abs(), p) / p.positions.shape[1] for p in found]
        ).mean(0)
        for name, found in places.items()
    }


def _batches(score: str, inputs: Any, data: Iterable[Batch] | None, loss: Loss | None) -> Iterable[Batch]:
    """The data, or the inputs as one batch without targets."""
    if data is not None:
        return data
    if inputs is None or loss is None:
        raise ProbeError(
            f"score {score!r} needs data, batches of (inputs, targets); or, with a loss that needs no targets, inputs"
        )
    return [(inputs, None)]


def _called(score: Callable[[nn.Module, Coupling], Tensor], model: nn.Module, coupling: Coupling) -> Tensor:
    """What a user's function gives, checked."""
    values = score(model, coupling)
    if not isinstance(values, Tensor) or values.shape != (coupling.units,):
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        name = getattr(score, "__name__", type(score).__name__)
        raise ProbeError(f"{name} must give a tensor of shape [{coupling.units}] for {coupling.name}, got {got}")
    return values.detach().double().cpu()


def _check_finite(name: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
    if bad:
        raise ProbeError(
            f"{name}: the score of {len(bad)} of {len(values)} units is not finite, first {values[bad[0]].item()} of "
            f"unit {bad[0]}; the weights or the data are not finite"
        )
