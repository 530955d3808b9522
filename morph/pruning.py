"""Prune a model: analyse, score, choose, cut, verify, record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor, nn

from morph.analysis import Analysis, Sizes, analyse, count_sizes
from morph.analysis.recording import Inputs, arguments_of, named_modules, tensors_of
from morph.carriers import Form
from morph.couplings import Choice, Coupling
from morph.errors import MorphError, TargetError
from morph.garbage import uncollected
from morph.model_config import with_config
from morph.plan import Check, Edit, Plan, Record
from morph.removal import Removed, Remover, checks_of, promise
from morph.selection import Heads, Normalise, Ranking, choose_families, choose_units, matches, schedule
from morph.surgery import Result, environment
from morph.unit_scores import GRADIENT, Score, score_units
from morph.verify import require

Loss = Callable[[Any, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a pruning; see `prune`."""

    ratio: float | None = None
    target_params: float | None = None
    target_macs: float | None = None
    score: Score = "l2"
    ranking: Ranking = "global"
    normalise: Normalise = "mean"
    minimum: int = 1
    multiple: int = 1
    ignore: Sequence[str] = ()
    ratios: Mapping[str, float] | None = None
    heads: Heads = "whole"
    seed: int = 0


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Loss | None = None,
    steps: int = 1,
    form: Form = "auto",
    verify: bool = True,
    on_step: Callable[[int, Sizes], None] = lambda step, sizes: None,
    **request: Any,
) -> Result:
    """Cut the least useful units out of a model.

    Every cut is exact: the new model computes what the model computes when every reader of a cut channel sees zero in
    its place. Where a norm runs over cut channels, it runs over those that stay, and the record says so.

    Args:
        model: Any module; not touched.
        example_inputs: A tensor, a tuple of arguments, or a mapping of named arguments; a batch of two or more.
        data: Batches ``(inputs, targets)`` for the scores that look at gradients; or mappings with ``labels`` in them.
        loss: Gives one value per sample from outputs and targets; cross-entropy if absent.
        steps: In how many steps to get there; scores are computed afresh before each.
        form: ``class`` for a module of the model's own class, ``graph`` for its traced graph, ``auto`` for the class
            wherever its code can carry the new sizes, and the graph elsewhere.
        verify: Whether to compare with the zeroing reference in float64.
        on_step: Told the number of each step and the sizes that it reached.
        **request: The fields of `Request`: one of ``ratio`` (share of the units), ``target_params``, ``target_macs``
            (multiply-adds of one sample); ``score`` (``l1``, ``l2``, ``bn``, ``taylor``, ``fisher``, ``random``, or a
            callable); ``ranking`` (``global`` or ``local``); ``normalise`` of scores between couplings (``mean``,
            ``macs``, ``params`` or None); ``minimum`` units of a coupling; ``multiple`` that widths shall be of;
            ``ignore``: patterns of couplings and tensors to leave whole; ``ratios`` by pattern; ``heads``: ``whole``,
            ``inside`` or ``both``; ``seed``.

    Raises:
        TargetError: Not exactly one target, one that is not below the present size, or one that cannot be reached; says
            the present size, or the nearest.
        TraceError: The model does not accept the inputs.
        AnalysisError, EditError: A rule does not fit, or no form of the model can carry a cut.
        CheckFailedError: The result differs from the zeroing reference.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> student = morph.prune(build("wrn-16-2"), torch.randn(2, 3, 32, 32), ratio=0.5)
        >>> student.record.after["params"] < 0.3 * student.record.before["params"]
        True
    """
    unknown = request.keys() - {f.name for f in dataclasses.fields(Request)}
    if unknown:
        raise TypeError(f"prune() got unexpected arguments: {', '.join(sorted(unknown))}")
    asked = Request(**request)
    if steps < 1:
        raise TargetError(f"steps must be at least 1, got {steps}")
    looks_at_data = callable(asked.score) or asked.score in GRADIENT  # then what is collected is not ours alone
    with nullcontext() if looks_at_data else uncollected():
        return _prune(model, example_inputs, asked, data, loss, steps, form, verify, on_step)


