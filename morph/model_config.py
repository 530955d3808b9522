"""Let the configuration that a model of transformers carries follow its new sizes, so that it opens from it again."""

from __future__ import annotations

import copy
import itertools
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from morph.analysis.recording import Inputs
from morph.cut import apply_plan
from morph.plan import Plan, SetConfig
from morph.removal import LIMIT, compare
from morph.resizing import set_config
from morph.zeroing import run_doubled

Shapes = Mapping[str, tuple[int, ...]]
_ROUNDS, _TRIES, _MOST = 8, 12, 512


def follow_config(before: nn.Module, after: nn.Module, inputs: Inputs) -> tuple[list[SetConfig], str]:
    """The sizes in ``before.config`` with which its class builds a model that takes the tensors of ``after``.

    Whether it does is tried: the model is built, gets the tensors, and its outputs are compared in float64.

    Args:
        before: The model that came in; not touched.
        after: What became of it, of the same class; not touched.
        inputs: One batch.

    Returns:
        The edits, and why there are none if the configuration cannot follow; neither where there is none, or nothing
        to change.
    """
    if not _has_config(before) or type(after) is not type(before):
        return [], ""
    old, wanted = _shapes(before), _shapes(after)
    if old == wanted:
        return [], ""
    uneven = _uneven(old, wanted)
    if uneven:
        return [], f"config keeps the old sizes: it has one number for all layers, and {uneven}"
    options = _options(before, old, wanted)
    first = _search(before, options, wanted)
    if first is None:
        return [], "config keeps the old sizes: no other numbers in it give these shapes"
    reason, outputs = "", run_doubled(after, inputs)
    for edits in islice(_of_these_shapes(before, first, options, wanted), _TRIES):
        reason = _differs(before, after, edits, inputs, outputs)
        if not reason:
            return edits, ""
    return [], f"config keeps the old sizes: {reason}"


def _of_these_shapes(
    before: nn.Module, first: list[SetConfig], options: list[list[SetConfig]], wanted: Shapes
) -> Iterator[list[SetConfig]]:
    """What was found, then all others that give the same shapes: half the heads, or heads of half the size."""
    yield first
    every = itertools.product(*([None, *some] for some in options))
    for some in islice(every, _MOST):
        edits = [edit for edit in some if edit is not None]
        if set(edits) != set(first) and not _wrong(before, edits, wanted):
            yield edits


def _differs(
    before: nn.Module, after: nn.Module, edits: list[SetConfig], inputs: Inputs, outputs: Sequence[Tensor]
) -> str:
    """Why a model built with these numbers is not ``after``, or that with them another; empty if they are the same."""
    try:
        rebuilt = _built(before, edits, None)
        rebuilt.load_state_dict(after.state_dict())
        told = apply_plan(after, Plan((*edits,)))
        checks = [compare("config", outputs, model, inputs, LIMIT) for model in (rebuilt, told)]
    except Exception as error:  # whatever the class raises when it is built or run
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "" if all(check.passed for check in checks) else "a model built from the new ones computes something else"


def with_config(
    before: nn.Module, after: nn.Module, inputs: Inputs
) -> tuple[nn.Module, list[SetConfig], dict[str, Any]]:
    """``after`` with a configuration that follows, the edits, and what the record says of it; see `follow_config`."""
    edits, reason = follow_config(before, after, inputs)
    if not edits:
        return after, [], {"config": reason} if reason else {}
    return apply_plan(after, Plan((*edits,))), edits, {"config": {e.setting: [e.value, e.new] for e in edits}}


def _has_config(model: nn.Module) -> bool:
    module = sys.modules.get("transformers.configuration_utils")
    kind = getattr(module, "PreTrainedConfig", None) or getattr(module, "PretrainedConfig", None)
    return kind is not None and isinstance(getattr(model, "config", None), kind)


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _uneven(old: Shapes, new: Shapes) -> str:
    """Two tensors of equal name but for numbers and of equal shape that have other shapes now; empty if none."""
    first: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, shape in old.items():
        known = first.setdefault((re.sub(r"\d+", "#", name), shape), name)
        if new.get(name) != new.get(known):
            return f"{known} is {list(new.get(known, ()))}, {name} {list(new.get(name, ()))}"
    return ""


def _search(before: nn.Module, options: list[list[SetConfig]], wanted: Shapes) -> list[SetConfig] | None:
    """Change one number after another, or two at once, as long as more shapes become right; None if some stay wrong."""
    chosen: dict[str, SetConfig] = {}
    wrong = _wrong(before, [], wanted)
    for _ in range(_ROUNDS):
        best = chosen
        for some in _moves(options):
            tried = {**chosen, **{edit.setting: edit for edit in some}}
            found = _wrong(before, list(tried.values()), wanted)
            if found < wrong:
                best, wrong = tried, found
            if not wrong:
                return [edit for edit in best.values() if edit.new != edit.value]
            if best is not chosen and len(some) == 2:
                break
        if best is chosen:
            return None
        chosen = best
    return None


def _moves(options: list[list[SetConfig]]) -> Iterator[tuple[SetConfig, ...]]:
    """Every change of one number, then every one of two."""
    yield from ((edit,) for some in options for edit in some)
    for one, other in itertools.combinations(options, 2):
        yield from itertools.product(one, other)


def _options(before: nn.Module, old: Shapes, wanted: Shapes) -> list[list[SetConfig]]:
    """For each size in the configuration what it may have become: a size, or a number of equal parts of one."""
    moved: dict[int, set[int]] = defaultdict(set)
    for name, shape in old.items():
        for a, b in zip(shape, wanted.get(name, shape), strict=False):
            if a != b:
                moved[a].add(b)
    found = []
    for setting, value in _numbers(getattr(before, "config", None), ""):
        news = set(moved.get(value, ()))
        for a, several in moved.items():
            if a % value == 0:
                news |= {b * value // a for b in several if b * value % a == 0}
        edits = [SetConfig(setting, value, new) for new in sorted(news - {value}) if new > 0]
        if edits:
            found.append(edits)
    return found


def _numbers(config: Any, prefix: str) -> Iterator[tuple[str, int]]:
    """Every whole number above one in a configuration and those inside it."""
    for name, value in vars(config).items():
        if name.startswith("_") or name.endswith("_token_id"):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield prefix + name, value
        elif hasattr(value, "model_type"):
            yield from _numbers(value, f"{prefix}{name}.")


def _wrong(before: nn.Module, edits: list[SetConfig], wanted: Shapes) -> float:
    """How many tensors of a model built so have another shape; infinite if it cannot be built."""
    try:
        built = _shapes(_built(before, edits, "meta"))
    except Exception:  # whatever the class raises: such numbers do not go together
        return float("inf")
    return sum(built.get(name) != shape for name, shape in wanted.items()) + len(built.keys() - wanted.keys())


def _built(before: nn.Module, edits: list[SetConfig], device: str | None) -> nn.Module:
    """A model of the same class built from the configuration with these numbers."""
    config = copy.deepcopy(before.config)
    holder = nn.Module()
    holder.config = config
    set_config(holder, edits)
    make: Any = type(before)
    with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
        built: nn.Module = make(config)
    return built.eval()
