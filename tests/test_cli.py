"""The command line as a user meets it: help, exit codes, streams, files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import randomise
from torch import nn

import morph
from morph.cli.main import COMMANDS, main
from morph.zoo.darts import DARTS_V2, DartsNet


@pytest.fixture
def student(tmp_path, monkeypatch) -> Path:
    """A small student in our own file, and images for it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    net = randomise(DartsNet(DARTS_V2, layers=4, channels=4))
    morph.save_model(net, tmp_path / "student.pt", input_shape=(3, 32, 32))
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz", images=draw.integers(0, 256, (20, 32, 32, 3), np.uint8), labels=draw.integers(0, 10, 20)
    )
    return tmp_path / "student.pt"


EXPAND = ["expand", "student.pt", "--data", "data.npz", "--target-params", "430K", "--batch-size", "4"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


HELP = """
import sys
from morph.cli.main import main
try:
    main(["--help"])
except SystemExit as error:
    code = error.code
print("heavy", [m for m in ("torch", "numpy", "torchvision", "rich", "matplotlib") if m in sys.modules], code)
"""


def test_help_imports_nothing_heavy():
    """This is what keeps it quick: well under 0.3 s, where torch alone takes two seconds."""
    out = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "heavy [] 0"
    assert all(name in out for name in COMMANDS)
    assert "exit codes: 0 done; 1 a check failed" in out


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: morph {command}" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_names_the_commands(capsys, shell):
    code, out, _ = run(capsys, "--print-completion", shell)
    assert code == 0
    assert all(name in out for name in COMMANDS)


def test_no_command_prints_help_and_is_bad_input(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "usage: morph" in out


def test_unknown_flags_end_with_two(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["expand", "x.pt", "--target-params", "1.4M", "--wat"])
    assert caught.value.code == 2


@pytest.mark.parametrize("text", ["1.4Q", "", "-3M", "0", "nan"])
def test_sizes_that_are_not(capsys, text):
    with pytest.raises(SystemExit) as caught:
        main(["expand", "x.pt", f"--target-params={text}"])
    assert caught.value.code == 2
    assert "is not" in capsys.readouterr().err


def test_sizes_that_are():
    from morph.cli.numbers import size

    assert [size(t) for t in ("1.4M", "90M", "1.2G", "1_400_000", "1,400,000", "3k", "7")] == [
        1_400_000,
        90_000_000,
        1_200_000_000,
        1_400_000,
        1_400_000,
        3_000,
        7,
    ]


def test_expand_writes_teacher_record_and_picture(capsys, student):
    before = student.read_bytes()
    code, out, _ = run(capsys, *EXPAND, "--fisher")
    assert code == 0
    assert student.read_bytes() == before
    assert sorted(p.name for p in student.parent.iterdir()) == [
        "data.npz",
        "student-teacher.json",
        "student-teacher.pt",
        "student-teacher.svg",
        "student.pt",
    ]
    assert "cells.1" in out
    assert "check          outputs: max |difference|" in out
    record = json.loads((student.parent / "student-teacher.json").read_text())
    assert f"parameters     {record['params_before']:,} -> {record['params_after']:,}\n" in out
    teacher = morph.open_model(student.parent / "student-teacher.pt")
    assert sum(p.numel() for p in teacher.model.parameters()) == record["params_after"] >= 430_000
    assert teacher.input_shape == (3, 32, 32)
    x = torch.randn(3, 3, 32, 32)
    original = morph.open_model(student).model
    torch.testing.assert_close(teacher.model.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-5)


def test_json_is_one_document_on_stdout_and_dry_run_writes_nothing(capsys, student):
    code, out, _ = run(capsys, *EXPAND, "--uniform", "--dry-run", "--json")
    assert code == 0
    record = json.loads(out)
    for key in ("params_before", "params_after", "macs_before", "macs_after", "max_abs_diff", "target", "steps"):
        assert key in record
    assert record["written"] == []
    assert sorted(p.name for p in student.parent.iterdir()) == ["data.npz", "student.pt"]


def test_apply_replays_to_the_same_bits(capsys, student):
    run(capsys, *EXPAND, "--random", "--seed", "3")
    code, out, _ = run(capsys, "apply", "student-teacher.json", "student.pt", "--out", "again.pt", "--json")
    assert code == 0
    assert json.loads(out)["max_abs_diff"] < 1e-9
    first, second = (morph.open_model(name).model.state_dict() for name in ("student-teacher.pt", "again.pt"))
    assert list(first) == list(second)
    assert all(torch.equal(first[k], second[k]) for k in first)
    code, _, err = run(capsys, "apply", "student-teacher.json", "student-teacher.pt", "--out", "twice.pt")
    assert code == 2
    assert "looks applied already" in err
    assert not Path("twice.pt").exists()


def bad(capsys, *arguments: str) -> str:
    """Run what must be refused: one line on stderr, nothing on stdout, exit code 2, no new file."""
    before = sorted(p.name for p in Path().iterdir())
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("morph: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(p.name for p in Path().iterdir()) == before
    return err


def test_bad_input_is_one_line(capsys, student):
    assert "none.pt" in bad(capsys, "expand", "none.pt", "--target-params", "1M")
    assert "zoo:darts-11x" in bad(capsys, "expand", "zoo:darts-11x", "--target-params", "1M")
    assert "not above the" in bad(capsys, *EXPAND[:4], "--target-params", "1K")
    assert "widening is another move" in bad(capsys, *EXPAND[:4], "--target-params", "1G")
    assert "no.npz" in bad(capsys, "expand", "student.pt", "--target-params", "430K", "--data", "no.npz")
    assert "exists already" in bad(capsys, *EXPAND, "--out", "student.pt")
    assert "does not exist" in bad(capsys, *EXPAND, "--out", "none/teacher.pt")
    assert "are taken by the record and the picture" in bad(capsys, *EXPAND, "--out", "teacher.json")
    assert "--at nothing" in bad(capsys, *EXPAND, "--at", "nothing")
    assert "does not accept inputs of shape [2, 5, 32, 32]" in bad(capsys, *EXPAND, "--input", "5x32x32")


def test_files_that_are_not_models(capsys, student):
    Path("text.pt").write_text("hello")
    Path("empty.pt").write_bytes(b"")
    Path("half.pt").write_bytes(student.read_bytes()[:1000])
    for name in ("text.pt", "empty.pt", "half.pt", "."):
        bad(capsys, "expand", name, "--target-params", "1M")
        bad(capsys, "report", name)


def test_a_hostile_pickle_runs_nothing(capsys, student):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (Path("ran"),)

    torch.save(Hostile(), "hostile.pt")
    line = bad(capsys, "expand", "hostile.pt", "--target-params", "1M")
    assert "--allow-code" in line or "--trust" in line
    assert not Path("ran").exists()


def test_nothing_to_grow_and_nan_and_wrong_labels(capsys, student):
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (6, 32, 32, 3), np.uint8)
    morph.save_model(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
        "plain.pt",
        input_shape=(3, 32, 32),
    )
    assert "widening is another move" in bad(
        capsys, "expand", "plain.pt", "--target-params", "1M", "--data", "data.npz"
    )
    np.savez("labels.npz", images=images, labels=np.arange(6) + 5)
    assert "labels.npz" in bad(capsys, "expand", "student.pt", "--target-params", "430K", "--data", "labels.npz")
    net = morph.open_model("student.pt").model
    with torch.no_grad():
        net.classifier.bias[0] = float("nan")
    morph.save_model(net, "nan.pt", input_shape=(3, 32, 32))
    assert "is nan" in bad(capsys, "expand", "nan.pt", "--target-params", "430K", "--data", "data.npz")


def test_a_full_disk_costs_nothing(capsys, student, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left on device" in bad(capsys, *EXPAND, "--uniform")


def test_an_interrupt_leaves_nothing(capsys, student, monkeypatch):
    import morph.expansion

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(morph.expansion, "operate", stop)
    code, _, err = run(capsys, *EXPAND, "--uniform")
    assert (code, err) == (130, "morph: interrupted; nothing was written\n")
    assert sorted(p.name for p in Path().iterdir()) == ["data.npz", "student.pt"]


@pytest.mark.parametrize("where", ["real", "python", "accelerator"])
def test_too_little_memory_is_one_line(capsys, student, monkeypatch, where):
    def greedy(*_, **__):
        if where == "real":
            torch.empty(2**60)
        raise (
            MemoryError if where == "python" else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        )

    monkeypatch.setattr("morph.files.open_model", greedy)
    code, out, err = run(capsys, *EXPAND)
    assert (code, out) == (2, "")
    assert err.startswith("morph: out of memory: ")
    assert err.count("\n") == 1
    assert not list(Path().glob("student-teacher*"))


def test_other_errors_are_not_taken_for_it(capsys, student, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("morph.files.open_model", broken)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        run(capsys, *EXPAND)


def test_a_failed_check_ends_with_one(capsys, student, monkeypatch):
    import morph.passes.regroup as home

    right = home.merge_groups
    monkeypatch.setattr(home, "merge_groups", lambda *a: right(*a).flip(1))
    code, out, err = run(capsys, *EXPAND, "--uniform")
    assert code == 1
    assert out == ""
    assert "check failed: the outputs moved by" in err
    assert sorted(p.name for p in Path().iterdir()) == ["data.npz", "student.pt"]