def _prune(
    model: nn.Module,
    example_inputs: Inputs,
    asked: Request,
    data: Iterable[tuple[Any, Any]] | None,
    loss: Loss | None,
    steps: int,
    form: Form,
    verify: bool,
    on_step: Callable[[int, Sizes], None],
) -> Result:
    """Analyse, score, choose, cut and check, step by step."""
    first = analyse(model, example_inputs)
    before, batch = first.sizes(), batch_of(example_inputs)
    _check_target(asked, _per_sample(before, batch))
    edits: list[Edit] = []
    checks: list[Check] = []
    removed: list[Removed] = []
    now, analysis, size = model, first, _per_sample(before, batch)
    cutter = _Cutter(example_inputs, data, loss, form)
    verified = "not verified: switched off"
    for number, target in enumerate(_targets(asked, before, batch, steps), 1):
        analysis = analyse(now, example_inputs) if number > 1 else first
        done = cutter.reach(now, analysis, target)
        if verify and not on_meta(now):
            try:
                found = checks_of(done, now, example_inputs, analysis)
            except MorphError:
                raise
            except Exception:  # code that does other things where there is no data, or on the data of the cut model
                analysis = analyse(now, example_inputs, with_data=True)
                done = cutter.reach(now, analysis, target)
                found = checks_of(done, now, example_inputs, analysis)
            checks += found
            require(tuple(checks))
            verified = promise(done, analysis)
        elif verify:
            verified = "not verified: the model has no data (meta device)"
        edits += done.plan.edits
        removed.append(done)
        now, size = done.model, _per_sample(count_sizes(analysis, done.times), batch)
        on_step(number, size)
    config: dict[str, Any] = {}
    if checks:
        now, settings, config = with_config(model, now, example_inputs)
        edits += settings
    record = Record(
        command="prune",
        options={**_options(asked), "steps": steps, "form": form, "verify": verify},
        plan=Plan(tuple(edits)),
        before=asdict(_per_sample(before, batch)),
        after=asdict(size),
        checks=tuple(checks),
        details={"weight_preserving": False, "verified": verified, **_details(first, removed), **config},
        environment=environment(model, example_inputs),
    )
    return Result(now, record)


@dataclasses.dataclass(frozen=True)
class _Cutter:
    """How models are scored and cut, in all steps alike; see `prune`."""

    inputs: Inputs
    data: Iterable[tuple[Any, Any]] | None
    loss: Loss | None
    form: Form

    def reach(self, model: nn.Module, analysis: Analysis, asked: Request) -> Removed:
        """Cut until the target is met: what had to be left whole is made up for elsewhere.

        Raises:
            TargetError: If the rest is not enough; says the nearest that can be reached.
        """
        found = self.cut(model, analysis, asked)
        done, left = found, found.left
        batch = batch_of(self.inputs)
        while found.left and _over(asked, _per_sample(analysis.sizes(found.choice), batch)) > 0:
            asked = dataclasses.replace(asked, ignore=(*asked.ignore, *sorted({item.coupling for item in found.left})))
            found = self.cut(model, analysis, asked)
            left = (*left, *found.left)
        return found if found is done else dataclasses.replace(found, left=left)

    def cut(self, model: nn.Module, analysis: Analysis, asked: Request) -> Removed:
        """Score, choose and cut once."""
        couplings = [
            c
            for c in choose_families(list(analysis.couplings.values()), asked.heads)
            if not matches(c, asked.ignore) and (asked.score not in GRADIENT or analysis.runs(c))
        ]
        scores = score_units(
            model, couplings, asked.score, inputs=self.inputs, data=self.data, loss=self.loss, seed=asked.seed
        )
        batch = batch_of(self.inputs)
        choice = choose_units(
            couplings,
            scores,
            lambda chosen: _per_sample(analysis.sizes(chosen), batch),
            ratio=asked.ratio,
            target_params=asked.target_params,
            target_macs=asked.target_macs,
            ranking=asked.ranking,
            minimum=asked.minimum,
            multiple=asked.multiple,
            normalise=asked.normalise,
            ratios=asked.ratios,
            heads=asked.heads,
        )
        return Remover(model, self.inputs, analysis, self.form).remove(repaired(analysis, choice, scores))


