"""Widen a model: analyse, decide which units are copied, copy, verify, record."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor, nn

from morph.analysis import Analysis, Sizes, analyse, count_sizes
from morph.analysis.recording import Inputs
from morph.carriers import Form, LeftWhole
from morph.copies import Widened, Widener, check_growth
from morph.cut import apply_plan
from morph.errors import EditError, NothingToGrowError, TargetError
from morph.model_config import with_config
from morph.noise import noise_on_copies
from morph.plan import Check, Plan, Record, Resize
from morph.pruning import batch_of, on_meta
from morph.selection import matches
from morph.surgery import NOISE, Result, environment, moved_by_noise
from morph.unit_scores import GRADIENT, Score, score_units
from morph.verify import require

Copies = Mapping[str, Mapping[int, int]]
VERIFIED = "outputs in evaluation mode, float64, before and after"


def widen(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    ratio: float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    score: Score = "random",
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    ignore: Sequence[str] = (),
    form: Form = "auto",
    noise: float = 0.0,
    seed: int = 0,
    verify: bool = True,
) -> Result:
    """Copy units so that a model grows and computes what it did (Net2WiderNet, Chen et al. 2016, section 3.1).

    A copied unit produces the same values, and whoever reads it divides its weights by the number of copies. Where a
    norm runs over units (LayerNorm, GroupNorm), only whole multiples of all of them are exact: such couplings grow when
    ``ratio`` is 2 or more, and are left as they are otherwise, with the reason in the record. A unit is there 1, 2, 4
    or 8 times, never 3: a third of a weight is not exact in floating point. Dropout between a unit and its readers is
    exact in evaluation mode only.

    Args:
        model: Any module; not touched.
        example_inputs: A tensor, a tuple of arguments, or a mapping of named arguments; a batch of two or more.
        ratio: Units afterwards over units before, in every coupling; give this or one target.
        target_params: Number of parameters to reach; the smallest size not below it that equal ratios give.
        target_macs: The same for the multiply-adds of one sample.
        score: Which units are copied first, the highest of each coupling: ``fisher`` copies single channels by Fisher
            information; ``random`` as Net2WiderNet does.
        data: Batches ``(inputs, targets)`` for scores that look at gradients.
        loss: Gives one value per sample from outputs and targets.
        ignore: Patterns of couplings to leave as they are.
        form: As for `morph.prune`.
        noise: Standard deviation of noise on the weights that make the copies, over the root mean square of each
            parameter; 0 for none. Copies are equal and get equal gradients, and without noise only dropout lets them
            part. The function then moves: by how much is measured and told, beside the check of the copies themselves.
        seed: Of the random score and the noise.
        verify: Whether to compare outputs before and after, in float64.

    Raises:
        TargetError: Not exactly one of ratio and targets, or one below the present size or out of reach; noise below 0.
        NothingToGrowError: No coupling can be copied exactly; gives the first reasons.
        TraceError, AnalysisError, EditError: As for `morph.prune`.
        CheckFailedError: The result does not compute what the model does.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> teacher = morph.widen(build("wrn-16-2"), torch.randn(2, 3, 32, 32), ratio=1.25)
        >>> teacher.record.checks[0].passed
        True
    """
    if sum(v is not None for v in (ratio, target_params, target_macs)) != 1:
        raise TargetError("give one of ratio, target_params and target_macs")
    if not 0 <= noise < float("inf"):
        raise TargetError(f"noise is a relative standard deviation, 0 or above, got {noise}")
    if ratio is not None and ratio <= 1:
        raise TargetError(f"ratio must be above 1, got {ratio}")
    batch = batch_of(example_inputs)

    def carried(*, with_data: bool) -> tuple[_Policy, float, tuple[Widened, tuple[Check, ...], list[LeftWhole]]]:
        analysis = analyse(model, example_inputs, with_data=with_data)
        runs = [c for c in analysis.couplings.values() if score not in GRADIENT or analysis.runs(c)]
        wanted = [c for c in runs if not matches(c, ignore)]
        scores = score_units(model, wanted, score, inputs=example_inputs, data=data, loss=loss, seed=seed)
        widener = Widener(model, example_inputs, analysis, form)
        policy = _Policy(analysis, widener, {k: v.numpy() for k, v in scores.items()}, ignore)
        share = policy.ratio_for(target_params, target_macs, batch) if ratio is None else ratio
        return policy, share, _carried(policy, share, model, example_inputs, verify=verify)

    try:
        policy, ratio, (widened, checks, left) = carried(with_data=False)
    except RuntimeError:  # code that does other things where there is no data
        policy, ratio, (widened, checks, left) = carried(with_data=True)
    analysis = policy.analysis
    if noise:
        widened, checks = _noisy(widened, checks, analysis, model, example_inputs, noise, seed)
    config: dict[str, Any] = {}
    if checks:
        wide, settings, config = with_config(model, widened.model, example_inputs)
        widened = dataclasses.replace(widened, model=wide, plan=Plan((*widened.plan.edits, *settings)))
    before = analysis.sizes()
    after = count_sizes(analysis, policy.widener.times({n: _times(policy, n, ratio, widened) for n in widened.copies}))
    record = Record(
        command="widen",
        options={
            "ratio": ratio,
            "target_params": target_params,
            "target_macs": target_macs,
            "score": score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__),
            "ignore": list(ignore),
            "form": form,
            "noise": noise,
            "seed": seed,
            "verify": verify,
        },
        plan=widened.plan,
        before={"params": before.params, "macs": before.macs // batch},
        after={"params": after.params, "macs": after.macs // batch},
        checks=checks,
        details={**_details(widened, checks, left, analysis, noise), **config},
        environment=environment(model, example_inputs),
    )
    return Result(widened.model, record)


def _details(
    widened: Widened, checks: tuple[Check, ...], left: list[LeftWhole], analysis: Analysis, noise: float
) -> dict[str, Any]:
    """What the record says of a widening."""
    return {
        "weight_preserving": not noise,
        "verified": VERIFIED + (f"; then {NOISE}" if noise else "") if checks else "not verified",
        "traced": analysis.traced,
        "form": widened.form,
        "why_graph": widened.why_graph,
        "copied": {name: units.tolist() for name, units in widened.copies.items()},
        "left": [asdict(item) for item in left],
        "unknown_operators": dict(analysis.unknown),
    }


def _noisy(
    widened: Widened,
    checks: tuple[Check, ...],
    analysis: Analysis,
    model: nn.Module,
    inputs: Inputs,
    noise: float,
    seed: int,
) -> tuple[Widened, tuple[Check, ...]]:
    """The wider model with noise on its copies; by how much that moves it is told where the copies were checked."""
    resizes = [edit for edit in widened.plan.edits if isinstance(edit, Resize)]
    edits = noise_on_copies(widened.model, resizes, analysis.parameters, noise, seed)
    noisy = apply_plan(widened.model, Plan(tuple(edits)))
    plan = Plan((*widened.plan.edits, *edits))
    if checks:
        checks = (*checks, moved_by_noise(model, noisy, inputs))
        require(checks)
    return dataclasses.replace(widened, model=noisy, plan=plan), checks


class _Policy:
    """Decides which units are copied at a ratio."""

    def __init__(
        self, analysis: Analysis, widener: Widener, scores: Mapping[str, np.ndarray], ignore: Sequence[str]
    ) -> None:
        self.analysis, self.widener, self.scores = analysis, widener, scores
        self.left: list[LeftWhole] = []
        self.free: list[str] = []
        self.together: list[str] = []
        for name, coupling in analysis.couplings.items():
            norm = widener.only_together(name)
            reason = widener.obstacle(name) or (f"{norm[1:]} runs over them" if norm.startswith("!") else "")
            if coupling.blocks > 1:
                reason = reason or "positions inside groups or heads; whole ones are copied"
            if name not in scores:
                reason = "asked to be left" if matches(coupling, ignore) else "no score: only training uses it"
            if reason:
                self.left.append(LeftWhole(name, 0, reason))
            else:
                (self.together if norm else self.free).append(name)
        if not self.free and not self.together:
            first = self.left[0].reason if self.left else "the model has no couplings"
            raise NothingToGrowError(
                f"no unit can be copied exactly: {len(self.left)} couplings are left, e.g. {first}"
            )

    def copies(self, ratio: float) -> dict[str, dict[int, int]]:
        """How often each copied unit is there at a ratio: the highest scores are copied first."""
        found: dict[str, dict[int, int]] = {}
        times = 2 ** int(np.log2(ratio))  # a half and a quarter are exact in every floating-point type, a third is not
        for name in self.free:
            units = self.analysis.couplings[name].units
            extra = round(units * (ratio / times - 1))
            counts = np.full(units, times)
            counts[np.argsort(-self.scores[name], kind="stable")[:extra]] *= 2
            found[name] = {u: int(c) for u, c in enumerate(counts) if c > 1}
        if times > 1:
            for name in self.together:
                found[name] = dict.fromkeys(range(self.analysis.couplings[name].units), times)
        return {name: some for name, some in found.items() if some}

    def sizes(self, ratio: float, batch: int) -> Sizes:
        """Parameters, and multiply-adds of one sample, at a ratio."""
        sizes = count_sizes(self.analysis, self.widener.times(self.copies(ratio)))
        return Sizes(sizes.params, sizes.macs // batch)

    def ratio_for(self, params: float | None, macs: float | None, batch: int) -> float:
        """The smallest ratio, on a grid of a thousandth, that reaches the target.

        Raises:
            TargetError: If the target is not above the present size, or out of reach.
        """
        metric, target = ("params", params) if params is not None else ("macs", macs)
        assert target is not None
        present = getattr(self.sizes(1.0, batch), metric)
        if target <= present:
            raise TargetError(f"the target of {target:,.0f} {metric} is not above the present {present:,}")
        low, high = 1000, 2000
        while getattr(self.sizes(high / 1000, batch), metric) < target:
            low, high = high, high * 2
            if high > 64000:
                reach = getattr(self.sizes(64.0, batch), metric)
                raise TargetError(
                    f"the target of {target:,.0f} {metric} is out of reach: 64 times as wide has {reach:,}"
                )
        while high - low > 1:
            middle = (low + high) // 2
            if getattr(self.sizes(middle / 1000, batch), metric) < target:
                low = middle
            else:
                high = middle
        return high / 1000


def _carried(
    policy: _Policy, ratio: float, model: nn.Module, inputs: Inputs, *, verify: bool
) -> tuple[Widened, tuple[Check, ...], list[LeftWhole]]:
    """Widen and check; if reshaped couplings turn out not to be exact, once more without them."""
    wanted = policy.copies(ratio)
    left = list(policy.left)
    if not wanted:
        raise NothingToGrowError(
            f"nothing to copy at ratio {ratio}: {len(policy.together)} couplings need a whole ratio of 2 or more"
        )
    if ratio < 2:
        left += [
            LeftWhole(name, 0, f"{policy.widener.only_together(name)} runs over them: exact from a ratio of 2 on")
            for name in policy.together
        ]
    if not verify or on_meta(model):
        sure = _without_reshaped(policy, wanted, left, "reshaped: copied only where the result is measured")
        widened = policy.widener.widen(sure)
        return widened, (), [*left, *widened.left]
    widened = policy.widener.widen(wanted)
    checks = check_growth(widened, model, inputs)
    if not all(check.passed for check in checks):
        done = {name: some for name, some in wanted.items() if name in widened.copies}
        left += widened.left
        sure = _without_reshaped(policy, done, left, "copies do not line up after its reshapes (measured)")
        widened = policy.widener.widen(sure)
        checks = check_growth(widened, model, inputs)
    require(checks)
    return widened, checks, [*left, *widened.left]


def _without_reshaped(policy: _Policy, wanted: Copies, left: list[LeftWhole], reason: str) -> Copies:
    """The couplings whose labels no reshape splits or merges; the others are added to ``left``.

    Raises:
        EditError: If there are none.
    """
    sure = {name: some for name, some in wanted.items() if not policy.widener.reshaped(name)}
    if not sure:
        raise EditError(f"no copies are sure to be exact: all {len(wanted)} couplings are {reason}")
    left += [LeftWhole(name, len(some), reason) for name, some in wanted.items() if name not in sure]
    return sure


def _times(policy: _Policy, name: str, ratio: float, widened: Widened) -> dict[int, int]:
    """How often the units of a coupling are there in what was carried out."""
    every = policy.copies(ratio)[name]
    return {int(u): every[int(u)] for u in widened.copies[name]}
