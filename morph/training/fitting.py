"""Train a student: any objective, any data, one process or many, to be stopped and taken up at any moment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from morph.batches import describe_data
from morph.errors import TrainingError
from morph.search_checkpoint import fingerprint, random_states, seed_everything, set_random_states
from morph.search_progress import Keep
from morph.training.evaluation import check_fit
from morph.training.logs import write_csv
from morph.training.loop import Run
from morph.training.options import FitOptions
from morph.training.progress import FitProgress, Fitted


def fit(
    objective: nn.Module,
    data: Any,
    *,
    validation: Any = None,
    fabric: Fabric | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    log: Path | None = None,
    log_prefix: str = "",
    identity: Mapping[str, Any] | None = None,
    on_progress: Callable[[FitProgress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    pause_after: int | None = None,
    **options: Any,
) -> Fitted:
    """Train what an objective holds, in place.

    Args:
        objective: A module that is called with a batch and gives a `morph.teaching.objective.Step`, such as
            `morph.teaching.objective.Labels`. Its parameters are trained where they ask for a gradient, its
            state_dict is what a checkpoint holds, its ``student`` is validated. Training flags and device are put
            back at the end.
        data: An object with ``batches(batch_size, seed)``, a pair of inputs and targets in memory, or a DataLoader or
            list of such pairs, of known length. Inputs are a tensor, a tuple of arguments or a mapping of named ones,
            with the samples on the first axis of every tensor; targets are labels ``[N]``, or a tuple whose first item
            they are. A mapping with ``labels`` in it, as collators of Hugging Face give, is the pair of the others and
            these. The order, and all that is drawn from torch's, NumPy's and Python's global states, is decided by the
            seed; those states are put back.
        validation: Of the same forms; the student is validated on it, as it is, after each round. None for none.
        fabric: Lightning Fabric with the devices, the precision, the loggers and, launched, the processes to use. Of
            several processes each computes a share of each batch, so that their step is that of one process, but for
            batch norms, which see a share. By default one device, the fastest that there is, in float32.
        checkpoint: A file that holds the state on the way; if it is there, the run goes on from it, and ends with the
            weights that it would have ended with, to the bit on a CPU with the same number of threads.
        checkpoint_every: Steps between two writings of it, beside those at the end of each round through the data.
        log: A ``.csv`` file for the history.
        log_prefix: In front of the names of what the loggers of ``fabric`` get, where several runs share them.
        identity: What else a checkpoint must share with this run, such as the numbers of a loss; plain values.
        on_progress: Told every some steps and at the end of each round.
        should_stop: Asked after every step; if it says so, the state is written and KeyboardInterrupt raised.
        pause_after: Rounds after which it ends for now, with the state written; the same call with a larger number, or
            none, goes on as if there had been no pause. The learning rates are those of the whole run.
        **options: The fields of `morph.training.options.FitOptions`: ``epochs``, ``lr``, ``schedule``, ``optimizer``,
            ``batch_size``, ``seed`` and more.

    Returns:
        The history, and the student's weights after the best round; the student itself holds the last ones.

    Raises:
        TrainingError: If a number is out of its range, or there is nothing to train.
        DivergedError: If the loss, a weight or an output is not finite.
        TrainingStateError: If the checkpoint cannot be read, or is of another run.
        DataError: If the data does not fit the student, or ends.
        TraceError, OutputError: As elsewhere.

    Example:
        >>> import torch, morph
        >>> from morph.teaching.objective import Labels
        >>> data = torch.randn(8, 4), torch.arange(8) % 3
        >>> fitted = morph.fit(Labels(torch.nn.Linear(4, 3)), data, epochs=2, batch_size=4)
        >>> [row["step"] for row in fitted.history]
        [2, 4]
    """
    numbers = FitOptions(**options)
    student = getattr(objective, "student", None)
    if not isinstance(student, nn.Module):
        raise TrainingError(
            f"{type(objective).__name__} has no student; give e.g. morph.teaching.objective.Labels(model)"
        )
    runner = fabric or Fabric(devices=1)
    states = random_states()
    try:
        seed_everything(numbers.seed)
        check_fit(student, data, numbers.batch_size, "the student")
        if validation is not None:
            check_fit(student, validation, numbers.batch_size, "the student")
        keep = None
        if checkpoint is not None:
            facts = _identity(objective, data, validation, numbers, runner) | dict(identity or {})
            facts = runner.broadcast(facts)  # the first process's weights count
            keep = Keep(checkpoint, checkpoint_every, facts)
        with _borrowed(objective, numbers.channels_last):
            run = Run(objective, data, validation, numbers, runner, keep, _logging(log), log_prefix)
            if keep is not None and keep.path.exists():
                run.resume()
            return run.run(on_progress, should_stop, pause_after)
    finally:
        set_random_states(states)


def _logging(log: Path | None) -> Callable[[Fitted], None] | None:
    """What writes the history."""
    return None if log is None else lambda done: write_csv(done.history, log)


@contextmanager
def _borrowed(objective: nn.Module, channels_last: bool) -> Iterator[None]:
    """Give training flags, device and layout back at the end."""
    flags = [(module, module.training) for module in objective.modules()]
    home = next((p.device for p in objective.parameters()), torch.device("cpu"))
    try:
        yield
    finally:
        objective.to(home)
        if channels_last:
            objective.to(memory_format=torch.contiguous_format)
        for module, training in flags:
            module.training = training


def _identity(objective: nn.Module, data: Any, validation: Any, options: FitOptions, fabric: Fabric) -> dict[str, Any]:
    """What a checkpoint must share with this run; plain values."""
    teacher = getattr(objective, "teacher", None)
    facts = {
        "objective": type(objective).__qualname__,
        "weights": fingerprint(objective.state_dict()),
        "data": repr(describe_data(data)),
        "validation": None if validation is None else repr(describe_data(validation)),
        "precision": str(fabric.strategy.precision.precision),
        "processes": fabric.world_size,
        **dataclasses.asdict(options),
    }
    return facts | ({"teacher": fingerprint(teacher.state_dict())} if isinstance(teacher, nn.Module) else {})
