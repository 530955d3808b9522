"""Find a cheaper student: cheap blocks for convolutions, ranked by Fisher potential.

BlockSwap (Turner, Crowley, O'Boyle, Storkey, Gray, ICLR 2020) draws random choices of one block type for each residual
block, keeps those whose size is within 2.5 % of what is wanted, and takes the one whose blocks have the largest sum of
Fisher scores on one batch. The result computes something else than the model that came in: it is to be trained, by
distillation from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from morph.batches import Batch, Data, choose_target, describe_data, stream_batches
from morph.configurations import Drawn, Site, draw_configurations, find_sites
from morph.counts import count
from morph.cut import apply_plan
from morph.errors import DataError, EditError, ProbeError
from morph.inputs import picked, samples_in
from morph.passes.cheap_blocks import STANDARD, make_block
from morph.passes.regroup import Left
from morph.plan import Plan, Record, Substitute
from morph.policies import Metric
from morph.scores import FisherProbe, Loss, cross_entropy
from morph.surgery import Result, environment, require_size, sizes, target_facts
from morph.tracing import Trace, trace

CHOICES = (STANDARD, "G2", "G4", "G8", "G16", "B2", "B4")


@dataclass(frozen=True)
class Scored:
    """A configuration that was ranked.

    Attributes:
        choices: The block of each site.
        params: Parameters of the model with it.
        macs: Multiply-adds of one sample.
        score: Sum of the Fisher scores of all sites.
    """

    choices: tuple[str, ...]
    params: int
    macs: int
    score: float


def substitute(
    model: nn.Module,
    data: Data,
    *,
    target_params: float | None = None,
    target_macs: float | None = None,
    choices: Sequence[str] = CHOICES,
    candidates: int = 1000,
    window: float = 0.025,
    at: Sequence[str] | None = None,
    loss: Loss = cross_entropy,
    batch_size: int = 128,
    seed: int = 0,
    on_candidate: Callable[[int, Scored], None] = lambda done, scored: None,
) -> Result:
    """Replace convolutions by cheap blocks until the model has a wanted size, choosing them by Fisher potential.

    Each block of the model takes one of ``choices`` for all its convolutions that have one group and a kernel larger
    than 1. Random configurations whose size is inside the window are ranked by the sum over the blocks of their Fisher
    score (`morph.scores.fisher`) on one batch, with batch normalisation by the statistics of that batch, since new
    blocks have none of their own. A residual block is probed at the end of its branch, before the sum; any other at its
    output. Weights of what is not replaced are kept, new blocks are drawn by ``seed``: a block that two configurations
    share has the same weights in both, and the result is the network that was ranked, to the bit.

    Configurations are drawn so that those of the same size are equally likely, and the mean size is the target.

    Args:
        model: The teacher; not touched.
        data: What to rank with, as for `morph.expand`; one batch is used.
        target_params: Number of parameters wanted; give this or ``target_macs``.
        target_macs: Multiply-adds of one sample wanted (1 multiply-add = 1).
        choices: Blocks to choose from: ``S`` (as it is), ``G4`` (4 groups, then 1x1), ``B2`` (1x1 down to half the
            channels, convolution, 1x1 up); see `morph.passes.cheap_blocks`.
        candidates: How many configurations to rank.
        window: Largest distance from the target, relative to it.
        at: Names or patterns of the modules that take one choice each; None takes each repeated block, or, in a model
            without those, each convolution.
        loss: Gives one value per sample from outputs and targets.
        batch_size: Samples in the batch.
        seed: Of the order of the data, the configurations and the new weights.
        on_candidate: Told how many configurations are ranked, and the last of them, for progress displays.

    Raises:
        TargetError: Not exactly one target, or one that no configuration meets; says what can be reached.
        NothingToGrowError: No convolution can be replaced by any of ``choices``; says why.
        EditError: A choice is not a block, or the seed is below 0.
        TraceError, ProbeError, CountError, DataError: As their names say.
        CheckFailedError: The result is not of the size decided.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> teacher = build("wrn-16-2")
        >>> batch = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
        >>> student = morph.substitute(teacher, batch, target_params=300e3, candidates=2)
        >>> 292_500 <= student.record.after["params"] <= 307_500
        True
    """
    metric, target = choose_target(target_params, target_macs)
    if seed < 0:
        raise EditError(f"a seed of {seed}; give 0 or more")
    batch = next(stream_batches(data, batch_size, seed, next(model.parameters()).device))
    if samples_in(batch[0]) < 2:
        raise DataError("one sample is too few: the ranking normalises by the statistics of its batch; give two")
    traced = trace(model, picked(batch[0], slice(0, 2)))
    sites, left = find_sites(traced, tuple(dict.fromkeys(choices)), at)
    before = count(model, picked(batch[0], slice(0, 1)))
    drawn = draw_configurations(sites, sizes(before), metric, target, window=window, candidates=candidates, seed=seed)
    ranked = _rank(traced, sites, drawn, batch, loss, seed, on_candidate)
    _check_scores(ranked)
    best = max(ranked, key=lambda scored: scored.score)
    plan = Plan(_edits(traced, sites, best.choices, seed))
    student = apply_plan(model, plan)
    after = count(student, picked(batch[0], slice(0, 1)))
    require_size(after, best)
    record = Record(
        command="substitute",
        options={
            f"target_{metric}": target,
            "choices": list(choices),
            "candidates": candidates,
            "window": window,
            "at": list(at) if at else None,
            "batch_size": batch_size,
            "seed": seed,
        },
        plan=plan,
        before=sizes(before),
        after=sizes(after),
        checks=(),
        details=_details(sites, left, drawn, ranked, best, metric, target),
        environment={**environment(model, batch[0]), "data": describe_data(data)},
    )
    return Result(student, record)


def _rank(
    traced: Trace,
    sites: Sequence[Site],
    drawn: Drawn,
    batch: Batch,
    loss: Loss,
    seed: int,
    on_candidate: Callable[[int, Scored], None],
) -> list[Scored]:
    """Score every configuration on one batch; blocks are swapped in one probed graph, which is a copy of the model."""
    probe = FisherProbe(traced, [site.cell for site in sites], loss)
    graph = probe.module
    blocks: dict[tuple[str, str], nn.Module] = {
        (path, STANDARD): traced.root.get_submodule(path) for site in sites for path in site.convs
    }
    ranked: list[Scored] = []
    for row, size in zip(drawn.configurations, drawn.sizes, strict=True):
        names = tuple(site.choices[i] for site, i in zip(sites, row, strict=True))
        for edit in _edits(traced, sites, names, seed):
            if (edit.module, edit.choice) not in blocks:
                conv = blocks[edit.module, STANDARD]
                blocks[edit.module, edit.choice] = make_block(conv, edit.choice, edit.seed)  # type: ignore[arg-type]
        for site, name in zip(sites, names, strict=True):
            for path in site.convs:
                graph.set_submodule(path, blocks[path, name])
        for module in graph.modules():
            if isinstance(module, _BatchNorm):
                module.train()
        scored = Scored(names, size.params, size.macs, sum(probe.scores([batch]).cells().values()))
        ranked.append(scored)
        on_candidate(len(ranked), scored)
    return ranked


def _edits(traced: Trace, sites: Sequence[Site], names: Sequence[str], seed: int) -> tuple[Substitute, ...]:
    """The edits of a configuration; each convolution has a seed of its own, whatever the others become."""
    places = [(path, name) for site, name in zip(sites, names, strict=True) for path in site.convs]
    return tuple(
        Substitute(path, name, tuple(traced.root.get_parameter(f"{path}.weight").shape), seed + i)
        for i, (path, name) in enumerate(places)
        if name != STANDARD
    )


def _check_scores(ranked: Sequence[Scored]) -> None:
    """Refuse scores that rank nothing."""
    if wrong := [scored for scored in ranked if not math.isfinite(scored.score)]:
        raise ProbeError(
            f"the Fisher potential of {len(wrong)} of {len(ranked)} configurations is not finite; the weights or the "
            f"images are too large"
        )
    if all(scored.score == 0 for scored in ranked):
        raise ProbeError(
            "the Fisher potential of every configuration is 0, since the residual branches end in weights that are "
            "zero, as before training; train the model first, or give those weights other values"
        )


def _details(
    sites: Sequence[Site],
    left: Sequence[Left],
    drawn: Drawn,
    ranked: Sequence[Scored],
    best: Scored,
    metric: Metric,
    target: int,
) -> dict[str, Any]:
    """What the record says of this substitution."""
    return {
        "weight_preserving": False,
        "verified": "nothing to verify: new blocks are drawn afresh, so the new model computes something else",
        "weights": "kept where nothing was replaced, drawn afresh in the new blocks",
        **target_facts(metric, target, getattr(best, metric)),
        "reachable": list(drawn.reachable),
        "configurations": math.prod(len(site.choices) for site in sites),
        "drawn": drawn.drawn,
        "outside_window": drawn.outside,
        "repeated": drawn.repeated,
        "scores": "sum over the blocks of 1/2 mean over samples of g**2, g the gradient of each channel's gate at one; "
        "one batch, batch normalisation by its statistics",
        "score": best.score,
        "candidates": [asdict(scored) for scored in ranked],
        "blocks": [_row(site, name) for site, name in zip(sites, best.choices, strict=True)],
        "left": [asdict(item) for item in left],
    }


def _row(site: Site, name: str) -> Mapping[str, Any]:
    """One block of the record; sizes are those of its replaceable convolutions."""
    before, after = site.sizes[STANDARD], site.sizes[name]
    return {
        "name": site.cell.name,
        "choice": name,
        "convolutions": list(site.convs),
        "params_before": before.params,
        "params_after": after.params,
        "macs_before": before.macs,
        "macs_after": after.macs,
        "unavailable": dict(site.unavailable),
    }
