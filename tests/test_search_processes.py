"""Two processes find what one finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import dataclasses, itertools, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from gate_nets import CountedNet, GatedNet, PlainNet, alphas
from lightning_fabric import Fabric
from morph.search_budget import Meter
from morph.search_loop import Search
from morph.search_progress import Keep
from test_search_loop import FAST, FLAT, X, Y

world = int(sys.argv[2])
fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto")
fabric.launch()
options = dataclasses.replace(FAST, batch_size=12, lambda2=0.1)

def made():
    net = GatedNet()
    keep = Keep(Path(sys.argv[3]), None, {})
    rest = (Meter(CountedNet(), FLAT, "macs"), 50, (X, Y), options.make_loss(), options, fabric, keep)
    return Search(net, PlainNet(), net.gates(), alphas(net), *rest)

calls = itertools.count(1)
try:
    made().run(should_stop=lambda: next(calls) == 7)
except KeyboardInterrupt:
    search = made()
    search.resume()
    found = search.run()
    if fabric.is_global_zero:
        print("FOUND" + json.dumps([found.step, found.values.tolist()]))
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    found = []
    (tmp_path / "search.py").write_text(SCRIPT)
    for world in (1, 2):
        command = [sys.executable, str(tmp_path / "search.py"), str(Path(__file__).parent), str(world)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(tmp_path / f"{world}.search")], capture_output=True, text=True, env=environment, timeout=300
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
        assert len(lines) == 1, done.stderr
        found.append(json.loads(lines[0].removeprefix("FOUND")))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-4)
