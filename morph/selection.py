"""Choose which units to drop: by a share or a target size, in each coupling or over all of them."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from morph.couplings import Choice, Coupling
from morph.errors import TargetError

Ranking = Literal["global", "local"]
Scale = Literal["mean", "macs", "params"]
Normalise = Scale | None
Heads = Literal["whole", "inside", "both"]
Spacing = Literal["geometric", "linear"]
_ROUNDING = 1e-9  # 0.29 * 100 is 28.999999999999996


class Size(Protocol):
    """How large a model is."""

    @property
    def params(self) -> int:
        """Number of parameters."""

    @property
    def macs(self) -> int:
        """Multiply-adds."""


Cost = Callable[[Choice], Size]


def choose_units(
    couplings: Iterable[Coupling] | Mapping[str, Coupling],
    scores: Mapping[str, Tensor],
    cost: Cost,
    *,
    ratio: float | None = None,
    target_params: float | None = None,
    target_macs: float | None = None,
    ranking: Ranking = "global",
    minimum: int = 1,
    multiple: int = 1,
    ignore: Sequence[str] = (),
    normalise: Normalise = "mean",
    ratios: Mapping[str, float] | None = None,
    heads: Heads = "whole",
) -> Choice:
    """Choose the units to drop, those of the lowest scores.

    Ties go to the coupling and the unit that come first. Choices are nested: a larger ratio, or a smaller target, drops
    what a smaller one does, and more.

    Args:
        couplings: What there is.
        scores: One finite number per unit for each coupling, as `morph.unit_scores.score_units` gives them.
        cost: The size of the model after dropping a choice; called some twenty times, and once for each coupling to
            normalise by size.
        ratio: Share of the units to drop, in [0, 1): of each coupling with the local ranking, of all units together
            with the global one. Never more than that; less where ``minimum`` and ``multiple`` say so.
        target_params: Drop as little as makes the model have at most so many parameters; nothing if it has.
        target_macs: The same for multiply-adds, in the unit of ``cost``.
        ranking: ``local`` takes the same share of each coupling, but for one unit where a target lies between;
            ``global`` sets one threshold over all scores.
        minimum: Units that stay in each coupling; at least one stays always.
        multiple: The width that a coupling keeps (its units times the positions of each on its first place) shall be a
            multiple of this; rounded up, so that a coupling that is no wider is left whole.
        ignore: Shell patterns; a coupling whose name or one of whose tensors matches is left whole.
        normalise: What makes scores of different couplings comparable, for the global ranking: ``mean`` divides by the
            mean of the coupling, ``macs`` and ``params`` by what one unit costs (Liu et al., "Group Fisher Pruning",
            ICML 2021), None takes them as they are.
        ratios: Shares for couplings by pattern (as for ``ignore``; the first that matches), cut on their own before
            anything else; the rest is chosen as above, or left whole without ``ratio`` or target.
        heads: Which to take where couplings overlap, as whole heads and the positions inside them (or whole groups and
            the channels inside them) do: ``whole`` ones, those ``inside``, or ``both``.

    Returns:
        For each coupling that loses units, their numbers, ascending.

    Raises:
        TargetError: If an option is out of its range, there is not exactly one of ratio and targets (``ratios`` alone
            will do), scores do not fit, or a target is out of reach; says the nearest that can be reached.
    """
    _check_options(ratio, ratios, ranking, minimum, multiple, normalise, heads)
    _check_goal(ratio, target_params, target_macs, ratios)
    found = list(couplings.values() if isinstance(couplings, Mapping) else couplings)
    found = choose_families([c for c in found if not matches(c, ignore)], heads)
    values = {c.name: _score_of(c, scores) for c in found}
    queues = [_Queue(c, values[c.name], minimum, multiple) for c in found]
    own = {q.coupling.name: _own_ratio(q.coupling, ratios or {}) for q in queues}
    fixed: Choice = {}
    for queue in queues:
        fixed |= queue.drop(_share(own[queue.coupling.name] or 0.0, queue.coupling.units))
    free = [queue for queue in queues if own[queue.coupling.name] is None]
    levels = _local(free) if ranking == "local" else _global(free, normalise, cost)
    if ratio is not None:
        return fixed | levels.at_ratio(ratio)
    for name, target in (("params", target_params), ("macs", target_macs)):
        if target is not None:
            return _meet(levels, fixed, cost, name, target)
    return fixed


def matches(coupling: Coupling, patterns: Sequence[str]) -> bool:
    """Whether a shell pattern fits the name of a coupling or of one of its tensors; a name fits itself."""
    if not patterns:
        return False
    names = {coupling.name, *(place.tensor for place in coupling.places)}
    return any(p in names or any(fnmatch.fnmatchcase(name, p) for name in names) for p in patterns)


def choose_families(couplings: Sequence[Coupling], heads: Heads) -> list[Coupling]:
    """Take couplings that do not overlap, first those of the wanted kind, then those of more units.

    Args:
        couplings: What there is, in order.
        heads: ``whole`` prefers couplings of one block, ``inside`` those with a position in each of several blocks;
            ``both`` takes everything.
    """
    if heads == "both":
        return list(couplings)
    order = sorted(couplings, key=lambda c: ((c.blocks > 1) == (heads == "whole"), -c.units))
    taken: set[str] = set()
    blocked: set[str] = set()
    for coupling in order:
        if coupling.name not in blocked and taken.isdisjoint(coupling.overlaps):
            taken.add(coupling.name)
            blocked.update(coupling.overlaps)
    return [c for c in couplings if c.name in taken]


def schedule(steps: int, start: float, target: float, *, spacing: Spacing = "geometric") -> list[float]:
    """The sizes to reach one after another on the way from ``start`` to ``target``; the last is ``target`` itself.

    Args:
        steps: How many.
        start: The present size; above zero.
        target: The size wanted; above zero.
        spacing: ``geometric`` removes the same share in each step, ``linear`` the same amount.

    Raises:
        TargetError: If one of them is out of its range.
    """
    if steps < 1 or start <= 0 or target <= 0:
        raise TargetError(f"a schedule needs steps, start and target above zero, got {steps}, {start:g} and {target:g}")
    if spacing not in get_args(Spacing):
        raise TargetError(f"{spacing!r} is not one of {', '.join(get_args(Spacing))}")
    shares = [step / steps for step in range(1, steps)]
    if spacing == "linear":
        return [*(start + (target - start) * share for share in shares), target]
    return [*(start * (target / start) ** share for share in shares), target]


class _Queue:
    """The units of one coupling in the order in which they go, and how many may go."""

    def __init__(self, coupling: Coupling, scores: NDArray[np.float64], minimum: int, multiple: int) -> None:
        self.coupling, self.scores = coupling, scores
        self.order = np.argsort(scores, kind="stable")
        self.step = multiple // math.gcd(multiple, coupling.places[0].positions.shape[1])
        self.most = self.rounded(max(coupling.units - minimum, 0))

    def rounded(self, count: int) -> int:
        """At most ``count`` units, such that what stays is a multiple."""
        kept = -(-(self.coupling.units - count) // self.step) * self.step
        return max(self.coupling.units - kept, 0)

    def drop(self, count: int) -> Choice:
        """The lowest ``count`` units, or as many of them as may go."""
        units = self.order[: self.rounded(min(count, self.most))]
        return {self.coupling.name: np.sort(units).astype(np.int64)} if len(units) else {}


class _Levels:
    """Nested choices, from none to everything that may go.

    Args:
        queues: The couplings.
        counts: How many units of each go at a level.
        highest: The last level; level 0 drops nothing.
        within: Whether a level stays within a ratio.
    """

    def __init__(
        self,
        queues: Sequence[_Queue],
        counts: Callable[[int], Sequence[int]],
        highest: int,
        within: Callable[[int, float], bool],
    ) -> None:
        self.queues, self.counts, self.highest, self.within = queues, counts, highest, within

    def choice(self, level: int) -> Choice:
        """What is dropped at a level."""
        result: Choice = {}
        for queue, count in zip(self.queues, self.counts(level), strict=True):
            result |= queue.drop(count)
        return result

    def at_ratio(self, ratio: float) -> Choice:
        """The highest level within a ratio."""
        low, high = 0, self.highest
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.within(middle, ratio) else (low, middle - 1)
        return self.choice(low)


def _local(queues: Sequence[_Queue]) -> _Levels:
    """Levels are numbers of units in one order over all couplings: by the share of its own that is gone with each."""
    shares = [np.arange(1, queue.coupling.units) / queue.coupling.units for queue in queues]
    together = np.concatenate([*shares, np.zeros(0)])
    order = np.argsort(together, kind="stable")
    owner = np.repeat(np.arange(len(queues)), [len(some) for some in shares])[order]
    reached = np.concatenate([[0.0], together[order]])
    counts = partial(_owned, owner, len(queues))
    return _Levels(queues, counts, len(owner), lambda level, ratio: bool(reached[level] <= ratio + _ROUNDING))


def _owned(owner: NDArray[np.int64], queues: int, level: int) -> list[int]:
    """How many of the first units of an order belong to each coupling."""
    return [int(n) for n in np.bincount(owner[:level], minlength=queues)]


def _global(queues: Sequence[_Queue], normalise: Normalise, cost: Cost) -> _Levels:
    """Levels are numbers of units in one order over all couplings."""
    total = sum(queue.coupling.units for queue in queues)
    lowest = [_normalised(queue, normalise, cost)[queue.order[: queue.most]] for queue in queues]
    owner = np.repeat(np.arange(len(queues)), [len(some) for some in lowest])
    order = np.argsort(np.concatenate([*lowest, np.zeros(0)]), kind="stable")
    owner = owner[order]

    counts = partial(_owned, owner, len(queues))

    def within(level: int, ratio: float) -> bool:
        dropped = sum(q.rounded(count) for q, count in zip(queues, counts(level), strict=True))
        return dropped <= _share(ratio, total)

    return _Levels(queues, counts, len(owner), within)


def _normalised(queue: _Queue, normalise: Normalise, cost: Cost) -> NDArray[np.float64]:
    """Scores that can be compared with those of other couplings."""
    if normalise is None or not queue.most:
        return queue.scores
    if normalise == "mean":
        mean = float(np.abs(queue.scores).mean())
        return queue.scores / mean if mean else queue.scores
    before, after = cost({}), cost({queue.coupling.name: queue.order[:1].astype(np.int64)})
    saved = before.macs - after.macs if normalise == "macs" else before.params - after.params
    return queue.scores / saved if saved > 0 else np.full_like(queue.scores, np.inf)


def _meet(levels: _Levels, fixed: Choice, cost: Cost, name: str, target: float) -> Choice:
    """The lowest level that is not above a target."""

    def size(level: int) -> int:
        after = cost(fixed | levels.choice(level))
        return after.params if name == "params" else after.macs

    if size(0) <= target:
        return fixed
    low, high = 0, levels.highest
    smallest = size(high)
    if smallest > target:
        raise TargetError(
            f"target_{name} {target:.0f} is out of reach: at least {smallest} {name} stay when every coupling that may "
            f"be cut is at its smallest; ask for that or more, or leave less whole (minimum, multiple, ignore)"
        )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) <= target else (middle, high)
    return fixed | levels.choice(high)


def _share(ratio: float, units: int) -> int:
    """How many units a share is, rounded down."""
    return math.floor(ratio * units + _ROUNDING)


def _own_ratio(coupling: Coupling, ratios: Mapping[str, float]) -> float | None:
    return next((ratio for pattern, ratio in ratios.items() if matches(coupling, [pattern])), None)


def _score_of(coupling: Coupling, scores: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """The scores of a coupling as an array."""
    if coupling.name not in scores:
        raise TargetError(f"there is no score for {coupling.name}; score all couplings, or ignore it")
    values = np.asarray(scores[coupling.name].detach().cpu().double().numpy())
    if values.shape != (coupling.units,) or not np.isfinite(values).all():
        raise TargetError(
            f"the scores of {coupling.name} must be {coupling.units} finite numbers, got shape {list(values.shape)}, "
            f"{int(np.isfinite(values).sum())} finite"
        )
    return values


def _check_options(
    ratio: float | None,
    ratios: Mapping[str, float] | None,
    ranking: str,
    minimum: int,
    multiple: int,
    normalise: str | None,
    heads: str,
) -> None:
    """Refuse options out of their range."""
    for share in [*([] if ratio is None else [ratio]), *(ratios or {}).values()]:
        if not 0 <= share < 1:
            raise TargetError(f"a ratio is the share of units to drop, from 0 to below 1, got {share}")
    for text, value in (("minimum", minimum), ("multiple", multiple)):
        if value < 1:
            raise TargetError(f"{text} must be at least 1, got {value}")
    scales = (None, *get_args(Scale))
    for option, allowed in ((ranking, get_args(Ranking)), (heads, get_args(Heads)), (normalise, scales)):
        if option not in allowed:
            raise TargetError(f"{option!r} is not one of {', '.join(map(str, allowed))}")


def _check_goal(
    ratio: float | None, params: float | None, macs: float | None, ratios: Mapping[str, float] | None
) -> None:
    """Refuse two goals, or none."""
    given = [
        name
        for name, value in (("ratio", ratio), ("target_params", params), ("target_macs", macs))
        if value is not None
    ]
    if len(given) > 1 or not (given or ratios):
        raise TargetError(f"give one of ratio, target_params and target_macs, got {' and '.join(given) or 'none'}")
