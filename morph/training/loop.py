"""The steps of a training run, one round through the data after another.

Devices, precision, mixed precision's scaling of losses and several processes are Lightning Fabric's business.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricOptimizer
from torch import Tensor, nn

from morph.batches import round_length
from morph.divergence import kept_at, require_finite
from morph.errors import DataError, DivergedError, MorphError, TrainingError, TrainingStateError
from morph.inputs import moved
from morph.search_checkpoint import Kind, load, random_states, save, set_random_states
from morph.search_progress import Keep
from morph.teaching.objective import labels_of
from morph.training.evaluation import Scores, score
from morph.training.options import FitOptions
from morph.training.progress import FitProgress, Fitted
from morph.training.rounds import Batch, fine_type, parts, seeded_round, share

STATE = Kind("training run", 1, TrainingStateError)

_ROUND = 1_000_003  # between the seeds of two rounds
_LOOK_EVERY = 20  # steps between two looks at the loss, each of which waits for the device


class Run:
    """A training run that can be stopped, saved and taken up.

    Args:
        objective: Called with a batch, gives a `morph.teaching.objective.Step`; its ``student`` is validated.
        data: Batches.
        validation: What the student is validated on; None for nothing.
        options: All numbers.
        fabric: Runs it.
        keep: Where its state is kept, and how often; None for nowhere.
        on_round: Given the history after each round, after the state was saved, and when a run is taken up.
        log_prefix: In front of the names of what the loggers of ``fabric`` get.
    """

    def __init__(
        self,
        objective: nn.Module,
        data: Any,
        validation: Any,
        options: FitOptions,
        fabric: Fabric,
        keep: Keep | None = None,
        on_round: Callable[[Fitted], None] | None = None,
        log_prefix: str = "",
    ) -> None:
        self.data, self.validation, self.options = data, validation, options
        self.fabric, self.keep, self.on_round = fabric, keep, on_round
        self.log_prefix = log_prefix
        self.length = round_length(data, options.batch_size)
        self.steps = options.epochs * self.length
        if options.channels_last:
            objective.to(memory_format=torch.channels_last)
        self.student = cast(nn.Module, objective.student)
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.module = fabric.setup_module(objective.train())
        self.optimizer = cast(_FabricOptimizer, fabric.setup_optimizers(options.make_optimizer(self.trained)))
        self.done = Fitted()
        self.fine = fine_type(fabric.device)
        self.sums: dict[str, Tensor] = {}  # over the round so far
        self.seconds, self.started = 0.0, time.perf_counter()
        self.finite = torch.ones((), dtype=torch.bool, device=fabric.device)

    def run(
        self,
        on_progress: Callable[[FitProgress], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        pause_after: int | None = None,
    ) -> Fitted:
        """Go on until the last round is over, or that of ``pause_after``.

        Raises:
            DivergedError: If the loss, a weight or an output is not finite; the state that was saved last stays.
            DataError: If the data ends.
            KeyboardInterrupt: If ``should_stop`` says so; the state is saved before.
        """
        self.started = time.perf_counter()
        end = self.steps if pause_after is None else min(self.steps, pause_after * self.length)
        while self.done.step < end:
            for batch in self._batches():
                loss = self._step(batch)
                self.done.step += 1
                ends = self.done.step % self.length == 0
                stop = should_stop is not None and self._agreed(should_stop())
                saves = ends or (self.keep is not None and self.done.step % (self.keep.every or self.length) == 0)
                if saves or stop or self.done.step % _LOOK_EVERY == 0:
                    require_finite(self.finite, loss, self.trained, self.done.step, self.keep)
                    row = self._end_round() if ends else None
                    if stop or saves:
                        self.save()
                    self._log(row)
                    if on_progress is not None:
                        on_progress(self._progress(loss, row))
                if stop and self.done.step < self.steps:
                    raise KeyboardInterrupt
        return self.done

    def _agreed(self, stop: bool) -> bool:
        """Whether any of the processes was asked to stop: all stop after the same step."""
        if self.fabric.world_size == 1:
            return stop
        asked = torch.tensor(float(stop), device=self.fabric.device)
        return bool(cast(Tensor, self.fabric.all_reduce(asked, reduce_op="sum")) > 0)

    def _batches(self) -> Iterator[Batch]:
        """The batches of the present round, from the present step on."""
        number, skip = divmod(self.done.step, self.length)
        states = random_states()
        batches = seeded_round(self.data, self.options.batch_size, self.options.seed + _ROUND * (number + 1))
        if skip:  # taken up in the middle of a round
            collections.deque(islice(batches, skip), maxlen=0)
            set_random_states(states)
        yield from batches
        if self.done.step < (number + 1) * self.length:
            got = self.done.step - number * self.length
            self.save()
            raise DataError(
                f"the data ended early: round {number + 1} gave {got} of {self.length} batches{kept_at(self.keep)}"
            )

    def _step(self, batch: Batch) -> Tensor:
        """One step; gives the loss of this process's share, detached."""
        options = self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate(self.done.step, self.length)
        self.optimizer.zero_grad()
        mine, weight = share(batch, self.fabric.global_rank, self.fabric.world_size)
        mine = moved(mine, self.fabric.device, options.channels_last)
        pieces = list(parts(mine, options.accumulate))
        total = torch.zeros((), device=self.fabric.device)
        for i, (piece, portion) in enumerate(pieces):
            with self.fabric.no_backward_sync(self.module, enabled=i < len(pieces) - 1):
                step = self.module(*piece)
                scale = weight * portion
                self.fabric.backward(step.loss if scale == 1 else step.loss * scale)
            loss = step.loss.detach()
            total += loss * portion
            self._add(step, loss, piece, portion if weight else 0.0)
        if options.clip is not None:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=options.clip, error_if_nonfinite=False)
        self.optimizer.step()
        self.finite &= torch.isfinite(total)
        return total

    def _add(self, step: Any, loss: Tensor, batch: Batch, weight: float) -> None:
        """Add a batch to the sums of the round, which stay on the device."""
        if not weight:
            return
        labels = labels_of(batch[1])
        number = len(labels)
        found = {"loss": loss * number}
        if step.logits is not None:  # a stage of hints has none
            found["hits"] = (step.logits.detach().argmax(1) == labels).sum()
        found |= {f"part_{name}": value.detach() * number for name, value in step.parts.items()}
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.to(self.fine)
        self.sums["number"] = self.sums.get("number", torch.zeros_like(self.sums["loss"])) + number

    def _end_round(self) -> dict[str, Any]:
        """Write the row of a round, with the validation that follows it."""
        epoch, options = self.done.step // self.length, self.options
        sums = self.sums
        if self.fabric.world_size > 1:
            sums = cast(dict[str, Tensor], self.fabric.all_reduce(sums, reduce_op="sum"))
        means = {name: float(value / sums["number"]) for name, value in sums.items() if name != "number"}
        row: dict[str, Any] = {"epoch": epoch, "step": self.done.step}
        row |= {"lr": options.learning_rate(self.done.step - 1, self.length)}
        row["loss"] = means.pop("loss")
        if "hits" in means:
            row["top1"] = means.pop("hits")
        row |= means
        if self.validation is not None and (epoch % options.validate_every == 0 or epoch == options.epochs):
            scores = self._validate()
            row |= {"val_loss": scores.loss, "val_top1": scores.top1, "val_top5": scores.top5}
            if self.done.best_epoch is None or scores.top1 > self.done.history[self.done.best_epoch - 1]["val_top1"]:
                self.done.best_epoch = epoch
                self.done.best = {k: v.detach().cpu().clone() for k, v in self.student.state_dict().items()}
        now = time.perf_counter()
        self.seconds, self.started = self.seconds + now - self.started, now
        self.done.history.append(row | {"seconds": round(self.seconds, 3)})
        self.sums, self.seconds = {}, 0.0
        return self.done.history[-1]

    def _log(self, row: dict[str, Any] | None) -> None:
        """Hand the history on after a round."""
        if row is None:
            return
        values = {f"{self.log_prefix}{key}": value for key, value in row.items() if key != "step"}
        self.fabric.log_dict(values, step=self.done.step)
        if self.on_round is not None and self.fabric.is_global_zero:
            self.on_round(self.done)

    def _validate(self) -> Scores:
        """Scores of the student; of several processes, the first one's running means count."""
        if self.fabric.world_size > 1:
            for buffer in self.student.buffers():
                buffer.copy_(self.fabric.broadcast(buffer))
        try:
            return score(
                self.student, self.validation, self.options.batch_size, self.fabric, self.options.channels_last
            )
        except MorphError as error:
            kind = DivergedError if isinstance(error, TrainingError) else type(error)  # the run failed, not its input
            raise kind(f"validation after step {self.done.step}: {error}{kept_at(self.keep)}") from error

    def _progress(self, loss: Tensor, row: dict[str, Any] | None) -> FitProgress:
        step = self.done.step
        rate = self.options.learning_rate(step - 1, self.length)
        epoch = math.ceil(step / self.length)
        return FitProgress(step, self.steps, epoch, self.options.epochs, float(loss), rate, row)

    def save(self) -> None:
        """Write the state, if there is a place for it."""
        if self.keep is None:
            return
        randoms = [random_states()]
        if self.fabric.world_size > 1:
            randoms *= self.fabric.world_size
            torch.distributed.all_gather_object(randoms, random_states())
        sums = [self.sums]
        if self.fabric.world_size > 1:
            sums *= self.fabric.world_size
            torch.distributed.all_gather_object(sums, self.sums)
        if self.fabric.is_global_zero:
            spent = self.seconds + time.perf_counter() - self.started
            state = {
                "objective": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "done": vars(self.done),
                "random": randoms,
                "sums": sums,
                "seconds": spent,
            }
            save(self.keep.path, state, self.keep.identity, STATE)
        self.fabric.barrier()

    def resume(self) -> None:
        """Go on from the saved state; errors as `morph.search_checkpoint.load`."""
        assert self.keep is not None
        state = load(self.keep.path, self.keep.identity, STATE)
        self.module.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.done = Fitted(**state["done"])
        rank = self.fabric.global_rank
        self.sums = {name: value.to(self.fabric.device) for name, value in state["sums"][rank].items()}
        self.seconds = state["seconds"]
        set_random_states(state["random"][rank])
        if self.done.history and self.on_round is not None and self.fabric.is_global_zero:
            self.on_round(self.done)
