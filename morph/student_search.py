"""Search for the student inside a teacher that learns best from it.

Source: Gu and Tresp, "Search for Better Students to Learn Distilled Knowledge", ECAI 2020. Every channel gets a gate;
weights and gates learn to match the teacher's softened outputs while an L1 penalty, weighted by what a gate would save,
closes gates; the search stops when the network that would come out meets the budget.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from morph.batches import Data, describe_data
from morph.counts import Counts, count
from morph.fresh_weights import reinitialise, said_of
from morph.inputs import picked, tensors_of
from morph.passes.gates import gates_of
from morph.plan import Plan, Record, Reinitialise
from morph.search_checkpoint import fingerprint, random_states, seed_everything, set_random_states
from morph.search_data import first_inputs
from morph.search_loop import Search
from morph.search_losses import UserLoss
from morph.search_options import SearchOptions
from morph.search_progress import Found, Keep, Progress
from morph.search_space import SearchSpace, drops, open_space, space_facts, thin, with_norms
from morph.surgery import Result, environment, sizes

COMMAND = "prune-for-student"

_ROWS = 500  # of the history that a record holds


def search_student(
    teacher: nn.Module,
    data: Data,
    *,
    target_macs: float | None = None,
    target_params: float | None = None,
    loss: UserLoss | None = None,
    fabric: Fabric | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **options: Any,
) -> Result:
    """Find a student of a given size inside a teacher.

    Args:
        teacher: Gives logits ``[N, C]``, as `morph.inputs.logits_in` finds them; not touched.
        data: An object with ``batches(batch_size, seed)``, a pair of inputs and labels, or a DataLoader or list of
            pairs, of known length; inputs as for `morph.fit`. Its order, and all that is drawn from torch's, NumPy's
            and Python's global states, is decided by the seed; those states are put back.
        target_macs: Largest number of multiply-adds of one sample, or
        target_params: largest number of parameters of the student.
        loss: Instead of that of the mode, ``(student logits, teacher logits, labels)`` to one value per sample.
        fabric: Lightning Fabric with the devices, the precision and, launched, the processes to use. By default one
            device, the fastest that there is, in float32.
        checkpoint: A file that holds the state on the way; if it is there, the search goes on from it.
        checkpoint_every: Steps between two writings of it; by default once in each round through the data.
        on_progress: Told each time that sizes are counted.
        should_stop: Asked after every step; if it says so, the state is written and KeyboardInterrupt raised.
        **options: The fields of `morph.search_options.SearchOptions`: ``mode`` (``kd-weighted``, ``kd``,
            ``np-weighted``, ``np``), ``epochs``, ``lambda2``, ``lr``, ``batch_size``, ``inherit``, ``seed`` and more.

    Returns:
        The student, a plain module without gates, all of whose parameters can be trained, and the record. Its check
        compares, in float64, the gated teacher whose closed gates are zero with the network that was cut out, before
        weights are drawn afresh.

    Raises:
        TargetError: If a number is out of its range, or the target is met already or cannot be reached.
        DataError: If the data does not fit the teacher, or ends.
        DivergedError: If the loss or a weight is not finite.
        SearchError: If the gates that may close do not meet the budget.
        SearchStateError: If the checkpoint cannot be read, or is of another search.
        TraceError, EditError, CheckFailedError, OutputError: As elsewhere.

    Example:
        >>> import torch, morph
        >>> from morph.zoo import build
        >>> data = torch.randn(8, 3, 32, 32), torch.arange(8)
        >>> teacher = build("densenet-bc-10-4")
        >>> found = morph.search_student(teacher, data, target_params=2500, epochs=2, batch_size=4, lr=0.01)
        >>> found.record.after["params"] <= 2500
        True
    """
    numbers = SearchOptions(**options)
    states = random_states()
    try:
        seed_everything(numbers.seed)
        inputs = first_inputs(teacher, data, numbers.batch_size, numbers.seed)
        space = open_space(teacher, inputs, numbers, target_macs=target_macs, target_params=target_params)
        keep = None
        if checkpoint is not None:
            keep = Keep(checkpoint, checkpoint_every, _identity(teacher, data, space, numbers, loss))
        search = _search(teacher, data, space, numbers, loss, fabric or Fabric(devices=1), keep)
        found = search.run(on_progress, should_stop)
        space.gated.model.to(tensors_of(inputs)[0].device)
        return _student(teacher, data, space, numbers, found)
    finally:
        set_random_states(states)


def _search(
    teacher: nn.Module,
    data: Data,
    space: SearchSpace,
    options: SearchOptions,
    loss: UserLoss | None,
    fabric: Fabric,
    keep: Keep | None,
) -> Search:
    """The search, at its beginning or where its state was left."""
    model, alpha, made = space.gated.model, dict(space.alpha), options.make_loss(loss)
    gates: dict[str, nn.Module] = dict(gates_of(model))
    search = Search(model, teacher, gates, alpha, space.meter, space.target, data, made, options, fabric, keep)
    if keep is not None and keep.path.exists():
        search.resume()
    return search


def _identity(
    teacher: nn.Module, data: Data, space: SearchSpace, options: SearchOptions, loss: UserLoss | None
) -> dict[str, Any]:
    """What a checkpoint must share with this search; plain values."""
    return {
        "teacher": fingerprint(teacher.state_dict()),
        "data": repr(describe_data(data)),
        "target": f"{space.target} {space.metric}",
        "loss": options.mode if loss is None else getattr(loss, "__qualname__", type(loss).__name__),
        **dataclasses.asdict(options),
    }


def _student(teacher: nn.Module, data: Data, space: SearchSpace, options: SearchOptions, found: Found) -> Result:
    """Take the closed gates out, draw weights afresh unless they are inherited, and write the record."""
    assert found.closed is not None
    assert found.values is not None
    values = space.flat.split(found.values)
    with torch.no_grad():
        for name, gate in gates_of(space.gated.model).items():
            gate.weight.copy_(values[name])
    space.gated.model.train(teacher.training)
    removed = space.gated.remove(space.flat.split(found.closed))
    plan, model = removed.record.plan, removed.model.requires_grad_(True)
    weights = "those of the search; replayed on the teacher, the plan gives the structure alone"
    if not options.inherit:
        plan = Plan((*plan.edits, Reinitialise(options.seed)))
        others = said_of(reinitialise(model, options.seed, teacher))
        weights = f"drawn afresh, seed {options.seed}, after the check" + (f"; {others}" if others else "")
    after = count(model, picked(space.inputs, slice(0, 1)))
    record = Record(
        command=COMMAND,
        options={f"target_{space.metric}": space.target, **dataclasses.asdict(options)},
        plan=plan,
        before=sizes(space.counts),
        after=sizes(after),
        checks=removed.record.checks,
        details={**removed.record.details, **_details(space, found, after), "weights": weights},
        environment={**environment(teacher, space.inputs), "data": describe_data(data)},
    )
    return Result(model, record)


def _details(space: SearchSpace, found: Found, after: Counts) -> dict[str, Any]:
    """What the record says beside what the removal says."""
    every = -(-len(found.history) // _ROWS)
    closed = space.flat.split(found.closed) if found.closed is not None else {}
    facts = space_facts(space)
    sites = [{**site, "closed": int(closed[site["name"]].sum())} for site in facts["sites"]]
    return {
        **facts,
        "sites": sites,
        "macs_paper_after": with_norms(after),
        "steps": found.step,
        "reopened": found.reopened,
        "forced": found.forced,
        "thin": thin(space.gated.sites, closed),
        "lambda2": found.lambda2,
        "gate_lr": found.gate_lr,
        "drops": drops(space.gated.sites, closed),
        "history": found.history[::-every][::-1],
    }
