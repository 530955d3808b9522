"""The other workers of `morph search` on this machine: the same command once more, each in a process of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from morph.cli import console

START = (sys.executable, "-m", "morph.cli.main")
"""What starts the command once more."""


class Workers:
    """Starts all workers of ``--workers`` but this process itself, which is one too.

    Each writes what it has to say to ``worker-N.log`` in the folder of the search.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.processes: list[tuple[subprocess.Popen[bytes], Path]] = []

    def __enter__(self) -> Self:
        """Start them."""
        number = self.args.workers or 1
        if number > 1:
            import torch

            threads = max(1, (os.cpu_count() or 1) // number)
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(threads)
            for worker in range(1, number):
                self._start(worker, threads, torch.cuda.device_count())
        return self

    def _start(self, worker: int, threads: int, cards: int) -> None:
        """Start one, on a card of its own where there are several."""
        argv = [*START, *self.args.argv, "--workers", "1", "--join"]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if cards > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(worker % cards)
        self.args.out.mkdir(parents=True, exist_ok=True)
        log = self.args.out / f"worker-{worker}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment)
        self.processes.append((process, log))

    def wait(self) -> None:
        """Wait for all, and say which of them ended badly; their trials were taken up."""
        for process, log in self.processes:
            code = process.wait()
            if code:
                console.note(f"note: a worker ended with exit code {code}, see {log}; its trial was taken up by others")
        self.processes = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let those that still run finish their step and give their trials back."""
        for process, _ in self.processes:
            if process.poll() is None:
                process.send_signal(2)
        for process, _ in self.processes:
            process.wait()
