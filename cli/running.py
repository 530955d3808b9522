"""Where a long work runs, and how it is asked to stop."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from morph.cli.data_arguments import positive

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger
    from torch import nn

PROCESSES = """\
several processes and machines:
  --devices 4 starts four processes on this machine, each of which computes its share of every batch. On several
  machines, start the same command on each with torchrun, which tells them of one another:
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      --no-python morph COMMAND ... --devices 4 --nodes 2"""


def add_device(parser: argparse.ArgumentParser, *, processes: bool = False) -> None:
    """Add the device and the precision, and if asked for the number of processes."""
    group = parser.add_argument_group("where it runs")
    group.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default %(default)s)")
    group.add_argument(
        "--precision",
        choices=["32-true", "bf16-mixed", "16-mixed"],
        default="32-true",
        help="default %(default)s",
    )
    if processes:
        group.add_argument(
            "--devices",
            type=positive,
            default=1,
            metavar="N",
            help="devices of each machine, with one process for each (default %(default)s)",
        )
        group.add_argument(
            "--nodes", type=positive, default=1, metavar="N", help="machines; see below (default %(default)s)"
        )
        group.add_argument(
            "--strategy",
            default="auto",
            metavar="NAME",
            help="of Lightning Fabric: ddp, or ddp_find_unused_parameters_true where a loss does not reach all "
            "parameters (default %(default)s)",
        )


def fabric_from(args: argparse.Namespace, loggers: Sequence[Logger] = ()) -> Fabric:
    """Where it runs; with several processes, all of them are started.

    Raises:
        DeviceError: If there is no such device.
    """
    from lightning_fabric import Fabric

    from morph.errors import DeviceError

    number, nodes = getattr(args, "devices", 1), getattr(args, "nodes", 1)
    more = {"strategy": args.strategy, "num_nodes": nodes} if hasattr(args, "strategy") else {}
    try:
        fabric = Fabric(
            accelerator=args.device, devices=number, precision=args.precision, loggers=list(loggers), **more
        )
        if number * nodes > 1:
            fabric.launch()
    except Exception as error:  # whatever Fabric raises
        raise DeviceError(f"--device {args.device} --precision {args.precision}: {error}") from error
    args.speaks = fabric.is_global_zero
    return fabric


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C be a request that the running step is finished before, and the second an interruption."""
    asked = False

    def handle(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def draw_afresh(args: argparse.Namespace, model: nn.Module) -> None:
    """Draw all weights of a model by ``--seed``; what was done goes into ``args.begin``, for the record."""
    from morph.cli import console
    from morph.fresh_weights import reinitialise, said_of

    others = said_of(reinitialise(model, args.seed))
    args.begin = f"drawn afresh, seed {args.seed}" + (f"; {others}" if others else "")
    if others:
        console.note(f"drawn afresh: {others}")


def interrupted(args: argparse.Namespace, kept: Path) -> int:
    """Say how to go on, and give the exit code."""
    from morph.cli import console

    if getattr(args, "speaks", True):
        console.error(f"interrupted; the same command goes on from {kept}" if kept.exists() else "interrupted")
    return 130
