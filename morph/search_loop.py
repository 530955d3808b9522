"""The steps of a search: weights and gates learn together until the network that would come out is small enough.

Devices, precision and several processes are Lightning Fabric's business.
"""

from __future__ import annotations

import collections
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn

from morph.attaching import attach_gates
from morph.batches import Batch, Data, one_round, round_length
from morph.divergence import kept_at, require_finite
from morph.errors import DataError, SearchError
from morph.inputs import logits_in, picked, run_on
from morph.search_budget import Meter, also, close_in_order
from morph.search_checkpoint import load, random_states, save, set_random_states
from morph.search_losses import kl_divergence
from morph.search_options import GATE_MOMENTUM, SearchLoss, SearchOptions
from morph.search_progress import Found, Keep, Progress
from morph.search_schedule import (
    distances,
    last_gates,
    learning_rate,
    least_penalty,
    order_of_closing,
    paced,
    wanted_size,
)

_ROUND = 1_000_003  # between the seeds of two rounds
_TOLD = 0.01  # by what share the penalty has changed when that is written down


class Search:
    """A search that can be stopped, saved and taken up.

    Args:
        model: The gated model, with the teacher's weights; learns in place.
        teacher: Not touched.
        gates: Its gates by name.
        alpha: Their weights in the penalty.
        meter: Counts what would come out.
        target: Largest size allowed.
        data: Batches.
        loss: What is minimised beside the penalty.
        options: All numbers.
        fabric: Runs it.
        keep: Where its state is kept, and how often; None for nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        gates: dict[str, nn.Module],
        alpha: dict[str, Tensor],
        meter: Meter,
        target: int,
        data: Data,
        loss: SearchLoss,
        options: SearchOptions,
        fabric: Fabric,
        keep: Keep | None,
    ) -> None:
        self.meter, self.target, self.data, self.loss = meter, target, data, loss
        self.options, self.fabric, self.keep = options, fabric, keep
        self.length = round_length(data, options.batch_size)
        self.steps = options.epochs * self.length
        self.gate_lr = options.gate_step(self.steps)
        self.teacher = fabric.to_device(copy.deepcopy(teacher)).eval().requires_grad_(False)
        self.model = fabric.setup_module(model.train())
        self.alpha = meter.flat.join(alpha)
        numbers = {id(gate.weight) for gate in gates.values()}
        weights = [p.requires_grad_(True) for p in model.parameters() if id(p) not in numbers]  # teachers may be frozen
        base = torch.optim.SGD(weights, options.lr, options.momentum, weight_decay=options.weight_decay)
        numbers_of_gates = {"lr": self.gate_lr, "lambda2": options.lambda2, "momentum": GATE_MOMENTUM}
        self.apg = attach_gates(base, gates, weights=alpha, clamp=options.clamp, **numbers_of_gates)
        self.base, self.optimizer = base, cast(_FabricOptimizer, fabric.setup_optimizers(base))
        self.before = self.sparse()  # the sparse iterate when sizes were counted last
        self.looked = 0  # the step at which the penalty was looked at last
        self.least = least_penalty(self.alpha, self.gate_lr, GATE_MOMENTUM, self.steps)
        self.start = meter.size(torch.zeros(len(self.alpha), dtype=torch.bool))
        self.found = Found(lambda2=[[0, options.lambda2]], gate_lr=self.gate_lr)

    def sparse(self) -> Tensor:
        """The sparse iterate of all gates, ``[total]``, on the CPU."""
        return self.meter.flat.join({name: self.apg.sparse(name) for name in self.meter.flat.lengths})

    def run(
        self, on_progress: Callable[[Progress], None] | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Found:
        """Go on until the budget is met.

        Raises:
            DivergedError: If the loss or a weight is not finite; the state that was saved last stays.
            SearchError: If the gates that may close do not meet the budget.
            DataError: If the data ends.
            KeyboardInterrupt: If ``should_stop`` says so; the state is saved before.
        """
        finite = torch.ones((), dtype=torch.bool, device=self.fabric.device)
        try:
            for batch in self._batches():
                loss, logits, wanted = self._step(batch)
                finite &= torch.isfinite(loss)
                self.found.step += 1
                last, stop = self.found.step >= self.steps, should_stop is not None and should_stop()
                saves = self.keep is not None and self.found.step % (self.keep.every or self.length) == 0
                counts = self.found.step % self.options.count_every == 0
                if last or stop or saves or counts:
                    require_finite(finite, loss, self.model.parameters(), self.found.step, self.keep)
                if (last or counts) and (self._count(loss, logits, wanted, on_progress) or last):
                    return self._finish()
                if stop or saves:
                    self.save()
                if stop:
                    raise KeyboardInterrupt
        except DataError as error:
            self.save()
            raise DataError(f"{error}{kept_at(self.keep)}") from error
        raise AssertionError  # the batches do not end by themselves

    def _batches(self) -> Iterator[Batch]:
        """The batches from the present step on; of each a share for each process."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        while True:
            number, skip = divmod(self.found.step, self.length)
            states = random_states()
            seed = self.options.seed + _ROUND * (number + 1)
            batches = one_round(self.data, self.options.batch_size, seed, self.fabric.device)
            if skip:  # taken up in the middle of a round
                collections.deque(islice(batches, skip), maxlen=0)
                set_random_states(states)
            for x, y in batches:
                yield picked(x, slice(rank, None, world)), y[rank::world]
            if self.found.step < (number + 1) * self.length:
                done = self.found.step - number * self.length
                raise DataError(f"the data ended early: round {number + 1} gave {done} of {self.length} batches")

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """One step of weights and gates."""
        x, y = batch
        wanted = None
        if self.loss.needs_teacher:
            with torch.no_grad(), self.fabric.autocast():
                wanted = logits_in(run_on(self.teacher, x))
        for group in self.base.param_groups[:-1]:  # the last one is that of the gates
            group["lr"] = learning_rate(self.options.lr, self.found.step, self.steps)
        self.optimizer.zero_grad()
        logits = cast(Tensor, logits_in(run_on(self.model, x)))
        wanted = None if wanted is None else wanted.to(logits.dtype)  # the teacher's are coarse in mixed precision
        loss = self.loss(logits, cast(Tensor, wanted), y).mean()  # a loss that needs no teacher does not look
        self.fabric.backward(loss)
        self.optimizer.step()
        return loss.detach(), logits.detach(), wanted

    def _count(
        self, loss: Tensor, logits: Tensor, wanted: Tensor | None, on_progress: Callable[[Progress], None] | None
    ) -> bool:
        """Whether the budget is met; otherwise adjust the penalty."""
        sparse = self.sparse()
        closed = sparse == 0
        sizes = self.meter.sizes(closed)
        kl = None if wanted is None else float(kl_divergence(logits, wanted, self.options.tau).mean())
        met = self.meter.size(closed) <= self.target
        if not met:
            self.before = sparse
            self._adjust(sparse, closed)
        counts = (len(closed) - int(closed.sum()), len(closed), sizes.params, sizes.macs)
        progress = Progress(self.found.step, self.steps, float(loss), kl, *counts, self.lambda2)
        self.found.history.append(asdict(progress))
        if on_progress is not None:
            on_progress(progress)
        return met

    @property
    def lambda2(self) -> float:
        """Strength of the penalty at present."""
        return float(self.apg.param_groups[0]["lambda2"])

    def _adjust(self, sparse: Tensor, closed: Tensor) -> None:
        """Raise the penalty where the network is larger than it should be by now, lower it where it is smaller."""
        step = self.found.step
        size, wanted = self.meter.size(closed), wanted_size(self.start, self.target, step, self.steps)
        behind, passed = (size - wanted) / (self.start - self.target), (step - self.looked) / self.steps
        value = max(self.options.lambda2, paced(self.lambda2, self.least, behind, passed))
        self.looked = step
        for group in self.apg.param_groups:
            group["lambda2"] = value
        if not math.isclose(value, self.found.lambda2[-1][1], rel_tol=_TOLD):
            self.found.lambda2.append([step, value])
        last = last_gates(distances(sparse, self.alpha), self.meter.flat.lengths.values())
        spares = self.meter.size(closed | ~last) <= self.target
        self._weigh(torch.where(last, self.options.lambda2 / value, 1.0) if spares and value else None)

    def _weigh(self, share: Tensor | None) -> None:
        """Lay a share ``[total]`` of the penalty on each gate: the last ones of a site bear no more than at first."""
        weights = self.meter.flat.split(self.alpha if share is None else self.alpha * share)
        for name, gate in self.apg.named().items():
            self.apg.state[gate]["alpha"].copy_(weights[name])

    def _finish(self) -> Found:
        """Close as many gates as the budget asks for, the nearest to zero first, the last ones of a site at the end."""
        sparse, found = self.sparse(), self.found
        shut = sparse == 0
        met = self.meter.size(shut) <= self.target
        if met:  # those that closed since the last count need not all be closed
            stays = shut & (self.before == 0)
            far = torch.where(shut, distances(self.before, self.alpha), torch.inf)
        else:
            stays, far = shut, distances(sparse, self.alpha)
        last = last_gates(far, self.meter.flat.lengths.values())
        order = order_of_closing(torch.where(shut == met, far, 0.0), last)
        number = close_in_order(self.meter, stays, order, self.target)
        if number is None:
            raise SearchError(f"the gates that may close do not meet the budget{kept_at(self.keep)}")
        found.closed = also(stays, order, number)
        found.values = torch.where(found.closed, 0.0, torch.where(shut, self.before, sparse))
        found.reopened, found.forced = (len(order) - number, 0) if met else (0, number)
        return found

    def save(self) -> None:
        """Write the state, if there is a place for it."""
        if self.keep is None:
            return
        randoms = [random_states()]
        if self.fabric.world_size > 1:
            randoms *= self.fabric.world_size
            torch.distributed.all_gather_object(randoms, random_states())
        if self.fabric.is_global_zero:
            found = {key: value for key, value in vars(self.found).items() if value is not None}
            parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "found": found}
            rest = {"alpha": self.alpha, "before": self.before, "looked": self.looked, "random": randoms}
            save(self.keep.path, parts | rest, self.keep.identity)
        self.fabric.barrier()

    def resume(self) -> None:
        """Go on from the saved state; errors as `morph.search_checkpoint.load`."""
        assert self.keep is not None
        state = load(self.keep.path, self.keep.identity)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.alpha = state["alpha"]  # measured latencies would be others now
        self.found = Found(**state["found"])
        self.before, self.looked = state["before"], state["looked"]
        set_random_states(state["random"][self.fabric.global_rank])
