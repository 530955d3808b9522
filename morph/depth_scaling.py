"""Build the deeper relative of a zoo network: more cells, fresh weights (Whettam 2020, the depth-scaled teachers).

This is for networks without residual blocks, where no copy can be inserted exactly. Nothing of the student's weights is
kept, and nothing is claimed about what the new network computes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from morph import zoo
from morph.counts import count, count_params
from morph.deepening import which_target
from morph.depth_policies import WORDS, DepthMetric
from morph.errors import NothingToGrowError, TargetError
from morph.plan import Plan, Record
from morph.policies import Fit
from morph.surgery import Result, environment, sizes, target_facts

_FAMILIES = (  # how a name is made from a depth, by how much that grows, and how many blocks that adds
    (re.compile(r"(darts-(?:v1-)?)(\d+)((?:x\d+)?)(?:-trained)?"), 1, 1),
    (re.compile(r"(densenet-bc-)(\d+)(-\d+)"), 6, 3),
)
_DEEPEST = 500


def can_scale_depth(arch: str | None) -> bool:
    """Whether ``arch`` names a zoo network that `scale_depth` knows, e.g. ``zoo:darts-10``."""
    return arch is not None and arch.startswith("zoo:") and _family(arch) is not None


def scale_depth(
    model: nn.Module,
    arch: str,
    example_inputs: Tensor,
    *,
    target_params: float | None = None,
    target_macs: float | None = None,
    blocks: int | None = None,
    fit: Fit = "first",
    seed: int = 0,
) -> Result:
    """Build the network of the same family that is as deep as the target asks, with fresh weights.

    Args:
        model: The student; only its size and its number of classes are used.
        arch: Its name, e.g. ``zoo:darts-10``.
        example_inputs: One batch to count with.
        target_params: Number of parameters wanted; give this, ``target_macs`` or ``blocks``.
        target_macs: Multiply-adds of one sample wanted.
        blocks: Number of cells (DARTS) or dense layers (DenseNet) to add.
        fit: As for `morph.deepening.deepen`.
        seed: Of the weights.

    Returns:
        The network and a record with ``weight_preserving`` false, an empty plan and no checks.

    Raises:
        NothingToGrowError: If ``arch`` names no network of a family whose depth can grow.
        TargetError: If there is not exactly one target, or it cannot be met.
        CountError: As `morph.counts.count`.

    Example:
        >>> import torch
        >>> from morph.zoo import build
        >>> teacher = scale_depth(build("darts-10"), "zoo:darts-10", torch.randn(1, 3, 32, 32), target_params=1.35e6)
        >>> teacher.record.details["architecture"], teacher.record.after["params"]
        ('zoo:darts-25', 1354980)
    """
    metric, target = which_target(target_params, target_macs, blocks)
    family = _family(arch)
    if family is None:
        raise NothingToGrowError(
            f"{arch}: is no DARTS or DenseNet of the zoo, whose depth could grow with fresh weights"
        )
    make, per_step = family
    classes = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].out_features
    before = count(model, example_inputs[:1])
    start = {"params": before.params, "macs": before.macs, "blocks": 0}[metric]

    @cache
    def size(steps: int) -> int:
        if metric == "blocks":
            return steps * per_step
        if metric == "macs":
            return count(zoo.architecture(make(steps), classes), example_inputs[:1].cpu()).macs
        with torch.device("meta"):
            return count_params(zoo.architecture(make(steps), classes))

    steps = _search(size, metric, target, fit, start)
    name = make(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        deeper = zoo.architecture(name, classes)
    deeper.train(model.training).to(example_inputs.device)
    record = Record(
        command="deepen",
        options={"policy": "depth of the family", f"target_{metric}": target, "fit": fit, "seed": seed},
        plan=Plan(()),
        before=sizes(before),
        after=sizes(count(deeper, example_inputs[:1])),
        checks=(),
        details={
            "weight_preserving": False,
            "architecture": f"zoo:{name}",
            "student": arch,
            "seed": seed,
            "blocks_added": steps * per_step,
            **target_facts(metric, target, size(steps)),
            "verified": "not verified: the network has fresh weights and computes something else",
        },
        environment=environment(model, example_inputs),
    )
    return Result(deeper, record)


def _family(arch: str) -> tuple[Callable[[int], str], int] | None:
    """How the name with so many more steps of depth is made, and how many blocks a step adds."""
    for pattern, step, blocks in _FAMILIES:
        if match := pattern.fullmatch(arch.removeprefix("zoo:")):
            head, depth, tail = match.groups()
            return partial(_name, head, depth, tail, step), blocks
    return None


def _name(head: str, depth: str, tail: str, step: int, steps: int) -> str:
    return f"{head}{int(depth) + step * steps}{tail}"


def _search(size: Callable[[int], int], metric: DepthMetric, target: int, fit: Fit, start: int) -> int:
    """The number of steps whose size fits the target; sizes rise with depth."""
    if target <= start:
        raise TargetError(
            f"the target of {target:,} {WORDS[metric]} is not above the {start:,} that the model has; "
            "deepening only adds"
        )
    reach = 1
    while size(reach) < target:
        reach *= 2
        if reach > _DEEPEST:
            raise TargetError(
                f"{target:,} {WORDS[metric]} would take more than {reach // 2:,} more steps of depth; with so many "
                f"the network has {size(reach // 2):,}: take a target up to that"
            )
    steps = bisect_left(range(reach + 1), target, lo=reach // 2, key=lambda n: size(n) if n else start)
    over, under = size(steps), size(steps - 1) if steps > 1 else start
    if over > target and (fit == "under" or (fit == "closest" and target - under < over - target)):
        steps -= 1
    if not steps:
        raise TargetError(
            f"--fit {fit}: one step of depth leads from {start:,} to {over:,} {WORDS[metric]}, past the target of "
            f"{target:,}; the nearest is {over:,}: take a higher target or --fit first"
        )
    return steps