def _over(asked: Request, size: Sizes) -> float:
    """By how much a size is above the target; 0 where there is none."""
    if asked.target_params is not None:
        return size.params - asked.target_params
    return size.macs - asked.target_macs if asked.target_macs is not None else 0.0


def repaired(analysis: Analysis, choice: Choice, scores: Mapping[str, Tensor]) -> Choice:
    """``choice`` without the best unit of every axis that would lose its last position."""
    result = {name: np.asarray(units, np.int64) for name, units in choice.items()}
    for _ in range(1000):
        empty = analysis.emptied(result)
        if not empty:
            break
        back: set[int] = set()
        for axis in empty:
            held = set(analysis.units.on(axis.roots)[0].tolist())
            if not back.isdisjoint(held):  # another axis has brought one back: look again
                continue
            best = max(
                (
                    (float(scores[name][unit]), name, unit)
                    for name, units in result.items()
                    for unit in units.tolist()
                    if int(analysis.numbers[name][unit]) in held
                ),
                default=None,
            )
            if best is not None:
                result[best[1]] = result[best[1]][result[best[1]] != best[2]]
                back.add(int(analysis.numbers[best[1]][best[2]]))
    return result


def _check_target(asked: Request, present: Sizes) -> None:
    """Refuse a target that the model meets as it is."""
    for metric, target in (("params", asked.target_params), ("macs", asked.target_macs)):
        size = getattr(present, metric)
        if target is not None and not target < size:
            raise TargetError(
                f"the target of {target:,.0f} {metric} is not below the present {size:,}; cutting only removes"
            )


def _targets(asked: Request, before: Sizes, batch: int, steps: int) -> list[Request]:
    """What to ask for in each step: the target is approached in equal ratios."""
    if steps == 1:
        return [asked]
    if asked.ratio is not None:
        kept = (1 - asked.ratio) ** (1 / steps)
        return [dataclasses.replace(asked, ratio=1 - kept)] * steps
    size = _per_sample(before, batch)
    if asked.target_params is not None:
        return [dataclasses.replace(asked, target_params=t) for t in schedule(steps, size.params, asked.target_params)]
    if asked.target_macs is not None:
        return [dataclasses.replace(asked, target_macs=t) for t in schedule(steps, size.macs, asked.target_macs)]
    return [asked]


def batch_of(inputs: Inputs) -> int:
    """Number of samples: the first axis that all inputs share, else 1."""
    sizes = {len(t) for t in tensors_of(arguments_of(inputs)) if t.dim()}
    return sizes.pop() if len(sizes) == 1 else 1


def _per_sample(sizes: Sizes, batch: int) -> Sizes:
    return Sizes(sizes.params, sizes.macs // batch)


def on_meta(model: nn.Module) -> bool:
    """Whether a parameter has no data."""
    held = (module._parameters.values() for _, module in named_modules(model))
    return any(p is not None and p.is_meta for parameters in held for p in parameters)


def _options(asked: Request) -> dict[str, Any]:
    options = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    options["ignore"] = list(asked.ignore)
    options["ratios"] = dict(asked.ratios) if asked.ratios else None
    if callable(asked.score):
        options["score"] = getattr(asked.score, "__name__", type(asked.score).__name__)
    return options


def _details(first: Analysis, removed: Sequence[Removed]) -> dict[str, Any]:
    """What the record says of a pruning."""
    last = removed[-1]
    return {
        "traced": first.traced,
        "form": last.form,
        "why_graph": last.why_graph,
        "couplings": [_row(c, removed) for c in first.couplings.values()],
        "left": [asdict(item) for done in removed for item in done.left],
        "frozen": [asdict(item) for item in first.frozen[:20]],
        "unknown_operators": dict(first.unknown),
        "free_params": first.free(),
    }


def _row(coupling: Coupling, removed: Sequence[Removed]) -> dict[str, Any]:
    """One coupling: how many units it had, and how many are left."""
    gone = sum(len(done.choice.get(coupling.name, ())) for done in removed)
    return {
        "name": coupling.name,
        "units_before": coupling.units,
        "units_after": coupling.units - gone,
        "blocks": coupling.blocks,
        "statistics": len(coupling.statistics),
    }
