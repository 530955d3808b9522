"""Two processes train as one does, stop together, and go on together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import morph
from morph.data import open_data
from morph.zoo import build

SCRIPT = """
import itertools, json, sys
from pathlib import Path
import torch
from lightning_fabric import Fabric
from torch import nn
import morph
from morph.teaching.distillation import Distillation
from morph.teaching.feature_losses import Hint
from morph.teaching.losses import SoftLabels
from morph.teaching.terms import Features

world = int(sys.argv[1])
fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto")
fabric.launch()
draw = torch.Generator().manual_seed(3)
x = torch.randn(31, 1, 4, 4, generator=draw)
y = (x.mean((1, 2, 3)) * 20).long() % 3
inputs = {"input": x} if world > 1 else x  # by name, as a mapping is shared out too
options = dict(epochs=4, batch_size=10, lr=0.2, clip=1.0, accumulate=2, validation=(x[:7], y[:7]))

def network(width):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * width, 3))

def made():
    torch.manual_seed(9)
    teacher = network(7)
    torch.manual_seed(fabric.global_rank)  # each process begins with other weights: the first one's count
    terms = [SoftLabels(3.0, 0.6), Features(Hint(), [("1", "1")])]
    return Distillation(network(5), teacher, terms, example_inputs=x[:2])

def run(**more):
    objective = made()
    return objective, morph.fit(objective, (inputs, y), fabric=fabric, checkpoint=Path(sys.argv[2]), **options, **more)

calls = itertools.count(1)
asks = fabric.global_rank == world - 1  # one of the processes is asked to stop
try:
    run(should_stop=lambda: asks and next(calls) == 6)
except KeyboardInterrupt:
    objective, fitted = run()
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in fitted.history]
    if fabric.is_global_zero:
        values = [p.flatten() for p in objective.parameters()]
        assert len(values) == 6  # of the student and of the adapter
        print("FOUND" + json.dumps([rows, torch.cat(values).tolist()]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    found = []
    (tmp_path / "train.py").write_text(SCRIPT)
    for world in (1, 2):
        command = [sys.executable, str(tmp_path / "train.py"), str(world), str(tmp_path / f"{world}.state")]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        assert len(lines) == 1, done.stderr
        found.append(json.loads(lines[0].removeprefix("FOUND")))
    (one, weights), (two, others) = found
    assert others == pytest.approx(weights, abs=1e-5)
    assert [row["step"] for row in one] == [row["step"] for row in two] == [4, 8, 12, 16]
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, abs=1e-5)


@pytest.mark.slow
def test_the_command_starts_its_processes(tmp_path):
    program = Path(sys.executable).parent / "morph"
    command = [str(program), "evaluate", "zoo:darts-10-trained", "--limit", "20", "--batch-size", "8", "--json"]
    command += ["--device", "cpu", "--devices", "2", "--strategy", "ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run():
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)

    done = run()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])["models"][0]
    images = open_data(None, input_shape=(3, 32, 32), num_classes=10, limit=20)
    assert found["top1"] == morph.evaluate(build("darts-10-trained"), images).top1
    assert found["images"] == 20
    command[2] = "missing.pt"
    done = run()
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("morph: missing.pt")]) == 1
    assert "Traceback" not in done.stderr
